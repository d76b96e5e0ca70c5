"""The pixels of patches, read from a slide in pieces that suit its file."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import SlideError
from .resample import area_resample, area_resample_torch

if TYPE_CHECKING:
    from .grid import Grid
    from .slides import Slide

READ_PX = 2304  # longest side of what is read at once: 16 MB
READ_COST = 0.1  # of a read, beside the tiles that it decodes, in tiles
PROBED = 64  # patches that choose the decoder


@dataclass(frozen=True, eq=False)
class PatchBatch:
    """Hold patches that were decoded together.

    Args:
        rows: int64 [b], their positions in `wanted`, ascending.
        pixels: uint8 [b, P, P, 3], numpy, or a torch tensor on the device that decoded them.
        lost: int64 [k], positions of those that could not be decoded, which have no pixels here.
    """

    rows: np.ndarray
    pixels: Any
    lost: np.ndarray


def read_patches(
    slide: Slide,
    grid: Grid,
    wanted: np.ndarray,
    *,
    batch: int = 64,
    workers: int = 1,
    device: str = "cpu",
) -> Iterator[PatchBatch]:
    """Decode patches, batch by batch, in an order that decodes each tile of the file about once.

    Blocks of neighbours are read at once, and each patch is cut out of its block, by the exact area
    mean where resolutions differ. Every patch comes once, with its pixels or as lost. Which patches
    share a batch depends on slide, grid, wanted and batch alone. Pixels are the caller's as long as
    anything refers to them; then their memory serves another batch.

    Args:
        slide: where to read.
        grid: its patches.
        wanted: int64 [n], which of them, as rows of the grid.
        batch: how many in a batch; the last may be smaller.
        workers: threads that decode.
        device: "cpu" gives numpy; another is handed to slide.read_many, which then gives tensors.
    """
    wanted = np.asarray(wanted, np.int64)
    order, firsts, blocks, side = _blocks(slide, grid, wanted)
    corners = grid.corners[wanted[order]]
    if grid.read_px > READ_PX:
        ratio, images = 1.0, ((_pieced(slide, grid, at, workers), 0.0, 0.0) for at in corners)
    else:
        ratio = grid.ratio
        images = _images(slide, grid, corners, firsts, blocks, side, workers, device)
    memory = _Memory(batch, grid.tile_px, grid.tile_px, 3)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        kept, pixels = np.ones(len(chosen), bool), None
        # Slots come first, so that no image of the next batch is asked for.
        for slot, (image, x, y) in zip(np.argsort(np.argsort(chosen)), images, strict=False):
            if isinstance(image, SlideError):
                kept[slot] = False
            else:
                if pixels is None:
                    pixels = memory.like(image)
                _cut(image, x, y, ratio, pixels[slot])
        rows = np.sort(chosen)
        if pixels is None:
            pixels = np.empty((0, *memory.shape[1:]), np.uint8)
        else:
            pixels = pixels[: len(rows)] if kept.all() else pixels[np.flatnonzero(kept)]
        yield PatchBatch(rows[kept], pixels, rows[~kept])


def probe_decoder(slide: Slide, grid: Grid) -> str:
    """Return "cuda" if decoding patches there is quicker and gives the same pixels, else "cpu".

    Up to 64 patches from the middle of the grid are decoded twice on both; the second time counts.
    The pixels are the same if they differ by at most 2 grey levels on average.

    Args:
        slide: the slide; only cuCIM decodes on a GPU.
        grid: its patches.
    """
    import torch

    if slide.reader != "cucim" or not torch.cuda.is_available() or not len(grid.coords):
        return "cpu"
    first = max(0, len(grid.coords) // 2 - PROBED // 2)
    wanted = np.arange(first, min(first + PROBED, len(grid.coords)))

    def decoded(device: str) -> tuple[float, np.ndarray, np.ndarray]:
        start = time.perf_counter()
        (patches,) = read_patches(slide, grid, wanted, batch=PROBED, device=device)
        pixels = torch.as_tensor(patches.pixels).cpu().numpy()  # waits for the GPU
        return time.perf_counter() - start, patches.rows, pixels

    try:
        decoded("cuda")
        there, rows, pixels = decoded("cuda")
    except (SlideError, RuntimeError):  # what torch and cuCIM raise where decoding does not work
        return "cpu"
    decoded("cpu")
    here, own_rows, own_pixels = decoded("cpu")
    if there >= here or not len(rows) or not np.array_equal(rows, own_rows):
        return "cpu"
    return "cuda" if np.abs(pixels - own_pixels.astype(np.float32)).mean() <= 2 else "cpu"


def _blocks(
    slide: Slide, grid: Grid, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Return what to read, in blocks of k x k patches, k such that the fewest tiles are decoded.

    Returns:
        order: int64 [n], positions in wanted, block by block.
        firsts: int64 [R + 1], where in order each block begins.
        blocks: int64 [R, 2], their upper left corners in px of the level.
        side: of all blocks, in px.
    """
    corners = grid.corners.reshape(*grid.shape, 2)
    axes = (corners[0, :, 0], corners[:, 0, 1]) if len(grid.corners) else (np.empty(0),) * 2
    level, tiles = slide.levels[grid.level], slide.tile_px or (256, 256)
    rows, columns = np.divmod(wanted, max(1, grid.shape[1]))
    best = None
    for k in range(1, max(1, min(16, int(READ_PX / grid.read_px))) + 1):
        begins = [np.floor(axis[::k]) for axis in axes]
        ends = [np.append(axis[k - 1 : -1 : k], axis[-1:]) + grid.read_px for axis in axes]
        side = max(
            (math.ceil((end - begin).max() - 1e-6) for begin, end in zip(begins, ends, strict=True)
             if len(begin)), default=0,
        )  # fmt: skip
        ids = rows // k * len(begins[0]) + columns // k
        counts = np.bincount(ids, minlength=len(begins[0]) * len(begins[1]))
        spans = [
            np.minimum(begin + side - 1, length - 1) // tile - begin // tile + 1
            for begin, length, tile in zip(begins, (level.width, level.height), tiles, strict=True)
        ]
        cost = ((np.outer(spans[1], spans[0]).ravel() + READ_COST) * (counts > 0)).sum()
        if best is None or cost < best[0]:
            best = cost, side, begins, ids, counts
    assert best is not None
    _, side, begins, ids, counts = best
    down, across = np.divmod(np.flatnonzero(counts), max(1, len(begins[0])))
    firsts = np.concatenate([[0], np.cumsum(counts[counts > 0])])
    blocks = np.stack([begins[0][across], begins[1][down]], axis=1).astype(np.int64)
    return np.argsort(ids, kind="stable"), firsts, blocks, side


