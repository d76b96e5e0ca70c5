"""The command that writes a report of runs."""

import argparse
from pathlib import Path

from .options import Commands


def add_report(commands: Commands) -> None:
    """Add `motet report`."""
    report = commands.add_parser(
        "report",
        help="write one HTML file with figures, pictures and patients of finished runs",
        description="Write one HTML file that shows finished runs of the same patients: cohort, "
        "metrics beside those of the first run, training, survival by risk group, calibration, "
        "and a table of patients. The file loads nothing and works offline.",
    )
    report.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN",
        help="finished runs; the others are compared with the first",
    )  # fmt: skip
    report.add_argument(
        "--out", type=Path, required=True, metavar="FILE.html", help="file to write"
    )
    report.add_argument(
        "--pictures", type=Path, metavar="DIR", help="also write the pictures as SVG and PNG to DIR"
    )
    report.add_argument(
        "--pseudonymise", type=Path, metavar="FILE",
        help="name patients by pseudonyms; FILE, which leads back to the ids, is made if it does "
        "not exist, and may be that of `motet tile`",
    )  # fmt: skip
    report.add_argument(
        "--draws", type=int, default=1000, metavar="N",
        help="number of bootstrap samples of the differences (default: 1000)",
    )  # fmt: skip
    report.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from ..experiments import Run, write_run_report

    if options.draws < 100:
        raise ValueError(f"--draws: expected at least 100, got {options.draws}")
    _check_out(options.out)
    if options.pictures is not None and options.pictures.exists() and not options.pictures.is_dir():
        raise ValueError(f"--pictures: expected a folder, got the file {str(options.pictures)!r}")
    runs = [Run.finished(path) for path in options.runs]
    path = write_run_report(
        runs, options.out, pictures=options.pictures, pseudonyms=options.pseudonymise,
        draws=options.draws,
    )  # fmt: skip
    patients = len(runs[0].predictions())
    print(f"{len(runs)} run{'s'[: len(runs) != 1]}, {patients} test patients: {path}")
    return 0


def _check_out(path: Path) -> None:
    """Raise unless the file can be written, and is new or another HTML file."""
    if path.is_dir() or path.suffix != ".html":
        raise ValueError(f"--out: expected a file that ends in .html, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"--out: no folder {str(path.parent)!r}")
