"""The commands that train and join."""

import argparse
import json
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


def _train(options: argparse.Namespace) -> int:
    from .. import experiments
    from ..io import load_cohort
    from .tables import show_runs

    run = experiments.train_run(
        load_cohort(options.cohort, data=options.data),
        options.model,
        options.out,
        modalities=options.modalities,
        changes=read_changes(options.changes),
        splits=experiments.Splits(options.splits, options.test, options.validation, options.seed),
    )
    return show_runs([run], as_json=options.json)


def _merge(options: argparse.Namespace) -> int:
    from ..experiments import merge_recipe
    from ..fusion.training import rank
    from .tables import show_runs

    recipe = _recipe(options)
    merged = merge_recipe.merge(recipe, options.out, data=options.data)
    if not isinstance(merged, Path):
        return show_runs([merged], as_json=options.json)
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
    from .tables import show_runs

    runs = experiments.blocks_of(options.runs)
    cohort = experiments.cohort_of(runs[0], options.data)
    run = experiments.fuse_runs(
        runs, options.out, cohort=cohort, changes=read_changes(options.changes),
        mode=options.mode, head=options.head,
    )  # fmt: skip
    return show_runs([run], as_json=options.json)
