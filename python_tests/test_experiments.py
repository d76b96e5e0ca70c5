"""Complete runs: leakage, killed runs, new patients, every shipped cohort, bad input."""

import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import motet
import numpy as np
import pandas as pd
import pytest
import torch
from motet import cli, experiments
from motet.experiments import Run
from motet.experiments.run_folder import locked
from motet.fusion.preprocessing import TableScaling
from motet.io import Bags, Cohort, Split, Survival, load_cohort
from motet.io.cohorts.bags import LazyBags
from safetensors import safe_open

from .conftest import data_path, drawn
from .processes import run_python

QUICK = ["--set", "epochs=2", "--set", "num_latents=4", "--set", "latent_dim=8"]
SMALL = {"epochs": 2, "num_latents": 4, "latent_dim": 8}
SHIPPED = sorted(
    path.stem for path in (Path(motet.__file__).parent / "io/cohorts/shipped").glob("*.yaml")
)
# Their data must be requested; test_public_cohorts.py reads made files.
REQUESTED = re.compile("mimic3_(?!demo)|siim|.*_slides$")
AT_HAND = [name for name in SHIPPED if not REQUESTED.match(name)]
NO_CATEGORY = "ignore:.* is no category of training"


def motet_command(*arguments: object) -> tuple[str, str]:
    """Run a command that succeeds, in this process; return its standard output and error."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert cli.main([*map(str, arguments)]) == 0
    return out.getvalue(), err.getvalue()


def in_another_process(*arguments: object) -> None:
    run_python(
        "import sys; from motet import cli; sys.exit(cli.main(sys.argv[1:]))", *map(str, arguments)
    )


def breast_cancer() -> Cohort:
    return load_cohort("breast_cancer")


def trained(cohort: Cohort, kind: str, out: Path, **options: Any) -> Run:
    if kind in ("healnet", "lego"):
        options.setdefault("changes", SMALL)
    options.setdefault("splits", experiments.Splits(2))
    return experiments.train_run(cohort, kind, out, **options)


def load_shipped(name: str) -> Cohort:
    """Load a shipped cohort; skip the test, or fail in CI, if its data are not there."""
    if name != "breast_cancer":
        data_path("data")
    return load_cohort(name)


def content(run: Path) -> dict[str, bytes]:
    """Return the files of a run that must be equal in two runs; no times, no log."""
    names = ("predictions.csv", "metrics.json", "splits.json", "outcome.csv")
    contents = {name: (run / name).read_bytes() for name in names}
    for path in sorted(run.glob("folds/*/*")):
        if path.suffix == ".safetensors":
            contents[str(path.relative_to(run))] = weights(path)
        elif path.name != "done.json":
            contents[str(path.relative_to(run))] = path.read_bytes()
    return contents


def weights(path: Path) -> bytes:
    """Return the digest of a model's configuration and tensors, which `motet.load` checks."""
    motet.load(path)
    with safe_open(path, framework="pt") as file:
        return file.metadata()["sha256"].encode()


# Leakage


def with_fixed_splits(cohort: Cohort) -> Cohort:
    ids = cohort.patients
    return replace(cohort, splits=(Split(ids[:110], ids[110:150], ids[150:]),))


def changed_test_rows(cohort: Cohort) -> Cohort:
    """Change every feature and the outcome of the patients that are tested."""
    rows = slice(150, None)
    modalities = {}
    for name, table in cohort.modalities.items():
        assert isinstance(table, pd.DataFrame)
        table = table.copy()
        numbers = table.select_dtypes(float).columns
        table.iloc[rows, table.columns.get_indexer(numbers)] *= -7.0
        modalities[name] = table
    outcome = cohort.outcome
    assert isinstance(outcome, Survival)
    times, events = outcome.times.copy(), outcome.events.copy()
    times[rows] = times[rows][::-1] * 3 + 1
    events[rows] = ~events[rows]
    outcome = replace(outcome, times=times, events=events)
    return replace(cohort, modalities=modalities, outcome=outcome)


