"""Draw the values of a slide's patches over its thumbnail."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..._atomic import replacing
from ..page import one_line
from ..scale_bar import choose_scale_bar
from ..store.read_slide import SlideFeatures
from .geometry import Floats, Geometry, check_values, geometry_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# Values are drawn on the pixels of the thumbnail; px of the longer side if there is none.
_LONGEST = 1024
_MOST = 120  # characters of a title or label
# Of a picture, in inches: the longer and the shortest side of the slide, and the space around it.
_SIDE, _SHORTEST = 9.0, 2.5
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.85, 1.2, 0.35, 0.55
# Limits of the colours: these quantiles of the values, as a few patches may have most attention.
_QUANTILES = (0.01, 0.99)
# Of Okabe and Ito's colours. Purple would look like stained tissue.
_OUTLINE, _NEGATIVE, _POSITIVE = "#009E73", "#0072B2", "#D55E00"


def heat_map(
    slide: SlideFeatures,
    values: ArrayLike,
    path: str | os.PathLike[str],
    *,
    label: str = "value",
    title: str = "",
) -> Path:
    """Draw one value per patch over the grey thumbnail of a slide, as PNG.

    Axes are in level-0 px. The tissue has an outline, if the store has its mask. A bar shows the
    scale, in µm if the resolution is known, else in px. Values of one sign have colours from dark
    purple to yellow; of both signs blue for negative and orange for positive ones. The ends of the
    colours are at the 1 % and 99 % quantiles. Where patches overlap, their mean is drawn.

    Args:
        slide: a slide of a `FeatureStore`.
        values: [N], one per patch, NaN for patches without a value.
        path: the file to write.
        label: what the values are, with a unit; beside the colour bar.
        title: above the picture.

    Returns:
        The path.

    Raises:
        ValueError: values of another length, infinite, or all NaN.
        StoreError: a slide without patches or coordinates.

    Example:
        >>> import numpy as np
        >>> np.savez("a.npz", features=np.eye(2, 8), coords=[[0, 0], [512, 0]])
        >>> slide = motet.io.import_features("a.npz", "cohort", encoder="mine")["a"]
        >>> motet.io.heat_map(slide, [0.2, 0.8], "a.png", label="attention").name
        'a.png'
    """
    import matplotlib

    path, numbers = Path(path), check_values(slide, values)
    with matplotlib.rc_context({"font.size": 9, "text.parse_math": False}):
        figure = _draw(slide, numbers, geometry_of(slide), label)
        count = f"n = {np.isfinite(numbers).sum():,} patches"
        figure.axes[0].set_title(
            one_line(f"{title}, {count}" if title else count)[:_MOST], loc="left", fontsize=9
        )
        with replacing(path) as partial:
            figure.savefig(partial, format="png", dpi=150, metadata={"Software": None})
    return path


def _draw(slide: SlideFeatures, values: Floats, place: Geometry, label: str) -> Figure:
    """Draw the picture without a title; return the figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = (max(_SHORTEST, side / max(place.size) * _SIDE) for side in place.size)
    across, along = width + _LEFT + _RIGHT, height + _TOP + _BOTTOM
    figure = Figure(figsize=(across, along))
    FigureCanvasAgg(figure)
    axes = figure.add_axes(
        (_LEFT / across, _BOTTOM / along, width / across, height / along), anchor="NW"
    )
    shown, extend = _draw_values(axes, slide.thumb, values, place)
    box = axes.get_position()
    beside = figure.add_axes((box.x1 + 0.15 / across, box.y0, 0.18 / across, box.height))
    figure.colorbar(shown, cax=beside, extend=extend).set_label(one_line(label)[:_MOST])
    _draw_outline(axes, slide.mask, place)
    _draw_scale_bar(axes, place)
    axes.set(xlabel="x (px of level 0)", ylabel="y (px of level 0)")
    return figure


