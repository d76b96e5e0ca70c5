"""Checks of arguments that are not tensors.

Every error names the argument, what was expected and what was passed. The functions return the
value; numbers become Python ints and floats.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any


def choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise unless `value` is one of `allowed`, with the same type."""
    if not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
        expected = ", ".join(map(repr, allowed[:-1])) + f" or {allowed[-1]!r}"
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def integer(name: str, value: Any, low: int = 1) -> int:
    """Return an integer of at least `low`; numpy integers are accepted, bools are not."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < low:
        kinds = {0: "a non-negative integer", 1: "a positive integer"}
        kind = kinds.get(low, f"an integer of at least {low}")
        raise ValueError(f"{name}: expected {kind}, got {value!r}")
    return number


def number(name: str, value: Any) -> float:
    """Return an int or a float as a float; bools are not accepted."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: expected a number, got {value!r}")
    return float(value)


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


def _number(value: Any) -> float:
    if isinstance(value, (bool, str)):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
