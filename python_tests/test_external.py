"""`motet evaluate --on`: an external cohort."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from motet import ClassFold, SurvivalFold, cli, evaluate_classes, evaluate_survival
from motet.experiments import External, Run, train_run
from motet.experiments.settings import Splits
from motet.io import load_cohort
from motet.io.cohorts.tables import HOURS

from .cohort_helpers import OUTCOMES, write_cohort


def train(folder: Path, kind: str, model: str, **options: Any) -> Run:
    cohort = load_cohort(folder / f"{kind}.yaml")
    return train_run(cohort, model, folder / f"{kind}_{model}", splits=Splits(2), **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write cohorts, train runs on them, and write an external cohort for each.

    Five patients of an external cohort have the ids of patients of the run.
    """
    folder = tmp_path_factory.mktemp("external")
    for kind, outcome in OUTCOMES.items():
        write_cohort(folder, kind, outcome, seed=0, n=90, first=0)
        write_cohort(folder, f"other_{kind}", outcome, seed=1, n=60, first=85)
    train(folder, "survival", "cox")
    train(folder, "survival", "healnet", changes={"epochs": 1})
    train(folder, "classes", "logistic")
    return folder


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    capsys.readouterr()
    assert cli.main(["evaluate", *map(str, arguments), "--draws", "100"]) == 0
    out = capsys.readouterr().out
    return json.loads(out) if "--json" in arguments else out


