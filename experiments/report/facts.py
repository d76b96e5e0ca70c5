"""What a report shows of a run, computed from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ...fusion.brier import brier_over_time, survival_at
from ...fusion.concordance import class_pairs, concordance
from ...fusion.held_out import ClassFold, Floats, SurvivalFold
from ...fusion.log_rank import stratified_log_rank
from ...fusion.resampling import Estimate, resample
from ...io.page import one_line
from ..evaluate import read_metrics
from ..run_folder import Run
from ..task import ClassTask, SurvivalTask

CURVE_STEPS = 40
THIRDS, HALVES = ("low", "middle", "high"), ("low", "high")


class RiskGroups(NamedTuple):
    """Test patients by their risk, with cut-points from the risks of the training patients."""

    names: tuple[str, ...]
    numbers: list[NDArray[np.intp]]
    """Group of each test patient, [n] per fold, from 0."""
    p: float | None
    """Of the log-rank test, stratified by fold."""


@dataclass(frozen=True)
class RunFacts:
    """A run with its name in the report; everything else is computed when it is first needed.

    Args:
        run: a finished run.
        name: its name in the report, in one line.
        number: its place in the report, from 0.
    """

    run: Run
    name: str
    number: int

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json."""
        return read_metrics(self.run)

    @cached_property
    def predictions(self) -> pd.DataFrame:
        """The out-of-fold predictions, fold after fold."""
        return self.run.predictions()

    @cached_property
    def tested(self) -> list[Any]:
        """The test parts; none if the run predicts no test patient."""
        return list(self.run.tested())

    @cached_property
    def folds(self) -> list[dict[str, Any]]:
        """The content of `done.json` of every fold."""
        return [self.run.facts(number) for number in range(len(self.run.splits))]

    @property
    def can_be_evaluated(self) -> bool:
        """Whether enough test patients were predicted for figures."""
        return bool(self.tested) and "reason" not in self.metrics

    @property
    def tested_folds(self) -> list[int]:
        """The number of the fold of every test part."""
        return sorted({int(fold) for fold in self.predictions["fold"]})

    @cached_property
    def histories(self) -> list[Mapping[str, Any]]:
        """The history of the training of every fold; empty lists for baselines."""
        return [fold["history"] for fold in self.folds]


def name_runs(runs: Sequence[Run]) -> list[RunFacts]:
    """Return the runs, named by their folders; by the parents too where two would be the same."""
    paths = [Path(run.path).absolute().parts for run in runs]
    depth, names = 1, [path[-1] for path in paths]
    while len({*names}) < len(names) and depth < max(map(len, paths)):
        depth += 1
        names = ["/".join(path[-depth:]) for path in paths]
    return [
        RunFacts(run, one_line(name) or f"run {number + 1}", number)
        for number, (run, name) in enumerate(zip(runs, names, strict=True))
    ]


# Survival


def risk_groups(facts: RunFacts) -> RiskGroups:
    """Return the groups of the test patients by the tertiles of the training risks of their fold.

    For runs that were trained before motet recorded the tertiles, two groups by the median.
    """
    parts = [facts.folds[number] for number in facts.tested_folds]
    thirds = all(part.get("tertiles") for part in parts)
    cuts = [part["tertiles"] if thirds else [part["cut"]] for part in parts]
    # A patient at a cut-point is in the lower group, as in the metrics.
    numbers = [
        np.searchsorted(np.asarray(cut, float), fold.risks, side="left")
        for cut, fold in zip(cuts, facts.tested, strict=True)
    ]
    names = THIRDS if thirds else HALVES
    return RiskGroups(names, numbers, stratified_log_rank(facts.tested, numbers, len(names)))


def common_times(folds: Sequence[SurvivalFold]) -> Floats:
    """Return evenly spaced times that the curves of all folds reach, [T], without 0."""
    end = min(float(fold.grid[-1]) for fold in folds if fold.grid is not None)
    return np.linspace(0, end, CURVE_STEPS + 1)[1:]


def survival_curves(folds: Sequence[SurvivalFold]) -> tuple[Floats, Floats]:
    """Return times [T], and the curves of the test patients of all folds, [n, T]."""
    times = common_times(folds)
    return times, np.concatenate([survival_at(fold, times) for fold in folds])


def brier_curves(facts: RunFacts) -> tuple[Floats, Floats, Floats]:
    """Return times [T], up to the end of the integrated score, the Brier score of the model, and
    that of Kaplan-Meier."""  # fmt: skip
    score = facts.metrics["integrated_brier"]
    times = np.linspace(0, score["end"], 61)[1:]
    return times, *brier_over_time(facts.tested, times)


