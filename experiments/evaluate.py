"""Metrics of a finished run, and the comparison of two runs."""

import json
from typing import Any

from ..fusion.resampling import Comparison
from .run_folder import Run, RunError


def evaluate_run(run: Run, *, draws: int = 1000) -> dict[str, Any]:
    """Compute the metrics of a finished run's out-of-fold predictions.

    If no patient was tested (a LegoBlock predicts only patients who have its modality), or too few,
    return only the counts and the reason.
    """
    tested = run.tested()
    if not tested:
        return {"patients": 0, "folds": 0}
    try:
        return run.task.evaluate(tested, draws)
    except ValueError as error:
        return {"patients": sum(map(len, tested)), "folds": len(tested), "reason": str(error)}


def read_metrics(run: Run) -> dict[str, Any]:
    """Return the metrics in metrics.json of a finished run.

    Raises:
        RunError: the file cannot be read.
    """
    try:
        return json.loads((run.path / "metrics.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise RunError(f"{run.path}: incomplete, metrics.json cannot be read: {error}") from error


def compare_runs(run: Run, other: Run, *, draws: int = 1000) -> Comparison:
    """Return how much better `run` is than `other` on the test patients that both predicted.

    A LegoBlock predicts only patients who have its modality.

    Raises:
        RunError: runs of other splits, or of other outcomes.
    """
    if run.splits != other.splits or not run.outcome().equals(other.outcome()):
        raise RunError(f"{other.path}: expected the splits and outcomes of {run.path}, got others")
    shared = set(run.predictions()["patient"]) & set(other.predictions()["patient"])
    if not shared:
        raise RunError(f"{other.path}: predicts no test patient that {run.path} predicts")
    return run.task.compare(run.tested(shared), other.tested(shared), draws)
