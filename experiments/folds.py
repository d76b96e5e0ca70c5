"""Which patients each fold trains on, stops on and tests: given with the cohort, or drawn."""

from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from ..fusion.splits import carve, split
from ..io import Cohort, Split
from .settings import Splits
from .task import Task, task_of

PARTS = ("train", "validation", "test")


def split_cohort(cohort: Cohort, splits: Splits) -> list[Split]:
    """Return the patients of every fold's parts, checked.

    Splits that came with the cohort are taken; a validation part that they lack is carved out of
    their training part.

    Raises:
        ValueError: a part that cannot serve, or a patient tested twice.
    """
    task = task_of(cohort)
    strata = task.strata(cohort)
    groups, ids = np.asarray(cohort.groups), np.asarray(cohort.patients)
    if cohort.splits is None:
        folds = [
            Split(*(tuple(ids[rows].tolist()) for rows in parts))
            for parts in split(groups, strata, **asdict(splits))
        ]
    else:
        folds = [
            given
            if given.validation
            else _with_validation(cohort, given, strata, splits, seed=splits.seed * 1_009 + number)
            for number, given in enumerate(cohort.splits)
        ]
    tested: dict[str, int] = {}
    for number, fold in enumerate(folds):
        try:
            _check_fold(cohort, fold, task)
        except ValueError as error:
            raise ValueError(f"fold {number + 1}: {error}") from None
        for patient in fold.test:
            if tested.setdefault(patient, number) != number:
                raise ValueError(
                    f"fold {number + 1}: patient {patient!r} is in its test part and in that of "
                    f"fold {tested[patient] + 1}; intervals need test parts that do not overlap"
                )
    return folds


def rows_of(cohort: Cohort, ids: tuple[str, ...]) -> NDArray[np.intp]:
    """Return the row numbers of some patients in the cohort, [n]."""
    row = {patient: i for i, patient in enumerate(cohort.patients)}
    return np.array([row[patient] for patient in ids], np.intp)


def _with_validation(
    cohort: Cohort, given: Split, strata: NDArray[np.int64], splits: Splits, *, seed: int
) -> Split:
    # The share is of the whole cohort, as without split files.
    share = splits.validation * (len(given.train) + len(given.test)) / len(given.train)
    rows = rows_of(cohort, given.train)
    kept, held = carve(rows, np.asarray(cohort.groups), strata, share=share, seed=seed)
    ids = np.asarray(cohort.patients)
    return Split(tuple(ids[kept].tolist()), tuple(ids[held].tolist()), given.test)


def _check_fold(cohort: Cohort, fold: Split, task: Task) -> None:
    """Raise unless every part can serve: no one twice, no group parted, events, or classes."""
    parts = {name: getattr(fold, name) for name in PARTS}
    ids = [patient for part in parts.values() for patient in part]
    if len(set(ids)) != len(ids):
        raise ValueError("expected every patient in one part, got one in two")
    group = dict(zip(cohort.patients, cohort.groups, strict=True))
    homes: dict[str, str] = {}
    for name, part in parts.items():
        for patient in part:
            if homes.setdefault(group[patient], name) != name:
                raise ValueError(f"expected group {group[patient]!r} in one part")
    for name, part in parts.items():
        task.check_part(name, task.outcome(cohort, rows_of(cohort, part)))
