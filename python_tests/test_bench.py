"""`motet bench` and the scripts of benchmarks/ work, at sizes too small for real timings."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from motet import cli
from motet.cli import bench, measure

from .conftest import ROOT


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a script of benchmarks/ in this process, which has already imported torch."""

    def run(name: str, *arguments: object) -> int:
        monkeypatch.syspath_prepend(ROOT)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        return import_module(f"benchmarks.{name}").main()

    return run


@pytest.mark.slow
def test_bench_prints_json() -> None:
    command = [sys.executable, "-m", "motet", "bench", "--quick", "--device", "cpu", "--dtype"]
    run = subprocess.run([*command, "fp32", "--threads", "1", "--json", "-"], capture_output=True,
                         text=True, check=False)  # fmt: skip
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert {"device", "torch", "motet", "revision", "date"} <= report.keys()
    assert report["threads"] == 1
    assert report["roofline"]["read"] > 0
    assert len(report["rows"]) == 6
    for row in report["rows"]:
        assert row["strategy"] in ("cached", "absorbed")
        assert 0 < row["error"]["motet"] <= row["allowed_error"] < 1e-4
        for timing in row["ms"].values():
            assert 0 < timing["low"] <= timing["median"] <= timing["high"]
        assert row["ratio"] == row["ms"]["reference"]["median"] / row["ms"]["motet"]["median"]
        assert row["predicted_ms"] > 0
        assert row["roofline_share"] > 0
        assert row["cell"] in run.stderr  # with --json, the table goes to stderr


def test_a_gpu_has_a_column_for_eager_mode(capsys) -> None:
    timing = {"median": 1.0, "low": 0.9, "high": 1.2, "rounds": 3}
    row = {
        "cell": "blca 8x15000 step", "dtype": "bf16", "strategy": "cached", "ratio": 7.0,
        "ms": dict.fromkeys(("motet", "eager", "reference"), timing), "predicted_ms": 0.8,
        "roofline_share": 0.3, "peak_mib": {"motet": 700.0, "eager": 650.0, "reference": 2800.0},
        "error": {"motet": 1e-2, "eager": 1e-2, "reference": 8e-3},
    }  # fmt: skip
    for device, columns in (("cpu", 2), ("cuda", 3)):
        bench._show(row, device, sys.stdout)
        (line,) = capsys.readouterr().out.splitlines()
        assert line.count("1.00 (0.900 to 1.20)") == columns
        assert ("eager ms" in bench._titles(device)) == (device == "cuda")
        assert len(line) == len(bench._titles(device))


def test_bench_has_no_time_for_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = bench.cells("cpu", quick=True)[0]
    roofline = measure.Roofline(1e9, 1e9, {"fp32": 1e9, "bf16": 1e9})
    monkeypatch.setattr(bench, "relative_error", lambda result, exact: 0.1)
    monkeypatch.setitem(measure.FLOOR, "fp32", -0.15)
    row = bench.measure(cell, "fp32", "cpu", roofline, quick=True)
    assert row["failed"] == "error 1.0e-01 is out of bounds"
    assert "ms" not in row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8'"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--device", "cpu", "--json", "nowhere/x.json"], "--json: expected a file in a folder"),
    ],
)
def test_bad_options_are_one_line(capsys, arguments: list[str], message: str) -> None:
    try:
        code = cli.main(["bench", *arguments])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("motet bench: ")
    assert message in line


def test_cuda_where_there_is_none(capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert cli.main(["bench", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "motet bench: --device: torch finds no CUDA device here\n"


@pytest.mark.parametrize("step", [False, True])
def test_a_workload_is_as_good_as_the_reference(step: bool) -> None:
    for lengths in ((30, 30), (30, 1, 8)):
        cell = measure.Cell("", measure.CONFIGS["blca"], lengths, step, width=24, dropout=0.5)
        assert cell.shortened(10).lengths == tuple(min(n, 10) for n in lengths)
        work = measure.Workload(cell.shortened(10), "fp32", "cpu")
        assert measure.relative_error(work.run(), work.exact()) < 1e-5


def test_relative_error_is_that_of_the_norms() -> None:
    result = [torch.tensor([3.0, 4.0]), torch.tensor([0.0])]
    exact = [torch.tensor([3.0, 0.0], dtype=torch.float64), torch.tensor([3.0]).double()]
    assert measure.relative_error(result, exact) == pytest.approx(5 / math.hypot(3, 3))


def test_roofline_is_the_larger_of_traffic_and_products() -> None:
    roofline = measure.Roofline(read=2e9, copy=1e9, products={"fp32": 1e9, "bf16": 1e12})
    cell = measure.Cell("", measure.CONFIGS["blca"], (500, 500), step=True, width=1000)
    assert roofline.seconds(cell, "bf16", 1e9) == 2 * 1e6 * 2 / 2e9  # read twice
    assert roofline.seconds(cell, "fp32", 1e9) == 1.0
    assert roofline.seconds(cell._replace(step=False), "bf16", 0) == 1e6 * 2 / 2e9


def test_contenders_run_in_turns() -> None:
    order: list[str] = []
    times = measure.in_turns(
        {name: lambda name=name: order.append(name) for name in "ab"}, "cpu", rounds=3,
        before=lambda: order.append("-"),
    )  # fmt: skip
    assert "".join(order) == "ab-ab-ab-ab"
    assert times["a"].rounds == 3


def test_operators_side_by_side(script, tmp_path: Path) -> None:
    out = tmp_path / "operators.json"
    options = ["--device", "cpu", "--threads", 1, "--rounds", 3, "--config", "blca"]
    options += ["--dtype", "fp32", "--json", out]
    assert script("bench_latent_attention", "--quick", *options) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 12  # two batches; attention: passes x dropout; projection: passes
    for row in rows:
        assert not row["failed"]
        assert {"motet", "SDPA"} <= row["ms"].keys() or row["name"].startswith("context_kv")
        assert all(timing["median"] > 0 for timing in row["ms"].values())
        assert all(error < measure.FLOOR["fp32"] for error in row["error"].values())


@pytest.mark.slow
def test_scaling(script, tmp_path: Path) -> None:
    out, figure = tmp_path / "scaling.json", tmp_path / "scaling.png"
    options = ["--threads", 1, "--rounds", 3, "--figure", figure, "--json", out]
    assert script("bench_healnet", "--scaling", "--quick", *options) == 0
    few, many = json.loads(out.read_text())["scaling"]
    assert (few["tokens"], many["tokens"]) == (50, 4000)
    assert 0 < few["median"] < many["median"]
    data = 4 * 2048 * 4000 / measure.MIB
    assert few["peak_mib"] < data < many["peak_mib"] < 5 * data
    assert figure.stat().st_size > 5000


@pytest.mark.parametrize(
    ("name", "program"), [("bench_healnet", "bench_healnet"), ("gpu", "make gpu")]
)
def test_a_folder_without_the_authors_code(
    script, capsys, tmp_path, name: str, program: str
) -> None:
    options = ["cells", "--device", "cpu", "--out", tmp_path] if name == "gpu" else ["--threads", 1]
    assert script(name, "--published", tmp_path, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{program}: --published: expected a clone of konst-int-i/healnet, got ")
