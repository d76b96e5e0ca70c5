"""The notebooks and the commands of docs/getting-started.md run unchanged."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.md"))

pytestmark = pytest.mark.slow


def run(command: list[str], folder: Path) -> str:
    """Run a command in a folder, without a display; return what it prints."""
    env = {**os.environ, "MPLBACKEND": "Agg"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path: Path, tmp_path: Path) -> None:
    """All cells of a notebook run in order, in a new process, and draw pictures."""
    cells = re.findall(r"```\{code-cell\}\n(.*?)```", path.read_text(), re.DOTALL)
    assert len(cells) >= 6
    code = "\n".join([*cells, "print('pictures:', len(plt.get_fignums()))"])
    (tmp_path / "cells.py").write_text(code)
    out = run([sys.executable, "-W", "error", "cells.py"], tmp_path)
    assert re.search(r"pictures: [2-9]", out)


def test_getting_started(tmp_path: Path) -> None:
    """The motet commands and the Python blocks of the page run in order, in one folder."""
    page = (ROOT / "docs" / "getting-started.md").read_text()
    printed = []
    for kind, block in re.findall(r"```(sh|python)\n(.*?)```", page, re.DOTALL):
        if kind == "python":
            run([sys.executable, "-c", block], tmp_path)
            continue
        for line in block.splitlines():
            if line.startswith("motet "):
                command = [sys.executable, "-m", "motet", *shlex.split(line)[1:]]
                printed.append(run(command, tmp_path))
    assert "runs/healnet minus runs/cox" in "".join(printed)
    assert (tmp_path / "groups.png").stat().st_size > 10_000
    assert (tmp_path / "risks.csv").read_text().count("\n") == 199
