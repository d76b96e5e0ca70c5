"""Join the LegoBlocks of finished runs, fold by fold, as LegoMerge or as LegoFuse."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from ..fusion.lego_block import LegoBlock
from ..fusion.lego_fuse import LegoFuse
from ..fusion.lego_merge import LegoMerge
from ..fusion.objectives import Objective
from ..fusion.preprocessing import Scaling
from ..fusion.training import History, Training, rank
from ..io import Cohort, Split, load_cohort
from .fit import EachEpoch, FoldResult, finish_network, fit_network
from .fold import Fold
from .folds import PARTS
from .run import RunSpec, execute_run, run_config
from .run_folder import Run, RunError
from .settings import Goal, Settings


@dataclass(frozen=True)
class JoinBlocks:
    """Joins the blocks of one fold and fine-tunes them if there is a training.

    Args:
        runs: runs of LegoBlocks.
        cohort: the cohort of the runs.
        model: LegoMerge or LegoFuse.
        options: arguments of the model.
        training: settings of the fine-tuning; None for no training.
    """

    runs: Sequence[Run]
    cohort: Cohort
    model: type[LegoMerge] | type[LegoFuse]
    options: Mapping[str, Any]
    training: Training | None = None

    def __call__(
        self, number: int, split: Split, folder: Path, each_epoch: EachEpoch
    ) -> FoldResult:
        blocks, scaling, objective = _blocks_of_fold(self.runs, number)
        model = self.model(blocks, **self.options)
        fold = Fold.of(self.cohort, split, number, scaling, objective)
        if self.training is None:
            return finish_network(model, fold, History())
        return fit_network(model, fold, self.training, folder, each_epoch)


def merge_runs(
    runs: Sequence[Run], out: Path, *, cohort: Cohort, command: str = "merge", **options: Any
) -> Run:
    """Merge the LegoBlocks of several runs, fold by fold, with no training.

    Args:
        runs: finished runs of LegoBlocks.
        out: the new run folder.
        cohort: the cohort of the runs.
        command: the command that the user typed, for the configuration.
        **options: arguments of LegoMerge.

    Raises:
        ValueError: runs that do not fit each other.
    """
    if rank():  # nothing to train; and the first process may still be writing the blocks
        return Run(out, {}, [])
    _check_fit(runs)
    config = _make_config(runs, cohort, "merge", command, options)
    spec = RunSpec(cohort, splits_of(runs[0]), config, out)
    return execute_run(spec, JoinBlocks(runs, cohort, LegoMerge, options))


def fuse_runs(
    runs: Sequence[Run],
    out: Path,
    *,
    cohort: Cohort,
    changes: Mapping[str, Any] | None = None,
    **options: Any,
) -> Run:
    """Fuse the LegoBlocks of several runs, fold by fold, and fine-tune them.

    Args:
        runs: finished runs of LegoBlocks.
        out: the new run folder.
        cohort: the cohort of the runs.
        changes: settings of the training that differ from the defaults.
        **options: arguments of LegoFuse.

    Raises:
        ValueError: runs that do not fit each other.
    """
    _check_fit(runs)
    seed = runs[0].config["training"]["seed"]
    training = Settings.of("fuse", changes or {}, seed=seed).training
    config = _make_config(runs, cohort, "fuse", "fuse", options)
    config["training"] = asdict(training)
    spec = RunSpec(cohort, splits_of(runs[0]), config, out)
    return execute_run(spec, JoinBlocks(runs, cohort, LegoFuse, options, training))


def blocks_of(paths: Sequence[Path]) -> list[Run]:
    """Return the runs of LegoBlocks in some folders: runs of a block, or runs of `--model lego`.

    Raises:
        RunError: a folder without LegoBlocks, or a run that is not finished.
    """
    runs = []
    for path in paths:
        folders = [path]
        if (path / "blocks").is_dir():
            folders = [path / "blocks" / name for name in Run.open(path).config["modalities"]]
        for folder in folders:
            run = Run.finished(folder)
            if run.config["model"] != "block":
                raise RunError(
                    f"{folder}: expected LegoBlocks (motet train --model lego), got model "
                    f"{run.config['model']}"
                )
            runs.append(run)
    return runs


def cohort_of(run: Run, data: Path | None = None) -> Cohort:
    """Load the cohort of a run.

    Args:
        run: finished or not.
        data: folder of the cohort's files; None for the folder in the run's configuration.

    Raises:
        ValueError: the files are missing, or have changed since the run.
    """
    data = data or (None if run.config["data"] is None else Path(run.config["data"]))
    cohort = load_cohort(run.config["cohort"], data=data)
    if cohort.fingerprint() != run.config["fingerprint"]:
        raise RunError(f"{run.path}: the data of {run.config['cohort']} changed since the run")
    return cohort


def splits_of(run: Run) -> list[Split]:
    """Return the patients of the parts of every fold of a run."""
    return [Split(*(tuple(parts[name]) for name in PARTS)) for parts in run.splits]


def _check_fit(runs: Sequence[Run]) -> None:
    """Raise unless the runs have the same cohort and the same splits."""
    if not runs:
        raise ValueError("runs: expected at least one, got none")
    first = runs[0]
    for run in runs[1:]:
        if run.config["fingerprint"] != first.config["fingerprint"]:
            raise RunError(
                f"{run.path}: expected the cohort of {first.path}, got another; to merge their "
                "blocks, put all modalities into one YAML and train with --modalities one by one"
            )
        if run.splits != first.splits:
            raise RunError(
                f"{run.path}: expected the splits of {first.path}, got others, so that a patient "
                "would be tested whom one of the blocks was trained on"
            )


def _make_config(
    runs: Sequence[Run], cohort: Cohort, model: str, command: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the configuration of a run of joined blocks; it has the digests of their weights."""
    names = [run.config["modalities"][0] for run in runs]
    digests = [_compute_digest(run) for run in runs]
    settings = Settings({**options, "blocks": digests}, Training(), Goal(**runs[0].config["goal"]))
    return run_config(cohort, model, names, settings, command=command)


def _compute_digest(run: Run) -> str:
    """Return a SHA-256 of the weights of all folds; another training gives another one."""
    digest = hashlib.sha256()
    for number in range(len(run.splits)):
        digest.update((run.fold(number) / "model.safetensors").read_bytes())
    return digest.hexdigest()


def _blocks_of_fold(
    runs: Sequence[Run], number: int
) -> tuple[dict[str, LegoBlock], dict[str, Scaling], Objective]:
    """Return the blocks of one fold by modality, their scalings, and the objective they share."""
    blocks, scaling, objective = {}, {}, None
    for run in runs:
        fitted = run.fitted(number)
        assert isinstance(fitted.model, LegoBlock)
        (name,) = fitted.scaling
        if name in blocks:
            raise RunError(f"{run.path}: a second block of modality {name!r}")
        block_objective = cast(Objective, fitted.objective).untrained()
        if objective is not None and block_objective != objective:
            raise RunError(
                f"{run.path}: expected the objective of {runs[0].path}, {objective.describe()}, "
                f"got {block_objective.describe()}; train the blocks on the same cohort and splits"
            )
        blocks[name], scaling[name], objective = fitted.model, fitted.scaling[name], block_objective
    assert objective is not None
    return blocks, scaling, objective
