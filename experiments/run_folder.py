"""The run folder: what `motet train`, `merge` and `fuse` write, and how it is read.

    config.json        the configuration; a run continues only with an equal one
    splits.json        {"folds": [{"train": [ids], "validation": [ids], "test": [ids]}, ...]}
    outcome.csv        patient, time and event, or label
    modalities.csv     patient, then has_NAME, 1 or 0, for each modality of the run
    folds/0/           model.safetensors, fitted.json (scaling, objective), predictions.csv and,
                       written last, done.json (history, seconds)
    predictions.csv    out of fold: the predictions of all test parts
    calibration.csv    predicted and observed probabilities of groups of patients
    calibration.svg    the same as a picture
    metrics.json       see docs/concepts/evaluation.md
    README.md          the card of `motet merge`, which names the merged blocks
    log.txt

Every file is written completely or not at all, so that a killed run continues where it stopped.
"""

import json
import time
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from .._atomic import write_text
from ..fusion.fitted import Fitted
from ..fusion.held_out import ClassFold, SurvivalFold
from .task import RunTables, Task, task_of_config

FORMAT = 1
# Keys of the configuration that may differ when a run is continued.
_MAY_DIFFER = ("motet", "data", "cohort")
# Names that may be in a folder without config.json: a run that is killed early leaves these.
_WRITTEN_FIRST = ("blocks", "folds", "splits.json", "outcome.csv", "modalities.csv")


class RunError(ValueError):
    """A run folder that cannot be used; the message has one line."""


