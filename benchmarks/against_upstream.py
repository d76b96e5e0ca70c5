"""Train the authors' HEALNet with the authors' code, on the splits of a run of ours.

    git clone https://github.com/konst-int-i/healnet DIR
    pip install einops python-box
    motet train tcga_blca --model healnet --out runs/healnet
    python benchmarks/against_upstream.py --checkout DIR --run runs/healnet --out runs/upstream
    motet evaluate runs/upstream runs/healnet

The predictions of their model are written as a run folder, so that the last command compares the
two models, patient by patient. None of their code is copied here: all of it is imported from the
checkout.

These parts of theirs are used unchanged: `HealNet`; `nll_loss`; `calc_reg_loss`; `EarlyStopping`;
of `Pipeline` the constructor, `load_data` (data loaders, bin weights), `make_model`,
`train_survival_fold` (the training loop) and `evaluate_survival_epoch`; items and length of
`TCGADataset`; the files `config/main_gpu.yml`, which the command of their README, `python3
healnet/main.py`, reads, and `config/best_hyperparams.yml`.

These parts are ours, because theirs need slides on disk or draw other splits:

* `TCGADataset` is filled without its constructor, with their columns as a single token of all
  features. It has one row per patient instead of one per slide, so that no patient is in two parts.
  Gaps are filled with means of the training part, and the time bins are those of the training part;
  in their code both come from all rows.
* `random_split` returns the given parts. The loop over folds replaces that of `Pipeline.main`, with
  the same seeds. Their loop swaps test and validation part in the call of `train_survival_fold`,
  which changes nothing if both are random parts of one size. Here the validation part decides when
  to stop, and the test part is predicted once, at the end.
* wandb, and libraries that only slides and other baselines need, are replaced by stubs; tqdm prints
  nothing.

Properties of their code that matter for the comparison:

* Features are not scaled. `--standardise` scales them by the training part.
* `EarlyStopping` keeps references to the weights instead of copies. So the tested weights are the
  last ones, `patience` epochs after the best.
* The loss is divided by 16, but every batch is a step. So the L1 penalty has 16 times its
  configured weight.
* Evaluation builds the graph of the gradients too.
* Eight workers load tables that are in memory. `--in-process` loads them without workers.

Seconds per epoch are measured side by side. After each fold of theirs the same fold is trained by
ours: once with motet's recipe on the run's modalities, and once with all features as one token and
with their sizes, batch size, learning rates and penalties.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import motet
import numpy as np
import pandas as pd
import torch
from motet import experiments
from motet.experiments import Run, Settings
from motet.experiments.train import FitModel
from motet.fusion.objectives import DiscreteSurvival
from motet.fusion.predictions import SurvivalPredictions, time_grid
from motet.io import Cohort
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Subset

ROOT = Path(__file__).parent.parent
# Their modules import these, but training on tables never calls them. wandb would also send logs to
# its server.
STUBS = (
    "wandb", "openslide", "h5py", "torchsummary", "torchmetrics", "torchvision",
    "torchvision.models",
)  # fmt: skip
NOT_FEATURES = (
    "site", "oncotree_code", "case_id", "slide_id", "train", "censorship", "survival_months",
)  # fmt: skip
PARTS = ("train", "validation", "test")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkout", type=Path, required=True, metavar="DIR",
        help="a clone of konst-int-i/healnet",
    )  # fmt: skip
    parser.add_argument(
        "--run", type=Path, required=True, metavar="DIR", help="a finished run of motet's HEALNet"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the run folder of their model"
    )
    shared = Path(os.environ.get("MOTET_DATA", ROOT.parent / "shared"))
    parser.add_argument(
        "--data",
        type=Path,
        default=shared / "data" / "tcga",
        help="folder of the authors' tables (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N",
        help="0 gives the folds the seeds of their code (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=int, default=2, metavar="N",
        help="threads of torch (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--standardise", action="store_true", help="scale features by the training part"
    )
    parser.add_argument(
        "--in-process", action="store_true", help="load batches without worker processes"
    )
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    ours = Run.finished(options.run)
    cohort = experiments.cohort_of(ours)
    upstream = import_upstream(options.checkout.resolve())
    if options.in_process:
        upstream.DataLoader = _in_process
    name = ours.config["cohort"]
    config = read_config(upstream, options.checkout, name)
    table = read_table(options.data / f"{name}_all_clean.csv.zip")
    workers = "none" if options.in_process else "as published"
    settings = {
        "standardised": options.standardise, "workers": workers, "seed": options.seed,
        "revision": _revision(options.checkout),
    }  # fmt: skip
    outcome = ours.outcome().reset_index()
    theirs = Run.create(
        options.out,
        {**ours.config, "model": "the authors' HEALNet", "options": settings, "training": None},
        ours.splits,
        outcome,
    )
    seconds: dict[str, list[float]] = {"theirs": [], "ours": [], "ours, their recipe": []}
    for number, fold in enumerate(ours.splits):
        # In their code the seed of a fold is its number, from 1 on.
        seed = options.seed * len(ours.splits) + number + 1
        positions = {part: locate(table, fold[part]) for part in PARTS}
        logits, run = train_fold(
            upstream, config, table, positions, seed=seed, standardise=options.standardise
        )
        times, events = table["survival_months"], table["censorship"] == 0
        train, test = positions["train"], positions["test"]
        objective = DiscreteSurvival.fit(
            times.iloc[train], events.iloc[train], bins=4, alpha=0.4, weighted=True
        )
        risks, grid = objective.risk(logits), time_grid(times.iloc[train].to_numpy())
        c = motet.concordance_index(times.iloc[test], events.iloc[test], risks)
        if abs(c - run["c_reported_by_their_code"]) > 1e-6:
            # The weights are not those that their code tested.
            raise RuntimeError(
                f"fold {number}: expected the c of their code, {run['c_reported_by_their_code']}, "
                f"got {c}"
            )
        curves = objective.curves(logits, grid)
        predictions = SurvivalPredictions(tuple(fold["test"]), risks, curves, grid)
        facts = {**run, "cut": None, "grid": grid.tolist()}
        theirs.finish_fold(number, theirs.task.predictions_table(predictions), facts, None)
        seconds["theirs"] += run["seconds_per_epoch"]
        seconds["ours"] += epochs_of(ours, cohort, number, {})
        seconds["ours, their recipe"] += epochs_of(
            ours, one_token(cohort), number, their_recipe(config)
        )
        text = ", ".join(f"{name} {statistics.median(s):.3f}" for name, s in seconds.items())
        print(f"fold {number}: c {c:.3f}, {run['epochs']} epochs; s per epoch: {text}", flush=True)

    (options.out / "predictions.csv").write_text(theirs.predictions().to_csv(index=False))
    (options.out / "metrics.json").write_text(json.dumps(experiments.evaluate_run(theirs)))
    summary = {
        "cohort": name,
        "seconds_per_epoch": {name: _spread(values) for name, values in seconds.items()},
        "hyperparameters": dict(_pipeline(upstream, config).config),
        "revision": _revision(ROOT),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
    }
    path = options.out / "summary.json"
    path.write_text(json.dumps(summary, indent=1, default=str) + "\n")
    return 0


def epochs_of(run: Run, cohort: Cohort, number: int, changes: dict[str, Any]) -> list[float]:
    """Return the seconds of every epoch of a fold, trained by ours with changed settings."""
    settings = {} if changes else {**run.config["options"], **run.config["goal"]}
    if not changes:
        settings |= {k: v for k, v in run.config["training"].items() if k != "seed"}
    fit = FitModel(
        cohort, list(cohort.modalities), "healnet",
        Settings.of("healnet", {**settings, **changes}, seed=0),
    )  # fmt: skip
    split = experiments.split_cohort(cohort, experiments.Splits())[number]
    with tempfile.TemporaryDirectory() as folder:
        return fit(number, split, Path(folder), lambda history: None).history.seconds


def one_token(cohort: Cohort) -> Cohort:
    """Return the cohort with all its features as one modality, as in the authors' code."""
    tables = [table for table in cohort.modalities.values() if isinstance(table, pd.DataFrame)]
    return replace(cohort, modalities={"omic": pd.concat(tables, axis=1)})


