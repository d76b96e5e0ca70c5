"""The text of docs/results.md, from the finished runs of benchmarks/results.py."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from motet import experiments
from motet.experiments import Run
from motet.fusion.resampling import Comparison

NOTES = Path(__file__).with_name("results_notes.md")
TABLES = "<!-- tables -->\n"
"""The line of NOTES for which the tables stand."""
NAMES = {
    "cox": "ridge Cox",
    "coxnet": "elastic-net Cox",
    "logistic": "logistic regression",
    "rsf": "random survival forest",
    "forest": "random forest",
    "boosting": "gradient boosting",
    "healnet": "HEALNet",
    "lego": "LegoMerge, no training",
    "fuse": "LegoFuse, 2 epochs",
}
BASELINES = {
    "survival": ("cox", "coxnet", "rsf", "boosting"),
    "classes": ("logistic", "forest", "boosting"),
}
NETWORKS = ("healnet", "lego", "fuse")


@dataclass(frozen=True)
class CohortEntry:
    """A cohort of the page.

    Args:
        cohort: name of the shipped cohort.
        title: of its section.
        outcome: "survival" or "classes".
        modalities: the modalities that are used; empty for all.
        seeds: number of seeds; seed 0 is in the tables, the others show the spread.
    """

    cohort: str
    title: str
    outcome: str
    modalities: tuple[str, ...] = ()
    seeds: int = 1

    @property
    def baselines(self) -> tuple[str, ...]:
        """The baselines, the linear model first."""
        return BASELINES[self.outcome]

    @property
    def forest(self) -> str:
        """The forest among the baselines."""
        return "rsf" if self.outcome == "survival" else "forest"

    def folder(self, out: Path, seed: int) -> Path:
        """Return the folder of the runs of a seed."""
        return out / self.cohort / f"seed{seed}"


@dataclass(frozen=True)
class ModelRow:
    """A finished run, and its differences from the linear model and the forest.

    Args:
        name: of the model.
        run: the run.
        metrics: of the run.
        less_linear: the paired difference from the linear model; None for itself.
        less_forest: the same from the forest.
        seconds: of all folds, training and prediction; of a merge with its blocks.
    """

    name: str
    run: Run
    metrics: dict[str, Any]
    less_linear: Comparison | None
    less_forest: Comparison | None
    seconds: float

    @property
    def figure(self) -> dict[str, Any]:
        """Harrell's c, AUC or macro AUC."""
        return next(self.metrics[k] for k in ("harrell_c", "auc", "macro_auc") if k in self.metrics)


def results_page(entries: Sequence[CohortEntry], out: Path, problems: Sequence[str]) -> str:
    """Return the page: the notes, with the tables of all cohorts in their place.

    Args:
        entries: the cohorts.
        out: folder of the runs.
        problems: what was absent and what failed, a line each.
    """
    before, after = NOTES.read_text().split(TABLES)
    rows = {entry: read_rows(entry, out, 0) for entry in entries}
    parts = [before.rstrip(), _describe_machine(problems), _summary(rows)]
    parts += [_section(entry, rows[entry], out) for entry in entries if rows[entry]]
    return "\n\n".join([*parts, after.strip()]) + "\n"


def cohort_section(entry: CohortEntry, out: Path) -> str:
    """Return the section of one cohort."""
    return _section(entry, read_rows(entry, out, 0), out)


def read_rows(entry: CohortEntry, out: Path, seed: int) -> list[ModelRow]:
    """Return the finished runs of a cohort and seed: baselines, HEALNet, blocks, merge, fuse."""
    folder = entry.folder(out, seed)
    linear, forest = (_read(folder / model) for model in (entry.baselines[0], entry.forest))
    rows = []
    for model in (*entry.baselines, *NETWORKS):
        run = _read(folder / model)
        if run is None:
            continue
        blocks = experiments.blocks_of([run.path]) if model == "lego" else []
        runs = [(f"LegoBlock {b.config['modalities'][0]}", b, [b]) for b in blocks]
        runs.append((NAMES[model], run, [run, *blocks]))
        for name, one, timed in runs:
            metrics = experiments.read_metrics(one)
            if metrics["patients"] and "reason" not in metrics:
                gaps = _compare(one, linear), _compare(one, forest)
                seconds = sum(map(_seconds, timed))
                rows.append(ModelRow(name, one, metrics, gaps[0], gaps[1], seconds))
    return rows


