"""How well predicted probabilities agree with observed shares: curves, errors and a test.

Patients are divided into groups of similar predictions. A group's mean prediction is compared with
the share of its patients in whom the event, or the class, was observed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2, norm

from .brier import survival_at
from .held_out import ClassFold, Floats, SurvivalFold

CALIBRATION_BINS = 10  # as in Haider et al.
CALIBRATION_GROUPS = 5


def survival_calibration(folds: Sequence[SurvivalFold], times: Floats) -> list[dict[str, Any]]:
    """Return predicted and observed probabilities of the event until each of `times` [T].

    The observed share is 1 - S(t) by Kaplan-Meier in the group, and None if no patient of the group
    was followed until then. Its interval is Wilson's, with the number of patients that gives a
    share without censoring the same variance (Greenwood's).
    """
    follow_up, events = (
        np.concatenate([getattr(fold, name) for fold in folds]) for name in ("times", "events")
    )
    predicted = 1 - np.concatenate([survival_at(fold, times) for fold in folds])
    rows: list[dict[str, Any]] = []
    for time, probabilities in zip(times.tolist(), predicted.T, strict=True):
        for members in _group(probabilities):
            observed = _observe_until(follow_up[members], events[members], time)
            rows.append({"time": time, **_describe(probabilities[members], *observed)})
    return rows


def class_calibration(folds: Sequence[ClassFold]) -> list[dict[str, Any]]:
    """Return predicted probabilities and observed shares of each class; of two, of class 1."""
    labels, probabilities = (
        np.concatenate([getattr(fold, name) for fold in folds])
        for name in ("labels", "probabilities")
    )
    classes = probabilities.shape[1]
    rows: list[dict[str, Any]] = []
    for k in (1,) if classes == 2 else range(classes):
        for members in _group(probabilities[:, k]):
            share = float((labels[members] == k).mean())
            described = _describe(probabilities[members, k], share, len(members))
            rows.append({"class": k, **described})
    return rows


def calibration_error(rows: Sequence[dict[str, Any]]) -> float:
    """Return the mean of |predicted - observed| over the patients and classes of some groups."""
    gaps = [abs(row["predicted"] - row["observed"]) for row in rows]
    return float(np.average(gaps, weights=[row["patients"] for row in rows]))


def d_calibration(folds: Sequence[SurvivalFold]) -> dict[str, Any]:
    """Return the test of Haider et al. (2020): for a calibrated model S(T | x) is uniform.

    A patient who is censored when S = s has the event later, so at some S below s. The patient is
    divided over all bins below s, in proportion to their widths; the bin of s counts with the part
    of its width that is below s.
    """
    counts = np.zeros(CALIBRATION_BINS)
    lows = np.arange(CALIBRATION_BINS) / CALIBRATION_BINS
    for fold in folds:
        assert fold.grid is not None
        # Patients observed beyond the end of the curves count as censored at their end.
        follow_up = np.minimum(fold.times, fold.grid[-1])
        events = fold.events & (fold.times <= fold.grid[-1])
        survival = np.clip(survival_at(fold, follow_up[:, None])[:, 0], 0, 1)
        index = np.minimum((survival * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
        counts += np.bincount(index[events], minlength=CALIBRATION_BINS)
        below = np.maximum(survival[~events], 1e-12)[:, None]  # S = 0: the lowest bin
        counts += (np.clip(below - lows, 0, 1 / CALIBRATION_BINS) / below).sum(0)
    expected = counts.sum() / CALIBRATION_BINS
    statistic = float(((counts - expected) ** 2).sum() / expected)
    return {
        "statistic": statistic,
        "p": float(chi2.sf(statistic, CALIBRATION_BINS - 1)),
        "counts": counts.tolist(),
    }


def _group(predicted: Floats) -> list[NDArray[np.intp]]:
    """Return the row numbers of each group, divided at quantiles; equal values stay together."""
    inner = np.arange(1, CALIBRATION_GROUPS) / CALIBRATION_GROUPS
    group = np.searchsorted(np.quantile(predicted, inner), predicted, side="right")
    return [np.flatnonzero(group == number) for number in np.unique(group)]


def _observe_until(
    times: Floats, events: NDArray[np.bool_], end: float
) -> tuple[float | None, float]:
    """Return the share with the event until `end`, and the effective number of patients."""
    event_times = np.unique(times[events & (times <= end)])[:, None]
    at_risk = (times >= event_times).sum(1)
    ended = ((times == event_times) & events).sum(1)
    survival = float(np.prod(1 - ended / at_risk))
    if survival > 0 and times.max() < end:
        return None, 0.0
    if not 0 < survival < 1:  # Greenwood's variance is 0
        return 1 - survival, float(((times >= end) | (events & (times <= end))).sum())
    variance = survival**2 * (ended / (at_risk * (at_risk - ended))).sum()
    return 1 - survival, survival * (1 - survival) / float(variance)


def _describe(predicted: Floats, observed: float | None, effective: float) -> dict[str, Any]:
    low = high = None
    if observed is not None:
        low, high = _wilson_interval(observed, effective)
    return {
        "patients": len(predicted),
        "predicted": float(predicted.mean()),
        "observed": observed,
        "low": low,
        "high": high,
    }


def _wilson_interval(share: float, n: float) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share of n patients; it also holds for 0 and 1."""
    z2 = float(norm.ppf(0.975)) ** 2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * share * (1 - share) / n + (z2 / (2 * n)) ** 2) / (1 + z2 / n)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))
