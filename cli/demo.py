"""`motet demo`: both systems on real patients, from data to report, next to a linear model.

The data are 198 patients with breast cancer from scikit-survival, with two modalities and five
splits by patient, so that each patient is tested once. The demo trains, merges, fuses and evaluates
as a user would. Then an image of real tissue from scikit-image is written as a slide, and the slide
is tiled into a feature store.
"""

import csv
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .. import experiments
from ..experiments import Run
from ..io import Cohort, Survival, load_cohort

MISSING = "HEALNet, half miss genes"


def run(out: Path, *, epochs: int | None = None, folds: int = 5) -> dict[str, Run]:
    """Train and evaluate all models; print a table; write runs, plots and results.csv to `out`.

    If `epochs` is None, every model trains for its default number of epochs.
    """
    cohort = load_cohort("breast_cancer")
    outcome = cohort.outcome
    assert isinstance(outcome, Survival)
    tables = {name: table.shape[1] for name, table in cohort.modalities.items()}  # pyright: ignore
    print(
        f"motet demo: {cohort.name}, {len(cohort)} patients, {int(outcome.events.sum())} events; "
        + ", ".join(f"{name} ({columns} columns)" for name, columns in tables.items())
        + f"; {folds} splits by patient",
        flush=True,
    )
    runs = _train(cohort, out, epochs, experiments.Splits(folds, test=1 / folds))
    _report(runs, outcome, out)
    return runs


def _train(
    cohort: Cohort, out: Path, epochs: int | None, splits: experiments.Splits
) -> dict[str, Run]:
    halved = _without_genes(cohort)
    runs: dict[str, Run] = {}

    def train(name: str, folder: str, kind: str, cohort: Cohort = cohort) -> None:
        changes = {} if kind == "cox" or epochs is None else {"epochs": epochs}
        runs[name] = experiments.train_run(
            cohort, kind, out / folder, changes=changes, splits=splits
        )
        print(f"{name}: done", flush=True)

    train("ridge Cox", "cox", "cox")
    train("HEALNet", "healnet", "healnet")
    train("LegoMerge, no training", "lego", "lego")
    blocks = experiments.blocks_of([out / "lego"])
    for block in blocks:
        runs[f"LegoBlock {block.config['modalities'][0]}"] = block
    runs["LegoFuse, 2 epochs"] = experiments.fuse_runs(
        blocks, out / "fuse", cohort=cohort, mode="weave"
    )
    train(MISSING, "healnet_half_missing", "healnet", halved)
    return runs


def _without_genes(cohort: Cohort) -> Cohort:
    """Return the cohort with the genes of every second patient missing."""
    genes = cohort.modalities["genes"]
    assert isinstance(genes, pd.DataFrame)
    halved = genes.copy()
    halved.iloc[1::2] = np.nan
    return replace(cohort, modalities={**cohort.modalities, "genes": halved})


def _report(runs: dict[str, Run], outcome: Survival, out: Path) -> None:
    rows = []
    for name, run in runs.items():
        c = experiments.read_metrics(run)["harrell_c"]
        facts = [run.facts(number) for number in range(len(run.splits))]
        seconds = sum(fact["seconds"] for fact in facts)
        rows.append((name, c["value"], c["low"], c["high"], seconds, facts[0]["parameters"]))
    print(f"\n{'model':26}{'c-index':>8}  {'95 % interval':15}{'seconds':>8}{'parameters':>12}")
    for name, c, low, high, seconds, parameters in rows:
        print(f"{name:26}{c:8.3f}  {low:.3f} to {high:.3f} {seconds:8.1f}{parameters:12,}")
    print(
        f"\nOut of fold: {len(outcome.times)} patients, each tested once; only pairs within a "
        f"fold count.\nWith {int(outcome.events.sum())} events the intervals are wide: a smaller "
        "difference is no evidence."
    )
    with open(out / "results.csv", "w", newline="") as file:
        header = ["model", "c_index", "ci_low", "ci_high", "seconds", "parameters"]
        csv.writer(file).writerows([header, *rows])
    _plot_groups(runs["HEALNet"], out / "kaplan_meier.png")
    _plot_histories(runs, out / "training.png")
    print(f"\nWritten to {out}: a folder per run, results.csv, kaplan_meier.png, training.png")


