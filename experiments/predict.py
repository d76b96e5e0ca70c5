"""Predict patients with the models of a finished run."""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from ..fusion.preprocessing import BagScaling, Scaling, TableScaling
from ..io import Cohort
from ..io.errors import listed
from .run_folder import Run


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
    names = run.config["modalities"]
    shared = {name: cohort.modalities[name] for name in names if name in cohort.modalities}
    if not shared:
        raise ValueError(
            f"{cohort.name}: expected at least one modality of the run ({', '.join(names)}), got "
            f"{', '.join(cohort.modalities)}"
        )
    ids = np.asarray(cohort.patients)
    has, folds = torch.zeros(len(names), len(ids)), []
    for number in range(len(run.splits)):
        fitted = run.fitted(number)
        patients = fitted.patients(shared, cohort.patients)
        has = torch.stack([patients.has(name) for name in names])
        predictions = fitted.predict(patients)
        bad = ids[~predictions.is_finite()]
        if len(bad):
            raise ValueError(
                f"{cohort.name}: expected finite predictions, got others for patient {bad[0]!r} "
                f"({len(bad)} in all): is a value far beyond those of training?"
            )
        folds.append((fitted, predictions))
    _warn_of_unseen(cohort, [fitted.scaling for fitted, _ in folds])
    trained = [{*parts["train"], *parts["validation"]} for parts in run.splits]
    return pd.DataFrame(
        {
            "patient": list(cohort.patients),
            "modalities": [
                " ".join(name for name, has_it in zip(names, row, strict=True) if has_it)
                for row in has.T.tolist()
            ],
            "seen": [sum(patient in ids for ids in trained) for patient in cohort.patients],
            **run.task.average(folds),
        }
    )


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
                        stacklevel=3,
                    )
        elif source.names is not None and len(source):
            known = [one.known_names for one in fitted if isinstance(one, BagScaling)]
            absent = dict.fromkeys(n for names in known for n in names if n not in source.names)
            if absent:
                warnings.warn(
                    f"{where}: {listed(absent, 3)} of training {'are' if len(absent) > 1 else 'is'}"
                    " absent; missing values are imputed",
                    stacklevel=3,
                )
