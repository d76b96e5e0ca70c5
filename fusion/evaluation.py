"""How good are out-of-fold predictions, and how sure can one be of it?

Risks of differently trained folds are not comparable, so every pair of patients lies within one
test part, and the pairs of all folds are pooled (`concordance`). Intervals come from resampling
patients (`resampling`); the spread over folds is not one. docs/concepts/evaluation.md explains the
figures and how far to trust them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import chi2, norm
from sksurv.nonparametric import SurvivalFunctionEstimator
from sksurv.util import Surv

from .concordance import (
    Pairs,
    auc_pairs,
    class_pairs,
    concordance,
    concordance_per_fold,
    harrell_pairs,
    inverse_censoring,
    mean_auc,
    uno_pairs,
)
from .held_out import ClassFold, Floats, SurvivalFold
from .resampling import Comparison, Resampling, combine, resample, resampled_mean

# Where fewer training patients than this are still under observation, weights 1 / G(t)^2 of Uno's c
# would exceed 25 and a handful of late events would decide it.
OBSERVED_SHARE = 0.2
BRIER_STEPS = 100
CALIBRATION_BINS = 10  # as Haider et al.


def evaluate_survival(
    folds: Sequence[SurvivalFold],
    *,
    tau: float | None = None,
    horizons: ArrayLike | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    r"""Evaluate out-of-fold survival predictions, with 95 % bootstrap intervals.

    With one fold every figure is scikit-survival's. With several, Harrell's c (1996), Uno's c
    (2011) and the cumulative/dynamic AUC (Uno 2007) pool the pairs within folds,

        c = Σ_f Σ_ij∈f w_ij [r_i > r_j] / Σ_f Σ_ij∈f w_ij,

    ties of risk one half; the Brier score (Graf 1999) is the mean over patients; D-calibration
    (Haider 2020) adds up the bins; log-rank test and hazard ratio are stratified by fold.
    Follow-up beyond `tau` or a horizon says only that the patient was free of the event until then,
    so test times may exceed the training part's. Figures that need `cut` or `curves` are absent
    unless every fold has them; test and ratio also where no fold has informative events in both
    risk groups.

    Args:
        folds: one per test part; a patient belongs to one only.
        tau: Uno's c counts events before it, the Brier score is integrated up to it. By default the
            last time when over a fifth of every training part are uncensored, by Kaplan-Meier.
        horizons: times of the AUC and the Brier score; by default the quartiles of the test parts'
            event times before `tau` and within the curves.
        draws: bootstrap samples.
        seed: of the draws.

    Returns:
        Plain numbers, lists and dicts, ready for JSON; docs/concepts/evaluation.md lists them.

    Raises:
        ValueError: no fold, no comparable pair, or a tau or horizon beyond parts or curves.

    Example:
        >>> times, events = [1.0, 2.0, 3.0, 4.0], [1, 1, 1, 0]
        >>> fold = motet.SurvivalFold(times, events, [4.0, 2.0, 3.0, 1.0], times, events)
        >>> motet.evaluate_survival([fold])["harrell_c"]["value"]
        0.8333333333333334
    """
    folds = _some(folds, SurvivalFold)
    resampling = resample([fold.events for fold in folds], draws, seed)
    tau, end, times = _chosen_times(folds, tau, horizons)
    found: dict[str, Any] = {
        "patients": sum(len(fold) for fold in folds),
        "events": int(sum(fold.events.sum() for fold in folds)),
        "folds": len(folds),
        "harrell_c": _pooled(harrell_pairs(folds), resampling),
        "uno_c": _pooled(uno_pairs(folds, tau), resampling, tau=tau),
        "auc": _auc_over_time(folds, times, resampling),
    }
    if all(fold.curves is not None for fold in folds):
        found |= _brier(folds, times, end, resampling)
        found["d_calibration"] = _d_calibration(folds)
    if all(fold.cut is not None for fold in folds):
        found["risk_groups"] = _risk_groups(folds)
    return found


def evaluate_classes(
    folds: Sequence[ClassFold], *, draws: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Evaluate out-of-fold class probabilities, with 95 % bootstrap intervals.

    With one fold the figures are scikit-learn's. With several, an AUC pools the pairs within folds;
    only folds that have the class and another count. Balanced accuracy is the mean over classes of
    the share of its patients whose most probable class it is.

    Args:
        folds: one per test part; a patient belongs to one only.
        draws: bootstrap samples.
        seed: of the draws.

    Returns:
        Plain numbers, lists and dicts, ready for JSON. Two classes have `auc`, of class 1; more
        have `macro_auc`, the mean of one-versus-rest AUCs. docs/concepts/evaluation.md lists the
        rest.

    Raises:
        ValueError: no fold, folds of different K, or a class that no fold can tell from another.

    Example:
        >>> from motet import ClassFold, evaluate_classes
        >>> fold = ClassFold([0, 1, 1], [[0.8, 0.2], [0.4, 0.6], [0.9, 0.1]])
        >>> evaluate_classes([fold])["auc"]["value"]
        0.5
    """
    folds, classes = _class_folds(folds)
    resampling = resample([fold.labels for fold in folds], draws, seed)
    labels = np.concatenate([fold.labels for fold in folds])
    predicted = np.concatenate([fold.probabilities.argmax(1) for fold in folds])
    right = (predicted == labels).astype(float)
    pairs = class_pairs(folds, classes)
    recalls = [resampled_mean(right, resampling, labels == k) for k in range(classes)]
    found: dict[str, Any] = {"patients": len(labels), "classes": classes, "folds": len(folds)}
    if classes == 2:
        found["auc"] = _pooled(pairs[0], resampling)
    else:
        found["macro_auc"] = {
            **resampling.share(mean_auc(pairs, resampling))._asdict(),
            "per_class": [concordance(of_class, resampling).value for of_class in pairs],
        }
    found["balanced_accuracy"] = resampling.share(combine(recalls))._asdict()
    found["accuracy"] = resampling.share(resampled_mean(right, resampling))._asdict()
    return found


