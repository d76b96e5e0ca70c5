"""Write the tables of docs/performance.md: `python benchmarks/performance.py`.

From every benchmarks/results/gpu-cells-*.json, which `make gpu` writes, and, marked as predictions,
from the planner. A test compares the page with what this prints.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from motet.cli import measure
from motet.kernels.chips import CHIPS, Chip

sys.path.append(str(Path(__file__).parent.parent))  # where a script does not look

from benchmarks.grid import ROOFLINES_ALLOWED

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
# Models, the sizes of their kernels in benchmarks/launches.py, and the kernels.
COMPILED = (
    ("blca", "context bf16 2048 to 1x256", ("project",)),
    ("blca", "attention bf16 8x16 c25", ("attend", "dq", "dkv")),
    ("kirp", "context bf16 2048 to 1x512", ("project",)),
    ("kirp", "attention bf16 8x27 c17", ("attend", "dq", "dkv")),
    ("brca", "attended bf16 8x63 c17", ("project",)),
    ("brca", "absorbed bf16 136 queries", ("pool",)),
    ("ucec", "attended bf16 8x103 c16", ("project", "pool")),
)


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
    yield (
        "8 bags of 15,000 patches, bfloat16, statistics of the tokens known, the batch in its "
        "place. The kernels of this revision have not run on a GPU yet. The predictions assume "
        "that each kernel reaches its required share of the roofline. Times of launches and of "
        "Python are those of an H200 and its host at revision 7918d87. Rates of other chips come "
        "from their data sheets."
    )
    for kind in ("step", "forward"):
        yield from _predicted(kind == "step")
    yield from _demanded()
    yield from _compiled()


def _measured(cells: list[dict[str, Any]]) -> Iterator[str]:
    titles = [title for who, title in SHOWN.items() if any(who in c["contenders"] for c in cells)]
    whose = {who: title for who, title in SHOWN.items() if title in titles}
    yield f"| ms (error) | {' | '.join(titles)} | roofline |"
    yield "|---" * (len(titles) + 2) + "|"
    for cell in cells:
        timed = {who: cell["contenders"].get(who, {}) for who in whose}
        row = [_figure(own) for own in timed.values()]
        if any(figure != "-" for figure in row):
            yield f"| {cell['cell']} | {' | '.join(row)} | {_roofline(timed)} |"


def _figure(own: dict[str, Any]) -> str:
    if "ms" not in own:
        return "-"
    return f"{measure.figures(own['ms']['median'])} ({own['error']:.0e})"


def _roofline(timed: dict[str, dict[str, Any]]) -> str:
    """Return the least time in ms, which every contender's share says."""
    for who, own in timed.items():
        if "ms" in own and "bf16" in who:
            return measure.figures(own["ms"]["median"] * own["roofline_share"])
    return "-"


class Prediction(NamedTuple):
    """What the planner says of a cell on a chip, as a graph if not said otherwise."""

    strategy: str
    graph_ms: float
    eager_ms: float
    """Of the strategy that is best in eager mode."""
    roofline_ms: float

    @property
    def rooflines(self) -> float:
        return self.graph_ms / self.roofline_ms


def predicted(cell: measure.Cell, chip: Chip) -> Prediction:
    """Predict a cell in bfloat16, on tokens with known statistics."""
    graph, eager = (
        cell.plan("bf16", chip, graph=graph, statistics=True) for graph in (True, False)
    )
    rates = {"bf16": chip.matrix[torch.bfloat16]}
    roofline = measure.Roofline(chip.bandwidth, chip.bandwidth, rates)
    return Prediction(
        graph.strategy, 1e3 * graph.cost.graph_seconds, 1e3 * eager.cost.seconds,
        1e3 * roofline.seconds(cell, "bf16", graph.cost.flop),
    )  # fmt: skip


def _slides(name: str, *, step: bool) -> measure.Cell:
    return measure.Cell(name, measure.CONFIGS[name], (15_000,) * 8, step)


def _predicted(step: bool) -> Iterator[str]:
    """Yield a table of all chips."""
    kind = "training step" if step else "forward"
    names = [f"{name}, predicted" for name in CHIPS]
    yield f"\n| {kind}, ms: graph (times the roofline), eager | {' | '.join(names)} |"
    yield "|---" * (len(names) + 1) + "|"
    for name in measure.CONFIGS:
        row = [predicted(_slides(name, step=step), chip) for chip in CHIPS.values()]
        shown = [
            f"{measure.figures(times.graph_ms)} ({times.rooflines:.1f}), "
            f"{measure.figures(times.eager_ms)}"
            for times in row
        ]
        yield f"| {name} | {' | '.join(shown)} |"


def _demanded() -> Iterator[str]:
    """Yield what is demanded of an H200, with what was measured of the kernels before."""
    before = _before()
    yield (
        "\n| H200, a graph | strategy | roofline, ms | predicted, ms | predicted / roofline | "
        "goal | | measured at 7918d87: graph, eager |"
    )
    yield "|---" * 8 + "|"
    for name in measure.CONFIGS:
        for step in (True, False):
            own = predicted(_slides(name, step=step), CHIPS["H200"])
            demanded = ROOFLINES_ALLOWED["step" if step else own.strategy]
            verdict = "met" if own.rooflines <= demanded else "missed"
            kind = "step" if step else "forward"
            yield (
                f"| {name} {kind} | {own.strategy} | {measure.figures(own.roofline_ms)} | "
                f"{measure.figures(own.graph_ms)} | {own.rooflines:.2f} | {demanded} | {verdict} | "
                f"{before.get(f'{name} 8x15000 {kind}', '-')} |"
            )


def _before() -> dict[str, str]:
    """Return what the first figures of an H200 are, by cell."""
    path = ROOT / "benchmarks" / "results" / "gpu-cells-NVIDIA-H200-7918d87.json"
    found = {}
    for row in json.loads(path.read_text())["cells"]:
        own = [
            row["contenders"].get(who, {}) for who in ("planned bf16, static graph", "planned bf16")
        ]
        if all("ms" in one for one in own):
            found[row["cell"]] = ", ".join(measure.figures(one["ms"]["median"]) for one in own)
    return found


def _compiled() -> Iterator[str]:
    """Yield what the compiler made of the kernels that take the time, from registers.json."""
    table = json.loads((ROOT / "benchmarks" / "results" / "registers.json").read_text())
    yield "\n### Compiled, not run\n"
    yield (
        f"What Triton {table['triton']} compiles the slowest kernels to, in bfloat16 "
        "(`python benchmarks/registers.py`). Matrix instructions and asynchronous copies are "
        "counted in the compiled code. A100 is sm_80, H100 and H200 are sm_90, B200 is sm_100.\n"
    )
    yield (
        "| model | kernel | chip | warps | buffers | registers | spills | shared KiB | "
        "matrix instructions | asynchronous copies |"
    )
    yield "|---" * 10 + "|"
    for model, cell, kernels in COMPILED:
        for kernel in kernels:
            names = (f"{kernel}_kernel", f"{kernel}_tma_kernel")
            for row in table["rows"]:
                if row["name"] == cell and row["kernel"] in names:
                    yield (
                        f"| {model} | {row['kernel']} | sm_{row['chip']} | {row['warps']} | "
                        f"{row['stages']} | {row['registers']} | {row['spill_stores']} | "
                        f"{row['shared_bytes'] / 1024:.0f} | {row['matrix_instructions']} | "
                        f"{row['async_copies']} |"
                    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
