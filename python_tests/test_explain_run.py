"""`motet explain`: the tables and pictures of a run, on made cohorts with planted columns."""

import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from motet import cli
from motet.experiments import Run, fuse_runs, train_run
from motet.experiments.explain_slides import file_name
from motet.experiments.settings import Splits
from motet.io import load_cohort

from .conftest import drawn

HOSTILE = '<b>$x_1$</b> & "é,\u202e'
SMALL = {"epochs": 2, "num_latents": 4, "latent_dim": 8}


def write_cohort(folder: Path, *, seed: int, n: int, genes: int, outcome: str = "survival") -> Any:
    """Write tables of genes and of a patient's data, and bags; return YAML and planted genes."""
    rng = np.random.default_rng(seed)
    names = [f"g{i}" for i in range(genes - 1)] + [HOSTILE]
    planted = rng.choice(genes, 2, replace=False).tolist()
    frame = pd.DataFrame(rng.normal(size=(n, genes)).round(3), columns=names)
    hazard = np.exp(1.5 * frame.iloc[:, planted].sum(axis=1).to_numpy())
    frame["months"] = (rng.exponential(20 / hazard) + 0.1).round(2)
    frame["died"] = 1
    frame["worse"] = (hazard > np.median(hazard)).astype(int)
    frame["sex"] = rng.choice(["f", "m", "x"], n)
    frame["age"] = rng.integers(40, 80, n).astype(float)
    frame.loc[5, "age"] = np.nan
    ids = [f"p{i}" for i in range(n)]
    ids[7] = "../<i>7</i>"
    frame.insert(0, "id", ids)
    frame.loc[3, ["sex", "age"]] = np.nan
    frame.to_csv(folder / "t.csv", index=False)
    np.savez(folder / "bags.npz", **{
        key: rng.normal(size=(5, 3)).astype(np.float32) for key in ids if key != ids[7]
    })  # fmt: skip
    path = folder / "made.yaml"
    ends = {
        "survival": "{table: t, time: months, unit: months, event: died}",
        "classes": "{table: t, label: worse, names: {0: well, 1: ill}}",
    }
    path.write_text(json.dumps({
        "name": "made", "patient": "id",
        "tables": {"t": {"file": "t.csv"}},
        "modalities": {
            "genes": {"table": "t", "columns": names},
            "person": {"table": "t", "columns": ["sex", "age"], "categorical": ["sex"]},
            "cells": {"bags": "bags.npz"},
        },
    })[:-1] + f', "outcome": {ends[outcome]}}}')  # fmt: skip
    return path, [names[i] for i in planted]


