"""Images as a modality of cohorts: patches, modes, missing and damaged files, encoders, stores."""

import json
import re
import zipfile
from collections.abc import Callable
from io import BytesIO
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from motet import experiments
from motet.io import Bags, Classes, CohortError, FeatureStore, load_cohort, load_encoder
from motet.io.cohorts import encode_images, images
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import roc_auc_score

from .conftest import data_path

YAML = """\
name: moles
patient: id
tables:
  t: {file: t.csv}
outcome: {table: t, label: bad}
modalities:
  mole: {images: photos, table: t, column: photo, file: "{}.png", patch: 4}
"""
TABLE = "id,photo,bad\n1,a,0\n2,b,1\n3,c,0\n1,d,0\n"
RNG = np.random.default_rng(0)
PIXELS = {name: RNG.integers(0, 256, (9, 14, 3), dtype=np.uint8) for name in "abcd"}


@pytest.fixture
def cohort(tmp_path: Path) -> Callable[..., Path]:
    """Write a cohort of three patients and four photographs, and return its YAML file."""

    def write(*changes: tuple[str, str], table: str = TABLE) -> Path:
        folder = tmp_path / "photos"
        folder.mkdir(exist_ok=True)
        for name, pixels in PIXELS.items():
            Image.fromarray(pixels).save(folder / f"{name}.png")
        (tmp_path / "t.csv").write_text(table)
        yaml = YAML.replace("{file: t.csv}", "{file: t.csv, repeats: same}")
        for old, new in changes:
            assert old in yaml
            yaml = yaml.replace(old, new)
        path = tmp_path / "moles.yaml"
        path.write_text(yaml)
        return path

    return write


Write = Callable[..., Path]


def bags(path: Path, **options: bool) -> Bags:
    modality = load_cohort(path, **options).modalities["mole"]
    assert isinstance(modality, Bags)
    return modality


def bag(path: Path, patient: str = "2") -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    features, coords = bags(path)[patient]
    assert coords is not None
    assert features.dtype == coords.dtype == np.float32
    return features, coords


def test_patches_are_tokens(cohort: Write) -> None:
    """14 x 9 px give 3 x 2 patches of 4 px; one column and half a row are lost on each side."""
    features, coords = bag(cohort())
    assert features.shape == (6, 48)
    kept = PIXELS["b"][:8, 1:13]
    np.testing.assert_array_equal(features[1], kept[:4, 4:8].ravel())
    np.testing.assert_array_equal(features[5], kept[4:, 8:].ravel())
    x, y = [-2 / 3, 0, 2 / 3], [-1 / 3, 1 / 3]
    expected = [(column, row) for row in y for column in x]
    np.testing.assert_allclose(coords, expected, atol=1e-6)
    several = bags(cohort())
    assert (several.features, several.coords, several.shape("1")) == (48, 2, (12, 48))
    corners = [PIXELS[name][0:8:4, 1:13:4].reshape(6, 3) for name in "ad"]
    np.testing.assert_array_equal(several["1"][0][:, :3], np.concatenate(corners))


