"""The paper's claims on real data: `python -m benchmarks.claims NAME` measures and draws one.

Whatever is trained is a run folder under OUT/runs, by `experiments`, so that a claim that was
killed goes on where it stopped; all else is computed anew from the trained blocks. docs/claims.md
has the figures. Every difference is paired, over out-of-fold patients, with a 95 % bootstrap
interval, which over several seeds is widened by their spread (`rows.over_seeds`).
"""

import json
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
        paper: where it is made, and what it says.
        cohorts: on which it is tried unless told otherwise; none, if it needs no patients.
        measure: of a study, its rows.
        say: of the rows of all studies, one sentence.
        seeds: how many by default.
        modalities: those used of some cohorts, where not all.
    """

    paper: str
    cohorts: tuple[str, ...]
    measure: Callable[[Any], list[Row]]
    say: Callable[[Sequence[Row]], str]
    seeds: int = 2
    modalities: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


# Of HANCOCK's six modalities three are at chance by themselves (docs/results.md), and know nothing
# that could be lost.
KNOWING = {"hancock_os": ("clinical", "pathological", "blood")}
CLAIMS = {
    "interference": Claim(
        "Fig. 5, 6: latents merged in the frequency domain interfere less than in the spatial",
        ("breast_tcga", "tcga_kirp", "hancock_os"),
        interference.measure,
        interference.say,
        modalities=KNOWING,
    ),
    "merging": Claim(
        "Fig. 3, 4: LegoMerge, without training, is better than its best block and the ensemble",
        ("breast_tcga", "tcga_kirp", "tcga_blca", "hancock_os", "mimic3_demo_death"),
        merging.measure,
        merging.say,
        seeds=3,
    ),
    "overlap": Claim(
        "Fig. 7: LegoMerge needs no patients in common between the blocks' training sets",
        ("hancock_os", "mimic3_demo_death"),
        overlap.measure,
        overlap.say,
        modalities={"hancock_os": ("pathological", "blood")},
    ),
    "addition": Claim(
        "section 3.3: modalities are added one after the other, nothing retrained",
        ("tcga_kirp", "tcga_blca", "hancock_os"),
        addition.measure,
        addition.say,
    ),
    "scaling": Claim(
        "section 3.3: cost is linear in the number of modalities",
        (),
        scaling.measure,
        scaling.say,
    ),
}


@dataclass(frozen=True)
class Result:
    """What a claim found: the content of results.json."""

    claim: str
    paper: str
    motet: str
    settings: dict[str, Any]
    seconds: float
    sentence: str
    rows: list[Row]

    def as_json(self) -> str:
        """Return everything, as in results.json."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    def table(self) -> str:
        """Return the means over seeds and blocks, as text."""
        lines = [self.paper]
        for row in means(self.rows):
            than = f" less {row.than}" if row.than else ""
            sign = "+" if row.than else ""
            ends = "" if row.low == row.high else f" ({row.low:{sign}.3f} to {row.high:{sign}.3f})"
            lines.append(
                f"{row.case:26} {row.what + than:66} {row.value:{sign}.3f}{ends}  {row.measure}"
            )
        return "\n".join([*lines, "", self.sentence])


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
        out: the folder; runs that are there go on, or are used as they are.
        cohorts: names or YAML files; None for the claim's own.
        data: folder of their files.
        modalities: those to use.
        seeds: number of seeds; None for the claim's own.
        quick: train next to nothing, on a cohort that is always there.

    Raises:
        ValueError: arguments or cohorts that do not serve, in one line.
    """
    if name not in CLAIMS:
        raise ValueError(f"name: expected one of {', '.join(CLAIMS)}, got {name!r}")
    claim, started = CLAIMS[name], time.perf_counter()
    if not claim.cohorts:
        given = {"cohort": cohorts, "data": data, "modalities": modalities, "seeds": seeds}
        for option, value in given.items():
            if value is not None:
                raise ValueError(f"--{option}: {name} needs no patients, and does without")
    seeds = integer("--seeds", (1 if quick else claim.seeds) if seeds is None else seeds)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    if claim.cohorts:
        names = cohorts or (("breast_cancer",) if quick else claim.cohorts)
        found = studies(
            names, out, data=data, modalities=modalities, seeds=seeds, quick=quick,
            given=bool(cohorts), usual=claim.modalities,
        )  # fmt: skip
        for study in found:
            rows += claim.measure(study)
        cohort_settings = {study.name: list(study.cohort.modalities) for study in found}
        settings = {"cohorts": cohort_settings, "seeds": seeds, "quick": quick}
    else:
        rows, settings = claim.measure(quick), {"quick": quick}
    seconds = time.perf_counter() - started
    sentence = claim.say(rows)
    result = Result(name, claim.paper, version("motet"), settings, seconds, sentence, rows)
    table = pd.DataFrame([asdict(row) for row in rows]).astype({"seed": "Int64"})
    write_text(out / "results.csv", table.to_csv(index=False))
    draw(result, out / "figure.png")
    write_text(out / "results.json", result.as_json())
    return result
