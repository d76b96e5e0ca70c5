"""Load the C++ module of this folder, `_C`, if it was built. Only this file imports it."""

from importlib import import_module
from types import ModuleType

try:  # not `from . import _C`, whose error would speak of a circular import
    _module, _reason = import_module("._C", __package__), ""
except ImportError as error:
    _module, _reason = None, str(error)


def native() -> ModuleType | None:
    """Return motet.io._C, or None. Without it numpy computes the same bits, more slowly."""
    return _module


def status() -> str:
    """Return why the C++ module is not loaded, "" if it is."""
    return _reason
