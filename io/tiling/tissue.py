"""Find tissue and blur in the thumbnail of a slide; ink.py finds pen marks.

The rules use only colour and contrast of the thumbnail, without trained weights: the same thumbnail
gives the same masks. docs/concepts/tissue.md shows them on real tissue, with the errors that
remain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .background import (
    Background,
    check_thumb,
    contrast,
    extremes,
    find_background,
    frames,
    remove_small,
    smooth,
    smooth_planes,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Image = NDArray[np.uint8]
    Mask = NDArray[np.bool_]
    Floats = NDArray[np.floating[Any]]

# Bounds of Otsu's threshold on the contrast (see `contrast`; background has 0). Measured on the
# test slides: noise, glue, JPEG artefacts and uneven light stay below 0.03 unless the picture is
# noisy; the palest stroma and fat lie above 0.05, and above 0.025 where all stain is pale. The
# upper bound is needed for strong eosin: there Otsu's threshold separates pale from deep tissue (it
# is 0.27), not tissue from glass.
_CONTRAST = (0.025, 0.07)
# Flat pixels of less contrast than this are uneven light or glue.
_CONTRAST_OF_FLAT = 0.05
# The threshold is at least this many times the median contrast of the background, and at most this
# share of the mean contrast of what is above it. Beside deeper tissue, within 1.5 times the
# smoothing, it is a share of that tissue's: the smoothing would else widen every piece.
_OF_NOISE, _OF_MEAN, _OF_NEIGHBOUR = 5.0, 0.35, 0.5
# Standard deviation of the smoothing, and the radius of the closing, um: gaps between nuclei and
# between fibres, up to twice as wide, are tissue. Fluorescence may show nothing but nuclei.
_SMOOTH_UM, _CLOSE_UM = 6.0, 25.0
# Largest hole that is filled and smallest piece that is kept: um^2, and the share of the thumbnail
# that is used instead if its resolution is unknown.
_HOLE, _PIECE = (20_000.0, 5e-4), (5_000.0, 1e-4)
# Resolutions (um per px) at which detail is measured, and above which blur cannot be seen; the
# least detail / structure of sharp tissue (see `blur_mask`: sharp tissue has 0.6 and more).
_FINEST_UM, _COARSEST_UM, _LEAST_DETAIL = 1.5, 8.0, 0.4


def tissue_mask(
    thumb: Image, um_per_px: float | None = None, threshold: float | None = None
) -> Mask:
    """Find the tissue of a slide: a threshold on the contrast between its thumbnail and the glass.

    The colour of the glass, of any tint and brightness, is that of the flat pixels; if the other
    pixels are brighter, the background is dark (fluorescence, dark field). The contrast to it is
    the saturation plus half of the darkness, or of the light. It is smoothed over 6 um. Otsu's
    threshold on it is kept between 0.025 and 0.07, and above five times the noise of the glass, so
    that a slide without tissue gives an empty mask. Gaps up to 50 um and holes up to 20,000 um² are
    filled, and pieces below 5,000 um² removed; without `um_per_px`, 1/320, 0.05 % and 0.01 % of the
    thumbnail. Padding is not tissue: pixels of exactly 0 or 255 in all channels, and dark areas
    with straight edges (the frame of a slide). Ink of a pen is coloured, so it counts as tissue
    here: subtract `pen_mask`.

    Args:
        thumb: thumbnail of the whole slide, uint8 [height, width, 3] RGB.
        um_per_px: micrometres per pixel of the thumbnail, None if not known.
        threshold: least contrast of tissue, above 0 and below 1; used instead of Otsu's. Lower
            values find paler tissue.

    Returns:
        Bool [height, width], True for tissue.

    Raises:
        ValueError: the image has another shape or dtype, the resolution is not positive, or the
            threshold is not between 0 and 1.

    Example:
        >>> from skimage import data
        >>> float(motet.io.tissue_mask(data.immunohistochemistry(), 0.5).mean()) > 0.9
        True
    """
    check_thumb(thumb, um_per_px)
    if threshold is not None and not 0 < threshold < 1:
        raise ValueError(f"threshold: expected a number between 0 and 1, got {threshold}")
    return find_stain(thumb, um_per_px, threshold, find_background(thumb))


def find_stain(
    thumb: Image, um_per_px: float | None, threshold: float | None, background: Background
) -> Mask:
    """Find the tissue of a thumbnail with a known background; see `tissue_mask`."""
    import numpy as np
    from scipy import ndimage

    brightest, darkest = extremes(thumb)
    is_scanned = (brightest > 0) & (darkest < 255)
    if background.is_dark and not any(background.colour):
        is_scanned = darkest < 255  # black is the background, not padding
    if not is_scanned.any():
        return is_scanned
    sigma = _px(_SMOOTH_UM, um_per_px, thumb)
    planes = smooth_planes(thumb, is_scanned, sigma)
    value = contrast(planes, background, is_scanned)
    frame = _frame(brightest, background, sigma)
    is_scanned &= ~frame
    if not is_scanned.any():
        return is_scanned
    least = np.float32(_threshold(value[is_scanned]) if threshold is None else threshold)
    around = 2 * round(1.5 * sigma) + 1
    mask = value > np.maximum(least, _OF_NEIGHBOUR * ndimage.maximum_filter(value, around))
    if threshold is None:
        mask &= ~background.flat | (value > _CONTRAST_OF_FLAT)
    mask = remove_small(mask & is_scanned, math.pi * sigma**2)  # specks of noise
    mask = _close(mask, _px(_CLOSE_UM, um_per_px, thumb))
    mask = _fill_and_drop(mask, um_per_px)
    return mask if background.is_dark else mask & (brightest > 0) & ~frame


def _frame(brightest: Image, background: Background, sigma: float) -> Mask:
    """Return the frame of the slide with its edge, which is smoothed by `sigma` px."""
    import numpy as np
    from scipy import ndimage

    glass = max(background.colour) * 255
    if background.is_dark or glass < 64:
        return np.zeros(brightest.shape, bool)
    frame = frames(1 - brightest / np.float32(glass))
    if not frame.any():
        return frame
    return np.asarray(ndimage.binary_dilation(frame, iterations=math.ceil(2.5 * sigma)), bool)


def _fill_and_drop(mask: Mask, um_per_px: float | None) -> Mask:
    """Return a mask with its small holes filled and its small pieces removed."""
    px_um2 = um_per_px**2 if um_per_px else None
    hole, piece = (um2 / px_um2 if px_um2 else share * mask.size for um2, share in (_HOLE, _PIECE))
    hole = min(hole, mask.size / 20)  # else the glass of a small thumbnail could be a hole
    return ~remove_small(~remove_small(mask, piece), hole)


def _threshold(value: Floats) -> float:
    """Return the least contrast of tissue, from the contrasts [n] of all pixels."""
    import numpy as np

    lowest, highest = _CONTRAST
    low = value[value < highest]
    noise = float(np.median(low)) if low.size else 0.0
    # Values above `highest` are surely tissue. They are cut off at twice that, so that Otsu's
    # threshold separates glass from tissue, not pale tissue from deep tissue.
    threshold = otsu(np.minimum(value, 2 * highest))
    threshold = min(threshold, _OF_MEAN * float(value[value >= threshold].mean()))
    return min(max(threshold, lowest, _OF_NOISE * noise), highest)


def _close(mask: Mask, radius: float) -> Mask:
    """Return the morphological closing of a mask with a disc of this radius, px."""
    import numpy as np
    from scipy import ndimage

    if not mask.any():
        return mask
    pad = math.ceil(radius)
    distance = np.asarray(ndimage.distance_transform_edt(~np.pad(mask, pad, mode="edge")))
    near = distance <= radius
    if near.all():
        return np.ones_like(mask)
    return (np.asarray(ndimage.distance_transform_edt(near)) > radius)[pad:-pad, pad:-pad]


def blur_mask(thumb: Image, tissue: Mask, um_per_px: float | None) -> Mask:
    """Find tissue that is out of focus: it has little fine detail beside its coarser structure.

    Detail is the contrast at 1 px and finer, structure the contrast between 1 and 3 px, both as
    root mean squares over a window of 8 px. They are compared at 1.5 um per px (or the resolution
    of a coarser thumbnail), and at two and four times that. Sharp tissue of any stain has
    detail / structure above 0.6 nearly everywhere; tissue below 0.4 is taken as blurred. A Gaussian
    blur of s um is found if the thumbnail has s / 1.5 um per px or finer: a blur of 3 um at 2 um
    per px. A blur below 2 um is never found. If the thumbnail is coarser than 8 um per px, or its
    resolution is unknown, blur cannot be seen and the mask is empty.

    Args:
        thumb: thumbnail of the whole slide, uint8 [height, width, 3] RGB.
        tissue: bool [height, width], see `tissue_mask`.
        um_per_px: micrometres per pixel of the thumbnail, None if not known.

    Returns:
        Bool [height, width], True for blurred tissue.

    Raises:
        ValueError: the image or mask has another shape or dtype, or the resolution is not positive.

    Example:
        >>> from scipy import ndimage
        >>> from skimage import data
        >>> sharp = data.immunohistochemistry()  # 0.5 um per px
        >>> blurred = ndimage.gaussian_filter(sharp, (8, 8, 0))
        >>> tissue = motet.io.tissue_mask(sharp, 0.5)
        >>> bool(motet.io.blur_mask(sharp, tissue, 0.5).any())
        False
        >>> bool((motet.io.blur_mask(blurred, tissue, 0.5) == tissue).mean() > 0.9)
        True
    """
    import numpy as np

    check_thumb(thumb, um_per_px)
    if tissue.dtype != bool or tissue.shape != thumb.shape[:2]:
        got = f"{tissue.dtype} {list(tissue.shape)}"
        raise ValueError(f"tissue: expected bool {list(thumb.shape[:2])}, got {got}")
    blurred = np.zeros(tissue.shape, bool)
    if um_per_px is None or um_per_px > _COARSEST_UM or not tissue.any():
        return blurred
    factor = max(1, math.ceil(_FINEST_UM / um_per_px - 0.01))
    grey, weight = _grey(thumb), tissue.astype(np.float32)
    steps = [step for step in (factor, 2 * factor, 4 * factor) if 16 * step <= min(tissue.shape)]
    for step in steps:
        image, within = _pool(grey, step), _pool(weight, step)
        fine, coarse = _smooth_both((image, 1.0), (image, 3.0))
        detail, structure = _smooth_both(
            (_square(image - fine, within), 8.0), (_square(fine - coarse, within), 8.0)
        )
        is_blurred = (within > 0.5) & (detail < _LEAST_DETAIL**2 * structure)
        is_blurred = remove_small(is_blurred, 64)
        rows, columns = (  # of each pixel of the thumbnail; the last pool takes the remainder
            np.minimum(np.arange(side) // step, count - 1)
            for side, count in zip(tissue.shape, is_blurred.shape, strict=True)
        )
        blurred |= is_blurred[rows[:, None], columns]
    return blurred & tissue


def otsu(values: Floats) -> float:
    """Return Otsu's threshold: the two classes that it separates have the least variance within.

    Equivalently, and computed here, the largest variance between both, over 256 bins.
    """
    import numpy as np

    low, high = float(values.min()), float(values.max())
    if low == high:
        return low
    counts, edges = np.histogram(values, 256, (low, high))
    centres, n = (edges[1:] + edges[:-1]) / 2, np.cumsum(counts)
    total = np.cumsum(counts * centres)
    below, above = total[:-1] / n[:-1], (total[-1] - total[:-1]) / (n[-1] - n[:-1])
    between = n[:-1] * (n[-1] - n[:-1]).astype(float) * (below - above) ** 2
    return float(centres[np.argmax(between)])


def _grey(thumb: Image) -> Floats:
    """Return the mean of the channels, float32, ten times as fast as thumb.mean(2)."""
    import numpy as np

    grey = thumb[..., 0].astype(np.float32)
    grey += thumb[..., 1]
    grey += thumb[..., 2]
    return grey / np.float32(3)


def _square(values: Floats, weight: Floats) -> Floats:
    """Return weight * values**2 in the memory of the values."""
    values *= values
    values *= weight
    return values


def _smooth_both(*pair: tuple[Floats, float]) -> Sequence[Floats]:
    """Smooth two images (image, sigma) at the same time, in two threads."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(smooth, *zip(*pair, strict=True)))


def _pool(image: Floats, factor: int) -> Floats:
    """Return the means of blocks of factor x factor px, three times as fast as by mean."""
    import numpy as np

    if factor == 1:
        return image
    height, width = (side // factor for side in image.shape)
    blocks = image[: height * factor, : width * factor].reshape(height, factor, width, factor)
    total = np.zeros((height, width), np.float32)
    for i in range(factor):
        row = blocks[:, i, :, 0].copy()
        for j in range(1, factor):
            row += blocks[:, i, :, j]
        total += row
    return total / np.float32(factor**2)


def _px(um: float, um_per_px: float | None, thumb: Image) -> float:
    """Return a length in px of the thumbnail, at least 1 and at most 1/32 of the longer side.

    If the resolution is unknown, 8 um are taken as 1/500 of the longer side.
    """
    longest = max(thumb.shape[:2])
    px = um / um_per_px if um_per_px else um / 8 * longest / 500
    return max(1.0, min(px, longest / 32))
