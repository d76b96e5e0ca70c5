"""Thumbnails: the whole slide in one small image; each px is the mean of the area it covers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import SlideError
from .levels import Level, Pixels

BLOCK_PX = 1024, 256  # (width, height) of a read, about: a band of this height fits the cache


class ReadMany(Protocol):
    """Read regions of one size of a level, as `Slide.read_many` does."""

    def __call__(
        self, level: int, corners: NDArray[np.int64], width: int, height: int, /
    ) -> Iterator[Pixels | SlideError]: ...


def thumbnail(
    levels: Sequence[Level],
    read_many: ReadMany,
    longest_px: int,
    tile_px: tuple[int, int] | None = None,
) -> Pixels:
    """Return the whole slide as a small image, see `Slide.thumbnail`.

    Args:
        levels: of the slide, finest first.
        read_many: reads regions of them.
        longest_px: px of the longer side.
        tile_px: (width, height) of the file's tiles, None if it is not tiled.
    """
    if longest_px < 1:
        raise ValueError(f"longest_px: expected at least 1, got {longest_px}")
    base = levels[0]
    width, height = _size(levels, longest_px)
    level = thumbnail_level(levels, longest_px)
    sides = levels[level]
    # Edges of the thumbnail's px in px of the level. A level may lack a part of level 0: 1001 px
    # divided by 4 are 250 px, without the last px of level 0. So the last edge is cut.
    across = np.minimum(np.linspace(0, base.width / sides.downsample, width + 1), sides.width)
    down = np.minimum(np.linspace(0, base.height / sides.downsample, height + 1), sides.height)
    bands = _bands(read_many, level, sides, tile_px)
    if np.array_equal(across, np.arange(width + 1)) and np.array_equal(down, np.arange(height + 1)):
        return np.concatenate([band for _, band in bands])  # each px is a px of the level
    total = np.zeros((height, width, 3), np.float32)
    for top, band in bands:
        # The band covers the thumbnail's rows first to last - 1, the first and the last in part.
        first = int(np.searchsorted(down, top, "right")) - 1
        last = int(np.searchsorted(down, top + len(band)))
        rows = _row_sums(band, np.clip(down[first : last + 1] - top, 0, len(band)))
        total[first:last] += _column_sums(rows, across)
    total /= (np.diff(down)[:, None] * np.diff(across))[..., None].astype(np.float32)
    total += 0.5
    return total.astype(np.uint8)


def thumbnail_level(levels: Sequence[Level], longest_px: int) -> int:
    """Return the index of the level for a thumbnail: the coarsest that is not smaller than it."""
    width, height = _size(levels, longest_px)
    return max(
        i for i, level in enumerate(levels)
        if i == 0 or (level.width >= width and level.height >= height)
    )  # fmt: skip


def _size(levels: Sequence[Level], longest_px: int) -> tuple[int, int]:
    base = levels[0]
    scale = min(1.0, longest_px / max(base.width, base.height))
    return max(1, round(base.width * scale)), max(1, round(base.height * scale))


def _bands(
    read_many: ReadMany, level: int, sides: Level, tile_px: tuple[int, int] | None
) -> Iterator[tuple[int, Pixels]]:
    """Yield bands of a level from top to bottom: first row, pixels [h, w, 3], white if damaged."""
    any_read, error = False, None
    across, down = (
        tile * max(1, block // tile) if tile <= 1024 else block
        for block, tile in zip(BLOCK_PX, tile_px or (1, 1), strict=True)
    )
    lefts = range(0, sides.width, across)
    for top in range(0, sides.height, down):
        height = min(down, sides.height - top)
        band = np.full((height, sides.width, 3), 255, np.uint8)
        corners = np.array([(left, top) for left in lefts])
        blocks = read_many(level, corners, across, height)
        for left, block in zip(lefts, blocks, strict=True):
            width = min(across, sides.width - left)
            if isinstance(block, SlideError):
                error = block
                block = _read_by_tile(read_many, level, (left, top, width, height), tile_px)
                if block is None:
                    continue  # stays white
            any_read = True
            band[:, left : left + width] = block[:, :width]
        yield top, band
    if error and not any_read:  # a completely white thumbnail would look like glass
        raise SlideError(error.path, "damaged", f"nothing can be read: {error.message}")


def _row_sums(image: Pixels, edges: NDArray[np.float64]) -> NDArray[np.float32]:
    """Sum the rows of an image [h, w, 3] between edges (0 to at most h); parts of rows in part.

    The sum between two edges is that of the rows from floor(edge) to floor(next edge) - 1, plus the
    part of the row at the next edge, minus the part of the row at the edge.
    """
    floors = edges.astype(int)
    flat = image.reshape(len(image), -1)
    # A loop, as np.add.reduceat takes 20 times as long. 16 bits hold the sum of 257 rows of 255.
    dtype = np.uint16 if np.diff(floors).max() <= 257 else np.uint32
    sums = np.empty((len(edges) - 1, flat.shape[1]), dtype)
    for out, (start, stop) in zip(sums, pairwise(floors.tolist()), strict=True):
        np.add.reduce(flat[start:stop], axis=0, dtype=dtype, out=out)
    parts = flat[np.minimum(floors, len(flat) - 1)].astype(np.float32)
    parts *= (edges - floors).astype(np.float32)[:, None]
    integrals = sums.astype(np.float32)
    integrals += parts[1:]
    integrals -= parts[:-1]
    return integrals.reshape(-1, *image.shape[1:])


def _column_sums(image: NDArray[np.float32], edges: NDArray[np.float64]) -> NDArray[np.float32]:
    """Sum the columns of an image [h, w, 3] between edges (0 to at most w), parts in part."""
    low, high = edges[:-1], edges[1:]
    first = low.astype(int)
    total = np.zeros((image.shape[0], len(low), 3), np.float32)
    for step in range(int(np.ceil((high - first).max()))):
        at = first + step
        part = np.clip(np.minimum(high, at + 1) - np.maximum(low, at), 0, None).astype(np.float32)
        column = image.take(np.minimum(at, image.shape[1] - 1), axis=1)
        column *= part[:, None]
        total += column
    return total


def _read_by_tile(
    read_many: ReadMany,
    level: int,
    region: tuple[int, int, int, int],
    tile_px: tuple[int, int] | None,
) -> Pixels | None:
    """Read a region (x, y, width, height) with damage tile by tile; damaged tiles are white.

    None if all tiles are damaged.
    """
    x, y, width, height = region
    across, down = tile_px or (256, 256)
    out = np.full((height, width, 3), 255, np.uint8)
    any_read = False
    for top in range(y // down * down, y + height, down):
        for left in range(x // across * across, x + width, across):
            a, b = max(left, x), max(top, y)
            c, d = min(left + across, x + width), min(top + down, y + height)
            (tile,) = read_many(level, np.array([(a, b)]), c - a, d - b)
            if isinstance(tile, SlideError):
                continue  # stays white
            out[b - y : d - y, a - x : c - x] = tile
            any_read = True
    return out if any_read else None