def _section(entry: CohortEntry, rows: Sequence[ModelRow], out: Path) -> str:
    lines = [f"## {entry.title}", ""]
    if not rows:
        return "\n".join([*lines, "No finished run."])
    run, metrics = rows[0].run, rows[0].metrics
    events = f", {metrics['events']} events" if "events" in metrics else ""
    parts = metrics["folds"]
    lines += [
        f"Cohort `{entry.cohort}`. {metrics['patients']} patients tested{events}, {parts} test "
        f"part{'s'[: parts != 1]}. Modalities: {', '.join(run.config['modalities'])}.",
        "",
        *_table(entry, rows),
    ]
    if entry.seeds > 1:
        by_seed = [rows, *(read_rows(entry, out, seed) for seed in range(1, entry.seeds))]
        lines += ["", *_seed_table(entry, by_seed)]
    return "\n".join(lines)


def _table(entry: CohortEntry, rows: Sequence[ModelRow]) -> list[str]:
    titles = rows[0].run.task.metrics
    metric = next(titles[k] for k in ("harrell_c", "auc", "macro_auc") if k in rows[0].metrics)
    last = "D-calibration p" if entry.outcome == "survival" else "calibration error"
    lines = [
        f"| model | {metric} | difference from {NAMES[entry.baselines[0]]} | difference from "
        f"{NAMES[entry.forest]} | scaled Brier | {last} | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        p = row.metrics.get("d_calibration", {}).get("p")
        error = row.metrics.get("calibration_error", {}).get("value")
        cells = [
            row.name, _interval(row.figure), _difference(row.less_linear),
            _difference(row.less_forest), _interval(row.metrics.get("scaled_brier")),
            _p_value(p) if p is not None else f"{error:.3f}" if error is not None else "",
            f"{row.seconds:.0f}" if row.seconds >= 10 else f"{row.seconds:.1f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _seed_table(entry: CohortEntry, by_seed: Sequence[Sequence[ModelRow]]) -> list[str]:
    """Return the figures of every seed, and the means of figures and differences."""
    seeds = [f"seed {number}" for number in range(len(by_seed))]
    lines = [
        f"| model | {' | '.join(seeds)} | mean | mean difference from "
        f"{NAMES[entry.baselines[0]]} | mean difference from {NAMES[entry.forest]} |",
        f"|{'---|' * (len(seeds) + 4)}",
    ]
    for row in by_seed[0]:
        same = [next((r for r in rows if r.name == row.name), None) for rows in by_seed]
        known = [one for one in same if one is not None]
        values = [one.figure["value"] for one in known]
        cells = ["" if one is None else f"{one.figure['value']:.3f}" for one in same]
        cells.append(f"{sum(values) / len(values):.3f}")
        for less in ("less_linear", "less_forest"):
            gaps = [getattr(one, less) for one in known if getattr(one, less) is not None]
            mean = sum(gap.difference for gap in gaps) / max(len(gaps), 1)
            cells.append(f"{mean:+.3f}" if gaps else "")
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return lines


def _summary(rows_of: dict[CohortEntry, list[ModelRow]]) -> str:
    """Return a table of the networks' differences from the linear model, and from the forest."""
    lines = ["## All cohorts", ""]
    titles = {
        "less_linear": "the linear model (ridge Cox or logistic regression)",
        "less_forest": "the forest",
    }
    for less, title in titles.items():
        lines += [
            f"Difference of c or AUC from {title}, seed 0:",
            "",
            f"| cohort | {' | '.join(NAMES[model] for model in NETWORKS)} |",
            f"|{'---|' * (len(NETWORKS) + 1)}",
        ]
        for entry, rows in rows_of.items():
            gaps = {row.name: getattr(row, less) for row in rows}
            cells = [_difference(gaps.get(NAMES[model])) for model in NETWORKS]
            if rows:
                lines.append(f"| {entry.title} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).strip()


def _describe_machine(problems: Sequence[str]) -> str:
    root = Path(__file__).parents[1]
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True
    ).stdout.strip()
    lines = [
        f"`make results` wrote this page at revision {revision or 'unknown'}, with torch "
        f"{version('torch')}. Seconds are\nthose of all folds, in a process of one thread, beside "
        "another such process."
    ]
    if problems:
        lines += ["", "Not in the tables:", "", *(f"* {problem}" for problem in problems)]
    return "\n".join(lines)


def _read(folder: Path) -> Run | None:
    """Return a finished run, or None."""
    return Run.finished(folder) if (folder / "metrics.json").is_file() else None


def _seconds(run: Run) -> float:
    return sum(run.facts(number)["seconds"] for number in range(len(run.splits)))


def _compare(run: Run, other: Run | None) -> Comparison | None:
    if other is None or run.path == other.path:
        return None
    return experiments.compare_runs(run, other)


def _interval(figure: dict[str, float] | None) -> str:
    if figure is None:
        return ""
    return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"


def _p_value(p: float) -> str:
    return f"{p:.2f}" if p >= 0.01 else f"{p:.0e}"


def _difference(gap: Comparison | None) -> str:
    return "" if gap is None else f"{gap.difference:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})"
