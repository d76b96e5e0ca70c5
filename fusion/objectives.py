"""What a model is trained for: fitted on training outcomes; makes targets, loss and predictions.

An objective knows how wide the logits are, what the loss of a batch is, and what the logits mean:
risks and survival curves, or probabilities of classes.
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
from .survival import TimeBins, outcome_arrays, risk, survival

Target = dict[str, Tensor]
Grid = NDArray[np.float64]


class _SurvivalObjective(ABC):
    """What both survival objectives make of logits."""

    @abstractmethod
    def risk(self, logits: Tensor) -> NDArray[np.float64]:
        """Return the risks [n], higher is worse."""

    @abstractmethod
    def curves(self, logits: Tensor, grid: Grid) -> NDArray[np.float64]:
        """Return S(t) [n, G] at the times `grid`."""

    def reference(
        self, logits: Tensor, times: NDArray[np.float64], events: NDArray[np.bool_]
    ) -> tuple[RiskScale, Grid]:
        """Return the scale of the training patients' risks, and the times of the curves [G]."""
        return RiskScale.fit(self.risk(logits)), time_grid(times)

    def predictions(
        self, ids: tuple[str, ...], logits: Tensor, grid: Grid | None
    ) -> SurvivalPredictions:
        """Return what the logits [n, K] say of the patients `ids`, curves at the times `grid`."""
        assert grid is not None
        return SurvivalPredictions(ids, self.risk(logits), self.curves(logits, grid), grid)


@dataclass(frozen=True)
class DiscreteSurvival(_SurvivalObjective):
    """Hazards in bins of follow-up time, by the likelihood of discrete-time survival."""

    bins: TimeBins
    end: float
    """Longest training follow-up, at which the last bin ends."""
    weights: tuple[float, ...] | None
    """Per bin, see `nll_loss`."""
    alpha: float
    kind: ClassVar[str] = "nll"

    @classmethod
    def fit(
        cls, times: ArrayLike, events: ArrayLike, *, bins: int, alpha: float, weighted: bool
    ) -> Self:
        """Cut the bins at quantiles of the uncensored training times.

        Args:
            times: [n] of the training patients.
            events: [n], likewise.
            bins: their number.
            alpha: of `nll_loss`.
            weighted: weigh each bin by the inverse of its size, as the authors do.
        """
        times, events = outcome_arrays(times, events)
        cut = TimeBins.fit(times, events, bins)
        sizes = np.bincount(cut.index(times), minlength=bins)
        weights = tuple((1.0 / np.maximum(sizes, 1)).tolist()) if weighted else None
        return cls(cut, float(times.max()), weights, alpha)

    @property
    def out_features(self) -> int:
        return self.bins.count

    def target(self, times: ArrayLike, events: ArrayLike) -> Target:
        """Return what `loss` needs of some patients."""
        times, events = outcome_arrays(times, events)
        return {"bins": torch.from_numpy(self.bins.index(times)), "events": torch.tensor(events)}

    def loss(self, logits: Tensor, target: Target) -> Tensor:
        """Return `nll_loss`; `target` checked the values of what it made."""
        weights = None if self.weights is None else on_device_of(logits, self.weights)
        return likelihood_of_bins(
            logits, target["bins"], target["events"], alpha=self.alpha, weights=weights
        )

    def risk(self, logits: Tensor) -> NDArray[np.float64]:
        """Return the risks [n], higher is worse."""
        return risk(logits.double()).cpu().numpy()

    def curves(self, logits: Tensor, grid: Grid) -> NDArray[np.float64]:
        """Return S(t) [n, G] at the times `grid`, linear within a bin, flat after the last."""
        at_edges = survival(logits.double()).cpu().numpy()
        edges = np.array([0.0, *self.bins.edges, max(self.end, self.bins.edges[-1])])
        known = np.concatenate([np.ones((len(at_edges), 1)), at_edges], axis=1)
        curves = [np.interp(grid, edges, curve) for curve in known]
        return np.asarray(curves).reshape(len(known), len(grid))

    def fitted(self, logits: Tensor, times: ArrayLike, events: ArrayLike) -> Self:
        """Return the objective after training; nothing more is learned."""
        return self

    def untrained(self) -> Self:
        """Return the objective as it was before training."""
        return self

    def described(self) -> str:
        """Return what tells it from others of its kind, for messages."""
        return f"bins at {', '.join(f'{edge:.6g}' for edge in self.bins.edges)}"


