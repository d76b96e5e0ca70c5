"""Launches the Triton kernels of absorbed attention: softmax and gradient, and those of the heads.

The products with the tokens are those of context_kv: `project` gives scores [T, R] of every bag's
own queries, `pool` gathers the tokens by weights [T, R]. `gather` has around them the products with
the weights of the heads.
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

# A program reads SIDE_CHUNK x 32 scores in 16 steps, and 8 bags of 15,000 patches with 200 queries
# make 7 x 128 programs.
_BLOCK_R = 32
# Numbers of dq that a program adds up over the bags.
_BLOCK_V = 256


class Tokens(NamedTuple):
    """What is attended to, and how."""

    x: Tensor
    """[T, D], last stride 1."""
    p: Tensor | None
    """[Np, P] positional channels, T a multiple of Np, last stride 1; or None."""
    offsets: Tensor
    """int64 [B + 1] on the device."""
    counts: Tensor | None
    """[T], contiguous, or None."""
    mean: Tensor
    """Those of the rows, fp32 [T], contiguous; as is rstd."""
    rstd: Tensor
    eps: float
    dropout_p: float
    seed: Tensor | None

    @classmethod
    def of(
        cls, x: Tensor, p: Tensor | None, offsets: Tensor, counts: Tensor | None, *rest: Any
    ) -> "Tokens":
        """Return the same of x, p and counts of any strides."""
        p = None if p is None else rows_apart(p)
        counts = None if counts is None else counts.contiguous()
        return cls(rows_apart(x), p, offsets, counts, *rest)

    @property
    def channels(self) -> int:
        """P."""
        return 0 if self.p is None else self.p.shape[1]

    @property
    def statistics(self) -> tuple[Tensor, Tensor, float]:
        return self.mean, self.rstd, self.eps


class Weights(NamedTuple):
    """Of K and V, with the tokens' LayerNorm in them, contiguous."""

    weights: Tensor
    """[2 H, E, W], of the dtype to work in."""
    shifts: Tensor
    """[2 H, E]"""

    @property
    def heads(self) -> int:
        return len(self.shifts) // 2


class Attended(NamedTuple):
    """What the backward pass takes from the forward pass."""

    pooled: Tensor
    """[B, R, W], of the dtype to work in."""
    mass: Tensor
    """[B, R], alike."""
    scores: Tensor
    """[T, R], without the counts; those of tokens behind the last bag are not written."""
    lse: Tensor
    """fp32 [B, R], with the counts."""

    @property
    def token(self) -> MeanToken:
        return MeanToken(self.pooled, self.mass)


def attend(queries: Tensor, tokens: Tokens) -> Attended:
    """Attend to the tokens with contiguous queries [B, R, W], of the dtype to work in."""
    centred, _ = centre(queries, tokens.x.shape[1], None)
    return _attend(centred, tokens)


def attend_backward(
    grad_pooled: Tensor, grad_mass: Tensor, made: Attended, tokens: Tokens
) -> Tensor:
    """Return the gradient of the queries, [B, R, W] of their dtype: dS (zhat - pooled / mass).

    The gradients, [B, R, W] and [B, R], are contiguous.
    """
    centred, delta = centre(grad_pooled, tokens.x.shape[1], (grad_mass, made.token))
    assert delta is not None
    return _attend_backward(centred, grad_mass, delta, made, tokens)


def gather(q: Tensor, own: Weights, tokens: Tokens, scale: float) -> tuple[Tensor, Attended]:
    """Return pooled W_v^T + mass b_v^T, fp32 [B, H, C, E], of what scale q W_k pools.

    Args:
        q: [B, H, C, E], last stride 1, or [1, H, C, E] for all bags.
    """
    weights, shifts, heads = own.weights, own.shifts, own.heads
    bags = len(tokens.offsets) - 1
    q = q.expand(bags, -1, -1, -1)
    made = _attend(_to_tokens(q, weights[:heads], tokens.channels, scale)[0], tokens)
    out = q.new_empty(q.shape, dtype=torch.float32)
    _to_heads(made.pooled, weights[heads:], (made.mass, shifts[heads:]), out, 1.0)
    return out, made


