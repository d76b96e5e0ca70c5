"""The rows of a claim's results: figures with intervals, and sentences decided by the intervals."""

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
        case: the cohort, or the model and pass that were timed.
        what: the model or the setting.
        than: the model or setting whose figure is subtracted; "" if none is.
        block: the block that the figure is of; "" for all blocks.
        measure: the metric, with its unit.
        seed: None for the mean over seeds.
        n: number of patients, or of repetitions.
        value: the figure.
        low: lower end of the interval.
        high: upper end of the interval.
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


Figure = tuple[Estimate | Comparison, int]
"""A metric or a difference of metrics, with its interval, and the number of patients."""


def over_seeds(
    figures: Sequence[Figure],
    *,
    case: str,
    what: str,
    measure: str,
    than: str = "",
    block: str = "",
) -> list[Row]:
    """Return a row for each seed, then a row for their mean.

    The interval of the mean has two parts, added in quadrature. The first is the mean of the
    intervals' ends: the standard deviation of a mean is at most the mean of the standard
    deviations, however many patients the seeds share. The second is the standard error over the
    seeds, because the bootstrap of patients holds the trained models fixed. With one seed the
    second part is unknown and left out.
    """
    numbers = [(*figure[:3], n) for figure, n in figures]
    row = partial(Row, case, what, than, block, measure)
    rows = [row(seed, n, *ends) for seed, (*ends, n) in enumerate(numbers)]
    value, low, high, n = (statistics.fmean(column) for column in zip(*numbers, strict=True))
    if len(numbers) > 1:
        spread = 1.96 * statistics.stdev(ends[0] for ends in numbers) / len(numbers) ** 0.5
        low, high = (
            value - math.hypot(value - low, spread),
            value + math.hypot(high - value, spread),
        )
        high = high if than else min(high, 1.0)  # no metric is above 1; a difference may be
    return [*rows, row(None, round(n), value, low, high)]


def mean_of(figures: Sequence[Figure]) -> Figure:
    """Return the mean of figures of the same patients.

    Its interval is the mean of the intervals, which is never too narrow.
    """
    columns = zip(*(figure[:3] for figure, _ in figures), strict=True)
    return Estimate(*map(statistics.fmean, columns)), figures[0][1]


def means(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that are means over seeds and over blocks."""
    return [row for row in rows if row.seed is None and not row.block]


def describe(
    subject: str,
    other: str,
    rows: Sequence[Row],
    *,
    above_verb: str = "is better than",
    below_verb: str = "is worse than",
) -> str:
    """Return a clause about the differences of `subject` less `other` in `rows`.

    It names the cases above 0, those below 0, and those without a shown difference, whose interval
    contains 0.
    """
    above = ", ".join(str(row) for row in rows if row.low > 0)
    below = ", ".join(str(row) for row in rows if row.high < 0)
    neither = ", ".join(str(row) for row in rows if row.low <= 0 <= row.high)
    if not (above or below):
        return f"{subject} shows no difference from {other} on {neither}"
    parts = [f"{above_verb} {other} on {above}"] * bool(above)
    parts += [f"{below_verb} {other} on {below}"] * bool(below)
    clause = f"{subject} {', '.join(parts)}"
    return clause + f", and shows no difference on {neither}" * bool(neither)


def verdict(rows: Sequence[Row]) -> str:
    """Return a phrase: whether the rows support a claim that all differences are above 0."""
    above, below = any(row.low > 0 for row in rows), any(row.high < 0 for row in rows)
    if above and below:
        return "partly as the paper claims, partly against it"
    if above:
        everywhere = all(row.low > 0 for row in rows)
        return "as the paper claims" if everywhere else "as the paper claims where any is shown"
    return "against the paper's claim" if below else "neither for nor against the paper's claim"


def loss_verdict(rows: Sequence[Row]) -> str:
    """Return a phrase: whether the rows support a claim that no difference is below 0."""
    if any(row.high < 0 for row in rows):
        return "against the paper's claim that nothing is lost"
    bounds = " and ".join(f"{max(-row.low, 0):.3f} on {row.case}" for row in rows)
    return f"no loss shown, as the paper claims, and none above {bounds} left possible"
