"""Load the C++ module of this folder, `_C`, if it was built. Only this file imports it."""

from types import ModuleType

try:
    from . import _C as _module  # pyright: ignore[reportAttributeAccessIssue]
except ImportError as error:
    _module, _reason = None, str(error)
else:
    _reason = ""


def native() -> ModuleType | None:
    """Return motet.io._C, or None. Without it numpy computes the same bits, more slowly."""
    return _module


def status() -> str:
    """Return why the C++ module is not loaded, "" if it is."""
    return _reason
