"""The predictions of a model: risks and survival curves, or probabilities of classes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

# Number of times of a survival curve, evenly spaced up to the longest training follow-up.
CURVE_POINTS = 32


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
        """Return bool [n], whether the risk of each patient is finite."""
        return np.isfinite(self.risk)

    def select(self, rows: NDArray[np.bool_]) -> Self:
        """Return the predictions of some patients, bool [n]."""
        ids = tuple(np.asarray(self.ids)[rows].tolist())
        return replace(self, ids=ids, risk=self.risk[rows], curves=self.curves[rows])


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
    """There are no curves, and so no times."""

    def is_finite(self) -> NDArray[np.bool_]:
        """Return bool [n], whether all probabilities of each patient are finite."""
        return np.asarray(np.isfinite(self.probabilities).all(1))

    def select(self, rows: NDArray[np.bool_]) -> Self:
        """Return the predictions of some patients, bool [n]."""
        ids = tuple(np.asarray(self.ids)[rows].tolist())
        return replace(self, ids=ids, probabilities=self.probabilities[rows])


Predictions = SurvivalPredictions | ClassPredictions


@dataclass(frozen=True)
class RiskScale:
    """The distribution of the training patients' risks, to compare new risks with.

    Args:
        cut: median; a patient above it counts as high risk.
        mean: mean.
        sd: standard deviation.
        tertiles: the two risks that divide the training patients into thirds; None for models that
            were fitted before they were recorded.
    """

    cut: float
    mean: float
    sd: float
    tertiles: tuple[float, float] | None = None

    @classmethod
    def fit(cls, risks: NDArray[np.float64]) -> Self:
        """Fit to the risks [n] of the training patients."""
        first, second = np.quantile(risks, [1 / 3, 2 / 3])
        return cls(
            float(np.median(risks)),
            float(risks.mean()),
            max(float(risks.std()), 1e-12),
            (float(first), float(second)),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build from the fields as JSON has them."""
        tertiles = config.get("tertiles")
        return cls(**{**config, "tertiles": None if tertiles is None else tuple(tertiles)})


def time_grid(times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the times [G] of the curves, from the follow-up times of the training patients."""
    return np.linspace(0.0, float(times.max()), CURVE_POINTS + 1)[1:]
