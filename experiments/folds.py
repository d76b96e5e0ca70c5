"""The training, validation and test patients of each fold: from split files, or drawn."""

from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from ..fusion.splits import carve, split
from ..io import Cohort, Split
from .settings import Splits
from .task import Task, task_of

PARTS = ("train", "validation", "test")


def split_cohort(cohort: Cohort, splits: Splits) -> list[Split]:
    """Return the patients of the parts of every fold, checked.

    If the cohort has split files, these are used; if they have no validation part, it is drawn from
    their training part. Otherwise the splits are drawn.

    Raises:
        ValueError: a part without events or classes, or a patient who is tested twice.
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
            cohort_split
            if cohort_split.validation
            else _add_validation(
                cohort, cohort_split, strata, splits, seed=splits.seed * 1_009 + number
            )
            for number, cohort_split in enumerate(cohort.splits)
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


def _add_validation(
    cohort: Cohort, cohort_split: Split, strata: NDArray[np.int64], splits: Splits, *, seed: int
) -> Split:
    # `splits.validation` is a share of all patients, as for drawn splits; `carve` needs a share of
    # the training part.
    share = (
        splits.validation
        * (len(cohort_split.train) + len(cohort_split.test))
        / len(cohort_split.train)
    )
    rows = rows_of(cohort, cohort_split.train)
    train_rows, validation_rows = carve(
        rows, np.asarray(cohort.groups), strata, share=share, seed=seed
    )
    ids = np.asarray(cohort.patients)
    return Split(
        tuple(ids[train_rows].tolist()), tuple(ids[validation_rows].tolist()), cohort_split.test
    )


def _check_fold(cohort: Cohort, fold: Split, task: Task) -> None:
    """Raise unless the parts are disjoint, keep groups together, and have events or classes."""
    parts = {name: getattr(fold, name) for name in PARTS}
    ids = [patient for members in parts.values() for patient in members]
    if len(set(ids)) != len(ids):
        raise ValueError("expected every patient in one part, got one in two")
    group = dict(zip(cohort.patients, cohort.groups, strict=True))
    part_of_group: dict[str, str] = {}
    for name, members in parts.items():
        for patient in members:
            if part_of_group.setdefault(group[patient], name) != name:
                raise ValueError(f"expected group {group[patient]!r} in one part")
    for name, members in parts.items():
        task.check_part(name, task.outcome(cohort, rows_of(cohort, members)))
