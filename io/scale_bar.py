"""The length of a scale bar."""

from __future__ import annotations

import math


def choose_scale_bar(longest_um: float) -> tuple[float, str]:
    """Return a length of 1, 2 or 5 times a power of ten µm, at most `longest_um`, and its text."""
    power = 10.0 ** math.floor(math.log10(longest_um))
    length = next(step * power for step in (5, 2, 1) if step * power <= longest_um)
    return length, f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
