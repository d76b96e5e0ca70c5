"""How the cost of a training step grows with patches and with modalities: `make cost-growth`.

    python benchmarks/cost_growth.py           measures this CPU, a small model: three minutes
    python benchmarks/cost_growth.py --draw    only predicts and draws again

Writes benchmarks/results/cost-growth.json, docs/figures/cost-growth.svg and a table of
docs/performance.md:
measured on this CPU, beside the literal equation; predicted for an H200, as one graph; measured on
an H200, of the kernels before. A test holds the three together, and the growth to be linear.
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
"""Of the CPU's model: features of a patch, and patches of a bag where modalities grow."""
CONTENDERS: dict[str, Strategy | None] = {"motet": None, "literal": "reference"}
LARGE, MANY = "blca", 15_000
"""The H200's model, and patches of a bag where modalities grow."""
LINEAR_FROM = 4000
"""Tokens of a batch from which on the cost of a step is that of the tokens, on a CPU."""


def main() -> int:
    """Measure, unless that is left out, and write all three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    if parser.parse_args().draw:
        found = json.loads(RESULT.read_text())
    else:
        torch.set_num_threads(1)
        found = {**measure.about("cpu"), "cpu": list(measured())}
    found["h200"] = list(predicted())
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    draw(found)
    PAGE.write_text(with_table(PAGE.read_text(), found))
    return 0


def batches() -> Iterator[tuple[int, int, int]]:
    """Yield bags, patches of each, and modalities."""
    yield from ((bags, patches, 1) for bags in BAGS for patches in PATCHES)
    yield from ((8, FEW, count) for count in MODALITIES if count > 1)


def measured() -> Iterator[dict[str, Any]]:
    """Yield the times of a training step on this CPU, in float32.

    All sizes take turns, so that a machine that slows down for a while does so for all of them.
    """
    runs: dict[str, Callable[[], list[Tensor]]] = {}
    for batch in batches():
        for who, how in CONTENDERS.items():
            runs[f"{batch} {who}"] = step(*batch, how)
    times = measure.in_turns(runs, "cpu", rounds=7, seconds=90.0)
    for batch in batches():
        bags, patches, count = batch
        row = {"bags": bags, "patches": patches, "modalities": count}
        row["error"] = errors(bags, min(patches, FEW), count)
        row["ms"] = {who: times[f"{batch} {who}"]._asdict() for who in CONTENDERS}
        said = ", ".join(f"{who} {times[f'{batch} {who}']} ms" for who in CONTENDERS)
        print(f"{bags} x {patches}, {count} modalities: {said}", flush=True)
        yield row


def errors(bags: int, patches: int, count: int) -> dict[str, float]:
    """Return the errors of the gradients, on short bags, against the equation in float64."""
    exact = step(bags, patches, count, "reference", torch.float64)()
    return {
        who: measure.relative_error(step(bags, patches, count, how)(), exact)
        for who, how in CONTENDERS.items()
    }


def step(
    bags: int,
    patches: int,
    count: int,
    strategy: Strategy | None,
    dtype: torch.dtype = torch.float32,
) -> Callable[[], list[Tensor]]:
    """Return a training step of a small HEALNet: the gradients of all parameters."""
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


def predicted() -> Iterator[dict[str, Any]]:
    """Yield what an H200 is predicted to take for BLCA's model as one graph, and what it took."""
    before = {row["cell"]: row["contenders"] for row in json.loads(H200_CELLS.read_text())["cells"]}
    for bags, patches, count in (
        *((bags, patches, 1) for bags in BAGS for patches in PATCHES),
        *((8, MANY, count) for count in MODALITIES if count > 1),
    ):
        row: dict[str, Any] = {"bags": bags, "patches": patches, "modalities": count}
        row["predicted_ms"] = 1e3 * predicted_seconds(bags, patches, count)
        own = before.get(f"{LARGE} {shape_name((patches,) * bags)} step", {}) if count == 1 else {}
        for who in ("planned bf16, static graph", "planned bf16"):
            if "ms" in own.get(who, {}):
                row.setdefault("measured_ms", {})[who] = own[who]["ms"]["median"]
        yield row


def predicted_seconds(bags: int, patches: int, count: int) -> float:
    """Predict a step on modalities of one size; what is there once whatever they are, once."""
    config = measure.CONFIGS[LARGE]

    def graph(tokens: int, layers: int) -> float:
        return motet.kernels.plan(
            tokens, 2048, bags=bags, latents=config.latents, heads=config.heads,
            head_dim=config.head_dim, layers=layers, dtype=torch.bfloat16, device="H200",
            training=True, statistics=True, graph=True,
        ).seconds  # fmt: skip

    once = 2 * graph(0, 1) - graph(0, 2)  # without any layer
    return once + count * (graph(bags * patches, config.depth) - once)


