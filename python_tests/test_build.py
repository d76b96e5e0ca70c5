"""The wheel: built without torch, usable without a compiler, nothing in it that should not be."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .conftest import ROOT


def build(target: Path, source: Path, environment: dict[str, str]) -> Path:
    """Run pip wheel on a copy of the tracked files, as a user would on a download."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True)
    changed = subprocess.run(
        ["git", "ls-files", "--modified", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in changed:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    log = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(target), str(source)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert log.returncode == 0, log.stdout[-3000:] + log.stderr[-3000:]
    assert "torch" not in [line.split("==")[0] for line in log.stdout.splitlines()]
    assert "Collecting torch" not in log.stdout
    (wheel,) = target.glob("*.whl")
    return wheel


@pytest.mark.parametrize("compiler", [True, False])
def test_wheel(compiler: bool, tmp_path: Path) -> None:
    import os

    environment = dict(os.environ)
    if not compiler:
        # What CMake finds on a machine without one: nothing that runs.
        environment |= {"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}
    wheel = build(tmp_path / "wheels", tmp_path / "source", environment)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    tops = {name.split("/")[0] for name in names}
    assert len(tops) == 2
    assert "motet" in tops
    folders = {
        name.split("/")[1] for name in names if name.startswith("motet/") and "/" in name[6:]
    }
    assert folders == {"fusion", "io", "kernels"}
    assert not {"motet/setup.py", "motet/io/cohorts.pyc"} & set(names)
    assert "motet/py.typed" in names
    assert any(name.startswith("motet/kernels/_C.") for name in names) == compiler

    code = """
import warnings, motet, torch
a, b = torch.tensor([1 + 0j]), torch.tensor([0 + 3j])
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(3):
        merged = motet.kernels.harmonic_merge([a, b])
        mean = motet.kernels.slerp([a.real, b.imag])
assert torch.allclose(merged, torch.tensor([1.0607 + 1.0607j]), atol=1e-4)
print(sum("falls back to torch" in str(w.message) for w in seen), motet.__file__)
"""
    # -I and a path of our own: neither the checkout nor the editable install can help.
    script = f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r})\n{code}"
    run = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    warned, where = run.stdout.split()
    assert where.startswith(str(tmp_path))
    assert int(warned) == (0 if compiler else 1)
