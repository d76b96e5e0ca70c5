"""The reader of tiled JPEG: the fastest. C++ reads and decodes tiles without the interpreter lock.

The JPEG decoder is the libjpeg-turbo that Pillow was built with. It is loaded at run time: nothing
is needed when motet is built. Its pixels are those of OpenSlide, which uses libjpeg-turbo too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import SlideError
from ..native import native, status
from .levels import Pixels
from .slide import Slide, check_corners
from .tiff import TiffFile, TiffLevel

YCBCR = 6  # the photometric tag


def jpeg_obstacle(tiff: TiffFile) -> str:
    """Return why a file is not read as JPEG tiles; empty if it is.

    It must be tiled baseline JPEG of three 8-bit samples, without tiles cut at the edges: in these
    files the scan of integrity.py finds damage that a decoder does not report.
    """
    if tiff.refusal:
        return tiff.refusal.message
    for level in tiff.levels:
        tiles = level.tiles
        if not level.tiled or tiles.coding != "jpeg" or tiles.samples != 3:
            return "damage can be found in tiled JPEG in colour only"
        if not (tiles.offsets.all() and tiles.counts.all()):
            return "some of its tiles are missing"
        for number in (0, len(tiles.offsets) - 1):
            header = tiff.header(level, number)  # None: damaged, which the scan will report
            if header and not header.single:
                return "its JPEG is progressive, in which damage cannot be found"
            if header and header.size != level.tile:
                return "its tiles are cut at the edges"
    return ""


def set_tile_size(level: TiffLevel) -> None:
    """Let the scan find the tiles of a level that have another size than the TIFF's tags say."""
    level.tiles = replace(level.tiles, sizes=frozenset([level.tile]))


class JpegSlide(Slide):
    """Read the tiles of a TIFF by libjpeg-turbo, after a scan of the level's tiles for damage.

    A tile is damaged too if libjpeg-turbo reports an error or a warning while it decodes it.
    """

    def __init__(self, path: Path, tiff: TiffFile) -> None:
        self._pages = tiff.levels
        for level in self._pages:
            set_tile_size(level)
        self._tiles = [_open_level(path, level) for level in self._pages]
        super().__init__(
            path, "libjpeg", tiff.vendor, tiff.pyramid, tiff.tile_px, tiff.mpp, tiff.properties,
            tiff, tiff.image,
        )  # fmt: skip

    def _pixels(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        out = np.empty((height, width, 3), np.uint8)
        (why,) = self._tiles[level].read([(x, y)], [out])
        if why:
            raise self._damage_error(level, x, y, width, height, why)
        return out

    def read_into(
        self, level: int, corners: NDArray[np.int64], out: Sequence[Pixels]
    ) -> list[SlideError | None]:
        """Read regions into given arrays, see Slide.read_into; by one call of C++ if it can."""
        level = self._level(level)
        corners = check_corners(corners)
        if not self._are_sound(level, corners, out):
            return super().read_into(level, corners, out)
        places = corners.tolist()
        reasons = self._tiles[level].read(places, out)
        if not any(reasons):
            return [None] * len(places)
        return [
            self._damage_error(level, x, y, pixels.shape[1], pixels.shape[0], why) if why else None
            for why, (x, y), pixels in zip(reasons, places, out, strict=True)
        ]

    def _are_sound(self, level: int, corners: NDArray[np.int64], out: Sequence[Pixels]) -> bool:
        """Return True if all regions lie inside of the level and touch no damaged tile."""
        sides, page = self.levels[level], self._pages[level]
        ends = corners + np.array([pixels.shape[1::-1] for pixels in out]).reshape(-1, 2)
        if (corners < 0).any() or (ends > (sides.width, sides.height)).any():
            return False
        if page.damage() is None:
            return True
        return not any(page.hit(*begin, *end) for begin, end in zip(corners, ends, strict=True))


def _open_level(path: Path, level: TiffLevel) -> Any:
    """Return the JpegTiles of C++ for a level."""
    module = native()
    if module is None:
        raise SlideError(path, "no-reader", f"the C++ of motet was not built ({status()})")
    from PIL import _imaging  # linked to libjpeg, through which C++ finds the functions of that

    tiles = level.tiles
    try:
        return module.JpegTiles(
            _imaging.__file__, level.file, tiles.offsets, tiles.counts, level.columns, level.tile,
            tiles.tables, level.colours.form == YCBCR,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:  # ValueError: tiles larger than a JPEG may be
        raise SlideError(path, "no-reader", f"libjpeg-turbo of Pillow: {error}") from None
