"""Feature stores: the format against a stored example and zarr, reading, damage."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr
from motet.io import CohortError, FeatureStore, StoreError, load_cohort
from motet.io.cohorts.bags import Bags
from motet.io.store import write_slide
from motet.io.store.array import StoredArray
from motet.io.store.failures import note_failure
from motet.io.store.format import FLAGS
from motet.io.store.write import StoreWriter

from .conftest import SOAK
from .store_helpers import GOLDEN, TILING, Slide, numbers, put, spec, tree

TISSUE = [1.0, 0.8, 0.6, 0.4, 0.2]
PLACES = [[0, 0], [1024, 0], [2048, 0], [0, 1024], [1024, 1024]]
FLAGGED = [1, 2, 8, 4, 0]


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., FeatureStore]:
    """Return a function that makes a store of named slides with features and flags."""

    def make(
        slides: dict[str, tuple[np.ndarray, list[int] | None]], width: int = 3
    ) -> FeatureStore:
        writer = StoreWriter.open(tmp_path / "cohort", TILING, "0" * 16, spec("made", width))
        for name, (features, flags) in slides.items():
            path = tmp_path / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
            put(writer, Slide(path, name), features, flags)
        return FeatureStore(tmp_path / "cohort")

    return make


Made = Callable[..., FeatureStore]


# The format.


def write_golden(folder: Path) -> None:
    """Write the content of golden/store-v1; the stored copy was written once and never changes."""
    known = {"bytes": 5, "mtime_ns": 1, "quick_hash": "0123456789abcdef"}
    thumb = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    mask = np.arange(12).reshape(3, 4) % 5 < 3
    for name, width in (("stain-stats", 6), ("hf:owl/vit", 4)):
        writer = StoreWriter.open(folder, TILING, "00112233aabbccdd", spec(name, width))
        for slide, n in (("site/tissue.svs", 5), ("blank.svs", 0)):
            source = Slide(Path(slide), slide)
            attrs = {
                "name": slide, "source": {"path": slide, **known}, "mpp": 0.5, "reader": "cucim",
                "mpp_source": "file", "footprint_px": 1024.0, "counts": {"grid": 9, "tissue": n},
            }  # fmt: skip
            if name == "stain-stats":
                made = writer.begin(
                    source.key, attrs, np.reshape(PLACES[:n], (n, 2)), TISSUE[:n], FLAGGED[:n],
                    thumb, mask, width,
                )  # fmt: skip
            else:
                made = writer.begin_features(source.key, width)
            rows = np.array([3, 0, 1, 4][: max(0, n - 1)], int)
            with made:
                made.write(rows, numbers(n, width)[rows])
                made.commit()
    broken = Slide(Path("broken.svs"), "broken.svs")
    note_failure(writer.path, writer.slug, broken, StoreError("not an image"), 2)
    FeatureStore(folder).write_manifest()


def test_golden_store() -> None:
    digest = hashlib.sha256()
    for name, content in tree(GOLDEN).items():
        digest.update(name.encode() + b"\0" + content)
    assert digest.hexdigest() == GOLDEN_DIGEST, "a golden store is never written again"

    with pytest.raises(StoreError, match="expected encoder=, one of hf:owl/vit, stain-stats"):
        _ = FeatureStore(GOLDEN)["tissue"].features
    for name, slug, width in (("stain-stats", "stain-stats", 6), ("hf:owl/vit", "hf-owl-vit", 4)):
        store = FeatureStore(GOLDEN, name)
        assert FeatureStore(GOLDEN, slug).slug == store.slug == slug
        assert list(store) == ["blank-75280f0a", "tissue-ccd5b8ee"]
        slide = store["tissue-ccd5b8ee"]
        expected = numbers(5, width).astype(np.float16)
        expected[2] = np.nan
        np.testing.assert_array_equal(slide.features, expected)
        assert isinstance(slide.features, np.memmap)
        assert slide.features.dtype == np.float16
        np.testing.assert_array_equal(slide.coords, PLACES)
        np.testing.assert_array_equal(slide.flags, FLAGGED)
        np.testing.assert_array_equal(
            slide.tissue, np.rint(np.multiply(TISSUE, 255)).astype("f4") / 255
        )
        features, coords = slide.bag()
        keep = [0, 1, 3, 4]
        assert features.dtype == coords.dtype == np.float32
        np.testing.assert_array_equal(features, numbers(5, width)[keep])
        np.testing.assert_array_equal(coords, np.array(PLACES)[keep])
        np.testing.assert_array_equal(slide.rows([4, 0, -1]), expected[[4, 0, 4]])
        np.testing.assert_array_equal(slide.thumb, np.arange(36).reshape(3, 4, 3))
        np.testing.assert_array_equal(slide.mask, np.arange(12).reshape(3, 4) % 5 < 3)
        empty = store["blank"]
        assert (len(empty), empty.width, empty.attrs["status"]) == (0, width, "empty")
        assert empty.bag()[0].shape == (0, width)
        assert empty.rows([]).shape == (0, width)
    assert slide.attrs["counts"] == {
        "blur": 1, "corrupt": 1, "edge": 1, "grid": 9, "patches": 5, "pen": 1, "tissue": 5,
    }  # fmt: skip
    assert store.failed["broken-1ca10da8"]["message"] == "not an image"
    assert store.verify() == []
    table = store.manifest()
    assert table["status"].tolist() == ["empty", "failed", "ok"]
    assert table["patches"].fillna(-1).tolist() == [0, -1, 5]
    pd.testing.assert_frame_equal(table, pd.read_parquet(GOLDEN / "slides.parquet"))


def test_golden_store_is_what_is_written_today(tmp_path: Path) -> None:
    write_golden(tmp_path / "new")
    new, old = tree(tmp_path / "new"), tree(GOLDEN)
    assert new.keys() == old.keys()
    for name, content in old.items():
        packed = "/thumb/c/" in name or "/mask/c/" in name  # depends on the version of zstd
        if name.startswith("slides/") and not packed:
            assert new[name] == content, name
    assert FeatureStore(tmp_path / "new").verify() == []


def test_zarr_reads_the_same(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """zarr reads features in one chunk, and in chunks of 4 rows of which the last is partial."""
    features = numbers(10, 3)
    monkeypatch.setattr(write_slide, "CHUNK_ROWS", 4)
    for limit in (2**28, 8):
        monkeypatch.setattr(write_slide, "ONE_CHUNK_BYTES", limit)
        store = made({f"{limit}.svs": (features, [8, *[0] * 9])})
        slide = store[str(limit)]
        group = zarr.open_group(slide.path, mode="r", zarr_format=3)
        by_zarr = group["features/made"]
        assert isinstance(by_zarr, zarr.Array)
        assert np.isnan(by_zarr.fill_value)
        assert by_zarr.chunks == ((10, 3) if limit > 8 else (4, 3))
        np.testing.assert_array_equal(by_zarr[...], slide.features)
        np.testing.assert_array_equal(slide.features[1:], features[1:])
        assert np.isnan(slide.features[0]).all()
        rows = np.array([9, 3, 4, -10, 3])
        np.testing.assert_array_equal(slide.rows(rows), np.asarray(slide.features)[rows])
        with pytest.raises(IndexError):
            slide.rows([10])
        for name in ("coords", "tissue", "flags"):
            array = group[name]
            assert isinstance(array, zarr.Array)
            np.testing.assert_array_equal(array[...], StoredArray(f"{slide.path}/{name}").read())
        assert dict(group.attrs) == slide.attrs
    assert store.verify() == []


def test_other_forms_are_read_through_zarr(made: Made) -> None:
    """Stores that another tool compressed, or chunked by columns, are read through zarr."""
    store = made({"a.svs": (numbers(6, 4), None)}, width=4)
    slide = store["a"]
    group = zarr.open_group(slide.path, mode="a", zarr_format=3)
    before = np.array(slide.features)
    attrs = dict(group["features/made"].attrs)
    del group["features/made"]
    compressed = group.create_array(
        "features/made", shape=(6, 4), chunks=(4, 2), dtype="float16", fill_value=np.nan,
        attributes=attrs,
    )  # fmt: skip
    compressed[...] = before
    again = FeatureStore(store.path)["a"]
    np.testing.assert_array_equal(again.features, before)
    np.testing.assert_array_equal(again.rows([5, 1]), before[[5, 1]])
    assert store.verify() == []
    Path(slide.path, "features/made/c/1/0").unlink()
    with pytest.raises(StoreError, match="c/1/0: No such file"):  # zarr would give NaN
        _ = FeatureStore(store.path)["a"].features


# The mapping.


def test_slides_are_found_by_names(made: Made) -> None:
    store = made({name: (numbers(2, 3), None) for name in ("x/a.svs", "y/a.svs", "x/b.1.svs")})
    assert len(store) == 3
    key = Slide(Path(), "x/b.1.svs").key
    assert {key, "x/b.1.svs", "b.1.svs", "b.1", "x/a.svs"} <= {
        name
        for name in (key, "x/b.1.svs", "b.1.svs", "b.1", "a", "a.svs", "x/a.svs")
        if name in store
    }
    assert "a" not in store
    assert 3 not in store
    assert store["b.1"].key == key
    with pytest.raises(KeyError, match="'a' is the name of 2 slides: a-"):
        _ = store["a"]
    with pytest.raises(KeyError, match=r"did you mean .*x/b\.1\.svs"):
        _ = store["x/b.2.svs"]
    made({"z.svs": (numbers(2, 3), None)})
    assert store["z"].attrs["name"] == "z.svs"  # added after the names were read
    for name in ("../cohort", "", "/", ".", "..", "x\0", "a" * 5000):
        assert name not in store


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="none: expected a feature store, got no such folder"):
        FeatureStore(tmp_path / "none")
    with pytest.raises(StoreError, match=r"got no run\.json in it"):
        FeatureStore(tmp_path)
    with pytest.raises(StoreError, match="no features of 'stain-stat': did you mean 'stain-stats'"):
        FeatureStore(GOLDEN, "stain-stat")
    run = json.loads((GOLDEN / "run.json").read_bytes())
    for change, message in (
        ({"version": 2}, "expected format version 1, got 2: upgrade"),
        ({"format": "x"}, "expected format 'motet-store', got 'x'"),
        ({"encoders": {"../x": {"id": "x"}}}, "expected tiling, tiling_hash and encoders"),
        ({"encoders": []}, "expected tiling, tiling_hash and encoders"),
        ({"tiling": 1}, "expected tiling, tiling_hash and encoders"),
    ):
        (tmp_path / "run.json").write_text(json.dumps(run | change))
        with pytest.raises(StoreError, match=message):
            FeatureStore(tmp_path)
    for text in ("", "[1]", "{", "[" * 100_000, "\0\xff"):
        (tmp_path / "run.json").write_bytes(text.encode("latin1"))
        with pytest.raises(StoreError, match="run.json"):
            FeatureStore(tmp_path)


# Damage.


@pytest.mark.parametrize("seed", range(4))
def test_damage_is_named(made: Made, seed: int) -> None:
    """A cut, lengthened, removed or bit-flipped file raises StoreError at most; verify tells."""
    store = made({"a.svs": (numbers(20, 3), [8, *[0] * 19])})
    store.write_manifest()
    assert store.verify() == []
    draw = np.random.default_rng(seed)
    for file in sorted(path for path in store.path.rglob("*") if path.is_file()):
        intact = file.read_bytes()
        at = int(draw.integers(len(intact)))
        turned = bytearray(intact)
        turned[at] ^= 1 << int(draw.integers(8))
        for content in (intact[:at], intact + b"x", bytes(turned), b"", None):
            if content is None:
                file.unlink()
            else:
                file.write_bytes(content)
            try:
                again = FeatureStore(store.path)
                slide = again["a"]
                for read in (slide.bag, lambda: slide.rows([3]), lambda: slide.tissue):  # noqa: B023
                    read()
            except (StoreError, KeyError):
                pass
            try:
                findings = FeatureStore(store.path).verify()
            except StoreError:
                findings = [None]
            # JSON that still parses may have changed in a field that nobody reads.
            if not (content and parses(content)) and file.name != "slides.parquet":
                assert findings, (file, content)
            file.write_bytes(intact)
    assert FeatureStore(store.path).verify() == []


def parses(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


def test_what_lies_about_is_named(made: Made) -> None:
    store = made({"a.svs": (numbers(3, 2), None)}, width=2)
    folder = Path(store["a"].path)
    for stray in (
        store.path / "slides/b.txt", folder / "x", folder / "coords/c/1",
        folder / "features/made/y", store.path / f".tmp/a.{'0' * 16}",
    ):  # fmt: skip
        stray.parent.mkdir(exist_ok=True)
        stray.touch()
        (problem,) = store.verify()
        assert stray.name in problem.message
        stray.unlink()
    table = store.manifest()
    table.assign(patches=5).to_parquet(store.path / "slides.parquet")
    assert "not in step" in store.verify()[0].message
    store.write_manifest()
    assert store.verify() == []
    run = json.loads((store.path / "run.json").read_bytes())
    (store.path / "run.json").write_text(json.dumps(run | {"tiling": {}}))
    assert "its hash" in FeatureStore(store.path).verify()[0].message


def test_values_are_verified(made: Made, tmp_path: Path) -> None:
    """verify checks counts, status and the places of NaN, even if all checksums are right."""
    for name, where, value, message in (
        ("nan", "features", (1, np.nan), "row 1: expected finite numbers"),
        ("number", "features", (0, 1.0), "row 0: expected NaN, as of a corrupt patch"),
        ("flag", "flags", (2, 2), "counts.pen: expected 1, got 0"),
    ):
        shutil.rmtree(tmp_path / "cohort", ignore_errors=True)
        store = made({f"{name}.svs": (numbers(4, 3), [8, 0, 0, 0])})
        group = zarr.open_group(store[name].path, mode="a")
        array = group["features/made" if where == "features" else where]
        assert isinstance(array, zarr.Array)
        array[value[0]] = value[1]
        assert [problem.message for problem in store.verify() if message in problem.message]
    meta = Path(store["flag"].path, "zarr.json")
    content = json.loads(meta.read_bytes())
    content["attributes"]["status"] = "empty"
    content["attributes"]["counts"]["patches"] = 10**12
    meta.write_text(json.dumps(content))
    with pytest.raises(StoreError, match=r"expected float16 \[1000000000000, any\]"):
        FeatureStore(store.path)["flag"].bag()


def test_a_huge_declaration_allocates_nothing(made: Made) -> None:
    store = made({"a.svs": (numbers(4, 3), None)})
    meta = Path(store["a"].path, "features/made/zarr.json")
    content = json.loads(meta.read_bytes())
    for shape, chunk in (
        ([10**12, 3], [10**12, 3]), ([10**12, 3], [4, 3]), ([10**30, 3], [10**30, 3]),
        ([-4, 3], [4, 3]), ([4, 3], [0, 3]), ([4], [4]), ("ab", [4, 3]), ([4, 3], [4, 10**9]),
    ):  # fmt: skip
        content["shape"], content["chunk_grid"]["configuration"]["chunk_shape"] = shape, chunk
        meta.write_text(json.dumps(content))
        with pytest.raises(StoreError):
            _ = FeatureStore(store.path)["a"].features
        with pytest.raises(StoreError):
            FeatureStore(store.path)["a"].rows([0])


# Scale.


def copies(made: Made, n: int) -> tuple[FeatureStore, list[Slide]]:
    """Make a cohort of n slides whose files are hard links to those of one slide."""
    store = made({"a.svs": (numbers(100, 8), None)}, width=8)
    original = Path(store["a"].path)
    name = json.loads((original / "zarr.json").read_bytes())
    file = store.path.parent / "in" / "a.svs"
    parts = [path.relative_to(original) for path in original.rglob("*")]
    folders = [part for part in parts if (original / part).is_dir()]
    files = [part for part in parts if (original / part).is_file() and part.name != "x"]
    slides = [Slide(file, f"s{i}.svs") for i in range(n)]
    for slide in slides:
        folder = store.path / "slides" / f"{slide.key}.zarr"
        folder.mkdir()
        for part in sorted(folders):
            (folder / part).mkdir()
        for part in files:
            os.link(original / part, folder / part)
        (folder / "zarr.json").unlink()
        name["attributes"] |= {"name": slide.name, "key": slide.key}
        (folder / "zarr.json").write_text(json.dumps(name))
    shutil.rmtree(original)
    return store, slides


def test_a_large_cohort(made: Made) -> None:
    """All slides of a finished cohort (500, or 10,000 in the soak profile) count as done."""
    n = 10_000 if SOAK else 500
    store, slides = copies(made, n)
    writer = StoreWriter.open(store.path, TILING, "0" * 16, spec("made", 8))
    assert {writer.state(slide) for slide in slides} == {"done"}
    table = store.manifest()
    assert table["patches"].sum() == 100 * n
    assert len(store) == n


# Cohorts.

TABLE = "patient,time,event,slide\n1,5,1,a\n1,5,1,x/b.svs\n2,7,0,{key}\n3,2,1,gone\n"
YAML = """\
name: slides
patient: patient
tables:
  t: {{file: t.csv, repeats: same}}
