"""Reading, checking and resuming, each beside what its cost is compared with.

Every function times two contenders in turns in one run, and holds the ratio of their medians below
a bound. The group of its row in the table shows the ratio.
"""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile
from motet.cli import measure
from motet.io import FeatureStore, open_slide, tile_slides, write_report
from motet.io.slides.integrity import find_damaged
from motet.io.slides.tiff import TiffFile
from motet.io.store.write import StoreWriter
from motet.io.tiling.masks import coverage, coverage_reference
from PIL import Image

from python_tests.processes import run_python
from python_tests.slides import draw_tissue, make_pyramid
from python_tests.store_helpers import TILING, Slide, put, spec

Run = Callable[[], object]


def hold(benchmark: Any, ours: Run, theirs: Run, at_most: float, *, per: float = 1.0) -> None:
    """Time both in turns; `ours` may take at most `at_most` times `theirs`.

    Args:
        per: how many times more work `ours` does, by which its time is divided.
    """
    timed = measure.in_turns({"ours": ours, "theirs": theirs}, "cpu", seconds=3.0)
    ratio = timed["ours"].median / per / timed["theirs"].median
    benchmark.group = f"{benchmark.name}: {ratio:.3g} times the other, at most {at_most:g}"
    benchmark.extra_info["ratio"] = ratio
    benchmark.pedantic(ours, rounds=3)
    assert ratio <= at_most


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """A store of one slide of 4,000 patches and 1,024 features."""
    folder = tmp_path_factory.mktemp("store")
    (folder / "a.svs").write_text("a")
    writer = StoreWriter.open(folder / "cohort", TILING, "0" * 16, spec("made", 1024))
    features = np.random.default_rng(0).standard_normal((4000, 1024)).astype(np.float16)
    put(writer, Slide(folder / "a.svs", "a.svs"), features.astype(np.float32))
    return FeatureStore(folder / "cohort")


def memory_map(store: FeatureStore) -> np.ndarray:
    path = f"{store['a.svs'].path}/features/made/c/0/0"
    return np.memmap(path, np.float16, "r", shape=(4000, 1024))


def bench_a_bag_beside_a_memory_map(benchmark, store: FeatureStore) -> None:
    """Opening and reading a whole bag beside np.memmap and a copy."""
    key = next(iter(store))
    assert (store[key].features == memory_map(store)).all()
    ours, theirs = lambda: np.array(store[key].features), lambda: np.array(memory_map(store))
    hold(benchmark, ours, theirs, 1.25)


def bench_rows_beside_a_memory_map(benchmark, store: FeatureStore) -> None:
    """512 random rows of an open slide beside the same of an open np.memmap."""
    slide, mapped = store[next(iter(store))], memory_map(store)
    rows = np.random.default_rng(0).choice(4000, 512, replace=False)
    assert (slide.rows(rows) == mapped[rows]).all()
    hold(benchmark, lambda: slide.rows(rows), lambda: np.array(mapped[rows]), 1.25)


def bench_a_finished_slide_beside_its_metadata(benchmark, tmp_path: Path) -> None:
    """What resuming asks of a slide of a finished cohort, beside reading its JSON files."""
    writer = StoreWriter.open(tmp_path / "cohort", TILING, "0" * 16, spec("made", 8))
    slides = [Slide(tmp_path / f"{i}.svs", f"{i}.svs") for i in range(50)]
    for slide in slides:
        slide.path.write_text(slide.name)
        put(writer, slide, np.zeros((100, 8), np.float32))
    texts = sorted((tmp_path / "cohort" / "slides").rglob("zarr.json"))
    ours = lambda: {writer.state(slide) for slide in slides}  # noqa: E731
    assert ours() == {"done"}
    hold(benchmark, ours, lambda: [json.loads(path.read_bytes()) for path in texts], 2)


def bench_a_manifest_beside_its_metadata(benchmark, tmp_path: Path) -> None:
    """The table of all slides of a cohort, beside reading their JSON files."""
    writer = StoreWriter.open(tmp_path / "cohort", TILING, "0" * 16, spec("made", 8))
    for i in range(50):
        slide = Slide(tmp_path / f"{i}.svs", f"{i}.svs")
        slide.path.write_text(slide.name)
        put(writer, slide, np.zeros((100, 8), np.float32))
    texts = sorted((tmp_path / "cohort" / "slides").rglob("zarr.json"))
    store = FeatureStore(tmp_path / "cohort")
    assert store.manifest()["patches"].sum() == 5000
    hold(benchmark, store.manifest, lambda: [json.loads(path.read_bytes()) for path in texts], 3)


def bench_a_finished_cohort_beside_its_making(benchmark, tmp_path: Path) -> None:
    """`tile_slides` where all is done, beside the run that did it."""
    slides = tmp_path / "slides"
    slides.mkdir()
    make_pyramid(slides / "0.tif", size=(700, 700), factors=(1, 4))
    for i in range(1, 10):
        (slides / f"{i}.tif").hardlink_to(slides / "0.tif")
    options: Any = {"encoder": "stain-stats", "downsample": 2, "tile_px": 64, "workers": 0}
    stores = iter(range(1000))

    def anew() -> object:
        return tile_slides(slides, tmp_path / f"store-{next(stores)}", **options)

    def again() -> object:
        return tile_slides(slides, tmp_path / "store-0", **options)

    anew()
    hold(benchmark, again, anew, 0.2)


