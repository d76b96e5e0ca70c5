"""How the cost of a training step grows with patches and with modalities: `make cost-growth`.

    python benchmarks/cost_growth.py           measure this CPU with a small model: three minutes
    python benchmarks/cost_growth.py --draw    measure nothing; predict and draw again

Writes benchmarks/results/cost-growth.json, docs/figures/cost-growth.svg and a table of
docs/performance.md.
They have the times measured on this CPU, beside those of the literal equation; the times predicted
for an H200, as one graph; and times measured on an H200 with the kernels of revision 7918d87. A
test checks that the three files agree, and that the growth is linear.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import motet
import numpy as np
import torch
from motet.cli import measure
from motet.cli.bench import shape_name
from motet.kernels.plan import Strategy
from torch import Tensor

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "cost-growth.json"
PICTURE = ROOT / "docs" / "figures" / "cost-growth.svg"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- benchmarks/cost_growth.py -->\n", "<!-- end of it -->\n"
H200_CELLS = ROOT / "benchmarks" / "results" / "gpu-cells-NVIDIA-H200-7918d87.json"

PATCHES = (500, 1000, 2000, 4000, 8000, 15_000, 30_000, 60_000)
BAGS = (1, 8)
MODALITIES = (1, 2, 4, 8, 16)
SMALL = measure.Config(17, 32, 16, 2, heads=4)
WIDTH, FEW = 512, 1000
"""On the CPU: features of a patch, and patches of a bag where the number of modalities grows."""
CONTENDERS: dict[str, Strategy | None] = {"motet": None, "literal": "reference"}
LARGE, MANY = "blca", 15_000
"""On the H200: the model, and patches of a bag where the number of modalities grows."""
LINEAR_FROM = 4000
"""The tokens of a batch from which on the tokens take most of a step's time on a CPU."""


def main() -> int:
    """Measure, unless --draw is given, and write the three files; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--draw", action="store_true", help="measure nothing; predict and draw again"
    )
    if parser.parse_args().draw:
        report = json.loads(RESULT.read_text())
    else:
        torch.set_num_threads(1)
        report = {**measure.about("cpu"), "cpu": list(measure_cpu())}
    report["h200"] = list(predict_h200())
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    draw(report)
    PAGE.write_text(with_table(PAGE.read_text(), report))
    return 0


def batches() -> Iterator[tuple[int, int, int]]:
    """Yield the sizes to measure: bags, patches of each bag, and modalities."""
    yield from ((bags, patches, 1) for bags in BAGS for patches in PATCHES)
    yield from ((8, FEW, count) for count in MODALITIES if count > 1)


def measure_cpu() -> Iterator[dict[str, Any]]:
    """Yield the times of a training step on this CPU, in float32.

    All sizes take turns, so that all are slowed down alike when the machine is.
    """
    runs: dict[str, Callable[[], list[Tensor]]] = {}
    for batch in batches():
        for name, strategy in CONTENDERS.items():
            runs[f"{batch} {name}"] = step(*batch, strategy)
    times = measure.in_turns(runs, "cpu", rounds=7, seconds=90.0)
    for batch in batches():
        bags, patches, count = batch
        row: dict[str, Any] = {"bags": bags, "patches": patches, "modalities": count}
        row["error"] = errors(bags, min(patches, FEW), count)
        row["ms"] = {name: times[f"{batch} {name}"]._asdict() for name in CONTENDERS}
        text = ", ".join(f"{name} {times[f'{batch} {name}']} ms" for name in CONTENDERS)
        print(f"{bags} x {patches}, {count} modalities: {text}", flush=True)
        yield row


def errors(bags: int, patches: int, count: int) -> dict[str, float]:
    """Return the errors of both contenders' gradients against the equation in float64."""
    exact = step(bags, patches, count, "reference", torch.float64)()
    return {
        name: measure.relative_error(step(bags, patches, count, strategy)(), exact)
        for name, strategy in CONTENDERS.items()
    }


def step(
    bags: int,
    patches: int,
    count: int,
    strategy: Strategy | None,
    dtype: torch.dtype = torch.float32,
) -> Callable[[], list[Tensor]]:
    """Return a function that computes the gradients of all parameters of a small HEALNet."""
    torch.manual_seed(0)
    names = [f"m{i}" for i in range(count)]
    model = motet.HEALNet(
        {name: motet.Bag(WIDTH) for name in names}, out_features=4, depth=SMALL.depth,
        num_latents=SMALL.latents, latent_dim=SMALL.latent_dim, heads=SMALL.heads,
        head_dim=SMALL.head_dim,
    ).to(dtype)  # fmt: skip
    inputs = {name: torch.randn(bags, patches, WIDTH).to(dtype) for name in names}
    parameters = list(model.parameters())

    def run() -> list[Tensor]:
        logits: Any = model(inputs, strategy=strategy)
        return list(torch.autograd.grad(measure.squares(logits, {}), parameters))

    return run


