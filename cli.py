"""The command `motet`."""

import argparse
import json
import os
import platform
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
    try:
        if options.command == "demo":
            from .demo import main as run_demo

            return run_demo(options.out)
        return _doctor(as_json=options.json)
    except (OSError, ValueError) as error:
        print(f"motet {options.command}: {error}", file=sys.stderr)
        return 2


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
    return 0


def _checks() -> list[Check]:
    """Look at what motet needs and what makes it faster."""
    checks = [
        Check("motet", "ok", f"{_version('motet')} in {Path(__file__).parent}"),
        Check("python", "ok", f"{platform.python_version()}, {os.cpu_count()} cores"),
    ]
    for package in ("numpy", "pandas", "safetensors", "scikit-survival", "matplotlib"):
        found = _version(package)
        cure = "" if found else f"pip install {package}"
        checks.append(Check(package, "ok" if found else "missing", found or "not installed", cure))
    try:
        torch = import_module("torch")
    except ImportError as error:
        return [*checks, Check("torch", "missing", str(error), "pip install torch")]
    checks.append(Check("torch", "ok", torch.__version__))
    checks.append(_native_check())
    checks.append(_gpu_check(torch))
    found = _version("POT")
    checks.append(
        Check("POT", "ok", found)
        if found
        else Check("POT", "off", "heads merge by optimal transport", "pip install 'motet[ot]'")
    )
    return checks


def _native_check() -> Check:
    from .kernels import _native

    reason = _native.status()
    if not reason:
        return Check("C++ module", "ok", "motet.kernels._C")
    compiler = next((c for c in ("c++", "g++", "clang++", "cl") if shutil.which(c)), None)
    cure = _native.CURE if compiler is None else f"run pip with -v to see why {compiler} failed"
    return Check("C++ module", "missing", f"merging runs in torch, slower ({reason})", cure)


def _gpu_check(torch) -> Check:
    if torch.cuda.is_available():
        return Check("GPU", "ok", f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    if torch.version.cuda is None:
        built = "this torch is built for CPUs"
        return Check("GPU", "off", built, "with an NVIDIA GPU: https://pytorch.org/get-started")
    return Check("GPU", "off", f"torch is built for CUDA {torch.version.cuda}, no device found")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
