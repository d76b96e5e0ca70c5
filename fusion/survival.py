"""Discrete-time survival: bins, hazards, survival curves, risk; and the concordance index."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sksurv.metrics import concordance_index_censored
from torch import Tensor


@dataclass(frozen=True)
class TimeBins:
    """Bins of follow-up time, learned from training patients only.

    Args:
        edges: the inner edges, rising, in units of the times; bin k is [edges[k-1], edges[k]), the
            first from 0 and the last without end.

    Example:
        >>> bins = motet.TimeBins.fit([1.0, 2.0, 3.0, 4.0, 9.0], [1, 1, 1, 1, 0])
        >>> bins.edges
        (1.75, 2.5, 3.25)
        >>> bins.index([0.5, 2.0, 30.0])
        array([0, 1, 3])
    """

    edges: tuple[float, ...]

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
        times, events = np.asarray(times, float), np.asarray(events, bool)
        if times.shape != events.shape or times.ndim != 1:
            raise ValueError(
                f"events: expected the shape of times, {times.shape}, got {events.shape}"
            )
        uncensored = times[events]
        if count < 1 or len(uncensored) < count:
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
        return np.searchsorted(self.edges, np.asarray(times, float), side="right").astype(np.int64)


def hazards(logits: Tensor) -> Tensor:
    """Return the probability of the event in each bin given survival so far: sigmoid, [B, K]."""
    return torch.sigmoid(logits)


def survival(logits: Tensor) -> Tensor:
    r"""Return the survival curve at the end of each bin, S_k = Π_{j<=k} (1 - h_j), [B, K].

    Args:
        logits: [B, K].

    Example:
        >>> motet.survival(torch.zeros(1, 3))
        tensor([[0.5000, 0.2500, 0.1250]])
    """
    return torch.nn.functional.logsigmoid(-logits).cumsum(1).exp()


def risk(logits: Tensor) -> Tensor:
    """Return -Σ_k S_k, [B]: higher for a higher risk, as in the papers.

    Args:
        logits: [B, K].

    Example:
        >>> motet.risk(torch.zeros(1, 3))
        tensor([-0.8750])
    """
    return -survival(logits).sum(1)


def concordance_index(times: ArrayLike, events: ArrayLike, risks: ArrayLike | Tensor) -> float:
    """Return Harrell's c, the share of comparable pairs that the risks order rightly.

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
        risks = risks.detach().cpu().numpy()
    c = concordance_index_censored(
        np.asarray(events, bool), np.asarray(times, float), np.asarray(risks, float)
    )[0]
    return float(c)