def their_recipe(config: Any) -> dict[str, Any]:
    """Return their hyperparameters under the names of motet's settings."""
    model, loop = config["model_params"], config["train_loop"]
    return {
        "depth": model["depth"], "num_latents": model["num_latents"],
        "latent_dim": model["latent_dim"], "heads": model["cross_heads"],
        "head_dim": model["cross_dim_head"], "attn_dropout": model["attn_dropout"],
        "ff_dropout": model["ff_dropout"], "snn": model["snn"],
        "share_weights": False, "temperature": 0.5, "latent_init": "normal",
        "epochs": loop["epochs"], "batch_size": loop["batch_size"], "patience": loop["patience"],
        "max_lr": config["optimizer"]["max_lr"],
        "alpha": 0.4, "weighted": True, "l1": 16 * model["l1"], "l2": 0,
    }  # fmt: skip


def import_upstream(checkout: Path) -> ModuleType:
    """Return their module `healnet.main`.

    Raises:
        FileNotFoundError: `checkout` is not a clone of their repository.
    """
    if not (checkout / "healnet" / "main.py").is_file():
        raise FileNotFoundError(
            f"checkout: expected a clone of konst-int-i/healnet, got {checkout} without "
            "healnet/main.py"
        )
    sys.path.insert(0, str(checkout))
    sys.modules.update({name: mock.MagicMock() for name in STUBS})
    try:
        upstream = importlib.import_module("healnet.main")
    finally:
        for name in STUBS:  # torch imports some of them itself, and must not get the stubs
            del sys.modules[name]
    upstream.MP_CONTEXT = "fork"  # their main.py sets it only if it is run as a program
    upstream.tqdm = iter
    return upstream


