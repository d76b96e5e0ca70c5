"""Thumbnails: the whole slide in one small picture, each px the mean of what it covers."""

from __future__ import annotations

from math import ceil

import numpy as np

from .errors import SlideError
from .slides import Pixels, Slide

BLOCK_PX = 1024  # about the side of what is read at once


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
    whole = max(1, min(sides.width // width, sides.height // height))
    return _mean_to(_mean_to(_reduced(slide, level, whole), height, 0), width, 1)


def _reduced(slide: Slide, level: int, factor: int) -> Pixels:
    """Read a level, reduced by a whole number to the means of blocks."""
    from PIL import Image

    sides = slide.levels[level]
    out = np.full((ceil(sides.height / factor), ceil(sides.width / factor), 3), 255, np.uint8)
    step = factor * ceil(BLOCK_PX / factor)
    corners = np.array(
        [(x, y) for y in range(0, sides.height, step) for x in range(0, sides.width, step)]
    )
    seen, lost = False, None
    for (x, y), image in zip(
        corners.tolist(), slide.read_many(level, corners, step, step), strict=True
    ):
        width, height = min(step, sides.width - x), min(step, sides.height - y)
        if isinstance(image, SlideError):
            lost, pieces = image, _piecewise(slide, level, x, y, width, height)
            if pieces is None:
                continue  # stays white
            image = pieces
        seen = True
        small = Image.fromarray(image[:height, :width]).reduce(factor)
        top, left = y // factor, x // factor
        out[top : top + small.height, left : left + small.width] = np.asarray(small)
    if lost and not seen:  # white would pass for glass
        raise SlideError(slide.path, "damaged", f"nothing can be read: {lost.message}")
    return out


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


def _mean_to(image: Pixels, size: int, axis: int) -> Pixels:
    """Average along an axis to `size` px, each the mean of the range that it covers."""
    length = image.shape[axis]
    if length == size:
        return image
    edges = np.arange(size + 1) * (length / size)
    low, high = edges[:-1], edges[1:]
    first = np.floor(low).astype(int)
    shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
    total = np.zeros((*image.shape[:axis], size, *image.shape[axis + 1 :]), np.float32)
    for step in range(ceil(length / size) + 1):
        at = first + step
        part = np.clip(np.minimum(high, at + 1) - np.maximum(low, at), 0, None).reshape(shape)
        total += image.take(np.minimum(at, length - 1), axis) * part.astype(np.float32)
    return (total * (size / length) + 0.5).astype(np.uint8)
