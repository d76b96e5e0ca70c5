"""Test a claim of the MM-Lego paper on real data: one figure, one sentence.

    python -m benchmarks.claims merging --out runs/claims/merging

Run it in the checkout. If it was interrupted, the same command continues it. `make claims` runs
all claims; docs/claims.md has their results.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import CLAIMS, run_claim


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help=", ".join(CLAIMS))
    parser.add_argument(
        "--cohort", action="append", metavar="COHORT", dest="cohorts",
        help="a YAML file or a shipped cohort; may be repeated (default: depends on the claim)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR",
        help="folder for figure.png, results.json, results.csv and the runs",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=Path, metavar="DIR",
        help="folder of the cohort's files (default: that of the YAML file, then $MOTET_DATA)",
    )  # fmt: skip
    parser.add_argument(
        "--modalities", type=_split_names, metavar="A,B",
        help="modalities to use (default: depends on the claim)",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=int, metavar="N",
        help="number of seeds for splits, weights and dropout (default: 2 or 3)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="sizes that only show that it works")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


def _split_names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the claim and print its results; return the exit code."""
    options = _options(arguments)
    try:
        result = run_claim(
            options.name, options.out, cohorts=options.cohorts, data=options.data,
            modalities=options.modalities, seeds=options.seeds, quick=options.quick,
        )  # fmt: skip
    except KeyboardInterrupt:
        print("claims: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"claims: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(result.as_json() if options.json else f"{result.table()}\n\nWritten to {options.out}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