def read_config(upstream: ModuleType, checkout: Path, cohort: str) -> Any:
    """Return their configuration of HEALNet on omics alone; nothing of the training is changed."""
    config = upstream.Config(str(checkout / "config" / "main_gpu.yml")).read()
    config["dataset"] = cohort.removeprefix("tcga_")
    tuned = upstream.Config(str(checkout / config["hyperparams"])).read()
    if config["dataset"] not in tuned:
        cohorts = ", ".join(f"tcga_{name}" for name in tuned)
        raise ValueError(f"cohort: expected one of {cohorts}, got {cohort}")
    config["model_params"] = tuned[config["dataset"]]
    config["sources"] = ["omic"]
    config["model"] = "healnet"
    return config


def read_table(path: Path) -> pd.DataFrame:
    """Return their table with one row per patient, by patient id.

    Raises:
        ValueError: the rows of a patient differ in a column that is used.
    """
    table = pd.read_csv(path, index_col=0, low_memory=False)
    used = table.drop(columns=["slide_id", "train"])
    patients = used.drop_duplicates().set_index("case_id")
    if not patients.index.is_unique:
        duplicates = patients.index[patients.index.duplicated()].unique().tolist()
        raise ValueError(
            f"{path}: expected equal rows for each patient, got different rows for {duplicates[:5]}"
        )
    return patients


def locate(table: pd.DataFrame, patients: Sequence[str]) -> NDArray[np.int64]:
    """Return the row numbers of patients.

    Raises:
        ValueError: the table lacks a patient.
    """
    rows = table.index.get_indexer(patients)
    if (rows < 0).any():
        missing = [patient for patient, row in zip(patients, rows, strict=True) if row < 0]
        raise ValueError(f"splits: expected patients of the table, got {missing[:5]}")
    return rows.astype(np.int64)


