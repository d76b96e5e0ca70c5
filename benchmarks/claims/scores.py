"""Out-of-fold predictions of models made of trained blocks, and the metrics of the predictions."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from motet.experiments import Run
from motet.experiments.fit import finish_network
from motet.experiments.fold import Fold
from motet.experiments.join import splits_of
from motet.fusion.evaluation import (
    compare_classes,
    compare_survival,
    evaluate_classes,
    evaluate_survival,
)
from motet.fusion.fitted import Fitted
from motet.fusion.held_out import ClassFold, SurvivalFold
from motet.fusion.lego_merge import LegoMerge
from motet.fusion.objectives import Classification, Objective
from motet.fusion.resampling import Estimate
from motet.fusion.survival import hazards
from motet.fusion.training import History
from motet.io import Cohort
from numpy.typing import NDArray
from torch import Tensor

from .rows import Figure

Floats = NDArray[np.float64]
DRAWS = 1000


class PartPredictions(NamedTuple):
    """The patients of one test part, with their outcomes and predictions."""

    number: int
    """The number of the split."""
    ids: tuple[str, ...]
    fold: SurvivalFold | ClassFold

    def only(self, ids: set[str]) -> "PartPredictions":
        """Return the predictions of those patients that are in `ids`."""
        keep = np.array([patient in ids for patient in self.ids], bool)
        names = ("labels", "probabilities") if isinstance(self.fold, ClassFold) else (
            "times", "events", "risks"
        )  # fmt: skip
        fold = replace(self.fold, **{name: getattr(self.fold, name)[keep] for name in names})
        return PartPredictions(self.number, tuple(np.asarray(self.ids, object)[keep]), fold)


Scores = list[PartPredictions]
"""Out-of-fold predictions, one entry for each test part."""


def part_predictions(run: Run, number: int, ids: Sequence[str], values: Floats) -> PartPredictions:
    """Return predictions of one test part: risks [n], or probabilities [n, K]."""
    outcome = run.outcome()
    test = outcome.loc[list(ids)]
    if run.config["classes"] is not None:
        fold = ClassFold(test["label"].to_numpy(), values)
        return PartPredictions(number, tuple(ids), fold)
    train = outcome.loc[run.splits[number]["train"]]
    times, events = test["time"].to_numpy(), test["event"].to_numpy()
    fold = SurvivalFold(times, events, values, train["time"].to_numpy(), train["event"].to_numpy())
    return PartPredictions(number, tuple(ids), fold)


def scores_of(run: Run) -> Scores:
    """Return the out-of-fold predictions of a run."""
    classes = run.config["classes"]
    columns = "risk" if classes is None else [f"p_{name}" for name in classes]
    return [
        part_predictions(
            run, int(str(number)), frame["patient"].tolist(), frame[columns].to_numpy()
        )
        for number, frame in run.predictions().groupby("fold")
    ]


def ids_of(scores: Scores) -> set[str]:
    """Return the ids of all tested patients."""
    return {patient for part in scores for patient in part.ids}


def folds_of(scores: Scores, ids: set[str]) -> Any:
    """Return the folds for evaluation, of the patients in `ids` alone."""
    return [part.only(ids).fold for part in scores if ids & set(part.ids)]


def compute_metric(scores: Scores) -> Figure:
    """Return Harrell's c, the AUC or the macro AUC."""
    folds = folds_of(scores, ids_of(scores))
    if isinstance(folds[0], ClassFold):
        metrics = evaluate_classes(folds, draws=DRAWS)
        metric = metrics["auc"] if "auc" in metrics else metrics["macro_auc"]
    else:
        metrics = evaluate_survival(folds, draws=DRAWS)
        metric = metrics["harrell_c"]
    return Estimate(metric["value"], metric["low"], metric["high"]), metrics["patients"]


def compute_difference(a: Scores, b: Scores) -> Figure:
    """Return the metric of a less that of b, on the patients whom both predict."""
    ids = ids_of(a) & ids_of(b)
    folds = folds_of(a, ids), folds_of(b, ids)
    compare = compare_classes if isinstance(folds[0][0], ClassFold) else compare_survival
    return compare(*folds, draws=DRAWS), len(ids)


def values_of(objective: Objective, logits: Tensor) -> Floats:
    """Return the predictions of logits: risks [n], or probabilities [n, K]."""
    if isinstance(objective, Classification):
        return objective.probabilities(logits)
    return objective.risk(logits)


def calibrate(
    merged: LegoMerge, blocks: Mapping[str, Fitted], cohort: Cohort, run: Run, number: int
) -> Fitted:
    """Return a merged model with its calibration, which is fitted as `motet merge` does.

    Args:
        merged: some of the blocks, merged.
        blocks: the trained blocks of the fold, by modality.
        cohort: the cohort of the run.
        run: the run whose splits count.
        number: number of the fold, from 0.
    """
    scaling = {name: blocks[name].scaling[name] for name in merged.blocks}
    objective = cast(Objective, next(iter(blocks.values())).objective).untrained()
    fold = Fold.of(cohort, splits_of(run)[number], number, scaling, objective)
    return finish_network(merged, fold, History()).fitted


def ensemble(
    blocks: Mapping[str, Fitted], cohort: Cohort, ids: Sequence[str]
) -> tuple[tuple[str, ...], Floats]:
    """Return the patients with any of the blocks' modalities, and the ensemble's predictions.

    The ensemble is the mean of the calibrated hazards, or probabilities, of those blocks whose
    modality a patient has.
    """
    total, count, objective = None, torch.zeros(len(ids), 1, dtype=torch.float64), None
    for name, fitted in blocks.items():
        objective = fitted.objective
        patients = fitted.patients(cohort.modalities, ids)
        has = patients.has(name)
        if not has.any():
            continue
        logits = fitted.logits(patients.select(has))
        shares = logits.softmax(1) if isinstance(objective, Classification) else hazards(logits)
        total = torch.zeros(len(ids), shares.shape[1]).double() if total is None else total
        total[has] += shares
        count[has] += 1
    assert total is not None
    assert objective is not None
    has_any = count.squeeze(1) > 0
    mean = (total / count)[has_any]
    joint = mean.log() if isinstance(objective, Classification) else mean.logit()
    return tuple(np.asarray(ids, object)[has_any.numpy()]), values_of(objective, joint)
