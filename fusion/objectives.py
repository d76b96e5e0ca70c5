"""Objectives: what a model is trained for, and what its logits mean.

An objective is fitted on the outcomes of the training patients. It determines the width of the
logits, makes the targets and the loss of a batch, and turns logits into predictions: risks and
survival curves, or probabilities of classes.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from .losses import likelihood_of_bins, on_device_of, partial_likelihood
from .predictions import ClassPredictions, RiskScale, SurvivalPredictions, time_grid
from .survival import TimeBins, breslow_hazard, outcome_arrays, risk, survival

Target = dict[str, Tensor]
CurveTimes = NDArray[np.float64]
"""The times [G] at which survival curves are given."""


class _SurvivalObjective(ABC):
    """The predictions of both survival objectives."""

    @abstractmethod
    def risk(self, logits: Tensor) -> NDArray[np.float64]:
        """Return the risks [n], higher is worse."""

    @abstractmethod
    def curves(self, logits: Tensor, grid: CurveTimes) -> NDArray[np.float64]:
        """Return S(t) [n, G] at the times `grid`."""

    def reference(
        self, logits: Tensor, times: NDArray[np.float64], events: NDArray[np.bool_]
    ) -> tuple[RiskScale, CurveTimes]:
        """Return the scale of the training patients' risks, and the times of the curves, [G]."""
        return RiskScale.fit(self.risk(logits)), time_grid(times)

    def predictions(
        self, ids: tuple[str, ...], logits: Tensor, grid: CurveTimes | None
    ) -> SurvivalPredictions:
        """Return the predictions for patients `ids` with logits [n, K]; curves at times `grid`."""
        assert grid is not None
        return SurvivalPredictions(ids, self.risk(logits), self.curves(logits, grid), grid)


@dataclass(frozen=True)
class DiscreteSurvival(_SurvivalObjective):
    """Hazards in bins of follow-up time; the loss is the discrete-time likelihood (`nll_loss`)."""

    bins: TimeBins
    end: float
    """The longest follow-up of a training patient, where the last bin ends."""
    weights: tuple[float, ...] | None
    """Weights of the bins, see `nll_loss`."""
    alpha: float
    kind: ClassVar[str] = "nll"

    @classmethod
    def fit(
        cls, times: ArrayLike, events: ArrayLike, *, bins: int, alpha: float, weighted: bool
    ) -> Self:
        """Cut the bins at quantiles of the uncensored training times.

        Args:
            times: [n], of the training patients.
            events: [n], of the training patients.
            bins: number of bins.
            alpha: of `nll_loss`.
            weighted: weight each bin by the inverse of its size, as the authors do.
        """
        times, events = outcome_arrays(times, events)
        time_bins = TimeBins.fit(times, events, bins)
        sizes = np.bincount(time_bins.index(times), minlength=bins)
        weights = tuple((1.0 / np.maximum(sizes, 1)).tolist()) if weighted else None
        return cls(time_bins, float(times.max()), weights, alpha)

    @property
    def out_features(self) -> int:
        return self.bins.count

    def target(self, times: ArrayLike, events: ArrayLike) -> Target:
        """Return the targets of some patients for `loss`; their values are checked here."""
        times, events = outcome_arrays(times, events)
        return {"bins": torch.from_numpy(self.bins.index(times)), "events": torch.tensor(events)}

    def loss(self, logits: Tensor, target: Target) -> Tensor:
        """Return `nll_loss` without checking values, which a CUDA graph cannot do."""
        weights = None if self.weights is None else on_device_of(logits, self.weights)
        return likelihood_of_bins(
            logits, target["bins"], target["events"], alpha=self.alpha, weights=weights
        )

    def risk(self, logits: Tensor) -> NDArray[np.float64]:
        """Return the risks [n], higher is worse."""
        return risk(logits.double()).cpu().numpy()

    def curves(self, logits: Tensor, grid: CurveTimes) -> NDArray[np.float64]:
        """Return S(t) [n, G] at the times `grid`: linear within a bin, constant after the last."""
        at_bin_ends = survival(logits.double()).cpu().numpy()
        edges = np.array([0.0, *self.bins.edges, max(self.end, self.bins.edges[-1])])
        at_edges = np.concatenate([np.ones((len(at_bin_ends), 1)), at_bin_ends], axis=1)
        curves = [np.interp(grid, edges, curve) for curve in at_edges]
        return np.asarray(curves).reshape(len(at_edges), len(grid))

    def fitted(self, logits: Tensor, times: ArrayLike, events: ArrayLike) -> Self:
        """Return the objective after training; there is nothing more to fit."""
        return self

    def untrained(self) -> Self:
        """Return the objective as it was before training."""
        return self

    def describe(self) -> str:
        """Return, for messages, what distinguishes it from others of its kind."""
        return f"bins at {', '.join(f'{edge:.6g}' for edge in self.bins.edges)}"


