"""The exceptions of motet.io, and functions that word their messages."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from os import PathLike


class CohortError(ValueError):
    """A cohort cannot be used. One line: file and key or column, expected, got, cure.

    Args:
        message: the text; line breaks become spaces.

    Example:
        >>> try:
        ...     motet.io.load_cohort("brest_cancer")
        ... except motet.io.CohortError as error:
        ...     print(str(error).split("?")[0])
        no cohort 'brest_cancer': did you mean 'breast_cancer'
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split("\n")))


class AbsentError(CohortError):
    """A cohort lacks a file or a column; its modality is left out if it is optional."""


class SlideError(ValueError):
    """A slide cannot be used. One line: file, expected, got, cure.

    Args:
        path: the file.
        reason: one of the keys of `SlideError.REASONS`, for tables and programs.
        message: expected, got, cure; line breaks become spaces.

    Example:
        >>> try:
        ...     motet.io.open_slide("none.svs")
        ... except motet.io.SlideError as error:
        ...     print(error.reason, "|", error)
        missing | none.svs: no such file
    """

    REASONS = {  # noqa: RUF012
        "missing": "the file does not exist",
        "unreadable": "not an image, or so damaged that no reader opens it",
        "unsupported": "an image in a format that no reader decodes",
        "no-reader": "the reader for this format is not installed",
        "several": "it holds several images that may be the slide",
        "too-large": "its header gives a size beyond the limits",
        "no-mpp": "its resolution is not known",
        "resolution": "it is coarser than the patches",
        "damaged": "too many of its tiles are damaged",
        "encoder": "its features are not finite",
    }

    def __init__(self, path: str | PathLike[str], reason: str, message: str) -> None:
        assert reason in self.REASONS
        super().__init__(f"{' '.join(str(path).splitlines())}: {' '.join(message.split())}")
        self.path, self.reason, self.message = str(path), reason, message

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.path, self.reason, self.message)


class StoreError(ValueError):
    """A feature store cannot be used. One line: path, expected, got, cure.

    Args:
        message: the text; line breaks become spaces.

    Example:
        >>> try:
        ...     motet.io.FeatureStore("nowhere")
        ... except motet.io.StoreError as error:
        ...     print(error)
        nowhere: expected a feature store, got no such folder
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split("\n")))


def suggest(name: str, names: Iterable[object], limit: int = 12) -> str:
    """Return text for a wrong name: "did you mean 'x'? known: x, y", or only "known: x, y"."""
    choices = [str(choice) for choice in names]
    close = get_close_matches(name, choices, n=3, cutoff=0.7)
    guess = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{guess}known: {listed(choices, limit)}"


def listed(items: Iterable[object], limit: int = 8) -> str:
    """Return the first items as text: "a, b and 3 more", or "none"."""
    items = list(items)
    text = ", ".join(map(str, items[:limit])) or "none"
    return f"{text} and {len(items) - limit} more" if len(items) > limit else text


def counted(items: Iterable[object], noun: str = "patient") -> str:
    """Return the number of items and the first one: "3 patients (the first: 001)"."""
    items = list(items)
    return f"{len(items)} {noun}{'s'[: len(items) != 1]} (the first: {items[0]})"
