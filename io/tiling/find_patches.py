"""Which patches of a slide hold tissue, and what else is known of each: ink, blur, damage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..slides.slide import Slide
from ..slides.thumbnails import thumbnail_level
from ..store.format import FLAGS
from .grid import Grid, Tiling, damaged_patches, make_grid
from .masks import coverage, read_mask
from .tissue import blur_mask, pen_mask, tissue_mask

if TYPE_CHECKING:
    from numpy.typing import NDArray

THUMB_PX = 2048
PEN_SHARE, BLUR_SHARE = 0.05, 0.5
"""Shares of a patch from which on it is flagged."""


@dataclass(frozen=True, eq=False)
class TissuePatches:
    """Hold the N patches of a slide that are kept.

    Args:
        grid: all patches, G of them.
        kept: int64 [N], which of the grid.
        tissue: float64 [N], how much of each is tissue.
        flags: uint8 [N], bits of FLAGS.
        touched: how many of the grid hold any tissue.
        thumb: uint8 [h, w, 3], the slide.
        mask: bool [h, w], its tissue.
    """

    grid: Grid
    kept: NDArray[np.int64]
    tissue: NDArray[np.float64]
    flags: NDArray[np.uint8]
    touched: int
    thumb: NDArray[np.uint8]
    mask: NDArray[np.bool_]

    @property
    def corrupt(self) -> NDArray[np.bool_]:
        """Return bool [N]: the file's own tiles are damaged there."""
        return (self.flags & np.uint8(FLAGS.CORRUPT)) != 0

    @property
    def why_empty(self) -> str | None:
        """Say why no patch is kept, None if one is."""
        if len(self.kept):
            return None
        if not len(self.grid.coords):
            return "the slide is smaller than one patch"
        return "no patch holds enough tissue" if self.mask.any() else "no tissue was found"


def find_patches(
    slide: Slide, tiling: Tiling, mpp: float | None, mask_file: Path | None
) -> TissuePatches:
    """Lay patches over a slide, and keep those that hold enough tissue.

    Args:
        slide: where to look.
        tiling: resolution, size, border of patches, and how much is enough.
        mpp: micrometres per level-0 pixel, None if not known.
        mask_file: the user's own mask of tissue, to take instead of what is found.

    Raises:
        SlideError: of `make_grid`, or "damaged" where nothing can be read.
        StoreError: the mask cannot be used.
    """
    grid = make_grid(slide, tiling, mpp)
    size = (slide.levels[0].width, slide.levels[0].height)
    thumb = slide.thumbnail(thumb_px(slide))
    um_per_px = mpp * size[0] / thumb.shape[1] if mpp else None
    mask, pen = find_tissue(thumb, um_per_px, grid.footprint_px / size[0] * thumb.shape[1])
    if mask_file is not None:
        mask = read_mask(mask_file, size, thumb.shape[:2])
    blur = blur_mask(thumb, mask, um_per_px)
    # Where the thumbnail itself is damaged nobody knows: such patches are flagged, not dropped.
    mask |= _damaged_mask(slide, mask.shape)

    def share_of(mask: NDArray[np.bool_], patches: NDArray[np.int32]) -> NDArray[np.float64]:
        return coverage(mask, patches, grid.footprint_px, size)

    tissue = share_of(mask, grid.coords)
    kept = np.flatnonzero(tissue >= tiling.min_tissue)
    coords = grid.coords[kept]
    flags = np.zeros(len(kept), np.uint8)
    for flag, where in (
        (FLAGS.EDGE, grid.edge[kept]),
        (FLAGS.PEN, share_of(pen, coords) >= PEN_SHARE),
        (FLAGS.BLUR, share_of(blur, coords) >= BLUR_SHARE),
        (FLAGS.CORRUPT, damaged_patches(slide, grid)[kept]),
    ):
        flags[where] |= np.uint8(flag)
    touched = int(np.count_nonzero(tissue))
    return TissuePatches(grid, kept, tissue[kept], flags, touched, thumb, mask)


def thumb_px(slide: Slide) -> int:
    """Return the longest side of a slide's thumbnail: 1024 to 2048 px where it is that large.

    It is a whole part of the coarsest level that is large enough, so that hardly anything is read.
    """
    longest = [max(level.width, level.height) for level in slide.levels]
    side = min((side for side in longest if side >= THUMB_PX // 2), default=longest[0])
    return side // math.ceil(side / THUMB_PX)


def find_tissue(
    thumb: NDArray[np.uint8], um_per_px: float | None, patch_px: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return masks of tissue and of pen, from a thumbnail reduced until a patch is 5 px wide.

    So that a slide of few tiles is not held up by its thumbnail.

    Args:
        thumb: uint8 [h, w, 3].
        um_per_px: of the thumbnail.
        patch_px: side of a patch in px of the thumbnail.

    Returns:
        Two of bool [h, w].
    """
    factor = max(1, min(int(patch_px / 5), max(thumb.shape) // 256))
    small = np.asarray(Image.fromarray(thumb).reduce(factor))
    pen = pen_mask(small)
    tissue = tissue_mask(small, um_per_px * factor if um_per_px else None) & ~pen
    height, width = thumb.shape[:2]
    found = [mask.repeat(factor, 0)[:height].repeat(factor, 1)[:, :width] for mask in (tissue, pen)]
    return found[0], found[1]


def _damaged_mask(slide: Slide, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return where the thumbnail, of this shape, is white because its level's tiles are damaged."""
    number = thumbnail_level(slide.levels, thumb_px(slide))
    level, found = slide.levels[number], np.zeros(shape, bool)
    down, across = shape[0] / level.height, shape[1] / level.width
    for x, y, width, height in slide.damaged(number).tolist():
        rows = slice(int(y * down), math.ceil((y + height) * down))
        found[rows, int(x * across) : math.ceil((x + width) * across)] = True
    return found
