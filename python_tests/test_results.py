"""`make results`: it continues, names what is absent or fails, and writes the page."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from benchmarks import results, results_page
from benchmarks.results_page import CohortEntry
from motet import cli, experiments
from motet.experiments import Run

from .cohort_helpers import OUTCOMES, write_cohort
from .conftest import ROOT

ENTRIES = (
    CohortEntry("made.yaml", "Made survival", "survival", seeds=2),
    CohortEntry("classed.yaml", "Made classes", "classes", ("omic",)),
    CohortEntry("nowhere.yaml", "Not here", "survival"),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Write two cohorts; each model is trained for one epoch, in this process."""
    write_cohort(tmp_path, "made", OUTCOMES["survival"], seed=0, n=80, first=0)
    write_cohort(tmp_path, "classed", OUTCOMES["classes"], seed=0, n=80, first=0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "COHORTS", ENTRIES)
    monkeypatch.setattr(results, "SPLITS", ("--splits", "2", "--test", "0.4"))
    few = {"survival": ("cox", "rsf"), "classes": ("logistic", "forest")}
    monkeypatch.setattr(results_page, "BASELINES", few)
    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Return the commands that are run from now on."""
    commands = []

    def run_command(arguments: Sequence[str], log: Path) -> int:
        commands.append(arguments)
        network = {"healnet", "lego", "fuse"} & {*arguments}
        return cli.main([*arguments, *(["--set", "epochs=1"] if network else [])])

    monkeypatch.setattr(results, "run_command", run_command)
    return commands


def make(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = results.main(["--jobs", "1", *arguments], out=Path("runs"), page=Path("page.md"))
    return code, out.getvalue(), err.getvalue()


@pytest.mark.slow
def test_the_page(folder: Path, commands: list[Sequence[str]]) -> None:
    code, _, err = make()
    assert code == 0  # a cohort that is absent is no failure
    assert err.count("nowhere.yaml: skipped: ") == 1
    assert len(commands) == 3 * (2 + 3)
    page = (folder / "page.md").read_text()
    before, after = results_page.NOTES.read_text().split(results_page.TABLES)
    assert page.startswith(before.rstrip())
    assert page.endswith(after.strip() + "\n")
    assert "What was wrong before" in before
    assert "* nowhere.yaml: skipped: " in page
    assert "## Not here" not in page

    table = page[page.index("## Made survival") : page.index("## Made classes")].splitlines()
    rows = {line.split(" | ")[0][2:]: line.split(" | ") for line in table if line[:2] == "| "}
    blocks = ["LegoBlock omic", "LegoBlock blood"]
    names = ["ridge Cox", "random survival forest", "HEALNet", *blocks]
    names += ["LegoMerge, no training", "LegoFuse, 2 epochs"]
    assert list(rows)[1:] == names
    cox, healnet = (Run.finished(Path("runs/made.yaml/seed0") / m) for m in ("cox", "healnet"))
    metrics = experiments.read_metrics(healnet)
    c, brier = metrics["harrell_c"], metrics["scaled_brier"]
    gap = experiments.compare_runs(healnet, cox)
    line = next(line for line in table if line.startswith("| HEALNet |"))
    assert f"| {c['value']:.3f} ({c['low']:.3f} to {c['high']:.3f}) |" in line
    assert f"| {gap.difference:+.3f} ({gap.low:+.3f} to {gap.high:+.3f}) |" in line
    assert f"| {brier['value']:.3f} (" in line
    p = metrics["d_calibration"]["p"]
    assert f"| {p:.2f} |" in line or f"| {p:.0e} |" in line
    # The table of seeds: the figures of both, and their mean.
    other = experiments.read_metrics(Run.finished(Path("runs/made.yaml/seed1/healnet")))
    values = c["value"], other["harrell_c"]["value"]
    figures = " | ".join(f"{value:.3f}" for value in (*values, sum(values) / 2))
    assert [line for line in table if line.startswith(f"| HEALNet | {figures} |")]
    assert "Modalities: omic." in page  # of the second cohort
    assert f"| Made survival | {gap.difference:+.3f} (" in page

    # Nothing is run again; a run that is not finished is.
    commands.clear()
    again = folder / "runs/made.yaml/seed0/fuse/metrics.json"
    again.unlink()
    (folder / "page.md").unlink()
    code, out, _ = make("--only", "made.yaml")
    assert (code, [command[0] for command in commands]) == (0, ["fuse"])
    assert again.exists()
    assert "## Made survival" in out
    assert not (folder / "page.md").exists()


def test_what_fails_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other runs go on, and are in the table."""
    commands = []

    def run_command(arguments: Sequence[str], log: Path) -> int:
        commands.append(arguments)
        if "logistic" in arguments:
            return cli.main(arguments)
        log.write_text("a progress bar\nmotet train: it failed\n")
        return 2

    monkeypatch.setattr(results, "run_command", run_command)
    code, out, err = make("--only", "classed.yaml")
    assert code == 1
    assert "runs/classed.yaml/seed0/lego: exit code 2: motet train: it failed\n" in err
    assert err.count("exit code 2") == 3
    assert len(commands) == 4  # without the blocks nothing is fused
    assert "| logistic regression |" in out
    assert "HEALNet" not in out


def test_all_cohorts_and_models_are_planned() -> None:
    names = {entry.cohort for entry in results.COHORTS}
    shipped = {path.stem for path in (ROOT / "io/cohorts/shipped").glob("*.yaml")}
    requested = {name for name in shipped if name.endswith("_slides") or name.startswith("siim")}
    requested |= {name for name in shipped if name.startswith("mimic3_") and "demo" not in name}
    assert names == shipped - requested
    for entry in results.COHORTS:
        steps = [step for chain in results.plan(entry, Path("runs")) for step in chain]
        models = (*results_page.BASELINES[entry.outcome], "lego", "fuse", "healnet")
        assert len(steps) == entry.seeds * len(models)
        assert {step.out.name for step in steps} == {*models}
        assert len({step.out for step in steps}) == len(steps)


@pytest.mark.slow
def test_interrupted_commands_end(folder: Path) -> None:
    """SIGTERM ends the commands; the same call continues, in processes of their own."""
    code = (
        "import sys; from pathlib import Path; from benchmarks import results, results_page\n"
        "from benchmarks.results_page import CohortEntry\n"
        "results_page.BASELINES = {'classes': ('logistic', 'forest')}\n"
        "results.COHORTS = (CohortEntry('classed.yaml', 'Made', 'classes'),)\n"
        "sys.exit(results.main(['--jobs', '2'], out=Path('runs'), page=Path('page.md')))"
    )
    command = [sys.executable, "-c", code]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths}
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    while not list(folder.glob("runs/*/*/*/config.json")):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; the same command continues" in err
    assert not (folder / "page.md").exists()
    subprocess.run(command, env=env, check=True, timeout=300)
    assert "| LegoFuse, 2 epochs |" in (folder / "page.md").read_text()
