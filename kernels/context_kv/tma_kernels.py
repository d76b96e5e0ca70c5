"""The products with the tokens on Hopper and Blackwell; triton.py says how they are launched.

Tiles come by the tensor memory accelerator (TMA), from tensors that descriptors describe: one
thread asks for a whole tile, so that no register holds an address, and rows or columns beyond the
tensor read as zeros. Rows beyond a bag do not: they are the next bag's.
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
    """Return what chunk_of_slot does, without a loop: BAGS is at least n_bags.

    Without offsets all rows are of one bag.
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
    x_desc, weight_desc, rest_desc, p_ptr, weight_p_ptr, weight_sum_ptr, bias_ptr, mean_ptr,
    rstd_ptr, y_ptr, p_t, bag, t, length, first_column, n_total, n_positions, eps,
    COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, REST: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """Compute y of up to BLOCK_T rows from t on, of which `length` are the bag's."""
    first_row = first_column
    if GROUPED:  # what is loaded beyond the bag's own weights is not stored
        first_row = bag.to(tl.int32) * OUTPUTS + first_column
    acc = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    if REST > 0:
        rest = tl.zeros([BLOCK_T, REST], tl.float32)
    t_index = t.to(tl.int32)
    for d0 in range(0, D, BLOCK_D):
        x = x_desc.load([t_index, d0])
        acc = tl.dot(x, weight_desc.load([first_row, d0]).T, acc)
        if REST > 0:
            rest = tl.dot(x, rest_desc.load([first_row + BLOCK_O, d0]).T, rest)
    row = tl.arange(0, BLOCK_T)
    valid = row < length
    mean = tl.load(mean_ptr + t + row, mask=valid, other=0.0)
    column = first_column + tl.arange(0, BLOCK_O)
    finish_projection(
        acc, column, row, valid, t, bag, mean, p_ptr, weight_p_ptr, weight_sum_ptr, bias_ptr,
        rstd_ptr, y_ptr, p_t, n_total, n_positions, eps, COLUMNS, OUTPUTS, P, BLOCK_P, GROUPED,
        True,
    )  # fmt: skip
    if REST > 0:
        column = first_column + BLOCK_O + tl.arange(0, REST)
        finish_projection(
            rest, column, row, valid, t, bag, mean, p_ptr, weight_p_ptr, weight_sum_ptr, bias_ptr,
            rstd_ptr, y_ptr, p_t, n_total, n_positions, eps, COLUMNS, OUTPUTS, P, BLOCK_P, GROUPED,
            True,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_bags", "n_total", "n_rows", "n_positions", "n_whole", "n_halves"])
def project_tma_kernel(
    x_desc, half_desc, weight_desc, rest_desc, p_ptr, weight_p_ptr, weight_sum_ptr, bias_ptr,
    offsets_ptr, mean_ptr, rstd_ptr, y_ptr, p_t, n_bags, n_total, n_rows, n_positions, eps,
    n_whole, n_halves,
    COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, REST: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr, GROUPED: tl.constexpr, BAGS: tl.constexpr,
):  # fmt: skip
    """Compute what project_kernel does with DIRECT, as many programs as there are multiprocessors.

    Each computes every nth of n_whole tiles of BLOCK_T rows, then perhaps one of n_halves tiles of
    half as many, so that none waits long for the last. Neighbours read the same rows at the same
    time. `flatten` makes one loop of those over tiles and over channels, so that the next tile's
    operands are loaded while this one's results are stored. Tiles beyond their bag, left over,
    store nothing.
    """
    WIDTH: tl.constexpr = BLOCK_O + REST
    o_tiles: tl.constexpr = (COLUMNS + WIDTH - 1) // WIDTH
    program = tl.program_id(0)
    n_programs = tl.num_programs(0)
    for tile in tl.range(program, n_whole, n_programs, flatten=True):
        slot = tile // o_tiles
        bag, origin, start, stop = _chunk_of_slot(
            slot, offsets_ptr, n_bags, n_rows, BLOCK_T, BAGS, GROUPED
        )
        _project_tile(
            x_desc, weight_desc, rest_desc, p_ptr, weight_p_ptr, weight_sum_ptr, bias_ptr, mean_ptr,
            rstd_ptr, y_ptr, p_t, bag, origin + start, stop - start, tile % o_tiles * WIDTH,
            n_total, n_positions, eps, COLUMNS, OUTPUTS, D, P, BLOCK_T, BLOCK_O, REST, BLOCK_D,
            BLOCK_P, GROUPED,
        )  # fmt: skip
    if program < n_halves:
        HALF: tl.constexpr = BLOCK_T // 2
        slot = n_whole // o_tiles + program // (2 * o_tiles)
        bag, origin, start, stop = _chunk_of_slot(
            slot, offsets_ptr, n_bags, n_rows, BLOCK_T, BAGS, GROUPED
        )
        start += program // o_tiles % 2 * HALF
        _project_tile(
            half_desc, weight_desc, rest_desc, p_ptr, weight_p_ptr, weight_sum_ptr, bias_ptr,
            mean_ptr, rstd_ptr, y_ptr, p_t, bag, origin + start, stop - start,
            program % o_tiles * WIDTH, n_total, n_positions, eps, COLUMNS, OUTPUTS, D, P, HALF,
            BLOCK_O, REST, BLOCK_D, BLOCK_P, GROUPED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_bags", "n_rows", "n_slots"])
def pool_tma_kernel(
    a_desc, rest_desc, x_desc, offsets_ptr, partial_ptr, n_bags, n_rows, n_slots,
    COLUMNS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr, REST: tl.constexpr, BLOCK_D: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Compute what pool_kernel does with SCALED, both operands from shared memory.

    The product is x^T a, [BLOCK_D, BLOCK_O]: matrix units take 64 rows at a time, but columns by 8,
    and O may be 136.
    """
    WIDTH: tl.constexpr = BLOCK_O + REST
    slot, d0, o0 = pool_program(n_slots, COLUMNS, WIDTH, D, BLOCK_D)
    _, origin, start, stop = chunk_of_slot(slot, offsets_ptr, n_bags, n_rows, CHUNK, RAGGED)
    if start >= stop:
        return
    first = (origin + start).to(tl.int32)
    end = (origin + stop).to(tl.int32)
    whole = first + (end - first) // BLOCK_T * BLOCK_T
    acc = tl.zeros([BLOCK_D, BLOCK_O], tl.float32)
    if REST > 0:
        rest = tl.zeros([BLOCK_D, REST], tl.float32)
    for t in range(first, whole, BLOCK_T):
        x = x_desc.load([t, d0]).T
        acc = tl.dot(x, a_desc.load([t, o0]), acc)
        if REST > 0:
            rest = tl.dot(x, rest_desc.load([t, o0 + BLOCK_O]), rest)
    if whole < end:  # rows of the next bag count for nothing
        valid = (whole + tl.arange(0, BLOCK_T) < end)[:, None]
        x = tl.where(valid, x_desc.load([whole, d0]), 0.0).T
        acc = tl.dot(x, tl.where(valid, a_desc.load([whole, o0]), 0.0), acc)
        if REST > 0:
            a = tl.where(valid, rest_desc.load([whole, o0 + BLOCK_O]), 0.0)
            rest = tl.dot(x, a, rest)
    d = d0 + tl.arange(0, BLOCK_D)
    store_pooled(partial_ptr, acc.T, slot, o0 + tl.arange(0, BLOCK_O), d, COLUMNS, D)
    if REST > 0:
        column = o0 + BLOCK_O + tl.arange(0, REST)
        store_pooled(partial_ptr, rest.T, slot, column, d, COLUMNS, D)