def _images(
    slide: Slide,
    grid: Grid,
    corners: np.ndarray,
    firsts: np.ndarray,
    blocks: np.ndarray,
    side: int,
    workers: int,
    device: str,
) -> Iterator[tuple[Any, float, float]]:
    """Yield for each patch an image, or the error, and where in it the patch begins."""
    options: dict[str, Any] = {"workers": workers} | ({} if device == "cpu" else {"device": device})
    at = (corners - np.repeat(blocks, np.diff(firsts), axis=0)).tolist()
    images = slide.read_many(grid.level, blocks, side, side, **options)
    for image, (first, end) in zip(images, pairwise(firsts.tolist()), strict=True):
        for nth in range(first, end):
            if isinstance(image, SlideError) and end - first > 1:  # a neighbour may be at fault
                low = np.floor(corners[nth])
                x, y = corners[nth] - low
                own = math.ceil(max(x, y) + grid.read_px - 1e-6)
                low = low.astype(np.int64)[None]
                for alone in slide.read_many(grid.level, low, own, own, **options):
                    yield alone, x, y
            else:
                yield image, *at[nth]


def _pieced(slide: Slide, grid: Grid, corner: np.ndarray, workers: int) -> Any:
    """Return the pixels of a patch that is too large to be read at once, or the error."""
    size = math.ceil(grid.tile_px / math.ceil(grid.read_px / READ_PX))
    parts = [(y, x) for y in range(0, grid.tile_px, size) for x in range(0, grid.tile_px, size)]
    places = corner + grid.ratio * np.array(parts)[:, ::-1]
    lows = np.floor(places)
    side = math.ceil((places - lows).max() + grid.ratio * size - 1e-6)
    whole = np.empty((grid.tile_px, grid.tile_px, 3), np.uint8)
    images = slide.read_many(grid.level, lows.astype(np.int64), side, side, workers=workers)
    for (y, x), begin, image in zip(parts, places - lows, images, strict=True):
        if isinstance(image, SlideError):
            return image
        _cut(image, begin[0], begin[1], grid.ratio, whole[y : y + size, x : x + size])
    return whole


def _cut(image: Any, x: float, y: float, ratio: float, out: Any) -> None:
    """Fill a patch, or a part of one, with the pixels from (x, y) on."""
    height, width = out.shape[:2]
    if ratio == 1.0:
        out[:] = image[int(y) : int(y) + height, int(x) : int(x) + width]
        return
    rows, columns = (begin + ratio * np.arange(n) for begin, n in ((y, height), (x, width)))
    if isinstance(image, np.ndarray):
        area_resample(image, rows, columns, ratio, out=out)
    else:
        out[:] = area_resample_torch(image, rows, columns, ratio)


class _Memory:
    """Memory of batches, used again once nothing refers to it.

    To touch fresh pages takes half as long as to fill them.
    """

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        self.blocks: list[tuple[memoryview, weakref.ref[np.ndarray]]] = []

    def like(self, image: Any) -> Any:
        """Return uninitialised pixels of the kind and on the device of an image."""
        if not isinstance(image, np.ndarray):
            return image.new_empty(self.shape)  # torch keeps memory itself
        free = [i for i, (_, user) in enumerate(self.blocks) if user() is None]
        i = free[0] if free else len(self.blocks)
        block = self.blocks[i][0] if free else np.empty(self.shape, np.uint8).data
        # Views of views refer to the first array over a memoryview, so that it outlives them all.
        pixels = np.asarray(block)
        self.blocks[i : i + 1] = [(block, weakref.ref(pixels))]
        return pixels
