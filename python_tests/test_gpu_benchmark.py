"""`make gpu` as far as a machine without a GPU can show it."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from motet.cli import measure
from motet.fusion import graph_cache

from .conftest import ROOT
from .fake_capture import FakeCapture


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run benchmarks/gpu.py in this process, which has imported torch already."""

    def of(*arguments: object) -> int:
        monkeypatch.syspath_prepend(ROOT)
        monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
        return import_module("benchmarks.gpu").main()

    return of


def assert_measured(cell: dict) -> None:
    timed = {name: rung for name, rung in cell["rungs"].items() if "failed" not in rung}
    assert set(timed) == {"reference fp32", "reference bf16", "folded bf16", "planned bf16"}
    for rung in timed.values():
        assert rung["ms"]["median"] > 0
        assert rung["error"] <= rung["allowed"] < 0.1
    absent = [rung for rung in cell["rungs"].values() if "failed" in rung]
    assert not any(rung["fault"] for rung in absent)
    assert {"needs CUDA", "no --published DIR"} <= {rung["failed"] for rung in absent}


def test_the_same_on_a_cpu(tmp_path: Path) -> None:
    """As `make gpu` runs it."""
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--device", "cpu", "--small"]
    done = subprocess.run(
        [*command, "--out", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("gpu-cpu-*.json")
    report = json.loads(path.read_text())
    assert {"torch", "revision", "native", "date"} <= report.keys()
    assert len(report["checks"]) == 34
    assert all(check["passed"] for check in report["checks"])
    assert len(report["cells"]) == 9
    assert report["not_reached"] == []
    for cell in report["cells"]:
        assert_measured(cell)
    assert len(report["operators"]) == 5
    assert all(row["error"] < 1e-4 for row in report["operators"])


def test_the_grid_goes_on_where_it_stopped(run, capsys, tmp_path: Path) -> None:
    arguments = ("--full", "--device", "cpu", "--small", "--out", tmp_path, "--budget")
    assert run(*arguments, 0) == 0
    assert not list(tmp_path.iterdir())
    assert run(*arguments, 60) == 0
    (path,) = tmp_path.iterdir()
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join(rest) + "\n")
    assert run(*arguments, 60) == 0
    assert "0 cells with faults; 0 left" in capsys.readouterr().out
    lines = path.read_text().splitlines()
    assert lines[:-1] == rest
    cells = [json.loads(line) for line in lines]
    assert cells[-1]["cell"] == json.loads(first)["cell"]
    for cell in cells:
        assert_measured(cell)


def test_without_a_gpu_it_is_one_line(run, capsys, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert run("--out", tmp_path) == 2
    assert capsys.readouterr().err == "make gpu: --device: torch finds no CUDA device here\n"


def test_what_is_measured_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a capture that runs things again in place of CUDA's."""
    monkeypatch.syspath_prepend(ROOT)
    ladder, cells = (import_module(f"benchmarks.{name}") for name in ("ladder", "cells"))
    monkeypatch.setattr(graph_cache, "CudaCapture", lambda device: FakeCapture())
    monkeypatch.setattr(graph_cache, "on_triton", lambda *_: True)
    monkeypatch.setattr(graph_cache.GraphCache, "_check_device", lambda self: None)
    for cell in ladder.named_cells(small=True)[:4]:
        work = measure.Workload(cell, "fp32", "cpu")
        run = ladder._graphed(work)
        for _ in range(3):
            assert measure.relative_error(run(), work.gold()) < 1e-5
    made = cells.lego_cells("cpu", 20, graphs=True)
    assert [cell.name.partition(", ")[2] for cell in made] == ["", "", "", *["CUDA graph"] * 2]
    for cell in made[-2:]:
        for _ in range(3):
            assert cell.error(cell.run) < 1e-4
