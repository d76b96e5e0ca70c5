"""Read the outcome: the patients, the group of each, and their survival or class."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from ..errors import CohortError, counted, listed
from .cohort import Classes, Survival
from .schema import CodeOutcome, LabelOutcome, SurvivalOutcome
from .table_files import natural_key
from .tables import Tables, texts


class PatientOutcomes(NamedTuple):
    """The patients with an outcome."""

    patients: tuple[str, ...]
    groups: tuple[str, ...]
    outcome: Survival | Classes
    dropped: frozenset[str] = frozenset()
    """Patients that are left out because of `nonpositive: drop`."""


def read_outcome(
    section: SurvivalOutcome | LabelOutcome | CodeOutcome, tables: Tables
) -> PatientOutcomes:
    """Read the section `outcome` of a cohort.

    Raises:
        CohortError: a patient has no outcome, or a value that is not allowed.
    """
    match section:
        case SurvivalOutcome():
            return _read_survival(section, tables)
        case LabelOutcome():
            return _read_labels(section, tables)
        case CodeOutcome():
            return _read_codes(section, tables)


def _read_survival(section: SurvivalOutcome, tables: Tables) -> PatientOutcomes:
    rows = _rows(section.table, section.columns, tables)
    title = tables.title(section.table)
    where = f"outcome.time: column {section.time!r} of {title}"
    times = tables.numeric(section.table, rows[[section.time]], "outcome.time")[section.time]
    _check_complete(times, where)
    bad = times <= 0
    if bad.any() and section.nonpositive == "error":
        raise CohortError(
            f"{where}: expected times above 0, got {times[bad].iloc[0]:g} and the like for "
            f"{counted(times.index[bad])}; leave them out by `nonpositive: drop`"
        )
    where = f"outcome.event: column {section.event!r} of {title}"
    cells = texts(rows[section.event])
    _check_complete(cells, where)
    flags, observed = cells.map(_flag), {_flag(value) for value in section.observed}
    events = flags.isin(observed)
    others = sorted(set(flags[~events]))
    if len(others) > 1:
        raise CohortError(
            f"{where}: expected `observed` ({listed(section.observed)}) and one other value, got "
            f"{listed(map(repr, sorted(set(cells))))}; list in `observed` all that mean the event"
        )
    rows, times, events = rows[~bad], times[~bad], events[~bad]
    if not events.any():
        raise CohortError(
            f"{where}: expected at least one event, that is `observed` "
            f"({listed(section.observed)}), got {listed(map(repr, sorted(set(cells))))}"
        )
    patients = tuple(map(str, rows.index))
    outcome = Survival(times.to_numpy(np.float64), events.to_numpy(bool), section.unit)
    dropped = frozenset(bad.index[bad].astype(str))
    return PatientOutcomes(patients, _groups(rows, patients, tables), outcome, dropped)


def _read_labels(section: LabelOutcome, tables: Tables) -> PatientOutcomes:
    rows = _rows(section.table, section.columns, tables)
    where = f"outcome.label: column {section.label!r} of {tables.title(section.table)}"
    cells = texts(rows[section.label])
    _check_complete(cells, where)
    names = section.names or {value: value for value in sorted(set(cells), key=natural_key)}
    unknown = sorted(set(cells) - {*names})
    if unknown:
        raise CohortError(
            f"{where}: expected the values of `names` ({listed(names)}), got "
            f"{listed(map(repr, unknown))} for {counted(cells.index[~cells.isin(list(names))])}"
        )
    classes = tuple(dict.fromkeys(names.values()))  # values with the same name are one class
    class_of = {value: classes.index(name) for value, name in names.items()}
    labels = np.array([class_of[cell] for cell in cells], dtype=np.int64)
    _check_two_classes(labels, where, f"only {listed(sorted(set(cells)))!r}")
    patients = tuple(map(str, rows.index))
    return PatientOutcomes(patients, _groups(rows, patients, tables), Classes(labels, classes))


def _read_codes(section: CodeOutcome, tables: Tables) -> PatientOutcomes:
    """Return two classes: whether any code of a patient begins with a number in the range."""
    low, high = section.between
    group = [tables.spec.group] if tables.spec.group else []
    rows = tables.long(section.table, [section.code, *group], "outcome")
    numbers = pd.to_numeric(
        texts(rows[section.code], verbatim=True).str.slice(0, 3), errors="coerce"
    )
    inside = numbers.between(low, high).groupby(level=0, sort=False).any()
    where = f"outcome.code: column {section.code!r} of {tables.title(section.table)}"
    span = f"{low:g}-{high:g}"
    _check_two_classes(
        inside.to_numpy(), where, f"{inside.sum()} of {len(inside)} patients in {span}"
    )
    patients = tuple(map(str, inside.index))
    names = tuple(section.names or (f"not {span}", span))
    if names[0] == names[1]:
        raise CohortError(f"outcome.names: expected two names, got {names[0]!r} twice")
    labels = np.asarray(inside, dtype=np.int64)
    return PatientOutcomes(patients, _groups(rows, patients, tables), Classes(labels, names))


def _rows(table: str, columns: tuple[str, ...], tables: Tables) -> pd.DataFrame:
    group = [tables.spec.group] if tables.spec.group else []
    return tables.wide(table, [*columns, *group], "outcome")


def _groups(rows: pd.DataFrame, patients: tuple[str, ...], tables: Tables) -> tuple[str, ...]:
    """Return the group of each patient; without a column of groups, the patient itself."""
    column = tables.spec.group
    if column is None:
        return patients
    cells = texts(rows[column])
    _check_complete(cells, f"group: column {column!r}")
    by_patient = cells.groupby(level=0).agg(["first", "nunique"])
    several = by_patient.index[by_patient["nunique"] > 1]
    if len(several):
        raise CohortError(f"group: column {column!r}: several groups for {counted(several)}")
    return tuple(by_patient["first"].loc[list(patients)])


def _flag(cell: str) -> str:
    """Return 1 for true and 0 for false, as in other columns; other text unchanged."""
    return {"true": "1", "false": "0"}.get(cell.lower(), cell)


def _check_complete(cells: pd.Series, where: str) -> None:
    gaps = cells.isna()
    if gaps.any():
        raise CohortError(
            f"{where}: expected a value for every patient, missing for "
            f"{counted(cells.index[gaps].unique())}"
        )


def _check_two_classes(labels: np.ndarray, where: str, got: str) -> None:
    if len(np.unique(labels)) < 2:
        raise CohortError(f"{where}: expected at least 2 classes, got {got}")
