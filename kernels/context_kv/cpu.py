"""context_kv in torch's operators: rows are normalised a chunk at a time, then multiplied."""

import torch
from torch import Tensor

from ..dtypes import wide
from ..ragged import bounds_of, chunks
from ..standardise import Standardiser, split_gradient, standardise_backward


def forward(
    x: Tensor,
    positions: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the projections [S, T, O], and the statistics of the rows, empty if given."""
    statistics = None if mean is None or rstd is None else (mean, rstd)
    sets, outputs, width = weight.shape
    y = weight.new_empty(sets, len(x), outputs)
    found = len(x) if statistics is None else 0
    means, rstds = (x.new_empty(found, dtype=wide(x.dtype)) for _ in range(2))
    standardised = Standardiser(x, positions, eps, weight.dtype)
    for _, start, stop in chunks(bounds_of(offsets, len(x)), width, x):
        rows = slice(start, stop)
        z, *own = standardised(rows, statistics)
        if statistics is None:
            means[rows], rstds[rows] = own
        for s in range(sets):
            if bias is None:
                torch.mm(z, weight[s].t(), out=y[s, rows])
            else:
                torch.addmm(bias[s], z, weight[s].t(), out=y[s, rows])
    return y, means, rstds


def backward(
    grad: Tensor,
    x: Tensor,
    positions: Tensor | None,
    weight: Tensor,
    offsets: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    given: bool,
    eps: float,
    *,
    tokens: bool,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, positions and weight; empty where not asked for.

    Args:
        tokens: whether those of x and positions are.
        weights: whether that of weight is.
    """
    full = wide(x.dtype)
    dweight = weight.new_zeros(weight.shape if weights else 0, dtype=full)
    drows = x.new_empty((len(x), weight.shape[2]) if tokens else 0, dtype=full)
    # Only the gradients of tokens are a bag's own.
    bounds = bounds_of(offsets if tokens else None, len(x)) if weights or tokens else []
    standardised = Standardiser(x, positions, eps, weight.dtype)
    for _, start, stop in chunks(bounds, weight.shape[2], x):
        rows = slice(start, stop)
        # Computed again in the very bits of the forward pass, in one sweep.
        z, _, own = standardised(rows, (mean, rstd) if given else None)
        if weights:
            for s in range(len(weight)):
                if full == weight.dtype:
                    dweight[s].addmm_(grad[s, rows].t(), z)
                else:
                    dweight[s] += grad[s, rows].t() @ z
        if tokens:
            dz = torch.zeros_like(z, dtype=full)
            for s in range(len(weight)):
                dz += grad[s, rows] @ weight[s]
            drows[rows] = standardise_backward(dz, z.to(full), own)
    if not tokens:
        return x.new_empty(0), x.new_empty(0), dweight.to(weight.dtype)
    return *split_gradient(drows, x, positions), dweight.to(weight.dtype)
