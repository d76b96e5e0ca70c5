"""Check, profile and time motet on the GPU at hand; each step writes a JSON file of its own.

    make gpu-check      compiles all kernels, compares them with float64, and runs with each other
    make gpu-profile    where the time of a training step goes, kernel by kernel
    make gpu            40 cells of benchmarks/grid.py, the most telling contenders first
    make gpu-full       the whole grid, a line of a file per cell; again goes on where it stopped

Runs in the environment that is active, since GPU machines bring their own torch. The file is
written again after each row, so that a machine that is taken away leaves what it did. Every time
has its error beside it, and what is too wrong has no time: a failed check, a time withheld, or a
kernel that is slower than demanded or than with another Triton makes the exit code 1.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Seconds after which a step begins nothing more.
BUDGETS = {"check": 90.0, "profile": 60.0, "cells": 200.0, "full": 500.0}


def main() -> int:
    """Carry out one step, and write."""
    options = _options()
    try:
        from motet.cli import measure

        device = measure.choose_device(options.device, None)
        if options.published is not None:
            from benchmarks.published import published_healnet

            published_healnet(options.published)
    except (ValueError, ImportError) as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 2
    import torch

    # Full float32 products, so that the error beside a time is that of the operator.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.config.recompile_limit = 64
    options.out.mkdir(parents=True, exist_ok=True)
    options.budget = BUDGETS[options.step] if options.budget is None else options.budget
    steps = {"check": check, "profile": profile, "cells": cells, "full": full}
    return steps[options.step](options, device)


def check(options: argparse.Namespace, device: str) -> int:
    """Compare operators and models with float64, and look for races."""
    from benchmarks import checks

    started = time.monotonic()
    report = {**_about(device), "checks": []}
    path = _path(options, "check", report)
    # Each process compiles, the GPU hardly works. On a CPU they would fight over the cores.
    processes = min(16, os.cpu_count() or 1) if device == "cuda" else 1
    for row in checks.run_all(device, processes):
        report["checks"].append(row)
        _write(path, report)
    failed = [row["name"] for row in report["checks"] if not row["passed"]]
    print(
        f"\n{len(report['checks']) - len(failed)} passed, {len(failed)} failed {failed or ''} in "
        f"{time.monotonic() - started:.0f} s; written to {path}"
    )
    return 1 if failed else 0


def profile(options: argparse.Namespace, device: str) -> int:
    """Write down every kernel of a training step of four models, in both strategies."""
    from benchmarks import profiling
    from motet.cli import measure

    deadline = time.monotonic() + options.budget
    report = _about(device)
    path = _path(options, "profile", report)
    roofline = measure.measure_roofline(device, quick=options.small)
    report |= {"roofline": roofline._asdict(), "rows": []}
    print(roofline, flush=True)
    for row in profiling.profiles(roofline, small=options.small):
        report["rows"].append(row)
        print(*profiling.lines(row), sep="\n", flush=True)
        _write(path, report)
        if time.monotonic() > deadline:
            print("\nstopped: no time left")
            break
    report["faults"] = list(profiling.too_slow(report["rows"])) if device == "cuda" else []
    before = profiling.earlier(report, ROOT / "benchmarks" / "results")
    if before is not None:
        report["faults"] += profiling.slower_than(before, report)
    _write(path, report)
    print(*report["faults"], f"\nwritten to {path}", sep="\n")
    return 1 if report["faults"] else 0


def cells(options: argparse.Namespace, device: str) -> int:
    """Time the named cells: first what says most of each, then the rest, until time is spent."""
    from benchmarks import grid
    from motet.cli import measure

    deadline = time.monotonic() + options.budget
    report = _about(device)
    path = _path(options, "cells", report)
    report["roofline"] = (
        roofline := measure.measure_roofline(device, quick=options.small)
    )._asdict()
    print(roofline, flush=True)
    named = grid.named_cells(small=options.small)
    rows = {
        cell.name: {"cell": cell.name, **grid.planned(cell, device), "contenders": {}}
        for cell in named
    }
    report |= {"cells": list(rows.values()), "demands": [], "operators": [], "not_reached": []}
    left = [(cell, who) for who in (grid.FIRST, grid.LAST) for cell in named]
    allowed: dict[str, dict[str, float]] = {cell.name: {} for cell in named}
    settings = _settings(options, device)
    while left and time.monotonic() < deadline:
        cell, contenders = left.pop(0)
        row = rows[cell.name]
        first = contenders is grid.FIRST
        if not first:  # so that these, too, are compared in one run with what a user gets
            contenders = {grid.USUAL: grid.FIRST[grid.USUAL], **contenders}
        found = _measured(cell, contenders, settings, roofline, allowed[cell.name], launches=first)
        row["contenders"] = {**found, **row["contenders"]}  # what was measured first stays
        print(*grid.lines({**row, "contenders": found}), sep="\n", flush=True)
        report["demands"] = list(grid.demands(report["cells"]))
        report["not_reached"] = [f"{c.name}: {', '.join(who)}" for c, who in left]
        _write(path, report)
    if not left:
        report["operators"] = list(_operators(device, deadline, small=options.small))
    report["rivals"] = _rivals(device, deadline, small=options.small)
    _write(path, report)
    failed = [name for row in report["cells"] for name in _faults(row)]
    failed += [row["name"] for row in report["operators"] if "ms" not in row]
    for row in report["demands"]:
        print(json.dumps(row))
    print(
        f"\n{len(failed)} failed {failed or ''}; {len(left)} parts not reached; written to {path}"
    )
    return 1 if failed else 0


def full(options: argparse.Namespace, device: str) -> int:
    """Time what is missing of the grid until the budget is spent."""
    from benchmarks import grid
    from motet.cli import measure

    deadline = time.monotonic() + options.budget
    about = _about(device)
    path = _path(options, "full", about).with_suffix(".jsonl")
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {row["cell"] for row in known}
    roofline = measure.measure_roofline(device, quick=options.small)
    left = [cell for cell in grid.all_cells(small=options.small) if cell.name not in done]
    settings, failed = _settings(options, device), 0
    everyone = {**grid.FIRST, **grid.LAST}
    while left and time.monotonic() < deadline:
        cell = left.pop(0)
        row = {"cell": cell.name, **grid.planned(cell, device)}
        row["contenders"] = _measured(cell, everyone, settings, roofline, {}, launches=False)
        print(*grid.lines(row), sep="\n", flush=True)
        failed += bool(_faults(row))
        with path.open("a") as file:
            file.write(json.dumps({**about, "roofline": roofline._asdict(), **row}) + "\n")
    print(f"\n{failed} cells with faults; {len(left)} left; written to {path}")
    return 1 if failed else 0


def _measured(
    cell: Any,
    contenders: Mapping[str, Any],
    settings: Any,
    roofline: Any,
    allowed: dict[str, float],
    *,
    launches: bool,
) -> dict[str, dict[str, Any]]:
    """Measure a cell; where that raises, every contender says why."""
    import torch
    from benchmarks import grid

    try:
        return grid.measure_cell(cell, contenders, settings, roofline, allowed, launches=launches)
    except Exception as error:  # such as no memory for the contenders together
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return {name: {"failed": reason, "fault": True} for name in contenders}
    finally:
        if settings.device == "cuda":
            torch.cuda.empty_cache()


def _faults(row: dict[str, Any]) -> list[str]:
    """Return what is wrong with a cell."""
    return [f"{row['cell']}: {who}" for who, own in row["contenders"].items() if own.get("fault")]


def _operators(device: str, deadline: float, *, small: bool) -> Iterator[dict[str, Any]]:
    """Yield rows of what is not among the cells: both merges, LegoBlock, LegoMerge."""
    from benchmarks.cells import lego_cells, merge_cells
    from motet import _error_floors
    from motet.cli import measure

    makers: tuple[tuple[Callable[..., Any], tuple[int, ...]], ...] = (
        (merge_cells, (1000,) if small else (8 * 17 * 126, 1 << 24)),
        (partial(lego_cells, graphs=device == "cuda"), (20,) if small else (500, 15_000)),
    )
    for make, sizes in makers:
        for size in sizes:
            if time.monotonic() > deadline:
                return
            for cell in make(device, size):
                row = {"name": cell.name, "error": cell.error(cell.run)}
                if row["error"] < _error_floors.FAULT:
                    times = measure.in_turns(cell.contenders(), device, rounds=3 if small else 15)
                    row["ms"] = {who: timing._asdict() for who, timing in times.items()}
                    said = ", ".join(f"{who} {timing} ms" for who, timing in times.items())
                    print(f"{cell.name:28} {said}, error {row['error']:.0e}", flush=True)
                yield row


def _rivals(device: str, deadline: float, *, small: bool) -> list[dict[str, Any]]:
    """Return other libraries' attention on the same keys and values, as far as they are here."""
    from benchmarks import bench_latent_attention as rivals
    from motet.cli import bench, measure

    who = rivals.ATTENTIONS | (rivals.ON_CUDA if device == "cuda" else {})
    functions = {name: f for name, f in who.items() if name not in rivals.COMPILED}
    rows: list[dict[str, Any]] = []
    batches = ((20, 20), (1, 20, 9)) if small else ((15_000,) * 8, bench.RAGGED)
    for lengths in batches:
        if time.monotonic() > deadline:
            break
        inputs = rivals.inputs_of(measure.CONFIGS["blca"], lengths, "bf16", device)
        name = f"blca {bench.shape_name(lengths)}"
        rows += rivals.attention_rows(name, inputs, "bf16", functions, 3 if small else 9)
    return rows


