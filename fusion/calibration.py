"""Calibration of a trained model: an affine map of its logits, fitted on validation patients.

A network that is trained until its ranking of patients is best is overconfident: its logits differ
between patients by more than the outcomes do. The map shrinks (or widens) these differences by one
slope, and shifts the logits so that the mean prediction equals what the training patients had:

    logits' = slope · logits + offset, slope > 0.

The order of the patients by risk changes little, their probabilities and curves do. A LegoMerge or
a patient without some modality has other mean logits; so there is a map for every set of modalities
that a patient may have (`Calibrations`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar

from .patients import Patients

Floats = NDArray[np.float64]
"""float64 arrays."""

# The slope maximises the likelihood of the validation patients times a normal prior of the logits'
# spread: with mean 0 and this standard deviation. With spread 1 a patient one standard deviation
# above the mean has 2.7 times the odds. A few events cannot give a larger spread than that.
PRIOR_SPREAD = 1.0
# A slope of zero would lose the order of the patients. A few validation patients cannot show that
# this order is worthless, so a small spread is kept: at one standard deviation, 10 % of the odds.
SMALLEST_SPREAD, LARGEST_SPREAD = 0.1, 5.0
# Logits are computed in float32: a spread below this share of their size is rounding.
ROUNDING = 1e-6
# Every subset of up to this number of modalities gets a map of its own.
ALL_SUBSETS = 6
# A map needs about this number of patients.
FEWEST_PATIENTS = 20


@dataclass(frozen=True)
class Calibration:
    """The map logits' = slope · logits + offset.

    Args:
        slope: above zero.
        offset: [K], one number per logit.
    """

    slope: float
    offset: tuple[float, ...]

    def apply(self, logits: Floats) -> Floats:
        """Return the calibrated logits [n, K] of logits [n, K]."""
        return self.slope * logits + np.asarray(self.offset)


class Calibrated(Protocol):
    """What `fit_calibration` needs of an objective."""

    def match_mean(self, logits: Floats) -> Floats:
        """Return the offsets [K] with which the mean prediction is that of the training part."""
        ...

    def likelihood_loss(self, logits: Floats, target: dict[str, Any]) -> float:
        """Return the mean negative log-likelihood of the targets, without weights."""
        ...


def spread_of(logits: Floats) -> float:
    """Return the root mean square of the logits' differences from their mean over patients."""
    return float(np.sqrt(np.square(logits - logits.mean(0)).mean()))


def fit_calibration(
    objective: Calibrated,
    logits: Floats,
    target: dict[str, Any],
    largest_spread: float = LARGEST_SPREAD,
) -> Calibration:
    """Fit the map on patients that the model was not trained on.

    Args:
        objective: fitted on the training part.
        logits: [n, K] of these patients.
        target: their targets, see the objectives.
        largest_spread: of the calibrated logits.
    """
    centre = logits.mean(0)
    differences = logits - centre
    spread = spread_of(logits)
    if spread < ROUNDING * max(1.0, float(np.abs(centre).max())):
        # One patient, or a constant model. They say nothing about the slope, and 1 keeps the order
        # of other patients.
        return Calibration(1.0, tuple((objective.match_mean(0 * differences) - centre).tolist()))
    unit = differences / spread

    def loss(size: float) -> float:
        scaled = size * unit
        return objective.likelihood_loss(scaled + objective.match_mean(scaled), target)

    penalty = 1 / (2 * PRIOR_SPREAD**2 * len(logits))
    size = float(
        minimize_scalar(
            lambda size: loss(size) + penalty * size**2,
            bounds=(SMALLEST_SPREAD, max(SMALLEST_SPREAD, largest_spread)),
            method="bounded",
            options={"xatol": 1e-3},
        ).x  # pyright: ignore[reportAttributeAccessIssue]
    )
    slope = size / spread
    offset = objective.match_mean(size * unit) - slope * centre
    return Calibration(slope, tuple(offset.tolist()))


