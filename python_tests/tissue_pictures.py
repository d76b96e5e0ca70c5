"""Real slides, tinted, dimmed, bleached, overstained and inverted, with tissue outlined by hand.

The outlines (tissue_truth/*.geojson, level-0 px) were drawn on the unchanged thumbnails. The
pictures themselves are not committed: see conftest.data_path.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from motet.io import read_mask
from PIL import Image

from .conftest import data_path

TRUTH = Path(__file__).parent / "tissue_truth"


class Original(NamedTuple):
    """A thumbnail with its truth: bool [h, w], and its resolution."""

    thumb: np.ndarray
    tissue: np.ndarray
    um_per_px: float | None


# File, micrometres per level-0 px (None if the file does not hold it).
ORIGINALS = {
    "CMU-1-Small-Region": ("CMU-1-Small-Region.svs", 0.499),
    "CMU-1-Small-Region-macro": ("CMU-1-Small-Region.svs", None),
    "1065626": ("1065626.svs", 0.5026),
    "tcga-cr-7395-01a-01-ts1": ("tcga-cr-7395-01a-01-ts1.svs", None),
    "test3-DAPI-2-387": ("test3-DAPI-2-387.ndpi", 0.228),
    "kidney-48-5": ("kidney-48-5.tif", None),
    "patch": ("patch.tif", None),
    "1065626-biopsy": ("1065626.svs", 0.5026),
}


def original(name: str, longest: int = 1024) -> Original:
    """Return the thumbnail of a slide, its tissue as outlined, and um per px."""
    file, mpp = ORIGINALS[name]
    path = data_path("slides", *file.split("/"))
    if path.suffix in (".png", ".tif"):
        with Image.open(path) as picture:
            image = picture.convert("RGB")
            image.info.clear()
    else:
        import openslide

        with openslide.OpenSlide(path) as slide:
            if name.endswith("biopsy"):  # a part of the slide, four times as fine
                image = slide.read_region((6840, 6600), 1, (500, 320)).convert("RGB")
                return _with_truth(name, image, (2000, 1280), mpp)
            if name.endswith("macro"):
                image = slide.associated_images["macro"].convert("RGB").crop((404, 68, 748, 318))
                image.paste((236, 237, 235), (239, 146, 250, 157))  # a mark of the scanner
            else:
                image, size = slide.get_thumbnail((longest, longest)), slide.dimensions
                return _with_truth(name, image.convert("RGB"), size, mpp)
    return _with_truth(name, image, image.size, mpp)


def _with_truth(
    name: str, image: Image.Image, size: tuple[int, int], mpp: float | None
) -> Original:
    thumb = np.array(image)
    tissue = read_mask(TRUTH / f"{name}.geojson", size, thumb.shape[:2])
    return Original(thumb, tissue, mpp * size[0] / thumb.shape[1] if mpp else None)


def _glass(thumb: np.ndarray) -> np.ndarray:
    """Return the colour of the glass of an unchanged picture: the median of its brightest tenth."""
    light = thumb.sum(2)
    inner = thumb[(light < 765) & (light >= np.quantile(light[light < 765], 0.9))]
    return np.median(inner, 0)


def _tint(red: int, green: int, blue: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda thumb: thumb * (np.array([red, green, blue]) / _glass(thumb))


def _dim(share: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda thumb: thumb * share


def _stain(depth: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that multiplies optical densities: below 1 pale, above 1 nearly black."""

    def change(thumb: np.ndarray) -> np.ndarray:
        glass = _glass(thumb)
        return glass * (np.maximum(thumb, 1) / glass) ** depth

    return change


def _fade(share: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that mixes a picture with white, as stray light does."""
    return lambda thumb: 255 - (255 - thumb.astype(float)) * share


def _invert(thumb: np.ndarray) -> np.ndarray:
    return 255.0 - thumb


def _char(thumb: np.ndarray) -> np.ndarray:
    """Return a picture in which tissue is grey and nearly black, and glass is unchanged."""
    glass = _glass(thumb)
    grey = np.minimum(thumb / glass, 1).min(2, keepdims=True)
    return glass * np.maximum(grey**4, 0.02)


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "yellow": _tint(228, 220, 198), "blue": _tint(210, 225, 242), "grey": _tint(160, 160, 160),
    "pink": _tint(245, 215, 225), "green": _tint(190, 225, 190), "brown": _tint(170, 140, 100),
    "dim": _dim(0.6), "dark": _dim(0.3), "pale": _stain(0.45), "faded": _fade(0.45),
    "deep": _stain(2.5), "black": _char, "inverted": _invert,
    "inverted, dim": lambda thumb: (255.0 - thumb) * 0.5,
    "pale, yellow": lambda thumb: _tint(228, 220, 198)(_stain(0.5)(thumb)),
    "dim, faded": lambda thumb: _fade(0.5)(thumb) * 0.5,
}  # fmt: skip

# 40 pictures: each original with five of the 16 changes. Stain is not made deeper in fluorescence.
PICTURES = [
    (name, change)
    for i, name in enumerate(ORIGINALS)
    for change in [
        change
        for change in [*CHANGES, *CHANGES][5 * i % 16 :]
        if not ("DAPI" in name and change in ("deep", "black"))
    ][:5]
]


def picture(name: str, change: str) -> Original:
    """Return a changed thumbnail, with the truth of the unchanged one."""
    unchanged = original(name)
    thumb = np.clip(CHANGES[change](unchanged.thumb).round(), 0, 255).astype(np.uint8)
    return unchanged._replace(thumb=thumb)


def overlap(mask: np.ndarray, truth: np.ndarray) -> float:
    """Return intersection over union."""
    return float((mask & truth).sum() / max(1, (mask | truth).sum()))
