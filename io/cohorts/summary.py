"""The text of a cohort's modalities, as `print(cohort)` shows it: at most 20 lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import listed
from .bags import Bags

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

MODALITIES, COMBINATIONS = 12, 5
"""Rows that the two tables of the text have at most."""


def summarize(modalities: Mapping[str, pd.DataFrame | Bags], patients: Sequence[str]) -> str:
    """Return a row per modality, and the combinations of modalities that patients lack."""
    rows = [("modality", "kind", "width", "patients", "tokens per patient: median (max)")]
    has = {name: has_modality(modality, patients) for name, modality in modalities.items()}
    for name, modality in list(modalities.items())[:MODALITIES]:
        rows.append((name, *_shape(modality, patients, has[name])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    if len(has) > MODALITIES:
        lines.append(f"and {len(has) - MODALITIES} more modalities")
    return "\n".join([*lines, *_missing(has)])


def median_follow_up(times: NDArray[np.float64], events: NDArray[np.bool_]) -> str:
    """Return the median follow-up by the reverse Kaplan-Meier method, where censoring is the event.

    The median of all times would count a patient who dies early as followed for a short time.

    Returns:
        The time as text, or "above" the last time if half of the patients are followed longer.
    """
    unique, position = np.unique(times, return_inverse=True)
    censored = np.bincount(position, weights=~events, minlength=len(unique))
    died = np.bincount(position, weights=events, minlength=len(unique))
    # Deaths at a time come before censoring at the same time.
    at_risk = len(times) - np.concatenate([[0], np.cumsum(censored + died)[:-1]]) - died
    followed = np.cumprod(1 - censored / np.maximum(at_risk, 1))
    reached = np.flatnonzero(followed <= 0.5)
    return f"{unique[reached[0]]:,.4g}" if len(reached) else f"above {unique[-1]:,.4g}"


def has_modality(modality: pd.DataFrame | Bags, patients: Sequence[str]) -> NDArray[np.bool_]:
    """Return bool [n], whether each patient has the modality."""
    if isinstance(modality, Bags):
        return np.array([patient in modality for patient in patients], bool)
    return modality.notna().any(axis=1).to_numpy(bool)


def _shape(
    modality: pd.DataFrame | Bags, patients: Sequence[str], has: NDArray[np.bool_]
) -> tuple[str, str, str, str]:
    """Return kind, width, patients and tokens of a modality."""
    count = f"{has.sum():,} ({has.sum() / max(1, len(has)):.0%})"
    if isinstance(modality, Bags):
        tokens = [modality.shape(p)[0] for p, one in zip(patients, has, strict=True) if one]
        shown = f"{np.median(tokens):,.0f} ({max(tokens):,})" if tokens else ""
        axes = f"{modality.coords} coordinate{'s'[: modality.coords != 1]}"
        kind = f"bags, {axes}" if modality.coords else "bags"
        return kind, f"{modality.features:,}", count, shown
    categories = sum(dtype == "category" for dtype in modality.dtypes)
    noun = "category" if categories == 1 else "categories"
    kind = f"table, {categories} {noun}" if categories else "table"
    return kind, f"{modality.shape[1]:,}", count, ""


def _missing(has: dict[str, NDArray[np.bool_]]) -> list[str]:
    """Return the most frequent combinations of missing modalities, a line each."""
    if not has:
        return []
    table = np.stack(list(has.values()), axis=1)
    combinations = Counter(map(bytes, table))
    lines = [f"missing:  {len(combinations)} combination{'s'[: len(combinations) != 1]}"]
    for one, count in combinations.most_common(COMBINATIONS):
        lacks = [name for name, there in zip(has, one, strict=True) if not there]
        share = f"{count:,} ({count / len(table):.0%})"
        lines.append(f"  {share:>14}  {listed(lacks, 4) if lacks else 'nothing missing'}")
    return lines
