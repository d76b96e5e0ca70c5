"""Read the tables of a cohort: find their files, join them, check their cells.

A cell is checked only when its column is used, so unused columns may hold anything. Each error
names the place in the YAML file (`where`), the table with its file, the column, and the first
patient or row at fault.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pandas as pd

from ..errors import AbsentError, CohortError, counted, listed, suggest
from .schema import (
    BagFiles,
    CodeOutcome,
    Codes,
    Columns,
    Join,
    LabelOutcome,
    Measurements,
    Spec,
    SurvivalOutcome,
    plain,
)
from .table_files import (
    MISSING,
    DataFolders,
    is_delimited,
    match_columns,
    read_chunks,
    read_header,
    read_sksurv,
    read_table,
)

YEAR = 365.2425 * 24
HOURS = {
    "minutes": 1 / 60, "hours": 1, "days": 24, "weeks": 168, "months": YEAR / 12, "years": YEAR,
}  # fmt: skip
"""Hours of each unit of time."""

CHUNK = 1_000_000
"""Rows of a table that are read at once: about 300 MB."""


def texts(column: pd.Series, *, verbatim: bool = False) -> pd.Series:
    """Return cells as text, missing values as None.

    1, 1.0 and "1.0" become the same text (see `plain`), unless `verbatim` is True, which keeps the
    ".0" of a code such as 038.0.
    """
    # Each distinct value is converted once. factorize gives -1 for a gap: the last entry, None.
    positions, unique = pd.factorize(column)
    words = [str(value).strip() if verbatim else plain(value) for value in unique]
    cells = np.array([*(None if word in MISSING else word for word in words), None], dtype=object)
    return pd.Series(cells[positions], index=column.index, name=column.name, dtype=object)


def numbers(column: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Return cells as float64 [n], and bool [n]: True for text that is no number (NaN then)."""
    if pd.api.types.is_numeric_dtype(column):  # bool too
        cells = column.to_numpy(np.float64, na_value=np.nan)
        return cells, np.zeros(len(cells), dtype=bool)
    words = texts(column)
    booleans = {"true": "1", "false": "0"}
    numerals = words.map(lambda cell: booleans.get(cell.lower(), cell), na_action="ignore")
    cells = pd.to_numeric(numerals, errors="coerce").to_numpy(np.float64)
    return cells, np.isnan(cells) & words.notna().to_numpy()


def _equals(column: pd.Series, values: Iterable[str]) -> pd.Series:
    """Return bool [n], whether each cell is one of the values, compared as `texts` does."""
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        numerals = pd.to_numeric(pd.Series(list(values)), errors="coerce").dropna()
        return column.isin(numerals.to_numpy(float))
    return texts(column).isin(list(values))


def dates(column: pd.Series, where: str) -> pd.Series:
    """Return cells as datetime64[s]: nanoseconds overflow, as MIMIC shifts births by 300 years."""
    parsed = pd.to_datetime(column, errors="coerce", format="ISO8601", utc=True)
    if not pd.api.types.is_datetime64_any_dtype(column):
        odd = (parsed.isna() & column.notna()).to_numpy()
        if odd.any():  # spaces around a date, or a text that means a gap: slow, but rare
            column = column.astype(object)
            column[odd] = texts(column[odd])
            again = pd.to_datetime(column[odd], errors="coerce", format="ISO8601", utc=True)
            parsed[odd] = again
    bad = parsed.isna() & column.notna()
    if bad.any():
        cell = column[bad].iloc[0]
        raise CohortError(
            f"{where}: column {column.name!r}: expected dates such as 2164-10-23 21:09:00, "
            f"got {cell!r}"
        )
    return parsed.dt.tz_localize(None).astype("datetime64[s]")


def hours_between(start: pd.Series, end: pd.Series) -> pd.Series:
    """Return end - start in hours."""
    return (end - start).dt.total_seconds() / 3600


