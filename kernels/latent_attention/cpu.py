"""latent_attention in torch's operators: a chunk of keys, or several short bags, at a time."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dropout import keep_mask
from ..dtypes import wide
from ..ragged import Run, bags_of, padded, runs_of, slices_of

# Keys that torch attends to at once: their scores, 8 heads x 25 latents, are 6 MiB in float32.
KEYS = 8192
# Scores that torch computes at once on CUDA, where starting an operator takes longer: 1 GiB.
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
    """Compute latent_attention by torch's own attention, bag after bag."""
    bias = None if counts is None else counts.log().to(q.dtype)
    if offsets is None:
        bias = None if bias is None else bias[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    biases = len(q) * [None] if bias is None else [bias[None, bag] for bag in slices_of(offsets)]
    bags = [
        F.scaled_dot_product_attention(own, key, value, attn_mask=extra, scale=scale)
        if key.shape[1]
        else torch.zeros_like(own)
        for own, key, value, extra in zip(
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
    for run in runs_of(k, offsets):
        own, keys, values = run.rows(scaled), run.tokens(k), run.tokens(v)
        mask, bias = _mask(seed, run, q, dropout_p), run.bias(counts, q.shape[1])
        top = lse.new_full((*own.shape[:2], 1), float("-inf"))
        total, summed = torch.zeros_like(top), torch.zeros_like(own, dtype=lse.dtype)
        for start in range(0, run.length, step):
            chunk = slice(start, start + step)
            weights = torch.bmm(own, keys[:, chunk].transpose(1, 2)).to(lse.dtype)
            if bias is not None:
                weights.add_(bias[..., chunk])
            highest = torch.maximum(top, weights.amax(-1, keepdim=True))
            shrunk = (top - highest).exp_()  # what came before, relative to the highest score
            weights.sub_(highest).exp_()
            total = total * shrunk + weights.sum(-1, keepdim=True)
            if mask is not None:
                weights.mul_(mask[..., chunk])
            summed = summed * shrunk + torch.bmm(weights.to(q.dtype), values[:, chunk])
            top = highest
        run.put(out, (summed / total)[..., : q.shape[-1]])
        run.put(lse, (top + total.log()).squeeze(-1))
    return out, lse


def _mask(seed: Tensor | None, run: Run, q: Tensor, dropout_p: float) -> Tensor | None:
    """Return the dropout mask [G·H, C, N] of a run."""
    if seed is None:
        return None
    heads, latents = q.shape[1], q.shape[2]
    like = q.new_empty(0, dtype=wide(q.dtype))
    shape = (heads * latents, run.length)
    bags = range(run.first, run.first + run.bags)
    masks = [keep_mask(seed, bag, shape, dropout_p, like) for bag in bags]
    return torch.cat(masks).unflatten(0, (-1, latents))


class _Weights(NamedTuple):
    """What the weights of a run of bags, and their gradient, are computed of again."""

    q: Tensor
    """[G·H, C, E], scaled, as `grad`, the gradient of the result."""
    grad: Tensor
    keys: Tensor
    """[G·H, N, E], as `values`."""
    values: Tensor
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
    """Fill dq, dk and dv.

    With A the weights and D = mask ∘ A those after dropout, O = D V: dV = Dᵀ dO, and with
    dA = mask ∘ (dO Vᵀ), dS = A ∘ (dA - rowsum(A ∘ dA)). That sum is rowsum(dO ∘ O) too, and the
    rows of A sum to 1, but not after rounding, which would be multiplied by what the keys have in
    common: so it is the mean of dA by A as it is here.
    """
    width = q.shape[-1]
    dq.zero_()
    if offsets is not None:
        behind = slice(int(offsets[-1]), None)
        dk[behind], dv[behind] = 0, 0
    scaled, step = q * scale, _keys(q)
    for run in runs_of(k, offsets):
        keys, values, bias = run.tokens(k), run.tokens(v), run.bias(counts, q.shape[1])
        own, of_out, mask = run.rows(scaled), run.rows(grad), _mask(seed, run, q, dropout_p)
        dkeys, dvalues, own_dq = run.view(dk), run.view(dv), torch.zeros_like(own)
        of = _Weights(own, of_out, keys, values, run.of(lse)[..., None], bias, mask)
        chunks = [slice(start, start + step) for start in range(0, run.length, step)]
        parts = [of(chunk) for chunk in chunks[:1]]
        delta = total = torch.zeros_like(of.lse)
        for weights, _, dweights in (*parts, *map(of, chunks[1:])):
            delta = delta + (weights * dweights).sum(-1, keepdim=True)
            total = total + weights.sum(-1, keepdim=True)
        delta = delta / total
        for index, chunk in enumerate(chunks):
            weights, dropped, dweights = parts.pop() if index == 0 else of(chunk)
            part = torch.bmm(dropped.to(q.dtype).transpose(1, 2), of_out)
            dvalues[:, :, chunk] = part[..., :width].unflatten(0, dvalues.shape[:2])
            dscores = dweights.sub_(delta).mul_(weights).to(q.dtype)
            own_dq.baddbmm_(dscores, keys[:, chunk])
            part = torch.bmm(dscores.transpose(1, 2), own)
            dkeys[:, :, chunk] = part[..., :width].unflatten(0, dkeys.shape[:2])
        run.put(dq, own_dq[..., :width])
    dq.mul_(scale)


def weights(
    q: Tensor, k: Tensor, offsets: Tensor | None, lse: Tensor, scale: float, reduce: Reduce
) -> Tensor:
    """Return the attention weights, before dropout; see attention_weights."""
    bags, step = [], _keys(q)
    for b, keys in enumerate(bags_of(k, offsets)):
        parts = [keys.new_empty(*q.shape[1:3], 0)]
        own = padded(q[b] * scale)
        for start in range(0, keys.shape[1], step):
            chunk = padded(keys[:, start : start + step].contiguous())
            scores = torch.bmm(own, chunk.transpose(1, 2))
            part = scores.to(lse.dtype).sub_(lse[b, ..., None]).exp_()
            parts.append(part.to(q.dtype) if reduce is None else part.mean((0, 1)))
        bags.append(torch.cat(parts if reduce is None else [lse.new_empty(0), *parts[1:]], -1))
    if offsets is None:
        shape = k.shape[2:3] if reduce else (*q.shape[1:3], k.shape[2])
        return torch.stack(bags) if bags else (lse if reduce else q).new_empty(0, *shape)
    if reduce is None:
        return torch.cat([q.new_empty(*q.shape[1:3], 0), *bags], -1).permute(2, 0, 1)
    return torch.cat([lse.new_empty(0), *bags])