def _plot_groups(run: Run, path: Path) -> None:
    """Plot Kaplan-Meier curves of patients above and below the median risk of the training part."""
    from matplotlib.figure import Figure
    from sksurv.nonparametric import kaplan_meier_estimator

    folds: Any = run.tested()
    high = np.concatenate([fold.risks > fold.cut for fold in folds])
    all_times = np.concatenate([fold.times for fold in folds])
    all_events = np.concatenate([fold.events for fold in folds])
    p = experiments.read_metrics(run)["risk_groups"]["log_rank_p"]
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    # The curves end when ten patients of a group are left: beyond that they show mostly chance.
    end = min(np.sort(all_times[high == group])[-10] for group in (False, True)) / 365.25
    for group, colour, label in ((False, "#2b6cb0", "low risk"), (True, "#c53030", "high risk")):
        rows = high == group
        estimate: Any = kaplan_meier_estimator(
            all_events[rows], all_times[rows], conf_type="log-log"
        )
        # At time 0 no patient has had the event; the estimate begins later.
        times, survival = np.append(0.0, estimate[0]), np.append(1.0, estimate[1])
        interval = np.column_stack([[1.0, 1.0], estimate[2]])
        years = times / 365.25
        axes.step(years, survival, where="post", color=colour, label=f"{label} (n = {rows.sum()})")
        axes.fill_between(years, *interval, step="post", color=colour, alpha=0.15, linewidth=0)
        censored = np.flatnonzero(rows & ~all_events)
        steps = np.searchsorted(times, all_times[censored], side="right") - 1
        axes.plot(all_times[censored] / 365.25, survival[steps], "|", color=colour, markersize=5)
    axes.set(
        xlabel="years", ylabel="free of distant metastasis", ylim=(0, 1.02), xlim=(0, end),
        title=f"HEALNet, out of fold, split at the median training risk (log-rank p = {p:.2g})",
    )  # fmt: skip
    axes.title.set_fontsize(10)
    axes.legend(loc="lower left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _plot_histories(runs: dict[str, Run], path: Path) -> None:
    """Plot training and validation losses of every trained model, one line per fold."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    trained = {
        name: [run.facts(number)["history"] for number in range(len(run.splits))]
        for name, run in runs.items()
        if run.config["training"]
    }
    figure = Figure(figsize=(3.2 * len(trained), 3.2), layout="constrained")
    panels = figure.subplots(1, len(trained), squeeze=False)[0]
    for axes, (name, histories) in zip(panels, trained.items(), strict=True):
        for history in histories:
            epochs = np.arange(1, len(history["train_loss"]) + 1)
            axes.plot(epochs, history["train_loss"], color="#a0aec0", linewidth=0.8)
            axes.plot(epochs, history["validation_loss"], color="#2b6cb0", linewidth=0.8)
            best = history["validation_loss"][history["best_epoch"] - 1]
            axes.plot(history["best_epoch"], best, "o", color="#2b6cb0", markersize=4)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("loss, one line per fold")
    handles = [
        Line2D([], [], color="#a0aec0", label="training"),
        Line2D([], [], color="#2b6cb0", label="validation"),
        Line2D([], [], color="#2b6cb0", linestyle="", marker="o", label="best"),
    ]
    panels[0].legend(handles=handles, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def tile(out: Path) -> None:
    """Write a slide of real tissue, tile it, and write the report of the store."""
    from ..io import FeatureStore, tile_slides
    from ..io.tiling.report.write_report import write_report

    out.mkdir(exist_ok=True)
    slide = out / "tissue.tif"
    try:
        _write_slide(slide)
    except ImportError as error:
        print(f"\nSlides skipped ({error}): pip install 'motet[wsi]'")
        return
    started = time.perf_counter()
    # The resolution of the image is unknown, so patches have its pixels (downsample=1).
    tiled = tile_slides(slide, out / "store", encoder="stain-stats", downsample=1, tile_px=128)
    seconds = time.perf_counter() - started
    assert not tiled.failed
    store = FeatureStore(out / "store")
    report = write_report(out / "store")
    tissue = store["tissue"]
    width, height = tissue.attrs["width"], tissue.attrs["height"]
    patches, features = tissue.features.shape
    print(
        f"\nmotet tile: {slide.name}, {width} x {height} px, colonic glands, FHL2 in brown: "
        f"{patches} patches of {tissue.attrs['counts']['grid']} hold tissue, {features} features "
        f"each (stain-stats), in {seconds:.1f} s\nWritten to {out}: the store, and its report: "
        f"{report}"
    )


def _write_slide(path: Path) -> None:
    """Write a pyramidal TIFF: mirrored copies of scikit-image's image in an ellipse on glass."""
    import tifffile
    from skimage.data import immunohistochemistry

    image = immunohistochemistry()
    row = np.concatenate([image, image[:, ::-1], image, image[:, ::-1]], axis=1)
    tissue = np.concatenate([row, row[::-1], row], axis=0)
    height, width = tissue.shape[:2]
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    image = np.where((x**2 + y**2 < 0.8)[..., None], tissue, np.uint8(242))
    with tifffile.TiffWriter(path) as writer:
        for level in range(2):
            writer.write(
                image, tile=(256, 256), photometric="rgb", compression="jpeg",
                subfiletype=min(level, 1), metadata=None,
            )  # fmt: skip
            blocks = image.reshape(len(image) // 4, 4, image.shape[1] // 4, 4, 3)
            image = (blocks.mean(axis=(1, 3)) + 0.5).astype(np.uint8)


def main(out: Path) -> int:
    """Run the demo; return the exit code."""
    started = time.perf_counter()
    run(out)
    tile(out / "slides")
    print(f"{time.perf_counter() - started:.0f} s in all")
    return 0
