"""The pixels of patches, read from a slide in pieces that suit its file."""

from __future__ import annotations

import math
import time
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import SlideError
from .resample import area_resample, area_resample_torch

if TYPE_CHECKING:
    from ..slides.slide import Slide
    from .grid import Grid

READ_PX = 2304  # longest side of what is read at once: 16 MB
READ_COST = 0.02  # of a read, beside the tiles that it decodes, in tiles: 5 µs
FEWEST = 1.01  # times the least cost: smaller blocks than that takes stay in the cache
RUN = 16  # patches that a thread decodes at least before it asks for more
RUN_ON_DEVICE = 256
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
    mean where resolutions differ, in the thread that decoded it: its pixels are in the cache there,
    and to copy them costs a third of what it costs elsewhere. Every patch comes once, with its
    pixels or as lost. Which patches share a batch depends on slide, grid, wanted and batch alone.
    Pixels are the caller's as long as anything refers to them; then their memory serves another
    batch. While the caller holds one batch the next is decoded; each worker holds a block.

    Args:
        slide: where to read.
        grid: its patches.
        wanted: int64 [n], which of them, as rows of the grid.
        batch: how many in a batch; the last may be smaller.
        workers: threads that decode and resample.
        device: "cpu" gives numpy; another is handed to slide.read_many, which then gives tensors.
    """
    wanted = np.asarray(wanted, np.int64)
    blocks = _Blocks.of(slide, grid, wanted)
    if device == "cpu" and _are_tiles(slide, grid):
        yield from _read_tiles(slide, grid, wanted, blocks.order, batch, workers)
    else:
        yield from _read_blocks(slide, grid, wanted, blocks, batch, workers, device)


def _read_blocks(
    slide: Slide,
    grid: Grid,
    wanted: np.ndarray,
    blocks: _Blocks,
    batch: int,
    workers: int,
    device: str,
) -> Iterator[PatchBatch]:
    """Read blocks of patches, and cut each patch out in the thread that decoded it."""
    on_cpu = device == "cpu"
    images = _Images(slide, grid, {} if on_cpu else {"workers": workers, "device": device})
    memory = _Memory(batch, grid.tile_px, grid.tile_px, 3)
    at, firsts = grid.corners[wanted[blocks.order]], blocks.firsts.tolist()
    opened: dict[int, _BatchBuffer] = {}

    def fill(start: int, end: int) -> None:
        read = images.patches(blocks, start, end, at)
        for nth, (image, x, y) in enumerate(read, firsts[start]):
            opened[nth // batch].put(nth % batch, image, x, y, images.ratio)

    threads = workers if on_cpu else 1
    running: deque[tuple[int, Future[None]]]
    waiting, running = deque(blocks.runs(RUN if on_cpu else RUN_ON_DEVICE)), deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for number, chosen in enumerate(range(0, len(wanted), batch)):
            # All of this batch and of the next, and something to do for every thread.
            while waiting and (
                firsts[waiting[0][0]] < chosen + 2 * batch or len(running) <= threads
            ):
                start, end = waiting.popleft()
                for n in range(firsts[start] // batch, (firsts[end] - 1) // batch + 1):
                    if n not in opened:
                        rows = blocks.order[n * batch : (n + 1) * batch]
                        opened[n] = _BatchBuffer(
                            rows, memory.take() if on_cpu else None, memory.shape
                        )
                running.append((firsts[start], pool.submit(fill, start, end)))
            while running and running[0][0] < chosen + batch:
                running.popleft()[1].result()
            yield opened.pop(number).done()
    finally:
        pool.shutdown(cancel_futures=True)


def _are_tiles(slide: Slide, grid: Grid) -> bool:
    """Tell whether patches are the file's own tiles, and cuCIM decodes these."""
    side = grid.tile_px
    whole = grid.ratio == 1 and slide.tile_px == (side, side)
    return slide.reader == "cucim" and whole and not (grid.corners % side).any()


