"""Slides to stores, timed beside cuCIM and OpenSlide; reading of stores, beside memory maps.

    python -m benchmarks.bench_tiling SLIDE.svs [--side 24576] [--json FILE]

makes a big slide, a pyramid of JPEG tiles: SLIDE.svs repeated inside a disc, every second copy
mirrored. On it these are timed in turns, over the same patches:

* cuCIM's batched iterator alone;
* the pipeline up to decoded pixels, with opening, tissue and damage;
* a loop with OpenSlide;
* `tile_slides` with stain-stats, until the store is committed.

The error of pixels is their largest difference from OpenSlide's. Then follow the time from opening
a slide to the first patch in a new process, memory over many slides, and reading of a store.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from motet.cli import measure
from motet.io import FeatureStore, open_slide, tile_slides
from motet.io.slides.slide import Slide
from motet.io.tiling.find_patches import find_tissue, thumb_px
from motet.io.tiling.grid import PatchGrid, Tiling, damaged_patches, make_grid
from motet.io.tiling.masks import coverage
from motet.io.tiling.patches import read_patches
from numpy.typing import NDArray

SIDE, MPP, TILE = 24_576, 0.499, 256
WORKERS = 2


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from python_tests.slides import make_pyramid

    path = tmp_path_factory.mktemp("bench") / "slide.tif"
    make_pyramid(path, size=(2560, 2048), factors=(1, 4))
    return path


@pytest.mark.parametrize("contender", ["motet", "cucim", "openslide"])
def bench_decoding(benchmark, small: Path, contender: str) -> None:
    """Decode the patches of a small slide; errors are against OpenSlide."""
    corners = _tissue_corners(small)
    benchmark.group = f"{len(corners)} patches of a small slide"
    benchmark.extra_info["error"] = error = pixel_error(small)
    assert error == 0
    benchmark.pedantic(DECODERS[contender], (small, corners), rounds=3, warmup_rounds=1)


def _tissue_corners(path: Path) -> NDArray[np.int32]:
    """Return the corners of a slide's tissue patches at about 0.5 um per pixel."""
    with open_slide(path) as slide:
        grid, rows = _find_tissue_rows(slide)
        return grid.coords[rows]


def _find_tissue_rows(slide: Slide) -> tuple[PatchGrid, NDArray[np.int64]]:
    """Return the grid, and the rows of its tissue patches, as the pipeline does before decoding."""
    grid = make_grid(slide, Tiling(mpp=0.5, tile_px=TILE), slide.mpp or MPP)
    size = (slide.levels[0].width, slide.levels[0].height)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(slide.damaged, grid.level)
        thumb = slide.thumbnail(thumb_px(slide))
        scale = thumb.shape[1] / size[0]
        mask, pen = find_tissue(thumb, MPP / scale, grid.footprint_px * scale)
        tissue = coverage(mask & ~pen, grid.coords, grid.footprint_px, size)
    return grid, np.flatnonzero((tissue >= 0.1) & ~damaged_patches(slide, grid))


def by_motet(path: Path, corners: NDArray[np.int32]) -> int:
    """Find the tissue and decode its patches; return their number."""
    with open_slide(path, reader="libjpeg") as slide:
        grid, rows = _find_tissue_rows(slide)
        assert len(rows) == len(corners)
        return sum(len(b.rows) for b in read_patches(slide, grid, rows, workers=WORKERS))


def by_cucim(path: Path, corners: NDArray[np.int32]) -> int:
    """Decode with the batched iterator alone, at the batch size that was fastest."""
    from cucim import CuImage

    image, count = CuImage(str(path)), 0
    for pixels in image.read_region(
        [tuple(corner) for corner in corners.tolist()], (TILE, TILE), level=0, batch_size=16,
        num_workers=WORKERS,
    ):  # fmt: skip
        count += np.asarray(pixels).shape[0]
    return count


def by_openslide(path: Path, corners: NDArray[np.int32]) -> int:
    """Decode patch by patch."""
    from openslide import OpenSlide

    with OpenSlide(path) as slide:
        for x, y in corners.tolist():
            np.asarray(slide.read_region((x, y), 0, (TILE, TILE)).convert("RGB"))
    return len(corners)


