"""The page of the report: one file without anything beside it, which works offline and on paper.

All texts of cohorts and runs are escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ...fusion.resampling import Comparison
from ...io.cohorts.summary import median_follow_up
from ...io.page import escape, frame_page
from ..task import ClassTask, SurvivalTask
from .drawing import Picture, figure_element
from .facts import RunFacts, patient_curves, patient_rows
from .pictures import format_p

_COLUMN_TITLES = {
    "patient": "Patient", "fold": "Fold", "group": "Risk group", "risk": "Risk", "time": "Time",
    "event": "Event", "class": "Class", "predicted": "Predicted", "modalities": "Modalities",
}  # fmt: skip


class RunReport(NamedTuple):
    """All that the page shows."""

    title: str
    runs: Sequence[RunFacts]
    """The first is the reference."""
    comparisons: Sequence[Comparison]
    """Each further run less the first."""
    comparing: Sequence[Picture]
    """Pictures that show all runs."""
    pictures: Sequence[Sequence[Picture]]
    """Of every run."""
    names: Mapping[str, str]
    """Patient id to the name that is shown."""


def page_parts(report: RunReport) -> Iterator[str]:
    """Yield the parts of the page."""
    before, after = frame_page(f"{report.title}: report", Path(__file__).parent, images="'none'")
    count = len(report.runs)
    yield (
        f"{before}<header>\n<h1><bdi>{escape(report.title)}</bdi></h1>\n"
        f'<p class="muted">Report of {count} run{"s"[: count != 1]}, out of fold</p>\n'
        '<nav><a href="#cohort">Cohort</a> <a href="#figures">Figures</a> '
    )
    for facts in report.runs:
        yield f'<a href="#run-{facts.number + 1}"><bdi>{escape(facts.name)}</bdi></a> '
    yield '<a href="#patients">Patients</a></nav>\n</header>\n<main>\n'
    yield from _cohort(report.runs[0])
    yield from _figures(report)
    for facts, pictures in zip(report.runs, report.pictures, strict=True):
        yield from _run(facts, pictures)
    yield from _patients(report.runs[0], report.names)
    version = escape(report.runs[0].run.config["motet"])
    yield f"</main>\n<footer>Written by motet {version}.</footer>\n{after}"


# The cohort


def _cohort(facts: RunFacts) -> Iterator[str]:
    """Yield counts, outcome, and which modalities patients lack."""
    run, outcome = facts.run, facts.run.outcome()
    tested = len(facts.predictions)
    tiles = [("Patients", f"{len(outcome):,}", f"{tested:,} tested")]
    if isinstance(run.task, SurvivalTask):
        times, events = outcome["time"].to_numpy(float), outcome["event"].to_numpy(bool)
        unit = escape(run.task.unit)
        share = f"{events.mean():.0%} of patients"
        tiles.append(("Events", f"{events.sum():,}", share))
        tiles.append(("Median follow-up", median_follow_up(times, events), unit))
        tiles.append(("Longest follow-up", f"{times.max():,.4g}", unit))
    else:
        assert isinstance(run.task, ClassTask)
        for label, name in enumerate(run.task.names):
            n = int((outcome["label"] == label).sum())
            tiles.append(
                (f"<bdi>{escape(name)}</bdi>", f"{n:,}", f"{n / len(outcome):.0%} of patients")
            )
    tiles.append(("Folds", f"{len(run.splits)}", _part_sizes(run.splits)))
    names = run.config["modalities"]
    tiles.append(("Modalities", f"{len(names)}", ", ".join(map(escape, names))))
    yield '<h2 id="cohort">Cohort</h2>\n<dl class="tiles">'
    for name, count, note in tiles:
        yield f"<div><dt>{name}</dt><dd>{count}<small>{note}</small></dd></div>"
    yield "</dl>\n"
    yield from _missing_pattern(run.modalities(), run.config["command"])


def _part_sizes(splits: Sequence[Mapping[str, Sequence[str]]]) -> str:
    """Return the median sizes of the parts of the folds."""
    sizes = (int(np.median([len(fold[part]) for fold in splits])) for part in splits[0])
    return ", ".join(f"{part} {size:,}" for part, size in zip(splits[0], sizes, strict=True))


def _missing_pattern(has: pd.DataFrame | None, command: str) -> Iterator[str]:
    """Yield a row for each set of modalities that patients have, with their number."""
    yield "<h3>Modalities present</h3>\n"
    if has is None:
        yield (
            '<p class="muted">This run does not record which modalities patients have: it was '
            f"finished by an earlier motet. The same <code>motet {escape(command)}</code>, given "
            "again, adds it.</p>\n"
        )
        return
    head = "".join(f'<th class="c"><bdi>{escape(name)}</bdi></th>' for name in has.columns)
    yield f'<div class="panel scroll"><table class="pattern"><tr><th>Patients</th>{head}</tr>\n'
    counts = has.value_counts()
    largest = int(counts.max())
    for present, n in zip(counts.index, counts, strict=True):
        marks = "".join(
            '<td class="c">●<span class="hidden">present</span></td>' if one
            else '<td class="c muted">–<span class="hidden">missing</span></td>'
            for one in present
        )  # fmt: skip
        yield (
            f'<tr><td class="bars"><svg viewBox="0 0 100 10" preserveAspectRatio="none" '
            f'aria-hidden="true"><rect class="bar" width="{100 * n / largest:.1f}" height="10"/>'
            f"</svg>{n:,} ({n / len(has):.0%})</td>{marks}</tr>\n"
        )
    total = "".join(f'<td class="c">{n:,}</td>' for n in has.sum())
    yield f"<tr><th>n = {len(has):,}</th>{total}</tr></table></div>\n"


# The figures of all runs


def _figures(report: RunReport) -> Iterator[str]:
    """Yield the table of metrics, the differences from the first run, and pictures of all runs."""
    titles = report.runs[0].run.task.metrics
    columns = [
        name for name in titles if any(name in facts.metrics for facts in report.runs)
    ]  # fmt: skip
    head = "".join(f"<th>{escape(titles[name])}</th>" for name in columns)
    difference = "<th>Difference from the first, paired</th>" if report.comparisons else ""
    yield (
        '<h2 id="figures">Figures</h2>\n<p class="muted">Of test patients, with 95 % bootstrap '
        "intervals; pairs are within folds.</p>\n"
        '<div class="panel scroll"><table class="metrics"><tr><th>Run</th><th>Model</th>'
        f'<th class="n">n</th>{head}{difference}</tr>\n'
    )
    for facts in report.runs:
        cells = "".join(f"<td>{_metric(facts.metrics.get(name))}</td>" for name in columns)
        if report.comparisons:
            cells += f"<td>{_difference(report, facts.number)}</td>"
        yield (
            f'<tr><td><a href="#run-{facts.number + 1}"><bdi>{escape(facts.name)}</bdi></a></td>'
            f"<td>{escape(facts.run.config['model'])}</td>"
            f'<td class="n">{facts.metrics["patients"]:,}</td>{cells}</tr>\n'
        )
    yield "</table></div>\n"
    yield from _pictures(report.comparing)


def _metric(metric: Mapping[str, Any] | None) -> str:
    if metric is None:
        return "–"
    if "p" in metric:
        return f"{metric['p']:.2f}" if metric["p"] >= 0.01 else f"{metric['p']:.0e}"
    value = f"<b>{metric['value']:.3f}</b>"
    if "low" not in metric:
        return value
    return f"{value}<small>{metric['low']:.3f} to {metric['high']:.3f}</small>"


def _difference(report: RunReport, number: int) -> str:
    if number == 0:
        return '<span class="muted">reference</span>'
    one = report.comparisons[number - 1]
    return (
        f"<b>{one.difference:+.3f}</b><small>{one.low:+.3f} to {one.high:+.3f}, "
        f"p {escape(format_p(one.p))}</small>"
    )


def _pictures(pictures: Sequence[Picture]) -> Iterator[str]:
    if pictures:
        yield '<div class="charts">\n'
        yield from map(figure_element, pictures)
        yield "</div>\n"


# One run


def _run(facts: RunFacts, pictures: Sequence[Picture]) -> Iterator[str]:
    config = facts.run.config
    trained = sum(fold["parameters"] for fold in facts.folds) // len(facts.folds)
    seconds = sum(fold["seconds"] for fold in facts.folds)
    parts = [
        f"model {escape(config['model'])}",
        "modalities " + ", ".join(map(escape, config["modalities"])),
        f"{trained:,} parameters", f"{seconds:,.0f} s for {len(facts.folds)} folds",
        f"{len(facts.predictions):,} test patients",
    ]  # fmt: skip
    yield (
        f'<section><h2 id="run-{facts.number + 1}"><bdi>{escape(facts.name)}</bdi></h2>\n'
        f'<p class="muted">{" · ".join(parts)}</p>\n'
    )
    if not facts.can_be_evaluated:
        reason = facts.metrics.get("reason", "no test patient has its modality")
        yield f"<p>Without figures: {escape(reason)}.</p>\n"
    yield from _pictures(pictures)
    if facts.can_be_evaluated and isinstance(facts.run.task, ClassTask):
        yield from _confusion(facts, facts.run.task)
    yield "</section>\n"


def _confusion(facts: RunFacts, task: ClassTask) -> Iterator[str]:
    """Yield a table of the classes of patients by the class of the highest probability."""
    labels = np.concatenate([fold.labels for fold in facts.tested])
    predicted = np.concatenate([fold.probabilities.argmax(1) for fold in facts.tested])
    counts = np.zeros((len(task.names), len(task.names)), int)
    np.add.at(counts, (labels, predicted), 1)
    head = "".join(f'<th class="n"><bdi>{escape(name)}</bdi></th>' for name in task.names)
    yield (
        f"<h3>Confusion table (n = {len(labels):,})</h3>\n"
        '<div class="panel scroll"><table class="confusion"><tr><th>Class</th>'
        f'<th class="n">n</th>{head}</tr>\n'
    )
    for k, (name, row) in enumerate(zip(task.names, counts, strict=True)):
        cells = "".join(
            f'<td class="n{" right" if j == k else ""}">{n:,}'
            f"<small>{n / max(1, row.sum()):.0%}</small></td>"
            for j, n in enumerate(row)
        )
        yield f'<tr><th><bdi>{escape(name)}</bdi></th><td class="n">{row.sum():,}</td>{cells}</tr>'
    yield (
        '</table></div>\n<p class="muted">Rows are the classes of the patients, columns the class '
        "of the highest probability; the diagonal is correct.</p>\n"
    )


# The patients


def _patients(facts: RunFacts, names: Mapping[str, str]) -> Iterator[str]:
    """Yield the table of the test patients, which the script can search and sort."""
    yield (
        f'<h2 id="patients">Patients (n = {len(facts.predictions):,})</h2>\n<p class="muted">Test '
        f"patients of <bdi>{escape(facts.name)}</bdi>, predicted by the model of the fold that did "
        "not train on them.</p>\n"
    )
    if not facts.can_be_evaluated:
        return
    rows, task = patient_rows(facts, names), facts.run.task
    with_curves = isinstance(task, SurvivalTask)
    if with_curves:
        yield (
            '<p class="muted">Risks of different folds have no common scale; the groups have. '
            '<span class="scripted screen">Choose a patient to see the survival curve.</span></p>\n'
        )
    yield (
        '<form class="controls" id="controls" hidden><input name="search" type="search" '
        'placeholder="Search patients, groups, modalities" aria-label="Search">'
        '<output id="shown" aria-live="polite"></output></form>\n'
        '<div class="panel" id="patient" hidden></div>\n'
        '<div class="panel scroll tall"><table id="table"><thead><tr>'
    )
    numeric = {name for name in rows.columns if pd.api.types.is_numeric_dtype(rows[name])}
    for name in rows.columns:
        title = _COLUMN_TITLES.get(name, name.removeprefix("p_"))
        title = f"P({title})" if name.startswith("p_") else title
        if name == "time":
            title += f", {task.unit}" if isinstance(task, SurvivalTask) else ""
        css = ' class="n"' if name in numeric else ""
        yield f'<th{css} scope="col"><bdi>{escape(title)}</bdi></th>'
    yield "</tr></thead><tbody>\n"
    for values in rows.itertuples(index=False):
        cells = (_cell(name, value) for name, value in zip(rows.columns, values, strict=True))
        yield f"<tr>{''.join(cells)}</tr>\n"
    yield "</tbody></table></div>\n"
    if with_curves:
        yield f'<script type="application/json" id="curves">{patient_curves(facts)}</script>\n'


def _cell(name: str, value: Any) -> str:
    if name == "event":
        return f'<td class="n">{"yes" if value else "no"}</td>'
    if name == "fold":
        return f'<td class="n">{value}</td>'
    if isinstance(value, float):
        return f'<td class="n">{value:{",.4g" if name == "time" else ".3f"}}</td>'
    return f"<td><bdi>{escape(value)}</bdi></td>"
