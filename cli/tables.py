"""The output of `motet train`, `merge`, `fuse` and `evaluate`."""

import json
from collections.abc import Sequence
from typing import Any

from ..experiments import Run
from ..fusion.resampling import Comparison

Result = tuple[Run, dict[str, Any]]


def table(results: Sequence[Result], comparisons: Sequence[Comparison]) -> str:
    """Return the metrics of runs, and the difference of each from the first, as text."""
    columns = results[0][0].task.metrics
    columns = {name: title for name, title in columns.items() if any(name in m for _, m in results)}
    width = max(len(str(run.path)) for run, _ in results)
    first = results[0][1]
    counts = f"{first['patients']} patients"
    if "events" in first:
        counts += f", {first['events']} events"
    lines = [
        f"out of fold: {counts}, test parts: {first['folds']}; pairs within a part only; 95 % "
        "bootstrap intervals",
        f"{'run':{width}}" + "".join(f"  {title:22}" for title in columns.values()),
    ]
    for run, metrics in results:
        cells = [_format_metric(metrics.get(name)) for name in columns]
        lines.append(f"{run.path!s:{width}}" + "".join(f"  {cell:22}" for cell in cells))
    for run, metrics in results:
        if "reason" in metrics:
            lines.append(f"{run.path} cannot be evaluated: {metrics['reason']}")
    for (run, _), comparison in zip(results[1:], comparisons, strict=True):
        lines.append(
            f"{run.path} minus {results[0][0].path}: {comparison.difference:+.3f} "
            f"({comparison.low:+.3f} to {comparison.high:+.3f}), paired, p = {comparison.p:.2g}"
        )
    return "\n".join(line.rstrip() for line in lines)


def as_json(results: Sequence[Result], comparisons: Sequence[Comparison]) -> str:
    """Return the same as JSON."""
    content = {
        "runs": {str(run.path): metrics for run, metrics in results},
        "less_the_first": {
            str(run.path): comparison._asdict()
            for (run, _), comparison in zip(results[1:], comparisons, strict=True)
        },
    }
    return json.dumps(content, indent=2)


def _format_metric(metric: dict[str, float] | None) -> str:
    if metric is None:
        return "-"
    return f"{metric['value']:.3f} ({metric['low']:.3f}-{metric['high']:.3f})"
