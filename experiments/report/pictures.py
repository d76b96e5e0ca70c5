"""The pictures of a run: training, survival by risk group, Brier score, calibration, ROC."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sksurv.nonparametric import kaplan_meier_estimator

from ...fusion.held_out import Floats
from ..calibration_plot import draw_calibration
from ..task import ClassTask
from .drawing import COLOURS, DASHES, HEIGHT, INK, MUTED, WIDTH, Picture, new_axes, short
from .facts import RunFacts, brier_curves, class_aucs, risk_groups, roc_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of the risk groups: low, middle, high.
GROUP_COLOURS = {"low": "#0072b2", "middle": "#e69f00", "high": "#d55e00"}
TICKS = 5


def run_pictures(facts: RunFacts, draws: int) -> Iterator[Picture]:
    """Yield all pictures of a run; to be called inside of `drawing_style`."""
    if any(history["train_loss"] for history in facts.histories):
        yield draw_training(facts)
    if not facts.can_be_evaluated:
        return
    task = facts.run.task
    if isinstance(task, ClassTask):
        yield draw_roc(facts, task, draws)
    else:
        yield draw_groups(facts)
        if "integrated_brier" in facts.metrics:
            yield draw_brier([facts])
    yield from draw_calibrations(facts)


def draw_training(facts: RunFacts) -> Picture:
    """Draw the losses of every fold; a dot marks the epoch whose weights were kept."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_axes("epoch", "loss per patient")
    trained = [history for history in facts.histories if history["train_loss"]]
    for number, history in enumerate(trained):
        parts = ((COLOURS[0], "--", "train"), (COLOURS[1], "-", "validation"))
        for colour, dash, part in parts:
            losses = np.asarray(history[f"{part}_loss"], float)
            axes.plot(
                np.arange(1, len(losses) + 1), losses, dash, color=colour, linewidth=1.1,
                alpha=0.8, label=part if number == 0 else None,
            )  # fmt: skip
        best = history["best_epoch"]
        if 0 < best <= len(history["validation_loss"]):
            axes.plot(
                best, history["validation_loss"][best - 1], "o", color=COLOURS[1], markersize=4,
                label="epoch that was kept" if number == 0 else None,
            )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    axes.set_title(f"n = {len(trained)} folds", loc="right", color=MUTED)
    caption = "Training and validation loss of every fold, one line each."
    return Picture(f"training-{facts.number + 1}", "Training", caption, figure)


def draw_groups(facts: RunFacts) -> Picture:
    """Draw Kaplan-Meier curves of the risk groups, with the numbers at risk below."""
    groups, unit = risk_groups(facts), facts.run.config["unit"]
    times = np.concatenate([fold.times for fold in facts.tested])
    events = np.concatenate([fold.events for fold in facts.tested])
    index = np.concatenate(groups.numbers)
    figure, axes = new_axes("", "share without the event", height=HEIGHT + 0.5)
    names = []
    for number, name in enumerate(groups.names):
        rows = index == number
        if rows.any():
            names.append((number, name))
            label = f"{name} risk (n = {rows.sum()}, {events[rows].sum()} events)"
            _draw_group(axes, times[rows], events[rows], name, label, DASHES[number])
    axes.set(ylim=(0, 1.02), xlim=(0, float(times.max())))
    axes.legend(loc="lower left")
    p = "not defined" if groups.p is None else format_p(groups.p)
    axes.set_title(f"log-rank p {p}" if groups.p is not None else f"log-rank p: {p}", loc="right")
    _write_numbers_at_risk(axes, times, index, names, unit)
    split = "tertiles" if len(groups.names) == 3 else "median"
    caption = (
        f"Kaplan-Meier curves of the test patients (n = {len(times):,}) with 95 % intervals. The "
        f"groups are divided at the {split} of the risks of the training patients of each fold; "
        "the log-rank test is stratified by fold."
    )
    return Picture(f"risk-groups-{facts.number + 1}", "Survival by risk group", caption, figure)


def _draw_group(
    axes: Axes, times: Floats, events: NDArray[np.bool_], name: str, label: str, dash: Any
) -> None:
    colour = GROUP_COLOURS[name]
    if events.any():
        estimate: Any = kaplan_meier_estimator(events, times, conf_type="log-log")
        at, survival = np.append(0.0, estimate[0]), np.append(1.0, estimate[1])
        interval = np.column_stack([[1.0, 1.0], estimate[2]])
        axes.fill_between(at, *interval, step="post", color=colour, alpha=0.12, linewidth=0)
    else:  # then an interval is not defined
        at, survival = np.array([0.0, times.max()]), np.ones(2)
    axes.step(at, survival, where="post", color=colour, linestyle=dash, label=label)
    censored = times[~events]
    heights = survival[np.searchsorted(at, censored, side="right") - 1]
    axes.plot(censored, heights, "|", color=colour, markersize=5)


