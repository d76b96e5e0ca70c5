"""Fit what the planner knows of a GPU to what was measured on it.

    python benchmarks/fit_planner.py [benchmarks/results/gpu-cells-....json]

Prints the numbers for kernels/chips.py, and how well a model without a cell predicts that cell. A
gpu-profile file of the same GPU and revision gives the kernels' shares of the roofline. What it
does not have is fitted by relative least squares: first the GPU's part in what ran as one graph,
then Python's part in what ran eagerly. Without it the shares of large kernels are found too.
"""

import argparse
import dataclasses
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.append(str(Path(__file__).parent.parent))  # where a script does not look

from benchmarks import grid, launches_7918d87
from motet.cli.measure import CONFIGS, Cell
from motet.kernels.chips import CHIPS, DEMANDED, Chip
from motet.kernels.gpu_cost import Launch, launches_of, times_of
from motet.kernels.work import Sizes
from scipy.optimize import least_squares, lsq_linear

RESULTS = Path(__file__).parent / "results"
WITHIN = 0.3
"""Of what was measured, that a prediction may be off."""


class Contender(NamedTuple):
    """What a contender of `make gpu` does, as far as the planner tells it apart."""

    strategy: str | None
    """None for the planned one."""
    graph: bool
    statistics: bool = False
    copied: bool = False
    """Whether the batch is copied to where a graph reads it."""


CONTENDERS = {
    "cached bf16": Contender("cached", False),
    "absorbed bf16": Contender("absorbed", False),
    "planned bf16": Contender(None, False),
    "planned bf16, static graph": Contender(None, True),
    "planned bf16, graph": Contender(None, True, statistics=True, copied=True),
}


class Run(NamedTuple):
    """A time that was measured, and the launches of it."""

    cell: str
    who: str
    strategy: str
    graph: bool
    seconds: float
    launches: list[Launch]

    def predicted(self, chip: Chip) -> float:
        times = times_of(self.launches, chip, torch.bfloat16)
        return times.graph if self.graph else times.eager


class Figures(NamedTuple):
    """What a file says."""

    chip: Chip
    """As far as it is known: without the shares, if a profile is missing."""
    runs: list[Run]
    unknown: tuple[str, ...]
    """Kernels whose shares are to be found."""


def read(path: Path) -> Figures:
    """Read a gpu-cells file, and the profile beside it."""
    report = json.loads(path.read_text())
    chip = next(chip for name, chip in CHIPS.items() if name in report["device"])
    cells = {cell.name: cell for cell in grid.named_cells()}
    launched = partial(listed, report["revision"], chip)
    runs = [
        Run(row["cell"], who, strategy, contender.graph, own["ms"]["median"] / 1e3,
            launched(cells[row["cell"]], strategy, contender))
        for row in report["cells"]
        for who, contender in CONTENDERS.items()
        if "ms" in (own := row["contenders"].get(who, {}))
        and (strategy := contender.strategy or _planned(row, contender.graph))
    ]  # fmt: skip
    if report["revision"] == launches_7918d87.REVISION:
        shares: Mapping[str, float] = _mean_shares(
            (own.launch.kernel, own.launch.least(chip, torch.bfloat16) / own.seconds)
            for own in launches_7918d87.PROFILE
        )
        unknown = launches_7918d87.FITTED
    else:
        beside = path.with_name(path.name.replace("gpu-cells", "gpu-profile"))
        shares = shares_of(json.loads(beside.read_text()), chip) if beside.exists() else {}
        unknown = tuple(name for name in DEMANDED if name not in shares)
    return Figures(dataclasses.replace(chip, shares={**chip.shares, **shares}), runs, unknown)


def _planned(row: Mapping[str, Any], graph: bool) -> str:
    """Return the strategy that was planned; formerly a graph had that of eager mode."""
    return row.get("graph_strategy", row["strategy"]) if graph else row["strategy"]


