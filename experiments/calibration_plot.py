"""Calibration curves as files: calibration.csv and calibration.svg."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._atomic import write_text
from .task import Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE = "#0072B2"  # of Okabe and Ito's colours, which the colour-blind can tell apart
COLUMNS = 4  # panels in a row
SIDE = 3.2  # of a panel, in inches


def write_calibration(task: Task, metrics: Mapping[str, Any], csv: Path) -> None:
    """Write the groups of the metric `calibration` to a CSV file, and a picture beside it.

    If the metrics have no calibration, nothing is written.

    Args:
        task: of the run.
        metrics: of the evaluated patients.
        csv: the file; the picture has the suffix .svg.
    """
    if "calibration" not in metrics:
        return
    table = task.calibration_table(metrics["calibration"])
    write_text(csv, table.to_csv(index=False))
    write_text(csv.with_suffix(".svg"), _draw(task, table))


def _draw(task: Task, table: pd.DataFrame) -> str:
    """Return an SVG with one panel for each horizon or class."""
    import matplotlib
    from matplotlib.figure import Figure

    panels = list(table.groupby(table.columns[0], sort=False))
    columns = min(len(panels), COLUMNS)
    rows = -(-len(panels) // columns)
    # Without `hashsalt` and a date, equal runs have equal pictures.
    with matplotlib.rc_context({"svg.hashsalt": "motet", "font.size": 9}):
        # Fixed margins, in inches: a layout that measures all texts takes half of the time.
        figure = Figure(figsize=(SIDE * columns, SIDE * rows))
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        figure.subplots_adjust(
            left=0.75 / columns / SIDE, right=1 - 0.1 / columns / SIDE, wspace=0.2,
            bottom=0.55 / rows / SIDE, top=1 - 0.3 / rows / SIDE, hspace=0.25,
        )  # fmt: skip
        for panel_axes, (panel, groups) in zip(axes, panels, strict=False):
            panel_axes.set_title(task.calibration_title(panel), fontsize=9)
            draw_calibration(panel_axes, groups)
        for unused in axes[len(panels) :]:
            unused.set_visible(False)
        figure.supxlabel("predicted probability", fontsize=9, y=0.1 / rows / SIDE, va="bottom")
        figure.supylabel(
            "observed share, 95 % interval", fontsize=9, x=0.05 / columns / SIDE, ha="left"
        )
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def draw_calibration(axes: "Axes", groups: pd.DataFrame) -> None:
    """Draw observed shares over mean predictions, with n of each group.

    Quantiles have equal n, which is written once: beside points that are close together, the
    numbers would cover each other.

    Args:
        axes: of one horizon or class.
        groups: its rows of `Task.calibration_table`.
    """
    known = groups[groups["observed"].notna()]
    end = 1.05 * max([*groups["predicted"], *known["high"], 0.05])
    top = 1.15 * end  # n needs some space above the intervals
    axes.plot([0, end], [0, end], "--", color="0.6", linewidth=1, zorder=1)
    x, y, low, high = (
        known[name].to_numpy(float) for name in ("predicted", "observed", "low", "high")
    )
    ends = np.maximum([y - low, high - y], 0)  # rounding may give -1e-17
    axes.errorbar(x, y, ends, fmt="o-", color=BLUE, capsize=2, markersize=4)
    counts = known["patients"].to_numpy(int)
    equal = len(counts) > 0 and counts.max() - counts.min() <= 1
    if equal:
        n = "-".join(str(count) for count in dict.fromkeys([counts.min(), counts.max()]))
        axes.text(0.02, 0.98, f"n = {n} per point", fontsize=7, va="top", transform=axes.transAxes)
    for place, height, n in [] if equal else zip(x, high, counts, strict=True):
        axes.annotate(
            f"n = {n}", (place, height), xytext=(0, 3), textcoords="offset points", fontsize=7,
            rotation=90, ha="center", va="bottom", annotation_clip=False,
        )  # fmt: skip
    axes.set(xlim=(0, end), ylim=(0, top))
    axes.spines[["top", "right"]].set_visible(False)