@pytest.mark.parametrize("kind", ["healnet", pytest.param("lego", marks=pytest.mark.slow)])
def test_test_patients_change_nothing_that_is_fitted(kind: str, tmp_path: Path) -> None:
    """Scaling, bins, weights, the stopping epoch and cut-points are equal, byte for byte."""
    cohort = with_fixed_splits(breast_cancer())
    changes = {**SMALL, "epochs": 6, "patience": 2}
    one = trained(cohort, kind, tmp_path / "one", changes=changes)
    other = trained(changed_test_rows(cohort), kind, tmp_path / "other", changes=changes)
    first, second = (one.fold(0) / "fitted.json", other.fold(0) / "fitted.json")
    assert first.read_bytes() == second.read_bytes()
    first, second = (weights(run.fold(0) / "model.safetensors") for run in (one, other))
    assert first == second
    assert not one.predictions().equals(other.predictions())
    if kind == "healnet":
        first, second = one.facts(0)["history"], other.facts(0)["history"]
        assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_bins_and_censoring_come_from_training(tmp_path: Path) -> None:
    cohort = with_fixed_splits(breast_cancer())
    run = trained(cohort, "healnet", tmp_path / "run")
    outcome = cohort.outcome
    assert isinstance(outcome, Survival)
    expected = motet.TimeBins.fit(outcome.times[:110], outcome.events[:110], 4)
    fitted = json.loads((run.fold(0) / "fitted.json").read_text())
    assert tuple(fitted["objective"]["bins"]["edges"]) == expected.edges
    (fold,) = run.tested()
    assert sorted(fold.train_times) == sorted(outcome.times[:110])
    assert len(fold) == 48


