"""What of a thumbnail is tissue, what a pen has marked, what is out of focus.

All is decided by colour and contrast of the slide's thumbnail alone, with numpy and scipy, so the
same thumbnail gives the same masks. docs/concepts/tissue.md shows them on real tissue, with their
errors.
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

# Stain (see `_stain`), the glass being 0. Noise, glue, JPEG and uneven light stay below 0.03; the
# palest stroma and fat of the test slides lie above 0.05. What is above 0.07 is stained, whatever
# Otsu's threshold: where eosin is strong that parts pale tissue from deep (0.27), not tissue from
# glass.
_STAIN = (0.045, 0.07)
# The same for fluorescence: square roots of the light above the background, of 1.
_LIGHT = (0.18, 0.25)
_HOLE, _PIECE = (20_000.0, 5e-4), (5_000.0, 1e-4)  # um^2; share of the thumbnail if mpp is unknown
_SMOOTH_UM, _SMOOTH_LIGHT_UM = 8.0, 30.0  # fluorescence shows nuclei: dots of 10 um with gaps
_FINEST_UM, _COARSEST_UM, _LEAST_DETAIL = 1.5, 8.0, 0.4
_BLACK = 12  # of 255: what JPEG makes of black


def tissue_mask(thumb: Image, um_per_px: float | None = None) -> Mask:
    """Find the tissue of a slide: Otsu's threshold on the saturation of its thumbnail.

    Colours are taken relative to the glass and smoothed over 8 um; half of their darkness is added
    to the saturation, for tissue that is only grey (stroma in IHC). Otsu's threshold is kept
    between 0.045 and 0.07: a slide without tissue has none, and a slide full of it is all tissue.
    Black and pixels of exactly 255 in all channels are padding, not tissue. Where the background is
    dark (fluorescence) brightness takes the place of saturation. Holes up to 20,000 um² are filled
    and pieces below 5,000 um² dropped; without `um_per_px`, 0.05 % and 0.01 % of the thumbnail. Ink
    of a pen is coloured and so counts as tissue here: see `pen_mask`.

    Args:
        thumb: the whole slide, uint8 [height, width, 3] RGB.
        um_per_px: micrometres per pixel of the thumbnail; None where that is not known.

    Returns:
        Bool [height, width].

    Raises:
        ValueError: no such image, or a resolution that is not positive.

    Example:
        >>> from skimage import data
        >>> float(motet.io.tissue_mask(data.immunohistochemistry(), 0.5).mean()) > 0.9
        True
    """
    import numpy as np

    _check(thumb, um_per_px)
    brightest, darkest = _extremes(thumb)
    dark = has_dark_background(thumb)
    real = darkest < 255 if dark else (brightest > _BLACK) & (darkest < 255)
    if not real.any():
        return real
    if dark:
        light = _smooth(brightest / np.float32(255), _px(_SMOOTH_LIGHT_UM, um_per_px, thumb))
        background = np.median(brightest[real & (brightest < 32)]) / 255
        value, (lowest, highest) = np.sqrt(np.maximum(light - background, 0)), _LIGHT
    else:
        value = _stain(thumb, real, _px(_SMOOTH_UM, um_per_px, thumb))
        lowest, highest = _STAIN
    # Cut off at twice what is surely tissue, Otsu looks for the step from glass to tissue.
    threshold = otsu(np.minimum(value[real], 2 * highest))
    mask = (value > min(max(threshold, lowest), highest)) & real
    px_um2 = um_per_px**2 if um_per_px else None
    hole, piece = (um2 / px_um2 if px_um2 else share * mask.size for um2, share in (_HOLE, _PIECE))
    hole = min(hole, mask.size / 20)  # not all the glass of a small thumbnail
    mask = ~_without_small(~_without_small(mask, piece), hole)
    return mask if dark else mask & (brightest > 0)


def pen_mask(thumb: Image) -> Mask:
    """Find marks of a pen: green, blue, red and black ink, by their optical densities.

    Haematoxylin, eosin and DAB absorb at most 1.2 times as much red as green; ink that is green or
    blue 1.5 times as much and more. Red ink absorbs green and blue alike, deeply, and hardly any
    red; black ink absorbs all three alike, deeply. From such pixels a mark spreads to its paler rim
    and to where it covers tissue. On a dark background (fluorescence) nothing is a mark. Red
    chromogens (AEC, Fast Red) that stain whole areas deeply cannot be told from red ink.

    Args:
        thumb: the whole slide, uint8 [height, width, 3] RGB.

    Returns:
        Bool [height, width].

    Raises:
        ValueError: no such image.

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
    real = (brightest > _BLACK) & (darkest < 255)
    colour = _balanced(thumb, real, max(1.0, max(mark.shape) / 1000))
    for ink, sure, perhaps in _inks(colour):
        core = _without_small(ink(*sure) & real, max(9.0, 2e-4 * mark.size))
        if core.any():
            mark |= ndimage.binary_propagation(core, mask=core | (ink(*perhaps) & real))
    if mark.any():  # what tissue hides is marked as well, where a third of what is around it is
        mark |= _smooth(mark.astype(np.float32), max(1.0, max(mark.shape) / 100)) > 0.35
    return mark


