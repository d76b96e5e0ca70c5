"""Heat maps of slides: pictures, GeoJSON, extreme patches, and those of `motet explain`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from motet import cli, io
from motet.experiments import train_run
from motet.experiments.settings import Splits
from motet.io.store.read_slide import SlideFeatures
from motet.io.store.source import Source, describe
from motet.io.store.write import StoreWriter
from PIL import Image

from .conftest import drawn
from .store_helpers import TILING, spec

SIDE = 64  # of a patch, in level-0 px
PURPLE, YELLOW = (68, 1, 84), (253, 231, 37)  # the ends of viridis


def make_slide(folder: Path, **attrs: object) -> tuple[SlideFeatures, np.ndarray]:
    """Write a store with a slide of 4 x 3 patches; return it and its picture, a colour per patch.

    Patch 5 is corrupt.
    """
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (3, 4, 3), np.uint8).repeat(SIDE, 0).repeat(SIDE, 1)
    Image.fromarray(pixels).save(folder / "s <b>$1$.png")
    coords = np.stack([np.arange(12) % 4, np.arange(12) // 4], axis=1) * SIDE
    flags = np.zeros(12, np.uint8)
    flags[5] = 8
    mask = np.ones((30, 40), bool)
    mask[:, :10] = False
    source = Source(folder / "s <b>$1$.png", "s <b>$1$.png")
    attrs = {"width": 4 * SIDE, "height": 3 * SIDE, "footprint_px": SIDE, "tile_px": 32, **attrs}
    writer = StoreWriter.open(folder / "store", TILING, "0" * 16, spec("made", 2))
    thumb = np.full((30, 40, 3), 240, np.uint8)
    attrs = {**describe(source), **attrs}
    with writer.begin(source.key, attrs, coords, np.ones(12), flags, thumb, mask, 2) as slide:
        rows = np.flatnonzero(flags == 0)
        slide.write(rows, np.ones((11, 2), np.float32))
        slide.commit()
    return io.FeatureStore(folder / "store")[source.key], pixels


def values_of(slide: SlideFeatures) -> np.ndarray:
    return np.where(slide.corrupt, np.nan, np.arange(12.0))


@pytest.mark.parametrize("attrs", [{"mpp": 0.5}, {"width": None, "footprint_px": None}])
def test_the_picture_has_the_values_where_the_patches_are(
    attrs: dict[str, Any], tmp_path: Path
) -> None:
    slide, _ = make_slide(tmp_path, **attrs)
    values = np.where(slide.coords[:, 0] == 3 * SIDE, 1.0, 0.0)  # the rightmost column
    values[slide.corrupt] = np.nan
    path = io.heat_map(slide, values, tmp_path / "map.png", label="$a <b>", title="é <i> $x$")
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert picture.shape[1] < 2500
    height, width = picture.shape[:2]
    # Colours at 65 % over the thumbnail of 240: columns 0 to 2 are dark purple, column 3 is yellow.
    for colour, is_right in ((PURPLE, False), (YELLOW, True)):
        mixed = 0.65 * np.array(colour) + 0.35 * 240
        near = np.argwhere(np.abs(picture - mixed).max(-1) < 4)
        near = near[near[:, 1] < 0.85 * width]  # without the colour bar
        assert len(near) > 0.03 * height * width
        middle = near[:, 1].mean() / width
        assert (middle > 0.65) == is_right
    green = (np.abs(picture - (0, 158, 115)).max(-1) < 60).sum()
    assert green > height / 4  # the outline of the tissue


def test_the_values_as_geojson(tmp_path: Path) -> None:
    slide, _ = make_slide(tmp_path)
    collection = io.heat_map_geojson(slide, {"attention": values_of(slide), "risk": -np.ones(12)})
    json.dumps(collection, allow_nan=False)
    features = collection["features"]
    assert len(features) == 12
    assert features[5]["properties"] == {"objectType": "tile", "measurements": {"risk": -1.0}}
    assert features[6]["properties"]["measurements"] == {"attention": 6.0, "risk": -1.0}
    ring = features[6]["geometry"]["coordinates"][0]
    assert ring == [[128, 64], [192, 64], [192, 128], [128, 128], [128, 64]]
    assert len(io.heat_map_geojson(slide, {"a": values_of(slide)})["features"]) == 11


def test_extreme_patches_are_those_of_the_slide(tmp_path: Path) -> None:
    slide, pixels = make_slide(tmp_path)
    table = io.extreme_patches(slide, values_of(slide), tmp_path / "out", count=3)
    assert table["rank"].tolist() == [f"{end}-{i}" for end in ("top", "bottom") for i in (1, 2, 3)]
    assert table["value"].tolist() == [11, 10, 9, 0, 1, 2]
    written = pd.read_csv(tmp_path / "out" / "patches.csv")
    assert written["file"].tolist() == table["file"].tolist()
    for row in written.itertuples():
        patch = np.asarray(Image.open(tmp_path / "out" / str(row.file)))
        assert patch.shape == (32, 32, 3)
        assert (patch == pixels[row.y, row.x]).all()
    # A few patches are not both; a slide that is gone or changed gives no pictures.
    assert len(io.extreme_patches(slide, values_of(slide), tmp_path / "few", count=9)) == 11
    Image.new("RGB", (9, 9)).save(slide.attrs["source"]["path"])
    table = io.extreme_patches(slide, values_of(slide), tmp_path / "gone", count=2)
    assert set(table["file"]) == {""}
    assert [path.name for path in (tmp_path / "gone").iterdir()] == ["patches.csv"]


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    """A patch has another height than width, in GeoJSON and in the pictures."""
    slide, pixels = make_slide(tmp_path, footprint_y_px=SIDE / 2)
    ring = io.heat_map_geojson(slide, {"a": values_of(slide)})["features"][0]["geometry"]
    x, y = np.array(ring["coordinates"][0]).T
    assert (np.ptp(x), np.ptp(y)) == (SIDE, SIDE / 2)
    table = io.extreme_patches(slide, values_of(slide), tmp_path / "patches", count=1)
    assert table[["width", "height"]].iloc[0].tolist() == [SIDE, SIDE / 2]
    x, y = table[["x", "y"]].iloc[0].astype(int)
    top = np.asarray(Image.open(tmp_path / "patches" / "top-1.png"))
    assert top.shape == (32, 32, 3)
    assert np.array_equal(top[0, 0], pixels[y, x])


def test_values_that_do_not_fit(tmp_path: Path) -> None:
    slide, _ = make_slide(tmp_path)
    with pytest.raises(
        ValueError, match=r"values: expected one for each of the 12 patches .*\[3\]"
    ):
        io.heat_map(slide, np.ones(3), tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"measurements\['x'\]: expected finite numbers"):
        io.heat_map_geojson(slide, {"x": np.full(12, np.nan)})
    with pytest.raises(ValueError, match="measurements: expected at least one name"):
        io.heat_map_geojson(slide, {})
    np.savez(tmp_path / "b.npz", features=np.eye(2, 8))
    absent = io.import_features(tmp_path / "b.npz", tmp_path / "imported", encoder="mine")["b"]
    with pytest.raises(io.StoreError, match="expected patches with coordinates, got no coord"):
        io.heat_map(absent, [1, 2], tmp_path / "a.png")


def write_slides(folder: Path, *, seed: int, n: int) -> tuple[Path, dict[str, list[np.ndarray]]]:
    """Write a store with two slides of 8 x 8 patches per patient, and a cohort that names it.

    In a square of 4 x 4 patches of each slide, feature 0 marks the region, and feature 1 has twice
    the logarithm of the rate at which the patient dies.

    Returns:
        The YAML file, and for each patient bool [64] of both slides, True in the region.
    """
    rng = np.random.default_rng(seed)
    writer = StoreWriter.open(folder / "store", TILING, "0" * 16, spec("made", 16))
    (folder / "slides").mkdir()
    regions: dict[str, list[np.ndarray]] = {}
    lines = ["patient,slide,months,died"]
    rows, columns = np.arange(64) // 8, np.arange(64) % 8
    for i in range(n):
        patient, signal = f"p{i}", rng.normal()
        months = 20 * np.exp(-signal)
        for part in "ab":
            source = Source(folder / "slides" / f"{patient}{part}.svs", f"{patient}{part}.svs")
            source.path.write_bytes(b"x")
            top, left = rng.integers(0, 5, 2)
            inside = (rows >= top) & (rows < top + 4) & (columns >= left) & (columns < left + 4)
            features = rng.normal(size=(64, 16))
            features[:, 0] += 5 * inside
            features[:, 1] += 2 * inside * signal
            coords = np.stack([columns, rows], axis=1) * 256
            fields = describe(source) | {
                "width": 2048, "height": 2048, "footprint_px": 256, "mpp": 0.5,
            }  # fmt: skip
            with writer.begin(
                source.key, fields, coords, np.ones(64), np.zeros(64, np.uint8), None, None, 16
            ) as slide:
                slide.write(np.arange(64), features.astype(np.float32))
                slide.commit()
            regions.setdefault(patient, []).append(inside)
            lines.append(f"{patient},{patient}{part},{months:.3f},1")
    (folder / "t.csv").write_text("\n".join(lines))
    path = folder / "made.yaml"
    path.write_text(
        "name: made\npatient: patient\ntables: {t: {file: t.csv, repeats: same}}\n"
        "outcome: {table: t, time: months, unit: months, event: died}\n"
        "modalities:\n  wsi: {bags: store, keys: {table: t, column: slide}}\n"
    )
    return path, regions


def explain_slides(
    folder: Path, *, seed: int, n: int, named: int, changes: dict[str, Any]
) -> list[tuple[np.ndarray, pd.DataFrame]]:
    """Train HEALNet, explain tested patients, and return region and measurements of the slides."""
    path, regions = write_slides(folder, seed=seed, n=n)
    cohort = io.load_cohort(path)
    run = train_run(cohort, "healnet", folder / "run", splits=Splits(1), changes=changes)
    patients = run.splits[0]["test"][:named]
    out = folder / "out"
    options = ["--out", str(out), "--limit", "0", "--patients", ",".join(patients)]
    assert cli.main(["explain", str(run.path), str(path), *options]) == 0
    by_slide = []
    for patient in patients:
        slides = cohort.modalities["wsi"].slides(patient)
        assert len(slides) == 2
        for slide, inside in zip(slides, regions[patient], strict=True):
            place = out / "slides" / patient / "wsi" / slide.key
            for name in ("attention.png", "contribution.png", "patches/patches.csv"):
                assert (place / name).is_file()
            features = json.loads((place / "patches.geojson").read_text())["features"]
            corners = [f["geometry"]["coordinates"][0][0] for f in features]
            assert corners == slide.coords.tolist()
            values = [f["properties"]["measurements"] for f in features]
            by_slide.append((inside, pd.DataFrame(values)))
    return by_slide


def named_first(folder: Path) -> str:
    return json.loads((folder / "out" / "explanation.json").read_text())["named"][0]


def test_slides_of_a_patient(tmp_path: Path) -> None:
    pytest.importorskip("captum")
    changes = {"num_latents": 4, "latent_dim": 8, "epochs": 1}
    slides = explain_slides(tmp_path, seed=0, n=24, named=1, changes=changes)
    attention = [values["attention"].sum() for _, values in slides]
    # The attention to both slides of a patient is 1 in sum.
    np.testing.assert_allclose(np.add(attention[::2], attention[1::2]), 1, atol=1e-4)
    tokens = pd.read_csv(tmp_path / "out" / "tokens.csv")
    of_first = np.concatenate([values["contribution"] for _, values in slides[:2]])
    first = tokens[tokens["patient"] == named_first(tmp_path)]
    np.testing.assert_allclose(of_first, first["contribution"], rtol=1e-4, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("seed", drawn(range(100), 1))
def test_the_region_of_a_slide_has_the_largest_values(seed: int, tmp_path: Path) -> None:
    pytest.importorskip("captum")
    changes = {
        "num_latents": 8, "latent_dim": 16, "heads": 4, "attn_dropout": 0, "ff_dropout": 0,
        "l2": 0, "max_lr": 0.005, "epochs": 30,
    }  # fmt: skip
    slides = explain_slides(tmp_path, seed=seed, n=200, named=3, changes=changes)
    for name in ("attention", "contribution"):
        top = [inside[values[name].abs().nlargest(8).index].mean() for inside, values in slides]
        assert np.mean(top) >= 0.8, name  # by chance 0.25
