"""Execute a run: fold after fold, each on disk before the next; then out-of-fold metrics."""

import json
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
from tqdm import tqdm

from .._atomic import write_text
from ..fusion.training import History, rank
from ..io import Cohort, Split
from ..io.cohorts.summary import has_modality
from .calibration_plot import write_calibration
from .evaluate import evaluate_run, read_metrics
from .fit import EachEpoch, FoldResult
from .folds import PARTS
from .run_folder import Run, RunError, locked
from .settings import Settings
from .task import task_of

# What a fold raises if its data or a library fail; errors in the code itself end the run.
_FAILURES = (ValueError, ArithmeticError, RuntimeError)


class FitFold(Protocol):
    """Fits one fold of a run."""

    def __call__(
        self, number: int, split: Split, folder: Path, each_epoch: EachEpoch, /
    ) -> FoldResult:
        """Fit the fold `number` on `split`.

        Args:
            number: number of the fold, from 0.
            split: the patients of its parts.
            folder: folder of the fold. The state saved there lets a killed run continue.
            each_epoch: to be called after every epoch of a training.
        """
        ...


@dataclass(frozen=True)
class RunSpec:
    """The specification of a run that is to be executed or continued.

    Args:
        cohort: the patients.
        splits: the patients of the parts of every fold.
        config: the configuration, see `run_config`.
        out: the run folder.
    """

    cohort: Cohort
    splits: list[Split]
    config: dict[str, Any]
    out: Path


def run_config(
    cohort: Cohort, model: str, modalities: list[str], settings: Settings, *, command: str
) -> dict[str, Any]:
    """Return the configuration of a run, config.json; a run continues only with an equal one.

    Args:
        cohort: the cohort as it was loaded, with all its modalities.
        model: healnet, block, merge, fuse or a baseline.
        modalities: the modalities that are used.
        settings: of the model.
        command: the command that the user typed: train, merge or fuse.
    """
    source = cohort.source
    return {
        "motet": version("motet"),
        "command": command,
        "cohort": cohort.name if source is None else source.cohort,
        "data": None if source is None else source.data,
        "fingerprint": cohort.fingerprint(),
        "model": model,
        "modalities": modalities,
        "options": settings.model,
        "training": asdict(settings.training) if model in ("healnet", "block") else None,
        "goal": asdict(settings.goal),
        **task_of(cohort).config(),
    }


def execute_run(spec: RunSpec, fit_fold: FitFold) -> Run:
    """Fit the folds that are not done yet, then write out-of-fold predictions and metrics.

    If a fold fails, the others are fitted all the same. The same command tries the failed ones
    again. Under torchrun only the first process writes; the others take part in the trainings.

    Raises:
        RunError: the folder holds something else, another process is writing to it, or a fold
            failed.
    """
    splits = [{name: list(getattr(split, name)) for name in PARTS} for split in spec.splits]
    if rank():
        for number, split in enumerate(spec.splits):
            folder = spec.out / "folds" / str(number)
            if not (folder / "done.json").is_file():
                fit_fold(number, split, folder, lambda history: None)
        return Run(spec.out, spec.config, splits)
    Run.check_free(spec.out, spec.config["model"])  # before the lock is written there
    with locked(spec.out):
        outcome = task_of(spec.cohort).outcome_table(spec.cohort)
        run = Run.create(spec.out, spec.config, splits, outcome)
        if not (run.path / "modalities.csv").is_file():
            write_text(run.path / "modalities.csv", _modalities_table(spec).to_csv(index=False))
        label = f"{spec.config['model']} {' + '.join(spec.config['modalities'])}"
        epochs = (spec.config["training"] or {}).get("epochs", 1)
        failed: dict[int, str] = {}
        with tqdm(total=len(splits) * epochs, disable=None, unit="epoch", leave=False) as bar:
            for number, split in enumerate(spec.splits):
                bar.set_description(f"{label}, fold {number + 1}/{len(splits)}")
                if not run.is_fold_done(number):
                    try:
                        _execute_fold(run, number, split, fit_fold, bar)
                    except _FAILURES as error:
                        failed[number] = _report_failure(run, number, error, bar)
                bar.update((number + 1) * epochs - bar.n)
        if failed:
            raise RunError(_describe_failures(run, failed))
        _write_metrics(run)
    return run


def _modalities_table(spec: RunSpec) -> pd.DataFrame:
    """Return the content of modalities.csv: patient, then has_NAME for each modality of the run."""
    cohort = spec.cohort
    columns = {
        f"has_{name}": has_modality(cohort.modalities[name], cohort.patients).astype(int)
        for name in spec.config["modalities"]
    }
    return pd.DataFrame({"patient": list(cohort.patients), **columns})


def _report_failure(run: Run, number: int, error: Exception, bar: tqdm) -> str:
    """Log why a fold failed, show it above a progress bar, and return the reason in one line."""
    reason = " ".join(str(error).split())
    if not isinstance(error, ValueError):  # of a library, which may not say what it is about
        reason = f"{type(error).__name__}: {reason}"
    line = f"fold {number + 1}/{len(run.splits)} failed: {reason}"
    run.log(f"{line}\n{''.join(traceback.format_exception(error))}")
    if not bar.disable:
        bar.write(f"{run.path}: {line}", file=sys.stderr)
    return reason


def _describe_failures(run: Run, failed: dict[int, str]) -> str:
    """Return one line that names the run and each failed fold with its reason."""
    folds_of: dict[str, list[int]] = {}
    for number, reason in failed.items():
        folds_of.setdefault(reason, []).append(number + 1)
    reasons = "; ".join(
        f"fold{'s' * (len(folds) > 1)} {', '.join(map(str, folds))}: {reason}"
        for reason, folds in folds_of.items()
    )
    return (
        f"{run.path}: {len(failed)} of {len(run.splits)} folds failed; {reasons} (the same command "
        "tries only these again)"
    )


def _execute_fold(run: Run, number: int, split: Split, fit_fold: FitFold, bar: tqdm) -> None:
    name = f"fold {number + 1}/{len(run.splits)}"
    sizes = ", ".join(f"{part} {len(getattr(split, part))}" for part in PARTS)
    run.log(f"{name}: {sizes} patients")

    def each_epoch(history: History) -> None:
        loss, epoch = history.validation_loss[-1], len(history.validation_loss)
        bar.set_postfix(validation=f"{loss:.4f}", best=history.best_epoch)
        bar.update()
        run.log(
            f"{name}: epoch {epoch}: train {history.train_loss[-1]:.6g}, validation {loss:.6g}, "
            f"{history.seconds[-1]:.2f} s"
        )

    started = time.perf_counter()
    result = fit_fold(number, split, run.fold(number), each_epoch)
    seconds = time.perf_counter() - started
    table = run.task.predictions_table(result.predictions)
    run.finish_fold(number, table, {"seconds": seconds, **result.facts()}, result.fitted)
    run.log(f"{name}: done in {seconds:.1f} s")


def _write_metrics(run: Run) -> None:
    """Write predictions, calibration curves and, last, metrics.json, unless it exists already."""
    try:
        read_metrics(run)
    except RunError:
        metrics, predictions = evaluate_run(run), run.predictions()
        write_text(run.path / "predictions.csv", predictions.to_csv(index=False))
        write_calibration(run.task, metrics, run.path / "calibration.csv")
        write_text(run.path / "metrics.json", json.dumps(metrics, indent=2))
        run.log("finished")
