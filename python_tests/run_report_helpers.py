"""Made runs for the tests of the report of runs."""

from pathlib import Path

import numpy as np
import pandas as pd
from motet.experiments import Run, Splits, train_run
from motet.io import Classes, Cohort, Survival

HOSTILE = [
    "<script>window.hit = 1</script>",
    '"><img src=x onerror="window.hit = 1">',
    "' onmouseover='window.hit = 1' x='",
    "</script><script>window.hit = 1</script>",
    "&lt;b&gt;&amp;",
    "javascript:window.hit=1",
    "--><!-- ${window.hit=1} {{7*7}} $x^2$",
    "محمد \u202egnp \u2066x\u2069",
    "x" * 120,
]
"""Ids of patients that must stay text."""
RNA = "<img src=x onerror=alert(1)>"
"""The name of a modality, which may hold neither dots nor slashes."""


def made_cohort(n: int = 90, *, classes: bool = False, seed: int = 0) -> Cohort:
    """Return patients with hostile ids; a sixth lacks the second modality."""
    random = np.random.default_rng(seed)
    ids = (*HOSTILE, *(f"p-{i:04}" for i in range(n - len(HOSTILE))))
    clinical = pd.DataFrame({"age": random.normal(size=n), "x": random.normal(size=n)}, index=ids)
    rna = pd.DataFrame(random.normal(size=(n, 4)), index=ids).add_prefix("g")
    rna.iloc[::6] = np.nan
    score = clinical["age"].to_numpy()
    if classes:
        labels = np.digitize(score + 0.5 * random.normal(size=n), [-0.4, 0.5])
        outcome = Classes(labels.astype(np.int64), ("low", HOSTILE[0], "high $x$"))
    else:
        times = random.exponential(np.exp(-score)) * 30 + 0.1
        outcome = Survival(times, random.random(n) < 0.7, "months <b>")
    return Cohort("<b>made</b> & \u202e", ids, ids, outcome, {"clinical": clinical, RNA: rna}, None)


def made_run(cohort: Cohort, model: str, folder: Path) -> Run:
    """Train a model on two folds; HEALNet is small, and has two epochs."""
    changes = {"epochs": 2, "num_latents": 4, "latent_dim": 8} if model == "healnet" else {}
    splits = Splits(2, test=0.4)
    return train_run(cohort, model, folder, changes=changes, splits=splits)
