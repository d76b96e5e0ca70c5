"""The report of runs: its statistics, its page, its files and pseudonyms."""

import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from motet import ClassFold, SurvivalFold, cli, evaluate_classes, evaluate_survival
from motet.experiments import Run, write_run_report
from motet.experiments.report.facts import (
    RunFacts,
    brier_curves,
    class_aucs,
    name_runs,
    patient_rows,
    risk_groups,
    roc_curve,
)
from motet.fusion.log_rank import stratified_log_rank
from motet.io.store.pseudonyms import pseudonymise_patients
from sksurv.compare import compare_survival
from sksurv.util import Surv

from .run_report_helpers import HOSTILE, RNA, made_cohort, made_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return made_run(made_cohort(), "cox", tmp_path_factory.mktemp("runs") / "cox")


def made_fold(seed: int, n: int = 60) -> SurvivalFold:
    random = np.random.default_rng(seed)
    times, events = random.integers(1, 25, n).astype(float), random.random(n) < 0.6
    return SurvivalFold(times, events, random.random(n), times, events, cut=0.5)


def test_log_rank_of_one_fold_is_that_of_scikit_survival() -> None:
    fold = made_fold(0)
    groups = np.random.default_rng(1).integers(0, 3, len(fold))
    expected = compare_survival(Surv.from_arrays(fold.events, fold.times), groups)[1]
    assert stratified_log_rank([fold], [groups], 3) == pytest.approx(expected, rel=1e-9)
    # A group without patients adds nothing.
    assert stratified_log_rank([fold], [groups], 5) == pytest.approx(expected, rel=1e-6)
    assert stratified_log_rank([fold], [np.zeros(len(fold), int)], 3) is None


def test_log_rank_of_two_groups_is_that_of_the_metrics() -> None:
    folds = [made_fold(seed) for seed in (2, 3, 4)]
    groups = [(fold.risks > 0.5).astype(int) for fold in folds]
    expected = evaluate_survival(folds, draws=10)["risk_groups"]["log_rank_p"]
    assert stratified_log_rank(folds, groups, 2) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("decimals", [1, 6])  # with ties of the probabilities, and without
def test_the_area_below_the_roc_curve_is_the_auc(decimals: int) -> None:
    random = np.random.default_rng(5)
    folds = []
    for n in (17, 40):
        scores = np.round(random.random((n, 3)), decimals) + 0.01
        labels = np.append([0, 1, 2], random.integers(0, 3, n - 3))
        folds.append(ClassFold(labels, scores / scores.sum(1, keepdims=True)))
    metrics = evaluate_classes(folds, draws=10)["macro_auc"]["per_class"]
    for k, auc in class_aucs(folds, 100).items():
        x, y = roc_curve(folds, k)
        assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
        assert (np.diff(x) >= 0).all()
        assert (np.diff(y) >= -1e-12).all()
        assert np.trapezoid(y, x) == pytest.approx(metrics[k], abs=1e-9)
        assert auc.low <= auc.value == pytest.approx(metrics[k])
        assert auc.value <= auc.high


def test_risk_groups_are_divided_at_the_tertiles_of_training(run: Run) -> None:
    facts = RunFacts(run, "cox", 0)
    groups = risk_groups(facts)
    assert groups.names == ("low", "middle", "high")
    for number, (group, fold) in enumerate(zip(groups.numbers, facts.tested, strict=True)):
        fitted, parts = run.fitted(number), run.splits[number]
        cohort = made_cohort()
        known = [*parts["train"], *parts["validation"]]  # a baseline is fitted to both
        risks = fitted.predict(fitted.patients(cohort.modalities, known)).risk  # pyright: ignore[reportAttributeAccessIssue]
        first, second = np.quantile(risks, [1 / 3, 2 / 3])
        expected = (fold.risks > first).astype(int) + (fold.risks > second)
        assert (group == expected).all()
        assert len({*expected.tolist()}) == 3
    # A run that was finished before the tertiles were recorded has two groups.
    for part in facts.folds:
        part.pop("tertiles")
    halves = risk_groups(facts)
    assert halves.names == ("low", "high")
    assert halves.p == pytest.approx(facts.metrics["risk_groups"]["log_rank_p"], rel=1e-9)


