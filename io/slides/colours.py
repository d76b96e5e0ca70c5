"""Samples of all kinds to RGB over white."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .levels import Pixels


@dataclass(frozen=True, eq=False)
class Colours:
    """What samples mean, and how they become RGB over white."""

    form: int  # the tag PhotometricInterpretation
    premultiplied: bool
    palette: NDArray[np.uint8] | None  # [256, 3]
    ycbcr: bool  # the decoder leaves YCbCr as it is

    def rgb(self, samples: NDArray[Any]) -> Pixels:
        """Turn samples [h, w, S] to RGB."""
        if samples.dtype != np.uint8:
            raise ValueError(f"expected 8-bit samples, got {samples.dtype}")
        if self.palette is not None:
            return self.palette[samples[..., 0]]
        if self.ycbcr:
            return _from_ycbcr(samples)
        if self.form == 0:
            samples = 255 - samples
        if samples.shape[2] in (2, 4):
            return over_white(samples, premultiplied=self.premultiplied)
        return np.repeat(samples, 3, 2) if samples.shape[2] == 1 else np.ascontiguousarray(samples)


def _from_ycbcr(samples: NDArray[np.uint8]) -> Pixels:
    """Turn YCbCr to RGB in libjpeg's (and OpenSlide's) whole numbers."""
    y, cb, cr = (samples[..., i].astype(np.int32) for i in range(3))
    cb, cr = cb - 128, cr - 128
    red = y + ((91881 * cr + 32768) >> 16)
    green = y + ((-22554 * cb - 46802 * cr + 32768) >> 16)
    blue = y + ((116130 * cb + 32768) >> 16)
    return np.clip(np.stack([red, green, blue], -1), 0, 255).astype(np.uint8)


def over_white(pixels: NDArray[np.uint8], *, premultiplied: bool = False) -> Pixels:
    """Compose colours with alpha [h, w, 2 or 4] over white, RGB [h, w, 3].

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