def train_fold(
    upstream: ModuleType,
    config: Any,
    table: pd.DataFrame,
    positions: dict[str, NDArray[np.int64]],
    *,
    seed: int,
    standardise: bool,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Train on one fold.

    Returns:
        Logits of the test patients, and facts of the training: epochs, losses, seconds.
    """
    pipeline = _pipeline(upstream, config)
    data = fill_dataset(upstream, pipeline, table, positions["train"], standardise=standardise)
    parts = {part: Subset(data, rows.tolist()) for part, rows in positions.items()}
    torch.manual_seed(seed)
    np.random.seed(seed)
    split = (parts["train"], parts["test"], parts["validation"])  # in the order of their unpacking
    with (
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.object(upstream, "TCGADataset", return_value=data),
        mock.patch.object(torch.utils.data, "random_split", return_value=split),
    ):
        train_data, validation_data, test_data = pipeline.load_data()
        model = pipeline.make_model(train_data)
        clock = pipeline.evaluate_survival_epoch = _Clock(pipeline.evaluate_survival_epoch)
        model, *_, reported, _ = pipeline.train_survival_fold(
            model, train_data, test_data=test_data, val_data=validation_data, fold=seed
        )
    model.eval()  # their evaluation leaves the model in training mode
    with torch.no_grad():
        logits = [model([x.to(pipeline.device) for x in batch[0]]).cpu() for batch in test_data]
    losses = clock.losses[:-1]  # the last evaluation is that of the test part
    return torch.cat(logits), {
        "patients": {part: len(rows) for part, rows in positions.items()},
        "features": data.omic_tensor.shape[2],
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps_per_epoch": len(train_data),
        "epochs": len(losses),
        "best_epoch": 1 + int(np.argmin(losses)),
        "validation_losses": losses,
        "seconds_per_epoch": [a + b for a, b in zip(clock.between, clock.within, strict=True)][:-1],
        "c_reported_by_their_code": float(reported),
    }


def fill_dataset(
    upstream: ModuleType,
    pipeline: Any,
    table: pd.DataFrame,
    train: NDArray[np.int64],
    *,
    standardise: bool,
) -> Any:
    """Return their dataset of all patients; means, scales and bins are of the training part."""
    features = table.drop(columns=[c for c in NOT_FEATURES if c in table]).astype(float)
    train_features = features.iloc[train]
    mean, std = train_features.mean(), train_features.std()
    features = features.fillna(mean)
    if standardise:
        features = (features - mean) / std.replace(0, 1).fillna(1)
    times, censored = table["survival_months"], table["censorship"].astype(int)
    # Quantiles of the uncensored times, as in their code.
    bins = motet.TimeBins.fit(times.iloc[train], censored.iloc[train] == 0, pipeline.output_dims)
    data = upstream.TCGADataset.__new__(upstream.TCGADataset)
    data.sources = pipeline.sources
    data.omic_tensor = torch.tensor(features.to_numpy(), dtype=torch.float32)[:, None]
    data.censorship, data.survival_months = censored.to_numpy(), times.to_numpy(float)
    data.y_disc = bins.index(times)
    data.omic_df = pd.DataFrame({"y_disc": data.y_disc})
    return data


class _Clock:
    """A wrapper of their evaluation that records its losses and times.

    `within` has the seconds of each evaluation, `between` the seconds since the last one ended.
    """

    def __init__(self, evaluate: Any) -> None:
        self.evaluate = evaluate
        self.within: list[float] = []
        self.between: list[float] = []
        self.losses: list[float] = []
        self.last = time.perf_counter()

    def __call__(self, *arguments: Any, **options: Any) -> tuple[float, float]:
        started = time.perf_counter()
        self.between.append(started - self.last)
        loss, c = self.evaluate(*arguments, **options)
        self.last = time.perf_counter()
        self.within.append(self.last - started)
        self.losses.append(float(loss))
        return loss, c


def _pipeline(upstream: ModuleType, config: Any) -> Any:
    return upstream.Pipeline(config, Namespace(mode="single_run"))


def _in_process(*arguments: Any, **options: Any) -> DataLoader[Any]:
    for name in ("multiprocessing_context", "persistent_workers", "prefetch_factor"):
        del options[name]  # DataLoader refuses them without workers
    return DataLoader(*arguments, **{**options, "num_workers": 0})


def _spread(seconds: list[float]) -> dict[str, float]:
    low, middle, high = np.quantile(seconds, [0.25, 0.5, 0.75])
    return {"median": middle, "iqr": high - low, "epochs": len(seconds)}


def _revision(folder: Path) -> str:
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
