"""Put a claim of the MM-Lego paper to the test on real data: one figure, one sentence.

    python -m benchmarks.claims merging --out runs/claims/merging

From the checkout; docs/claims.md has the figures. The same command again continues one that was
stopped. `make claims` runs all of them.
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
        help="a YAML file or a shipped cohort; may be repeated (default: the claim's own)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR",
        help="for figure.png, results.json, results.csv and the runs",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=Path, metavar="DIR",
        help="folder of the cohort's files (default: beside the YAML, then $MOTET_DATA)",
    )  # fmt: skip
    parser.add_argument(
        "--modalities", type=_names, metavar="A,B", help="those to use (default: the claim's own)"
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="of splits, weights and dropout (default: 2 or 3)"
    )
    parser.add_argument("--quick", action="store_true", help="sizes that only show that it works")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the claim, print what it found; return the exit code."""
    options = _options(arguments)
    try:
        result = run_claim(
            options.name, options.out, cohorts=options.cohorts, data=options.data,
            modalities=options.modalities, seeds=options.seeds, quick=options.quick,
        )  # fmt: skip
    except KeyboardInterrupt:
        print("claims: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"claims: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(result.as_json() if options.json else f"{result.table()}\n\nWritten to {options.out}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
