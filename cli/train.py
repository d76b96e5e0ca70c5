"""The commands that train, join, evaluate and predict."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .options import (
    Commands,
    add_data,
    add_json,
    add_modality_dropout,
    add_out,
    add_set,
    read_changes,
    read_names,
)

if TYPE_CHECKING:
    from ..experiments.merge_recipe import Recipe
    from ..experiments.run_folder import Run


def add_train(commands: Commands) -> None:
    """Add `motet train`."""
    train = commands.add_parser(
        "train",
        help="train a model on every split of a cohort, and evaluate it",
        description="Train a model on every split of a cohort, and evaluate it on the test parts. "
        "To continue a run that was stopped, give the same command again.",
    )
    train.add_argument(
        "cohort", help="a YAML file, or the name of a shipped cohort (docs/how-to/tables.md)"
    )
    train.add_argument(
        "--model",
        required=True,
        help="healnet; lego (a LegoBlock per modality, then their merge); or a baseline: cox, "
        "coxnet, rsf or boosting for survival, logistic, forest or boosting for classes",
    )
    add_out(train, "folder of the run")
    add_data(train)
    train.add_argument(
        "--modalities", type=read_names, metavar="A,B", help="modalities to use (default: all)"
    )
    train.add_argument(
        "--splits", type=int, default=5, metavar="N", help="number of splits (default: 5)"
    )
    train.add_argument(
        "--test", type=float, default=0.15, metavar="SHARE",
        help="share of the patients in each test part; with --splits 5 and 0.2 every patient is "
        "tested once (default: 0.15)",
    )  # fmt: skip
    train.add_argument(
        "--validation", type=float, default=0.15, metavar="SHARE",
        help="share of the patients in each validation part, which decides when training stops "
        "(default: 0.15)",
    )  # fmt: skip
    train.add_argument(
        "--seed", type=int, default=0, help="seed of splits, weights and dropout (default: 0)"
    )
    add_set(train)
    add_modality_dropout(train)
    add_json(train)
    train.set_defaults(run=_train)


def add_merge(commands: Commands) -> None:
    """Add `motet merge`."""
    merge = commands.add_parser(
        "merge",
        help="join trained LegoBlocks without training",
        description="Join trained LegoBlocks without training (MM-Lego, Eq. 4). A recipe is a YAML "
        "file with the blocks, their weights, method, phase and head (docs/concepts/legomerge.md). "
        "If its blocks are model files, the result is a folder with model.safetensors; if they are "
        "run folders, it is a run folder. RUN ... merges all blocks of these runs with equal "
        "weights. A card, README.md, lists what was merged.",
    )
    merge.add_argument(
        "parts",
        nargs="+",
        type=Path,
        metavar="RECIPE|RUN",
        help="a YAML file, or runs of LegoBlocks",
    )
    add_out(merge, "folder of the result")
    add_data(merge)
    merge.add_argument(
        "--method", help="with RUN ...: harmonic, mean, sum or product (default: harmonic)"
    )
    merge.add_argument("--head", help="with RUN ...: slerp, linear or ot (default: slerp)")
    add_json(merge)
    merge.set_defaults(run=_merge)


def add_fuse(commands: Commands) -> None:
    """Add `motet fuse`."""
    fuse = commands.add_parser(
        "fuse",
        help="join trained LegoBlocks and fine-tune them",
        description="Join the LegoBlocks of finished runs in one network (LegoFuse), fine-tune it, "
        "and evaluate it on the test parts.",
    )
    fuse.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="runs of LegoBlocks")
    add_out(fuse, "folder of the new run")
    add_data(fuse)
    fuse.add_argument(
        "--head", default="slerp",
        help="how heads are merged first: slerp, linear or ot (default: slerp)",
    )  # fmt: skip
    fuse.add_argument(
        "--mode", default="weave", help="order of the layers: weave or stack (default: weave)"
    )
    add_set(fuse)
    add_modality_dropout(fuse)
    add_json(fuse)
    fuse.set_defaults(run=_fuse)


def add_evaluate(commands: Commands) -> None:
    """Add `motet evaluate`."""
    evaluate = commands.add_parser(
        "evaluate",
        help="show metrics of finished runs, and compare them with the first run",
        description="Show the metrics of finished runs on their test parts, with 95 % intervals, "
        "and compare each run with the first one on the same patients.",
    )
    evaluate.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished runs")
    evaluate.add_argument(
        "--draws", type=int, default=1000, metavar="N",
        help="number of bootstrap samples (default: 1000)",
    )  # fmt: skip
    add_json(evaluate)
    evaluate.set_defaults(run=_evaluate)


def add_predict(commands: Commands) -> None:
    """Add `motet predict`."""
    predict = commands.add_parser(
        "predict",
        help="predict new patients with the models of a run",
        description="Predict new patients with the models of all folds of a run, and write the "
        "averages to a CSV file.",
    )
    predict.add_argument("trained", type=Path, metavar="RUN", help="a finished run")
    predict.add_argument("cohort", help="a YAML file of the patients; no outcome needed")
    predict.add_argument("--out", type=Path, required=True, metavar="CSV", help="file to write")
    add_data(predict)
    predict.set_defaults(run=_predict)


def _train(options: argparse.Namespace) -> int:
    from .. import experiments
    from ..io import load_cohort

    run = experiments.train_run(
        load_cohort(options.cohort, data=options.data),
        options.model,
        options.out,
        modalities=options.modalities,
        changes=read_changes(options.changes),
        splits=experiments.Splits(options.splits, options.test, options.validation, options.seed),
    )
    return _show([run], as_json=options.json)


def _merge(options: argparse.Namespace) -> int:
    from ..experiments import merge_recipe
    from ..fusion.training import rank

    recipe = _recipe(options)
    merged = merge_recipe.merge(recipe, options.out, data=options.data)
    if not isinstance(merged, Path):
        return _show([merged], as_json=options.json)
    if rank() == 0:
        weights = recipe.options()["weights"]
        text = f"{' and '.join(weights)} merged: {merged}"
        print(json.dumps({"model": str(merged), "weights": weights}) if options.json else text)
    return 0


def _recipe(options: argparse.Namespace) -> "Recipe":
    from ..experiments import merge_recipe

    yaml = (".yaml", ".yml")
    files = [p for p in options.parts if p.is_file() or (p.suffix in yaml and not p.is_dir())]
    if not files:
        method, head = options.method or "harmonic", options.head or "slerp"
        return merge_recipe.make_recipe(options.parts, method=method, head=head)
    if len(options.parts) > 1:
        raise ValueError(
            f"expected one recipe or run folders, got {len(options.parts)} paths, "
            f"{str(files[0])!r} among them"
        )
    for name in ("method", "head"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name}: expected it in the recipe, got {getattr(options, name)!r}")
    return merge_recipe.read_recipe(files[0])


def _fuse(options: argparse.Namespace) -> int:
    from .. import experiments

    runs = experiments.blocks_of(options.runs)
    cohort = experiments.cohort_of(runs[0], options.data)
    run = experiments.fuse_runs(
        runs, options.out, cohort=cohort, changes=read_changes(options.changes),
        mode=options.mode, head=options.head,
    )  # fmt: skip
    return _show([run], as_json=options.json)


def _evaluate(options: argparse.Namespace) -> int:
    from ..experiments import Run

    if options.draws < 100:
        raise ValueError(f"--draws: expected at least 100, got {options.draws}")

    return _show(
        [Run.finished(path) for path in options.runs], as_json=options.json, draws=options.draws
    )


def _predict(options: argparse.Namespace) -> int:
    from .. import experiments
    from .._atomic import write_text
    from ..io import load_cohort

    _check_csv(options.out)
    run = experiments.Run.finished(options.trained)
    cohort = load_cohort(options.cohort, data=options.data, outcome=False)
    table = experiments.predict_cohort(run, cohort)
    write_text(options.out, table.to_csv(index=False))
    trained_on = sum(folds > 0 for folds in table["seen"])
    note = f"; {trained_on} of them were trained on" if trained_on else ""
    print(f"{len(table)} patients predicted{note}: {options.out}")
    return 0


def _check_csv(path: Path) -> None:
    """Raise unless the file is new or holds earlier predictions, which may be overwritten."""
    if path.is_dir() or not path.name:
        raise ValueError(f"--out: expected a file, got the folder {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"--out: no folder {str(path.parent)!r}")
    if not path.exists():
        return
    header = b"patient,modalities,seen,"
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(header)) == header:
                return
    raise ValueError(f"--out: {str(path)!r} exists, and holds no predictions of motet")


def _show(runs: Sequence["Run"], *, as_json: bool, draws: int | None = None) -> int:
    """Print the metrics of runs: from disk, or computed anew if `draws` is a number."""
    from .. import experiments
    from ..fusion.training import rank
    from . import tables

    if rank():
        return 0
    results = [
        (
            run,
            experiments.read_metrics(run)
            if draws is None
            else experiments.evaluate_run(run, draws=draws),
        )
        for run in runs
    ]
    draws_option = {} if draws is None else {"draws": draws}
    comparisons = [experiments.compare_runs(run, runs[0], **draws_option) for run in runs[1:]]
    print(tables.as_json(results, comparisons) if as_json else tables.table(results, comparisons))
    return 0