def predict_h200() -> Iterator[dict[str, Any]]:
    """Yield the times of BLCA's model on an H200: predicted as one graph, and measured."""
    measured = {
        row["cell"]: row["contenders"] for row in json.loads(H200_CELLS.read_text())["cells"]
    }
    for bags, patches, count in (
        *((bags, patches, 1) for bags in BAGS for patches in PATCHES),
        *((8, MANY, count) for count in MODALITIES if count > 1),
    ):
        row: dict[str, Any] = {"bags": bags, "patches": patches, "modalities": count}
        row["predicted_ms"] = 1e3 * predicted_seconds(bags, patches, count)
        cell = f"{LARGE} {shape_name((patches,) * bags)} step"
        contenders = measured.get(cell, {}) if count == 1 else {}
        for name in ("planned bf16, static graph", "planned bf16"):
            if "ms" in contenders.get(name, {}):
                row.setdefault("measured_ms", {})[name] = contenders[name]["ms"]["median"]
        yield row


def predicted_seconds(bags: int, patches: int, count: int) -> float:
    """Predict the time of a step on `count` modalities of one size.

    The planner predicts a step on one modality. From it the part that does not depend on the number
    of modalities, such as the head, is counted once, the rest `count` times.
    """
    config = measure.CONFIGS[LARGE]

    def graph(tokens: int, layers: int) -> float:
        return motet.kernels.plan(
            tokens, 2048, bags=bags, latents=config.latents, heads=config.heads,
            head_dim=config.head_dim, layers=layers, dtype=torch.bfloat16, device="H200",
            training=True, statistics=True, graph=True,
        ).seconds  # fmt: skip

    fixed = 2 * graph(0, 1) - graph(0, 2)  # the time with no layer, by extrapolation
    return fixed + count * (graph(bags * patches, config.depth) - fixed)


def slope(x: list[float], y: list[float]) -> float:
    """Return the exponent of y = c * x ** exponent, by least squares: 1 for linear growth."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def slopes(report: dict[str, Any]) -> dict[str, float]:
    """Return the exponents by which the time of a step on the CPU grows."""
    rows = report["cpu"]
    exponents = {}
    for name in CONTENDERS:
        for bags in BAGS:
            long = [
                row for row in rows
                if (row["bags"], row["modalities"]) == (bags, 1)
                and bags * row["patches"] >= LINEAR_FROM
            ]  # fmt: skip
            times = [row["ms"][name]["median"] for row in long]
            exponents[f"{name}, patches, {bags} x"] = slope([row["patches"] for row in long], times)
        growing = modality_rows(rows)
        times = [row["ms"][name]["median"] for row in growing]
        exponents[f"{name}, modalities"] = slope([row["modalities"] for row in growing], times)
    return exponents


def modality_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows that differ in the number of modalities alone."""
    patches = next(row["patches"] for row in rows if row["modalities"] > 1)
    return [row for row in rows if (row["bags"], row["patches"]) == (8, patches)]


def size(rows: list[dict[str, Any]]) -> str:
    """Return the size of the rows' modalities, for a legend."""
    return f"8 bags of {rows[0]['patches']:,}"


def digest(report: dict[str, Any]) -> str:
    """Return a digest of all numbers, which the picture holds so that a test can compare them."""
    return hashlib.sha256(json.dumps(report, sort_keys=True).encode()).hexdigest()


