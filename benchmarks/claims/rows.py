"""What a claim finds: figures with intervals, and the sentence that the intervals decide."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from motet.fusion.resampling import Comparison, Estimate


@dataclass(frozen=True)
class Row:
    """One figure with its 95 % interval; a row of results.csv.

    Args:
        case: the cohort, or what was timed.
        what: the model or the setting.
        than: what is subtracted, "" for a figure by itself.
        block: the block it is about, "" for all.
        measure: what it is measured by, with its unit.
        seed: None for the mean over seeds.
        n: patients, or repetitions.
        value: the figure.
        low: lower end of the interval.
        high: upper end.
    """

    case: str
    what: str
    than: str
    block: str
    measure: str
    seed: int | None
    n: int
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        sign = "+" if self.than else ""
        ends = f"{self.value:{sign}.3f}, {self.low:{sign}.3f} to {self.high:{sign}.3f}"
        return f"{self.case} ({ends})"


Found = tuple[Estimate | Comparison, int]
"""A figure or a difference, and the patients it is of."""


def over_seeds(
    found: Sequence[Found], *, case: str, what: str, measure: str, than: str = "", block: str = ""
) -> list[Row]:
    """Return a row per seed, then their mean.

    The mean's interval: the ends averaged, since the standard deviation of a mean is at most the
    mean of the standard deviations, however many patients the seeds share; and in quadrature the
    standard error of the seeds, since the bootstrap of patients holds the trained models fixed. Of
    one seed nothing is known of the latter.
    """
    numbers = [(*figure[:3], n) for figure, n in found]
    row = partial(Row, case, what, than, block, measure)
    rows = [row(seed, n, *ends) for seed, (*ends, n) in enumerate(numbers)]
    value, low, high, n = (statistics.fmean(column) for column in zip(*numbers, strict=True))
    if len(numbers) > 1:
        spread = 1.96 * statistics.stdev(ends[0] for ends in numbers) / len(numbers) ** 0.5
        low, high = (
            value - math.hypot(value - low, spread),
            value + math.hypot(high - value, spread),
        )
        high = high if than else min(high, 1.0)  # a share
    return [*rows, row(None, round(n), value, low, high)]


def mean_of(found: Sequence[Found]) -> Found:
    """Return the mean of several figures of the same patients, its interval never too narrow."""
    ends = [statistics.fmean(column) for column in zip(*(f[:3] for f, _ in found), strict=True)]
    return Estimate(*ends), found[0][1]


def means(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that are means over seeds and over blocks."""
    return [row for row in rows if row.seed is None and not row.block]


def said(
    what: str,
    than: str,
    rows: Sequence[Row],
    *,
    more: str = "is better than",
    less: str = "is worse than",
) -> str:
    """Say on which cases a difference is shown, in which direction, and on which none is."""
    above = ", ".join(str(row) for row in rows if row.low > 0)
    below = ", ".join(str(row) for row in rows if row.high < 0)
    neither = ", ".join(str(row) for row in rows if row.low <= 0 <= row.high)
    if not (above or below):
        return f"{what} shows no difference from {than} on {neither}"
    parts = [f"{more} {than} on {above}"] * bool(above)
    parts += [f"{less} {than} on {below}"] * bool(below)
    return f"{what} {', '.join(parts)}" + f", and shows no difference on {neither}" * bool(neither)


def verdict(rows: Sequence[Row]) -> str:
    """Say whether differences bear out a claim that they are above 0."""
    above, below = any(row.low > 0 for row in rows), any(row.high < 0 for row in rows)
    if above and below:
        return "partly as the paper claims, partly against it"
    if above:
        everywhere = all(row.low > 0 for row in rows)
        return "as the paper claims" if everywhere else "as the paper claims where any is shown"
    return "against the paper's claim" if below else "neither for nor against the paper's claim"


def no_loss(rows: Sequence[Row]) -> str:
    """Say whether differences bear out a claim that nothing is lost."""
    if any(row.high < 0 for row in rows):
        return "against the paper's claim that nothing is lost"
    most = " and ".join(f"{max(-row.low, 0):.3f} on {row.case}" for row in rows)
    return f"no loss shown, as the paper claims, and none above {most} left possible"
