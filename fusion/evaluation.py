"""Metrics of out-of-fold predictions, with intervals.

Risks from models of different folds are not comparable. So both patients of a pair are in the same
test part, and the pairs of all folds are pooled (`concordance`). Intervals come from resampling
patients (`resampling`), not from the spread over folds, which is not an interval.
docs/concepts/evaluation.md explains the figures and how far they can be trusted.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import norm
from sksurv.nonparametric import SurvivalFunctionEstimator
from sksurv.util import Surv

from .brier import class_brier, survival_brier
from .concordance import (
    Pairs,
    auc_pairs,
    class_pairs,
    concordance,
    concordance_per_fold,
    harrell_pairs,
    mean_auc,
    uno_pairs,
)
from .held_out import ClassFold, Floats, SurvivalFold
from .log_rank import stratified_log_rank
from .reliability import (
    calibration_error,
    class_calibration,
    d_calibration,
    survival_calibration,
)
from .resampling import Comparison, Resampling, combine, resample, resampled_mean

# Smallest share G(t) of uncensored training patients up to which Uno's c counts events. Below it
# the weights 1 / G(t)^2 exceed 25, and a few late events would decide the result.
OBSERVED_SHARE = 0.2


def evaluate_survival(
    folds: Sequence[SurvivalFold],
    *,
    tau: float | None = None,
    horizons: ArrayLike | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    r"""Evaluate out-of-fold survival predictions, with 95 % bootstrap intervals.

    With one fold every figure equals that of scikit-survival. With several folds, Harrell's c
    (1996), Uno's c (2011) and the cumulative/dynamic AUC (Uno 2007) pool the pairs within folds,

        c = Σ_f Σ_ij∈f w_ij [r_i > r_j] / Σ_f Σ_ij∈f w_ij,

    where ties of risk count one half. The Brier score (Graf 1999) is the mean over patients,
    D-calibration (Haider 2020) adds up the bins, and the log-rank test and the hazard ratio are
    stratified by fold. Follow-up beyond `tau` or a horizon only says that the patient was free of
    the event until then, so test times may be longer than those of the training part. Figures that
    need `cut` or `curves` are left out unless every fold has them; test and ratio also unless both
    risk groups have events while both are under observation.

    Args:
        folds: one per test part; each patient is in one fold only.
        tau: Uno's c counts events before it, the Brier score is integrated up to it. None for the
            last time at which over a fifth of every training part are uncensored (Kaplan-Meier).
        horizons: times of AUC, Brier score and calibration; None for quartiles of the event times.
        draws: bootstrap samples.
        seed: of the draws.

    Returns:
        Plain numbers, lists and dicts, ready for JSON; docs/concepts/evaluation.md lists them.

    Raises:
        ValueError: no fold, no comparable pair, or a tau or horizon beyond follow-up or curves.

    Example:
        >>> times, events = [1.0, 2.0, 3.0, 4.0], [1, 1, 1, 0]
        >>> fold = motet.SurvivalFold(times, events, [4.0, 2.0, 3.0, 1.0], times, events)
        >>> motet.evaluate_survival([fold])["harrell_c"]["value"]
        0.8333333333333334
    """
    folds = _check_folds(folds, SurvivalFold)
    resampling = resample([fold.events for fold in folds], draws, seed)
    tau, end, times = _choose_times(folds, tau, horizons)
    metrics: dict[str, Any] = {
        "patients": sum(len(fold) for fold in folds),
        "events": int(sum(fold.events.sum() for fold in folds)),
        "folds": len(folds),
        "harrell_c": _pool_pairs(harrell_pairs(folds), resampling),
        "uno_c": _pool_pairs(uno_pairs(folds, tau), resampling, tau=tau),
        "auc": _auc_over_time(folds, times, resampling),
    }
    if all(fold.curves is not None for fold in folds):
        metrics |= survival_brier(folds, times, end, resampling)
        metrics["d_calibration"] = d_calibration(folds)
        metrics["calibration"] = survival_calibration(folds, times)
    if all(fold.cut is not None for fold in folds):
        metrics["risk_groups"] = _risk_groups(folds)
    return metrics


def evaluate_classes(
    folds: Sequence[ClassFold], *, draws: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Evaluate out-of-fold class probabilities, with 95 % bootstrap intervals.

    With one fold the figures equal those of scikit-learn. With several folds, an AUC pools the
    pairs within folds; a fold counts only if it has patients of the class and of another. Balanced
    accuracy is the mean over classes of the share of patients that are predicted correctly.

    Args:
        folds: one per test part; each patient is in one fold only.
        draws: bootstrap samples.
        seed: of the draws.

    Returns:
        Plain numbers, lists and dicts, ready for JSON. Two classes have `auc`, of class 1; more
        have `macro_auc`, the mean of one-versus-rest AUCs. docs/concepts/evaluation.md lists the
        rest.

    Raises:
        ValueError: no fold, folds of different K, or a class that is nowhere beside another class.

    Example:
        >>> from motet import ClassFold, evaluate_classes
        >>> fold = ClassFold([0, 1, 1], [[0.8, 0.2], [0.4, 0.6], [0.9, 0.1]])
        >>> evaluate_classes([fold])["auc"]["value"]
        0.5
    """
    folds, classes = _check_class_folds(folds)
    resampling = resample([fold.labels for fold in folds], draws, seed)
    labels = np.concatenate([fold.labels for fold in folds])
    predicted = np.concatenate([fold.probabilities.argmax(1) for fold in folds])
    right = (predicted == labels).astype(float)
    pairs = class_pairs(folds, classes)
    recalls = [resampled_mean(right, resampling, labels == k) for k in range(classes)]
    metrics: dict[str, Any] = {"patients": len(labels), "classes": classes, "folds": len(folds)}
    if classes == 2:
        metrics["auc"] = _pool_pairs(pairs[0], resampling)
    else:
        metrics["macro_auc"] = {
            **resampling.interval_of_share(mean_auc(pairs, resampling))._asdict(),
            "per_class": [concordance(of_class, resampling).value for of_class in pairs],
        }
    metrics["balanced_accuracy"] = resampling.interval_of_share(combine(recalls))._asdict()
    metrics["accuracy"] = resampling.interval_of_share(resampled_mean(right, resampling))._asdict()
    metrics |= class_brier(folds, resampling)
    metrics["calibration"] = class_calibration(folds)
    metrics["calibration_error"] = {"value": calibration_error(metrics["calibration"])}
    return metrics


