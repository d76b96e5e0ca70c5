"""Predict patients with the models of a finished run."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..fusion.predictions import Predictions
from ..fusion.preprocessing import BagScaling, Scaling, TableScaling
from ..io import Cohort
from ..io.errors import listed
from .run_folder import Run


@dataclass(frozen=True)
class CohortPredictions:
    """The predictions for a cohort, averaged over the models of all folds of a run.

    Args:
        run: the run.
        average: of all patients of the cohort, in its order; risks are in standard deviations.
        has: bool [M, n], which modalities of the run each patient has.
        seen: int [n], the number of folds that trained on a patient of that id.
        cut: the mean of the folds' median training risks, in standard deviations; None for classes.
    """

    run: Run
    average: Predictions
    has: NDArray[np.bool_]
    seen: NDArray[np.int64]
    cut: float | None

    @classmethod
    def of(cls, run: Run, cohort: Cohort) -> Self:
        """Predict the patients of a cohort with the models of all folds.

        Raises:
            ValueError: a cohort without any of the run's modalities, or with other columns.
        """
        names = run.config["modalities"]
        shared = {name: cohort.modalities[name] for name in names if name in cohort.modalities}
        if not shared:
            raise ValueError(
                f"{cohort.name}: expected at least one modality of the run ({', '.join(names)}), "
                f"got {', '.join(cohort.modalities)}"
            )
        ids = np.asarray(cohort.patients)
        has, folds = np.zeros((len(names), len(ids)), bool), []
        for number in range(len(run.splits)):
            fitted = run.fitted(number)
            patients = fitted.patients(shared, cohort.patients)
            has = np.stack([patients.has(name).numpy() for name in names])
            predictions = fitted.predict(patients)
            bad = ids[~predictions.is_finite()]
            if len(bad):
                raise ValueError(
                    f"{cohort.name}: expected finite predictions, got others for patient "
                    f"{bad[0]!r} ({len(bad)} in all): is a value far beyond those of training?"
                )
            folds.append((fitted, predictions))
        _warn_of_unseen(cohort, [fitted.scaling for fitted, _ in folds])
        scales = [fitted.scale for fitted, _ in folds if fitted.scale is not None]
        cuts = [(scale.cut - scale.mean) / scale.sd for scale in scales]
        cut = float(np.mean(cuts)) if cuts else None
        return cls(run, run.task.average(folds), has, count_seen(run, cohort), cut)

    def table(self) -> pd.DataFrame:
        """Return the table that `predict_cohort` describes."""
        names = self.run.config["modalities"]
        return pd.DataFrame(
            {
                "patient": list(self.average.ids),
                "modalities": [
                    " ".join(name for name, has_it in zip(names, row, strict=True) if has_it)
                    for row in self.has.T
                ],
                "seen": self.seen,
                **self.run.task.average_columns(self.average),
            }
        )


def predict_cohort(run: Run, cohort: Cohort) -> pd.DataFrame:
    """Predict patients with the models of all folds, and average the predictions.

    Risks of different folds have no common scale. Each is first expressed in standard deviations
    from the mean risk of the training patients of its fold. Curves and probabilities are averaged
    directly, curves at the times of the first fold.

    Args:
        run: a finished run.
        cohort: patients with at least one of the run's modalities.

    Returns:
        A table with the columns patient, modalities (which the patient has), seen (number of folds
        trained on a patient of that id), then risk and survival by time, or probabilities by class.

    Raises:
        ValueError: a cohort without any of the run's modalities, or with other columns.
    """
    return CohortPredictions.of(run, cohort).table()


def count_seen(run: Run, cohort: Cohort) -> NDArray[np.int64]:
    """Return the number of folds of a run that trained on a patient of the same id, [n]."""
    trained = [{*parts["train"], *parts["validation"]} for parts in run.splits]
    return np.array([sum(patient in ids for ids in trained) for patient in cohort.patients])


def _warn_of_unseen(cohort: Cohort, scalings: Sequence[Mapping[str, Scaling]]) -> None:
    """Warn of categories that no fold has in training, and of features of bags that are absent."""
    for name, source in cohort.modalities.items():
        fitted = [scaling[name] for scaling in scalings if name in scaling]
        where = f"{cohort.name}: modality {name!r}"
        if isinstance(source, pd.DataFrame):
            by_fold = [one.unseen(source) for one in fitted if isinstance(one, TableScaling)]
            for (column, value), count in (by_fold[0] if by_fold else {}).items():
                if all((column, value) in unseen for unseen in by_fold):
                    warnings.warn(
                        f"{where}, column {column!r}: {value!r} ({count} patient"
                        f"{'s'[: count != 1]}) is no category of training; it counts as none of "
                        "the known ones",
                        stacklevel=4,
                    )
        elif source.names is not None and len(source):
            known = [one.known_names for one in fitted if isinstance(one, BagScaling)]
            absent = dict.fromkeys(n for names in known for n in names if n not in source.names)
            if absent:
                warnings.warn(
                    f"{where}: {listed(absent, 3)} of training {'are' if len(absent) > 1 else 'is'}"
                    " absent; missing values are imputed",
                    stacklevel=4,
                )
