"""Compute where the patches of a slide lie: their level, resolution and coordinates."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..._checks import number
from ..errors import SlideError
from ..store.format import drop_bits

if TYPE_CHECKING:
    from ..slides.slide import Slide

BORDERS = ("drop", "shift", "pad")
TOLERANCE = 0.02  # resolutions that differ by at most this share count as equal
CLOSE = 1 + TOLERANCE
MAX_TOLERANCE = 0.5
MAX_PATCHES = 2**24  # of a slide


@dataclass(frozen=True)
class Tiling:
    """How slides are cut into patches.

    Args:
        mpp: micrometres per pixel of the patches; either this or `downsample`.
        downsample: level-0 pixels per pixel of the patches, 1 or more, whatever the resolution.
        tile_px: side of the patches in pixels.
        border: patches that reach beyond the slide: "drop" leaves them out, "shift" moves them
            inwards, "pad" fills them with white.
        min_tissue: least share of a patch that must be tissue, 0 to 1.
        mpp_tolerance: resolutions that differ by at most this share, 0 to 0.5, count as equal.
        tissue_threshold: least contrast of tissue, see `tissue_mask`; None for Otsu's.
        drop: flags of patches that are left out, "pen" and "blur".

    Raises:
        ValueError: an argument has another value.
    """

    mpp: float | None = None
    downsample: float | None = None
    tile_px: int = 256
    border: str = "drop"
    min_tissue: float = 0.1
    mpp_tolerance: float = TOLERANCE
    tissue_threshold: float | None = None
    drop: Sequence[str] = ()

    def __post_init__(self) -> None:
        if (self.mpp is None) == (self.downsample is None):
            raise ValueError(
                "expected mpp or downsample, one of them, "
                f"got mpp={self.mpp}, downsample={self.downsample}"
            )
        for name in (
            "mpp",
            "downsample",
            "min_tissue",
            "mpp_tolerance",
            "tissue_threshold",
        ):  # 4 and 4.0 have the same hash
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, number(name, value))
        if self.mpp is not None and not 0 < self.mpp < math.inf:
            raise ValueError(f"mpp: expected micrometres per pixel above 0, got {self.mpp}")
        if self.downsample is not None and not 1 <= self.downsample < 1e6:
            raise ValueError(
                "downsample: expected 1 or more (nothing is enlarged) and less than a million, "
                f"got {self.downsample}"
            )
        if type(self.tile_px) is not int or not 1 <= self.tile_px <= 2**14:
            raise ValueError(f"tile_px: expected an int from 1 to 16384, got {self.tile_px!r}")
        if self.border not in BORDERS:
            raise ValueError(f"border: expected one of {', '.join(BORDERS)}, got {self.border!r}")
        if not 0 <= self.min_tissue <= 1:
            raise ValueError(f"min_tissue: expected 0 to 1, got {self.min_tissue}")
        if not 0 <= self.mpp_tolerance <= MAX_TOLERANCE:
            raise ValueError(f"mpp_tolerance: expected 0 to 0.5, got {self.mpp_tolerance}")
        drop_bits(self.drop)  # raises ValueError if a name is wrong
        names = (self.drop,) if isinstance(self.drop, str) else self.drop
        object.__setattr__(self, "drop", tuple(sorted(set(names))))
        if self.tissue_threshold is not None and not 0 < self.tissue_threshold < 1:
            raise ValueError(
                f"tissue_threshold: expected a number between 0 and 1, got {self.tissue_threshold}"
            )

    def to_json(self) -> dict[str, float | int | str | list[str] | None]:
        """Return the fields as they are written to run.json of a store.

        Fields that were added later are left out at their default, so that stores that were
        written without them keep their hash.
        """
        fields = asdict(self)
        if self.mpp_tolerance == TOLERANCE:
            del fields["mpp_tolerance"]
        if self.tissue_threshold is None:
            del fields["tissue_threshold"]
        fields["drop"] = list(self.drop)
        if not self.drop:
            del fields["drop"]
        return fields

    @property
    def hash(self) -> str:
        """Return 16 hexadecimal digits of the SHA-256 of the fields."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class PatchGrid:
    """The G patches of a slide, row by row.

    Args:
        level: the level from which the patches are read.
        ratio: pixels of the level per pixel of a patch; if 1.0, pixels are copied.
        read_px: side of a patch in pixels of the level, tile_px * ratio.
        footprint_px: side of a patch in level-0 pixels.
        mpp: micrometres per pixel of the patches, None if the slide's resolution is not known.
        tile_px: side of a patch in its own pixels.
        coords: int32 [G, 2], (x, y) of the upper left corners in level-0 pixels, rounded.
        corners: float64 [G, 2], the same in pixels of the level, not rounded; used for reading.
        edge: bool [G], True if the patch was moved inwards or reaches beyond the slide.
        shape: number of rows and columns of patches; G is their product.
        aspect: height of a pixel of the level, in micrometres, divided by its width: 1.0 if it is
            square. `ratio`, `read_px` and `footprint_px` are along x; along y they are divided by
            the aspect, so that a patch is square in micrometres.
    """

    level: int
    ratio: float
    read_px: float
    footprint_px: float
    mpp: float | None
    tile_px: int
    coords: np.ndarray
    corners: np.ndarray
    edge: np.ndarray
    shape: tuple[int, int]
    aspect: float = 1.0

    @property
    def ratios(self) -> tuple[float, float]:
        """Return `ratio` along x and y."""
        return self.ratio, self.ratio / self.aspect

    @property
    def read_size(self) -> tuple[float, float]:
        """Return `read_px` along x and y."""
        return self.read_px, self.read_px / self.aspect

    @property
    def footprint(self) -> tuple[float, float]:
        """Return `footprint_px` along x and y."""
        return self.footprint_px, self.footprint_px / self.aspect


