"""Attention of a few latent queries to very many context tokens, per bag."""

import torch
from torch import Tensor

from ..._checks import choice
from ..backends import Backend, check_backend, compiled, on_triton, refuse_second_derivative
from ..checks import check_counts, check_offsets, refuse_forward_mode
from ..dropout import check_dropout
from ..dtypes import wide
from ..layout import rows_apart
from ..ragged import padded, slices_of
from . import cpu
from .cpu import Reduce, through_sdpa
from .reference import scale_of, softmax_weights

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
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute latent_attention with K and V in one tensor [T, 2, H, E], as context_kv makes them.

    Tokens behind the last bag belong to none; their gradient is zero.

    Returns:
        [B, H, C, E] in float32 (float64), as sums are, for lego_pass to round; and the
        log-sum-exp of the scores [B, H, C], which attention_weights takes; it includes the counts,
        so that these weights are those of one token out of a key's.
    """
    _check(q, kv[:, 0], offsets, v=kv[:, 1], whole=False)
    seed = check_dropout(dropout_p, seed, q.device)
    check_counts(counts, kv.shape[:1], kv, dropout_p)
    refuse_forward_mode("latent_attention")
    if backend == "compile" and not dropout_p:
        out = compiled(through_sdpa)(q, kv[:, 0], kv[:, 1], offsets, counts, scale)
        return out, q.new_empty(0)
    out, lse = torch.ops.motet.latent_attention_kv(
        q, kv, offsets, counts, scale, dropout_p, seed, backend
    )
    return out, lse


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
    _check_lse(lse, q)
    if lse is None and reduce is None:
        return _differentiable_weights(q, k, offsets, scale)
    with torch.no_grad():
        if lse is None:
            arguments = (q, k, k, offsets, None, scale_of(q, scale), 0.0, None, backend)
            lse = torch.ops.motet.latent_attention(*arguments)[1]
            assert lse is not None
        factor = scale_of(q, scale)
        if _takes_triton(backend, q):
            from . import triton as launchers

            q, k = rows_apart(q), rows_apart(k)
            return launchers.weights(q, k, offsets, lse.contiguous(), factor, reduce)
        return cpu.weights(q, k, offsets, lse, factor, reduce)


def _check_lse(lse: Tensor | None, q: Tensor) -> None:
    if lse is None:
        return
    if not isinstance(lse, Tensor):
        raise TypeError(f"lse: expected a tensor, got {type(lse).__name__}")
    if (lse.shape, lse.dtype, lse.device) != (q.shape[:3], wide(q.dtype), q.device):
        raise ValueError(
            f"lse: expected {tuple(q.shape[:3])} {wide(q.dtype)} on {q.device}, got "
            f"{tuple(lse.shape)} {lse.dtype} on {lse.device}"
        )


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


def _takes_triton(backend: str, q: Tensor) -> bool:
    too_wide = "takes heads of up to 256 numbers" if q.shape[-1] > 256 else ""
    return on_triton(backend, q.device.type, q.dtype, too_wide)


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
    if _takes_triton(backend, q):
        from . import triton as launchers

        q, k, v = map(rows_apart, (q, k, v))
        return launchers.attend(q, k, v, offsets, counts, scale, dropout_p, seed)
    return cpu.forward(q, k, v, offsets, counts, scale, dropout_p, seed)


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
    """Fill dk and dv, return dq."""
    if not q.numel():  # nobody attends
        dk.zero_()
        dv.zero_()
        return torch.empty_like(q)
    if _takes_triton(backend, q):
        from . import triton as launchers

        grad, q, k, v = map(rows_apart, (grad, q, k, v))
        return launchers.attend_backward(
            grad, q, k, v, offsets, counts, out, lse, scale, dropout_p, seed, dk, dv
        )
    return cpu.backward_into(grad, q, k, v, offsets, counts, lse, scale, dropout_p, seed, dk, dv)


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


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.dropout_p, seed, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for the log-sum-exp, which nobody differentiates
    ctx.save_for_backward(*tensors, seed, *output)


def _backward(ctx, grad: Tensor | None, _: None):
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
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
