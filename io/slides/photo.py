"""Pillow: photographs and patches as PNG or JPEG, held in memory once their pixels are wanted."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SlideError
from .colours import over_white
from .levels import MOST_PHOTO_PX, Pixels, make_levels
from .library_errors import DAMAGE, opening
from .slide import Slide

BAND_PX = 1 << 22  # converted at once

_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr"}


class PhotoSlide(Slide):
    """Read a PNG or JPEG: one level, as it is stored (EXIF orientation is not applied)."""

    def __init__(self, path: Path, kind: str) -> None:
        try:
            from PIL import Image
        except ImportError:
            raise SlideError(path, "no-reader", "not installed: pip install pillow") from None
        with opening(path), _limited(path, Image), Image.open(path, formats=[kind]) as image:
            size, mode = image.size, image.mode
        levels = make_levels(path, [size])
        if size[0] * size[1] > MOST_PHOTO_PX:
            raise SlideError(
                path, "too-large",
                f"{size[0]} x {size[1]} px; at most {MOST_PHOTO_PX} px of a {kind.upper()}: "
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
        self._whole: Pixels | None = None
        self._lost: Exception | None = None
        self._lock = threading.Lock()

    def _pixels(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        with self._lock:
            if self._lost:
                raise self._lost
            if self._whole is None:
                try:
                    self._whole = self._decode()
                except DAMAGE as error:
                    self._lost = error  # not to be decoded for every patch again
                    raise
            whole = self._whole
        return whole[y : y + height, x : x + width].copy()

    def _decode(self) -> Pixels:
        width, height = self.levels[0].width, self.levels[0].height
        out = np.empty((height, width, 3), np.uint8)
        rows = max(1, BAND_PX // width)
        with (
            _limited(self.path, self._image_module),
            self._image_module.open(self.path, formats=[self._kind]) as image,
        ):
            if image.size != (width, height):
                raise SlideError(self.path, "damaged", "the file has been exchanged")
            image.load()
            clear = image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info
            for top in range(0, height, rows):
                band = image.crop((0, top, width, min(top + rows, height)))
                if clear:
                    out[top : top + rows] = over_white(np.asarray(band.convert("RGBA")))
                else:
                    out[top : top + rows] = np.asarray(band.convert("RGB"))
        return out

    def close(self) -> None:
        """Let go of the pixels."""
        self._whole = None
        super().close()


class _limited:
    """Turn Pillow's own limit on sizes, an error or a warning, into SlideError "too-large"."""

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
