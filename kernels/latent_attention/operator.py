"""Attention of a few latent queries to very many context tokens, per bag."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._checks import choice
from ..backends import Backend, check_backend, compiled, refuse_second_derivative
from ..checks import check_counts, refuse_forward_mode
from ..dropout import check_dropout
from ..dtypes import wide
from ..layout import rows_apart
from ..ragged import padded, slices_of
from . import cpu
from .checks import check_attention, check_lse
from .cpu import Reduce, through_sdpa
from .records import like_record, record_width, takes_triton
from .reference import scale_of, softmax_weights

_LIBRARY = torch.library.Library("motet", "FRAGMENT")
# The result is float32 also for tensors in half precision: the backward pass subtracts a number
# computed from it, and the difference may be as small as its rounding would be. Callers round it.
_LIBRARY.define(
    "latent_attention(Tensor q, Tensor k, Tensor v, Tensor? offsets, Tensor? counts, float scale, "
    "float dropout_p, Tensor? seed, str backend) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "latent_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? offsets, "
    "Tensor? counts, Tensor out, Tensor lse, float scale, float dropout_p, Tensor? seed, "
    "str backend) -> (Tensor, Tensor, Tensor)"
)
# The same with K and V in one tensor [T, 2, H, P], as one projection makes them, or with Q, K and V
# in one tensor [B, C, 3, H, E]: their gradient is then written into one tensor too, instead of
# being concatenated from two or three.
_LIBRARY.define(
    "latent_attention_kv(Tensor q, Tensor kv, Tensor offsets, Tensor? counts, float scale, "
    "float dropout_p, Tensor? seed, str backend, Tensor? record) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "latent_attention_kv_backward(Tensor grad, Tensor q, Tensor kv, Tensor offsets, "
    "Tensor? counts, Tensor out, Tensor lse, float scale, float dropout_p, Tensor? seed, "
    "str backend, bool recorded) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "latent_self_attention(Tensor qkv, float scale, float dropout_p, Tensor? seed, str backend) "
    "-> (Tensor, Tensor)"
)
_LIBRARY.define(
    "latent_self_attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, float scale, "
    "float dropout_p, Tensor? seed, str backend) -> Tensor"
)


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

    HEALNet, Eq. 2. The result of a bag without tokens is zero; that of a single token is its value.
    A bag alone gives the same bits as in any batch, on one device. The scores are never all in
    memory; the backward pass computes them again.

    Args:
        q: [B, H, C, E] queries.
        k: [B, H, N, E] keys, or [T, H, E] for ragged bags, T tokens in all. Any strides.
        v: values, like `k`.
        offsets: int64 [B + 1] for ragged bags: bag b has tokens offsets[b] to offsets[b + 1].
        counts: [B, N], or [T] with `offsets`: how many tokens each key stands for, float32 (float64
            for float64 tensors), positive; None means 1 each. A key of count m acts as m equal
            keys: its score rises by log m. Counts get no gradient. Their values are checked on the
            CPU, elsewhere only with MOTET_CHECK=1, as those of `offsets` are.
        scale: factor on the scores; None means E ** -0.5.
        dropout_p: probability of dropping an attention weight, in [0, 1); 0 with `counts`, since
            the tokens that a key stands for would be dropped together.
        seed: int64 [1], what the mask is drawn from; None draws one from torch's generator. The
            mask of a bag depends on the seed, the bag's place in the batch and its sizes, not on
            how the work is cut or on other bags.
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
    check_attention(q, k, offsets, v=v)
    check_backend(backend)
    seed = check_dropout(dropout_p, seed, q.device)
    check_counts(counts, k.shape[::2] if offsets is None else k.shape[:1], k, dropout_p)
    refuse_forward_mode("latent_attention")
    if backend == "compile" and not dropout_p:
        return compiled(through_sdpa)(q, k, v, offsets, counts, scale_of(q, scale))
    out, _ = torch.ops.motet.latent_attention(
        q, k, v, offsets, counts, scale_of(q, scale), dropout_p, seed, backend
    )
    return out.to(q.dtype)


def latent_attention_kv(
    q: Tensor,
    kv: Tensor,
    offsets: Tensor,
    *,
    counts: Tensor | None = None,
    record: Tensor | None = None,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute latent_attention with K and V in one tensor, as context_kv returns them.

    Args:
        q: [B, H, C, E], or [1, H, C, E] for all bags.
        kv: [T, 2, H, P]. P is E, or the next multiple of 16, with zeros behind the Eth number: so
            rows begin at multiples of 32 bytes, and loads can be asynchronous. Tokens behind
            the last bag belong to no bag; their gradient is zero, as is that of the padding.
        record: one of the records that kv_records made for `kv`, used by this call only; the
            gradient reaches `kv` through it (see records.py). None: this call computes the gradient
            of `kv` itself.
        offsets, counts, scale, dropout_p, seed, backend: see latent_attention.

    Returns:
        [B, H, C, E] in float32 (float64), not rounded: lego_pass does that; and the log-sum-exp of
        the scores [B, H, C], which attention_weights takes. It includes the counts, so that a
        weight computed from it is that of one of the tokens that a key stands for.
    """
    bags, width = len(offsets) - 1, q.shape[-1]
    k, v = kv[..., :width].unbind(1)
    check_attention(q.expand(bags, -1, -1, -1), k, offsets, v=v, covers_all=False)
    if kv.shape[-1] not in (width, width + -width % 16):
        raise ValueError(
            f"kv: expected rows of {width} numbers, or of {width + -width % 16}, got "
            f"{tuple(kv.shape)}"
        )
    seed = check_dropout(dropout_p, seed, q.device)
    check_counts(counts, kv.shape[:1], kv, dropout_p)
    expected = (bags, *q.shape[1:3], record_width(width))
    if record is not None and record.shape != expected:
        raise ValueError(f"record: expected {expected}, got {tuple(record.shape)}")
    refuse_forward_mode("latent_attention")
    if backend == "compile" and not dropout_p:
        q = q.expand(bags, -1, -1, -1)
        return compiled(through_sdpa)(q, k, v, offsets, counts, scale), q.new_empty(0)
    out, lse = torch.ops.motet.latent_attention_kv(
        q, kv, offsets, counts, scale, dropout_p, seed, backend, record
    )
    return out, lse


