"""`make gpu`: check and time everything on the GPU at hand, and write one JSON file.

Runs in the environment that is active, since GPU machines bring their own torch. First models and
operators are compared with float64; then the device's own limits are measured, and 40 cells of
benchmarks/ladder.py. Every time has its error beside it, and what is too wrong has no time. The
file is written again after each step, so that a machine that is taken away leaves what it did. A
failed check, or a time withheld, makes the exit code 1.

`--full` (`make gpu-full`) measures the whole grid instead, a line of a file per cell; the same
command again goes on where it stopped.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def main() -> int:
    """Check, measure, write."""
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
    return full(options, device) if options.full else named(options, device)


def named(options: argparse.Namespace, device: str) -> int:
    """Check, then time the named cells until the budget is spent."""
    from benchmarks import checks, ladder
    from motet.cli import measure

    deadline = time.monotonic() + options.budget
    report = _about(device)
    path = options.out / f"gpu-{_stem(report)}.json"
    report["checks"] = checks.run_all(device)
    report["roof"] = (roof := measure.measure_roof(device, quick=options.small))._asdict()
    print(roof, flush=True)
    cells = ladder.named_cells(small=options.small)
    report |= {"cells": [], "operators": [], "not_reached": [cell.name for cell in cells]}
    settings = _settings(options, device)
    for number, cell in enumerate(cells):
        _write(path, report)
        if time.monotonic() > deadline:
            break
        row = _measured(cell, settings, roof, launches=number < 8)
        report["cells"].append(row)
        report["not_reached"].remove(cell.name)
    if not report["not_reached"] and time.monotonic() < deadline:
        report["operators"] = list(_operators(device, small=options.small))
    _write(path, report)
    failed = [check["name"] for check in report["checks"] if not check["passed"]]
    failed += [name for row in report["cells"] for name in _faults(row)]
    failed += [row["name"] for row in report["operators"] if "ms" not in row]
    print(f"\n{len(failed)} failed {failed or ''}; {len(report['not_reached'])} cells not reached; "
          f"written to {path}")  # fmt: skip
    return 1 if failed else 0


def full(options: argparse.Namespace, device: str) -> int:
    """Time what is missing of the grid until the budget is spent."""
    from benchmarks import ladder
    from motet.cli import measure

    deadline = time.monotonic() + options.budget
    about = _about(device)
    path = options.out / f"gpu-full-{_stem(about)}.jsonl"
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {row["cell"] for row in known}
    roof = measure.measure_roof(device, quick=options.small)
    left = [cell for cell in ladder.grid(small=options.small) if cell.name not in done]
    settings, failed = _settings(options, device), 0
    while left and time.monotonic() < deadline:
        row = _measured(left.pop(0), settings, roof, launches=False)
        failed += bool(_faults(row))
        with path.open("a") as file:
            file.write(json.dumps({**about, "roof": roof._asdict(), **row}) + "\n")
    print(f"\n{failed} cells with faults; {len(left)} left; written to {path}")
    return 1 if failed else 0


def _measured(cell: Any, settings: Any, roof: Any, *, launches: bool) -> dict[str, Any]:
    """Measure a cell; one that raises is a row with its reason."""
    import torch
    from benchmarks import ladder

    try:
        row = ladder.measure_cell(cell, settings, roof, launches=launches)
    except Exception as error:  # such as no memory for the rungs together
        row = {"cell": cell.name, "rungs": {}, "failed": " ".join(str(error).split())[:300]}
        print(f"\n{cell.name}: {row['failed']}", flush=True)
    else:
        print(*ladder.lines(row), sep="\n", flush=True)
    if settings.device == "cuda":
        torch.cuda.empty_cache()
    return row


def _faults(row: dict[str, Any]) -> list[str]:
    """Return what is wrong with a cell."""
    if "failed" in row:
        return [row["cell"]]
    return [f"{row['cell']}: {name}" for name, own in row["rungs"].items() if own.get("fault")]


def _operators(device: str, *, small: bool) -> Iterator[dict[str, Any]]:
    """Yield rows of what is not on the ladder: both merges, LegoBlock, LegoMerge."""
    from benchmarks.cells import lego_cells, merge_cells
    from motet import _error_floors
    from motet.cli import measure

    for make, sizes in (
        (merge_cells, (1000,) if small else (8 * 17 * 126, 1 << 24)),
        (partial(lego_cells, graphs=device == "cuda"), (20,) if small else (500, 15_000)),
    ):
        for size in sizes:
            for cell in make(device, size):
                row = {"name": cell.name, "error": cell.error(cell.run)}
                if row["error"] < _error_floors.FAULT:
                    times = measure.in_turns(cell.contenders(), device, rounds=3 if small else 15)
                    row["ms"] = {who: timing._asdict() for who, timing in times.items()}
                    said = ", ".join(f"{who} {timing} ms" for who, timing in times.items())
                    print(f"{cell.name:28} {said}, error {row['error']:.0e}", flush=True)
                yield row


def _settings(options: argparse.Namespace, device: str) -> Any:
    from benchmarks.ladder import Settings

    compile_s = options.compile_budget if device == "cuda" and not options.small else 0.0
    rounds = 3 if options.small else 15
    return Settings(device, rounds=rounds, published=options.published, compile_s=compile_s)


def _about(device: str) -> dict[str, Any]:
    from motet.cli import measure
    from motet.kernels import native

    facts = {**measure.about(device), "native": native.status() or "built"}
    print(json.dumps(facts), flush=True)
    return facts


def _stem(facts: dict[str, Any]) -> str:
    device = facts["device"].replace(" ", "-") if "cuda" in facts else "cpu"
    return f"{device}-{facts['revision']}"


def _write(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the file")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu runs it as a smoke test"
    )
    parser.add_argument("--small", action="store_true", help="sizes that only show that it works")
    parser.add_argument("--full", action="store_true", help="the whole grid, resumable")
    parser.add_argument(
        "--budget", type=float, default=500.0, metavar="SECONDS",
        help="no cell begins later (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--compile-budget", type=float, default=90.0, metavar="SECONDS",
        help="of it for torch.compile (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--published", type=Path, metavar="DIR", help="the authors' checkout")
    return parser.parse_args()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # for benchmarks
    sys.exit(main())
