"""Out-of-fold predictions of whatever was put together from trained blocks, and their figures."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from motet.experiments import Run
from motet.fusion.evaluation import (
    compare_classes,
    compare_survival,
    evaluate_classes,
    evaluate_survival,
)
from motet.fusion.fitted import Fitted
from motet.fusion.held_out import ClassFold, SurvivalFold
from motet.fusion.objectives import Classification, Objective
from motet.fusion.resampling import Estimate
from motet.fusion.survival import hazards
from motet.fusion.training import predict_logits
from motet.io import Cohort
from numpy.typing import NDArray
from torch import Tensor

from .rows import Found

Floats = NDArray[np.float64]
DRAWS = 1000


class Tested(NamedTuple):
    """The patients of one test part and what was predicted of them."""

    number: int
    """Of the split."""
    ids: tuple[str, ...]
    fold: SurvivalFold | ClassFold

    def only(self, ids: set[str]) -> "Tested":
        """Return some of the patients."""
        keep = np.array([patient in ids for patient in self.ids], bool)
        names = ("labels", "probabilities") if isinstance(self.fold, ClassFold) else (
            "times", "events", "risks"
        )  # fmt: skip
        fold = replace(self.fold, **{name: getattr(self.fold, name)[keep] for name in names})
        return Tested(self.number, tuple(np.asarray(self.ids, object)[keep]), fold)


Scores = list[Tested]
"""Out-of-fold predictions, one entry per test part."""


def tested(run: Run, number: int, ids: Sequence[str], values: Floats) -> Tested:
    """Return predictions of one fold: risks [n], or probabilities [n, K]."""
    outcome = run.outcome()
    own = outcome.loc[list(ids)]
    if run.config["classes"] is not None:
        return Tested(number, tuple(ids), ClassFold(own["label"].to_numpy(), values))
    train = outcome.loc[run.splits[number]["train"]]
    known = [part[name].to_numpy() for part in (own, train) for name in ("time", "event")]
    return Tested(number, tuple(ids), SurvivalFold(known[0], known[1], values, *known[2:]))


def scores_of(run: Run) -> Scores:
    """Return what a run predicted out of fold."""
    classes = run.config["classes"]
    columns = "risk" if classes is None else [f"p_{name}" for name in classes]
    return [
        tested(run, int(str(number)), frame["patient"].tolist(), frame[columns].to_numpy())
        for number, frame in run.predictions().groupby("fold")
    ]


def ids_of(scores: Scores) -> set[str]:
    """Return all patients tested."""
    return {patient for part in scores for patient in part.ids}


def folds_of(scores: Scores, only: set[str]) -> Any:
    """Return the folds for evaluation, of some patients."""
    return [part.only(only).fold for part in scores if only & set(part.ids)]


def figure(scores: Scores) -> Found:
    """Return Harrell's c, the AUC or the macro AUC, and the patients it is of."""
    folds = folds_of(scores, ids_of(scores))
    if isinstance(folds[0], ClassFold):
        found = evaluate_classes(folds, draws=DRAWS)
        auc = found["auc"] if "auc" in found else found["macro_auc"]
    else:
        found = evaluate_survival(folds, draws=DRAWS)
        auc = found["harrell_c"]
    return Estimate(auc["value"], auc["low"], auc["high"]), found["patients"]


def less(a: Scores, b: Scores) -> Found:
    """Return how much better a is than b, on the patients that both predict."""
    both = ids_of(a) & ids_of(b)
    folds = folds_of(a, both), folds_of(b, both)
    compare = compare_classes if isinstance(folds[0][0], ClassFold) else compare_survival
    return compare(*folds, draws=DRAWS), len(both)


def values_of(objective: Objective, logits: Tensor) -> Floats:
    """Return what logits say: risks [n], or probabilities [n, K]."""
    if isinstance(objective, Classification):
        return objective.probabilities(logits)
    return objective.risk(logits)


def ensemble(
    blocks: Mapping[str, Fitted], cohort: Cohort, ids: Sequence[str]
) -> tuple[tuple[str, ...], Floats]:
    """Return who has any of the blocks' modalities, and what the blocks say together.

    That is the mean of the hazards, or probabilities, of the blocks that a patient has.
    """
    total, count, objective = None, torch.zeros(len(ids), 1, dtype=torch.float64), None
    for name, fitted in blocks.items():
        objective = fitted.objective
        patients = fitted.patients(cohort.modalities, ids)
        has = patients.has(name)
        if not has.any():
            continue
        logits = predict_logits(fitted.model, patients.select(has)).double()
        shares = logits.softmax(1) if isinstance(objective, Classification) else hazards(logits)
        total = torch.zeros(len(ids), shares.shape[1]).double() if total is None else total
        total[has] += shares
        count[has] += 1
    assert total is not None
    assert objective is not None
    there = count.squeeze(1) > 0
    mean = (total / count)[there]
    joint = mean.log() if isinstance(objective, Classification) else mean.logit()
    return tuple(np.asarray(ids, object)[there.numpy()]), values_of(objective, joint)
