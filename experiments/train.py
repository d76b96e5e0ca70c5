"""Train a model on every split of a cohort, and evaluate it out of fold.

In each split, scaling, time bins and weights are fitted on the training part, the validation part
decides when the training stops, and the test part is predicted once. Every finished fold is on disk
before the next one starts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..fusion.modalities import check_names
from ..fusion.training import rank
from ..io import Cohort, Split
from .fit import EachEpoch, FoldResult, build_block, build_network, fit_baseline, fit_network
from .fold import Fold
from .folds import split_cohort
from .join import merge_runs
from .run import RunSpec, execute_run, run_config
from .run_folder import Run
from .settings import BASELINES, MODELS, Settings, Splits
from .task import task_of


@dataclass(frozen=True)
class FitModel:
    """Fits HEALNet, a LegoBlock or a baseline on the folds of a cohort.

    Args:
        cohort: the patients.
        modalities: the modalities to use; one for a LegoBlock.
        model: healnet, block or a baseline.
        settings: of the model. The seed of the training is also that of a baseline.
    """

    cohort: Cohort
    modalities: Sequence[str]
    model: str
    settings: Settings

    def __call__(
        self, number: int, split: Split, folder: Path, each_epoch: EachEpoch
    ) -> FoldResult:
        settings = self.settings
        fold = Fold.learn(self.cohort, self.modalities, split, number, settings.goal)
        if self.model in BASELINES:
            fit = task_of(self.cohort).baselines[self.model]
            return fit_baseline(fit, fold, settings.training.seed)
        build = build_network if self.model == "healnet" else build_block
        return fit_network(build(fold, settings), fold, settings.training, folder, each_epoch)


def train_run(
    cohort: Cohort,
    model: str,
    out: Path,
    *,
    modalities: Sequence[str] | None = None,
    changes: Mapping[str, Any] | None = None,
    splits: Splits | None = None,
) -> Run:
    """Train a model on every split of a cohort, and evaluate it out of fold.

    Args:
        cohort: the patients.
        model: one of MODELS; "lego" trains a block per modality in `out/blocks` and merges them.
        out: the run folder. If it holds the same run, unfinished, that run is continued.
        modalities: the modalities to use; None for all.
        changes: settings that differ from the defaults.
        splits: how to draw the splits; not used if the cohort has split files.

    Returns:
        The finished run.

    Raises:
        ValueError: settings or a cohort that cannot be used, in one line.
    """
    splits = splits or Splits()
    if model not in MODELS:
        raise ValueError(f"--model: expected one of {', '.join(MODELS)}, got {model!r}")
    names = _choose_modalities(cohort, modalities)
    settings = Settings.of(model, changes or {}, seed=splits.seed)
    _check_task(cohort, model, settings)
    folds = split_cohort(cohort, splits)

    def fit(kind: str, names: list[str], folder: Path) -> Run:
        config = run_config(cohort, kind, names, settings, command="train")
        return execute_run(
            RunSpec(cohort, folds, config, folder), FitModel(cohort, names, kind, settings)
        )

    if model != "lego":
        return fit(model, names, out)
    if not rank():
        Run.check_free(out, "merge")  # before hours of training, not after
    blocks = [fit("block", [name], out / "blocks" / name) for name in names]
    return merge_runs(blocks, out, cohort=cohort, command="train")


def _choose_modalities(cohort: Cohort, names: Sequence[str] | None) -> list[str]:
    """Return the names of the modalities to use, in the cohort's order."""
    if names is None:
        names = list(cohort.modalities)
    unknown = [name for name in names if name not in cohort.modalities]
    if unknown or not names:
        raise ValueError(
            f"--modalities: expected some of {', '.join(cohort.modalities)}, got "
            f"{', '.join(unknown) or 'none'}"
        )
    in_order = [name for name in cohort.modalities if name in names]
    check_names("modalities", in_order)
    return in_order


def _check_task(cohort: Cohort, model: str, settings: Settings) -> None:
    task = task_of(cohort)
    if model in BASELINES and model not in task.baselines:
        raise ValueError(
            f"--model: expected {', '.join(task.baselines)} for {task.outcome_name}, got {model}"
        )
    settings.goal.check(task.losses)
