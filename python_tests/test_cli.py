"""The command `motet`: doctor, demo, messages for bad input."""

import csv
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from motet import cli
from motet.cli import demo, doctor
from motet.kernels import native

from .conftest import ROOT


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("motet")
    assert any(line.startswith("C++ module") for line in lines)
    assert cli.main(["doctor", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)
    by_name = {check["name"]: check for check in checks}
    assert {"motet", "torch", "C++ modules", "GPU", "triton"} <= by_name.keys()
    assert {check["state"] for check in checks} <= {"ok", "missing", "off"}
    assert all(check["cure"] for check in checks if check["state"] == "missing")


def test_doctor_fails_where_motet_cannot_work(monkeypatch, capsys) -> None:
    versions = {"torch": "2.9.1+cu130", "tqdm": ""}
    installed = doctor.installed_version
    monkeypatch.setattr(
        doctor, "installed_version", lambda name: versions.get(name, installed(name))
    )
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "2.9.1+cu130 is older than 2.10" in out
    assert "cure: pip install 'tqdm>=4.66'" in out


def test_doctor_knows_the_requirements() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert sorted(declared) == sorted(f"{name}>={floor}" for name, floor in doctor.REQUIRED)


def test_doctor_names_the_cure(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(native, "_reason", "No module named 'motet.kernels._C'")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    cli.main(["doctor"])
    out = capsys.readouterr().out
    assert "missing torch and numpy compute instead, slower" in out
    assert "cure: install a C++20 compiler" in out
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    cli.main(["doctor"])
    assert "run pip with -v to see why c++ failed" in capsys.readouterr().out


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One shortened run as a user's: no terminal, no progress bar; the folder gets its files."""
    out = tmp_path / "a" / "report"
    demo.run(out, epochs=2, folds=2)
    printed = capsys.readouterr()
    assert "\r" not in printed.err
    assert "HEALNet: done" in printed.out
    files = {"results.csv", "report.html"}
    folders = {"cox", "healnet", "lego", "fuse", "healnet_half_missing"}
    assert {path.name for path in out.iterdir()} == files | folders
    with open(out / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows][:2] == ["ridge Cox", "HEALNet"]
    for row in rows:
        assert 0 <= float(row["ci_low"]) <= float(row["c_index"]) <= float(row["ci_high"]) <= 1
        assert int(row["parameters"]) > 0
        assert f"{float(row['c_index']):.3f}" in printed.out
    for folder in folders:
        with open(out / folder / "predictions.csv") as file:
            patients = list(csv.DictReader(file))
        assert len({row["patient"] for row in patients}) == len(patients) == 198
        for fold in "01":  # no model may predict the same for everyone
            risks = np.array([float(row["risk"]) for row in patients if row["fold"] == fold])
            assert risks.std() > 1e-3 * abs(risks.mean()), folder
    page = (out / "report.html").read_text()
    assert page.count("<svg") > 10
    assert "healnet_half_missing" in page


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert cli.main(["demo", "--out", str(blocked)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("motet demo: ")
    assert error.count("\n") == 1
    with pytest.raises(SystemExit) as exit_:
        cli.main(["fly"])
    assert exit_.value.code == 2
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
