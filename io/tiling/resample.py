"""The exact area mean of an image, which brings slides to the resolution of the patches.

Each pixel of a patch is the mean of the level over exactly its footprint. This avoids aliasing, and
C++, numpy and torch give the same result, whatever filters a library has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..native import native

if TYPE_CHECKING:
    import torch

# floor(mean + HALF) rounds to nearest, halves up. The mean has an error of up to 1e-11, so a mean
# of exactly a half may come out a little below it; the 1e-9 still rounds it up.
HALF = 0.5 + 1e-9

Ratio = float | tuple[float, float]
"""Pixels of the image per pixel of the result: for both axes, or along x and along y."""

_module = native()  # numpy computes the same without it


def area_resample(
    image: np.ndarray, rows: np.ndarray, columns: np.ndarray, ratio: Ratio, *, out: Any = None
) -> np.ndarray:
    """Compute the mean of an image over windows of ratio x ratio px.

    out[i, j] is the mean over [rows[i], rows[i] + ratio) x [columns[j], columns[j] + ratio),
    rounded to nearest, halves up. A pixel that a window covers in part has that part as its weight.
    The mean is exact to 1e-11 grey levels before rounding, so the result is correctly rounded
    unless the mean lies less than 1e-9 below a half. The C++ code copies if the ratio is 1 and the
    windows begin at whole pixels, and computes with integers if it is 2 or 4.

    Args:
        image: uint8 [H, W, 3]; each row contiguous, rows may have gaps between them (a crop).
        rows: float64 [h], upper edges of the windows in px; windows must lie within the image.
        columns: float64 [w], left edges of the windows in px.
        ratio: px of the image per px of the result, 1 or more; a pair if it differs along x and y,
            for images whose pixels are not square.
        out: uint8 [h, w, 3] to write to; must not overlap the image. A new array if None.

    Returns:
        uint8 [h, w, 3].

    Raises:
        ValueError: a window reaches beyond the image, or an argument has another shape or dtype.

    Example:
        >>> image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
        >>> area_resample(image, np.array([0.0, 1.5]), np.array([0.25]), 2.5)[..., 0].tolist()
        [[13], [29]]
    """
    if out is None:
        out = np.empty((len(rows), len(columns), 3), np.uint8)
    if isinstance(ratio, tuple):
        # The C++ code has one ratio: few slides need two.
        across = _window_means(image, np.asarray(columns, np.float64), ratio[0], axis=1)
        mean = _window_means(across, np.asarray(rows, np.float64), ratio[1], axis=0)
        out[:] = np.floor(mean + HALF).astype(np.uint8)
    elif _module is not None:
        _module.area_resample(image, rows, columns, ratio, out)
    else:
        out[:] = area_resample_reference(image, rows, columns, ratio)
    return out


def area_resample_reference(
    image: np.ndarray, rows: np.ndarray, columns: np.ndarray, ratio: Ratio
) -> np.ndarray:
    """Compute area_resample as a product with a matrix of weights on each side.

    mean[i, j, c] = sum over y, x of down[i, y] image[y, x, c] across[j, x]: the weight of a pixel
    in a window is the product of its weights along both axes.
    """
    along_x, along_y = ratio if isinstance(ratio, tuple) else (ratio, ratio)
    down = window_weights(rows, image.shape[0], along_y)
    across = window_weights(columns, image.shape[1], along_x)
    mean = np.einsum("iy,yxc,jx->ijc", down, image.astype(np.float64), across, optimize=True)
    return np.floor(mean + HALF).astype(np.uint8)


def area_resample_torch(
    image: torch.Tensor, rows: np.ndarray, columns: np.ndarray, ratio: Ratio
) -> torch.Tensor:
    """Compute area_resample of a tensor, on its device."""
    import torch

    along_x, along_y = ratio if isinstance(ratio, tuple) else (ratio, ratio)
    down, across = (
        torch.from_numpy(window_weights(begins, side, along)).to(image.device)
        for begins, side, along in (
            (rows, image.shape[0], along_y),
            (columns, image.shape[1], along_x),
        )
    )
    mean = torch.einsum("iy,yxc,jx->ijc", down, image.double(), across)
    return (mean + HALF).to(torch.uint8)


def _window_means(values: np.ndarray, begins: np.ndarray, ratio: float, axis: int) -> np.ndarray:
    """Return the means over windows along axis 0 or 1, float64, as a sum of few weighted slices."""
    side = values.shape[axis]
    ends = _check_windows(begins, side, ratio)
    first = np.floor(begins).astype(np.int64)
    shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
    total = np.zeros(())
    for step in range(int(np.ceil((ends - first).max(initial=0)))):
        pixel = first + step
        share = np.minimum(ends, pixel + 1) - np.maximum(begins, pixel)
        weight = np.maximum(share, 0).reshape(shape) / ratio
        total = total + values.take(np.minimum(pixel, side - 1), axis) * weight
    return total


def _check_windows(begins: np.ndarray, side: int, ratio: float) -> np.ndarray:
    """Return the ends of windows; raise ValueError if one reaches beyond the image."""
    if not ratio >= 1:
        raise ValueError(f"ratio: expected a number of 1 or more, got {ratio}")
    ends = begins + ratio
    if not ((begins >= 0) & (ends <= side + 1e-6)).all():
        raise ValueError(f"expected windows of {ratio} px within the {side} px of the image")
    return ends


def window_weights(begins: np.ndarray, side: int, ratio: float) -> np.ndarray:
    """Return float64 [n, side]: the share of each window along one axis that lies in each pixel."""
    begins = np.asarray(begins, np.float64)
    ends = _check_windows(begins, side, ratio)
    pixels = np.arange(side)
    overlap = np.minimum(pixels + 1, ends[:, None]) - np.maximum(pixels, begins[:, None])
    return np.maximum(overlap, 0) / ratio
