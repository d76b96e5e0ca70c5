"""Load a cohort from its YAML file."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pandas as pd

from ..errors import CohortError, counted, suggest
from .bags import Bags
from .cohort import Cohort, CohortSource
from .modalities import read_modality
from .outcomes import read_outcome
from .schema import Spec, read_spec
from .splits import read_splits
from .tables import Places, Tables

SHIPPED = Path(__file__).parent / "shipped"


def load_cohort(
    path: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None = None,
    outcome: bool = True,
) -> Cohort:
    """Load a cohort from a YAML file (docs/how-to/tables.md says what stands in it).

    Rows of patients without an outcome are left out; patients without a modality miss it. Nothing
    is imputed, scaled or filtered, for that belongs inside the training part of a split.

    Args:
        path: a YAML file, or the name of a shipped cohort such as "tcga_blca".
        data: folder of the files it names; by default the YAML's own, then $MOTET_DATA/data, then
            $MOTET_DATA, and for shipped cohorts `shared/data` beside the checkout.
        outcome: False to predict for new patients: neither outcome nor splits are read, patients
            are all who have a modality, each a group of its own, and columns may be empty.

    Returns:
        The cohort; tables are in memory, bags are read when asked for.

    Raises:
        CohortError: in one line, what is wrong with which file, key or column.

    Example:
        >>> cohort = motet.io.load_cohort("breast_cancer")
        >>> len(cohort), cohort.modalities["clinical"].columns.tolist()
        (198, ['age', 'er', 'grade', 'size'])
    """
    file = _find(path)
    try:
        cohort = _load(read_spec(file), _places(file, data), outcome)
    except CohortError as error:
        raise CohortError(f"{file.name}: {error}") from None
    return replace(cohort, source=_source(path, data))


def _find(path: str | os.PathLike[str]) -> Path:
    file = Path(path).expanduser()
    if file.is_file():
        return file
    shipped = {one.stem: one for one in sorted(SHIPPED.glob("*.yaml"))}
    if str(path) in shipped:
        return shipped[str(path)]
    if file.suffix in (".yaml", ".yml"):
        raise CohortError(f"no file {str(path)!r}")
    raise CohortError(
        f"no cohort {str(path)!r}: {suggest(str(path), shipped)}; or name a YAML file of your own"
    )


def _source(path: str | os.PathLike[str], data: str | os.PathLike[str] | None) -> CohortSource:
    file = Path(path).expanduser()
    return CohortSource(
        str(file.resolve()) if file.is_file() else str(path),
        None if data is None else str(Path(data).expanduser().resolve()),
    )


def _places(file: Path, data: str | os.PathLike[str] | None) -> Places:
    if data is not None:
        return Places([Path(data).expanduser()])
    folders = [file.resolve().parent]
    if base := os.environ.get("MOTET_DATA"):
        folders += [Path(base) / "data", Path(base)]
    if folders[0] == SHIPPED:
        folders.append(SHIPPED.parents[3] / "shared" / "data")
    return Places(folders)


def _load(spec: Spec, places: Places, with_outcome: bool) -> Cohort:
    tables = Tables(spec, places, empty=not with_outcome)
    if not with_outcome:
        found = {name: read_modality(name, tables, None) for name in spec.modalities}
        patients = tuple(dict.fromkeys(one for part in found.values() for one in _ids(part)))
        if not patients:
            raise CohortError("no modality has a patient")
        return Cohort(spec.name, patients, patients, None, _aligned(found, patients), None)
    if spec.outcome is None:
        raise CohortError("key 'outcome' is missing (only prediction goes without)")
    patients, groups, outcome, dropped = read_outcome(spec.outcome, tables)
    keep = set(patients)
    found = {name: read_modality(name, tables, keep) for name in spec.modalities}
    for name, part in found.items():
        _check_filled(name, part)
    splits = None
    if spec.splits:
        of = dict(zip(patients, groups, strict=True))
        splits = read_splits(spec.splits, tables, of, dropped)
    return Cohort(spec.name, patients, groups, outcome, _aligned(found, patients), splits)


def _ids(part: pd.DataFrame | Bags) -> tuple[str, ...]:
    return part.patients if isinstance(part, Bags) else tuple(map(str, part.index))


def _aligned(
    found: dict[str, pd.DataFrame | Bags], patients: tuple[str, ...]
) -> dict[str, pd.DataFrame | Bags]:
    index = pd.Index(patients, dtype=object, name="patient")
    return {
        name: part if isinstance(part, Bags) else part.reindex(index)
        for name, part in found.items()
    }


def _check_filled(name: str, part: pd.DataFrame | Bags) -> None:
    if isinstance(part, Bags):  # refuses to be empty itself
        return
    gaps = part.isna()
    if gaps.to_numpy().all():
        raise CohortError(f"modalities.{name}: no patient of the outcome has it")
    empty = gaps.columns[gaps.all()]
    if len(empty):
        raise CohortError(
            f"modalities.{name}: no patient has a value in {counted(map(repr, empty), 'column')}; "
            "leave it out of `columns`"
        )
