"""Find the background of a thumbnail: glass, or the dark around fluorescence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..native import native

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Image = NDArray[np.uint8]
    Mask = NDArray[np.bool_]
    Floats = NDArray[np.floating[Any]]

# Background is flat: the gradient of its brightness, smoothed over 1 px, is at most this share of
# the brightness, as a mean over 7 px. Glass of the test slides has 0.0005 to 0.004, also after
# JPEG; tissue has 0.01 and more, unless it is very pale.
_FLAT = 0.008
# A colour is a candidate if this share of the pixels has it and is flat, and at least a quarter as
# many as have the most frequent flat colour. Colours are equal within 0.025 (0 to 1, per channel).
_LEAST_SHARE, _OF_LARGEST, _SAME_COLOUR = 0.02, 0.25, 0.025
# Ink may be as flat, but is more saturated ((max - min) / max) than the tint of any glass. Dark
# colours have no meaningful saturation.
_SATURATION_OF_INK, _DARK = 0.6, 0.15
_LEAST_BLACK = 0.2  # share of pixels of exactly 0 that can be a background
_LEAST_GLASS = 0.3  # a darker glass is taken as this bright: its noise is not stain
_TRUNCATE = 2.5  # standard deviations at which the kernel of a smoothing ends
# Light above the dark background of 1 counts as much as stain of 1 if the brightest 0.1 % are as
# bright as this; otherwise the exposure is scaled.
_FULL_LIGHT = 0.4


@dataclass(frozen=True, eq=False)
class Background:
    """The background of a thumbnail.

    Args:
        colour: red, green and blue, 0 to 1.
        is_dark: True if the tissue is brighter than the background (fluorescence, dark field).
        flat: bool [h, w], True for pixels as flat as the background, whatever their colour.
    """

    colour: tuple[float, float, float]
    is_dark: bool
    flat: Mask


def find_background(thumb: Image) -> Background:
    """Find the background of a thumbnail, whatever its tint and brightness.

    It is flat, while tissue has texture. Of the frequent colours of flat pixels the brightest is
    taken. (A dark frame, or tissue that looks flat because it is stained weakly, is darker than
    glass. Nothing dark is flat beside a bright background but these.) The background is dark if the
    pixels that differ from it are brighter rather than darker.

    Args:
        thumb: uint8 [height, width, 3] RGB.

    Returns:
        The background. If no colour is both flat and frequent, tissue fills the thumbnail: then it
        is the colour of light grey holes in the tissue, white if there are none.
    """
    import numpy as np

    brightest, darkest = extremes(thumb)
    is_scanned = (brightest > 0) & (darkest < 255)
    planes = smooth_planes(thumb, is_scanned, 1.0)
    flat = _flat_pixels(planes, is_scanned)
    colour = _frequent_colour(planes, is_scanned, flat)
    black = brightest == 0
    if colour is None and black.mean() >= _LEAST_BLACK:
        # No glass between the black and the rest: the black is no padding, but the background.
        return Background((0.0, 0.0, 0.0), is_dark=True, flat=black)
    if colour is None:
        glass = _light_grey(planes, is_scanned)
        return Background(glass, is_dark=False, flat=np.zeros_like(flat))
    above = np.maximum.reduce([plane - level for plane, level in zip(planes, colour, strict=True)])
    below = np.maximum.reduce([level - plane for plane, level in zip(planes, colour, strict=True)])
    light, shade = (part[is_scanned & (part > 0.03)].sum() for part in (above, below))
    return Background(
        (float(colour[0]), float(colour[1]), float(colour[2])), bool(light > shade), flat
    )


def contrast(planes: Sequence[Floats], background: Background, is_scanned: Mask) -> Floats:
    """Return how much each pixel differs from the background: saturation plus half the grey part.

    For glass: ratios r of the colours to those of the glass give (max r - min r) / max r, the
    saturation, plus (1 - max r) / 2, half the darkness. For a dark background: with a = colour -
    background it is (max a - min a) + min a / 2, divided by the exposure (0.4, or the light that
    only 0.1 % of the pixels exceed, if that is more).

    Args:
        planes: red, green and blue, 0 to 1, smoothed.
        background: see `find_background`.
        is_scanned: bool [h, w], False for padding.
    """
    import numpy as np

    pairs = [(p, np.float32(c)) for p, c in zip(planes, background.colour, strict=True)]
    if background.is_dark:
        parts = [plane - level for plane, level in pairs]
        highest = np.maximum(np.maximum.reduce(parts), 0)
        lowest = np.clip(np.minimum.reduce(parts), 0, highest)
        exposure = max(float(np.quantile(highest[is_scanned], 0.999)), _FULL_LIGHT)
        return (highest - lowest / 2) / np.float32(exposure)
    parts = [1 + (plane - level) / np.float32(max(level, _LEAST_GLASS)) for plane, level in pairs]
    highest, lowest = np.maximum.reduce(parts), np.minimum.reduce(parts)
    # The floor of 0.25 keeps the noise of nearly black pixels below the saturation of tissue.
    saturation = (highest - lowest) / np.maximum(highest, 0.25)
    return saturation + np.clip(1 - highest, 0, 1) / 2


def frames(darkness: Floats, least: float = 0.75) -> Mask:
    """Return the dark areas with straight edges: the frame of a slide, or black padding.

    Tissue may be as dark, but the edge of tissue is ragged. An area is a frame if at least half of
    its edge, beside that of the thumbnail, consists of horizontal and vertical lines of 1/64 of the
    longer side, and at least 1 % of the thumbnail is in it.

    Args:
        darkness: [h, w], 1 minus the brightness divided by that of the glass.
        least: areas with at least this darkness are examined.
    """
    import numpy as np
    from scipy import ndimage

    dark = np.pad(darkness >= least, 2, mode="edge")
    dark = np.asarray(ndimage.binary_opening(dark, np.ones((5, 5))), bool)[2:-2, 2:-2]
    labels = np.empty(dark.shape, np.int32)
    ndimage.label(remove_small(dark, 0.01 * dark.size), output=labels)
    count = int(labels.max())
    if not count:
        return labels > 0
    line_px = max(12, max(labels.shape) // 64)
    edge, straight = np.zeros(count + 1), np.zeros(count + 1)
    for side in (labels, labels.T):
        differs = (side[1:] > 0) != (side[:-1] > 0)
        # A line may lie one pixel off in places.
        line = ndimage.binary_dilation(differs, np.ones((3, 1)))
        line = np.pad(line, ((0, 0), (line_px, line_px)), mode="edge")
        line = np.asarray(ndimage.binary_opening(line, np.ones((1, line_px))), bool)
        line = line[:, line_px:-line_px] & differs
        label = np.maximum(side[1:], side[:-1])
        edge += np.bincount(label[differs], minlength=count + 1)
        straight += np.bincount(label[line], minlength=count + 1)
    is_frame = straight >= edge / 2
    is_frame[0] = False
    return is_frame[labels]


def smooth_planes(thumb: Image, is_scanned: Mask, sigma: float) -> list[Floats]:
    """Return red, green and blue from 0 to 1, smoothed; padding has no weight."""
    import numpy as np

    weight = np.maximum(smooth(is_scanned.astype(np.float32), sigma), 1e-6)
    return [
        smooth(np.where(is_scanned, thumb[..., i], np.float32(0)), sigma) / (255 * weight)
        for i in range(3)
    ]


def extremes(thumb: Image) -> tuple[Image, Image]:
    """Return the brightest and the darkest channel, ten times as fast as thumb.max(2)."""
    import numpy as np

    red, green, blue = (thumb[..., i] for i in range(3))
    brightest = np.maximum(np.maximum(red, green), blue)
    return brightest, np.minimum(np.minimum(red, green), blue)


def smooth(image: Floats, sigma: float) -> Floats:
    """Return a Gaussian smoothing, float32; with C++ the same bits in a third of the time."""
    import numpy as np

    if module := native():
        reach = int(_TRUNCATE * sigma + 0.5)
        weights = np.exp(-0.5 / (sigma * sigma) * np.arange(-reach, reach + 1) ** 2)
        weights /= weights.sum()
        image = np.ascontiguousarray(image, np.float32)
        out = np.empty_like(image)
        module.smooth(image, weights[reach:].tolist(), out)
        return out
    from scipy import ndimage

    return ndimage.gaussian_filter(np.float32(image), sigma, truncate=_TRUNCATE, mode="nearest")


def remove_small(mask: Mask, least_px: float) -> Mask:
    """Return a mask without the pieces of fewer than `least_px` pixels, connected by edges."""
    import numpy as np
    from scipy import ndimage

    labels = np.empty(mask.shape, np.int32)
    ndimage.label(mask, output=labels)
    kept = np.bincount(labels.ravel()) >= least_px
    kept[0] = False
    return kept[labels]


def check_thumb(thumb: Image, um_per_px: float | None) -> None:
    """Raise ValueError unless this is a thumbnail and a resolution, as `tissue_mask` takes them."""
    import numpy as np

    valid = isinstance(thumb, np.ndarray) and thumb.dtype == np.uint8 and thumb.size > 0
    if not (valid and thumb.ndim == 3 and thumb.shape[2] == 3):
        kind, shape = getattr(thumb, "dtype", type(thumb).__name__), getattr(thumb, "shape", ())
        raise ValueError(f"thumb: expected uint8 [height, width, 3], got {kind} {list(shape)}")
    if um_per_px is not None and not (math.isfinite(um_per_px) and um_per_px > 0):
        raise ValueError(f"um_per_px: expected a positive number or None, got {um_per_px}")


def _flat_pixels(planes: Sequence[Floats], is_scanned: Mask) -> Mask:
    """Return the pixels that are as flat as the flattest part of the thumbnail, bool [h, w]."""
    import numpy as np
    from scipy import ndimage

    brightness = sum(planes[1:], planes[0]) / 3
    slopes = [ndimage.correlate1d(brightness, [-0.5, 0, 0.5], axis, mode="nearest")
              for axis in (0, 1)]  # fmt: skip
    relative = np.hypot(*slopes) / np.maximum(brightness, 0.25)
    roughness = ndimage.uniform_filter(relative, 7, mode="nearest")
    inner = np.asarray(ndimage.binary_erosion(is_scanned, iterations=3, border_value=1), bool)
    sample = roughness[::3, ::3][inner[::3, ::3]]
    if not sample.size:
        return np.zeros_like(is_scanned)
    # If the flattest pixels are much flatter than the limit, so is the background.
    return inner & (roughness < np.clip(3 * np.quantile(sample, 0.05), 0.002, _FLAT))


def _frequent_colour(planes: Sequence[Floats], is_scanned: Mask, flat: Mask) -> Floats | None:
    """Return the brightest of the frequent colours of flat pixels [3], None if there is none."""
    import numpy as np

    step = max(1, int(math.sqrt(flat.size / 2e5)))  # 200,000 pixels are enough
    flat = flat[::step, ::step]
    count = int(is_scanned[::step, ::step].sum())
    pixels = np.stack([plane[::step, ::step][flat] for plane in planes])
    codes = ((pixels * 64).astype(np.int32) * np.array([[65 * 65], [65], [1]])).sum(0)
    candidates: list[tuple[float, Floats]] = []
    while pixels.shape[1] > _LEAST_SHARE * count:
        values, counts = np.unique(codes, return_counts=True)
        colour = np.median(pixels[:, codes == values[counts.argmax()]], 1)
        near = np.abs(pixels - colour[:, None]).max(0) < _SAME_COLOUR
        colour = np.median(pixels[:, near], 1)
        near = np.abs(pixels - colour[:, None]).max(0) < _SAME_COLOUR
        share = float(near.sum() / count)
        largest = max([share, *(other for other, _ in candidates)])
        if share < max(_LEAST_SHARE, _OF_LARGEST * largest):
            break  # the next are not more frequent
        candidates.append((share, colour))
        pixels, codes = pixels[:, ~near], codes[~near]
    glass = [
        colour
        for _, colour in candidates
        if np.ptp(colour) < _SATURATION_OF_INK * colour.max() or colour.max() < _DARK
    ]
    return max(glass, key=lambda colour: float(colour.sum()), default=None)


def _light_grey(planes: Sequence[Floats], is_scanned: Mask) -> tuple[float, float, float]:
    """Return the median of the brightest tenth of light grey pixels; white without such pixels."""
    import numpy as np

    sample = np.stack([plane[::3, ::3][is_scanned[::3, ::3]] for plane in planes])
    if not sample.size:
        return 1.0, 1.0, 1.0
    lowest = sample.min(0)
    grey = sample[:, (lowest > 0.7) & (sample.max(0) - lowest < 0.08)]
    if grey.shape[1] <= 1e-3 * sample.shape[1]:
        return 1.0, 1.0, 1.0
    light = grey.sum(0)
    red, green, blue = map(float, np.median(grey[:, light >= np.quantile(light, 0.9)], 1))
    return red, green, blue
