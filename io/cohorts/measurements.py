"""Measurements over time: one token per time stamp, one feature per item."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..errors import CohortError
from .bags import Bag, Bags, LazyBags
from .schema import Measurements
from .table_files import natural_key
from .tables import HOURS, Tables, dates, hours_between, numbers, texts


class _Rows(NamedTuple):
    """Measurements in columns, as numbers: 28 million laboratory results must fit in memory."""

    patient: NDArray[np.int32]
    item: NDArray[np.int32]
    hours: NDArray[np.float64]
    value: NDArray[np.float64]


def read_measurements(
    section: Measurements, tables: Tables, keep: set[str] | None, where: str
) -> Bags:
    """Return bags of the measurements in the window `hours`.

    Args:
        section: of the YAML file.
        tables: of the cohort.
        keep: the patients to read; None for all.
        where: the place in the YAML file, for errors.
    """
    tables.refuse_outcome([section.item, section.value, section.time], where)
    start = _read_start(section, tables, where)
    patients: dict[str, int] = {}
    items: dict[str, int] = {}
    parts = []
    columns = [section.item, section.value, section.time]
    for part in tables.stream(section.table, columns, where):
        if start is not None:
            part = part[part.index.isin(start.index)]
        if keep is not None:
            part = part[part.index.isin(list(keep))]
        hours = _hours(part[section.time], start, section, where)
        value, item = _values(part[section.value]), texts(part[section.item])
        first, last = section.hours
        is_valid = (hours >= first) & (hours <= last) & np.isfinite(value)
        is_wanted = item.notna() if section.items is None else item.isin(section.items)
        is_valid &= is_wanted.to_numpy()
        parts.append(
            _Rows(
                _numbered(part.index[is_valid], patients),
                _numbered(pd.Index(item[is_valid]), items),
                hours[is_valid],
                value[is_valid],
            )
        )
    rows = _Rows(*map(np.concatenate, zip(*parts, strict=True))) if parts else None
    if (rows is None or not len(rows.value)) and keep is not None:
        after = f" after {section.since.column}" if section.since else ""
        raise CohortError(
            f"{where}: no numbers in column {section.value!r} of {tables.title(section.table)} "
            f"from hour {section.hours[0]:g} to {section.hours[1]:g}{after}"
        )
    names = tuple(section.items or sorted(items, key=natural_key))
    absent = [name for name in names if name not in items]
    if absent and keep is not None:
        raise CohortError(
            f"{where}.items: no numbers of item {absent[0]!r} in {tables.title(section.table)} "
            f"from hour {section.hours[0]:g} to {section.hours[1]:g}"
        )
    if rows is not None:
        rank = {name: i for i, name in enumerate(names)}
        order = np.array([rank[name] for name in items], np.int32)
        rows = rows._replace(item=order[rows.item]) if len(order) else rows
    bags = MeasurementBags(rows, tuple(patients), len(names))
    extent = max(map(abs, section.hours))
    return Bags(bags, features=len(names), coords=1, extent=extent, names=names)


def _read_start(section: Measurements, tables: Tables, where: str) -> pd.Series | None:
    """Return the date from which the hours of each patient count."""
    if section.since is None:
        return None
    column = section.since.column
    rows = tables.wide(section.since.table, [column], f"{where}.since")
    return dates(rows[column], f"{where}.since")


def _hours(
    times: pd.Series, start: pd.Series | None, section: Measurements, where: str
) -> NDArray[np.float64]:
    """Return the hour of each measurement, NaN if its time is missing."""
    if start is not None:
        elapsed = hours_between(
            start.reindex(times.index).reset_index(drop=True),
            dates(times, f"{where}.time").reset_index(drop=True),
        )
        return elapsed.to_numpy(np.float64)
    unit = section.unit or "hours"
    cells, is_text = numbers(times)
    if is_text.any():
        raise CohortError(
            f"{where}.time: column {times.name!r}: expected numbers ({unit} since the start), got "
            f"{times.iloc[int(is_text.argmax())]!r}; if times are dates, name the start by `since`"
        )
    return cells * HOURS[unit]


def _values(cells: pd.Series) -> NDArray[np.float64]:
    """Return values as float64, NaN for text such as NEG."""
    if pd.api.types.is_numeric_dtype(cells):
        return cells.to_numpy(np.float64, na_value=np.nan)
    return pd.to_numeric(texts(cells), errors="coerce").to_numpy(np.float64)


def _numbered(names: pd.Index, numbers_of: dict[str, int]) -> NDArray[np.int32]:
    """Return the number of each name; new names are numbered in order of appearance."""
    codes, unique = pd.factorize(names)
    known = [numbers_of.setdefault(str(name), len(numbers_of)) for name in unique]
    return np.array(known, np.int32)[codes] if known else np.zeros(0, np.int32)


class MeasurementBags(LazyBags):
    """Bags of irregular measurements: one token per time stamp, one feature per item.

    An item that was not measured at a time stamp is NaN; if it was measured several times, its mean
    is taken.

    Args:
        rows: the measurements; their patients and items are numbers. None for no measurement.
        patients: names of the patients.
        width: number of items.
    """

    def __init__(self, rows: _Rows | None, patients: tuple[str, ...], width: int) -> None:
        self._width = width
        if rows is None:
            super().__init__({})
            return
        order = np.lexsort((rows.item, rows.hours, rows.patient))
        patient, item, hours = rows.patient[order], rows.item[order], rows.hours[order]
        is_new = np.ones(len(order), bool)
        is_new[1:] = (np.diff(patient) != 0) | (np.diff(item) != 0) | (np.diff(hours) != 0)
        first = np.flatnonzero(is_new)
        counts = np.diff(first, append=len(order))
        total = np.add.reduceat(rows.value[order], first) if len(first) else np.zeros(0)
        self._hours, self._item = hours[first], item[first]
        self._value = (total / counts).astype(np.float32)
        bounds = np.searchsorted(patient[first], np.arange(len(patients) + 1))
        super().__init__({name: slice(*bounds[i : i + 2]) for i, name in enumerate(patients)})

    def __getitem__(self, patient: str) -> Bag:
        rows = self._locations[patient]
        hours, token = np.unique(self._hours[rows], return_inverse=True)
        features = np.full((len(hours), self._width), np.nan, np.float32)
        features[token, self._item[rows]] = self._value[rows]
        return features, hours.astype(np.float32)[:, None]

    def tokens(self, patient: str) -> int:
        return len(np.unique(self._hours[self._locations[patient]]))