DECODERS: dict[str, Callable[[Path, NDArray[np.int32]], int]] = {
    "motet": by_motet,
    "cucim": by_cucim,
    "openslide": by_openslide,
}


def pixel_error(path: Path, count: int = 50) -> int:
    """Return the largest difference, in grey levels, between our patches and OpenSlide's.

    Of about `count` patches, spread over the slide.
    """
    from openslide import OpenSlide

    worst = 0
    with open_slide(path, reader="libjpeg") as slide, OpenSlide(path) as exact:
        grid, rows = _find_tissue_rows(slide)
        rows = rows[:: max(1, len(rows) // count)]
        for batch in read_patches(slide, grid, rows, workers=WORKERS):
            for row, pixels in zip(batch.rows, batch.pixels, strict=True):
                x, y = grid.coords[rows[row]].tolist()
                expected = exact.read_region((x, y), 0, (TILE, TILE)).convert("RGB")
                worst = max(worst, int(np.abs(np.asarray(expected, int) - pixels).max()))
    return worst


def make_big(source: Path, path: Path, side: int) -> None:
    """Write the big slide: the source repeated inside a disc, on a background of grey level 242."""
    import tifffile

    with open_slide(source) as slide:
        width, height = slide.levels[0].width, slide.levels[0].height
        pixels = slide.read(0, 0, 0, width, height)
    image = np.full((side, side, 3), 242, np.uint8)
    for i, y in enumerate(range(0, side, height)):
        for j, x in enumerate(range(0, side, width)):
            region = image[y : y + height, x : x + width]
            mirrored = pixels[:: (-1) ** i, :: (-1) ** j]
            region[:] = mirrored[: region.shape[0], : region.shape[1]]
    across = np.arange(side) - side / 2
    for y in range(side):
        image[y, across**2 + across[y] ** 2 > (0.45 * side) ** 2] = 242
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for level in range(4):
            factor = 4**level
            writer.write(
                image, tile=(256, 256), photometric="rgb", compression="jpeg",
                compressionargs={"level": 80}, subfiletype=1 if level else 0, metadata=None,
                resolution=(1e4 / MPP / factor,) * 2, resolutionunit="CENTIMETER",
                maxworkers=WORKERS,
            )  # fmt: skip
            n = len(image) // 4
            image = np.stack([
                (image[4 * y : 4 * y + 4, : 4 * n].reshape(4, n, 4, 3).mean((0, 2)) + 0.5)
                .astype(np.uint8) for y in range(n)
            ])  # fmt: skip


def speed(path: Path, rounds: int) -> dict[str, Any]:
    """Time all contenders in turns, over the same patches; OpenSlide on every eighth."""
    corners = _tissue_corners(path)
    few_corners = corners[::8]
    options: Any = {"encoder": "stain-stats", "mpp": 0.5, "tile_px": TILE, "workers": 0}
    seconds: dict[str, list[float]] = {"motet": [], "cucim": [], "openslide": [], "store": []}

    def add_time(contender: str, run: Callable[[], object], count: int) -> None:
        started = time.perf_counter()
        run()
        seconds[contender].append((time.perf_counter() - started) / count)

    with tempfile.TemporaryDirectory() as folder:
        for i in range(rounds):
            add_time("cucim", lambda: by_cucim(path, corners), len(corners))
            add_time("motet", lambda: by_motet(path, corners), len(corners))
            add_time("openslide", lambda: by_openslide(path, few_corners), len(few_corners))
            out = Path(folder, str(i))
            add_time("store", lambda out=out: tile_slides(path, out, **options), len(corners))
    rate = {name: 1 / statistics.median(times) for name, times in seconds.items()}
    return {
        "tiles": len(corners),
        "tiles_per_s": rate,
        "spread": {name: [1 / max(times), 1 / min(times)] for name, times in seconds.items()},
        "of_cucim": rate["motet"] / rate["cucim"],
        "over_openslide": rate["motet"] / rate["openslide"],
        "store_over_openslide": rate["store"] / rate["openslide"],
        "pixel_error": pixel_error(path),
    }


def first_tile_s(path: Path, rounds: int) -> float:
    """Return the median seconds from the call of open_slide to a patch, in a new process."""
    code = (
        "import sys, time; import motet; t = time.perf_counter();"
        "s = motet.io.open_slide(sys.argv[1]); s.read(0, 8192, 8192, 256, 256);"
        "print(time.perf_counter() - t)"
    )
    command = [sys.executable, "-c", code, str(path)]
    return statistics.median(
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(rounds)
    )


MEMORY = """
import sys, motet
peaks = []
def note(event):
    if event["event"] == "done":
        status = open("/proc/self/status").read()
        peaks.append(int(status.split("VmHWM:")[1].split()[0]) / 1024)
folder, out = sys.argv[1:]
motet.io.tile_slides(folder, out, encoder="stain-stats", mpp=0.5, workers=0, progress=note)
print(peaks[len(peaks) // 10], peaks[-1])
"""


def memory(source: Path, folder: Path, slides: int) -> dict[str, float]:
    """Return a process's peak memory in MiB after a tenth of a cohort, and at its end."""
    for i in range(slides):
        shutil.copyfile(source, folder / f"slide-{i:04d}{source.suffix}")
    command = [sys.executable, "-c", MEMORY, str(folder), str(folder.with_suffix(".store"))]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    early, late = map(float, out.split())
    return {"slides": slides, "after_a_tenth_mib": early, "at_the_end_mib": late}


def reading(folder: Path, tokens: int, width: int, rounds: int) -> dict[str, Any]:
    """Time complete bags and 512 random rows of a store, beside copies from np.memmap."""
    from motet.io import import_features

    features = np.random.default_rng(0).standard_normal((tokens, width)).astype(np.float16)
    coords = np.stack([np.arange(tokens), np.arange(tokens)], 1).astype(np.int32)
    np.savez(folder / "bag.npz", features=features, coords=coords)
    import_features(folder / "bag.npz", folder / "store", encoder="random")
    np.save(folder / "bag.npy", features)
    random_rows = np.random.default_rng(1).choice(tokens, 512)

    def memmap_all() -> NDArray[np.float16]:
        return np.array(np.load(folder / "bag.npy", mmap_mode="r"))

    def memmap_some() -> NDArray[np.float16]:
        return np.load(folder / "bag.npy", mmap_mode="r")[random_rows]

    store = FeatureStore(folder / "store")
    runs: dict[str, Callable[[], NDArray[np.float16]]] = {
        "all_memmap": memmap_all,
        "all_store": lambda: np.array(store["bag"].features),
        "some_memmap": memmap_some,
        "some_store": lambda: store["bag"].rows(random_rows),
    }
    for name, run in runs.items():
        assert (run() == (features if name.startswith("all") else features[random_rows])).all()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    ms = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    return {
        "tokens": tokens, "width": width, "ms": ms,
        "whole_bags": ms["all_memmap"] / ms["all_store"],
        "random_rows": ms["some_memmap"] / ms["some_store"],
    }  # fmt: skip


def results(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield each measurement's name and figures."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        big = folder / "big.tif"
        make_big(options.slide, big, options.side)
        yield "speed", speed(big, options.rounds)
        yield "first_tile_s", first_tile_s(big, options.rounds)
        for i, (tokens, width) in enumerate(((4_000, 1024), (60_000, 2048))):
            (folder / str(i)).mkdir()
            yield f"reading_{tokens}x{width}", reading(folder / str(i), tokens, width, 30)
        (folder / "cohort").mkdir()
        yield "memory", memory(options.slide, folder / "cohort", options.slides)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slide", type=Path, help="such as CMU-1-Small-Region.svs")
    parser.add_argument(
        "--side", type=int, default=SIDE, metavar="PX",
        help="side of the big slide in pixels (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N",
        help="times that each contender runs (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--slides", type=int, default=200, metavar="N",
        help="slides of the cohort for memory (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results to this file too"
    )
    options = parser.parse_args()
    report: dict[str, Any] = {"about": measure.about("cpu")}
    for name, figures in results(options):
        report[name] = figures
        print(name, json.dumps(figures, indent=2), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
