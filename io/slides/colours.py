"""Convert decoded samples of all colour spaces to RGB over white."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .levels import Pixels


@dataclass(frozen=True, eq=False)
class Colours:
    """The colour space of decoded samples."""

    form: int  # the tag PhotometricInterpretation
    premultiplied: bool  # True: the colours have been multiplied by alpha
    palette: NDArray[np.uint8] | None  # [256, 3]
    ycbcr: bool  # True: the decoder gives YCbCr, not RGB

    def rgb(self, samples: NDArray[Any]) -> Pixels:
        """Return samples [h, w, S] as RGB [h, w, 3], over white."""
        if samples.dtype != np.uint8:
            raise ValueError(f"expected 8-bit samples, got {samples.dtype}")
        if self.palette is not None:
            return self.palette[samples[..., 0]]
        if self.ycbcr:
            return _from_ycbcr(samples)
        if self.form == 0:  # white is zero
            samples = 255 - samples
        if samples.shape[2] in (2, 4):
            return over_white(samples, premultiplied=self.premultiplied)
        return np.repeat(samples, 3, 2) if samples.shape[2] == 1 else np.ascontiguousarray(samples)


def _from_ycbcr(samples: NDArray[np.uint8]) -> Pixels:
    """Convert YCbCr to RGB with the integer arithmetic of libjpeg, which OpenSlide uses too."""
    y, cb, cr = (samples[..., i].astype(np.int32) for i in range(3))
    cb, cr = cb - 128, cr - 128
    red = y + ((91881 * cr + 32768) >> 16)
    green = y + ((-22554 * cb - 46802 * cr + 32768) >> 16)
    blue = y + ((116130 * cb + 32768) >> 16)
    return np.clip(np.stack([red, green, blue], -1), 0, 255).astype(np.uint8)


def over_white(pixels: NDArray[np.uint8], *, premultiplied: bool = False) -> Pixels:
    """Return colours with alpha, [h, w, 2 or 4], composed over white, as RGB [h, w, 3].

    Args:
        pixels: grey or RGB, then alpha.
        premultiplied: True if the colours have been multiplied by alpha.
    """
    colour, alpha = pixels[..., :-1], pixels[..., -1:]
    if colour.shape[2] == 1:
        colour = np.repeat(colour, 3, 2)
    if (alpha == 255).all():
        return np.ascontiguousarray(colour)
    wide = alpha.astype(np.uint16)
    if premultiplied:
        return np.minimum(colour + (255 - wide), 255).astype(np.uint8)
    return ((colour * wide + 255 * (255 - wide) + 127) // 255).astype(np.uint8)
