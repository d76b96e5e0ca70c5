"""The one error of this folder, and how it lists what would have been right."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


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
