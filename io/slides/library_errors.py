"""The exceptions of the libraries that decode slides."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import SlideError

DAMAGE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, NotImplementedError,
    OSError, RuntimeError, SyntaxError, TypeError, ValueError, struct.error,
)  # fmt: skip
"""Exceptions that libraries raise for damaged or hostile files."""


def error_text(error: BaseException) -> str:
    """Return the type of an error and the beginning of its message."""
    text = str(error)
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


@contextmanager
def opening(path: Path, *others: type[Exception]) -> Iterator[None]:
    """Raise SlideError "unreadable" in place of DAMAGE, or other exceptions, in the block."""
    try:
        yield
    except SlideError:
        raise
    except (*DAMAGE, *others) as error:
        raise SlideError(path, "unreadable", error_text(error)) from error
