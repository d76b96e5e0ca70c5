"""The command is killed at random moments, with two workers and two encoders: nothing is lost."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from motet.io import FeatureStore

from .conftest import SOAK
from .slides import make_pyramid
from .tiling_helpers import command, content, leftovers, tile

FURTHER = """
def mean(pixels):
    return pixels.reshape(len(pixels), -1, 3).mean(1, dtype="f4")
"""
ENCODERS = ("stain-stats", "further:mean")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with five slides and the module of the second encoder."""
    folder = tmp_path_factory.mktemp("cohort")
    (folder / "slides").mkdir()
    for i in range(5):
        make_pyramid(folder / "slides" / f"{i}.tif", size=(1000 + 64 * i, 900), seed=i)
    (folder / "further.py").write_text(FURTHER)
    return folder


@pytest.fixture(autouse=True)
def _find_the_encoder(cohort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(cohort), prepend=os.pathsep)


@pytest.fixture(scope="module")
def undisturbed(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Return the store of an undisturbed run, and the seconds of one command."""
    store = tmp_path_factory.mktemp("undisturbed") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(cohort), prepend=os.pathsep)
        began = time.perf_counter()
        for encoder in ENCODERS:
            tile(cohort / "slides", store, "--encoder", encoder)
    return store, (time.perf_counter() - began) / len(ENCODERS)


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        return [int(child) for child in path.read_text().split()]
    except OSError:
        return []


def killed(arguments: list[str], after_s: float, random: np.random.Generator) -> bool:
    """Run a command; kill it, one of its workers, or all of them; False if it ended before."""
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        process.communicate(timeout=after_s)
    except subprocess.TimeoutExpired:
        workers = children(process.pid)
        victims = [[process.pid], workers[:1], workers[1:], [process.pid, *workers]]
        chosen = victims[int(random.integers(len(victims)))] or [process.pid]
        for victim in chosen:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(victim, signal.SIGKILL)
        process.communicate(timeout=120)
        # A worker that was killed is replaced.
        assert process.returncode in (0, -signal.SIGKILL if process.pid in chosen else 0)
        return True
    assert process.returncode == 0
    return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(25 if SOAK else 2))
def test_kill_and_resume(
    cohort: Path, undisturbed: tuple[Path, float], tmp_path: Path, seed: int
) -> None:
    """Two kills per seed; then the same commands complete the store, with the same bytes."""
    random, kills, expected = np.random.default_rng(seed), 0, content(undisturbed[0])
    store = tmp_path / "store-0"
    while kills < 2:
        store = tmp_path / f"store-{int(store.name[6:]) + 1}"
        for encoder in ENCODERS:
            arguments = command(cohort / "slides", store, "--encoder", encoder, "--workers", "2")
            while kills < 2 and killed(arguments, random.uniform(0, undisturbed[1]), random):
                kills += 1
                if (store / "run.json").exists():  # the store can be read at any moment
                    problems = FeatureStore(store).verify()
                    assert [problem for problem in problems if problem.key] == []
    for encoder in ENCODERS:
        # A dead worker's lease is free at once: no run waits for heartbeats that stay away.
        tile(cohort / "slides", store, "--encoder", encoder, "--workers", "2", timeout=60)
    assert content(store) == expected
    assert not leftovers(store)
    assert FeatureStore(store).verify() == []
