"""OpenSlide: scanners' own formats, DICOM, and what nothing else reads."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SlideError
from .colours import over_white
from .levels import MOST_LEVELS, Pixels, make_levels, sane_mpp
from .library_errors import DAMAGE, opening
from .slide import Slide
from .tiff import TiffFile, TiffLevel, TileCache, read_tiles


def has_openslide() -> bool:
    """Tell whether OpenSlide is installed, without importing it."""
    return importlib.util.find_spec("openslide") is not None


def _openslide(path: Path) -> Any:
    try:
        import openslide
    except (ImportError, OSError) as error:  # OSError: the library itself is not there
        raise SlideError(
            path, "no-reader", f"OpenSlide cannot be imported ({error}): pip install 'motet[wsi]'"
        ) from None
    return openslide


class OpenSlideSlide(Slide):
    """Read by OpenSlide.

    A handle that has met an error answers every call with it, so the file is opened again. Where a
    level's downsample is no whole number OpenSlide interpolates (1.2 grey levels on average on an
    Aperio level of 4.0002); of a TIFF such levels are read by tifffile.
    """

    def __init__(self, path: Path, tiff: TiffFile | None) -> None:
        self._library = _openslide(path)
        self._lock = threading.Lock()
        with opening(path, self._library.OpenSlideError):
            if self._library.OpenSlide.detect_format(path) is None:
                raise SlideError(path, "unreadable", "neither a slide, nor TIFF, PNG or JPEG")
            self._handle = self._library.OpenSlide(path)
            try:
                found: dict[str, str] = dict(self._handle.properties)
                sides = [(int(w), int(h)) for w, h in self._handle.level_dimensions]
                self._ratios = [float(ratio) for ratio in self._handle.level_downsamples]
                levels = make_levels(path, sides[:MOST_LEVELS])
            except BaseException:
                self._handle.close()
                raise
        tile = [found.get(f"openslide.level[0].tile-{side}", "") for side in ("width", "height")]
        mpp = [_number(found.get(f"openslide.mpp-{axis}", "")) for axis in "xy"]
        same = tiff is not None and not tiff.refusal and tiff.sides == sides
        super().__init__(
            path, "openslide", found.get("openslide.vendor", "unknown"), levels,
            (int(tile[0]), int(tile[1])) if all(side.isdigit() for side in tile) else None,
            tiff.mpp if tiff and not tiff.needs_openslide else sane_mpp(*mpp),
            {key: value for key, value in found.items() if "Patient" not in key},
            tiff if same else None,
        )  # fmt: skip
        if tiff is not None and not same:
            tiff.close()
        self._pages: list[TiffLevel] | None = tiff.levels if tiff is not None and same else None
        self._cache = TileCache()

    def _pixels(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        ratio = self._ratios[level]
        if self._pages is not None and ratio != round(ratio):
            return read_tiles(self._pages[level], self._cache, level, x, y, width, height)
        handle = self._handle
        try:
            image = handle.read_region((round(x * ratio), round(y * ratio)), level, (width, height))
        except (*DAMAGE, self._library.OpenSlideError) as error:
            self._reopen(handle)
            raise RuntimeError(error) from error
        return over_white(np.asarray(image))

    def _reopen(self, broken: Any) -> None:
        """Open the file again; threads that are reading keep the broken handle alive."""
        with self._lock:
            if self._handle is broken:
                with opening(self.path, self._library.OpenSlideError):
                    self._handle = self._library.OpenSlide(self.path)

    def close(self) -> None:
        """Let go of the file."""
        self._cache.clear()
        self._handle.close()
        super().close()


def _number(text: str) -> float:
    try:
        return float(text.replace(",", "."))
    except ValueError:
        return float("nan")