def _read_tiles(
    slide: Slide, grid: Grid, wanted: np.ndarray, order: np.ndarray, batch: int, workers: int
) -> Iterator[PatchBatch]:
    """Read patches that are tiles, in one go: cuCIM's own threads wait for no lock of Python's.

    To copy tiles in this thread costs less than what threads of Python lose to one another.
    """
    corners, side = grid.corners[wanted[order]].astype(np.int64), grid.tile_px
    images = slide.read_many(grid.level, corners, side, side, workers=workers)
    memory = _Memory(batch, side, side, 3)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        opened = _BatchBuffer(rows, memory.take(), memory.shape)
        for nth, image in zip(range(len(rows)), images, strict=False):  # takes no image too many
            opened.put(nth, image, 0.0, 0.0, 1.0)
        yield opened.done()


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


@dataclass(frozen=True, eq=False)
class _Blocks:
    """What to read: k x k patches at once, k such that few tiles of the file are decoded twice.

    order: int64 [n], positions in wanted, block by block.
    firsts: int64 [R + 1], where in order each block begins.
    corners: int64 [R, 2], their upper left corners in px of the level.
    side: of all blocks, in px.
    """

    order: np.ndarray
    firsts: np.ndarray
    corners: np.ndarray
    side: int

    @classmethod
    def of(cls, slide: Slide, grid: Grid, wanted: np.ndarray) -> _Blocks:
        corners = grid.corners.reshape(*grid.shape, 2)
        axes = (corners[0, :, 0], corners[:, 0, 1]) if len(grid.corners) else (np.empty(0),) * 2
        level, tiles = slide.levels[grid.level], slide.tile_px or (256, 256)
        rows, columns = np.divmod(wanted, max(1, grid.shape[1]))
        choices = []
        for k in range(1, max(1, min(16, int(READ_PX / grid.read_px))) + 1):
            begins = [np.floor(axis[::k]) for axis in axes]
            ends = [np.append(axis[k - 1 : -1 : k], axis[-1:]) + grid.read_px for axis in axes]
            lengths = [
                (end - begin).max(initial=0) for begin, end in zip(begins, ends, strict=True)
            ]
            side = math.ceil(max(lengths) - 1e-6)
            ids = rows // k * len(begins[0]) + columns // k
            counts = np.bincount(ids, minlength=len(begins[0]) * len(begins[1]))
            spans = [
                np.minimum(begin + side - 1, length - 1) // tile - begin // tile + 1
                for begin, length, tile in zip(
                    begins, (level.width, level.height), tiles, strict=True
                )
            ]
            cost = ((np.outer(spans[1], spans[0]).ravel() + READ_COST) * (counts > 0)).sum()
            choices.append((cost, side, begins, ids, counts))
        least = min(cost for cost, *_ in choices)
        _, side, begins, ids, counts = next(one for one in choices if one[0] <= FEWEST * least)
        down, across = np.divmod(np.flatnonzero(counts), max(1, len(begins[0])))
        return cls(
            np.argsort(ids, kind="stable"),
            np.concatenate([[0], np.cumsum(counts[counts > 0])]),
            np.stack([begins[0][across], begins[1][down]], axis=1).astype(np.int64),
            side,
        )

    def runs(self, patches: int) -> list[tuple[int, int]]:
        """Return runs of blocks, the first and the end of each, of about so many patches."""
        starts = np.flatnonzero(np.diff(self.firsts[:-1] // patches, prepend=-1))
        return list(pairwise([*starts.tolist(), len(self.corners)]))


class _Images:
    """Reads blocks, and what is too large for one."""

    def __init__(self, slide: Slide, grid: Grid, options: dict[str, Any]) -> None:
        self.slide, self.grid, self.options = slide, grid, options
        self.whole = grid.read_px > READ_PX
        self.ratio = 1.0 if self.whole else grid.ratio

    def read(self, corners: np.ndarray, side: int) -> Iterator[Any]:
        """Yield an image, or the error, for each corner."""
        if self.options:
            yield from self.slide.read_many(self.grid.level, corners, side, side, **self.options)
            return
        for x, y in corners.tolist():
            try:
                image = self.slide.read(self.grid.level, x, y, side, side)
            except SlideError as error:
                image = error
            yield image

    def patches(
        self, blocks: _Blocks, start: int, end: int, at: np.ndarray
    ) -> Iterator[tuple[Any, float, float]]:
        """Yield for each patch of some blocks an image, or the error, and its place in there."""
        corners = blocks.corners[start:end]
        spans = list(pairwise(blocks.firsts[start : end + 1].tolist()))
        if self.whole:
            for nth in range(spans[0][0], spans[-1][1]):
                yield self.pieced(at[nth]), 0.0, 0.0
            return
        read = self.read(corners, blocks.side)
        for image, corner, (first, last) in zip(read, corners, spans, strict=True):
            places = at[first:last] - corner
            if not isinstance(image, SlideError) or blocks.side <= math.ceil(self.grid.read_px):
                yield from ((image, x, y) for x, y in places.tolist())
                continue
            for place in at[first:last]:  # a neighbour may be at fault, wanted or not
                low = np.floor(place)
                x, y = place - low
                side = math.ceil(max(x, y) + self.grid.read_px - 1e-6)
                for alone in self.read(low.astype(np.int64)[None], side):
                    yield alone, x, y

    def pieced(self, corner: np.ndarray) -> Any:
        """Return the pixels of a patch that is too large to be read at once, or the error."""
        grid = self.grid
        size = math.ceil(grid.tile_px / math.ceil(grid.read_px / READ_PX))
        parts = [(y, x) for y in range(0, grid.tile_px, size) for x in range(0, grid.tile_px, size)]
        places = corner + grid.ratio * np.array(parts)[:, ::-1]
        lows = np.floor(places)
        side = math.ceil((places - lows).max() + grid.ratio * size - 1e-6)
        whole = None
        images = self.read(lows.astype(np.int64), side)
        for (y, x), begin, image in zip(parts, places - lows, images, strict=True):
            if isinstance(image, SlideError):
                return image
            if whole is None:
                whole = _like(image, (grid.tile_px, grid.tile_px, 3))
            _cut(image, begin[0], begin[1], grid.ratio, whole[y : y + size, x : x + size])
        return whole


class _BatchBuffer:
    """A batch that threads fill, each patch in a slot of its own."""

    def __init__(self, chosen: np.ndarray, pixels: Any, shape: tuple[int, ...]) -> None:
        self.rows, self.pixels, self.shape = np.sort(chosen), pixels, shape
        self.slots = np.argsort(np.argsort(chosen)).tolist()
        self.kept = np.ones(len(chosen), bool)

    def put(self, nth: int, image: Any, x: float, y: float, ratio: float) -> None:
        slot = self.slots[nth]
        if isinstance(image, SlideError):
            self.kept[slot] = False
            return
        if self.pixels is None:  # for tensors, which one thread reads
            self.pixels = _like(image, self.shape)
        _cut(image, x, y, ratio, self.pixels[slot])

    def done(self) -> PatchBatch:
        kept, pixels = self.kept, self.pixels
        if pixels is None or not kept.any():
            pixels = np.empty((0, *self.shape[1:]), np.uint8)
        elif kept.all():
            pixels = pixels[: len(kept)]
        else:
            pixels = pixels[np.flatnonzero(kept)]
        return PatchBatch(self.rows[kept], pixels, self.rows[~kept])


class _Memory:
    """Memory of batches, used again once nothing refers to it.

    To touch fresh pages takes half as long as to fill them.
    """

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        self.blocks: list[tuple[memoryview, weakref.ref[np.ndarray]]] = []

    def take(self) -> np.ndarray:
        free = [i for i, (_, user) in enumerate(self.blocks) if user() is None]
        i = free[0] if free else len(self.blocks)
        block = self.blocks[i][0] if free else np.empty(self.shape, np.uint8).data
        # Views of views refer to the first array over a memoryview, so that it outlives them all.
        pixels = np.asarray(block)
        self.blocks[i : i + 1] = [(block, weakref.ref(pixels))]
        return pixels


def _like(image: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(image, np.ndarray):
        return np.empty(shape, np.uint8)
    return image.new_empty(shape)


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
