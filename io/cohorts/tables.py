"""Read the tables of a cohort: find their files, join them, check their cells.

A cell is checked only when its column is used, so unused columns may hold anything. Each error
names the place in the YAML file (`where`), the table with its file, the column, and the first
patient or row at fault.
"""

from __future__ import annotations

import glob
import re
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import CohortError, counted, listed, suggest
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

# Texts that mean a missing value: the list of pandas, also applied to parquet files, so that a
# table has the same gaps in both formats.
MISSING = {
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
    *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
}
HOURS = {"hours": 1, "days": 24, "months": 365.2425 * 24 / 12, "years": 365.2425 * 24}


class DataFolders:
    """The folders in which the files of a cohort are looked up, in this order."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self.folders = tuple(folders)

    def find(self, name: str, where: str) -> Path:
        """Return the path of a file; raise CohortError if no folder has it."""
        for folder in self.folders:  # if the name is an absolute path, `/` drops the folder
            if (path := folder / Path(name).expanduser()).exists():
                return path
        raise self._not_found(name, where)

    def match(self, patterns: Iterable[str], where: str) -> list[Path]:
        """Return the paths that match each pattern, in natural order: 2 before 10.

        The first folder with a match is taken; a pattern without any match is a CohortError.
        """
        matches: list[Path] = []
        for pattern in patterns:
            for folder in self.folders:
                if (path := folder / Path(pattern).expanduser()).exists():
                    paths = [path]
                else:
                    names = glob.glob(str(Path(pattern).expanduser()), root_dir=folder)
                    paths = [folder / name for name in names]
                if paths:
                    matches += sorted(paths, key=lambda path: natural_key(path.name))
                    break
            else:
                raise self._not_found(pattern, where)
        return matches

    def _not_found(self, name: str, where: str) -> CohortError:
        return CohortError(
            f"{where}: no file {name!r} in {', '.join(map(str, self.folders))}: "
            "give its folder with --data DIR or MOTET_DATA"
        )


def natural_key(text: str) -> list[tuple[int, str]]:
    """Return a key to sort texts by, in which numbers are compared as numbers: 2 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


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


def dates(column: pd.Series, where: str) -> pd.Series:
    """Return cells as datetime64[s]: nanoseconds overflow, as MIMIC shifts births by 300 years."""
    if not pd.api.types.is_datetime64_any_dtype(column):
        column = texts(column)
    parsed = pd.to_datetime(column, errors="coerce", format="ISO8601", utc=True)
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


def match_columns(patterns: Iterable[str], columns: Sequence[str]) -> dict[str, list[str]]:
    """Return for each pattern the columns of that name, else those that match its * and ?.

    Brackets have no special meaning, as names of columns contain them.
    """
    matches = {}
    for pattern in patterns:
        if pattern in columns:
            matches[pattern] = [pattern]
            continue
        parts = re.split(r"([*?])", pattern)
        regex = "".join({"*": ".*", "?": "."}.get(part, re.escape(part)) for part in parts)
        matches[pattern] = [name for name in columns if re.fullmatch(regex, name, re.DOTALL)]
    return matches