def test_a_zip_file_is_read_as_a_folder_is(cohort: Write, tmp_path: Path) -> None:
    path = cohort(("images: photos", "images: p.zip"), ('"{}.png"', '"in/{}.png"'))
    with zipfile.ZipFile(tmp_path / "p.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in (tmp_path / "photos").iterdir():
            archive.write(file, f"in/{file.name}")
    in_zip, in_folder = bags(path), bags(cohort())
    assert in_zip.patients == in_folder.patients == ("1", "2", "3")
    copy = ForkingPickler.loads(ForkingPickler.dumps(in_zip))  # as for a process that reads bags
    for patient in in_zip.patients:
        for one, other, third in zip(
            in_zip[patient], in_folder[patient], copy[patient], strict=True
        ):
            np.testing.assert_array_equal(one, other)
            np.testing.assert_array_equal(one, third)


def test_images_are_resized_first(cohort: Write, tmp_path: Path) -> None:
    photo = np.zeros((90, 140, 3), np.uint8)
    photo[:, 70:] = 200
    Image.fromarray(photo).save(tmp_path / "photos.jpg", quality=95)
    path = cohort(("patch: 4", "patch: 4, size: [8, 4]"))
    (tmp_path / "photos.jpg").replace(tmp_path / "photos" / "b.png")
    features, coords = bag(path)
    assert features.shape == (2, 48)
    pixels = features.reshape(2, 4, 4, 3)
    np.testing.assert_allclose(pixels[0, :, :3], 0, atol=3)
    np.testing.assert_allclose(pixels[1, :, 1:], 200, atol=3)
    np.testing.assert_array_equal(coords, [[-0.5, 0], [0.5, 0]])
    assert bags(path).shape("1") == (4, 48)


RED, GREY = (255, 0, 0), (100, 100, 100)


def palette(transparent: bool) -> Image.Image:
    image = Image.new("P", (4, 4))
    image.putpalette([*RED, *GREY])
    if transparent:
        image.info["transparency"] = 0
    return image


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("L", (4, 4), 100), "png", GREY),
        (Image.new("1", (4, 4), 1), "png", (255, 255, 255)),
        (Image.new("LA", (4, 4), (100, 255)), "png", GREY),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 155)), "png", GREY),
        (Image.fromarray(np.full((4, 4), 100 * 257, np.uint16)), "png", GREY),
        (Image.fromarray(np.full((4, 4), 100 * 257, np.uint16)), "tiff", GREY),
        (palette(False), "gif", RED),
        (palette(True), "png", (255, 255, 255)),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "tiff", RED),
        (Image.new("YCbCr", (4, 4), (100, 128, 128)), "jpeg", GREY),
    ],
)
def test_every_mode_becomes_rgb(
    image: Image.Image, kind: str, expected: tuple[int, ...], cohort: Write, tmp_path: Path
) -> None:
    path = cohort()
    image.save(tmp_path / "photos" / "b.png", format=kind)  # the suffix does not matter
    np.testing.assert_allclose(bag(path)[0].reshape(-1, 3), [expected] * 16, atol=1)


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_orientation_is_applied(kind: str, orientation: int, cohort: Write, tmp_path: Path) -> None:
    path = cohort()
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 4:] = 250
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "photos" / "b.png", format=kind, exif=exif)
    features, coords = bag(path)
    bright = coords[features.mean(axis=1).argmax()]
    expected = {1: [0.5, 0], 3: [-0.5, 0], 6: [0, 0.5]}[orientation]
    np.testing.assert_allclose(bright, expected)
    assert bags(path).shape("2") == (2, 48)


def test_missing_images_are_counted_once(cohort: Write, tmp_path: Path) -> None:
    path = cohort(table=TABLE + "4,,0\n5,x,1\n")
    (tmp_path / "photos" / "d.png").unlink()
    with pytest.warns(UserWarning, match="2 files") as caught:
        loaded = load_cohort(path)
    (message,) = [str(warning.message) for warning in caught]
    assert re.fullmatch(
        r"modalities.mole: 2 files \(the first: d.png\) not in .*photos; patients without any "
        r"image, 1, lack the modality",
        message,
    )
    mole = loaded.modalities["mole"]
    assert isinstance(mole, Bags)
    assert loaded.patients == ("1", "2", "3", "4", "5")
    assert mole.patients == ("1", "2", "3")
    assert mole.shape("1") == (6, 48)
    path = cohort(('"{}.png"', '"{}.jpg"'))
    with pytest.raises(CohortError, match=r"expected names such as a.jpg, .*it has a.png, b.png"):
        load_cohort(path)
    with (
        pytest.warns(UserWarning, match="4 files"),
        pytest.raises(CohortError, match="no modality has a patient"),
    ):
        load_cohort(path, outcome=False)
    assert bags(cohort(), outcome=False).patients == ("1", "2", "3")


