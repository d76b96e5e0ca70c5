"""The drawing of each claim: every point with its 95 % interval.

Colours are safe for colour-blind readers, and markers differ too.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .interference import METHODS, PROBE, TRANSFORMS
from .merging import RIVALS
from .overlap import TRAINED
from .rows import Row, means
from .scaling import JOINED, PASSES, WITHIN, straight

if TYPE_CHECKING:
    from . import Result

# Okabe and Ito's palette; in black and white the markers tell the points apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
DPI = 110


def draw(result: "Result", path: Path) -> None:
    """Draw the result of a claim and write it as PNG."""
    figure = _FIGURES[result.claim](result.rows)
    figure.savefig(path, dpi=DPI)


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """Return a drawing and its panels, [rows, columns]; width and height are those of a panel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    return figure, panels


def _point(
    axes: Any, at: float, row: Row, style: int, label: str = "", *, horizontal: bool = False
):
    """Draw a row's value and interval, along the vertical axis or the horizontal one.

    `at` is the position on the other axis.
    """
    error = np.array([[row.value - row.low], [row.high - row.value]]).clip(0)
    x, y = (row.value, at) if horizontal else (at, row.value)
    axes.errorbar(
        x, y, **{"xerr" if horizontal else "yerr": error}, fmt=MARKERS[style],
        color=COLOURS[style], markersize=5, elinewidth=1.2, capsize=2, label=label or None,
    )  # fmt: skip


def _zero(axes: Any, *, horizontal: bool = False) -> None:
    """Draw a line at the value 0."""
    (axes.axvline if horizontal else axes.axhline)(0, color="#999999", linewidth=0.8, zorder=0)


def _select(rows: Sequence[Row], **fields: Any) -> list[Row]:
    """Return the rows with these fields."""
    return [row for row in rows if all(getattr(row, k) == v for k, v in fields.items())]


def _cases(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.case for row in rows))


def _interference(rows: Sequence[Row]) -> Any:
    rows = means(rows)
    figure, panels = _panels(len(_cases(rows)), 2, 4.8, 2.7)
    for case, line in zip(_cases(rows), panels, strict=True):
        case_rows = _select(rows, case=case)
        for style, transform in enumerate(TRANSFORMS):
            for x, method in enumerate(METHODS):
                at, is_first = x + 0.2 * (style - 1), not x and case == rows[0].case
                label = f"transform: {transform}" if is_first else ""
                merge = f"{transform}, {method}"
                (change,) = _select(case_rows, what=f"{merge}, others shuffled", than="block alone")
                (probe,) = _select(case_rows, what=merge, measure=PROBE, than="")
                _point(line[0], at, change, style, label)
                _point(line[1], at, probe, style)
        measure = case_rows[0].measure
        n = _select(case_rows, measure=PROBE)[0].n
        line[0].set_title(f"{case}, n = {n} patients", fontsize=10)
        line[0].set_ylabel(f"change of {measure},\nothers shuffled less alone", fontsize=9)
        line[1].set_ylabel("R² of a block's logits\nread from merged latents", fontsize=9)
        _zero(line[0])
        for axes in line:
            axes.set_xticks(range(len(METHODS)), METHODS)
    figure.legend(frameon=False, fontsize=8, ncols=3, loc="outside upper center")
    for axes in panels[-1]:
        axes.set_xlabel("merged by")
    return figure


def _merging(rows: Sequence[Row]) -> Any:
    per_seed, rows = _select(rows, block=""), means(rows)
    cases = _cases(rows)
    figure, panels = _panels(1, 2, 5.2, 1.3 + 0.9 * len(cases))
    left, right = panels[0]
    for group, case in enumerate(cases):
        case_rows = _select(rows, case=case)
        for style, name in enumerate(("LegoMerge", *RIVALS)):
            y, label = -group - 0.17 * (style - 1.5), "" if group else name
            (row,) = _select(case_rows, what=name, than="")
            _point(left, y, row, style, label, horizontal=True)
            if style:
                (row,) = _select(case_rows, what="LegoMerge", than=name)
                _point(right, y, row, style, horizontal=True)
                seeds = [r for r in _select(per_seed, case=case, than=name) if r.seed is not None]
                right.plot(
                    [r.value for r in seeds], [y - 0.05] * len(seeds), "|", color=COLOURS[style],
                    markersize=5, alpha=0.7,
                )  # fmt: skip
    labels = [f"{c}\n{(r := _select(rows, case=c)[0]).measure}\nn = {r.n}" for c in cases]
    left.set_yticks([-group for group in range(len(cases))], labels, fontsize=8)
    right.set_yticks([])
    for axes in panels[0]:
        axes.set_ylim(0.5 - len(cases), 0.5)
    left.set_xlabel("figure, out of fold, with 95 % interval")
    right.set_xlabel("LegoMerge less the other, paired (ticks: single seeds)")
    left.axvline(0.5, color="#999999", linewidth=0.8, zorder=0)
    _zero(right, horizontal=True)
    figure.legend(frameon=False, fontsize=8, ncols=4, loc="outside upper center")
    return figure


