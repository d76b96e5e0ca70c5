"""Find the patches of a slide that hold tissue, and flag those with ink, blur or damage."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..slides.slide import Slide
from ..slides.thumbnails import thumbnail_level
from ..store.format import FLAGS, drop_bits
from .background import find_background
from .grid import PatchGrid, Tiling, damaged_patches, make_grid
from .ink import find_ink
from .masks import coverage, read_mask
from .tissue import blur_mask, find_stain

if TYPE_CHECKING:
    from numpy.typing import NDArray

THUMB_PX = 2048
"""Longest side of a thumbnail, px; at least half of it where the slide is that large."""
PEN_SHARE, BLUR_SHARE = 0.05, 0.5
"""A patch is flagged if at least this share of it is ink, or blurred tissue."""


@dataclass(frozen=True, eq=False)
class TissuePatches:
    """The N patches of a slide that are kept, because they hold enough tissue.

    Args:
        grid: all G patches of the slide.
        kept: int64 [N], indices of the grid.
        tissue: float64 [N], the share of each patch that is tissue.
        flags: uint8 [N], bits of FLAGS.
        with_tissue: number of patches of the grid that hold any tissue.
        dropped: number of patches that are left out because of a flag in `Tiling.drop`.
        thumb: uint8 [h, w, 3], the thumbnail of the slide.
        mask: bool [h, w], the tissue in the thumbnail.
    """

    grid: PatchGrid
    kept: NDArray[np.int64]
    tissue: NDArray[np.float64]
    flags: NDArray[np.uint8]
    with_tissue: int
    dropped: int
    thumb: NDArray[np.uint8]
    mask: NDArray[np.bool_]

    @property
    def corrupt(self) -> NDArray[np.bool_]:
        """Return bool [N]: True if the patch lies on damaged tiles of the file."""
        return (self.flags & np.uint8(FLAGS.CORRUPT)) != 0

    @property
    def why_empty(self) -> str | None:
        """Return why no patch is kept, None if at least one is."""
        if len(self.kept):
            return None
        if not len(self.grid.coords):
            return "the slide is smaller than one patch"
        if self.dropped:
            return "all patches with tissue have a flag that is dropped"
        return "no patch holds enough tissue" if self.mask.any() else "no tissue was found"


def find_patches(
    slide: Slide, tiling: Tiling, mpp: tuple[float, float] | None, mask_file: Path | None
) -> TissuePatches:
    """Divide a slide into patches, and keep those that hold enough tissue.

    Args:
        slide: the slide.
        tiling: resolution, size and border of patches, and the least share of tissue.
        mpp: micrometres per level-0 pixel along x and y, None if not known.
        mask_file: the user's own mask of the tissue, used instead of `tissue_mask`.

    Raises:
        SlideError: as in `make_grid`, or "damaged" if no thumbnail can be read.
        StoreError: the mask cannot be used.
    """
    grid = make_grid(slide, tiling, mpp)
    with ThreadPoolExecutor(1, "scan") as pool:
        pool.submit(slide.damaged, grid.level)  # the slide keeps the result; see damaged_patches
        return _find_patches(slide, tiling, grid, mpp, mask_file)


def _find_patches(
    slide: Slide,
    tiling: Tiling,
    grid: PatchGrid,
    mpp: tuple[float, float] | None,
    mask_file: Path | None,
) -> TissuePatches:
    """Find the patches of a grid; see `find_patches`."""
    size = (slide.levels[0].width, slide.levels[0].height)
    thumb = slide.thumbnail(thumb_px(slide))
    um_per_px = math.sqrt(mpp[0] * mpp[1]) * size[0] / thumb.shape[1] if mpp else None
    patch_px = grid.footprint_px / size[0] * thumb.shape[1]
    mask, pen = np.zeros(thumb.shape[:2], bool), np.zeros(thumb.shape[:2], bool)
    scanned = _scanned_part(slide, thumb.shape)
    mask[scanned], pen[scanned] = find_tissue(
        thumb[scanned], um_per_px, patch_px, tiling.tissue_threshold
    )
    if mask_file is not None:
        mask = read_mask(mask_file, size, thumb.shape[:2])
    blur = blur_mask(thumb, mask, um_per_px)
    # Where the thumbnail itself is damaged, tissue cannot be seen. Count it as tissue: the patches
    # are then kept and flagged as corrupt, not silently dropped.
    mask |= _damaged_mask(slide, mask.shape)

    def share_of(mask: NDArray[np.bool_], patches: NDArray[np.int32]) -> NDArray[np.float64]:
        # If pixels are not square, neither are patches in level-0 px: stretch y until they are.
        stretched = size[0], size[1] * grid.aspect
        return coverage(mask, patches * (1, grid.aspect), grid.footprint_px, stretched)

    tissue = share_of(mask, grid.coords)
    kept = np.flatnonzero(tissue >= tiling.min_tissue)
    coords = grid.coords[kept]
    flags = np.zeros(len(kept), np.uint8)
    for flag, is_set in (
        (FLAGS.EDGE, grid.edge[kept]),
        (FLAGS.PEN, share_of(pen, coords) >= PEN_SHARE),
        (FLAGS.BLUR, share_of(blur, coords) >= BLUR_SHARE),
        (FLAGS.CORRUPT, damaged_patches(slide, grid)[kept]),
    ):
        flags[is_set] |= np.uint8(flag)
    with_tissue = int(np.count_nonzero(tissue))
    used = (flags & np.uint8(drop_bits(tiling.drop))) == 0
    kept, flags, dropped = kept[used], flags[used], int(np.count_nonzero(~used))
    return TissuePatches(grid, kept, tissue[kept], flags, with_tissue, dropped, thumb, mask)


def thumb_px(slide: Slide) -> int:
    """Return the longest side of a slide's thumbnail: 1024 to 2048 px if the slide is that large.

    If at most half of the file was scanned, it is twice as large. It is that of the coarsest level
    with at least 1024 px, divided by an integer: so few pixels are read, and the thumbnail is a
    mean of whole pixels.
    """
    sides = [max(level.width, level.height) for level in slide.levels]
    longest = THUMB_PX
    if slide.bounds and 2 * max(slide.bounds[2:]) <= sides[0]:
        longest = 2 * THUMB_PX
    side = min((side for side in sides if side >= longest // 2), default=sides[0])
    return side // math.ceil(side / longest)


def find_tissue(
    thumb: NDArray[np.uint8],
    um_per_px: float | None,
    patch_px: float,
    threshold: float | None = None,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the masks of tissue and of ink, each bool [h, w].

    They are computed on the thumbnail reduced until a patch is about 5 px wide, which is fine
    enough for the share of a patch. On a slide with few large patches, masks of the full thumbnail
    would take longer than the patches.

    Args:
        thumb: uint8 [h, w, 3].
        um_per_px: micrometres per pixel of the thumbnail, None if not known.
        patch_px: side of a patch in px of the thumbnail.
        threshold: least contrast of tissue, see `tissue_mask`.
    """
    factor = max(1, min(int(patch_px / 5), max(thumb.shape) // 256))
    small = np.asarray(Image.fromarray(thumb).reduce(factor))
    background = find_background(small)
    with ThreadPoolExecutor(1, "ink") as pool:  # numpy and scipy release Python's lock
        pen_of_thread = pool.submit(find_ink, small, background)
        um = um_per_px * factor if um_per_px else None
        tissue = find_stain(small, um, threshold, background)
        pen = pen_of_thread.result()
    tissue &= ~pen
    height, width = thumb.shape[:2]
    masks = [mask.repeat(factor, 0)[:height].repeat(factor, 1)[:, :width] for mask in (tissue, pen)]
    return masks[0], masks[1]


def _scanned_part(slide: Slide, shape: tuple[int, ...]) -> tuple[slice, slice]:
    """Return the rows and columns of the thumbnail that were scanned.

    What lies outside is white, unlike glass, and must not be taken into account.
    """
    level = slide.levels[0]
    left, top, width, height = slide.bounds or (0, 0, level.width, level.height)
    down, across = shape[0] / level.height, shape[1] / level.width
    rows = slice(math.floor(top * down), math.ceil((top + height) * down))
    return rows, slice(math.floor(left * across), math.ceil((left + width) * across))


def _damaged_mask(slide: Slide, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return bool [h, w]: True where the thumbnail is white because of damaged tiles."""
    number = thumbnail_level(slide.levels, thumb_px(slide))
    level, mask = slide.levels[number], np.zeros(shape, bool)
    down, across = shape[0] / level.height, shape[1] / level.width
    for x, y, width, height in slide.damaged(number).tolist():
        rows = slice(int(y * down), math.ceil((y + height) * down))
        mask[rows, int(x * across) : math.ceil((x + width) * across)] = True
    return mask
