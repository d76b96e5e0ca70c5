"""Levels of a slide: their sides and scales, and what sizes are sane."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, isfinite
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import SlideError

Pixels = NDArray[np.uint8]

# What is sane. Beyond it: SlideError "too-large", before any memory is taken for it.
MOST_SIDE_PX = 2_000_000  # of a slide
MOST_TILES = 1 << 24  # of a level
MOST_TILE_BYTES = 1 << 29  # of a tile or strip, decoded
MOST_PHOTO_PX = 100_000_000  # of a PNG or JPEG, which is held whole: 700 MB while it is read
MOST_LEVELS = 64


@dataclass(frozen=True)
class Level:
    """One resolution of a slide: its sides in px, and level-0 px per px of this level."""

    width: int
    height: int
    downsample: float


def make_levels(path: Path, sides: list[tuple[int, int]]) -> tuple[Level, ...]:
    """Make levels from their sides (width, height), finest first; refuse what is not sane."""
    if not sides or any(side < 1 for pair in sides for side in pair):
        raise SlideError(path, "unreadable", f"expected an image, got sides {sides[:1]}")
    if max(sides[0]) > MOST_SIDE_PX:
        raise SlideError(
            path, "too-large", f"{sides[0][0]} x {sides[0][1]} px; at most {MOST_SIDE_PX} a side"
        )
    return tuple(Level(*pair, downsample=_downsample(sides[0], pair)) for pair in sides)


def _downsample(base: tuple[int, int], sides: tuple[int, int]) -> float:
    """Return the whole number that level 0 was divided by, if one was, else the mean ratio."""
    ratios = [whole / side for whole, side in zip(base, sides, strict=True)]
    mean = sum(ratios) / 2

    def divides(k: int) -> bool:
        return all(
            side in (whole // k, ceil(whole / k)) for whole, side in zip(base, sides, strict=True)
        )

    low, high = int(min(ratios) * 0.5) or 1, int(max(ratios) * 2) + 1
    powers = [2**n for n in range(22) if low <= 2**n <= high and divides(2**n)]
    # Of the small levels several numbers could be right: scanners use powers of two.
    near = powers or [k for k in (int(mean), int(mean) + 1) if k >= 1 and divides(k)]
    return float(min(near, key=lambda k: abs(k - mean))) if near else mean


def sane_mpp(*values: float) -> float | None:
    """Return the mean of resolutions in micrometres per px, None if one cannot be."""
    if not values or not all(isfinite(value) and 1e-3 < value < 1e3 for value in values):
        return None
    return sum(values) / len(values)
