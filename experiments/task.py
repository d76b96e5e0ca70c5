"""Tasks, survival or classes: everything in which runs of the two differ.

`task_of` finds the task of a cohort, `task_of_config` that of a run folder. Apart from the
report, whose pictures differ, no other code asks which of the two it is.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..fusion.baselines.fit import CLASS_BASELINES, SURVIVAL_BASELINES, FitBaseline
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
from ..io.cohorts.tables import HOURS
from .settings import Explained, Goal

Outcome = tuple[NDArray[Any], ...]
"""Times and events, or labels, [n] each."""
# The cure for a part without events or classes, for messages.
CURE = "use fewer splits or larger parts (--splits, --test, --validation)"


class Task(ABC):
    """What a model predicts, and how that is trained, evaluated and stored."""

    outcome_name: ClassVar[str]
    """For messages."""
    losses: ClassVar[tuple[str, ...]]
    baselines: ClassVar[dict[str, FitBaseline]]
    metrics: ClassVar[dict[str, str]]
    """Name and title of the metrics in tables."""

    # Of a cohort

    @abstractmethod
    def outcome(self, cohort: Cohort, rows: NDArray[np.intp] | slice) -> Outcome:
        """Return the outcome of the patients in some rows."""

    @abstractmethod
    def strata(self, cohort: Cohort) -> NDArray[np.int64]:
        """Return the stratum of each patient, [n]; splits keep their proportions."""

    @abstractmethod
    def check_part(self, name: str, outcome: Outcome) -> None:
        """Raise a ValueError unless a part of a split has the events or classes that it needs."""

    @abstractmethod
    def objective(self, goal: Goal, outcome: Outcome) -> Objective:
        """Return the objective, fitted to the outcome of the training patients."""

    @abstractmethod
    def outcome_table(self, cohort: Cohort) -> pd.DataFrame:
        """Return the content of outcome.csv: patient, then time and event, or label."""

    # Of a run

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return the keys of config.json that describe the outcome: classes and unit."""

    @abstractmethod
    def predictions_table(self, predictions: Predictions) -> pd.DataFrame:
        """Return the content of predictions.csv.

        Columns: patient, then risk and S(t) at the times of the grid (s_0, s_1, ...), or p_CLASS.
        """

    @abstractmethod
    def tested(
        self, tables: "RunTables", splits: Sequence[Mapping[str, Sequence[str]]]
    ) -> list[SurvivalFold] | list[ClassFold]:
        """Return the test parts of a run for an evaluation."""

    @abstractmethod
    def evaluate(self, tested: Any, draws: int) -> dict[str, Any]:
        """Return the metrics of test parts."""

    @abstractmethod
    def compare(self, a: Any, b: Any, draws: int) -> Comparison:
        """Return how much better run a predicts the same test parts than run b."""

    @abstractmethod
    def average(self, folds: Sequence[tuple[Fitted, Predictions]]) -> Predictions:
        """Return the average of the predictions of the models of all folds."""

    @abstractmethod
    def average_columns(self, average: Predictions) -> dict[str, NDArray[Any]]:
        """Return the columns of a prediction table from the average over folds."""

    @abstractmethod
    def explained(self, name: str | None) -> Explained:
        """Return what `motet explain` explains: the risk, or the log-odds of the class `name`.

        Raises:
            ValueError: a class for survival; none or an unknown one for classes.
        """

    @abstractmethod
    def calibration_table(self, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
        """Return the content of calibration.csv from the metric `calibration`.

        Columns: time or class, then patients, predicted, observed, low, high of each group.
        """

    @abstractmethod
    def calibration_title(self, panel: Any) -> str:
        """Return what is predicted, from the first column of `calibration_table`."""

    # Of a run, for an external cohort

    @abstractmethod
    def convert_outcome(self, cohort: Cohort) -> pd.DataFrame:
        """Return the outcome of an external cohort in the unit, or with the classes, of the run.

        It has the columns of outcome.csv; the index is the patient.

        Raises:
            ValueError: another kind of outcome, an unknown unit, or other classes.
        """

    @abstractmethod
    def external(
        self, average: Predictions, outcomes: "Outcomes", cut: float | None
    ) -> list[SurvivalFold] | list[ClassFold]:
        """Return averaged predictions of an external cohort as one test part.

        Args:
            average: predictions of the patients that are evaluated.
            outcomes: of these patients, of all patients of the external cohort, and of the run.
            cut: the risk above which a patient counts as high risk; None for classes.
        """


class Outcomes(NamedTuple):
    """Outcomes for the evaluation of an external cohort; the index is the patient.

    Args:
        evaluated: of the patients that are evaluated, in the order of the predictions.
        external: of all patients of the external cohort.
        run: of all patients of the run.
    """

    evaluated: pd.DataFrame
    external: pd.DataFrame
    run: pd.DataFrame


@dataclass(frozen=True)
class RunTables:
    """The tables of a run folder from which test parts are made.

    Args:
        outcome: time and event, or label; the index is the patient.
        predictions: patient, fold, then the columns of `Task.predictions_table`.
        facts: the content of `done.json` of every fold.
    """

    outcome: pd.DataFrame
    predictions: pd.DataFrame
    facts: Sequence[Mapping[str, Any]]

    def by_fold(self) -> Iterator[tuple[int, pd.DataFrame]]:
        """Yield number and predictions of every fold with test patients."""
        for number, frame in self.predictions.groupby("fold"):
            yield int(str(number)), frame


@dataclass(frozen=True)
class SurvivalTask(Task):
    """Time to an event that may be censored.

    Args:
        unit: of the times.
    """

    unit: str
    outcome_name: ClassVar[str] = "survival"
    losses: ClassVar[tuple[str, ...]] = ("nll", "cox")
    baselines: ClassVar[dict[str, FitBaseline]] = SURVIVAL_BASELINES
    metrics: ClassVar[dict[str, str]] = {
        "harrell_c": "Harrell's c",
        "uno_c": "Uno's c",
        "scaled_brier": "scaled Brier",
        "d_calibration": "D-cal. p",
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
        times, events = outcome
        if goal.loss == "cox":
            return CoxSurvival.fit(times, events)
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

    def compare(self, a: Any, b: Any, draws: int) -> Comparison:
        return compare_survival(a, b, draws=draws)

    def average(self, folds: Sequence[tuple[Fitted, Predictions]]) -> Predictions:
        """Average standardised risks and curves over the folds.

        Risks of different folds have no common scale, so each is standardised by the risks of the
        training patients of its fold. Curves are interpolated to the times of the first fold.
        """
        first = cast(SurvivalPredictions, folds[0][1])
        risks, curves = [], []
        for fitted, predictions in folds:
            assert isinstance(predictions, SurvivalPredictions)
            assert fitted.scale is not None
            risks.append((predictions.risk - fitted.scale.mean) / fitted.scale.sd)
            times = np.array([0.0, *predictions.grid])
            curves.append(
                np.stack([np.interp(first.grid, times, [1.0, *c]) for c in predictions.curves])
            )
        return SurvivalPredictions(
            first.ids, np.mean(risks, axis=0), np.mean(curves, axis=0), first.grid
        )

    def average_columns(self, average: Predictions) -> dict[str, NDArray[Any]]:
        """Return the risk, and the curve at every fourth of its 32 times."""
        assert isinstance(average, SurvivalPredictions)
        every_fourth = slice(3, None, 4)
        times, curves = average.grid[every_fourth], average.curves.T[every_fourth]
        return {"risk": average.risk} | {
            f"survival at {time:.4g} {self.unit}": column
            for time, column in zip(times, curves, strict=True)
        }

    def explained(self, name: str | None) -> Explained:
        if name is not None:
            raise ValueError(
                f"--class: expected none for a run that predicts survival, got {name!r}"
            )
        return Explained("risk (SD of the training patients' risks)", None)

    def calibration_table(self, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
        return pd.DataFrame(rows)

    def calibration_title(self, panel: Any) -> str:
        return f"event until {panel:.4g} {self.unit}"

    def convert_outcome(self, cohort: Cohort) -> pd.DataFrame:
        outcome = cohort.outcome
        if not isinstance(outcome, Survival):
            raise ValueError(f"{cohort.name}: expected survival, as in the run, got classes")
        table = self.outcome_table(cohort).set_index("patient")
        if outcome.unit != self.unit:
            if not {outcome.unit, self.unit} <= {*HOURS}:
                raise ValueError(
                    f"{cohort.name}: expected times in {self.unit}, as in the run, got "
                    f"{outcome.unit!r}; units that are converted: {', '.join(HOURS)}"
                )
            table["time"] *= HOURS[outcome.unit] / HOURS[self.unit]
        return table

    def external(
        self, average: Predictions, outcomes: Outcomes, cut: float | None
    ) -> list[SurvivalFold]:
        """Return one fold: Kaplan-Meier's reference is of the run, censoring of the cohort.

        The models learned the survival of the patients of the run, so the reference is their
        Kaplan-Meier curve. The weights 1 / G correct for how long the external patients were
        followed, so G is estimated from the external cohort.
        """
        assert isinstance(average, SurvivalPredictions)
        return [
            SurvivalFold(
                outcomes.evaluated["time"].to_numpy(),
                outcomes.evaluated["event"].to_numpy(),
                average.risk,
                outcomes.run["time"].to_numpy(),
                outcomes.run["event"].to_numpy(),
                cut=cut,
                grid=average.grid,
                curves=average.curves,
                censoring_times=outcomes.external["time"].to_numpy(),
                censoring_events=outcomes.external["event"].to_numpy(),
            )
        ]


@dataclass(frozen=True)
class ClassTask(Task):
    """One of several classes.

    Args:
        names: names of the classes.
    """

    names: tuple[str, ...]
    outcome_name: ClassVar[str] = "classes"
    losses: ClassVar[tuple[str, ...]] = ("cross_entropy",)
    baselines: ClassVar[dict[str, FitBaseline]] = CLASS_BASELINES
    metrics: ClassVar[dict[str, str]] = {
        "auc": "AUC",
        "macro_auc": "macro AUC",
        "balanced_accuracy": "balanced accuracy",
        "scaled_brier": "scaled Brier",
        "calibration_error": "cal. error",
    }

    def outcome(self, cohort: Cohort, rows: NDArray[np.intp] | slice) -> Outcome:
        return (cast(Classes, cohort.outcome).labels[rows],)

    def strata(self, cohort: Cohort) -> NDArray[np.int64]:
        return cast(Classes, cohort.outcome).labels

    def check_part(self, name: str, outcome: Outcome) -> None:
        classes = len(np.unique(outcome[0]))
        if name == "train" and classes < len(self.names):
            raise ValueError(f"its train part lacks a class; {CURE}")
        if classes < 2:
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
        labels = tables.outcome["label"]
        return [
            ClassFold(
                labels.loc[frame["patient"]].to_numpy(),
                frame[columns].to_numpy(),
                self._shares(labels.loc[list(splits[number]["train"])]),
            )
            for number, frame in tables.by_fold()
        ]

    def evaluate(self, tested: Any, draws: int) -> dict[str, Any]:
        return evaluate_classes(tested, draws=draws)

    def compare(self, a: Any, b: Any, draws: int) -> Comparison:
        return compare_classes(a, b, draws=draws)

    def average(self, folds: Sequence[tuple[Fitted, Predictions]]) -> Predictions:
        """Average the probabilities."""
        first = cast(ClassPredictions, folds[0][1])
        probabilities = [
            cast(ClassPredictions, predictions).probabilities for _, predictions in folds
        ]
        return ClassPredictions(first.ids, np.mean(probabilities, axis=0))

    def average_columns(self, average: Predictions) -> dict[str, NDArray[Any]]:
        return self._columns(cast(ClassPredictions, average).probabilities)

    def explained(self, name: str | None) -> Explained:
        """Return the log-odds of a class; without a name those of the last one of two classes."""
        if name is None and len(self.names) == 2:
            name = self.names[-1]
        if name not in self.names:
            raise ValueError(
                f"--class: expected one of {', '.join(self.names)}, got {name or 'none'}"
            )
        return Explained(f"log-odds of {name}", self.names.index(name))

    def calibration_table(self, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
        return pd.DataFrame([{**row, "class": self.names[row["class"]]} for row in rows])

    def calibration_title(self, panel: Any) -> str:
        return f"class {panel}"

    def convert_outcome(self, cohort: Cohort) -> pd.DataFrame:
        outcome = cohort.outcome
        if not isinstance(outcome, Classes):
            raise ValueError(f"{cohort.name}: expected classes, as in the run, got survival")
        unknown = [name for name in outcome.names if name not in self.names]
        if unknown:
            raise ValueError(
                f"{cohort.name}: expected the classes of the run ({', '.join(self.names)}), got "
                f"{', '.join(unknown)}; give them these names by `names` of the outcome"
            )
        table = self.outcome_table(cohort).set_index("patient")
        table["label"] = np.array([self.names.index(name) for name in outcome.names])[
            table["label"]
        ]
        return table

    def external(
        self, average: Predictions, outcomes: Outcomes, cut: float | None
    ) -> list[ClassFold]:
        """Return one fold, whose reference is the class shares of all patients of the run."""
        assert isinstance(average, ClassPredictions)
        labels = outcomes.evaluated["label"].to_numpy()
        return [ClassFold(labels, average.probabilities, self._shares(outcomes.run["label"]))]

    def _shares(self, labels: pd.Series) -> NDArray[np.float64]:
        return np.bincount(labels, minlength=len(self.names)) / len(labels)

    def _columns(self, probabilities: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        return {
            f"p_{name}": column for name, column in zip(self.names, probabilities.T, strict=True)
        }


def task_of(cohort: Cohort) -> Task:
    """Return the task of a cohort, which must have an outcome."""
    if isinstance(cohort.outcome, Classes):
        return ClassTask(cohort.outcome.names)
    assert cohort.outcome is not None
    return SurvivalTask(cohort.outcome.unit)


def task_of_config(config: Mapping[str, Any]) -> Task:
    """Return the task of a run from its configuration."""
    if config["classes"] is not None:
        return ClassTask(tuple(config["classes"]))
    return SurvivalTask(config["unit"])
