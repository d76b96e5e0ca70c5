"""Cohorts as plain tables: one row per patient, one table per modality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Cohort:
    """Patients with their modalities and follow-up.

    Args:
        name: what to call it.
        tables: modality name to table; rows are patients, the same in every table.
        times: float64 [n], follow-up in `time_unit`.
        events: bool [n], True if the event was observed, False if censored.
        time_unit: unit of the times.

    Example:
        >>> cohort = motet.io.breast_cancer()
        >>> cohort.time_unit, int(cohort.events.sum())
        ('days', 51)
    """

    name: str
    tables: dict[str, pd.DataFrame]
    times: NDArray[np.float64]
    events: NDArray[np.bool_]
    time_unit: str

    def __len__(self) -> int:
        """Return the number of patients."""
        return len(self.times)


def breast_cancer() -> Cohort:
    """Load the cohort that ships with scikit-survival: 198 node-negative breast cancers.

    Time to distant metastasis (Desmedt et al. 2007); modality "genes", expression of the 76-gene
    signature, and "clinical": age, size, oestrogen receptor and grade as indicators.

    Returns:
        A Cohort of 198 patients, 51 with the event, times in days.

    Example:
        >>> cohort = motet.io.breast_cancer()
        >>> len(cohort), cohort.tables["genes"].shape
        (198, (198, 76))
    """
    import pandas as pd
    from sksurv.datasets import load_breast_cancer

    features, outcome = load_breast_cancer()
    assert outcome is not None
    genes = features.filter(regex="_at$")
    clinical = features.drop(columns=genes.columns)
    return Cohort(
        "breast cancer (198 patients)",
        {
            "genes": genes.astype(float),
            "clinical": pd.get_dummies(clinical, dtype=float),
        },
        outcome["t.tdm"].astype(float),
        outcome["e.tdm"].astype(bool),
        "days",
    )
