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
    """Return pooled, mass, scores, lse and the statistics of the rows, reading the tokens once.

    Every chunk of rows is normalised, scored and pooled while it lies in the caches: with a running
    softmax, whose sums are relative to the highest score so far and shrink when a higher one comes.
    The statistics, the last two results, are empty if the caller gave them.
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
    computed = len(x) if statistics is None else 0
    means, rstds = (x.new_empty(computed, dtype=full) for _ in range(2))
    bounds = offsets.tolist()
    masks = _Masks(seed, bounds, count, dropout_p, mass)
    standardised = Standardiser(x, positions, eps, queries.dtype)
    for bag, start, stop in chunks(bounds, width, x):
        rows = slice(start, stop)
        z, *computed_statistics = standardised(rows, statistics)
        if statistics is None:
            means[rows], rstds[rows] = computed_statistics
        scores[rows] = chunk_scores = z @ aligned(queries[bag]).t()
        chunk_scores = chunk_scores.to(full)
        if counts is not None:
            chunk_scores.add_(counts[rows].log()[:, None])
        highest = torch.maximum(top[bag], chunk_scores.amax(0))
        weights = (chunk_scores - highest).exp_()
        shrunk = (top[bag] - highest).exp_()  # of the former sums, to the new highest score
        total[bag] = total[bag] * shrunk + weights.sum(0)
        weights = masks.apply(weights, bag, rows)
        mass[bag] = mass[bag] * shrunk + weights.sum(0)
        part = weights.to(queries.dtype).t() @ z
        pooled[bag] = part if start == bounds[bag] else pooled[bag] * shrunk[:, None] + part
        top[bag] = highest
    has_tokens = total > 0
    total = torch.where(has_tokens, total, 1)
    lse = torch.where(has_tokens, top + total.log(), top)
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
    statistics_given: bool,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    kept: Tensor | None,
    *,
    needs_rows: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of the queries, rowsum(dS), and the gradient of the rows.

    dS = A ∘ (mask ∘ (dpooled ẑᵀ + dmass) - delta), and dqueries = dS ẑ, in the dtype of `lse`.

    Args:
        statistics_given: whether the caller gave mean and rstd to the forward pass.
        kept: bool [T, R], the dropout mask if Triton drew it; None if it is drawn here.
        needs_rows: whether to compute the gradient of the rows, [T, D + P]; empty if not.
    """
    count, width = queries.shape[1:]
    row_sums = torch.zeros_like(lse)
    dqueries = torch.zeros_like(queries, dtype=lse.dtype)
    drows = mean.new_zeros((len(x), width) if needs_rows else 0)  # zero behind the last bag
    bounds = offsets.tolist()
    masks = _Masks(seed, bounds, count, dropout_p, lse, kept)
    standardised = Standardiser(x, positions, eps, queries.dtype)
    for bag, start, stop in chunks(bounds, width, x):
        rows = slice(start, stop)
        # Normalised as in the forward pass, so that z has the same bits. Where the forward pass
        # computed the statistics in C++, in one sweep with z, they are computed again with z.
        z, _, row_rstd = standardised(rows, (mean, rstd) if statistics_given else None)
        weights = scores[rows].to(lse.dtype) - lse[bag]
        if counts is not None:
            weights.add_(counts[rows].log()[:, None])
        weights.exp_()
        bag_queries, bag_grad = aligned(queries[bag]), aligned(grad_pooled[bag])
        dweights = (z @ bag_grad.t()).to(lse.dtype).add_(grad_mass[bag])
        dscores = masks.apply(dweights, bag, rows).sub_(delta[bag]).mul_(weights)
        dscores = dscores.to(queries.dtype)
        dqueries[bag] += dscores.t() @ z
        row_sums[bag] += dscores.sum(0, dtype=lse.dtype)
        if needs_rows:
            dropped = masks.apply(weights, bag, rows).to(queries.dtype)
            dz = dscores @ bag_queries + dropped @ bag_grad
            full = lse.dtype
            drows[rows] = standardise_backward(dz.to(full), z.to(full), row_rstd)
    return dqueries, row_sums, drows


class _Masks:
    """The dropout masks of all bags: drawn bag by bag, or taken from `kept` [T, R] if given."""

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