def gather_backward(
    grad: Tensor, q: Tensor, own: Weights, made: Attended, tokens: Tokens, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, as [B or 1, C, H, E] seen as q is, of the weights and the shifts.

    grad [B, H, C, E], of any dtype, has a last stride of 1.
    """
    weights, shifts, heads = own.weights, own.shifts, own.heads
    bags, _, latents, width = grad.shape
    centred, of = _to_tokens(
        grad, weights[heads:], tokens.channels, 1.0, (made.token, shifts[heads:])
    )
    assert of is not None
    dasked = _attend_backward(centred, *of, made, tokens)
    shared = len(q) < bags
    dq = q.new_empty(len(q), latents, heads, width).transpose(1, 2)
    # Of queries that all bags share, what each bag adds; the last launch adds it up.
    partial = None
    if shared:
        partial = dq.new_empty(bags, latents, heads, width, dtype=torch.float32).transpose(1, 2)
    _to_heads(dasked, weights[:heads], None, dq if partial is None else partial, scale)
    dweights, dshifts = torch.empty_like(weights), torch.empty_like(shifts)
    # 128 spill in float32 on sm_80 (41 stores).
    block_e = min(128 if weights.element_size() == 2 else 64, _channels(width))
    grid = 2 * heads * cdiv(width, block_e) * (cdiv(weights.shape[2], 64) + 1)
    if shared:
        grid += cdiv(dq.numel(), _BLOCK_V)
    q = q.expand(bags, -1, -1, -1)
    launch(
        head_gradients_kernel, grad, (grid,),
        q, dasked, grad, made.pooled, made.mass, partial, dweights, dshifts, dq,
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
    own = {"dtype": torch.float32, "device": x.device}
    peak, total = torch.empty(slots, count, **own), torch.empty(slots, count, **own)
    lse, side = torch.empty(bags, count, **own), _side(slots, count, tokens)
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
    centred: Centred, grad_mass: Tensor, delta: Tensor, made: Attended, tokens: Tokens
) -> Tensor:
    """Return the gradient of the queries, of the centred gradient of pooled and of delta."""
    x, p, offsets, scores = tokens.x, tokens.p, tokens.offsets, made.scores
    dweights = project(x, p, centred, None, offsets, *tokens.statistics)
    (rows, count), bags = scores.shape, len(made.pooled)
    slots = count_slots(rows, bags, SIDE_CHUNK)
    side = _side(slots, count, tokens)
    launch(
        softmax_gradient_kernel, x, (slots, cdiv(count, _BLOCK_R)),
        scores, made.lse, dweights, grad_mass, delta, offsets, tokens.counts, tokens.seed, p,
        tokens.mean, tokens.rstd, side.sums, *_rows_of(p), bags, tokens.eps,
        *_dropout(tokens.dropout_p), R=count, **_constants(tokens, scores), num_warps=8,
    )  # fmt: skip
    dqueries = torch.empty_like(made.pooled)
    pool(dweights, x, tokens.mean, tokens.rstd, offsets, side, dqueries, None, made.token)
    return dqueries


def _to_tokens(
    rows: Tensor,
    weight: Tensor,
    channels: int,
    scale: float,
    of: tuple[MeanToken, Tensor] | None = None,
) -> tuple[Centred, tuple[Tensor, Tensor] | None]:
    """Return scale rows weight of each head [H, E, W], centred as context_kv's `centre` does.

    Args:
        rows: [B, H, C, E], last stride 1.
        channels: P, the positional ones at the end of the W.
        of: of the gradient of what is attended, what was pooled and the shifts [H, E].

    Returns:
        [B, H C, W] in parts; and, where `of` is given, the gradient of mass and
        delta = rowsum(dpooled pooled) + dmass mass, fp32 [B, H C] each.
    """
    (bags, heads, latents, width), total = rows.shape, weight.shape[2]
    own = weight.new_empty(bags, heads * latents, total - channels)
    own_p = weight.new_empty(bags, heads * latents, channels)
    sums = weight.new_empty(bags, heads * latents, dtype=torch.float32)
    dmass = delta = pooled = mass = shift = None
    if of is not None:
        (pooled, mass), shift = of
        dmass, delta = torch.empty_like(sums), torch.empty_like(sums)
    block_c, block_e = _latents(latents, weight), _channels(width)
    # Numbers of a tile of the weight, and of the result: wide tiles make a row in few steps.
    room = 16384 if weight.element_size() == 2 else 4096
    if weight.element_size() > 2 and capability(rows) > 90:  # else 7 stores spill for heads of 63
        room = 2048
    block_w = max(16, min(256, room // block_e, room // block_c))
    launch(
        to_tokens_kernel, rows, (bags * heads * cdiv(latents, block_c),),
        rows, weight, own, own_p, sums, pooled, mass, shift, dmass, delta,
        *rows.stride()[:3], scale, H=heads, C=latents, E=width, W=total, P=channels,
        BLOCK_C=block_c, BLOCK_E=block_e, BLOCK_W=block_w,
        num_warps=8 if max(block_c, block_e) * block_w > 64 * 64 else 4, num_stages=3,
    )  # fmt: skip
    made = None if dmass is None or delta is None else (dmass, delta)
    return Centred(own, own_p, sums), made


def _to_heads(
    rows: Tensor, weight: Tensor, of: tuple[Tensor, Tensor] | None, out: Tensor, scale: float
) -> None:
    """Write scale rows weight^T [B, H, C, E] to `out`, plus mass shift^T, given [B, R], [H, E].

    rows is contiguous [B, H C, W], weight [H, E, W], and the last stride of `out` is 1.
    """
    (bags, heads, latents, width), total = out.shape, weight.shape[2]
    mass, shift = of or (None, None)
    block_c, block_e = _latents(latents, weight), _channels(width)
    # 128 spill for heads of 16 on sm_100 (4 stores).
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
    sums = tokens.x.new_empty(slots, count, 1 + tokens.channels, dtype=torch.float32)
    return Side(sums, tokens.channels)


def _constants(tokens: Tokens, scores: Tensor) -> dict[str, Any]:
    dropout = tokens.seed is not None
    return {
        "P": tokens.channels,
        "CHUNK": SIDE_CHUNK,
        # 64 spill in float32 with counts (1 store on sm_80), and with dropout (6 on sm_100).
        "BLOCK_N": 64 if scores.element_size() == 2 and not dropout else 32,
        "BLOCK_R": _BLOCK_R,
        "BLOCK_P": max(16, next_power_of_2(tokens.channels)),
        "DROPOUT": dropout,
        "COUNTS": tokens.counts is not None,
        "SCALED": scaled(tokens.x, scores.dtype),
    }


def _rows_of(p: Tensor | None) -> tuple[int, int]:
    """Return the stride and the number of the rows of positions."""
    return (0, 1) if p is None else (p.stride(0), p.shape[0])


def _dropout(dropout_p: float) -> tuple[float, float]:
    return representable(dropout_p), 1 / (1 - dropout_p)
