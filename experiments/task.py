"""Survival or classes: everything in which runs of the two differ.

What kind of outcome a cohort has is asked once, in `task_of`; a run folder says it in its
configuration.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..fusion.evaluation import (
    compare_classes,
    compare_survival,
    evaluate_classes,
    evaluate_survival,
)
from ..fusion.fitted import Fitted
from ..fusion.held_out import ClassFold, SurvivalFold
from ..fusion.objectives import Classification, CoxSurvival, DiscreteSurvival, Objective
from ..fusion.predictions import ClassPredictions, Predictions, SurvivalPredictions
from ..fusion.resampling import Comparison
from ..io import Classes, Cohort, Survival
from .settings import Goal

Outcome = tuple[NDArray[Any], ...]
"""Times and events, or labels, [n] each."""
# What to do about a part that cannot serve.
CURE = "use fewer splits or larger parts (--splits, --test, --validation)"


class Task(ABC):
    """What a model is asked for."""

    word: ClassVar[str]
    """For messages."""
    losses: ClassVar[tuple[str, ...]]
    baselines: ClassVar[tuple[str, ...]]
    metrics: ClassVar[dict[str, str]]
    """Those that tables show, and their titles."""

    # Of a cohort

    @abstractmethod
    def outcome(self, cohort: Cohort, rows: NDArray[np.intp] | slice) -> Outcome:
        """Return the outcome of the patients at the given rows."""

    @abstractmethod
    def strata(self, cohort: Cohort) -> NDArray[np.int64]:
        """Return what splits keep in proportion, [n]."""

    @abstractmethod
    def check_part(self, name: str, outcome: Outcome) -> None:
        """Raise a ValueError unless a part of a split can serve: it has events, or classes."""

    @abstractmethod
    def objective(self, goal: Goal, outcome: Outcome) -> Objective:
        """Return what to train for, learned from the outcome of the training patients."""

    @abstractmethod
    def outcome_table(self, cohort: Cohort) -> pd.DataFrame:
        """Return outcome.csv: patient, then time and event, or label."""

    # Of a run

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return what config.json says of the outcome: classes and unit."""

    @abstractmethod
    def predictions_table(self, predictions: Predictions) -> pd.DataFrame:
        """Return predictions.csv: patient, then risk and S at the grid (s_0, ...), or p_CLASS."""

    @abstractmethod
    def tested(
        self, tables: "RunTables", splits: Sequence[Mapping[str, Sequence[str]]]
    ) -> list[SurvivalFold] | list[ClassFold]:
        """Return the test parts of a run for evaluation."""

    @abstractmethod
    def evaluate(self, tested: Any, draws: int) -> dict[str, Any]:
        """Return the metrics of test parts."""

    @abstractmethod
    def compare(self, mine: Any, theirs: Any, draws: int) -> Comparison:
        """Return how much better one run predicts the same test parts than another."""

    @abstractmethod
    def average(self, folds: Sequence[tuple[Fitted, Predictions]]) -> dict[str, NDArray[Any]]:
        """Return the columns of a prediction table, averaged over the models of all folds."""


@dataclass(frozen=True)
class RunTables:
    """What a run folder holds of its test patients.

    Args:
        outcome: index patient; time and event, or label.
        predictions: patient, fold, then what `Task.predictions_table` gives.
        facts: of every fold, `done.json`.
    """

    outcome: pd.DataFrame
    predictions: pd.DataFrame
    facts: Sequence[Mapping[str, Any]]

    def by_fold(self) -> Iterator[tuple[int, pd.DataFrame]]:
        """Return the predictions of every fold that tested anybody."""
        for number, frame in self.predictions.groupby("fold"):
            yield int(str(number)), frame


