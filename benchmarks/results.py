"""Make docs/results.md anew: `python -m benchmarks.results [--only COHORT] [--jobs N]`.

Trains every model with its default settings on every cohort whose data are on this machine, with
`motet` commands, and writes the page from the finished runs. The runs are in runs/results. If it
was interrupted, the same command continues it: finished runs are not repeated, and a run that was
interrupted continues. A run that fails is named, and the others go on.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from motet.io import load_cohort
from motet.io.errors import CohortError

from .results_page import CohortEntry, cohort_section, results_page

OUT, PAGE = Path("runs/results"), Path("docs/results.md")
COHORTS = (
    CohortEntry("tcga_blca", "TCGA-BLCA, overall survival", "survival", seeds=3),
    CohortEntry("tcga_kirp", "TCGA-KIRP, overall survival", "survival", seeds=3),
    CohortEntry("tcga_stad", "TCGA-STAD, overall survival", "survival"),
    CohortEntry("tcga_lusc", "TCGA-LUSC, overall survival", "survival"),
    CohortEntry("hancock_os", "HANCOCK, overall survival", "survival"),
    CohortEntry("hancock_rfs", "HANCOCK, relapse-free survival", "survival"),
    CohortEntry("breast_cancer", "Breast cancer, distant metastasis", "survival"),
    # Diagnoses are coded at discharge, when the outcome is known.
    CohortEntry(
        "mimic3_demo_death", "MIMIC-III demo, death in hospital", "classes", ("static", "labs")
    ),
    CohortEntry("mimic3_demo_icd9_neoplasms", "MIMIC-III demo, neoplasms", "classes"),
    CohortEntry("mimic3_demo_icd9_respiratory", "MIMIC-III demo, respiratory diseases", "classes"),
    CohortEntry("breast_tcga", "Breast TCGA, PAM50 subtype", "classes"),
    CohortEntry("physionet2012", "PhysioNet 2012, death in hospital", "classes"),
    CohortEntry("ham10000", "HAM10000, melanoma", "classes"),
)
SPLITS = ("--splits", "5", "--test", "0.2")  # every patient is tested once


@dataclass(frozen=True)
class Step:
    """One `motet` command.

    Args:
        arguments: those of `motet`.
        out: the run folder, which is the last of them.
    """

    arguments: tuple[str, ...]
    out: Path

    def is_done(self) -> bool:
        """Return whether the run is finished."""
        return (self.out / "metrics.json").is_file()


def plan(entry: CohortEntry, out: Path) -> list[list[Step]]:
    """Return the commands of a cohort; those of an inner list need each other, in order.

    The longest are first, so that two processes end at nearly the same time.
    """
    chains = []
    for seed in range(entry.seeds):
        folder = entry.folder(out, seed)

        def train(model: str, folder: Path = folder, seed: int = seed) -> Step:
            modalities = ("--modalities", ",".join(entry.modalities)) if entry.modalities else ()
            options = ("--model", model, *SPLITS, "--seed", str(seed), *modalities)
            path = folder / model
            return Step(("train", entry.cohort, *options, "--out", str(path)), path)

        fused = folder / "fuse"
        fuse = Step(("fuse", str(folder / "lego"), "--out", str(fused)), fused)
        chains += [[train("lego"), fuse], [train("healnet")]]
        chains += [[train(model)] for model in reversed(entry.baselines)]
    return chains


def run_chain(chain: Sequence[Step]) -> str | None:
    """Run commands in order, those that are not done; return what failed in one line, or None."""
    for step in chain:
        if step.is_done():
            continue
        print("motet", *step.arguments, flush=True)
        log = step.out.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        code = run_command(step.arguments, log)
        if code:
            lines = log.read_text().strip().splitlines()
            return f"{step.out}: exit code {code}: {lines[-1] if lines else 'no message'}"
    return None


def run_command(arguments: Sequence[str], log: Path) -> int:
    """Run `motet` in a process of one thread, which ends with this one; return its exit code."""
    command = [sys.executable, "-m", "motet", *arguments]
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}
        ) as process,
    ):
        PROCESSES.add(process)
        try:
            return process.wait()
        finally:
            PROCESSES.discard(process)


PROCESSES: set[subprocess.Popen[bytes]] = set()


def run_cohorts(entries: Sequence[CohortEntry], out: Path, jobs: int) -> Iterator[str]:
    """Run what is not done, `jobs` commands at a time; yield what is absent and what failed."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = []
        try:
            for entry in entries:
                chains = plan(entry, out)
                if all(step.is_done() for chain in chains for step in chain):
                    continue
                absent = find_absent(entry.cohort)
                if absent is not None:
                    yield f"{entry.cohort}: skipped: {absent}"
                    continue
                futures += [pool.submit(run_chain, chain) for chain in chains]
            for future in as_completed(futures):
                failure = future.result()
                if failure is not None:
                    yield failure
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(PROCESSES):
                process.terminate()
            raise


def find_absent(cohort: str) -> str | None:
    """Return why a cohort cannot be read on this machine, in one line, or None."""
    try:
        load_cohort(cohort)
    except (CohortError, OSError) as error:
        return " ".join(str(error).split())
    return None


def main(arguments: Sequence[str] | None = None, *, out: Path = OUT, page: Path = PAGE) -> int:
    """Run what is not done, then write the page, or print one section; return the exit code.

    Args:
        arguments: of the command line.
        out: folder of the runs.
        page: file to write.
    """
    parser = argparse.ArgumentParser(prog="benchmarks.results", description=__doc__)
    parser.add_argument(
        "--only", metavar="COHORT", choices=[entry.cohort for entry in COHORTS],
        help="run this cohort only, and print its section instead of writing the page",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=2, metavar="N",
        help="commands at a time, each of one thread (default: 2)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    entries = [entry for entry in COHORTS if options.only in (None, entry.cohort)]
    problems = []
    try:
        for problem in run_cohorts(entries, out, options.jobs):
            print(problem, file=sys.stderr, flush=True)
            problems.append(problem)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    if options.only:
        print(cohort_section(entries[0], out))
    else:
        page.write_text(results_page(entries, out, problems))
        print(page)
    return int(any(": skipped: " not in problem for problem in problems))


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