def compare_survival(
    a: Sequence[SurvivalFold], b: Sequence[SurvivalFold], *, draws: int = 1000, seed: int = 0
) -> Comparison:
    """Compare two models by Harrell's c on the same patients, resampled together.

    Args:
        a: folds of the one model.
        b: folds of the other, same patients in the same order.
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
    a, b = _some(a, SurvivalFold), _some(b, SurvivalFold)
    _same_patients([(f.times, f.events) for f in a], [(f.times, f.events) for f in b])
    resampling = resample([fold.events for fold in a], draws, seed)
    return resampling.difference(*(concordance(harrell_pairs(x), resampling) for x in (a, b)))


def compare_classes(
    a: Sequence[ClassFold], b: Sequence[ClassFold], *, draws: int = 1000, seed: int = 0
) -> Comparison:
    """Compare two models by (macro) AUC on the same patients, resampled together.

    Args:
        a: folds of the one model.
        b: folds of the other, same patients in the same order.
        draws: bootstrap samples.
        seed: of the draws.

    Returns:
        The AUC of a minus that of b; with more than two classes, the macro AUC.

    Raises:
        ValueError: other patients or classes in b than in a, or a class that no fold can tell.

    Example:
        >>> from motet import ClassFold, compare_classes
        >>> fold = ClassFold([0, 1, 1], [[0.8, 0.2], [0.4, 0.6], [0.9, 0.1]])
        >>> compare_classes([fold], [fold]).p
        1.0
    """
    a, classes = _class_folds(a)
    b, others = _class_folds(b)
    if classes != others:
        raise ValueError(f"b: expected {classes} classes as a, got {others}")
    _same_patients([(f.labels,) for f in a], [(f.labels,) for f in b])
    resampling = resample([fold.labels for fold in a], draws, seed)
    return resampling.difference(*(mean_auc(class_pairs(x, classes), resampling) for x in (a, b)))


def _chosen_times(
    folds: Sequence[SurvivalFold], tau: float | None, horizons: ArrayLike | None
) -> tuple[float, float, Floats]:
    """Return tau, where the Brier score's integral ends, and the horizons, given or default."""
    reach = _observed_until(folds, 0.0)
    tau = _observed_until(folds, OBSERVED_SHARE) if tau is None else _time("tau", tau, reach)
    curves_end = min((fold.grid[-1] for fold in folds if fold.grid is not None), default=np.inf)
    end = float(min(tau, curves_end))
    if horizons is None:
        inside = [fold.times[fold.events & (fold.times < end)] for fold in folds]
        return tau, end, _default_horizons(np.concatenate(inside), end)
    limit = float(min(reach, curves_end))
    times = np.unique([_time("horizons", t, limit) for t in np.ravel(horizons)])
    if not len(times):
        raise ValueError("horizons: expected at least one time, got none")
    return tau, end, times


def _observed_until(folds: Sequence[SurvivalFold], share: float) -> float:
    """Return the last time at which in every training part more than `share` are uncensored."""

    def last(fold: SurvivalFold) -> float:
        times = np.unique(fold.train_times)
        # G(0) = 1 even where everyone is censored at once.
        return times[fold.uncensored(times) > share].max(initial=0.0)

    return float(min(last(fold) for fold in folds))