@dataclass(frozen=True)
class CoxSurvival(_SurvivalObjective):
    """One log hazard ratio per patient; the loss is Cox's partial likelihood with Efron's ties."""

    times: tuple[float, ...] = ()
    """Event times of Breslow's baseline, which is fitted after training."""
    hazard: tuple[float, ...] = ()
    """Cumulative baseline hazard at these times."""
    kind: ClassVar[str] = "cox"
    out_features: ClassVar[int] = 1

    def target(self, times: ArrayLike, events: ArrayLike) -> Target:
        """Return the targets of some patients for `loss`; their values are checked here."""
        times, events = outcome_arrays(times, events)
        return {"times": torch.from_numpy(times), "events": torch.tensor(events)}

    def loss(self, logits: Tensor, target: Target) -> Tensor:
        """Return `cox_loss` without checking values, which a CUDA graph cannot do."""
        return partial_likelihood(logits.squeeze(1), target["times"], target["events"])

    def risk(self, logits: Tensor) -> NDArray[np.float64]:
        """Return the risks [n], log hazard ratios."""
        return logits.double().squeeze(1).cpu().numpy()

    def curves(self, logits: Tensor, grid: CurveTimes) -> NDArray[np.float64]:
        """Return S(t) [n, G] at the times `grid`, from Breslow's baseline.

        All are finite: log hazard ratios beyond ±300 count as ±300.
        """
        steps = np.searchsorted(np.asarray(self.times), grid, side="right")
        cumulative = np.array([0.0, *self.hazard])[steps]
        return np.exp(-cumulative * np.exp(_limited(self.risk(logits)))[:, None])

    def fitted(self, logits: Tensor, times: ArrayLike, events: ArrayLike) -> Self:
        """Return the objective with Breslow's baseline of the training patients."""
        event_times, hazard = breslow_hazard(
            _limited(self.risk(logits)), *outcome_arrays(times, events)
        )
        return replace(self, times=tuple(event_times.tolist()), hazard=tuple(hazard.tolist()))

    def untrained(self) -> Self:
        """Return the objective as it was before training, without a baseline."""
        return replace(self, times=(), hazard=())

    def describe(self) -> str:
        """Return, for messages, what distinguishes it from others of its kind."""
        return self.kind


@dataclass(frozen=True)
class SurvivalCurves(_SurvivalObjective):
    """A risk and a survival curve per patient, of a model that is not trained by a loss.

    The logits are the risk, then S(t) at given times.
    """

    times: tuple[float, ...]
    """Times of the curves, rising and above 0."""
    kind: ClassVar[str] = "curves"

    @property
    def out_features(self) -> int:
        return 1 + len(self.times)

    def risk(self, logits: Tensor) -> NDArray[np.float64]:
        """Return the risks [n], higher is worse."""
        return logits[:, 0].double().cpu().numpy()

    def curves(self, logits: Tensor, grid: CurveTimes) -> NDArray[np.float64]:
        """Return S(t) [n, G] at the times `grid`: linear from S(0) = 1, constant after the last."""
        at_times = logits[:, 1:].double().cpu().numpy()
        curves = [np.interp(grid, [0.0, *self.times], [1.0, *curve]) for curve in at_times]
        return np.asarray(curves).reshape(len(at_times), len(grid))


