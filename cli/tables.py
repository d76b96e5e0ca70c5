"""The output of `motet train`, `merge`, `fuse` and `evaluate`."""

import json
from collections.abc import Sequence
from typing import Any

from .. import experiments
from ..experiments import Run
from ..fusion.resampling import Comparison
from ..fusion.training import rank

Result = tuple[Run, dict[str, Any]]


def show_runs(runs: Sequence[Run], *, as_json: bool, draws: int | None = None) -> int:
    """Print the metrics of runs: from disk, or computed anew if `draws` is a number."""
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
    print(to_json(results, comparisons) if as_json else run_table(results, comparisons))
    return 0


def run_table(results: Sequence[Result], comparisons: Sequence[Comparison]) -> str:
    """Return the metrics of runs, and the difference of each from the first, as text."""
    first = results[0][1]
    head = (
        f"out of fold: {_counts(first)}, {first['folds']} test parts; pairs within a part; "
        "95 % bootstrap intervals"
    )
    return "\n".join([head, *_lines(results, comparisons)])


def external_table(results: Sequence[Result], comparisons: Sequence[Comparison]) -> str:
    """Return the same for an external cohort, with the number of patients that are left out."""
    first = results[0][1]
    lines = [f"{first['cohort']}: {_counts(first)}; models of all folds averaged; 95 % intervals"]
    for run, metrics in results:
        reasons = {"trained_on": "were trained on", "without_modality": "have no modality of it"}
        left_out = [f"{metrics[key]} {text}" for key, text in reasons.items() if metrics[key]]
        if left_out:
            lines.append(f"{run.path}: left out: {', '.join(left_out)}")
    return "\n".join([*lines, *_lines(results, comparisons)])


def to_json(results: Sequence[Result], comparisons: Sequence[Comparison]) -> str:
    """Return metrics and differences as JSON."""
    content = {
        "runs": {str(run.path): metrics for run, metrics in results},
        "less_the_first": {
            str(run.path): comparison._asdict()
            for (run, _), comparison in zip(results[1:], comparisons, strict=True)
        },
    }
    return json.dumps(content, indent=2)


def _counts(metrics: dict[str, Any]) -> str:
    events = f", {metrics['events']} events" if "events" in metrics else ""
    return f"{metrics['patients']} patients{events}"


def _lines(results: Sequence[Result], comparisons: Sequence[Comparison]) -> list[str]:
    """Return a row of metrics for each run, and a line for each comparison with the first."""
    titles = results[0][0].task.metrics
    columns = [name for name in titles if any(name in metrics for _, metrics in results)]
    rows = [["run", *(titles[name] for name in columns)]]
    for run, metrics in results:
        rows.append([str(run.path), *(_format_metric(metrics.get(name)) for name in columns)])
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    for run, metrics in results:
        if "reason" in metrics:
            lines.append(f"{run.path} cannot be evaluated: {metrics['reason']}")
    for (run, _), comparison in zip(results[1:], comparisons, strict=True):
        lines.append(
            f"{run.path} minus {results[0][0].path}: {comparison.difference:+.3f} "
            f"({comparison.low:+.3f} to {comparison.high:+.3f}), paired, p = {comparison.p:.2g}"
        )
    return lines


def _format_metric(metric: dict[str, Any] | None) -> str:
    if metric is None:
        return "-"
    if "p" in metric:
        return f"{metric['p']:.2f}" if metric["p"] >= 0.01 else f"{metric['p']:.0e}"
    if "low" not in metric:
        return f"{metric['value']:.3f}"
    dash = " to " if metric["low"] < 0 else "-"
    return f"{metric['value']:.3f} ({metric['low']:.3f}{dash}{metric['high']:.3f})"