@dataclass(frozen=True)
class SurvivalTask(Task):
    """Time to an event that may be censored.

    Args:
        unit: of the times.
    """

    unit: str
    word: ClassVar[str] = "survival"
    losses: ClassVar[tuple[str, ...]] = ("nll", "cox")
    baselines: ClassVar[tuple[str, ...]] = ("cox", "rsf")
    metrics: ClassVar[dict[str, str]] = {
        "harrell_c": "Harrell's c",
        "uno_c": "Uno's c",
        "integrated_brier": "integrated Brier",
    }

    def outcome(self, cohort: Cohort, rows: NDArray[np.intp] | slice) -> Outcome:
        survival = cast(Survival, cohort.outcome)
        return survival.times[rows], survival.events[rows]

    def strata(self, cohort: Cohort) -> NDArray[np.int64]:
        return cast(Survival, cohort.outcome).events.astype(np.int64)

    def check_part(self, name: str, outcome: Outcome) -> None:
        times, events = outcome
        if not events.any():
            raise ValueError(f"no event among the {len(times)} patients of its {name} part; {CURE}")
        if not (times[events].min() < times).any():
            raise ValueError(f"no comparable pair in its {name} part; {CURE}")

    def objective(self, goal: Goal, outcome: Outcome) -> Objective:
        if goal.loss == "cox":
            return CoxSurvival()
        times, events = outcome
        return DiscreteSurvival.fit(
            times, events, bins=goal.bins, alpha=goal.alpha, weighted=goal.weighted
        )

    def outcome_table(self, cohort: Cohort) -> pd.DataFrame:
        times, events = self.outcome(cohort, slice(None))
        return pd.DataFrame(
            {"patient": list(cohort.patients), "time": times, "event": events.astype(int)}
        )

    def config(self) -> dict[str, Any]:
        return {"classes": None, "unit": self.unit}

    def predictions_table(self, predictions: Predictions) -> pd.DataFrame:
        assert isinstance(predictions, SurvivalPredictions)
        columns: dict[str, Any] = {"patient": list(predictions.ids), "risk": predictions.risk}
        columns |= {f"s_{i}": column for i, column in enumerate(predictions.curves.T)}
        return pd.DataFrame(columns)

    def tested(
        self, tables: RunTables, splits: Sequence[Mapping[str, Sequence[str]]]
    ) -> list[SurvivalFold]:
        folds = []
        for number, frame in tables.by_fold():
            train = tables.outcome.loc[list(splits[number]["train"])]
            test = tables.outcome.loc[frame["patient"]]
            folds.append(
                SurvivalFold(
                    test["time"].to_numpy(),
                    test["event"].to_numpy(),
                    frame["risk"].to_numpy(),
                    train["time"].to_numpy(),
                    train["event"].to_numpy(),
                    cut=tables.facts[number]["cut"],
                    grid=np.asarray(tables.facts[number]["grid"]),
                    curves=frame.filter(regex=r"^s_\d+$").to_numpy(),
                )
            )
        return folds

    def evaluate(self, tested: Any, draws: int) -> dict[str, Any]:
        return evaluate_survival(tested, draws=draws)

    def compare(self, mine: Any, theirs: Any, draws: int) -> Comparison:
        return compare_survival(mine, theirs, draws=draws)

    def average(self, folds: Sequence[tuple[Fitted, Predictions]]) -> dict[str, NDArray[Any]]:
        """Average risks in standard deviations of each fold's training patients, and curves.

        Risks of different folds have no common scale. Curves are taken at the times of the first
        fold, and given at eight of them.
        """
        grid = cast(SurvivalPredictions, folds[0][1]).grid
        risks, curves = [], []
        for fitted, predictions in folds:
            assert isinstance(predictions, SurvivalPredictions)
            assert fitted.scale is not None
            risks.append((predictions.risk - fitted.scale.mean) / fitted.scale.sd)
            times = np.array([0.0, *predictions.grid])
            curves.append(np.stack([np.interp(grid, times, [1.0, *c]) for c in predictions.curves]))
        every = slice(3, None, 4)
        columns = {"risk": np.mean(risks, axis=0)}
        for at, column in zip(grid[every], np.mean(curves, axis=0).T[every], strict=True):
            columns[f"survival at {at:.4g} {self.unit}"] = column
        return columns


@dataclass(frozen=True)
class ClassTask(Task):
    """One of several classes.

    Args:
        names: what the classes are called.
    """

    names: tuple[str, ...]
    word: ClassVar[str] = "classes"
    losses: ClassVar[tuple[str, ...]] = ("cross_entropy",)
    baselines: ClassVar[tuple[str, ...]] = ("logistic", "forest")
    metrics: ClassVar[dict[str, str]] = {
        "auc": "AUC",
        "macro_auc": "macro AUC",
        "balanced_accuracy": "balanced accuracy",
    }

    def outcome(self, cohort: Cohort, rows: NDArray[np.intp] | slice) -> Outcome:
        return (cast(Classes, cohort.outcome).labels[rows],)

    def strata(self, cohort: Cohort) -> NDArray[np.int64]:
        return cast(Classes, cohort.outcome).labels

    def check_part(self, name: str, outcome: Outcome) -> None:
        seen = len(np.unique(outcome[0]))
        if name == "train" and seen < len(self.names):
            raise ValueError(f"its train part lacks a class; {CURE}")
        if seen < 2:
            raise ValueError(f"its {name} part has one class only; {CURE}")

    def objective(self, goal: Goal, outcome: Outcome) -> Objective:
        return Classification.fit(outcome[0], classes=len(self.names), weighted=goal.weighted)

    def outcome_table(self, cohort: Cohort) -> pd.DataFrame:
        (labels,) = self.outcome(cohort, slice(None))
        return pd.DataFrame({"patient": list(cohort.patients), "label": labels})

    def config(self) -> dict[str, Any]:
        return {"classes": list(self.names), "unit": None}

    def predictions_table(self, predictions: Predictions) -> pd.DataFrame:
        assert isinstance(predictions, ClassPredictions)
        columns: dict[str, Any] = {"patient": list(predictions.ids)}
        columns |= self._columns(predictions.probabilities)
        return pd.DataFrame(columns)

    def tested(
        self, tables: RunTables, splits: Sequence[Mapping[str, Sequence[str]]]
    ) -> list[ClassFold]:
        columns = [f"p_{name}" for name in self.names]
        return [
            ClassFold(
                tables.outcome["label"].loc[frame["patient"]].to_numpy(), frame[columns].to_numpy()
            )
            for _, frame in tables.by_fold()
        ]

    def evaluate(self, tested: Any, draws: int) -> dict[str, Any]:
        return evaluate_classes(tested, draws=draws)

    def compare(self, mine: Any, theirs: Any, draws: int) -> Comparison:
        return compare_classes(mine, theirs, draws=draws)

    def average(self, folds: Sequence[tuple[Fitted, Predictions]]) -> dict[str, NDArray[Any]]:
        """Average the probabilities."""
        every = [cast(ClassPredictions, predictions).probabilities for _, predictions in folds]
        return self._columns(np.mean(every, axis=0))

    def _columns(self, probabilities: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        return {
            f"p_{name}": column for name, column in zip(self.names, probabilities.T, strict=True)
        }


def task_of(cohort: Cohort) -> Task:
    """Return what a model can be asked for on a cohort that has an outcome."""
    if isinstance(cohort.outcome, Classes):
        return ClassTask(cohort.outcome.names)
    assert cohort.outcome is not None
    return SurvivalTask(cohort.outcome.unit)


def task_of_config(config: Mapping[str, Any]) -> Task:
    """Return what the model of a run was asked for."""
    if config["classes"] is not None:
        return ClassTask(tuple(config["classes"]))
    return SurvivalTask(config["unit"])
