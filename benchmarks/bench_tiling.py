"""Slides to stores beside raw cuCIM and an OpenSlide loop, and stores beside memory maps.

    python -m benchmarks.bench_tiling SLIDE.svs [--side 24576] [--json FILE]

makes a big slide (SLIDE.svs repeated, mirrored now and then, inside a disc, as a pyramid of JPEG
tiles) and times in turns, over the same patches: cuCIM's batched iterator alone; the pipeline up
to decoded pixels, with opening, tissue and damage; an OpenSlide loop; `tile_slides` with
stain-stats to the committed store. The error of pixels is their largest difference from
OpenSlide's. Then opening to the first tile in a fresh process, memory over many slides, and reading
a store.
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
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from motet.cli import measure
from motet.io import FeatureStore, open_slide, tile_slides
from motet.io.slides.slide import Slide
from motet.io.tiling.find_patches import find_tissue, thumb_px
from motet.io.tiling.grid import Grid, Tiling, damaged_patches, make_grid
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


@pytest.mark.parametrize("who", ["motet", "cucim", "openslide"])
def bench_decoding(benchmark, small: Path, who: str) -> None:
    """Tiles of a small slide; errors are against OpenSlide."""
    tiles = _patches(small)[1]
    benchmark.group = f"{len(tiles)} tiles of a small slide"
    benchmark.extra_info["error"] = error = pixel_error(small, tiles)
    assert error == 0
    benchmark.pedantic(DECODERS[who], (small, tiles), rounds=3, warmup_rounds=1)


def _patches(path: Path) -> tuple[Grid, NDArray[np.int32]]:
    """Return the grid of a slide at about 0.5 um per pixel, and its patches of tissue."""
    with open_slide(path) as slide:
        grid, wanted = _tissue(slide)
        return grid, grid.coords[wanted]


def _tissue(slide: Slide) -> tuple[Grid, NDArray[np.int64]]:
    """As the pipeline does before it decodes."""
    grid = make_grid(slide, Tiling(mpp=0.5, tile_px=TILE), slide.mpp or MPP)
    size = (slide.levels[0].width, slide.levels[0].height)
    thumb = slide.thumbnail(thumb_px(slide))
    scale = thumb.shape[1] / size[0]
    mask, pen = find_tissue(thumb, MPP / scale, grid.footprint_px * scale)
    tissue = coverage(mask & ~pen, grid.coords, grid.footprint_px, size)
    return grid, np.flatnonzero((tissue >= 0.1) & ~damaged_patches(slide, grid))


def by_motet(path: Path, tiles: NDArray[np.int32]) -> int:
    with open_slide(path, reader="cucim") as slide:
        grid, wanted = _tissue(slide)
        assert len(wanted) == len(tiles)
        return sum(len(b.rows) for b in read_patches(slide, grid, wanted, workers=WORKERS))


def by_cucim(path: Path, tiles: NDArray[np.int32]) -> int:
    """Nothing but the batched iterator, at the batch size that is best here."""
    from cucim import CuImage

    image, count = CuImage(str(path)), 0
    corners = [tuple(corner) for corner in tiles.tolist()]
    for pixels in image.read_region(
        corners, (TILE, TILE), level=0, batch_size=16, num_workers=WORKERS
    ):
        count += np.asarray(pixels).shape[0]
    return count


def by_openslide(path: Path, tiles: NDArray[np.int32]) -> int:
    from openslide import OpenSlide

    with OpenSlide(path) as slide:
        for x, y in tiles.tolist():
            np.asarray(slide.read_region((x, y), 0, (TILE, TILE)).convert("RGB"))
    return len(tiles)


DECODERS: dict[str, Callable[[Path, NDArray[np.int32]], int]] = {
    "motet": by_motet,
    "cucim": by_cucim,
    "openslide": by_openslide,
}


def pixel_error(path: Path, tiles: NDArray[np.int32], some: int = 50) -> int:
    """Return the largest difference, in grey levels, between our patches and OpenSlide's."""
    from openslide import OpenSlide

    worst = 0
    with open_slide(path, reader="cucim") as slide, OpenSlide(path) as exact:
        grid, wanted = _tissue(slide)
        wanted = wanted[:: max(1, len(wanted) // some)]
        for batch in read_patches(slide, grid, wanted, workers=WORKERS):
            for row, pixels in zip(batch.rows, batch.pixels, strict=True):
                x, y = grid.coords[wanted[row]].tolist()
                theirs = exact.read_region((x, y), 0, (TILE, TILE)).convert("RGB")
                worst = max(worst, int(np.abs(np.asarray(theirs, int) - pixels).max()))
    return worst


def make_big(source: Path, path: Path, side: int) -> None:
    """Write the big slide: the source repeated inside a disc on a background of 242."""
    import tifffile

    with open_slide(source) as slide:
        width, height = slide.levels[0].width, slide.levels[0].height
        piece = slide.read(0, 0, 0, width, height)
    image = np.full((side, side, 3), 242, np.uint8)
    for i, y in enumerate(range(0, side, height)):
        for j, x in enumerate(range(0, side, width)):
            part = image[y : y + height, x : x + width]
            part[:] = piece[:: (-1) ** i, :: (-1) ** j][: part.shape[0], : part.shape[1]]
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
    """Time all in turns, over the same tiles; OpenSlide on every eighth."""
    tiles = _patches(path)[1]
    some = tiles[::8]
    seconds: dict[str, list[float]] = {"motet": [], "cucim": [], "openslide": [], "store": []}

    def timed(who: str, run: Callable[[], object], count: int) -> None:
        started = time.perf_counter()
        run()
        seconds[who].append((time.perf_counter() - started) / count)

    with tempfile.TemporaryDirectory() as folder:
        for i in range(rounds):
            timed("cucim", lambda: by_cucim(path, tiles), len(tiles))
            timed("motet", lambda: by_motet(path, tiles), len(tiles))
            timed("openslide", lambda: by_openslide(path, some), len(some))
            how: Any = {"encoder": "stain-stats", "mpp": 0.5, "tile_px": TILE, "workers": 0}
            out = Path(folder, str(i))
            timed("store", lambda out=out, how=how: tile_slides(path, out, **how), len(tiles))
    rate = {who: 1 / statistics.median(times) for who, times in seconds.items()}
    return {
        "tiles": len(tiles),
        "tiles_per_s": rate,
        "spread": {who: [1 / max(t), 1 / min(t)] for who, t in seconds.items()},
        "of_cucim": rate["motet"] / rate["cucim"],
        "over_openslide": rate["motet"] / rate["openslide"],
        "store_over_openslide": rate["store"] / rate["openslide"],
        "pixel_error": pixel_error(path, tiles),
    }


def first_tile_s(path: Path, rounds: int) -> float:
    """Return the median seconds of a fresh process from the call of open_slide to a tile."""
    code = (
        "import sys, time; import motet; t = time.perf_counter();"
        "s = motet.io.open_slide(sys.argv[1]); s.read(0, 8192, 8192, 256, 256);"
        "print(time.perf_counter() - t)"
    )
    command = [sys.executable, "-c", code, str(path)]
    found = [
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(rounds)
    ]
    return statistics.median(found)


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
    """Return a process's peak in MiB over a cohort, after a tenth of it and at its end."""
    for i in range(slides):
        shutil.copyfile(source, folder / f"slide-{i:04d}{source.suffix}")
    command = [sys.executable, "-c", MEMORY, str(folder), str(folder.with_suffix(".store"))]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    early, late = map(float, out.split())
    return {"slides": slides, "after_a_tenth_mib": early, "at_the_end_mib": late}


def reading(folder: Path, tokens: int, width: int, rounds: int) -> dict[str, Any]:
    """Time whole bags and 512 random rows beside np.memmap and a copy."""
    from motet.io import import_features

    features = np.random.default_rng(0).standard_normal((tokens, width)).astype(np.float16)
    coords = np.stack([np.arange(tokens), np.arange(tokens)], 1).astype(np.int32)
    np.savez(folder / "bag.npz", features=features, coords=coords)
    import_features(folder / "bag.npz", folder / "store", encoder="random")
    np.save(folder / "bag.npy", features)
    some = np.random.default_rng(1).choice(tokens, 512)

    def memmap_all() -> NDArray[np.float16]:
        return np.array(np.load(folder / "bag.npy", mmap_mode="r"))

    def memmap_some() -> NDArray[np.float16]:
        return np.load(folder / "bag.npy", mmap_mode="r")[some]

    store = FeatureStore(folder / "store")
    runs: dict[str, Callable[[], NDArray[np.float16]]] = {
        "all_memmap": memmap_all,
        "all_store": lambda: np.array(store["bag"].features),
        "some_memmap": memmap_some,
        "some_store": lambda: store["bag"].rows(some),
    }
    for name, run in runs.items():
        assert (run() == (features if name.startswith("all") else features[some])).all()
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


def parts(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
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
    parser.add_argument("--side", type=int, default=SIDE, help="px; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--slides", type=int, default=200, help="for memory; default: %(default)s")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {"about": measure.about("cpu")}
    for name, figures in parts(options):
        found[name] = figures
        print(name, json.dumps(figures, indent=2), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
