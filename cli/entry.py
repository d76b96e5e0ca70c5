"""The command `motet`: which commands there are, and how their errors are told."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .doctor import add_doctor, installed_version
from .options import Commands, Parser, add_out
from .store import add_store
from .tile import add_tile
from .train import add_evaluate, add_fuse, add_merge, add_predict, add_train


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        again = "; the same command goes on where it stopped" if hasattr(options, "out") else ""
        print(f"motet {options.command}: interrupted{again}", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        # Bad input: the loaders, checks and models say in one line what is wrong with it.
        message = " ".join(str(error).split())
        print(f"motet {options.command}: {message}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="motet", description="Fuse biomedical modalities in one latent: HEALNet and MM-Lego."
    )
    version = f"motet {installed_version('motet')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_demo, add_tile, add_train, add_merge, add_fuse, add_evaluate, add_predict, add_store,
        _add_bench, add_doctor,
    ):  # fmt: skip
        add(commands)
    return parser


# Demonstration and benchmark load torch: what they run is imported when it is asked for.


def _add_demo(commands: Commands) -> None:
    demo = commands.add_parser("demo", help="train both systems on real patients, with a report")
    add_out(demo, "where to write tables and pictures", default=Path("runs/demo"))
    demo.set_defaults(run=_demo)


def _add_bench(commands: Commands) -> None:
    bench = commands.add_parser(
        "bench",
        help="time HEALNet on this machine, beside the literal equation and the machine's limits",
    )
    bench.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is)")
    bench.add_argument("--dtype", choices=("fp32", "bf16"), help="(default: both)")
    bench.add_argument("--threads", type=int, metavar="N", help="of torch (default: its own)")
    bench.add_argument("--quick", action="store_true", help="sizes that only show that it works")
    bench.add_argument(
        "--json", metavar="FILE", help="write the figures too; - prints them instead of the table"
    )
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
