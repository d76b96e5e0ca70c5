"""Thumbnails: the whole slide in one small picture, each px the mean of what it covers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..errors import SlideError
from .slide import Pixels, Slide

BLOCK_PX = 1024, 256  # about what is read at once: a band of them stays in the cache


def thumbnail(slide: Slide, longest_px: int) -> Pixels:
    """Return the whole slide; see Slide.thumbnail."""
    if longest_px < 1:
        raise ValueError(f"longest_px: expected at least 1, got {longest_px}")
    base = slide.levels[0]
    width, height = _size(slide, longest_px)
    level = thumbnail_level(slide, longest_px)
    sides = slide.levels[level]
    # A level may lack a part of level 0: 1001 px divided by 4 are 250 px, with a quarter left out.
    across = np.minimum(np.linspace(0, base.width / sides.downsample, width + 1), sides.width)
    down = np.minimum(np.linspace(0, base.height / sides.downsample, height + 1), sides.height)
    if np.array_equal(across, np.arange(width + 1)) and np.array_equal(down, np.arange(height + 1)):
        return np.concatenate([band for _, band in _bands(slide, level)])  # the level itself
    total = np.zeros((height, width, 3), np.float32)
    for top, band in _bands(slide, level):
        first = int(np.searchsorted(down, top, "right")) - 1
        last = int(np.searchsorted(down, top + len(band)))
        rows = _row_sums(band, np.clip(down[first : last + 1] - top, 0, len(band)))
        total[first:last] += _column_sums(rows, across)
    total /= (np.diff(down)[:, None] * np.diff(across))[..., None].astype(np.float32)
    total += 0.5
    return total.astype(np.uint8)


def thumbnail_level(slide: Slide, longest_px: int) -> int:
    """Return the level that a thumbnail is made of: the coarsest that is no smaller."""
    width, height = _size(slide, longest_px)
    return max(
        i for i, one in enumerate(slide.levels)
        if i == 0 or (one.width >= width and one.height >= height)
    )  # fmt: skip


def _size(slide: Slide, longest_px: int) -> tuple[int, int]:
    base = slide.levels[0]
    scale = min(1.0, longest_px / max(base.width, base.height))
    return max(1, round(base.width * scale)), max(1, round(base.height * scale))


def _bands(slide: Slide, level: int) -> Iterator[tuple[int, Pixels]]:
    """Read a level from top to bottom: (first row, pixels), white where damaged."""
    sides = slide.levels[level]
    seen, lost = False, None
    across, down = (
        tile * max(1, block // tile) if tile <= 1024 else block
        for block, tile in zip(BLOCK_PX, slide.tile_px or (1, 1), strict=True)
    )
    lefts = range(0, sides.width, across)
    for top in range(0, sides.height, down):
        height = min(down, sides.height - top)
        band = np.full((height, sides.width, 3), 255, np.uint8)
        corners = np.array([(left, top) for left in lefts])
        blocks = slide.read_many(level, corners, across, height)
        for left, block in zip(lefts, blocks, strict=True):
            width = min(across, sides.width - left)
            if isinstance(block, SlideError):
                lost, pieces = block, _piecewise(slide, level, left, top, width, height)
                if pieces is None:
                    continue  # stays white
                block = pieces
            seen = True
            band[:, left : left + width] = block[:, :width]
        yield top, band
    if lost and not seen:  # white would pass for glass
        raise SlideError(slide.path, "damaged", f"nothing can be read: {lost.message}")


def _row_sums(image: Pixels, edges: NDArray[np.float64]) -> NDArray[np.float32]:
    """Integrate rows [h, w, 3] between edges from 0 to at most h, parts of rows in part."""
    whole = edges.astype(int)
    flat = image.reshape(len(image), -1)
    # A loop, for np.add.reduceat takes 20 times as long; 257 rows of 255 are what 16 bits hold.
    kind = np.uint16 if np.diff(whole).max() <= 257 else np.uint32
    sums = np.empty((len(edges) - 1, flat.shape[1]), kind)
    for out, (start, stop) in zip(sums, pairwise(whole.tolist()), strict=True):
        np.add.reduce(flat[start:stop], axis=0, dtype=kind, out=out)
    parts = flat[np.minimum(whole, len(flat) - 1)].astype(np.float32)
    parts *= (edges - whole).astype(np.float32)[:, None]
    integrals = sums.astype(np.float32)
    integrals += parts[1:]
    integrals -= parts[:-1]
    return integrals.reshape(-1, *image.shape[1:])


def _column_sums(image: NDArray[np.float32], edges: NDArray[np.float64]) -> NDArray[np.float32]:
    """Integrate columns [h, w, 3] between edges from 0 to at most w, parts of columns in part."""
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


def _piecewise(slide: Slide, level: int, x: int, y: int, width: int, height: int) -> Pixels | None:
    """Read a region of which parts are damaged: tile by tile, those white; None if all are."""
    across, down = slide.tile_px or (256, 256)
    out = np.full((height, width, 3), 255, np.uint8)
    seen = False
    for top in range(y // down * down, y + height, down):
        for left in range(x // across * across, x + width, across):
            a, b = max(left, x), max(top, y)
            c, d = min(left + across, x + width), min(top + down, y + height)
            try:
                out[b - y : d - y, a - x : c - x] = slide.read(level, a, b, c - a, d - b)
            except SlideError:
                continue  # stays white
            seen = True
    return out if seen else None
