"""Triton kernels for slerp: products of all pairs of vectors in one sweep, and their combination.

Everything is summed in float64, in chunks of a fixed size that are added in order: no atomics, the
same bits every time.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512
CHUNK = 16 * BLOCK


def products(vectors: Sequence[Tensor]) -> Tensor:
    """Return the products [n, n], float64, of n contiguous float32 tensors taken as vectors."""
    size, count, device = vectors[0].numel(), len(vectors), vectors[0].device
    pairs = count * (count + 1) // 2
    chunks = triton.cdiv(size, CHUNK)
    partial = torch.empty(chunks, pairs, dtype=torch.float64, device=device)
    if chunks:
        with torch.cuda.device_of(vectors[0]):
            _products[(chunks,)](tuple(vectors), partial, size, CHUNK=CHUNK, BLOCK=BLOCK)
    sums = partial.sum(0)
    found = sums.new_empty(count, count)
    rows, columns = torch.tril_indices(count, count, device=device)
    found[rows, columns] = found[columns, rows] = sums
    return found


def combine(vectors: Sequence[Tensor], coefficients: Tensor, out: Tensor) -> None:
    """Write sum_j c_j v_j to `out`, contiguous or one of the vectors; c float64 [n]."""
    size = out.numel()
    if size:
        with torch.cuda.device_of(out):
            _combine_vectors[(triton.cdiv(size, BLOCK),)](
                tuple(vectors), coefficients.to(out.device), out, size, BLOCK=BLOCK
            )


@triton.jit
def _products(vectors, partial, size, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    chunk = tl.program_id(0).to(tl.int64)
    pairs: tl.constexpr = len(vectors) * (len(vectors) + 1) // 2
    out = partial + chunk * pairs
    for i in tl.static_range(len(vectors)):
        for j in tl.static_range(i + 1):
            sums = tl.zeros((BLOCK,), tl.float64)
            for start in range(0, CHUNK, BLOCK):
                at = chunk * CHUNK + start + tl.arange(0, BLOCK)
                a = tl.load(vectors[i] + at, mask=at < size, other=0.0).to(tl.float64)
                b = tl.load(vectors[j] + at, mask=at < size, other=0.0).to(tl.float64)
                sums += a * b
            tl.store(out + i * (i + 1) // 2 + j, tl.sum(sums))


@triton.jit
def _combine_vectors(vectors, coefficients, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float64)
    for j in tl.static_range(len(vectors)):
        x = tl.load(vectors[j] + at, mask=inside, other=0.0).to(tl.float64)
        total += tl.load(coefficients + j) * x
    tl.store(out + at, total.to(tl.float32), mask=inside)
