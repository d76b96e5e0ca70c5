"""The command `motet`: its subcommands, and how their errors are printed."""

import argparse
import functools
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from .doctor import add_doctor, installed_version
from .evaluate import add_evaluate, add_predict
from .explain import add_explain
from .options import Commands, Parser, add_out
from .report import add_report
from .store import add_store
from .tile import add_tile
from .train import add_fuse, add_merge, add_train


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = functools.partial(_show_warning, options.command)
            return options.run(options)
    except KeyboardInterrupt:
        note = "; give the same command again to continue" if hasattr(options, "out") else ""
        print(f"motet {options.command}: interrupted{note}", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        # Bad input: the message of the exception says what is wrong, in one line.
        message = " ".join(str(error).split())
        print(f"motet {options.command}: {message}", file=sys.stderr)
        return 2


def _show_warning(command: str, message: Warning | str, *_: object) -> None:
    """Print a warning in one line, without the place in the code."""
    print(f"motet {command}: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="motet", description="Fuse biomedical modalities in one latent: HEALNet and MM-Lego."
    )
    version = f"motet {installed_version('motet')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_demo, add_tile, add_train, add_merge, add_fuse, add_evaluate, add_predict, add_explain,
        add_report, add_store, _add_bench, add_doctor,
    ):  # fmt: skip
        add(commands)
    return parser


# The demo and the benchmark need torch, which takes seconds to import. So they are imported only
# when they run.


def _add_demo(commands: Commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="train HEALNet and MM-Lego on real patients, and report",
        description="Train HEALNet, LegoBlocks, LegoMerge and LegoFuse on 198 patients with breast "
        "cancer, compare them with a linear model, and tile a slide of real tissue.",
    )
    add_out(demo, "folder for runs, tables and pictures", default=Path("runs/demo"))
    demo.set_defaults(run=_demo)


def _add_bench(commands: Commands) -> None:
    bench = commands.add_parser(
        "bench",
        help="time HEALNet here, next to the literal equation and the limits of the machine",
        description="Time the forward pass and the training step of HEALNet on batches of slides, "
        "next to the literal equation in torch and the measured limits of this machine. Exit code "
        "1: a batch failed, or its error was out of bounds.",
    )
    bench.add_argument(
        "--device", choices=("cpu", "cuda"), help="device to measure (default: cuda if available)"
    )
    bench.add_argument("--dtype", choices=("fp32", "bf16"), help="precision (default: both)")
    bench.add_argument(
        "--threads", type=int, metavar="N", help="number of CPU threads (default: as torch sets it)"
    )
    bench.add_argument(
        "--quick", action="store_true", help="tiny sizes, to try the command; times mean nothing"
    )
    bench.add_argument(
        "--json", metavar="FILE",
        help="also write the figures to FILE as JSON; with - print them instead of the table",
    )  # fmt: skip
    bench.set_defaults(run=_bench)


def _demo(options: argparse.Namespace) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    from .demo import main as run_demo

    return run_demo(options.out)


def _bench(options: argparse.Namespace) -> int:
    from .bench import main as run_bench

    return run_bench(
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
        quick=options.quick,
        json_to=options.json,
    )
