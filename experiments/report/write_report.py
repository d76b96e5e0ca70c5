"""Write the report of finished runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..._atomic import write_text
from ...io.store.pseudonyms import pseudonymise_patients
from ..evaluate import compare_runs
from ..run_folder import Run
from ..task import ClassTask
from .drawing import Picture, drawing_style, write_picture
from .facts import RunFacts, name_runs
from .page import RunReport, page_parts
from .pictures import draw_brier, draw_comparison, run_pictures


def write_run_report(
    runs: Sequence[Run],
    out: str | os.PathLike[str],
    *,
    pictures: str | os.PathLike[str] | None = None,
    pseudonyms: str | os.PathLike[str] | None = None,
    draws: int = 1000,
) -> Path:
    """Write one HTML file that shows finished runs of the same patients.

    It has the cohort, the sets of modalities that patients have, the metrics with intervals and
    paired differences from the first run, and for every run the training curves, the survival of
    risk groups with numbers at risk, the Brier score over time, and calibration; for classes ROC
    curves and a confusion table instead of the two former. The patients are those of the first run.
    The page loads nothing; it can be searched and sorted, and printed.

    Args:
        runs: finished runs with equal splits and outcomes; the first is the reference.
        out: the file.
        pictures: a folder for the pictures as SVG and PNG; None for none.
        pseudonyms: a file of pseudonyms, as of `motet tile --pseudonymise`, which is made if it
            does not exist: the page then has pseudonyms in place of the ids of patients.
        draws: bootstrap samples of the differences and the AUCs of classes.

    Returns:
        The path of the file.

    Raises:
        RunError: a run that cannot be read, or runs of other splits or outcomes.
        ValueError: no run, or a file of pseudonyms that would be overwritten or sent with the
            report.
        StoreError: the file of pseudonyms is another file.
        OSError: the report cannot be written.
    """
    if not runs:
        raise ValueError("runs: expected at least one, got none")
    out, folder = Path(out), None if pictures is None else Path(pictures)
    facts = name_runs(runs)
    comparisons = [compare_runs(run, runs[0], draws=draws) for run in runs[1:]]
    patients = facts[0].predictions["patient"].tolist()
    names = {patient: patient for patient in patients}
    if pseudonyms is not None:
        _check_pseudonyms(Path(pseudonyms), out, folder)
        names = pseudonymise_patients(patients, Path(pseudonyms))
    with drawing_style():
        comparing = _comparing_pictures(facts)
        by_run = [list(run_pictures(one, draws)) for one in facts]
    cohort = Path(runs[0].config["cohort"])  # a YAML file, or a name
    title = cohort.stem if cohort.suffix in (".yaml", ".yml") else str(cohort)
    report = RunReport(title, facts, comparisons, comparing, by_run, names)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for picture in [*comparing, *(picture for one in by_run for picture in one)]:
            write_picture(picture, folder)
    write_text(out, "".join(page_parts(report)))
    return out


def _comparing_pictures(facts: Sequence[RunFacts]) -> list[Picture]:
    """Return the pictures that show several runs side by side."""
    known = [one for one in facts if one.can_be_evaluated]
    if len(known) < 2:
        return []
    task = facts[0].run.task
    metric = next(name for name in task.metrics if name in known[0].metrics)
    pictures = [draw_comparison(known, metric, task.metrics[metric])]
    if not isinstance(task, ClassTask):
        with_curves = [one for one in known if "integrated_brier" in one.metrics]
        if len(with_curves) > 1:
            pictures.append(draw_brier(with_curves))
    return pictures


def _check_pseudonyms(file: Path, out: Path, folder: Path | None) -> None:
    """Raise unless the file of pseudonyms stays apart from what is sent."""
    resolved = file.resolve()
    if resolved == out.resolve() or (
        folder is not None and resolved.is_relative_to(folder.resolve())
    ):
        raise ValueError(
            f"pseudonymise: expected a file apart from report and pictures, got {str(file)!r}"
        )
