"""Read a modality of columns: numbers and categories, one row or several per patient."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from ..errors import AbsentError, CohortError, suggest
from .bags import Bags
from .schema import Columns
from .table_files import match_columns, natural_key
from .tables import Tables, texts


def read_columns(
    section: Columns, tables: Tables, keep: set[str] | None, where: str
) -> pd.DataFrame | Bags:
    """Read a modality of columns.

    Args:
        section: of the YAML file.
        tables: of the cohort.
        keep: the patients to read; None for all.
        where: the place in the YAML file, for errors.

    Returns:
        A table with a row per patient who has the modality; Bags if the section has `rows: bag`.
    """
    columns = _find_columns(section, tables, f"{where}.columns")
    categorical = _find_categories(section, columns, where)
    frame_columns = tables.frame(section.table).columns
    absent = [name for name in columns if name not in frame_columns]
    read = tables.wide if section.rows is None else tables.long
    rows = read(section.table, [name for name in columns if name not in absent], where)
    if keep is not None:
        rows = rows[rows.index.isin(keep)]
    if absent:
        rows = _add_absent(rows.reindex(columns=columns), absent, section, tables, where)
    cure = "; declare it under `categorical` if it is a category"
    if section.rows is not None:
        cure = f"; `rows: {section.rows}` reads numbers only: leave it out of `columns`"
        tables.check_patients(section.table, [name for name in columns if name not in absent])
    numeric = tables.numeric(
        section.table, rows[[name for name in columns if name not in categorical]], where, cure
    )
    if section.rows == "bag":
        return _bags_of_rows(numeric, where)
    if section.rows == "mean":
        return numeric.groupby(level=0, sort=False).mean()  # of the values that are not missing
    if not categorical:
        return numeric
    cells = {
        column: _as_category(rows[column]) if column in categorical else numeric[column]
        for column in columns
    }
    return pd.DataFrame(cells, index=rows.index)


def _find_columns(section: Columns, tables: Tables, where: str) -> list[str]:
    """Return the columns of a modality: never the patient, the group, or the outcome.

    Columns that the table lacks are among them if `optional` or `fill` names them.
    """
    spec, frame = tables.spec, tables.frame(section.table)
    excluded = {tables.patient_column(section.table): "names the patient"}
    if spec.group:
        excluded[spec.group] = "is the group"
    if spec.outcome:
        why = "is the outcome: a model would just read it"
        excluded |= dict.fromkeys(spec.outcome.columns, why)
    absent = [name for name in section.may_lack if name not in frame.columns]
    # A column without a name holds row numbers.
    known = [name for name in frame.columns if not re.match(r"Unnamed: \d+$", name)] + absent
    columns: dict[str, None] = {}  # a dict as an ordered set
    for pattern, matches in match_columns(section.columns or ["*"], known).items():
        if pattern in matches and pattern in excluded:
            raise CohortError(f"{where}: column {pattern!r} {excluded[pattern]}; leave it out")
        matches = [name for name in matches if name not in excluded]
        if not matches and not re.search(r"[*?]", pattern):
            tables.column(section.table, pattern, where)
        if not matches:
            raise AbsentError(
                f"{where}: {pattern!r} matches no column of {tables.title(section.table)}: "
                f"{suggest(pattern, [name for name in known if name not in excluded])}"
            )
        columns |= dict.fromkeys(matches)
    for name in section.may_lack:
        if name not in columns:
            key = "fill" if name in section.fill else "optional"
            raise CohortError(
                f"{where.removesuffix('.columns')}.{key}: {name!r} is none of the columns of this "
                f"modality: {suggest(name, columns)}"
            )
    if len(absent) == len(columns):
        raise AbsentError(f"{where}: {tables.title(section.table)} has none of the columns")
    return list(columns)


def _find_categories(section: Columns, columns: list[str], where: str) -> set[str]:
    categorical: set[str] = set()
    for pattern, matches in match_columns(section.categorical or (), columns).items():
        if not matches:
            raise CohortError(
                f"{where}.categorical: {pattern!r} matches none of the columns of this modality: "
                f"{suggest(pattern, columns)}"
            )
        categorical.update(matches)
    if categorical and section.rows is not None:
        raise CohortError(
            f"{where}.categorical: expected numbers with `rows: {section.rows}`, got category "
            f"{min(categorical)!r}: give it a modality without `rows`, or write a column of 0 and "
            "1 for each of its values"
        )
    return categorical


def _add_absent(
    rows: pd.DataFrame, absent: list[str], section: Columns, tables: Tables, where: str
) -> pd.DataFrame:
    """Put the values of `fill` into columns that the table lacks, and note what was done."""
    has_modality = rows.notna().any(axis=1)
    for name in absent:
        done = "it is missing for all patients"
        if name in section.fill:
            done = f"filled with {section.fill[name]!r}"
            cells = pd.Series(None, index=rows.index, dtype=object)
            rows[name] = cells.mask(has_modality, section.fill[name])
        tables.notes.append(
            f"{where}: {tables.title(section.table)} has no column {name!r}; {done}"
        )
    return rows


def _bags_of_rows(rows: pd.DataFrame, where: str) -> Bags:
    """Return bags whose tokens are the rows of a patient; rows without any value are left out."""
    rows = rows[rows.notna().any(axis=1)]
    with np.errstate(over="ignore"):  # numbers beyond float32 become Inf, which is refused below
        cells = rows.to_numpy(np.float32)
    for row, column in np.argwhere(np.isinf(cells))[:1].tolist():
        raise CohortError(
            f"{where}: column {rows.columns[column]!r}: expected numbers within float32, got "
            f"{rows.iloc[row, column]:g} for patient {rows.index[row]}"
        )
    codes, patients = pd.factorize(rows.index)
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(patients) + 1))
    bags = {
        str(name): (cells[order[bounds[i] : bounds[i + 1]]], None)
        for i, name in enumerate(patients)
    }
    return Bags(bags, features=rows.shape[1], names=tuple(rows.columns))


def _as_category(cells: pd.Series) -> pd.Series:
    words = texts(cells)
    categories = sorted(words.dropna().unique(), key=natural_key)
    return words.astype(pd.CategoricalDtype(categories))