def _settings(options: argparse.Namespace, device: str) -> Any:
    from benchmarks.grid import GridSettings

    compile_s = options.compile_budget if device == "cuda" and not options.small else 0.0
    return GridSettings(
        device,
        rounds=3 if options.small else 15,
        seconds=1.5,
        published=options.published,
        compile_s=compile_s,
    )


def _about(device: str) -> dict[str, Any]:
    from motet.cli import measure
    from motet.kernels import native

    facts = {**measure.about(device), "native": native.status() or "built"}
    print(json.dumps(facts), flush=True)
    return facts


def _path(options: argparse.Namespace, step: str, facts: dict[str, Any]) -> Path:
    device = facts["device"].replace(" ", "-") if "cuda" in facts else "cpu"
    return options.out / f"gpu-{step}-{device}-{facts['revision']}.json"


def _write(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=tuple(BUDGETS), help="what to do")
    parser.add_argument("--out", type=Path, required=True, help="folder for the file")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu runs it as a smoke test"
    )
    parser.add_argument("--small", action="store_true", help="sizes that only show that it works")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS",
        help=f"nothing begins later (default: {BUDGETS})",
    )  # fmt: skip
    parser.add_argument(
        "--compile-budget", type=float, default=30.0, metavar="SECONDS",
        help="of it for torch.compile (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--published", type=Path, metavar="DIR", help="the authors' checkout")
    return parser.parse_args()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # for benchmarks
    sys.exit(main())
