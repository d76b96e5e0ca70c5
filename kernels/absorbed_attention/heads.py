"""The outputs of a layer's heads: absorbed_attention between the projections of K and V."""

from typing import Any

import torch
from torch import Tensor

from ..backends import Backend, on_triton, refuse_second_derivative
from ..checks import check_counts, check_rows, check_statistics, refuse_forward_mode
from ..dropout import check_dropout
from ..layout import rows_apart
from ..row_statistics.operator import row_statistics
from .operator import absorbed_attention

_LIBRARY = torch.library.Library("motet", "FRAGMENT")
# Registered for the Triton form only. It does not call motet::absorbed_attention: so the absorbed
# queries, which are as wide as the tokens, and their gradients are temporary memory of the
# launchers and never tensors of autograd.
_LIBRARY.define(
    "absorbed_heads(Tensor q, Tensor weights, Tensor shifts, Tensor x, Tensor? positions, "
    "Tensor offsets, Tensor? counts, Tensor mean, Tensor rstd, float scale, float eps, "
    "float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "absorbed_heads_backward(Tensor grad, Tensor q, Tensor weights, Tensor shifts, Tensor x, "
    "Tensor? positions, Tensor offsets, Tensor? counts, Tensor mean, Tensor rstd, Tensor pooled, "
    "Tensor mass, Tensor scores, Tensor lse, float scale, float eps, float dropout_p, "
    "Tensor? seed) -> (Tensor, Tensor, Tensor)"
)
# The most channels of a head that Triton takes: a program of the heads' kernels holds all of them.
_MOST_CHANNELS = 256


def absorbed_heads(
    q: Tensor,
    weights: Tensor,
    shifts: Tensor,
    x: Tensor,
    offsets: Tensor,
    *,
    scale: float,
    positions: Tensor | None = None,
    counts: Tensor | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Compute the outputs of all heads, with absorbed_attention between two projections.

    .. math:: \mathrm{pooled}\, W_v^\top + \mathrm{mass}\, b_v^\top, \quad \mathrm{pooled},
        \mathrm{mass} = \mathrm{absorbed\_attention}(\mathrm{scale} \cdot q W_k)

    On Triton it is 7 launches forward and 7 backward. Triton has no gradient of the tokens here:
    where they need one, absorbed_attention is called between torch's products.

    Args:
        q: [B, H, C, E], or [1, H, C, E] for all bags.
        weights: W_k, then W_v, [2 H, E, W], with the gain of the tokens' LayerNorm folded in (by
            fold_norm), W = D + P; their dtype is that of the products.
        shifts: b_k, then b_v, [2 H, E]. b_k has no effect: it adds the same number to all scores
            of a row.
        scale: of the scores.
        x, offsets, positions, counts, statistics, eps, dropout_p, seed, backend: as in
            absorbed_attention.

    Returns:
        [B, H, C, E], float32 where Triton computes, which does not round its sums; else of the
        weights' dtype.

    Raises:
        ValueError: as absorbed_attention; or sizes of q, weights and shifts that do not fit.
    """
    if not _takes_triton(q, weights, x, positions, offsets, backend):
        absorbed = absorb_queries(q, weights, scale).expand(len(offsets) - 1, -1, -1)
        pooled, mass = absorbed_attention(
            absorbed, x, offsets, positions=positions, counts=counts, statistics=statistics,
            eps=eps, dropout_p=dropout_p, seed=seed, backend=backend,
        )  # fmt: skip
        return project_back(pooled, mass, weights, shifts)
    check_rows(x, positions, offsets)
    _check(q, weights, shifts, x, positions, offsets)
    seed = check_dropout(dropout_p, seed, x.device)
    check_counts(counts, x.shape[:1], x, dropout_p)
    refuse_forward_mode("absorbed_heads")
    if statistics is None:
        statistics = row_statistics(x, positions=positions, eps=eps, backend=backend)
    mean, rstd = check_statistics(statistics, x)
    return torch.ops.motet.absorbed_heads(
        q, weights, shifts, x, positions, offsets, counts, mean, rstd, scale, eps, dropout_p, seed
    )[0]


def absorb_queries(q: Tensor, weights: Tensor, scale: float) -> Tensor:
    """Return scale · q W_k, [B, H·C, W], of q [B, H, C, E]."""
    key_weight, _ = weights.unflatten(0, (2, -1)).unbind()
    return torch.einsum("bhce,hew->bhcw", q * scale, key_weight).flatten(1, 2)


def project_back(pooled: Tensor, mass: Tensor, weights: Tensor, shifts: Tensor) -> Tensor:
    """Return pooled W_vᵀ + mass b_vᵀ, [B, H, C, E], of pooled [B, H·C, W] and mass [B, H·C]."""
    _, value_weight = weights.unflatten(0, (2, -1)).unbind()
    _, shift = shifts.unflatten(0, (2, -1)).unbind()
    pooled, mass = (part.unflatten(1, (len(shift), -1)) for part in (pooled, mass))
    values = torch.einsum("bhcw,hew->bhce", pooled, value_weight)
    return torch.addcmul(values, mass[..., None], shift[:, None])


def _takes_triton(
    q: Tensor,
    weights: Tensor,
    x: Tensor,
    positions: Tensor | None,
    offsets: Tensor,
    backend: Backend,
) -> bool:
    """Return whether Triton computes the heads' projections too.

    If not, absorbed_attention, between torch's projections, may still be computed by Triton.
    """
    tokens_need_grad = torch.is_grad_enabled() and any(
        part is not None and part.requires_grad for part in (x, positions)
    )
    is_empty = not q.numel() or len(offsets) < 2
    if backend == "compile" or tokens_need_grad or is_empty or q.shape[-1] > _MOST_CHANNELS:
        return False
    return on_triton(backend, x.device.type, weights.dtype)


def _check(
    q: Tensor, weights: Tensor, shifts: Tensor, x: Tensor, positions: Tensor | None, offsets: Tensor
) -> None:
    width = x.shape[1] + (0 if positions is None else positions.shape[1])
    if q.ndim != 4 or len(q) not in (1, len(offsets) - 1) or q.device != x.device:
        raise ValueError(
            f"q: expected [{len(offsets) - 1} or 1, H, C, E] on {x.device}, got {tuple(q.shape)} "
            f"on {q.device}"
        )
    if x.dtype == torch.float64:
        raise ValueError(
            f"x: expected a dtype that goes with {weights.dtype} weights, got torch.float64"
        )
    heads, channels = q.shape[1], q.shape[3]
    expected = (2 * heads, channels, width)
    for name, part, shape in (("weights", weights, expected), ("shifts", shifts, expected[:2])):
        if part.shape != shape or part.dtype != weights.dtype or part.device != x.device:
            raise ValueError(
                f"{name}: expected {weights.dtype} {list(shape)} on {x.device}, got {part.dtype} "
                f"{tuple(part.shape)} on {part.device}"
            )


def _forward(
    q: Tensor,
    weights: Tensor,
    shifts: Tensor,
    x: Tensor,
    positions: Tensor | None,
    offsets: Tensor,
    counts: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    scale: float,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the outputs of the heads, and pooled, mass, scores and lse of absorbed_attention."""
    from . import triton as launchers

    tokens = launchers.Tokens.of(x, positions, offsets, counts, mean, rstd, eps, dropout_p, seed)
    folded = launchers.HeadWeights.of(weights, shifts)
    out, attended = launchers.attend_heads(rows_apart(q), folded, tokens, scale)
    return out, attended.pooled, attended.mass, attended.scores, attended.lse


def _backward_of(
    grad: Tensor,
    q: Tensor,
    weights: Tensor,
    shifts: Tensor,
    x: Tensor,
    positions: Tensor | None,
    offsets: Tensor,
    counts: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    pooled: Tensor,
    mass: Tensor,
    scores: Tensor,
    lse: Tensor,
    scale: float,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, weights and shifts."""
    from . import triton as launchers

    tokens = launchers.Tokens.of(x, positions, offsets, counts, mean, rstd, eps, dropout_p, seed)
    folded = launchers.HeadWeights.of(weights, shifts)
    attended = launchers.Attended(pooled, mass, scores, lse)
    return launchers.attend_heads_backward(
        rows_apart(grad), rows_apart(q), folded, attended, tokens, scale
    )


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.scale, ctx.eps, ctx.dropout_p, seed = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else torch makes zeros [T, R] as the gradient of the scores
    ctx.save_for_backward(*tensors, *output[1:], seed)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    *saved, seed = ctx.saved_tensors
    grads = torch.ops.motet.absorbed_heads_backward(
        grad, *saved, ctx.scale, ctx.eps, ctx.dropout_p, seed
    )
    return *grads, *[None] * 10


def _fake(q, weights, shifts, x, positions, offsets, *_):
    bags, rows = offsets.shape[0] - 1, q.shape[1] * q.shape[2]
    return (
        q.new_empty(bags, *q.shape[1:], dtype=torch.float32),
        weights.new_empty(bags, rows, weights.shape[2]),
        weights.new_empty(bags, rows),
        weights.new_empty(x.shape[0], rows),
        weights.new_empty(bags, rows, dtype=torch.float32),
    )


def _fake_backward(grad, q, weights, shifts, *_):
    bags, heads, latents, width = q.shape
    return (
        q.new_empty(bags, latents, heads, width).transpose(1, 2),
        weights.new_empty(weights.shape),
        shifts.new_empty(shifts.shape),
    )


_LIBRARY.impl("absorbed_heads", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("absorbed_heads_backward", _backward_of, "CompositeExplicitAutograd")
torch.library.register_fake("motet::absorbed_heads", _fake, lib=_LIBRARY)
torch.library.register_fake("motet::absorbed_heads_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd(
    "motet::absorbed_heads", _backward, setup_context=_setup_context, lib=_LIBRARY
)
refuse_second_derivative(_LIBRARY, "absorbed_heads")