def jpeg() -> bytes:
    file = BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "jpeg")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (jpeg()[:2000], "image 'b.png' in .* cannot be read: .*truncated"),
        (b"", "image 'b.png' in .* cannot be read"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
            "image 'b.png' in .* cannot be read",
        ),
    ],
)
def test_damaged_images_are_errors(
    content: bytes, message: str, cohort: Write, tmp_path: Path
) -> None:
    path = cohort()
    (tmp_path / "photos" / "b.png").write_bytes(content)
    with pytest.raises(CohortError, match=message):
        bag(path)
    assert bag(path, "3")[0].shape == (6, 48)


def test_images_that_do_not_fit(
    cohort: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cohort()
    Image.fromarray(np.zeros((9, 3, 3), np.uint8)).save(tmp_path / "photos" / "b.png")
    with pytest.raises(CohortError, match=r"'b.png': expected at least one patch of 4 px.* 3 x 9"):
        bag(path)
    Image.fromarray(np.zeros((9, 9), np.float32)).save(tmp_path / "photos" / "b.png", "tiff")
    with pytest.raises(CohortError, match="samples of mode F; expected 8 or 16 bits"):
        bag(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(CohortError, match="image 'c.png' in .* cannot be read: .*Decompression"):
        bag(path, "3")
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.write(tmp_path / "photos" / "b.png", "b.png")
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 10)
    path = cohort(("images: photos", "images: p.zip"))
    with (
        pytest.warns(UserWarning, match="3 files"),
        pytest.raises(CohortError, match="bytes; at most 10"),
    ):
        bag(path)
    (tmp_path / "p.zip").write_text("no zip file")
    with pytest.raises(CohortError, match="p.zip cannot be read"):
        load_cohort(path)


@pytest.mark.parametrize("name", ["../t.csv", "/etc/passwd", "x/../../t.csv"])
def test_names_stay_in_the_folder(name: str, cohort: Write) -> None:
    path = cohort(('"{}.png"', '"{}"'), table=TABLE.replace(",b,", f",{name},"))
    with pytest.raises(CohortError, match=re.escape(f"got {name!r}, which is outside")):
        load_cohort(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("patch: 4", "patch: 4, size: [8, 6]", "expected a size in multiples of patch, 4, got [8"),
        ("patch: 4", "patch: 4, size: [8]", "size: list should have at least 2"),
        ("patch: 4", "patch: 0", "patch: expected greater than or equal to 1, got 0"),
        (", patch: 4", "", "key 'patch' is missing"),
        ("patch: 4", "patch: 4, encoder: stain-stats", "both of the keys encoder and store"),
        ('"{}.png"', '"a.png"', "file: string should match pattern"),
        ("column: photo", "column: foto", "no column 'foto' in table 't' (t.csv): known: id"),
        ("images: photos", "images: none", "no file 'none'"),
        ("table: t, column: photo", "table: u, column: photo", "no table 'u'"),
    ],
)
def test_refused_yaml(old: str, new: str, message: str, cohort: Write) -> None:
    with pytest.raises(CohortError, match=re.escape(message)):
        load_cohort(cohort((old, new)))


ENCODED = ("patch: 4", "patch: 4, encoder: stain-stats, store: moles.store")


