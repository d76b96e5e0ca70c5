"""The modalities: tables of numbers and categories, codes, measurements, stores."""

from __future__ import annotations

import re
from collections.abc import Collection

import pandas as pd

from ..errors import CohortError, listed
from .bags import Bags, Measured, open_stores
from .schema import Codes, Columns, Events, Stores
from .tables import Tables, dates, hours_between, matching, natural, texts


def read_modality(name: str, tables: Tables, keep: set[str] | None) -> pd.DataFrame | Bags:
    """Read one modality, of the patients in `keep` or of all; tables have a row for each found."""
    where, section = f"modalities.{name}", tables.spec.modalities[name]
    match section:
        case Columns():
            return _columns(section, tables, keep, where)
        case Codes():
            return _codes(section, tables, keep, where)
        case Events():
            return _events(section, tables, keep, where)
        case Stores():
            return _stores(section, tables, keep, where)


def _columns(section: Columns, tables: Tables, keep: set[str] | None, where: str) -> pd.DataFrame:
    wanted = _chosen(section, tables, f"{where}.columns")
    categorical: set[str] = set()
    for pattern, found in matching(section.categorical or (), wanted).items():
        if not found:
            raise CohortError(
                f"{where}.categorical: {pattern!r} matches none of the columns of this modality: "
                f"{listed(wanted)}"
            )
        categorical.update(found)
    rows = tables.wide(section.table, wanted, where)
    if keep is not None:
        rows = rows[rows.index.isin(keep)]
    numeric = tables.numeric(
        section.table,
        rows[[column for column in wanted if column not in categorical]],
        where,
        cure="; declare it under `categorical` if it is a category",
    )
    cells = {
        column: _category(rows[column]) if column in categorical else numeric[column]
        for column in wanted
    }
    return pd.DataFrame(cells, index=rows.index)


def _chosen(section: Columns, tables: Tables, where: str) -> list[str]:
    """Return the columns of a modality: never the patient, its group, or the outcome."""
    spec, frame = tables.spec, tables.frame(section.table)
    barred = {tables.patient_column(section.table): "names the patient"}
    if spec.group:
        barred[spec.group] = "is the group"
    if spec.outcome:
        barred |= dict.fromkeys(spec.outcome.columns, "is the outcome: a model would just read it")
    found: dict[str, None] = {}
    for pattern, names in matching(section.columns or ["*"], list(frame.columns)).items():
        if pattern in names and pattern in barred:
            raise CohortError(f"{where}: column {pattern!r} {barred[pattern]}; leave it out")
        # Without a name it is a row number.
        names = [one for one in names if one not in barred and not re.match(r"Unnamed: \d+$", one)]
        if not names and not re.search(r"[*?]", pattern):
            tables.column(section.table, pattern, where)
        if not names:
            raise CohortError(
                f"{where}: {pattern!r} matches no column of {tables.title(section.table)}: "
                f"known: {listed(one for one in frame.columns if one not in barred)}"
            )
        found |= dict.fromkeys(names)
    return list(found)


def _category(cells: pd.Series) -> pd.Series:
    words = texts(cells)
    kinds = sorted(words.dropna().unique(), key=natural)
    return words.astype(pd.CategoricalDtype(kinds))


def _codes(section: Codes, tables: Tables, keep: set[str] | None, where: str) -> pd.DataFrame:
    _not_the_outcome([section.codes], tables, f"{where}.codes")
    rows = tables.long(section.table, [section.codes], where)
    codes = texts(rows[section.codes], verbatim=True).dropna().str.slice(0, section.characters)
    if keep is not None:
        codes = codes[codes.index.isin(keep)]
    there = pd.crosstab(codes.index, codes.to_numpy()).clip(upper=1).astype(float)
    there = there.reindex(codes.index.unique()).rename_axis(index=None, columns=None)
    there.attrs["codes"] = True  # a code that nobody else has is 0, not unknown
    return there


def _events(section: Events, tables: Tables, keep: set[str] | None, where: str) -> Bags:
    _not_the_outcome([section.item, section.value], tables, where)
    since = section.since
    start = tables.wide(since.table, [since.column], f"{where}.since")[since.column]
    start = dates(start, f"{where}.since")
    rows = tables.long(section.table, [section.item, section.value, section.time], where)
    rows = rows[rows.index.isin(start.index if keep is None else start.index.intersection([*keep]))]
    time = dates(rows[section.time], f"{where}.time")
    rows = pd.DataFrame(
        {
            "patient": rows.index.astype(str),
            "hours": hours_between(start.reindex(rows.index), time).to_numpy(),
            "item": texts(rows[section.item]).to_numpy(),
            "value": pd.to_numeric(texts(rows[section.value]), errors="coerce").to_numpy(float),
        }
    )
    first, last = section.hours
    known = rows["item"].notna() & rows["value"].abs().lt(float("inf"))
    rows = rows[known & rows["hours"].between(first, last)]
    if rows.empty and keep is not None:
        raise CohortError(
            f"{where}: no numbers in column {section.value!r} of {tables.title(section.table)} "
            f"from hour {first:g} to {last:g} after {since.column}"
        )
    items = tuple(sorted(rows["item"].unique(), key=natural))
    extent = max(abs(first), abs(last))
    return Bags(Measured(rows, items), features=len(items), coords=1, extent=extent, names=items)


def _stores(section: Stores, tables: Tables, keep: set[str] | None, where: str) -> Bags:
    keys = None
    if section.keys:
        column = section.keys.column
        rows = tables.long(section.keys.table, [column], f"{where}.keys")[column]
        named = texts(rows, verbatim=True).dropna()
        keys = {
            str(one): list(dict.fromkeys(part)) for one, part in named.groupby(level=0, sort=False)
        }
    return open_stores(
        tables.places.match(section.bags, f"{where}.bags"),
        keys,
        keep,
        features=section.features,
        source=section.source,
        encoder=section.encoder,
        where=where,
    )


def _not_the_outcome(columns: Collection[str], tables: Tables, where: str) -> None:
    outcome = tables.spec.outcome.columns if tables.spec.outcome else ()
    for column in columns:
        if column in outcome:
            raise CohortError(f"{where}: column {column!r} is the outcome: a model would read it")
