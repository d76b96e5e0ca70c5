"""Where the patches of a slide are: size of the slide, corners and side of the patches."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import StoreError
from ..store.read_slide import SlideFeatures

Floats = NDArray[np.float64]


class Geometry(NamedTuple):
    """Positions in level-0 px."""

    size: tuple[float, float]
    """(width, height) of the slide; if unknown, as far as its patches reach."""
    corners: Floats
    """[N, 2], (x, y) of the top left corners."""
    footprint: tuple[float, float]
    """Sides of a patch along x and y, which differ if pixels are not square; if unknown, the
    smallest distance between two patches."""
    mpp: float | None
    """µm per px along x."""


def geometry_of(slide: SlideFeatures) -> Geometry:
    """Return where the patches of a slide are.

    Raises:
        StoreError: the slide has no patch or no coordinates.
    """
    attrs = slide.attrs
    if not len(slide) or attrs.get("coords") == "absent":
        why = "no coordinates" if len(slide) else "no patch"
        raise StoreError(f"{slide.path}: expected patches with coordinates, got {why}")
    corners = np.asarray(slide.coords, np.float64)
    footprint = attrs.get("footprint_px")
    if not isinstance(footprint, int | float) or not footprint > 0:
        steps = [np.diff(np.unique(axis)).min(initial=np.inf) for axis in corners.T]
        footprint = min(steps) if np.isfinite(min(steps)) else 256.0
    sides = float(footprint), float(attrs.get("footprint_y_px", footprint))
    width, height = attrs.get("width"), attrs.get("height")
    if not (isinstance(width, int) and isinstance(height, int) and min(width, height) > 0):
        width, height = (corners.max(0) + sides).tolist()
    mpp = attrs.get("mpp")
    if not (isinstance(mpp, int | float) and 0 < mpp < np.inf):
        mpp = None
    return Geometry((width, height), corners, sides, mpp)


def check_values(slide: SlideFeatures, values: ArrayLike, name: str = "values") -> Floats:
    """Return values as float64 [N]; NaN for patches without a value.

    Raises:
        ValueError: another shape, an infinite value, or no value at all.
    """
    array = np.asarray(values, np.float64)
    if array.shape != (len(slide),):
        raise ValueError(
            f"{name}: expected one for each of the {len(slide):,} patches of {slide.key}, got "
            f"{list(array.shape)}"
        )
    if np.isinf(array).any() or np.isnan(array).all():
        raise ValueError(f"{name}: expected finite numbers, NaN for none, got others or only NaN")
    return array
