"""The wheel builds without torch, works without a compiler, and has no unwanted file."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from .conftest import ROOT


def copied(source: Path) -> Path:
    """Copy the files that git tracks or would track, as a user downloads them."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    return source


def pip_wheel(target: Path, source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel in isolation without torch; a constraint makes installing torch impossible."""
    target.mkdir(exist_ok=True)
    without_torch = target / "constraint.txt"
    without_torch.write_text("torch<0\n")
    environment["PIP_CONSTRAINT"] = str(without_torch)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(target)]
    return subprocess.run(
        [*command, str(source)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def build(target: Path, source: Path, **environment: str) -> Path:
    done = pip_wheel(target, source, **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (wheel,) = target.glob("*.whl")
    return wheel


def has_native(wheel: Path) -> bool:
    """Return whether the wheel has both C++ modules; fail if it has only one."""
    with zipfile.ZipFile(wheel) as archive:
        built = {Path(name).parent for name in archive.namelist() if "/_C." in name}
    assert built in ({Path("motet/kernels"), Path("motet/io")}, set())
    return bool(built)


def test_conda_and_citation_say_what_pip_is_told() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    recipe = yaml.safe_load((ROOT / "recipe" / "recipe.yaml").read_text())
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    renamed = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
    requirements = [f"python {project['requires-python']}"]
    for dependency in project["dependencies"]:
        name, floor = dependency.split(">=")
        requirements.append(f"{renamed.get(name, name.lower())} >={floor}")
    assert sorted(recipe["requirements"]["run"]) == sorted(requirements)
    assert recipe["context"]["version"] == citation["version"] == project["version"]


# As on a machine without a compiler: CMake gets compilers that do not exist.
NO_COMPILER = {"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}


@pytest.mark.slow
def test_source_distribution_builds_the_module(tmp_path: Path) -> None:
    source = copied(tmp_path / "source")
    make = "import sys; from setuptools import build_meta as b; print(b.build_sdist(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", make, str(tmp_path)], cwd=source, capture_output=True, check=True
    )
    (archive,) = tmp_path.glob("motet-*.tar.gz")
    assert has_native(build(tmp_path / "wheels", archive)) == (shutil.which("c++") is not None)


@pytest.mark.slow
def test_a_broken_module_is_an_error_where_it_is_required(tmp_path: Path) -> None:
    """With MOTET_REQUIRE_NATIVE=1, a warning in C++ or a missing compiler fails the build."""
    source = copied(tmp_path / "source")
    with open(source / "csrc" / "kernels" / "slerp.cpp", "a") as file:
        file.write("static void unused() {}\n")
    strict = {
        "MOTET_REQUIRE_NATIVE": "1",
        "CMAKE_ARGS": "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON",
    }
    assert pip_wheel(tmp_path / "wheels", source, **strict).returncode != 0
    assert pip_wheel(tmp_path / "wheels", copied(source), **NO_COMPILER, **strict).returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [True, False])
def test_wheel(compiler: bool, tmp_path: Path) -> None:
    wheel = build(
        tmp_path / "wheels", copied(tmp_path / "source"), **({} if compiler else NO_COMPILER)
    )
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    tops = {name.split("/")[0] for name in names}
    assert len(tops) == 2
    assert "motet" in tops
    folders = {
        name.split("/")[1] for name in names if name.startswith("motet/") and "/" in name[6:]
    }
    assert folders == {"cli", "experiments", "fusion", "io", "kernels"}
    assert "motet/setup.py" not in names
    assert "motet/py.typed" in names
    assert "motet/io/cohorts/shipped/breast_cancer.yaml" in names
    assert {f"motet/io/tiling/report/page.{kind}" for kind in ("css", "js")} <= {*names}
    assert has_native(wheel) == compiler

    code = """
import warnings, motet, torch, numpy
from motet.io.native import status
from motet.io.tiling.resample import area_resample
a, b = torch.tensor([1 + 0j]), torch.tensor([0 + 3j])
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(3):
        merged = motet.kernels.harmonic_merge([a, b])
        mean = motet.kernels.slerp([a.real, b.imag])
grey = area_resample(numpy.full((4, 4, 3), 7, "u1"), numpy.zeros(1), numpy.zeros(1), 2.5)
assert grey.tolist() == [[[7, 7, 7]]]
assert torch.allclose(merged, torch.tensor([1.0607 + 1.0607j]), atol=1e-4)
print(sum("torch computes instead" in str(w.message) for w in seen), bool(status()), motet.__file__)
"""
    # -I and an explicit path: neither the checkout nor the editable install is imported.
    script = f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r})\n{code}"
    run = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    warned, without, where = run.stdout.split()
    assert without == str(not compiler)
    assert where.startswith(str(tmp_path))
    assert int(warned) == (0 if compiler else 1)