def compare_survival(
    a: Sequence[SurvivalFold], b: Sequence[SurvivalFold], *, draws: int = 1000, seed: int = 0
) -> Comparison:
    """Compare two models by Harrell's c on the same patients, resampled together.

    Args:
        a: folds of the one model.
        b: folds of the other, with the same patients in the same order.
        draws: bootstrap samples.
        seed: of the draws.

    Returns:
        c of a minus c of b.

    Raises:
        ValueError: other patients in b than in a, or no comparable pair.

    Example:
        >>> from motet import SurvivalFold, compare_survival
        >>> times, events = [1.0, 2.0, 3.0, 4.0], [1, 1, 1, 0]
        >>> fold = SurvivalFold(times, events, [4.0, 2.0, 3.0, 1.0], times, events)
        >>> compare_survival([fold], [fold])
        Comparison(difference=0.0, low=0.0, high=0.0, p=1.0)
    """
    a, b = _check_folds(a, SurvivalFold), _check_folds(b, SurvivalFold)
    _check_same_patients([(f.times, f.events) for f in a], [(f.times, f.events) for f in b])
    resampling = resample([fold.events for fold in a], draws, seed)
    return resampling.compare(*(concordance(harrell_pairs(x), resampling) for x in (a, b)))


def compare_classes(
    a: Sequence[ClassFold], b: Sequence[ClassFold], *, draws: int = 1000, seed: int = 0
) -> Comparison:
    """Compare two models by (macro) AUC on the same patients, resampled together.

    Args:
        a: folds of the one model.
        b: folds of the other, with the same patients in the same order.
        draws: bootstrap samples.
        seed: of the draws.

    Returns:
        The AUC of a minus that of b; with more than two classes, the macro AUC.

    Raises:
        ValueError: other patients or classes in b than in a, or a class that is nowhere beside
            another class.

    Example:
        >>> from motet import ClassFold, compare_classes
        >>> fold = ClassFold([0, 1, 1], [[0.8, 0.2], [0.4, 0.6], [0.9, 0.1]])
        >>> compare_classes([fold], [fold]).p
        1.0
    """
    a, classes = _check_class_folds(a)
    b, classes_of_b = _check_class_folds(b)
    if classes != classes_of_b:
        raise ValueError(f"b: expected {classes} classes as a, got {classes_of_b}")
    _check_same_patients([(f.labels,) for f in a], [(f.labels,) for f in b])
    resampling = resample([fold.labels for fold in a], draws, seed)
    return resampling.compare(*(mean_auc(class_pairs(x, classes), resampling) for x in (a, b)))