@dataclass(frozen=True)
class Classification:
    """Probabilities of classes; the loss is the cross entropy."""

    classes: int
    weights: tuple[float, ...] | None
    """Weights of the classes."""
    kind: ClassVar[str] = "cross_entropy"

    @classmethod
    def fit(cls, labels: ArrayLike, *, classes: int, weighted: bool) -> Self:
        """Fit the weights of the classes, the inverse of their sizes; None if not `weighted`.

        Raises:
            ValueError: a class without a training patient.
        """
        sizes = np.bincount(np.asarray(labels, np.int64), minlength=classes)
        if not sizes.all():
            raise ValueError(
                f"labels: expected training patients of all {classes} classes, got {sizes.tolist()}"
            )
        weights = tuple((sizes.sum() / (classes * sizes)).tolist()) if weighted else None
        return cls(classes, weights)

    @property
    def out_features(self) -> int:
        return self.classes

    def target(self, labels: ArrayLike) -> Target:
        """Return the targets of some patients for `loss`; their values are checked here.

        Raises:
            ValueError: a label that is not a class; on a GPU it would abort the process.
        """
        labels = np.asarray(labels, np.int64)
        wrong = (labels < 0) | (labels >= self.classes)
        if wrong.any():
            raise ValueError(
                f"labels: expected 0 to {self.classes - 1}, got {int(labels[wrong][0])}"
            )
        return {"labels": torch.from_numpy(labels)}

    def loss(self, logits: Tensor, target: Target) -> Tensor:
        """Return the cross entropy without checking values, which a CUDA graph cannot do."""
        weights = None if self.weights is None else on_device_of(logits, self.weights)
        return cross_entropy(logits, target["labels"], weights)

    def reference(self, logits: Tensor, labels: NDArray[np.int64]) -> tuple[None, None]:
        """Return None for the scale of risks and None for the times of curves: there are none."""
        return None, None

    def probabilities(self, logits: Tensor) -> NDArray[np.float64]:
        """Return [n, K]."""
        return logits.double().softmax(1).cpu().numpy()

    def predictions(
        self, ids: tuple[str, ...], logits: Tensor, grid: CurveTimes | None
    ) -> ClassPredictions:
        """Return the predictions for patients `ids` with logits [n, K]; `grid` is not used."""
        return ClassPredictions(ids, self.probabilities(logits))

    def fitted(self, logits: Tensor, labels: ArrayLike) -> Self:
        """Return the objective after training; there is nothing more to fit."""
        return self

    def untrained(self) -> Self:
        """Return the objective as it was before training."""
        return self

    def describe(self) -> str:
        """Return, for messages, what distinguishes it from others of its kind."""
        return self.kind


Objective = DiscreteSurvival | CoxSurvival | Classification
"""What networks are trained for."""
FittedObjective = Objective | SurvivalCurves
"""What the logits of a fitted model mean."""
_KINDS: dict[str, type[Any]] = {
    o.kind: o for o in (DiscreteSurvival, CoxSurvival, SurvivalCurves, Classification)
}


def _limited(log_hazard_ratios: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return log hazard ratios within ±300, so that no product of their exponentials overflows."""
    return np.clip(log_hazard_ratios, -300.0, 300.0)


def objective_to_config(objective: FittedObjective) -> dict[str, Any]:
    """Return the objective as plain values for JSON; `objective_from_config` reads them."""
    return {"kind": objective.kind, **asdict(objective)}


def objective_from_config(config: dict[str, Any]) -> FittedObjective:
    """Build an objective from the values of `objective_to_config`."""
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in config.items()
        if key != "kind"
    }
    if "bins" in fields:
        fields["bins"] = TimeBins(tuple(fields["bins"]["edges"]))
    return _KINDS[config["kind"]](**fields)
