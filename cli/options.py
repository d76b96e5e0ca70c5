"""Options that several commands share."""

import argparse
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeAlias


class Parser(argparse.ArgumentParser):
    """A parser whose errors have one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
"""The object to which each command adds its parser."""


def add_out(parser: argparse.ArgumentParser, text: str, default: Path | None = None) -> None:
    """Add --out, a folder; required unless it has a default."""
    note = "" if default is None else " (default: %(default)s)"
    parser.add_argument(
        "--out", type=Path, default=default, required=default is None, metavar="DIR",
        help=text + note,
    )  # fmt: skip


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add --data, the folder of a cohort's files."""
    parser.add_argument(
        "--data", type=Path, metavar="DIR",
        help="folder of the cohort's files (default: that of the YAML file, then "
        "$MOTET_DATA/data, then $MOTET_DATA)",
    )  # fmt: skip


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def add_drop(parser: argparse.ArgumentParser, text: str) -> None:
    """Add --drop, flags of patches separated by commas."""
    parser.add_argument("--drop", type=read_names, default=[], metavar="FLAGS", help=text)


def add_set(parser: argparse.ArgumentParser) -> None:
    """Add --set, read by `read_changes`."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="changes",
        help="change a setting of the model or its training; may be repeated "
        "(docs/how-to/training.md)",
    )  # fmt: skip


def add_modality_dropout(parser: argparse.ArgumentParser) -> None:
    """Add --modality-dropout, short for --set modality_dropout; to be called beside `add_set`."""
    parser.add_argument(
        "--modality-dropout", action="append", metavar="P", dest="changes",
        type=lambda text: f"modality_dropout={text}",
        help="probability of dropping a modality of a patient in a training step (default: 0.2 if "
        "there are several)",
    )  # fmt: skip


def read_names(text: str) -> list[str]:
    """Read names that are separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def read_changes(settings: Sequence[str]) -> dict[str, Any]:
    """Read NAME=VALUE settings; the values are YAML: numbers, true, null, text."""
    import yaml

    changes = {}
    for setting in settings:
        name, separator, value = setting.partition("=")
        if not separator:
            raise ValueError(f"--set: expected NAME=VALUE, got {setting!r}")
        try:
            changes[name] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"--set: cannot read {setting!r}") from error
        # YAML reads 1e-3 as text.
        with suppress(TypeError, ValueError):
            if isinstance(changes[name], str):
                changes[name] = float(changes[name])
    return changes
