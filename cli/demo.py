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

import numpy as np
import pandas as pd

from .. import experiments
from ..experiments import Run
from ..io import Cohort, Survival, load_cohort

MISSING = "HEALNet, half miss genes"


def run(out: Path, *, epochs: int | None = None, folds: int = 5) -> dict[str, Run]:
    """Train and evaluate all models; print a table; write runs, results.csv and a report to `out`.

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
    blocks = [name for name in runs if name.startswith("LegoBlock")]
    report = experiments.write_run_report(
        [run for name, run in runs.items() if name not in blocks], out / "report.html"
    )
    print(f"\nWritten to {out}: a folder per run, results.csv, and a report to look at: {report}")


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
