"""The command `motet`."""

import argparse
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple


class Check(NamedTuple):
    """One line of `motet doctor`."""

    name: str
    state: str
    """ok, missing or off."""
    detail: str
    cure: str = ""
    needed: bool = False
    """Whether motet does not work without it."""


# Distribution and the oldest version that motet works with, as in pyproject.toml.
REQUIRED = (
    ("numpy", "2"),
    ("pandas", "2.2"),
    ("safetensors", "0.5"),
    ("scikit-learn", "1.6"),
    ("scikit-survival", "0.24"),
    ("matplotlib", "3.9"),
    ("tqdm", "4.66"),
    ("torch", "2.10"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="motet", description="Fuse biomedical modalities in one latent: HEALNet and MM-Lego."
    )
    parser.add_argument("--version", action="version", version=f"motet {_version('motet')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="train both systems on real patients, with a report")
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="where to write tables and pictures (default: %(default)s)",
    )
    doctor = commands.add_parser("doctor", help="say what is built, what is missing, and the cure")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if options.command == "doctor":
        return _doctor(as_json=options.json)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"motet demo: --out: {error}", file=sys.stderr)
        return 2
    from .demo import main as run_demo

    return run_demo(options.out)


def _doctor(*, as_json: bool) -> int:
    checks = _checks()
    if as_json:
        print(json.dumps([check._asdict() for check in checks], indent=2))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            print(f"{check.name:{width}}  {check.state:8}{check.detail}")
            if check.cure:
                print(f"{'':{width}}  {'':8}cure: {check.cure}")
    return 1 if any(check.state == "missing" and check.needed for check in checks) else 0


def _checks() -> list[Check]:
    """Look at what motet needs and what makes it faster."""
    checks = [
        Check("motet", "ok", f"{_version('motet')} in {Path(__file__).parent}"),
        Check("python", "ok", f"{platform.python_version()}, {os.cpu_count()} cores"),
    ]
    for package, floor in REQUIRED:
        found = _version(package)
        cure = f"pip install '{package}>={floor}'"
        if not found:
            checks.append(Check(package, "missing", "not installed", cure, needed=True))
        elif _numbers(found) < _numbers(floor):
            checks.append(Check(package, "missing", f"{found} is older than {floor}", cure, True))
        else:
            checks.append(Check(package, "ok", found))
    try:
        torch = import_module("torch")
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        cure = "reinstall torch: https://pytorch.org/get-started"
        return [*checks, Check("torch import", "missing", str(error), cure, needed=True)]
    checks.append(_native_check())
    checks.append(_gpu_check(torch))
    found = _version("POT")
    checks.append(
        Check("POT", "ok", found)
        if found
        else Check("POT", "off", "for heads merged by optimal transport", "pip install POT")
    )
    return checks


def _native_check() -> Check:
    from .kernels import native

    reason = native.status()
    if not reason:
        return Check("C++ module", "ok", "motet.kernels._C")
    compiler = next((c for c in ("c++", "g++", "clang++", "cl") if shutil.which(c)), None)
    cure = native.CURE if compiler is None else f"run pip with -v to see why {compiler} failed"
    return Check("C++ module", "missing", f"merging runs in torch, slower ({reason})", cure)


def _gpu_check(torch) -> Check:
    if torch.cuda.is_available():
        return Check("GPU", "ok", f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    if torch.version.cuda is None:
        built = "this torch is built for CPUs"
        return Check("GPU", "off", built, "with an NVIDIA GPU: https://pytorch.org/get-started")
    return Check("GPU", "off", f"torch is built for CUDA {torch.version.cuda}, no device found")


def _numbers(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: (2, 13, 0) of 2.13.0+cpu."""
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