def _choose_times(
    folds: Sequence[SurvivalFold], tau: float | None, horizons: ArrayLike | None
) -> tuple[float, float, Floats]:
    """Return tau, the end of the integral of the Brier score, and the horizons."""
    reach = _find_observed_until(folds, 0.0)
    tau = (
        _find_observed_until(folds, OBSERVED_SHARE)
        if tau is None
        else _check_time("tau", tau, reach)
    )
    # Up to there the curves are known, and those of Kaplan-Meier beside them.
    known = [min(f.grid[-1], f.train_times.max()) for f in folds if f.grid is not None]
    curves_end = min(known, default=np.inf)
    end = float(min(tau, curves_end))
    if horizons is None:
        event_times = [fold.times[fold.events & (fold.times < end)] for fold in folds]
        return tau, end, _choose_horizons(np.concatenate(event_times), end)
    limit = float(min(reach, curves_end))
    times = np.unique([_check_time("horizons", t, limit) for t in np.ravel(horizons)])
    if not len(times):
        raise ValueError("horizons: expected at least one time, got none")
    return tau, end, times


def _find_observed_until(folds: Sequence[SurvivalFold], share: float) -> float:
    """Return the last time at which more than `share` are uncensored, in every fold."""

    def last_time(fold: SurvivalFold) -> float:
        times = np.unique(fold.censoring[0])
        # 0 if all are censored at once: G(0) = 1.
        return times[fold.uncensored(times) > share].max(initial=0.0)

    return float(min(last_time(fold) for fold in folds))


def _choose_horizons(events: Floats, end: float) -> Floats:
    if not len(events):
        raise ValueError(f"horizons: expected test events before {end} to choose by, got none")
    return np.unique(np.quantile(events, [0.25, 0.5, 0.75]))


def _pool_pairs(pairs: Sequence[Pairs], resampling: Resampling, **facts: float) -> dict[str, Any]:
    """Return the concordance of all pairs with its interval, and that of each fold."""
    estimate = resampling.interval_of_share(concordance(pairs, resampling))
    return {**estimate._asdict(), **facts, "per_fold": concordance_per_fold(pairs)}


def _auc_over_time(
    folds: Sequence[SurvivalFold], times: Floats, resampling: Resampling
) -> dict[str, Any]:
    figures = [concordance(auc_pairs(folds, t), resampling) for t in times]
    # As in scikit-survival, the weight of a horizon in the mean is the fall of the survival curve
    # since the horizon before. The bootstrap draws use the same weights.
    outcome = Surv.from_arrays(
        np.concatenate([fold.events for fold in folds]),
        np.concatenate([fold.times for fold in folds]),
    )
    survival = SurvivalFunctionEstimator().fit(outcome).predict_proba(times)
    falls = -np.diff(np.asarray(survival), prepend=1.0)
    estimates = [resampling.interval_of_share(figure) for figure in figures]
    return {
        "times": times.tolist(),
        "values": [estimate.value for estimate in estimates],
        "low": [estimate.low for estimate in estimates],
        "high": [estimate.high for estimate in estimates],
        "mean": resampling.interval_of_share(combine(figures, falls / falls.sum()))._asdict(),
    }


