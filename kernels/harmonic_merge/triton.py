"""Launches the Triton kernel of harmonic_merge: any number of complex64 tensors, each read once.

It is bound by memory, so that the phases are taken by polynomials for two equal weights too, where
the C++ gets by with square roots.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..launch import cdiv, launch
from .triton_kernels import merge_kernel

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
