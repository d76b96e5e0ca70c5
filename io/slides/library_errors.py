"""What the libraries that decode slides raise, and how it is told."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import SlideError

# What libraries raise on files that are damaged or made to harm.
DAMAGE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, NotImplementedError,
    OSError, RuntimeError, SyntaxError, TypeError, ValueError, struct.error,
)  # fmt: skip


def error_text(error: BaseException) -> str:
    """Return the kind of an error and the beginning of what it says."""
    text = str(error)
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


@contextmanager
def opening(path: Path, *others: type[Exception]) -> Iterator[None]:
    """Turn what a library raises on opening, DAMAGE or others, into SlideError "unreadable"."""
    try:
        yield
    except SlideError:
        raise
    except (*DAMAGE, *others) as error:
        raise SlideError(path, "unreadable", error_text(error)) from error