def _risk_groups(folds: Sequence[SurvivalFold]) -> dict[str, Any]:
    """Compare the patients above and below each fold's cut, stratified by fold."""
    rows, groups, sizes = [], [], np.zeros((2, 2), int)
    for fold in folds:
        assert fold.cut is not None
        high = fold.risks > fold.cut
        groups.append(high.astype(np.intp))
        for group in (0, 1):
            sizes[group] += (high == group).sum(), (fold.events & (high == group)).sum()
        event_times = np.unique(fold.times[fold.events])[:, None]
        has_event_then, risk = fold.events & (fold.times == event_times), fold.times >= event_times
        counted = has_event_then, has_event_then & high, risk, risk & high
        rows.append(np.stack([x.sum(1) for x in counted], axis=1))
    events, events_high, risk, risk_high = np.concatenate(rows).T.astype(float)
    metrics: dict[str, Any] = {
        name: {"patients": int(patients), "events": int(deaths)}
        for name, (patients, deaths) in zip(("low_risk", "high_risk"), sizes, strict=True)
    }
    # An event time carries information only if patients of both groups are at risk.
    informative = (risk_high > 0) & (risk_high < risk)
    events, events_high, risk, risk_high = (
        x[informative] for x in (events, events_high, risk, risk_high)
    )
    p = stratified_log_rank(folds, groups, 2)
    if not 0 < events_high.sum() < events.sum() or p is None:
        return metrics
    metrics["log_rank_p"] = p
    share = risk_high / risk

    def expected(log_ratio: float) -> Floats:
        return expit(logit(share) + log_ratio)

    # The log hazard ratio maximises Cox's partial likelihood with one covariate, Breslow's ties
    # and one baseline per fold: its derivative is zero there.
    log_ratio = float(
        brentq(lambda x: (events_high - events * expected(x)).sum(), -50, 50)  # pyright: ignore[reportArgumentType]
    )
    chance = expected(log_ratio)
    error = 1 / np.sqrt((events * chance * (1 - chance)).sum())
    ends = np.exp(log_ratio + norm.ppf([0.025, 0.975]) * error)
    metrics["hazard_ratio"] = dict(
        zip(("value", "low", "high"), map(float, (np.exp(log_ratio), *ends)), strict=True)
    )
    return metrics


def _check_time(name: str, value: Any, limit: float) -> float:
    time = float(value)
    if not 0 < time <= limit:
        raise ValueError(
            f"{name}: expected times up to {limit}, where every training part and curve reaches, "
            f"got {time}"
        )
    return time


def _check_folds(folds: Sequence[Any], kind: type) -> list[Any]:
    checked = list(folds)
    if not checked or not all(isinstance(fold, kind) for fold in checked):
        raise ValueError(
            f"folds: expected a list of {kind.__name__}, at least one, got "
            f"{[type(fold).__name__ for fold in checked]}"
        )
    return checked


def _check_class_folds(folds: Sequence[ClassFold]) -> tuple[list[ClassFold], int]:
    checked = _check_folds(folds, ClassFold)
    widths = {fold.probabilities.shape[1] for fold in checked}
    if len(widths) > 1:
        raise ValueError(f"folds: expected the same number of classes, got {sorted(widths)}")
    return checked, widths.pop()


def _check_same_patients(
    a: Sequence[tuple[NDArray, ...]], b: Sequence[tuple[NDArray, ...]]
) -> None:
    if len(a) != len(b):
        raise ValueError(f"b: expected {len(a)} folds as a, got {len(b)}")
    for number, (fold_a, fold_b) in enumerate(zip(a, b, strict=True)):
        if not all(np.array_equal(x, y) for x, y in zip(fold_a, fold_b, strict=True)):
            raise ValueError(f"b: expected the patients of a, got others in fold {number}")
