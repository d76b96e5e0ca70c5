"""The Triton kernels between heads and tokens: what a head asks and gathers, and their gradients.

A row of a head has E channels, a row of the tokens W. Rows of heads [B, H, C, E] have any strides
but 1 between channels; those of the tokens are contiguous [B, H, C, W].
"""

import triton
import triton.language as tl

from ..tile_kernels import load_tile, product


@triton.jit
def _place(program, H: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return a program's bag and head, int64 each, and its latents with a mask."""
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = program % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    head = program // tiles
    return (head // H).to(tl.int64), (head % H).to(tl.int64), c, c < C


@triton.jit
def to_tokens_kernel(
    rows_ptr, weight_ptr, own_ptr, own_p_ptr, sums_ptr,
    pooled_ptr, mass_ptr, shift_ptr, dmass_ptr, delta_ptr, rows_b, rows_h, rows_c, scale,
    H: tl.constexpr, C: tl.constexpr, E: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Multiply rows of a head by its weight [H, E, W], y = scale rows weight, and centre them.

    own[n, W - P] and own_p[n, P] = y - mean(y), rounded, and sums[n] = the sum of what was rounded.
    Where pooled [n, W] is given, the rows being the gradient of pooled weight^T + mass shift^T:
    dmass[n] = sum(rows shift), and delta[n] = sum(own pooled) + dmass mass.
    """
    bag, head, c, there = _place(tl.program_id(0), H, C, BLOCK_C)
    e = tl.arange(0, BLOCK_E)
    weight_ptr += head * E * W
    rows_ptr += bag * rows_b + head * rows_h
    full = load_tile(rows_ptr, c, rows_c, there, 0, E, BLOCK_E).to(tl.float32)
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
        own = product(rows, weight, tl.zeros([BLOCK_C, BLOCK_W], tl.float32))
        inside = there[:, None] & (w < W)[None, :]
        own = tl.where(inside, own * scale - mean[:, None], 0.0).to(own_ptr.dtype.element_ty)
        at = own_ptr + n[:, None] * (W - P) + w[None, :]
        tl.store(at, own, mask=inside & (w < W - P)[None, :])
        if P > 0:
            at = own_p_ptr + n[:, None] * P + w[None, :] - (W - P)
            tl.store(at, own, mask=inside & (w >= W - P)[None, :])
        sums += tl.sum(own.to(tl.float32), 1)
        if pooled_ptr is not None:
            pooled = load_tile(pooled_ptr, n, W, there, w0, W, BLOCK_W)
            delta += tl.sum(own.to(tl.float32) * pooled.to(tl.float32), 1)
    tl.store(sums_ptr + n, sums, mask=there)
    if pooled_ptr is not None:
        shift = tl.load(shift_ptr + head * E + e, mask=e < E, other=0.0).to(tl.float32)
        dmass = tl.sum(full * shift[None, :], 1)
        mass = tl.load(mass_ptr + n, mask=there, other=0.0).to(tl.float32)
        tl.store(dmass_ptr + n, dmass, mask=there)
        tl.store(delta_ptr + n, delta + dmass * mass, mask=there)


@triton.jit
def to_heads_kernel(
    rows_ptr, weight_ptr, mass_ptr, shift_ptr, out_ptr, out_b, out_h, out_c, scale,
    H: tl.constexpr, C: tl.constexpr, E: tl.constexpr, W: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Write scale rows weight^T, of rows of the tokens; plus mass shift^T where given."""
    bag, head, c, there = _place(tl.program_id(0), H, C, BLOCK_C)
    e = tl.arange(0, BLOCK_E)
    weight_ptr += head * E * W
    rows_ptr += (bag * H + head) * C * W
    acc = tl.zeros([BLOCK_C, BLOCK_E], tl.float32)
    for w0 in range(0, W, BLOCK_W):
        rows = load_tile(rows_ptr, c, W, there, w0, W, BLOCK_W)
        weight = load_tile(weight_ptr, e, W, e < E, w0, W, BLOCK_W)
        acc = product(rows, tl.trans(weight), acc)
    acc *= scale
    if mass_ptr is not None:
        mass = tl.load(mass_ptr + (bag * H + head) * C + c, mask=there, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + head * E + e, mask=e < E, other=0.0).to(tl.float32)
        acc += mass[:, None] * shift[None, :]
    at = out_ptr + bag * out_b + head * out_h + c[:, None] * out_c + e[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=there[:, None] & (e < E)[None, :])


@triton.jit
def _gradient_of_weight(
    tile, left_ptr, left_b, left_h, left_c, right_ptr, out_ptr, scale, n_rows,
    H: tl.constexpr, C: tl.constexpr, E: tl.constexpr, W: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Write one tile of scale left^T right [H, E, W], of the latents of all bags in order.

    Nothing where `tile` is none of it.
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
    """Write BLOCK_E of the gradient of the shifts [2, H, E]: 0 of K's, grad^T mass of V's."""
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
    q_ptr, dasked_ptr, grad_ptr, pooled_ptr, mass_ptr, partial_ptr,
    dweights_ptr, dshifts_ptr, dq_ptr, q_b, q_h, q_c, grad_b, grad_h, grad_c, scale, n_bags,
    H: tl.constexpr, C: tl.constexpr, E: tl.constexpr, W: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write the gradients of what all bags share, each program one tile of one part.

    Of the weights [2, H, E, W], scale q^T dasked and grad^T pooled; of the shifts [2, H, E]; and,
    where given, dq [C H E], the sum of `partial` [B, C H E], of queries that all bags share.
    """
    tile = tl.program_id(0)
    n_rows = n_bags * C
    down: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    tiles: tl.constexpr = H * down * ((W + BLOCK_W - 1) // BLOCK_W)
    _gradient_of_weight(
        tile, q_ptr, q_b, q_h, q_c, dasked_ptr, dweights_ptr, scale, n_rows, H, C, E, W, BLOCK_T,
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
