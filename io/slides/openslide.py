"""The reader by OpenSlide: formats of scanners, DICOM, and files that no other reader reads."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SlideError
from .colours import over_white
from .levels import MAX_LEVELS, Pixels, checked_mpp, make_levels
from .library_errors import DAMAGE, opening
from .slide import Slide
from .tiff import TiffFile, TiffLevel, TileCache, read_tiles


def has_openslide() -> bool:
    """Return True if OpenSlide is installed, without importing it."""
    return importlib.util.find_spec("openslide") is not None


def _openslide(path: Path) -> Any:
    try:
        import openslide
    except (ImportError, OSError) as error:  # OSError: the C library is missing
        raise SlideError(
            path, "no-reader", f"OpenSlide cannot be imported ({error}): pip install 'motet[wsi]'"
        ) from None
    return openslide


class OpenSlideSlide(Slide):
    """Read a slide by OpenSlide.

    After an error, each further call with the same handle raises this error, so the file is opened
    again. If the downsample of a level is not an integer, OpenSlide interpolates (an error of 1.2
    grey levels on average on an Aperio level of 4.0002); such levels of a TIFF are read by
    tifffile instead.
    """

    def __init__(self, path: Path, tiff: TiffFile | None) -> None:
        self._library = _openslide(path)
        self._lock = threading.Lock()
        with opening(path, self._library.OpenSlideError):
            if self._library.OpenSlide.detect_format(path) is None:
                raise SlideError(path, "unreadable", "neither a slide, nor TIFF, PNG or JPEG")
            self._handle = self._library.OpenSlide(path)
            try:
                properties: dict[str, str] = dict(self._handle.properties)
                sides = [(int(w), int(h)) for w, h in self._handle.level_dimensions]
                self._ratios = [float(ratio) for ratio in self._handle.level_downsamples]
                levels = make_levels(path, sides[:MAX_LEVELS])
            except BaseException:
                self._handle.close()
                raise
        tile = [
            properties.get(f"openslide.level[0].tile-{side}", "") for side in ("width", "height")
        ]
        mpp = [_number(properties.get(f"openslide.mpp-{axis}", "")) for axis in "xy"]
        if tiff is not None and not tiff.needs_openslide and sides[0] != tiff.sides[0]:
            self._handle.close()
            raise SlideError(
                path, "unsupported",
                f"OpenSlide takes an image of {sides[0][0]} x {sides[0][1]} px for the slide, "
                f"which has {tiff.sides[0][0]} x {tiff.sides[0][1]} px; leave reader='auto'",
            )  # fmt: skip
        # Both see the same levels: then damage can be scanned, and levels read by tifffile.
        same_levels = tiff is not None and not tiff.refusal and tiff.sides == sides
        super().__init__(
            path, "openslide", properties.get("openslide.vendor", "unknown"), levels,
            (int(tile[0]), int(tile[1])) if all(side.isdigit() for side in tile) else None,
            tiff.mpp if tiff and not tiff.needs_openslide else checked_mpp(mpp[0], mpp[1]),
            {key: value for key, value in properties.items() if "Patient" not in key},
            tiff if same_levels else None, tiff.image if tiff else {},
            _bounds(properties, *sides[0]),
        )  # fmt: skip
        if tiff is not None and not same_levels:
            tiff.close()
        self._pages: list[TiffLevel] | None = None
        if tiff is not None and same_levels:
            self._pages = tiff.levels
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
        """Open the file again. Threads that still read keep the broken handle alive."""
        with self._lock:
            if self._handle is broken:
                with opening(self.path, self._library.OpenSlideError):
                    self._handle = self._library.OpenSlide(self.path)

    def close(self) -> None:
        """Close the file."""
        self._cache.clear()
        self._handle.close()
        super().close()


def _bounds(
    properties: dict[str, str], width: int, height: int
) -> tuple[int, int, int, int] | None:
    """Return the part of level 0 that was scanned; None if it is all of it, or not known.

    MIRAX files, for example, have a large empty canvas.
    """
    values = [
        properties.get(f"openslide.bounds-{name}", "") for name in ("x", "y", "width", "height")
    ]
    if not all(value.isdecimal() for value in values):
        return None
    x, y, w, h = map(int, values)
    is_part = w > 0 and h > 0 and x + w <= width and y + h <= height and (w, h) != (width, height)
    return (x, y, w, h) if is_part else None


def _number(text: str) -> float:
    try:
        return float(text.replace(",", "."))
    except ValueError:
        return float("nan")


def read_associated(path: Path, longest: int) -> dict[str, Pixels]:
    """Read the images of a slide file that are not the slide: label, macro and others.

    The thumbnail, which shows the slide, is left out. Images of more than 50 million px are too.

    Args:
        path: the file.
        longest: most px of the longer side; a larger image is reduced.

    Returns:
        Name to uint8 [h, w, 3]; empty if OpenSlide reads no such image.

    Raises:
        SlideError: the file cannot be read, or OpenSlide is not installed.
    """
    library = _openslide(path)
    images = {}
    with opening(path, library.OpenSlideError), library.OpenSlide(path) as handle:
        sizes = {
            name: [_number(handle.properties.get(f"openslide.associated.{name}.{side}", ""))
                   for side in ("width", "height")]
            for name in handle.associated_images
        }  # fmt: skip
        for name, (width, height) in sizes.items():
            if name != "thumbnail" and width * height <= 50e6:
                image = handle.associated_images[name]
                image.thumbnail((longest, longest))
                images[name] = over_white(np.asarray(image))
    return images
