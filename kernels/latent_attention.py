"""Attention of a few latent queries to very many context tokens, per bag."""

import math
import os
from collections.abc import Sequence
from itertools import pairwise
from types import ModuleType
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import choice
from .backends import (
    Backend,
    check_backend,
    compiled,
    refuse_second_derivative,
    rows_apart,
    triton_kernels,
)
from .checks import check_offsets, refuse_forward_mode
from .context_kv import wide

_LIBRARY = torch.library.Library("motet", "FRAGMENT")
# The result is float32 also for half precision, since its rounding would be that of a difference in
# the backward pass; callers round it.
_LIBRARY.define(
    "latent_attention(Tensor q, Tensor k, Tensor v, Tensor? offsets, Tensor? counts, float scale, "
    "float dropout_p, Tensor? seed, str backend) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "latent_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? offsets, "
    "Tensor? counts, Tensor out, Tensor lse, float scale, float dropout_p, Tensor? seed, "
    "str backend) -> (Tensor, Tensor, Tensor)"
)
# The same with K and V in one tensor [T, 2, H, E], as one projection makes them: their gradient is
# then written in place too, instead of being put together from two.
_LIBRARY.define(
    "latent_attention_kv(Tensor q, Tensor kv, Tensor offsets, Tensor? counts, float scale, "
    "float dropout_p, Tensor? seed, str backend) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "latent_attention_kv_backward(Tensor grad, Tensor q, Tensor kv, Tensor offsets, "
    "Tensor? counts, Tensor out, Tensor lse, float scale, float dropout_p, Tensor? seed, "
    "str backend) -> (Tensor, Tensor)"
)

# Keys that torch attends to at once: their scores, 8 heads x 25 latents, are 6 MiB in float32.
KEYS = 8192
# Neighbouring bags of one length up to this are attended to by one product: below it, the time of a
# bag is that of starting a dozen operators.
TOGETHER = 512

Reduce = Literal["mean"] | None


def latent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None = None,
    *,
    counts: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Attend from latent queries to the tokens of each bag.

    .. math:: \mathrm{dropout}(\mathrm{softmax}(\mathrm{scale} \cdot q k^\top)) v

    HEALNet, Eq. 2. A bag without tokens gives zeros; one with a single token gives its value.
    Tokens of one bag never see another's: a bag alone gives the bits that it gives in a batch, on
    one device. The scores are never all in memory; the backward pass computes them again.

    Args:
        q: [B, H, C, E] queries.
        k: [B, H, N, E] keys, or [T, H, E] for ragged bags, T tokens in all. Any strides.
        v: values, like `k`.
        offsets: int64 [B + 1] for ragged bags: bag b owns tokens offsets[b] to offsets[b + 1].
        counts: [B, N], or [T] with `offsets`: how many tokens each key stands for, float32 (float64
            for float64 tensors), positive; None means 1 each. A key that counts m times is m equal
            keys: its score rises by log m. No gradient flows to them. Their values are checked
            where those of offsets are, on the CPU or under MOTET_CHECK=1.
        scale: factor on the scores; None means E ** -0.5.
        dropout_p: probability of dropping an attention weight, in [0, 1); 0 with `counts`, since
            the tokens that a key stands for would be dropped together.
        seed: int64 [1], what the mask is drawn from; None draws one from torch's generator. The
            mask of a bag depends on the seed, the bag's place in the batch and its own sizes, not
            on how the work is cut or on other bags.
        backend: "auto", "triton", "compile" (without dropout; with it "eager") or "eager".

    Returns:
        [B, H, C, E]. Differentiable once, in reverse mode.

    Raises:
        ValueError: shapes, dtypes, devices, offsets or counts that do not fit.
        TypeError: something that is not a tensor.

    Example:
        >>> q, k, v = torch.randn(2, 8, 25, 16), torch.randn(70, 8, 16), torch.randn(70, 8, 16)
        >>> motet.kernels.latent_attention(q, k, v, offsets=torch.tensor([0, 50, 70])).shape
        torch.Size([2, 8, 25, 16])
    """
    _check(q, k, offsets, v=v)
    check_backend(backend)
    seed = check_dropout(dropout_p, seed, q.device)
    check_counts(counts, k.shape[::2] if offsets is None else k.shape[:1], k, dropout_p)
    refuse_forward_mode("latent_attention")
    if backend == "compile" and not dropout_p:
        return compiled(_through_sdpa)(q, k, v, offsets, counts, _scale(q, scale))
    out, _ = torch.ops.motet.latent_attention(
        q, k, v, offsets, counts, _scale(q, scale), dropout_p, seed, backend
    )
    return out.to(q.dtype)


def latent_attention_kv(
    q: Tensor,
    kv: Tensor,
    offsets: Tensor,
    *,
    counts: Tensor | None = None,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute latent_attention with K and V in one tensor [T, 2, H, E], as context_kv makes them.

    Tokens behind the last bag belong to none; their gradient is left undefined.

    Returns:
        [B, H, C, E], and the log-sum-exp of the scores [B, H, C], which attention_weights takes; it
        includes the counts, so that these weights are those of one token out of a key's.
    """
    _check(q, kv[:, 0], offsets, v=kv[:, 1], whole=False)
    seed = check_dropout(dropout_p, seed, q.device)
    check_counts(counts, kv.shape[:1], kv, dropout_p)
    refuse_forward_mode("latent_attention")
    if backend == "compile" and not dropout_p:
        out = compiled(_through_sdpa)(q, kv[:, 0], kv[:, 1], offsets, counts, scale)
        return out, q.new_empty(0)
    out, lse = torch.ops.motet.latent_attention_kv(
        q, kv, offsets, counts, scale, dropout_p, seed, backend
    )
    return out.to(q.dtype), lse


def latent_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None = None,
    *,
    counts: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Compute latent_attention in torch, literally, bag after bag."""
    if offsets is None:
        own = None if counts is None else counts[:, None, None]
        return F.dropout(_softmax(q, k, scale, own), dropout_p) @ v
    bags = []
    for b, bag in enumerate(_slices(offsets)):
        own = None if counts is None else counts[bag]
        weights = _softmax(q[b], k[bag].transpose(0, 1), scale, own)
        bags.append(F.dropout(weights, dropout_p) @ v[bag].transpose(0, 1))
    return torch.stack(bags) if bags else torch.empty_like(q)


def attention_weights(
    q: Tensor,
    k: Tensor,
    offsets: Tensor | None = None,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    reduce: Reduce = None,
    backend: Backend = "auto",
) -> Tensor:
    """Return the attention weights of latent_attention, before dropout.

    Args:
        q: [B, H, C, E] queries.
        k: [B, H, N, E] keys, or [T, H, E] with `offsets`.
        offsets: int64 [B + 1], see latent_attention.
        scale: factor on the scores; None means E ** -0.5.
        lse: [B, H, C], the log-sum-exp of the scaled scores where it is known; None computes it.
        reduce: "mean" for one number per token, the mean over heads and latents, for which the full
            map is never in memory; None for all.
        backend: "auto", "triton" or "eager" ("compile" counts as "eager").

    Returns:
        [B, H, C, N], or [T, H, C] with `offsets`; they sum to 1 over the tokens of each bag. With
        `reduce="mean"` [B, N], or [T], float32 or float64. Differentiable if neither `lse` nor
        `reduce` is given.

    Raises:
        ValueError: shapes, dtypes, devices or offsets that do not fit.
        TypeError: something that is not a tensor.

    Example:
        >>> q, k = torch.randn(2, 8, 25, 16), torch.randn(2, 8, 50, 16)
        >>> motet.kernels.attention_weights(q, k).shape
        torch.Size([2, 8, 25, 50])
        >>> motet.kernels.attention_weights(q, k, reduce="mean").shape
        torch.Size([2, 50])
    """
    _check(q, k, offsets)
    check_backend(backend)
    choice("reduce", reduce, (None, "mean"))
    if lse is not None:
        if not isinstance(lse, Tensor):
            raise TypeError(f"lse: expected a tensor, got {type(lse).__name__}")
        if (lse.shape, lse.dtype, lse.device) != (q.shape[:3], wide(q.dtype), q.device):
            raise ValueError(
                f"lse: expected {tuple(q.shape[:3])} {wide(q.dtype)} on {q.device}, got "
                f"{tuple(lse.shape)} {lse.dtype} on {lse.device}"
            )
    if lse is None and reduce is None:
        if offsets is None:
            return _softmax(q, k, scale)
        bags = [
            _softmax(q[b], k[bag].transpose(0, 1), scale) for b, bag in enumerate(_slices(offsets))
        ]
        # [H, C, N] of each bag, one after the other along the tokens
        return torch.cat(bags, dim=-1).permute(2, 0, 1) if bags else k.new_empty(0, *q.shape[1:3])
    with torch.no_grad():
        if lse is None:
            arguments = (q, k, k, offsets, None, _scale(q, scale), 0.0, None, backend)
            lse = torch.ops.motet.latent_attention(*arguments)[1]
            assert lse is not None
        fast = _fast(backend, q)
        if fast is not None:
            q, k = rows_apart(q), rows_apart(k)
            return fast.weights(q, k, offsets, lse.contiguous(), _scale(q, scale), reduce)
        return _weights(q, k, offsets, lse, _scale(q, scale), reduce)


def check_dropout(dropout_p: float, seed: Tensor | None, device: torch.device) -> Tensor | None:
    """Return the seed of the dropout mask, drawn if need be; None without dropout."""
    if not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: expected a number in [0, 1), got {dropout_p!r}")
    if dropout_p == 0:
        return None
    if seed is None:
        return torch.randint(2**62, (1,), device=device)
    if not isinstance(seed, Tensor):
        raise TypeError(f"seed: expected a tensor, got {type(seed).__name__}")
    if seed.dtype != torch.int64 or seed.shape != (1,) or seed.device != device:
        raise ValueError(
            f"seed: expected int64 [1] on {device}, got {seed.dtype} {tuple(seed.shape)} on "
            f"{seed.device}"
        )
    return seed


def check_counts(
    counts: Tensor | None, keys: Sequence[int], like: Tensor, dropout_p: float
) -> None:
    """Raise unless there are no counts, or positive ones of the shape `keys` and no dropout."""
    if counts is None:
        return
    if not isinstance(counts, Tensor):
        raise TypeError(f"counts: expected a tensor, got {type(counts).__name__}")
    expected = (tuple(keys), wide(like.dtype), like.device)
    got = (tuple(counts.shape), counts.dtype, counts.device)
    if got != expected:
        raise ValueError("counts: expected {} {} on {}, got {} {} on {}".format(*expected, *got))
    if counts.requires_grad:
        raise ValueError("counts: expected no gradient, got requires_grad=True; detach them")
    if dropout_p:
        raise ValueError(
            "dropout_p: expected 0 with counts, since the tokens that a key stands for would be "
            f"dropped together, got {dropout_p}"
        )
    if torch.compiler.is_compiling() or not counts.numel():
        return
    # As with the values of offsets.
    if counts.device.type == "cpu" or os.environ.get("MOTET_CHECK") == "1":
        lowest, highest = (bound.item() for bound in counts.aminmax())
        if not (lowest > 0 and highest < math.inf):  # NaN is both bounds
            raise ValueError(
                f"counts: expected positive finite numbers, got {lowest:g} to {highest:g}"
            )


def keep_mask(
    seed: Tensor, bag: int, shape: tuple[int, int], dropout_p: float, like: Tensor
) -> Tensor:
    """Return 1 / (1 - p) for the weights of a bag that are kept, else 0; one generator per bag."""
    generator = torch.Generator(like.device).manual_seed((int(seed) + bag) % 2**62)
    return like.new_empty(shape).bernoulli_(1 - dropout_p, generator=generator).div_(1 - dropout_p)


def _softmax(q: Tensor, k: Tensor, scale: float | None, counts: Tensor | None = None) -> Tensor:
    scores = q @ k.transpose(-1, -2) * _scale(q, scale)
    if counts is not None:
        scores = scores + counts.log().to(scores.dtype)
    return torch.softmax(scores, dim=-1)


def _scale(q: Tensor, scale: float | None) -> float:
    if scale is not None:
        return scale
    if q.shape[-1] == 0:
        raise ValueError("q: expected [B, H, C, E] with E > 0, or a scale")
    return q.shape[-1] ** -0.5


def _slices(offsets: Tensor) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise(offsets.tolist())]


def _bags(tokens: Tensor, offsets: Tensor | None) -> list[Tensor]:
    """Return views [H, N_b, E] of each bag's tokens."""
    if offsets is None:
        return list(tokens)
    return [tokens[bag].transpose(0, 1) for bag in _slices(offsets)]


def _through_sdpa(
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
    biases = len(q) * [None] if bias is None else [bias[None, bag] for bag in _slices(offsets)]
    bags = [
        F.scaled_dot_product_attention(own, key, value, attn_mask=extra, scale=scale)
        if key.shape[1]
        else torch.zeros_like(own)
        for own, key, value, extra in zip(
            q, _bags(k, offsets), _bags(v, offsets), biases, strict=True
        )
    ]
    return torch.stack(bags) if bags else torch.empty_like(q)


def _fast(backend: str, q: Tensor) -> ModuleType | None:
    too_wide = "takes heads of up to 256 numbers" if q.shape[-1] > 256 else ""
    return triton_kernels("latent_attention", backend, q, why_not=too_wide)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None,
    counts: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    fast = _fast(backend, q)
    if fast is not None:
        return fast.attend(*map(rows_apart, (q, k, v)), offsets, counts, scale, dropout_p, seed)
    out = q.new_zeros(q.shape, dtype=wide(q.dtype))
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=wide(q.dtype))
    scaled = q * scale
    for run in _runs(k, offsets):
        own, keys, values = run.of(scaled), run.tokens(k), run.tokens(v)
        mask, bias = _mask(seed, run, q, dropout_p), run.bias(counts, q.shape[1])
        top = lse.new_full((*own.shape[:2], 1), float("-inf"))
        total, summed = torch.zeros_like(top), torch.zeros_like(own, dtype=lse.dtype)
        for start in range(0, run.length, KEYS):
            chunk = slice(start, start + KEYS)
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
        run.put(out, summed / total)
        run.put(lse, (top + total.log()).squeeze(-1))
    return out, lse


class _Run(NamedTuple):
    """Neighbouring bags of one length, or one bag."""

    first: int
    bags: int
    start: int | None
    """The first bag's first token; None if bags are an axis of their own."""
    length: int

    def of(self, x: Tensor) -> Tensor:
        """Return this run's part [G·H, ...] of x [B, H, ...]."""
        return x[self.first : self.first + self.bags].flatten(0, 1)

    def put(self, target: Tensor, x: Tensor) -> None:
        """Write x [G·H, ...] into this run's part of target [B, H, ...]."""
        own = target[self.first : self.first + self.bags]
        own.copy_(x.unflatten(0, own.shape[:2]))

    def view(self, tokens: Tensor) -> Tensor:
        """Return a view [G, H, N, E] of this run's tokens."""
        if self.start is None:
            return tokens[self.first : self.first + self.bags]
        own = tokens[self.start : self.start + self.bags * self.length]
        return own.unflatten(0, (self.bags, self.length)).transpose(1, 2)

    def tokens(self, tokens: Tensor) -> Tensor:
        """Return this run's tokens [G·H, N, E].

        Always a copy for short bags, so that one alone is multiplied as it is among others.
        """
        view = self.view(tokens)
        if self.length <= TOGETHER:
            return view.contiguous().flatten(0, 1)
        return view[0]

    def bias(self, counts: Tensor | None, heads: int) -> Tensor | None:
        """Return what the counts of this run's keys add to their scores, [G·H, 1, N]."""
        if counts is None:
            return None
        if self.start is None:
            own = counts[self.first : self.first + self.bags]
        else:
            own = counts[self.start : self.start + self.bags * self.length]
        own = own.log().reshape(self.bags, 1, 1, self.length)
        return own.expand(-1, heads, -1, -1).flatten(0, 1)


def _runs(k: Tensor, offsets: Tensor | None) -> list[_Run]:
    """Cut the bags that have tokens into runs."""
    if offsets is None:
        bags, _, length, _ = k.shape
        lengths, starts = [length] * bags, [None] * bags
    else:
        starts = offsets.tolist()
        lengths = [stop - start for start, stop in pairwise(starts)]
    runs: list[_Run] = []
    for bag, length in enumerate(lengths):
        last = runs[-1] if runs else None
        if not length:
            continue
        if last and length == last.length <= TOGETHER and last.first + last.bags == bag:
            runs[-1] = last._replace(bags=last.bags + 1)
        else:
            runs.append(_Run(bag, 1, starts[bag], length))
    return runs


def _mask(seed: Tensor | None, run: _Run, q: Tensor, dropout_p: float) -> Tensor | None:
    """Return the dropout mask [G·H, C, N] of a run."""
    if seed is None:
        return None
    heads, latents = q.shape[1], q.shape[2]
    like = q.new_empty(0, dtype=wide(q.dtype))
    shape = (heads * latents, run.length)
    bags = range(run.first, run.first + run.bags)
    masks = [keep_mask(seed, bag, shape, dropout_p, like) for bag in bags]
    return torch.cat(masks).unflatten(0, (-1, latents))


def _backward_into(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None,
    counts: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    """Fill dk and dv, return dq.

    With A the weights and D = mask ∘ A those after dropout, O = D V: dV = Dᵀ dO, and with
    dA = mask ∘ (dO Vᵀ), dS = A ∘ (dA - rowsum(A ∘ dA)). That sum is rowsum(dO ∘ O) too, and the
    rows of A sum to 1, but not after rounding, which would be multiplied by what the keys have in
    common: so it is the mean of dA by A as it is here.
    """
    fast = _fast(backend, q)
    if fast is not None:
        rows = map(rows_apart, (grad, q, k, v))
        return fast.attend_backward(
            *rows, offsets, counts, out, lse, scale, dropout_p, seed, dk, dv
        )
    dq = q.new_zeros(q.shape)
    scaled = q * scale
    for run in _runs(k, offsets):
        own, of_out, keys, values = run.of(scaled), run.of(grad), run.tokens(k), run.tokens(v)
        dkeys, dvalues = run.view(dk), run.view(dv)
        mask, own_dq = _mask(seed, run, q, dropout_p), torch.zeros_like(own)
        own_lse, own_bias = run.of(lse)[..., None], run.bias(counts, q.shape[1])

        def of(
            chunk: slice, own=own, of_out=of_out, keys=keys, values=values, mask=mask, lse=own_lse,
            bias=own_bias,
        ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
            """Return A, A after dropout, and the gradient of A, [G·H, C, n] each."""
            weights = torch.bmm(own, keys[:, chunk].transpose(1, 2)).to(lse.dtype)
            if bias is not None:
                weights.add_(bias[..., chunk])
            weights.sub_(lse).exp_()
            dweights = torch.bmm(of_out, values[:, chunk].transpose(1, 2)).to(lse.dtype)
            if mask is None:
                return weights, weights, dweights
            return weights, weights * mask[..., chunk], dweights.mul_(mask[..., chunk])

        chunks = [slice(start, start + KEYS) for start in range(0, run.length, KEYS)]
        parts = [of(chunk) for chunk in chunks[:1]]
        delta = total = torch.zeros_like(own_lse)
        for weights, _, dweights in (*parts, *map(of, chunks[1:])):
            delta = delta + (weights * dweights).sum(-1, keepdim=True)
            total = total + weights.sum(-1, keepdim=True)
        delta = delta / total
        for index, chunk in enumerate(chunks):
            weights, dropped, dweights = parts.pop() if index == 0 else of(chunk)
            part = torch.bmm(dropped.to(q.dtype).transpose(1, 2), of_out)
            dvalues[:, :, chunk] = part.unflatten(0, dvalues.shape[:2])
            dscores = dweights.sub_(delta).mul_(weights).to(q.dtype)
            own_dq.baddbmm_(dscores, keys[:, chunk])
            part = torch.bmm(dscores.transpose(1, 2), own)
            dkeys[:, :, chunk] = part.unflatten(0, dkeys.shape[:2])
        run.put(dq, own_dq)
    return dq.mul_(scale)


def _backward_of(grad, q, k, v, offsets, counts, out, lse, scale, dropout_p, seed, backend):
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    dq = _backward_into(
        grad, q, k, v, offsets, counts, out, lse, scale, dropout_p, seed, backend, dk, dv
    )
    return dq, dk, dv


def _forward_kv(q, kv, *rest):
    return _forward(q, kv[:, 0], kv[:, 1], *rest)


def _backward_of_kv(grad, q, kv, offsets, counts, out, lse, scale, dropout_p, seed, backend):
    dkv = kv.new_empty(kv.shape)
    dq = _backward_into(
        grad, q, kv[:, 0], kv[:, 1], offsets, counts, out, lse, scale, dropout_p, seed, backend,
        dkv[:, 0], dkv[:, 1],
    )  # fmt: skip
    return dq, dkv


def _weights(
    q: Tensor, k: Tensor, offsets: Tensor | None, lse: Tensor, scale: float, reduce: Reduce
) -> Tensor:
    bags = []
    for b, keys in enumerate(_bags(k, offsets)):
        parts = [keys.new_empty(*q.shape[1:3], 0)]
        for start in range(0, keys.shape[1], KEYS):
            scores = torch.bmm(q[b] * scale, keys[:, start : start + KEYS].transpose(1, 2))
            part = scores.to(lse.dtype).sub_(lse[b, ..., None]).exp_()
            parts.append(part.to(q.dtype) if reduce is None else part.mean((0, 1)))
        bags.append(torch.cat(parts if reduce is None else [lse.new_empty(0), *parts[1:]], -1))
    if offsets is None:
        shape = k.shape[2:3] if reduce else (*q.shape[1:3], k.shape[2])
        return torch.stack(bags) if bags else (lse if reduce else q).new_empty(0, *shape)
    if reduce is None:
        return torch.cat([q.new_empty(*q.shape[1:3], 0), *bags], -1).permute(2, 0, 1)
    return torch.cat([lse.new_empty(0), *bags])


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.dropout_p, seed, ctx.backend = inputs
    ctx.save_for_backward(*tensors, seed, *output)


def _backward(ctx, grad: Tensor, _: Tensor):
    *tensors, seed, out, lse = ctx.saved_tensors
    packed = len(tensors) == 4  # q, kv, offsets and counts, instead of q, k, v and these two
    operators = torch.ops.motet
    run = operators.latent_attention_kv_backward if packed else operators.latent_attention_backward
    grads = run(
        grad.to(tensors[0].dtype), *tensors, out, lse, ctx.scale, ctx.dropout_p, seed, ctx.backend
    )
    return (*grads, *[None] * 6)


def _fake(q, *rest):
    full = wide(q.dtype)
    return q.new_empty(q.shape, dtype=full), q.new_empty(q.shape[:3], dtype=full)


def _fake_backward(grad, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _fake_backward_kv(grad, q, kv, *rest):
    return q.new_empty(q.shape), kv.new_empty(kv.shape)


for _name, _implementation, _fake_of in (
    ("latent_attention", _forward, _fake),
    ("latent_attention_backward", _backward_of, _fake_backward),
    ("latent_attention_kv", _forward_kv, _fake),
    ("latent_attention_kv_backward", _backward_of_kv, _fake_backward_kv),
):
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"motet::{_name}", _fake_of, lib=_LIBRARY)
for _name in ("latent_attention", "latent_attention_kv"):
    torch.library.register_autograd(
        f"motet::{_name}", _backward, setup_context=_setup_context, lib=_LIBRARY
    )
    refuse_second_derivative(_LIBRARY, _name)


def _check(
    q: Tensor,
    k: Tensor,
    offsets: Tensor | None,
    v: Tensor | None = None,
    *,
    whole: bool = True,
) -> None:
    named = {"q": q, "k": k} if v is None else {"q": q, "k": k, "v": v}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    if q.ndim != 4:
        raise ValueError(f"q: expected [B, H, C, E], got {tuple(q.shape)}")
    batch, heads, _, width = q.shape
    ragged = offsets is not None
    expected = ("T", heads, width) if ragged else (batch, heads, "N", width)
    fits = (
        k.ndim == 3 and k.shape[1:] == (heads, width)
        if ragged
        else k.ndim == 4 and (*k.shape[:2], k.shape[3]) == (batch, heads, width)
    )
    if not fits:
        text = ", ".join(map(str, expected))
        raise ValueError(f"k: expected [{text}] for q {tuple(q.shape)}, got {tuple(k.shape)}")
    if v is not None and v.shape != k.shape:
        raise ValueError(f"v: expected the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    for name, tensor in named.items():
        if (tensor.dtype, tensor.device) != (q.dtype, q.device):
            raise ValueError(
                f"{name}: expected {q.dtype} on {q.device} as q, got {tensor.dtype} on "
                f"{tensor.device}"
            )
    if offsets is not None:
        check_offsets(offsets, len(k), k.device, batch, whole=whole)
