"""The Triton kernel of row_statistics; triton.py says how it is launched."""

import triton
import triton.language as tl

from ..tile_kernels import load_tile


@triton.jit
def _join(mean, m2, count, z, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Add a block of columns to the mean and the sum of squared deviations m2 of `count` columns.

    Chan et al. 1983, Eq. 2.1. The mean of the block is computed twice, the second time of the
    deviations from the first: so the rounding of a large mean does not reach m2, and a constant row
    has a deviation of exactly zero.
    """
    column = first + tl.arange(0, BLOCK)
    inside = (column < WIDTH)[None, :]
    size = tl.minimum(WIDTH - first, BLOCK).to(tl.float32)
    block_mean = tl.sum(z, 1) / size
    deviation = tl.where(inside, z - block_mean[:, None], 0.0)
    shift = tl.sum(deviation, 1) / size
    deviation = tl.where(inside, deviation - shift[:, None], 0.0)
    move = (block_mean - mean) + shift
    m2 += tl.sum(deviation * deviation, 1) + move * move * (count * size / (count + size))
    return mean + move * (size / (count + size)), m2, count + size


@triton.jit(do_not_specialize=["n_rows", "n_positions"])
def row_statistics_kernel(
    x_ptr, p_ptr, mean_ptr, rstd_ptr, x_t, p_t, n_rows, n_positions, eps,
    D: tl.constexpr, P: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """mean[t] and rstd[t] = 1 / sqrt(var[t] + eps) of BLOCK_T rows [x[t] | p[t mod n_positions]].

    The product that needs the statistics is another kernel, although both read x. If a tile were
    summed up and multiplied in one loop, Triton would give it one buffer less, and refill it while
    the matrix units of sm_90 still read it: a data race (benchmarks/loops.py).
    """
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = t < n_rows
    mean = tl.zeros([BLOCK_T], tl.float32)
    m2 = mean
    count = 0.0
    for d0 in range(0, D, BLOCK_D):
        z = load_tile(x_ptr, t, x_t, valid, d0, D, BLOCK_D).to(tl.float32)
        mean, m2, count = _join(mean, m2, count, z, d0, D, BLOCK_D)
    if P > 0:
        z = load_tile(p_ptr, t % n_positions, p_t, valid, 0, P, BLOCK_P).to(tl.float32)
        mean, m2, count = _join(mean, m2, count, z, 0, P, BLOCK_P)
    tl.store(mean_ptr + t, mean, mask=valid)
    tl.store(rstd_ptr + t, tl.rsqrt(m2 / (D + P) + eps), mask=valid)
