"""The command that explains predictions."""

import argparse
import sys
import time
from pathlib import Path

from .options import Commands, add_data, add_json, add_out, read_names


def add_explain(commands: Commands) -> None:
    """Add `motet explain`."""
    explain = commands.add_parser(
        "explain",
        help="explain predictions: which features, modalities and patches matter",
        description="Explain the predictions of a finished run of healnet, lego, merge or fuse: "
        "contributions of features and modalities by integrated gradients, and attention, averaged "
        "over the folds that tested a patient, or over all folds for new patients "
        "(docs/how-to/explain.md).",
    )
    explain.add_argument("trained", type=Path, metavar="RUN", help="a finished run")
    explain.add_argument(
        "cohort", help="a YAML file of the patients, or the name of a shipped cohort; no outcome "
        "needed",
    )  # fmt: skip
    add_out(explain, "folder for tables and pictures")
    explain.add_argument(
        "--patients", type=read_names, default=[], metavar="ID,ID",
        help="patients for whom pictures are drawn",
    )  # fmt: skip
    explain.add_argument(
        "--class", metavar="NAME", dest="class_name",
        help="explain the log-odds of this class; optional if there are two, then the last one",
    )  # fmt: skip
    explain.add_argument(
        "--limit", type=int, metavar="N", default=200,
        help="explain at most N patients besides those of --patients, drawn at random (default: "
        "%(default)s; 0 for none)",
    )  # fmt: skip
    add_data(explain)
    add_json(explain)
    explain.set_defaults(run=_explain)


def _explain(options: argparse.Namespace) -> int:
    import json

    from .. import experiments
    from ..io import load_cohort

    if options.limit < 0:
        raise ValueError(f"--limit: expected at least 0, got {options.limit}")
    experiments.check_explanation_folder(options.out)
    run = experiments.Run.finished(options.trained)
    cohort = load_cohort(options.cohort, data=options.data, outcome=False)
    choice = experiments.Choice(tuple(options.patients), options.limit)
    try:
        explanation = experiments.explain_run(
            run, cohort, choice, class_name=options.class_name, progress=_Progress()
        )
    except ImportError as error:  # Captum is missing; the message has the cure
        raise ValueError(str(error)) from error
    about = experiments.write_explanation(explanation, options.out)
    if options.json:
        print(json.dumps(about, indent=2))
        return 0
    print(f"{about['patients']} patients explained: {options.out}")
    for modality, agreement in about["agreement"].items():
        text = agreement if isinstance(agreement, str) else f"Spearman {agreement:.2f}"
        print(f"attention and contributions, {modality}: {text}")
    return 0


class _Progress:
    """Prints a line every few seconds, to standard error."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, done: int, of: int) -> None:
        if time.monotonic() - self.last > 5 and done < of:
            self.last = time.monotonic()
            print(f"motet explain: {done} of {of} patients", file=sys.stderr)
