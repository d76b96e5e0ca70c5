"""Load a cohort from its YAML file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pandas as pd

from ..errors import AbsentError, CohortError, counted, suggest
from .bags import Bags
from .cohort import Cohort, CohortSource
from .modalities import read_modality
from .outcomes import read_outcome
from .schema import Columns, Spec, read_spec
from .splits import read_splits
from .table_files import DataFolders
from .tables import Tables

SHIPPED = Path(__file__).parent / "shipped"


def load_cohort(
    path: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None = None,
    outcome: bool = True,
) -> Cohort:
    """Load a cohort from a YAML file (its format: docs/how-to/tables.md).

    Patients without an outcome are left out. A patient may lack a modality. No value is imputed,
    scaled or filtered: that must be fitted on the training part of a split only. What is left out
    because it is `optional` and absent is shown as a warning.

    Args:
        path: a YAML file, or the name of a shipped cohort such as "tcga_blca".
        data: folder of its data files. By default they are looked up in the folder of the YAML
            file, then in $MOTET_DATA/data, then in $MOTET_DATA, and for shipped cohorts in
            `shared/data` beside the checkout.
        outcome: False to predict for new patients: outcome and splits are not read, all patients
            with at least one modality are taken, each is its own group, and columns may be empty.

    Returns:
        The cohort. Tables are in memory; bags are read at each use. Images with an `encoder` that
        their store lacks are encoded first.

    Raises:
        CohortError: in one line, the file, key or column at fault, and why.

    Example:
        >>> cohort = motet.io.load_cohort("breast_cancer")
        >>> len(cohort), cohort.modalities["clinical"].columns.tolist()
        (198, ['age', 'er', 'grade', 'size'])
    """
    file = _find(path)
    try:
        spec = read_spec(file)
        tables = Tables(spec, _data_folders(file, data), may_be_empty=not outcome)
        cohort = _load(spec, tables) if outcome else _load_for_prediction(spec, tables)
    except CohortError as error:
        raise CohortError(f"{file.name}: {error}") from None
    for note in tables.notes:
        warnings.warn(f"{file.name}: {note}", stacklevel=2)
    return replace(cohort, source=_source(path, data))


def _find(path: str | os.PathLike[str]) -> Path:
    """Return the YAML file of a path, or of the name of a shipped cohort."""
    file = Path(path).expanduser()
    if file.is_file():
        return file
    shipped = {shipped_file.stem: shipped_file for shipped_file in sorted(SHIPPED.glob("*.yaml"))}
    if str(path) in shipped:
        return shipped[str(path)]
    if file.suffix in (".yaml", ".yml"):
        raise CohortError(f"no file {str(path)!r}")
    known = suggest(str(path), shipped, limit=len(shipped))
    raise CohortError(f"no cohort {str(path)!r}: {known}; or name a YAML file of your own")


def _source(path: str | os.PathLike[str], data: str | os.PathLike[str] | None) -> CohortSource:
    file = Path(path).expanduser()
    return CohortSource(
        str(file.resolve()) if file.is_file() else str(path),
        None if data is None else str(Path(data).expanduser().resolve()),
    )


def _data_folders(file: Path, data: str | os.PathLike[str] | None) -> DataFolders:
    if data is not None:
        return DataFolders([Path(data).expanduser()])
    folders = [file.resolve().parent]
    if base := os.environ.get("MOTET_DATA"):
        folders += [Path(base) / "data", Path(base)]
    if folders[0] == SHIPPED:
        # SHIPPED is motet/io/cohorts/shipped; its fourth parent is the folder beside the checkout.
        folders.append(SHIPPED.parents[3] / "shared" / "data")
    return DataFolders(folders)


def _load(spec: Spec, tables: Tables) -> Cohort:
    if spec.outcome is None:
        raise CohortError("key 'outcome' is missing (only prediction works without it)")
    # The outcome decides who the patients are; the modalities are then read for these only.
    patients, groups, outcome, dropped = read_outcome(spec.outcome, tables)
    keep = set(patients)
    modalities = _read_modalities(spec, tables, keep)
    for name, modality in modalities.items():
        section = spec.modalities[name]
        _check_not_empty(name, modality, section.may_lack if isinstance(section, Columns) else ())
    splits = None
    if spec.splits:
        group_of = dict(zip(patients, groups, strict=True))
        splits = read_splits(spec.splits, tables, group_of, dropped)
    return Cohort(spec.name, patients, groups, outcome, _align(modalities, patients), splits)


def _load_for_prediction(spec: Spec, tables: Tables) -> Cohort:
    """Return a cohort of all patients with at least one modality, without outcome and splits."""
    modalities = _read_modalities(spec, tables, None)
    ids = (patient for modality in modalities.values() for patient in _ids(modality))
    patients = tuple(dict.fromkeys(ids))
    if not patients:
        raise CohortError("no modality has a patient")
    return Cohort(spec.name, patients, patients, None, _align(modalities, patients), None)


def _read_modalities(
    spec: Spec, tables: Tables, keep: set[str] | None
) -> dict[str, pd.DataFrame | Bags]:
    """Read the modalities; those that are optional and absent are left out."""
    modalities = {}
    for name, section in spec.modalities.items():
        try:
            modalities[name] = read_modality(name, tables, keep)
        except AbsentError as error:
            if section.optional is not True:
                raise
            tables.notes.append(f"modality {name!r} is left out: {error}")
    if not modalities:
        raise CohortError("modalities: all are optional, and none is there")
    return modalities


def _ids(modality: pd.DataFrame | Bags) -> tuple[str, ...]:
    return modality.patients if isinstance(modality, Bags) else tuple(map(str, modality.index))


def _align(
    modalities: dict[str, pd.DataFrame | Bags], patients: tuple[str, ...]
) -> dict[str, pd.DataFrame | Bags]:
    """Give each table one row per patient, in order; a patient without the modality gets NaN."""
    index = pd.Index(patients, dtype=object, name="patient")
    return {
        name: modality if isinstance(modality, Bags) else modality.reindex(index)
        for name, modality in modalities.items()
    }


def _check_not_empty(name: str, modality: pd.DataFrame | Bags, may_lack: Collection[str]) -> None:
    if isinstance(modality, Bags):
        if not len(modality):
            raise CohortError(f"modalities.{name}: no patient of the outcome has it")
        return
    gaps = modality.isna()
    if gaps.to_numpy().all():
        raise CohortError(f"modalities.{name}: no patient of the outcome has it")
    empty = gaps.columns[gaps.all()].difference(list(may_lack), sort=False)
    if len(empty):
        raise CohortError(
            f"modalities.{name}: no patient has a value in {counted(map(repr, empty), 'column')}; "
            "leave it out of `columns`"
        )