def _default_horizons(events: Floats, end: float) -> Floats:
    if not len(events):
        raise ValueError(f"horizons: expected test events before {end} to choose by, got none")
    return np.unique(np.quantile(events, [0.25, 0.5, 0.75]))


def _pooled(pairs: Sequence[Pairs], resampling: Resampling, **further: float) -> dict[str, Any]:
    """Return the share of all pairs that is ordered rightly, with its interval, and each fold's."""
    estimate = resampling.share(concordance(pairs, resampling))
    return {**estimate._asdict(), **further, "per_fold": concordance_per_fold(pairs)}


def _auc_over_time(
    folds: Sequence[SurvivalFold], times: Floats, resampling: Resampling
) -> dict[str, Any]:
    figures = [concordance(auc_pairs(folds, t), resampling) for t in times]
    # The mean weighs each horizon by the events since the one before, as scikit-survival; the
    # draws keep these weights.
    outcome = Surv.from_arrays(
        np.concatenate([fold.events for fold in folds]),
        np.concatenate([fold.times for fold in folds]),
    )
    survival = SurvivalFunctionEstimator().fit(outcome).predict_proba(times)
    falls = -np.diff(np.asarray(survival), prepend=1.0)
    estimates = [resampling.share(figure) for figure in figures]
    return {
        "times": times.tolist(),
        "values": [estimate.value for estimate in estimates],
        "low": [estimate.low for estimate in estimates],
        "high": [estimate.high for estimate in estimates],
        "mean": resampling.share(combine(figures, falls / falls.sum()))._asdict(),
    }


def _survival_at(fold: SurvivalFold, times: Floats) -> Floats:
    """Return S(t | x), [n, T], at `times` [T] or [n, T], linear from S(0) = 1 through the grid."""
    assert fold.grid is not None
    assert fold.curves is not None
    grid = np.append(0.0, fold.grid)
    curves = np.column_stack([np.ones(len(fold)), fold.curves])
    at = np.broadcast_to(times, (len(fold), np.shape(times)[-1]))
    right = np.clip(np.searchsorted(grid, at), 1, len(grid) - 1)
    part = (at - grid[right - 1]) / (grid[right] - grid[right - 1])
    before, after = (np.take_along_axis(curves, i, axis=1) for i in (right - 1, right))
    return before + part * (after - before)


def _squared_errors(fold: SurvivalFold, times: Floats, curves: Floats) -> Floats:
    """Return each patient's part of the Brier score at `times` [T], weighted by IPCW, [n, T]."""
    here = fold.times[:, None]
    case = inverse_censoring(fold, fold.times <= times[-1])[:, None] * (here <= times)
    free = (here > times) / fold.uncensored(times)
    return case * curves**2 + free * (1 - curves) ** 2


def _brier(
    folds: Sequence[SurvivalFold], times: Floats, end: float, resampling: Resampling
) -> dict[str, Any]:
    steps = np.linspace(0, end, BRIER_STEPS + 1)[1:]

    def errors(at: Floats, *, model: bool) -> Floats:
        def curves(fold: SurvivalFold) -> Floats:
            if model:
                return _survival_at(fold, at)
            return fold.kaplan_meier(at)[None]

        return np.concatenate([_squared_errors(fold, at, curves(fold)) for fold in folds])

    def integrated(values: Floats) -> Floats:
        return np.trapezoid(values, steps, axis=1) / (steps[-1] - steps[0])

    own, reference = (integrated(errors(steps, model=model)) for model in (True, False))
    score = resampling.number(resampled_mean(own, resampling))
    return {
        "brier": {
            "times": times.tolist(),
            "values": errors(times, model=True).mean(0).tolist(),
            "kaplan_meier": errors(times, model=False).mean(0).tolist(),
        },
        "integrated_brier": {
            **score._asdict(),
            "kaplan_meier": float(reference.mean()),
            "scaled": float(1 - score.value / reference.mean()),
            "start": float(steps[0]),
            "end": float(steps[-1]),
        },
    }


