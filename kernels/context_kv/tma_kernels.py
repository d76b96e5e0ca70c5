"""The products with the tokens on Hopper and Blackwell; triton.py says how they are launched.

The tensor memory accelerator (TMA) loads the tiles, from tensors that descriptors describe: one
thread starts the copy of a tile into shared memory, and no registers are needed for addresses or
data. There are no masks: rows and columns behind the end of the tensor read as zeros. Rows behind
the end of a bag do not: they are those of the next bag, and the kernels must drop them.
"""

import triton
import triton.language as tl

from ..ragged_kernels import chunk_of_slot
from .triton_kernels import finish_projection, pool_program, store_pooled


@triton.jit
def _chunk_of_slot(
    slot, offsets_ptr, n_bags, n_rows, CHUNK: tl.constexpr, BAGS: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """Return what chunk_of_slot does, without its loop over the bags: BAGS is at least n_bags.

    In project_tma_kernel the loop over channels must be the only one inside that over tiles: so the
    two become one (`flatten`). Without offsets all rows are of one bag.
    """
    if RAGGED:
        b = tl.arange(0, BAGS)
        first = tl.load(offsets_ptr + b, mask=b < n_bags, other=0) // CHUNK + b
        bag = (tl.sum(((first <= slot) & (b < n_bags)).to(tl.int32), 0) - 1).to(tl.int64)
        origin = tl.load(offsets_ptr + bag)
        length = (tl.load(offsets_ptr + bag + 1) - origin).to(tl.int32)
        start = (slot - origin // CHUNK - bag).to(tl.int32) * CHUNK
    else:
        bag = (slot * 0).to(tl.int64)
        origin = bag
        length = n_rows
        start = slot * CHUNK
    return bag, origin, start, tl.minimum(start + CHUNK, length)


@triton.jit
def _project_tile(
    x_desc, weight_desc, narrow_desc, p_ptr, weight_p_ptr, weight_sum_ptr, bias_ptr, mean_ptr,
    rstd_ptr, y_ptr, p_t, bag, t, length, first_column, n_total, n_positions, eps,
    COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, NARROW: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """Compute and store y of up to BLOCK_T rows from t on, of which the first `length` are the
    bag's.

    The sums of a tile, BLOCK_T x (BLOCK_O + NARROW), stay in registers while the loop goes through
    the channels; a tile of x is read once and multiplied with both blocks of weights.
    """
    first_row = first_column
    if GROUPED:  # weights of the next bag may be loaded too; their columns are not stored
        first_row = bag.to(tl.int32) * OUTPUTS + first_column
    acc = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    if NARROW > 0:
        narrow = tl.zeros([BLOCK_T, NARROW], tl.float32)
    t_index = t.to(tl.int32)
    for d0 in range(0, D, BLOCK_D):
        x = x_desc.load([t_index, d0])
        acc = tl.dot(x, weight_desc.load([first_row, d0]).T, acc)
        if NARROW > 0:
            narrow = tl.dot(x, narrow_desc.load([first_row + BLOCK_O, d0]).T, narrow)
    row = tl.arange(0, BLOCK_T)
    valid = row < length
    mean = tl.load(mean_ptr + t + row, mask=valid, other=0.0)
    column = first_column + tl.arange(0, BLOCK_O)
    finish_projection(
        acc, column, row, valid, t, bag, mean, p_ptr, weight_p_ptr, weight_sum_ptr, bias_ptr,
        rstd_ptr, y_ptr, p_t, n_total, n_positions, eps, COLUMNS, OUTPUTS, P, BLOCK_P, GROUPED,
        True,
    )  # fmt: skip
    if NARROW > 0:
        column = first_column + BLOCK_O + tl.arange(0, NARROW)
        finish_projection(
            narrow, column, row, valid, t, bag, mean, p_ptr, weight_p_ptr, weight_sum_ptr, bias_ptr,
            rstd_ptr, y_ptr, p_t, n_total, n_positions, eps, COLUMNS, OUTPUTS, P, BLOCK_P, GROUPED,
            True,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_bags", "n_total", "n_rows", "n_positions", "n_full", "n_half"])
def project_tma_kernel(
    x_desc, half_desc, weight_desc, narrow_desc, p_ptr, weight_p_ptr, weight_sum_ptr, bias_ptr,
    offsets_ptr, mean_ptr, rstd_ptr, y_ptr, p_t, n_bags, n_total, n_rows, n_positions, eps,
    n_full, n_half,
    COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, NARROW: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr, GROUPED: tl.constexpr, BAGS: tl.constexpr,
):  # fmt: skip
    """Compute what project_kernel does with DIRECT, by one program for each multiprocessor.

    A program computes every n_programs-th of n_full tiles of BLOCK_T rows; then, if its number is
    below n_half, one tile of half as many rows. So all programs end at about the same time (see
    _waves in triton.py). Programs with neighbouring numbers have the same rows and other outputs,
    and read the rows at the same time. `flatten` makes one loop of those over tiles and over
    channels, so that the operands of the next tile are loaded while the results of this one are
    stored. Slots that no chunk of a bag takes have no valid rows, and store nothing.
    """
    WIDTH: tl.constexpr = BLOCK_O + NARROW
    o_tiles: tl.constexpr = (COLUMNS + WIDTH - 1) // WIDTH
    program = tl.program_id(0)
    n_programs = tl.num_programs(0)
    for tile in tl.range(program, n_full, n_programs, flatten=True):
        slot = tile // o_tiles
        bag, origin, start, stop = _chunk_of_slot(
            slot, offsets_ptr, n_bags, n_rows, BLOCK_T, BAGS, GROUPED
        )
        _project_tile(
            x_desc, weight_desc, narrow_desc, p_ptr, weight_p_ptr, weight_sum_ptr, bias_ptr,
            mean_ptr, rstd_ptr, y_ptr, p_t, bag, origin + start, stop - start,
            tile % o_tiles * WIDTH, n_total, n_positions, eps, COLUMNS, OUTPUTS, D, P, BLOCK_T,
            BLOCK_O, NARROW, BLOCK_D, BLOCK_P, GROUPED,
        )  # fmt: skip
    if program < n_half:
        HALF: tl.constexpr = BLOCK_T // 2
        slot = n_full // o_tiles + program // (2 * o_tiles)
        bag, origin, start, stop = _chunk_of_slot(
            slot, offsets_ptr, n_bags, n_rows, BLOCK_T, BAGS, GROUPED
        )
        start += program // o_tiles % 2 * HALF
        _project_tile(
            half_desc, weight_desc, narrow_desc, p_ptr, weight_p_ptr, weight_sum_ptr, bias_ptr,
            mean_ptr, rstd_ptr, y_ptr, p_t, bag, origin + start, stop - start,
            program % o_tiles * WIDTH, n_total, n_positions, eps, COLUMNS, OUTPUTS, D, P, HALF,
            BLOCK_O, NARROW, BLOCK_D, BLOCK_P, GROUPED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_bags", "n_rows", "n_slots"])
def pool_tma_kernel(
    a_desc, narrow_desc, x_desc, offsets_ptr, partial_ptr, n_bags, n_rows, n_slots,
    COLUMNS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr, NARROW: tl.constexpr, BLOCK_D: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Compute what pool_kernel does with SCALED, both operands from shared memory.

    The product is computed as x^T a, [BLOCK_D, BLOCK_O], not as a^T x: matrix units take rows by 64
    but columns by 8, and the outputs may be 136. The loop reads full blocks of rows without a mask;
    the rows from `tail` on, fewer than a block, come after it, and those behind the bag's end are
    set to zero: they are the next bag's.
    """
    WIDTH: tl.constexpr = BLOCK_O + NARROW
    slot, d0, o0 = pool_program(n_slots, COLUMNS, WIDTH, D, BLOCK_D)
    _, origin, start, stop = chunk_of_slot(slot, offsets_ptr, n_bags, n_rows, CHUNK, RAGGED)
    if start >= stop:
        return
    first = (origin + start).to(tl.int32)
    end = (origin + stop).to(tl.int32)
    tail = first + (end - first) // BLOCK_T * BLOCK_T
    acc = tl.zeros([BLOCK_D, BLOCK_O], tl.float32)
    if NARROW > 0:
        narrow = tl.zeros([BLOCK_D, NARROW], tl.float32)
    for t in range(first, tail, BLOCK_T):
        x = x_desc.load([t, d0]).T
        acc = tl.dot(x, a_desc.load([t, o0]), acc)
        if NARROW > 0:
            narrow = tl.dot(x, narrow_desc.load([t, o0 + BLOCK_O]), narrow)
    if tail < end:
        valid = (tail + tl.arange(0, BLOCK_T) < end)[:, None]
        x = tl.where(valid, x_desc.load([tail, d0]), 0.0).T
        acc = tl.dot(x, tl.where(valid, a_desc.load([tail, o0]), 0.0), acc)
        if NARROW > 0:
            a = tl.where(valid, narrow_desc.load([tail, o0 + BLOCK_O]), 0.0)
            narrow = tl.dot(x, a, narrow)
    d = d0 + tl.arange(0, BLOCK_D)
    store_pooled(partial_ptr, acc.T, slot, o0 + tl.arange(0, BLOCK_O), d, COLUMNS, D)
    if NARROW > 0:
        column = o0 + BLOCK_O + tl.arange(0, NARROW)
        store_pooled(partial_ptr, narrow.T, slot, column, d, COLUMNS, D)
