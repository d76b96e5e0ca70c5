"""The cost of merged and fused models of 1 to 16 equal blocks, in time and memory."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from motet.cli.measure import growth, in_child
from motet.fusion.lego_block import LegoBlock
from motet.fusion.lego_fuse import LegoFuse
from motet.fusion.lego_merge import LegoMerge
from motet.fusion.modalities import Bag
from torch import nn

from .rows import Row
from .scores import DRAWS, Floats

COUNTS = (1, 2, 4, 8, 12, 16)
WIDTH, TOKENS, ROWS = 64, 64, 4
REPEATS = 4  # passes of a model of one block per turn, 2 of two blocks: turns take equally long
WITHIN = 0.10
"""The largest deviation from M times the time of one block that counts as linear."""
JOINED: dict[str, Callable[..., nn.Module]] = {
    "LegoMerge": LegoMerge,
    "LegoFuse stack": partial(LegoFuse, mode="stack"),
    "LegoFuse weave": partial(LegoFuse, mode="weave"),
}
PASSES = ("forward", "forward and backward")


def measure(quick: bool) -> list[Row]:
    """Time models of 1 to 16 equal blocks in turns, and measure their memory in new processes.

    The blocks have the default sizes, and each gets a bag of 64 tokens of width 64 from each of 4
    patients. One thread; what is measured is its CPU time, which other processes hardly change.
    """
    counts, rounds, children = ((1, 2, 3), 3, 1) if quick else (COUNTS, 9, 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cells = [(kind, step, m) for kind in JOINED for step in PASSES for m in counts]
    seconds: dict[tuple[str, str, int], list[float]] = {cell: [] for cell in cells}
    order = np.random.default_rng(0)
    try:
        passes = {cell: _make_pass(*cell) for cell in cells}
        for run in passes.values():
            run()
        for _ in range(rounds):
            for number in order.permutation(len(cells)):
                cell = cells[number]
                repeats = max(1, REPEATS // cell[2])
                started = time.process_time()
                for _ in range(repeats):
                    passes[cell]()
                seconds[cell].append((time.process_time() - started) / repeats)
    finally:
        torch.set_num_threads(threads)
    rows = []
    for kind in JOINED:
        for step in PASSES:
            rows += _time_rows(kind, step, {m: seconds[kind, step, m] for m in counts})
            mib = [in_child(1, _memory_of, kind, step, counts) for _ in range(children)]
            rows += _memory_rows(kind, step, counts, np.array(mib))
    return rows


def _make_pass(kind: str, step: str, count: int, **sizes: int) -> Callable[[], object]:
    """Return the function to time: one pass of a model of `count` equal blocks."""
    torch.manual_seed(count)
    names = [f"m{i}" for i in range(count)]
    blocks = {name: LegoBlock(Bag(WIDTH), out_features=4, **cast(Any, sizes)) for name in names}
    model = JOINED[kind](blocks).eval()
    x = {name: torch.randn(ROWS, TOKENS, WIDTH) for name in names}

    def forward() -> object:
        with torch.no_grad():
            return model(x)

    def forward_and_backward() -> object:
        model.zero_grad()
        return model(x).sum().backward()

    return forward if step == PASSES[0] else forward_and_backward


def _memory_of(kind: str, step: str, counts: Sequence[int]) -> list[float]:
    """Return the MiB of a model, its data and a pass, for each of the rising counts.

    The peak memory of a process never falls. So each count adds to it only what the model needs
    beyond the smaller ones, and the sum so far is what this model needs.
    """
    # A pass of a tiny model first, which loads the libraries.
    _make_pass(kind, step, 1, num_latents=2, latent_dim=2, heads=1, head_dim=1)()
    total = 0.0
    return [total := total + growth(lambda m=m: _make_pass(kind, step, m)()) for m in counts]


def straight(counts: Sequence[int], values: Sequence[float]) -> tuple[Floats, float]:
    """Return slope and intercept of the straight line with the least relative squared deviation.

    And the largest relative deviation from it.
    """
    line = np.polyfit(counts, values, 1, w=1 / np.maximum(values, 1e-12))
    fitted = np.polyval(line, counts)
    return line, float((np.abs(values - fitted) / np.maximum(fitted, 1e-12)).max())


def _time_rows(kind: str, step: str, seconds: Mapping[int, Sequence[float]]) -> list[Row]:
    """Return the rows of times: medians, M blocks over M times one, and the straight line.

    The intervals are from a bootstrap of the rounds.
    """
    counts, case = list(seconds), f"{kind}, {step}"
    times = 1e3 * np.array([seconds[m] for m in counts])  # [M, rounds]
    rounds = times.shape[1]
    drawn = np.random.default_rng(0).integers(rounds, size=(DRAWS, rounds))
    medians = np.median(times[:, drawn], axis=2)  # [M, draws]
    middle = np.median(times, axis=1)

    def row(label: str, measure: str, value: float, draws: Floats) -> Row:
        low, high = map(float, np.quantile(draws, [0.025, 0.975]))
        return Row(case, label, "", "", measure, None, rounds, float(value), low, high)

    rows = [row(str(m), "ms", middle[i], medians[i]) for i, m in enumerate(counts)]
    for i, m in enumerate(counts[1:], 1):
        ratios = medians[i] / (m * medians[0])
        rows.append(row(str(m), "share of M blocks", middle[i] / (m * middle[0]), ratios))
    fits = [straight(counts, column) for column in medians.T]
    line, worst = straight(counts, list(middle))
    rows.append(row("per further block", "ms", line[0], np.array([fit[0] for fit, _ in fits])))
    rows.append(row("worst from the line", "share of ms", worst, np.array([w for _, w in fits])))
    return rows


def _memory_rows(kind: str, step: str, counts: Sequence[int], mib: Floats) -> list[Row]:
    """Return the rows of memory: medians over processes, and the straight line.

    `mib` is [processes, M]. The intervals are the range over the processes.
    """
    fits = [straight(counts, list(process)) for process in mib]
    samples = {(str(m), "MiB"): mib[:, i] for i, m in enumerate(counts)}
    samples["per further block", "MiB"] = np.array([line[0] for line, _ in fits])
    samples["worst from the line", "share of MiB"] = np.array([worst for _, worst in fits])
    return [
        Row(
            f"{kind}, {step}", label, "", "", measure, None, len(mib), float(np.median(values)),
            float(values.min()), float(values.max()),
        )
        for (label, measure), values in samples.items()
    ]  # fmt: skip


def conclude(rows: Sequence[Row]) -> str:
    """Return a sentence: the deviation from M times one block, and from a straight line."""
    clauses = []
    for case in dict.fromkeys(row.case for row in rows):
        case_rows = [row for row in rows if row.case == case]
        worst = max(
            (row for row in case_rows if row.measure == "share of M blocks"),
            key=lambda row: abs(row.value - 1),
        )
        line = next(row for row in case_rows if row.measure == "share of ms")
        memory = next(row for row in case_rows if row.measure == "share of MiB")
        clauses.append(
            f"{case}: {worst.what} blocks take {worst.value:.2f} ({worst.low:.2f} to "
            f"{worst.high:.2f}) of {worst.what} times one, {_within(worst)}; times are "
            f"{line.value:.0%} and memory {memory.value:.0%} from a straight line at worst"
        )
    return "; ".join(clauses) + "."


def _within(row: Row) -> str:
    """Return a phrase: whether the interval of a share lies within WITHIN of 1."""
    if row.low >= 1 - WITHIN and row.high <= 1 + WITHIN:
        return f"within {WITHIN:.0%}"
    if row.high < 1 - WITHIN:
        return f"less than {1 - WITHIN:.0%}"
    return f"not within {WITHIN:.0%}" if row.low > 1 + WITHIN else f"not shown within {WITHIN:.0%}"