def _inks(colour: Sequence[Floats]) -> list[tuple[Ink, Pair, Pair]]:
    """Return for cold, warm and black ink where it is, given depth and ratio; those at which it
    surely is there, and those at which it may spread."""
    import numpy as np

    red, green, blue = (-np.log10(np.clip(plane, 1 / 255, 1)) for plane in colour)
    least = np.minimum(np.minimum(red, green), blue)
    most = np.maximum(np.maximum(red, green), blue)

    def cold(depth: float, ratio: float) -> Mask:
        return (red > depth) & (red > ratio * green) & (red > blue)

    def warm(depth: float, ratio: float) -> Mask:
        return (green > depth) & (np.abs(blue - green) < 0.25 * green) & (red < ratio * green)

    def black(depth: float, ratio: float) -> Mask:
        return (least > depth) & (least > ratio * most)

    return [
        (cold, (0.2, 1.5), (0.1, 1.15)),
        (warm, (0.75, 0.35), (0.25, 0.35)),
        (black, (0.75, 0.85), (0.4, 0.8)),
    ]


def blur_mask(thumb: Image, tissue: Mask, um_per_px: float | None) -> Mask:
    """Find tissue that is out of focus: what has hardly any detail beside its coarser structure.

    Detail is the contrast at 1 px and finer, structure that between 1 and 3 px, each over a window
    of 8 px, at 1.5 um per px or as coarse as the thumbnail is, then twice and four times coarser.
    Sharp tissue of any stain has detail / structure above 0.6 nearly everywhere; where it is below
    0.4 the tissue is blurred. A Gaussian blur of s um is found on a thumbnail of s / 1.5 um per px
    or finer: of 3 um at 2 um per px; below 2 um it is never found. Thumbnails coarser than 8 um per
    px, or of unknown resolution, do not show it, and nothing is flagged.

    Args:
        thumb: the whole slide, uint8 [height, width, 3] RGB.
        tissue: bool [height, width], see `tissue_mask`.
        um_per_px: micrometres per pixel of the thumbnail; None where that is not known.

    Returns:
        Bool [height, width], within the tissue.

    Raises:
        ValueError: no such image or mask, or a resolution that is not positive.

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
        expected = list(thumb.shape[:2])
        raise ValueError(
            f"tissue: expected bool {expected}, got {tissue.dtype} {list(tissue.shape)}"
        )
    blurred = np.zeros(tissue.shape, bool)
    if um_per_px is None or um_per_px > _COARSEST_UM or not tissue.any():
        return blurred
    factor = max(1, math.ceil(_FINEST_UM / um_per_px - 0.01))
    grey, weight = thumb.mean(2, dtype=np.float32), tissue.astype(np.float32)
    for pooled in (factor, 2 * factor, 4 * factor):
        if min(tissue.shape) < 16 * pooled:
            break
        image, within = _pooled(grey, pooled), _pooled(weight, pooled)
        one, three = _smooth(image, 1.0), _smooth(image, 3.0)
        detail = _smooth(within * (image - one) ** 2, 8.0)
        structure = _smooth(within * (one - three) ** 2, 8.0)
        found = (within > 0.5) & (detail < _LEAST_DETAIL**2 * structure)
        found = _without_small(found, 64)
        rows, columns = (
            np.minimum(np.arange(side) // pooled, last - 1)
            for side, last in zip(tissue.shape, found.shape, strict=True)
        )
        blurred |= found[rows[:, None], columns]
    return blurred & tissue


def has_dark_background(thumb: Image) -> bool:
    """Say whether a thumbnail is of fluorescence: a quarter of it nearly black, and no glass.

    Exact black, which bright-field scanners put around what they did not scan, counts as dark only
    if all else is dark too; glass is what is light in all channels.
    """
    import numpy as np

    brightest, darkest = _extremes(thumb)
    seen = darkest[brightest > 0]
    dark = seen.size > 0 and np.median(seen) < 32 and (brightest < 32).mean() > 0.25
    return bool(dark and (darkest > 160).mean() < 0.05)


def otsu(values: Floats) -> float:
    """Return Otsu's threshold, which parts the values into two with the least variance within."""
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


