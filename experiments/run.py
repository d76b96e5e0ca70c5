"""Carry out a run: fold after fold, each on disk before the next, then metrics out of fold."""

import json
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from .._atomic import write_text
from ..fusion.training import History, rank
from ..io import Cohort, Split
from .evaluate import evaluate_run, read_metrics
from .fit import EachEpoch, FoldResult
from .folds import PARTS
from .run_folder import Run, RunError, locked
from .settings import Settings
from .task import task_of


class FitFold(Protocol):
    """Fits one fold of a run."""

    def __call__(
        self, number: int, split: Split, folder: Path, each_epoch: EachEpoch, /
    ) -> FoldResult:
        """Fit the fold `number` on `split`.

        Args:
            number: of the fold, from 0.
            split: the patients of its parts.
            folder: of the fold; what is kept there lets a killed run go on.
            each_epoch: to be called after every epoch of a training.
        """
        ...


@dataclass(frozen=True)
class Job:
    """A run to be made, or to be gone on with.

    Args:
        cohort: the patients.
        splits: those of every fold's parts.
        config: what was asked for, see `run_config`.
        out: the run folder.
    """

    cohort: Cohort
    splits: list[Split]
    config: dict[str, Any]
    out: Path


def run_config(
    cohort: Cohort, model: str, modalities: list[str], settings: Settings, *, command: str
) -> dict[str, Any]:
    """Return config.json of a run: with another one, a folder is not gone on with.

    Args:
        cohort: as it was loaded, with all its modalities.
        model: healnet, block, merge, fuse or a baseline.
        modalities: those that are used.
        settings: of the model.
        command: what was typed: train, merge or fuse.
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


def carry_out(job: Job, fit_fold: FitFold) -> Run:
    """Do what is left of a run: folds, then out-of-fold predictions and metrics.

    Under torchrun the first process alone writes; the others take part in the trainings.

    Raises:
        RunError: the folder holds something else, or another process is writing to it.
    """
    splits = [{name: list(getattr(split, name)) for name in PARTS} for split in job.splits]
    if rank():
        for number, split in enumerate(job.splits):
            folder = job.out / "folds" / str(number)
            if not (folder / "done.json").is_file():
                fit_fold(number, split, folder, lambda history: None)
        return Run(job.out, job.config, splits)
    Run.check_free(job.out, job.config["model"])  # before anything is put there, the lock included
    with locked(job.out):
        outcome = task_of(job.cohort).outcome_table(job.cohort)
        run = Run.create(job.out, job.config, splits, outcome)
        label = f"{job.config['model']} {' + '.join(job.config['modalities'])}"
        epochs = (job.config["training"] or {}).get("epochs", 1)
        with tqdm(total=len(splits) * epochs, disable=None, unit="epoch", leave=False) as bar:
            for number, split in enumerate(job.splits):
                bar.set_description(f"{label}, fold {number + 1}/{len(splits)}")
                if not run.done(number):
                    _carry_out_fold(run, number, split, fit_fold, bar)
                bar.update((number + 1) * epochs - bar.n)
        _write_metrics(run)
    return run


def _carry_out_fold(run: Run, number: int, split: Split, fit_fold: FitFold, bar: tqdm) -> None:
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
    """Write predictions.csv and metrics.json, unless an earlier process has."""
    try:
        read_metrics(run)
    except RunError:
        metrics, predictions = evaluate_run(run), run.predictions()
        write_text(run.path / "predictions.csv", predictions.to_csv(index=False))
        write_text(run.path / "metrics.json", json.dumps(metrics, indent=2))
        run.log("finished")
