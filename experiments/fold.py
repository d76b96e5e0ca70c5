"""One fold, ready for any model: scaled patients and a fitted objective."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..fusion.objectives import Objective
from ..fusion.patients import BagsReadOnce, Patients
from ..fusion.preprocessing import Scaling, fit_scaling
from ..io import Cohort, Split
from .folds import rows_of
from .settings import Goal
from .task import Outcome, task_of


@dataclass(frozen=True)
class FoldPart:
    """The patients of one part of a split who have at least one of the modalities.

    Args:
        patients: scaled, with the targets of the objective.
        outcome: times and events, or labels, [n] each.
        groups: the group of each patient, [n].
    """

    patients: Patients
    outcome: Outcome
    groups: NDArray[Any]


@dataclass(frozen=True)
class Fold:
    """The scaled patients of one split, and the objective.

    It is made once per fold, since its parts keep the bags that they have read.

    Args:
        number: number of the fold, from 0.
        train: the training part.
        validation: the validation part; it decides when a training stops.
        test: the test part.
        scaling: of each modality, fitted on the training patients.
        objective: fitted on the training patients.
    """

    number: int
    train: FoldPart
    validation: FoldPart
    test: FoldPart
    scaling: dict[str, Scaling]
    objective: Objective

    @classmethod
    def learn(
        cls, cohort: Cohort, names: Sequence[str], split: Split, number: int, goal: Goal
    ) -> Self:
        """Fit scaling and objective to the training patients of a split, then scale all patients.

        Args:
            cohort: the patients.
            names: the modalities to use.
            split: the patients of each part.
            number: number of the fold, from 0.
            goal: what to train for.

        Raises:
            ValueError: a modality that no training patient has, or that cannot be scaled.
        """
        modalities = {
            name: source if isinstance(source, pd.DataFrame) else BagsReadOnce(source)
            for name, source in cohort.modalities.items()
            if name in names
        }
        scaling = fit_scaling(modalities, split.train)
        for source in modalities.values():
            if isinstance(source, BagsReadOnce):
                source.hand_over()
        # Fitted on all training patients, even if a LegoBlock trains only on those who have its
        # modality: the objectives of all blocks are then equal, and the blocks can be merged.
        task = task_of(cohort)
        objective = task.objective(goal, task.outcome(cohort, rows_of(cohort, split.train)))
        read_once = replace(cohort, modalities=cast(Any, modalities))
        return cls.of(read_once, split, number, scaling, objective)

    @classmethod
    def of(
        cls,
        cohort: Cohort,
        split: Split,
        number: int,
        scaling: dict[str, Scaling],
        objective: Objective,
    ) -> Self:
        """Scale all patients with a scaling and an objective that were fitted before."""
        task = task_of(cohort)

        def make_part(ids: tuple[str, ...]) -> FoldPart:
            patients = Patients.of(cohort.modalities, scaling, ids)
            has = patients.held().any(1)
            rows = rows_of(cohort, ids)[has.numpy()]
            outcome = task.outcome(cohort, rows)
            target = cast(Any, objective).target(*outcome)
            selected = replace(patients.select(has), target=target)
            return FoldPart(selected, outcome, np.asarray(cohort.groups)[rows])

        return cls(
            number,
            make_part(split.train),
            make_part(split.validation),
            make_part(split.test),
            scaling,
            objective,
        )
