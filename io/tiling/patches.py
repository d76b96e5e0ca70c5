"""Read the pixels of patches from a slide, in blocks that suit the tiles of its file.

A patch seldom coincides with a tile of the file. Read one by one, patches would decode each tile up
to four times. So blocks of k x k neighbouring patches are read at once and the patches cut out.

Threads: the caller's thread decides which blocks to read next; `workers` threads read blocks, cut
the patches out and write them into the buffers of their batches. A block may hold patches of
several batches, and a batch patches of many blocks. A batch is complete once all blocks that begin
before its end have been read.

Memory: one block per thread, and the batches that are open. The pixels of a batch are given to the
caller without a copy; `_Memory` uses their memory again once the caller has dropped all references.
"""

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
from .resample import Ratio, area_resample, area_resample_torch

if TYPE_CHECKING:
    from ..slides.slide import Slide
    from .grid import PatchGrid

READ_PX = 2304  # most px per side of a block: 16 MB of pixels
MOST_PATCHES = 16  # most patches per side of a block
READ_COST = 0.02  # cost of a read beside that of its tiles, as a share of decoding a tile: 5 µs
COST_TOLERANCE = 1.01  # take the smallest block within 1 % of the least cost: it fits the cache
RUN = 16  # patches per task of a thread, about, so that the cost of a task is small beside it
RUN_ON_DEVICE = 256  # the same for a GPU, which decodes many tiles at a time
PROBED = 64  # patches that are decoded to choose the decoder


@dataclass(frozen=True, eq=False)
class PatchBatch:
    """A batch of decoded patches.

    Args:
        rows: int64 [b], their positions in `indices`, ascending.
        pixels: uint8 [b, P, P, 3], numpy, or a torch tensor on the device that decoded them.
        lost: int64 [k], positions of the patches that could not be decoded; they have no pixels.
    """

    rows: np.ndarray
    pixels: Any
    lost: np.ndarray


def read_patches(
    slide: Slide,
    grid: PatchGrid,
    indices: np.ndarray,
    *,
    batch: int = 64,
    workers: int = 1,
    device: str = "cpu",
    pinned: bool = False,
) -> Iterator[PatchBatch]:
    """Decode patches, batch by batch, in an order that decodes each tile of the file about once.

    Blocks of neighbouring patches are read at once. Each patch is cut out of its block, by the
    exact area mean if the resolutions differ, in the thread that decoded the block: its pixels are
    in that core's cache, and the copy takes a third of the time. Each patch comes once, with its
    pixels or as lost. Which patches are in a batch depends only on slide, grid, indices and batch.
    The memory of a batch is used again once nothing refers to its pixels. While the caller works on
    one batch, the next is decoded; each worker holds one block.

    Args:
        slide: the slide.
        grid: its patches.
        indices: int64 [n], the patches to read, as rows of the grid.
        batch: number of patches in a batch; the last one may be smaller.
        workers: threads that decode and resample.
        device: "cpu" gives numpy arrays; any other is passed to slide.read_many, which then gives
            tensors on that device.
        pinned: True keeps batches of numpy arrays in pinned memory, for copies to a GPU.
    """
    indices = np.asarray(indices, np.int64)
    most = 1 if device == "cpu" and _are_tiles(slide, grid) else MOST_PATCHES
    blocks = _Blocks.choose(slide, grid, indices, most)
    memory = _Memory(batch, grid.tile_px, grid.tile_px, 3, pinned=pinned)
    yield from _read_blocks(slide, grid, indices, blocks, memory, workers, device)


