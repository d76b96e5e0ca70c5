"""Triton kernels that read a context once: LayerNorm folded into projections and into pools.

Row t of the context is z_t = [x_t | p_(t mod Np)], of width W = D + P, and zhat_t = (z_t - mean_t)
rstd_t. Neither the concatenation nor zhat is ever written. Ragged rows are cut in chunks that are
counted from the start of each bag, so that a bag alone gives what it gives in any batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# One tf32 product costs 1e-2 absolute; three are as good as fp32. Half precision ignores it.
PRECISION = tl.constexpr("tf32x3")

# Dtypes whose raw x goes to the matrix units, the mean taken out afterwards. bf16 has 8 bits: what
# the fp32 sums lose at mean/SD 100 (1e-3 at worst) is below its rounding. Others subtract first.
_DIRECT = (torch.bfloat16,)


def project(
    x: Tensor,
    p: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight zhat + bias and the statistics of the rows, reading x from memory once.

    Programs that share rows are neighbours in the grid and read them through the second-level
    cache: 128 outputs, on Hopper 256, fit in one program's registers, and 1,648 are needed.

    Args:
        x: [T, D], last stride 1.
        p: [Np, P] positional channels, T a multiple of Np; or None.
        weight: contiguous [S, O, W], of the dtype to work in.
        bias: [S, O] or None.
        offsets: None, and every weight set sees every row; or int64 [S + 1] on the device, and set
            s sees rows offsets[s] to offsets[s + 1].
        mean, rstd: fp32 [T] if known, else None.
        eps: LayerNorm's.

    Returns:
        [S, T, O], or [T, O] with offsets, of weight's dtype; mean and rstd, fp32 [T].
    """
    rows, width = x.shape
    sets, outputs, total = weight.shape
    grouped = offsets is not None
    given = mean is not None
    direct = x.dtype == weight.dtype and x.dtype in _DIRECT
    columns = outputs if grouped else sets * outputs
    # 256 outputs spill on sm_80 (2 stores) and sm_100 (16), where operands pass through registers.
    widest = 256 if direct and capability(x) == 90 else 128
    block_o = _output_block(columns, widest)
    half = weight.element_size() == 2 and x.element_size() == 2
    # Of the others, 128 rows by 128 outputs with statistics spill on sm_100 (2 stores).
    block_t, block_d = (128 if direct or given else 64, 64) if half else (64, 32)
    y = torch.empty(
        (rows, outputs) if grouped else (sets, rows, outputs), dtype=weight.dtype, device=x.device
    )
    if mean is None or rstd is None:
        own = {"dtype": torch.float32, "device": x.device}
        mean, rstd = torch.empty(rows, **own), torch.empty(rows, **own)
    # An odd W would leave every row of the weight unaligned, without asynchronous copies.
    weight_x = weight if p is None else weight[..., :width].contiguous()
    slots = count_slots(rows, sets, block_t) if grouped else triton.cdiv(rows, block_t)
    if rows and y.numel():
        with torch.cuda.device_of(x):
            _project[(slots * triton.cdiv(columns, block_o),)](
                x, p, weight_x, weight, bias,
                weight.sum(-1, dtype=torch.float32) if direct else None,
                offsets, mean, rstd, y, x.stride(0), 0 if p is None else p.stride(0),
                sets, rows, 0 if grouped else rows, 1 if p is None else p.shape[0], eps,
                COLUMNS=columns, OUTPUTS=outputs, D=width, P=total - width,
                BLOCK_T=block_t, BLOCK_O=block_o, BLOCK_D=block_d,
                BLOCK_P=max(16, triton.next_power_of_2(total - width)),
                GROUPED=grouped, GIVEN=given, DIRECT=direct,
                num_warps=8 if block_t * block_o > 64 * 64 else 4, num_stages=3,
            )  # fmt: skip
    return y, mean, rstd


def pool(
    a: Tensor,
    x: Tensor,
    p: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    offsets: Tensor | None,
    groups: int = 1,
) -> Tensor:
    """Return sum_t a[t] zhat[t]^T over the rows t of each bag, in fp32 and in a fixed order.

    Rows are cut in chunks of 16 times the number of outputs, 512 to 16,384 rows, so that the
    partial results take an eighth of a 16-bit x at most (a fifth for 1,648 outputs), and one more
    result per bag.

    Args:
        a: [T, O], or [S, T, O] with one bag; its dtype is the one to work in.
        x, p: as given to project.
        mean, rstd: fp32 [T].
        offsets: int64 [G + 1] on the device: bag g owns rows offsets[g] to offsets[g + 1].
        groups: without offsets, the number of equally long bags.

    Returns:
        fp32 [G, O, W], or [S, O, W] for a of three axes.
    """
    if a.stride(-1) != 1:  # the gradient of a sum, say
        a = a.contiguous()
    rows, width = x.shape
    outputs = a.shape[-1]
    sets = a.shape[0] if a.ndim == 3 else 1
    columns = sets * outputs
    bags = groups if offsets is None else offsets.shape[0] - 1
    length = rows // groups if offsets is None else 0
    chunk = max(512, min(16384, triton.next_power_of_2(16 * columns)))
    slots = (
        groups * triton.cdiv(length, chunk) if offsets is None else count_slots(rows, bags, chunk)
    )
    total = width + (0 if p is None else p.shape[1])
    own = {"dtype": torch.float32, "device": x.device}
    out = torch.empty(sets if a.ndim == 3 else bags, outputs, total, **own)
    if not out.numel():
        return out
    partial = torch.empty(slots, columns, total, **own)
    block_o = _output_block(columns, 128)
    with torch.cuda.device_of(x):
        for part, at in ((x, 0), (p, width)):
            if part is None or not slots:
                continue
            own_width = part.shape[1]
            # Triton takes no notice of strides that 8 divides but not 16, such as 200 outputs'.
            unit = 8 if a.stride(-2) % 8 == 0 else 1
            direct = part.dtype == a.dtype and part.dtype in _DIRECT
            half = a.element_size() == 2 and part.element_size() == 2
            # 128 by 128 spill where the outputs do not fill the last block (14 to 38 stores).
            block_d = 64 if own_width > 32 else 32
            _pool[(slots * triton.cdiv(own_width, block_d) * triton.cdiv(columns, block_o),)](
                a, part, mean, rstd, offsets, partial, a.stride(0) if a.ndim == 3 else 0,
                a.stride(-2) // unit, part.stride(0), at, total, bags, length, part.shape[0],
                A_UNIT=unit, COLUMNS=columns, OUTPUTS=outputs, D=own_width, CHUNK=chunk,
                BLOCK_T=64 if half else 32, BLOCK_O=block_o, BLOCK_D=block_d,
                RAGGED=offsets is not None, REPEATED=part.shape[0] != rows, DIRECT=direct,
                num_warps=8 if block_d * block_o > 64 * 64 else 4, num_stages=3,
            )  # fmt: skip
        size = columns * total
        _combine_pool[(triton.cdiv(size, 128), bags)](
            partial, offsets, out, length, size, CHUNK=chunk, RAGGED=offsets is not None,
            num_warps=4,
        )  # fmt: skip
    return out


