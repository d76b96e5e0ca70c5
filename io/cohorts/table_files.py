"""Find and read the files of tables, without joining or checking their cells."""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import lzma
import re
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pandas as pd

from ..errors import AbsentError, CohortError, listed, suggest

# Texts that mean a missing value: the list of pandas, also applied to parquet files, so that a
# table has the same gaps in both formats.
MISSING = {
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
    *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
}


class DataFolders:
    """The folders in which the files of a cohort are looked up, in this order."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self.folders = tuple(folders)

    def find(self, name: str, where: str) -> Path:
        """Return the path of a file; raise AbsentError if no folder has it."""
        for folder in self.folders:  # if the name is an absolute path, `/` drops the folder
            if (path := folder / Path(name).expanduser()).exists():
                return path
        raise self._not_found(name, where)

    def find_or_new(self, name: str) -> Path:
        """Return the path of a file or folder; if none exists, where to make it."""
        paths = [folder / Path(name).expanduser() for folder in self.folders]
        return next((path for path in paths if path.exists()), paths[0])

    def match(self, patterns: Iterable[str], where: str) -> list[Path]:
        """Return the paths that match each pattern, in natural order: 2 before 10.

        The first folder with a match is taken; a pattern without any match is an AbsentError.
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

    def _not_found(self, name: str, where: str) -> AbsentError:
        return AbsentError(
            f"{where}: no file {name!r} in {', '.join(map(str, self.folders))}: "
            "give its folder with --data DIR or MOTET_DATA"
        )


def natural_key(text: str) -> list[tuple[int, str]]:
    """Return a key to sort texts by, in which numbers are compared as numbers: 2 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


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


def read_table(path: Path, text: Iterable[str], where: str) -> pd.DataFrame:
    """Read one file. Columns that match a name or pattern of `text` are read as text."""
    with _readable(path, where):
        if _kind(path, where) == "parquet":
            frame = pd.read_parquet(path)
            if frame.index.name is not None:
                frame = frame.reset_index()
            return frame.rename(columns=lambda name: str(name).strip())
        # pandas keeps the columns of a file apart, so that each step takes time for each of them
        # (40,000 genes: 0.6 s); those of a copy lie together.
        return pd.read_csv(path, **_options(path, text)).copy()


def is_delimited(path: Path) -> bool:
    """Return True for csv and tsv files."""
    return bool(_KIND.search(path.name.lower())) and ".parquet" not in path.name.lower()


def read_header(path: Path, where: str) -> list[str]:
    """Return the names of the columns of a csv or tsv file."""
    with _readable(path, where):
        return _read_header(path)


def read_chunks(
    path: Path, text: Iterable[str], columns: Sequence[str], rows: int, where: str
) -> Iterator[pd.DataFrame]:
    """Read some columns of a csv or tsv file, `rows` rows at a time."""
    with (
        _readable(path, where),
        pd.read_csv(path, **_options(path, text), usecols=list(columns), chunksize=rows) as chunks,
    ):
        yield from chunks


_KIND = re.compile(r"\.(csv|tsv|parquet)(\.(gz|zip|bz2|xz))?$")


def _kind(path: Path, where: str) -> str:
    kind = _KIND.search(path.name.lower())
    if not kind:
        raise CohortError(f"{where}: {path.name}: expected csv, tsv (.gz, .zip) or parquet")
    return kind[1]


@contextmanager
def _readable(path: Path, where: str) -> Iterator[None]:
    """Raise errors of reading as CohortError."""
    try:
        with warnings.catch_warnings():
            # pandas only warns of a row that is longer than the header; its cells would be in the
            # wrong columns.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            yield
    except CohortError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        raise CohortError(f"{where}: {path} cannot be read: {error}") from None
    except pd.errors.ParserWarning as error:
        raise CohortError(f"{where}: {path}: rows are longer than the header: {error}") from None


def _options(path: Path, text: Iterable[str]) -> dict[str, Any]:
    """Return the options with which pandas reads a csv or tsv file."""
    names = _read_header(path)
    as_text = {name for matches in match_columns(text, names).values() for name in matches}
    return {
        **{"sep": _separator(path), "header": 0, "names": names, "index_col": False},
        **{"dtype": dict.fromkeys(as_text, str), "na_values": sorted(MISSING)},
        **{"keep_default_na": False, "low_memory": False, "encoding": "utf-8-sig"},
    }


def _read_header(path: Path) -> list[str]:
    """Return the names of the columns; pandas would take seconds for 40,000 of them."""
    with _open_text(path) as file:
        cells = next((cells for cells in csv.reader(file, delimiter=_separator(path)) if cells), [])
    if not cells:
        raise ValueError("No columns to parse from file")
    # pandas writes its row numbers as a column without a name.
    names = [cell.strip() or f"Unnamed: {i}" for i, cell in enumerate(cells)]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"the header names {listed(map(repr, repeated))} more than once")
    return names


def _separator(path: Path) -> str:
    kind = _KIND.search(path.name.lower())
    return "\t" if kind and kind[1] == "tsv" else ","


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    opened: Any
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
            if len(names) != 1:
                raise ValueError(f"expected one file in it, got {len(names)}: {listed(names)}")
            with archive.open(names[0]) as opened:
                yield TextIOWrapper(opened, "utf-8-sig", newline="")
        return
    open_binary = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    with open_binary.get(path.suffix.lower(), open)(path, "rb") as opened:
        yield TextIOWrapper(opened, "utf-8-sig", newline="")


def read_sksurv(name: str, where: str) -> pd.DataFrame:
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