def explain(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert cli.main(["explain", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refuse(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert cli.main(["explain", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a cohort and train HEALNet on two splits of it."""
    folder = tmp_path_factory.mktemp("explain")
    path, _ = write_cohort(folder, seed=0, n=44, genes=6)
    train_run(load_cohort(path), "healnet", folder / "run", splits=Splits(2), changes=SMALL)
    return folder


def test_tables_of_an_explanation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("captum")
    run, out = Run.finished(folder / "run"), folder / "out"
    tested = [*dict.fromkeys(run.splits[0]["test"] + run.splits[1]["test"])]
    trained = next(p for p in load_cohort(folder / "made.yaml").patients if p not in tested)
    names = [tested[0], trained]
    printed = explain(capsys, folder / "run", folder / "made.yaml", "--out", out, "--patients",
                      ",".join(names))  # fmt: skip
    assert f"{len(tested) + 1} patients explained" in printed
    assert "attention and contributions, genes: not comparable: one token" in printed
    assert re.search(r"attention and contributions, cells: Spearman -?\d", printed)
    frames = {path.stem: pd.read_csv(path, keep_default_na=False) for path in out.glob("*.csv")}
    patients = frames["patients"].set_index("patient")
    assert patients["trained"].sum() == patients.loc[trained, "trained"] == 1
    assert patients.loc[tested[0], "folds"] == sum(
        tested[0] in parts["test"] for parts in run.splits
    )
    # The outputs are the standardised risks of the run, averaged over the folds that tested.
    risks = run.predictions().groupby("fold")["risk"]
    scales = [run.fitted(number).scale for number in range(2)]
    predicted = run.predictions().assign(
        risk=np.concatenate([(r - s.mean) / s.sd for (_, r), s in zip(risks, scales, strict=True)])
    )
    expected = predicted.groupby("patient")["risk"].mean()
    np.testing.assert_allclose(patients["output"][tested], expected[tested], rtol=1e-3, atol=1e-4)
    # Contributions add up: of columns to their modality, of modalities to the change.
    modalities, features = frames["modalities"], frames["features"]
    sums = modalities.groupby("patient")["contribution"].sum()
    np.testing.assert_allclose(sums[patients.index], patients["sum"], atol=1e-4)
    assert (patients["sum"] - patients["change"]).abs().median() < 0.1
    of_genes = features[features["modality"] == "genes"].groupby("patient")["contribution"].sum()
    genes = modalities[modalities["modality"] == "genes"].set_index("patient")["contribution"]
    np.testing.assert_allclose(of_genes[patients.index], genes[patients.index], atol=1e-4)
    # Columns are those of the user, with their values; one row for a category.
    of_person = features[(features["modality"] == "person") & (features["patient"] == tested[0])]
    assert of_person["feature"].tolist() == ["sex", "age"]
    table = pd.read_csv(folder / "t.csv", keep_default_na=False).set_index("id")
    assert of_person["value"].tolist()[0] == table.loc[tested[0], "sex"]
    assert set(frames["tokens"]["patient"]) == {p for p in names if p != "../<i>7</i>"}
    assert frames["tokens"].groupby("patient").size().eq(5).all()
    sums = frames["tokens"].groupby("patient")["attention"].sum()
    np.testing.assert_allclose(sums, 1, atol=1e-4)
    cohort = frames["cohort"]
    assert cohort["patients"].max() == len(tested)
    assert (cohort["low"] <= cohort["mean"]).all()
    assert (cohort["mean"] <= cohort["high"]).all()


def test_hostile_names_stay_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("captum")
    out, patient = folder / "hostile", "../<i>7</i>"
    explain(capsys, folder / "run", folder / "made.yaml", "--out", out, "--limit", 3, "--patients",
            patient, "--json")  # fmt: skip
    assert [path.name for path in (out / "patients").iterdir()] == [f"{file_name(patient)}.svg"]
    assert re.fullmatch(r"_.*-[0-9a-f]{8}", file_name(patient))
    assert file_name("TCGA-2F-A9KO") == "TCGA-2F-A9KO"
    for path in (out / "cohort.svg", *(out / "patients").iterdir()):
        tags = {node.tag.rpartition("}")[2] for node in ET.parse(path).iter()}
        assert tags.isdisjoint({"b", "i", "script", "a"})
    assert HOSTILE in set(pd.read_csv(out / "features.csv")["feature"])
    # A patient without bags has the others; the missing one is named in modalities.csv.
    modalities = pd.read_csv(out / "modalities.csv").set_index(["patient", "modality"])
    assert modalities.loc[(patient, "cells"), "present"] == 0
    assert modalities.loc[(patient, "genes"), "present"] == 1


def test_what_cannot_be_explained(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, cohort, out = folder / "run", folder / "made.yaml", folder / "refused"
    error = refuse(capsys, run, cohort, "--out", out, "--patients", "p999")
    assert "--patients: made has no patient 'p999': known: p0, p1" in error
    assert "--class: expected none" in refuse(capsys, run, cohort, "--out", out, "--class", "ill")
    assert "--limit: expected at least 0" in refuse(capsys, run, cohort, "--out", out, "--limit=-1")
    assert "holds something else" in refuse(capsys, run, cohort, "--out", folder)
    train_run(load_cohort(cohort), "cox", folder / "cox", splits=Splits(2), modalities=["genes"])
    error = refuse(capsys, folder / "cox", cohort, "--out", out)
    assert "expected a run of healnet, lego, merge or fuse, got the baseline cox" in error
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    error = refuse(capsys, run, cohort, "--out", out)
    assert error == "motet explain: integrated_gradients needs Captum: pip install captum\n"
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", drawn(range(100), 1))
@pytest.mark.parametrize("kind", ["healnet", "lego", "fuse"])
def test_planted_genes_are_the_top_bars(
    kind: str, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("captum")
    path, planted = write_cohort(
        tmp_path, seed=seed, n=240, genes=20, outcome="classes" if kind == "lego" else "survival"
    )
    cohort, names = load_cohort(path), ["genes", "person"]
    changes = {"num_latents": 4, "latent_dim": 8, "epochs": 15}
    model = "healnet" if kind == "healnet" else "lego"
    run = train_run(
        cohort, model, tmp_path / model, splits=Splits(1), changes=changes, modalities=names
    )
    if kind == "fuse":
        blocks = [Run.finished(run.path / "blocks" / name) for name in names]
        run = fuse_runs(
            blocks, tmp_path / "fuse", cohort=cohort, changes={}, mode="weave", head="slerp"
        )
    explain(capsys, run.path, path, "--out", tmp_path / "out", "--limit", 30)
    table = pd.read_csv(tmp_path / "out" / "cohort.csv")
    assert table[table["level"] == "modality"]["modality"].iloc[0] == "genes"
    top = table[table["level"] == "feature"]["feature"].head(2)
    assert set(top) == set(planted)
