"""Write the tables of docs/performance.md: `python benchmarks/performance.py`.

Measured times are those of every benchmarks/results/gpu-cells-*.json, which `make gpu` writes;
predicted ones are the planner's, and marked as such. A test checks that the page has the tables.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from motet.cli import measure
from motet.kernels.chips import CHIPS, Chip

sys.path.append(str(Path(__file__).parent.parent))  # so that this script can import benchmarks

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
# (model, name of the size in benchmarks/launches.py, kernels)
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
    """Write the tables into the page; return the exit code."""
    PAGE.write_text(with_tables(PAGE.read_text()))
    return 0


def with_tables(page: str) -> str:
    """Return the page with tables of the current files."""
    before, after = page.split(BEGIN, 1)
    return before + BEGIN + "\n".join(tables()) + "\n" + END + after.split(END, 1)[1]


def tables() -> Iterator[str]:
    """Yield the lines of all tables."""
    for path in sorted((ROOT / "benchmarks" / "results").glob("gpu-cells-*.json")):
        report = json.loads(path.read_text())
        yield f"\n### {report['device']}, revision {report['revision']}\n"
        versions = f"torch {report['torch']}, triton {report['triton']}, {report['date'][:10]}"
        note = f" {report['note']}" if "note" in report else ""
        yield f"{versions}; `benchmarks/results/{path.name}`.{note}\n"
        yield from _measured_table(report["cells"])
    yield "\n### Predicted, not measured\n"
    yield (
        "8 bags of 15,000 patches, bfloat16, statistics of the tokens known, the batch in its "
        "place. The kernels of this revision have not run on a GPU yet. The predictions assume "
        "that each kernel reaches its required share of the roofline. Times of launches and of "
        "Python are those of an H200 and its host at revision 7918d87. Rates of other chips come "
        "from their data sheets."
    )
    for step in (True, False):
        yield from _predicted_table(step)
    yield from _demanded_table()
    yield from _compiled_table()


def _measured_table(cells: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table of measured times, a row per cell."""
    shown = {
        name: title
        for name, title in SHOWN.items()
        if any(name in cell["contenders"] for cell in cells)
    }
    yield f"| ms (error) | {' | '.join(shown.values())} | roofline |"
    yield "|---" * (len(shown) + 2) + "|"
    for cell in cells:
        results = {name: cell["contenders"].get(name, {}) for name in shown}
        row = [_figure(result) for result in results.values()]
        if any(figure != "-" for figure in row):
            yield f"| {cell['cell']} | {' | '.join(row)} | {_roofline(results)} |"


def _figure(result: dict[str, Any]) -> str:
    if "ms" not in result:
        return "-"
    return f"{measure.figures(result['ms']['median'])} ({result['error']:.0e})"


def _roofline(results: dict[str, dict[str, Any]]) -> str:
    """Return the roofline in ms: the time of any bf16 contender, times its share."""
    for name, result in results.items():
        if "ms" in result and "bf16" in name:
            return measure.figures(result["ms"]["median"] * result["roofline_share"])
    return "-"


class Prediction(NamedTuple):
    """The planner's predictions of a cell on a chip."""

    strategy: str
    """The fastest in a graph."""
    graph_ms: float
    eager_ms: float
    """Of the strategy that is fastest in eager mode."""
    roofline_ms: float

    @property
    def rooflines(self) -> float:
        """The time of the graph as a multiple of the roofline."""
        return self.graph_ms / self.roofline_ms


def predict(cell: measure.Cell, chip: Chip) -> Prediction:
    """Predict a cell in bfloat16, on tokens whose statistics are given."""
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


def _predicted_table(step: bool) -> Iterator[str]:
    """Yield the lines of a table of predicted times on all chips."""
    kind = "training step" if step else "forward"
    names = [f"{name}, predicted" for name in CHIPS]
    yield f"\n| {kind}, ms: graph (times the roofline), eager | {' | '.join(names)} |"
    yield "|---" * (len(names) + 1) + "|"
    for name in measure.CONFIGS:
        predictions = [predict(_slides(name, step=step), chip) for chip in CHIPS.values()]
        row = [
            f"{measure.figures(prediction.graph_ms)} ({prediction.rooflines:.1f}), "
            f"{measure.figures(prediction.eager_ms)}"
            for prediction in predictions
        ]
        yield f"| {name} | {' | '.join(row)} |"


def _demanded_table() -> Iterator[str]:
    """Yield the lines of a table of an H200: predicted and demanded, and measured at 7918d87."""
    measured = _measured_at_7918d87()
    yield (
        "\n| H200, a graph | strategy | roofline, ms | predicted, ms | predicted / roofline | "
        "goal | | measured at 7918d87: graph, eager |"
    )
    yield "|---" * 8 + "|"
    for name in measure.CONFIGS:
        for step in (True, False):
            prediction = predict(_slides(name, step=step), CHIPS["H200"])
            rooflines = prediction.rooflines
            demanded = ROOFLINES_ALLOWED["step" if step else prediction.strategy]
            verdict = "met" if rooflines <= demanded else "missed"
            kind = "step" if step else "forward"
            yield (
                f"| {name} {kind} | {prediction.strategy} | "
                f"{measure.figures(prediction.roofline_ms)} | "
                f"{measure.figures(prediction.graph_ms)} | {rooflines:.2f} | {demanded} | "
                f"{verdict} | {measured.get(f'{name} 8x15000 {kind}', '-')} |"
            )


def _measured_at_7918d87() -> dict[str, str]:
    """Return the first times that were measured on an H200, as text by cell: graph, eager."""
    path = ROOT / "benchmarks" / "results" / "gpu-cells-NVIDIA-H200-7918d87.json"
    names = ("planned bf16, static graph", "planned bf16")
    texts = {}
    for row in json.loads(path.read_text())["cells"]:
        results = [row["contenders"].get(name, {}) for name in names]
        if all("ms" in result for result in results):
            figures = (measure.figures(result["ms"]["median"]) for result in results)
            texts[row["cell"]] = ", ".join(figures)
    return texts


def _compiled_table() -> Iterator[str]:
    """Yield the lines of a table of the longest kernels as compiled, from registers.json."""
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