def _shape(thumb: NDArray[np.uint8] | None, place: Geometry) -> tuple[int, int]:
    """Return (height, width) of the grid on which values are drawn."""
    if thumb is not None:
        return thumb.shape[0], thumb.shape[1]
    width, height = (max(1, round(side / max(place.size) * _LONGEST)) for side in place.size)
    return height, width


def _spread(values: Floats, place: Geometry, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Return the values on a grid [h, w] over the slide, NaN where no patch is."""
    scale = np.array([shape[1] / place.size[0], shape[0] / place.size[1]])
    limits = np.array([shape[1], shape[0]])
    low = np.clip(np.rint(place.corners * scale), 0, limits - 1).astype(int)
    high = np.clip(np.rint((place.corners + place.footprint) * scale), low + 1, limits).astype(int)
    total, count = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    for value, (left, top), (right, bottom) in zip(
        values.tolist(), low.tolist(), high.tolist(), strict=True
    ):
        if value == value:
            total[top:bottom, left:right] += value
            count[top:bottom, left:right] += 1
    return np.divide(total, count, out=np.full(shape, np.nan, np.float32), where=count > 0)


def _draw_values(
    axes: Axes,
    thumb: NDArray[np.uint8] | None,
    values: Floats,
    place: Geometry,
) -> tuple[AxesImage, str]:
    """Draw the values; return what has the colours, and which ends of the colours are exceeded."""
    from matplotlib.colors import LinearSegmentedColormap

    grid = _spread(values, place, _shape(thumb, place))
    extent = (0, place.size[0], place.size[1], 0)
    if thumb is not None:
        grey = thumb.mean(-1, dtype=np.float32)  # stains would change the colours drawn over them
        axes.imshow(grey, extent=extent, cmap="gray", vmin=0, vmax=255)
    known = values[np.isfinite(values)]
    low, high = np.quantile(known, _QUANTILES).tolist()
    if not high > low:  # most values are equal
        low, high = float(known.min()), float(known.max())
    colours: Any = "viridis"  # has no grey, unlike cividis
    if known.min() < 0 < known.max():
        ends = [_NEGATIVE, "white", _POSITIVE]
        colours, high = LinearSegmentedColormap.from_list("signed", ends), max(-low, high)
        low = -high
    shown = axes.imshow(
        np.ma.masked_invalid(grid), extent=extent, cmap=colours, vmin=low, vmax=high,
        alpha=1.0 if thumb is None else 0.65, interpolation="nearest",
    )  # fmt: skip
    below, above = known.min() < low, known.max() > high
    extend = "both" if below and above else "min" if below else "max" if above else "neither"
    axes.apply_aspect()  # now the position of the axes is final
    return shown, extend


def _draw_outline(axes: Axes, mask: NDArray[np.bool_] | None, place: Geometry) -> None:
    """Draw the outline of the tissue."""
    if mask is None or mask.all() or not mask.any():
        return
    x = (np.arange(mask.shape[1]) + 0.5) * place.size[0] / mask.shape[1]
    y = (np.arange(mask.shape[0]) + 0.5) * place.size[1] / mask.shape[0]
    axes.contour(x, y, mask.astype(np.uint8), levels=[0.5], colors=_OUTLINE, linewidths=0.8)


def _draw_scale_bar(axes: Axes, place: Geometry) -> None:
    """Draw a bar of at most a fifth of the slide's width, in µm, or in px if mpp is unknown."""
    from matplotlib.patches import Rectangle

    width, height = place.size
    if place.mpp is None:
        length, text = choose_scale_bar(width / 5)
        text = f"{length:g} px"
    else:
        um, text = choose_scale_bar(width / 5 * place.mpp)
        length = um / place.mpp
    pad, thick = 0.02 * max(width, height), 0.008 * max(width, height)
    left, bottom = pad, height - pad
    axes.add_patch(Rectangle((left, bottom - thick), length, thick, color="black"))
    axes.text(
        left, bottom - 1.6 * thick, text, va="bottom", ha="left",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
    )  # fmt: skip
