"""How good are out-of-fold risks, and how sure can one be of it?"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .survival import outcome_arrays


class Concordance(NamedTuple):
    """Harrell's c with a 95 % bootstrap interval."""

    c: float
    low: float
    high: float


def pooled_concordance(
    times: ArrayLike,
    events: ArrayLike,
    risks: ArrayLike,
    folds: ArrayLike,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Concordance:
    """Return Harrell's c over all pairs within a fold, with a 95 % interval.

    Risks of differently trained folds are not comparable, so no pair spans two. Patients are drawn
    with replacement, within each fold and within events and censored. With one fold, c is
    scikit-survival's.

    Args:
        times: [n].
        events: bool [n], True if the event was observed.
        risks: [n], out of fold, higher for an earlier event.
        folds: [n], the fold in which each patient was tested.
        draws: bootstrap samples.
        seed: of the draws.

    Raises:
        ValueError: no comparable pair, numbers that are not finite, or shapes that differ.

    Example:
        >>> from motet.fusion.evaluation import pooled_concordance
        >>> pooled_concordance([1.0, 2.0, 3.0], [1, 1, 0], [3.0, 1.0, 2.0], [0, 0, 0]).c
        0.6666666666666666
    """
    times, events = outcome_arrays(times, events)
    risks, folds = np.asarray(risks, float), np.asarray(folds)
    for name, values in (("risks", risks), ("folds", folds)):
        if values.shape != times.shape:
            raise ValueError(f"{name}: expected {times.shape} as times, got {values.shape}")
    if not np.isfinite(risks).all():
        raise ValueError("risks: expected finite numbers, got NaN or infinity")
    earlier = times[:, None] < times
    tied = (times[:, None] == times) & events[:, None] & ~events
    comparable = (events[:, None] & earlier | tied) & (folds[:, None] == folds)
    if not comparable.any():
        raise ValueError("events: expected a comparable pair in some fold, got none")
    gap = risks[:, None] - risks
    concordant = comparable * np.where(np.abs(gap) <= 1e-8, 0.5, gap > 0)

    def c_of(counts: np.ndarray) -> float:
        pairs = counts @ comparable @ counts
        return counts @ concordant @ counts / pairs if pairs else np.nan

    generator = np.random.default_rng(seed)
    groups = [
        np.flatnonzero((folds == fold) & (events == event))
        for fold in np.unique(folds)
        for event in (True, False)
    ]
    sampled = []
    for _ in range(draws):
        drawn = [generator.choice(group, len(group)) for group in groups if len(group)]
        sampled.append(c_of(np.bincount(np.concatenate(drawn), minlength=len(times)).astype(float)))
    low, high = np.nanpercentile(sampled, [2.5, 97.5])
    return Concordance(float(c_of(np.ones(len(times)))), float(low), float(high))
