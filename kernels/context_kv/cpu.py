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
    """Return the projections [S, T, O], and means and 1 / SDs of the rows.

    The statistics are empty if the caller gave them.
    """
    statistics = None if mean is None or rstd is None else (mean, rstd)
    sets, outputs, width = weight.shape
    y = weight.new_empty(sets, len(x), outputs)
    computed = len(x) if statistics is None else 0
    means, rstds = (x.new_empty(computed, dtype=wide(x.dtype)) for _ in range(2))
    standardised = Standardiser(x, positions, eps, weight.dtype)
    for _, start, stop in chunks(bounds_of(offsets, len(x)), width, x):
        rows = slice(start, stop)
        z, *computed_statistics = standardised(rows, statistics)
        if statistics is None:
            means[rows], rstds[rows] = computed_statistics
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
    statistics_given: bool,
    eps: float,
    *,
    needs_tokens: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, positions and weight, empty where they are not needed.

    Args:
        statistics_given: whether the caller gave mean and rstd to the forward pass.
        needs_tokens: whether the gradients of x and positions are needed.
        needs_weight: whether the gradient of weight is needed.
    """
    full = wide(x.dtype)
    dweight = weight.new_zeros(weight.shape if needs_weight else 0, dtype=full)
    drows = x.new_empty((len(x), weight.shape[2]) if needs_tokens else 0, dtype=full)
    # The gradients of a bag's tokens must not depend on the other bags. That of the weight is a sum
    # over all bags, so that its chunks need not end where bags do.
    needed = needs_weight or needs_tokens
    bounds = bounds_of(offsets if needs_tokens else None, len(x)) if needed else []
    standardised = Standardiser(x, positions, eps, weight.dtype)
    for _, start, stop in chunks(bounds, weight.shape[2], x):
        rows = slice(start, stop)
        # Normalised as in the forward pass, so that z has the same bits. Where the forward pass
        # computed the statistics in C++, in one sweep with z, they are computed again with z.
        z, _, row_rstd = standardised(rows, (mean, rstd) if statistics_given else None)
        if needs_weight:
            for s in range(len(weight)):
                if full == weight.dtype:
                    dweight[s].addmm_(grad[s, rows].t(), z)
                else:
                    dweight[s] += grad[s, rows].t() @ z
        if needs_tokens:
            dz = torch.zeros_like(z, dtype=full)
            for s in range(len(weight)):
                dz += grad[s, rows] @ weight[s]
            drows[rows] = standardise_backward(dz, z.to(full), row_rstd)
    if not needs_tokens:
        return x.new_empty(0), x.new_empty(0), dweight.to(weight.dtype)
    return *split_gradient(drows, x, positions), dweight.to(weight.dtype)
