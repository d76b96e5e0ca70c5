"""The Triton kernels that multiply with the weights of the heads, around absorbed attention.

Rows have two widths: E, the channels of a head, and W, the channels of a token with its position.
to_tokens_kernel multiplies from E to W (queries into absorbed queries; the gradient of the outputs
into that of pooled), to_heads_kernel from W to E (pooled into outputs; the gradient of absorbed
queries into that of the queries), head_gradients_kernel sums the gradients of the weights over all
bags. Rows of width E, [B, H, C, E], have any strides but a last one of 1; rows of width W are
contiguous [B, H, C, W]. A program of the first two has all channels of up to BLOCK_C latents of one
head and bag: so every result has one writer, and a bag gives the same bits in any batch.
"""

import triton
import triton.language as tl

from ..tile_kernels import load_tile, product


@triton.jit
def _place(program, H: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return a program's bag and head, int64 each, its latents, and which of them exist."""
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = program % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    head = program // tiles
    return (head // H).to(tl.int64), (head % H).to(tl.int64), c, c < C


@triton.jit
def to_tokens_kernel(
    rows_ptr, weight_ptr, y_ptr, y_p_ptr, sums_ptr,
    pooled_ptr, mass_ptr, shift_ptr, dmass_ptr, delta_ptr, rows_b, rows_h, rows_c, scale,
    H: tl.constexpr, C: tl.constexpr, E: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Multiply rows of a head by its weight [H, E, W], y = scale rows weight, and centre them.

    The results are y[n, W - P] and y_p[n, P] = y - mean(y), rounded, and sums[n], the sum of the
    rounded numbers of a row. If pooled [n, W] is given, the rows are the gradient of
    pooled weight^T + mass shift^T, and further results are dmass[n] = sum(rows shift) and
    delta[n] = sum(y pooled) + dmass mass.

    The weight is read twice. mean(y) is needed before the first number of y is stored, and equals
    the rows times the means of the weight's rows: so a first loop sums the weight up, a second one
    multiplies. All of y, C x W numbers, would not fit in registers.
    """
    bag, head, c, valid = _place(tl.program_id(0), H, C, BLOCK_C)
    e = tl.arange(0, BLOCK_E)
    weight_ptr += head * E * W
    rows_ptr += bag * rows_b + head * rows_h
    full = load_tile(rows_ptr, c, rows_c, valid, 0, E, BLOCK_E).to(tl.float32)
    rows = full.to(weight_ptr.dtype.element_ty)
    totals = tl.zeros([BLOCK_E], tl.float32)
    for w0 in range(0, W, BLOCK_W):
        weight = load_tile(weight_ptr, e, W, e < E, w0, W, BLOCK_W)
        totals += tl.sum(weight.to(tl.float32), 1)
    mean = tl.sum(rows.to(tl.float32) * totals[None, :], 1) * (scale / W)
    n = (bag * H + head) * C + c
    sums = tl.zeros([BLOCK_C], tl.float32)
    delta = tl.zeros([BLOCK_C], tl.float32)
    for w0 in range(0, W, BLOCK_W):
        w = w0 + tl.arange(0, BLOCK_W)
        weight = load_tile(weight_ptr, e, W, e < E, w0, W, BLOCK_W)
        y = product(rows, weight, tl.zeros([BLOCK_C, BLOCK_W], tl.float32))
        inside = valid[:, None] & (w < W)[None, :]
        y = tl.where(inside, y * scale - mean[:, None], 0.0).to(y_ptr.dtype.element_ty)
        at = y_ptr + n[:, None] * (W - P) + w[None, :]
        tl.store(at, y, mask=inside & (w < W - P)[None, :])
        if P > 0:
            at = y_p_ptr + n[:, None] * P + w[None, :] - (W - P)
            tl.store(at, y, mask=inside & (w >= W - P)[None, :])
        sums += tl.sum(y.to(tl.float32), 1)
        if pooled_ptr is not None:
            pooled = load_tile(pooled_ptr, n, W, valid, w0, W, BLOCK_W)
            delta += tl.sum(y.to(tl.float32) * pooled.to(tl.float32), 1)
    tl.store(sums_ptr + n, sums, mask=valid)
    if pooled_ptr is not None:
        shift = tl.load(shift_ptr + head * E + e, mask=e < E, other=0.0).to(tl.float32)
        dmass = tl.sum(full * shift[None, :], 1)
        mass = tl.load(mass_ptr + n, mask=valid, other=0.0).to(tl.float32)
        tl.store(dmass_ptr + n, dmass, mask=valid)
        tl.store(delta_ptr + n, delta + dmass * mass, mask=valid)


@triton.jit
def to_heads_kernel(
    rows_ptr, weight_ptr, mass_ptr, shift_ptr, out_ptr, out_b, out_h, out_c, scale,
    H: tl.constexpr, C: tl.constexpr, E: tl.constexpr, W: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Write scale rows weight^T, of rows of width W; plus mass shift^T if mass is given.

    The sum over W runs through the loop, a block of BLOCK_W at a time, in fp32 registers.
    """
    bag, head, c, valid = _place(tl.program_id(0), H, C, BLOCK_C)
    e = tl.arange(0, BLOCK_E)
    weight_ptr += head * E * W
    rows_ptr += (bag * H + head) * C * W
    acc = tl.zeros([BLOCK_C, BLOCK_E], tl.float32)
    for w0 in range(0, W, BLOCK_W):
        rows = load_tile(rows_ptr, c, W, valid, w0, W, BLOCK_W)
        weight = load_tile(weight_ptr, e, W, e < E, w0, W, BLOCK_W)
        acc = product(rows, tl.trans(weight), acc)
    acc *= scale
    if mass_ptr is not None:
        mass = tl.load(mass_ptr + (bag * H + head) * C + c, mask=valid, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + head * E + e, mask=e < E, other=0.0).to(tl.float32)
        acc += mass[:, None] * shift[None, :]
    at = out_ptr + bag * out_b + head * out_h + c[:, None] * out_c + e[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (e < E)[None, :])


@triton.jit
def _gradient_of_weight(
    tile, left_ptr, left_b, left_h, left_c, right_ptr, out_ptr, scale, n_rows,
    H: tl.constexpr, C: tl.constexpr, E: tl.constexpr, W: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Write one tile of scale left^T right [H, E, W], summed over the latents of all bags in order.

    Writes nothing if `tile` is not one of this matrix's tiles: all programs call all parts, each
    part with the number of the tile counted from its first one.
    """
    across: tl.constexpr = (W + BLOCK_W - 1) // BLOCK_W
    down: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    if (tile >= 0) & (tile < H * down * across):
        head = (tile // (down * across)).to(tl.int64)
        e0, w0 = tile // across % down * BLOCK_E, tile % across * BLOCK_W
        left_ptr += head * left_h
        acc = tl.zeros([BLOCK_E, BLOCK_W], tl.float32)
        for t0 in range(0, n_rows, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            bag, c = (t // C).to(tl.int64), t % C
            right = load_tile(right_ptr, (bag * H + head) * C + c, W, t < n_rows, w0, W, BLOCK_W)
            left = load_tile(left_ptr, bag * left_b + c * left_c, 1, t < n_rows, e0, E, BLOCK_E)
            acc = product(tl.trans(left.to(right.dtype)), right, acc)
        e, w = e0 + tl.arange(0, BLOCK_E), w0 + tl.arange(0, BLOCK_W)
        at = out_ptr + (head * E + e[:, None]) * W + w[None, :]
        acc = (acc * scale).to(out_ptr.dtype.element_ty)
        tl.store(at, acc, mask=(e < E)[:, None] & (w < W)[None, :])


@triton.jit
def _gradient_of_shift(
    tile, grad_ptr, grad_b, grad_h, grad_c, mass_ptr, out_ptr, n_rows,
    H: tl.constexpr, C: tl.constexpr, E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_E of the gradient of the shifts [2, H, E]: 0 for K, grad^T mass for V.

    The heads of K, the first H, load nothing: their mask `valid` is false throughout.
    """
    down: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    if (tile >= 0) & (tile < 2 * H * down):
        head = (tile // down).to(tl.int64)
        e0 = tile % down * BLOCK_E
        grad_ptr += (head - H) * grad_h
        acc = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
        for t0 in range(0, n_rows, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            valid = (t < n_rows) & (head >= H)
            bag, c = (t // C).to(tl.int64), t % C
            grad = load_tile(grad_ptr, bag * grad_b + c * grad_c, 1, valid, e0, E, BLOCK_E)
            mass = tl.load(mass_ptr + (bag * H + head - H) * C + c, mask=valid, other=0.0)
            acc += grad.to(tl.float32) * mass.to(tl.float32)[:, None]
        e = e0 + tl.arange(0, BLOCK_E)
        total = tl.sum(acc, 0).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + head * E + e, total, mask=e < E)


@triton.jit
def _sum_of_bags(tile, partial_ptr, out_ptr, n_bags, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Write BLOCK of the sums over partial [bags, SIZE], in order."""
    if (tile >= 0) & (tile * BLOCK < SIZE):
        i = tile * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for _ in range(0, n_bags):
            total += tl.load(partial_ptr + i, mask=i < SIZE, other=0.0)
            partial_ptr += SIZE
        tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=i < SIZE)


@triton.jit(do_not_specialize=["n_bags"])
def head_gradients_kernel(
    q_ptr, dabsorbed_ptr, grad_ptr, pooled_ptr, mass_ptr, partial_ptr,
    dweights_ptr, dshifts_ptr, dq_ptr, q_b, q_h, q_c, grad_b, grad_h, grad_c, scale, n_bags,
    H: tl.constexpr, C: tl.constexpr, E: tl.constexpr, W: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write the gradients of what all bags share; each program writes one tile of one of them.

    The gradient of the weights [2, H, E, W] is scale q^T dabsorbed for K and grad^T pooled for V;
    then that of the shifts [2, H, E]; and, if `partial` [B, C H E] is given, dq [C H E], its sum
    over the bags: the gradient of queries that all bags share. Programs are numbered through these
    four parts in this order. Each sums over all bags by itself, in order: no atomics, the same bits
    in every run.
    """
    tile = tl.program_id(0)
    n_rows = n_bags * C
    down: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    tiles: tl.constexpr = H * down * ((W + BLOCK_W - 1) // BLOCK_W)
    _gradient_of_weight(
        tile, q_ptr, q_b, q_h, q_c, dabsorbed_ptr, dweights_ptr, scale, n_rows, H, C, E, W, BLOCK_T,
        BLOCK_E, BLOCK_W,
    )  # fmt: skip
    tile -= tiles
    _gradient_of_weight(
        tile, grad_ptr, grad_b, grad_h, grad_c, pooled_ptr, dweights_ptr + H * E * W, 1.0, n_rows,
        H, C, E, W, BLOCK_T, BLOCK_E, BLOCK_W,
    )  # fmt: skip
    tile -= tiles
    _gradient_of_shift(
        tile, grad_ptr, grad_b, grad_h, grad_c, mass_ptr, dshifts_ptr, n_rows, H, C, E, BLOCK_T,
        BLOCK_E,
    )  # fmt: skip
    if partial_ptr is not None:
        _sum_of_bags(tile - 2 * H * down, partial_ptr, dq_ptr, n_bags, C * H * E, BLOCK_V)