def _stain(thumb: Image, real: Mask, sigma: float) -> Floats:
    """Return saturation, and half the darkness of what is not very dark (a frame, its shadow)."""
    import numpy as np

    red, green, blue = _balanced(thumb, real, sigma)
    brightest = np.maximum(np.maximum(red, green), blue)
    darkest = np.minimum(np.minimum(red, green), blue)
    # The floor keeps the noise of nearly black pixels below tissue's saturation.
    saturation = (brightest - darkest) / np.maximum(brightest, 0.25)
    return saturation + np.where(brightest > 0.5, (1 - brightest) / 2, 0)


def _balanced(thumb: Image, real: Mask, sigma: float) -> Sequence[Floats]:
    """Return smoothed colours as shares of the glass's, the brightest of what is nearly grey."""
    import numpy as np

    weight = np.maximum(_smooth(real.astype(np.float32), sigma), 1e-6)
    planes = [
        _smooth(np.where(real, thumb[..., i], np.float32(0)), sigma) / (255 * weight)
        for i in range(3)
    ]
    few = np.stack([plane[::3, ::3][real[::3, ::3]] for plane in planes])
    brightest, darkest = few.max(0), few.min(0)
    glass = few[:, (darkest > 0.7) & (brightest - darkest < 0.08)]
    if glass.shape[1] <= 1e-3 * few.shape[1]:
        return planes
    light = glass.sum(0)
    white = np.median(glass[:, light >= np.quantile(light, 0.9)], 1)
    return [np.minimum(plane / level, 1) for plane, level in zip(planes, white, strict=True)]


def _extremes(thumb: Image) -> tuple[Image, Image]:
    """Return the brightest and the darkest channel; ten times as fast as max(2)."""
    import numpy as np

    red, green, blue = (thumb[..., i] for i in range(3))
    brightest = np.maximum(np.maximum(red, green), blue)
    return brightest, np.minimum(np.minimum(red, green), blue)


def _smooth(image: Floats, sigma: float) -> Floats:
    from scipy import ndimage

    return ndimage.gaussian_filter(image, sigma, truncate=2.5, mode="nearest")


def _pooled(image: Floats, factor: int) -> Floats:
    height, width = (side // factor for side in image.shape)
    blocks = image[: height * factor, : width * factor].reshape(height, factor, width, factor)
    return blocks.mean((1, 3))


def _px(um: float, um_per_px: float | None, thumb: Image) -> float:
    """Return a length in px, from 1 to 1/32 of the thumbnail; where unknown, 8 um are 1/500."""
    longest = max(thumb.shape[:2])
    wanted = um / um_per_px if um_per_px else um / _SMOOTH_UM * longest / 500
    return max(1.0, min(wanted, longest / 32))


def _without_small(mask: Mask, least_px: float) -> Mask:
    """Return a mask without the pieces, connected by edges, of fewer pixels than that."""
    import numpy as np
    from scipy import ndimage

    labels = np.empty(mask.shape, np.int32)
    ndimage.label(mask, output=labels)
    kept = np.bincount(labels.ravel()) >= least_px
    kept[0] = False
    return kept[labels]


def _check(thumb: Image, um_per_px: float | None) -> None:
    import numpy as np

    good = isinstance(thumb, np.ndarray) and thumb.dtype == np.uint8 and thumb.size > 0
    if not (good and thumb.ndim == 3 and thumb.shape[2] == 3):
        kind, shape = getattr(thumb, "dtype", type(thumb).__name__), getattr(thumb, "shape", ())
        raise ValueError(f"thumb: expected uint8 [height, width, 3], got {kind} {list(shape)}")
    if um_per_px is not None and not (math.isfinite(um_per_px) and um_per_px > 0):
        raise ValueError(f"um_per_px: expected a positive number or None, got {um_per_px}")
