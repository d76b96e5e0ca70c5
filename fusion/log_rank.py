"""The log-rank test of any number of groups, stratified by fold."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

from .held_out import SurvivalFold


def stratified_log_rank(
    folds: Sequence[SurvivalFold], groups: Sequence[NDArray[np.intp]], count: int
) -> float | None:
    r"""Return p of the log-rank test that the hazard is equal in all groups, stratified by fold.

    At each event time of a fold, with d events among n patients at risk, the expected events of a
    group are d n_g / n, and their covariance is that of the multivariate hypergeometric
    distribution. Both are summed over times and folds; χ² = (O - E)ᵀ V⁺ (O - E) has as many degrees
    of freedom as V has dimensions (its rank).

    Args:
        folds: the test parts.
        groups: int [n] per fold, from 0 to `count` - 1.
        count: number of groups, K.

    Returns:
        The p-value; None if no event time has patients of two groups at risk.
    """
    surplus, variance, events_in_all = np.zeros(count), np.zeros((count, count)), 0.0
    for fold, group in zip(folds, groups, strict=True):
        member = group == np.arange(count)[:, None]
        times = np.unique(fold.times[fold.events])[:, None]
        events = ((fold.times == times) & fold.events) @ member.T.astype(float)  # [T, K]
        at_risk = (fold.times >= times) @ member.T.astype(float)
        died, left = events.sum(1), at_risk.sum(1)
        share = at_risk / left[:, None]
        surplus += (events - died[:, None] * share).sum(0)
        weight = died * (left - died) / np.maximum(left - 1, 1)
        variance += np.diag(weight @ share) - (share * weight[:, None]).T @ share
        events_in_all += died.sum()
    values, vectors = np.linalg.eigh(variance)
    # Without a group that differs, rounding alone is left of the variance.
    known = values > 1e-9 * events_in_all
    if not known.any():
        return None
    statistic = ((vectors.T @ surplus)[known] ** 2 / values[known]).sum()
    return float(chi2.sf(statistic, df=int(known.sum())))