@dataclass(frozen=True)
class Run:
    """A run folder.

    Args:
        path: the folder.
        config: the configuration.
        splits: one dict per fold, name of the part to patient ids.
    """

    path: Path
    config: dict[str, Any]
    splits: list[dict[str, list[str]]]

    @property
    def task(self) -> Task:
        """Survival or classes."""
        return task_of_config(self.config)

    @classmethod
    def create(
        cls,
        path: Path,
        config: dict[str, Any],
        splits: list[dict[str, list[str]]],
        outcome: pd.DataFrame,
    ) -> "Run":
        """Create the folder, or continue one with an equal configuration.

        Raises:
            RunError: the folder holds something else.
        """
        config = {"format": FORMAT, **config}
        existing = cls.check_free(path, config["model"])
        if existing is not None and existing.has_begun():
            differs = [
                key
                for key in sorted({*config, *existing.config})
                if key not in _MAY_DIFFER and config.get(key) != existing.config.get(key)
            ]
            if "fingerprint" in differs:
                raise RunError(f"{path}: the data of {config['cohort']} changed since the run")
            if not differs and existing.splits != splits:
                raise RunError(
                    f"{path}: holds a run with other splits (--splits, --test, --validation, "
                    "--seed or split files); choose another --out, or remove the folder"
                )
            if differs:
                key = differs[0]
                raise RunError(
                    f"{path}: holds a run with {key} {_abbreviate(existing.config.get(key))}, got "
                    f"{_abbreviate(config.get(key))}; choose another --out, or remove the folder"
                )
            write_text(path / "outcome.csv", outcome.to_csv(index=False))  # may be incomplete
            return existing
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path, config, splits)
        write_text(path / "splits.json", json.dumps({"folds": splits}))
        write_text(path / "outcome.csv", outcome.to_csv(index=False))
        write_text(path / "config.json", json.dumps(config, indent=2))
        return run

    @classmethod
    def check_free(cls, path: Path, model: str) -> "Run | None":
        """Return the run in a folder, None if there is none yet.

        Raises:
            RunError: the folder holds something else, or a run of another model.
        """
        if (path / "config.json").exists():
            existing = cls.open(path)
            if existing.has_begun() and existing.config["model"] != model:
                raise RunError(
                    f"{path}: holds a run with model {_abbreviate(existing.config['model'])}, got "
                    f"{_abbreviate(model)}; choose another --out, or remove the folder"
                )
            return existing
        if path.exists() and not path.is_dir():
            raise RunError(f"{path}: expected a folder, got a file")
        if path.exists() and any(
            item.name not in _WRITTEN_FIRST and item.name[0] != "." for item in path.iterdir()
        ):
            raise RunError(f"{path}: expected a new or empty folder, or a run to continue")
        return None

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Read a run, finished or not.

        Raises:
            RunError: no run, or a run of a newer format.
        """
        if not path.is_dir():
            raise RunError(f"{path}: no such run folder")
        if not (path / "config.json").is_file():
            raise RunError(f"{path}: not a run folder: no config.json")
        try:
            config = json.loads((path / "config.json").read_text())
            if config["format"] > FORMAT:
                raise RunError(
                    f"{path}: format {config['format']} was written by motet "
                    f"{config.get('motet')}; this motet reads up to format {FORMAT}"
                )
            splits = json.loads((path / "splits.json").read_text())["folds"]
        except FileNotFoundError as error:
            raise RunError(f"{path}: incomplete, without {error.filename}") from error
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise RunError(f"{path}: corrupt, config.json or splits.json: {error}") from error
        return cls(path, config, splits)

    @classmethod
    def finished(cls, path: Path) -> "Run":
        """Read a run that has all its folds.

        Raises:
            RunError: no run, or a fold is not done.
        """
        run = cls.open(path)
        for fold in range(len(run.splits)):
            if not run.is_fold_done(fold):
                raise RunError(
                    f"{path}: incomplete, fold {fold + 1} of {len(run.splits)} is not done; run "
                    f"the same `motet {run.config['command']}` again to finish it"
                )
        return run

    def fold(self, number: int) -> Path:
        """Return the folder of a fold."""
        return self.path / "folds" / str(number)

    def has_begun(self) -> bool:
        """Return whether training has begun; before, another configuration may take the folder."""
        folds = self.path / "folds"
        return any(folds.glob("*/done.json")) or any(folds.glob("*/last.ckpt"))

    def is_fold_done(self, number: int) -> bool:
        """Return whether a fold is complete: its files have the sizes that `done.json` names."""
        folder = self.fold(number)
        try:
            sizes = json.loads((folder / "done.json").read_text())["bytes"]
            return all((folder / name).stat().st_size == size for name, size in sizes.items())
        except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
            return False

    def finish_fold(
        self,
        number: int,
        predictions: pd.DataFrame,
        facts: dict[str, Any],
        fitted: Fitted,
    ) -> None:
        """Write the files of a fold, `done.json` last."""
        folder = self.fold(number)
        folder.mkdir(parents=True, exist_ok=True)
        fitted.save(folder)
        write_text(folder / "predictions.csv", predictions.to_csv(index=False))
        names = ("predictions.csv", "model.safetensors", "fitted.json")
        sizes = {name: (folder / name).stat().st_size for name in names}
        write_text(folder / "done.json", json.dumps({**facts, "bytes": sizes}))

    def fitted(self, number: int) -> Fitted:
        """Read the model of a fold.

        Raises:
            RunError: a missing or corrupt file.
        """
        try:
            return Fitted.load(self.fold(number))
        except (OSError, ValueError) as error:
            raise RunError(str(error)) from error

    def facts(self, number: int) -> dict[str, Any]:
        """Return the content of `done.json` of a fold."""
        return json.loads((self.fold(number) / "done.json").read_text())

    def predictions(self) -> pd.DataFrame:
        """Return the out-of-fold predictions: patient, fold, `Task.predictions_table`."""
        frames = []
        for fold in range(len(self.splits)):
            path = self.fold(fold) / "predictions.csv"
            frame = pd.read_csv(path, dtype={"patient": str}, keep_default_na=False)
            frame.insert(1, "fold", fold)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def outcome(self) -> pd.DataFrame:
        """Return time and event, or label, by patient."""
        path = self.path / "outcome.csv"
        try:
            frame = pd.read_csv(path, dtype={"patient": str}, keep_default_na=False)
            frame = frame.set_index("patient")
        except (OSError, ValueError, KeyError) as error:
            raise RunError(f"{path}: cannot be read: {error}") from error
        split_patients = {
            patient for fold in self.splits for part in fold.values() for patient in part
        }
        if not split_patients <= set(frame.index):
            raise RunError(f"{path}: incomplete, it lacks patients of splits.json")
        return frame

    def modalities(self) -> pd.DataFrame | None:
        """Return which modality of the run each patient has, bool; the index is the patient.

        None for a run that was finished before this was recorded; the same command adds it.
        """
        path = self.path / "modalities.csv"
        if not path.is_file():
            return None
        try:
            frame = pd.read_csv(path, dtype={"patient": str}, keep_default_na=False)
            frame = frame.set_index("patient").loc[self.outcome().index]
            names = self.config["modalities"]
            return frame[[f"has_{name}" for name in names]].astype(bool).set_axis(names, axis=1)
        except (OSError, ValueError, KeyError) as error:
            raise RunError(f"{path}: cannot be read: {error}") from error

    def tested(self, only: Set[str] | None = None) -> list[SurvivalFold] | list[ClassFold]:
        """Return the test parts for an evaluation; `only` selects patients."""
        predictions = self.predictions()
        if only is not None:
            predictions = predictions[predictions["patient"].isin(list(only))]
        facts = [self.facts(number) for number in range(len(self.splits))]
        return self.task.tested(RunTables(self.outcome(), predictions, facts), self.splits)

    def log(self, line: str) -> None:
        """Append a line to log.txt."""
        with open(self.path / "log.txt", "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from writing to the run folder.

    Raises:
        RunError: another process is writing to it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / ".lock", timeout=0)
        lock.acquire()
    except Timeout as error:
        raise RunError(f"{path}: another motet process is writing to it") from error
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error}") from error
    try:
        yield
    finally:
        lock.release()


def _abbreviate(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
