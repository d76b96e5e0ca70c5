"""Fit the planner's numbers of a GPU to the times that were measured on it.

    python benchmarks/fit_planner.py [benchmarks/results/gpu-cells-....json]

Prints the numbers for kernels/chips.py, and how well numbers that are fitted without a cell predict
that cell. A gpu-profile file of the same GPU and revision gives the kernels' shares of the
roofline. All other numbers are fitted by relative least squares: first those of the GPU, to the
times as one graph, then those of Python, to the times in eager mode. Without a gpu-profile file the
shares of the large kernels are fitted too.
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

sys.path.append(str(Path(__file__).parent.parent))  # so that this script can import benchmarks

from benchmarks import grid, launches_7918d87
from motet.cli.measure import CONFIGS, Cell
from motet.kernels.chips import CHIPS, DEMANDED, Chip
from motet.kernels.gpu_cost import Launch, launches_of, times_of
from motet.kernels.work import Sizes
from scipy.optimize import least_squares, lsq_linear

RESULTS = Path(__file__).parent / "results"
WITHIN = 0.3
"""The largest error of a prediction that counts as good, as a share of the measured time."""


class LaunchMode(NamedTuple):
    """The properties of a contender of `make gpu` on which the planner's prediction depends."""

    strategy: str | None
    """None for the planned one."""
    graph: bool
    statistics: bool = False
    copied: bool = False
    """Whether the batch is copied to the memory that a graph reads."""


LAUNCH_MODES = {
    "cached bf16": LaunchMode("cached", False),
    "absorbed bf16": LaunchMode("absorbed", False),
    "planned bf16": LaunchMode(None, False),
    "planned bf16, static graph": LaunchMode(None, True),
    "planned bf16, graph": LaunchMode(None, True, statistics=True, copied=True),
}
"""By contender, as benchmarks/grid.py names them."""


class Measurement(NamedTuple):
    """The measured time of a contender on a cell, and its launches."""

    cell: str
    contender: str
    strategy: str
    graph: bool
    seconds: float
    launches: list[Launch]

    def predict(self, chip: Chip) -> float:
        """Return the seconds that the planner predicts."""
        times = times_of(self.launches, chip, torch.bfloat16)
        return times.graph if self.graph else times.eager


class GpuReport(NamedTuple):
    """The content of a gpu-cells file and of the gpu-profile file beside it."""

    chip: Chip
    """With the shares of the profile; those of the kernels in `unknown` are not measured."""
    measurements: list[Measurement]
    unknown: tuple[str, ...]
    """Kernels whose shares are to be fitted."""


def read(path: Path) -> GpuReport:
    """Read a gpu-cells file, and the gpu-profile file beside it if there is one."""
    report = json.loads(path.read_text())
    chip = next(chip for name, chip in CHIPS.items() if name in report["device"])
    cells = {cell.name: cell for cell in grid.named_cells()}
    list_of_chip = partial(list_launches, report["revision"], chip)
    measurements = [
        Measurement(row["cell"], name, strategy, mode.graph, result["ms"]["median"] / 1e3,
                    list_of_chip(cells[row["cell"]], strategy, mode))
        for row in report["cells"]
        for name, mode in LAUNCH_MODES.items()
        if "ms" in (result := row["contenders"].get(name, {}))
        and (strategy := mode.strategy or _planned_strategy(row, mode.graph))
    ]  # fmt: skip
    if report["revision"] == launches_7918d87.REVISION:
        shares: Mapping[str, float] = _mean_shares(
            (profiled.launch.kernel,
             profiled.launch.least(chip, torch.bfloat16) / profiled.seconds)
            for profiled in launches_7918d87.PROFILE
        )  # fmt: skip
        unknown = launches_7918d87.FITTED
    else:
        profile = path.with_name(path.name.replace("gpu-cells", "gpu-profile"))
        shares = shares_of(json.loads(profile.read_text()), chip) if profile.exists() else {}
        unknown = tuple(name for name in DEMANDED if name not in shares)
    chip = dataclasses.replace(chip, shares={**chip.shares, **shares})
    return GpuReport(chip, measurements, unknown)


def _planned_strategy(row: Mapping[str, Any], graph: bool) -> str:
    """Return the strategy that was planned.

    Files without "graph_strategy" are of a revision whose graphs took the strategy of eager mode.
    """
    return row.get("graph_strategy", row["strategy"]) if graph else row["strategy"]


