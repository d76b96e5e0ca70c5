"""What is typed and what is printed: the command `motet`, and what measures this machine."""

from .entry import main

__all__ = ["main"]
