"""Checks of constructor arguments; each returns the value as a plain Python number."""

import math
import operator
from typing import Any

import torch


def integer(name: str, value: Any, low: int = 1) -> int:
    """Return an integer of at least `low`, numpy's included, bools not."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < low:
        kinds = {0: "a non-negative integer", 1: "a positive integer"}
        kind = kinds.get(low, f"an integer of at least {low}")
        raise ValueError(f"{name}: expected {kind}, got {value!r}")
    return number


def positive(name: str, value: Any) -> float:
    """Return a finite number above 0."""
    number = _number(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: expected a positive finite number, got {value!r}")
    return number


def rate(name: str, value: Any) -> float:
    """Return a dropout rate, in [0, 1)."""
    number = _number(value)
    if not 0 <= number < 1:
        raise ValueError(f"{name}: expected a probability in [0, 1), got {value!r}")
    return number


def same_kind(name: str, tensor: torch.Tensor, like: torch.Tensor, whose: str) -> None:
    """Raise unless `tensor` has the dtype and the device of `like`."""
    if (tensor.dtype, tensor.device) != (like.dtype, like.device):
        raise ValueError(
            f"{name}: expected {like.dtype} on {like.device} as {whose}, got {tensor.dtype} on "
            f"{tensor.device}"
        )


def _number(value: Any) -> float:
    if isinstance(value, (bool, str)):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