def bench_a_scan_for_damage_beside_decoding(benchmark, tmp_path: Path) -> None:
    """Looking through 10,000 JPEG tiles, beside decoding a hundredth of them."""
    path, buffer = tmp_path / "slide.tif", io.BytesIO()
    tifffile.imwrite(
        buffer, draw_tissue(256, 256), tile=(256, 256), photometric="rgb", compression="jpeg"
    )
    buffer.seek(0)
    with tifffile.TiffFile(buffer) as tiff:
        page = tiff.pages[0]
        tile = buffer.getvalue()[page.dataoffsets[0] :][: page.databytecounts[0]]
    tifffile.imwrite(
        path, iter([tile] * 10_000), shape=(25_600, 25_600, 3), dtype=np.uint8, tile=(256, 256),
        photometric="ycbcr", compression="jpeg", subsampling=(2, 2), metadata=None,
    )  # fmt: skip
    with open_slide(path, reader="openslide") as slide:
        tiff = TiffFile(path)
        assert not find_damaged(tiff.file, tiff.levels[0].tiles).any()
        hold(
            benchmark,
            lambda: find_damaged(tiff.file, tiff.levels[0].tiles),
            lambda: [slide.read(0, 256 * x, 0, 256, 256) for x in range(100)],
            2,
        )
        tiff.close()


def bench_coverage_beside_the_reference(benchmark) -> None:
    """The share of tissue in a patch of a million, beside that of one by the literal loop."""
    mask = np.random.default_rng(0).random((2048, 1500)) < 0.5
    size, footprint = (75_000, 102_400), 128.0
    x, y = np.meshgrid(np.arange(1000) * 75, np.arange(1000) * 102)
    coords = np.stack([x.ravel(), y.ravel()], 1).astype(np.int32)
    corner, few, side = mask[:20, :20], coords[:9], (1000, 1000)
    np.testing.assert_allclose(
        coverage(corner, few, footprint, side), coverage_reference(corner, few, footprint, side)
    )
    hold(
        benchmark,
        lambda: coverage(mask, coords, footprint, size),
        lambda: coverage_reference(corner, few, footprint, side),
        0.001,
        per=len(coords) / len(few),
    )


def bench_a_report_beside_its_pictures(benchmark, tmp_path: Path) -> None:
    """The page of a slide with a thumbnail of 2,048 px, beside writing the thumbnail as PNG."""
    thumb = draw_tissue(2048, 1536)
    mask = np.zeros(thumb.shape[:2], bool)
    mask[:, :1024] = True
    coords = np.stack(np.meshgrid(np.arange(50), np.arange(70)), 2).reshape(-1, 2) * 10
    counts = dict.fromkeys(("grid", "tissue", "patches", "edge", "pen", "blur", "corrupt"), 0)
    attrs = {
        "name": "a.svs", "source": {"path": "a.svs"}, "status": "ok", "mpp": 0.5,
        "mpp_source": "file", "level": 0, "reader": "cucim", "vendor": "aperio", "width": 1000,
        "height": 750, "footprint_px": 10.0, "counts": counts,
    }  # fmt: skip
    flags = np.zeros(len(coords), np.uint8)
    made = SimpleNamespace(attrs=attrs, coords=coords, flags=flags, thumb=thumb, mask=mask)
    (tmp_path / "slides" / "a.zarr").mkdir(parents=True)

    class OneSlide(dict[str, Any]):
        failed: dict[str, dict[str, Any]] = {}  # noqa: RUF012

    reports = iter(range(1000))

    def report() -> object:
        return write_report(tmp_path, tmp_path / f"{next(reports)}", store=OneSlide(a=made))

    hold(benchmark, report, lambda: Image.fromarray(thumb).save(io.BytesIO(), "png"), 0.5)


FIRST = {
    "ours": "import sys, motet; motet.io.open_slide(sys.argv[1]).read(0, 0, 0, 256, 256)",
    "theirs": (
        "import sys, numpy; from openslide import OpenSlide;"
        "numpy.asarray(OpenSlide(sys.argv[1]).read_region((0, 0), 0, (256, 256)).convert('RGB'))"
    ),
}


def bench_an_import_beside_the_standard_library(benchmark) -> None:
    """A fresh process that imports motet, beside one that imports what it needs to begin with."""
    ours, theirs = "import motet", "import importlib, typing"
    hold(benchmark, lambda: run_python(ours), lambda: run_python(theirs), 2)


def bench_a_first_tile_beside_openslide(benchmark, tmp_path: Path) -> None:
    """A fresh process to a JPEG tile, beside one that imports openslide-python alone.

    Of the generic TIFFs that the tests write, OpenSlide reads no JPEG 2000.
    """
    path = os.fspath(tmp_path / "slide.tif")
    make_pyramid(path)
    runs = {who: lambda code=code: run_python(code, path) for who, code in FIRST.items()}
    hold(benchmark, runs["ours"], runs["theirs"], 2.5)
