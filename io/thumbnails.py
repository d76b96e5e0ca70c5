"""Thumbnails: the whole slide in one small picture, each px the mean of what it covers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import SlideError
from .slides import Pixels, Slide

BLOCK_PX = 1024  # side of what is read at once


def thumbnail(slide: Slide, longest_px: int) -> Pixels:
    """Return the whole slide; see Slide.thumbnail."""
    if longest_px < 1:
        raise ValueError(f"longest_px: expected at least 1, got {longest_px}")
    base = slide.levels[0]
    scale = min(1.0, longest_px / max(base.width, base.height))
    width, height = (max(1, round(side * scale)) for side in (base.width, base.height))
    level = max(
        i for i, one in enumerate(slide.levels)
        if i == 0 or (one.width >= width and one.height >= height)
    )  # fmt: skip
    sides = slide.levels[level]
    # A level may lack a part of level 0: 1001 px divided by 4 are 250 px, with a quarter left out.
    across = np.minimum(np.linspace(0, base.width / sides.downsample, width + 1), sides.width)
    down = np.minimum(np.linspace(0, base.height / sides.downsample, height + 1), sides.height)
    total = np.zeros((height, width, 3), np.float32)
    for top, band in _bands(slide, level):
        first = int(np.searchsorted(down, top, "right")) - 1
        last = int(np.searchsorted(down, top + len(band)))
        rows = _sums(band, np.clip(down[first : last + 1] - top, 0, len(band)))
        total[first:last] += _sums(rows.transpose(1, 0, 2).copy(), across).transpose(1, 0, 2)
    area = np.diff(down)[:, None] * np.diff(across)
    return (total / area[..., None].astype(np.float32) + 0.5).astype(np.uint8)


def _bands(slide: Slide, level: int) -> Iterator[tuple[int, Pixels]]:
    """Read a level from top to bottom: (first row, pixels), white where damaged."""
    sides = slide.levels[level]
    seen, lost = False, None
    lefts = range(0, sides.width, BLOCK_PX)
    for top in range(0, sides.height, BLOCK_PX):
        height = min(BLOCK_PX, sides.height - top)
        band = np.full((height, sides.width, 3), 255, np.uint8)
        corners = np.array([(left, top) for left in lefts])
        blocks = slide.read_many(level, corners, BLOCK_PX, height)
        for left, block in zip(lefts, blocks, strict=True):
            width = min(BLOCK_PX, sides.width - left)
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


def _sums(image: NDArray[Any], edges: NDArray[np.float64]) -> NDArray[np.float32]:
    """Integrate rows between edges: out[j] sums rows from edges[j] to edges[j + 1], parts in part.

    Args:
        image: [h, w, 3].
        edges: increasing, from 0 to at most h.
    """
    whole = edges.astype(int)
    kind = np.uint32 if image.dtype == np.uint8 else np.float32
    sums = np.empty((len(edges) - 1, *image.shape[1:]), np.float32)
    for row, start, stop in zip(sums, whole[:-1], whole[1:], strict=True):
        row[:] = np.add.reduce(image[start:stop], axis=0, dtype=kind)  # reduceat takes 20 times it
    parts = (edges - whole).astype(np.float32)[:, None, None]
    parts = parts * image[np.minimum(whole, len(image) - 1)]
    return sums + parts[1:] - parts[:-1]


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