def slope(x: list[float], y: list[float]) -> float:
    """Return the exponent by which y grows with x, by least squares: 1 if it is linear."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def slopes(found: dict[str, Any]) -> dict[str, float]:
    """Return how the measured time of a step on the CPU grows, by what grows."""
    rows = found["cpu"]
    result = {}
    for who in ("motet", "literal"):
        for bags in BAGS:
            own = [
                row for row in rows
                if (row["bags"], row["modalities"]) == (bags, 1)
                and bags * row["patches"] >= LINEAR_FROM
            ]  # fmt: skip
            times = [row["ms"][who]["median"] for row in own]
            result[f"{who}, patches, {bags} x"] = slope([row["patches"] for row in own], times)
        own = modality_rows(rows)
        times = [row["ms"][who]["median"] for row in own]
        result[f"{who}, modalities"] = slope([row["modalities"] for row in own], times)
    return result


def modality_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows in which modalities grow."""
    patches = next(row["patches"] for row in rows if row["modalities"] > 1)
    return [row for row in rows if (row["bags"], row["patches"]) == (8, patches)]


def size(rows: list[dict[str, Any]]) -> str:
    """Return the size of the modalities of rows, as a legend has it."""
    return f"8 bags of {rows[0]['patches']:,}"


def digest(found: dict[str, Any]) -> str:
    """Return what a picture says of the numbers that it was drawn from."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def draw(found: dict[str, Any]) -> None:
    """Draw the picture."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    (cpu, gpu), (cpu_modalities, gpu_modalities) = figure.subplots(2, 2)
    for bags, colour in zip(BAGS, ("tab:blue", "tab:orange"), strict=True):
        batch = "1 bag" if bags == 1 else f"{bags} bags"
        own = [r for r in found["cpu"] if (r["bags"], r["modalities"]) == (bags, 1)]
        x = [row["patches"] for row in own]
        for who, style in (("motet", "o-"), ("literal", "s:")):
            y = [row["ms"][who]["median"] for row in own]
            cpu.plot(x, y, style, color=colour, markersize=4, label=f"{who}, {batch}")
        own = [r for r in found["h200"] if (r["bags"], r["modalities"]) == (bags, 1)]
        y = [row["predicted_ms"] for row in own]
        gpu.plot([row["patches"] for row in own], y, color=colour, label=f"predicted, {batch}")
        for who, mark in (("planned bf16, static graph", "^"), ("planned bf16", "x")):
            there = [row for row in own if who in row.get("measured_ms", {})]
            how = "graph" if "graph" in who else "eager"
            label = f"{how} at 7918d87, {batch}"
            y = [row["measured_ms"][who] for row in there]
            gpu.plot([row["patches"] for row in there], y, mark, color=colour, label=label)
    own = modality_rows(found["cpu"])
    x = [row["modalities"] for row in own]
    for who, style in (("motet", "o-"), ("literal", "s:")):
        y = [row["ms"][who]["median"] for row in own]
        cpu_modalities.plot(x, y, style, markersize=4, label=f"{who}, {size(own)}")
    own = modality_rows(found["h200"])
    y = [row["predicted_ms"] for row in own]
    gpu_modalities.plot([row["modalities"] for row in own], y, label=f"predicted, {size(own)}")
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
        # Above the curves, beside the points that an older revision took.
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (10 if axes is gpu else 3))
        axes.legend(fontsize=7, loc="upper left", ncols=2 if axes is gpu else 1)
        axes.grid(True, which="major", alpha=0.3)
    with mpl.rc_context({"svg.hashsalt": "motet", "svg.fonttype": "none"}):
        figure.savefig(PICTURE, metadata={"Date": None, "Description": digest(found)})


def with_table(page: str, found: dict[str, Any]) -> str:
    """Return the page with the table of these numbers."""
    before, rest = page.split(BEGIN, 1)
    return before + BEGIN + "\n".join(table(found)) + "\n" + END + rest.split(END, 1)[1]


def table(found: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the table, and how the times grow."""
    shown = measure.figures
    yield f"{found['device']}, one thread; torch {found['torch']}, {found['date'][:10]}.\n"
    yield "| patches | CPU, 1 bag: motet, literal | 8 bags | H200 predicted, 1 bag | 8 bags |"
    yield "|---|---|---|---|---|"
    cpu, gpu = (
        {(r["bags"], r["patches"], r["modalities"]): r for r in found[kind]}
        for kind in ("cpu", "h200")
    )
    for patches in PATCHES:
        ms = [cpu[bags, patches, 1]["ms"] for bags in BAGS]
        own = [f"{shown(m['motet']['median'])}, {shown(m['literal']['median'])}" for m in ms]
        told = [shown(gpu[bags, patches, 1]["predicted_ms"]) for bags in BAGS]
        yield f"| {patches:,} | {' | '.join([*own, *told])} |"
    yield f"\n| modalities | CPU, 8 x {FEW:,}: motet, literal | H200 predicted, 8 x {MANY:,} |"
    yield "|---|---|---|"
    for count in MODALITIES:
        ms = cpu[8, FEW, count]["ms"]
        told = shown(gpu[8, MANY, count]["predicted_ms"])
        own = f"{shown(ms['motet']['median'])}, {shown(ms['literal']['median'])}"
        yield f"| {count} | {own} | {told} |"
    grown = ", ".join(f"{value:.2f} ({name})" for name, value in slopes(found).items())
    yield f"\nExponents on the CPU, from {LINEAR_FROM:,} tokens a batch on: {grown}."
    worst = {who: max(row["error"][who] for row in found["cpu"]) for who in CONTENDERS}
    yield (
        f"Gradients err by at most {worst['motet']:.0e}, those of the literal equation by "
        f"{worst['literal']:.0e}, relative, against float64 on bags of at most {FEW:,}."
    )


if __name__ == "__main__":
    sys.exit(main())