# Classes


def class_aucs(folds: Sequence[ClassFold], draws: int) -> dict[int, Estimate]:
    """Return the AUC of each class against the others with its interval; of two classes, class 1.

    The pairs are pooled within folds, as in the metrics.
    """
    classes = folds[0].probabilities.shape[1]
    resampling = resample([fold.labels for fold in folds], draws, 0)
    numbers = (1,) if classes == 2 else range(classes)
    return {
        k: resampling.interval_of_share(concordance(pairs, resampling))
        for k, pairs in zip(numbers, class_pairs(folds, classes), strict=True)
    }


def roc_curve(folds: Sequence[ClassFold], k: int) -> tuple[Floats, Floats]:
    """Return false and true positive rates [P] of class k.

    The curves of the folds are averaged over their true positive rates, weighted by their pairs.
    So the area below the curve is the AUC of the metrics, whose pairs are pooled within folds.
    """
    curves, weights = [], []
    for fold in folds:
        is_k = fold.labels == k
        if is_k.any() and not is_k.all():
            curves.append(_roc_of_fold(is_k, fold.probabilities[:, k]))
            weights.append(is_k.sum() * (~is_k).sum())
    # At the false positive rate of a vertical step the curve has two values: just before and after.
    rates = np.unique(np.concatenate([x for x, _ in curves]))
    points = np.sort(np.concatenate([rates, rates]))
    shares = np.asarray(weights) / np.sum(weights)
    average = sum(
        share * np.where(
            np.arange(len(points)) % 2, _value_at(x, y, points, last=True),
            _value_at(x, y, points, last=False),
        )
        for share, (x, y) in zip(shares, curves, strict=True)
    )  # fmt: skip
    return points, np.asarray(average)


def _roc_of_fold(is_k: NDArray[np.bool_], scores: Floats) -> tuple[Floats, Floats]:
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    positive = np.cumsum(is_k[order])[ends]
    false = np.append(0, ends + 1 - positive) / (~is_k).sum()
    return false.astype(float), np.append(0, positive) / is_k.sum()


def _value_at(x: Floats, y: Floats, points: Floats, *, last: bool) -> Floats:
    """Return y at `points`; where x has a vertical step, its upper end (`last`) or its lower."""
    first_of, last_of = np.searchsorted(x, points, "left"), np.searchsorted(x, points, "right") - 1
    exact = x[np.minimum(first_of, len(x) - 1)] == points
    return np.where(exact, y[last_of if last else np.minimum(first_of, len(x) - 1)],
                    np.interp(points, x, y))  # fmt: skip


# Patients


def patient_rows(facts: RunFacts, names: Mapping[str, str]) -> pd.DataFrame:
    """Return a row for each test patient: its name, fold, outcome, predictions and modalities.

    Args:
        facts: the run.
        names: id to the name that is shown.
    """
    predictions = facts.predictions
    outcome = facts.run.outcome().loc[predictions["patient"]]
    rows = pd.DataFrame(
        {
            "patient": [names[patient] for patient in predictions["patient"]],
            "fold": predictions["fold"] + 1,
        }
    )
    task = facts.run.task
    if isinstance(task, SurvivalTask):
        groups = risk_groups(facts)
        rows["group"] = [groups.names[i] for i in np.concatenate(groups.numbers)]
        rows["risk"] = predictions["risk"]
        rows["time"], rows["event"] = outcome["time"].to_numpy(), outcome["event"].to_numpy()
    else:
        assert isinstance(task, ClassTask)
        columns = [f"p_{name}" for name in task.names]
        rows["class"] = [task.names[label] for label in outcome["label"]]
        best = predictions[columns].to_numpy().argmax(1)
        rows["predicted"] = [task.names[label] for label in best]
        rows = rows.join(predictions[columns])
    has = facts.run.modalities()
    if has is not None:
        present = has.loc[predictions["patient"]]
        rows["modalities"] = [
            ", ".join(present.columns[row]) or "none" for row in present.to_numpy()
        ]
    return rows


def patient_curves(facts: RunFacts) -> str:
    """Return the survival curves of the test patients as JSON: per mille, at common times."""
    times, curves = survival_curves(facts.tested)
    content = {
        "unit": facts.run.config["unit"],
        "times": [float(f"{time:.5g}") for time in times],
        "mean": np.rint(1000 * curves.mean(0)).astype(int).tolist(),
        "curves": np.rint(1000 * curves).astype(int).tolist(),
    }
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
