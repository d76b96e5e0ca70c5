"""Metrics of finished runs, and comparisons of two."""

import json
from typing import Any

from ..fusion.resampling import Comparison
from .run_folder import Run, RunError


def evaluate_run(run: Run, *, draws: int = 1000) -> dict[str, Any]:
    """Compute the metrics of a finished run's out-of-fold predictions.

    Where nobody was tested (a LegoBlock predicts only those who have its modality), or too few to
    evaluate, the counts and the reason are given alone.
    """
    tested = run.tested()
    if not tested:
        return {"patients": 0, "folds": 0}
    try:
        return run.task.evaluate(tested, draws)
    except ValueError as error:
        return {"patients": sum(map(len, tested)), "folds": len(tested), "reason": str(error)}


def read_metrics(run: Run) -> dict[str, Any]:
    """Return the metrics of a finished run as they were written.

    Raises:
        RunError: they cannot be read.
    """
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
    return run.task.compare(run.tested(both), other.tested(both), draws)
