"""Launches the Triton kernels of head: a program has a sample, or backward also some columns."""

import torch
from torch import Tensor

from ..launch import cdiv, launch, next_power_of_2
from .triton_kernels import head_backward_kernel, head_kernel

# Latents, and outputs, of a sample in a step.
_BLOCK_C, _BLOCK_K = 16, 16
# Gradients of weights: samples and outputs in a step, and columns of a program.
_SAMPLES, _OUTPUTS, _COLUMNS = 16, 16, 8


def forward(
    latents: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute motet::head of contiguous weights and latents of any strides."""
    (bags, count, dim), outputs = latents.shape, len(weight)
    logits = weight.new_empty(bags, outputs)
    normal = weight.new_empty(bags, dim, dtype=torch.float32)
    rstd = weight.new_empty(bags, dtype=torch.float32)
    if bags:
        launch(
            head_kernel, weight, (bags,),
            latents, gain, shift, weight, bias, logits, normal, rstd, *latents.stride(), outputs,
            eps, C=count, D=dim, BLOCK_C=_BLOCK_C, BLOCK_D=_power(dim), BLOCK_K=_BLOCK_K,
            num_warps=4,
        )  # fmt: skip
    return logits, normal, rstd


def backward(
    grad: Tensor,
    normal: Tensor,
    rstd: Tensor,
    gain: Tensor,
    shift: Tensor,
    weight: Tensor,
    count: int,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Compute motet::head_backward of contiguous arguments."""
    (bags, dim), outputs = normal.shape, len(weight)
    dlatents = normal.new_empty(bags, count, dim, dtype=dtype)
    dgain, dshift, dweight = (torch.empty_like(x) for x in (gain, shift, weight))
    dbias = weight.new_empty(outputs)
    programs = bags + cdiv(dim, _COLUMNS)
    if programs:
        launch(
            head_backward_kernel, weight, (programs,),
            grad, normal, rstd, gain, shift, weight, dlatents, dgain, dshift, dweight, dbias,
            bags, outputs, C=count, D=dim, BLOCK_C=_BLOCK_C, BLOCK_D=_power(dim),
            BLOCK_K=_BLOCK_K, SAMPLES=_SAMPLES, OUTPUTS=_OUTPUTS, COLUMNS=_COLUMNS, num_warps=4,
        )  # fmt: skip
    return dlatents, dgain, dshift, dweight, dbias


def _power(dim: int) -> int:
    return max(16, next_power_of_2(dim))
