"""The run folder: what `motet train`, `merge` and `fuse` leave behind, and how it is read again.

    config.json        what was asked for; a run continues only with the same
    splits.json        {"folds": [{"train": [ids], "validation": [ids], "test": [ids]}, ...]}
    outcome.csv        patient, time and event, or label
    folds/0/           model.safetensors, fitted.json (scaling, objective), predictions.csv and,
                       written last, done.json (history, seconds)
    predictions.csv    out of fold: all folds' predictions of their test parts
    metrics.json       see docs/concepts/evaluation.md
    README.md          of `motet merge`: the card, which names the parts
    log.txt

Every file is written whole or not at all, so that a run that was killed goes on where it stopped.
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
# What may differ between a run and its continuation.
_FREE = ("motet", "data", "cohort")
# What may lie in a folder before config.json does: a run stopped in its first moments leaves these.
_BEFORE = ("blocks", "folds", "splits.json", "outcome.csv")


class RunError(ValueError):
    """A run folder that does not serve, in one line."""


@dataclass(frozen=True)
class Run:
    """A run folder.

    Args:
        path: the folder.
        config: what was asked for.
        splits: one dict per fold, part name to patient ids.
    """

    path: Path
    config: dict[str, Any]
    splits: list[dict[str, list[str]]]

    @property
    def task(self) -> Task:
        """What the model was asked for."""
        return task_of_config(self.config)

    @classmethod
    def create(
        cls,
        path: Path,
        config: dict[str, Any],
        splits: list[dict[str, list[str]]],
        outcome: pd.DataFrame,
    ) -> "Run":
        """Make the folder, or continue one that was made with the same configuration.

        Raises:
            RunError: the folder holds something else.
        """
        config = {"format": FORMAT, **config}
        known = cls.check_free(path, config["model"])
        if known is not None and known.begun():
            differs = [
                key
                for key in sorted({*config, *known.config})
                if key not in _FREE and config.get(key) != known.config.get(key)
            ]
            if "fingerprint" in differs:
                raise RunError(f"{path}: the data of {config['cohort']} changed since the run")
            if not differs and known.splits != splits:
                raise RunError(
                    f"{path}: holds a run with other splits (--splits, --test, --validation, "
                    "--seed or split files); choose another --out, or remove the folder"
                )
            if differs:
                key = differs[0]
                raise RunError(
                    f"{path}: holds a run with {key} {_shortened(known.config.get(key))}, got "
                    f"{_shortened(config.get(key))}; choose another --out, or remove the folder"
                )
            write_text(path / "outcome.csv", outcome.to_csv(index=False))  # should it be cut short
            return known
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path, config, splits)
        write_text(path / "splits.json", json.dumps({"folds": splits}))
        write_text(path / "outcome.csv", outcome.to_csv(index=False))
        write_text(path / "config.json", json.dumps(config, indent=2))
        return run

    @classmethod
    def check_free(cls, path: Path, model: str) -> "Run | None":
        """Return the run at a path, None if there is none yet.

        Raises:
            RunError: the folder holds something else, or a run of another model.
        """
        if (path / "config.json").exists():
            known = cls.open(path)
            if known.begun() and known.config["model"] != model:
                raise RunError(
                    f"{path}: holds a run with model {_shortened(known.config['model'])}, got "
                    f"{_shortened(model)}; choose another --out, or remove the folder"
                )
            return known
        if path.exists() and not path.is_dir():
            raise RunError(f"{path}: expected a folder, got a file")
        if path.exists() and any(
            item.name not in _BEFORE and item.name[0] != "." for item in path.iterdir()
        ):
            raise RunError(f"{path}: expected a new or empty folder, or a run to continue")
        return None

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Read a run, finished or not.

        Raises:
            RunError: no run, or one of a newer format.
        """
        if not path.is_dir():
            raise RunError(f"{path}: no such run folder")
        if not (path / "config.json").is_file():
            raise RunError(f"{path}: not a run folder, or one that was never begun: no config.json")
        try:
            config = json.loads((path / "config.json").read_text())
            if config["format"] > FORMAT:
                raise RunError(
                    f"{path}: format {config['format']} was written by motet "
                    f"{config.get('motet')}; this motet reads up to format {FORMAT}"
                )
            splits = json.loads((path / "splits.json").read_text())["folds"]
        except FileNotFoundError as error:
            raise RunError(f"{path}: half-written, without {error.filename}") from error
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise RunError(f"{path}: corrupt, config.json or splits.json: {error}") from error
        return cls(path, config, splits)

    @classmethod
    def finished(cls, path: Path) -> "Run":
        """Read a run whose folds are all done.

        Raises:
            RunError: they are not.
        """
        run = cls.open(path)
        for fold in range(len(run.splits)):
            if not run.done(fold):
                raise RunError(
                    f"{path}: half-written, fold {fold + 1} of {len(run.splits)} is not done; run "
                    f"the same `motet {run.config['command']}` again to finish it"
                )
        return run

    def fold(self, number: int) -> Path:
        """Return the folder of a fold."""
        return self.path / "folds" / str(number)

    def begun(self) -> bool:
        """Return whether anything was trained; a run refused before that may be begun otherwise."""
        folds = self.path / "folds"
        return any(folds.glob("*/done.json")) or any(folds.glob("*/last.ckpt"))

    def done(self, number: int) -> bool:
        """Return whether a fold is complete: `done.json` names its files and their sizes."""
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
        fitted: Fitted | None,
    ) -> None:
        """Write a fold; `done.json` is last."""
        folder = self.fold(number)
        folder.mkdir(parents=True, exist_ok=True)
        if fitted is not None:
            fitted.save(folder)
        write_text(folder / "predictions.csv", predictions.to_csv(index=False))
        names = ["predictions.csv"]
        if fitted is not None:
            names += ["model.safetensors", "fitted.json"]
        sizes = {name: (folder / name).stat().st_size for name in names}
        write_text(folder / "done.json", json.dumps({**facts, "bytes": sizes}))

    def fitted(self, number: int) -> Fitted:
        """Read the model of a fold.

        Raises:
            RunError: a baseline, whose models are not kept, or a file that is lost or corrupt.
        """
        folder = self.fold(number)
        if not (folder / "fitted.json").exists():
            raise RunError(
                f"{self.path}: keeps no model to predict with (model {self.config['model']})"
            )
        try:
            return Fitted.load(folder)
        except (OSError, ValueError) as error:
            raise RunError(str(error)) from error

    def facts(self, number: int) -> dict[str, Any]:
        """Return what `done.json` of a fold holds."""
        return json.loads((self.fold(number) / "done.json").read_text())

    def predictions(self) -> pd.DataFrame:
        """Return the predictions out of fold: patient, fold, then those of the `Task`."""
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
        known = {patient for fold in self.splits for part in fold.values() for patient in part}
        if not known <= set(frame.index):
            raise RunError(f"{path}: half-written, it lacks patients of splits.json")
        return frame

    def tested(self, only: Set[str] | None = None) -> list[SurvivalFold] | list[ClassFold]:
        """Return the test parts for evaluation, all patients or some."""
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
        RunError: another one is writing.
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


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
