"""The errors of this folder, and how they list what would have been right."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from os import PathLike


class CohortError(ValueError):
    """Say in one line what is wrong with a cohort: file and key or column, expected, got, cure.

    Args:
        message: what to say; line breaks become spaces.

    Example:
        >>> try:
        ...     motet.io.load_cohort("brest_cancer")
        ... except motet.io.CohortError as error:
        ...     print(str(error).split("?")[0])
        no cohort 'brest_cancer': did you mean 'breast_cancer'
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split("\n")))


class SlideError(ValueError):
    """Say in one line why a slide cannot be used.

    Args:
        path: the slide.
        reason: one of `SlideError.REASONS`, for tables and programs.
        message: expected, got, cure; line breaks become spaces.

    Example:
        >>> try:
        ...     motet.io.open_slide("none.svs")
        ... except motet.io.SlideError as error:
        ...     print(error.reason, "|", error)
        missing | none.svs: no such file
    """

    REASONS = {  # noqa: RUF012
        "missing": "there is no such file",
        "unreadable": "not an image, or damaged so that no reader opens it",
        "unsupported": "an image in a form that no reader decodes",
        "no-reader": "the reader for this format is not installed",
        "too-large": "declares a size beyond what is sane",
        "no-mpp": "its resolution is not known",
        "resolution": "it is coarser than was asked for",
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
    """Say in one line what is wrong with a feature store: path, expected, got, cure.

    Args:
        message: what to say; line breaks become spaces.

    Example:
        >>> try:
        ...     motet.io.FeatureStore("nowhere")
        ... except motet.io.StoreError as error:
        ...     print(error)
        nowhere: expected a feature store, got no such folder
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split("\n")))


def suggest(name: str, known: Iterable[object]) -> str:
    """Say which of what is known is close to a name, if any, and what is known."""
    known = [str(one) for one in known]
    close = get_close_matches(name, known, n=3, cutoff=0.7)
    guess = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{guess}known: {listed(known, 12)}"


def listed(things: Iterable[object], most: int = 8) -> str:
    """List the first few."""
    things = list(things)
    text = ", ".join(map(str, things[:most])) or "none"
    return f"{text} and {len(things) - most} more" if len(things) > most else text


def counted(patients: Iterable[object], what: str = "patient") -> str:
    """Count them and name the first: '3 patients (the first: 001)'."""
    patients = list(patients)
    return f"{len(patients)} {what}{'s'[: len(patients) != 1]} (the first: {patients[0]})"
