"""Parts of a cohort to train on, to stop on and to test on: by group, stratified by outcome."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._checks import integer


class Parts(NamedTuple):
    """Row numbers of one split, int64 each, no row in two of them."""

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

    Whole groups are dealt out, so that rows of one patient never part. `count * test` of 1 is
    cross-validation: every row is tested.

    Args:
        groups: [n], rows with the same value stay together.
        strata: [n] of integers or bools, kept in proportion (events, classes); a group counts by
            its largest.
        count: number of splits.
        test: share of the groups to test on.
        validation: share of the groups to stop on.
        seed: of the draw.

    Raises:
        ValueError: shares that leave nobody to train on, more than there is to test, or too few
            groups.

    Example:
        >>> from motet.fusion.splits import split
        >>> [part.test.tolist() for part in split(range(6), [0, 1] * 3, count=3, test=1 / 3)]
        [[4, 5], [0, 1], [2, 3]]
    """
    count = integer("count", count)
    _check_shares(count, test, validation)
    units, stratum = _units(groups, strata)
    size = len(stratum)
    order = _interleaved(stratum, np.random.default_rng(seed))
    cuts = [round(i * test * size) for i in range(count + 1)]
    splits = []
    for i in range(count):
        tested = order[cuts[i] : cuts[i + 1]]
        rest = np.setdiff1d(order, tested)
        held = _drawn(rest, stratum, round(validation * size), seed=(seed, i))
        trained = np.setdiff1d(rest, held)
        for name, part in (("train", trained), ("validation", held), ("test", tested)):
            if not len(part):
                raise ValueError(
                    f"groups: expected enough for {count} splits, got {size}, which leaves the "
                    f"{name} part of split {i + 1} empty"
                )
        splits.append(Parts(*(np.flatnonzero(np.isin(units, p)) for p in (trained, held, tested))))
    return splits


def carve(
    rows: NDArray[np.int64], groups: ArrayLike, strata: ArrayLike, *, share: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Take `share` of the given rows' groups out of them, for validation.

    Args:
        rows: row numbers to divide.
        groups: [n] over all rows of the cohort.
        strata: [n] likewise.
        share: of the groups among `rows`.
        seed: of the draw.

    Returns:
        The rows that stay and the rows taken.
    """
    units, stratum = _units(np.asarray(groups)[rows], np.asarray(strata)[rows])
    everyone = np.arange(len(stratum))
    held = _drawn(everyone, stratum, round(share * len(stratum)), seed=(seed,))
    taken = np.isin(units, held)
    return rows[~taken], rows[taken]


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


def _units(groups: ArrayLike, strata: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the unit of each row, numbered by first appearance of its group, and its stratum."""
    groups, strata = np.asarray(groups), np.asarray(strata).astype(np.int64)
    if groups.ndim != 1 or strata.shape != groups.shape:
        raise ValueError(f"strata: expected {groups.shape} as groups, got {strata.shape}")
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    units = rank[inverse]
    stratum = np.full(len(first), np.iinfo(np.int64).min)
    np.maximum.at(stratum, units, strata)
    return units, stratum


def _drawn(
    units: NDArray[np.int64], stratum: NDArray[np.int64], size: int, *, seed: tuple[int, ...]
) -> NDArray[np.int64]:
    order = _interleaved(stratum[units], np.random.default_rng(seed))
    return units[order[:size]]


def _interleaved(strata: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
    """Return a random order in which every stretch holds the strata in their proportions."""
    position = np.empty(len(strata))
    for stratum in np.unique(strata):
        rows = generator.permutation(np.flatnonzero(strata == stratum))
        position[rows] = (np.arange(len(rows)) + generator.random()) / len(rows)
    return np.argsort(position, kind="stable")
