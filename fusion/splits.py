"""Divide a cohort into training, validation and test parts: by group, stratified by outcome."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._checks import integer


class Parts(NamedTuple):
    """The row numbers of the parts of one split, int64; no row is in two parts."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def split(
    groups: ArrayLike,
    strata: ArrayLike,
    *,
    count: int = 5,
    test: float = 0.15,
    validation: float = 0.15,
    seed: int = 0,
) -> list[Parts]:
    """Draw `count` splits whose test parts do not overlap: a patient is tested at most once.

    All rows of a group get into the same part, so the rows of a patient are never separated. If
    `count * test` is 1, this is cross-validation: every row is tested once.

    Args:
        groups: [n], rows with the same value stay together.
        strata: [n] of integers or bools (events, classes); every part has them in the same
            proportions. The stratum of a group is the largest of its rows.
        count: number of splits.
        test: share of the groups in the test part.
        validation: share of the groups in the validation part.
        seed: of the draw.

    Raises:
        ValueError: shares that leave no row to train on, test parts of more than all rows, or too
            few groups.

    Example:
        >>> from motet.fusion.splits import split
        >>> [part.test.tolist() for part in split(range(6), [0, 1] * 3, count=3, test=1 / 3)]
        [[4, 5], [0, 1], [2, 3]]
    """
    count = integer("count", count)
    _check_shares(count, test, validation)
    units, stratum = _number_groups(groups, strata)
    size = len(stratum)
    order = _interleave(stratum, np.random.default_rng(seed))
    cuts = [round(i * test * size) for i in range(count + 1)]
    splits = []
    for i in range(count):
        tested = order[cuts[i] : cuts[i + 1]]
        others = np.setdiff1d(order, tested)
        validated = _draw_units(others, stratum, round(validation * size), seed=(seed, i))
        trained = np.setdiff1d(others, validated)
        for name, members in (("train", trained), ("validation", validated), ("test", tested)):
            if not len(members):
                raise ValueError(
                    f"groups: expected enough for {count} splits, got {size}, which leaves the "
                    f"{name} part of split {i + 1} empty"
                )
        splits.append(
            Parts(*(np.flatnonzero(np.isin(units, p)) for p in (trained, validated, tested)))
        )
    return splits


def carve(
    rows: NDArray[np.int64], groups: ArrayLike, strata: ArrayLike, *, share: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw a share of the groups of some rows for validation.

    Args:
        rows: row numbers to divide.
        groups: [n], of all rows of the cohort.
        strata: [n], of all rows of the cohort.
        share: share of the groups of `rows` that is drawn.
        seed: of the draw.

    Returns:
        The rows that were not drawn, and the rows that were.
    """
    units, stratum = _number_groups(np.asarray(groups)[rows], np.asarray(strata)[rows])
    all_units = np.arange(len(stratum))
    validated = _draw_units(all_units, stratum, round(share * len(stratum)), seed=(seed,))
    is_taken = np.isin(units, validated)
    return rows[~is_taken], rows[is_taken]


def _check_shares(count: int, test: float, validation: float) -> None:
    for name, share in (("test", test), ("validation", validation)):
        if not 0 < share < 1:
            raise ValueError(f"{name}: expected a share in (0, 1), got {share}")
    if test + validation >= 1:
        raise ValueError(f"validation: expected test + validation < 1, got {test} + {validation}")
    if count * test > 1 + 1e-9:
        raise ValueError(
            f"test: expected at most 1 / {count} for {count} test parts that do not overlap, got "
            f"{test}"
        )


def _number_groups(
    groups: ArrayLike, strata: ArrayLike
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the unit of each row, and the stratum of each unit.

    A unit is the number of a group, in the order of first appearance.
    """
    groups, strata = np.asarray(groups), np.asarray(strata).astype(np.int64)
    if groups.ndim != 1 or strata.shape != groups.shape:
        raise ValueError(f"strata: expected {groups.shape} as groups, got {strata.shape}")
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    units = rank[inverse]
    stratum = np.full(len(first), np.iinfo(np.int64).min)
    np.maximum.at(stratum, units, strata)
    return units, stratum


def _draw_units(
    units: NDArray[np.int64], stratum: NDArray[np.int64], size: int, *, seed: tuple[int, ...]
) -> NDArray[np.int64]:
    order = _interleave(stratum[units], np.random.default_rng(seed))
    return units[order[:size]]


def _interleave(strata: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
    """Return a random order in which every stretch has the strata in the same proportions.

    The rows of each stratum get random, evenly spaced positions in [0, 1); all are then sorted.
    """
    position = np.empty(len(strata))
    for stratum in np.unique(strata):
        rows = generator.permutation(np.flatnonzero(strata == stratum))
        position[rows] = (np.arange(len(rows)) + generator.random()) / len(rows)
    return np.argsort(position, kind="stable")


def draw_folds(groups: ArrayLike, strata: ArrayLike, *, count: int, seed: int) -> NDArray[np.int64]:
    """Draw the folds of a cross-validation; return the fold of each row, int64 [n].

    There are fewer than `count` folds if there are fewer groups.

    Args:
        groups: [n], rows with the same value stay together.
        strata: [n] of integers or bools; every fold has them in the same proportions.
        count: number of folds.
        seed: of the draw.

    Raises:
        ValueError: fewer than two groups.
    """
    units, stratum = _number_groups(groups, strata)
    size = len(stratum)
    count = min(count, size)
    if count < 2:
        raise ValueError(f"groups: expected at least 2 for a cross-validation, got {size}")
    fold = np.empty(size, np.int64)
    fold[_interleave(stratum, np.random.default_rng(seed))] = np.arange(size) * count // size
    return fold[units]
