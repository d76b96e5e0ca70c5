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
