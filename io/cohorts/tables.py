"""Tables from files: found, read, joined, and checked cell by cell where they are used."""

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
    CodeOutcome,
    Codes,
    Columns,
    Events,
    Join,
    LabelOutcome,
    Spec,
    Stores,
    SurvivalOutcome,
    plain,
)

# pandas' own list, so that a parquet file and a csv file have the same gaps.
MISSING = {
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
    *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
}
HOURS = {"hours": 1, "days": 24, "months": 365.2425 * 24 / 12, "years": 365.2425 * 24}


class Places:
    """Look files up in folders, in order."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self.folders = tuple(folders)

    def find(self, name: str, where: str) -> Path:
        """Return the path of one file."""
        for folder in self.folders:  # an absolute name replaces the folder
            if (path := folder / Path(name).expanduser()).exists():
                return path
        raise self._not_found(name, where)

    def match(self, patterns: Iterable[str], where: str) -> list[Path]:
        """Return the paths that match each pattern, in natural order: 2 before 10."""
        found: list[Path] = []
        for pattern in patterns:
            for folder in self.folders:
                if (path := folder / Path(pattern).expanduser()).exists():
                    paths = [path]
                else:
                    paths = [folder / one for one in glob.glob(str(Path(pattern).expanduser()),
                                                               root_dir=folder)]  # fmt: skip
                if paths:
                    found += sorted(paths, key=lambda path: natural(path.name))
                    break
            else:
                raise self._not_found(pattern, where)
        return found

    def _not_found(self, name: str, where: str) -> CohortError:
        return CohortError(
            f"{where}: no file {name!r} in {', '.join(map(str, self.folders))}: "
            "name the folder that holds it by --data DIR or MOTET_DATA"
        )


def natural(text: str) -> list[tuple[int, str]]:
    """Sort key by which 2 comes before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def texts(column: pd.Series, *, verbatim: bool = False) -> pd.Series:
    """Return cells as text, gaps as None; `verbatim` keeps the ".0" of a code such as 038.0."""
    places, unique = pd.factorize(column)
    words = [str(one).strip() if verbatim else plain(one) for one in unique]
    cells = np.array([*(None if word in MISSING else word for word in words), None], dtype=object)
    return pd.Series(cells[places], index=column.index, name=column.name, dtype=object)