def test_groups_never_part_and_patients_are_tested_once() -> None:
    cohort = replace(breast_cancer(), groups=tuple(str(i // 3) for i in range(198)))
    group = dict(zip(cohort.patients, cohort.groups, strict=True))
    tested: list[str] = []
    for fold in experiments.split_cohort(cohort, experiments.Splits(test=0.2)):
        parts = (fold.train, fold.validation, fold.test)
        owners = [{group[patient] for patient in part} for part in parts]
        assert len(set.union(*owners)) == sum(map(len, owners))
        tested += fold.test
    assert sorted(tested) == sorted(cohort.patients)


def test_given_splits_are_used_and_checked() -> None:
    cohort, ids = breast_cancer(), breast_cancer().patients
    with_splits = replace(cohort, splits=(Split(ids[:150], (), ids[150:]),))
    (fold,) = experiments.split_cohort(with_splits, experiments.Splits())
    assert fold.test == ids[150:]
    assert set(fold.train) | set(fold.validation) == set(ids[:150])
    assert len(fold.validation) == round(0.15 * 198)
    twice = replace(cohort, splits=(Split(ids[:150], ids[149:170], ids[170:]),))
    with pytest.raises(ValueError, match="fold 1: expected every patient in one part"):
        experiments.split_cohort(twice, experiments.Splits())
    again = replace(cohort, splits=(Split(ids[:99], (), ids[99:]), Split(ids[:150], (), ids[150:])))
    with pytest.raises(ValueError, match="fold 2: patient .* in that of fold 1; intervals need"):
        experiments.split_cohort(again, experiments.Splits())
    parted = replace(with_splits, groups=("same",) * 198)
    with pytest.raises(ValueError, match="validation|group"):
        experiments.split_cohort(parted, experiments.Splits())


# Runs


def test_a_run_from_the_command_line(tmp_path: Path) -> None:
    """Predictions in another process equal those of training, also without a modality."""
    out = tmp_path / "runs" / "healnet"
    train = ["train", "breast_cancer", "--model", "healnet", "--out", out, *QUICK]
    shown, errors = motet_command(*train, "--splits", 2, "--test", 0.5, "--json")
    assert errors == ""
    metrics = json.loads(shown)["runs"][str(out)]
    assert metrics == json.loads((out / "metrics.json").read_text())
    frame = pd.read_csv(out / "predictions.csv", dtype={"patient": str})
    assert sorted(frame["patient"]) == sorted(breast_cancer().patients)
    assert "epoch 2: train" in (out / "log.txt").read_text()

    # Curves in predictions.csv are what the metrics were made of.
    again, _ = motet_command("evaluate", out, "--json", "--draws", 1000)
    assert json.loads(again)["runs"][str(out)] == metrics

    new = tmp_path / "new.csv"
    in_another_process("predict", out, "breast_cancer", "--out", new)
    predicted = pd.read_csv(new, dtype={"patient": str}).set_index("patient")
    run, cohort = Run.finished(out), breast_cancer()
    with torch.no_grad():
        expected = []
        for number in range(2):
            fitted = run.fitted(number)
            patients = fitted.patients(cohort.modalities, cohort.patients)
            logits = torch.cat([
                fitted.model(*_arguments(patients.__getitems__([row]))) for row in range(198)
            ])  # fmt: skip
            assert fitted.calibrations is not None
            calibration = fitted.calibrations.maps["genes", "clinical"]
            logits = calibration.slope * logits.double() + torch.tensor(calibration.offset)
            risks = motet.risk(logits).numpy()
            assert fitted.scale is not None
            expected.append((risks - fitted.scale.mean) / fitted.scale.sd)
    np.testing.assert_allclose(predicted["risk"], np.mean(expected, 0), rtol=1e-4, atol=1e-5)
    assert (predicted["seen"] == 1).all()  # each fold tests the half that the other trained on
    assert (predicted["modalities"] == "genes clinical").all()

    table = cohort.modalities["clinical"]
    assert isinstance(table, pd.DataFrame)
    table = table.rename(columns=str).reset_index()
    table["patient"] = "new " + table["patient"]
    table.loc[5, ["age", "size", "grade", "er"]] = None
    table.to_csv(tmp_path / "clinical.csv", index=False)
    (tmp_path / "new.yaml").write_text(
        "name: new patients\npatient: patient\ntables: {c: {file: clinical.csv}}\n"
        "modalities: {clinical: {table: c, categorical: [er, grade]}}\n"
    )
    motet_command("predict", out, tmp_path / "new.yaml", "--out", new)
    fewer = pd.read_csv(new, dtype={"patient": str}, keep_default_na=False)
    assert (fewer["seen"] == 0).all()
    assert set(fewer["modalities"]) == {"clinical", ""}
    halved = replace(cohort, modalities={"clinical": cohort.modalities["clinical"]})
    np.testing.assert_allclose(
        fewer["risk"].drop(5),
        experiments.predict_cohort(run, halved)["risk"].drop(5),
        rtol=1e-4,
        atol=1e-5,
    )
    curves = fewer.filter(like="survival at").to_numpy()
    assert ((curves >= 0) & (curves <= 1)).all()
    assert (np.diff(curves, axis=1) <= 1e-9).all()


def test_warnings_of_prediction_are_lines(tmp_path: Path) -> None:
    """A category that training did not have, and a column that is filled, are named."""
    out, new = tmp_path / "run", tmp_path / "new.csv"
    run = trained(breast_cancer(), "healnet", out, modalities=["clinical"])
    table = breast_cancer().modalities["clinical"]
    assert isinstance(table, pd.DataFrame)
    table = table.astype({"grade": object}).drop(columns="size")
    table.iloc[[3, 4], table.columns.get_loc("grade")] = "worst"
    table.to_csv(tmp_path / "clinical.csv")
    (tmp_path / "new.yaml").write_text(
        "name: new patients\npatient: patient\ntables: {c: {file: clinical.csv}}\n"
        "modalities: {clinical: {table: c, categorical: [er, grade], fill: {size: 2}}}\n"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        _, errors = motet_command("predict", out, tmp_path / "new.yaml", "--out", new)
    begin = "motet predict: warning: new"
    assert errors.splitlines() == [
        f"{begin}.yaml: modalities.clinical: table 'c' (clinical.csv) has no column 'size'; filled "
        "with '2'",
        f"{begin} patients: modality 'clinical', column 'grade': 'worst' (2 patients) is no "
        "category of training; it counts as none of the known ones",
    ]
    (scaling,) = run.fitted(0).scaling.values()
    assert isinstance(scaling, TableScaling)
    x, _ = scaling.transform(table.assign(size=2.0).astype({"grade": "category"}))
    grades = [i for i, name in enumerate(scaling.features) if name.startswith("grade=")]
    assert not x[3][grades].any()


def test_features_of_bags_that_are_absent_are_named(tmp_path: Path) -> None:
    """New bags may have their features in another order; those of training that they lack count."""
    cohort = breast_cancer()
    rng = np.random.default_rng(0)
    tokens = {p: rng.normal(size=(2, 3)).astype(np.float32) for p in cohort.patients}

    def with_bags(columns: list[int]) -> Cohort:
        names = tuple("abc"[i] for i in columns)
        bags = {p: (x[:, columns], None) for p, x in tokens.items()}
        return replace(cohort, modalities={"rows": Bags(bags, features=len(names), names=names)})

    run = trained(with_bags([0, 1, 2]), "healnet", tmp_path / "run")
    expected = experiments.predict_cohort(run, with_bags([0, 1, 2]))["risk"]
    turned = experiments.predict_cohort(run, with_bags([2, 0, 1]))["risk"]
    np.testing.assert_allclose(turned, expected, rtol=1e-5)
    with pytest.warns(UserWarning, match="'rows': c of training is absent; missing values are imp"):
        experiments.predict_cohort(run, with_bags([1, 0]))


def _arguments(batch: Any) -> tuple[Any]:
    inputs, options = batch.arguments()
    assert not options["present"]
    return (inputs,)


def test_lego_merge_and_fuse(tmp_path: Path) -> None:
    cohort = breast_cancer()
    lego = trained(cohort, "lego", tmp_path / "lego")
    blocks = experiments.blocks_of([tmp_path / "lego"])
    assert [block.config["modalities"] for block in blocks] == [["genes"], ["clinical"]]
    code = cli.main(["merge", str(tmp_path / "lego"), "--out", str(tmp_path / "merged")])
    assert code == 0
    merged = Run.finished(tmp_path / "merged")
    assert merged.predictions().equals(lego.predictions())
    # Blocks trained one by one give the same merge, and the same risks in the other order.
    folders = [str(tmp_path / "lego" / "blocks" / name) for name in ("clinical", "genes")]
    assert cli.main(["merge", *folders, "--out", str(tmp_path / "turned")]) == 0
    turned = Run.finished(tmp_path / "turned").predictions()
    np.testing.assert_allclose(turned["risk"], lego.predictions()["risk"], rtol=1e-3)
    command = ["fuse", str(tmp_path / "lego"), "--out", str(tmp_path / "fused"), "--mode", "weave"]
    assert cli.main(command) == 0
    fused = Run.finished(tmp_path / "fused")
    assert len(fused.facts(0)["history"]["train_loss"]) == 2
    assert not fused.predictions().equals(lego.predictions())
    compared = experiments.compare_runs(fused, lego)
    assert compared.low <= compared.difference <= compared.high


def test_blocks_of_other_splits_do_not_merge(tmp_path: Path) -> None:
    cohort = breast_cancer()
    trained(cohort, "lego", tmp_path / "a", modalities=["genes"])
    other = experiments.Splits(2, seed=1)
    trained(cohort, "lego", tmp_path / "b", modalities=["clinical"], splits=other)
    trained(cohort, "lego", tmp_path / "c", modalities=["clinical"])
    blocks = experiments.blocks_of([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ValueError, match="expected the splits of .* would be tested"):
        experiments.merge_runs(blocks, tmp_path / "ab", cohort=cohort)
    elsewhere = replace(cohort, groups=tuple(f"of {group}" for group in cohort.groups))
    trained(elsewhere, "lego", tmp_path / "d", modalities=["clinical"])
    blocks = experiments.blocks_of([tmp_path / "a", tmp_path / "d"])
    with pytest.raises(ValueError, match="expected the cohort of"):
        experiments.merge_runs(blocks, tmp_path / "ad", cohort=cohort)
    blocks = experiments.blocks_of([tmp_path / "a", tmp_path / "a"])
    with pytest.raises(ValueError, match="a second block of modality 'genes'"):
        experiments.merge_runs(blocks, tmp_path / "aa", cohort=cohort)
    blocks = experiments.blocks_of([tmp_path / "a", tmp_path / "c"])
    merged = experiments.merge_runs(blocks, tmp_path / "ac", cohort=cohort)
    assert merged.predictions()["risk"].nunique() > 20


def test_blocks_train_on_the_patients_that_have_their_modality(tmp_path: Path) -> None:
    """If no patient has both modalities, the blocks still merge and every patient is predicted."""
    cohort = breast_cancer()
    genes, clinical = (cohort.modalities[name].copy() for name in ("genes", "clinical"))
    genes.iloc[::2] = np.nan
    clinical.iloc[1::2] = None
    unpaired = replace(cohort, modalities={"genes": genes, "clinical": clinical})
    run = trained(unpaired, "lego", tmp_path / "run", splits=experiments.Splits(2, test=0.5))
    assert sorted(run.predictions()["patient"]) == sorted(cohort.patients)
    for block in experiments.blocks_of([tmp_path / "run"]):
        assert len(block.predictions()) == 99


def test_nobody_in_the_test_part_has_a_modality(tmp_path: Path) -> None:
    """Such a block is trained and merged, and tested on no patient (as protein in breast_tcga)."""
    cohort = with_fixed_splits(breast_cancer())
    genes = cohort.modalities["genes"].copy()
    genes.iloc[150:] = np.nan
    cohort = replace(cohort, modalities={**cohort.modalities, "genes": genes})
    run = trained(cohort, "lego", tmp_path / "run")
    assert len(run.predictions()) == 48
    block, clinical = experiments.blocks_of([tmp_path / "run"])
    assert experiments.read_metrics(block) == {"patients": 0, "folds": 0}
    # The merge then predicts with the other block and the merged head.
    assert (run.predictions()["patient"] == clinical.predictions()["patient"]).all()
    with pytest.raises(ValueError, match="predicts no test patient that"):
        experiments.compare_runs(run, block)
    assert cli.main(["evaluate", str(block.path)]) == 0


class CountedBags(LazyBags):
    """Bags that count how often each is read."""

    def __init__(self, patients: Sequence[str]) -> None:
        super().__init__({patient: i for i, patient in enumerate(patients)})
        self.reads = dict.fromkeys(patients, 0)

    def __getitem__(self, patient: str) -> tuple[np.ndarray, None]:
        self.reads[patient] += 1
        generator = np.random.default_rng(self._locations[patient])
        return generator.normal(size=(3, 4)).astype(np.float32), None

    def tokens(self, patient: str) -> int:
        return 3


@pytest.mark.parametrize(("kind", "runs"), [("healnet", 1), ("cox", 1), ("lego", 2)])
def test_a_bag_is_read_once_per_fold(kind: str, runs: int, tmp_path: Path) -> None:
    """Scaling, two epochs, validation and prediction read a bag once; a merge once more."""
    cohort = breast_cancer()
    counted = CountedBags(cohort.patients)
    modalities = {"clinical": cohort.modalities["clinical"], "wsi": Bags(counted, features=4)}
    trained(replace(cohort, modalities=modalities), kind, tmp_path / "run")
    # A patient is in at most two folds; merging does not read the validation part.
    assert min(counted.reads.values()) >= 1
    assert max(counted.reads.values()) == 2 * runs


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """A run that is killed and continued ends with the files of an undisturbed run."""
    changes = ["--set", "epochs=30", "--set", "patience=30", *QUICK[2:], "--splits", "2"]
    command = ["train", "breast_cancer", "--model", "healnet", *changes, "--out"]
    motet_command(*command, tmp_path / "whole")
    generator, killed, kills = random.Random(0), tmp_path / "killed", 0
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-m", "motet", *command, str(killed)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        seen = len(list(killed.glob("log.txt")) and (killed / "log.txt").read_text())
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            log = killed / "log.txt"
            if log.exists() and "epoch" in log.read_text()[seen:]:
                break
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.8))
        # A kill counts only if the training had already written a checkpoint.
        kills += process.poll() is None and any(killed.glob("folds/*/last.ckpt"))
        process.kill()
        process.wait()
    assert kills >= 2
    motet_command(*command, killed)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob("folds/*/last.ckpt"))


@pytest.mark.slow
def test_torchrun_leaves_one_run_folder(tmp_path: Path) -> None:
    """Of two processes only the first writes; the blocks are merged after their training."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    command = ["train", "breast_cancer", "--model", "lego", *QUICK, "--splits", "2", "--out"]
    subprocess.run(
        [sys.executable, *launch, "-m", "motet", *command, str(tmp_path / "run")],
        check=True, capture_output=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    run = Run.finished(tmp_path / "run")
    assert np.isfinite(run.predictions()["risk"]).all()
    (block, _) = experiments.blocks_of([tmp_path / "run"])
    assert len(block.facts(1)["history"]["train_loss"]) == 2
    assert block.predictions()["risk"].nunique() > 20


def test_a_run_continues_only_as_it_began(tmp_path: Path) -> None:
    cohort = breast_cancer()
    trained(cohort, "cox", tmp_path / "run")
    before = content(tmp_path / "run")
    again = trained(cohort, "cox", tmp_path / "run")
    assert content(tmp_path / "run") == before
    assert again.predictions()["fold"].nunique() == 2
    with pytest.raises(
        ValueError, match=r'holds a run with model "cox", got "rsf"; choose another'
    ):
        trained(cohort, "rsf", tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run with other splits"):
        trained(cohort, "cox", tmp_path / "run", splits=experiments.Splits(2, seed=9))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        trained(cohort, "cox", tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir() if path.suffix] == ["thesis.tex"]
    (tmp_path / "full" / "blocks").mkdir()
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        trained(cohort, "lego", tmp_path / "full")
    assert not list((tmp_path / "full" / "blocks").iterdir())  # refused before training
    with pytest.raises(ValueError, match="heads: expected a positive integer, got -1"):
        trained(cohort, "healnet", tmp_path / "typo", changes={**SMALL, "heads": -1})
    # The failed attempt trained nothing, so another may begin.
    trained(cohort, "healnet", tmp_path / "typo")
    with locked(tmp_path / "busy"), pytest.raises(ValueError, match="another motet process"):
        trained(cohort, "cox", tmp_path / "busy")


@pytest.mark.slow
@pytest.mark.filterwarnings(NO_CATEGORY)
@pytest.mark.parametrize("name", drawn(AT_HAND, 7))
def test_every_shipped_cohort_trains_with_one_command(name: str, tmp_path: Path) -> None:
    cohort = load_shipped(name)
    out = tmp_path / "run"
    command = ["train", name, "--model", "healnet", "--out", str(out), "--set", "epochs=1"]
    assert cli.main([*command, *QUICK[2:], "--splits", "2"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["patients"] == len(Run.finished(out).predictions())
    run = Run.finished(out)
    table = experiments.predict_cohort(run, cohort)
    assert list(table["patient"]) == list(cohort.patients)
    assert np.isfinite(table.select_dtypes(float)).all().all()
    # Without an outcome, codes, categories and lab items may have another order.
    blind = load_cohort(name, outcome=False)
    other = experiments.predict_cohort(run, blind).set_index("patient").loc[list(cohort.patients)]
    numbers = table.select_dtypes(float).to_numpy()
    np.testing.assert_allclose(other.select_dtypes(float), numbers, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings(NO_CATEGORY)
@pytest.mark.parametrize("name", drawn(AT_HAND, 5))
def test_a_baseline_predicts_every_shipped_cohort(name: str, tmp_path: Path) -> None:
    """Its curves are finite and fall in every fold."""
    cohort = load_shipped(name)
    survival = isinstance(cohort.outcome, Survival)
    run = trained(cohort, "cox" if survival else "logistic", tmp_path / "run")
    for number in range(len(run.splits)):
        numbers = run.predictions().query(f"fold == {number}").filter(regex=r"^(s|p)_")
        assert len(numbers)
        assert ((numbers >= 0) & (numbers <= 1)).all().all()  # NaN is neither
        if survival:
            assert (np.diff(numbers, axis=1) <= 0).all()
    assert np.isfinite(experiments.predict_cohort(run, cohort).select_dtypes(float)).all().all()


# Bad input

ROWS = 60


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Write a cohort of 60 patients that trains; tests damage it."""
    generator = np.random.default_rng(0)
    frame = pd.DataFrame(generator.normal(size=(ROWS, 3)).round(3), columns=["a", "b", "c"])
    frame.insert(0, "id", [f"{i:03}" for i in range(ROWS)])
    frame["months"] = generator.exponential(20, ROWS).round(2) + 0.1
    frame["died"] = (generator.random(ROWS) < 0.7).astype(int)
    frame.to_csv(tmp_path / "table.csv", index=False)
    np.savez(tmp_path / "bags.npz", **{i: generator.normal(size=(2, 3)) for i in frame["id"]})
    (tmp_path / "cohort.yaml").write_text(
        "name: sixty\npatient: id\ntables: {t: {file: table.csv}}\n"
        "outcome: {table: t, time: months, unit: months, event: died}\n"
        "modalities:\n  omic: {table: t, columns: [a, b, c]}\n  wsi: {bags: bags.npz}\n"
    )
    return tmp_path


def spoil(change: Callable[[pd.DataFrame], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        frame = pd.read_csv(folder / "table.csv", dtype={"id": str})
        changed = change(frame)
        (frame if changed is None else changed).to_csv(folder / "table.csv", index=False)

    return apply


def rewrite(old: str, new: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        text = (folder / "cohort.yaml").read_text()
        assert old in text
        (folder / "cohort.yaml").write_text(text.replace(old, new))

    return apply


def bags(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        with np.load(folder / "bags.npz") as archive:
            content = dict(archive)
        change(content)
        np.savez(folder / "bags.npz", **content)

    return apply


def set_cell(column: str, row: int, value: Any) -> Callable[[Path], None]:
    def change(frame: pd.DataFrame) -> None:
        frame[column] = frame[column].astype(object)
        frame.loc[row, column] = value

    return spoil(change)


BAD = {
    "a missing file": (lambda folder: (folder / "table.csv").unlink(), "table.csv"),
    "no such cohort": (lambda folder: (folder / "cohort.yaml").unlink(), "no file"),
    "an unknown column": (rewrite("[a, b, c]", "[a, b, cc]"), "no column 'cc'"),
    "time below zero": (set_cell("months", 3, -1), "-1"),
    "time zero": (set_cell("months", 3, 0), "003"),
    "no event": (spoil(lambda f: f.assign(died=0)), "event"),
    "one event": (spoil(lambda f: f.assign(died=[1] + [0] * (ROWS - 1))), "no event among the"),
    "a column of NaN": (spoil(lambda f: f.assign(b=np.nan)), "'b'"),
    "nobody has it": (
        bags(lambda held: [held.update({"x" + key: held.pop(key)}) for key in list(held)]),
        "no patient of the outcome has a bag",
    ),
    "a word": (set_cell("a", 7, "high"), "'high'"),
    "infinity": (set_cell("a", 7, np.inf), "column 'a'"),
    "NaN in a bag": (bags(lambda held: held["004"].__setitem__((0, 0), np.nan)), "NaN or Inf"),
    "Inf in a bag": (bags(lambda held: held["004"].__setitem__((0, 0), np.inf)), "NaN or Inf"),
    "an empty table": (spoil(lambda f: f.iloc[:0]), "table.csv"),
    "an unknown key": (rewrite("columns: [a", "colums: [a"), "unknown key 'colums'"),
    "a patient twice": (spoil(lambda f: pd.concat([f, f.iloc[:1]])), "000"),
    "no YAML": (lambda folder: (folder / "cohort.yaml").write_text("a: [b"), "cohort.yaml"),
    "a name that leaves the folder": (rewrite("omic:", '"../omic":'), "without dots and slashes"),
    "too large numbers": (set_cell("a", 7, 1e300), "column 'a'"),
    "a group as big as all": (rewrite("patient: id\n", "patient: id\ngroup: died\n"), "groups"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(
    case: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = BAD[case]
    change(files)
    command = ["train", str(files / "cohort.yaml"), "--model", "cox", "--out", str(files / "run")]
    assert cli.main(command) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("motet train: ")
    assert printed.err.count("\n") == 1
    assert expected in printed.err
    assert not list(files.glob("run/folds/*/done.json"))


def test_the_cohort_that_is_spoiled_trains(files: Path) -> None:
    command = ["train", str(files / "cohort.yaml"), "--model", "healnet", *QUICK, "--out"]
    assert cli.main([*command, str(files / "run")]) == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "perceiver"], "--model: expected one of healnet, lego, cox"),
        (["--model", "logistic"], "--model: expected cox, coxnet, rsf, boosting for survival"),
        (["--model", "healnet", "--set", "epoch=3"], "unknown setting 'epoch' of healnet; did you"),
        (["--model", "healnet", "--set", "epochs"], "--set: expected NAME=VALUE, got 'epochs'"),
        (["--model", "healnet", "--set", "depth=none"], "depth: expected a positive integer"),
        (["--model", "healnet", "--set", "max_lr=fast"], "max_lr: expected a positive finite"),
        (["--model", "healnet", "--set", "loss=mse"], "--set loss: expected nll or cox, got 'mse'"),
        (["--model", "healnet", "--set", "alpha=2"], "--set alpha: expected a number in [0, 1]"),
        (["--model", "lego", "--set", "encoders=big"], "--set encoders: expected null or paper"),
        (["--model", "cox", "--set", "bins=3"], "unknown setting 'bins' of cox"),
        (
            ["--model", "healnet", "--set", "bins=1"],
            "--set bins: expected an integer of at least 2",
        ),
        (["--model", "healnet", "--set", "snn=[e"], "--set: cannot read 'snn=[e'"),
        (
            ["--model", "healnet", "--set", "depth=2020-01-01"],
            "--set depth: expected a number or a",
        ),
        (["--model", "healnet", "--set", "momentum=abc"], "momentum: expected a positive finite"),
        (["--model", "cox", "--set", "epochs=3"], "unknown setting 'epochs' of cox"),
        (["--model", "cox", "--modalities", "rna"], "--modalities: expected some of omic, wsi"),
        (["--model", "cox", "--test", "0.5"], "test: expected at most 1 / 5"),
        (["--model", "cox", "--splits", "0"], "count: expected a positive integer"),
        (["--model", "cox", "--data", "nowhere"], "table.csv"),
    ],
)
def test_bad_options_are_one_clear_line(
    arguments: list[str], expected: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(files / "run")]
    assert cli.main(["train", str(files / "cohort.yaml"), *arguments, *out]) == 2
    printed = capsys.readouterr()
    assert expected in printed.err
    assert printed.err.count("\n") == 1


def test_half_written_runs_are_one_clear_line(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort, run = str(files / "cohort.yaml"), files / "run"
    train = ["train", cohort, "--model", "healnet", *QUICK, "--splits", "2", "--out", str(run)]
    assert cli.main(train) == 0
    before = content(run)
    capsys.readouterr()

    def refused(expected: str, *command: str) -> None:
        assert cli.main([*command]) == 2
        printed = capsys.readouterr()
        assert expected in printed.err
        assert printed.err.count("\n") == 1

    evaluate = ["evaluate", str(run)]
    predict = ["predict", str(run), cohort, "--out", str(files / "risks.csv")]
    refused("no such run folder", "evaluate", str(files / "nothing"))
    refused("no config.json", "evaluate", str(files))
    refused("expected LegoBlocks", "merge", str(run), "--out", str(files / "merged"))

    (run / "folds" / "1" / "done.json").rename(files / "kept")
    for command in (evaluate, predict):
        refused("incomplete, fold 2 of 2 is not done", *command)
    (files / "kept").rename(run / "folds" / "1" / "done.json")

    for name in ("model.safetensors", "fitted.json", "predictions.csv", "done.json"):
        path = run / "folds" / "0" / name
        kept = path.read_bytes()
        for broken in (kept[: len(kept) // 2], None):
            path.write_bytes(broken) if broken else path.unlink()
            refused("incomplete, fold 1 of 2 is not done", *predict)
        if name in ("model.safetensors", "fitted.json"):
            path.write_bytes(kept[:-9] + b"?" * 9)  # damaged, but of the right size
            refused("corrupt", *predict)
        path.write_bytes(kept)
    outcome = (run / "outcome.csv").read_bytes()
    (run / "outcome.csv").write_bytes(outcome[: len(outcome) // 2])
    refused("outcome.csv: incomplete", *evaluate)

    (run / "metrics.json").write_text("{")
    (run / "splits.json").write_text("{")
    refused("corrupt, config.json or splits.json", *evaluate)
    (run / "splits.json").unlink()
    refused("incomplete, without", *evaluate)
    (run / "splits.json").write_bytes(before["splits.json"])
    assert cli.main(train) == 0  # the same command trains the missing parts again
    assert content(run) == before

    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "format": 99}))
    refused("format 99 was written by motet", *evaluate)


def test_predictions_overwrite_nothing_else(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort, run = files / "cohort.yaml", files / "run"
    train = ["train", str(cohort), "--model", "healnet", *QUICK, "--splits", "2", "--out", str(run)]
    assert cli.main(train) == 0
    before = content(run)
    predict = ["predict", str(run), str(cohort), "--out"]
    for out, expected in (
        (files / "table.csv", "holds no predictions of motet"),
        (run / "predictions.csv", "holds no predictions of motet"),
        (Path("/dev/null"), "holds no predictions of motet"),
        (run, "expected a file, got the folder"),
        (files / "nowhere" / "risks.csv", "no folder"),
    ):
        capsys.readouterr()
        assert cli.main([*predict, str(out)]) == 2
        printed = capsys.readouterr()
        assert expected in printed.err
        assert printed.err.count("\n") == 1
    assert content(run) == before
    assert not Path("/dev/null").is_file()
    for _ in range(2):
        assert cli.main([*predict, str(files / "risks.csv")]) == 0
    spoil(lambda f: f.assign(a=[1e35] + [0.0] * (ROWS - 1)))(files)
    capsys.readouterr()
    assert cli.main([*predict, str(files / "risks.csv")]) == 2
    printed = capsys.readouterr().err
    assert "modality 'omic': column 'a': expected numbers like those of training" in printed
    assert "got 1e+35 for patient '000'" in printed


@pytest.mark.parametrize(
    "sign", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_an_interrupted_run_says_so(sign: signal.Signals, tmp_path: Path) -> None:
    command = ["train", "breast_cancer", "--model", "healnet", "--set", "epochs=500", "--out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "motet", *command, str(tmp_path / "run")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell's background jobs ignore Ctrl-C, and so would processes started by the tests.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("run/folds/*/last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(sign)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err == "motet train: interrupted; give the same command again to continue\n"


def test_new_patients_that_do_not_fit(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cohort, run = files / "cohort.yaml", files / "run"
    train = ["train", str(cohort), "--model", "healnet", *QUICK, "--splits", "2", "--out", str(run)]
    assert cli.main(train) == 0
    capsys.readouterr()
    for change, expected in (
        (rewrite("[a, b, c]", "[a, b]"), "modality 'omic': expected the columns of training, got"),
        (rewrite("omic:", "rna:"), None),
        (rewrite("wsi:", "ct:"), "expected at least one modality of the run (omic, wsi), got rna"),
    ):
        change(files)
        code = cli.main(["predict", str(run), str(cohort), "--out", str(files / "risks.csv")])
        printed = capsys.readouterr()
        assert code == (0 if expected is None else 2), printed.err
        if expected:
            assert expected in printed.err
            assert printed.err.count("\n") == 1
