"""Launches the Triton kernels of fold_norm: a program has a row forward, some columns backward."""

import torch
from torch import Tensor

from ..launch import cdiv, launch
from .triton_kernels import fold_backward_kernel, fold_kernel

# Forward: numbers of a row in a step. Backward: rows in a step, and columns of a program.
_BLOCK_D, _BLOCK_ROWS, _BLOCK_COLUMNS = 1024, 64, 32


def fold(
    weight: Tensor, gain: Tensor, shift: Tensor, padding: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute motet::fold_norm of contiguous arguments."""
    groups, rows, width = weight.shape
    folded = weight.new_empty(groups, rows + padding, width, dtype=dtype)
    bias = weight.new_empty(groups, rows + padding, dtype=dtype)
    if bias.numel():
        launch(
            fold_kernel, weight, (bias.numel(),),
            weight, gain, shift, folded, bias, E=rows, PADDED=rows + padding, D=width,
            BLOCK_D=_BLOCK_D, num_warps=4,
        )  # fmt: skip
    return folded, bias


def fold_backward(
    grad_folded: Tensor, grad_bias: Tensor, weight: Tensor, gain: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of weight, gain and shift, of contiguous arguments."""
    groups, rows, width = weight.shape
    dweight, dgain, dshift = (torch.empty_like(x) for x in (weight, gain, shift))
    if width:
        launch(
            fold_backward_kernel, weight, (cdiv(width, _BLOCK_COLUMNS),),
            grad_folded, grad_bias, weight, gain, shift, dweight, dgain, dshift, groups * rows,
            E=rows, PADDED=grad_bias.shape[1], D=width, BLOCK_N=_BLOCK_ROWS,
            BLOCK_D=_BLOCK_COLUMNS, num_warps=4,
        )  # fmt: skip
    return dweight, dgain, dshift