def numbers(column: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Return cells as float64, and which of them are text that is no number (NaN in the first)."""
    if pd.api.types.is_numeric_dtype(column):  # bool too
        cells = column.to_numpy(np.float64, na_value=np.nan)
        return cells, np.zeros(len(cells), dtype=bool)
    written = texts(column)
    booleans = {"true": "1", "false": "0"}
    known = written.map(lambda cell: booleans.get(cell.lower(), cell), na_action="ignore")
    cells = pd.to_numeric(known, errors="coerce").to_numpy(np.float64)
    return cells, np.isnan(cells) & written.notna().to_numpy()


def dates(column: pd.Series, where: str) -> pd.Series:
    """Return cells as seconds-wide dates: MIMIC shifts births by 300 years, too many for ns."""
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


def matching(patterns: Iterable[str], columns: Sequence[str]) -> dict[str, list[str]]:
    """Match columns by name, else by * and ?; brackets mean themselves, as names have them."""
    found = {}
    for pattern in patterns:
        if pattern in columns:
            found[pattern] = [pattern]
            continue
        parts = re.split(r"([*?])", pattern)
        glob_ = "".join({"*": ".*", "?": "."}.get(part, re.escape(part)) for part in parts)
        found[pattern] = [name for name in columns if re.fullmatch(glob_, name, re.DOTALL)]
    return found


class Tables:
    """The tables of a cohort, each read when first used."""

    def __init__(self, spec: Spec, places: Places, *, empty: bool) -> None:
        self.spec, self.places, self.empty = spec, places, empty
        self._raw: dict[str, pd.DataFrame] = {}
        self._frames: dict[str, pd.DataFrame] = {}
        self._text = _text_columns(spec)

    def title(self, name: str) -> str:
        """Name a table and its file, for errors."""
        table = self.spec.tables[name]
        return f"table {name!r} ({listed(table.file or [f'sksurv {table.sksurv}'], 2)})"

    def frame(self, name: str) -> pd.DataFrame:
        """Return a table with what is joined and derived."""
        if name not in self._frames:
            table, frame = self.spec.tables[name], self._read(name)
            where = f"tables.{name}"
            if table.join:
                frame = self._joined(name, frame, table.join, where)
            for new, derive in table.derive.items():
                start, end = (
                    dates(frame[self.column(name, one, f"{where}.derive.{new}", frame)], where)
                    for one in (derive.start, derive.to)
                )
                value = hours_between(start, end) / HOURS[derive.unit]
                frame = frame.assign(**{new: value.clip(upper=derive.at_most)})
            self._frames[name] = frame
        return self._frames[name]

    def column(self, name: str, column: str, where: str, frame: pd.DataFrame | None = None) -> str:
        """Return the name of a column that is there."""
        frame = self.frame(name) if frame is None else frame
        if column not in frame.columns:
            raise CohortError(
                f"{where}: no column {column!r} in {self.title(name)}: "
                f"{suggest(column, frame.columns)}"
            )
        return column

    def patient_column(self, name: str) -> str:
        """Return the name of the column that holds patients, whether it is there or not."""
        table = self.spec.tables[name]
        return table.patient or ("patient" if table.sksurv else self.spec.patient)

    def ids(self, name: str) -> pd.Series:
        """Return the patient of each row, None where it has none."""
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
        """Return the rows that have a patient: index patient, these columns."""
        columns = [self.column(name, one, where) for one in columns]
        ids = self.ids(name)
        part = self.frame(name)[columns].set_axis(pd.Index(ids, dtype=object))
        return part[ids.notna().to_numpy()]

    def wide(self, name: str, columns: Iterable[str], where: str) -> pd.DataFrame:
        """Return these columns with one row per patient."""
        columns = [self.column(name, one, where) for one in dict.fromkeys(columns)]
        ids, part = self.ids(name), self.frame(name)[columns]
        nobody = part[ids.isna().to_numpy()].notna().any(axis=1)
        if nobody.any():
            raise CohortError(
                f"tables.{name}: the patient is missing in {counted(nobody[nobody].index, 'row')} "
                f"of {self.title(name)}"
            )
        part = self.long(name, columns, where)
        repeats = part.index.duplicated()
        if not repeats.any():
            return part
        first = part.index[repeats][0]
        if self.spec.tables[name].repeats != "same":
            raise CohortError(
                f"tables.{name}: {part.index.nunique()} patients in {len(part)} rows, {first} in "
                f"{(part.index == first).sum()}: expected one row per patient, else one patient is "
                "in train and test; say `repeats: same` if the rows agree, as those of slides do"
            )
        one = part.groupby(level=0, sort=False).first()  # the first known value, by column
        part = part[part.index.duplicated(keep=False)]
        differ = part.ne(one.loc[part.index]) & part.notna()
        if differ.to_numpy().any():
            column = differ.columns[differ.any()][0]
            patient = part.index[differ[column]][0]
            got = listed(part.loc[patient, column].dropna().unique())
            raise CohortError(
                f"tables.{name}.repeats: the rows of patient {patient} differ in column "
                f"{column!r}: expected the same in all, got {got}"
            )
        return one

    def numeric(self, name: str, rows: pd.DataFrame, where: str, cure: str = "") -> pd.DataFrame:
        """Return rows of `wide` as float64, finite or NaN."""
        cells = {}
        for column in rows:
            cells[column], text = numbers(rows[column])
            wrong, what = (text, "numbers") if text.any() else (np.isinf(cells[column]), "finite")
            if wrong.any():
                at = int(wrong.argmax())
                got = repr(str(rows[column].iloc[at])) if text.any() else "Inf"
                raise CohortError(
                    f"{where}: column {column!r} of {self.title(name)}: expected {what}, got {got} "
                    f"for patient {rows.index[at]}" + (cure if text.any() else "")
                )
        return pd.DataFrame(cells, index=rows.index, columns=rows.columns)

    def _joined(self, name: str, frame: pd.DataFrame, join: Join, where: str) -> pd.DataFrame:
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
        found = extra[new].reindex(texts(frame[on])).set_axis(frame.index)
        return pd.concat([frame, found], axis=1)

    def _read(self, name: str) -> pd.DataFrame:
        if name not in self._raw:
            table, where = self.spec.tables[name], f"tables.{name}"
            if table.sksurv:
                frame = _bundled(table.sksurv, where)
            else:
                frame = self._appended(table.file or [], f"{where}.file")
            if frame.empty and not self.empty:
                raise CohortError(f"{where}: {self.title(name)} has no rows")
            self._raw[name] = frame
        return self._raw[name]

    def _appended(self, files: list[str], where: str) -> pd.DataFrame:
        parts = [read_table(self.places.find(file, where), self._text, where) for file in files]
        for file, part in zip(files[1:], parts[1:], strict=True):
            if odd := sorted({*part.columns} ^ {*parts[0].columns}):
                raise CohortError(
                    f"{where}: expected the same columns in {files[0]!r} and {file!r}; only one of "
                    f"them has {listed(odd)}"
                )
        return parts[0] if len(parts) == 1 else pd.concat(parts, ignore_index=True)


def _text_columns(spec: Spec) -> set[str]:
    """Return names and patterns of columns to be read as text, so that 001 stays 001."""
    named: list[str | None] = [spec.patient, spec.group]
    for table in spec.tables.values():
        named += [table.patient, table.join and table.join.on]
        named += [one for derive in table.derive.values() for one in (derive.start, derive.to)]
    match spec.outcome:
        case SurvivalOutcome(event=column) | LabelOutcome(label=column) | CodeOutcome(code=column):
            named.append(column)
    for modality in spec.modalities.values():
        match modality:
            case Columns():
                named += modality.categorical or ()
            case Codes():
                named.append(modality.codes)
            case Events():
                named += [modality.item, modality.time, modality.since.column]
            case Stores(keys=keys) if keys:
                named.append(keys.column)
    return {name for name in named if name}


def read_table(path: Path, text: Iterable[str], where: str) -> pd.DataFrame:
    """Read one file; columns that match `text` are kept as written."""
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
            # A row longer than the header: cells would stand under the wrong names.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return _read_delimited(path, "," if kind[1] == "csv" else "\t", text)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CohortError(f"{where}: {path} cannot be read: {error}") from None
    except pd.errors.ParserWarning as error:
        raise CohortError(f"{where}: {path}: rows are longer than the header: {error}") from None


def _read_delimited(path: Path, separator: str, text: Iterable[str]) -> pd.DataFrame:
    head = pd.read_csv(path, sep=separator, header=None, nrows=1, dtype=str,
                       keep_default_na=False, encoding="utf-8-sig")  # fmt: skip
    # A column without a name is the row number that pandas writes.
    names = [str(one).strip() or f"Unnamed: {place}" for place, one in enumerate(head.iloc[0])]
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise ValueError(f"the header names {listed(map(repr, repeated))} more than once")
    kept = {name for found in matching(text, names).values() for name in found}
    return pd.read_csv(path, sep=separator, header=0, names=names, index_col=False,
                       dtype=dict.fromkeys(kept, str), na_values=sorted(MISSING),
                       keep_default_na=False, low_memory=False, encoding="utf-8-sig")  # fmt: skip


def _bundled(name: str, where: str) -> pd.DataFrame:
    from sksurv import datasets

    # Every loader but the one that reads other people's files.
    known = [one.removeprefix("load_") for one in dir(datasets) if re.match("load_(?!arff)", one)]
    if name not in known:
        raise CohortError(f"{where}.sksurv: no data set {name!r}: {suggest(name, known)}")
    features, outcome = getattr(datasets, f"load_{name}")()
    frame = features.reset_index(drop=True)
    frame = frame.assign(**{column: outcome[column] for column in outcome.dtype.names})
    return frame.assign(patient=np.arange(len(frame)).astype(str))
