"""Cross-validation among the patients to whom a baseline is fitted."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..splits import draw_folds
from .partial_likelihood import Floats, PartialLikelihood

FOLDS = 5
Outcome = tuple[NDArray[Any], ...]
"""Times and events, or labels, [n] each."""


@dataclass(frozen=True)
class FittingData:
    """The patients to whom a baseline is fitted: training and validation together.

    Args:
        x: flat features, [n, P].
        outcome: times and events, or labels.
        groups: [n]; folds keep a group together.
        seed: of the folds and of trees.
    """

    x: Floats
    outcome: Outcome
    groups: NDArray[Any]
    seed: int

    def select(self, rows: NDArray[np.bool_]) -> Self:
        """Return the patients for whom `rows` [n] is True."""
        outcome = tuple(values[rows] for values in self.outcome)
        return replace(self, x=self.x[rows], outcome=outcome, groups=self.groups[rows])

    def with_features(self, x: Floats) -> Self:
        """Return the same patients with other features."""
        return replace(self, x=x)


FitCandidates = Callable[[FittingData], Callable[[Floats], NDArray[np.float64]]]
"""Fits L candidates, and returns the function from features [n, P] to predictions [L, n, ...]."""
Score = Callable[[NDArray[np.float64], FittingData, NDArray[np.bool_]], Floats]
"""Scores [L] of predictions [L, n, ...] of all patients by candidates that were fitted without the
patients of a fold, for whom the bool [n] is True. Higher is better."""


def choose(data: FittingData, fit: FitCandidates, score: Score, what: str) -> int:
    """Return the number of the candidate with the best score, summed over the folds.

    The folds are stratified by the last array of the outcome: events, or labels.

    Args:
        data: the patients.
        fit: fits all candidates.
        score: of candidates on one fold; a candidate whose score is not finite is rejected.
        what: the candidates, for the message.

    Raises:
        ValueError: all candidates are rejected.
    """
    fold = draw_folds(data.groups, data.outcome[-1], count=FOLDS, seed=data.seed)
    total = np.zeros(1)
    for number in np.unique(fold):
        is_left_out = fold == number
        predict = fit(data.select(~is_left_out))
        total = total + score(predict(data.x), data, is_left_out)
    total = np.where(np.isfinite(total), total, -np.inf)
    if total.max() == -np.inf:
        raise ValueError(f"no {what} could be fitted: none of the {len(total)} converged")
    return int(total.argmax())


def partial_likelihood_score(
    predictors: Floats, data: FittingData, is_left_out: NDArray[np.bool_]
) -> Floats:
    """Return what a fold adds to the cross-validated partial likelihood, [L].

    That is l(β; all) - l(β; without the fold), with β fitted without the fold (Verweij & van
    Houwelingen 1993).

    Args:
        predictors: linear predictors of all patients, [L, n].
        data: all patients.
        is_left_out: the patients of the fold, [n].
    """
    kept = data.select(~is_left_out)
    everyone = PartialLikelihood.of(*data.outcome).values(predictors)
    others = PartialLikelihood.of(*kept.outcome).values(predictors[:, ~is_left_out])
    with np.errstate(invalid="ignore"):  # -inf - -inf: a candidate that did not converge
        return everyone - others


def log_likelihood_score(
    probabilities: Floats, data: FittingData, is_left_out: NDArray[np.bool_]
) -> Floats:
    """Return the log-likelihood of the patients of a fold, [L].

    Args:
        probabilities: of the classes, [L, n, K].
        data: all patients.
        is_left_out: the patients of the fold, [n].
    """
    labels = data.outcome[0][is_left_out]
    of_label = probabilities[:, is_left_out][:, np.arange(len(labels)), labels]
    return np.log(np.maximum(of_label, np.finfo(float).eps)).sum(1)
