"""Predictions and outcomes of one test part: the input of an evaluation, one per fold."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sksurv.nonparametric import CensoringDistributionEstimator, SurvivalFunctionEstimator
from sksurv.util import Surv

from .survival import outcome_arrays

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SurvivalFold:
    """One test part, with the outcomes of the training part of its model.

    Args:
        times: [n], of the test patients, until the event or censoring.
        events: bool or 0/1 [n], True if the event was observed.
        risks: [n], higher for an earlier event.
        train_times: [m], of the training part; from it come the Kaplan-Meier reference and, by
            default, the censoring distribution.
        train_events: bool or 0/1 [m].
        cut: patients with a higher risk form the high-risk group; chosen on the training part, for
            example its median risk. None for no groups.
        grid: [G], the times of `curves`, rising and positive.
        curves: [n, G], S(t | x) at the times of `grid`; linear in between, from S(0) = 1.
        censoring_times: [q], of the patients from whom the censoring distribution is estimated.
            None for the training part, which is right if it was followed up as the test part was.
        censoring_events: bool or 0/1 [q].

    Raises:
        ValueError: shapes that differ, numbers that are not finite, negative times, no training
            event, a grid without curves, censoring times without events, or curves that rise or
            leave [0, 1].

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
    censoring_times: Floats | None = None
    censoring_events: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        if (self.censoring_times is None) != (self.censoring_events is None):
            raise ValueError("censoring_times: expected together with censoring_events, got one")
        prefixes = ("", "train_") if self.censoring_times is None else ("", "train_", "censoring_")
        for prefix in prefixes:
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
        object.__setattr__(self, "risks", _check_finite("risks", self.risks, self.times.shape))
        if self.cut is not None:
            object.__setattr__(self, "cut", float(_check_finite("cut", self.cut, ())))
        if (self.grid is None) != (self.curves is None):
            raise ValueError("grid: expected together with curves, got one without the other")
        if self.grid is None:
            return
        grid = _check_finite("grid", self.grid, np.shape(self.grid))
        if grid.ndim != 1 or not len(grid) or not all(a < b for a, b in pairwise((0.0, *grid))):
            raise ValueError("grid: expected rising positive times [G], got other")
        curves = _check_finite("curves", self.curves, (len(self.times), len(grid)))
        # In single precision a curve may rise by a rounding error.
        rises = np.diff(curves, axis=1, prepend=1.0).max() > 1e-6
        if rises or curves.min() < 0:
            raise ValueError("curves: expected falling probabilities in [0, 1], got other")
        object.__setattr__(self, "grid", grid)
        object.__setattr__(self, "curves", curves)

    def __len__(self) -> int:
        """Number of test patients."""
        return len(self.times)

    @property
    def censoring(self) -> tuple[Floats, NDArray[np.bool_]]:
        """Times and events from which the censoring distribution is estimated, [q] each."""
        if self.censoring_times is None or self.censoring_events is None:
            return self.train_times, self.train_events
        return self.censoring_times, self.censoring_events

    def uncensored(self, times: Floats) -> Floats:
        """Return G(t), the share of uncensored patients, by Kaplan-Meier."""
        return np.asarray(self._estimators[0].predict_proba(times))

    def kaplan_meier(self, times: Floats) -> Floats:
        """Return S(t), the share without the event, by Kaplan-Meier on the training part."""
        return np.asarray(self._estimators[1].predict_proba(times))

    @cached_property
    def _estimators(self) -> tuple[SurvivalFunctionEstimator, SurvivalFunctionEstimator]:
        censoring, survival = CensoringDistributionEstimator(), SurvivalFunctionEstimator()
        times, events = self.censoring
        return (
            censoring.fit(Surv.from_arrays(events, times)),
            survival.fit(Surv.from_arrays(self.train_events, self.train_times)),
        )


@dataclass(frozen=True, eq=False)
class ClassFold:
    """One test part of a classification.

    Args:
        labels: int [n], classes 0 to K - 1.
        probabilities: [n, K].
        train_shares: [K], the shares of the classes in the training part, the reference of the
            scaled Brier score; None for no such score.

    Raises:
        ValueError: shapes that differ, labels beyond the columns, or rows or shares that are not
            probabilities.

    Example:
        >>> from motet import ClassFold
        >>> ClassFold([0, 1], [[0.9, 0.1], [0.4, 0.6]]).probabilities.shape
        (2, 2)
    """

    labels: NDArray[np.intp]
    probabilities: Floats
    train_shares: Floats | None = None

    def __post_init__(self) -> None:
        labels = np.asarray(self.labels)
        shape = np.shape(self.probabilities)
        if labels.ndim != 1 or not len(labels) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"labels: expected integers [n], got {labels.dtype} {labels.shape}")
        if len(shape) != 2 or shape[0] != len(labels) or shape[1] < 2:
            raise ValueError(
                f"probabilities: expected [{len(labels)}, K], K at least 2, got {shape}"
            )
        probabilities = _check_finite("probabilities", self.probabilities, shape)
        if labels.min() < 0 or labels.max() >= shape[1]:
            raise ValueError(
                f"labels: expected 0 to {shape[1] - 1}, got {labels.min()} to {labels.max()}"
            )
        if not _are_probabilities(probabilities):
            raise ValueError("probabilities: expected rows that sum to 1, none negative, got other")
        if self.train_shares is not None:
            shares = _check_finite("train_shares", self.train_shares, shape[1:])
            if not _are_probabilities(shares):
                raise ValueError("train_shares: expected shares that sum to 1, got other")
            object.__setattr__(self, "train_shares", shares)
        object.__setattr__(self, "labels", labels.astype(np.intp))
        object.__setattr__(self, "probabilities", probabilities)

    def __len__(self) -> int:
        """Number of test patients."""
        return len(self.labels)


def _are_probabilities(values: Floats) -> bool:
    # In half precision the sum may differ from 1 by 1e-3.
    return bool(values.min() >= 0 and np.abs(values.sum(-1) - 1).max() <= 2e-3)


def _check_finite(name: str, values: Any, shape: tuple[int, ...]) -> Floats:
    array = np.asarray(values, float)
    if array.shape != shape:
        raise ValueError(f"{name}: expected {shape}, got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    return array