def shares_of(profile: Mapping[str, Any], chip: Chip) -> dict[str, float]:
    """Return the share of the roofline that each kernel reaches in a gpu-profile file.

    Of the roofline of what the planner takes a launch to be: padded blocks and partial sums count.
    """
    found: list[tuple[str, float]] = []
    for row in profile["rows"]:
        if "kernels" not in row:
            continue
        cell = Cell(row["model"], CONFIGS[row["model"]], tuple(row["lengths"]), step=True)
        contender = Contender(row["strategy"], False, statistics=True)
        launched = listed(profile["revision"], chip, cell, row["strategy"], contender)
        least = defaultdict(float)
        for own in launched:
            least[own.kernel] += 1e6 * own.times * own.least(chip, torch.bfloat16)
        found += [
            (own["role"], least[own["role"]] / own["us"])
            for own in row["kernels"]
            if own.get("role") in chip.shares and least[own["role"]]
        ]
    return _mean_shares(found)


def _mean_shares(found: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return the harmonic means by kernel: of times at the roofline, that is."""
    inverse: dict[str, list[float]] = defaultdict(list)
    for kernel, share in found:
        inverse[kernel].append(1 / share)
    return {kernel: min(1.0, len(own) / sum(own)) for kernel, own in inverse.items()}


def listed(
    revision: str, chip: Chip, cell: Cell, strategy: str, contender: Contender
) -> list[Launch]:
    """Return what a contender launched at a revision."""
    if revision == launches_7918d87.REVISION:
        return launches_7918d87.launches(cell, strategy, chip)
    c, tokens = cell.config, sum(cell.lengths)
    sizes = Sizes(
        tokens, cell.width, len(cell.lengths), c.latents, c.heads, c.head_dim, c.depth, 1, 2,
        cell.step, cell.step and cell.dropout > 0, statistics=contender.statistics,
    )  # fmt: skip
    copied = [Launch("copy", 1, 4.0 * tokens * cell.width)] if contender.copied else []
    return [*copied, *launches_of(strategy, sizes, chip)]


def fitted(figures: Figures, runs: Sequence[Run]) -> Chip:
    """Return the chip with the numbers that fit these runs best."""
    chip = _fit_gpu(figures.chip, [run for run in runs if run.graph], figures.unknown)
    return _fit_host(chip, [run for run in runs if not run.graph])


def _fit_gpu(chip: Chip, runs: Sequence[Run], unknown: Sequence[str]) -> Chip:
    """Find unknown shares, seconds per launch and per dropout decision, none below zero."""
    free = [*unknown, "launch", "drawn"]
    rows, rest = np.zeros((len(runs), len(free))), np.ones(len(runs))
    known = dataclasses.replace(chip, launch_s=0.0)
    for i, run in enumerate(runs):
        for own in run.launches:
            if own.kernel in unknown:
                rows[i, free.index(own.kernel)] += own.times * own.least(chip, torch.bfloat16)
                fixed = chip.latencies.get(own.kernel, 0.0)
            else:
                fixed = own._replace(drawn=0.0).seconds(known, torch.bfloat16)
            rest[i] -= own.times * fixed / run.seconds
            rows[i, -2] += own.times * (own.kernel not in chip.latencies)
            rows[i, -1] += own.times * own.drawn
        rows[i] /= run.seconds
    # To numbers of about 1: seconds per launch in us, decisions in 1e-12 s.
    scale = np.array([1.0] * len(unknown) + [1e-6, 1e-12])
    low = [1.0] * len(unknown) + [1e-3, 1e-3]
    found = lsq_linear(rows * scale, rest, (low, np.inf)).x * scale
    shares = {name: float(1 / found[i]) for i, name in enumerate(unknown)}
    return dataclasses.replace(
        chip, shares={**chip.shares, **shares}, launch_s=float(found[-2]),
        random_numbers=float(1 / found[-1]),
    )  # fmt: skip


def _fit_host(chip: Chip, runs: Sequence[Run]) -> Chip:
    """Find what Python needs for a pass and for each launch."""
    idle = dataclasses.replace(chip, host_s=0.0, host_launch_s=0.0)
    times = [times_of(run.launches, idle, torch.bfloat16) for run in runs]
    large = [[own for own in run.launches if own.large][-1] for run in runs]
    last = np.array([own.seconds(idle, torch.bfloat16) for own in large])
    graph, count = np.array([(own.graph, own.launches) for own in times]).T
    seconds = np.array([run.seconds for run in runs])

    def error(x: np.ndarray) -> np.ndarray:
        host = 1e-3 * x[0] + 1e-6 * x[1] * count
        return (np.maximum(host, graph - last) + last) / seconds - 1

    found = least_squares(error, [1.0, 50.0], bounds=(0, np.inf)).x
    return dataclasses.replace(
        chip, host_s=1e-3 * float(found[0]), host_launch_s=1e-6 * float(found[1])
    )


class Quality(NamedTuple):
    """How good predictions are."""

    errors: dict[str, list[float]]
    """By "eager" and "graph": predicted over measured, less 1."""
    right: int
    """Cells in which the faster of cached and absorbed was told, of `compared`."""
    compared: int

    def within(self, kind: str, bound: float = WITHIN) -> float:
        """Return the share of times that are predicted within a bound."""
        return float(np.mean(np.abs(self.errors[kind]) <= bound))


def quality(runs: Iterable[Run], chip_of: Callable[[Run], Chip]) -> Quality:
    """Compare what was measured with what the chip of each run predicts."""
    errors: dict[str, list[float]] = {"eager": [], "graph": []}
    pairs: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for run in runs:
        predicted = run.predicted(chip_of(run))
        errors["graph" if run.graph else "eager"].append(predicted / run.seconds - 1)
        if run.who in ("cached bf16", "absorbed bf16"):
            pairs[run.cell][run.strategy] = (predicted, run.seconds)
    both = [pair for pair in pairs.values() if len(pair) == 2]
    right = sum(
        min(pair, key=lambda s: pair[s][0]) == min(pair, key=lambda s: pair[s][1]) for pair in both
    )
    return Quality(errors, right, len(both))


def by_cell(run: Run) -> str:
    return run.cell


def by_model(run: Run) -> str:
    return run.cell.split()[0].strip(",")


def leave_one_out(figures: Figures, key: Callable[[Run], str]) -> Quality:
    """Return how well the runs of every cell, or model, are predicted from the others."""
    runs = figures.runs
    chips = {
        left_out: fitted(figures, [run for run in runs if key(run) != left_out])
        for left_out in {key(run) for run in runs}
    }
    return quality(runs, lambda run: chips[key(run)])


def lines(figures: Figures) -> Iterable[str]:
    """Yield what is found."""
    chip = fitted(figures, figures.runs)
    yield f"{chip.name}: launch_s {chip.launch_s:.2e}, host_launch_s {chip.host_launch_s:.2e}, "
    yield f"host_s {chip.host_s:.2e}, random_numbers {chip.random_numbers:.2e}"
    kernels = {own.kernel for run in figures.runs for own in run.launches}
    for name in sorted(kernels & chip.shares.keys()):
        how = "fitted" if name in figures.unknown else "profiled or expected"
        yield f"  share {name:26} {chip.shares[name]:.3f} {how}"
    yield "\n| cell | contender | measured ms | predicted ms | ratio |\n|---|---|---|---|---|"
    for run in figures.runs:
        predicted = run.predicted(chip)
        yield (
            f"| {run.cell} | {run.who} {run.strategy} | {1e3 * run.seconds:.2f} | "
            f"{1e3 * predicted:.2f} | {predicted / run.seconds:.2f} |"
        )
    for name, found in {
        "all cells": quality(figures.runs, lambda run: chip),
        "each cell left out in turn": leave_one_out(figures, by_cell),
        "each model left out in turn": leave_one_out(figures, by_model),
    }.items():
        yield f"\n{name}: faster of cached and absorbed told in {found.right} of {found.compared}"
        for kind, errors in found.errors.items():
            if errors:
                yield (
                    f"  {kind}: {found.within(kind):.0%} of {len(errors)} within {WITHIN:.0%}, "
                    f"median {np.median(np.abs(errors)):.0%}, worst {max(errors, key=abs):+.0%}"
                )


def main() -> int:
    """Fit and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    newest = max(RESULTS.glob("gpu-cells-*.json"), default=None, key=date_of)
    parser.add_argument("file", type=Path, nargs="?", default=newest, help="default: %(default)s")
    print(*lines(read(parser.parse_args().file)), sep="\n")
    return 0


def date_of(path: Path) -> str:
    """Return when a file was measured."""
    return json.loads(path.read_text())["date"]


if __name__ == "__main__":
    sys.exit(main())
