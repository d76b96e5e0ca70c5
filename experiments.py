"""What the commands `train`, `merge`, `fuse`, `evaluate` and `predict` do, on any cohort.

Each split's training part fits scaling, bins and weights, its validation part stops the training,
its test part is predicted once. Every finished fold is on disk before the next one starts.
"""

import hashlib
import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from ._atomic import write_text
from ._checks import integer
from .fusion.baselines import (
    ClassBaseline,
    SurvivalBaseline,
    class_forest,
    flat,
    logistic,
    ridge_cox,
    survival_forest,
)
from .fusion.encoders import ABMIL, SNN
from .fusion.evaluation import (
    Comparison,
    compare_classes,
    compare_survival,
    evaluate_classes,
    evaluate_survival,
)
from .fusion.fitted import Fitted, Predictions, RiskScale, time_grid
from .fusion.healnet import HEALNet
from .fusion.lego_block import LegoBlock
from .fusion.lego_join import LegoFuse, LegoMerge
from .fusion.modalities import Tabular, check_names
from .fusion.objectives import Classification, CoxSurvival, DiscreteSurvival, Objective
from .fusion.patients import Patients, modalities_of
from .fusion.preprocessing import Scaling, fit_scaling
from .fusion.splits import carve, split
from .fusion.training import History, Training, rank, train
from .io import Classes, Cohort, Survival, load_cohort
from .runs import Run, RunError, locked, table_of

BASELINES = ("cox", "rsf", "logistic", "forest")
MODELS = ("healnet", "lego", *BASELINES)

# Chosen on validation parts of tcga_blca, tcga_kirp, hancock_os and breast_cancer, among some 20
# settings of HEALNet and 30 of LegoBlocks; few of them differ by more than chance.
RECIPES: dict[str, dict[str, Any]] = {
    "healnet": {
        "num_latents": 16, "latent_dim": 32, "depth": 2, "heads": 1, "head_dim": 16,
        "attn_dropout": 0.5, "ff_dropout": 0.5, "epochs": 20, "max_lr": 0.001, "batch_size": 16,
        "patience": 10, "l2": 1e-2,
    },
    "lego": {
        "num_latents": 16, "latent_dim": 16, "depth": 2, "heads": 8, "head_dim": 16,
        "attn_dropout": 0.1, "ff_dropout": 0.5, "epochs": 20, "max_lr": 0.002, "batch_size": 32,
        "patience": 5, "l1": 1e-4, "l2": 1e-2,
    },
    "fuse": {"epochs": 2, "max_lr": 0.002, "batch_size": 16, "patience": 2, "l2": 1e-2},
}  # fmt: skip


@dataclass(frozen=True)
class Goal:
    """What to train for.

    Args:
        loss: "nll" (discrete time) or "cox" for survival, "cross_entropy" for classes; None takes
            the first that fits the cohort.
        bins: number of time bins of "nll".
        alpha: of `nll_loss`.
        weighted: weigh bins or classes by the inverse of their size.
    """

    loss: str | None = None
    bins: int = 4
    alpha: float = 0.0
    weighted: bool = False


