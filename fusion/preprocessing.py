"""Imputation and scaling, fitted on training patients only, kept as plain numbers.

Mean, sd and median are those of the training patients. A number x becomes (x - mean) / sd; a
missing number is replaced by the median first. If some training patients lack a column, a further
column is added: 1 for patients who lack it, else 0. A category becomes one 0/1 column per value
that occurs in training. Table columns that do not vary in training are left out.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

# Features that a smaller share of the training patients' bags hold are left out (rare lab values).
MIN_HOLDERS = 0.1
# A number more than this many standard deviations from the training mean is taken for an error.
MAX_DEVIATIONS = 1e6


class BagSource(Protocol):
    """The bags of a modality by patient; each is read when it is accessed."""

    features: int
    coords: int
    names: tuple[str, ...] | None
    """Names of the features, if new patients may have other features (lab items); else None."""

    def __contains__(self, patient: object) -> bool: ...

    def __getitem__(
        self, patient: str
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]: ...


@dataclass(frozen=True)
class TableScaling:
    """How the table of one modality is scaled."""

    columns: tuple[str, ...]
    """All columns that the table must have."""
    numbers: tuple[str, ...]
    """The numeric columns that are kept; `fill`, `mean` and `sd` hold a number for each."""
    fill: tuple[float, ...]
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    flagged: tuple[str, ...]
    """Numeric columns that get a further column: 1 where the number is missing."""
    categories: tuple[str, ...]
    """The columns that are categories."""
    levels: dict[str, tuple[str, ...]]
    """The values of each category that varies."""
    codes: bool
    """Whether columns are codes that a patient has or lacks; a column that is absent for new
    patients is then zero."""

    @classmethod
    def fit(cls, frame: pd.DataFrame) -> Self:
        """Fit to the rows of the training patients; rows without the modality are skipped.

        Raises:
            ValueError: no patient has the modality, or no column varies.
        """
        frame = frame.loc[frame.notna().any(axis=1)]
        if frame.empty:
            raise ValueError("no training patient has it")
        numbers, fill, mean, sd, flagged = [], [], [], [], []
        levels: dict[str, tuple[str, ...]] = {}
        for name, column in frame.items():
            if isinstance(column.dtype, pd.CategoricalDtype):
                values_seen = tuple(sorted(map(str, column.dropna().unique())))
                if len(values_seen) > 1:
                    levels[str(name)] = values_seen
                continue
            values = column.to_numpy(float)
            missing = np.isnan(values)
            if missing.any() and not missing.all():
                flagged.append(str(name))
            median = float(np.median(values[~missing])) if not missing.all() else 0.0
            filled = np.where(missing, median, values)
            with np.errstate(over="ignore", invalid="ignore"):
                spread = float(filled.std())
            if not spread < np.finfo(np.float32).max:
                raise ValueError(f"column {name!r} holds numbers too large to scale")
            if spread > 1e-12 * max(1.0, abs(median)):
                numbers.append(str(name))
                fill.append(median)
                mean.append(float(filled.mean()))
                sd.append(spread)
        if not numbers and not levels:
            raise ValueError("no column varies among the training patients")
        return cls(
            columns=tuple(map(str, frame.columns)),
            numbers=tuple(numbers),
            fill=tuple(fill),
            mean=tuple(mean),
            sd=tuple(sd),
            flagged=tuple(flagged),
            categories=tuple(
                str(name)
                for name, column in frame.items()
                if isinstance(column.dtype, pd.CategoricalDtype)
            ),
            levels=levels,
            codes=bool(frame.attrs.get("codes")),
        )

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the columns of the scaled table."""
        missing = (f"{name} missing" for name in self.flagged)
        values = (f"{name}={level}" for name, levels in self.levels.items() for level in levels)
        return (*self.numbers, *missing, *values)

    @property
    def columns_of_features(self) -> tuple[str, ...]:
        """The column of the table from which each of `features` is made."""
        values = (name for name, levels in self.levels.items() for _ in levels)
        return (*self.numbers, *self.flagged, *values)

    def unseen(self, frame: pd.DataFrame) -> dict[tuple[str, str], int]:
        """Return the patients with a category that no training patient has, by column and value."""
        counts = {}
        for name, levels in self.levels.items():
            if name in frame:
                values = frame[name].dropna().astype(str)
                for value, patients in values[~values.isin(levels)].value_counts().items():
                    counts[name, str(value)] = int(patients)
        return counts

    def transform(self, frame: pd.DataFrame) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return the scaled numbers [n, F], and bool [n], whether each patient has the modality.

        Rows without the modality are zero.

        Raises:
            ValueError: a column of the training table is missing, or a value does not fit it.
        """
        lost = [name for name in self.columns if name not in frame]
        if lost and not self.codes:
            raise ValueError(f"expected the columns of training, got none named {lost[0]!r}")
        columns = frame if self.codes else frame.loc[:, list(self.columns)]
        present = columns.notna().any(axis=1).to_numpy(bool, copy=True)
        frame = frame.reindex(columns=list(self.columns), fill_value=0.0)
        for name in self.columns:
            category = isinstance(frame[name].dtype, pd.CategoricalDtype)
            if category != (name in self.categories):
                kinds = ("numbers", "categories") if category else ("categories", "numbers")
                raise ValueError(
                    f"expected {kinds[0]} in column {name!r}, as in training, got {kinds[1]}; see "
                    "`categorical` in docs/how-to/tables.md"
                )
        numbers = frame[list(self.numbers)].to_numpy(float)
        numbers = np.where(np.isnan(numbers), np.asarray(self.fill), numbers)
        scaled = (numbers - np.asarray(self.mean)) / np.asarray(self.sd)
        for row, column in np.argwhere(np.abs(scaled) > MAX_DEVIATIONS)[:1]:
            raise ValueError(
                f"column {self.numbers[column]!r}: expected numbers like those of training "
                f"({self.mean[column]:.6g} ± {self.sd[column]:.6g}), got "
                f"{numbers[row, column]:.6g} for patient {frame.index[row]!r}"
            )
        parts = [scaled]
        parts.append(frame[list(self.flagged)].isna().to_numpy(float))
        for name, levels in self.levels.items():
            values = frame[name].astype(object).map(str).to_numpy(object)
            parts.append((values[:, None] == np.asarray(levels, object)).astype(float))
        x = np.concatenate(parts, axis=1).astype(np.float32)
        x[~present] = 0
        return x, present


@dataclass(frozen=True)
class BagScaling:
    """How the tokens of one bag modality are scaled; missing features become the mean."""

    width: int
    """Number of features of a token before scaling."""
    kept: tuple[int, ...]
    """The features that are kept; `mean` and `sd` hold a number for each."""
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    flagged: tuple[int, ...]
    """Features (numbered as before scaling) that get a further column: 1 where it is missing."""
    coords: int
    extent: float
    """Largest absolute coordinate of the training patients."""
    names: tuple[str, ...] | None

    @classmethod
    def fit(cls, bags: BagSource, patients: Iterable[str]) -> Self:
        """Fit to the bags of the training patients, one bag in memory at a time.

        Raises:
            ValueError: no patient has the modality, or no feature is held often enough.
        """
        width = bags.features
        count, total, square, holders = (np.zeros(width) for _ in range(4))
        owners, tokens, extent = 0, 0, 0.0
        for patient in patients:
            if patient not in bags:
                continue
            features, coords = bags[patient]
            if coords is not None and len(coords):
                extent = max(extent, float(np.abs(coords).max()))
            x = features.astype(float)
            real = ~np.isnan(x)
            x = np.where(real, x, 0.0)
            owners += 1
            tokens += len(x)
            count += real.sum(0)
            holders += real.any(0)
            total += x.sum(0)
            square += np.square(x).sum(0)
        if not owners:
            raise ValueError("no training patient has it")
        kept = np.flatnonzero(holders >= max(1, MIN_HOLDERS * owners))
        if not len(kept):
            raise ValueError(
                f"no feature is held by {MIN_HOLDERS:.0%} of the training patients' bags"
            )
        mean = total[kept] / count[kept]
        sd = np.sqrt(np.maximum(square[kept] / count[kept] - mean**2, 0.0))
        sd[sd <= 1e-6 * np.maximum(1.0, np.abs(mean))] = 1.0  # keeps a constant feature at zero
        return cls(
            width,
            tuple(kept.tolist()),
            tuple(mean.tolist()),
            tuple(sd.tolist()),
            tuple(kept[count[kept] < tokens].tolist()),
            bags.coords,
            extent or 1.0,
            bags.names,
        )

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the columns of the scaled tokens."""
        return (*map(str, self.kept), *(f"{i} missing" for i in self.flagged))

    @property
    def names_of_features(self) -> tuple[str, ...]:
        """The name of the feature from which each of `features` is made; empty without names."""
        return tuple(self.names[i] for i in (*self.kept, *self.flagged)) if self.names else ()

    @property
    def known_names(self) -> tuple[str, ...]:
        """Names of the features that are kept; empty if the bags have no names."""
        return tuple(self.names[i] for i in self.kept) if self.names else ()

    def transform(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the scaled tokens [N, F] of x [N, width]."""
        if x.shape[1] != self.width:
            raise ValueError(f"expected {self.width} features per token, got {x.shape[1]}")
        scaled = (x[:, list(self.kept)] - np.asarray(self.mean)) / np.asarray(self.sd)
        flags = np.isnan(x[:, list(self.flagged)])
        scaled = np.nan_to_num(scaled, nan=0.0, posinf=np.inf, neginf=-np.inf)
        return np.concatenate([scaled, flags], axis=1, dtype=np.float32, casting="same_kind")


Scaling = TableScaling | BagScaling


def fit_scaling(
    modalities: Mapping[str, pd.DataFrame | BagSource], patients: Iterable[str]
) -> dict[str, Scaling]:
    """Fit the scaling of every modality to the training patients.

    Raises:
        ValueError: a modality that no training patient has.
    """
    patients = list(patients)
    scaling: dict[str, Scaling] = {}
    for name, source in modalities.items():
        try:
            if isinstance(source, pd.DataFrame):
                scaling[name] = TableScaling.fit(source.loc[patients])
            else:
                scaling[name] = BagScaling.fit(source, patients)
        except ValueError as error:
            raise ValueError(f"modality {name!r}: {error}") from error
    return scaling


def scaling_from_config(config: Mapping[str, Any]) -> Scaling:
    """Build a scaling from the values of `dataclasses.asdict`."""
    if "levels" in config:
        levels = {name: tuple(values) for name, values in config["levels"].items()}
        return TableScaling(**{**_lists_to_tuples(config), "levels": levels})
    return BagScaling(**_lists_to_tuples(config))


def _lists_to_tuples(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in config.items()}
