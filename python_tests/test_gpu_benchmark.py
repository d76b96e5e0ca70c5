"""`make gpu`, as far as a machine without a GPU can test it."""

import json
import math
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
    """Run benchmarks/gpu.py in this process, which has already imported torch."""

    def of(*arguments: object) -> int:
        monkeypatch.syspath_prepend(ROOT)
        monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
        return import_module("benchmarks.gpu").main()

    return of


MEASURED = {"reference bf16", "planned bf16", "folded bf16", "reference fp32"}


def assert_measured(cell: dict) -> None:
    rows = cell["contenders"]
    timed = {name: row for name, row in rows.items() if "failed" not in row}
    assert set(timed) == MEASURED
    for row in timed.values():
        assert row["ms"]["median"] > 0
        assert row["error"] <= row["allowed"] < 0.1
    absent = [row for row in rows.values() if "failed" in row]
    assert not any(row["fault"] for row in absent)
    assert {"needs CUDA", "no --published DIR"} <= {row["failed"] for row in absent}


def report_of(tmp_path: Path, step: str, *more: str) -> dict:
    """Run a step as `make` does, but on a CPU, and return its report."""
    script = ROOT / "benchmarks" / "gpu.py"
    command = [sys.executable, script, step, "--device", "cpu", "--small", "--out", tmp_path, *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob(f"gpu-{step}-cpu-*.json")
    report = json.loads(path.read_text())
    assert {"torch", "revision", "native", "date"} <= report.keys()
    return report


def test_a_check_compares_with_float64() -> None:
    """One check of each form: with gradients, and of results alone."""
    checks = import_module("benchmarks.checks")
    for error, allowed in (
        checks._slerp("cpu", "eager", 2),
        checks._weights("cpu", "eager", torch.float32),
    ):
        assert 0 < allowed < 1e-4
        assert error <= allowed
    wrong = checks._compare(lambda x: 1.001 * x, lambda x: x, [torch.ones(9)], torch.float32)
    assert wrong[0] > wrong[1]
    infinite = checks._compare(lambda x: x / 0, lambda x: x, [torch.ones(9)], torch.float32)
    assert infinite == (math.inf, 0.0)


@pytest.mark.slow
def test_the_checks_on_a_cpu(tmp_path: Path) -> None:
    report = report_of(tmp_path, "check")
    names = [check["name"] for check in report["checks"]]
    assert len({*names}) == len(names)
    for model in ("LegoBlock", "HEALNet", "LegoMerge", "LegoFuse"):
        assert any(name.startswith(model) for name in names)
    for operator in (
        "context_kv", "latent_attention", "attention_weights", "absorbed_attention",
        "absorbed_heads", "a bag alone", "harmonic_merge", "slerp",
    ):  # fmt: skip
        assert any(name.startswith(operator) for name in names)
    assert all(check["passed"] for check in report["checks"])


@pytest.mark.slow
def test_the_profile_on_a_cpu(tmp_path: Path) -> None:
    report = report_of(tmp_path, "profile")
    *models, products = report["rows"]
    assert len(models) == 8
    for row in models:
        assert row["gpu_us"] == pytest.approx(sum(kernel["us"] for kernel in row["kernels"]))
        shares = [
            kernel["roofline_share"] for kernel in row["kernels"] if "roofline_share" in kernel
        ]
        assert len(shares) == (row["strategy"] == "cached")  # on a CPU the other kernels do not run
    assert {"128", "136", "512"} <= products["products"].keys()


def profile_row(strategy: str, shares: dict[str, float], **more) -> dict:
    """Return a row of a profile; each of its kernels takes 100 us in two launches."""
    kernels = [
        {"kernel": name, "role": role, "us": 100.0, "launches": 2, "roofline_share": share}
        for name, share in shares.items()
        for role in [import_module("benchmarks.profiling").role_of(name)]
    ]
    kernels.append({"kernel": "memcpy", "us": 4.0, "launches": 1})
    return {
        "model": "blca", "strategy": strategy, "lengths": [15_000] * 8, "gpu_us": 504.0,
        "kernels": kernels, **more,
    }  # fmt: skip


CACHED = {"project_tma_kernel": 0.8, "attend_kernel": 0.6, "dq_kernel": 0.61, "dkv_kernel": 0.62,
          "mm": 0.7}  # fmt: skip


def test_kernels_below_their_share_of_the_roofline_are_named(monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    profiling = import_module("benchmarks.profiling")
    good = [profile_row("cached", CACHED), {"products": {}},
            profile_row("absorbed", {"project_kernel": 0.75, "pool_tma_kernel": 0.65})]  # fmt: skip
    assert list(profiling.too_slow(good)) == []
    worse = {**CACHED, "dkv_kernel": 0.45}
    del worse["project_tma_kernel"]
    rows = [profile_row("cached", worse), profile_row("cached", {}, lengths=[500] * 8)]
    assert list(profiling.too_slow(rows)) == [
        "blca cached: project_kernel was not launched",
        "blca cached: dkv_kernel reaches 45% of the roofline, not 60%",
    ]
    for strategy, demanded in profiling.LAUNCHED.items():
        cell = measure.Cell("", measure.CONFIGS["blca"], (15_000,) * 8, True)
        assert set(demanded) <= profiling.kernel_works(cell, strategy).keys()


def test_kernels_slower_than_with_another_triton_are_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    profiling = import_module("benchmarks.profiling")
    facts = {"device": "NVIDIA H200", "date": "2026-12-01"}
    now = {**facts, "triton": "3.8.0", "rows": [profile_row("cached", CACHED)]}
    assert profiling.earlier(now, tmp_path) is None
    for i, (device, triton, us) in enumerate((
        ("NVIDIA H200", "3.6.0", 99.0), ("NVIDIA H200", "3.7.1", 90.0),
        ("NVIDIA H200", "3.8.0", 1.0), ("NVIDIA B200", "3.7.1", 1.0),
    )):  # fmt: skip
        row = profile_row("cached", CACHED)
        row["kernels"][1]["us"] = us
        row["kernels"][2] |= {"us": 45.5, "launches": 1}  # 9 % less is within the variation
        row["kernels"][-1]["us"] = 2.0  # too short to tell
        report = {"device": device, "triton": triton, "date": f"2026-11-2{i}", "rows": [row]}
        (tmp_path / f"gpu-profile-{i}.json").write_text(json.dumps(report))
    before = profiling.earlier(now, tmp_path)
    assert before["triton"] == "3.7.1"
    assert list(profiling.slower_than(before, now)) == [
        "blca cached: attend_kernel takes 50.0 us, 11% more than with Triton 3.7.1"
    ]
    assert list(profiling.slower_than(now, now)) == []


def test_a_slow_kernel_fails_the_profile(run, capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    profiling, gpu = import_module("benchmarks.profiling"), import_module("benchmarks.gpu")
    roofline = measure.Roofline(1e12, 1e12, {"bf16": 1e15})
    monkeypatch.setattr(measure, "choose_device", lambda *_: "cuda")
    monkeypatch.setattr(measure, "measure_roofline", lambda *_, **__: roofline)
    facts = {"device": "NVIDIA H200", "cuda": "13", "triton": "3.8.0", "revision": "made"}
    monkeypatch.setattr(gpu, "_about", lambda _: dict(facts, date="2026-12-01"))
    monkeypatch.setattr(profiling, "lines", lambda row: ())
    for share, code in ((0.8, 0), (0.5, 1)):
        rows = [profile_row("cached", {**CACHED, "attend_kernel": share})]
        monkeypatch.setattr(profiling, "profiles", lambda *_, rows=rows, **__: rows)
        assert run("profile", "--out", tmp_path) == code
        report = json.loads((tmp_path / "gpu-profile-NVIDIA-H200-made.json").read_text())
        assert report["triton"] == "3.8.0"
        faults = ["blca cached: attend_kernel reaches 50% of the roofline, not 60%"] * code
        assert report["faults"] == faults
        assert all(fault in capsys.readouterr().out for fault in faults)


@pytest.mark.slow
def test_the_cells_on_a_cpu(tmp_path: Path) -> None:
    report = report_of(tmp_path, "cells")
    assert len(report["cells"]) == 9
    assert report["not_reached"] == []
    for cell in report["cells"]:
        assert_measured(cell)
    assert len(report["operators"]) == 5
    assert all(row["error"] < 1e-4 for row in report["operators"])
    assert len(report["rivals"]) == 8


def test_what_says_most_comes_first(run, tmp_path: Path, monkeypatch) -> None:
    """Every cell measures the first contenders before any cell measures the others."""
    grid, measured = import_module("benchmarks.grid"), []

    def measure_cell(cell, contenders, *_, **__) -> dict:
        measured.append((cell.name, set(contenders)))
        return {}

    monkeypatch.setattr(grid, "measure_cell", measure_cell)
    monkeypatch.setattr(import_module("benchmarks.gpu"), "_operators", lambda *_, **__: ())
    monkeypatch.setattr(import_module("benchmarks.gpu"), "_rivals", lambda *_, **__: [])
    assert run("cells", "--device", "cpu", "--small", "--out", tmp_path) == 0
    cells = [cell.name for cell in grid.named_cells(small=True)]
    assert [name for name, _ in measured] == cells * 2
    assert all(names == set(grid.FIRST) for _, names in measured[: len(cells)])
    assert all(names == {grid.USUAL, *grid.LAST} for _, names in measured[len(cells) :])


def test_no_time_left_is_no_failure(run, tmp_path: Path) -> None:
    assert run("cells", "--device", "cpu", "--small", "--budget", 0, "--out", tmp_path) == 0
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["cells"]


def test_demands_are_compared_with_what_was_measured() -> None:
    grid = import_module("benchmarks.grid")

    def row(name: str, ours: float, theirs: float) -> dict:
        planned = {"ms": {"median": ours}, "roofline_share": 0.4 / ours, "peak_mib": 250}
        return {"cell": name, "graph_strategy": "absorbed", "contenders": {
            "planned bf16, static graph": planned,
            "published bf16": {"ms": {"median": theirs}, "peak_mib": 1000},
        }}  # fmt: skip

    names = ("blca 8x15000 step", "brca 8x15000 forward", "kirp 8 ragged step", "blca 8x500 step")
    rows = list(grid.demands([row(name, 2.0, 14.0) for name in names]))
    assert [row["cell"] for row in rows] == list(names[:3])
    step, forward, ragged = rows
    assert step["rooflines"] == pytest.approx(5.0)
    assert (step["rooflines_allowed"], step["times_demanded"]) == (2.7, 9.0)
    assert step["times_published"] == pytest.approx(7.0)
    assert step["peak_share"] == pytest.approx(0.25)
    assert forward["rooflines_allowed"] == 2.6
    assert "times_demanded" not in forward
    assert ragged["times_demanded"] == 25.0
    assert "rooflines" not in ragged


def test_the_page_says_what_the_files_say(monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    performance = import_module("benchmarks.performance")
    page = performance.PAGE.read_text()
    assert performance.with_tables(page) == page, "run `python benchmarks/performance.py`"


def test_the_grid_goes_on_where_it_stopped(run, capsys, tmp_path: Path) -> None:
    arguments = ("full", "--device", "cpu", "--small", "--out", tmp_path, "--budget")
    assert run(*arguments, 0) == 0
    assert not list(tmp_path.iterdir())
    assert run(*arguments, 60) == 0
    (path,) = tmp_path.iterdir()
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join(others) + "\n")
    assert run(*arguments, 60) == 0
    assert "0 cells with faults; 0 left" in capsys.readouterr().out
    lines = path.read_text().splitlines()
    assert lines[:-1] == others
    cells = [json.loads(line) for line in lines]
    assert cells[-1]["cell"] == json.loads(first)["cell"]
    for cell in cells:
        assert_measured(cell)


def test_without_a_gpu_it_is_one_line(run, capsys, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert run("cells", "--out", tmp_path) == 2
    assert capsys.readouterr().err == "make gpu: --device: torch finds no CUDA device here\n"


@pytest.mark.slow
def test_what_is_measured_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are measured correctly, with a FakeCapture in place of CUDA's."""
    monkeypatch.syspath_prepend(ROOT)
    grid, cells = (import_module(f"benchmarks.{name}") for name in ("grid", "cells"))
    monkeypatch.setattr(graph_cache, "CudaCapture", lambda device: FakeCapture())
    monkeypatch.setattr(graph_cache, "on_triton", lambda *_: True)
    monkeypatch.setattr(graph_cache.GraphCache, "_check_device", lambda self: None)
    monkeypatch.setattr(grid, "check_device", lambda *_: None)
    roofline = measure.Roofline(1e12, 1e12, {"fp32": 1e14, "bf16": 1e15})
    named = grid.named_cells(small=True)
    for cell in (*named[:4], named[-1]):  # forward and steps, equal and ragged bags, dropout
        work = measure.Workload(cell._replace(dropout=0.0), "fp32", "cpu")
        run = work.graphed()
        for _ in range(3):  # replays
            assert measure.relative_error(run(), work.exact()) < 1e-5
        name = "planned bf16, graph"
        figures = grid.measure_cell(
            cell, {name: grid.FIRST[name]}, grid.GridSettings("cpu", rounds=3), roofline, {}
        )[name]
        assert figures["error"] <= figures["allowed"] < 0.1
        assert figures["roofline_share"] > 0
    work.model.head.register_forward_hook(lambda *_: None)
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match="no graph: hooks would"):
        work.graphed()  # eager mode is not measured as a graph
    for model in ("HEALNet", "LegoBlock"):
        error, allowed = import_module("benchmarks.model_checks").step_graph(model, "cpu")
        assert error <= allowed < 1e-4
    made = cells.lego_cells("cpu", 20, graphs=True)
    assert [cell.name.partition(", ")[2] for cell in made] == ["", "", "", *["CUDA graph"] * 2]
    for cell in made[-2:]:
        for _ in range(3):
            assert cell.error(cell.run) < 1e-4
