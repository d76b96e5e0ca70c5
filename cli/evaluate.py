"""The commands that evaluate and predict."""

import argparse
from pathlib import Path

from .options import Commands, add_data, add_json


def add_evaluate(commands: Commands) -> None:
    """Add `motet evaluate`."""
    evaluate = commands.add_parser(
        "evaluate",
        help="show metrics of finished runs, and compare them with the first run",
        description="Show the metrics of finished runs on their test parts, with 95 % intervals, "
        "and compare each run with the first one on the same patients. With --on, show those of "
        "an external cohort instead, which the models of all folds predict together.",
    )
    evaluate.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished runs")
    evaluate.add_argument(
        "--on", metavar="COHORT",
        help="an external cohort with its outcome: a YAML file, or the name of a shipped cohort",
    )  # fmt: skip
    add_data(evaluate)
    evaluate.add_argument(
        "--out", type=Path, metavar="CSV",
        help="with --on and one RUN: file for the predictions; NAME_calibration.csv and .svg are "
        "written beside it",
    )  # fmt: skip
    evaluate.add_argument(
        "--draws", type=int, default=1000, metavar="N",
        help="number of bootstrap samples (default: 1000)",
    )  # fmt: skip
    add_json(evaluate)
    evaluate.set_defaults(run=_evaluate)


def add_predict(commands: Commands) -> None:
    """Add `motet predict`."""
    predict = commands.add_parser(
        "predict",
        help="predict new patients with the models of a run",
        description="Predict new patients with the models of all folds of a run, and write the "
        "averages to a CSV file.",
    )
    predict.add_argument("trained", type=Path, metavar="RUN", help="a finished run")
    predict.add_argument("cohort", help="a YAML file of the patients; no outcome needed")
    predict.add_argument("--out", type=Path, required=True, metavar="CSV", help="file to write")
    add_data(predict)
    predict.set_defaults(run=_predict)


def _evaluate(options: argparse.Namespace) -> int:
    from ..experiments import Run
    from .tables import show_runs

    if options.draws < 100:
        raise ValueError(f"--draws: expected at least 100, got {options.draws}")
    if options.on is not None:
        return _evaluate_external(options)
    for name in ("data", "out"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name}: expected together with --on, got it alone")
    runs = [Run.finished(path) for path in options.runs]
    return show_runs(runs, as_json=options.json, draws=options.draws)


def _evaluate_external(options: argparse.Namespace) -> int:
    from .. import experiments
    from .._atomic import write_text
    from ..io import load_cohort
    from . import tables

    out: Path | None = options.out
    if out is not None:
        if len(options.runs) > 1:
            raise ValueError(f"--out: expected one RUN with it, got {len(options.runs)}")
        _check_csv(out)
        _check_beside(out)
    runs = [experiments.Run.finished(path) for path in options.runs]
    cohort = load_cohort(options.on, data=options.data)
    externals = [experiments.External.predict(run, cohort) for run in runs]
    results = [
        (run, external.evaluate(draws=options.draws))
        for run, external in zip(runs, externals, strict=True)
    ]
    comparisons = [e.compare(externals[0], draws=options.draws) for e in externals[1:]]
    if out is not None:
        write_text(out, externals[0].predictions.table().to_csv(index=False))
        experiments.write_calibration(runs[0].task, results[0][1], _calibration_csv(out))
    show = tables.to_json if options.json else tables.external_table
    print(show(results, comparisons))
    return 0


def _predict(options: argparse.Namespace) -> int:
    from .. import experiments
    from .._atomic import write_text
    from ..io import load_cohort

    _check_csv(options.out)
    run = experiments.Run.finished(options.trained)
    cohort = load_cohort(options.cohort, data=options.data, outcome=False)
    table = experiments.predict_cohort(run, cohort)
    write_text(options.out, table.to_csv(index=False))
    trained_on = sum(folds > 0 for folds in table["seen"])
    note = f"; {trained_on} of them were trained on" if trained_on else ""
    print(f"{len(table)} patients predicted{note}: {options.out}")
    return 0


def _check_csv(path: Path) -> None:
    """Raise unless the file is new or holds earlier predictions, which may be overwritten."""
    if path.is_dir() or not path.name:
        raise ValueError(f"--out: expected a file, got the folder {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"--out: no folder {str(path.parent)!r}")
    if not path.exists():
        return
    header = b"patient,modalities,seen,"
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(header)) == header:
                return
    raise ValueError(f"--out: {str(path)!r} exists, and holds no predictions of motet")


def _check_beside(path: Path) -> None:
    """Raise if files for calibration exist that are not of an earlier `path`."""
    csv = _calibration_csv(path)
    for file in (csv, csv.with_suffix(".svg")):
        if file.exists() and not path.exists():
            raise ValueError(f"--out: {str(file)!r} exists, and would be overwritten")


def _calibration_csv(path: Path) -> Path:
    return path.with_name(f"{path.stem}_calibration.csv")
