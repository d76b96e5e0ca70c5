"""Attention of a few latent queries to very many context tokens, per bag."""

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import (
    Backend,
    check_backend,
    compiled,
    refuse_second_derivative,
    triton_kernels,
)
from .checks import check_offsets, choice, refuse_forward_mode

_LIBRARY = torch.library.Library("motet", "FRAGMENT")
_LIBRARY.define(
    "latent_attention(Tensor q, Tensor k, Tensor v, Tensor? offsets, float scale, float dropout_p, "
    "Tensor? seed, str backend) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "latent_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? offsets, "
    "Tensor out, Tensor lse, float scale, float dropout_p, Tensor? seed, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)
# The same with K and V in one tensor [T, 2, H, E], as one projection makes them: their gradient is
# then written in place too, instead of being put together from two.
_LIBRARY.define(
    "latent_attention_kv(Tensor q, Tensor kv, Tensor offsets, float scale, float dropout_p, "
    "Tensor? seed, str backend) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "latent_attention_kv_backward(Tensor grad, Tensor q, Tensor kv, Tensor offsets, Tensor out, "
    "Tensor lse, float scale, float dropout_p, Tensor? seed, str backend) -> (Tensor, Tensor)"
)

# Keys that torch attends to at once: their scores, 8 heads x 25 latents, are 6 MiB in float32.
KEYS = 8192

Reduce = Literal["mean"] | None


def latent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None = None,
    *,
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
        scale: factor on the scores; None means E ** -0.5.
        dropout_p: probability of dropping an attention weight, in [0, 1).
        seed: int64 [1], what the mask is drawn from; None draws one from torch's generator. The
            mask depends on seed, bag, token, head and latent, on nothing else.
        backend: "auto", "triton", "compile" or "eager".

    Returns:
        [B, H, C, E]. Differentiable once, in reverse mode.

    Raises:
        ValueError: shapes, dtypes, devices or offsets that do not fit.
        TypeError: something that is not a tensor.

    Example:
        >>> q, k, v = torch.randn(2, 8, 25, 16), torch.randn(70, 8, 16), torch.randn(70, 8, 16)
        >>> motet.kernels.latent_attention(q, k, v, offsets=torch.tensor([0, 50, 70])).shape
        torch.Size([2, 8, 25, 16])
    """
    _check(q, k, offsets, v=v)
    check_backend(backend)
    seed = check_dropout(dropout_p, seed, q.device)
    refuse_forward_mode("latent_attention")
    if backend == "compile":
        return compiled(_through_sdpa)(q, k, v, offsets, _scale(q, scale), dropout_p)
    out, _ = torch.ops.motet.latent_attention(
        q, k, v, offsets, _scale(q, scale), dropout_p, seed, backend
    )
    return out


def latent_attention_kv(
    q: Tensor,
    kv: Tensor,
    offsets: Tensor,
    *,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute latent_attention with K and V in one tensor [T, 2, H, E], as context_kv makes them.

    Tokens behind the last bag belong to none; their gradient is left undefined.

    Returns:
        [B, H, C, E], and the log-sum-exp of the scores [B, H, C], which attention_weights takes.
    """
    _check(q, kv[:, 0], offsets, v=kv[:, 1], whole=False)
    seed = check_dropout(dropout_p, seed, q.device)
    if backend == "compile":
        out = compiled(_through_sdpa)(q, kv[:, 0], kv[:, 1], offsets, scale, dropout_p)
        return out, q.new_empty(0)
    return torch.ops.motet.latent_attention_kv(q, kv, offsets, scale, dropout_p, seed, backend)


def latent_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Compute latent_attention in torch, literally, bag after bag."""
    if offsets is None:
        return F.dropout(_softmax(q, k, scale), dropout_p) @ v
    bags = [
        F.dropout(_softmax(q[b], k[bag].transpose(0, 1), scale), dropout_p) @ v[bag].transpose(0, 1)
        for b, bag in enumerate(_slices(offsets))
    ]
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
    if lse is not None and lse.shape != q.shape[:3]:
        raise ValueError(f"lse: expected {tuple(q.shape[:3])}, got {tuple(lse.shape)}")
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
            arguments = (q, k, k, offsets, _scale(q, scale), 0.0, None, backend)
            lse = torch.ops.motet.latent_attention(*arguments)[1]
            assert lse is not None
        fast = triton_kernels("latent_attention", backend, q)
        if fast is not None:
            return fast.weights(q, k, offsets, lse, _scale(q, scale), reduce)
        return _weights(q, k, offsets, lse, _scale(q, scale), reduce)


def check_dropout(dropout_p: float, seed: Tensor | None, device: torch.device) -> Tensor | None:
    """Return the seed of the dropout mask, drawn if need be; None without dropout."""
    if not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: expected a number in [0, 1), got {dropout_p!r}")
    if dropout_p == 0:
        return None
    if seed is None:
        return torch.randint(2**62, (1,), device=device)
    if seed.dtype != torch.int64 or seed.shape != (1,) or seed.device != device:
        raise ValueError(
            f"seed: expected int64 [1] on {device}, got {seed.dtype} {tuple(seed.shape)} on "
            f"{seed.device}"
        )
    return seed


def keep_mask(
    seed: Tensor, bag: int, shape: tuple[int, int], dropout_p: float, like: Tensor
) -> Tensor:
    """Return 1 / (1 - p) for the weights of a bag that are kept, else 0.

    One generator per bag: the mask depends on the seed and the bag's place in the batch alone.
    """
    generator = torch.Generator(like.device).manual_seed((int(seed) + bag) % 2**62)
    return like.new_empty(shape).bernoulli_(1 - dropout_p, generator=generator).div_(1 - dropout_p)


def _softmax(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * _scale(q, scale), dim=-1)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _slices(offsets: Tensor) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise(offsets.tolist())]


def _bags(tokens: Tensor, offsets: Tensor | None) -> list[Tensor]:
    """Return views [H, N_b, E] of each bag's tokens."""
    if offsets is None:
        return list(tokens)
    return [tokens[bag].transpose(0, 1) for bag in _slices(offsets)]


def _through_sdpa(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None, scale: float, dropout_p: float
) -> Tensor:
    """Compute latent_attention by torch's own attention, bag after bag."""
    if offsets is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
    bags = [
        F.scaled_dot_product_attention(own, key, value, dropout_p=dropout_p, scale=scale)
        if key.shape[1]
        else torch.zeros_like(own)
        for own, key, value in zip(q, _bags(k, offsets), _bags(v, offsets), strict=True)
    ]
    return torch.stack(bags) if bags else torch.empty_like(q)


def _full(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    fast = triton_kernels("latent_attention", backend, q)
    if fast is not None:
        return fast.attend(q, k, v, offsets, scale, dropout_p, seed)
    out = q.new_zeros(q.shape)
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=_full(q.dtype))
    scaled = q * scale
    for b, (keys, values) in enumerate(zip(_bags(k, offsets), _bags(v, offsets), strict=True)):
        if not keys.shape[1]:
            continue
        mask = _mask(seed, b, q, keys, dropout_p)
        top = lse.new_full((*q.shape[1:3], 1), float("-inf"))
        total, summed = torch.zeros_like(top), torch.zeros_like(q[b], dtype=lse.dtype)
        for start in range(0, keys.shape[1], KEYS):
            chunk = slice(start, start + KEYS)
            weights = torch.bmm(scaled[b], keys[:, chunk].transpose(1, 2)).to(lse.dtype)
            highest = torch.maximum(top, weights.amax(-1, keepdim=True))
            shrunk = (top - highest).exp_()  # what came before, relative to the highest score
            weights.sub_(highest).exp_()
            total = total * shrunk + weights.sum(-1, keepdim=True)
            if mask is not None:
                weights.mul_(mask[..., chunk])
            summed = summed * shrunk + torch.bmm(weights.to(q.dtype), values[:, chunk])
            top = highest
        out[b] = summed / total
        lse[b] = (top + total.log()).squeeze(-1)
    return out, lse


def _mask(
    seed: Tensor | None, bag: int, q: Tensor, keys: Tensor, dropout_p: float
) -> Tensor | None:
    """Return the dropout mask [H, C, N_b] of one bag."""
    if seed is None:
        return None
    heads, latents, tokens = q.shape[1], q.shape[2], keys.shape[1]
    like = q.new_empty(0, dtype=_full(q.dtype))
    mask = keep_mask(seed, bag, (heads * latents, tokens), dropout_p, like)
    return mask.unflatten(0, (heads, latents))


def _backward_into(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None,
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

    With A the weights and D = mask ∘ A those after dropout, O = D V: dV = Dᵀ dO, and
    dS = A ∘ (mask ∘ (dO Vᵀ) - rowsum(dO ∘ O)).
    """
    fast = triton_kernels("latent_attention", backend, q)
    if fast is not None:
        return fast.attend_backward(
            grad, q, k, v, offsets, out, lse, scale, dropout_p, seed, dk, dv
        )
    dq = q.new_zeros(q.shape)
    scaled = q * scale
    delta = (grad * out).sum(-1, keepdim=True, dtype=lse.dtype)
    bags = (_bags(tokens, offsets) for tokens in (k, v, dk, dv))
    for b, (keys, values, dkeys, dvalues) in enumerate(zip(*bags, strict=True)):
        mask = _mask(seed, b, q, keys, dropout_p)
        for start in range(0, keys.shape[1], KEYS):
            chunk = slice(start, start + KEYS)
            weights = torch.bmm(scaled[b], keys[:, chunk].transpose(1, 2)).to(lse.dtype)
            weights.sub_(lse[b, ..., None]).exp_()
            dscores = torch.bmm(grad[b], values[:, chunk].transpose(1, 2)).to(lse.dtype)
            dropped = weights
            if mask is not None:
                dropped = weights * mask[..., chunk]
                dscores.mul_(mask[..., chunk])
            dvalues[:, chunk] = torch.bmm(dropped.to(q.dtype).transpose(1, 2), grad[b])
            dscores = dscores.sub_(delta[b]).mul_(weights).to(q.dtype)
            dq[b] += torch.bmm(dscores, keys[:, chunk])
            dkeys[:, chunk] = torch.bmm(dscores.transpose(1, 2), scaled[b])
    return dq.mul_(scale)


def _backward_of(grad, q, k, v, offsets, out, lse, scale, dropout_p, seed, backend):
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    dq = _backward_into(grad, q, k, v, offsets, out, lse, scale, dropout_p, seed, backend, dk, dv)
    return dq, dk, dv


def _forward_kv(q, kv, offsets, scale, dropout_p, seed, backend):
    return _forward(q, kv[:, 0], kv[:, 1], offsets, scale, dropout_p, seed, backend)


def _backward_of_kv(grad, q, kv, offsets, out, lse, scale, dropout_p, seed, backend):
    dkv = torch.empty_like(kv)
    dq = _backward_into(
        grad, q, kv[:, 0], kv[:, 1], offsets, out, lse, scale, dropout_p, seed, backend,
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
        return torch.stack(bags)
    if reduce is None:
        return torch.cat([q.new_empty(*q.shape[1:3], 0), *bags], -1).permute(2, 0, 1)
    return torch.cat([lse.new_empty(0), *bags])


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.dropout_p, seed, ctx.backend = inputs
    ctx.save_for_backward(*tensors, seed, *output)


def _backward(ctx, grad: Tensor, _: Tensor):
    *tensors, seed, out, lse = ctx.saved_tensors
    packed = len(tensors) == 3  # q, kv and offsets, instead of q, k, v and offsets
    operators = torch.ops.motet
    run = operators.latent_attention_kv_backward if packed else operators.latent_attention_backward
    grads = run(grad, *tensors, out, lse, ctx.scale, ctx.dropout_p, seed, ctx.backend)
    return (*grads, *[None] * 5)


def _fake(q, *rest):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=_full(q.dtype))


def _fake_backward(grad, q, k, v, *rest):
    return q.new_empty(q.shape), torch.empty_like(k), torch.empty_like(v)


def _fake_backward_kv(grad, q, kv, *rest):
    return q.new_empty(q.shape), torch.empty_like(kv)


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
