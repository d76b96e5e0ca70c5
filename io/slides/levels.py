"""The levels of a slide: their sides and scales, and limits of sizes."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, isfinite
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import SlideError

Pixels = NDArray[np.uint8]
Mpp = tuple[float, float]
"""Micrometres per px along x and along y."""
SQUARE = 1.02  # the largest ratio of the sides of pixels that count as square

# Limits. Beyond them: SlideError "too-large", before memory is allocated.
MAX_SIDE_PX = 2_000_000  # of a slide
MAX_TILES = 1 << 24  # of a level
MAX_TILE_BYTES = 1 << 29  # of a tile or strip, decoded
MAX_PHOTO_PX = 100_000_000  # of a PNG or JPEG, which is decoded completely: 700 MB meanwhile
MAX_LEVELS = 64


@dataclass(frozen=True)
class Level:
    """One resolution of a slide: its sides in px, and level-0 px per px of this level."""

    width: int
    height: int
    downsample: float


def make_levels(path: Path, sides: list[tuple[int, int]]) -> tuple[Level, ...]:
    """Make levels from their sides (width, height), finest first.

    Raises:
        SlideError: "unreadable" if a side is below 1, "too-large" if one is above MAX_SIDE_PX.
    """
    if not sides or any(side < 1 for pair in sides for side in pair):
        raise SlideError(path, "unreadable", f"expected an image, got sides {sides[:1]}")
    if max(sides[0]) > MAX_SIDE_PX:
        raise SlideError(
            path, "too-large", f"{sides[0][0]} x {sides[0][1]} px; at most {MAX_SIDE_PX} a side"
        )
    return tuple(Level(*pair, downsample=_downsample(sides[0], pair)) for pair in sides)


def _downsample(base: tuple[int, int], sides: tuple[int, int]) -> float:
    """Return the integer by which level 0 was divided to get a level, else the mean ratio.

    Sides are rounded up or down, so the ratio of sides is not exactly that integer: 4097 px divided
    by 4 are 1024 or 1025 px.
    """
    ratios = [base_side / side for base_side, side in zip(base, sides, strict=True)]
    mean = sum(ratios) / 2

    def divides(k: int) -> bool:
        return all(
            side in (base_side // k, ceil(base_side / k))
            for base_side, side in zip(base, sides, strict=True)
        )

    low, high = int(min(ratios) * 0.5) or 1, int(max(ratios) * 2) + 1
    powers = [2**n for n in range(22) if low <= 2**n <= high and divides(2**n)]
    # For a small level several integers are possible. Scanners use powers of two: prefer these.
    candidates = powers or [k for k in (int(mean), int(mean) + 1) if k >= 1 and divides(k)]
    return float(min(candidates, key=lambda k: abs(k - mean))) if candidates else mean


def checked_mpp(x: float, y: float) -> Mpp | None:
    """Return a resolution along x and y, µm per px; None if one is not in 1e-3 to 1e3."""
    is_sound = all(isfinite(value) and 1e-3 < value < 1e3 for value in (x, y))
    return (x, y) if is_sound else None


def mean_mpp(mpp: Mpp | None) -> float | None:
    """Return the mean of both axes; None if they differ by more than 2 %, or are not known."""
    if mpp is None or max(mpp) > SQUARE * min(mpp):
        return None
    return (mpp[0] + mpp[1]) / 2
