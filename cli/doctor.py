"""`motet doctor`: check the installation, and name the cure for everything that is missing."""

import argparse
import json
import os
import platform
import re
import shutil
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from .options import Commands, add_json


class Check(NamedTuple):
    """One line of `motet doctor`."""

    name: str
    state: str
    """ok; missing; or off, if motet works without it."""
    detail: str
    cure: str = ""
    needed: bool = False
    """Whether motet needs it to work at all."""


# Package and the oldest version that motet works with, as in pyproject.toml.
REQUIRED = (
    ("numpy", "2"),
    ("pandas", "3"),
    ("pillow", "11"),
    ("safetensors", "0.5"),
    ("scikit-learn", "1.9.1"),
    ("scikit-survival", "0.28"),
    ("scipy", "1.14"),
    ("matplotlib", "3.9"),
    ("tqdm", "4.66"),
    ("filelock", "3.16"),
    ("pyarrow", "22"),
    ("pydantic", "2.10"),
    ("PyYAML", "6"),
    ("zarr", "3.1"),
    ("numcodecs", "0.14"),
    ("google-crc32c", "1.6"),
    ("lightning", "2.6.6"),
    ("torch", "2.10"),
)
# Package, what it is needed for, and the cure.
WSI = "pip install 'motet[wsi]'"
OPTIONAL = (
    ("POT", "for heads merged by optimal transport", "pip install POT"),
    ("tifffile", "for slides in TIFF, and to check them for the other readers", WSI),
    ("imagecodecs", "for compressed TIFF", WSI),
    ("openslide-python", "for slides in the formats of scanners", WSI),
    ("scikit-image", "for tissue masks", WSI),
    ("h5py", "for features of TRIDENT and CLAM", WSI),
    (
        "cucim-cu13",
        "for reading tiles 8 times as fast as with OpenSlide; Linux only",
        "with a GPU: pip install 'motet[cucim]'; without: pip install --no-deps cucim-cu13 and "
        "pip install click lazy-loader",
    ),
    ("ray", "for tiling on a Ray cluster", "pip install 'motet[ray]'"),
    ("transformers", "for encoders hf:...", "pip install 'motet[encoders]'"),
    ("timm", "for encoders timm:...", "pip install 'motet[encoders]'"),
    ("torchvision", "for encoders torchvision:...", "the build that fits your torch: "
     "https://pytorch.org/get-started"),
)  # fmt: skip


def add_doctor(commands: Commands) -> None:
    """Add `motet doctor`."""
    doctor = commands.add_parser(
        "doctor",
        help="check the installation, and say how to get what is missing",
        description="Check the packages and devices that motet needs or can use. The states are "
        "ok, missing, and off (motet works without it). Exit code 1: something that motet needs is "
        "missing.",
    )
    add_json(doctor)
    doctor.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    checks = _run_checks()
    if options.json:
        print(json.dumps([check._asdict() for check in checks], indent=2))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            print(f"{check.name:{width}}  {check.state:8}{check.detail}")
            if check.cure:
                print(f"{'':{width}}  {'':8}cure: {check.cure}")
    return 1 if any(check.state == "missing" and check.needed for check in checks) else 0


def _run_checks() -> list[Check]:
    """Check what motet needs and what makes it faster."""
    checks = [
        Check("motet", "ok", f"{installed_version('motet')} in {Path(__file__).parents[1]}"),
        Check("python", "ok", f"{platform.python_version()}, {os.cpu_count()} cores"),
    ]
    for package, floor in REQUIRED:
        installed = installed_version(package)
        cure = f"pip install '{package}>={floor}'"
        if not installed:
            checks.append(Check(package, "missing", "not installed", cure, needed=True))
        elif _version_numbers(installed) < _version_numbers(floor):
            checks.append(
                Check(package, "missing", f"{installed} is older than {floor}", cure, True)
            )
        else:
            checks.append(Check(package, "ok", installed))
    try:
        torch = import_module("torch")
    except (ImportError, OSError) as error:  # OSError: a shared library cannot be loaded
        cure = "reinstall torch: https://pytorch.org/get-started"
        return [*checks, Check("torch import", "missing", str(error), cure, needed=True)]
    checks += [_check_native(), _check_gpu(torch), _check_triton(torch)]
    return [*checks, *(_check_optional(*optional) for optional in OPTIONAL)]


def _check_optional(package: str, purpose: str, cure: str) -> Check:
    installed = installed_version(package)
    return Check(package, "ok", installed) if installed else Check(package, "off", purpose, cure)


def _check_native() -> Check:
    from ..io import native as native_io
    from ..kernels import native

    reason = native.status() or native_io.status()
    if not reason:
        return Check("C++ modules", "ok", "motet.kernels._C, motet.io._C")
    compiler = next((c for c in ("c++", "g++", "clang++", "cl") if shutil.which(c)), None)
    cure = native.CURE if compiler is None else f"run pip with -v to see why {compiler} failed"
    slower = f"torch and numpy compute instead, slower ({reason})"
    return Check("C++ modules", "missing", slower, cure)


def _check_gpu(torch) -> Check:
    if torch.cuda.is_available():
        return Check("GPU", "ok", f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    if torch.version.cuda is None:
        built = "this torch is built for CPUs only"
        cure = "with an NVIDIA GPU, a CUDA build of torch: https://pytorch.org/get-started"
        return Check("GPU", "off", built, cure)
    return Check("GPU", "off", f"torch is built for CUDA {torch.version.cuda}, no device found")


def _check_triton(torch) -> Check:
    installed = installed_version("triton")
    if installed and _version_numbers(installed) >= (3, 6):
        return Check("triton", "ok", installed)
    reason = f"{installed} is older than 3.6" if installed else "not installed"
    if not torch.cuda.is_available():
        return Check("triton", "off", f"{reason}; the kernels are for GPUs")
    return Check(
        "triton", "missing", f"{reason}; attention runs in torch, slower", "pip install triton"
    )


def _version_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of a version: (2, 13, 0) for 2.13.0+cpu."""
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])


def installed_version(package: str) -> str:
    """Return the version of a package, "" if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