@dataclass(frozen=True)
class Splits:
    """How to split a cohort that has no split files; see `motet.fusion.splits.split`."""

    count: int = 5
    test: float = 0.15
    validation: float = 0.15
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """Settings of a model, its training and its goal, from recipe and `--set`."""

    model: dict[str, Any]
    training: Training
    goal: Goal

    @classmethod
    def of(cls, kind: str, changes: Mapping[str, Any], *, seed: int) -> "Plan":
        """Apply changes to a model's recipe.

        Raises:
            ValueError: an unknown setting, or a value outside its range.
        """
        builder = {"healnet": HEALNet, "lego": LegoBlock}.get(kind)
        options: set[str] = set()
        if builder is not None:
            options = set(inspect.signature(builder).parameters)
            options -= {"modalities", "modality", "encoder", "encoder_dim", "out_features"}
            options |= {"tokens"} if kind == "healnet" else {"encoders"}
        training = {f.name for f in fields(Training)} - {"seed"}
        goal = {f.name for f in fields(Goal)}
        known = set(options)
        known |= training if kind in RECIPES else set()
        known |= goal if kind in ("healnet", "lego") else set()
        for name in changes:
            if name not in known:
                close = get_close_matches(name, known, 1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ValueError(f"--set: unknown setting {name!r} of {kind}{hint}")
            if not isinstance(changes[name], str | int | float | None):
                raise ValueError(f"--set {name}: expected a number or a word, got {changes[name]}")
        chosen = {**RECIPES.get(kind, {}), **changes}

        def part(names: set[str]) -> dict[str, Any]:
            return {name: value for name, value in chosen.items() if name in names}

        return cls(part(options), Training(**part(training), seed=seed), Goal(**part(goal)))


@dataclass(frozen=True)
class Part:
    """One part of a split."""

    ids: tuple[str, ...]
    outcome: tuple[NDArray[Any], ...]
    """Times and events, or labels, [n] each."""


Progress = Callable[[History], None]


def source_of(cohort: Cohort, path: str, data: Path | None) -> dict[str, Any]:
    """Return what a run's configuration says of where its cohort came from."""
    if Path(path).is_file():
        path = str(Path(path).resolve())
    return {
        "cohort": path,
        "data": None if data is None else str(data.resolve()),
        "fingerprint": cohort.fingerprint(),
    }


def train_run(
    cohort: Cohort,
    source: Mapping[str, Any],
    kind: str,
    out: Path,
    *,
    modalities: Sequence[str] | None = None,
    changes: Mapping[str, Any] | None = None,
    splits: Splits | None = None,
) -> Run:
    """Train a model on every split of a cohort, and evaluate it out of fold.

    Args:
        cohort: the patients.
        source: see `source_of`.
        kind: one of MODELS; "lego" trains a block per modality in `out/blocks` and merges them.
        out: the run folder; continued if it holds the same run, unfinished.
        modalities: those to use; None for all.
        changes: settings that differ from the recipe.
        splits: how to split, unless the cohort has split files.

    Returns:
        The finished run.

    Raises:
        ValueError: settings or a cohort that do not serve, in one line.
    """
    splits = splits or Splits()
    if kind not in MODELS:
        raise ValueError(f"--model: expected one of {', '.join(MODELS)}, got {kind!r}")
    cohort = _with_modalities(cohort, modalities)
    check_names("modalities", cohort.modalities)
    plan = Plan.of(kind, changes or {}, seed=splits.seed)
    _check_goal(plan.goal, cohort, kind)
    parts = parts_of(cohort, splits)
    if kind == "lego":
        if not rank():
            Run.check_free(out, "merge")  # before hours of training, not after them
        blocks = []
        for name in cohort.modalities:
            config = _config(cohort, source, "block", [name], plan, command="train")
            blocks.append(
                _run(cohort, config, parts, out / "blocks" / name, trainer(cohort, name, plan))
            )
        return merge_runs(blocks, out, cohort=cohort, source=source, command="train")
    config = _config(cohort, source, kind, list(cohort.modalities), plan, command="train")
    work = trainer(cohort, None, plan) if kind == "healnet" else _baseline(cohort, kind, splits)
    return _run(cohort, config, parts, out, work)


def merge_runs(
    runs: Sequence[Run],
    out: Path,
    *,
    cohort: Cohort,
    source: Mapping[str, Any],
    command: str = "merge",
    **options: Any,
) -> Run:
    """Merge the LegoBlocks of several runs, fold by fold, with no training.

    Args:
        runs: finished runs of blocks.
        out: the new run folder.
        cohort: that of the runs.
        source: see `source_of`.
        command: what was typed, for the configuration.
        **options: of LegoMerge.

    Raises:
        ValueError: runs that do not fit each other.
    """
    if rank():  # there is nothing to train, and the first process may still be writing the blocks
        return Run(out, {}, [])
    parts, config = _joint(runs, cohort, source, "merge", command, options)
    return _run(cohort, config, parts, out, _joiner(runs, cohort, LegoMerge, options, None))


def fuse_runs(
    runs: Sequence[Run],
    out: Path,
    *,
    cohort: Cohort,
    source: Mapping[str, Any],
    changes: Mapping[str, Any] | None = None,
    **options: Any,
) -> Run:
    """Fuse the LegoBlocks of several runs, fold by fold, and fine-tune them.

    Args:
        runs: finished runs of blocks.
        out: the new run folder.
        cohort: that of the runs.
        source: see `source_of`.
        changes: settings of the training that differ from the recipe.
        **options: of LegoFuse.

    Raises:
        ValueError: runs that do not fit each other.
    """
    seed = runs[0].config["training"]["seed"]
    plan = Plan.of("fuse", changes or {}, seed=seed)
    parts, config = _joint(runs, cohort, source, "fuse", "fuse", options)
    config["training"] = asdict(plan.training)
    return _run(cohort, config, parts, out, _joiner(runs, cohort, LegoFuse, options, plan))


def blocks_of(paths: Sequence[Path]) -> list[Run]:
    """Find the runs of LegoBlocks at some folders: blocks, or runs of `--model lego`.

    Raises:
        RunError: a folder that holds none, or a run that is not finished.
    """
    runs = []
    for path in paths:
        found = [path]
        if (path / "blocks").is_dir():
            found = [path / "blocks" / name for name in Run.open(path).config["modalities"]]
        for folder in found:
            run = Run.finished(folder)
            if run.config["model"] != "block":
                raise RunError(
                    f"{folder}: expected LegoBlocks (motet train --model lego), got model "
                    f"{run.config['model']}"
                )
            runs.append(run)
    return runs


def evaluate_run(run: Run, *, draws: int = 1000) -> dict[str, Any]:
    """Compute the metrics of a finished run's out-of-fold predictions.

    Where nobody was tested (a LegoBlock predicts only those who have its modality), or too few to
    evaluate, the counts and the reason are given alone.
    """
    tested = run.tested()
    if not tested:
        return {"patients": 0, "folds": 0}
    evaluate = evaluate_survival if run.config["classes"] is None else evaluate_classes
    try:
        return evaluate(cast(Any, tested), draws=draws)
    except ValueError as error:
        return {"patients": sum(map(len, tested)), "folds": len(tested), "reason": str(error)}


def read_metrics(run: Run) -> dict[str, Any]:
    """Return the metrics of a finished run as they were written."""
    try:
        return json.loads((run.path / "metrics.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise RunError(f"{run.path}: half-written, metrics.json cannot be read: {error}") from error


def compare_runs(run: Run, other: Run, *, draws: int = 1000) -> Comparison:
    """Compare two runs on the test patients that both predicted: how much better is `run`.

    A LegoBlock predicts only those who have its modality.

    Raises:
        RunError: runs of other splits, or of other outcomes.
    """
    if run.splits != other.splits or not run.outcome().equals(other.outcome()):
        raise RunError(f"{other.path}: expected the splits and outcomes of {run.path}, got others")
    both = set(run.predictions()["patient"]) & set(other.predictions()["patient"])
    if not both:
        raise RunError(f"{other.path}: predicts no test patient that {run.path} predicts")
    mine, theirs = (cast(Any, one.tested(both)) for one in (run, other))
    compare = compare_survival if run.config["classes"] is None else compare_classes
    return compare(mine, theirs, draws=draws)


def predict(run: Run, cohort: Cohort) -> pd.DataFrame:
    """Predict patients with the models of all folds.

    Risks of different folds have no common scale: each is expressed in standard deviations from the
    mean of its own training patients, then averaged over the folds. Curves and probabilities are
    averaged as they are, curves at the times of the first fold.

    Args:
        run: finished.
        cohort: patients, with all, some or one of the run's modalities.

    Returns:
        A table: patient, modalities (those the patient has), seen (folds trained on a patient of
        that id), then risk and survival by time, or probabilities by class.

    Raises:
        ValueError: a cohort without any of the run's modalities, or with other columns.
    """
    names = run.config["modalities"]
    shared = {name: cohort.modalities[name] for name in names if name in cohort.modalities}
    if not shared:
        raise ValueError(
            f"{cohort.name}: expected at least one modality of the run ({', '.join(names)}), got "
            f"{', '.join(cohort.modalities)}"
        )
    risks, curves, probabilities, grid = [], [], [], None
    held = None
    ids = np.asarray(cohort.patients)
    for number in range(len(run.splits)):
        fitted = run.fitted(number)
        patients = fitted.patients(shared, cohort.patients)
        held = torch.stack([patients.has(name) for name in names])
        predictions = fitted.predict(patients)
        said = predictions.risk if predictions.probabilities is None else predictions.probabilities
        assert said is not None
        bad = ids[~np.isfinite(said.reshape(len(ids), -1)).all(1)]
        if len(bad):
            raise ValueError(
                f"{cohort.name}: expected finite predictions, got others for patient {bad[0]!r} "
                f"({len(bad)} in all): a value far beyond those of training?"
            )
        if predictions.probabilities is not None:
            probabilities.append(predictions.probabilities)
            continue
        assert predictions.risk is not None
        assert predictions.curves is not None
        assert fitted.scale is not None
        assert predictions.grid is not None
        risks.append((predictions.risk - fitted.scale.mean) / fitted.scale.sd)
        grid = predictions.grid if grid is None else grid
        own = np.array([0.0, *predictions.grid])
        curves.append(np.stack([np.interp(grid, own, [1.0, *c]) for c in predictions.curves]))
    assert held is not None
    trained = [{*parts["train"], *parts["validation"]} for parts in run.splits]
    table = pd.DataFrame(
        {
            "patient": list(cohort.patients),
            "modalities": [
                " ".join(name for name, there in zip(names, row, strict=True) if there)
                for row in held.T.tolist()
            ],
            "seen": [sum(patient in ids for ids in trained) for patient in cohort.patients],
        }
    )
    if run.config["classes"] is not None:
        for name, column in zip(
            run.config["classes"], np.mean(probabilities, axis=0).T, strict=True
        ):
            table[f"p_{name}"] = column
        return table
    assert grid is not None
    table["risk"] = np.mean(risks, axis=0)
    every = slice(3, None, 4)  # eight times
    unit = run.config["unit"]
    for at, column in zip(grid[every], np.mean(curves, axis=0).T[every], strict=True):
        table[f"survival at {at:.4g} {unit}"] = column
    return table


def cohort_of(run: Run, data: Path | None = None) -> tuple[Cohort, dict[str, Any]]:
    """Load the cohort that a run was made on; return it with its source.

    Raises:
        ValueError: its files are gone, or have changed.
    """
    data = data or (None if run.config["data"] is None else Path(run.config["data"]))
    cohort = load_cohort(run.config["cohort"], data=data)
    if cohort.fingerprint() != run.config["fingerprint"]:
        raise RunError(f"{run.path}: the data of {run.config['cohort']} changed since the run")
    return cohort, source_of(cohort, run.config["cohort"], data)


@dataclass(frozen=True)
class Work:
    """What came of one fold."""

    predictions: Predictions
    fitted: Fitted | None
    history: History = field(default_factory=History)
    scale: RiskScale | None = None
    seconds: float = 0.0
    parameters: int = 0


Worker = Callable[[int, Mapping[str, Part], Path, Progress], Work]


def _run(
    cohort: Cohort,
    config: dict[str, Any],
    parts: Sequence[Mapping[str, Part]],
    out: Path,
    work: Worker,
) -> Run:
    """Do what is left of a run: folds, then out-of-fold predictions and metrics."""
    ids = [{name: list(part.ids) for name, part in fold.items()} for fold in parts]
    if not rank():
        Run.check_free(out, config["model"])  # before anything is put there, the lock included
    else:
        for number, fold in enumerate(parts):
            folder = out / "folds" / str(number)
            if not (folder / "done.json").is_file():
                work(number, fold, folder, lambda history: None)
        return Run(out, config, ids)
    with locked(out):
        run = Run.create(out, config, ids, _outcome_table(cohort))
        label = f"{config['model']} {' + '.join(config['modalities'])}"
        epochs = (config["training"] or {}).get("epochs", 1)
        with tqdm(total=len(parts) * epochs, disable=None, unit="epoch", leave=False) as bar:
            for number, fold in enumerate(parts):
                bar.set_description(f"{label}, fold {number + 1}/{len(parts)}")
                if not run.done(number):
                    _fold(run, number, fold, work, bar)
                bar.update((number + 1) * epochs - bar.n)
        try:
            read_metrics(run)
        except RunError:
            write_text(out / "predictions.csv", run.predictions().to_csv(index=False))
            write_text(out / "metrics.json", json.dumps(evaluate_run(run), indent=2))
            run.log("finished")
    return run


def _fold(run: Run, number: int, parts: Mapping[str, Part], work: Worker, bar: tqdm) -> None:
    name = f"fold {number + 1}/{len(run.splits)}"
    sizes = ", ".join(f"{part} {len(p.ids)}" for part, p in parts.items())
    run.log(f"{name}: {sizes} patients")

    def progress(history: History) -> None:
        loss, epoch = history.validation_loss[-1], len(history.validation_loss)
        bar.set_postfix(validation=f"{loss:.4f}", best=history.best_epoch)
        bar.update()
        run.log(
            f"{name}: epoch {epoch}: train {history.train_loss[-1]:.6g}, validation {loss:.6g}, "
            f"{history.seconds[-1]:.2f} s"
        )

    result = work(number, parts, run.fold(number), progress)
    classes = run.config["classes"]
    facts = {
        "seconds": result.seconds,
        "parameters": result.parameters,
        "history": asdict(result.history),
        "cut": None if result.scale is None else result.scale.cut,
        "grid": None if result.predictions.grid is None else result.predictions.grid.tolist(),
    }
    run.finish_fold(number, table_of(result.predictions, classes), facts, result.fitted)
    run.log(f"{name}: done in {result.seconds:.1f} s")


def trainer(cohort: Cohort, modality: str | None, plan: Plan) -> Worker:
    """Return what trains HEALNet on all modalities, or a LegoBlock on one."""
    chosen = cohort if modality is None else _with_modalities(cohort, [modality])

    def work(number: int, parts: Mapping[str, Part], folder: Path, progress: Progress) -> Work:
        started = time.perf_counter()
        scaling = _scaling(chosen, parts, number)
        # Bins from all training patients, also where a block trains on some: so blocks fit.
        objective = _objective(plan.goal, cohort, parts["train"].outcome)
        torch.manual_seed(plan.training.seed * 1_009 + number)
        model = _build(scaling, objective, plan, modality)
        history = _fit(chosen, parts, model, scaling, objective, plan, number, folder, progress)
        return _worked(chosen, parts, model, scaling, objective, history, started)

    return work


def _build(
    scaling: dict[str, Scaling], objective: Objective, plan: Plan, modality: str | None
) -> nn.Module:
    options, shapes = dict(plan.model), modalities_of(scaling)
    if modality is None:
        tokens = options.pop("tokens", "row")
        shapes = {
            name: replace(shape, tokens=tokens) if isinstance(shape, Tabular) else shape
            for name, shape in shapes.items()
        }
        return HEALNet(shapes, out_features=objective.out_features, **options)
    shape, encoder = shapes[modality], None
    encoders = options.pop("encoders", None)
    if encoders not in (None, "paper"):
        raise ValueError(f"--set encoders: expected null or paper, got {encoders!r}")
    if encoders == "paper":
        kind = SNN if isinstance(shape, Tabular) else ABMIL
        encoder = kind(shape.channels)
    return LegoBlock(shape, encoder, out_features=objective.out_features, **options)


def _fit(
    cohort: Cohort,
    parts: Mapping[str, Part],
    model: nn.Module,
    scaling: dict[str, Scaling],
    objective: Objective,
    plan: Plan,
    number: int,
    folder: Path,
    progress: Progress,
) -> History:
    folder.mkdir(parents=True, exist_ok=True)

    def patients(name: str) -> Patients:
        some, outcome = _having(cohort, scaling, parts[name])
        if not len(some):
            raise ValueError(
                f"fold {number + 1}: nobody in its {name} part has {' or '.join(scaling)}"
            )
        return replace(some, target=cast(Any, objective).target(*outcome))

    return train(
        model,
        objective,
        patients("train"),
        patients("validation"),
        replace(plan.training, seed=plan.training.seed * 1_009 + number),
        resume=folder,
        each_epoch=progress,
    )


def _worked(
    cohort: Cohort,
    parts: Mapping[str, Part],
    model: nn.Module,
    scaling: dict[str, Scaling],
    objective: Objective,
    history: History,
    started: float,
) -> Work:
    patients, outcome = _having(cohort, scaling, parts["train"])
    fitted = Fitted.finish(model, scaling, objective, patients, outcome)
    predictions = fitted.predict(_having(cohort, scaling, parts["test"])[0])
    count = sum(p.numel() for p in model.parameters())
    seconds = time.perf_counter() - started
    return Work(predictions, fitted, history, fitted.scale, seconds, count)


def _scaling(cohort: Cohort, parts: Mapping[str, Part], number: int) -> dict[str, Scaling]:
    try:
        return fit_scaling(cohort.modalities, parts["train"].ids)
    except ValueError as error:
        raise ValueError(f"fold {number + 1}: {error}") from error


def _having(
    cohort: Cohort, scaling: dict[str, Scaling], part: Part
) -> tuple[Patients, tuple[NDArray[Any], ...]]:
    """Return the patients of a part that have any of the modalities, scaled, and their outcome."""
    patients = Patients.of(cohort.modalities, scaling, part.ids)
    has = torch.stack([patients.has(name) for name in scaling]).any(0)
    return patients.take(has), tuple(values[has.numpy()] for values in part.outcome)


def _baseline(cohort: Cohort, kind: str, splits: Splits) -> Worker:
    def work(number: int, parts: Mapping[str, Part], folder: Path, progress: Progress) -> Work:
        started = time.perf_counter()
        scaling = _scaling(cohort, parts, number)
        train, outcome = _having(cohort, scaling, parts["train"])
        held, held_outcome = _having(cohort, scaling, parts["validation"])
        test = _having(cohort, scaling, parts["test"])[0]
        seed, ids = splits.seed * 1_009 + number, test.ids
        if isinstance(cohort.outcome, Classes):
            model: ClassBaseline = (
                logistic(train, outcome[0], held, held_outcome[0])
                if kind == "logistic"
                else class_forest(train, outcome[0], seed)
            )
            probabilities = np.zeros((0, len(cohort.outcome.names)))
            if ids:
                probabilities = model.probabilities(flat(test))
            predictions = Predictions(ids, probabilities=probabilities)
            scale, count = None, model.parameters
        else:
            times, events = outcome
            baseline: SurvivalBaseline = (
                ridge_cox(train, (times, events), held, cast(Any, held_outcome))
                if kind == "cox"
                else survival_forest(train, (times, events), seed)
            )
            grid = time_grid(times)
            risks, curves = np.zeros(0), np.zeros((0, len(grid)))
            if ids:
                risks, curves = baseline.risk(flat(test)), baseline.curves(flat(test), grid)
            predictions = Predictions(ids, risks, curves, grid)
            scale, count = RiskScale.fit(baseline.risk(flat(train))), baseline.parameters
        seconds = time.perf_counter() - started
        return Work(predictions, None, History(), scale, seconds, count)

    return work


def _joiner(
    runs: Sequence[Run],
    cohort: Cohort,
    kind: type[LegoMerge] | type[LegoFuse],
    options: Mapping[str, Any],
    plan: Plan | None,
) -> Worker:
    """Return what joins the blocks of one fold and, with a plan, fine-tunes them."""

    def work(number: int, parts: Mapping[str, Part], folder: Path, progress: Progress) -> Work:
        started = time.perf_counter()
        blocks, scaling, objective = _blocks(runs, number)
        model, history = kind(blocks, **options), History()
        if plan is not None:
            history = _fit(cohort, parts, model, scaling, objective, plan, number, folder, progress)
        return _worked(cohort, parts, model, scaling, objective, history, started)

    return work


def _blocks(
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
        own = fitted.objective
        own = replace(own, times=(), hazard=()) if isinstance(own, CoxSurvival) else own
        if objective is not None and own != objective:
            raise RunError(
                f"{run.path}: expected the objective of {runs[0].path}, {_said(objective)}, got "
                f"{_said(own)}; train the blocks on the same cohort and splits"
            )
        blocks[name], scaling[name], objective = fitted.model, fitted.scaling[name], own
    assert objective is not None
    return blocks, scaling, objective


def _said(objective: Objective) -> str:
    if isinstance(objective, DiscreteSurvival):
        return f"bins at {', '.join(f'{edge:.6g}' for edge in objective.bins.edges)}"
    return objective.kind


def _joint(
    runs: Sequence[Run],
    cohort: Cohort,
    source: Mapping[str, Any],
    model: str,
    command: str,
    options: Mapping[str, Any],
) -> tuple[list[dict[str, Part]], dict[str, Any]]:
    """Return the splits and the configuration of blocks joined, after checking that they fit."""
    if not runs:
        raise ValueError("runs: expected at least one, got none")
    first = runs[0]
    for run in runs[1:]:
        if run.config["fingerprint"] != first.config["fingerprint"]:
            raise RunError(
                f"{run.path}: expected the cohort of {first.path}, got another; one YAML with the "
                "modalities of both lets their blocks merge (train --modalities one by one)"
            )
        if run.splits != first.splits:
            raise RunError(
                f"{run.path}: expected the splits of {first.path}, got others: a patient that one "
                "of them trained on would be tested"
            )
    names = [run.config["modalities"][0] for run in runs]
    plan = Plan({}, Training(), Goal(**first.config["goal"]))
    config = _config(cohort, source, model, names, plan, command=command)
    config["training"] = None
    config["options"] = {**options, "blocks": [_block_digest(run) for run in runs]}
    return [_part_of(cohort, split) for split in first.splits], config


def _block_digest(run: Run) -> str:
    """Tell one training of a block from another, by its weights."""
    digest = hashlib.sha256()
    for number in range(len(run.splits)):
        digest.update((run.fold(number) / "model.safetensors").read_bytes())
    return digest.hexdigest()


def parts_of(cohort: Cohort, splits: Splits) -> list[dict[str, Part]]:
    """Return the parts of every split, checked."""
    strata = _strata(cohort)
    groups, ids = np.asarray(cohort.groups), np.asarray(cohort.patients)
    if cohort.splits is None:
        drawn = [
            {name: tuple(ids[rows].tolist()) for name, rows in parts._asdict().items()}
            for parts in split(groups, strata, **asdict(splits))
        ]
    else:
        row = {patient: i for i, patient in enumerate(cohort.patients)}
        drawn = []
        for number, given in enumerate(cohort.splits):
            train, validation = given.train, given.validation
            if not validation:
                # The share is of the whole cohort, as without split files.
                share = splits.validation * (len(train) + len(given.test)) / len(train)
                rows = np.array([row[patient] for patient in train])
                kept, held = carve(
                    rows, groups, strata, share=share, seed=splits.seed * 1_009 + number
                )
                train, validation = tuple(ids[kept].tolist()), tuple(ids[held].tolist())
            drawn.append({"train": train, "validation": validation, "test": given.test})
    folds = [_part_of(cohort, names) for names in drawn]
    tested: dict[str, int] = {}
    for number, fold in enumerate(folds):
        _check_parts(cohort, number, fold)
        for patient in fold["test"].ids:
            if tested.setdefault(patient, number) != number:
                raise ValueError(
                    f"fold {number + 1}: patient {patient!r} is in its test part and in that of "
                    f"fold {tested[patient] + 1}; intervals need test parts that do not overlap"
                )
    return folds


def _part_of(cohort: Cohort, names: Mapping[str, Sequence[str]]) -> dict[str, Part]:
    row = {patient: i for i, patient in enumerate(cohort.patients)}
    parts = {}
    for name in ("train", "validation", "test"):
        rows = [row[patient] for patient in names[name]]
        outcome = cohort.outcome
        if isinstance(outcome, Classes):
            values: tuple[NDArray[Any], ...] = (outcome.labels[rows],)
        else:
            assert outcome is not None
            values = (outcome.times[rows], outcome.events[rows])
        parts[name] = Part(tuple(names[name]), values)
    return parts


def _check_parts(cohort: Cohort, number: int, parts: Mapping[str, Part]) -> None:
    """Raise unless every part of a fold can serve: no one twice, and events, or classes."""
    where = f"fold {number + 1}"
    ids = [patient for part in parts.values() for patient in part.ids]
    if len(set(ids)) != len(ids):
        raise ValueError(f"{where}: expected every patient in one part, got one in two")
    group = dict(zip(cohort.patients, cohort.groups, strict=True))
    homes: dict[str, str] = {}
    for name, part in parts.items():
        for patient in part.ids:
            if homes.setdefault(group[patient], name) != name:
                raise ValueError(f"{where}: expected group {group[patient]!r} in one part")
    cure = "use fewer splits or larger parts (--splits, --test, --validation)"
    for name, part in parts.items():
        if isinstance(cohort.outcome, Classes):
            seen = len(np.unique(part.outcome[0]))
            if name == "train" and seen < len(cohort.outcome.names):
                raise ValueError(f"{where}: its train part lacks a class; {cure}")
            if seen < 2:
                raise ValueError(f"{where}: its {name} part has one class only; {cure}")
            continue
        times, events = part.outcome
        if not events.any():
            raise ValueError(
                f"{where}: no event among the {len(times)} patients of its {name} part; {cure}"
            )
        if not (times[events].min() < times).any():
            raise ValueError(f"{where}: no comparable pair in its {name} part; {cure}")


def _strata(cohort: Cohort) -> NDArray[np.int64]:
    if isinstance(cohort.outcome, Classes):
        return cohort.outcome.labels
    assert cohort.outcome is not None
    return cohort.outcome.events.astype(np.int64)


def _with_modalities(cohort: Cohort, names: Sequence[str] | None) -> Cohort:
    """Return the cohort with some of its modalities."""
    if names is None:
        return cohort
    unknown = [name for name in names if name not in cohort.modalities]
    if unknown or not names:
        raise ValueError(
            f"--modalities: expected some of {', '.join(cohort.modalities)}, got "
            f"{', '.join(unknown) or 'none'}"
        )
    chosen = {name: source for name, source in cohort.modalities.items() if name in names}
    return replace(cohort, modalities=chosen)


def _check_goal(goal: Goal, cohort: Cohort, kind: str) -> None:
    classes = isinstance(cohort.outcome, Classes)
    models = ("logistic", "forest") if classes else ("cox", "rsf")
    if kind in BASELINES and kind not in models:
        said = "classes" if classes else "survival"
        raise ValueError(f"--model: expected {' or '.join(models)} for {said}, got {kind}")
    losses = ("cross_entropy",) if classes else ("nll", "cox")
    if goal.loss is not None and goal.loss not in losses:
        raise ValueError(f"--set loss: expected {' or '.join(losses)}, got {goal.loss!r}")
    if not isinstance(goal.alpha, int | float) or not 0 <= goal.alpha <= 1:
        raise ValueError(f"--set alpha: expected a number in [0, 1], got {goal.alpha!r}")
    integer("--set bins", goal.bins, 2)
    if not isinstance(goal.weighted, bool):
        raise ValueError(f"--set weighted: expected true or false, got {goal.weighted!r}")


def _objective(goal: Goal, cohort: Cohort, outcome: tuple[NDArray[Any], ...]) -> Objective:
    if isinstance(cohort.outcome, Classes):
        classes = len(cohort.outcome.names)
        return Classification.fit(outcome[0], classes=classes, weighted=goal.weighted)
    if goal.loss == "cox":
        return CoxSurvival()
    times, events = outcome
    return DiscreteSurvival.fit(
        times, events, bins=goal.bins, alpha=goal.alpha, weighted=goal.weighted
    )


def _config(
    cohort: Cohort,
    source: Mapping[str, Any],
    model: str,
    modalities: list[str],
    plan: Plan,
    *,
    command: str,
) -> dict[str, Any]:
    from importlib.metadata import version

    outcome = cohort.outcome
    network = model in ("healnet", "block")
    return {
        "motet": version("motet"),
        "command": command,
        "cohort": source["cohort"],
        "data": source["data"],
        "fingerprint": source["fingerprint"],
        "model": model,
        "modalities": modalities,
        "options": plan.model,
        "training": asdict(plan.training) if network else None,
        "goal": asdict(plan.goal),
        "classes": list(outcome.names) if isinstance(outcome, Classes) else None,
        "unit": outcome.unit if isinstance(outcome, Survival) else None,
    }


def _outcome_table(cohort: Cohort) -> pd.DataFrame:
    table: dict[str, Any] = {"patient": list(cohort.patients)}
    if isinstance(cohort.outcome, Classes):
        table["label"] = cohort.outcome.labels
    elif cohort.outcome is not None:
        table["time"] = cohort.outcome.times
        table["event"] = cohort.outcome.events.astype(int)
    return pd.DataFrame(table)