def _write_numbers_at_risk(
    axes: Axes,
    times: Floats,
    index: NDArray[np.intp],
    names: Sequence[tuple[int, str]],
    unit: str,
) -> None:
    """Write the number of patients at risk of each group under the ticks of the time axis."""
    from matplotlib.ticker import MaxNLocator

    ticks = [tick for tick in MaxNLocator(TICKS).tick_values(0, times.max()) if tick >= 0]
    ticks = [float(tick) for tick in ticks if tick <= times.max()]
    axes.set_xticks(ticks)
    axes.set_xlabel(f"time in {short(unit)}")
    place: dict[str, Any] = {"textcoords": "offset points", "va": "top", "fontsize": 8}
    for row, (number, name) in enumerate([(-1, "at risk"), *names]):
        below = -36 - 12 * row
        colour = INK if row else MUTED
        axes.annotate(
            name, (0, 0), xytext=(-16, below), xycoords="axes fraction", ha="right", color=colour,
            **place,
        )  # fmt: skip
        for tick in ticks if row else []:
            count = ((times >= tick) & (index == number)).sum()
            axes.annotate(
                f"{count}", (tick, 0), xytext=(0, below), ha="center", annotation_clip=False,
                xycoords=("data", "axes fraction"), **place,
            )  # fmt: skip


def draw_brier(runs: Sequence[RunFacts]) -> Picture:
    """Draw the Brier score of runs over time, with that of Kaplan-Meier of the first."""
    unit = short(runs[0].run.config["unit"])
    figure, axes = new_axes(f"time in {unit}", "Brier score")
    for number, facts in enumerate(runs):
        times, model, reference = brier_curves(facts)
        if number == 0:
            axes.plot(times, reference, color=MUTED, linewidth=2.2, alpha=0.6, label="Kaplan-Meier")
        axes.plot(
            times, model, color=COLOURS[number % len(COLOURS)],
            linestyle=DASHES[(number + number // len(COLOURS)) % len(DASHES)],
            label=short(facts.name),
        )  # fmt: skip
    patients = sum(len(fold) for fold in runs[0].tested)
    axes.set(ylim=(0, None), xlim=(0, None))
    figure.legend(loc="outside lower center", ncols=3)
    axes.set_title(f"n = {patients:,} patients", loc="right", color=MUTED)
    name = f"brier-{runs[0].number + 1}" if len(runs) == 1 else "brier-runs"
    caption = (
        "Weighted for censoring; lower is better. Kaplan-Meier is the curve of the training "
        "patients, the same for everyone."
    )
    return Picture(name, "Brier score over time", caption, figure)


def draw_calibrations(facts: RunFacts) -> Iterator[Picture]:
    """Yield a calibration curve for each horizon or class."""
    task = facts.run.task
    if "calibration" not in facts.metrics:
        return
    table = task.calibration_table(facts.metrics["calibration"])
    for number, (panel, groups) in enumerate(table.groupby(table.columns[0], sort=False)):
        title = short(task.calibration_title(panel))
        figure, axes = new_axes(f"predicted probability: {title}", "observed share, 95 % interval")
        draw_calibration(axes, groups)
        patients = groups["patients"].sum()
        axes.set_title(f"n = {patients:,} patients", loc="right", color=MUTED)
        yield Picture(
            f"calibration-{facts.number + 1}-{number + 1}",
            f"Calibration: {task.calibration_title(panel)}",
            "Groups of patients by this probability. On the dashed line prediction and observation "
            "agree.",
            figure,
        )


def draw_roc(facts: RunFacts, task: ClassTask, draws: int) -> Picture:
    """Draw the ROC curve of every class against the others."""
    figure, axes = new_axes("false positive rate", "true positive rate", height=WIDTH)
    axes.plot([0, 1], [0, 1], "--", color=MUTED, linewidth=1)
    labels = np.concatenate([fold.labels for fold in facts.tested])
    for number, (k, auc) in enumerate(class_aucs(facts.tested, draws).items()):
        label = (
            f"{short(task.names[k])} (n = {(labels == k).sum():,}): "
            f"{auc.value:.2f} ({auc.low:.2f} to {auc.high:.2f})"
        )
        axes.plot(
            *roc_curve(facts.tested, k), color=COLOURS[number % len(COLOURS)],
            linestyle=DASHES[number % len(DASHES)], label=label,
        )  # fmt: skip
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    figure.legend(loc="outside lower center", title="AUC (95 % interval)", title_fontsize=8)
    axes.set_title(f"n = {len(labels):,} patients", loc="right", color=MUTED)
    caption = (
        "Each class against the others. The curves are averaged over folds, weighted by pairs: "
        "the area below is the AUC, whose pairs are within folds."
    )
    return Picture(f"roc-{facts.number + 1}", "ROC", caption, figure)


def draw_comparison(runs: Sequence[RunFacts], metric: str, title: str) -> Picture:
    """Draw a metric of every run with its interval, one row per run."""
    known = [facts for facts in runs if "low" in facts.metrics.get(metric, {})]
    figure, axes = new_axes(f"{title}, 95 % interval", "", height=0.9 + 0.3 * len(known))
    for row, facts in enumerate(known):
        value = facts.metrics[metric]
        axes.plot([value["low"], value["high"]], [row, row], color=COLOURS[0], linewidth=1.6)
        axes.plot(value["value"], row, "o", color=COLOURS[0], markersize=5)
    axes.axvline(0.5, color=MUTED, linestyle="--", linewidth=1)
    axes.set_yticks(
        range(len(known)),
        [f"{short(facts.name)} (n = {facts.metrics['patients']:,})" for facts in known],
        color=INK,
    )
    axes.set_ylim(len(known) - 0.5, -0.5)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    caption = "Out of fold. The dashed line is a prediction by chance."
    return Picture("comparison", title, caption, figure)


def format_p(p: float) -> str:
    """Return a p-value after its sign: "= 0.031", or "< 0.001"."""
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"