def _d_calibration(folds: Sequence[SurvivalFold]) -> dict[str, Any]:
    """Return Haider et al.'s (2020) test: S(T | x) of a calibrated model is uniform.

    A patient censored where S = s may have the event anywhere below: the bin of s gets its part
    below s, and the lower bins the rest, each in proportion to its width.
    """
    counts = np.zeros(CALIBRATION_BINS)
    lows = np.arange(CALIBRATION_BINS) / CALIBRATION_BINS
    for fold in folds:
        assert fold.grid is not None
        # Follow-up beyond the curves says that the patient was free of the event until their end.
        seen = np.minimum(fold.times, fold.grid[-1])
        events = fold.events & (fold.times <= fold.grid[-1])
        left = np.clip(_survival_at(fold, seen[:, None])[:, 0], 0, 1)
        index = np.minimum((left * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
        counts += np.bincount(index[events], minlength=CALIBRATION_BINS)
        below = np.maximum(left[~events], 1e-12)[:, None]  # at S = 0 all falls into the lowest bin
        counts += (np.clip(below - lows, 0, 1 / CALIBRATION_BINS) / below).sum(0)
    expected = counts.sum() / CALIBRATION_BINS
    statistic = float(((counts - expected) ** 2).sum() / expected)
    return {
        "statistic": statistic,
        "p": float(chi2.sf(statistic, CALIBRATION_BINS - 1)),
        "counts": counts.tolist(),
    }


def _risk_groups(folds: Sequence[SurvivalFold]) -> dict[str, Any]:
    """Compare the patients above and below each fold's cut, stratified by fold."""
    rows, sizes = [], np.zeros((2, 2), int)
    for fold in folds:
        assert fold.cut is not None
        high = fold.risks > fold.cut
        for group in (0, 1):
            sizes[group] += (high == group).sum(), (fold.events & (high == group)).sum()
        at = np.unique(fold.times[fold.events])[:, None]
        now, risk = fold.events & (fold.times == at), fold.times >= at
        rows.append(np.stack([x.sum(1) for x in (now, now & high, risk, risk & high)], axis=1))
    events, of_high, risk, risk_high = np.concatenate(rows).T.astype(float)
    found: dict[str, Any] = {
        name: {"patients": int(patients), "events": int(deaths)}
        for name, (patients, deaths) in zip(("low_risk", "high_risk"), sizes, strict=True)
    }
    # Only event times at which both groups are at risk say anything.
    both = (risk_high > 0) & (risk_high < risk)
    events, of_high, risk, risk_high = (x[both] for x in (events, of_high, risk, risk_high))
    share = risk_high / risk
    variance = (events * share * (1 - share) * (risk - events) / np.maximum(risk - 1, 1)).sum()
    if not 0 < of_high.sum() < events.sum() or not variance:
        return found
    surplus = (of_high - events * share).sum()
    found["log_rank_p"] = float(chi2.sf(surplus**2 / variance, df=1))

    def expected(log_ratio: float) -> Floats:
        return expit(logit(share) + log_ratio)

    # Cox's partial likelihood with one covariate, Breslow's ties, one baseline per fold.
    log_ratio = float(
        brentq(lambda x: (of_high - events * expected(x)).sum(), -50, 50)  # pyright: ignore[reportArgumentType]
    )
    chance = expected(log_ratio)
    error = 1 / np.sqrt((events * chance * (1 - chance)).sum())
    ends = np.exp(log_ratio + norm.ppf([0.025, 0.975]) * error)
    found["hazard_ratio"] = dict(
        zip(("value", "low", "high"), map(float, (np.exp(log_ratio), *ends)), strict=True)
    )
    return found


def _time(name: str, value: Any, limit: float) -> float:
    time = float(value)
    if not 0 < time <= limit:
        raise ValueError(
            f"{name}: expected times up to {limit}, where every training part and curve reaches, "
            f"got {time}"
        )
    return time


def _some(folds: Sequence[Any], kind: type) -> list[Any]:
    found = list(folds)
    if not found or not all(isinstance(fold, kind) for fold in found):
        raise ValueError(
            f"folds: expected a list of {kind.__name__}, at least one, got "
            f"{[type(fold).__name__ for fold in found]}"
        )
    return found


def _class_folds(folds: Sequence[ClassFold]) -> tuple[list[ClassFold], int]:
    found = _some(folds, ClassFold)
    widths = {fold.probabilities.shape[1] for fold in found}
    if len(widths) > 1:
        raise ValueError(f"folds: expected the same number of classes, got {sorted(widths)}")
    return found, widths.pop()


def _same_patients(a: Sequence[tuple[NDArray, ...]], b: Sequence[tuple[NDArray, ...]]) -> None:
    if len(a) != len(b):
        raise ValueError(f"b: expected {len(a)} folds as a, got {len(b)}")
    for number, (one, other) in enumerate(zip(a, b, strict=True)):
        if not all(np.array_equal(x, y) for x, y in zip(one, other, strict=True)):
            raise ValueError(f"b: expected the patients of a, got others in fold {number}")
