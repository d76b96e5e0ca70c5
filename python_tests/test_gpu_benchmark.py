"""`make gpu` as far as a machine without a GPU can show it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .conftest import ROOT


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_same_on_a_cpu(tmp_path: Path) -> None:
    done = run("--device", "cpu", "--small", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("gpu-cpu-*.json")
    report = json.loads(path.read_text())
    assert {"torch", "revision", "native", "date"} <= report.keys()
    assert all(check["passed"] for check in report["checks"])
    assert len(report["cells"]) == 7
    for cell in report["cells"]:
        assert cell["median_ms"]["motet"] > 0
        assert all(error < 1e-4 for error in cell["errors"].values())
    assert sum("torch" in cell["median_ms"] for cell in report["cells"]) == 2


def test_without_a_gpu_it_is_one_line(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = run("--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.strip() == "make gpu: torch finds no CUDA device here"
