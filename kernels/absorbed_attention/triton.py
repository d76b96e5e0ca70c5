"""Launches the Triton kernels of absorbed attention: the softmax, its gradient, and the heads.

The products with the tokens are those of context_kv: `project` computes the scores [T, R] of every
bag's queries, `pool` sums the tokens up by weights [T, R]. `attend` is these two with the softmax
between them; `attend_heads` multiplies with the heads' weights before and after.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import capability
from ..context_kv.triton import (
    SIDE_CHUNK,
    Centred,
    MeanToken,
    Side,
    centre,
    pool,
    project,
    scaled,
)
from ..dropout import representable
from ..launch import cdiv, launch, next_power_of_2
from ..layout import rows_apart
from ..ragged import count_slots
from .heads_kernels import head_gradients_kernel, to_heads_kernel, to_tokens_kernel
from .triton_kernels import (
    softmax_gradient_kernel,
    softmax_statistics_kernel,
    softmax_weights_kernel,
)

# Columns of the scores, one a query, that a program of the softmax has. It reads SIDE_CHUNK x 32
# scores in 16 steps, and 8 bags of 15,000 patches with 200 queries are 7 x 128 programs: enough for
# the 132 multiprocessors of an H200.
_BLOCK_R = 32
# Numbers of the gradient of the queries that a program adds up over the bags.
_BLOCK_V = 256


class Tokens(NamedTuple):
    """The tokens that are attended to, their statistics, and the dropout."""

    x: Tensor
    """[T, D], last stride 1."""
    p: Tensor | None
    """[Np, P] positional channels, T a multiple of Np, last stride 1; or None."""
    offsets: Tensor
    """int64 [B + 1] on the device."""
    counts: Tensor | None
    """[T], contiguous, or None."""
    mean: Tensor
    """Means of the rows, fp32 [T], contiguous, as is rstd, 1 / SD."""
    rstd: Tensor
    eps: float
    dropout_p: float
    seed: Tensor | None

    @classmethod
    def of(
        cls, x: Tensor, p: Tensor | None, offsets: Tensor, counts: Tensor | None, mean: Tensor,
        rstd: Tensor, *rest: Any,
    ) -> "Tokens":  # fmt: skip
        """Return these tokens; tensors but offsets are copied if their strides do not fit."""
        p = None if p is None else rows_apart(p)
        counts = None if counts is None else counts.contiguous()
        return cls(rows_apart(x), p, offsets, counts, mean.contiguous(), rstd.contiguous(), *rest)

    @property
    def channels(self) -> int:
        """P."""
        return 0 if self.p is None else self.p.shape[1]

    @property
    def statistics(self) -> tuple[Tensor, Tensor, float]:
        return self.mean, self.rstd, self.eps


class HeadWeights(NamedTuple):
    """The weights of K and V with the tokens' LayerNorm folded in, contiguous: K's heads, V's."""

    weights: Tensor
    """[2 H, E, W], of the dtype of the products."""
    shifts: Tensor
    """[2 H, E]"""

    @classmethod
    def of(cls, weights: Tensor, shifts: Tensor) -> "HeadWeights":
        """Return these weights, copied if they are not contiguous."""
        return cls(weights.contiguous(), shifts.contiguous())

    @property
    def heads(self) -> int:
        return len(self.shifts) // 2


class Attended(NamedTuple):
    """What the backward pass takes from the forward pass."""

    pooled: Tensor
    """[B, R, W], of the dtype of the products."""
    mass: Tensor
    """[B, R], of the same dtype."""
    scores: Tensor
    """[T, R], before log(counts) is added; not written for tokens behind the last bag."""
    lse: Tensor
    """fp32 [B, R], the log-sum-exp of the scores with log(counts) added."""

    @property
    def token(self) -> MeanToken:
        return MeanToken(self.pooled, self.mass)


def attend(queries: Tensor, tokens: Tokens) -> Attended:
    """Attend to the tokens with contiguous queries [B, R, W], of the dtype of the products."""
    centred, _ = centre(queries, tokens.x.shape[1], None)
    return _attend(centred, tokens)