def _read_blocks(
    slide: Slide,
    grid: PatchGrid,
    indices: np.ndarray,
    blocks: _Blocks,
    memory: _Memory,
    workers: int,
    device: str,
) -> Iterator[PatchBatch]:
    """Read blocks of patches, and cut each patch out in the thread that decoded its block.

    Below, a position is a patch's place in `blocks.order`: patches sorted by their block. Batch n
    consists of the positions n * batch to (n + 1) * batch - 1; a run of blocks is the task of one
    thread, and consists of consecutive positions too.
    """
    on_cpu = device == "cpu"
    images = _BlockReader(slide, grid, {} if on_cpu else {"workers": workers, "device": device})
    batch = memory.shape[0]
    corners, firsts = grid.corners[indices[blocks.order]], blocks.firsts.tolist()
    buffers: dict[int, _BatchBuffer] = {}  # by number of the batch

    # Blocks of one patch whose pixels are not resampled are decoded straight into the batch.
    side = grid.tile_px
    in_place = on_cpu and grid.ratio == grid.aspect == 1 and blocks.size == (side, side)
    in_place = in_place and side <= READ_PX

    def fill(start: int, end: int) -> None:
        # Threads never write the same slot of a buffer, so they need no lock.
        if in_place:
            run = slice(firsts[start], firsts[end])
            _read_in_place(slide, grid.level, corners[run], run.start, batch, buffers)
            return
        patches = images.patches(blocks, start, end, corners)
        for position, (image, x, y) in enumerate(patches, firsts[start]):
            buffers[position // batch].put(position % batch, image, x, y, images.ratio)

    threads = workers if on_cpu else 1
    running: deque[tuple[int, Future[None]]]  # first position of a run, and its task
    runs, running = deque(blocks.runs(RUN if on_cpu else RUN_ON_DEVICE)), deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for number, begin in enumerate(range(0, len(indices), batch)):
            # Start the runs of this batch and the next, and at least one per thread. Buffers are
            # created here, before the task that fills them, so that tasks do not change the dict.
            while runs and (firsts[runs[0][0]] < begin + 2 * batch or len(running) <= threads):
                start, end = runs.popleft()
                for n in range(firsts[start] // batch, (firsts[end] - 1) // batch + 1):
                    if n not in buffers:
                        rows = blocks.order[n * batch : (n + 1) * batch]
                        buffers[n] = _BatchBuffer(
                            rows, memory.take() if on_cpu else None, memory.shape
                        )
                running.append((firsts[start], pool.submit(fill, start, end)))
            # Positions ascend with runs: once all runs that begin in this batch or before are done,
            # the batch is complete.
            while running and running[0][0] < begin + batch:
                running.popleft()[1].result()
            yield buffers.pop(number).finish()
    finally:
        pool.shutdown(cancel_futures=True)


def _read_in_place(
    slide: Slide, level: int, corners: np.ndarray, first: int, batch: int,
    buffers: dict[int, _BatchBuffer],
) -> None:  # fmt: skip
    """Decode the patches from position `first` on straight into their batches."""
    places = [divmod(position, batch) for position in range(first, first + len(corners))]
    out = [buffers[n].pixels_of(nth) for n, nth in places]
    errors = slide.read_into(level, corners.astype(np.int64), out)
    for (n, nth), error in zip(places, errors, strict=True):
        if error is not None:
            buffers[n].lose(nth)


def _are_tiles(slide: Slide, grid: PatchGrid) -> bool:
    """Return True if the patches are tiles of the file: then no block decodes a tile twice."""
    side = grid.tile_px
    same_size = grid.ratio == grid.aspect == 1 and slide.tile_px == (side, side)
    return same_size and not (grid.corners % side).any()


def probe_decoder(slide: Slide, grid: PatchGrid) -> str:
    """Return "cuda" if decoding there is faster and gives the same pixels, else "cpu".

    Up to 64 patches from the middle of the grid are decoded twice on both; the second time is
    compared. Pixels count as the same if they differ by at most 2 grey levels on average.

    Args:
        slide: the slide; only cuCIM decodes on a GPU.
        grid: its patches.
    """
    import torch

    if slide.reader != "cucim" or not torch.cuda.is_available() or not len(grid.coords):
        return "cpu"
    first = max(0, len(grid.coords) // 2 - PROBED // 2)
    indices = np.arange(first, min(first + PROBED, len(grid.coords)))

    def decode(device: str) -> tuple[float, np.ndarray, np.ndarray]:
        start = time.perf_counter()
        (patches,) = read_patches(slide, grid, indices, batch=PROBED, device=device)
        pixels = torch.as_tensor(patches.pixels).cpu().numpy()  # waits for the GPU
        return time.perf_counter() - start, patches.rows, pixels

    try:
        decode("cuda")
        cuda_s, cuda_rows, cuda_pixels = decode("cuda")
    except (SlideError, RuntimeError):  # torch and cuCIM raise these if decoding does not work
        return "cpu"
    decode("cpu")
    cpu_s, cpu_rows, cpu_pixels = decode("cpu")
    if cuda_s >= cpu_s or not len(cuda_rows) or not np.array_equal(cuda_rows, cpu_rows):
        return "cpu"
    return "cuda" if np.abs(cuda_pixels - cpu_pixels.astype(np.float32)).mean() <= 2 else "cpu"


@dataclass(frozen=True, eq=False)
class _Blocks:
    """The R blocks to read, each of k x k patches of the grid, with at least one patch to read.

    order: int64 [n], positions in `indices`, sorted by block.
    firsts: int64 [R + 1], the positions in `order` at which the blocks begin, and n.
    corners: int64 [R, 2], upper left corners of the blocks, (x, y) in px of the level.
    size: (width, height) of every block, in px of the level.
    """

    order: np.ndarray
    firsts: np.ndarray
    corners: np.ndarray
    size: tuple[int, int]

    @classmethod
    def choose(cls, slide: Slide, grid: PatchGrid, indices: np.ndarray, most: int) -> _Blocks:
        """Choose k, at most `most`: the smallest whose cost is within 1 % of the least.

        The cost is that of the tiles that are decoded, and of the reads. A tile that two blocks
        touch is decoded twice and counts twice.
        """
        corners = grid.corners.reshape(*grid.shape, 2)
        axes = (corners[0, :, 0], corners[:, 0, 1]) if len(grid.corners) else (np.empty(0),) * 2
        level, tiles = slide.levels[grid.level], slide.tile_px or (256, 256)
        rows, columns = np.divmod(indices, max(1, grid.shape[1]))
        choices = []
        for k in range(1, max(1, min(most, int(READ_PX / max(grid.read_size)))) + 1):
            # Per axis: where blocks begin (a whole px), and where their last patches end.
            begins = [np.floor(axis[::k]) for axis in axes]
            ends = [
                np.append(axis[k - 1 : -1 : k], axis[-1:]) + length
                for axis, length in zip(axes, grid.read_size, strict=True)
            ]
            width, height = (
                math.ceil((end - begin).max(initial=0) - 1e-6)
                for begin, end in zip(begins, ends, strict=True)
            )
            size = width, height
            ids = rows // k * len(begins[0]) + columns // k  # of the block of each patch
            counts = np.bincount(ids, minlength=len(begins[0]) * len(begins[1]))
            # Per axis: how many tiles of the file a block touches.
            spans = [
                np.minimum(begin + side - 1, length - 1) // tile - begin // tile + 1
                for begin, side, length, tile in zip(
                    begins, size, (level.width, level.height), tiles, strict=True
                )
            ]
            cost = ((np.outer(spans[1], spans[0]).ravel() + READ_COST) * (counts > 0)).sum()
            choices.append((cost, size, begins, ids, counts))
        least = min(cost for cost, *_ in choices)
        _, size, begins, ids, counts = next(
            choice for choice in choices if choice[0] <= COST_TOLERANCE * least
        )
        down, across = np.divmod(np.flatnonzero(counts), max(1, len(begins[0])))
        return cls(
            np.argsort(ids, kind="stable"),
            np.concatenate([[0], np.cumsum(counts[counts > 0])]),
            np.stack([begins[0][across], begins[1][down]], axis=1).astype(np.int64),
            size,
        )

    def runs(self, patches: int) -> list[tuple[int, int]]:
        """Return runs of blocks (first, end), each of about this number of patches."""
        starts = np.flatnonzero(np.diff(self.firsts[:-1] // patches, prepend=-1))
        return list(pairwise([*starts.tolist(), len(self.corners)]))


class _BlockReader:
    """Read blocks, and patches that are larger than a block may be."""

    def __init__(self, slide: Slide, grid: PatchGrid, options: dict[str, Any]) -> None:
        self.slide, self.grid, self.options = slide, grid, options
        # A patch of more than READ_PX is read in parts, and each part resampled: what `patches`
        # then yields has the patch's own resolution, hence a ratio of 1.
        self.in_parts = max(grid.read_size) > READ_PX
        ratio = grid.ratio if grid.aspect == 1 else grid.ratios
        self.ratio: Ratio = 1.0 if self.in_parts else ratio

    def read(self, corners: np.ndarray, size: tuple[int, int]) -> Iterator[Any]:
        """Yield for each corner the pixels of the rectangle there, or the SlideError."""
        if self.options:
            yield from self.slide.read_many(self.grid.level, corners, *size, **self.options)
            return
        for x, y in corners.tolist():
            try:
                image = self.slide.read(self.grid.level, x, y, *size)
            except SlideError as error:
                image = error
            yield image

    def patches(
        self, blocks: _Blocks, start: int, end: int, patch_corners: np.ndarray
    ) -> Iterator[tuple[Any, float, float]]:
        """Yield for each patch of the blocks start to end - 1 an image and the patch's place in it.

        The image is a SlideError if the patch cannot be decoded.

        Args:
            blocks: all blocks.
            start: the first block.
            end: one after the last block.
            patch_corners: float64 [n, 2], corners of the patches in the order of `blocks.order`.
        """
        corners = blocks.corners[start:end]
        spans = list(pairwise(blocks.firsts[start : end + 1].tolist()))
        if self.in_parts:
            for position in range(spans[0][0], spans[-1][1]):
                yield self.read_in_parts(patch_corners[position]), 0.0, 0.0
            return
        images = self.read(corners, blocks.size)
        read_size = np.array(self.grid.read_size)
        is_one_patch = bool((blocks.size <= np.ceil(read_size)).all())
        for image, corner, (first, last) in zip(images, corners, spans, strict=True):
            offsets = patch_corners[first:last] - corner
            if not isinstance(image, SlideError) or is_one_patch:
                yield from ((image, x, y) for x, y in offsets.tolist())
                continue
            # The block cannot be decoded, but some of its patches may be: read them one by one.
            for patch_corner in patch_corners[first:last]:
                low = np.floor(patch_corner)
                x, y = patch_corner - low
                width, height = np.ceil(patch_corner - low + read_size - 1e-6).astype(int).tolist()
                for patch_image in self.read(low.astype(np.int64)[None], (width, height)):
                    yield patch_image, x, y

    def read_in_parts(self, corner: np.ndarray) -> Any:
        """Return the pixels of a patch that is too large to be read at once, or the SlideError.

        The patch is divided into squares of `size` px of the patch, such that each reads at most
        about READ_PX px of the level.
        """
        grid = self.grid
        ratio = grid.ratio if grid.aspect == 1 else grid.ratios
        size = math.ceil(grid.tile_px / math.ceil(max(grid.read_size) / READ_PX))
        parts = [(y, x) for y in range(0, grid.tile_px, size) for x in range(0, grid.tile_px, size)]
        part_corners = corner + np.array(grid.ratios) * np.array(parts)[:, ::-1]
        lows = np.floor(part_corners)
        ends = (part_corners - lows).max(0) + np.array(grid.ratios) * size
        width, height = np.ceil(ends - 1e-6).astype(int).tolist()
        patch = None
        images = self.read(lows.astype(np.int64), (width, height))
        for (y, x), offset, image in zip(parts, part_corners - lows, images, strict=True):
            if isinstance(image, SlideError):
                return image
            if patch is None:
                patch = _empty_like(image, (grid.tile_px, grid.tile_px, 3))
            _cut(image, offset[0], offset[1], ratio, patch[y : y + size, x : x + size])
        return patch


class _BatchBuffer:
    """The pixels of a batch while threads fill it; each patch has its own slot.

    Patches arrive in the order of their blocks, `rows`. Their slots are in ascending order of the
    rows, so that the batch is the same whichever thread is first.

    Args:
        rows: int64 [b], the patches' positions in `indices`, in the order of arrival.
        pixels: uint8 [batch, P, P, 3], or None: then a tensor is allocated with the first patch.
        shape: (batch, P, P, 3).
    """

    def __init__(self, rows: np.ndarray, pixels: Any, shape: tuple[int, ...]) -> None:
        self.rows, self.pixels, self.shape = np.sort(rows), pixels, shape
        self.slots = np.argsort(np.argsort(rows)).tolist()
        self.kept = np.ones(len(rows), bool)

    def put(self, nth: int, image: Any, x: float, y: float, ratio: Ratio) -> None:
        """Cut the nth patch out of an image, or mark it as lost if the image is a SlideError."""
        if isinstance(image, SlideError):
            self.lose(nth)
            return
        if self.pixels is None:  # tensors: there is only one thread, so no other allocates too
            self.pixels = _empty_like(image, self.shape)
        _cut(image, x, y, ratio, self.pixels_of(nth))

    def lose(self, nth: int) -> None:
        """Mark the nth patch as lost."""
        self.kept[self.slots[nth]] = False

    def pixels_of(self, nth: int) -> Any:
        """Return the memory of the nth patch."""
        return self.pixels[self.slots[nth]]

    def finish(self) -> PatchBatch:
        """Return the batch, without the lost patches."""
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

    Without it each batch would be fresh memory, whose first access costs a page fault per 4 KiB:
    half as much time as filling it with pixels.

    How it knows that a batch is free: each `take` makes a new array over the same memory and keeps
    only a weak reference to it. All views of that array (slices, and views of these) hold a
    reference to it, because its memory comes from a memoryview and numpy follows the `base` of a
    view no further than there. So the weak reference is dead only once every view is gone.
    """

    def __init__(self, *shape: int, pinned: bool) -> None:
        self.shape, self.pinned = shape, pinned
        self.blocks: list[tuple[memoryview, weakref.ref[np.ndarray]]] = []

    def take(self) -> np.ndarray:
        """Return uint8 memory of the shape, not initialised."""
        free = [i for i, (_, user) in enumerate(self.blocks) if user() is None]
        i = free[0] if free else len(self.blocks)
        block = self.blocks[i][0] if free else self._allocate()
        pixels = np.asarray(block)
        self.blocks[i : i + 1] = [(block, weakref.ref(pixels))]
        return pixels

    def _allocate(self) -> memoryview:
        if not self.pinned:
            return np.empty(self.shape, np.uint8).data
        import torch

        return torch.empty(self.shape, dtype=torch.uint8, pin_memory=True).numpy().data


def _empty_like(image: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(image, np.ndarray):
        return np.empty(shape, np.uint8)
    return image.new_empty(shape)


def _cut(image: Any, x: float, y: float, ratio: Ratio, out: Any) -> None:
    """Fill `out`, a patch or a part of one, with the pixels of an image from (x, y) on.

    With a ratio of 1 the pixels are copied; x and y are integers then.
    """
    height, width = out.shape[:2]
    if ratio == 1.0:
        out[:] = image[int(y) : int(y) + height, int(x) : int(x) + width]
        return
    along_x, along_y = ratio if isinstance(ratio, tuple) else (ratio, ratio)
    rows, columns = y + along_y * np.arange(height), x + along_x * np.arange(width)
    if isinstance(image, np.ndarray):
        area_resample(image, rows, columns, ratio, out=out)
    else:
        out[:] = area_resample_torch(image, rows, columns, ratio)
