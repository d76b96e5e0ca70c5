"""The share of patient pairs that a score orders correctly: Harrell's c, Uno's c, AUCs.

All of these are the same statistic over different pairs: Σ w_ij [s_i > s_j] / Σ w_ij, where a pair
(i, j) has a first patient i who should have the higher score, and ties of the score count one half.
Both patients of a pair are in the same fold, since risks of different folds are not comparable.
A function per kind of pair returns `Pairs` for each fold; `concordance` computes the share.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .held_out import ClassFold, Floats, SurvivalFold
from .resampling import Resampling, Statistic, combine

TIED_RISKS = 1e-8  # scikit-survival's tolerance
AnyFold = TypeVar("AnyFold", SurvivalFold, ClassFold)


class Pairs(NamedTuple):
    """The pairs of one fold: P first patients, who should have higher scores, times Q others."""

    first: NDArray[np.intp]  # [P], row numbers of patients
    second: NDArray[np.intp]  # [Q]
    weight: Floats  # [P, Q], 0 if the two are not comparable
    right: Floats  # [P, Q], the weight if the order is correct, half of it if the scores are tied


def _make_pairs(
    first: NDArray[np.intp],
    second: NDArray[np.intp],
    weight: ArrayLike,
    scores: Floats,
    tied: float = TIED_RISKS,
) -> Pairs:
    """Return the pairs of some first and second patients; scores closer than `tied` are tied."""
    gap = scores[first][:, None] - scores[second]
    full = np.broadcast_to(np.asarray(weight, float), gap.shape)
    return Pairs(first, second, full, full * np.where(np.abs(gap) <= tied, 0.5, gap > 0))


def _pairs_of_folds(
    folds: Sequence[AnyFold], make_pairs: Callable[[AnyFold], Pairs], message: str
) -> list[Pairs]:
    """Return `make_pairs` of each fold, with patients numbered through all folds.

    Raises:
        ValueError: `message`, if no fold has a comparable pair.
    """
    pairs_of_folds, start = [], 0
    for fold in folds:
        pairs = make_pairs(fold)
        pairs_of_folds.append(
            pairs._replace(first=pairs.first + start, second=pairs.second + start)
        )
        start += len(fold)
    if not any(pairs.weight.any() for pairs in pairs_of_folds):
        raise ValueError(message)
    return pairs_of_folds


def concordance(pairs: Sequence[Pairs], resampling: Resampling) -> Statistic:
    """Return the share of the weight of all pairs whose order is correct.

    A bootstrap draw counts patient i c_i times, so pair (i, j) counts c_i · c_j times: the sums of
    a draw are c' W c, and no pairs have to be formed anew. The influence of a patient is the
    derivative of the share with respect to c_i at c = 1. The sum of weights has the derivative
    Σ_j (w_ij + w_ji), here called a move.
    """
    counts = resampling.counts
    right, weight = np.zeros((2, len(counts)))  # sums of every draw
    moves = np.zeros((2, counts.shape[1]))  # derivatives of both sums, per patient
    for fold_pairs in pairs:
        first, second = counts[:, fold_pairs.first], counts[:, fold_pairs.second]
        right += ((first @ fold_pairs.right) * second).sum(1)
        weight += ((first @ fold_pairs.weight) * second).sum(1)
        for move, values in zip(moves, (fold_pairs.right, fold_pairs.weight), strict=True):
            move[fold_pairs.first] += values.sum(1)
            move[fold_pairs.second] += values.sum(0)
    right_moves, weight_moves = moves
    total = weight_moves.sum() / 2  # each pair is in the moves of both of its patients
    value = float(right_moves.sum() / 2 / total)
    draws = np.divide(right, weight, out=np.full(len(counts), np.nan), where=weight > 0)
    return Statistic(value, (right_moves - value * weight_moves) / total, draws)


def concordance_per_fold(pairs: Sequence[Pairs]) -> list[float | None]:
    """Return the share of each fold; None for folds without a comparable pair."""
    return [float(p.right.sum() / p.weight.sum()) if p.weight.any() else None for p in pairs]


def _find_comparable(fold: SurvivalFold) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Return the patients with an event, [P], and which patients certainly have it later, [P, n].

    Later: the time is longer, or equal and censored.
    """
    first = np.flatnonzero(fold.events)
    event_times = fold.times[first][:, None]
    return first, (event_times < fold.times) | ((event_times == fold.times) & ~fold.events)


def harrell_pairs(folds: Sequence[SurvivalFold]) -> list[Pairs]:
    """Return the pairs of Harrell's c: those in which one patient certainly had the event first."""

    def make_pairs(fold: SurvivalFold) -> Pairs:
        first, is_later = _find_comparable(fold)
        return _make_pairs(first, np.arange(len(fold)), is_later, fold.risks)

    message = "events: expected a comparable pair in some fold, got none"
    return _pairs_of_folds(folds, make_pairs, message)


def uno_pairs(folds: Sequence[SurvivalFold], tau: float) -> list[Pairs]:
    """Return the pairs of Uno's c: those of Harrell's c with the event before `tau`.

    Their weight is 1 / G(t)^2, t the time of the event and G(t) the share not yet censored: it
    corrects for the pairs that censoring made incomparable.
    """

    def make_pairs(fold: SurvivalFold) -> Pairs:
        first, is_later = _find_comparable(fold)
        weight = inverse_censoring(fold, fold.times < tau)[first][:, None] ** 2
        return _make_pairs(first, np.arange(len(fold)), is_later * weight, fold.risks)

    message = f"tau: expected a comparable pair before it in some fold, got none: {tau}"
    return _pairs_of_folds(folds, make_pairs, message)


def auc_pairs(folds: Sequence[SurvivalFold], horizon: float) -> list[Pairs]:
    """Return pairs of a case (event until the horizon) and a control (no event until then)."""

    def make_pairs(fold: SurvivalFold) -> Pairs:
        early = fold.times <= horizon
        cases, controls = np.flatnonzero(early & fold.events), np.flatnonzero(~early)
        return _make_pairs(
            cases, controls, inverse_censoring(fold, early)[cases][:, None], fold.risks
        )

    message = (
        f"horizons: expected an event by and a patient free of it at {horizon} in some fold, got "
        "none"
    )
    return _pairs_of_folds(folds, make_pairs, message)


def class_pairs(folds: Sequence[ClassFold], classes: int) -> list[list[Pairs]]:
    """Return the pairs of each class against all others; if there are two, of class 1 only."""

    def make_class_pairs(k: int) -> list[Pairs]:
        def make_pairs(fold: ClassFold) -> Pairs:
            is_k = fold.labels == k
            first, second = np.flatnonzero(is_k), np.flatnonzero(~is_k)
            return _make_pairs(first, second, 1.0, fold.probabilities[:, k], tied=0.0)

        message = f"labels: expected class {k} beside another in some fold, got neither"
        return _pairs_of_folds(folds, make_pairs, message)

    return [make_class_pairs(k) for k in ((1,) if classes == 2 else range(classes))]


def mean_auc(pairs: Sequence[Sequence[Pairs]], resampling: Resampling) -> Statistic:
    """Return the mean of the AUCs of `class_pairs`, with equal weights."""
    return combine([concordance(of_class, resampling) for of_class in pairs])


def inverse_censoring(fold: SurvivalFold, in_time: NDArray[np.bool_]) -> Floats:
    """Return weights [n]: 1 / G(t) for an event of a patient in `in_time` (bool [n]), else 0."""
    weights = np.zeros(len(fold))
    weighted = fold.events & in_time
    if weighted.any():
        weights[weighted] = 1 / fold.uncensored(fold.times[weighted])
    return weights