def make_grid(slide: Slide, tiling: Tiling, mpp: tuple[float, float] | float | None) -> PatchGrid:
    """Choose a level of a slide and place patches on it.

    The level is the coarsest one whose resolution is at least that of the patches, with a tolerance
    of 2 % (`mpp_tolerance`). If it is within this of the resolution of the patches, pixels of the
    level are copied, and patches begin at integer pixels of the level. Otherwise a patch is the
    area mean of tile_px * target level-0 px, and begins at an integer level-0 px.

    Args:
        slide: the slide.
        tiling: resolution, size and border.
        mpp: micrometres per level-0 pixel, or along x and along y; None if not known. Axes that
            differ by more than 2 % are resampled each by its own ratio.

    Returns:
        The grid. With border "drop" and a slide smaller than a patch it has no patches.

    Raises:
        SlideError: "no-mpp" if the tiling has an mpp and that of the slide is not known,
            "resolution" if the slide is coarser than the tiling by more than the tolerance,
            "too-large" if there would be more than 16 million patches.
    """
    if isinstance(mpp, tuple):
        mpp = mpp if max(mpp) > CLOSE * min(mpp) else (mpp[0] + mpp[1]) / 2
    axes = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    targets, index = _targets_and_level(slide, tiling, axes)
    level = slide.levels[index]
    # Level-0 px per px of a patch, along x and y: those of the level if it is close enough.
    scales = [
        level.downsample if level.downsample >= target / (1 + tiling.mpp_tolerance) else target
        for target in targets
    ]
    copies = scales == [level.downsample] * 2
    # Patches begin at integer units: px of the level if these are copied, else level-0 px.
    unit = level.downsample if copies else 1.0
    origin, sides = _extents(slide, index, unit)
    lengths = [tiling.tile_px * scale / unit for scale in scales]
    columns, rows = (
        _patch_count(side, length, tiling.border)
        for side, length in zip(sides, lengths, strict=True)
    )
    if rows * columns > MAX_PATCHES:
        message = f"expected at most {MAX_PATCHES} patches, got {rows} x {columns}"
        raise SlideError(slide.path, "too-large", message)
    xs, beyond_x = _patch_begins(columns, lengths[0], sides[0], tiling.border)
    ys, beyond_y = _patch_begins(rows, lengths[1], sides[1], tiling.border)
    corners = np.stack([np.tile(xs, rows), np.repeat(ys, columns)], axis=1) + origin
    return PatchGrid(
        level=index,
        ratio=1.0 if copies else scales[0] / level.downsample,
        read_px=tiling.tile_px * scales[0] / level.downsample,
        footprint_px=tiling.tile_px * scales[0],
        mpp=None if axes[0] is None else axes[0] * scales[0],
        tile_px=tiling.tile_px,
        coords=np.rint(corners * unit).astype(np.int32),
        corners=corners * (unit / level.downsample),
        edge=(beyond_y[:, None] | beyond_x).ravel(),
        shape=(rows, columns),
        aspect=scales[0] / scales[1],
    )


