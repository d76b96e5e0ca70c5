"""The one place that knows whether this folder's C++ module, `_C`, was built."""

from types import ModuleType

try:
    from . import _C as _module  # pyright: ignore[reportAttributeAccessIssue]
except ImportError as error:
    _module, _reason = None, str(error)
else:
    _reason = ""


def native() -> ModuleType | None:
    """Return motet.io._C, or None: numpy then computes the same, to the bit, more slowly."""
    return _module


def status() -> str:
    """Return "" if the C++ module is loaded, else why not."""
    return _reason
