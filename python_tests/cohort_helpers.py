"""Cohorts of two tables, written to files."""

from pathlib import Path

import numpy as np
import pandas as pd

OUTCOMES = {
    "survival": "{table: t, time: months, unit: months, event: died}",
    "classes": "{table: t, label: stage, names: {0: early, 1: late, 2: distant}}",
}


def write_cohort(folder: Path, name: str, outcome: str, *, seed: int, n: int, first: int) -> Path:
    """Write a cohort of n patients, whose ids begin at `first`, with two tables."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(rng.normal(size=(n, 4)).round(3), columns=list("abcd"))
    frame.insert(0, "id", [f"p{first + i}" for i in range(n)])
    frame["months"] = (rng.exponential(20 * np.exp(-frame["a"])) + 0.1).round(2)
    frame["died"] = (rng.random(n) < 0.6).astype(int)
    frame["stage"] = np.digitize(frame["a"] + rng.normal(size=n), [-0.5, 0.7])
    frame.loc[3, ["c", "d"]] = np.nan
    frame.to_csv(folder / f"{name}.csv", index=False)
    path = folder / f"{name}.yaml"
    path.write_text(
        f"name: {name}\npatient: id\ntables: {{t: {{file: {name}.csv}}}}\noutcome: {outcome}\n"
        "modalities:\n  omic: {table: t, columns: [a, b]}\n  blood: {table: t, columns: [c, d]}\n"
    )
    return path
