"""The claims of the MM-Lego paper, tested on real data: `python -m benchmarks.claims NAME`.

Models are trained by `experiments`, into run folders under OUT/runs, so that a claim that was
interrupted continues where it stopped. Everything else is computed again from the trained blocks.
docs/claims.md has the results. Every difference is paired, over out-of-fold patients, with a 95 %
bootstrap interval; that of a mean over seeds also contains their spread (`rows.over_seeds`).
"""

import json
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from motet._atomic import write_text
from motet._checks import integer

from . import addition, interference, merging, overlap, scaling
from .figures import draw
from .rows import Row, means
from .study import studies


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Args:
        paper: where the paper makes it, and its content.
        cohorts: the default cohorts; empty if the claim needs no patients.
        measure: returns the rows of a study.
        conclude: returns one sentence about the rows of all studies.
        seeds: the default number.
        modalities: those to use of some cohorts; all of the others.
    """

    paper: str
    cohorts: tuple[str, ...]
    measure: Callable[[Any], list[Row]]
    conclude: Callable[[Sequence[Row]], str]
    seeds: int = 2
    modalities: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


# The other three of HANCOCK's modalities are at chance level by themselves (docs/results.md): they
# have no information that a merge could lose.
INFORMATIVE = {"hancock_os": ("clinical", "pathological", "blood")}
CLAIMS = {
    "interference": Claim(
        "Fig. 5, 6: latents merged in the frequency domain interfere less than in the spatial",
        ("breast_tcga", "tcga_kirp", "hancock_os"),
        interference.measure,
        interference.conclude,
        modalities=INFORMATIVE,
    ),
    "merging": Claim(
        "Fig. 3, 4: LegoMerge, without training, is better than its best block and the ensemble",
        ("breast_tcga", "tcga_kirp", "tcga_blca", "hancock_os", "mimic3_demo_death"),
        merging.measure,
        merging.conclude,
        seeds=3,
    ),
    "overlap": Claim(
        "Fig. 7: LegoMerge needs no patients in common between the blocks' training sets",
        ("hancock_os", "mimic3_demo_death"),
        overlap.measure,
        overlap.conclude,
        modalities={"hancock_os": ("pathological", "blood")},
    ),
    "addition": Claim(
        "section 3.3: modalities are added one after the other, nothing retrained",
        ("tcga_kirp", "tcga_blca", "hancock_os"),
        addition.measure,
        addition.conclude,
    ),
    "scaling": Claim(
        "section 3.3: cost is linear in the number of modalities",
        (),
        scaling.measure,
        scaling.conclude,
    ),
}


@dataclass(frozen=True)
class Result:
    """The result of a claim: the content of results.json."""

    claim: str
    paper: str
    motet: str
    settings: dict[str, Any]
    seconds: float
    sentence: str
    rows: list[Row]

    def as_json(self) -> str:
        """Return the content of results.json."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    def table(self) -> str:
        """Return the means over seeds and blocks as text, two lines for each."""
        lines = [self.paper]
        for row in means(self.rows):
            than = f" minus {row.than}" if row.than else ""
            sign = "+" if row.than else ""
            ends = "" if row.low == row.high else f" ({row.low:{sign}.3f} to {row.high:{sign}.3f})"
            lines.append(f"{row.case}: {row.what}{than}")
            lines.append(f"    {row.value:{sign}.3f}{ends}  {row.measure}")
        return "\n".join([*lines, "", textwrap.fill(self.sentence, 96)])


def run_claim(
    name: str,
    out: Path,
    *,
    cohorts: Sequence[str] | None = None,
    data: Path | None = None,
    modalities: Sequence[str] | None = None,
    seeds: int | None = None,
    quick: bool = False,
) -> Result:
    """Measure a claim; write results.json, results.csv and figure.png to `out`.

    Args:
        name: one of CLAIMS.
        out: the folder. Unfinished runs in it are continued, finished ones are used as they are.
        cohorts: names or YAML files; None for the claim's default cohorts.
        data: folder of the cohorts' files.
        modalities: those to use; None for the default ones.
        seeds: number of seeds; None for the claim's default number.
        quick: train tiny models for two epochs, on a cohort that scikit-survival brings.

    Raises:
        ValueError: an argument is wrong, or a cohort cannot be used; one line says which.
    """
    if name not in CLAIMS:
        raise ValueError(f"name: expected one of {', '.join(CLAIMS)}, got {name!r}")
    claim, started = CLAIMS[name], time.perf_counter()
    if not claim.cohorts:
        options = {"cohort": cohorts, "data": data, "modalities": modalities, "seeds": seeds}
        for option, value in options.items():
            if value is not None:
                raise ValueError(f"--{option}: {name} needs no patients; leave the option out")
    seeds = integer("--seeds", (1 if quick else claim.seeds) if seeds is None else seeds)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    if claim.cohorts:
        names = cohorts or (("breast_cancer",) if quick else claim.cohorts)
        loaded = studies(
            names, out, data=data, modalities=modalities, seeds=seeds, quick=quick,
            required=bool(cohorts), defaults=claim.modalities,
        )  # fmt: skip
        for study in loaded:
            rows += claim.measure(study)
        cohort_settings = {study.name: list(study.cohort.modalities) for study in loaded}
        settings = {"cohorts": cohort_settings, "seeds": seeds, "quick": quick}
    else:
        rows, settings = claim.measure(quick), {"quick": quick}
    seconds = time.perf_counter() - started
    sentence = claim.conclude(rows)
    result = Result(name, claim.paper, version("motet"), settings, seconds, sentence, rows)
    table = pd.DataFrame([asdict(row) for row in rows]).astype({"seed": "Int64"})
    write_text(out / "results.csv", table.to_csv(index=False))
    draw(result, out / "figure.png")
    write_text(out / "results.json", result.as_json())
    return result
