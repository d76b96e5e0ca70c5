"""Intervals and tests by bootstrap; patients are drawn within their fold and event or class.

A statistic comes with its draws and with its influence function, from which the interval takes its
acceleration and its widening (`Resampling`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit
from scipy.stats import norm

from .._checks import integer
from .held_out import Floats


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


class Statistic(NamedTuple):
    """A figure, what each patient adds to it (its influence function), and its bootstrap draws."""

    value: float
    influence: Floats  # [n], infinitesimal jackknife: d value / d weight of the patient
    draws: Floats  # [draws]


@dataclass(frozen=True, eq=False)
class Resampling:
    """How often each patient is drawn, with replacement, within fold and event or class."""

    counts: Floats  # [draws, n]
    fold: NDArray[np.intp]  # [n]
    stratum: NDArray[np.intp]  # [n]

    def share(self, figure: Statistic) -> Estimate:
        """Return the interval of a figure in [0, 1], widened on the logit scale to stay there."""
        shape = self._shape(figure)
        if shape is None:
            return Estimate(figure.value, figure.value, figure.value)
        ends = logit(np.clip(shape.ends, 0, 1))  # 1 may be passed by a rounding error
        low, high = expit(logit(figure.value) + (ends - logit(figure.value)) * shape.widening)
        return Estimate(figure.value, float(low), float(high))

    def number(self, figure: Statistic) -> Estimate:
        """Return the interval of a figure that has no bounds."""
        shape = self._shape(figure)
        if shape is None:
            return Estimate(figure.value, figure.value, figure.value)
        low, high = figure.value + (shape.ends - figure.value) * shape.widening
        return Estimate(figure.value, float(low), float(high))

    def difference(self, a: Statistic, b: Statistic) -> Comparison:
        """Return a - b; p is the level at which the interval begins to exclude 0."""
        figure = combine([a, b], [1.0, -1.0])
        shape = self._shape(figure)
        if shape is None:
            p = 2 / (len(figure.draws) + 1) if figure.value else 1.0
            return Comparison(figure.value, figure.value, figure.value, p)
        widened = figure.value + (figure.draws - figure.value) * shape.widening
        level = _level(widened, 0.0) - shape.bias
        z = level / (1 + shape.acceleration * level) - shape.bias
        return Comparison(*self.number(figure), float(2 * norm.sf(abs(z))))

    def _shape(self, figure: Statistic) -> "_Shape | None":
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


def resample(strata: Sequence[NDArray], draws: int, seed: int) -> Resampling:
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
    return Resampling(counts, fold, stratum)


def combine(figures: Sequence[Statistic], weights: ArrayLike | None = None) -> Statistic:
    """Return the weighted sum of figures, by default their mean."""
    factors = np.full(len(figures), 1 / len(figures)) if weights is None else np.asarray(weights)
    value, influence, draws = (
        sum(w * part for w, part in zip(factors, parts, strict=True))
        for parts in zip(*figures, strict=True)
    )
    return Statistic(float(value), np.asarray(influence), np.asarray(draws))


def resampled_mean(
    values: Floats, resampling: Resampling, members: NDArray[np.bool_] | None = None
) -> Statistic:
    """Return the mean of `values` [n] over `members`, by default everyone."""
    weights = np.ones(len(values)) if members is None else members.astype(float)
    value = weights @ values / weights.sum()
    drawn = resampling.counts @ (weights * values) / (resampling.counts @ weights)
    return Statistic(float(value), weights * (values - value) / weights.sum(), drawn)
