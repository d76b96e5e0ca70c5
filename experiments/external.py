"""Evaluate finished runs on an external cohort: other patients, of other places or years."""

from collections.abc import Set
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..fusion.held_out import ClassFold, SurvivalFold
from ..fusion.resampling import Comparison
from ..io import Cohort
from .predict import CohortPredictions, count_seen
from .run_folder import Run, RunError
from .task import Outcomes


@dataclass(frozen=True)
class External:
    """The averaged predictions of a run for an external cohort, with the outcomes.

    Args:
        cohort: name of the cohort.
        predictions: of all of its patients.
        outcome: of the same patients, in the unit or with the classes of the run.
        evaluated: bool [n]. The others were trained on, or have no modality of the run.
    """

    cohort: str
    predictions: CohortPredictions
    outcome: pd.DataFrame
    evaluated: NDArray[np.bool_]

    @classmethod
    def predict(cls, run: Run, cohort: Cohort) -> Self:
        """Predict a cohort with the models of all folds of a run.

        A patient whose id is in the training or validation part of a fold is not evaluated.

        Raises:
            ValueError: an outcome that is not that of the run, columns that do not fit the run, or
                no patient to evaluate.
        """
        outcome = run.task.convert_outcome(cohort)
        if count_seen(run, cohort).all():
            raise ValueError(
                f"{cohort.name}: {run.path} was trained on all its {len(cohort)} patients (equal "
                "ids); without --on, motet evaluate shows the figures of its test parts. Other "
                "patients need other ids"
            )
        predictions = CohortPredictions.of(run, cohort)
        evaluated = (predictions.seen == 0) & predictions.has.any(0)
        if not evaluated.any():
            raise ValueError(f"{cohort.name}: no new patient has a modality of {run.path}")
        return cls(cohort.name, predictions, outcome, evaluated)

    def patients(self) -> set[str]:
        """Return the patients that are evaluated."""
        return set(self.outcome.index[self.evaluated])

    def tested(self, only: Set[str] | None = None) -> list[SurvivalFold] | list[ClassFold]:
        """Return one test part for an evaluation; `only` selects patients."""
        rows = self.evaluated
        if only is not None:
            rows = rows & self.outcome.index.isin(list(only))
        run = self.predictions.run
        outcomes = Outcomes(self.outcome[rows], self.outcome, run.outcome())
        average = self.predictions.average.select(rows)
        return run.task.external(average, outcomes, self.predictions.cut)

    def evaluate(self, *, draws: int = 1000) -> dict[str, Any]:
        """Compute the metrics, with the number of patients that are left out.

        If too few events or classes were observed, return only the counts and the reason.
        """
        seen = self.predictions.seen > 0
        counts: dict[str, Any] = {
            "cohort": self.cohort,
            "patients": int(self.evaluated.sum()),
            "trained_on": int(seen.sum()),
            "without_modality": int((~seen & ~self.evaluated).sum()),
        }
        try:
            return counts | self.predictions.run.task.evaluate(self.tested(), draws)
        except ValueError as error:
            return {**counts, "folds": 1, "reason": str(error)}

    def compare(self, other: "External", *, draws: int = 1000) -> Comparison:
        """Return how much better this run is than another on the patients that both evaluate.

        Raises:
            RunError: no such patient, or runs with another outcome.
        """
        run, path = self.predictions.run, other.predictions.run.path
        if run.task != other.predictions.run.task:
            raise RunError(f"{path}: expected the outcome of {run.path}, got another")
        shared = self.patients() & other.patients()
        if not shared:
            raise RunError(f"{path}: evaluates no patient that {run.path} evaluates")
        return run.task.compare(self.tested(shared), other.tested(shared), draws)
