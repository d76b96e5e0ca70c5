"""The command `motet`: its options and its output; and measurements of this machine."""

from .entry import main

__all__ = ["main"]
