"""A cohort of a claim, and the training of models on it."""

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

# The modalities in use. MIMIC's diagnoses are left out: they are coded at discharge, when the
# outcome is known. The test set of breast TCGA has no protein.
MODALITIES = {
    "mimic3_demo_death": ("static", "labs"),
    "mimic3_demo_icd9_neoplasms": ("static", "labs"),
    "mimic3_demo_icd9_respiratory": ("static", "labs"),
    "breast_tcga": ("mrna", "mirna"),
}
# Settings of --quick, which only shows that a claim can be computed.
QUICK = {"epochs": 2, "num_latents": 4, "latent_dim": 8}


@dataclass(frozen=True)
class Study:
    """A cohort of a claim.

    Args:
        name: of the cohort, in the results.
        cohort: the patients.
        out: the folder of its runs.
        seeds: number of seeds, for splits (if there are no split files), weights and dropout.
        quick: train tiny models for two epochs.
    """

    name: str
    cohort: Cohort
    out: Path
    seeds: int
    quick: bool

    @property
    def measure(self) -> str:
        """The name of the metric of the cohort's predictions."""
        if isinstance(self.cohort.outcome, Classes):
            return "AUC" if len(self.cohort.outcome.names) == 2 else "macro AUC"
        return "Harrell's c"

    @property
    def splits(self) -> int:
        """The number of splits, which test every patient once, if there are no split files."""
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
        """Train a run or continue it; return it unchanged if it is finished."""
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
        return {block.config["modalities"][0]: block for block in runs}


def studies(
    names: Sequence[str],
    out: Path,
    *,
    data: Path | None,
    modalities: Sequence[str] | None,
    seeds: int,
    quick: bool,
    required: bool,
    defaults: Mapping[str, tuple[str, ...]],
) -> list[Study]:
    """Load cohorts.

    Args:
        names: of the cohorts.
        out: folder of the claim.
        data: folder of the cohorts' files.
        modalities: those to use of every cohort; None for the default ones.
        seeds: number of seeds.
        quick: train tiny models for two epochs.
        required: raise if the data of a cohort are missing; otherwise it is left out.
        defaults: default modalities of some cohorts.

    Raises:
        CohortError: a required cohort cannot be loaded.
        ValueError: no cohort is left, or the modalities are unknown or fewer than two.
    """
    loaded = []
    for name in names:
        try:
            cohort = load_cohort(name, data=data)
        except CohortError as error:
            if required:
                raise
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        chosen = modalities or {**MODALITIES, **defaults}.get(name, tuple(cohort.modalities))
        unknown = [modality for modality in chosen if modality not in cohort.modalities]
        if unknown or len(set(chosen)) < 2:
            raise ValueError(
                f"--modalities: expected at least two of {', '.join(cohort.modalities)}, got "
                f"{', '.join(chosen)}"
            )
        cohort = replace(cohort, modalities={m: cohort.modalities[m] for m in chosen})
        stem = Path(name).stem
        loaded.append(Study(stem, cohort, out / "runs" / stem, seeds, quick))
    if not loaded:
        raise ValueError("--cohort: no default cohort has its data on this machine; name a cohort")
    return loaded


def fitted_at(blocks: Mapping[str, Run], number: int) -> dict[str, Fitted]:
    """Return the trained blocks of one fold, by modality, with their scaling and objective."""
    return {name: run.fitted(number) for name, run in blocks.items()}


def models_of(fitted: Mapping[str, Fitted]) -> dict[str, LegoBlock]:
    """Return the models of trained blocks."""
    return {name: cast(LegoBlock, block.model) for name, block in fitted.items()}