def count_slots(rows: int, bags: int, chunk: int) -> int:
    """Return how many programs chunk_of_slot can need, whatever the offsets are."""
    return rows // chunk + bags


def capability(x: Tensor) -> int:
    """Return 90 for compute capability 9.0; 0 where the interpreter runs the kernels."""
    if not x.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def _output_block(columns: int, widest: int) -> int:
    """Return the block that reads least from cache, 128 rows and its own columns per program."""
    if columns <= 64:
        return max(16, triton.next_power_of_2(columns))
    blocks = [block for block in (64, 128, 256) if block <= widest]
    return min(blocks, key=lambda block: triton.cdiv(columns, block) * (128 + block))


@triton.jit
def chunk_of_slot(
    slot, offsets_ptr, n_bags, n_rows, CHUNK: tl.constexpr, RAGGED: tl.constexpr
):  # fmt: skip
    """Return a slot's bag, the bag's first row, and where the chunk starts and stops in the bag.

    Bag b's chunks take the slots from offsets[b] // CHUNK + b on. That rises from bag to bag by at
    least ceil(length / CHUNK), so that no scan over the bags and no map is needed; a slot left over
    starts behind its bag's end. Without offsets, bags have n_rows rows each and start at row 0 of
    their own.
    """
    if RAGGED:
        before = 0
        for b0 in range(0, n_bags, 128):
            b = b0 + tl.arange(0, 128)
            first = tl.load(offsets_ptr + b, mask=b < n_bags, other=0) // CHUNK + b
            before += tl.sum(((first <= slot) & (b < n_bags)).to(tl.int32), 0)
        bag = (before - 1).to(tl.int64)
        origin = tl.load(offsets_ptr + bag)
        length = (tl.load(offsets_ptr + bag + 1) - origin).to(tl.int32)
        start = (slot - origin // CHUNK - bag).to(tl.int32) * CHUNK
    else:
        chunks = (n_rows + CHUNK - 1) // CHUNK
        bag = (slot // chunks).to(tl.int64)
        origin = bag * 0
        length = n_rows
        start = slot % chunks * CHUNK
    return bag, origin, start, tl.minimum(start + CHUNK, length)


@triton.jit
def chunks_of_bag(bag, offsets_ptr, n_rows, CHUNK: tl.constexpr, RAGGED: tl.constexpr):
    """Return a bag's first slot and its number of chunks; see chunk_of_slot."""
    bag = bag.to(tl.int64)
    if RAGGED:
        origin = tl.load(offsets_ptr + bag)
        length = (tl.load(offsets_ptr + bag + 1) - origin).to(tl.int32)
        slot = origin // CHUNK + bag
        chunks = (length + CHUNK - 1) // CHUNK
    else:
        chunks = (n_rows + CHUNK - 1) // CHUNK
        slot = bag * chunks
    return slot, chunks


@triton.jit
def _load_tile(base, row, stride, valid, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load columns first to first + BLOCK of rows of width WIDTH, zeros elsewhere."""
    column = first + tl.arange(0, BLOCK)
    pointer = base + row[:, None] * stride + column[None, :]
    if WIDTH % BLOCK == 0:
        return tl.load(pointer, mask=valid[:, None], other=0.0)
    return tl.load(pointer, mask=valid[:, None] & (column[None, :] < WIDTH), other=0.0)


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
def _project(
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
        block = _load_tile(x_ptr, row, x_t, valid, 0, D, BLOCK_D)
        pivot = tl.sum(block.to(tl.float32), 1) / min(D, BLOCK_D)
    weight_sum = tl.zeros([BLOCK_O], tl.float32)
    count = 0.0
    for d0 in range(0, D, BLOCK_D):
        z = _load_tile(x_ptr, row, x_t, valid, d0, D, BLOCK_D)
        w = _load_tile(weight_ptr, column, D, wanted, d0, D, BLOCK_D)
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
        z = _load_tile(p_ptr, position, p_t, valid, 0, P, BLOCK_P)
        w = _load_tile(weight_p_ptr + D, column, D + P, wanted, 0, P, BLOCK_P)
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
def _pool(
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
        x = _load_tile(x_ptr, row, x_t, valid, d0, D, BLOCK_D)
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
def _combine_pool(
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
