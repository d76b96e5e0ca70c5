"""Launches the Triton kernels of harmonic_merge, for any number of complex64 tensors.

Memory bounds them, not arithmetic: so phases are computed by polynomials for two inputs of equal
weights too, for which the C++ needs square roots only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..launch import cdiv, launch
from .triton_kernels import merge_backward_kernel, merge_kernel

BLOCK = 512


def merge(latents: Sequence[Tensor], weights: Sequence[float], phase: str, out: Tensor) -> None:
    """Write the merge of contiguous complex64 tensors to `out`, contiguous or one of them."""
    size = out.numel()
    if not size:
        return
    parts = tuple(torch.view_as_real(z) for z in latents)
    launch(
        merge_kernel, out, (cdiv(size, BLOCK),),
        parts, tuple(weights), torch.view_as_real(out), size,
        CIRCULAR=phase == "circular", BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


def merge_backward(
    grad: Tensor, merged: Tensor, latents: Sequence[Tensor], weights: Sequence[float], phase: str
) -> list[Tensor]:
    """Return the gradients of contiguous complex64 tensors, given that of their merge."""
    grads, size = [torch.empty_like(z) for z in latents], merged.numel()
    if size:
        parts, grad_parts = (
            tuple(torch.view_as_real(z) for z in tensors) for tensors in (latents, grads)
        )
        launch(
            merge_backward_kernel, merged, (cdiv(size, BLOCK),),
            torch.view_as_real(grad), torch.view_as_real(merged), parts, tuple(weights),
            grad_parts, size, CIRCULAR=phase == "circular", BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return grads