outcome: {{table: t, time: time, unit: days, event: event}}
modalities:
  wsi: {{bags: cohort{more}}}
"""


def cohort_bags(folder: Path, more: str, key: str = "") -> Bags:
    (folder / "t.csv").write_text(TABLE.format(key=key))
    (folder / "c.yaml").write_text(YAML.format(more=more))
    bags = load_cohort(folder / "c.yaml").modalities["wsi"]
    assert isinstance(bags, Bags)
    return bags


def test_cohorts_read_stores(made: Made, tmp_path: Path) -> None:
    slides = {
        "a.svs": (numbers(4, 3), [0, 8, 0, 0]),
        "x/b.svs": (numbers(2, 3) + 9, None),
        "c.svs": (numbers(3, 3), None),
        "1.svs": (numbers(5, 3), None),
        "2.svs": (numbers(1, 3), [8]),
        "3.svs": (numbers(0, 3), None),
    }
    made(slides)
    keys = ", keys: {table: t, column: slide}"
    bags = cohort_bags(tmp_path, keys, Slide(Path(), "c.svs").key)
    assert bags.patients == ("1", "2")
    assert bags.shape("1") == (5, 3)
    features, coords = bags["1"]
    np.testing.assert_array_equal(
        features, np.concatenate([numbers(4, 3)[[0, 2, 3]], numbers(2, 3) + 9])
    )
    assert coords is not None
    np.testing.assert_array_equal(coords[:, 0], np.array([0, 2, 3, 0, 1]) * 256)
    assert bags.coords == 2
    assert bags.extent == 3 * 256
    assert bags["2"][0].shape == (3, 3)

    # Without keys a slide's stem is the patient; a slide without embedded patches is no bag.
    assert cohort_bags(tmp_path, "").patients == ("1",)
    assert cohort_bags(tmp_path, ", encoder: made").patients == ("1",)
    with pytest.raises(CohortError, match="modalities.wsi: .*no features of 'maid': did you mean"):
        cohort_bags(tmp_path, ", encoder: maid")
    StoreWriter.open(tmp_path / "cohort", TILING, "0" * 16, spec("further", 2))
    with pytest.raises(CohortError, match="expected encoder=, one of further, made"):
        cohort_bags(tmp_path, "")
    with pytest.raises(CohortError, match="1: no features of 'further' yet: tile the cohort again"):
        cohort_bags(tmp_path, ", encoder: further")

    made({"y/a.svs": (numbers(4, 3), None)})
    with pytest.raises(CohortError, match="'a' is the name of slides a-"):
        cohort_bags(tmp_path, keys + ", encoder: made", "x")
    path = next((tmp_path / "cohort/slides").glob("1-*")) / "features/made/c/0/0"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CohortError, match="expected 34 bytes, got 33"):
        _ = cohort_bags(tmp_path, ", encoder: made")["1"]


def test_flags_are_as_specified() -> None:
    assert [int(flag) for flag in FLAGS] == [1, 2, 4, 8]


GOLDEN_DIGEST = "5ac31a16f418d3fd105c21a0aa365cd3029b4e35ea3aec8c6a0567d5dc442446"
