"""Find the marks of pens in the thumbnail of a slide, and leave the stains alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .background import (
    Background,
    check_thumb,
    extremes,
    find_background,
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
    Pair = tuple[float, float]

_BLACK = 12  # of 255: JPEG turns black into values up to this
# Ink is flat: within a mark its optical density varies, around the mean over 3 px, by 2 to 9 % (the
# median of each mark of the test pictures); stains with the texture of tissue vary by 12 to 39 %,
# on thumbnails of 20 um per px by 8 to 11 %. If a colour makes up more than half of all that is
# coloured, it is more likely a stain: then the lower limit holds.
_TEXTURE, _MOST = (0.1, 0.06), 0.5
# Tissue that is nearly black varies by 6.5 % and more; black strokes by 2 %.
_TEXTURE_OF_BLACK = (0.06, 0.0)


class InkKind(NamedTuple):
    """A kind of ink."""

    is_like: Callable[[float, float], Mask]
    """From a least optical density and a ratio of densities to a mask, bool [h, w]."""
    core: Pair
    """These limits for the core of a mark, which has the colour of ink."""
    rim: Pair
    """The same for its rim, which tissue may have too; it counts only if it touches a core."""
    density: Floats
    """[h, w], the optical density by which the ink is compared with the texture of tissue."""
    texture: Pair
    """Limits of the texture: usually, and if most of what is coloured has this colour."""


def pen_mask(thumb: Image) -> Mask:
    """Find marks of a pen (green, blue, red and black ink) by their colour and flatness.

    Colour: the optical density of red is at most 1.2 times that of green in haematoxylin, eosin and
    DAB, and at least 1.5 times in green and blue ink. Red ink has high and equal densities of green
    and blue, and almost none of red; black ink has high and equal densities of all three. A mark
    grows from such pixels into its paler rim, and over tissue that it covers. Flatness: methyl
    green, light green, methylene blue and other stains have the colours of ink, but the texture of
    tissue. A mark counts only if its density varies by less than 10 % over a few pixels (6 % if its
    colour makes up most of what is coloured). On a dark background (fluorescence) there are no
    marks.

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
    check_thumb(thumb, None)
    return find_ink(thumb, find_background(thumb))


def find_ink(thumb: Image, background: Background) -> Mask:
    """Find marks of a pen on a thumbnail with a known background; see `pen_mask`."""
    import numpy as np
    from scipy import ndimage

    mark = np.zeros(thumb.shape[:2], bool)
    if background.is_dark:
        return mark
    brightest, darkest = extremes(thumb)
    is_scanned = (brightest > _BLACK) & (darkest < 255)
    planes = smooth_planes(thumb, is_scanned, max(1.0, max(mark.shape) / 1000))
    densities = [
        -np.log10(np.clip(plane / max(level, 1 / 255), 1 / 255, 1))
        for plane, level in zip(planes, background.colour, strict=True)
    ]
    coloured = int((np.maximum.reduce(densities) > 0.08).sum())
    for ink in _inks(densities):
        core = remove_small(ink.is_like(*ink.core) & is_scanned, max(9.0, 2e-4 * mark.size))
        if core.any():
            rim = ink.is_like(*ink.rim) & is_scanned
            marks = np.asarray(ndimage.binary_propagation(core, mask=core | rim), bool)
            mark |= _flat_marks(marks, ink, coloured)
    # Tissue under a mark hides its colour. A pixel counts as marked if, smoothed over 1 % of the
    # thumbnail, more than a third of its surroundings is.
    if mark.any():
        mark |= smooth(mark.astype(np.float32), max(1.0, max(mark.shape) / 100)) > 0.35
    return mark


def _flat_marks(marks: Mask, ink: InkKind, coloured: int) -> Mask:
    """Return the marks of one kind whose density is flat.

    Args:
        marks: bool [h, w].
        ink: the kind.
        coloured: number of pixels of the thumbnail that are not glass.
    """
    import numpy as np
    from scipy import ndimage

    labels = np.empty(marks.shape, np.int32)
    ndimage.label(marks, output=labels)
    every = np.arange(1, int(labels.max()) + 1)
    depth = np.asarray(ndimage.distance_transform_edt(marks))
    radius = np.concatenate([[0.0], ndimage.maximum(depth, labels, every)])
    # The edge of a mark is no texture: leave out 3 px, or half of a narrow mark.
    inner = marks & (depth > np.minimum(3.0, radius / 2)[labels])
    share = inner.astype(np.float32)
    weight = np.maximum(smooth(share, 3.0), 1e-6)
    mean = smooth(share * ink.density, 3.0) / weight
    variance = np.maximum(smooth(share * ink.density**2, 3.0) / weight - mean**2, 0)
    texture = np.sqrt(variance) / np.maximum(mean, 0.03)
    area = np.bincount(labels.ravel())[1:]
    is_most = area.sum() > _MOST * coloured
    medians = ndimage.median(texture, np.where(inner, labels, 0), every)
    is_flat = medians < ink.texture[int(is_most)]
    # Narrow or striped strokes are not flat. They are ink if most marks of this colour are.
    if area[is_flat].sum() > area.sum() / 2:
        is_flat[:] = True
    return np.concatenate([[False], is_flat])[labels]


def _inks(densities: Sequence[Floats]) -> list[InkKind]:
    """Return cold (green, blue), warm (red) and black ink, for densities of red, green, blue."""
    import numpy as np

    red, green, blue = densities
    lowest = np.minimum(np.minimum(red, green), blue)
    highest = np.maximum(np.maximum(red, green), blue)

    def cold(depth: float, ratio: float) -> Mask:
        return (red > depth) & (red > ratio * green) & (red > blue)

    def warm(depth: float, ratio: float) -> Mask:
        return (green > depth) & (np.abs(blue - green) < 0.25 * green) & (red < ratio * green)

    def black(depth: float, ratio: float) -> Mask:
        return (lowest > depth) & (lowest > ratio * highest)

    return [
        InkKind(cold, (0.2, 1.5), (0.1, 1.15), red, _TEXTURE),
        InkKind(warm, (0.75, 0.35), (0.25, 0.35), green, _TEXTURE),
        InkKind(black, (0.75, 0.85), (0.4, 0.8), lowest, _TEXTURE_OF_BLACK),
    ]
