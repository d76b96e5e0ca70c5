"""Launches the Triton kernel that computes the means and 1 / SDs of rows."""

import torch
from torch import Tensor

from ..launch import cdiv, launch, next_power_of_2
from .triton_kernels import row_statistics_kernel


def forward(x: Tensor, p: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Return mean and rstd, fp32 [T], of the rows of [x | p].

    Args:
        x: [T, D], last stride 1.
        p: [Np, P], last stride 1, T a multiple of Np; or None.
        eps: LayerNorm's.
    """
    rows, width = x.shape
    channels = 0 if p is None else p.shape[1]
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    if not rows:
        return mean, rstd
    # A row of up to 4096 numbers is one block. A program of 4 warps holds 8192 numbers.
    block_d, block_p = min(4096, next_power_of_2(width)), next_power_of_2(max(channels, 1))
    block_t = max(1, 8192 // max(block_d, block_p, 64))
    launch(
        row_statistics_kernel, x, (cdiv(rows, block_t),),
        x, p, mean, rstd, x.stride(0), 0 if p is None else p.stride(0), rows,
        1 if p is None else p.shape[0], eps, D=width, P=channels, BLOCK_T=block_t,
        BLOCK_D=block_d, BLOCK_P=block_p, num_warps=4,
    )  # fmt: skip
    return mean, rstd


def statistics_of(
    x: Tensor, p: Tensor | None, mean: Tensor | None, rstd: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return mean and rstd, contiguous; computes those of the rows of [x | p] if they are None."""
    if mean is None or rstd is None:
        return forward(x, p, eps)
    return mean.contiguous(), rstd.contiguous()