def attend_backward(
    grad_pooled: Tensor, grad_mass: Tensor, attended: Attended, tokens: Tokens
) -> Tensor:
    """Return the gradient of the queries, [B, R, W] of their dtype: dS (zhat - pooled / mass).

    The gradients of pooled [B, R, W] and of mass [B, R] are contiguous.
    """
    centred, delta = centre(grad_pooled, tokens.x.shape[1], (grad_mass, attended.token))
    assert delta is not None
    return _attend_backward(centred, grad_mass, delta, attended, tokens)


def attend_heads(
    q: Tensor, folded: HeadWeights, tokens: Tokens, scale: float
) -> tuple[Tensor, Attended]:
    """Return the outputs of the heads, fp32 [B, H, C, E], and what the backward pass takes.

    The outputs are pooled W_v^T + mass b_v^T, with the queries scale q W_k.

    Args:
        q: [B, H, C, E], last stride 1, or [1, H, C, E] for all bags.
    """
    weights, shifts, heads = folded.weights, folded.shifts, folded.heads
    bags = len(tokens.offsets) - 1
    q = q.expand(bags, -1, -1, -1)
    attended = _attend(_to_tokens(q, weights[:heads], tokens.channels, scale)[0], tokens)
    out = q.new_empty(q.shape, dtype=torch.float32)
    _to_heads(attended.pooled, weights[heads:], (attended.mass, shifts[heads:]), out, 1.0)
    return out, attended


