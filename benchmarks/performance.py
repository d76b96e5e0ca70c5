"""Write the tables of docs/performance.md: `python benchmarks/performance.py`.

From every benchmarks/results/gpu-cells-*.json, which `make gpu` writes, and, marked as predictions,
from the planner for GPUs that were not measured. A test compares the page with what this prints.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from motet.cli import bench, measure
from motet.kernels.chips import CHIPS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- benchmarks/performance.py -->\n", "<!-- end -->\n"
SHOWN = {
    "published fp32": "authors' fp32",
    "published bf16": "authors' bf16",
    "reference bf16": "literal bf16",
    "planned bf16": "motet bf16",
    "planned bf16, graph": "motet, graph",
    "planned bf16, static graph": "motet, static graph",
}


def main() -> int:
    """Put the tables in the page."""
    PAGE.write_text(with_tables(PAGE.read_text()))
    return 0


def with_tables(page: str) -> str:
    """Return the page with its tables as the files say."""
    before, rest = page.split(BEGIN, 1)
    return before + BEGIN + "\n".join(tables()) + "\n" + END + rest.split(END, 1)[1]


def tables() -> Iterator[str]:
    """Yield the lines of all tables."""
    for path in sorted((ROOT / "benchmarks" / "results").glob("gpu-cells-*.json")):
        report = json.loads(path.read_text())
        yield f"\n### {report['device']}, revision {report['revision']}\n"
        versions = f"torch {report['torch']}, triton {report['triton']}, {report['date'][:10]}"
        note = f" {report['note']}" if "note" in report else ""
        yield f"{versions}; `benchmarks/results/{path.name}`.{note}\n"
        yield from _measured(report["cells"])
    yield "\n### Predicted, not measured\n"
    yield from _predicted()


def _measured(cells: list[dict[str, Any]]) -> Iterator[str]:
    titles = [title for who, title in SHOWN.items() if any(who in c["contenders"] for c in cells)]
    whose = {who: title for who, title in SHOWN.items() if title in titles}
    yield f"| ms (error) | {' | '.join(titles)} | roof |"
    yield "|---" * (len(titles) + 2) + "|"
    for cell in cells:
        timed = {who: cell["contenders"].get(who, {}) for who in whose}
        row = [_figure(own) for own in timed.values()]
        if any(figure != "-" for figure in row):
            yield f"| {cell['cell']} | {' | '.join(row)} | {_roof(timed)} |"


def _figure(own: dict[str, Any]) -> str:
    if "ms" not in own:
        return "-"
    return f"{measure.figures(own['ms']['median'])} ({own['error']:.0e})"


def _roof(timed: dict[str, dict[str, Any]]) -> str:
    """Return the least time in ms, which every contender's share says."""
    for who, own in timed.items():
        if "ms" in own and "bf16" in who:
            return measure.figures(own["ms"]["median"] * own["roof_share"])
    return "-"


def _predicted() -> Iterator[str]:
    names = [name for name in CHIPS if name != "H200"]
    yield f"| training step, ms | {' | '.join(f'{name}, predicted' for name in names)} |"
    yield "|---" * (len(names) + 1) + "|"
    for name, config in measure.CONFIGS.items():
        cell = measure.Cell(name, config, (15_000,) * 8, step=True)
        times = [1e3 * cell.plan("bf16", machine).cost.seconds for machine in names]
        shown = " | ".join(map(measure.figures, times))
        yield f"| {name} {bench.shape_name(cell.lengths)} | {shown} |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
