"""Where the patches of a slide lie: level, resolution, coordinates."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..._checks import number
from ..errors import SlideError

if TYPE_CHECKING:
    from ..slides.slide import Slide

BORDERS = ("drop", "shift", "pad")
CLOSE = 1.02  # resolutions whose ratio is at most this are the same
MOST = 2**24  # patches of a slide


@dataclass(frozen=True)
class Tiling:
    """Say how slides are cut into patches.

    Args:
        mpp: micrometres per pixel of the patches; this or `downsample`.
        downsample: level-0 pixels per pixel of the patches, 1 or more, whatever they measure.
        tile_px: side of the patches in pixels.
        border: what becomes of patches that reach beyond the slide: "drop" leaves them out, "shift"
            moves them inwards, "pad" fills them with white.
        min_tissue: share of a patch that has to be tissue, 0 to 1.

    Raises:
        ValueError: an argument is none of these.
    """

    mpp: float | None = None
    downsample: float | None = None
    tile_px: int = 256
    border: str = "drop"
    min_tissue: float = 0.1

    def __post_init__(self) -> None:
        if (self.mpp is None) == (self.downsample is None):
            raise ValueError(
                "expected mpp or downsample, one of them, "
                f"got mpp={self.mpp}, downsample={self.downsample}"
            )
        for name in ("mpp", "downsample", "min_tissue"):  # 4 and 4.0 have the same hash
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

    def to_json(self) -> dict[str, float | int | str | None]:
        """Return the fields, as stores keep them."""
        return asdict(self)

    @property
    def hash(self) -> str:
        """Return 16 hexadecimal digits that tell this tiling from others."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Grid:
    """Hold the G patches of a slide, row by row.

    Args:
        level: the level that they are read from.
        ratio: its pixels per pixel of a patch; 1.0 means that pixels are taken as they are.
        read_px: side of a patch in its pixels, tile_px * ratio.
        footprint_px: side of a patch in level-0 pixels.
        mpp: micrometres per pixel of the patches, None where the slide's are not known.
        tile_px: side of a patch in its own pixels.
        coords: int32 [G, 2], level-0 pixels (x, y), the upper left corner.
        corners: float64 [G, 2], the same in pixels of the level, from which pixels are taken.
        edge: bool [G], the patch was moved inwards or reaches beyond the slide.
        shape: rows and columns of patches; G is their product.
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


def make_grid(slide: Slide, tiling: Tiling, mpp: float | None) -> Grid:
    """Choose a level of a slide and lay patches over it.

    The level is the coarsest that is no coarser than asked for, give or take 2 %. Within 2 % of
    what is asked for, its pixels are taken as they are, and patches begin at whole ones. Otherwise
    a patch is the area mean of tile_px * target level-0 px, and begins at a whole one of these.

    Args:
        slide: what to lay them over.
        tiling: resolution, size, border.
        mpp: micrometres per level-0 pixel, None if not known.

    Returns:
        The grid; with border "drop" on a slide smaller than a patch, one of no patches.

    Raises:
        SlideError: of reason "no-mpp" if a resolution is asked for that the slide does not know,
            "resolution" if the slide is more than 2 % coarser than asked for, "too-large" if there
            would be more than 16 million patches.
    """
    target, index = _target_and_level(slide, tiling, mpp)
    level, whole = slide.levels[index], slide.levels[0]
    as_it_is = level.downsample >= target / CLOSE
    scale = level.downsample if as_it_is else target
    # Where patches begin, in whole units: px of the level where these are taken as they are, else
    # level-0 px. What lies beyond the level is no part of the slide: 4097 px at 4 are 1024.
    unit = level.downsample if as_it_is else 1.0
    length = tiling.tile_px * scale / unit
    extents = ((whole.width, level.width), (whole.height, level.height))
    sides = [math.floor(min(base, px * level.downsample) / unit + 1e-9) for base, px in extents]
    if tiling.border == "drop":
        columns, rows = (math.floor(side / length + 1e-9) for side in sides)
    else:
        columns, rows = (math.ceil(side / length - 1e-9) for side in sides)
    if rows * columns > MOST:
        raise SlideError(
            slide.path, "too-large", f"expected at most {MOST} patches, got {rows} x {columns}"
        )
    places = [np.rint(np.arange(n) * length) for n in (columns, rows)]
    # The last whole place; rounded ones may be half a unit beyond it.
    lasts = [math.floor(side - length + 1e-6) for side in sides]
    edges = [at > last for at, last in zip(places, lasts, strict=True)]
    if tiling.border == "drop":
        edges = [np.zeros_like(edge) for edge in edges]
    if tiling.border != "pad":
        places = [np.minimum(at, max(last, 0)) for at, last in zip(places, lasts, strict=True)]
    corners = np.stack([np.tile(places[0], rows), np.repeat(places[1], columns)], axis=1)
    return Grid(
        level=index,
        ratio=1.0 if as_it_is else target / level.downsample,
        read_px=tiling.tile_px * scale / level.downsample,
        footprint_px=tiling.tile_px * scale,
        mpp=None if mpp is None else mpp * scale,
        tile_px=tiling.tile_px,
        coords=np.rint(corners * unit).astype(np.int32),
        corners=corners * (unit / level.downsample),
        edge=(edges[1][:, None] | edges[0]).ravel(),
        shape=(rows, columns),
    )


def _target_and_level(slide: Slide, tiling: Tiling, mpp: float | None) -> tuple[float, int]:
    """Return level-0 px per pixel of the patches, and the level to read them from."""
    if tiling.downsample is not None:
        target = float(tiling.downsample)
    elif mpp is not None and 1e-4 < mpp < 1e6:
        # To 12 digits: a quotient of 3.0000000000000004 must not cost the last column.
        target = round(tiling.mpp / mpp, 12)  # pyright: ignore[reportOptionalOperand]
    else:
        raise SlideError(
            slide.path,
            "no-mpp",
            f"expected its micrometres per pixel, got {mpp}: give them, or ask for a downsample",
        )
    fine = [i for i, level in enumerate(slide.levels) if level.downsample <= target * CLOSE]
    if not fine:
        raise SlideError(
            slide.path,
            "resolution",
            f"expected {tiling.mpp} micrometres per pixel or finer, got {mpp}: nothing is enlarged",
        )
    return target, max(fine, key=lambda i: slide.levels[i].downsample)


def damaged_patches(slide: Slide, grid: Grid) -> np.ndarray:
    """Return bool [G]: whether a patch needs pixels of one of the file's damaged tiles.

    Args:
        slide: the slide.
        grid: its patches.
    """
    rows, columns = grid.shape
    found = np.zeros(grid.shape, bool)
    corners = grid.corners.reshape(rows, columns, 2)
    xs, ys = (corners[0, :, 0], corners[:, 0, 1]) if found.size else (np.empty(0), np.empty(0))
    for x, y, width, height in slide.damaged(grid.level):
        across, down = (  # a millionth of a pixel is none
            slice(
                np.searchsorted(begins + grid.read_px, first + 1e-6),
                np.searchsorted(begins, first + size - 1e-6),
            )
            for begins, first, size in ((xs, x, width), (ys, y, height))
        )
        found[down, across] = True
    return found.ravel()
