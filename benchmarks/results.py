"""Run the experiments of docs/results.md: `python benchmarks/results.py [--table] COHORT ...`.

Prints `motet` commands and runs them one after the other, into runs/results/COHORT. Finished runs
are not repeated. `--table` runs nothing: it prints tables of the finished runs, as Markdown.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from motet import experiments
from motet.experiments import Run

OUT = Path("runs/results")
# Diagnoses are left out: they are coded at discharge, when the outcome is known.
MODALITIES = {"mimic3_demo_death": ["--modalities", "static,labs"]}
CLINICAL = {"tcga_blca": "clinical", "tcga_kirp": "clinical", "hancock_os": "clinical",
            "hancock_rfs": "clinical"}  # fmt: skip
NAMES = {
    "cox": "ridge Cox",
    "rsf": "random survival forest",
    "logistic": "logistic regression",
    "forest": "random forest",
    "clinical": "ridge Cox, clinical alone",
    "healnet": "HEALNet",
    "lego": "LegoMerge, no training",
    "fuse": "LegoFuse, 2 epochs",
}


def main() -> int:
    """Run, or print tables; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="print the tables of finished runs")
    parser.add_argument("cohorts", nargs="+", metavar="COHORT")
    options = parser.parse_args()
    for cohort in options.cohorts:
        if options.table:
            table(cohort)
        else:
            run(cohort)
    return 0


def run(cohort: str) -> None:
    """Run every model on a cohort."""
    survival = cohort.startswith(("tcga", "hancock", "breast_cancer"))
    modalities = MODALITIES.get(cohort, [])
    out = OUT / cohort
    seconds = json.loads((out / "seconds.json").read_text()) if out.is_dir() else {}

    def motet(name: str, *arguments: str) -> None:
        if (out / name / "metrics.json").exists():
            return
        command = ["motet", *arguments, "--out", str(out / name)]
        print(shlex.join(command), flush=True)
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL)
        seconds[name] = time.perf_counter() - started
        (out / "seconds.json").write_text(json.dumps(seconds))

    for model in ("cox", "rsf") if survival else ("logistic", "forest"):
        motet(model, "train", cohort, "--model", model, *modalities)
    if cohort in CLINICAL:
        motet("clinical", "train", cohort, "--model", "cox", "--modalities", CLINICAL[cohort])
    motet("healnet", "train", cohort, "--model", "healnet", *modalities)
    motet("lego", "train", cohort, "--model", "lego", *modalities)
    motet("fuse", "fuse", str(out / "lego"))


def table(cohort: str) -> None:
    """Print a cohort's figures, and their differences from those of its linear model."""
    out = OUT / cohort
    seconds = json.loads((out / "seconds.json").read_text())
    first = Run.finished(out / ("cox" if (out / "cox").exists() else "logistic"))
    metrics = experiments.read_metrics(first)
    classes = first.config["classes"] is not None
    metric = "harrell_c" if not classes else "auc" if "auc" in metrics else "macro_auc"
    second = "balanced_accuracy" if classes else "integrated_brier"
    counts = f"{metrics['patients']} patients tested"
    if not classes:
        counts += f", {metrics['events']} events"
    blocks = [
        out / "lego" / "blocks" / name for name in Run.open(out / "lego").config["modalities"]
    ]
    folders = [out / name for name in NAMES if (out / name).exists()]
    healnet_end = folders.index(out / "healnet") + 1  # the blocks' rows come after HEALNet's
    print(f"\n{counts}, {metrics['folds']} test parts.\n")
    titles = {
        "harrell_c": "Harrell's c", "auc": "AUC", "macro_auc": "macro AUC",
        "balanced_accuracy": "balanced accuracy", "integrated_brier": "integrated Brier",
    }  # fmt: skip
    print(
        f"| model | {titles[metric]} | less {NAMES[first.path.name]} (paired) | {titles[second]} | "
        "seconds |"
    )
    print("|---|---|---|---|---|")
    for folder in [*folders[:healnet_end], *blocks, *folders[healnet_end:]]:
        run = Run.finished(folder)
        figures = experiments.read_metrics(run)
        if not figures["patients"]:  # no patient of the test part has the block's modality
            continue
        name = NAMES.get(folder.name) if folder.parent == out else f"LegoBlock {folder.name}"
        gap = "" if folder == first.path else _signed(*experiments.compare_runs(run, first)[:3])
        wall = f"{seconds[folder.name]:.0f}" if folder.parent == out else ""
        print(
            f"| {name} | {_interval(figures[metric])} | {gap} | {_interval(figures[second])} | "
            f"{wall} |"
        )


def _interval(figure: dict[str, float]) -> str:
    return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"


def _signed(value: float, low: float, high: float) -> str:
    return f"{value:+.3f} ({low:+.3f} to {high:+.3f})"


if __name__ == "__main__":
    sys.exit(main())
