"""What runs write and `motet evaluate` prints about calibration."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from motet import cli
from motet.experiments import train_run
from motet.experiments.calibration_plot import write_calibration
from motet.experiments.settings import Splits
from motet.experiments.task import ClassTask, SurvivalTask
from motet.io import load_cohort

from .cohort_helpers import OUTCOMES, write_cohort

MODELS = {"survival": "cox", "classes": "logistic"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run of each task, survival_cox and classes_logistic."""
    folder = tmp_path_factory.mktemp("calibration")
    for kind, model in MODELS.items():
        cohort = load_cohort(write_cohort(folder, kind, OUTCOMES[kind], seed=0, n=90, first=0))
        train_run(cohort, model, folder / f"{kind}_{model}", splits=Splits(2))
    return folder


def test_what_is_printed(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    titles = {
        "survival_cox": ["run", "Harrell's c", "Uno's c", "scaled Brier", "D-cal. p"],
        "classes_logistic": [
            "run", "macro AUC", "balanced accuracy", "scaled Brier", "cal. error",
        ],
    }  # fmt: skip
    for run, columns in titles.items():
        assert cli.main(["evaluate", run, "--draws", "100"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 100
        assert lines[0].startswith("out of fold: ")
        assert re.split("  +", lines[1]) == columns
        assert len(re.split("  +", lines[2])) == len(columns)


@pytest.mark.parametrize(
    ("run", "first"), [("survival_cox", "time"), ("classes_logistic", "class")]
)
def test_calibration_of_a_run(run: str, first: str, runs: Path) -> None:
    table = pd.read_csv(runs / run / "calibration.csv")
    metrics = json.loads((runs / run / "metrics.json").read_text())
    assert list(table[first].unique()) == (
        metrics["brier"]["times"] if first == "time" else ["early", "late", "distant"]
    )
    for name in ("patients", "predicted", "observed", "low", "high"):
        np.testing.assert_allclose(table[name], [row[name] for row in metrics["calibration"]])
    assert (runs / run / "calibration.svg").read_text().count('<g id="axes_') == 3


@pytest.mark.parametrize("task", [SurvivalTask("days"), ClassTask(("well", "ill"))], ids=str)
def test_calibration_of_edges_is_drawn(task: Any, tmp_path: Path) -> None:
    """Groups without an event, and without follow-up; a single patient; equal runs, equal files."""
    key = "time" if isinstance(task, SurvivalTask) else "class"
    group = {"patients": 1, "predicted": 0.0, "observed": 0.0, "low": 0.0, "high": 0.8}
    unknown = {"patients": 9, "predicted": 0.5, "observed": None, "low": None, "high": None}
    rows = [{key: 1, **group}] + ([{key: 1, **unknown}] if key == "time" else [])
    written = []
    for name in ("a", "b"):
        write_calibration(task, {"calibration": rows}, tmp_path / f"{name}.csv")
        written.append((tmp_path / f"{name}.svg").read_bytes())
    assert written[0] == written[1]
    assert pd.read_csv(tmp_path / "a.csv")["patients"].tolist() == [r["patients"] for r in rows]
    write_calibration(task, {"patients": 3}, tmp_path / "none.csv")
    assert not (tmp_path / "none.csv").exists()