class Tables:
    """The tables of a cohort, each read at its first use.

    Args:
        spec: of the cohort.
        folders: where the files are looked up.
        may_be_empty: True to accept a table without rows.
    """

    def __init__(self, spec: Spec, folders: DataFolders, *, may_be_empty: bool) -> None:
        self.spec, self.folders, self.may_be_empty = spec, folders, may_be_empty
        self.notes: list[str] = []
        """Sentences on what was left out, to be shown to the user."""
        self._raw: dict[str, pd.DataFrame] = {}  # as read, without joined and derived columns
        self._frames: dict[str, pd.DataFrame] = {}
        self._text = _text_columns(spec)

    def title(self, name: str) -> str:
        """Return the name of a table and its file, for errors."""
        table = self.spec.tables[name]
        return f"table {name!r} ({listed(table.file or [f'sksurv {table.sksurv}'], 2)})"

    def frame(self, name: str) -> pd.DataFrame:
        """Return a table with its joined and derived columns."""
        if name not in self._frames:
            table, frame = self.spec.tables[name], self._read(name)
            where = f"tables.{name}"
            if table.join:
                frame = self._join(name, frame, table.join, where)
            for new, derive in table.derive.items():
                start, end = (
                    dates(frame[self.column(name, column, f"{where}.derive.{new}", frame)], where)
                    for column in (derive.start, derive.to)
                )
                value = hours_between(start, end) / HOURS[derive.unit]
                frame = frame.assign(**{new: value.clip(upper=derive.at_most)})
            self._frames[name] = frame
        return self._frames[name]

    def column(self, name: str, column: str, where: str, frame: pd.DataFrame | None = None) -> str:
        """Return the name of a column; raise AbsentError if the table does not have it."""
        frame = self.frame(name) if frame is None else frame
        if column not in frame.columns:
            raise AbsentError(
                f"{where}: no column {column!r} in {self.title(name)}: "
                f"{suggest(column, frame.columns)}"
            )
        return column

    def patient_column(self, name: str) -> str:
        """Return the name of the column of patients; the table need not have it."""
        table = self.spec.tables[name]
        return table.patient or ("patient" if table.sksurv else self.spec.patient)

    def ids(self, name: str) -> pd.Series:
        """Return the patient of each row, None if the row has none."""
        table, where = self.spec.tables[name], f"tables.{name}"
        if not table.patients_of:
            return texts(self.frame(name)[self.column(name, self.patient_column(name), where)])
        ids = self.ids(table.patients_of)
        if len(ids) != len(self.frame(name)):
            raise CohortError(
                f"{where}.patients_of: expected one row per row of {table.patients_of!r} "
                f"({len(ids)}), got {len(self.frame(name))}"
            )
        return ids

    def long(self, name: str, columns: Iterable[str], where: str) -> pd.DataFrame:
        """Return these columns of all rows that have a patient, with the patient as index."""
        columns = [self.column(name, column, where) for column in columns]
        ids = self.ids(name)
        rows = self.frame(name)[columns].set_axis(pd.Index(ids, dtype=object))
        return rows if ids.notna().all() else rows[ids.notna().to_numpy()]

    def stream(self, name: str, columns: Iterable[str], where: str) -> Iterator[pd.DataFrame]:
        """Yield the rows of `long` in parts, so that a file may be larger than memory.

        That is so for csv and tsv files without join, derive and patients_of; other tables come in
        one part.
        """
        table, columns = self.spec.tables[name], list(columns)
        files = [self.folders.find(file, f"tables.{name}.file") for file in table.file or []]
        if table.join or table.derive or table.patients_of or not all(map(is_delimited, files)):
            yield self.long(name, columns, where)
            return
        patient, rows = self.patient_column(name), 0
        for path in files:
            header = pd.DataFrame(columns=read_header(path, f"tables.{name}.file"))
            for column in columns:
                self.column(name, column, where, header)
            self.column(name, patient, f"tables.{name}", header)
            used = list(dict.fromkeys([patient, *columns]))
            for part in read_chunks(path, self._text, used, CHUNK, f"tables.{name}.file"):
                part = self._without_missing(name, part, known=header.columns)
                ids = texts(part[patient])
                part = part[columns].set_axis(pd.Index(ids, dtype=object))
                rows += len(part)
                yield part[ids.notna().to_numpy()]
        if not rows and not self.may_be_empty:
            raise CohortError(f"tables.{name}: {self.title(name)} has no rows")

    def check_patients(self, name: str, columns: list[str]) -> None:
        """Raise CohortError if a row with values in these columns has no patient."""
        without_patient = self.ids(name).isna()
        if without_patient.any():
            without_patient &= self.frame(name)[columns].notna().any(axis=1)
        if without_patient.any():
            raise CohortError(
                f"tables.{name}: the patient is missing in "
                f"{counted(without_patient[without_patient].index, 'row')} of {self.title(name)}"
            )

    def wide(self, name: str, columns: Iterable[str], where: str) -> pd.DataFrame:
        """Return these columns with one row per patient, who is the index.

        With `repeats: same` several rows of a patient are merged into one: in each column the first
        value that is not missing; all others must be equal to it.

        Raises:
            CohortError: a row with values has no patient, or a patient has several rows.
        """
        columns = [self.column(name, column, where) for column in dict.fromkeys(columns)]
        self.check_patients(name, columns)
        rows = self.long(name, columns, where)
        repeats = rows.index.duplicated()
        if not repeats.any():
            return rows
        first = rows.index[repeats][0]
        if self.spec.tables[name].repeats != "same":
            raise CohortError(
                f"tables.{name}: {rows.index.nunique()} patients in {len(rows)} rows, {first} in "
                f"{(rows.index == first).sum()}: expected one row per patient. If the rows agree, "
                "add `repeats: same` to the table. If they differ, add to the modality `rows: bag` "
                "(each row is a token) or `rows: mean`"
            )
        merged = rows.groupby(level=0, sort=False).first()  # the first value not missing, by column
        rows = rows[rows.index.duplicated(keep=False)]
        differ = rows.ne(merged.loc[rows.index]) & rows.notna()
        if differ.to_numpy().any():
            column = differ.columns[differ.any()][0]
            patient = rows.index[differ[column]][0]
            got = listed(rows.loc[patient, column].dropna().unique())
            raise CohortError(
                f"tables.{name}.repeats: the rows of patient {patient} differ in column "
                f"{column!r}: expected the same in all, got {got}"
            )
        return merged

    def numeric(self, name: str, rows: pd.DataFrame, where: str, cure: str = "") -> pd.DataFrame:
        """Return rows of `wide` as float64, finite or NaN."""
        is_numeric = np.array([pd.api.types.is_numeric_dtype(dtype) for dtype in rows.dtypes], bool)
        cells = np.empty(rows.shape)
        if is_numeric.any():
            cells[:, is_numeric] = rows.loc[:, is_numeric].to_numpy(np.float64, na_value=np.nan)
        for i in np.flatnonzero(~is_numeric).tolist():
            cells[:, i], text = numbers(rows.iloc[:, i])
            if text.any():
                at = int(text.argmax())
                raise CohortError(
                    f"{where}: column {rows.columns[i]!r} of {self.title(name)}: expected numbers, "
                    f"got {str(rows.iloc[at, i])!r} for patient {rows.index[at]}{cure}"
                )
        for at, i in np.argwhere(np.isinf(cells))[:1].tolist():
            raise CohortError(
                f"{where}: column {rows.columns[i]!r} of {self.title(name)}: expected finite, got "
                f"Inf for patient {rows.index[at]}"
            )
        return pd.DataFrame(cells, index=rows.index, columns=rows.columns)

    def refuse_outcome(self, columns: Iterable[str], where: str) -> None:
        """Raise CohortError if one of the columns is the outcome."""
        outcome = self.spec.outcome.columns if self.spec.outcome else ()
        for column in columns:
            if column in outcome:
                raise CohortError(
                    f"{where}: column {column!r} is the outcome: a model would read it"
                )

    def _without_missing(
        self, name: str, frame: pd.DataFrame, known: Sequence[str] | pd.Index
    ) -> pd.DataFrame:
        """Replace the values that `missing` declares.

        Args:
            name: of the table.
            frame: its rows, perhaps with some of its columns only.
            known: all columns of the table.
        """
        declared = self.spec.tables[name].missing
        gaps = {}
        for pattern, columns in match_columns(declared, list(known)).items():
            if not columns:
                raise CohortError(
                    f"tables.{name}.missing: {pattern!r} matches no column of {self.title(name)}: "
                    f"{suggest(pattern, known)}"
                )
            for column in columns:
                if column in frame:
                    cells = gaps.get(column, frame[column])
                    gaps[column] = cells.mask(_equals(cells, declared[pattern]))
        return frame.assign(**gaps) if gaps else frame

    def _join(self, name: str, frame: pd.DataFrame, join: Join, where: str) -> pd.DataFrame:
        other, extra = join.table, self._read(join.table)
        on = self.column(name, join.on, f"{where}.join.on", frame)
        key = texts(extra[self.column(other, on, f"{where}.join.on", extra)])
        extra = extra[key.notna().to_numpy()].set_axis(pd.Index(key.dropna(), dtype=object))
        if not extra.index.is_unique:
            repeated = extra.index[extra.index.duplicated()].unique()
            raise CohortError(
                f"{where}.join: expected one row of {self.title(other)} per {on}, but "
                f"{counted(repeated, 'value')} in several"
            )
        new = [name for name in extra.columns if name not in frame.columns]
        joined = extra[new].reindex(texts(frame[on])).set_axis(frame.index)
        return pd.concat([frame, joined], axis=1)

    def _read(self, name: str) -> pd.DataFrame:
        if name not in self._raw:
            table, where = self.spec.tables[name], f"tables.{name}"
            if table.sksurv:
                frame = read_sksurv(table.sksurv, where)
            else:
                frame = self._read_files(table.file or [], f"{where}.file")
            if frame.empty and not self.may_be_empty:
                raise CohortError(f"{where}: {self.title(name)} has no rows")
            self._raw[name] = self._without_missing(name, frame, known=frame.columns)
        return self._raw[name]

    def _read_files(self, files: list[str], where: str) -> pd.DataFrame:
        """Return the rows of all files, which must have the same columns."""
        frames = [read_table(self.folders.find(file, where), self._text, where) for file in files]
        for file, frame in zip(files[1:], frames[1:], strict=True):
            if odd := sorted({*frame.columns} ^ {*frames[0].columns}):
                raise CohortError(
                    f"{where}: expected the same columns in {files[0]!r} and {file!r}; only one of "
                    f"them has {listed(odd)}"
                )
        return frames[0] if len(frames) == 1 else pd.concat(frames, ignore_index=True)


def _text_columns(spec: Spec) -> set[str]:
    """Return names and patterns of the columns to read as text, so that 001 does not become 1.

    These are ids, groups, dates, codes, categories, and the column of events or classes.
    """
    names: list[str | None] = [spec.patient, spec.group]
    for table in spec.tables.values():
        names += [table.patient, table.join and table.join.on]
        for derive in table.derive.values():
            names += [derive.start, derive.to]
    match spec.outcome:
        case SurvivalOutcome(event=column) | LabelOutcome(label=column) | CodeOutcome(code=column):
            names.append(column)
    for modality in spec.modalities.values():
        match modality:
            case Columns():
                names += modality.categorical or ()
            case Codes():
                names.append(modality.codes)
            case Measurements(item=item, time=time, since=since):
                names += [item, *([time, since.column] if since else [])]
            case BagFiles(keys=keys) if keys:
                names.append(keys.column)
    return {name for name in names if name}
