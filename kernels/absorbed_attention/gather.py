"""What the heads of a layer gather by absorbed_attention, its projections included."""

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
# The Triton form alone. Beside absorbed_attention, which it does not call: the rows of the tokens'
# width that a head asks with, and their gradients, exist within it only.
_LIBRARY.define(
    "absorbed_gather(Tensor q, Tensor weights, Tensor shifts, Tensor x, Tensor? positions, "
    "Tensor offsets, Tensor? counts, Tensor mean, Tensor rstd, float scale, float eps, "
    "float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "absorbed_gather_backward(Tensor grad, Tensor q, Tensor weights, Tensor shifts, Tensor x, "
    "Tensor? positions, Tensor offsets, Tensor? counts, Tensor mean, Tensor rstd, Tensor pooled, "
    "Tensor mass, Tensor scores, Tensor lse, float scale, float eps, float dropout_p, "
    "Tensor? seed) -> (Tensor, Tensor, Tensor)"
)
# Channels of a head that a program holds.
_WIDEST = 256


def absorbed_gather(
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
    r"""Gather what the heads' queries ask for, with absorbed_attention between two projections.

    .. math:: \mathrm{pooled}\, W_v^\top + \mathrm{mass}\, b_v^\top, \quad \mathrm{pooled},
        \mathrm{mass} = \mathrm{absorbed\_attention}(\mathrm{scale} \cdot q W_k)

    On Triton, which has no gradient of the tokens here, it is 7 launches forward and 7 backward.

    Args:
        q: [B, H, C, E], or [1, H, C, E] for all bags.
        weights: those of K and V with the tokens' LayerNorm in them, [2 H, E, W], as fold_norm
            makes them; of the dtype to work in.
        shifts: b of K and V, [2 H, E]. K's has no effect: it adds the same to all scores of a row.
        scale: of the scores.
        x, offsets, positions, counts, statistics, eps, dropout_p, seed, backend: as in
            absorbed_attention.

    Returns:
        [B, H, C, E], in float32 where Triton computes, as sums are; else of the weights' dtype.

    Raises:
        ValueError: as absorbed_attention; or sizes of q, weights and shifts that do not fit.
    """
    if not _takes_triton(q, weights, x, positions, offsets, backend):
        absorbed = absorb_queries(q, weights, scale).expand(len(offsets) - 1, -1, -1)
        pooled, mass = absorbed_attention(
            absorbed, x, offsets, positions=positions, counts=counts, statistics=statistics,
            eps=eps,
            dropout_p=dropout_p, seed=seed, backend=backend,
        )  # fmt: skip
        return project_back(pooled, mass, weights, shifts)
    check_rows(x, positions, offsets)
    _check(q, weights, shifts, x, positions, offsets)
    seed = check_dropout(dropout_p, seed, x.device)
    check_counts(counts, x.shape[:1], x, dropout_p)
    refuse_forward_mode("absorbed_gather")
    if statistics is None:
        statistics = row_statistics(x, positions=positions, eps=eps, backend=backend)
    mean, rstd = check_statistics(statistics, x)
    return torch.ops.motet.absorbed_gather(
        q, weights, shifts, x, positions, offsets, counts, mean, rstd, scale, eps, dropout_p, seed
    )[0]


def absorb_queries(q: Tensor, weights: Tensor, scale: float) -> Tensor:
    """Return scale · q W_k, [B, H·C, W], of q [B, H, C, E]."""
    of_keys, _ = weights.unflatten(0, (2, -1)).unbind()
    return torch.einsum("bhce,hew->bhcw", q * scale, of_keys).flatten(1, 2)


def project_back(pooled: Tensor, mass: Tensor, weights: Tensor, shifts: Tensor) -> Tensor:
    """Return pooled W_vᵀ + mass b_vᵀ, [B, H, C, E], of pooled [B, H·C, W] and mass [B, H·C]."""
    _, of_values = weights.unflatten(0, (2, -1)).unbind()
    _, shift = shifts.unflatten(0, (2, -1)).unbind()
    pooled, mass = (part.unflatten(1, (len(shift), -1)) for part in (pooled, mass))
    values = torch.einsum("bhcw,hew->bhce", pooled, of_values)
    return torch.addcmul(values, mass[..., None], shift[:, None])


def _takes_triton(
    q: Tensor,
    weights: Tensor,
    x: Tensor,
    positions: Tensor | None,
    offsets: Tensor,
    backend: Backend,
) -> bool:
    """Return whether the heads' projections are Triton's too; absorbed_attention may be, if not."""
    of_rows = torch.is_grad_enabled() and any(
        part is not None and part.requires_grad for part in (x, positions)
    )
    nothing = not q.numel() or len(offsets) < 2
    if backend == "compile" or of_rows or nothing or q.shape[-1] > _WIDEST:
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
    """Return what is attended, and pooled, mass, scores and lse of absorbed_attention."""
    from . import triton as launchers

    statistics = mean.contiguous(), rstd.contiguous()
    tokens = launchers.Tokens.of(x, positions, offsets, counts, *statistics, eps, dropout_p, seed)
    own = launchers.Weights(weights.contiguous(), shifts.contiguous())
    attended, made = launchers.gather(rows_apart(q), own, tokens, scale)
    return attended, made.pooled, made.mass, made.scores, made.lse


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

    statistics = mean.contiguous(), rstd.contiguous()
    tokens = launchers.Tokens.of(x, positions, offsets, counts, *statistics, eps, dropout_p, seed)
    own = launchers.Weights(weights.contiguous(), shifts.contiguous())
    made = launchers.Attended(pooled, mass, scores, lse)
    return launchers.gather_backward(rows_apart(grad), rows_apart(q), own, made, tokens, scale)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.scale, ctx.eps, ctx.dropout_p, seed = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros [T, R] for what nobody differentiates
    ctx.save_for_backward(*tensors, *output[1:], seed)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    *saved, seed = ctx.saved_tensors
    made = torch.ops.motet.absorbed_gather_backward(
        grad, *saved, ctx.scale, ctx.eps, ctx.dropout_p, seed
    )
    return *made, *[None] * 10


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


_LIBRARY.impl("absorbed_gather", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("absorbed_gather_backward", _backward_of, "CompositeExplicitAutograd")
torch.library.register_fake("motet::absorbed_gather", _fake, lib=_LIBRARY)
torch.library.register_fake("motet::absorbed_gather_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd(
    "motet::absorbed_gather", _backward, setup_context=_setup_context, lib=_LIBRARY
)
refuse_second_derivative(_LIBRARY, "absorbed_gather")
