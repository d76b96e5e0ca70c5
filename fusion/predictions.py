"""What a model says of patients: risks and survival curves, or probabilities of classes."""

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

# Times at which survival curves are given, evenly up to the longest training follow-up.
GRID = 32


@dataclass(frozen=True)
class SurvivalPredictions:
    """Risks and survival curves of some patients.

    Args:
        ids: [n].
        risk: float64 [n], higher is worse.
        curves: float64 [n, G], S(t) at the times `grid`.
        grid: float64 [G], in the unit of the outcome.
    """

    ids: tuple[str, ...]
    risk: NDArray[np.float64]
    curves: NDArray[np.float64]
    grid: NDArray[np.float64]

    def is_finite(self) -> NDArray[np.bool_]:
        """Return whose risk is a finite number, bool [n]."""
        return np.isfinite(self.risk)


@dataclass(frozen=True)
class ClassPredictions:
    """Probabilities of classes of some patients.

    Args:
        ids: [n].
        probabilities: float64 [n, K].
    """

    ids: tuple[str, ...]
    probabilities: NDArray[np.float64]
    grid: ClassVar[None] = None
    """Probabilities are not of any time."""

    def is_finite(self) -> NDArray[np.bool_]:
        """Return whose probabilities are all finite numbers, bool [n]."""
        return np.asarray(np.isfinite(self.probabilities).all(1))


Predictions = SurvivalPredictions | ClassPredictions


@dataclass(frozen=True)
class RiskScale:
    """The risks of the training patients: their middle and spread, to place new ones among them.

    Args:
        cut: median, above which a patient counts as high risk.
        mean: mean.
        sd: standard deviation.
    """

    cut: float
    mean: float
    sd: float

    @classmethod
    def fit(cls, risks: NDArray[np.float64]) -> Self:
        """Learn from the risks [n] of the training patients."""
        return cls(float(np.median(risks)), float(risks.mean()), max(float(risks.std()), 1e-12))


def time_grid(times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the times at which curves are given, from the training follow-up."""
    return np.linspace(0.0, float(times.max()), GRID + 1)[1:]
