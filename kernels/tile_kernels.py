"""Triton functions on tiles that several operators use."""

import triton
import triton.language as tl

# One tf32 product costs 1e-2 absolute; three are as good as fp32. Half precision ignores it.
PRECISION = tl.constexpr("tf32x3")


@triton.jit
def load_tile(base, row, stride, valid, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load columns first to first + BLOCK of rows of width WIDTH, zeros elsewhere."""
    column = first + tl.arange(0, BLOCK)
    pointer = base + row[:, None] * stride + column[None, :]
    if WIDTH % BLOCK == 0:
        return tl.load(pointer, mask=valid[:, None], other=0.0)
    return tl.load(pointer, mask=valid[:, None] & (column[None, :] < WIDTH), other=0.0)


@triton.jit
def row_factors(rstd_ptr, t, valid, eps):
    """Return 1 / SD of rows t, 0 for constant rows: all else that they had would be rounding."""
    rstd = tl.load(rstd_ptr + t, mask=valid, other=0.0)
    return tl.where(rstd < tl.rsqrt(eps + rstd * 0), rstd, 0.0)


@triton.jit
def store_tile(base, row, valid, first, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store columns first to first + BLOCK of contiguous rows of WIDTH."""
    column = first + tl.arange(0, BLOCK)
    mask = valid[:, None] & (column < WIDTH)[None, :]
    at = base + row[:, None] * WIDTH + column[None, :]
    tl.store(at, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def product(a, b, acc):
    """Return a b + acc, in fp32 as precisely as fp32."""
    return tl.dot(a, b, acc, input_precision=PRECISION)
