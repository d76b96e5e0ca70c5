"""The reader by Pillow: PNG and JPEG, decoded completely at the first read and kept in memory."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SlideError
from .colours import over_white
from .levels import MAX_PHOTO_PX, Pixels, make_levels
from .library_errors import DAMAGE, opening
from .slide import Slide

BAND_PX = 1 << 22  # px that are converted at a time

_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr"}


class PhotoSlide(Slide):
    """Read a PNG or JPEG: one level, in its stored orientation (EXIF is not applied)."""

    def __init__(self, path: Path, kind: str) -> None:
        try:
            from PIL import Image
        except ImportError:
            raise SlideError(path, "no-reader", "not installed: pip install pillow") from None
        with opening(path), _size_limit(path, Image), Image.open(path, formats=[kind]) as image:
            size, mode = image.size, image.mode
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
        super().__init__(path, "pillow", kind, levels, None, None, {f"{kind}.mode": mode})
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
        return out

    def close(self) -> None:
        """Release the pixels."""
        self._image = None
        super().close()


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