def attend_heads_backward(
    grad: Tensor, q: Tensor, folded: HeadWeights, attended: Attended, tokens: Tokens, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, of the weights and of the shifts.

    The gradient of q is [B or 1, H, C, E], its memory in the order B, C, H, E. grad, that of the
    outputs [B, H, C, E], may have any dtype; its last stride is 1.
    """
    weights, shifts, heads = folded.weights, folded.shifts, folded.heads
    bags, _, latents, width = grad.shape
    centred, mass_and_delta = _to_tokens(
        grad, weights[heads:], tokens.channels, 1.0, (attended.token, shifts[heads:])
    )
    assert mass_and_delta is not None
    dabsorbed = _attend_backward(centred, *mass_and_delta, attended, tokens)
    shared = len(q) < bags
    dq = q.new_empty(len(q), latents, heads, width).transpose(1, 2)
    # Where all bags share the queries: each bag's part of dq. The last launch adds the parts up.
    partial = None
    if shared:
        partial = dq.new_empty(bags, latents, heads, width, dtype=torch.float32).transpose(1, 2)
    _to_heads(dabsorbed, weights[:heads], None, dq if partial is None else partial, scale)
    dweights, dshifts = torch.empty_like(weights), torch.empty_like(shifts)
    # Blocks of 128 spill registers in float32 on sm_80 (41 stores).
    block_e = min(128 if weights.element_size() == 2 else 64, _channels(width))
    grid = 2 * heads * cdiv(width, block_e) * (cdiv(weights.shape[2], 64) + 1)
    if shared:
        grid += cdiv(dq.numel(), _BLOCK_V)
    q = q.expand(bags, -1, -1, -1)
    launch(
        head_gradients_kernel, grad, (grid,),
        q, dabsorbed, grad, attended.pooled, attended.mass, partial, dweights, dshifts, dq,
        *q.stride()[:3], *grad.stride()[:3], scale, bags,
        H=heads, C=latents, E=width, W=weights.shape[2], BLOCK_T=32, BLOCK_E=block_e, BLOCK_W=64,
        BLOCK_V=_BLOCK_V, num_warps=4, num_stages=3,
    )  # fmt: skip
    return dq, dweights, dshifts


def _attend(centred: Centred, tokens: Tokens) -> Attended:
    x, offsets, counts, seed = tokens.x, tokens.offsets, tokens.counts, tokens.seed
    scores = project(x, tokens.p, centred, None, offsets, *tokens.statistics)
    (rows, count), bags = scores.shape, len(centred.sums)
    slots = count_slots(rows, bags, SIDE_CHUNK)
    fp32 = {"dtype": torch.float32, "device": x.device}
    peak, total = torch.empty(slots, count, **fp32), torch.empty(slots, count, **fp32)
    lse, side = torch.empty(bags, count, **fp32), _side(slots, count, tokens)
    grid = (slots, cdiv(count, _BLOCK_R))
    launch(
        softmax_statistics_kernel, x, grid,
        scores, offsets, counts, peak, total, bags, R=count, CHUNK=SIDE_CHUNK, BLOCK_N=64,
        BLOCK_R=_BLOCK_R, COUNTS=counts is not None, num_warps=4,
    )  # fmt: skip
    weights = torch.empty_like(scores)
    launch(
        softmax_weights_kernel, x, grid,
        scores, peak, total, offsets, counts, seed, tokens.p, tokens.mean, tokens.rstd, weights,
        lse, side.sums, *_rows_of(tokens.p), bags, tokens.eps, *_dropout(tokens.dropout_p),
        R=count, **_constants(tokens, scores), num_warps=4,
    )  # fmt: skip
    pooled = scores.new_empty(bags, count, x.shape[1] + tokens.channels)
    mass = scores.new_empty(bags, count)
    pool(weights, x, tokens.mean, tokens.rstd, offsets, side, pooled, mass, None)
    return Attended(pooled, mass, scores, lse)


def _attend_backward(
    centred: Centred, grad_mass: Tensor, delta: Tensor, attended: Attended, tokens: Tokens
) -> Tensor:
    """Return the gradient of the queries, given the centred gradient of pooled, and delta."""
    x, p, offsets, scores = tokens.x, tokens.p, tokens.offsets, attended.scores
    dweights = project(x, p, centred, None, offsets, *tokens.statistics)
    (rows, count), bags = scores.shape, len(attended.pooled)
    slots = count_slots(rows, bags, SIDE_CHUNK)
    side = _side(slots, count, tokens)
    launch(
        softmax_gradient_kernel, x, (slots, cdiv(count, _BLOCK_R)),
        scores, attended.lse, dweights, grad_mass, delta, offsets, tokens.counts, tokens.seed, p,
        tokens.mean, tokens.rstd, side.sums, *_rows_of(p), bags, tokens.eps,
        *_dropout(tokens.dropout_p), R=count, **_constants(tokens, scores), num_warps=8,
    )  # fmt: skip
    dqueries = torch.empty_like(attended.pooled)
    pool(dweights, x, tokens.mean, tokens.rstd, offsets, side, dqueries, None, attended.token)
    return dqueries


def _to_tokens(
    rows: Tensor,
    weight: Tensor,
    channels: int,
    scale: float,
    forward_pass: tuple[MeanToken, Tensor] | None = None,
) -> tuple[Centred, tuple[Tensor, Tensor] | None]:
    """Return scale rows weight of each head [H, E, W], centred as context_kv's `centre` does.

    Args:
        rows: [B, H, C, E], last stride 1: queries, or the gradient of the heads' outputs.
        channels: P, the positional ones at the end of the W.
        forward_pass: with the gradient of the outputs only: what was pooled, and the shifts [H, E].

    Returns:
        [B, H C, W], centred; and, with `forward_pass`, the gradient of mass and
        delta = rowsum(dpooled pooled) + dmass mass, fp32 [B, H C] each.
    """
    (bags, heads, latents, width), total = rows.shape, weight.shape[2]
    products = weight.new_empty(bags, heads * latents, total - channels)
    products_p = weight.new_empty(bags, heads * latents, channels)
    sums = weight.new_empty(bags, heads * latents, dtype=torch.float32)
    dmass = delta = pooled = mass = shift = None
    if forward_pass is not None:
        (pooled, mass), shift = forward_pass
        dmass, delta = torch.empty_like(sums), torch.empty_like(sums)
    block_c, block_e = _latents(latents, weight), _channels(width)
    # The most numbers of a tile of the weight, and of one of the result: the wider the tiles, the
    # fewer steps a row takes. sm_100 spills 7 stores with 4096 for heads of 63 in float32.
    most = 16384 if weight.element_size() == 2 else 4096
    if weight.element_size() > 2 and capability(rows) > 90:
        most = 2048
    block_w = max(16, min(256, most // block_e, most // block_c))
    launch(
        to_tokens_kernel, rows, (bags * heads * cdiv(latents, block_c),),
        rows, weight, products, products_p, sums, pooled, mass, shift, dmass, delta,
        *rows.stride()[:3], scale, H=heads, C=latents, E=width, W=total, P=channels,
        BLOCK_C=block_c, BLOCK_E=block_e, BLOCK_W=block_w,
        num_warps=8 if max(block_c, block_e) * block_w > 64 * 64 else 4, num_stages=3,
    )  # fmt: skip
    mass_and_delta = None if dmass is None or delta is None else (dmass, delta)
    return Centred(products, products_p, sums), mass_and_delta


def _to_heads(
    rows: Tensor,
    weight: Tensor,
    mass_and_shift: tuple[Tensor, Tensor] | None,
    out: Tensor,
    scale: float,
) -> None:
    """Write scale rows weight^T [B, H, C, E] to `out`, plus mass shift^T if these are given.

    rows is contiguous [B, H C, W], weight [H, E, W], mass [B, R], shift [H, E], and the last stride
    of `out` is 1.
    """
    (bags, heads, latents, width), total = out.shape, weight.shape[2]
    mass, shift = mass_and_shift or (None, None)
    block_c, block_e = _latents(latents, weight), _channels(width)
    # Blocks of 128 spill registers for heads of 16 on sm_100 (4 stores).
    block_w = 256 if block_e <= 16 else 128 if block_e <= 64 else 64
    if weight.element_size() > 2:
        block_w = 64 if block_e <= 64 else 32
    launch(
        to_heads_kernel, rows, (bags * heads * cdiv(latents, block_c),),
        rows, weight, mass, shift, out, *out.stride()[:3], scale,
        H=heads, C=latents, E=width, W=total, BLOCK_C=block_c, BLOCK_E=block_e, BLOCK_W=block_w,
        num_warps=8 if block_c * block_e > 64 * 64 else 4, num_stages=3,
    )  # fmt: skip


def _latents(latents: int, weight: Tensor) -> int:
    """Return how many latents of a head a program has."""
    return max(16, min(64 if weight.element_size() == 2 else 32, next_power_of_2(latents)))


def _channels(width: int) -> int:
    """Return the block that holds the channels of a head."""
    return max(16, next_power_of_2(width))


def _side(slots: int, count: int, tokens: Tokens) -> Side:
    """Return room for the sums of every chunk of weights; see context_kv/triton.py."""
    sums = tokens.x.new_empty(slots, count, 1 + tokens.channels, dtype=torch.float32)
    return Side(sums, tokens.channels)


def _constants(tokens: Tokens, scores: Tensor) -> dict[str, Any]:
    """Return the constants of softmax_weights_kernel and softmax_gradient_kernel."""
    dropout = tokens.seed is not None
    return {
        "P": tokens.channels,
        "CHUNK": SIDE_CHUNK,
        # Blocks of 64 spill registers in float32 with counts (1 store on sm_80), and with dropout
        # (6 on sm_100).
        "BLOCK_N": 64 if scores.element_size() == 2 and not dropout else 32,
        "BLOCK_R": _BLOCK_R,
        "BLOCK_P": max(16, next_power_of_2(tokens.channels)),
        "DROPOUT": dropout,
        "COUNTS": tokens.counts is not None,
        "SCALED": scaled(tokens.x, scores.dtype),
    }


def _rows_of(p: Tensor | None) -> tuple[int, int]:
    """Return the stride and the number of the rows of positions; 0 and 1 without them."""
    return (0, 1) if p is None else (p.stride(0), p.shape[0])


def _dropout(dropout_p: float) -> tuple[float, float]:
    """Return the probability of dropping, as fp32 has it, and the factor of what is kept."""
    return representable(dropout_p), 1 / (1 - dropout_p)
