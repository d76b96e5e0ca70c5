"""Imputation and scaling, fitted on training patients only, kept as plain numbers.

A number becomes (x - mean) / sd of the training patients, a missing one their median before that; a
column that some of them lack gets a further column, 1 where it was missing. A category becomes one
0/1 column per value seen in training. Columns of a table without a spread in training are left out.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

# A feature of a bag that fewer of the training patients' bags hold is left out (rare lab values).
RARE = 0.1
# Standard deviations from the training mean beyond which a number is taken for an error.
FARTHEST = 1e6


class BagSource(Protocol):
    """Bags of a modality by patient, read when asked for."""

    features: int
    coords: int
    names: tuple[str, ...] | None
    """Of the features, where new patients may have others (lab items)."""

    def __contains__(self, patient: object) -> bool: ...

    def __getitem__(
        self, patient: str
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]: ...


@dataclass(frozen=True)
class TableScaling:
    """How a table of one modality becomes numbers."""

    columns: tuple[str, ...]
    """All columns that the table must have."""
    numbers: tuple[str, ...]
    """Those that are scaled; `fill`, `mean` and `sd` hold a number for each."""
    fill: tuple[float, ...]
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    flagged: tuple[str, ...]
    """Numbers that get a column of their own, 1 where missing."""
    categories: tuple[str, ...]
    """Those that are categories."""
    levels: dict[str, tuple[str, ...]]
    """Values of each category that varies."""
    codes: bool
    """Columns are codes that a patient has or has not: one that new patients lack is zero."""

    @classmethod
    def fit(cls, frame: pd.DataFrame) -> Self:
        """Learn from the training patients' rows; those who miss the modality do not count.

        Raises:
            ValueError: nobody has the modality, or no column has a spread.
        """
        frame = frame.loc[frame.notna().any(axis=1)]
        if frame.empty:
            raise ValueError("no training patient has it")
        numbers, fill, mean, sd, flagged = [], [], [], [], []
        levels: dict[str, tuple[str, ...]] = {}
        for name, column in frame.items():
            if isinstance(column.dtype, pd.CategoricalDtype):
                seen = tuple(sorted(map(str, column.dropna().unique())))
                if len(seen) > 1:
                    levels[str(name)] = seen
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
        """Names of the columns that `transform` makes."""
        missing = (f"{name} missing" for name in self.flagged)
        values = (f"{name}={level}" for name, seen in self.levels.items() for level in seen)
        return (*self.numbers, *missing, *values)

    def transform(self, frame: pd.DataFrame) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return [n, F] scaled numbers, zero where the modality is missing, and who has it, [n].

        Raises:
            ValueError: a column that the training table had is not there.
        """
        lost = [name for name in self.columns if name not in frame]
        if lost and not self.codes:
            raise ValueError(f"expected the columns of training, got none named {lost[0]!r}")
        known = frame if self.codes else frame.loc[:, list(self.columns)]
        present = known.notna().any(axis=1).to_numpy(bool, copy=True)
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
        for row, column in np.argwhere(np.abs(scaled) > FARTHEST)[:1]:
            raise ValueError(
                f"column {self.numbers[column]!r}: expected numbers like those of training "
                f"({self.mean[column]:.6g} ± {self.sd[column]:.6g}), got "
                f"{numbers[row, column]:.6g} for patient {frame.index[row]!r}"
            )
        parts = [scaled]
        parts.append(frame[list(self.flagged)].isna().to_numpy(float))
        for name, seen in self.levels.items():
            values = frame[name].astype(object).map(str).to_numpy(object)
            parts.append((values[:, None] == np.asarray(seen, object)).astype(float))
        x = np.concatenate(parts, axis=1).astype(np.float32)
        x[~present] = 0
        return x, present


@dataclass(frozen=True)
class BagScaling:
    """How the tokens of one bag modality become numbers; missing features take the mean."""

    width: int
    """Features of a token before."""
    kept: tuple[int, ...]
    """Features that stay; `mean` and `sd` hold a number for each."""
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    flagged: tuple[int, ...]
    """Features, as numbered before, that get a column of their own, 1 where missing."""
    coords: int
    extent: float
    """Largest coordinate, by its absolute value, of the training patients."""
    names: tuple[str, ...] | None

    @classmethod
    def fit(cls, bags: BagSource, patients: Iterable[str]) -> Self:
        """Learn from the training patients' bags, one at a time.

        Raises:
            ValueError: nobody has the modality, or no feature is held often enough.
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
        kept = np.flatnonzero(holders >= max(1, RARE * owners))
        if not len(kept):
            raise ValueError(f"no feature is held by {RARE:.0%} of the training patients' bags")
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
        """Names of the columns that `transform` makes."""
        return (*map(str, self.kept), *(f"{i} missing" for i in self.flagged))

    def transform(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the tokens [N, F] of x [N, width]."""
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
    """Learn the scaling of every modality from the training patients.

    Raises:
        ValueError: a modality that none of them has.
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
    """Build what `dataclasses.asdict` made."""
    if "levels" in config:
        levels = {name: tuple(seen) for name, seen in config["levels"].items()}
        return TableScaling(**{**_tuples(config), "levels": levels})
    return BagScaling(**_tuples(config))


def _tuples(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in config.items()}
