"""Brier scores, plain and scaled by the score of a reference without features."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .concordance import inverse_censoring
from .held_out import ClassFold, Floats, SurvivalFold
from .resampling import Resampling, complement_of_ratio, resampled_mean

BRIER_STEPS = 100


def survival_at(fold: SurvivalFold, times: Floats) -> Floats:
    """Return S(t | x), [n, T], at `times` [T] or [n, T]: linear from S(0) = 1 through the grid."""
    assert fold.grid is not None
    assert fold.curves is not None
    grid = np.append(0.0, fold.grid)
    curves = np.column_stack([np.ones(len(fold)), fold.curves])
    query_times = np.broadcast_to(times, (len(fold), np.shape(times)[-1]))
    right = np.clip(np.searchsorted(grid, query_times), 1, len(grid) - 1)
    fraction = (query_times - grid[right - 1]) / (grid[right] - grid[right - 1])
    before, after = (np.take_along_axis(curves, i, axis=1) for i in (right - 1, right))
    return before + fraction * (after - before)


def survival_brier(
    folds: Sequence[SurvivalFold], times: Floats, end: float, resampling: Resampling
) -> dict[str, Any]:
    """Return the Brier score at `times`, and its integral up to `end`, plain and scaled.

    The reference of the scaled score is the Kaplan-Meier curve of the training part. Both scores
    are means over the same patients, so each bootstrap draw gives a ratio of the two.
    """
    steps = np.linspace(0, end, BRIER_STEPS + 1)[1:]

    def integrated(values: Floats) -> Floats:
        return np.trapezoid(values, steps, axis=1) / (steps[-1] - steps[0])

    model, reference = (
        resampled_mean(integrated(errors), resampling) for errors in _all_errors(folds, steps)
    )
    scaled = resampling.interval_of_number(complement_of_ratio(model, reference))
    scores, reference_scores = brier_over_time(folds, times)
    return {
        "brier": {
            "times": times.tolist(),
            "values": scores.tolist(),
            "kaplan_meier": reference_scores.tolist(),
        },
        "integrated_brier": {
            **resampling.interval_of_number(model)._asdict(),
            "kaplan_meier": reference.value,
            "scaled": scaled.value,
            "start": float(steps[0]),
            "end": float(steps[-1]),
        },
        "scaled_brier": scaled._asdict(),
    }


def brier_over_time(folds: Sequence[SurvivalFold], times: Floats) -> tuple[Floats, Floats]:
    """Return the Brier score of the model and of Kaplan-Meier at rising `times`, [T] each."""
    model, reference = _all_errors(folds, times)
    return model.mean(0), reference.mean(0)


def _all_errors(folds: Sequence[SurvivalFold], times: Floats) -> tuple[Floats, Floats]:
    """Return the squared errors of all patients, [n, T], by the model and by Kaplan-Meier."""
    model = [_squared_errors(fold, times, survival_at(fold, times)) for fold in folds]
    reference = [_squared_errors(fold, times, fold.kaplan_meier(times)[None]) for fold in folds]
    return np.concatenate(model), np.concatenate(reference)


def class_brier(folds: Sequence[ClassFold], resampling: Resampling) -> dict[str, Any]:
    """Return the Brier score and, if every fold has `train_shares`, the scaled score."""

    def score(fold: ClassFold, probabilities: Floats) -> Floats:
        squares = (probabilities - np.eye(fold.probabilities.shape[1])[fold.labels]) ** 2
        # The squares of two classes are equal; that of class 1 is the usual score.
        return squares[:, 1] if squares.shape[1] == 2 else squares.sum(1)

    model = resampled_mean(
        np.concatenate([score(fold, fold.probabilities) for fold in folds]), resampling
    )
    metrics: dict[str, Any] = {"brier": resampling.interval_of_number(model)._asdict()}
    shares = [fold.train_shares for fold in folds if fold.train_shares is not None]
    if len(shares) == len(folds):
        errors = [score(fold, share[None]) for fold, share in zip(folds, shares, strict=True)]
        reference = resampled_mean(np.concatenate(errors), resampling)
        scaled = resampling.interval_of_number(complement_of_ratio(model, reference))
        metrics["brier"]["class_shares"] = reference.value
        metrics["scaled_brier"] = scaled._asdict()
    return metrics


def _squared_errors(fold: SurvivalFold, times: Floats, curves: Floats) -> Floats:
    """Return the squared errors of every patient at `times` [T], weighted by IPCW, [n, T].

    A patient with the event until t counts S(t)^2 / G(T), a patient free of it (1 - S(t))^2 / G(t),
    a patient censored before t nothing; T is the time of the event.
    """
    follow_up = fold.times[:, None]
    case = inverse_censoring(fold, fold.times <= times[-1])[:, None] * (follow_up <= times)
    free = (follow_up > times) / fold.uncensored(times)
    return case * curves**2 + free * (1 - curves) ** 2