def refuse(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert cli.main(["evaluate", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


# External cohorts


def test_survival_by_hand(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The figures are those of the mean of the folds' curves and standardised risks."""
    run, other = folder / "survival_cox", folder / "other_survival.yaml"
    printed = evaluate(capsys, run, "--on", other, "--json")["runs"][str(run)]
    cohort, trained = load_cohort(other), pd.read_csv(run / "outcome.csv")
    new = ~np.isin(cohort.patients, trained["patient"])
    risks, curves, cuts = [], [], []
    grid = Run.finished(run).fitted(0).grid
    for number in (0, 1):
        fitted = Run.finished(run).fitted(number)
        predicted = fitted.predict(fitted.patients(cohort.modalities, cohort.patients))
        risks.append((predicted.risk - fitted.scale.mean) / fitted.scale.sd)
        cuts.append((fitted.scale.cut - fitted.scale.mean) / fitted.scale.sd)
        curves.append(
            [np.interp(grid, [0, *predicted.grid], [1, *curve]) for curve in predicted.curves]
        )
    times, events = cohort.outcome.times, cohort.outcome.events
    fold = SurvivalFold(
        times[new], events[new], np.mean(risks, 0)[new], trained["time"], trained["event"],
        cut=np.mean(cuts), grid=grid, curves=np.mean(curves, 0)[new], censoring_times=times,
        censoring_events=events,
    )  # fmt: skip
    expected = json.loads(json.dumps(evaluate_survival([fold], draws=100)))
    counts = {"cohort": "other_survival", "trained_on": 5, "without_modality": 0}
    assert printed == {**counts, **expected}
    assert (printed["patients"], printed["folds"]) == (55, 1)


def test_classes_by_hand(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = folder / "classes_logistic", folder / "other_classes.yaml"
    # The same classes in another order.
    text = other.read_text().replace("{0: early, 1: late, 2:", "{2: distant, 1: late, 0: early, x:")
    (folder / "turned.yaml").write_text(text.replace("name: other_classes", "name: turned"))
    printed = evaluate(capsys, run, "--on", folder / "turned.yaml", "--json")["runs"][str(run)]
    cohort, trained = load_cohort(other), pd.read_csv(run / "outcome.csv")
    new = ~np.isin(cohort.patients, trained["patient"])
    probabilities = []
    for number in (0, 1):
        fitted = Run.finished(run).fitted(number)
        patients = fitted.patients(cohort.modalities, cohort.patients)
        probabilities.append(fitted.predict(patients).probabilities)
    fold = ClassFold(
        cohort.outcome.labels[new],
        np.mean(probabilities, 0)[new],
        np.bincount(trained["label"]) / len(trained),
    )
    expected = json.loads(json.dumps(evaluate_classes([fold], draws=100)))
    counts = {"cohort": "turned", "trained_on": 5, "without_modality": 0}
    assert printed == {**counts, **expected}


def test_what_is_printed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    runs = ["survival_cox", "survival_healnet"]
    lines = evaluate(capsys, *runs, "--on", "other_survival.yaml").splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith("other_survival: 55 patients, ")
    assert lines[1] == "survival_cox: left out: 5 were trained on"
    assert re.split("  +", lines[3]) == [
        "run",
        "Harrell's c",
        "Uno's c",
        "scaled Brier",
        "D-cal. p",
    ]
    interval = r" +-?0\.\d{3} \(-?0\.\d{3}(-| to )-?0\.\d{3}\)"
    assert re.fullmatch(rf"survival_cox({interval}){{3}} +[0-9.e-]+", lines[4])
    assert lines[-1].startswith("survival_healnet minus survival_cox: ")


def test_units_are_converted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = folder / "survival_cox", folder / "other_survival.yaml"
    expected = evaluate(capsys, run, "--on", other, "--json")["runs"][str(run)]
    frame = pd.read_csv(folder / "other_survival.csv")
    days = HOURS["months"] / HOURS["days"]
    frame.assign(months=frame["months"] * days).to_csv(folder / "days.csv", index=False)
    text = other.read_text().replace("other_survival.csv", "days.csv")
    (folder / "days.yaml").write_text(text.replace("unit: months", "unit: days"))
    figures = evaluate(capsys, run, "--on", folder / "days.yaml", "--json")["runs"][str(run)]
    for name in ("harrell_c", "scaled_brier"):
        assert figures[name]["value"] == pytest.approx(expected[name]["value"], rel=1e-9)
    assert figures["brier"]["times"] == pytest.approx(expected["brier"]["times"])
    (folder / "days.yaml").write_text(text.replace("unit: months", "unit: visits"))
    error = refuse(capsys, run, "--on", folder / "days.yaml")
    assert "expected times in months, as in the run, got 'visits'" in error


def test_patients_that_are_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of one modality evaluates those who have it; comparisons use those of both runs."""
    blood = train(folder, "survival", "rsf", modalities=["blood"])
    runs, on = [folder / "survival_cox", blood.path], ["--on", folder / "other_survival.yaml"]
    error = refuse(capsys, runs[0], "--on", folder / "survival.yaml")
    assert "was trained on all its 90 patients" in error
    # Patient 3 of the file lacks blood, and is one of those that were trained on: another id.
    frame = pd.read_csv(folder / "other_survival.csv")
    frame.loc[50, ["c", "d"]] = np.nan
    frame.to_csv(folder / "lacking.csv", index=False)
    text = on[1].read_text().replace("other_survival.csv", "lacking.csv")
    (folder / "lacking.yaml").write_text(text)
    printed = evaluate(capsys, *runs, "--on", folder / "lacking.yaml", "--json")
    figures = printed["runs"][str(blood.path)]
    assert [figures[key] for key in ("trained_on", "without_modality", "patients")] == [5, 1, 54]
    cohort = load_cohort(folder / "lacking.yaml")
    a, b = (External.predict(Run.finished(path), cohort) for path in runs)
    shared = b.patients()
    assert len(a.patients()) == 55
    expected = b.predictions.run.task.compare(b.tested(shared), a.tested(shared), 100)
    assert printed["less_the_first"][str(blood.path)] == pytest.approx(expected._asdict())


def test_cohorts_that_do_not_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    survival, classes = folder / "survival_cox", folder / "classes_logistic"
    error = refuse(capsys, survival, "--on", folder / "other_classes.yaml")
    assert "other_classes: expected survival, as in the run, got classes" in error
    error = refuse(capsys, classes, "--on", folder / "other_survival.yaml")
    assert "other_survival: expected classes, as in the run, got survival" in error
    text = (folder / "other_classes.yaml").read_text().replace("2: distant", "2: remote")
    (folder / "remote.yaml").write_text(text)
    error = refuse(capsys, classes, "--on", folder / "remote.yaml")
    assert "expected the classes of the run (early, late, distant), got remote" in error
    for option, value in (("--data", folder), ("--out", folder / "x.csv")):
        error = refuse(capsys, survival, option, value)
        assert f"{option}: expected together with --on" in error


def test_files_of_an_external_cohort(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, on = folder / "survival_cox", ["--on", folder / "other_survival.yaml"]
    out = folder / "risks.csv"
    evaluate(capsys, run, *on, "--out", out)
    table = pd.read_csv(out)
    assert list(table.columns[:4]) == ["patient", "modalities", "seen", "risk"]
    assert (len(table), (table["seen"] > 0).sum()) == (60, 5)
    groups = pd.read_csv(folder / "risks_calibration.csv")
    assert list(groups.columns) == ["time", "patients", "predicted", "observed", "low", "high"]
    assert set(groups.groupby("time")["patients"].sum()) == {55}
    assert (folder / "risks_calibration.svg").read_text().startswith("<?xml")
    evaluate(capsys, run, *on, "--out", out)  # overwrites its own files
    out.unlink()
    assert "risks_calibration.csv' exists" in refuse(capsys, run, *on, "--out", out)
    error = refuse(capsys, run, run, *on, "--out", folder / "new.csv")
    assert "--out: expected one RUN with it, got 2" in error
