"""Penalised Cox models: ridge, by Newton's method on rotated features, and the elastic net."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve, qr
from sklearn.exceptions import ConvergenceWarning
from sksurv.linear_model import CoxnetSurvivalAnalysis
from sksurv.util import Surv

from .cross_validation import FittingData, choose, partial_likelihood_score
from .features import FlatFeatures
from .models import LinearModel
from .partial_likelihood import Floats, PartialLikelihood

# Falling, so that each fit starts from the one before, which is stronger penalised and near.
PENALTIES = tuple(float(10 ** (exponent / 2)) for exponent in range(12, -1, -1))
# The elastic net: the share of the L1 penalty, and the number and smallest ratio of its penalties.
L1_RATIO, NET_PENALTIES, NET_RANGE = 0.5, 50, 0.05
NET_STEPS = 10_000  # in all; a path that converges takes some hundred
STEPS = 100
# The Hessian is computed again when a step leaves more than this share of the gradient. At 800
# patients and 1,000 axes it takes 70 ms with its factor, a step with the former one 4 ms.
KEEP_FACTOR = 0.5


@dataclass(frozen=True)
class OrthonormalAxes:
    """Orthonormal axes of the space of some patients' features: at most as many as patients.

    A ridge penalty does not change if the features are rotated. So a model is fitted on the axes,
    and its coefficients are rotated back: it is the same model as on all features.
    """

    centre: Floats
    """[P]."""
    axes: Floats
    """[P, r]."""

    @classmethod
    def of(cls, x: Floats) -> Self:
        """Return the axes of features [n, P].

        Raises:
            ValueError: a feature is not finite.
        """
        centre = x.mean(0)
        return cls(centre, np.asarray(qr((x - centre).T, mode="economic")[0]))

    def rotate(self, x: Floats) -> Floats:
        """Return features [n, P] on the axes, [n, r]."""
        return (x - self.centre) @ self.axes

    def linear_model(self, features: FlatFeatures, coefficients: Floats) -> LinearModel:
        """Return the model with coefficients [K, r] on the axes; at the centre its logits are 0."""
        model = LinearModel(features, len(coefficients))
        weight = coefficients @ self.axes.T
        model.weight.data = torch.from_numpy(weight)
        model.bias.data = torch.from_numpy(-weight @ self.centre)
        return model


def fit_ridge(
    z: Floats,
    likelihood: PartialLikelihood,
    penalty: float,
    *,
    start: Floats | None = None,
    tolerance: float = 1e-10,
) -> Floats:
    """Return the coefficients β [r] that maximise l(β) - penalty / 2 · |β|², by Newton's method.

    A step is halved until the penalised likelihood does not fall. The Hessian is kept for several
    steps while the gradient shrinks fast.

    Args:
        z: features [n, r].
        likelihood: of the same patients.
        penalty: above 0.
        start: coefficients to begin with, [r]; None for zeros.
        tolerance: the largest gradient at a solution, as a share of the sum over the events of the
            features' absolute values.

    Returns:
        The coefficients; NaN if the gradient is larger after 100 steps, or no step helps.
    """
    failed = np.full(z.shape[1], np.nan)
    beta = np.zeros(z.shape[1]) if start is None or np.isnan(start).any() else start
    of_events = np.abs(z[likelihood.order[likelihood.rows]]).sum(0)
    limit = tolerance * max(1.0, of_events.max(initial=0.0))

    def penalised(beta: Floats) -> float:
        return float(likelihood.values((z @ beta)[None])[0] - penalty / 2 * beta @ beta)

    value, last, factor = penalised(beta), np.inf, None
    for _ in range(STEPS):
        derivatives = likelihood.derivatives(z @ beta)
        gradient = z.T @ derivatives.gradient - penalty * beta
        size = np.abs(gradient).max(initial=0.0)
        if size <= limit:
            return beta
        if factor is None or size > KEEP_FACTOR * last:
            information = derivatives.information(z)
            information[np.diag_indices_from(information)] += penalty
            try:
                factor = cho_factor(information, overwrite_a=True)
            except ValueError:  # not finite, or not positive definite by rounding
                return failed
        step, last = cho_solve(factor, gradient, check_finite=False), size
        new = penalised(beta + step)
        while not new >= value - 1e-12 * abs(value):
            step = step / 2
            if np.abs(step).max() < 1e-12:
                return failed
            new = penalised(beta + step)
        beta, value = beta + step, new
    return failed


def ridge_cox(features: FlatFeatures, data: FittingData) -> LinearModel:
    """Fit Cox's model with a ridge penalty, the one of the best cross-validated likelihood.

    Raises:
        ValueError: no fit converged, or not the one at the chosen penalty.
    """
    axes = OrthonormalAxes.of(data.x)
    rotated = data.with_features(axes.rotate(data.x))

    def fit_penalties(part: FittingData) -> Callable[[Floats], Floats]:
        likelihood, fits, beta = PartialLikelihood.of(*part.outcome), [], None
        for penalty in PENALTIES:
            beta = fit_ridge(part.x, likelihood, penalty, start=beta, tolerance=1e-6)
            fits.append(beta)
        return lambda z: np.stack(fits) @ z.T

    chosen = choose(rotated, fit_penalties, partial_likelihood_score, "ridge Cox model")
    penalty = PENALTIES[chosen]
    beta = fit_ridge(rotated.x, PartialLikelihood.of(*data.outcome), penalty)
    if np.isnan(beta).any():
        raise ValueError(f"ridge Cox did not converge at its penalty, {penalty:g}")
    return axes.linear_model(features, beta[None])


def elastic_net_cox(features: FlatFeatures, data: FittingData) -> LinearModel:
    """Fit Cox's model with an elastic net (Simon et al. 2011), with scikit-survival.

    Half of the penalty is L1. Of 50 penalties, from the smallest that makes all coefficients zero
    down to a twentieth of it, the one of the best cross-validated partial likelihood is taken.
    Those at which scikit-survival does not converge are rejected.
    """
    centre = data.x.mean(0)
    centred = data.with_features(data.x - centre)
    path = _fit_net(centred, n_alphas=NET_PENALTIES, alpha_min_ratio=NET_RANGE)

    def fit_penalties(part: FittingData) -> Callable[[Floats], Floats]:
        fits = _fit_path(part, path.penalties)
        return lambda x: fits @ x.T

    chosen = choose(centred, fit_penalties, partial_likelihood_score, "elastic-net Cox model")
    axes = OrthonormalAxes(centre, np.eye(data.x.shape[1]))
    return axes.linear_model(features, path.coefficients[chosen : chosen + 1])


class _NetPath(NamedTuple):
    """Elastic nets at falling penalties; it may end before the last of those requested."""

    penalties: Floats
    """[L]."""
    coefficients: Floats
    """[L, P]."""
    converged: bool
    """False if it ended because scikit-survival did not converge at the next penalty."""


def _fit_path(data: FittingData, penalties: Floats) -> Floats:
    """Return the coefficients at all of some falling penalties, [L, P]; NaN if not converged.

    Above the first penalty of these patients all coefficients are zero. scikit-survival must not
    begin there, as it ends after some penalties at which nothing changes. It also ends where the
    model explains nearly everything; the last coefficients then hold for all smaller penalties.
    """
    coefficients = np.zeros((len(penalties), data.x.shape[1]))
    first = _fit_net(data, n_alphas=1).penalties[0]
    below = np.flatnonzero(penalties < first)
    if len(below):
        path = _fit_net(data, alphas=[first, *penalties[below]])
        fitted = path.coefficients[1 : len(below) + 1]
        rest = fitted[-1] if path.converged and len(fitted) else np.nan
        coefficients[below[: len(fitted)]] = fitted
        coefficients[below[len(fitted) :]] = rest
    return coefficients


def _fit_net(data: FittingData, **path: Any) -> _NetPath:
    net = CoxnetSurvivalAnalysis(l1_ratio=L1_RATIO, max_iter=NET_STEPS, **path)
    times, events = data.outcome
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net.fit(data.x, Surv.from_arrays(events, times))
    failed = any(issubclass(each.category, ConvergenceWarning) for each in caught)
    count = len(net.alphas_) - failed  # of the last one it did not find the solution
    return _NetPath(net.alphas_[:count], net.coef_.T[:count], not failed)
