"""Launches the Triton kernels of slerp: products of all pairs of vectors, and their combination.

Everything is summed in float64, in chunks of a fixed size that are added in order: no atomics, the
same bits every time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..launch import cdiv, launch
from .triton_kernels import combine_vectors_kernel, products_kernel

BLOCK = 512
CHUNK = 16 * BLOCK


def products(vectors: Sequence[Tensor]) -> Tensor:
    """Return the products [n, n], float64, of n contiguous float32 tensors taken as vectors."""
    size, count, device = vectors[0].numel(), len(vectors), vectors[0].device
    pairs = count * (count + 1) // 2
    chunks = cdiv(size, CHUNK)
    partial = torch.empty(chunks, pairs, dtype=torch.float64, device=device)
    if chunks:
        grid, like = (chunks,), vectors[0]
        launch(products_kernel, like, grid, tuple(vectors), partial, size, CHUNK=CHUNK, BLOCK=BLOCK)
    sums = partial.sum(0)
    gram = sums.new_empty(count, count)
    rows, columns = torch.tril_indices(count, count, device=device)
    gram[rows, columns] = gram[columns, rows] = sums
    return gram


def combine(vectors: Sequence[Tensor], coefficients: Tensor, out: Tensor) -> None:
    """Write sum_j c_j v_j to `out`, contiguous or one of the vectors; c float64 [n]."""
    size = out.numel()
    if size:
        grid, coefficients = (cdiv(size, BLOCK),), coefficients.to(out.device)
        launch(
            combine_vectors_kernel, out, grid, tuple(vectors), coefficients, out, size, BLOCK=BLOCK
        )