def shares_of(profile: Mapping[str, Any], chip: Chip) -> dict[str, float]:
    """Return the share of the roofline that each kernel reaches in a gpu-profile file.

    The roofline here is that of the launch as the planner counts it, with padded blocks and partial
    sums; the file's own shares count only what a kernel needs at least.
    """
    shares: list[tuple[str, float]] = []
    for row in profile["rows"]:
        if "kernels" not in row:
            continue
        cell = Cell(row["model"], CONFIGS[row["model"]], tuple(row["lengths"]), step=True)
        mode = LaunchMode(row["strategy"], False, statistics=True)
        least_us = defaultdict(float)
        for launch in list_launches(profile["revision"], chip, cell, row["strategy"], mode):
            least_us[launch.kernel] += 1e6 * launch.times * launch.least(chip, torch.bfloat16)
        shares += [
            (kernel["role"], least_us[kernel["role"]] / kernel["us"])
            for kernel in row["kernels"]
            if kernel.get("role") in chip.shares and least_us[kernel["role"]]
        ]
    return _mean_shares(shares)


def _mean_shares(shares: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return the harmonic mean of each kernel's shares, which is the mean of its times."""
    inverse: dict[str, list[float]] = defaultdict(list)
    for kernel, share in shares:
        inverse[kernel].append(1 / share)
    return {kernel: min(1.0, len(values) / sum(values)) for kernel, values in inverse.items()}


def list_launches(
    revision: str, chip: Chip, cell: Cell, strategy: str, mode: LaunchMode
) -> list[Launch]:
    """Return what a contender launched at a revision."""
    if revision == launches_7918d87.REVISION:
        return launches_7918d87.launches(cell, strategy, chip)
    c, tokens = cell.config, sum(cell.lengths)
    sizes = Sizes(
        tokens, cell.width, len(cell.lengths), c.latents, c.heads, c.head_dim, c.depth, 1, 2,
        cell.step, cell.step and cell.dropout > 0, statistics=mode.statistics,
    )  # fmt: skip
    copy = [Launch("copy", 1, 4.0 * tokens * cell.width)] if mode.copied else []
    return [*copy, *launches_of(strategy, sizes, chip)]


def fit(report: GpuReport, measurements: Sequence[Measurement]) -> Chip:
    """Return the report's chip with the numbers that fit these measurements best."""
    graphs = [measurement for measurement in measurements if measurement.graph]
    eager = [measurement for measurement in measurements if not measurement.graph]
    return _fit_host(_fit_gpu(report.chip, graphs, report.unknown), eager)


def _fit_gpu(chip: Chip, measurements: Sequence[Measurement], unknown: Sequence[str]) -> Chip:
    """Fit unknown shares, seconds per launch and seconds per dropout decision, none below zero.

    The time of a graph is a sum over its launches, and linear in 1 / share, in the seconds per
    launch and in the seconds per decision. Each row of the system is one measurement, divided by
    the measured time: the unknowns' part must equal 1 less the part that is known already.
    """
    free = [*unknown, "launch", "drawn"]
    rows, targets = np.zeros((len(measurements), len(free))), np.ones(len(measurements))
    without_launches = dataclasses.replace(chip, launch_s=0.0)
    for i, measurement in enumerate(measurements):
        for launch in measurement.launches:
            if launch.kernel in unknown:
                least = launch.least(chip, torch.bfloat16)
                rows[i, free.index(launch.kernel)] += launch.times * least
                fixed = chip.latencies.get(launch.kernel, 0.0)
            else:
                fixed = launch._replace(drawn=0.0).seconds(without_launches, torch.bfloat16)
            targets[i] -= launch.times * fixed / measurement.seconds
            rows[i, -2] += launch.times * (launch.kernel not in chip.latencies)
            rows[i, -1] += launch.times * launch.drawn
        rows[i] /= measurement.seconds
    # Unknowns of about 1, for the solver: microseconds per launch, 1e-12 s per decision.
    scale = np.array([1.0] * len(unknown) + [1e-6, 1e-12])
    low = [1.0] * len(unknown) + [1e-3, 1e-3]  # 1 / share is at least 1
    solution = lsq_linear(rows * scale, targets, (low, np.inf)).x * scale
    shares = {name: float(1 / solution[i]) for i, name in enumerate(unknown)}
    return dataclasses.replace(
        chip, shares={**chip.shares, **shares}, launch_s=float(solution[-2]),
        random_numbers=float(1 / solution[-1]),
    )  # fmt: skip


def _fit_host(chip: Chip, measurements: Sequence[Measurement]) -> Chip:
    """Fit the seconds that Python takes for a pass, and for each launch.

    The time in eager mode is max(host, graph - last) + last: when Python has launched all kernels,
    the GPU still has to run the last large one.
    """
    idle = dataclasses.replace(chip, host_s=0.0, host_launch_s=0.0)
    times = [times_of(measurement.launches, idle, torch.bfloat16) for measurement in measurements]
    large = [
        [launch for launch in measurement.launches if launch.large][-1]
        for measurement in measurements
    ]
    last = np.array([launch.seconds(idle, torch.bfloat16) for launch in large])
    graph, count = np.array([(time.graph, time.launches) for time in times]).T
    seconds = np.array([measurement.seconds for measurement in measurements])

    def error(x: np.ndarray) -> np.ndarray:
        host = 1e-3 * x[0] + 1e-6 * x[1] * count  # x: milliseconds a pass, microseconds a launch
        return (np.maximum(host, graph - last) + last) / seconds - 1

    pass_ms, launch_us = map(float, least_squares(error, [1.0, 50.0], bounds=(0, np.inf)).x)
    return dataclasses.replace(chip, host_s=1e-3 * pass_ms, host_launch_s=1e-6 * launch_us)


class Quality(NamedTuple):
    """The quality of predictions."""

    errors: dict[str, list[float]]
    """By "eager" and "graph": predicted over measured time, less 1."""
    right: int
    """Of `compared` cells, those in which the faster of cached and absorbed was predicted."""
    compared: int

    def within(self, kind: str, bound: float = WITHIN) -> float:
        """Return the share of the times whose prediction is off by at most `bound`."""
        return float(np.mean(np.abs(self.errors[kind]) <= bound))


def quality(measurements: Iterable[Measurement], chip_of: Callable[[Measurement], Chip]) -> Quality:
    """Compare measured times with those that `chip_of(measurement)` predicts."""
    errors: dict[str, list[float]] = {"eager": [], "graph": []}
    pairs: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for measurement in measurements:
        predicted = measurement.predict(chip_of(measurement))
        kind = "graph" if measurement.graph else "eager"
        errors[kind].append(predicted / measurement.seconds - 1)
        if measurement.contender in ("cached bf16", "absorbed bf16"):
            pairs[measurement.cell][measurement.strategy] = (predicted, measurement.seconds)
    complete = [pair for pair in pairs.values() if len(pair) == 2]
    right = sum(
        min(pair, key=lambda s: pair[s][0]) == min(pair, key=lambda s: pair[s][1])
        for pair in complete
    )
    return Quality(errors, right, len(complete))


def by_cell(measurement: Measurement) -> str:
    return measurement.cell


def by_model(measurement: Measurement) -> str:
    return measurement.cell.split()[0].strip(",")


def leave_one_out(report: GpuReport, key: Callable[[Measurement], str]) -> Quality:
    """Predict each group of measurements, a cell or a model by `key`, from all other groups."""
    measurements = report.measurements
    chips = {
        group: fit(report, [m for m in measurements if key(m) != group])
        for group in {key(m) for m in measurements}
    }
    return quality(measurements, lambda measurement: chips[key(measurement)])


def lines(report: GpuReport) -> Iterable[str]:
    """Yield the fitted numbers, a table of predictions, and their quality."""
    chip = fit(report, report.measurements)
    yield f"{chip.name}: launch_s {chip.launch_s:.2e}, host_launch_s {chip.host_launch_s:.2e}, "
    yield f"host_s {chip.host_s:.2e}, random_numbers {chip.random_numbers:.2e}"
    kernels = {launch.kernel for m in report.measurements for launch in m.launches}
    for name in sorted(kernels & chip.shares.keys()):
        source = "fitted" if name in report.unknown else "profiled or expected"
        yield f"  share {name:26} {chip.shares[name]:.3f} {source}"
    yield "\n| cell | contender | measured ms | predicted ms | ratio |\n|---|---|---|---|---|"
    for measurement in report.measurements:
        predicted = measurement.predict(chip)
        yield (
            f"| {measurement.cell} | {measurement.contender} {measurement.strategy} | "
            f"{1e3 * measurement.seconds:.2f} | {1e3 * predicted:.2f} | "
            f"{predicted / measurement.seconds:.2f} |"
        )
    for name, result in {
        "all cells": quality(report.measurements, lambda _: chip),
        "each cell left out in turn": leave_one_out(report, by_cell),
        "each model left out in turn": leave_one_out(report, by_model),
    }.items():
        yield (
            f"\n{name}: faster of cached and absorbed predicted in {result.right} of "
            f"{result.compared} cells"
        )
        for kind, errors in result.errors.items():
            if errors:
                yield (
                    f"  {kind}: {result.within(kind):.0%} of {len(errors)} within {WITHIN:.0%}, "
                    f"median {np.median(np.abs(errors)):.0%}, worst {max(errors, key=abs):+.0%}"
                )


def main() -> int:
    """Fit and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    newest = max(RESULTS.glob("gpu-cells-*.json"), default=None, key=date_of)
    parser.add_argument(
        "file", type=Path, nargs="?", default=newest,
        help="a gpu-cells file (default: the newest, %(default)s)",
    )  # fmt: skip
    print(*lines(read(parser.parse_args().file)), sep="\n")
    return 0


def date_of(path: Path) -> str:
    """Return the date at which a file was measured."""
    return json.loads(path.read_text())["date"]


if __name__ == "__main__":
    sys.exit(main())