def latent_self_attention(
    qkv: Tensor,
    *,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Compute latent_attention of latents to themselves, with Q, K and V in one [B, C, 3, H, E].

    Returns:
        [B, H, C, E] in float32 (float64), as latent_attention_kv.
    """
    q, k, v = _queries_keys_values(qkv)
    check_attention(q, k, None, v=v)
    seed = check_dropout(dropout_p, seed, qkv.device)
    refuse_forward_mode("latent_attention")
    if backend == "compile" and not dropout_p:
        return compiled(through_sdpa)(q, k, v, None, None, scale)
    return torch.ops.motet.latent_self_attention(qkv, scale, dropout_p, seed, backend)[0]


def _queries_keys_values(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return views [B, H, C, E] of Q, K and V [B, C, 3, H, E]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return q, k, v


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
        lse: [B, H, C], the log-sum-exp of the scaled scores, if known; None computes it.
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
    check_attention(q, k, offsets)
    check_backend(backend)
    choice("reduce", reduce, (None, "mean"))
    check_lse(lse, q)
    if lse is None and reduce is None:
        return _differentiable_weights(q, k, offsets, scale)
    with torch.no_grad():
        if lse is None:
            arguments = (q, k, k, offsets, None, scale_of(q, scale), 0.0, None, backend)
            lse = torch.ops.motet.latent_attention(*arguments)[1]
            assert lse is not None
        factor = scale_of(q, scale)
        if takes_triton(backend, q):
            from . import triton as launchers

            q, k = rows_apart(q), rows_apart(k)
            return launchers.weights(q, k, offsets, lse.contiguous(), factor, reduce)
        return cpu.weights(q, k, offsets, lse, factor, reduce)


def _differentiable_weights(
    q: Tensor, k: Tensor, offsets: Tensor | None, scale: float | None
) -> Tensor:
    if offsets is None:
        return softmax_weights(q, k, scale)
    bags = [
        softmax_weights(
            padded(q[b]), padded(k[bag].transpose(0, 1).contiguous()), scale_of(q, scale)
        )
        for b, bag in enumerate(slices_of(offsets))
    ]
    # [H, C, N] of each bag, one after the other along the tokens
    return torch.cat(bags, dim=-1).permute(2, 0, 1) if bags else k.new_empty(0, *q.shape[1:3])


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
    if takes_triton(backend, q):
        from . import triton as launchers

        q, k, v = map(rows_apart, (q, k, v))
        return launchers.attend(q, k, v, offsets, counts, scale, dropout_p, seed)
    if offsets is not None:
        q = q.expand(len(offsets) - 1, -1, -1, -1)
    k, v = k[..., : q.shape[-1]], v[..., : q.shape[-1]]
    return cpu.forward(q, k, v, offsets, counts, scale, dropout_p, seed)


def _backward_into(
    results: tuple[Tensor, Tensor, Tensor],
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
) -> None:
    """Write dq, dk and dv into `results`."""
    if not out.numel():  # no bags, or no queries
        for result in results:
            result.zero_()
        return
    if takes_triton(backend, q):
        from . import triton as launchers

        dq, dk, dv = results
        grad, q, k, v = map(rows_apart, (grad, q, k, v))
        record = like_record(grad)
        launchers.query_gradient(
            grad, q, k, v, offsets, counts, out, lse, scale, dropout_p, seed, dq, record
        )
        launchers.kv_gradient(
            record[:, :, None], k, v, offsets, counts, q.shape[-1], scale, dropout_p, dk, dv
        )
        return
    dq, dk, dv = results
    width, bags = q.shape[-1], len(out)
    for result in (dk, dv):
        result[..., width:] = 0
    k, v, dk, dv = (x[..., :width] for x in (k, v, dk, dv))
    bags_dq = dq if len(q) == bags else dq.new_empty(out.shape)
    cpu.backward_into(
        grad.to(q.dtype), q.expand(bags, -1, -1, -1), k, v, offsets, counts, lse, scale, dropout_p,
        seed, bags_dq, dk, dv,
    )  # fmt: skip
    if bags_dq is not dq:
        torch.sum(bags_dq, 0, keepdim=True, out=dq)


def _like_queries(q: Tensor) -> Tensor:
    """Return memory for their gradient, with their strides, so that autograd need not copy it."""
    return torch.empty_like(rows_apart(q))


def _backward_of(grad, q, k, v, *rest):
    dq, dk, dv = _like_queries(q), k.new_empty(k.shape), v.new_empty(v.shape)
    _backward_into((dq, dk, dv), grad, q, k, v, *rest)
    return dq, dk, dv


def _forward_kv(q, kv, offsets, counts, scale, dropout_p, seed, backend, record):
    rest = (offsets, counts, scale, dropout_p, seed, backend)
    return _forward(q, kv[:, 0], kv[:, 1], *rest)


def _backward_of_kv(
    grad, q, kv, offsets, counts, out, lse, scale, dropout_p, seed, backend, recorded
):
    """Return the gradient of q; and that of kv, or, if `recorded`, that of the record."""
    dq, options = _like_queries(q), (out, lse, scale, dropout_p, seed)
    if not recorded:
        dkv = kv.new_empty(kv.shape)
        results, (k, v) = (dq, dkv[:, 0], dkv[:, 1]), kv.unbind(1)
        _backward_into(results, grad, q, k, v, offsets, counts, *options, backend)
        return dq, dkv
    record = like_record(grad)
    if not grad.numel():  # no bags, or no queries
        return dq.zero_(), record
    from . import triton as launchers

    grad, q, k, v = map(rows_apart, (grad, q, kv[:, 0], kv[:, 1]))
    launchers.query_gradient(grad, q, k, v, offsets, counts, *options, dq, record)
    return dq, record


def _forward_self(qkv, *rest):
    q, k, v = _queries_keys_values(qkv)
    return _forward(q, k, v, None, None, *rest)


def _backward_of_self(grad, qkv, *rest):
    dqkv, (q, k, v) = qkv.new_empty(qkv.shape), _queries_keys_values(qkv)
    _backward_into(_queries_keys_values(dqkv), grad, q, k, v, None, None, *rest)
    return dqkv


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.dropout_p, seed, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else torch makes zeros as the gradient of the log-sum-exp
    ctx.save_for_backward(*tensors, seed, *output)


def _differentiated_by(name: str) -> Callable[..., Any]:
    """Return an autograd function that calls the backward operator of this name."""

    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        no_grads = (None,) * len(ctx.needs_input_grad)
        if grad is None:
            return no_grads
        *tensors, seed, out, lse = ctx.saved_tensors
        operator = getattr(torch.ops.motet, name)
        grads = operator(grad, *tensors, out, lse, ctx.scale, ctx.dropout_p, seed, ctx.backend)
        grads = (grads,) if isinstance(grads, Tensor) else tuple(grads)
        return grads + no_grads[len(grads) :]

    return backward


def _setup_context_kv(ctx, inputs, output) -> None:
    *inputs, record = inputs
    ctx.recorded = record is not None
    _setup_context(ctx, inputs, output)


def _backward_kv(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    no_grads = (None,) * 7
    if grad is None:
        return None, None, *no_grads
    *tensors, seed, out, lse = ctx.saved_tensors
    dq, dkv_or_record = torch.ops.motet.latent_attention_kv_backward(
        grad, *tensors, out, lse, ctx.scale, ctx.dropout_p, seed, ctx.backend, ctx.recorded
    )
    if ctx.recorded:
        return dq, None, *no_grads[1:], dkv_or_record
    return dq, dkv_or_record, *no_grads


def _fake(q, k, v, offsets, *rest):
    full, bags = wide(q.dtype), len(q) if offsets is None else len(offsets) - 1
    out = q.new_empty((bags, *q.shape[1:]), dtype=full)
    return out, q.new_empty(out.shape[:3], dtype=full)


def _fake_kv(q, kv, offsets, *rest):
    return _fake(q, *kv.unbind(1), offsets)


def _fake_self(qkv, *rest):
    return _fake(*_queries_keys_values(qkv), None)


def _fake_backward(grad, q, k, v, *rest):
    return _like_queries(q), k.new_empty(k.shape), v.new_empty(v.shape)


def _fake_backward_kv(grad, q, kv, *rest):
    return _like_queries(q), like_record(grad) if rest[-1] else kv.new_empty(kv.shape)


def _fake_backward_self(grad, qkv, *rest):
    return qkv.new_empty(qkv.shape)


for _name, _implementation, _fake_of in (
    ("latent_attention", _forward, _fake),
    ("latent_attention_backward", _backward_of, _fake_backward),
    ("latent_attention_kv", _forward_kv, _fake_kv),
    ("latent_attention_kv_backward", _backward_of_kv, _fake_backward_kv),
    ("latent_self_attention", _forward_self, _fake_self),
    ("latent_self_attention_backward", _backward_of_self, _fake_backward_self),
):
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"motet::{_name}", _fake_of, lib=_LIBRARY)
for _name, _setup, _derivative in (
    ("latent_attention", _setup_context, _differentiated_by("latent_attention_backward")),
    ("latent_attention_kv", _setup_context_kv, _backward_kv),
    ("latent_self_attention", _setup_context, _differentiated_by("latent_self_attention_backward")),
):
    torch.library.register_autograd(
        f"motet::{_name}", _derivative, setup_context=_setup, lib=_LIBRARY
    )
    refuse_second_derivative(_LIBRARY, _name)
