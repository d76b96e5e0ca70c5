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
        "and compare each run with the first one on the same patients.",
    )
    evaluate.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished runs")
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
    runs = [Run.finished(path) for path in options.runs]
    return show_runs(runs, as_json=options.json, draws=options.draws)


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
