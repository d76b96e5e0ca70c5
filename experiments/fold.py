"""One fold, ready for any model: its patients scaled, its objective learned."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import pandas as pd
import torch

from ..fusion.objectives import Objective
from ..fusion.patients import BagsReadOnce, Patients
from ..fusion.preprocessing import Scaling, fit_scaling
from ..io import Cohort, Split
from .folds import rows_of
from .settings import Goal
from .task import Outcome, task_of


@dataclass(frozen=True)
class Part:
    """Those patients of one part of a split who have any of the modalities.

    Args:
        patients: scaled, with the targets of the objective.
        outcome: times and events, or labels, [n] each.
    """

    patients: Patients
    outcome: Outcome


@dataclass(frozen=True)
class Fold:
    """The patients of one split, scaled as the training patients say, and what to train for.

    Made once per fold: the parts keep the bags that they have read.

    Args:
        number: from 0.
        train: to learn from.
        validation: to stop by.
        test: to report on.
        scaling: by modality, learned from the training patients.
        objective: likewise.
    """

    number: int
    train: Part
    validation: Part
    test: Part
    scaling: dict[str, Scaling]
    objective: Objective

    @classmethod
    def learn(
        cls, cohort: Cohort, names: Sequence[str], split: Split, number: int, goal: Goal
    ) -> Self:
        """Learn scaling and objective from the training patients of a split, then scale everyone.

        Args:
            cohort: the patients.
            names: the modalities to use.
            split: the patients of each part.
            number: of the fold, from 0.
            goal: what to train for.

        Raises:
            ValueError: a modality that no training patient has, or that cannot be scaled.
        """
        modalities = {
            name: source if isinstance(source, pd.DataFrame) else BagsReadOnce(source)
            for name, source in cohort.modalities.items()
            if name in names
        }
        try:
            scaling = fit_scaling(modalities, split.train)
        except ValueError as error:
            raise ValueError(f"fold {number + 1}: {error}") from error
        for source in modalities.values():
            if isinstance(source, BagsReadOnce):
                source.hand_over()
        # From all training patients, also where a block trains on some: so blocks fit each other.
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
        """Scale everyone as `scaling` says, which was learned before; see `Fold`."""
        task = task_of(cohort)

        def part(ids: tuple[str, ...]) -> Part:
            patients = Patients.of(cohort.modalities, scaling, ids)
            has = torch.stack([patients.has(name) for name in scaling]).any(0)
            outcome = task.outcome(cohort, rows_of(cohort, ids)[has.numpy()])
            target = cast(Any, objective).target(*outcome)
            return Part(replace(patients.select(has), target=target), outcome)

        return cls(
            number, part(split.train), part(split.validation), part(split.test), scaling, objective
        )
