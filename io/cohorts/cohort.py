"""What a cohort is: patients with an outcome, one table or set of bags per modality, splits."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .bags import Bags

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Survival:
    """Hold follow-up, one entry per patient.

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


@dataclass(frozen=True, eq=False)
class Classes:
    """Hold classes, one entry per patient.

    Args:
        labels: int64 [n], indices into `names`.
        names: what the classes are called.

    Example:
        >>> import numpy as np
        >>> outcome = motet.io.Classes(np.array([0, 1, 1]), ("survived", "died"))
        >>> outcome.names[outcome.labels[2]]
        'died'
    """

    labels: NDArray[np.int64]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """Name the patients of each part.

    Args:
        train: patients to learn from.
        validation: patients to stop by; empty if they are to be carved out of `train`.
        test: patients to report on.

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
    """Where a cohort was loaded from, so that it can be loaded again.

    Args:
        cohort: path of its YAML file, or the name of a shipped cohort.
        data: folder of the files it names, None for the usual places.
    """

    cohort: str
    data: str | None


@dataclass(frozen=True, eq=False)
class Cohort:
    """Hold patients with their outcome and modalities, as `load_cohort` reads them.

    A patient who misses a modality has a row of only NaN in its table, or no bag.

    Args:
        name: what to call it.
        patients: n ids, each once.
        groups: n names; patients of one group must stay in one part of a split.
        outcome: Survival or Classes, or None if it was loaded for prediction.
        modalities: name to table (index is `patients`; columns are float64 or categories) or Bags.
        splits: those that came with the data, or None.
        source: where it was loaded from, or None if it was made in memory.

    Example:
        >>> cohort = motet.io.load_cohort("breast_cancer")
        >>> len(cohort), list(cohort.modalities), cohort.modalities["genes"].shape
        (198, ['genes', 'clinical'], (198, 76))
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

    def fingerprint(self) -> str:
        """Return a sha256 over ids, groups, outcome and tables; of bags, over ids and shapes."""
        digest = hashlib.sha256()

        def add(*things: object) -> None:
            digest.update(json.dumps(things).encode() + b"\n")

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
                add([(one, modality.shape(one)) for one in self.patients if one in modality])
                continue
            add(name, list(modality.columns))
            for column in modality:
                values = modality[column]
                if values.dtype == "category":
                    add(list(values.cat.categories))
                    digest.update(values.cat.codes.to_numpy().astype("<i8").tobytes())
                else:  # + 0.0 and one NaN, so that equal cells have equal bytes
                    cells = values.to_numpy(np.float64) + 0.0
                    digest.update(np.where(np.isnan(cells), np.nan, cells).astype("<f8").tobytes())
        return digest.hexdigest()
