"""Read the modalities: tables of numbers and categories, codes, measurements, bags in files."""

from __future__ import annotations

import re

import pandas as pd

from ..errors import CohortError, suggest
from .bags import Bags, open_bags
from .measurements import read_measurements
from .schema import BagFiles, Codes, Columns, Measurements
from .table_files import match_columns, natural_key
from .tables import Tables, texts


def read_modality(name: str, tables: Tables, keep: set[str] | None) -> pd.DataFrame | Bags:
    """Read one modality.

    Args:
        name: of the modality.
        tables: of the cohort.
        keep: the patients to read; None for all.

    Returns:
        A table with a row per patient who has the modality, or Bags.
    """
    where, section = f"modalities.{name}", tables.spec.modalities[name]
    match section:
        case Columns():
            return _read_columns(section, tables, keep, where)
        case Codes():
            return _read_codes(section, tables, keep, where)
        case Measurements():
            return read_measurements(section, tables, keep, where)
        case BagFiles():
            return _read_bags(section, tables, keep, where)


def _read_columns(
    section: Columns, tables: Tables, keep: set[str] | None, where: str
) -> pd.DataFrame:
    columns = _find_columns(section, tables, f"{where}.columns")
    categorical: set[str] = set()
    for pattern, matches in match_columns(section.categorical or (), columns).items():
        if not matches:
            raise CohortError(
                f"{where}.categorical: {pattern!r} matches none of the columns of this modality: "
                f"{suggest(pattern, columns)}"
            )
        categorical.update(matches)
    rows = tables.wide(section.table, columns, where)
    if keep is not None:
        rows = rows[rows.index.isin(keep)]
    numeric = tables.numeric(
        section.table,
        rows[[column for column in columns if column not in categorical]],
        where,
        cure="; declare it under `categorical` if it is a category",
    )
    if not categorical:
        return numeric
    cells = {
        column: _as_category(rows[column]) if column in categorical else numeric[column]
        for column in columns
    }
    return pd.DataFrame(cells, index=rows.index)


def _find_columns(section: Columns, tables: Tables, where: str) -> list[str]:
    """Return the columns of a modality: never the patient, the group, or the outcome."""
    spec, frame = tables.spec, tables.frame(section.table)
    excluded = {tables.patient_column(section.table): "names the patient"}
    if spec.group:
        excluded[spec.group] = "is the group"
    if spec.outcome:
        why = "is the outcome: a model would just read it"
        excluded |= dict.fromkeys(spec.outcome.columns, why)
    columns: dict[str, None] = {}  # a dict as an ordered set
    for pattern, matches in match_columns(section.columns or ["*"], list(frame.columns)).items():
        if pattern in matches and pattern in excluded:
            raise CohortError(f"{where}: column {pattern!r} {excluded[pattern]}; leave it out")
        # A column without a name holds row numbers.
        matches = [
            name
            for name in matches
            if name not in excluded and not re.match(r"Unnamed: \d+$", name)
        ]
        if not matches and not re.search(r"[*?]", pattern):
            tables.column(section.table, pattern, where)
        if not matches:
            raise CohortError(
                f"{where}: {pattern!r} matches no column of {tables.title(section.table)}: "
                f"{suggest(pattern, [name for name in frame.columns if name not in excluded])}"
            )
        columns |= dict.fromkeys(matches)
    return list(columns)


def _as_category(cells: pd.Series) -> pd.Series:
    words = texts(cells)
    categories = sorted(words.dropna().unique(), key=natural_key)
    return words.astype(pd.CategoricalDtype(categories))


def _read_codes(section: Codes, tables: Tables, keep: set[str] | None, where: str) -> pd.DataFrame:
    """Return a table of 0 and 1: a row per patient, a column per code."""
    tables.refuse_outcome([section.codes], f"{where}.codes")
    rows = tables.long(section.table, [section.codes], where)
    codes = texts(rows[section.codes], verbatim=True).dropna().str.slice(0, section.characters)
    if keep is not None:
        codes = codes[codes.index.isin(keep)]
    has_code = pd.crosstab(codes.index, codes.to_numpy()).clip(upper=1).astype(float)
    has_code = has_code.reindex(codes.index.unique()).rename_axis(index=None, columns=None)
    # For prediction: a code of the training data that no new patient has is 0, not unknown.
    has_code.attrs["codes"] = True
    return has_code


def _read_bags(section: BagFiles, tables: Tables, keep: set[str] | None, where: str) -> Bags:
    keys = None
    if section.keys:
        column = section.keys.column
        rows = tables.long(section.keys.table, [column], f"{where}.keys")[column]
        names = texts(rows, verbatim=True).dropna()
        keys = {
            str(patient): list(dict.fromkeys(part))
            for patient, part in names.groupby(level=0, sort=False)
        }
    return open_bags(
        tables.folders.match(section.bags, f"{where}.bags"),
        keys,
        keep,
        features=section.features,
        source=section.source,
        encoder=section.encoder,
        where=where,
    )