class Tables:
    """The tables of a cohort, each read at its first use.

    Args:
        spec: of the cohort.
        folders: where the files are looked up.
        may_be_empty: True to accept a table without rows.
    """

    def __init__(self, spec: Spec, folders: DataFolders, *, may_be_empty: bool) -> None:
        self.spec, self.folders, self.may_be_empty = spec, folders, may_be_empty
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
        """Return the name of a column; raise CohortError if the table does not have it."""
        frame = self.frame(name) if frame is None else frame
        if column not in frame.columns:
            raise CohortError(
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
        return rows[ids.notna().to_numpy()]

    def wide(self, name: str, columns: Iterable[str], where: str) -> pd.DataFrame:
        """Return these columns with one row per patient, who is the index.

        With `repeats: same` several rows of a patient are merged into one: in each column the first
        value that is not missing; all others must be equal to it.

        Raises:
            CohortError: a row with values has no patient, or a patient has several rows.
        """
        columns = [self.column(name, column, where) for column in dict.fromkeys(columns)]
        ids, cells = self.ids(name), self.frame(name)[columns]
        without_patient = cells[ids.isna().to_numpy()].notna().any(axis=1)
        if without_patient.any():
            raise CohortError(
                f"tables.{name}: the patient is missing in "
                f"{counted(without_patient[without_patient].index, 'row')} of {self.title(name)}"
            )
        rows = self.long(name, columns, where)
        repeats = rows.index.duplicated()
        if not repeats.any():
            return rows
        first = rows.index[repeats][0]
        if self.spec.tables[name].repeats != "same":
            raise CohortError(
                f"tables.{name}: {rows.index.nunique()} patients in {len(rows)} rows, {first} in "
                f"{(rows.index == first).sum()}: expected one row per patient, else one patient is "
                "in train and test; say `repeats: same` if the rows agree, as those of slides do"
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
        cells = {}
        for column in rows:
            cells[column], text = numbers(rows[column])
            is_wrong, expected = text, "numbers"
            if not text.any():
                is_wrong, expected = np.isinf(cells[column]), "finite"
            if is_wrong.any():
                at = int(is_wrong.argmax())
                got = repr(str(rows[column].iloc[at])) if text.any() else "Inf"
                raise CohortError(
                    f"{where}: column {column!r} of {self.title(name)}: expected {expected}, got "
                    f"{got} for patient {rows.index[at]}" + (cure if text.any() else "")
                )
        return pd.DataFrame(cells, index=rows.index, columns=rows.columns)

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
                frame = _read_sksurv(table.sksurv, where)
            else:
                frame = self._read_files(table.file or [], f"{where}.file")
            if frame.empty and not self.may_be_empty:
                raise CohortError(f"{where}: {self.title(name)} has no rows")
            self._raw[name] = frame
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
            case Measurements():
                names += [modality.item, modality.time, modality.since.column]
            case BagFiles(keys=keys) if keys:
                names.append(keys.column)
    return {name for name in names if name}


def read_table(path: Path, text: Iterable[str], where: str) -> pd.DataFrame:
    """Read one file. Columns that match a name or pattern of `text` are read as text."""
    kind = re.search(r"\.(csv|tsv|parquet)(\.(gz|zip|bz2|xz))?$", path.name.lower())
    if not kind:
        raise CohortError(f"{where}: {path.name}: expected csv, tsv (.gz, .zip) or parquet")
    try:
        if kind[1] == "parquet":
            frame = pd.read_parquet(path)
            if frame.index.name is not None:
                frame = frame.reset_index()
            return frame.rename(columns=lambda name: str(name).strip())
        with warnings.catch_warnings():
            # pandas only warns of a row that is longer than the header; its cells would be in the
            # wrong columns.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return _read_delimited(path, "," if kind[1] == "csv" else "\t", text)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CohortError(f"{where}: {path} cannot be read: {error}") from None
    except pd.errors.ParserWarning as error:
        raise CohortError(f"{where}: {path}: rows are longer than the header: {error}") from None


def _read_delimited(path: Path, separator: str, text: Iterable[str]) -> pd.DataFrame:
    head = pd.read_csv(path, sep=separator, header=None, nrows=1, dtype=str,
                       keep_default_na=False, encoding="utf-8-sig")  # fmt: skip
    # pandas writes its row numbers as a column without a name.
    names = [str(cell).strip() or f"Unnamed: {i}" for i, cell in enumerate(head.iloc[0])]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"the header names {listed(map(repr, repeated))} more than once")
    as_text = {name for matches in match_columns(text, names).values() for name in matches}
    return pd.read_csv(path, sep=separator, header=0, names=names, index_col=False,
                       dtype=dict.fromkeys(as_text, str), na_values=sorted(MISSING),
                       keep_default_na=False, low_memory=False, encoding="utf-8-sig")  # fmt: skip


def _read_sksurv(name: str, where: str) -> pd.DataFrame:
    """Return a data set of scikit-survival, its outcome as columns, and a column `patient`."""
    from sksurv import datasets

    # All loaders of data sets; load_arff_files_standardized reads the user's files.
    loaders = [loader for loader in dir(datasets) if re.match("load_(?!arff)", loader)]
    names = [loader.removeprefix("load_") for loader in loaders]
    if name not in names:
        raise CohortError(f"{where}.sksurv: no data set {name!r}: {suggest(name, names)}")
    features, outcome = getattr(datasets, f"load_{name}")()
    frame = features.reset_index(drop=True)
    frame = frame.assign(**{column: outcome[column] for column in outcome.dtype.names})
    return frame.assign(patient=np.arange(len(frame)).astype(str))