def _extents(slide: Slide, index: int, unit: float) -> tuple[list[int], list[int]]:
    """Return where the slide begins and its sides, along x and y, in units of level-0 px.

    The slide ends where the level ends: 4097 level-0 px at a downsample of 4 are 1024 px, and the
    last level-0 px belongs to no patch. If only a part of the file was scanned, it is the slide.
    """
    level, level_0 = slide.levels[index], slide.levels[0]
    left, top, width, height = slide.bounds or (0, 0, level_0.width, level_0.height)
    origin, sides = [], []
    for begin, end, px in ((left, left + width, level.width), (top, top + height, level.height)):
        first = math.ceil(begin / unit - 1e-9)
        last = math.floor(min(end, px * level.downsample) / unit + 1e-9)
        origin.append(first)
        sides.append(max(last - first, 0))
    return origin, sides


def _patch_count(side: int, length: float, border: str) -> int:
    if border == "drop":
        return math.floor(side / length + 1e-9)
    return math.ceil(side / length - 1e-9)


def _patch_begins(
    count: int, length: float, side: int, border: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return where the patches of one axis begin, and True for those that reach beyond the side.

    With border "shift" these are moved inwards, and stay True.
    """
    begins = np.rint(np.arange(count) * length)
    # The last begin of a patch inside of the slide. Rounding may put a begin half a unit beyond.
    last = math.floor(side - length + 1e-6)
    beyond = begins > last
    if border == "drop":
        beyond = np.zeros_like(beyond)
    if border != "pad":
        begins = np.minimum(begins, max(last, 0))
    return begins, beyond


def _targets_and_level(
    slide: Slide, tiling: Tiling, axes: Sequence[float | None]
) -> tuple[list[float], int]:
    """Return the targets (level-0 px per px of a patch, along x and y) and the level to read."""
    mpp = max((axis for axis in axes if axis is not None), default=None)
    if tiling.downsample is not None:
        targets = [float(tiling.downsample)] * 2
    elif mpp is not None and all(axis is not None and 1e-4 < axis < 1e6 for axis in axes):
        # Rounded to 12 digits: with 3.0000000000000004 the last column would not fit.
        targets = [round((tiling.mpp or 0) / axis, 12) for axis in axes if axis is not None]
    else:
        raise SlideError(
            slide.path,
            "no-mpp",
            f"expected its micrometres per pixel, got {mpp}: set slide_mpp, or use downsample",
        )
    target, close = min(targets), 1 + tiling.mpp_tolerance
    fine_levels = [i for i, level in enumerate(slide.levels) if level.downsample <= target * close]
    if not fine_levels:
        raise SlideError(
            slide.path,
            "resolution",
            f"expected {tiling.mpp:.6g} micrometres per pixel or finer, got {mpp:.6g}: nothing is "
            f"enlarged; ask for mpp={mpp:.6g} or more{_tolerance_cure(1 / target)}",
        )
    return targets, max(fine_levels, key=lambda i: slide.levels[i].downsample)


def _tolerance_cure(ratio: float) -> str:
    """Return the tolerance that would accept a slide, as words; empty if none may be so large."""
    tolerance = math.ceil(1000 * (ratio - 1) - 1e-6) / 1000
    return f", or set mpp_tolerance={tolerance:g}" if tolerance <= MAX_TOLERANCE else ""


def damaged_patches(slide: Slide, grid: PatchGrid) -> np.ndarray:
    """Return bool [G]: True if a patch needs pixels of a damaged tile of the file.

    Args:
        slide: the slide.
        grid: its patches.
    """
    rows, columns = grid.shape
    is_damaged = np.zeros(grid.shape, bool)
    corners = grid.corners.reshape(rows, columns, 2)
    xs, ys = np.empty(0), np.empty(0)
    if is_damaged.size:
        xs, ys = corners[0, :, 0], corners[:, 0, 1]
    for x, y, width, height in slide.damaged(grid.level):
        across, down = (  # an overlap of less than 1e-6 px is rounding, no overlap
            slice(
                np.searchsorted(begins + length, first + 1e-6),
                np.searchsorted(begins, first + size - 1e-6),
            )
            for begins, length, first, size in (
                (xs, grid.read_size[0], x, width),
                (ys, grid.read_size[1], y, height),
            )
        )
        is_damaged[down, across] = True
    return is_damaged.ravel()
