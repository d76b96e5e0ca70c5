"""The exact area mean of an image, by which slides are brought to the resolution asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..native import native

if TYPE_CHECKING:
    import torch

HALF = 0.5 + 1e-9  # a half that came out a little less is still rounded up

_module = native()  # numpy computes the same without it


def area_resample(
    image: np.ndarray, rows: np.ndarray, columns: np.ndarray, ratio: float, *, out: Any = None
) -> np.ndarray:
    """Take the mean of an image over windows of ratio x ratio px that begin at rows and columns.

    out[i, j] is the mean over [rows[i], rows[i] + ratio) x [columns[j], columns[j] + ratio), in
    which a pixel that a window covers in part counts in part, rounded to nearest, halves up. The
    mean is exact to 1e-11 grey levels before it is rounded, so that the result is the correctly
    rounded one unless the mean lies less than 1e-9 below a half. In C++, a ratio of 1 at whole
    pixels is a copy, and ratios of 2 and 4 there take integers alone.

    Args:
        image: uint8 [H, W, 3], pixels without gaps; rows may lie apart, as in a crop.
        rows: float64 [h], the upper ends of the windows in px, which must lie within the image.
        columns: float64 [w], their left ends.
        ratio: px of the image per px of the result, 1 or more.
        out: uint8 [h, w, 3] to write to, apart from the image; a new array if None.

    Returns:
        uint8 [h, w, 3].

    Raises:
        ValueError: a window reaches beyond the image, or an argument has another form.

    Example:
        >>> image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
        >>> area_resample(image, np.array([0.0, 1.5]), np.array([0.25]), 2.5)[..., 0].tolist()
        [[13], [29]]
    """
    if out is None:
        out = np.empty((len(rows), len(columns), 3), np.uint8)
    if _module is not None:
        _module.area_resample(image, rows, columns, ratio, out)
    else:
        out[:] = area_resample_reference(image, rows, columns, ratio)
    return out


def area_resample_reference(
    image: np.ndarray, rows: np.ndarray, columns: np.ndarray, ratio: float
) -> np.ndarray:
    """Compute area_resample literally: a matrix of the shares of pixels from each side."""
    down, across = (
        shares(*of, ratio) for of in ((rows, image.shape[0]), (columns, image.shape[1]))
    )
    mean = np.einsum("iy,yxc,jx->ijc", down, image.astype(np.float64), across, optimize=True)
    return np.floor(mean + HALF).astype(np.uint8)


def area_resample_torch(
    image: torch.Tensor, rows: np.ndarray, columns: np.ndarray, ratio: float
) -> torch.Tensor:
    """Compute area_resample on the device that the image is on."""
    import torch

    down, across = (
        torch.from_numpy(shares(*of, ratio)).to(image.device)
        for of in ((rows, image.shape[0]), (columns, image.shape[1]))
    )
    mean = torch.einsum("iy,yxc,jx->ijc", down, image.double(), across)
    return (mean + HALF).to(torch.uint8)


def shares(begins: np.ndarray, side: int, ratio: float) -> np.ndarray:
    """Return float64 [n, side]: how much of each window along one axis lies in each pixel."""
    if not ratio >= 1:
        raise ValueError(f"ratio: expected a number of 1 or more, got {ratio}")
    begins = np.asarray(begins, np.float64)
    ends = begins + ratio
    if not ((begins >= 0) & (ends <= side + 1e-6)).all():
        raise ValueError(f"expected windows of {ratio} px within the {side} px of the image")
    pixels = np.arange(side)
    overlap = np.minimum(pixels + 1, ends[:, None]) - np.maximum(pixels, begins[:, None])
    return np.maximum(overlap, 0) / ratio
