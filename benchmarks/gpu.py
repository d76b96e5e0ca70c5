"""Check, profile and time motet on the GPU of this machine; each step writes its own JSON file.

    make gpu-check      compile all kernels, compare them with float64, and 50 runs with each other
    make gpu-profile    the time of every kernel of a training step
    make gpu            40 cells of benchmarks/grid.py, the most important contenders first
    make gpu-full       all cells, one line of a file each; a second call continues where the
                        first stopped

Runs in the active environment, since GPU machines bring their own torch. The file is written again
after each row, so that a session that is cut off keeps its results. Every time has its error beside
it; a contender whose error is too large has no time. The exit code is 1 if a check failed, if a
contender has no time by a fault of motet, or if a kernel is slower than demanded or than with
another Triton.
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
# Seconds after which a step starts nothing new.
BUDGETS = {"check": 90.0, "profile": 60.0, "cells": 200.0, "full": 500.0}


def main() -> int:
    """Run one step and write its file; return the exit code."""
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

    # Full float32 products: with TF32 the error beside a time would be that of the product.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.config.recompile_limit = 64
    options.out.mkdir(parents=True, exist_ok=True)
    options.budget = BUDGETS[options.step] if options.budget is None else options.budget
    steps = {"check": check, "profile": profile, "cells": cells, "full": full}
    return steps[options.step](options, device)


def check(options: argparse.Namespace, device: str) -> int:
    """Compare operators and models with float64, and repeated runs with each other (races)."""
    from benchmarks import checks

    started = time.monotonic()
    report = {**_about(device), "checks": []}
    path = _path(options, "check", report)
    # The processes spend their time in Triton's compiler, not on the GPU. Without a GPU they would
    # compete for the cores.
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
    """Record every kernel of a training step of four models, in both strategies."""
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
            print("\nstopped: the time budget is spent")
            break
    report["faults"] = list(profiling.too_slow(report["rows"])) if device == "cuda" else []
    earlier = profiling.earlier(report, ROOT / "benchmarks" / "results")
    if earlier is not None:
        report["faults"] += profiling.slower_than(earlier, report)
    _write(path, report)
    print(*report["faults"], f"\nwritten to {path}", sep="\n")
    return 1 if report["faults"] else 0


def cells(options: argparse.Namespace, device: str) -> int:
    """Time the named cells until the budget is spent.

    All cells with their first contenders, then all cells with their last ones.
    """
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
    queue = [(cell, contenders) for contenders in (grid.FIRST, grid.LAST) for cell in named]
    allowed: dict[str, dict[str, float]] = {cell.name: {} for cell in named}
    settings = _settings(options, device)
    while queue and time.monotonic() < deadline:
        cell, contenders = queue.pop(0)
        row = rows[cell.name]
        first = contenders is grid.FIRST
        if not first:  # every run has this one, so that all ratios are of times side by side
            contenders = {grid.USUAL: grid.FIRST[grid.USUAL], **contenders}
        results = _measure(cell, contenders, settings, roofline, allowed[cell.name], launches=first)
        row["contenders"] = {**results, **row["contenders"]}  # of grid.USUAL the first time stays
        print(*grid.lines({**row, "contenders": results}), sep="\n", flush=True)
        report["demands"] = list(grid.demands(report["cells"]))
        report["not_reached"] = [f"{c.name}: {', '.join(names)}" for c, names in queue]
        _write(path, report)
    if not queue:
        report["operators"] = list(_operators(device, deadline, small=options.small))
    report["rivals"] = _rivals(device, deadline, small=options.small)
    _write(path, report)
    failed = [name for row in report["cells"] for name in _faults(row)]
    failed += [row["name"] for row in report["operators"] if "ms" not in row]
    for row in report["demands"]:
        print(json.dumps(row))
    print(
        f"\n{len(failed)} failed {failed or ''}; {len(queue)} parts not reached; written to {path}"
    )
    return 1 if failed else 0


def full(options: argparse.Namespace, device: str) -> int:
    """Time the cells that the file does not have yet, until the budget is spent."""
    from benchmarks import grid
    from motet.cli import measure

    deadline = time.monotonic() + options.budget
    about = _about(device)
    path = _path(options, "full", about).with_suffix(".jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {row["cell"] for row in rows}
    roofline = measure.measure_roofline(device, quick=options.small)
    queue = [cell for cell in grid.all_cells(small=options.small) if cell.name not in done]
    settings, failed = _settings(options, device), 0
    contenders = {**grid.FIRST, **grid.LAST}
    while queue and time.monotonic() < deadline:
        cell = queue.pop(0)
        row = {"cell": cell.name, **grid.planned(cell, device)}
        row["contenders"] = _measure(cell, contenders, settings, roofline, {}, launches=False)
        print(*grid.lines(row), sep="\n", flush=True)
        failed += bool(_faults(row))
        with path.open("a") as file:
            file.write(json.dumps({**about, "roofline": roofline._asdict(), **row}) + "\n")
    print(f"\n{failed} cells with faults; {len(queue)} left; written to {path}")
    return 1 if failed else 0


def _measure(
    cell: Any,
    contenders: Mapping[str, Any],
    settings: Any,
    roofline: Any,
    allowed: dict[str, float],
    *,
    launches: bool,
) -> dict[str, dict[str, Any]]:
    """Measure a cell; if that raises, return the reason for every contender."""
    import torch
    from benchmarks import grid

    try:
        return grid.measure_cell(cell, contenders, settings, roofline, allowed, launches=launches)
    except Exception as error:  # such as too little memory for all contenders at once
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return {name: {"failed": reason, "fault": True} for name in contenders}
    finally:
        if settings.device == "cuda":
            torch.cuda.empty_cache()


def _faults(row: dict[str, Any]) -> list[str]:
    """Return the contenders of a cell that have a fault."""
    return [
        f"{row['cell']}: {name}"
        for name, result in row["contenders"].items()
        if result.get("fault")
    ]


def _operators(device: str, deadline: float, *, small: bool) -> Iterator[dict[str, Any]]:
    """Yield rows of both merges, LegoBlock and LegoMerge, which grid.py does not have."""
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
                    row["ms"] = {name: timing._asdict() for name, timing in times.items()}
                    text = ", ".join(f"{name} {timing} ms" for name, timing in times.items())
                    print(f"{cell.name:28} {text}, error {row['error']:.0e}", flush=True)
                yield row


def _rivals(device: str, deadline: float, *, small: bool) -> list[dict[str, Any]]:
    """Return rows of the installed libraries' attention on the same keys and values."""
    from benchmarks import bench_latent_attention as rivals
    from motet.cli import bench, measure

    attentions = rivals.ATTENTIONS | (rivals.ON_CUDA if device == "cuda" else {})
    functions = {name: f for name, f in attentions.items() if name not in rivals.COMPILED}
    rows: list[dict[str, Any]] = []
    batches = ((20, 20), (1, 20, 9)) if small else ((15_000,) * 8, bench.RAGGED_GPU)
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
    budgets = ", ".join(f"{name} {seconds:g}" for name, seconds in BUDGETS.items())
    parser.add_argument("step", choices=tuple(BUDGETS), help="the step to run")
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON file")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda",
        help="cpu only shows that the script works (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--small", action="store_true", help="sizes that only show that it works")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS",
        help=f"start nothing new after this time (default: {budgets})",
    )  # fmt: skip
    parser.add_argument(
        "--compile-budget", type=float, default=30.0, metavar="SECONDS",
        help="the part of the budget for torch.compile (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--published", type=Path, metavar="DIR", help="a clone of konst-int-i/healnet"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # so that this script can import the package benchmarks
    sys.exit(main())
