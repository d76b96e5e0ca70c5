"""Cox's partial likelihood with Efron's ties: its value, gradient and Hessian, in float64 NumPy.

With linear predictors η, w = exp(η), the patients R at risk at an event time, and the d patients D
who have the event at that time, the term of the l-th of them (l = 0, ..., d - 1) is

    η_l - log(Σ_R w - l / d · Σ_D w).

Patients are sorted by falling time, so that R is a prefix and Σ_R a cumulative sum.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PartialLikelihood:
    """The partial likelihood of some patients; vectors are in the order of the patients.

    Args:
        order: int [n], the patients by falling time.
        ends: int [E], for each event, how many patients are at risk.
        starts: int [T], for each event time, the number of its first event among the E.
        tied: int [E], number of the event time of each event, rising.
        fractions: [E], l / d of each event.
        rows: int [E], the places in `order` of the patients with events, by event time.
    """

    order: NDArray[np.intp]
    ends: NDArray[np.intp]
    starts: NDArray[np.intp]
    tied: NDArray[np.intp]
    fractions: Floats
    rows: NDArray[np.intp]

    @classmethod
    def of(cls, times: Floats, events: NDArray[np.bool_]) -> Self:
        """Sort the patients with these times [n] and events [n]."""
        order = np.argsort(-times, kind="stable")
        sorted_times = -times[order]  # rising
        rows = np.flatnonzero(events[order])
        ends = np.searchsorted(sorted_times, sorted_times[rows], side="right")
        _, starts, tied, counts = np.unique(
            ends, return_index=True, return_inverse=True, return_counts=True
        )
        fractions = (np.arange(len(rows)) - starts[tied]) / counts[tied]
        return cls(order, ends, starts, tied, fractions, rows)

    def values(self, predictors: Floats) -> Floats:
        """Return the log partial likelihoods [L] of linear predictors [L, n].

        A predictor that is not finite, or whose exponentials underflow, has -inf.
        """
        eta = predictors[:, self.order]
        if not len(self.rows):
            return np.where(np.isfinite(eta).all(1), 0.0, -np.inf)
        with np.errstate(all="ignore"):  # what is not finite becomes -inf
            eta = eta - eta.max(1, keepdims=True)
            logs = np.log(self._denominators(np.exp(eta)))
            values = eta[:, self.rows].sum(1) - logs.sum(1)
        return np.where(np.isfinite(values), values, -np.inf)

    def derivatives(self, predictor: Floats) -> "Derivatives":
        """Return gradient and curvature at a finite linear predictor [n]."""
        weights = np.exp(predictor[self.order] - predictor.max())
        denominators = self._denominators(weights[None])[0]
        expected = np.zeros(len(weights))
        if len(self.rows):
            # Σ 1 / denominator over the events at which a patient is at risk.
            at_end = np.bincount(self.ends - 1, 1 / denominators, len(weights))
            expected = at_end[::-1].cumsum()[::-1]
            tied = np.add.reduceat(self.fractions / denominators, self.starts)
            expected[self.rows] -= tied[self.tied]
        expected *= weights
        gradient = np.empty(len(weights))
        gradient[self.order] = np.bincount(self.rows, minlength=len(weights)) - expected
        return Derivatives(self, gradient, weights, denominators, expected)

    def _denominators(self, weights: Floats) -> Floats:
        """Return Σ_R w - l / d · Σ_D w of each event, [L, E], of sorted weights [L, n]."""
        at_risk = weights.cumsum(1)[:, self.ends - 1]
        tied = np.add.reduceat(weights[:, self.rows], self.starts, axis=1)[:, self.tied]
        return at_risk - self.fractions * tied


@dataclass(frozen=True)
class Derivatives:
    """The derivatives of the log partial likelihood with respect to the linear predictor.

    Args:
        likelihood: of the patients.
        gradient: [n].
        weights: exp(η), [n], sorted.
        denominators: [E].
        expected: Σ over events of the weight of each patient among those at risk, [n], sorted.
    """

    likelihood: PartialLikelihood
    gradient: Floats
    weights: Floats
    denominators: Floats
    expected: Floats

    def information(self, z: Floats) -> Floats:
        """Return the negative Hessian [r, r] with respect to coefficients of features z [n, r].

        With p the weights of the patients at an event, it is zᵀ (diag(Σ p) - Σ p pᵀ) z: two
        products of matrices.
        """
        of, z = self.likelihood, z[self.likelihood.order]
        root = np.sqrt(self.expected)[:, None] * z
        information = root.T @ root
        if len(of.rows):
            weighted = self.weights[:, None] * z
            tied = np.add.reduceat(weighted[of.rows], of.starts)[of.tied]
            means = weighted.cumsum(0)[of.ends - 1] - of.fractions[:, None] * tied
            means /= self.denominators[:, None]
            information -= means.T @ means
        return information
