"""The Triton kernels of slerp; triton.py says how they are launched.

`vectors` is a tuple of float32 tensors, over which the loops are unrolled at compile time. Sums are
float64: in float32 the cosine of nearly equal vectors would round to 1, and their angle to 0.
"""

import triton
import triton.language as tl


@triton.jit
def products_kernel(vectors, partial, size, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Write the products of all pairs i >= j over one chunk of vectors: partial [chunks, pairs].

    The pair (i, j) is number i (i + 1) / 2 + j. BLOCK lanes have a sum each, added up at the end.
    """
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
def combine_vectors_kernel(vectors, coefficients, out, size, BLOCK: tl.constexpr):
    """Write BLOCK numbers of sum_j coefficients[j] vectors[j]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float64)
    for j in tl.static_range(len(vectors)):
        x = tl.load(vectors[j] + at, mask=inside, other=0.0).to(tl.float64)
        total += tl.load(coefficients + j) * x
    tl.store(out + at, total.to(tl.float32), mask=inside)
