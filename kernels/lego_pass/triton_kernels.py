"""The Triton kernels of lego_pass; triton.py says how they are launched.

Rows are the latents of all samples, B C of them, `row` their numbers. A program has BLOCK_C rows in
tiles of BLOCK_D columns; with ALL_ROWS or ALONG_C, all rows of one sample. Rows and columns behind
the last are loaded as zeros and not stored. `UpdateWeights.flat` is up [8 D, D], down [D, 4 D], out
[D, H E], then vectors: up's shift [8 D], out's [D], the LayerNorm's gain and shift, down's shift.
"""

import triton
import triton.language as tl

from ..tile_kernels import load_tile, product, store_tile

EPS = tl.constexpr(1e-5)
SLOPE = tl.constexpr(0.01)

# The smallest normal number: sums of squares below it count as it, and 1 / sqrt stays finite.
TINY = tl.constexpr(1.1754943508222875e-38)
LARGEST_SCALE = tl.constexpr(9e18)  # a little less than 1 / sqrt(TINY)


@triton.jit
def _program_rows(n_rows, C: tl.constexpr, BLOCK_C: tl.constexpr, ALL_ROWS: tl.constexpr):
    """Return the rows of a program among all B C, and which of them exist."""
    i = tl.arange(0, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    if ALL_ROWS:
        return program * C + i, i < C
    row = program * BLOCK_C + i
    return row, row < n_rows


@triton.jit
def _standardised(x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return (x - mean) / SD of each row, 0 in columns behind D, and 1 / SD."""
    inside = tl.arange(0, BLOCK_D)[None, :] < D
    deviation = tl.where(inside, x - tl.sum(tl.where(inside, x, 0.0), 1)[:, None] / D, 0.0)
    rstd = tl.rsqrt(tl.sum(deviation * deviation, 1) / D + EPS)[:, None]
    return deviation * rstd, rstd


@triton.jit
def _standardised_backward(grad, normal, rstd, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the gradient of the argument of _standardised, given that of its result."""
    inside = tl.arange(0, BLOCK_D)[None, :] < D
    grad -= tl.sum(grad, 1)[:, None] / D + normal * (tl.sum(grad * normal, 1)[:, None] / D)
    return tl.where(inside, grad * rstd, 0.0)


@triton.jit
def _normed(normal, gain_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Apply a LayerNorm's gain [D], and its shift behind it in memory, to standardised rows."""
    gain = _load_vector(gain_ptr, 0, D, BLOCK_D)
    return normal * gain + _load_vector(gain_ptr + D, 0, D, BLOCK_D)


@triton.jit
def _load_vector(base, first, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Load numbers first to first + BLOCK of a vector as [1, BLOCK], zeros behind SIZE."""
    i = first + tl.arange(0, BLOCK)
    return tl.load(base + i, mask=i < SIZE, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _store_sum(partial_ptr, first, x, TOTAL: tl.constexpr, size, BLOCK: tl.constexpr):
    """Store the sum of x over a program's rows, `size` numbers, in the program's row of partial."""
    i = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * TOTAL + first + i
    tl.store(partial_ptr + at, tl.sum(x, 0), mask=i < size)


@triton.jit
def _load_attended(
    attended_ptr, out_ptr, flat_ptr, row, valid, b_stride, h_stride, c_stride,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, E: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Return out attended; copy attended to `flat_ptr` [B C, H E] if given."""
    tiles: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    d = tl.arange(0, BLOCK_D)
    attended_ptr += (row // C * b_stride + row % C * c_stride)[:, None]
    acc = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    for i in range(0, H * tiles):
        head = i // tiles
        e = i % tiles * BLOCK_E + tl.arange(0, BLOCK_E)
        in_head = (e < E)[None, :]
        at = attended_ptr + head * h_stride + e[None, :]
        h = tl.load(at, mask=valid[:, None] & in_head, other=0.0).to(DTYPE)
        at = out_ptr + d[:, None] * (H * E) + head * E + e[None, :]
        weight = tl.load(at, mask=(d < D)[:, None] & in_head, other=0.0).to(DTYPE)
        acc = product(h, tl.trans(weight), acc)
        if flat_ptr is not None:
            at = flat_ptr + row[:, None] * (H * E) + head * E + e[None, :]
            tl.store(at, h, mask=valid[:, None] & in_head)
    return acc


@triton.jit
def _flags(flags_ptr, row, valid, C: tl.constexpr, ALL_ROWS: tl.constexpr):
    """Load the flags [B] of the samples of some rows, [rows, 1]; with ALL_ROWS one, [1, 1]."""
    at, mask = (row // C)[:, None], valid[:, None]
    if ALL_ROWS:
        at = tl.program_id(0) + tl.zeros([1, 1], tl.int32)
        mask = at >= 0
    return tl.load(flags_ptr + at, mask=mask, other=0)


@triton.jit
def _scale_places(
    row, valid, D: tl.constexpr, BLOCK_D: tl.constexpr, ALONG_C: tl.constexpr,
    ALONG_D: tl.constexpr,
):  # fmt: skip
    """Return where the column scale of some rows lies in memory, and which of it exists."""
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
    """Return the sum over the normalised axes, which keep length 1; HALF as in pass_kernel."""
    if HALF > 0:
        numbers *= _stands_for(row, C, HALF)
    if ALONG_D:
        numbers = tl.sum(numbers, 1, keep_dims=True)
    if ALONG_C:
        numbers = tl.sum(numbers, 0, keep_dims=True)
    return numbers


@triton.jit
def _stands_for(row, C: tl.constexpr, HALF: tl.constexpr):
    """Return for how many of HALF rows each of the first C stands: 1 if self-conjugate, else 2."""
    c = (row % C)[:, None]
    is_real = c == 0
    if HALF % 2 == 0:
        is_real |= c == C - 1
    return tl.where(is_real, 1.0, 2.0)


@triton.jit
def _gate(gate, SNN: tl.constexpr):
    """Return SELU(gate) or GELU(gate), and its derivative."""
    if SNN:
        scale: tl.constexpr = 1.0507009873554805
        alpha: tl.constexpr = 1.6732632423543772 * scale
        exp_gate = alpha * tl.exp(tl.minimum(gate, 0.0))
        value = tl.where(gate > 0, scale * gate, exp_gate - alpha)
        return value, tl.where(gate > 0, scale, exp_gate)
    cdf = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
    return gate * cdf, cdf + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)


@triton.jit
def _scratch_rows(
    base_ptr, first, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr
):
    """Return pointers to columns first to first + BLOCK of a program's rows of scratch memory.

    Each program has [BLOCK_C, BLOCK_D] numbers there. Products over D load their rows from it in
    steps: in tf32x3, two parts of whole rows are more than the registers hold (up to 260 spill
    stores). tl.debug_barrier separates a store from the loads behind it: threads load what others
    stored.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    return base_ptr + row[:, None] * BLOCK_D + first + tl.arange(0, BLOCK)[None, :]


@triton.jit
def _draw_kept(
    seed_ptr, kept_ptr, row, dropout_p, C: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write which numbers of a program's rows dropout keeps, keyed by sample, latent and channel.

    To memory, and before the loops over the hidden layer: drawn after these, they spill (2 to 17
    stores for 256 rows of 32). A Philox call gives four words, for four channels.
    """
    quad = tl.arange(0, BLOCK_D // 4)[None, :]
    sample, latent = (row // C).to(tl.int32)[:, None], (row % C).to(tl.int32)[:, None]
    zero = latent * 0 + quad * 0
    words = tl.philox(tl.load(seed_ptr), quad + zero, latent + zero, sample + zero, 0)
    threshold = (tl.full([1, 1], dropout_p, tl.float32) * 4294967296.0).to(tl.uint32)
    at = _scratch_rows(kept_ptr, 0, BLOCK_C, BLOCK_D, BLOCK_D // 4) + 3 * quad
    for i in tl.static_range(4):
        tl.store(at + i, (words[i] >= threshold).to(tl.int8))


@triton.jit
def _kept(kept_ptr, kept_scale, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return what dropout multiplies a program's rows by: 0 or kept_scale."""
    return (
        tl.load(_scratch_rows(kept_ptr, 0, BLOCK_C, BLOCK_D, BLOCK_D)).to(tl.float32) * kept_scale
    )


@triton.jit
def _hidden(
    normed_ptr, update_ptr, bias_ptr, f0, D: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Return BLOCK_F values and gates of the hidden layer: all 8 D would not fit in registers."""
    f = f0 + tl.arange(0, BLOCK_F)
    value = tl.zeros([BLOCK_C, BLOCK_F], tl.float32)
    gate = tl.zeros([BLOCK_C, BLOCK_F], tl.float32)
    for k0 in range(0, D, BLOCK_K):
        part = tl.load(_scratch_rows(normed_ptr, k0, BLOCK_C, BLOCK_D, BLOCK_K))
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
    """Return rows of latents after the update, also those of samples that keep their real part."""
    bias_ptr = update_ptr + 12 * D * D + D * H * E
    pre = _load_attended(
        attended_ptr, update_ptr + 12 * D * D, None, row, valid, b_stride, h_stride, c_stride,
        C, D, H, E, DTYPE, BLOCK_C, BLOCK_D, BLOCK_E,
    )  # fmt: skip
    pre += _load_vector(bias_ptr + 8 * D, 0, D, BLOCK_D)
    x = tl.where(pre > 0, pre, SLOPE * pre) + load_tile(real_ptr, place, D, valid, 0, D, BLOCK_D)
    normed = _normed(_standardised(x, D, BLOCK_D)[0], bias_ptr + 9 * D, D, BLOCK_D).to(DTYPE)
    tl.store(_scratch_rows(normed_ptr, 0, BLOCK_C, BLOCK_D, BLOCK_D), normed)
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
    """Update and normalise latents, and compute their queries: BLOCK_C rows, or those of a sample.

    x = real + LeakyReLU(out attended + out_bias); x += keep (down (value act(gate)) + down_bias);
    s = 1 / sqrt(sum |Z|^2 / count); queries = query_weight LN(s x). No update without `attended`.
    HALF: rows of the full spectrum if the first C are here, 0 if all are. x stays in registers
    throughout; `place` is a row's place in `real`, which all samples share if SHARED. normed_ptr
    and kept_ptr are scratch memory.
    """
    row, valid = _program_rows(n_rows, C, BLOCK_C, ALONG_C)
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
        normal, _ = _standardised(x, D, BLOCK_D)
        normed = _normed(normal, query_weights_ptr + Q * D, D, BLOCK_D).to(DTYPE)
        tl.debug_barrier()
        tl.store(_scratch_rows(normed_ptr, 0, BLOCK_C, BLOCK_D, BLOCK_D), normed)
        tl.debug_barrier()
        for q0 in range(0, Q, BLOCK_E):
            q = q0 + tl.arange(0, BLOCK_E)
            query = tl.zeros([BLOCK_C, BLOCK_E], tl.float32)
            for k0 in range(0, D, BLOCK_K):
                part = tl.load(_scratch_rows(normed_ptr, k0, BLOCK_C, BLOCK_D, BLOCK_K))
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
    """Go back from the results of pass_kernel to the real and imaginary part before the scale s.

    With z = s Z and w the rows that each stands for, dZ = s (dz - w z sum(dz z) / count), where
    dz includes the part that comes through the queries. If there are queries, normed [B C, BLOCK_D]
    and partial [programs, 2 D], sums over the rows, are written for the gradients of their weights.
    """
    row, valid = _program_rows(n_rows, C, BLOCK_C, ALONG_C)
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
        inner = dx * x
        if y_ptr is not None:
            y = load_tile(y_ptr, row, D, valid, 0, D, BLOCK_D).to(tl.float32)
            dy = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
            if dy_ptr is not None:
                dy += load_tile(dy_ptr, row, D, valid, 0, D, BLOCK_D)
            inner += dy * y
        at, mask = _scale_places(row, valid, D, BLOCK_D, ALONG_C, ALONG_D)
        scale = tl.load(scale_ptr + at, mask=mask, other=0.0)
        # Of half a spectrum every row counts once here: only these rows are results with gradients.
        radial = _total(inner, row, C, 0, ALONG_C, ALONG_D) / count
        if scaled_ptr is not None:
            radial = tl.where(_flags(scaled_ptr, row, valid, C, ALONG_C), radial, 0.0)
        # A scale at its bound is constant, and passes no gradient.
        radial = tl.where(scale < LARGEST_SCALE, radial, 0.0)
        weight = tl.full([1, 1], 1.0, tl.float32)
        if HALF > 0:
            weight = _stands_for(row, C, HALF)
        dx = scale * (dx - weight * x * radial)
        if y_ptr is not None:
            store_tile(dy_before_ptr, row, valid, 0, scale * (dy - weight * y * radial), D, BLOCK_D)
    store_tile(dx_before_ptr, row, valid, 0, dx, D, BLOCK_D)


@triton.jit
def _updated_gradient(
    dx_ptr, present_ptr, row, valid, C: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Return the gradient of the updated rows, zero for rows of samples without an update."""
    dx = load_tile(dx_ptr, row, D, valid, 0, D, BLOCK_D).to(tl.float32)
    # No early return: Triton compiles the code behind it too, even for a pointer of None.
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
    """Go back through the update of BLOCK_C rows, of any samples, computing it again step by step.

    Written for the gradients of the matrices: flat [B C, H E] (attended), dpre (of its projection),
    normed, dhidden (of values, then of gates), gated, dout (of the feed-forward's result); and for
    those of the vectors partial [programs, 12 D], sums over a program's rows of dhidden, dpre, the
    LayerNorm's gain and shift, dout.
    """
    row, valid = _program_rows(n_rows, C, BLOCK_C, False)
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
    tl.store(_scratch_rows(normed_ptr, 0, BLOCK_C, BLOCK_D, BLOCK_D), normed)
    dout = _updated_gradient(dx_ptr, present_ptr, row, valid, C, D, BLOCK_D)
    if seed_ptr is not None:
        _draw_kept(seed_ptr, kept_ptr, row, dropout_p, C, BLOCK_C, BLOCK_D)
        tl.debug_barrier()
        dout *= _kept(kept_ptr, kept_scale, BLOCK_C, BLOCK_D)
    _store_sum(partial_ptr, 11 * D, dout, 12 * D, D, BLOCK_D)
    tl.store(_scratch_rows(dout_ptr, 0, BLOCK_C, BLOCK_D, BLOCK_D), dout.to(DTYPE))
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
            part = tl.load(_scratch_rows(dout_ptr, k0, BLOCK_C, BLOCK_D, BLOCK_K))
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
    tl.store(_scratch_rows(dpre_ptr, 0, BLOCK_C, BLOCK_D, BLOCK_D), dpre.to(DTYPE))
    tl.debug_barrier()
    tiles: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    dattended_ptr += (row // C * C * H * E + row % C * E)[:, None]
    for i in range(0, H * tiles):
        head = i // tiles
        e = i % tiles * BLOCK_E + tl.arange(0, BLOCK_E)
        in_head = (e < E)[None, :]
        dh = tl.zeros([BLOCK_C, BLOCK_E], tl.float32)
        for k0 in range(0, D, BLOCK_K):
            part = tl.load(_scratch_rows(dpre_ptr, k0, BLOCK_C, BLOCK_D, BLOCK_K))
            k = (k0 + tl.arange(0, BLOCK_K))[:, None]
            at = out_ptr + k * (H * E) + head * E + e[None, :]
            weight = tl.load(at, mask=(k < D) & in_head, other=0.0).to(DTYPE)
            dh = product(part, weight, dh)
        at = dattended_ptr + head * (C * E) + e[None, :]
        tl.store(at, dh.to(dattended_ptr.dtype.element_ty), mask=valid[:, None] & in_head)
