"""Discrete-time survival (bins, hazards, survival curves, risk) and the concordance index."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sksurv.metrics import concordance_index_censored
from sksurv.nonparametric import kaplan_meier_estimator
from torch import Tensor

from .._checks import integer


@dataclass(frozen=True)
class TimeBins:
    """Bins of follow-up time, fitted to training patients only.

    Args:
        edges: the inner edges, rising, in the unit of the times. Bin k is [edges[k-1], edges[k]);
            the first bin begins at 0, the last one has no end.

    Raises:
        ValueError: edges that do not rise.

    Example:
        >>> bins = motet.TimeBins.fit([1.0, 2.0, 3.0, 4.0, 9.0], [1, 1, 1, 1, 0])
        >>> bins.edges
        (1.75, 2.5, 3.25)
        >>> bins.index([0.5, 2.0, 30.0])
        array([0, 1, 3])
    """

    edges: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "edges", tuple(float(edge) for edge in self.edges))
        if not all(a < b for a, b in pairwise((-math.inf, *self.edges, math.inf))):
            raise ValueError(f"edges: expected rising finite numbers, got {self.edges}")

    @property
    def count(self) -> int:
        """Number of bins K."""
        return len(self.edges) + 1

    @classmethod
    def fit(cls, times: ArrayLike, events: ArrayLike, count: int = 4) -> Self:
        """Cut at the quantiles of the uncensored times.

        Args:
            times: [n] of the training patients.
            events: bool or 0/1 [n], True if the event was observed.
            count: number of bins K.

        Raises:
            ValueError: too few distinct uncensored times for `count` bins, or shapes that differ.
        """
        times, events = outcome_arrays(times, events)
        uncensored = times[events]
        count = integer("count", count)
        if len(uncensored) < count:
            raise ValueError(
                f"events: expected at least {count} events for {count} bins, got {len(uncensored)}"
            )
        edges = np.quantile(uncensored, np.arange(1, count) / count)
        if len(np.unique(edges)) != len(edges):
            raise ValueError(
                f"times: expected uncensored times distinct enough for {count} bins, got quantiles "
                f"{edges.tolist()}"
            )
        return cls(tuple(edges.tolist()))

    def index(self, times: ArrayLike) -> NDArray[np.int64]:
        """Return the bin of each time, int64 [n]."""
        values = np.asarray(times, float)
        if np.isnan(values).any():
            raise ValueError("times: expected numbers, got NaN")
        return np.searchsorted(self.edges, values, side="right").astype(np.int64)


@dataclass(frozen=True)
class KaplanMeier:
    """The Kaplan-Meier curve of the training patients, as the cumulative hazard -log S(t).

    Args:
        times: the distinct times at which an event was observed, rising.
        hazard: the cumulative hazard after each of them, rising.
    """

    times: tuple[float, ...]
    hazard: tuple[float, ...]

    @classmethod
    def fit(cls, times: ArrayLike, events: ArrayLike) -> Self:
        """Fit to times [n] and events [n] of the training patients, at least one event.

        If the last patient has the event, the curve falls to zero there, which no model predicts:
        that last step goes to half a patient's share, 1 / (2 n), instead.
        """
        values, observed = outcome_arrays(times, events)
        steps, survival = kaplan_meier_estimator(observed, values)[:2]
        falls = np.diff(survival, prepend=1.0) < 0
        hazard = -np.log(np.maximum(survival[falls], 0.5 / len(values)))
        return cls(tuple(steps[falls].tolist()), tuple(hazard.tolist()))

    def cumulative(self, times: ArrayLike) -> NDArray[np.float64]:
        """Return the cumulative hazard at `times`: linear between events, constant after the last.

        Kaplan-Meier's curve is a step function. The line through its steps is a smooth estimate.
        """
        return np.interp(np.asarray(times, float), (0.0, *self.times), (0.0, *self.hazard))


def outcome_arrays(
    times: ArrayLike, events: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return times as float64 [n] and events as bool [n] after checking them.

    Raises:
        ValueError: shapes that differ, times that are not finite, or events other than 0 and 1.
    """
    values, observed = np.asarray(times, float), np.asarray(events)
    if values.shape != observed.shape or values.ndim != 1:
        raise ValueError(
            f"events: expected the shape of times, {values.shape}, got {observed.shape}"
        )
    if not np.isfinite(values).all():
        raise ValueError("times: expected finite numbers, got NaN or infinity")
    if not np.isin(observed, (0, 1)).all():
        raise ValueError(f"events: expected 0 or 1, got {np.unique(observed)[:5]}")
    return values, observed.astype(bool)


def breslow_hazard(
    log_hazard_ratios: NDArray[np.float64], times: NDArray[np.float64], events: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return Breslow's cumulative baseline hazard: the event times [T], and its values there [T].

    At each event time it rises by the number of events, divided by Σ exp(log hazard ratio) of the
    patients at risk. These sums only add, from the last time on: with differences, large hazard
    ratios would leave sums of zero or below.

    Args:
        log_hazard_ratios: [n].
        times: [n].
        events: [n].
    """
    distinct, place = np.unique(times, return_inverse=True)
    ended = np.bincount(place, np.exp(log_hazard_ratios), len(distinct))
    at_risk = ended[::-1].cumsum()[::-1]
    count = np.bincount(place, events, len(distinct))
    has_event = count > 0
    return distinct[has_event], (count[has_event] / at_risk[has_event]).cumsum()


def hazards(logits: Tensor) -> Tensor:
    """Return sigmoid(logits), [B, K]: the probability of the event in a bin, if not earlier.

    Args:
        logits: [B, K].

    Example:
        >>> motet.hazards(torch.zeros(1, 3))
        tensor([[0.5000, 0.5000, 0.5000]])
    """
    return torch.sigmoid(logits)


def survival(logits: Tensor) -> Tensor:
    r"""Return the survival curve at the end of each bin, S_k = Π_{j<=k} (1 - h_j), [B, K].

    Args:
        logits: [B, K].

    Raises:
        ValueError: logits of another shape.

    Example:
        >>> motet.survival(torch.zeros(1, 3))
        tensor([[0.5000, 0.2500, 0.1250]])
    """
    if logits.ndim != 2:
        raise ValueError(f"logits: expected [B, K], got {tuple(logits.shape)}")
    return torch.nn.functional.logsigmoid(-logits).cumsum(1).exp()


def risk(logits: Tensor) -> Tensor:
    """Return -Σ_k S_k, [B]: higher for a higher risk, as in the papers.

    Args:
        logits: [B, K].

    Raises:
        ValueError: logits of another shape.

    Example:
        >>> motet.risk(torch.zeros(1, 3))
        tensor([-0.8750])
    """
    return -survival(logits).sum(1)


def concordance_index(times: ArrayLike, events: ArrayLike, risks: ArrayLike | Tensor) -> float:
    """Return Harrell's c, the share of comparable pairs that the risks order correctly.

    scikit-survival's `concordance_index_censored`; tied risks count one half.

    Args:
        times: [n].
        events: bool or 0/1 [n], True if the event was observed.
        risks: [n], higher for an earlier event.

    Raises:
        ValueError: no comparable pair, NaN, or shapes that differ.

    Example:
        >>> motet.concordance_index([1.0, 2.0, 3.0], [1, 1, 0], [3.0, 1.0, 2.0])
        0.6666666666666666
    """
    if isinstance(risks, Tensor):
        risks = risks.detach().double().cpu().numpy()
    values, observed = outcome_arrays(times, events)
    return float(concordance_index_censored(observed, values, np.asarray(risks, float))[0])
