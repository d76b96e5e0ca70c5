"""The Triton kernels of lego_pass; triton.py says how they are launched."""

import triton
import triton.language as tl

from ..tile_kernels import load_tile, product, store_tile

EPS = tl.constexpr(1e-5)
SLOPE = tl.constexpr(0.01)

# The smallest normal number, below which no sum of squares is divided by.
TINY = tl.constexpr(1.1754943508222875e-38)
LARGEST_SCALE = tl.constexpr(9e18)  # a little less than 1 / sqrt(TINY)


@triton.jit
def _own_rows(n_rows, C: tl.constexpr, BLOCK_C: tl.constexpr, WHOLE: tl.constexpr):
    """Return the rows of a program among all B C, and which of them there are."""
    i = tl.arange(0, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    if WHOLE:
        return program * C + i, i < C
    row = program * BLOCK_C + i
    return row, row < n_rows


@triton.jit
def _standardised(x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return (x - mean) / SD of each row, 0 in the columns beyond D, and 1 / SD."""
    real = tl.arange(0, BLOCK_D)[None, :] < D
    deviation = tl.where(real, x - tl.sum(tl.where(real, x, 0.0), 1)[:, None] / D, 0.0)
    rstd = tl.rsqrt(tl.sum(deviation * deviation, 1) / D + EPS)[:, None]
    return deviation * rstd, rstd


@triton.jit
def _standardised_backward(grad, normal, rstd, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the gradient of what _standardised was given."""
    real = tl.arange(0, BLOCK_D)[None, :] < D
    grad -= tl.sum(grad, 1)[:, None] / D + normal * (tl.sum(grad * normal, 1)[:, None] / D)
    return tl.where(real, grad * rstd, 0.0)


@triton.jit
def _normed(normal, gain_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Apply a LayerNorm's gain [D], and its shift behind it, to standardised rows."""
    gain = _load_vector(gain_ptr, 0, D, BLOCK_D)
    return normal * gain + _load_vector(gain_ptr + D, 0, D, BLOCK_D)


@triton.jit
def _load_vector(base, first, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Load numbers first to first + BLOCK of a vector as [1, BLOCK], zeros beyond SIZE."""
    i = first + tl.arange(0, BLOCK)
    return tl.load(base + i, mask=i < SIZE, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _store_sum(partial_ptr, first, x, TOTAL: tl.constexpr, size, BLOCK: tl.constexpr):
    """Store the sum over the rows of x, up to `size` numbers, in a program's own row of partial."""
    i = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * TOTAL + first + i
    tl.store(partial_ptr + at, tl.sum(x, 0), mask=i < size)


@triton.jit
def _load_attended(
    attended_ptr, out_ptr, flat_ptr, row, valid, b_stride, h_stride, c_stride,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, E: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Return out attended; what was attended goes to `flat_ptr` [B C, H E] if given."""
    tiles: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    d = tl.arange(0, BLOCK_D)
    attended_ptr += (row // C * b_stride + row % C * c_stride)[:, None]
    acc = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    for i in range(0, H * tiles):
        head = i // tiles
        e = i % tiles * BLOCK_E + tl.arange(0, BLOCK_E)
        known = (e < E)[None, :]
        at = attended_ptr + head * h_stride + e[None, :]
        h = tl.load(at, mask=valid[:, None] & known, other=0.0).to(DTYPE)
        at = out_ptr + d[:, None] * (H * E) + head * E + e[None, :]
        weight = tl.load(at, mask=(d < D)[:, None] & known, other=0.0).to(DTYPE)
        acc = product(h, tl.trans(weight), acc)
        if flat_ptr is not None:
            at = flat_ptr + row[:, None] * (H * E) + head * E + e[None, :]
            tl.store(at, h, mask=valid[:, None] & known)
    return acc


@triton.jit
def _flags(flags_ptr, row, valid, C: tl.constexpr, WHOLE: tl.constexpr):
    """Load what is said of the samples [B] of some rows, [rows, 1]; of a whole sample, [1, 1]."""
    at, mask = (row // C)[:, None], valid[:, None]
    if WHOLE:
        at = tl.program_id(0) + tl.zeros([1, 1], tl.int32)
        mask = at >= 0
    return tl.load(flags_ptr + at, mask=mask, other=0)


@triton.jit
def _scale_places(
    row, valid, D: tl.constexpr, BLOCK_D: tl.constexpr, ALONG_C: tl.constexpr,
    ALONG_D: tl.constexpr,
):  # fmt: skip
    """Return where the column scale of some rows lies in memory, and what of it there is."""
    at, mask = row[:, None], valid[:, None]
    if ALONG_C:
        at = tl.program_id(0).to(tl.int64) + tl.zeros([1, 1], tl.int64)
        mask = at >= 0
    if not ALONG_D:
        d = tl.arange(0, BLOCK_D)[None, :]
        at, mask = at * D + d, mask & (d < D)
    return at, mask


@triton.jit
def _total(
    numbers, row, C: tl.constexpr, HALF: tl.constexpr, ALONG_C: tl.constexpr, ALONG_D: tl.constexpr
):  # fmt: skip
    """Return the sum over the normalised axes, which keep length 1."""
    if HALF > 0:
        numbers *= _stands_for(row, C, HALF)
    if ALONG_D:
        numbers = tl.sum(numbers, 1, keep_dims=True)
    if ALONG_C:
        numbers = tl.sum(numbers, 0, keep_dims=True)
    return numbers


@triton.jit
def _stands_for(row, C: tl.constexpr, HALF: tl.constexpr):
    """Return for how many of HALF rows each of the first C stands."""
    c = (row % C)[:, None]
    alone = c == 0
    if HALF % 2 == 0:
        alone |= c == C - 1
    return tl.where(alone, 1.0, 2.0)


@triton.jit
def _gate(gate, SNN: tl.constexpr):
    """Return SELU(gate) or GELU(gate), and its derivative."""
    if SNN:
        scale: tl.constexpr = 1.0507009873554805
        alpha: tl.constexpr = 1.6732632423543772 * scale
        grown = alpha * tl.exp(tl.minimum(gate, 0.0))
        return tl.where(gate > 0, scale * gate, grown - alpha), tl.where(gate > 0, scale, grown)
    share = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
    return gate * share, share + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)


@triton.jit
def _room_rows(room_ptr, first, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """Point at columns first to first + BLOCK of a program's own rows [BLOCK_C, BLOCK_D] in memory.

    Products over D take their rows from there in steps: in tf32x3, two parts of a whole row are
    more than the registers hold (up to 260 spill stores). Between storing and loading, all threads
    of the program have to meet (tl.debug_barrier).
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    return room_ptr + row[:, None] * BLOCK_D + first + tl.arange(0, BLOCK)[None, :]


@triton.jit
def _draw_kept(
    seed_ptr, kept_ptr, row, dropout_p, C: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write which numbers of a program's rows dropout keeps, keyed by sample, latent and channel.

    To memory, and before the loops over the hidden layer: drawn behind them it spills (2 to 17
    stores for 256 rows of 32). One Philox call serves four channels, as in kept_weights.
    """
    quad = tl.arange(0, BLOCK_D // 4)[None, :]
    sample, latent = (row // C).to(tl.int32)[:, None], (row % C).to(tl.int32)[:, None]
    zero = latent * 0 + quad * 0
    words = tl.philox(tl.load(seed_ptr), quad + zero, latent + zero, sample + zero, 0)
    threshold = (tl.full([1, 1], dropout_p, tl.float32) * 4294967296.0).to(tl.uint32)
    at = _room_rows(kept_ptr, 0, BLOCK_C, BLOCK_D, BLOCK_D // 4) + 3 * quad
    for i in tl.static_range(4):
        tl.store(at + i, (words[i] >= threshold).to(tl.int8))


@triton.jit
def _kept(kept_ptr, kept_scale, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return what dropout multiplies a program's rows by."""
    return tl.load(_room_rows(kept_ptr, 0, BLOCK_C, BLOCK_D, BLOCK_D)).to(tl.float32) * kept_scale


@triton.jit
def _hidden(
    normed_ptr, update_ptr, bias_ptr, f0, D: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Return BLOCK_F values and gates of the hidden layer."""
    f = f0 + tl.arange(0, BLOCK_F)
    value = tl.zeros([BLOCK_C, BLOCK_F], tl.float32)
    gate = tl.zeros([BLOCK_C, BLOCK_F], tl.float32)
    for k0 in range(0, D, BLOCK_K):
        part = tl.load(_room_rows(normed_ptr, k0, BLOCK_C, BLOCK_D, BLOCK_K))
        weight = load_tile(update_ptr, f, D, f < 4 * D, k0, D, BLOCK_K).to(DTYPE)
        value = product(part, tl.trans(weight), value)
        weight = load_tile(update_ptr + 4 * D * D, f, D, f < 4 * D, k0, D, BLOCK_K).to(DTYPE)
        gate = product(part, tl.trans(weight), gate)
    value += _load_vector(bias_ptr, f0, 4 * D, BLOCK_F)
    return value, gate + _load_vector(bias_ptr + 4 * D, f0, 4 * D, BLOCK_F)


@triton.jit
def _updated(
    real_ptr, attended_ptr, update_ptr, seed_ptr, kept_ptr, normed_ptr, row, place, valid,
    b_stride, h_stride, c_stride, dropout_p, kept_scale,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, E: tl.constexpr, SNN: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Return rows of latents after the update, whatever samples it is for.

    Without one they are those at `place` of `real`.
    """
    bias_ptr = update_ptr + 12 * D * D + D * H * E
    pre = _load_attended(
        attended_ptr, update_ptr + 12 * D * D, None, row, valid, b_stride, h_stride, c_stride,
        C, D, H, E, DTYPE, BLOCK_C, BLOCK_D, BLOCK_E,
    )  # fmt: skip
    pre += _load_vector(bias_ptr + 8 * D, 0, D, BLOCK_D)
    x = tl.where(pre > 0, pre, SLOPE * pre) + load_tile(real_ptr, place, D, valid, 0, D, BLOCK_D)
    normed = _normed(_standardised(x, D, BLOCK_D)[0], bias_ptr + 9 * D, D, BLOCK_D).to(DTYPE)
    tl.store(_room_rows(normed_ptr, 0, BLOCK_C, BLOCK_D, BLOCK_D), normed)
    if seed_ptr is not None:
        _draw_kept(seed_ptr, kept_ptr, row, dropout_p, C, BLOCK_C, BLOCK_D)
    tl.debug_barrier()
    acc = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    d = tl.arange(0, BLOCK_D)
    for f0 in range(0, 4 * D, BLOCK_F):
        value, gate = _hidden(
            normed_ptr, update_ptr, bias_ptr, f0, D, DTYPE, BLOCK_C, BLOCK_D, BLOCK_K, BLOCK_F
        )
        gate = _gate(gate, SNN)[0]
        down_ptr = update_ptr + 8 * D * D
        weight = load_tile(down_ptr, d, 4 * D, d < D, f0, 4 * D, BLOCK_F).to(DTYPE)
        acc = product((value * gate).to(DTYPE), tl.trans(weight), acc)
    acc += _load_vector(bias_ptr + 11 * D, 0, D, BLOCK_D)
    if seed_ptr is not None:
        acc *= _kept(kept_ptr, kept_scale, BLOCK_C, BLOCK_D)
    return x + acc


@triton.jit(do_not_specialize=["n_rows"])
def pass_kernel(
    real_ptr, imaginary_ptr, attended_ptr, update_ptr, query_weights_ptr, present_ptr, scaled_ptr,
    seed_ptr, x_ptr, y_ptr, queries_ptr, scale_ptr, normed_ptr, kept_ptr,
    b_stride, h_stride, c_stride, n_rows, count, dropout_p, kept_scale,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, E: tl.constexpr, Q: tl.constexpr,
    HALF: tl.constexpr, SHARED: tl.constexpr, SNN: tl.constexpr, ALONG_C: tl.constexpr,
    ALONG_D: tl.constexpr, DTYPE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Update, normalise and ask, for the rows of a sample (ALONG_C) or BLOCK_C of all.

    x = real + LeakyReLU(out attended + out_bias); x += keep (down (value act(gate)) + down_bias);
    s = 1 / sqrt(sum |Z|^2 / count); queries = ask LN(s x). No update without `attended`; HALF: rows
    of the whole of a spectrum of which C are here, 0 if all are. The weights are `Update.flat` and
    `QueryWeights.flat`.
    """
    row, valid = _own_rows(n_rows, C, BLOCK_C, ALONG_C)
    place = row
    if SHARED:
        place = row % C
    if attended_ptr is None:
        x = load_tile(real_ptr, place, D, valid, 0, D, BLOCK_D).to(tl.float32)
    else:
        x = _updated(
            real_ptr, attended_ptr, update_ptr, seed_ptr, kept_ptr, normed_ptr, row, place, valid,
            b_stride, h_stride, c_stride, dropout_p, kept_scale, C, D, H, E, SNN, DTYPE,
            BLOCK_C, BLOCK_D, BLOCK_K, BLOCK_E, BLOCK_F,
        )  # fmt: skip
        if present_ptr is not None:
            present = _flags(present_ptr, row, valid, C, ALONG_C)
            x = tl.where(present, x, load_tile(real_ptr, place, D, valid, 0, D, BLOCK_D))
    if ALONG_C or ALONG_D:
        x = tl.where(valid[:, None], x, 0.0)
        square = x * x
        y = x
        if imaginary_ptr is not None:
            y = load_tile(imaginary_ptr, place, D, valid, 0, D, BLOCK_D).to(tl.float32)
            square += y * y
        total = _total(square, row, C, HALF, ALONG_C, ALONG_D)
        scale = tl.rsqrt(tl.maximum(total / count, TINY))
        if scaled_ptr is not None:
            scale = tl.where(_flags(scaled_ptr, row, valid, C, ALONG_C), scale, 1.0)
        at, mask = _scale_places(row, valid, D, BLOCK_D, ALONG_C, ALONG_D)
        tl.store(scale_ptr + at, scale, mask=mask)
        x *= scale
        if imaginary_ptr is not None:
            store_tile(y_ptr, row, valid, 0, y * scale, D, BLOCK_D)
    store_tile(x_ptr, row, valid, 0, x, D, BLOCK_D)
    if query_weights_ptr is not None:
        normed = _normed(_standardised(x, D, BLOCK_D)[0], query_weights_ptr + Q * D, D, BLOCK_D).to(
            DTYPE
        )
        tl.debug_barrier()
        tl.store(_room_rows(normed_ptr, 0, BLOCK_C, BLOCK_D, BLOCK_D), normed)
        tl.debug_barrier()
        for q0 in range(0, Q, BLOCK_E):
            q = q0 + tl.arange(0, BLOCK_E)
            query = tl.zeros([BLOCK_C, BLOCK_E], tl.float32)
            for k0 in range(0, D, BLOCK_K):
                part = tl.load(_room_rows(normed_ptr, k0, BLOCK_C, BLOCK_D, BLOCK_K))
                weight = load_tile(query_weights_ptr, q, D, q < Q, k0, D, BLOCK_K).to(DTYPE)
                query = product(part, tl.trans(weight), query)
            store_tile(queries_ptr, row, valid, q0, query, Q, BLOCK_E)


@triton.jit(do_not_specialize=["n_rows"])
def query_backward_kernel(
    dx_ptr, dy_ptr, dqueries_ptr, x_ptr, y_ptr, scale_ptr, scaled_ptr, query_weights_ptr,
    dx_before_ptr, dy_before_ptr, normed_ptr, partial_ptr, n_rows, count,
    C: tl.constexpr, D: tl.constexpr, Q: tl.constexpr, HALF: tl.constexpr,
    ALONG_C: tl.constexpr, ALONG_D: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Go back from what pass_kernel returned to the real and the imaginary part before the scale s.

    With z = s Z returned and w the rows each stands for, dZ = s (dz - w z sum(dz z) / count), where
    dz has got ask's part. Written for the gradients of asking, if queries have one: normed
    [B C, BLOCK_D] and partial [programs, 2 D], sums over the rows for its LayerNorm's vectors.
    """
    row, valid = _own_rows(n_rows, C, BLOCK_C, ALONG_C)
    x = load_tile(x_ptr, row, D, valid, 0, D, BLOCK_D).to(tl.float32)
    dx = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    if dqueries_ptr is not None:
        normal, rstd = _standardised(x, D, BLOCK_D)
        normed = _normed(normal, query_weights_ptr + Q * D, D, BLOCK_D)
        store_tile(normed_ptr, row, valid, 0, normed, BLOCK_D, BLOCK_D)
        for q0 in range(0, Q, BLOCK_E):
            q = q0 + tl.arange(0, BLOCK_E)
            weight = load_tile(query_weights_ptr, q, D, q < Q, 0, D, BLOCK_D).to(DTYPE)
            dquery = load_tile(dqueries_ptr, row, Q, valid, q0, Q, BLOCK_E).to(DTYPE)
            dx = product(dquery, weight, dx)
        _store_sum(partial_ptr, 0, dx * normal, 2 * D, D, BLOCK_D)
        _store_sum(partial_ptr, D, dx, 2 * D, D, BLOCK_D)
        dx *= _load_vector(query_weights_ptr + Q * D, 0, D, BLOCK_D)
        dx = _standardised_backward(dx, normal, rstd, D, BLOCK_D)
    if dx_ptr is not None:
        dx += load_tile(dx_ptr, row, D, valid, 0, D, BLOCK_D)
    if ALONG_C or ALONG_D:
        moved = dx * x
        if y_ptr is not None:
            y = load_tile(y_ptr, row, D, valid, 0, D, BLOCK_D).to(tl.float32)
            dy = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
            if dy_ptr is not None:
                dy += load_tile(dy_ptr, row, D, valid, 0, D, BLOCK_D)
            moved += dy * y
        at, mask = _scale_places(row, valid, D, BLOCK_D, ALONG_C, ALONG_D)
        scale = tl.load(scale_ptr + at, mask=mask, other=0.0)
        # Of half a spectrum, every row counts once here: the other half is no result.
        along = _total(moved, row, C, 0, ALONG_C, ALONG_D) / count
        if scaled_ptr is not None:
            along = tl.where(_flags(scaled_ptr, row, valid, C, ALONG_C), along, 0.0)
        # A scale at its bound does not move.
        along = tl.where(scale < LARGEST_SCALE, along, 0.0)
        weight = tl.full([1, 1], 1.0, tl.float32)
        if HALF > 0:
            weight = _stands_for(row, C, HALF)
        dx = scale * (dx - weight * x * along)
        if y_ptr is not None:
            store_tile(dy_before_ptr, row, valid, 0, scale * (dy - weight * y * along), D, BLOCK_D)
    store_tile(dx_before_ptr, row, valid, 0, dx, D, BLOCK_D)


@triton.jit
def _updated_gradient(
    dx_ptr, present_ptr, row, valid, C: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Return the gradient of updated rows, zero for rows without an update."""
    dx = load_tile(dx_ptr, row, D, valid, 0, D, BLOCK_D).to(tl.float32)
    # One return: what follows an early one is compiled too, where the pointer is None.
    if present_ptr is not None:
        dx = tl.where(_flags(present_ptr, row, valid, C, False), dx, 0.0)
    return dx


@triton.jit(do_not_specialize=["n_rows"])
def update_backward_kernel(
    dx_ptr, real_ptr, attended_ptr, update_ptr, present_ptr, seed_ptr,
    dreal_ptr, dattended_ptr, flat_ptr, normed_ptr, gated_ptr, dhidden_ptr, dout_ptr, dpre_ptr,
    partial_ptr, kept_ptr, b_stride, h_stride, c_stride, n_rows, dropout_p, kept_scale,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, E: tl.constexpr,
    SHARED: tl.constexpr, SNN: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Go back through the update of BLOCK_C rows, whatever their samples.

    Written for the gradients of matrices: flat [B C, H E] (what was attended), dpre (of its
    projection), normed, dhidden (values, then gates), gated, dout (of the feed-forward); partial
    [programs, 12 D]: sums over the rows of dhidden, dpre, of the LayerNorm's two vectors, of dout.
    """
    row, valid = _own_rows(n_rows, C, BLOCK_C, False)
    place = row
    if SHARED:
        place = row % C
    out_ptr, bias_ptr = update_ptr + 12 * D * D, update_ptr + 12 * D * D + D * H * E
    pre = _load_attended(
        attended_ptr, out_ptr, flat_ptr, row, valid, b_stride, h_stride, c_stride,
        C, D, H, E, DTYPE, BLOCK_C, BLOCK_D, BLOCK_E,
    )  # fmt: skip
    pre += _load_vector(bias_ptr + 8 * D, 0, D, BLOCK_D)
    slope = tl.where(pre > 0, 1.0, SLOPE)
    x = pre * slope + load_tile(real_ptr, place, D, valid, 0, D, BLOCK_D)
    normal, rstd = _standardised(x, D, BLOCK_D)
    normed = _normed(normal, bias_ptr + 9 * D, D, BLOCK_D).to(DTYPE)
    tl.store(_room_rows(normed_ptr, 0, BLOCK_C, BLOCK_D, BLOCK_D), normed)
    dout = _updated_gradient(dx_ptr, present_ptr, row, valid, C, D, BLOCK_D)
    if seed_ptr is not None:
        _draw_kept(seed_ptr, kept_ptr, row, dropout_p, C, BLOCK_C, BLOCK_D)
        tl.debug_barrier()
        dout *= _kept(kept_ptr, kept_scale, BLOCK_C, BLOCK_D)
    _store_sum(partial_ptr, 11 * D, dout, 12 * D, D, BLOCK_D)
    tl.store(_room_rows(dout_ptr, 0, BLOCK_C, BLOCK_D, BLOCK_D), dout.to(DTYPE))
    tl.debug_barrier()
    dnormed = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    for f0 in range(0, 4 * D, BLOCK_F):
        value, gate = _hidden(
            normed_ptr, update_ptr, bias_ptr, f0, D, DTYPE, BLOCK_C, BLOCK_D, BLOCK_K, BLOCK_F
        )
        gate, slope_of_gate = _gate(gate, SNN)
        store_tile(gated_ptr, row, valid, f0, value * gate, 4 * D, BLOCK_F)
        dgated = tl.zeros([BLOCK_C, BLOCK_F], tl.float32)
        for k0 in range(0, D, BLOCK_K):
            part = tl.load(_room_rows(dout_ptr, k0, BLOCK_C, BLOCK_D, BLOCK_K))
            k = k0 + tl.arange(0, BLOCK_K)
            down_ptr = update_ptr + 8 * D * D
            weight = load_tile(down_ptr, k, 4 * D, k < D, f0, 4 * D, BLOCK_F).to(DTYPE)
            dgated = product(part, weight, dgated)
        dvalue = dgated * gate
        dgate = dgated * value * slope_of_gate
        _store_sum(partial_ptr, f0, dvalue, 12 * D, 4 * D - f0, BLOCK_F)
        _store_sum(partial_ptr, 4 * D + f0, dgate, 12 * D, 4 * D - f0, BLOCK_F)
        dvalue = dvalue.to(DTYPE)
        dgate = dgate.to(DTYPE)
        f = f0 + tl.arange(0, BLOCK_F)
        at = dhidden_ptr + row[:, None] * (8 * D) + f[None, :]
        mask = valid[:, None] & (f < 4 * D)[None, :]
        tl.store(at, dvalue, mask=mask)
        tl.store(at + 4 * D, dgate, mask=mask)
        weight = load_tile(update_ptr, f, D, f < 4 * D, 0, D, BLOCK_D).to(DTYPE)
        dnormed = product(dvalue, weight, dnormed)
        weight = load_tile(update_ptr + 4 * D * D, f, D, f < 4 * D, 0, D, BLOCK_D).to(DTYPE)
        dnormed = product(dgate, weight, dnormed)
    _store_sum(partial_ptr, 9 * D, dnormed * normal, 12 * D, D, BLOCK_D)
    _store_sum(partial_ptr, 10 * D, dnormed, 12 * D, D, BLOCK_D)
    dnormed *= _load_vector(bias_ptr + 9 * D, 0, D, BLOCK_D)
    dx = _standardised_backward(dnormed, normal, rstd, D, BLOCK_D)
    dx += _updated_gradient(dx_ptr, present_ptr, row, valid, C, D, BLOCK_D)
    dreal = dx
    if present_ptr is not None:
        present = _flags(present_ptr, row, valid, C, False)
        dreal = tl.where(present, dx, load_tile(dx_ptr, row, D, valid, 0, D, BLOCK_D))
    store_tile(dreal_ptr, row, valid, 0, dreal, D, BLOCK_D)
    dpre = dx * slope
    _store_sum(partial_ptr, 8 * D, dpre, 12 * D, D, BLOCK_D)
    tl.store(_room_rows(dpre_ptr, 0, BLOCK_C, BLOCK_D, BLOCK_D), dpre.to(DTYPE))
    tl.debug_barrier()
    tiles: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    dattended_ptr += (row // C * C * H * E + row % C * E)[:, None]
    for i in range(0, H * tiles):
        head = i // tiles
        e = i % tiles * BLOCK_E + tl.arange(0, BLOCK_E)
        known = (e < E)[None, :]
        dh = tl.zeros([BLOCK_C, BLOCK_E], tl.float32)
        for k0 in range(0, D, BLOCK_K):
            part = tl.load(_room_rows(dpre_ptr, k0, BLOCK_C, BLOCK_D, BLOCK_K))
            k = (k0 + tl.arange(0, BLOCK_K))[:, None]
            at = out_ptr + k * (H * E) + head * E + e[None, :]
            weight = tl.load(at, mask=(k < D) & known, other=0.0).to(DTYPE)
            dh = product(part, weight, dh)
        at = dattended_ptr + head * (C * E) + e[None, :]
        tl.store(at, dh.to(dattended_ptr.dtype.element_ty), mask=valid[:, None] & known)
