"""Share of the pairs that a score orders rightly: Harrell's c, Uno's c, AUCs; within folds only.

Each kind of pair is a function that returns `Pairs` per fold; `concordance` takes their share.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .held_out import ClassFold, Floats, SurvivalFold
from .resampling import Resampling, Statistic, combine

TIED_RISKS = 1e-8  # scikit-survival's tolerance
Fold = TypeVar("Fold", SurvivalFold, ClassFold)


class Pairs(NamedTuple):
    """Pairs of a first patient, who should have the higher score, and a second, in one fold."""

    first: NDArray[np.intp]  # [P], numbers of patients
    second: NDArray[np.intp]  # [Q]
    weight: Floats  # [P, Q], 0 if not comparable
    right: Floats  # [P, Q], weight if ordered rightly, half if tied


def _pairs(
    first: NDArray[np.intp],
    second: NDArray[np.intp],
    weight: ArrayLike,
    scores: Floats,
    tied: float = TIED_RISKS,
) -> Pairs:
    gap = scores[first][:, None] - scores[second]
    full = np.broadcast_to(np.asarray(weight, float), gap.shape)
    return Pairs(first, second, full, full * np.where(np.abs(gap) <= tied, 0.5, gap > 0))


def _pairs_of_folds(
    folds: Sequence[Fold], of_fold: Callable[[Fold], Pairs], none: str
) -> list[Pairs]:
    """Return the pairs of each fold, patients numbered through all folds; raise `none` if none."""
    found, start = [], 0
    for fold in folds:
        pairs = of_fold(fold)
        found.append(pairs._replace(first=pairs.first + start, second=pairs.second + start))
        start += len(fold)
    if not any(pairs.weight.any() for pairs in found):
        raise ValueError(none)
    return found


def concordance(pairs: Sequence[Pairs], resampling: Resampling) -> Statistic:
    """Return the share of the weight of all pairs that is ordered rightly."""
    counts = resampling.counts
    right, weight = np.zeros((2, len(counts)))
    moves = np.zeros((2, counts.shape[1]))  # of right and weight, per patient
    for part in pairs:
        first, second = counts[:, part.first], counts[:, part.second]
        right += ((first @ part.right) * second).sum(1)
        weight += ((first @ part.weight) * second).sum(1)
        for move, values in zip(moves, (part.right, part.weight), strict=True):
            move[part.first] += values.sum(1)
            move[part.second] += values.sum(0)
    of_right, of_weight = moves
    total = of_weight.sum() / 2  # each pair moves both of its patients
    value = float(of_right.sum() / 2 / total)
    drawn = np.divide(right, weight, out=np.full(len(counts), np.nan), where=weight > 0)
    return Statistic(value, (of_right - value * of_weight) / total, drawn)


def concordance_per_fold(pairs: Sequence[Pairs]) -> list[float | None]:
    """Return the share rightly ordered in each fold, None where no pair is comparable."""
    return [float(p.right.sum() / p.weight.sum()) if p.weight.any() else None for p in pairs]


def _comparable(fold: SurvivalFold) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Return the patients with an event, and of whom it is known to have come first, [P, n]."""
    first = np.flatnonzero(fold.events)
    at = fold.times[first][:, None]
    return first, (at < fold.times) | ((at == fold.times) & ~fold.events)


def harrell_pairs(folds: Sequence[SurvivalFold]) -> list[Pairs]:
    """Return the pairs of Harrell's c, of which it is known who had the event first."""

    def of_fold(fold: SurvivalFold) -> Pairs:
        first, earlier = _comparable(fold)
        return _pairs(first, np.arange(len(fold)), earlier, fold.risks)

    none = "events: expected a comparable pair in some fold, got none"
    return _pairs_of_folds(folds, of_fold, none)


def uno_pairs(folds: Sequence[SurvivalFold], tau: float) -> list[Pairs]:
    """Return the pairs of Uno's c: Harrell's with the event before tau, weighted by 1 / G(t)^2."""

    def of_fold(fold: SurvivalFold) -> Pairs:
        first, earlier = _comparable(fold)
        weight = inverse_censoring(fold, fold.times < tau)[first][:, None] ** 2
        return _pairs(first, np.arange(len(fold)), earlier * weight, fold.risks)

    none = f"tau: expected a comparable pair before it in some fold, got none: {tau}"
    return _pairs_of_folds(folds, of_fold, none)


def auc_pairs(folds: Sequence[SurvivalFold], horizon: float) -> list[Pairs]:
    """Return a case and a control each: the event by the horizon, and free of it then."""

    def of_fold(fold: SurvivalFold) -> Pairs:
        early = fold.times <= horizon
        cases, controls = np.flatnonzero(early & fold.events), np.flatnonzero(~early)
        return _pairs(cases, controls, inverse_censoring(fold, early)[cases][:, None], fold.risks)

    none = (
        f"horizons: expected an event by and a patient free of it at {horizon} in some fold, got "
        "none"
    )
    return _pairs_of_folds(folds, of_fold, none)


def class_pairs(folds: Sequence[ClassFold], classes: int) -> list[list[Pairs]]:
    """Return the pairs of each class against the rest; of two classes, of class 1 alone."""

    def of_class(k: int) -> list[Pairs]:
        def of_fold(fold: ClassFold) -> Pairs:
            is_k = fold.labels == k
            first, second = np.flatnonzero(is_k), np.flatnonzero(~is_k)
            return _pairs(first, second, 1.0, fold.probabilities[:, k], tied=0.0)

        none = f"labels: expected class {k} beside another in some fold, got neither"
        return _pairs_of_folds(folds, of_fold, none)

    return [of_class(k) for k in ((1,) if classes == 2 else range(classes))]


def mean_auc(pairs: Sequence[Sequence[Pairs]], resampling: Resampling) -> Statistic:
    """Return the mean of the AUCs of `class_pairs`, weighing classes alike."""
    return combine([concordance(of_class, resampling) for of_class in pairs])


def inverse_censoring(fold: SurvivalFold, inside: NDArray[np.bool_]) -> Floats:
    """Return 1 / G(t) of the patients with an event at a time inside, 0 of the others, [n]."""
    weights = np.zeros(len(fold))
    known = fold.events & inside
    if known.any():
        weights[known] = 1 / fold.uncensored(fold.times[known])
    return weights
