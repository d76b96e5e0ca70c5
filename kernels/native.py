"""The one place that knows whether the C++ module was built."""

import warnings
from functools import cache
from types import ModuleType

CURE = "install a C++20 compiler, then `pip install --force-reinstall --no-deps .` in the checkout"

try:
    from . import _C as _module  # pyright: ignore[reportAttributeAccessIssue]
except ImportError as error:
    _module, _reason = None, str(error)
else:
    _reason = ""


def native() -> ModuleType | None:
    """Return motet.kernels._C, or None after saying once that torch computes instead."""
    if _module is None:
        _say_once()
    return _module


def status() -> str:
    """Return "" if the C++ module is loaded, else why not."""
    return _reason


@cache
def _say_once() -> None:
    warnings.warn(
        f"motet.kernels._C is not available ({_reason}): torch computes instead, which gives "
        f"the same results more slowly. To build it: {CURE}.",
        RuntimeWarning,
        stacklevel=2,
    )