@dataclass(frozen=True)
class CoxSurvival(_SurvivalObjective):
    """One log hazard ratio per patient, by Cox's partial likelihood (Efron's form for ties)."""

    times: tuple[float, ...] = ()
    """Event times of Breslow's baseline, learned after training."""
    hazard: tuple[float, ...] = ()
    """Its cumulative hazard at these."""
    kind: ClassVar[str] = "cox"
    out_features: ClassVar[int] = 1

    def target(self, times: ArrayLike, events: ArrayLike) -> Target:
        """Return what `loss` needs of some patients."""
        times, events = outcome_arrays(times, events)
        return {"times": torch.from_numpy(times), "events": torch.tensor(events)}

    def loss(self, logits: Tensor, target: Target) -> Tensor:
        """Return `cox_loss`; `target` checked the values of what it made."""
        return partial_likelihood(logits.squeeze(1), target["times"], target["events"])

    def risk(self, logits: Tensor) -> NDArray[np.float64]:
        """Return the risks [n], log hazard ratios."""
        return logits.double().squeeze(1).cpu().numpy()

    def curves(self, logits: Tensor, grid: Grid) -> NDArray[np.float64]:
        """Return S(t) [n, G] at the times `grid`, from Breslow's baseline."""
        at = np.searchsorted(np.asarray(self.times), grid, side="right")
        cumulative = np.array([0.0, *self.hazard])[at]
        return np.exp(-cumulative * np.exp(self.risk(logits))[:, None])

    def fitted(self, logits: Tensor, times: ArrayLike, events: ArrayLike) -> Self:
        """Return the objective with Breslow's baseline of the training patients."""
        from sksurv.linear_model.coxph import BreslowEstimator

        times, events = outcome_arrays(times, events)
        baseline = BreslowEstimator().fit(self.risk(logits), events, times).cum_baseline_hazard_
        assert baseline is not None
        return replace(
            self, times=tuple(map(float, baseline.x)), hazard=tuple(map(float, baseline.y))
        )

    def untrained(self) -> Self:
        """Return the objective as it was before training, without a baseline."""
        return replace(self, times=(), hazard=())

    def described(self) -> str:
        """Return what tells it from others of its kind, for messages."""
        return self.kind


@dataclass(frozen=True)
class Classification:
    """Probabilities of classes, by cross entropy."""

    classes: int
    weights: tuple[float, ...] | None
    """Per class."""
    kind: ClassVar[str] = "cross_entropy"

    @classmethod
    def fit(cls, labels: ArrayLike, *, classes: int, weighted: bool) -> Self:
        """Weigh each class by the inverse of its size among the training patients, or not.

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
        """Return what `loss` needs of some patients.

        Raises:
            ValueError: a label that is no class: a GPU that met it would stop the process.
        """
        labels = np.asarray(labels, np.int64)
        wrong = (labels < 0) | (labels >= self.classes)
        if wrong.any():
            raise ValueError(
                f"labels: expected 0 to {self.classes - 1}, got {int(labels[wrong][0])}"
            )
        return {"labels": torch.from_numpy(labels)}

    def loss(self, logits: Tensor, target: Target) -> Tensor:
        """Return the cross entropy; `target` checked the values of what it made."""
        weights = None if self.weights is None else on_device_of(logits, self.weights)
        return cross_entropy(logits, target["labels"], weights)

    def reference(self, logits: Tensor, labels: NDArray[np.int64]) -> tuple[None, None]:
        """Return that probabilities need neither a scale of risks nor times of curves."""
        return None, None

    def probabilities(self, logits: Tensor) -> NDArray[np.float64]:
        """Return [n, K]."""
        return logits.double().softmax(1).cpu().numpy()

    def predictions(
        self, ids: tuple[str, ...], logits: Tensor, grid: Grid | None
    ) -> ClassPredictions:
        """Return what the logits [n, K] say of the patients `ids`; `grid` is not used."""
        return ClassPredictions(ids, self.probabilities(logits))

    def fitted(self, logits: Tensor, labels: ArrayLike) -> Self:
        """Return the objective after training; nothing more is learned."""
        return self

    def untrained(self) -> Self:
        """Return the objective as it was before training."""
        return self

    def described(self) -> str:
        """Return what tells it from others of its kind, for messages."""
        return self.kind


Objective = DiscreteSurvival | CoxSurvival | Classification
_KINDS: dict[str, type[Any]] = {o.kind: o for o in (DiscreteSurvival, CoxSurvival, Classification)}


def objective_to_config(objective: Objective) -> dict[str, Any]:
    """Return plain values from which `objective_from_config` builds the objective again."""
    return {"kind": objective.kind, **asdict(objective)}


def objective_from_config(config: dict[str, Any]) -> Objective:
    """Build what `objective_to_config` described."""
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in config.items()
        if key != "kind"
    }
    if "bins" in fields:
        fields["bins"] = TimeBins(tuple(fields["bins"]["edges"]))
    return _KINDS[config["kind"]](**fields)
