"""A cohort of a claim, and what is trained on it."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from motet import experiments
from motet.experiments import Run
from motet.fusion.fitted import Fitted
from motet.fusion.lego_block import LegoBlock
from motet.io import Classes, Cohort, CohortError, load_cohort

# Diagnoses of MIMIC are coded at discharge, when the outcome is known; the test set of breast TCGA
# has no protein.
MODALITIES = {
    "mimic3_demo_death": ("static", "labs"),
    "mimic3_demo_icd9_neoplasms": ("static", "labs"),
    "mimic3_demo_icd9_respiratory": ("static", "labs"),
    "breast_tcga": ("mrna", "mirna"),
}
# What --quick trains: something that shows that it works.
QUICK = {"epochs": 2, "num_latents": 4, "latent_dim": 8}


@dataclass(frozen=True)
class Study:
    """A cohort of a claim.

    Args:
        name: what it is called in the results.
        cohort: the patients.
        out: where its runs are.
        seeds: number of seeds: of splits (without split files), weights and dropout.
        quick: whether to train next to nothing.
    """

    name: str
    cohort: Cohort
    out: Path
    seeds: int
    quick: bool

    @property
    def measure(self) -> str:
        """What the cohort's predictions are measured by."""
        if isinstance(self.cohort.outcome, Classes):
            return "AUC" if len(self.cohort.outcome.names) == 2 else "macro AUC"
        return "Harrell's c"

    @property
    def splits(self) -> int:
        """Number of splits that test every patient once, where there are no split files."""
        return 2 if self.quick else 5

    def train(
        self,
        kind: str,
        seed: int,
        folder: str,
        *,
        cohort: Cohort | None = None,
        changes: Mapping[str, Any] | None = None,
    ) -> Run:
        """Train, or go on, or return what was trained."""
        return experiments.train_run(
            cohort or self.cohort,
            kind,
            self.out / f"seed{seed}" / folder,
            changes={**(QUICK if self.quick else {}), **(changes or {})},
            splits=experiments.Splits(self.splits, test=1 / self.splits, seed=seed),
        )

    def blocks(self, run: Run) -> dict[str, Run]:
        """Return the runs of the blocks of a "lego" run, by modality."""
        runs = experiments.blocks_of([run.path])
        return {one.config["modalities"][0]: one for one in runs}


def studies(
    names: Sequence[str],
    out: Path,
    *,
    data: Path | None,
    modalities: Sequence[str] | None,
    seeds: int,
    quick: bool,
    given: bool,
    usual: Mapping[str, tuple[str, ...]],
) -> list[Study]:
    """Load the cohorts; of the default ones, those whose data are there.

    `usual` names the modalities of some cohorts, unless they are given.
    """
    found = []
    for name in names:
        try:
            cohort = load_cohort(name, data=data)
        except CohortError as error:
            if given:
                raise
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        wanted = modalities or {**MODALITIES, **usual}.get(name, tuple(cohort.modalities))
        unknown = [one for one in wanted if one not in cohort.modalities]
        if unknown or len(set(wanted)) < 2:
            raise ValueError(
                f"--modalities: expected at least two of {', '.join(cohort.modalities)}, got "
                f"{', '.join(wanted)}"
            )
        cohort = replace(cohort, modalities={one: cohort.modalities[one] for one in wanted})
        short = Path(name).stem
        found.append(Study(short, cohort, out / "runs" / short, seeds, quick))
    if not found:
        raise ValueError("--cohort: the data of no default cohort are there; name a cohort")
    return found


def fitted_at(blocks: Mapping[str, Run], number: int) -> dict[str, Fitted]:
    """Return the trained blocks of one fold with what was fitted beside them, by modality."""
    return {name: run.fitted(number) for name, run in blocks.items()}


def models_of(fitted: Mapping[str, Fitted]) -> dict[str, LegoBlock]:
    """Return the blocks themselves."""
    return {name: cast(LegoBlock, one.model) for name, one in fitted.items()}