@dataclass(frozen=True)
class Calibrations:
    """A Calibration for each set of modalities that a patient may have.

    Args:
        maps: the names of the modalities that a patient has, in the order of
            `Patients.modalities`, to the Calibration.
    """

    maps: Mapping[tuple[str, ...], Calibration]

    @classmethod
    def fit(
        cls,
        objective: Calibrated,
        compute_logits: Callable[[Patients], Floats],
        validation: Patients,
        others: Iterable[Patients] = (),
    ) -> Self:
        """Fit the map of every set of modalities.

        The map of a set is fitted on the validation patients who have all of them, with their other
        modalities removed. If fewer than FEWEST_PATIENTS have, on all who have one of them. Its
        calibrated logits spread at most as those of the larger sets that contain it.

        Args:
            objective: fitted on the training part.
            compute_logits: the logits [n, K] of patients, by the trained model.
            validation: the validation part, with targets.
            others: further patients; the sets of modalities that they have get a map too.
        """
        names = tuple(validation.modalities)
        held = validation.held()
        seen = {subset for part in (validation, *others) for subset in part.sets_of_modalities()}
        maps: dict[tuple[str, ...], Calibration] = {}
        spreads: dict[tuple[str, ...], float] = {}
        for subset in _choose_subsets(names, seen):
            columns = [name in subset for name in names]
            rows = held[:, columns].all(1)
            if rows.sum() < FEWEST_PATIENTS:
                rows = held[:, columns].any(1)
            if not rows.any():
                continue
            patients = validation.select(rows).only(subset)
            logits = compute_logits(patients)
            # With fewer modalities less is known of a patient, so predictions vary less. Without
            # this bound the noise of a few validation patients can give a weak modality alone
            # a larger spread than all modalities have together, and so shift the risks.
            larger = [spreads[other] for other in spreads if {*other} > {*subset}]
            largest = min([LARGEST_SPREAD, *larger])
            maps[subset] = fit_calibration(objective, logits, patients.target, largest)
            spreads[subset] = spread_of(maps[subset].apply(logits))
        return cls(maps)

    def apply(self, patients: Patients, logits: Floats) -> Floats:
        """Return the calibrated logits [n, K] of patients with logits [n, K]."""
        calibrated = np.empty_like(logits)
        subsets = patients.sets_of_modalities()
        for subset in set(subsets):
            rows = [i for i, other in enumerate(subsets) if other == subset]
            calibrated[rows] = self.nearest(subset).apply(logits[rows])
        return calibrated

    def nearest(self, subset: tuple[str, ...]) -> Calibration:
        """Return the map of a set of modalities, or of the one that differs in the fewest."""
        nearest = min(self.maps, key=lambda other: (len({*other} ^ {*subset}), other))
        return self.maps[nearest]

    def to_config(self) -> list[dict[str, Any]]:
        """Return the maps as plain values for JSON."""
        return [
            {"modalities": list(subset), **asdict(calibration)}
            for subset, calibration in self.maps.items()
        ]

    @classmethod
    def from_config(cls, config: Iterable[Mapping[str, Any]]) -> Self:
        """Build from the values of `to_config`."""
        return cls(
            {
                tuple(entry["modalities"]): Calibration(entry["slope"], tuple(entry["offset"]))
                for entry in config
            },
        )


def _choose_subsets(
    names: tuple[str, ...], seen: Iterable[tuple[str, ...]]
) -> Iterator[tuple[str, ...]]:
    """Yield the sets of modalities that get a map, the largest first."""
    chosen = {subset for subset in seen if subset}
    sizes = range(1, len(names) + 1)
    if len(names) > ALL_SUBSETS:
        sizes = (1, len(names) - 1, len(names))
    for size in sizes:
        chosen.update(combinations(names, size))
    yield from sorted(chosen, key=lambda subset: (-len(subset), subset))


def solve_decreasing(function: Callable[[float], float]) -> float:
    """Return the root of a decreasing function on [-60, 60]; the nearer end if it has none."""
    if function(-60.0) <= 0:
        return -60.0
    if function(60.0) >= 0:
        return 60.0
    return float(brentq(function, -60.0, 60.0, xtol=1e-10))  # pyright: ignore[reportArgumentType]
