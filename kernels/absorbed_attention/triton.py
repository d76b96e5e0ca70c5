"""Launches the Triton kernels between the products of absorbed attention: softmax and gradient.

The products are those of context_kv: `project` gives scores [T, R] of every bag's own queries,
`pool` gathers the tokens by weights [T, R].
"""

import torch
from torch import Tensor

from ..context_kv.triton import pool, project
from ..dropout import representable
from ..launch import cdiv, launch
from ..ragged import count_slots
from .triton_kernels import (
    combine_softmax_kernel,
    combine_sums_kernel,
    softmax_gradient_kernel,
    softmax_statistics_kernel,
    softmax_weights_kernel,
)

# Rows of a program: 1024 x 32 scores are read in 16 steps, and 8 bags of 15,000 patches with 200
# queries make 7 x 128 programs.
_CHUNK, _BLOCK_N, _BLOCK_R = 1024, 64, 32


def attend(
    queries: Tensor,
    x: Tensor,
    p: Tensor | None,
    offsets: Tensor,
    counts: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return pooled [B, R, W], mass [B, R], scores [T, R], lse fp32 [B, R], mean and rstd [T].

    The scores are without the counts, the lse with them.
    """
    scores, mean, rstd = project(x, p, queries, None, offsets, None, None, eps)
    (rows, count), bags = scores.shape, len(queries)
    slots = count_slots(rows, bags, _CHUNK)
    own = {"dtype": torch.float32, "device": x.device}
    peak, total = torch.empty(slots, count, **own), torch.empty(slots, count, **own)
    lse, mass = torch.empty(bags, count, **own), torch.empty(bags, count, **own)
    grid, combined = _grids(slots, bags, count)
    counts = None if counts is None else counts.contiguous()
    launch(
        softmax_statistics_kernel, x, grid,
        scores, offsets, counts, peak, total, bags, R=count, CHUNK=_CHUNK, BLOCK_N=_BLOCK_N,
        BLOCK_R=_BLOCK_R, COUNTS=counts is not None, num_warps=4,
    )  # fmt: skip
    launch(
        combine_softmax_kernel, x, combined,
        peak, total, offsets, lse, R=count, CHUNK=_CHUNK, BLOCK_R=_BLOCK_R, num_warps=1,
    )  # fmt: skip
    weights = torch.empty_like(scores)
    launch(
        softmax_weights_kernel, x, grid,
        scores, lse, offsets, counts, seed, weights, total, bags, *_dropout(dropout_p), R=count,
        CHUNK=_CHUNK, BLOCK_N=_BLOCK_N, BLOCK_R=_BLOCK_R, DROPOUT=seed is not None,
        COUNTS=counts is not None, num_warps=4,
    )  # fmt: skip
    launch(
        combine_sums_kernel, x, combined,
        total, offsets, mass, R=count, CHUNK=_CHUNK, BLOCK_R=_BLOCK_R, num_warps=1,
    )  # fmt: skip
    pooled = pool(weights, x, p, mean, rstd, offsets)
    return pooled.to(queries.dtype), mass.to(queries.dtype), scores, lse, mean, rstd


def attend_backward(
    grad_pooled: Tensor,
    grad_mass: Tensor,
    delta: Tensor,
    queries: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the queries, fp32 [B, R, W], and rowsum(dS) [B, R]; delta is fp32."""
    dweights, _, _ = project(x, p, grad_pooled.contiguous(), None, offsets, mean, rstd, eps)
    (rows, count), bags = scores.shape, len(queries)
    slots = count_slots(rows, bags, _CHUNK)
    grid, combined = _grids(slots, bags, count)
    own = {"dtype": torch.float32, "device": x.device}
    counts = None if counts is None else counts.contiguous()
    partial, rest = torch.empty(slots, count, **own), torch.empty(bags, count, **own)
    launch(
        softmax_gradient_kernel, x, grid,
        scores, lse, dweights, grad_mass.float().contiguous(), delta.contiguous(), offsets,
        counts, seed, partial, bags, *_dropout(dropout_p), R=count, CHUNK=_CHUNK,
        BLOCK_N=_BLOCK_N, BLOCK_R=_BLOCK_R, DROPOUT=seed is not None,
        COUNTS=counts is not None, num_warps=8,
    )  # fmt: skip
    launch(
        combine_sums_kernel, x, combined,
        partial, offsets, rest, R=count, CHUNK=_CHUNK, BLOCK_R=_BLOCK_R, num_warps=1,
    )  # fmt: skip
    return pool(dweights, x, p, mean, rstd, offsets), rest


def _grids(slots: int, bags: int, count: int) -> tuple[tuple[int, int], tuple[int, int]]:
    blocks = cdiv(count, _BLOCK_R)
    return (max(slots, 1), blocks), (max(bags, 1), blocks)


def _dropout(dropout_p: float) -> tuple[float, float]:
    return representable(dropout_p), 1 / (1 - dropout_p)
