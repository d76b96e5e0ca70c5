"""absorbed_attention in torch's operators, a chunk of tokens at a time."""

import torch
from torch import Tensor

from ..dropout import keep_mask
from ..dtypes import wide
from ..ragged import aligned, chunks
from ..standardise import Standardiser, standardise_backward


def forward(
    queries: Tensor,
    x: Tensor,
    positions: Tensor | None,
    offsets: Tensor,
    counts: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Read the tokens once: scores, running softmax and pooling per chunk of rows.

    The statistics of the rows, the last two results, are empty if given.
    """
    statistics = None if mean is None or rstd is None else (mean, rstd)
    full, (bags, count, width) = wide(x.dtype), queries.shape
    pooled, mass = (
        queries.new_zeros(queries.shape, dtype=full),
        queries.new_zeros(bags, count, dtype=full),
    )
    total = torch.zeros_like(mass)
    top = torch.full_like(mass, float("-inf"))
    scores = queries.new_empty(len(x), count)
    found = len(x) if statistics is None else 0
    means, rstds = (x.new_empty(found, dtype=full) for _ in range(2))
    bounds = offsets.tolist()
    masks = _Masks(seed, bounds, count, dropout_p, mass)
    standardised = Standardiser(x, positions, eps, queries.dtype)
    for bag, start, stop in chunks(bounds, width, x):
        rows = slice(start, stop)
        z, *own_statistics = standardised(rows, statistics)
        if statistics is None:
            means[rows], rstds[rows] = own_statistics
        scores[rows] = own = z @ aligned(queries[bag]).t()
        own = own.to(full)
        if counts is not None:
            own.add_(counts[rows].log()[:, None])
        highest = torch.maximum(top[bag], own.amax(0))
        weights = (own - highest).exp_()
        shrunk = (top[bag] - highest).exp_()  # what came before, relative to the highest score
        total[bag] = total[bag] * shrunk + weights.sum(0)
        weights = masks.apply(weights, bag, rows)
        mass[bag] = mass[bag] * shrunk + weights.sum(0)
        part = weights.to(queries.dtype).t() @ z
        pooled[bag] = part if start == bounds[bag] else pooled[bag] * shrunk[:, None] + part
        top[bag] = highest
    seen = total > 0
    total = torch.where(seen, total, 1)
    lse = torch.where(seen, top + total.log(), top)
    pooled.div_(total[..., None])
    return (
        pooled.to(queries.dtype), mass.div_(total).to(queries.dtype), scores, lse, means, rstds
    )  # fmt: skip


def backward(
    grad_pooled: Tensor,
    grad_mass: Tensor,
    queries: Tensor,
    x: Tensor,
    positions: Tensor | None,
    offsets: Tensor,
    counts: Tensor | None,
    delta: Tensor,
    scores: Tensor,
    lse: Tensor,
    mean: Tensor,
    rstd: Tensor,
    given: bool,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    kept: Tensor | None,
    *,
    of_rows: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of the queries and rowsum(dS), and that of the rows, else empty.

    dS = A ∘ (mask ∘ (dpooled ẑᵀ + dmass) - delta), and dqueries = dS ẑ, in the dtype of `lse`.

    Args:
        kept: bool [T, R], the dropout mask where the seed does not say it here.
        of_rows: whether that of the rows, [T, D + P], is wanted.
    """
    count, width = queries.shape[1:]
    rest = torch.zeros_like(lse)
    dqueries = torch.zeros_like(queries, dtype=lse.dtype)
    drows = mean.new_zeros((len(x), width) if of_rows else 0)  # also behind the last bag
    bounds = offsets.tolist()
    masks = _Masks(seed, bounds, count, dropout_p, lse, kept)
    standardised = Standardiser(x, positions, eps, queries.dtype)
    for bag, start, stop in chunks(bounds, width, x):
        rows = slice(start, stop)
        # Computed again in the very bits of the forward pass, in one sweep.
        z, _, own = standardised(rows, (mean, rstd) if given else None)
        weights = scores[rows].to(lse.dtype) - lse[bag]
        if counts is not None:
            weights.add_(counts[rows].log()[:, None])
        weights.exp_()
        own_queries, own_grad = aligned(queries[bag]), aligned(grad_pooled[bag])
        dweights = (z @ own_grad.t()).to(lse.dtype).add_(grad_mass[bag])
        dscores = masks.apply(dweights, bag, rows).sub_(delta[bag]).mul_(weights)
        dscores = dscores.to(queries.dtype)
        dqueries[bag] += dscores.t() @ z
        rest[bag] += dscores.sum(0, dtype=lse.dtype)
        if of_rows:
            dropped = masks.apply(weights, bag, rows).to(queries.dtype)
            dz = dscores @ own_queries + dropped @ own_grad
            full = lse.dtype
            drows[rows] = standardise_backward(dz.to(full), z.to(full), own)
    return dqueries, rest, drows


class _Masks:
    """The dropout masks of all bags, one drawn at a time unless all are `kept` [T, R] already."""

    def __init__(
        self,
        seed: Tensor | None,
        bounds: list[int],
        columns: int,
        dropout_p: float,
        like: Tensor,
        kept: Tensor | None = None,
    ) -> None:
        self.kept = kept
        self.seed, self.bounds, self.columns = seed, bounds, columns
        self.dropout_p, self.like = dropout_p, like
        self.bag, self.mask = -1, like

    def apply(self, weights: Tensor, bag: int, rows: slice) -> Tensor:
        """Return weights [n, R] of some rows of a bag after dropout."""
        if self.seed is None:
            return weights
        if self.kept is not None:
            return weights * self.kept[rows] / (1 - self.dropout_p)
        first, last = self.bounds[bag : bag + 2]
        if bag != self.bag:
            shape = (last - first, self.columns)
            self.bag = bag
            self.mask = keep_mask(self.seed, bag, shape, self.dropout_p, self.like)
        return weights * self.mask[rows.start - first : rows.stop - first]
