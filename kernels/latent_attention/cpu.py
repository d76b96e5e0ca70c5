"""latent_attention in torch's operators: a chunk of keys, or some short bags, at a time."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dropout import keep_mask
from ..dtypes import wide
from ..ragged import EqualBags, bags_of, equal_bags, padded, slices_of

# Keys that torch attends to at once: their scores, for 8 heads x 25 latents, take 6 MiB in float32.
KEYS = 8192
# Scores that torch computes at once on CUDA, where more work has to follow each start of an
# operator: 1 GiB in float32.
CUDA_SCORES = 1 << 28
Reduce = Literal["mean"] | None


def _keys(q: Tensor) -> int:
    """Return how many keys torch attends to at once, from queries [B, H, C, E]."""
    return max(KEYS, CUDA_SCORES // max(1, q.shape[1] * q.shape[2])) if q.is_cuda else KEYS


def through_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None,
    counts: Tensor | None,
    scale: float,
) -> Tensor:
    """Compute latent_attention by torch's scaled_dot_product_attention, bag after bag."""
    bias = None if counts is None else counts.log().to(q.dtype)
    if offsets is None:
        bias = None if bias is None else bias[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    biases = len(q) * [None] if bias is None else [bias[None, bag] for bag in slices_of(offsets)]
    bags = [
        F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        if key.shape[1]
        else torch.zeros_like(query)
        for query, key, value, mask in zip(
            q, bags_of(k, offsets), bags_of(v, offsets), biases, strict=True
        )
    ]
    return torch.stack(bags) if bags else torch.empty_like(q)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None,
    counts: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the result [B, H, C, E] and the log-sum-exp of the scores [B, H, C]."""
    out = q.new_zeros(q.shape, dtype=wide(q.dtype))
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=wide(q.dtype))
    scaled, step = q * scale, _keys(q)
    for group in equal_bags(k, offsets):
        queries, keys, values = group.rows(scaled), group.tokens(k), group.tokens(v)
        mask, bias = _mask(seed, group, q, dropout_p), group.bias(counts, q.shape[1])
        top = lse.new_full((*queries.shape[:2], 1), float("-inf"))
        total, summed = torch.zeros_like(top), torch.zeros_like(queries, dtype=lse.dtype)
        for start in range(0, group.length, step):
            chunk = slice(start, start + step)
            weights = torch.bmm(queries, keys[:, chunk].transpose(1, 2)).to(lse.dtype)
            if bias is not None:
                weights.add_(bias[..., chunk])
            highest = torch.maximum(top, weights.amax(-1, keepdim=True))
            shrunk = (top - highest).exp_()  # of the former sums, to the new highest score
            weights.sub_(highest).exp_()
            total = total * shrunk + weights.sum(-1, keepdim=True)
            if mask is not None:
                weights.mul_(mask[..., chunk])
            summed = summed * shrunk + torch.bmm(weights.to(q.dtype), values[:, chunk])
            top = highest
        group.write(out, (summed / total)[..., : q.shape[-1]])
        group.write(lse, (top + total.log()).squeeze(-1))
    return out, lse


def _mask(seed: Tensor | None, group: EqualBags, q: Tensor, dropout_p: float) -> Tensor | None:
    """Return the dropout mask [G·H, C, N] of a group of bags, None without dropout."""
    if seed is None:
        return None
    heads, latents = q.shape[1], q.shape[2]
    like = q.new_empty(0, dtype=wide(q.dtype))
    shape = (heads * latents, group.length)
    bags = range(group.first, group.first + group.bags)
    masks = [keep_mask(seed, bag, shape, dropout_p, like) for bag in bags]
    return torch.cat(masks).unflatten(0, (-1, latents))


class _Weights(NamedTuple):
    """Computes the weights of a group of bags, and their gradient, a chunk of keys at a time."""

    q: Tensor
    """[G·H, C, E], scaled."""
    grad: Tensor
    """[G·H, C, E], the gradient of the result."""
    keys: Tensor
    """[G·H, N, E]."""
    values: Tensor
    """[G·H, N, E]."""
    lse: Tensor
    """[G·H, C, 1]"""
    bias: Tensor | None
    """[G·H, 1, N]"""
    mask: Tensor | None
    """[G·H, C, N]"""

    def __call__(self, chunk: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return A, A after dropout, and the gradient of A, [G·H, C, n] each."""
        weights = torch.bmm(self.q, self.keys[:, chunk].transpose(1, 2)).to(self.lse.dtype)
        if self.bias is not None:
            weights.add_(self.bias[..., chunk])
        weights.sub_(self.lse).exp_()
        dweights = torch.bmm(self.grad, self.values[:, chunk].transpose(1, 2)).to(self.lse.dtype)
        if self.mask is None:
            return weights, weights, dweights
        return weights, weights * self.mask[..., chunk], dweights.mul_(self.mask[..., chunk])


def backward_into(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None,
    counts: Tensor | None,
    lse: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Write the gradients into dq, dk and dv.

    Let A be the weights, D = mask ∘ A those after dropout, O = D V. Then dV = Dᵀ dO and, with
    dA = mask ∘ (dO Vᵀ), dS = A ∘ (dA - delta), delta = rowsum(A ∘ dA). In exact arithmetic delta
    is rowsum(dO ∘ O) too, and the rows of A sum to 1. After rounding neither is exact, and the
    rows of dS would not sum to 0; dQ = dS K would contain their sum times the part that all keys
    have in common. So delta is the mean of dA weighted by A, both as they are computed here.
    """
    width = q.shape[-1]
    dq.zero_()
    if offsets is not None:
        behind = slice(int(offsets[-1]), None)
        dk[behind], dv[behind] = 0, 0
    scaled, step = q * scale, _keys(q)
    for group in equal_bags(k, offsets):
        keys, values, bias = group.tokens(k), group.tokens(v), group.bias(counts, q.shape[1])
        queries, dout = group.rows(scaled), group.rows(grad)
        mask = _mask(seed, group, q, dropout_p)
        dkeys, dvalues, dqueries = group.view(dk), group.view(dv), torch.zeros_like(queries)
        weights_of = _Weights(queries, dout, keys, values, group.of(lse)[..., None], bias, mask)
        chunks = [slice(start, start + step) for start in range(0, group.length, step)]
        # The first chunk, often the only one, is kept for the second loop; others come twice.
        first = [weights_of(chunk) for chunk in chunks[:1]]
        delta = total = torch.zeros_like(weights_of.lse)
        for weights, _, dweights in (*first, *map(weights_of, chunks[1:])):
            delta = delta + (weights * dweights).sum(-1, keepdim=True)
            total = total + weights.sum(-1, keepdim=True)
        delta = delta / total
        for index, chunk in enumerate(chunks):
            weights, dropped, dweights = first.pop() if index == 0 else weights_of(chunk)
            part = torch.bmm(dropped.to(q.dtype).transpose(1, 2), dout)
            dvalues[:, :, chunk] = part[..., :width].unflatten(0, dvalues.shape[:2])
            dscores = dweights.sub_(delta).mul_(weights).to(q.dtype)
            dqueries.baddbmm_(dscores, keys[:, chunk])
            part = torch.bmm(dscores.transpose(1, 2), queries)
            dkeys[:, :, chunk] = part[..., :width].unflatten(0, dkeys.shape[:2])
        group.write(dq, dqueries[..., :width])
    dq.mul_(scale)


def weights(
    q: Tensor, k: Tensor, offsets: Tensor | None, lse: Tensor, scale: float, reduce: Reduce
) -> Tensor:
    """Return the attention weights, before dropout; see attention_weights."""
    bags, step = [], _keys(q)
    for b, keys in enumerate(bags_of(k, offsets)):
        parts = [keys.new_empty(*q.shape[1:3], 0)]
        queries = padded(q[b] * scale)
        for start in range(0, keys.shape[1], step):
            chunk = padded(keys[:, start : start + step].contiguous())
            scores = torch.bmm(queries, chunk.transpose(1, 2))
            part = scores.to(lse.dtype).sub_(lse[b, ..., None]).exp_()
            parts.append(part.to(q.dtype) if reduce is None else part.mean((0, 1)))
        bags.append(torch.cat(parts if reduce is None else [lse.new_empty(0), *parts[1:]], -1))
    if offsets is None:
        shape = k.shape[2:3] if reduce else (*q.shape[1:3], k.shape[2])
        return torch.stack(bags) if bags else (lse if reduce else q).new_empty(0, *shape)
    if reduce is None:
        return torch.cat([q.new_empty(*q.shape[1:3], 0), *bags], -1).permute(2, 0, 1)
    return torch.cat([lse.new_empty(0), *bags])