def test_the_brier_curve_agrees_with_the_metrics(run: Run) -> None:
    facts = RunFacts(run, "cox", 0)
    times, model, reference = brier_curves(facts)
    brier = facts.metrics["brier"]
    for curve, name in ((model, "values"), (reference, "kaplan_meier")):
        assert np.interp(brier["times"], times, curve) == pytest.approx(brier[name], abs=0.02)
    assert times[-1] == facts.metrics["integrated_brier"]["end"]


def test_a_run_records_the_modalities_of_its_patients(run: Run) -> None:
    has = run.modalities()
    assert has is not None
    cohort = made_cohort()
    for name, table in cohort.modalities.items():
        assert isinstance(table, pd.DataFrame)
        assert has[name].tolist() == table.notna().any(axis=1).tolist()
    rows = patient_rows(RunFacts(run, "cox", 0), {p: p for p in cohort.patients})
    shown = dict(zip(rows["patient"], rows["modalities"], strict=True))
    for patient, text in shown.items():
        assert text == ("clinical" if not has[RNA][patient] else f"clinical, {RNA}")
    assert {*shown.values()} == {"clinical", f"clinical, {RNA}"}


def test_runs_of_one_folder_name_are_told_apart_by_their_parents(run: Run, tmp_path: Path) -> None:
    runs = [replace(run, path=tmp_path / seed / "cox") for seed in ("0", "1")]
    assert [facts.name for facts in name_runs(runs)] == ["0/cox", "1/cox"]
    assert [facts.name for facts in name_runs(runs[:1])] == ["cox"]


@pytest.mark.slow  # pictures as PNG take seconds
def test_the_page_has_everything_and_no_markup_of_names(run: Run, tmp_path: Path) -> None:
    out = write_run_report([run], tmp_path / "report.html", pictures=tmp_path / "p", draws=100)
    page = out.read_text()
    for name in HOSTILE[:5]:
        assert name not in page
    rows = re.findall(r"<tr><td><bdi>(.*?)</bdi>", page)
    tested = run.predictions()["patient"]
    assert len(rows) == len(tested)
    shown = {unescape(row) for row in rows}
    assert shown >= {name for name in tested if name.isprintable()}
    assert not re.search("[\u202e\u2066]", page)
    pictures = sorted(path.name for path in (tmp_path / "p").iterdir())
    names = ["brier-1", *(f"calibration-1-{i}" for i in (1, 2, 3)), "risk-groups-1"]
    assert pictures == sorted(f"{name}.{suffix}" for name in names for suffix in ("png", "svg"))
    assert page.count('class="plot"') == len(names)  # a baseline has no training curve
    assert "<image" not in page
    assert not re.search('(src|href)="[^#]', page)
    curves: dict[str, Any] = json.loads(re.findall(r'id="curves">(.*?)</script>', page)[0])
    assert np.shape(curves["curves"]) == (len(tested), len(curves["times"]))


def test_pseudonyms_replace_the_ids_and_stay(run: Run, tmp_path: Path) -> None:
    keys, tested = tmp_path / "keys.json", run.predictions()["patient"].tolist()
    page = write_run_report([run], tmp_path / "a.html", pseudonyms=keys, draws=100).read_text()
    assert not [patient for patient in tested if patient in unescape(page)]
    known = json.loads(keys.read_text())
    assert {*known["patients"].values()} == {*tested}
    for pseudonym in known["patients"]:
        assert pseudonym in page
    assert keys.stat().st_mode & 0o077 == 0
    again = pseudonymise_patients(tested[:3], keys)
    assert [known["patients"][again[patient]] for patient in tested[:3]] == tested[:3]
    assert json.loads(keys.read_text()) == known
    other = pseudonymise_patients(tested[:1], tmp_path / "other.json")
    assert other[tested[0]] not in known["patients"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "report.txt"], "--out: expected a file that ends in .html, got 'report.txt'"),
        (["--out", "gone/report.html"], "--out: no folder 'gone'"),
        (["--out", "a.html", "--draws", "3"], "--draws: expected at least 100, got 3"),
        (["--out", "a.html", "--pictures", "file"], "--pictures: expected a folder, got the file"),
        (["--out", "a.html", "--pseudonymise", "a.html"], "expected a file apart from report and"),
        (
            ["--out", "a.html", "--pictures", "p", "--pseudonymise", "p/keys"],
            "expected a file apart",
        ),
        (["nothing", "--out", "a.html"], "nothing: no such run folder"),
    ],
)
def test_bad_input_is_one_line(
    run: Run, arguments: list[str], message: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert cli.main(["report", str(run.path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("a.html").exists()
