"""Triton functions on tiles that several operators use."""

import triton
import triton.language as tl

# How fp32 operands are multiplied: one product in tf32 has absolute errors of 1e-2; three products
# ("tf32x3") are as precise as fp32. It has no effect on operands in half precision.
PRECISION = tl.constexpr("tf32x3")


@triton.jit
def load_tile(base, row, stride, valid, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load columns first to first + BLOCK of rows of width WIDTH; zeros behind it.

    Where WIDTH is a multiple of BLOCK the columns need no mask, and loads can be asynchronous.
    """
    column = first + tl.arange(0, BLOCK)
    pointer = base + row[:, None] * stride + column[None, :]
    if WIDTH % BLOCK == 0:
        return tl.load(pointer, mask=valid[:, None], other=0.0)
    return tl.load(pointer, mask=valid[:, None] & (column[None, :] < WIDTH), other=0.0)


@triton.jit
def row_factors(rstd_ptr, t, valid, eps):
    """Return 1 / SD of rows t, but 0 for constant rows, whose deviations are only rounding.

    A row with no variance has rstd = 1 / sqrt(eps), the largest possible.
    """
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
    """Return a b + acc, of fp32 operands with the precision of fp32."""
    return tl.dot(a, b, acc, input_precision=PRECISION)