def _overlap(rows: Sequence[Row]) -> Any:
    rows = means(rows)
    cases = _cases(rows)
    figure, panels = _panels(len(cases), 2, 4.8, 2.9)
    for case, (left, right) in zip(cases, panels, strict=True):
        case_rows = _select(rows, case=case)
        for style, name in enumerate(TRAINED):
            for row in case_rows:
                model, _, share = row.what.rpartition(", ")
                if model != name or row.than not in ("", "100% in common"):
                    continue
                percent = float(share.split("%")[0])
                at, axes = percent + 2.2 * (style - 1.5), right if row.than else left
                label = name if case == cases[0] and percent == 100 and not row.than else ""
                _point(axes, at, row, style, label)
        left.set_title(f"{case}, n = {case_rows[0].n} patients tested", fontsize=10)
        left.set_ylabel(case_rows[0].measure)
        right.set_ylabel("less the same with 100 %\nin common, paired", fontsize=9)
        left.axhline(0.5, color="#999999", linewidth=0.8, zorder=0)
        _zero(right)
    shares = sorted({float(row.what.rpartition(", ")[2].split("%")[0]) for row in rows})
    for axes in panels.flat:
        axes.set_xticks(shares)
        axes.set_xlim(-7, 107)
    for axes in panels[-1]:
        axes.set_xlabel("% of training patients in common")
    figure.legend(frameon=False, fontsize=8, ncols=4, loc="outside upper center")
    return figure


def _addition(rows: Sequence[Row]) -> Any:
    rows = means(rows)
    cases = _cases(rows)
    figure, panels = _panels(2, len(cases), 3.6, 2.6)
    for column, case in enumerate(cases):
        top, bottom = panels[:, column]
        case_rows = _select(rows, case=case)
        steps = _select(case_rows, than="")
        for x, row in enumerate(steps):
            _point(top, x, row, 0)
        for style, than in enumerate(("the first alone", "one less"), 1):
            for x, row in enumerate(_select(case_rows, than=than), 1):
                label = "" if column or x > 1 else f"less {than}"
                _point(bottom, x + 0.2 * (style - 1.5), row, style, label)
        top.plot(range(len(steps)), [r.value for r in steps], color=COLOURS[0], linewidth=0.8)
        top.set_title(f"{case}, n = {steps[0].n} patients", fontsize=10)
        names = [row.what.split(": ")[1].replace("and ", "+ ") for row in steps]
        top.set_xticks(range(len(steps)), [])
        bottom.set_xticks(range(len(steps)), names, rotation=35, ha="right", fontsize=8)
        for axes in (top, bottom):
            axes.set_xlim(-0.3, len(steps) - 0.7)
        _zero(bottom)
        if not column:
            top.set_ylabel(steps[0].measure)
            bottom.set_ylabel("difference, paired")
            bottom.legend(frameon=False, fontsize=8)
    return figure


def _scaling(rows: Sequence[Row]) -> Any:
    figure, panels = _panels(2, 3, 3.8, 2.9)
    for line, step in zip(panels, PASSES, strict=True):
        time, share, memory = line
        share.axhspan(1 - WITHIN, 1 + WITHIN, color="#dddddd", zorder=0, label="within 10 %")
        for style, kind in enumerate(JOINED):
            count_rows = [
                row for row in rows if row.case == f"{kind}, {step}" and row.what.isdigit()
            ]
            for axes, measure in ((time, "ms"), (share, "share of M blocks"), (memory, "MiB")):
                measured = _select(count_rows, measure=measure)
                for i, row in enumerate(measured):
                    shift = 0.25 * (style - 1) if axes is share else 0
                    _point(axes, int(row.what) + shift, row, style, "" if i else kind)
                if axes is not share:
                    counts = [int(row.what) for row in measured]
                    fit, _ = straight(counts, [row.value for row in measured])
                    ends = np.array([counts[0], counts[-1]])
                    axes.plot(ends, np.polyval(fit, ends), color=COLOURS[style], linewidth=0.8)
        n = _select(rows, measure="ms")[0].n
        time.set_ylabel(f"{step}, ms of CPU\n(median of {n} rounds)", fontsize=9)
        share.set_ylabel("time / (M · time of one block)", fontsize=9)
        memory.set_ylabel("growth of peak memory, MiB", fontsize=9)
    figure.legend(
        *panels[0, 1].get_legend_handles_labels(), frameon=False, fontsize=8, ncols=4,
        loc="outside upper center",
    )  # fmt: skip
    for axes in panels.flat:
        axes.set_xticks(sorted({int(row.what) for row in rows if row.what.isdigit()}))
    for axes in panels[-1]:
        axes.set_xlabel("modalities M")
    return figure


_FIGURES: dict[str, Callable[[Sequence[Row]], Any]] = {
    "interference": _interference,
    "merging": _merging,
    "overlap": _overlap,
    "addition": _addition,
    "scaling": _scaling,
}
