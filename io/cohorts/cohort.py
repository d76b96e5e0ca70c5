"""The classes of a cohort: patients with an outcome, a table or bags per modality, splits."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import listed
from .bags import Bags
from .summary import median_follow_up, summarize

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Survival:
    """The follow-up of n patients.

    Args:
        times: float64 [n], time to the event or to the end of follow-up, above 0.
        events: bool [n], True if the event was observed, False if censored.
        unit: unit of the times.

    Example:
        >>> outcome = motet.io.load_cohort("breast_cancer").outcome
        >>> outcome.unit, int(outcome.events.sum())
        ('days', 51)
    """

    times: NDArray[np.float64]
    events: NDArray[np.bool_]
    unit: str

    def __str__(self) -> str:
        """Return the number of events and the median follow-up (reverse Kaplan-Meier)."""
        events = int(self.events.sum())
        follow_up = median_follow_up(self.times, self.events)
        return (
            f"survival, {events:,} events ({events / len(self.events):.0%}), median follow-up "
            f"{follow_up} {self.unit}"
        )


@dataclass(frozen=True, eq=False)
class Classes:
    """The classes of n patients.

    Args:
        labels: int64 [n], indices into `names`.
        names: names of the classes.

    Example:
        >>> import numpy as np
        >>> outcome = motet.io.Classes(np.array([0, 1, 1]), ("survived", "died"))
        >>> outcome.names[outcome.labels[2]]
        'died'
    """

    labels: NDArray[np.int64]
    names: tuple[str, ...]

    def __str__(self) -> str:
        """Return the number of patients of each class."""
        counts = np.bincount(self.labels, minlength=len(self.names))
        parts = [f"{name} {n:,}" for name, n in zip(self.names, counts.tolist(), strict=True)]
        return f"classes {listed(parts)}"


@dataclass(frozen=True)
class Split:
    """The patients of each part of a fold.

    Args:
        train: patients for training.
        validation: patients for early stopping; if empty, they are taken from `train`.
        test: patients for the reported metrics.

    Example:
        >>> split = motet.io.Split(("001", "002"), (), ("003",))
        >>> split.test
        ('003',)
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True)
class CohortSource:
    """The arguments with which a cohort was loaded, to load it again.

    Args:
        cohort: path of its YAML file, or the name of a shipped cohort.
        data: folder of its data files, None for the default folders.
    """

    cohort: str
    data: str | None


@dataclass(frozen=True, eq=False)
class Cohort:
    """Patients with their outcome and modalities, as `load_cohort` reads them.

    A patient without a modality has a row of only NaN in its table, or no bag.

    Args:
        name: of the cohort.
        patients: n ids, each once.
        groups: n names; patients of one group must be in the same part of a split.
        outcome: Survival or Classes, or None if the cohort was loaded for prediction.
        modalities: name to table (index is `patients`; columns are float64 or categories) or Bags.
        splits: the splits that came with the data, or None.
        source: how it was loaded, or None if it was made in memory.

    Example:
        >>> cohort = motet.io.load_cohort("breast_cancer")
        >>> len(cohort), list(cohort.modalities), cohort.modalities["genes"].shape
        (198, ['genes', 'clinical'], (198, 76))
        >>> print(cohort)
        breast cancer (198 patients)
        patients: 198; splits with the data: 0
        outcome:  survival, 51 events (26%), median follow-up 5,012 days
        modality  kind                 width  patients    tokens per patient: median (max)
        genes     table                76     198 (100%)
        clinical  table, 2 categories  4      198 (100%)
        missing:  1 combination
              198 (100%)  nothing missing
    """

    name: str
    patients: tuple[str, ...]
    groups: tuple[str, ...]
    outcome: Survival | Classes | None
    modalities: dict[str, pd.DataFrame | Bags]
    splits: tuple[Split, ...] | None
    source: CohortSource | None = None

    def __len__(self) -> int:
        """Return the number of patients."""
        return len(self.patients)

    def __str__(self) -> str:
        """Return patients, outcome, modalities and what is missing, in at most 24 lines."""
        groups = len(set(self.groups))
        in_groups = "" if groups == len(self) else f" in {groups:,} groups"
        outcome = "none, loaded for prediction" if self.outcome is None else self.outcome
        head = (
            f"{self.name}\n"
            f"patients: {len(self):,}{in_groups}; splits with the data: {len(self.splits or ())}\n"
            f"outcome:  {outcome}\n"
        )
        return head + summarize(self.modalities, self.patients)

    def __repr__(self) -> str:
        """Return name, number of patients and names of the modalities."""
        return f"<Cohort {self.name!r}: {len(self)} patients, {', '.join(self.modalities)}>"

    def fingerprint(self) -> str:
        """Return a SHA-256 of ids, groups, outcome and tables; of bags only of ids and shapes."""
        digest = hashlib.sha256()

        def add(*values: object) -> None:
            digest.update(json.dumps(values).encode() + b"\n")

        add(self.patients, self.groups)
        if isinstance(self.outcome, Survival):
            add("survival", self.outcome.unit)
            digest.update(self.outcome.times.astype("<f8").tobytes())
            digest.update(self.outcome.events.astype("u1").tobytes())
        elif isinstance(self.outcome, Classes):
            add("classes", self.outcome.names)
            digest.update(self.outcome.labels.astype("<i8").tobytes())
        for name, modality in self.modalities.items():
            if isinstance(modality, Bags):
                add(name, modality.features, modality.coords, modality.names)
                patients = [patient for patient in self.patients if patient in modality]
                add([(patient, modality.shape(patient)) for patient in patients])
                continue
            add(name, list(modality.columns))
            if all(dtype == "float64" for dtype in modality.dtypes):  # at once: there may be 40,000
                cells = modality.to_numpy(np.float64).T + 0.0
                digest.update(np.where(np.isnan(cells), np.nan, cells).astype("<f8").tobytes())
                continue
            for column in modality:
                values = modality[column]
                if values.dtype == "category":
                    add(list(values.cat.categories))
                    digest.update(values.cat.codes.to_numpy().astype("<i8").tobytes())
                else:  # -0.0 + 0.0 is 0.0, and there is only one NaN: equal cells give equal bytes
                    cells = values.to_numpy(np.float64) + 0.0
                    digest.update(np.where(np.isnan(cells), np.nan, cells).astype("<f8").tobytes())
        return digest.hexdigest()