def draw(report: dict[str, Any]) -> None:
    """Draw the picture."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    (cpu, gpu), (cpu_modalities, gpu_modalities) = figure.subplots(2, 2)
    for bags, colour in zip(BAGS, ("tab:blue", "tab:orange"), strict=True):
        batch = "1 bag" if bags == 1 else f"{bags} bags"
        rows = [r for r in report["cpu"] if (r["bags"], r["modalities"]) == (bags, 1)]
        x = [row["patches"] for row in rows]
        for name, style in (("motet", "o-"), ("literal", "s:")):
            y = [row["ms"][name]["median"] for row in rows]
            cpu.plot(x, y, style, color=colour, markersize=4, label=f"{name}, {batch}")
        rows = [r for r in report["h200"] if (r["bags"], r["modalities"]) == (bags, 1)]
        y = [row["predicted_ms"] for row in rows]
        gpu.plot([row["patches"] for row in rows], y, color=colour, label=f"predicted, {batch}")
        for name, mark in (("planned bf16, static graph", "^"), ("planned bf16", "x")):
            measured = [row for row in rows if name in row.get("measured_ms", {})]
            mode = "graph" if "graph" in name else "eager"
            label = f"{mode} at 7918d87, {batch}"
            y = [row["measured_ms"][name] for row in measured]
            gpu.plot([row["patches"] for row in measured], y, mark, color=colour, label=label)
    rows = modality_rows(report["cpu"])
    x = [row["modalities"] for row in rows]
    for name, style in (("motet", "o-"), ("literal", "s:")):
        y = [row["ms"][name]["median"] for row in rows]
        cpu_modalities.plot(x, y, style, markersize=4, label=f"{name}, {size(rows)}")
    rows = modality_rows(report["h200"])
    y = [row["predicted_ms"] for row in rows]
    gpu_modalities.plot([row["modalities"] for row in rows], y, label=f"predicted, {size(rows)}")
    titles = (
        "one core of a CPU, small model",
        "H200, BLCA, bf16: predicted, and measured before",
    )
    for axes, title in zip((cpu, gpu), titles, strict=True):
        axes.set(title=title)
    for axes in figure.axes:
        patches = axes in (cpu, gpu)
        axes.set(xscale="log", yscale="log", ylabel="ms of a training step",
                 xlabel="patches of a bag" if patches else "modalities")  # fmt: skip
        ticks = PATCHES[::2] if patches else MODALITIES
        axes.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        # Room above the curves for the legend; more on the GPU's, whose measured points are higher.
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (10 if axes is gpu else 3))
        axes.legend(fontsize=7, loc="upper left", ncols=2 if axes is gpu else 1)
        axes.grid(True, which="major", alpha=0.3)
    with mpl.rc_context({"svg.hashsalt": "motet", "svg.fonttype": "none"}):
        figure.savefig(PICTURE, metadata={"Date": None, "Description": digest(report)})


def with_table(page: str, report: dict[str, Any]) -> str:
    """Return the page with the table of these numbers."""
    before, after = page.split(BEGIN, 1)
    return before + BEGIN + "\n".join(table(report)) + "\n" + END + after.split(END, 1)[1]


def table(report: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the tables, and the exponents of the growth."""
    shown = measure.figures
    yield f"{report['device']}, one thread; torch {report['torch']}, {report['date'][:10]}.\n"
    yield "| patches | CPU, 1 bag: motet, literal | 8 bags | H200 predicted, 1 bag | 8 bags |"
    yield "|---|---|---|---|---|"
    cpu, gpu = (
        {(r["bags"], r["patches"], r["modalities"]): r for r in report[kind]}
        for kind in ("cpu", "h200")
    )
    for patches in PATCHES:
        ms = [cpu[bags, patches, 1]["ms"] for bags in BAGS]
        measured = [f"{shown(m['motet']['median'])}, {shown(m['literal']['median'])}" for m in ms]
        predicted = [shown(gpu[bags, patches, 1]["predicted_ms"]) for bags in BAGS]
        yield f"| {patches:,} | {' | '.join([*measured, *predicted])} |"
    yield f"\n| modalities | CPU, 8 x {FEW:,}: motet, literal | H200 predicted, 8 x {MANY:,} |"
    yield "|---|---|---|"
    for count in MODALITIES:
        ms = cpu[8, FEW, count]["ms"]
        predicted = shown(gpu[8, MANY, count]["predicted_ms"])
        measured = f"{shown(ms['motet']['median'])}, {shown(ms['literal']['median'])}"
        yield f"| {count} | {measured} | {predicted} |"
    exponents = ", ".join(f"{value:.2f} ({name})" for name, value in slopes(report).items())
    yield f"\nExponents on the CPU, from {LINEAR_FROM:,} tokens a batch on: {exponents}."
    worst = {name: max(row["error"][name] for row in report["cpu"]) for name in CONTENDERS}
    yield (
        f"Gradients err by at most {worst['motet']:.0e}, those of the literal equation by "
        f"{worst['literal']:.0e}, relative, against float64 on bags of at most {FEW:,}."
    )


if __name__ == "__main__":
    sys.exit(main())
