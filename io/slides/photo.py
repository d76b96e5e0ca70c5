"""The reader by Pillow: PNG and JPEG, decoded completely at the first read and kept in memory."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SlideError
from .colours import over_white
from .levels import MAX_PHOTO_PX, Pixels, make_levels
from .library_errors import DAMAGE, opening
from .slide import Slide

BAND_PX = 1 << 22  # px that are converted at a time

_ORIENTATION = 274  # tag of EXIF
_TURNED: dict[int, Callable[[Pixels], Pixels]] = {  # views, which need no further memory
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr"}


class PhotoSlide(Slide):
    """Read a PNG or JPEG: one level, turned upright by the orientation in its EXIF."""

    def __init__(self, path: Path, kind: str) -> None:
        try:
            from PIL import Image
        except ImportError:
            raise SlideError(path, "no-reader", "not installed: pip install pillow") from None
        with opening(path), _size_limit(path, Image), Image.open(path, formats=[kind]) as image:
            self._turn = _orientation(image)
            width, height = image.size if self._turn < 5 else image.size[::-1]
            size, mode = (width, height), image.mode
        levels = make_levels(path, [size])
        if size[0] * size[1] > MAX_PHOTO_PX:
            raise SlideError(
                path, "too-large",
                f"{size[0]} x {size[1]} px; at most {MAX_PHOTO_PX} px of a {kind.upper()}: "
                "write it as a tiled TIFF",
            )  # fmt: skip
        if mode not in _MODES:
            raise SlideError(
                path, "unsupported",
                f"samples of mode {mode}; expected 8 bits: scale them by your camera's range",
            )  # fmt: skip
        properties = {f"{kind}.mode": mode, f"{kind}.orientation": str(self._turn)}
        super().__init__(path, "pillow", kind, levels, None, None, properties)
        self._image_module: Any = Image
        self._kind = kind
        self._image: Pixels | None = None
        self._error: Exception | None = None
        self._lock = threading.Lock()

    def _pixels(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        with self._lock:
            if self._error:
                raise self._error
            if self._image is None:
                try:
                    self._image = self._decode()
                except DAMAGE as error:
                    self._error = error  # kept, so that not every patch decodes the file again
                    raise
            image = self._image
        return image[y : y + height, x : x + width].copy()

    def _decode(self) -> Pixels:
        width, height = self.levels[0].width, self.levels[0].height
        if self._turn >= 5:
            width, height = height, width
        out = np.empty((height, width, 3), np.uint8)
        rows = max(1, BAND_PX // width)
        with (
            _size_limit(self.path, self._image_module),
            self._image_module.open(self.path, formats=[self._kind]) as image,
        ):
            if image.size != (width, height):
                raise SlideError(self.path, "damaged", "the file has been exchanged")
            image.load()
            has_alpha = image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info
            for top in range(0, height, rows):
                band = image.crop((0, top, width, min(top + rows, height)))
                if has_alpha:
                    out[top : top + rows] = over_white(np.asarray(band.convert("RGBA")))
                else:
                    out[top : top + rows] = np.asarray(band.convert("RGB"))
        return _TURNED[self._turn](out)

    def close(self) -> None:
        """Release the pixels."""
        self._image = None
        super().close()


def _orientation(image: Any) -> int:
    """Return the orientation of an image by its EXIF, 1 to 8; 1 if it has none."""
    if "exif" not in image.info:  # else Pillow would decode a PNG to look for it at its end
        return 1
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except DAMAGE:
        return 1
    return orientation if orientation in _TURNED else 1


class _size_limit:
    """Raise SlideError "too-large" for Pillow's error of its size limit, and ignore its warning."""

    def __init__(self, path: Path, module: Any) -> None:
        self._path, self._module = path, module

    def __enter__(self) -> None:
        self._catch = warnings.catch_warnings()
        self._catch.__enter__()
        warnings.simplefilter("ignore", self._module.DecompressionBombWarning)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._catch.__exit__(kind, error, trace)
        if isinstance(error, self._module.DecompressionBombError):
            raise SlideError(self._path, "too-large", str(error)) from None
