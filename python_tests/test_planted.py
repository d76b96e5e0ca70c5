"""Runs on planted data: narrow tables learn, and a missing modality does not shift the risks."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from motet import experiments
from motet.io import Cohort, Survival

pytestmark = pytest.mark.slow
PATIENTS = 400
FOLDS = experiments.Splits(5)


def cohort_of(modalities: dict[str, np.ndarray], risk: np.ndarray, name: str) -> Cohort:
    """Return patients with exponential times and a third of them censored."""
    generator = np.random.default_rng(1)
    ids = tuple(f"p{i:03}" for i in range(len(risk)))
    times = generator.exponential(np.exp(-risk)) + 1e-3
    censored = generator.exponential(2.0, len(risk)) + 1e-3
    tables = {
        modality: pd.DataFrame(
            x, index=pd.Index(ids, name="patient"), columns=[f"x{i}" for i in range(x.shape[1])]
        )
        for modality, x in modalities.items()
    }
    outcome = Survival(np.minimum(times, censored), times <= censored, "years")
    return Cohort(name, ids, ids, outcome, tables, None)


def c_of(cohort: Cohort, model: str, folder: Path) -> float:
    run = experiments.train_run(cohort, model, folder / model, splits=FOLDS)
    return experiments.read_metrics(run)["harrell_c"]["value"]


@pytest.mark.parametrize(("noise", "within"), [(0, 0.02), (20, 0.05)])
def test_age_decides(noise: int, within: float, tmp_path: Path) -> None:
    """Alone, or among columns of noise, as well as ridge Cox on the same columns."""
    generator = np.random.default_rng(0)
    age = generator.normal(65, 10, PATIENTS)
    columns = np.column_stack([age, generator.normal(size=(PATIENTS, noise))])
    cohort = cohort_of({"clinical": columns}, 1.2 * (age - 65) / 10, "age")
    cox = c_of(cohort, "cox", tmp_path)
    assert cox > 0.7
    for model in ("healnet", "lego"):
        assert c_of(cohort, model, tmp_path) > cox - within, model


@pytest.mark.parametrize("model", ["healnet", "lego"])
def test_a_missing_modality_does_not_shift_the_risk(model: str, tmp_path: Path) -> None:
    """The mean risk of all patients, with one of two informative modalities removed."""
    generator = np.random.default_rng(2)
    a, b = generator.normal(size=(2, PATIENTS, 5))
    cohort = cohort_of({"a": a, "b": b}, a[:, 0] + b[:, 0], "two")
    run = experiments.train_run(cohort, model, tmp_path / model, splits=FOLDS)
    full = experiments.predict_cohort(run, cohort)["risk"]
    for name in ("a", "b"):
        less = Cohort(
            cohort.name, cohort.patients, cohort.groups, cohort.outcome,
            {name: cohort.modalities[name]}, None,
        )  # fmt: skip
        risk = experiments.predict_cohort(run, less)["risk"]
        assert abs(risk.mean() - full.mean()) < 0.15 * full.std(), name
        assert risk.std() > 0.2 * full.std()
