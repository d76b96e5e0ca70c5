"""Launches the Triton kernels between the products of absorbed attention: softmax and gradient.

The products are those of context_kv: `project` gives scores [T, R] of every bag's own queries,
`pool` gathers the tokens by weights [T, R].
"""

from typing import Any

import torch
from torch import Tensor

from ..context_kv.triton import SIDE_CHUNK, MeanToken, Side, centre, pool, project, scaled
from ..dropout import representable
from ..launch import cdiv, launch, next_power_of_2
from ..ragged import count_slots
from .triton_kernels import (
    softmax_gradient_kernel,
    softmax_statistics_kernel,
    softmax_weights_kernel,
)

# A program reads SIDE_CHUNK x 32 scores in 16 steps, and 8 bags of 15,000 patches with 200 queries
# make 7 x 128 programs.
_BLOCK_R = 32


def attend(
    queries: Tensor,
    x: Tensor,
    p: Tensor | None,
    offsets: Tensor,
    counts: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return pooled [B, R, W], mass [B, R], scores [T, R] and lse, fp32 [B, R].

    The scores are without the counts, the lse with them. mean and rstd, fp32 [T], are contiguous.
    Scores of tokens behind the last bag are not written.
    """
    centred, _ = centre(queries, x.shape[1], None)
    scores = project(x, p, centred, None, offsets, mean, rstd, eps)
    (rows, count), bags = scores.shape, len(queries)
    slots = count_slots(rows, bags, SIDE_CHUNK)
    own = {"dtype": torch.float32, "device": x.device}
    peak, total = torch.empty(slots, count, **own), torch.empty(slots, count, **own)
    lse, side = torch.empty(bags, count, **own), _side(slots, count, p, x)
    counts = None if counts is None else counts.contiguous()
    grid = (slots, cdiv(count, _BLOCK_R))
    launch(
        softmax_statistics_kernel, x, grid,
        scores, offsets, counts, peak, total, bags, R=count, CHUNK=SIDE_CHUNK, BLOCK_N=64,
        BLOCK_R=_BLOCK_R, COUNTS=counts is not None, num_warps=4,
    )  # fmt: skip
    weights = torch.empty_like(scores)
    launch(
        softmax_weights_kernel, x, grid,
        scores, peak, total, offsets, counts, seed, p, mean, rstd, weights, lse, side.sums,
        *_rows_of(p), bags, eps, *_dropout(dropout_p), R=count,
        **_constants(x, p, scores, counts, seed), num_warps=4,
    )  # fmt: skip
    pooled, mass = torch.empty_like(queries), queries.new_empty(bags, count)
    pool(weights, x, mean, rstd, offsets, side, pooled, mass, None)
    return pooled, mass, scores, lse


def attend_backward(
    grad_pooled: Tensor,
    grad_mass: Tensor,
    pooled: Tensor,
    mass: Tensor,
    x: Tensor,
    p: Tensor | None,
    offsets: Tensor,
    counts: Tensor | None,
    scores: Tensor,
    lse: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """Return the gradient of the queries, [B, R, W] of their dtype: dS (zhat - pooled / mass).

    pooled, mass, scores and lse are what attend returned; gradients are contiguous.
    """
    token = MeanToken(pooled, mass)
    centred, delta = centre(grad_pooled, x.shape[1], (grad_mass, token))
    dweights = project(x, p, centred, None, offsets, mean, rstd, eps)
    (rows, count), bags = scores.shape, len(pooled)
    slots = count_slots(rows, bags, SIDE_CHUNK)
    side = _side(slots, count, p, x)
    counts = None if counts is None else counts.contiguous()
    launch(
        softmax_gradient_kernel, x, (slots, cdiv(count, _BLOCK_R)),
        scores, lse, dweights, grad_mass, delta, offsets, counts, seed, p, mean, rstd, side.sums,
        *_rows_of(p), bags, eps, *_dropout(dropout_p), R=count,
        **_constants(x, p, scores, counts, seed), num_warps=8,
    )  # fmt: skip
    dqueries = torch.empty_like(pooled)
    pool(dweights, x, mean, rstd, offsets, side, dqueries, None, token)
    return dqueries


def _side(slots: int, count: int, p: Tensor | None, x: Tensor) -> Side:
    channels = 0 if p is None else p.shape[1]
    return Side(x.new_empty(slots, count, 1 + channels, dtype=torch.float32), channels)


def _constants(
    x: Tensor, p: Tensor | None, scores: Tensor, counts: Tensor | None, seed: Tensor | None
) -> dict[str, Any]:
    channels = 0 if p is None else p.shape[1]
    return {
        "P": channels,
        "CHUNK": SIDE_CHUNK,
        # 64 spill in float32 with counts (1 store on sm_80), and with dropout (6 on sm_100).
        "BLOCK_N": 64 if scores.element_size() == 2 and seed is None else 32,
        "BLOCK_R": _BLOCK_R,
        "BLOCK_P": max(16, next_power_of_2(channels)),
        "DROPOUT": seed is not None,
        "COUNTS": counts is not None,
        "SCALED": scaled(x, scores.dtype),
    }


def _rows_of(p: Tensor | None) -> tuple[int, int]:
    """Return the stride and the number of the rows of positions."""
    return (0, 1) if p is None else (p.stride(0), p.shape[0])


def _dropout(dropout_p: float) -> tuple[float, float]:
    return representable(dropout_p), 1 / (1 - dropout_p)
