"""How good are out-of-fold predictions, and how sure can one be of it?

Risks of differently trained folds are not comparable, so every pair of patients lies within one
test part, and the pairs of all folds are pooled. Intervals come from resampling patients; the
spread over folds is not one. docs/evaluation.md explains the figures and how far to trust them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import chi2, norm
from sksurv.nonparametric import CensoringDistributionEstimator, SurvivalFunctionEstimator
from sksurv.util import Surv

from .._checks import integer
from .survival import outcome_arrays

Floats = NDArray[np.float64]

TIED_RISKS = 1e-8  # scikit-survival's tolerance
# Where fewer training patients than this are still under observation, weights 1 / G(t)^2 of Uno's c
# would exceed 25 and a handful of late events would decide it.
OBSERVED_SHARE = 0.2
BRIER_STEPS = 100
CALIBRATION_BINS = 10  # as Haider et al.


class Estimate(NamedTuple):
    """A figure with its 95 % bootstrap interval.

    Args:
        value: the figure.
        low: lower end of the interval.
        high: upper end.

    Example:
        >>> motet.Estimate(0.71, 0.65, 0.77).value
        0.71
    """

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """The difference a - b between two models, its 95 % bootstrap interval and two-sided p.

    Args:
        difference: of a less b.
        low: lower end of the interval.
        high: upper end.
        p: two-sided, for no difference.

    Example:
        >>> motet.Comparison(0.02, -0.01, 0.05, 0.2).difference
        0.02
    """

    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True, eq=False)
class SurvivalFold:
    """One test part, with what the training part of its model says.

    Args:
        times: [n], of the test patients, until event or censoring.
        events: bool or 0/1 [n], True if the event was observed.
        risks: [n], higher for an earlier event.
        train_times: [m], of the training part: the censoring distribution and the Kaplan-Meier
            reference come from there.
        train_events: bool or 0/1 [m].
        cut: the risk above which a patient is in the high-risk group, chosen on the training part
            (for example its median risk); None for no groups.
        grid: [G], rising positive times of `curves`.
        curves: [n, G], S(t | x) at the times of `grid`; in between and from S(0) = 1, linear.

    Raises:
        ValueError: shapes that differ, numbers that are not finite, negative times, no training
            event, a grid without curves, or curves that rise or leave [0, 1].

    Example:
        >>> from motet import SurvivalFold
        >>> fold = SurvivalFold([2.0, 5.0], [1, 0], [0.3, 0.1], [1.0, 4.0, 6.0], [1, 1, 0], cut=0.2)
        >>> fold.events
        array([ True, False])
    """

    times: Floats
    events: NDArray[np.bool_]
    risks: Floats
    train_times: Floats
    train_events: NDArray[np.bool_]
    cut: float | None = None
    grid: Floats | None = None
    curves: Floats | None = None

    def __post_init__(self) -> None:
        for prefix in ("", "train_"):
            times, events = outcome_arrays(
                getattr(self, f"{prefix}times"), getattr(self, f"{prefix}events")
            )
            if not len(times) or times.min() < 0:
                raise ValueError(
                    f"{prefix}times: expected times from 0, at least one, got "
                    f"{times.min() if len(times) else 'none'}"
                )
            object.__setattr__(self, f"{prefix}times", times)
            object.__setattr__(self, f"{prefix}events", events)
        if not self.train_events.any():
            raise ValueError("train_events: expected at least one event, got none")
        object.__setattr__(self, "risks", _finite("risks", self.risks, self.times.shape))
        if self.cut is not None:
            object.__setattr__(self, "cut", float(_finite("cut", self.cut, ())))
        if (self.grid is None) != (self.curves is None):
            raise ValueError("grid: expected together with curves, got one without the other")
        if self.grid is None:
            return
        grid = _finite("grid", self.grid, np.shape(self.grid))
        if grid.ndim != 1 or not len(grid) or not all(a < b for a, b in pairwise((0.0, *grid))):
            raise ValueError("grid: expected rising positive times [G], got other")
        curves = _finite("curves", self.curves, (len(self.times), len(grid)))
        # Single precision may rise by a rounding error.
        rises = np.diff(curves, axis=1, prepend=1.0).max() > 1e-6
        if rises or curves.min() < 0:
            raise ValueError("curves: expected falling probabilities in [0, 1], got other")
        object.__setattr__(self, "grid", grid)
        object.__setattr__(self, "curves", curves)

    def __len__(self) -> int:
        """Number of test patients."""
        return len(self.times)

    def uncensored(self, times: Floats) -> Floats:
        """Return G(t), the share not yet censored, by Kaplan-Meier on the training part."""
        return np.asarray(self._estimators[0].predict_proba(times))

    def kaplan_meier(self, times: Floats) -> Floats:
        """Return S(t), the share free of the event, by Kaplan-Meier on the training part."""
        return np.asarray(self._estimators[1].predict_proba(times))

    @cached_property
    def _estimators(self) -> tuple[SurvivalFunctionEstimator, SurvivalFunctionEstimator]:
        outcome = Surv.from_arrays(self.train_events, self.train_times)
        kinds = CensoringDistributionEstimator(), SurvivalFunctionEstimator()
        return kinds[0].fit(outcome), kinds[1].fit(outcome)


@dataclass(frozen=True, eq=False)
class ClassFold:
    """One test part of a classification.

    Args:
        labels: int [n], classes 0 to K - 1.
        probabilities: [n, K].

    Raises:
        ValueError: shapes that differ, labels beyond the columns, or rows that are no
            probabilities.

    Example:
        >>> from motet import ClassFold
        >>> ClassFold([0, 1], [[0.9, 0.1], [0.4, 0.6]]).probabilities.shape
        (2, 2)
    """

    labels: NDArray[np.intp]
    probabilities: Floats

    def __post_init__(self) -> None:
        labels = np.asarray(self.labels)
        shape = np.shape(self.probabilities)
        if labels.ndim != 1 or not len(labels) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"labels: expected integers [n], got {labels.dtype} {labels.shape}")
        if len(shape) != 2 or shape[0] != len(labels) or shape[1] < 2:
            raise ValueError(
                f"probabilities: expected [{len(labels)}, K], K at least 2, got {shape}"
            )
        probabilities = _finite("probabilities", self.probabilities, shape)
        if labels.min() < 0 or labels.max() >= shape[1]:
            raise ValueError(
                f"labels: expected 0 to {shape[1] - 1}, got {labels.min()} to {labels.max()}"
            )
        # Half precision sums to 1 within 1e-3.
        if probabilities.min() < 0 or np.abs(probabilities.sum(1) - 1).max() > 2e-3:
            raise ValueError("probabilities: expected rows that sum to 1, none negative, got other")
        object.__setattr__(self, "labels", labels.astype(np.intp))
        object.__setattr__(self, "probabilities", probabilities)

    def __len__(self) -> int:
        """Number of test patients."""
        return len(self.labels)


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
    unless every fold has them, and so are test and ratio where no fold has informative events in
    both risk groups.

    Args:
        folds: one per test part; a patient belongs to one only.
        tau: Uno's c counts events before it, the Brier score is integrated up to it. By default the
            last time at which in every training part more than a fifth are uncensored, by
            Kaplan-Meier.
        horizons: times of the AUC and the Brier score; by default the quartiles of the test parts'
            event times before `tau` and within the curves.
        draws: bootstrap samples.
        seed: of the draws.

    Returns:
        Plain numbers, lists and dicts, ready for JSON; docs/evaluation.md lists them.

    Raises:
        ValueError: no fold, no comparable pair, or a tau or horizon that the training parts, the
            test parts or the curves do not reach.

    Example:
        >>> from motet import SurvivalFold, evaluate_survival
        >>> times, events = [1.0, 2.0, 3.0, 4.0], [1, 1, 1, 0]
        >>> fold = SurvivalFold(times, events, [4.0, 2.0, 3.0, 1.0], times, events)
        >>> evaluate_survival([fold])["harrell_c"]["value"]
        0.8333333333333334
    """
    folds = _some(folds, SurvivalFold)
    resampling = _resampled([fold.events for fold in folds], draws, seed)
    reach = _observed_until(folds, 0.0)
    tau = _observed_until(folds, OBSERVED_SHARE) if tau is None else _time("tau", tau, reach)
    curves_end = min((fold.grid[-1] for fold in folds if fold.grid is not None), default=np.inf)
    end = float(min(tau, curves_end))
    if horizons is None:
        inside = [fold.times[fold.events & (fold.times < end)] for fold in folds]
        times = _default_horizons(np.concatenate(inside), end)
    else:
        limit = float(min(reach, curves_end))
        times = np.unique([_time("horizons", t, limit) for t in np.ravel(horizons)])
        if not len(times):
            raise ValueError("horizons: expected at least one time, got none")

    harrell = _harrell_pairs(folds)
    uno = _located(folds, lambda fold: _uno_pairs(fold, tau))
    if not _any_pair(uno):
        raise ValueError(f"tau: expected a comparable pair before it in some fold, got none: {tau}")
    found: dict[str, Any] = {
        "patients": sum(len(fold) for fold in folds),
        "events": int(sum(fold.events.sum() for fold in folds)),
        "folds": len(folds),
        "harrell_c": {
            **resampling.share(_pair_share(harrell, resampling))._asdict(),
            "per_fold": _per_fold(harrell),
        },
        "uno_c": {
            **resampling.share(_pair_share(uno, resampling))._asdict(),
            "tau": tau,
            "per_fold": _per_fold(uno),
        },
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
        Plain numbers, lists and dicts, ready for JSON: with two classes `auc` of class 1, with more
        `macro_auc`, the mean of one-versus-rest AUCs; docs/evaluation.md lists the rest.

    Raises:
        ValueError: no fold, folds of different K, or a class that no fold can tell from another.

    Example:
        >>> from motet import ClassFold, evaluate_classes
        >>> fold = ClassFold([0, 1, 1], [[0.8, 0.2], [0.4, 0.6], [0.9, 0.1]])
        >>> evaluate_classes([fold])["auc"]["value"]
        0.5
    """
    folds, classes = _class_folds(folds)
    resampling = _resampled([fold.labels for fold in folds], draws, seed)
    labels = np.concatenate([fold.labels for fold in folds])
    predicted = np.concatenate([fold.probabilities.argmax(1) for fold in folds])
    right = (predicted == labels).astype(float)
    pairs = _class_pairs(folds, classes)
    recalls = [_mean(right, resampling, labels == k) for k in range(classes)]
    found: dict[str, Any] = {"patients": len(labels), "classes": classes, "folds": len(folds)}
    auc = resampling.share(_mean_auc(pairs, resampling))._asdict()
    if classes == 2:
        found["auc"] = {**auc, "per_fold": _per_fold(pairs[0])}
    else:
        found["macro_auc"] = {
            **auc,
            "per_class": [_pair_share(of_class, resampling).value for of_class in pairs],
        }
    found["balanced_accuracy"] = resampling.share(_combined(recalls))._asdict()
    found["accuracy"] = resampling.share(_mean(right, resampling))._asdict()
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
    resampling = _resampled([fold.events for fold in a], draws, seed)
    return resampling.difference(*(_pair_share(_harrell_pairs(x), resampling) for x in (a, b)))


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
    resampling = _resampled([fold.labels for fold in a], draws, seed)
    return resampling.difference(*(_mean_auc(_class_pairs(x, classes), resampling) for x in (a, b)))


# Resampling


class _Figure(NamedTuple):
    """A figure, what each patient adds to it (its influence function), and its bootstrap draws."""

    value: float
    influence: Floats  # [n], infinitesimal jackknife: d value / d weight of the patient
    draws: Floats  # [draws]


@dataclass(frozen=True, eq=False)
class _Resampling:
    """How often each patient is drawn, with replacement, within fold and event or class."""

    counts: Floats  # [draws, n]
    fold: NDArray[np.intp]  # [n]
    stratum: NDArray[np.intp]  # [n]

    def share(self, figure: _Figure) -> Estimate:
        """Return the interval of a figure in [0, 1], widened on the logit scale to stay there."""
        shape = self._shape(figure)
        if shape is None:
            return Estimate(figure.value, figure.value, figure.value)
        ends = logit(np.clip(shape.ends, 0, 1))  # 1 may be passed by a rounding error
        low, high = expit(logit(figure.value) + (ends - logit(figure.value)) * shape.widening)
        return Estimate(figure.value, float(low), float(high))

    def number(self, figure: _Figure) -> Estimate:
        """Return the interval of a figure that has no bounds."""
        shape = self._shape(figure)
        if shape is None:
            return Estimate(figure.value, figure.value, figure.value)
        low, high = figure.value + (shape.ends - figure.value) * shape.widening
        return Estimate(figure.value, float(low), float(high))

    def difference(self, a: _Figure, b: _Figure) -> Comparison:
        """Return a - b; p is the level at which the interval begins to exclude 0."""
        figure = _combined([a, b], [1.0, -1.0])
        shape = self._shape(figure)
        if shape is None:
            p = 2 / (len(figure.draws) + 1) if figure.value else 1.0
            return Comparison(figure.value, figure.value, figure.value, p)
        widened = figure.value + (figure.draws - figure.value) * shape.widening
        level = _level(widened, 0.0) - shape.bias
        z = level / (1 + shape.acceleration * level) - shape.bias
        return Comparison(*self.number(figure), float(2 * norm.sf(abs(z))))

    def _shape(self, figure: _Figure) -> "_Shape | None":
        """Return Efron's (1987) BCa interval of the draws, None if nothing varies.

        Draws that hold the number of events fixed miss the part of the variance that comes from
        this number; the interval is widened by the ratio of the two standard errors. At a c of
        0.93 the 95 % interval covers in 92.5 % of cohorts without it, in 95.5 % with it.
        """
        held = _centred(figure.influence, self.stratum)
        free = _centred(figure.influence, self.fold)
        variance = (held**2).sum()
        if variance <= 1e-24:
            return None
        # A draw of few patients may leave no pair, and then has no value.
        draws = figure.draws[np.isfinite(figure.draws)]
        bias = _level(draws, figure.value)
        acceleration = float((held**3).sum() / (6 * variance**1.5))
        z = bias + norm.ppf([0.025, 0.975])
        levels = norm.cdf(bias + z / (1 - acceleration * z))
        widening = float(np.sqrt((free**2).sum() / variance))
        return _Shape(np.quantile(draws, levels), bias, acceleration, widening)


class _Shape(NamedTuple):
    ends: Floats
    bias: float
    acceleration: float
    widening: float


def _level(draws: Floats, at: float) -> float:
    """Return the normal quantile of the share of draws below `at`, ties one half."""
    draws = draws[np.isfinite(draws)]
    below = ((draws < at).mean() + (draws <= at).mean()) / 2
    return float(norm.ppf(np.clip(below, 1 / (len(draws) + 1), 1 - 1 / (len(draws) + 1))))


def _centred(values: Floats, groups: NDArray[np.intp]) -> Floats:
    return values - (np.bincount(groups, values) / np.bincount(groups))[groups]


def _resampled(strata: Sequence[NDArray], draws: int, seed: int) -> _Resampling:
    """Draw within each fold and each value of `strata`, one array per fold."""
    fold = np.repeat(np.arange(len(strata)), [len(values) for values in strata])
    both = np.column_stack([fold, np.concatenate(strata)])
    stratum = np.unique(both, axis=0, return_inverse=True)[1].reshape(-1)
    generator = np.random.default_rng(seed)
    counts = np.empty((integer("draws", draws), len(fold)))
    for number in range(stratum.max() + 1):
        members = np.flatnonzero(stratum == number)
        chances = np.full(len(members), 1 / len(members))
        counts[:, members] = generator.multinomial(len(members), chances, size=draws)
    return _Resampling(counts, fold, stratum)


def _combined(figures: Sequence[_Figure], weights: ArrayLike | None = None) -> _Figure:
    """Return the weighted sum of figures, by default their mean."""
    factors = np.full(len(figures), 1 / len(figures)) if weights is None else np.asarray(weights)
    value, influence, draws = (
        sum(w * part for w, part in zip(factors, parts, strict=True))
        for parts in zip(*figures, strict=True)
    )
    return _Figure(float(value), np.asarray(influence), np.asarray(draws))


def _mean(
    values: Floats, resampling: _Resampling, members: NDArray[np.bool_] | None = None
) -> _Figure:
    """Return the mean of `values` [n] over `members`, by default everyone."""
    weights = np.ones(len(values)) if members is None else members.astype(float)
    value = weights @ values / weights.sum()
    drawn = resampling.counts @ (weights * values) / (resampling.counts @ weights)
    return _Figure(float(value), weights * (values - value) / weights.sum(), drawn)


# Pairs


class _Pairs(NamedTuple):
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
) -> _Pairs:
    gap = scores[first][:, None] - scores[second]
    full = np.broadcast_to(np.asarray(weight, float), gap.shape)
    return _Pairs(first, second, full, full * np.where(np.abs(gap) <= tied, 0.5, gap > 0))


def _located(folds: Sequence[Any], of_fold: Any) -> list[_Pairs]:
    """Return the pairs of each fold, patients numbered through all folds."""
    found, start = [], 0
    for fold in folds:
        pairs: _Pairs = of_fold(fold)
        found.append(pairs._replace(first=pairs.first + start, second=pairs.second + start))
        start += len(fold)
    return found


def _any_pair(pairs: Iterable[_Pairs]) -> bool:
    return any(part.weight.any() for part in pairs)


def _pair_share(pairs: Sequence[_Pairs], resampling: _Resampling) -> _Figure:
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
    return _Figure(value, (of_right - value * of_weight) / total, drawn)


def _per_fold(pairs: Sequence[_Pairs]) -> list[float | None]:
    """Return the share rightly ordered in each fold, None where no pair is comparable."""
    return [float(p.right.sum() / p.weight.sum()) if p.weight.any() else None for p in pairs]


def _comparable(fold: SurvivalFold) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Return the patients with an event, and of whom it is known to have come first, [P, n]."""
    first = np.flatnonzero(fold.events)
    at = fold.times[first][:, None]
    return first, (at < fold.times) | ((at == fold.times) & ~fold.events)


def _harrell_pairs(folds: Sequence[SurvivalFold]) -> list[_Pairs]:
    def of_fold(fold: SurvivalFold) -> _Pairs:
        first, earlier = _comparable(fold)
        return _pairs(first, np.arange(len(fold)), earlier, fold.risks)

    pairs = _located(folds, of_fold)
    if not _any_pair(pairs):
        raise ValueError("events: expected a comparable pair in some fold, got none")
    return pairs


def _uno_pairs(fold: SurvivalFold, tau: float) -> _Pairs:
    first, earlier = _comparable(fold)
    inverse = _inverse_censoring(fold, fold.times < tau)
    return _pairs(first, np.arange(len(fold)), earlier * inverse[first][:, None] ** 2, fold.risks)


def _auc_pairs(fold: SurvivalFold, horizon: float) -> _Pairs:
    """Cases have had the event by the horizon, controls are free of it then."""
    early = fold.times <= horizon
    cases, controls = np.flatnonzero(early & fold.events), np.flatnonzero(~early)
    return _pairs(cases, controls, _inverse_censoring(fold, early)[cases][:, None], fold.risks)


def _class_pairs(folds: Sequence[ClassFold], classes: int) -> list[list[_Pairs]]:
    """Return the pairs of each class against the rest; of two classes, of class 1 alone."""

    def of_class(k: int) -> list[_Pairs]:
        def of_fold(fold: ClassFold) -> _Pairs:
            is_k = fold.labels == k
            first, second = np.flatnonzero(is_k), np.flatnonzero(~is_k)
            return _pairs(first, second, 1.0, fold.probabilities[:, k], tied=0.0)

        pairs = _located(folds, of_fold)
        if not _any_pair(pairs):
            raise ValueError(f"labels: expected class {k} beside another in some fold, got neither")
        return pairs

    return [of_class(k) for k in ((1,) if classes == 2 else range(classes))]


def _mean_auc(pairs: Sequence[Sequence[_Pairs]], resampling: _Resampling) -> _Figure:
    return _combined([_pair_share(of_class, resampling) for of_class in pairs])


# Survival


def _inverse_censoring(fold: SurvivalFold, inside: NDArray[np.bool_]) -> Floats:
    """Return 1 / G(t) of the patients with an event at a time inside, 0 of the others, [n]."""
    weights = np.zeros(len(fold))
    known = fold.events & inside
    if known.any():
        weights[known] = 1 / fold.uncensored(fold.times[known])
    return weights


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


def _auc_over_time(
    folds: Sequence[SurvivalFold], times: Floats, resampling: _Resampling
) -> dict[str, Any]:
    figures = []
    for t in times:
        pairs = _located(folds, lambda fold, t=t: _auc_pairs(fold, t))
        if not _any_pair(pairs):
            raise ValueError(
                f"horizons: expected an event by and a patient free of it at {t} in some fold, "
                "got none"
            )
        figures.append(_pair_share(pairs, resampling))
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
        "mean": resampling.share(_combined(figures, falls / falls.sum()))._asdict(),
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
    case = _inverse_censoring(fold, fold.times <= times[-1])[:, None] * (here <= times)
    free = (here > times) / fold.uncensored(times)
    return case * curves**2 + free * (1 - curves) ** 2


def _brier(
    folds: Sequence[SurvivalFold], times: Floats, end: float, resampling: _Resampling
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
    score = resampling.number(_mean(own, resampling))
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


# Checks


def _finite(name: str, values: Any, shape: tuple[int, ...]) -> Floats:
    array = np.asarray(values, float)
    if array.shape != shape:
        raise ValueError(f"{name}: expected {shape}, got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    return array


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