def test_encoded_once(cohort: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cohort(ENCODED)
    mole = bags(path)
    encoder = load_encoder("stain-stats")
    assert (mole.features, mole.coords, mole.shape("1")) == (encoder.width, 2, (12, encoder.width))
    pixels = PIXELS["b"][:8, 1:13].reshape(2, 4, 3, 4, 3).swapaxes(1, 2).reshape(6, 4, 4, 3)
    features, coords = bag(path)
    np.testing.assert_allclose(features, encoder.encode(pixels).astype(np.float16), rtol=1e-3)
    np.testing.assert_array_equal(coords, [(x, y) for y in (0, 4) for x in (1, 5, 9)])
    assert FeatureStore(tmp_path / "moles.store").verify() == []

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is loaded again")

    monkeypatch.setattr(encode_images, "load_encoder", refuse)
    np.testing.assert_array_equal(bag(path)[0], features)
    monkeypatch.undo()
    Image.fromarray(PIXELS["c"]).save(tmp_path / "photos" / "b.png")
    assert not np.array_equal(bag(path)[0], features)
    assert FeatureStore(tmp_path / "moles.store").verify() == []
    with pytest.raises(CohortError, match=r"tiling.patch: this store was begun with 4, got 2"):
        load_cohort(cohort(("patch: 4", ENCODED[1].replace("patch: 4", "patch: 2"))))
    with pytest.raises(CohortError, match="modalities.mole: no encoder 'resnet'"):
        load_cohort(cohort(("patch: 4", ENCODED[1].replace("stain-stats", "resnet"))))


def test_a_second_encoder_uses_the_same_store(
    cohort: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "colours.py").write_text("def mean(pixels):\n    return pixels.mean((1, 2))\n")
    monkeypatch.syspath_prepend(tmp_path)
    colours = bag(cohort())[0].reshape(6, 16, 3).mean(axis=1)
    first = bag(cohort(ENCODED))[0]
    path = cohort(("patch: 4", ENCODED[1].replace("stain-stats", '"colours:mean"')))
    second = bag(path)[0]
    assert second.shape == (6, 3)
    np.testing.assert_allclose(second, colours, rtol=1e-3)
    np.testing.assert_array_equal(bag(path)[0], second)
    np.testing.assert_array_equal(bag(cohort(ENCODED))[0], first)
    assert len(FeatureStore(tmp_path / "moles.store").encoders) == 2


def test_encoding_goes_on_after_a_damaged_image(cohort: Write, tmp_path: Path) -> None:
    path = cohort(ENCODED)
    (tmp_path / "photos" / "c.png").write_bytes(b"damaged")
    with pytest.raises(CohortError, match="image 'c.png' in .* cannot be read"):
        load_cohort(path)
    Image.fromarray(PIXELS["c"]).save(tmp_path / "photos" / "c.png")
    assert bags(path).patients == ("1", "2", "3")


@pytest.mark.slow
def test_a_model_learns_from_raw_images(tmp_path: Path) -> None:
    """The class is which half of the image is the brighter one: neither half alone shows it."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for i, label in enumerate(labels):
            pixels = np.full((16, 24, 3), rng.integers(40, 200)) + rng.normal(0, 10, (16, 24, 3))
            pixels[:, 12 * label : 12 * label + 12] += 30
            file = BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "png")
            archive.writestr(f"{i}.png", file.getvalue())
    rows = pd.DataFrame({"id": range(200), "photo": range(200), "bad": labels})
    rows.to_csv(tmp_path / "t.csv", index=False)
    path = tmp_path / "moles.yaml"
    path.write_text(YAML.replace("images: photos", "images: photos.zip"))
    cohort = load_cohort(path)
    splits = experiments.Splits(1, 0.3, 0.2)
    run = experiments.train_run(cohort, "healnet", tmp_path / "run", splits=splits)
    auc = json.loads((tmp_path / "run" / "metrics.json").read_text())["auc"]["value"]
    assert auc > 0.95
    new = experiments.predict_cohort(run, load_cohort(path, outcome=False))
    assert new["modalities"].tolist() == ["mole"] * 200
    assert roc_auc_score(labels, new["p_1"]) > 0.95


def test_ham10000() -> None:
    base = data_path("data", "ham10000")
    rows = pd.read_csv(base / "metadata.csv")
    cohort = load_cohort("ham10000", data=base.parent)
    assert cohort.patients == tuple(rows.image_id)
    assert cohort.groups == tuple(rows.lesion_id)
    assert isinstance(cohort.outcome, Classes)
    np.testing.assert_array_equal(cohort.outcome.labels, rows.melanoma)
    assert list(cohort.modalities["clinical"]) == ["age", "sex", "localization"]
    image = cohort.modalities["image"]
    assert isinstance(image, Bags)
    assert image.patients == cohort.patients
    with zipfile.ZipFile(base / "images.zip") as archive:
        photo = Image.open(BytesIO(archive.read(f"{rows.image_id[0]}.jpg")))
        small = photo.resize((48, 36), Image.Resampling.BILINEAR)
    features, _ = image[rows.image_id[0]]
    np.testing.assert_array_equal(features[5], np.asarray(small)[12:24, 12:24].ravel())
