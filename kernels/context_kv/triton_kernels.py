"""The Triton kernels of context_kv; triton.py says how they are launched."""

import triton
import triton.language as tl

from ..ragged_kernels import chunk_of_slot, chunks_of_bag
from ..tile_kernels import PRECISION, load_tile


@triton.jit
def _deviations(z, mean, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return z - mean, 0 in the columns beyond WIDTH."""
    deviation = z - mean[:, None]
    if WIDTH % BLOCK == 0:
        return deviation
    column = first + tl.arange(0, BLOCK)
    return tl.where(column[None, :] < WIDTH, deviation, 0.0)


@triton.jit
def _accumulate(
    acc, weight_sum, mean, m2, count, z, pivot, w, first,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """Add a block of columns to acc = sum_w weight[w] (z[w] - pivot - mean), mean of those so far.

    Where the mean moves, so does acc, by the sum of the weights so far: every term stays as large
    as the deviations it stands for, so that no digits cancel whatever the mean of the row is. m2 is
    the sum of squared deviations (Chan et al. 1983, Eq. 2.1).
    """
    w = tl.trans(w)
    z = _deviations(z.to(tl.float32), pivot, first, WIDTH, BLOCK)
    if not GIVEN:
        size = tl.minimum(WIDTH - first, BLOCK).to(tl.float32)
        own = tl.sum(z, 1) / size
        own_deviation = _deviations(z, own, first, WIDTH, BLOCK)
        move = own - mean
        new_mean = mean + move * (size / (count + size))
        m2 += tl.sum(own_deviation * own_deviation, 1)
        m2 += move * move * (count * size / (count + size))
        count += size
        acc += (mean - new_mean)[:, None] * weight_sum[None, :]
        # Along axis 0: along axis 1 of an fp32 tile just loaded, Triton 3.7.1 moves the sum behind
        # the loop, which uses it, and fails where nothing behind the loop does.
        weight_sum += tl.sum(w.to(tl.float32), 0)
        mean = new_mean
        z = _deviations(z, mean, first, WIDTH, BLOCK)
    acc = tl.dot(z.to(w.dtype), w, acc, input_precision=PRECISION)
    return acc, weight_sum, mean, m2, count


@triton.jit(do_not_specialize=["n_bags", "n_total", "n_rows", "n_positions"])
def project_kernel(
    x_ptr, p_ptr, weight_ptr, weight_p_ptr, bias_ptr, weight_sum_ptr, offsets_ptr,
    mean_ptr, rstd_ptr, y_ptr, x_t, p_t, n_bags, n_total, n_rows, n_positions, eps,
    COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    GROUPED: tl.constexpr, GIVEN: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """y[s, t, o] = sum_w weight[s, o, w] zhat[t, w] + bias[s, o] for BLOCK_T rows of one bag.

    DIRECT: rstd (weight z - mean sum_w weight[w]) + bias with z as it lies in memory, the
    variance from sums shifted by the mean of the row's first block. Otherwise: see _accumulate.
    weight [S O, D], weight_p [S O, D + P], y [S, T, O].
    """
    program = tl.program_id(0)
    tiles: tl.constexpr = (COLUMNS + BLOCK_O - 1) // BLOCK_O
    slot = program // tiles
    bag, origin, start, stop = chunk_of_slot(slot, offsets_ptr, n_bags, n_rows, BLOCK_T, GROUPED)
    if start >= stop:
        return
    row = tl.arange(0, BLOCK_T)
    valid = row < stop - start
    t = origin + start
    x_ptr += t * x_t
    column = program % tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    wanted = column < COLUMNS
    set_row = column
    if GROUPED:
        weight_ptr += bag * OUTPUTS * D
        weight_p_ptr += bag * OUTPUTS * (D + P)
        set_row = column + bag.to(tl.int32) * OUTPUTS
    acc = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    mean = tl.zeros([BLOCK_T], tl.float32)
    pivot = mean
    m2 = mean
    if GIVEN:
        pivot = tl.load(mean_ptr + t + row, mask=valid, other=0.0)
    else:
        block = load_tile(x_ptr, row, x_t, valid, 0, D, BLOCK_D)
        pivot = tl.sum(block.to(tl.float32), 1) / min(D, BLOCK_D)
    weight_sum = tl.zeros([BLOCK_O], tl.float32)
    count = 0.0
    for d0 in range(0, D, BLOCK_D):
        z = load_tile(x_ptr, row, x_t, valid, d0, D, BLOCK_D)
        w = load_tile(weight_ptr, column, D, wanted, d0, D, BLOCK_D)
        if DIRECT:
            acc = tl.dot(z, tl.trans(w), acc)
            if not GIVEN:
                deviation = _deviations(z.to(tl.float32), pivot, d0, D, BLOCK_D)
                mean += tl.sum(deviation, 1)
                m2 += tl.sum(deviation * deviation, 1)
        else:
            acc, weight_sum, mean, m2, count = _accumulate(
                acc, weight_sum, mean, m2, count, z, pivot, w, d0, D, BLOCK_D, GIVEN
            )
    if P > 0:
        position = ((t + row) % n_positions).to(tl.int64)
        z = load_tile(p_ptr, position, p_t, valid, 0, P, BLOCK_P)
        w = load_tile(weight_p_ptr + D, column, D + P, wanted, 0, P, BLOCK_P)
        if DIRECT:
            acc = tl.dot(z.to(w.dtype), tl.trans(w), acc)
            if not GIVEN:
                deviation = _deviations(z.to(tl.float32), pivot, 0, P, BLOCK_P)
                mean += tl.sum(deviation, 1)
                m2 += tl.sum(deviation * deviation, 1)
        else:
            acc, weight_sum, mean, m2, count = _accumulate(
                acc, weight_sum, mean, m2, count, z, pivot, w, 0, P, BLOCK_P, GIVEN
            )
    if GIVEN:
        mean = pivot
        rstd = tl.load(rstd_ptr + t + row, mask=valid, other=0.0)
    else:
        if DIRECT:
            mean /= D + P
            m2 -= mean * mean * (D + P)
        mean += pivot
        rstd = tl.rsqrt(tl.maximum(m2, 0.0) / (D + P) + eps)
        mine = valid & (program % tiles == 0)
        tl.store(mean_ptr + t + row, mean, mask=mine)
        tl.store(rstd_ptr + t + row, rstd, mask=mine)
    if DIRECT:
        weight_sum = tl.load(weight_sum_ptr + set_row, mask=wanted, other=0.0)
        acc -= mean[:, None] * weight_sum[None, :]
        # Rounding times 1 / sqrt(eps) is all that would be left of a constant row.
        rstd = tl.where(rstd < tl.rsqrt(eps + mean * 0), rstd, 0.0)
    acc *= rstd[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + set_row, mask=wanted, other=0.0).to(tl.float32)[None, :]
    offset = column
    if OUTPUTS < COLUMNS:
        offset = (column // OUTPUTS).to(tl.int64) * n_total * OUTPUTS + column % OUTPUTS
    pointer = y_ptr + t * OUTPUTS + row[:, None] * OUTPUTS + offset[None, :]
    tl.store(pointer, acc.to(y_ptr.dtype.element_ty), mask=valid[:, None] & wanted[None, :])


@triton.jit(do_not_specialize=["at", "total", "n_bags", "n_rows", "n_positions"])
def pool_kernel(
    a_ptr, x_ptr, mean_ptr, rstd_ptr, offsets_ptr, partial_ptr,
    a_s, a_units, x_t, at, total, n_bags, n_rows, n_positions, A_UNIT: tl.constexpr,
    COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
    RAGGED: tl.constexpr, REPEATED: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """partial[slot, o, at + d] = sum_t a[t, o] (x[t, d] - mean[t]) rstd[t] over one chunk of rows.

    DIRECT: (a rstd)^T x - sum_t a rstd mean, with x as it lies in memory. a [S, T, O],
    partial [slots, S O, total]; x repeats after n_positions rows where REPEATED.
    """
    program = tl.program_id(0)
    o_tiles: tl.constexpr = (COLUMNS + BLOCK_O - 1) // BLOCK_O
    d_tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    slot = program // (o_tiles * d_tiles)
    bag, origin, start, stop = chunk_of_slot(slot, offsets_ptr, n_bags, n_rows, CHUNK, RAGGED)
    if start >= stop:
        return
    d0 = program // o_tiles % d_tiles * BLOCK_D
    column = program % o_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    first = origin + bag * n_rows + start
    length = stop - start
    a_t = a_units * A_UNIT
    a_ptr += first * a_t
    mean_ptr += first
    rstd_ptr += first
    if not REPEATED:
        x_ptr += first * x_t
    a_column = column
    if OUTPUTS < COLUMNS:
        a_column = (column // OUTPUTS).to(tl.int64) * a_s + column % OUTPUTS
    acc = tl.zeros([BLOCK_O, BLOCK_D], tl.float32)
    shift = tl.zeros([BLOCK_O], tl.float32)
    for t0 in range(0, length, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        valid = t < length
        mask = valid[:, None] & (column < COLUMNS)[None, :]
        a = tl.load(a_ptr + t[:, None] * a_t + a_column[None, :], mask=mask, other=0.0)
        mean = tl.load(mean_ptr + t, mask=valid, other=0.0)
        rstd = tl.load(rstd_ptr + t, mask=valid, other=0.0)
        row = t
        if REPEATED:
            row = ((first + t) % n_positions).to(tl.int64)
        x = load_tile(x_ptr, row, x_t, valid, d0, D, BLOCK_D)
        if DIRECT:
            a = (a.to(tl.float32) * rstd[:, None]).to(a.dtype)
            shift += tl.sum(a.to(tl.float32) * mean[:, None], 0)
        else:
            x = ((x.to(tl.float32) - mean[:, None]) * rstd[:, None]).to(a.dtype)
        acc = tl.dot(tl.trans(a), x, acc, input_precision=PRECISION)
    if DIRECT:
        acc -= shift[:, None]
    d = d0 + tl.arange(0, BLOCK_D)
    out = partial_ptr + (slot.to(tl.int64) * COLUMNS + column[:, None]) * total + at + d[None, :]
    tl.store(out, acc, mask=(column < COLUMNS)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["n_rows", "size"])
def combine_pool_kernel(
    partial_ptr, offsets_ptr, out_ptr, n_rows, size, CHUNK: tl.constexpr, RAGGED: tl.constexpr
):  # fmt: skip
    """Add the chunks of a bag in order: out[bag, i] = sum_j partial[slot + j, i], i < size."""
    bag = tl.program_id(1)
    slot, chunks = chunks_of_bag(bag, offsets_ptr, n_rows, CHUNK, RAGGED)
    i = tl.program_id(0) * 128 + tl.arange(0, 128)
    out = tl.zeros([128], tl.float32)
    for j0 in range(0, chunks, 16):
        j = j0 + tl.arange(0, 16)
        mask = (j[:, None] < chunks) & (i[None, :] < size)
        own = tl.load(partial_ptr + (slot + j)[:, None] * size + i[None, :], mask=mask, other=0.0)
        out += tl.sum(own, 0)
    tl.store(out_ptr + bag.to(tl.int64) * size + i, out, mask=i < size)
