"""Find tissue, pen marks and blur in the thumbnail of a slide.

The rules use only colour and contrast of the thumbnail, without trained weights: the same thumbnail
gives the same masks. docs/concepts/tissue.md shows them on real tissue, with the errors that
remain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Image = NDArray[np.uint8]
    Mask = NDArray[np.bool_]
    Floats = NDArray[np.floating[Any]]
    Pair = tuple[float, float]
    Ink = Callable[[float, float], Mask]

# Bounds of Otsu's threshold on the stain (see `_stain`; glass has 0). Measured on the test slides:
# noise, glue, JPEG artefacts and uneven light stay below 0.03; the palest stroma and fat lie above
# 0.05. Hence the lower bound. The upper bound is needed for strong eosin: there Otsu's threshold
# separates pale from deep tissue (it is 0.27), not tissue from glass.
_STAIN = (0.045, 0.07)
# The same for fluorescence, on the square root of the light above the background, from 0 to 1.
_LIGHT = (0.18, 0.25)
# Largest hole that is filled and smallest piece that is kept: um^2, and the share of the thumbnail
# that is used instead if its resolution is unknown.
_HOLE, _PIECE = (20_000.0, 5e-4), (5_000.0, 1e-4)
# Standard deviation of the smoothing, um. Fluorescence needs more: it shows nuclei, dots of 10 um
# with gaps between them, and the mask should cover the gaps.
_SMOOTH_UM, _SMOOTH_LIGHT_UM = 8.0, 30.0
# Resolutions (um per px) at which detail is measured, and above which blur cannot be seen; the
# least detail / structure of sharp tissue (see `blur_mask`: sharp tissue has 0.6 and more).
_FINEST_UM, _COARSEST_UM, _LEAST_DETAIL = 1.5, 8.0, 0.4
_BLACK = 12  # of 255: JPEG turns black into values up to this


def tissue_mask(thumb: Image, um_per_px: float | None = None) -> Mask:
    """Find the tissue of a slide: Otsu's threshold on the saturation of its thumbnail.

    Colours are divided by the colour of the glass and smoothed over 8 um. Half of the darkness is
    added to the saturation, to find tissue that is only grey (stroma in IHC). Otsu's threshold is
    kept between 0.045 and 0.07, so that a slide without tissue gives an empty mask, and a slide
    full of tissue a full one. Black pixels, and pixels of exactly 255 in all channels, are padding,
    not tissue. If the background is dark (fluorescence), brightness is used instead of saturation.
    Holes up to 20,000 um² are filled and pieces below 5,000 um² removed; without `um_per_px`,
    0.05 % and 0.01 % of the thumbnail. Ink of a pen is coloured, so it counts as tissue here:
    subtract `pen_mask`.

    Args:
        thumb: thumbnail of the whole slide, uint8 [height, width, 3] RGB.
        um_per_px: micrometres per pixel of the thumbnail, None if not known.

    Returns:
        Bool [height, width], True for tissue.

    Raises:
        ValueError: the image has another shape or dtype, or the resolution is not positive.

    Example:
        >>> from skimage import data
        >>> float(motet.io.tissue_mask(data.immunohistochemistry(), 0.5).mean()) > 0.9
        True
    """
    import numpy as np

    _check(thumb, um_per_px)
    brightest, darkest = _extremes(thumb)
    dark = has_dark_background(thumb)
    is_scanned = darkest < 255 if dark else (brightest > _BLACK) & (darkest < 255)
    if not is_scanned.any():
        return is_scanned
    if dark:
        light = _smooth(brightest / np.float32(255), _px(_SMOOTH_LIGHT_UM, um_per_px, thumb))
        background = np.median(brightest[is_scanned & (brightest < 32)]) / 255
        value, (lowest, highest) = np.sqrt(np.maximum(light - background, 0)), _LIGHT
    else:
        value = _stain(thumb, is_scanned, _px(_SMOOTH_UM, um_per_px, thumb))
        lowest, highest = _STAIN
    # Values above `highest` are surely tissue. They are cut off at twice that, so that Otsu's
    # threshold separates glass from tissue, not pale tissue from deep tissue.
    threshold = otsu(np.minimum(value[is_scanned], 2 * highest))
    mask = (value > min(max(threshold, lowest), highest)) & is_scanned
    px_um2 = um_per_px**2 if um_per_px else None
    hole, piece = (um2 / px_um2 if px_um2 else share * mask.size for um2, share in (_HOLE, _PIECE))
    hole = min(hole, mask.size / 20)  # else the glass of a small thumbnail could be a hole
    mask = ~_remove_small(~_remove_small(mask, piece), hole)
    return mask if dark else mask & (brightest > 0)


def pen_mask(thumb: Image) -> Mask:
    """Find marks of a pen (green, blue, red and black ink) by their optical densities.

    The optical density of red is at most 1.2 times that of green in haematoxylin, eosin and DAB,
    and at least 1.5 times in green and blue ink. Red ink has high and equal densities of green and
    blue, and almost none of red; black ink has high and equal densities of all three. A mark then
    grows from such pixels into its paler rim, and over tissue that it covers. On a dark background
    (fluorescence) there are no marks. Red chromogens (AEC, Fast Red) that stain large areas deeply
    look like red ink.

    Args:
        thumb: thumbnail of the whole slide, uint8 [height, width, 3] RGB.

    Returns:
        Bool [height, width], True for ink.

    Raises:
        ValueError: the image has another shape or dtype.

    Example:
        >>> from skimage import data
        >>> tissue = data.immunohistochemistry()  # blue haematoxylin, brown DAB
        >>> bool(motet.io.pen_mask(tissue).any())
        False
        >>> tissue[100:200] = (45, 85, 175)
        >>> round(float(motet.io.pen_mask(tissue).mean()), 2)
        0.2
    """
    import numpy as np
    from scipy import ndimage

    _check(thumb, None)
    mark = np.zeros(thumb.shape[:2], bool)
    if has_dark_background(thumb):
        return mark
    brightest, darkest = _extremes(thumb)
    is_scanned = (brightest > _BLACK) & (darkest < 255)
    colour = _balance(thumb, is_scanned, max(1.0, max(mark.shape) / 1000))
    for ink, core_limits, rim_limits in _inks(colour):
        core = _remove_small(ink(*core_limits) & is_scanned, max(9.0, 2e-4 * mark.size))
        if core.any():
            rim = ink(*rim_limits) & is_scanned
            mark |= ndimage.binary_propagation(core, mask=core | rim)
    # Tissue under a mark hides its colour. A pixel counts as marked if, smoothed over 1 % of the
    # thumbnail, more than a third of its surroundings is.
    if mark.any():
        mark |= _smooth(mark.astype(np.float32), max(1.0, max(mark.shape) / 100)) > 0.35
    return mark


def _inks(colour: Sequence[Floats]) -> list[tuple[Ink, Pair, Pair]]:
    """Return the rules for cold (green, blue), warm (red) and black ink.

    Each is a function of a least optical density and a ratio of densities, which returns a mask,
    and two pairs of these limits: for the core of a mark, which only ink has, and for its rim,
    which stain may have too and which counts only if it touches a core.
    """
    import numpy as np

    red, green, blue = (-np.log10(np.clip(plane, 1 / 255, 1)) for plane in colour)
    lowest = np.minimum(np.minimum(red, green), blue)
    highest = np.maximum(np.maximum(red, green), blue)

    def cold(depth: float, ratio: float) -> Mask:
        return (red > depth) & (red > ratio * green) & (red > blue)

    def warm(depth: float, ratio: float) -> Mask:
        return (green > depth) & (np.abs(blue - green) < 0.25 * green) & (red < ratio * green)

    def black(depth: float, ratio: float) -> Mask:
        return (lowest > depth) & (lowest > ratio * highest)

    return [
        (cold, (0.2, 1.5), (0.1, 1.15)),
        (warm, (0.75, 0.35), (0.25, 0.35)),
        (black, (0.75, 0.85), (0.4, 0.8)),
    ]


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

    _check(thumb, um_per_px)
    if tissue.dtype != bool or tissue.shape != thumb.shape[:2]:
        got = f"{tissue.dtype} {list(tissue.shape)}"
        raise ValueError(f"tissue: expected bool {list(thumb.shape[:2])}, got {got}")
    blurred = np.zeros(tissue.shape, bool)
    if um_per_px is None or um_per_px > _COARSEST_UM or not tissue.any():
        return blurred
    factor = max(1, math.ceil(_FINEST_UM / um_per_px - 0.01))
    grey, weight = thumb.mean(2, dtype=np.float32), tissue.astype(np.float32)
    for step in (factor, 2 * factor, 4 * factor):
        if min(tissue.shape) < 16 * step:
            break
        image, within = _pool(grey, step), _pool(weight, step)
        fine, coarse = _smooth(image, 1.0), _smooth(image, 3.0)
        detail = _smooth(within * (image - fine) ** 2, 8.0)
        structure = _smooth(within * (fine - coarse) ** 2, 8.0)
        is_blurred = (within > 0.5) & (detail < _LEAST_DETAIL**2 * structure)
        is_blurred = _remove_small(is_blurred, 64)
        rows, columns = (  # of each pixel of the thumbnail; the last pool takes the remainder
            np.minimum(np.arange(side) // step, count - 1)
            for side, count in zip(tissue.shape, is_blurred.shape, strict=True)
        )
        blurred |= is_blurred[rows[:, None], columns]
    return blurred & tissue


def has_dark_background(thumb: Image) -> bool:
    """Return True if a thumbnail shows fluorescence: over a quarter nearly black, and no glass.

    Bright-field scanners fill areas that they did not scan with exact black, so the median of the
    other pixels must be dark too. Glass is light in all channels: less than 5 % may be.
    """
    import numpy as np

    brightest, darkest = _extremes(thumb)
    scanned = darkest[brightest > 0]
    dark = scanned.size > 0 and np.median(scanned) < 32 and (brightest < 32).mean() > 0.25
    return bool(dark and (darkest > 160).mean() < 0.05)


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


def _stain(thumb: Image, is_scanned: Mask, sigma: float) -> Floats:
    """Return the saturation plus half the darkness (1 - brightness).

    Darkness of 0.5 and more is left out: the frame of the slide and its shadow are as dark.
    """
    import numpy as np

    red, green, blue = _balance(thumb, is_scanned, sigma)
    brightest = np.maximum(np.maximum(red, green), blue)
    darkest = np.minimum(np.minimum(red, green), blue)
    # The floor of 0.25 keeps the noise of nearly black pixels below the saturation of tissue.
    saturation = (brightest - darkest) / np.maximum(brightest, 0.25)
    return saturation + np.where(brightest > 0.5, (1 - brightest) / 2, 0)


def _balance(thumb: Image, is_scanned: Mask, sigma: float) -> Sequence[Floats]:
    """Return the smoothed colours divided by those of the glass, three planes from 0 to 1.

    Glass is light (all channels above 0.7) and nearly grey (within 0.08); its colour is the median
    of the brightest tenth. If less than 0.1 % of the pixels are glass, colours are not divided.
    """
    import numpy as np

    # A weighted mean, in which pixels that were not scanned have no weight.
    weight = np.maximum(_smooth(is_scanned.astype(np.float32), sigma), 1e-6)
    planes = [
        _smooth(np.where(is_scanned, thumb[..., i], np.float32(0)), sigma) / (255 * weight)
        for i in range(3)
    ]
    # Every ninth pixel is enough for the colour of the glass.
    sample = np.stack([plane[::3, ::3][is_scanned[::3, ::3]] for plane in planes])
    brightest, darkest = sample.max(0), sample.min(0)
    glass = sample[:, (darkest > 0.7) & (brightest - darkest < 0.08)]
    if glass.shape[1] <= 1e-3 * sample.shape[1]:
        return planes
    light = glass.sum(0)
    white = np.median(glass[:, light >= np.quantile(light, 0.9)], 1)
    return [np.minimum(plane / level, 1) for plane, level in zip(planes, white, strict=True)]


def _extremes(thumb: Image) -> tuple[Image, Image]:
    """Return the brightest and the darkest channel, ten times as fast as thumb.max(2)."""
    import numpy as np

    red, green, blue = (thumb[..., i] for i in range(3))
    brightest = np.maximum(np.maximum(red, green), blue)
    return brightest, np.minimum(np.minimum(red, green), blue)


def _smooth(image: Floats, sigma: float) -> Floats:
    from scipy import ndimage

    return ndimage.gaussian_filter(image, sigma, truncate=2.5, mode="nearest")


def _pool(image: Floats, factor: int) -> Floats:
    height, width = (side // factor for side in image.shape)
    blocks = image[: height * factor, : width * factor].reshape(height, factor, width, factor)
    return blocks.mean((1, 3))


def _px(um: float, um_per_px: float | None, thumb: Image) -> float:
    """Return a length in px of the thumbnail, at least 1 and at most 1/32 of the longer side.

    If the resolution is unknown, 8 um are taken as 1/500 of the longer side.
    """
    longest = max(thumb.shape[:2])
    px = um / um_per_px if um_per_px else um / _SMOOTH_UM * longest / 500
    return max(1.0, min(px, longest / 32))


def _remove_small(mask: Mask, least_px: float) -> Mask:
    """Return a mask without the pieces of fewer than `least_px` pixels, connected by edges."""
    import numpy as np
    from scipy import ndimage

    labels = np.empty(mask.shape, np.int32)
    ndimage.label(mask, output=labels)
    kept = np.bincount(labels.ravel()) >= least_px
    kept[0] = False
    return kept[labels]


def _check(thumb: Image, um_per_px: float | None) -> None:
    import numpy as np

    valid = isinstance(thumb, np.ndarray) and thumb.dtype == np.uint8 and thumb.size > 0
    if not (valid and thumb.ndim == 3 and thumb.shape[2] == 3):
        kind, shape = getattr(thumb, "dtype", type(thumb).__name__), getattr(thumb, "shape", ())
        raise ValueError(f"thumb: expected uint8 [height, width, 3], got {kind} {list(shape)}")
    if um_per_px is not None and not (math.isfinite(um_per_px) and um_per_px > 0):
        raise ValueError(f"um_per_px: expected a positive number or None, got {um_per_px}")
