"""Objectives: what a model is trained for, and what its logits mean.

An objective is fitted on the outcomes of the training patients. It determines the width of the
logits, makes the targets and the loss of a batch, and turns logits into predictions: risks and
survival curves, or probabilities of classes. For the calibration after training it has two further
methods: `match_mean` and `likelihood_loss` (see `calibration`).
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, log_softmax, logsumexp
from torch import Tensor
from torch.nn.functional import cross_entropy

from .calibration import solve_decreasing
from .losses import likelihood_of_bins, on_device_of, partial_likelihood
from .predictions import ClassPredictions, RiskScale, SurvivalPredictions, time_grid
from .survival import KaplanMeier, TimeBins, breslow_hazard, outcome_arrays, risk

Target = dict[str, Tensor]
CurveTimes = NDArray[np.float64]
"""The times [G] at which survival curves are given."""
# Largest number of iterations of `Classification.match_mean`; 20 reach 1e-9 in the usual case.
MATCH_STEPS = 1000


class _SurvivalObjective(ABC):
    """The predictions of both survival objectives."""

    @abstractmethod
    def explained(self, logits: Tensor, label: int | None = None) -> Tensor:
        """Return what explanations explain: the risk [n] of each patient, with its gradient."""

    def risk(self, logits: Tensor) -> NDArray[np.float64]:
        """Return the risks [n], higher is worse."""
        return self.explained(logits.double()).cpu().numpy()

    @abstractmethod
    def curves(self, logits: Tensor, grid: CurveTimes) -> NDArray[np.float64]:
        """Return S(t) [n, G] at the times `grid`."""

    def risk_scale(
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
    kaplan_meier: KaplanMeier | None = None
    """Kaplan-Meier's curve of the training patients; None in older files."""
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
        kaplan_meier = KaplanMeier.fit(times, events)
        return cls(time_bins, float(times.max()), weights, alpha, kaplan_meier)

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

    def explained(self, logits: Tensor, label: int | None = None) -> Tensor:
        """Return the risk [n] of each patient; `label` is not used."""
        return risk(logits)

    def curves(self, logits: Tensor, grid: CurveTimes) -> NDArray[np.float64]:
        """Return S(t) [n, G] at the times `grid`; constant after the end of the last bin.

        Within a bin the hazard is proportional to that of Kaplan-Meier's curve, so that the mean of
        the patients follows it. (Without that curve, S is linear within a bin.)
        """
        log_at_ends = -F.softplus(logits.double()).cumsum(1).cpu().numpy()
        log_at_edges = np.concatenate([np.zeros((len(log_at_ends), 1)), log_at_ends], axis=1)
        edges = self._edges
        if self.kaplan_meier is None:
            survival = np.exp(log_at_edges)
            curves = [np.interp(grid, edges, curve) for curve in survival]
            return np.asarray(curves).reshape(len(survival), len(grid))
        inside = np.clip(grid, edges[0], edges[-1])
        bins = np.clip(np.searchsorted(edges, inside, side="right") - 1, 0, self.bins.count - 1)
        start, end = edges[bins], edges[bins + 1]
        before, then, after = map(self.kaplan_meier.cumulative, (start, inside, end))
        # A bin in which Kaplan-Meier's curve has no event: its share of time in place of hazard.
        by_time = (inside - start) / (end - start)
        share = np.divide(then - before, after - before, out=by_time, where=after > before)
        at_start, at_end = log_at_edges[:, bins], log_at_edges[:, bins + 1]
        return np.exp(at_start + share * (at_end - at_start))

    @property
    def _edges(self) -> NDArray[np.float64]:
        """The edges of all bins, [K + 1]."""
        last = self.bins.edges[-1]
        end = self.end if self.end > last else last + 1.0  # the last bin must have a width
        return np.array([0.0, *self.bins.edges, end])

    def match_mean(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return offsets [K] with which the mean survival at the ends of bins is Kaplan-Meier's.

        Bin after bin: Σ_i S_{k-1}(x_i) · (1 - h_k(x_i)) = n · S_KM(k).
        """
        assert self.kaplan_meier is not None
        expected = np.exp(-self.kaplan_meier.cumulative(self._edges[1:]))
        survival, offsets = np.ones(len(logits)), []
        for column, mean in zip(logits.T, expected, strict=True):
            before = survival
            offset = solve_decreasing(
                lambda shift, column=column, mean=mean, before=before: float(
                    (before * expit(-(column + shift))).mean() - mean
                )
            )
            survival = before * expit(-(column + offset))
            offsets.append(offset)
        return np.array(offsets)

    def likelihood_loss(self, logits: NDArray[np.float64], target: Target) -> float:
        """Return the mean negative log-likelihood, without weights and with alpha 0."""
        return float(
            likelihood_of_bins(
                torch.from_numpy(logits), target["bins"], target["events"], alpha=0, weights=None
            )
        )

    def fitted(self, logits: Tensor) -> Self:
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

    kaplan_meier: KaplanMeier | None = None
    """Kaplan-Meier's curve of the training patients, needed by `fitted`."""
    times: tuple[float, ...] = ()
    """Times of the steps of the baseline, which is fitted after training."""
    hazard: tuple[float, ...] = ()
    """Cumulative baseline hazard at these times."""
    kind: ClassVar[str] = "cox"
    out_features: ClassVar[int] = 1

    @classmethod
    def fit(cls, times: ArrayLike, events: ArrayLike) -> Self:
        """Fit Kaplan-Meier's curve to the training patients."""
        return cls(KaplanMeier.fit(times, events))

    def target(self, times: ArrayLike, events: ArrayLike) -> Target:
        """Return the targets of some patients for `loss`; their values are checked here."""
        times, events = outcome_arrays(times, events)
        return {"times": torch.from_numpy(times), "events": torch.tensor(events)}

    def loss(self, logits: Tensor, target: Target) -> Tensor:
        """Return `cox_loss` without checking values, which a CUDA graph cannot do."""
        return partial_likelihood(logits.squeeze(1), target["times"], target["events"])

    def explained(self, logits: Tensor, label: int | None = None) -> Tensor:
        """Return the log hazard ratio [n] of each patient; `label` is not used."""
        return logits.squeeze(1)

    def curves(self, logits: Tensor, grid: CurveTimes) -> NDArray[np.float64]:
        """Return S(t) [n, G] at the times `grid`, exp(-H(t) exp(risk)) with the baseline H.

        All are finite: log hazard ratios beyond ±300 count as ±300.
        """
        steps = np.searchsorted(np.asarray(self.times), grid, side="right")
        cumulative = np.array([0.0, *self.hazard])[steps]
        return np.exp(-cumulative * np.exp(_limited(self.risk(logits)))[:, None])

    def match_mean(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the offset [1] with which the mean survival is Kaplan-Meier's at its middle step.

        Before there is a baseline the offset is zero: it has no influence on the likelihood.
        """
        if not self.times or self.kaplan_meier is None:
            return np.zeros(1)
        middle = len(self.times) // 2
        expected = np.exp(-self.kaplan_meier.hazard[middle])
        offset = solve_decreasing(
            lambda shift: float(
                np.exp(-self.hazard[middle] * np.exp(_limited(logits + shift))).mean() - expected
            )
        )
        return np.array([offset])

    def likelihood_loss(self, logits: NDArray[np.float64], target: Target) -> float:
        """Return the negative partial log-likelihood, divided by the number of patients."""
        return float(self.loss(torch.from_numpy(logits), target))

    def fitted(self, logits: Tensor) -> Self:
        """Return the objective with a baseline hazard, fitted to patients not trained on.

        At each step of Kaplan-Meier's curve the mean survival of these patients, with their
        calibrated logits, equals it. (Breslow's baseline needs risks of the training
        patients, whose order is too good.)
        """
        assert self.kaplan_meier is not None
        log_ratios = _limited(self.risk(logits))

        def log_baseline(survival: float) -> float:
            return solve_decreasing(
                lambda shift: float(np.exp(-np.exp(shift + log_ratios)).mean() - survival)
            )

        hazard = [np.exp(log_baseline(np.exp(-step))) for step in self.kaplan_meier.hazard]
        return replace(self, times=self.kaplan_meier.times, hazard=tuple(map(float, hazard)))

    def with_breslow(self, logits: Tensor, times: ArrayLike, events: ArrayLike) -> Self:
        """Return the objective with Breslow's baseline of patients with logits [n, 1].

        For a model that was fitted to these patients by the partial likelihood.
        """
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

    def explained(self, logits: Tensor, label: int | None = None) -> Tensor:
        """Return the risk [n] of each patient; `label` is not used."""
        return logits[:, 0]

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
    shares: tuple[float, ...] | None = None
    """Share of each class among the training patients; with weights, equal shares. None in older
    files."""
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
        shares = np.full(classes, 1 / classes) if weighted else sizes / sizes.sum()
        return cls(classes, weights, tuple(shares.tolist()))

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

    def risk_scale(self, logits: Tensor, labels: NDArray[np.int64]) -> tuple[None, None]:
        """Return None for the scale of risks and None for the times of curves: there are none."""
        return None, None

    def explained(self, logits: Tensor, label: int | None = None) -> Tensor:
        """Return the log-odds [n] of the class `label`, which must be given."""
        assert label is not None
        others = [k for k in range(self.classes) if k != label]
        return logits[:, label] - logits[:, others].logsumexp(1)

    def probabilities(self, logits: Tensor) -> NDArray[np.float64]:
        """Return [n, K]."""
        return logits.double().softmax(1).cpu().numpy()

    def predictions(
        self, ids: tuple[str, ...], logits: Tensor, grid: CurveTimes | None
    ) -> ClassPredictions:
        """Return the predictions for patients `ids` with logits [n, K]; `grid` is not used."""
        return ClassPredictions(ids, self.probabilities(logits))

    def match_mean(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return offsets [K] with which the mean probabilities are `shares`, by iteration."""
        offsets = np.zeros(self.classes)
        # By logarithms, since a class may have no probability above 0 that float64 can represent.
        wanted = np.log(np.asarray(self.shares)) + np.log(len(logits))
        for _ in range(MATCH_STEPS):
            change = wanted - logsumexp(log_softmax(logits + offsets, axis=1), axis=0)
            offsets += change
            if np.abs(change).max() < 1e-9:
                break
        return offsets - offsets.mean()

    def likelihood_loss(self, logits: NDArray[np.float64], target: Target) -> float:
        """Return the cross entropy, with the weights of the classes if there are any."""
        return float(self.loss(torch.from_numpy(logits), target))

    def fitted(self, logits: Tensor) -> Self:
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
    if fields.get("kaplan_meier") is not None:
        fields["kaplan_meier"] = KaplanMeier(
            **{k: tuple(v) for k, v in fields["kaplan_meier"].items()}
        )
    return _KINDS[config["kind"]](**fields)
