"""The coefficients of slerp, from the cosines between the vectors."""

import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from ..checks import normalised_weights

# Two vectors whose cosine is closer than this to -1 count as opposite: many great circles join
# them, and rounding would choose one. The value is a choice.
_OPPOSITE = 1e-7

# The least y . p (see slerp_coefficients) from which c = y / (y . p) is computed; below it the
# division would amplify rounding a thousand times. The value is a choice.
_FLAT = 1e-3


def shares_of(weights: Sequence[float] | float | None, count: int) -> list[float]:
    """Return one weight per vector, in sum 1; a single number is that of the second of two."""
    if weights is None or (isinstance(weights, Iterable) and getattr(weights, "ndim", 1) > 0):
        return normalised_weights(weights, count)
    t = float(cast(float, weights))
    if count != 2 or not 0 <= t <= 1:
        raise ValueError(
            "weights: expected one number in [0, 1] with two vectors, or one number per vector, "
            f"got {t} with {count}"
        )
    return [1.0 - t, t]


def slerp_coefficients(cosines: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the c_i of the weighted Karcher mean Σ c_i u_i, float64 [n].

    Args:
        cosines: float64 [n, n] on the CPU, between the vectors; a zero vector has the cosine 0 with
            itself.
        weights: n numbers that sum to 1.
    """
    w = torch.tensor(list(weights), dtype=torch.float64)
    # `not (a > b)`, so that NaN is caught too.
    if not (cosines.diagonal() > 0.5).all() or not (cosines > _OPPOSITE - 1.0).all():
        return w
    if len(w) == 2:
        angle = math.acos(max(-1.0, min(1.0, cosines[0, 1].item())))
        if math.sin(angle) < 1e-8:
            return w
        return (w * angle).sin() / math.sin(angle)
    # Riemannian gradient steps, in coefficients: the mean of the logarithms of the u_i at u is
    # Σ t_i u_i with t = y - (y·p) c, p the cosines to u and y_i = w_i Θ_i / sin Θ_i.
    c = w
    for _ in range(1000):
        square = c @ cosines @ c
        if not square > 1e-14:
            return w
        c = c / square.sqrt()
        p = cosines @ c
        if p.min() < _OPPOSITE - 1.0:
            return w
        y = w * inverse_sinc(p)
        t = y - (y @ p) * c
        step = (t @ cosines @ t).clamp_min(0).sqrt().item()
        if step < 1e-13:
            # Where vectors depend on each other c is not unique; this form, which the mean
            # satisfies, is. Without a component along the mean there is no such form.
            return y / (y @ p) if y @ p > _FLAT else w
        c = math.cos(step) * c + math.sin(step) / step * t
    return w


def inverse_sinc(cosine: Tensor) -> Tensor:
    """Return Θ / sin Θ of cos Θ, continuous at 1."""
    cosine = cosine.clamp(-1, 1)
    sine = ((1 - cosine) * (1 + cosine)).sqrt()
    return torch.where(sine < 1e-6, 1 + (1 - cosine) / 3, cosine.acos() / sine)


def cosines_between(vectors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return cosines [n, n] and norms [n], float64 on the CPU; a zero vector has cosine 0."""
    flat = torch.stack([v.detach().double().flatten() for v in vectors])
    scale = flat.abs().amax(1) if flat.shape[1] else flat.new_zeros(len(flat))
    scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)
    flat = flat / scale[:, None]
    cosines, norms = cosines_of(flat @ flat.T)
    return cosines.cpu(), (norms * scale).cpu()


def cosines_of(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and norms of the products [n, n] between vectors."""
    norms = gram.diagonal().sqrt()
    product = norms[:, None] * norms
    cosines = torch.where(product > 0, gram / product, 0.0)
    cosines.diagonal().copy_(torch.where(norms > 0, norms / norms, 0.0))
    return cosines, norms
