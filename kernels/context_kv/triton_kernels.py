"""The two products with the tokens, and the small kernels around them; triton.py launches them.

`project_kernel` multiplies rows of tokens by weights, summing over the channels; `pool_kernel`
multiplies the transposed weights a by the tokens, summing over the rows. Both have the tokens x
[T, D] with a stride between rows and 1 between channels, and positions p apart from them, which are
too few channels to be worth the concatenation. No kernel adds atomically: each number has one
writer, and sums over chunks are added up in order by a second kernel, so that the bits are the same
in every run, and those of a bag in every batch.
"""

import triton
import triton.language as tl

from ..ragged_kernels import chunk_of_slot, chunks_of_bag
from ..tile_kernels import PRECISION, load_tile, row_factors


@triton.jit
def _deviations(z, mean, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return z - mean in fp32, and 0 in columns behind WIDTH, which a load filled with zeros.

    Without the mask these would be -mean, and add -mean times a weight if that is not zero there.
    """
    deviation = z.to(tl.float32) - mean[:, None]
    if WIDTH % BLOCK == 0:
        return deviation
    column = first + tl.arange(0, BLOCK)
    return tl.where(column[None, :] < WIDTH, deviation, 0.0)


@triton.jit
def centre_weights_kernel(
    weight_ptr, centred_ptr, centred_p_ptr, sum_ptr, pooled_ptr, dmass_ptr, mass_ptr, delta_ptr,
    D: tl.constexpr, P: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Subtract the mean from one row of weights, w[n, D + P].

    centred[n, D] and centred_p[n, P] are w - mean(w), rounded, and sum[n] the sum of the rounded
    numbers, which the products with x are corrected by. If pooled [n, D + P] is given, w is its
    gradient, and delta[n] = sum(w pooled) + dmass mass. A program holds its row in registers.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_W)
    inside = column < D + P
    weight = tl.load(weight_ptr + row * (D + P) + column, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, weight - tl.sum(weight, 0) / (D + P), 0.0)
    centred = centred.to(centred_ptr.dtype.element_ty)
    tl.store(centred_ptr + row * D + column, centred, mask=column < D)
    if P > 0:
        tl.store(centred_p_ptr + row * P + column - D, centred, mask=inside & (column >= D))
    tl.store(sum_ptr + row, tl.sum(centred.to(tl.float32), 0))
    if pooled_ptr is not None:
        at = row * (D + P) + column
        pooled = tl.load(pooled_ptr + at, mask=inside, other=0.0).to(tl.float32)
        mass_term = tl.load(dmass_ptr + row).to(tl.float32) * tl.load(mass_ptr + row).to(tl.float32)
        tl.store(delta_ptr + row, tl.sum(weight * pooled, 0) + mass_term)


@triton.jit
def finish_projection(
    acc, column, row, valid, t, bag, mean, p_ptr, weight_p_ptr, weight_sum_ptr, bias_ptr, rstd_ptr,
    y_ptr, p_t, n_total, n_positions, eps,
    COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr,
    GROUPED: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """Turn a tile acc = x weight^T into y and store it, for rows t + row and columns `column`.

    y = rstd (acc + p weight_p^T - mean weight_sum) + bias. The term with the mean only if DIRECT:
    then x and p were multiplied as they lie in memory, and each row's product contains its mean
    times the sum of the weights. That sum is small, since the weights are centred: it is what
    their rounding left. Without DIRECT the mean was subtracted from x before the product.
    Column `column` of all S sets is output column % OUTPUTS of set column // OUTPUTS; if GROUPED, a
    bag has one set, its own.
    """
    inside = column < COLUMNS
    set_row = column
    if GROUPED:
        weight_p_ptr += bag * OUTPUTS * P
        set_row = column + bag.to(tl.int32) * OUTPUTS
    if P > 0:
        position = ((t + row) % n_positions).to(tl.int64)
        z = load_tile(p_ptr, position, p_t, valid, 0, P, BLOCK_P)
        w = load_tile(weight_p_ptr, column, P, inside, 0, P, BLOCK_P)
        if not DIRECT:
            z = _deviations(z, mean, 0, P, BLOCK_P)
        acc = tl.dot(z.to(w.dtype), tl.trans(w), acc, input_precision=PRECISION)
    if DIRECT:
        weight_sum = tl.load(weight_sum_ptr + set_row, mask=inside, other=0.0)
        acc -= mean[:, None] * weight_sum[None, :]
    acc *= row_factors(rstd_ptr, t + row, valid, eps)[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + set_row, mask=inside, other=0.0).to(tl.float32)[None, :]
    offset = column
    if OUTPUTS < COLUMNS:
        offset = (column // OUTPUTS).to(tl.int64) * n_total * OUTPUTS + column % OUTPUTS
    pointer = y_ptr + t * OUTPUTS + row[:, None] * OUTPUTS + offset[None, :]
    tl.store(pointer, acc.to(y_ptr.dtype.element_ty), mask=valid[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["n_bags", "n_total", "n_rows", "n_positions"])
def project_kernel(
    x_ptr, p_ptr, weight_ptr, weight_p_ptr, weight_sum_ptr, bias_ptr, offsets_ptr,
    mean_ptr, rstd_ptr, y_ptr, x_t, p_t, n_bags, n_total, n_rows, n_positions, eps,
    COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, NARROW: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr, GROUPED: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """y[s, t, o] = sum_w weight[s, o, w] zhat[t, w] + bias[s, o] for BLOCK_T rows of one bag.

    weight [S O, D] and weight_p [S O, P] are centred (centre_weights_kernel), y [S, T, O]. DIRECT:
    rstd (weight z - mean sum_w weight[w]) + bias, with z as it lies in memory; otherwise the mean
    is subtracted from z in registers, before the product. GROUPED: one weight set for each bag, and
    the rows of a slot belong to one bag.

    A program has BLOCK_T rows and BLOCK_O outputs, and NARROW more outputs beside these. Their fp32
    sums stay in registers through the loop over the channels, which reads each tile of x once for
    both blocks. The programs of all outputs of the same rows have neighbouring numbers, so that
    they run together and find the rows in the second-level cache. Rows behind the chunk's end
    and columns behind COLUMNS are loaded as zeros and not stored.
    """
    program = tl.program_id(0)
    WIDTH: tl.constexpr = BLOCK_O + NARROW
    tiles: tl.constexpr = (COLUMNS + WIDTH - 1) // WIDTH
    slot = program // tiles
    bag, origin, start, stop = chunk_of_slot(slot, offsets_ptr, n_bags, n_rows, BLOCK_T, GROUPED)
    if start >= stop:
        return
    row = tl.arange(0, BLOCK_T)
    valid = row < stop - start
    t = origin + start
    x_ptr += t * x_t
    if GROUPED:
        weight_ptr += bag * OUTPUTS * D
    column = program % tiles * WIDTH + tl.arange(0, BLOCK_O)
    acc = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    if NARROW > 0:
        narrow_column = program % tiles * WIDTH + BLOCK_O + tl.arange(0, NARROW)
        narrow = tl.zeros([BLOCK_T, NARROW], tl.float32)
    mean = tl.load(mean_ptr + t + row, mask=valid, other=0.0)
    for d0 in range(0, D, BLOCK_D):
        z = load_tile(x_ptr, row, x_t, valid, d0, D, BLOCK_D)
        w = load_tile(weight_ptr, column, D, column < COLUMNS, d0, D, BLOCK_D)
        if not DIRECT:
            z = _deviations(z, mean, d0, D, BLOCK_D).to(w.dtype)
        acc = tl.dot(z, tl.trans(w), acc, input_precision=PRECISION)
        if NARROW > 0:
            w = load_tile(weight_ptr, narrow_column, D, narrow_column < COLUMNS, d0, D, BLOCK_D)
            narrow = tl.dot(z, tl.trans(w), narrow, input_precision=PRECISION)
    finish_projection(
        acc, column, row, valid, t, bag, mean, p_ptr, weight_p_ptr, weight_sum_ptr, bias_ptr,
        rstd_ptr, y_ptr, p_t, n_total, n_positions, eps, COLUMNS, OUTPUTS, P, BLOCK_P, GROUPED,
        DIRECT,
    )  # fmt: skip
    if NARROW > 0:
        finish_projection(
            narrow, narrow_column, row, valid, t, bag, mean, p_ptr, weight_p_ptr, weight_sum_ptr,
            bias_ptr, rstd_ptr, y_ptr, p_t, n_total, n_positions, eps, COLUMNS, OUTPUTS, P, BLOCK_P,
            GROUPED, DIRECT,
        )  # fmt: skip


@triton.jit
def add_positions(
    acc, a, p_ptr, p_t, t, valid, n_positions, mean_ptr, rstd_ptr,
    P: tl.constexpr, BLOCK_P: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Return acc + a[t]^T p[t mod n_positions], [BLOCK_O, BLOCK_P], for a tile a of rows t.

    SCALED: a has been multiplied by rstd, and p is multiplied as it lies in memory; otherwise p is
    normalised first.
    """
    p = load_tile(p_ptr, (t % n_positions).to(tl.int64), p_t, valid, 0, P, BLOCK_P).to(tl.float32)
    if not SCALED:
        mean = tl.load(mean_ptr + t, mask=valid, other=0.0)
        rstd = tl.load(rstd_ptr + t, mask=valid, other=0.0)
        p = _deviations(p, mean, 0, P, BLOCK_P) * rstd[:, None]
    return tl.dot(tl.trans(a), p.to(a.dtype), acc, input_precision=PRECISION)


@triton.jit
def store_side(
    side_ptr, slot, column, sums, places, start, stop, COLUMNS: tl.constexpr, P: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write side[slot, column] = [sums | places], unless the slot has no rows."""
    valid = (column < COLUMNS) & (start < stop)
    at = (slot.to(tl.int64) * COLUMNS + column) * (1 + P)
    tl.store(side_ptr + at, sums, mask=valid)
    if P > 0:
        place = tl.arange(0, BLOCK_P)
        mask = valid[:, None] & (place < P)[None, :]
        tl.store(side_ptr + at[:, None] + 1 + place[None, :], places, mask=mask)


@triton.jit(do_not_specialize=["n_rows", "n_positions"])
def scale_gradient_kernel(
    grad_ptr, p_ptr, mean_ptr, rstd_ptr, scaled_ptr, side_ptr, p_t, n_rows, n_positions, eps,
    COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sum the gradient [S, T, O] of y over one chunk of rows, alone and times the positions.

    side[slot, column] = [sum_t grad | sum_t grad phat[t]^T]. If `scaled` [T, S O] is given, grad
    rstd is written to it, by which the tokens are then pooled as they lie in memory.
    """
    slot = tl.program_id(0)
    start = slot * CHUNK
    stop = tl.minimum(start + CHUNK, n_rows)
    column = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    grad_column = column.to(tl.int64)
    if OUTPUTS < COLUMNS:
        grad_column = (column // OUTPUTS).to(tl.int64) * n_rows * OUTPUTS + column % OUTPUTS
    sums = tl.zeros([BLOCK_O], tl.float32)
    places = tl.zeros([BLOCK_O, BLOCK_P], tl.float32)
    for t0 in range(start, stop, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T).to(tl.int64)
        valid = t < stop
        mask = valid[:, None] & (column < COLUMNS)[None, :]
        grad = tl.load(grad_ptr + t[:, None] * OUTPUTS + grad_column[None, :], mask=mask, other=0.0)
        sums += tl.sum(grad.to(tl.float32), 0)
        if scaled_ptr is not None:
            factor = row_factors(rstd_ptr, t, valid, eps)
            grad = (grad.to(tl.float32) * factor[:, None]).to(grad.dtype)
            tl.store(scaled_ptr + t[:, None] * COLUMNS + column[None, :], grad, mask=mask)
        if P > 0:
            places = add_positions(
                places, grad, p_ptr, p_t, t, valid, n_positions, mean_ptr, rstd_ptr, P, BLOCK_P,
                scaled_ptr is not None,
            )  # fmt: skip
    store_side(side_ptr, slot, column, sums, places, start, stop, COLUMNS, P, BLOCK_P)


@triton.jit
def pool_program(
    n_slots, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Return a program's slot, its first channel of x, and its first output.

    Slots are taken from the last to the first. A projection runs before and after, from the first
    row to the last: its last rows are still in the second-level cache when the pooling
    begins, and the pooling's last rows are in it when the next projection begins.
    """
    program = tl.program_id(0)
    o_tiles: tl.constexpr = (COLUMNS + WIDTH - 1) // WIDTH
    d_tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    slot = n_slots - 1 - program // (o_tiles * d_tiles)
    return slot, program // o_tiles % d_tiles * BLOCK_D, program % o_tiles * WIDTH


@triton.jit
def store_pooled(partial_ptr, acc, slot, column, d, COLUMNS: tl.constexpr, D: tl.constexpr):
    """partial[slot, column, d] = acc[column, d]."""
    out = partial_ptr + (slot.to(tl.int64) * COLUMNS + column[:, None]) * D + d[None, :]
    tl.store(out, acc, mask=(column < COLUMNS)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["n_bags", "n_rows", "n_slots"])
def pool_kernel(
    a_ptr, x_ptr, mean_ptr, rstd_ptr, offsets_ptr, partial_ptr, a_s, a_units, x_t, n_bags, n_rows,
    n_slots, A_UNIT: tl.constexpr,
    COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, NARROW: tl.constexpr, BLOCK_D: tl.constexpr,
    RAGGED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """partial[slot, o, d] = sum_t a[t, o] (x[t, d] - mean[t]) rstd[t] over one chunk of rows.

    a [S, T, O], partial [slots, S O, D] in fp32. SCALED: sum_t a[t, o] x[t, d], both as they lie in
    memory: a has been multiplied by rstd, and combine_pool_kernel subtracts the mean from the sums.
    a_units A_UNIT is the stride of a's rows: see _pool_by_pointers.

    A program has BLOCK_O outputs, NARROW more beside them, and BLOCK_D channels of x. Their fp32
    sums stay in registers through the loop over the chunk's rows. Every chunk has a slot of its own
    in `partial`, so that no two programs add to the same number.
    """
    WIDTH: tl.constexpr = BLOCK_O + NARROW
    slot, d0, first_column = pool_program(n_slots, COLUMNS, WIDTH, D, BLOCK_D)
    _, origin, start, stop = chunk_of_slot(slot, offsets_ptr, n_bags, n_rows, CHUNK, RAGGED)
    if start >= stop:
        return
    column = first_column + tl.arange(0, BLOCK_O)
    first = origin + start
    length = stop - start
    a_t = a_units * A_UNIT
    a_ptr += first * a_t
    x_ptr += first * x_t
    mean_ptr += first
    rstd_ptr += first
    a_column = column
    if OUTPUTS < COLUMNS:
        a_column = (column // OUTPUTS).to(tl.int64) * a_s + column % OUTPUTS
    acc = tl.zeros([BLOCK_O, BLOCK_D], tl.float32)
    if NARROW > 0:  # only with one set, where OUTPUTS is COLUMNS and a's column is the output
        narrow_column = first_column + BLOCK_O + tl.arange(0, NARROW)
        narrow = tl.zeros([NARROW, BLOCK_D], tl.float32)
    for t0 in range(0, length, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        valid = t < length
        mask = valid[:, None] & (column < COLUMNS)[None, :]
        a = tl.load(a_ptr + t[:, None] * a_t + a_column[None, :], mask=mask, other=0.0)
        x = load_tile(x_ptr, t, x_t, valid, d0, D, BLOCK_D)
        if not SCALED:
            mean = tl.load(mean_ptr + t, mask=valid, other=0.0)
            rstd = tl.load(rstd_ptr + t, mask=valid, other=0.0)
            x = (_deviations(x, mean, d0, D, BLOCK_D) * rstd[:, None]).to(a.dtype)
        acc = tl.dot(tl.trans(a), x, acc, input_precision=PRECISION)
        if NARROW > 0:
            mask = valid[:, None] & (narrow_column < COLUMNS)[None, :]
            a = tl.load(a_ptr + t[:, None] * a_t + narrow_column[None, :], mask=mask, other=0.0)
            narrow = tl.dot(tl.trans(a), x, narrow, input_precision=PRECISION)
    d = d0 + tl.arange(0, BLOCK_D)
    store_pooled(partial_ptr, acc, slot, column, d, COLUMNS, D)
    if NARROW > 0:
        store_pooled(partial_ptr, narrow, slot, narrow_column, d, COLUMNS, D)


@triton.jit(do_not_specialize=["n_rows", "n_side"])
def combine_pool_kernel(
    partial_ptr, side_ptr, offsets_ptr, pooled_ptr, mass_ptr, out_ptr, sums_ptr, n_rows, n_side,
    COLUMNS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr,
    SIDE_CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Add the chunks of one bag and column in order, and subtract the mean over the width.

    out[bag, column] = v - mean(v), v = [sum_j partial[slot + j] | sum_j places of side], and
    sums[bag, column] = sum_j sums of side. `partial` and `side` have chunks of different lengths.
    If pooled is given, the sums would be zero but for rounding, and out -= sums / mass pooled
    removes what that added (see _backward_of in absorbed_attention/operator.py). A program has the
    D + P numbers of one row in registers.
    """
    row = tl.program_id(0)
    bag = row // COLUMNS
    column = row % COLUMNS
    d = tl.arange(0, BLOCK_D)
    place = tl.arange(0, BLOCK_P)
    out = tl.zeros([BLOCK_D], tl.float32)
    slot, chunks = chunks_of_bag(bag, offsets_ptr, n_rows, CHUNK, RAGGED)
    for chunk in range(0, chunks):
        at = ((slot + chunk).to(tl.int64) * COLUMNS + column) * D
        out += tl.load(partial_ptr + at + d, mask=d < D, other=0.0)
    sums = tl.zeros([1], tl.float32)
    places = tl.zeros([BLOCK_P], tl.float32)
    slot, chunks = chunks_of_bag(bag, offsets_ptr, n_side, SIDE_CHUNK, RAGGED)
    for j0 in range(0, chunks, 16):
        j = j0 + tl.arange(0, 16)
        valid = j < chunks
        at = ((slot + j).to(tl.int64) * COLUMNS + column) * (1 + P)
        sums += tl.sum(tl.load(side_ptr + at, mask=valid, other=0.0), 0)
        if P > 0:
            mask = valid[:, None] & (place < P)[None, :]
            part = tl.load(side_ptr + at[:, None] + 1 + place[None, :], mask=mask, other=0.0)
            places += tl.sum(part, 0)
    mean = (tl.sum(out, 0) + tl.sum(places, 0)) / (D + P)
    out -= mean
    places -= mean
    row = row.to(tl.int64)
    if sums_ptr is not None:
        tl.store(sums_ptr + row + tl.arange(0, 1), sums.to(sums_ptr.dtype.element_ty))
    at = row * (D + P)
    if pooled_ptr is not None:
        mass = tl.load(mass_ptr + row).to(tl.float32)
        share = tl.sum(sums, 0) / tl.where(mass > 0, mass, 1.0)
        out -= share * tl.load(pooled_ptr + at + d, mask=d < D, other=0.0).to(tl.float32)
        if P > 0:
            token = tl.load(pooled_ptr + at + D + place, mask=place < P, other=0.0)
            places -= share * token.to(tl.float32)
    tl.store(out_ptr + at + d, out.to(out_ptr.dtype.element_ty), mask=d < D)
    if P > 0:
        tl.store(out_ptr + at + D + place, places.to(out_ptr.dtype.element_ty), mask=place < P)
