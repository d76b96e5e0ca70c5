"""The Triton kernels of latent_attention; triton.py says how they are launched.

A slot is a chunk of one bag's keys (ragged_kernels.py). q_b, q_h and q_c are the strides of q
between bags, heads and latents; others alike. Exponentials are powers of 2, one instruction each:
scores are multiplied by log2(e). Keys and latents behind the last are loaded as zeros; they get the
score -inf or the weight 0, and are not stored.
"""

import triton
import triton.language as tl

from ..dropout_kernels import kept_weights
from ..ragged_kernels import chunk_of_any_row, chunk_of_slot, chunks_of_bag
from ..tile_kernels import PRECISION

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_rows(base, row, stride, valid, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Load rows [BLOCK, BLOCK_E] of width E, zeros elsewhere."""
    e = tl.arange(0, BLOCK_E)
    pointer = base + row[:, None] * stride + e[None, :]
    if E == BLOCK_E:
        return tl.load(pointer, mask=valid[:, None], other=0.0)
    return tl.load(pointer, mask=valid[:, None] & (e[None, :] < E), other=0.0)


@triton.jit
def _store_rows(base, row, stride, valid, value, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Store rows [BLOCK, BLOCK_E] of width E."""
    e = tl.arange(0, BLOCK_E)
    pointer = base + row[:, None] * stride + e[None, :]
    mask = valid[:, None] & (e[None, :] < E)
    tl.store(pointer, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _load_heads(
    base, head_stride, row, stride, valid, E: tl.constexpr, BLOCK_E: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Load rows of one head, [BLOCK, BLOCK_E], or of several, [HEADS, BLOCK, BLOCK_E].

    One head has no axis for it: Triton uses Hopper's wgmma for products of matrices only.
    """
    if HEADS == 1:
        value = _load_rows(base, row, stride, valid, E, BLOCK_E)
    else:
        h, e = tl.arange(0, HEADS), tl.arange(0, BLOCK_E)
        # In the order of memory: neighbouring threads read neighbouring heads of a row.
        pointer = base + row[:, None, None] * stride + h[None, :, None] * head_stride
        mask = valid[:, None, None]
        if E != BLOCK_E:
            mask &= e[None, None, :] < E
        value = tl.load(pointer + e[None, None, :], mask=mask, other=0.0)
        value = tl.permute(value, (1, 0, 2))
    return value


@triton.jit
def _store_heads(
    base, head_stride, row, stride, valid, value, E: tl.constexpr, BLOCK_E: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Store what _load_heads loads."""
    if HEADS == 1:
        _store_rows(base, row, stride, valid, value, E, BLOCK_E)
    else:
        h, e = tl.arange(0, HEADS), tl.arange(0, BLOCK_E)
        pointer = base + row[:, None, None] * stride + h[None, :, None] * head_stride
        mask = valid[:, None, None] & (e[None, None, :] < E)
        value = tl.permute(value.to(base.dtype.element_ty), (1, 0, 2))
        tl.store(pointer + e[None, None, :], value, mask=mask)


@triton.jit
def _at_heads(column, head_stride, HEADS: tl.constexpr):
    """Return the offsets of `column`, [BLOCK], in one head, or [HEADS, BLOCK] in several."""
    return column if HEADS == 1 else tl.arange(0, HEADS)[:, None] * head_stride + column[None, :]


@triton.jit
def _zeros(BLOCK: tl.constexpr, BLOCK_E: tl.constexpr, HEADS: tl.constexpr):
    if HEADS == 1:
        zeros = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    else:
        zeros = tl.zeros([HEADS, BLOCK, BLOCK_E], tl.float32)
    return zeros


@triton.jit
def _transposed(x):
    """Return x [.., M, N] as [.., N, M]."""
    return tl.trans(x) if len(x.shape) == 2 else tl.permute(x, (0, 2, 1))


@triton.jit
def _kept(
    seed, n0, row, bag, dropout_p, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Return which weights [BLOCK_C, BLOCK_N] or [HEADS, BLOCK_C, BLOCK_N] are kept."""
    if HEADS == 1:
        kept = kept_weights(seed, n0, row, bag, dropout_p, BLOCK_N)
    else:
        row = tl.reshape(row, [HEADS * BLOCK_C])
        kept = kept_weights(seed, n0, row, bag, dropout_p, BLOCK_N)
        kept = tl.reshape(kept, [HEADS, BLOCK_C, BLOCK_N])
    return kept


@triton.jit
def _log2_counts(base, n, length):
    """Return log2 of the counts of keys n, to add to their scores; 0 from `length` on."""
    return tl.log2(tl.load(base + n, mask=n < length, other=1.0))


@triton.jit(do_not_specialize=["n_bags", "n_keys"])
def attend_kernel(
    q_ptr, k_ptr, v_ptr, offsets_ptr, counts_ptr, partial_ptr, peak_ptr, total_ptr, seed_ptr,
    q_b, q_h, q_c, k_b, k_h, k_n, v_b, v_h, v_n,
    n_bags, n_keys, H, scale, dropout_p, undrop,
    C: tl.constexpr, E: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    RAGGED: tl.constexpr, DROPOUT: tl.constexpr, COUNTS: tl.constexpr, HEADS: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
):  # fmt: skip
    """Reduce one chunk of keys for HEADS heads and up to BLOCK_C latents.

    With s = scale q k^T + log counts over the chunk's keys n: peak = max_n s log2(e),
    total = sum_n 2^(s log2(e) - peak), partial = sum_n dropped 2^(s log2(e) - peak) v_n.
    partial [slots, H, C, PADDED], peak and total [slots, H, C]. ONE_CHUNK: every bag is one chunk,
    and the final out and lse are written instead of partial and peak.

    q, partial, peak and total stay in registers while the loop reads the keys and values (flash
    attention); sums are relative to the highest score so far, and shrink when a higher one comes.
    Dropout comes after the softmax: total includes the weights that it drops. Rows of K and V have
    PADDED numbers, zeros from the Eth on, so that loads can be asynchronous.
    """
    program = tl.program_id(0)
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    head = program // tiles % (H // HEADS) * HEADS
    slot = program // tiles // (H // HEADS)
    bag, origin, start, stop = chunk_of_slot(slot, offsets_ptr, n_bags, n_keys, CHUNK, RAGGED)
    if start >= stop:
        return
    c = program % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    q = _load_heads(q_ptr + bag * q_b + head * q_h, q_h, c, q_c, c < C, E, BLOCK_E, HEADS)
    first = origin + start
    k_ptr += bag * k_b + head * k_h + first * k_n
    v_ptr += bag * v_b + head * v_h + first * v_n
    if COUNTS:
        counts_ptr += bag * n_keys + first
    length = stop - start
    if DROPOUT:
        seed = tl.load(seed_ptr)
    partial = _zeros(BLOCK_C, BLOCK_E, HEADS)
    total = tl.sum(partial, -1)
    peak = total + float("-inf")
    for n0 in range(0, length, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        k = _load_heads(k_ptr, k_h, n, k_n, n < length, PADDED, BLOCK_E, HEADS)
        s = tl.dot(q, _transposed(k), input_precision=PRECISION) * (scale * LOG2_E)
        if COUNTS:
            s += _log2_counts(counts_ptr, n, length)[None, :]
        s = tl.where(n[None, :] < length, s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, -1))
        shrink = tl.exp2(peak - new_peak)
        p = tl.exp2(s - tl.expand_dims(new_peak, -1))
        total = total * shrink + tl.sum(p, -1)
        if DROPOUT:
            at = head * C + _at_heads(c, C, HEADS)
            kept = _kept(seed, start + n0, at, bag.to(tl.int32), dropout_p, BLOCK_C, BLOCK_N, HEADS)
            p = tl.where(kept, p, 0.0)
        v = _load_heads(v_ptr, v_h, n, v_n, n < length, PADDED, BLOCK_E, HEADS)
        partial = partial * tl.expand_dims(shrink, -1)
        partial = tl.dot(p.to(v.dtype), v, partial, input_precision=PRECISION)
        peak = new_peak
    if ONE_CHUNK:
        partial = partial * tl.expand_dims(undrop / total, -1)
        peak = (peak + tl.log2(total)) * LN_2
    row = (slot.to(tl.int64) * H + head) * C
    _store_heads(
        partial_ptr + row * PADDED, C * PADDED, c, PADDED, c < C, partial, PADDED, BLOCK_E, HEADS
    )
    at, valid = row + _at_heads(c, C, HEADS), _at_heads(c, 0, HEADS) < C
    tl.store(peak_ptr + at, peak, mask=valid)
    if not ONE_CHUNK:
        tl.store(total_ptr + at, total, mask=valid)


@triton.jit(do_not_specialize=["n_keys"])
def combine_attend_kernel(
    partial_ptr, peak_ptr, total_ptr, offsets_ptr, out_ptr, lse_ptr, n_keys, H, undrop,
    C: tl.constexpr, E: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Add the chunks of one bag, head and latent in order.

    lse, and out = undrop sum_j 2^(peak_j - max) partial_j / sum_j 2^(peak_j - max) total_j.
    """
    program = tl.program_id(0)
    bag = program // C // H
    row = program % (C * H)
    slot, chunks = chunks_of_bag(bag, offsets_ptr, n_keys, CHUNK, RAGGED)
    BLOCK_J: tl.constexpr = 2048 // BLOCK_E
    e = tl.arange(0, BLOCK_E)
    peak = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    out = tl.zeros([BLOCK_E], tl.float32)
    for j0 in range(0, chunks, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        at = (slot + j) * (C * H) + row
        chunk_peak = tl.load(peak_ptr + at, mask=j < chunks, other=float("-inf"))
        chunk_total = tl.load(total_ptr + at, mask=j < chunks, other=0.0)
        mask = (j[:, None] < chunks) & (e[None, :] < E)
        chunk_out = tl.load(partial_ptr + at[:, None] * PADDED + e[None, :], mask=mask, other=0.0)
        new_peak = tl.maximum(peak, tl.max(chunk_peak, 0))
        shrink = tl.exp2(peak - new_peak)
        factor = tl.exp2(chunk_peak - new_peak)
        total = total * shrink + tl.sum(factor * chunk_total, 0)
        out = out * shrink + tl.sum(factor[:, None] * chunk_out, 0)
        peak = new_peak
    total = tl.where(chunks > 0, total, 1.0)  # an empty bag: out = 0, lse = -inf
    at = program.to(tl.int64)
    out = out * (undrop / total)
    tl.store(out_ptr + at * E + e, out.to(out_ptr.dtype.element_ty), mask=e < E)
    tl.store(lse_ptr + at + tl.arange(0, 1), (peak + tl.log2(total)) * LN_2)


@triton.jit
def _store_record(
    records_ptr, c, q, dout, lse, delta, seed,
    C: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Write what dkv_kernel needs of latents: q and dout, then lse, delta and the seed's 4 words.

    A row of a record has 2 R + 8 numbers, R being E up to the next multiple of 16; the last two are
    zero. A word has 16 bits of the seed: fp32 holds such integers exactly.
    """
    R: tl.constexpr = (E + 15) // 16 * 16
    W: tl.constexpr = 2 * R + 8
    _store_heads(records_ptr, C * W, c, W, c < C, q, R, BLOCK_E, HEADS)
    _store_heads(records_ptr + R, C * W, c, W, c < C, dout, R, BLOCK_E, HEADS)
    i = tl.arange(0, 8)
    word = (seed >> (16 * tl.minimum(tl.maximum(i - 2, 0), 3)).to(tl.int64)) & 0xFFFF
    tail = tl.where(i < 6, word, 0).to(tl.float32)[None, :]
    tail = tl.where(i[None, :] == 0, tl.expand_dims(lse, -1), tail)
    tail = tl.where(i[None, :] == 1, tl.expand_dims(delta, -1), tail)
    _store_heads(records_ptr + 2 * R, C * W, c, W, c < C, tail, 8, 8, HEADS)


@triton.jit
def _seed_of(tail_ptr, valid):
    """Return the seeds [BLOCK_C] that records hold in words of 16 bits."""
    seed = tl.load(tail_ptr + 2, mask=valid, other=0.0).to(tl.int64)
    seed |= tl.load(tail_ptr + 3, mask=valid, other=0.0).to(tl.int64) << 16
    seed |= tl.load(tail_ptr + 4, mask=valid, other=0.0).to(tl.int64) << 32
    return seed | (tl.load(tail_ptr + 5, mask=valid, other=0.0).to(tl.int64) << 48)


@triton.jit(do_not_specialize=["n_bags", "n_keys"])
def dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, offsets_ptr, counts_ptr, out_ptr, lse_ptr, partial_ptr,
    records_ptr, seed_ptr,
    dout_b, dout_h, dout_c, q_b, q_h, q_c, k_b, k_h, k_n, v_b, v_h, v_n,
    dq_b, dq_h, dq_c,
    n_bags, n_keys, H, scale, dropout_p, undrop,
    C: tl.constexpr, E: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    RAGGED: tl.constexpr, DROPOUT: tl.constexpr, COUNTS: tl.constexpr, HEADS: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the part of dq / scale of one chunk of keys, for HEADS heads and BLOCK_C latents.

    p = exp(scale q k^T + log counts - lse), ds = p (kept undrop dout v^T - delta) and partial =
    ds k, [slots, H, C, PADDED]; delta = rowsum(dout out) includes the dropout, since out does. A
    slot without keys writes zeros: combine_dq_kernel adds all slots if all bags share the queries.
    ONE_CHUNK: every bag is one chunk, and dq is written instead of partial. The programs of a bag's
    first chunk write its records [B, H, C, .] too. q, dout and dq stay in registers.
    """
    program = tl.program_id(0)
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    head = program // tiles % (H // HEADS) * HEADS
    slot = program // tiles // (H // HEADS)
    bag, origin, start, stop = chunk_of_slot(slot, offsets_ptr, n_bags, n_keys, CHUNK, RAGGED)
    c = program % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    row = (bag * H + head) * C
    q = _load_heads(q_ptr + bag * q_b + head * q_h, q_h, c, q_c, c < C, E, BLOCK_E, HEADS)
    dout_ptr += bag * dout_b + head * dout_h
    dout = _load_heads(dout_ptr, dout_h, c, dout_c, c < C, E, BLOCK_E, HEADS).to(q.dtype)
    # From the result in float32: an error of delta is multiplied by the mean of the bag's keys.
    out = _load_heads(out_ptr + row * E, C * E, c, E, c < C, E, BLOCK_E, HEADS)
    delta = tl.sum(dout.to(tl.float32) * out, -1)
    at, valid = _at_heads(c, C, HEADS), _at_heads(c, 0, HEADS) < C
    lse = tl.load(lse_ptr + row + at, mask=valid, other=0.0) * LOG2_E
    seed = bag * 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    if start == 0:
        records_ptr += row * (2 * ((E + 15) // 16 * 16) + 8)
        _store_record(records_ptr, c, q, dout, lse, delta, seed, C, E, BLOCK_E, HEADS)
    first = origin + start
    k_ptr += bag * k_b + head * k_h + first * k_n
    v_ptr += bag * v_b + head * v_h + first * v_n
    if COUNTS:
        counts_ptr += bag * n_keys + first
    length = stop - start
    dq = _zeros(BLOCK_C, BLOCK_E, HEADS)
    for n0 in range(0, length, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        k = _load_heads(k_ptr, k_h, n, k_n, n < length, PADDED, BLOCK_E, HEADS)
        v = _load_heads(v_ptr, v_h, n, v_n, n < length, PADDED, BLOCK_E, HEADS)
        s = tl.dot(q, _transposed(k), input_precision=PRECISION) * (scale * LOG2_E)
        if COUNTS:
            s += _log2_counts(counts_ptr, n, length)[None, :]
        p = tl.where(n[None, :] < length, tl.exp2(s - tl.expand_dims(lse, -1)), 0.0)
        dp = tl.dot(dout, _transposed(v), input_precision=PRECISION)
        if DROPOUT:
            kept = _kept(
                seed, start + n0, head * C + at, bag.to(tl.int32), dropout_p, BLOCK_C, BLOCK_N,
                HEADS,
            )  # fmt: skip
            dp = tl.where(kept, dp * undrop, 0.0)
        # The weight of a bag's only key is 1, whatever q and k are: ds is 0, not 1e-6 of rounding.
        ds = tl.where(stop > 1, p * (dp - tl.expand_dims(delta, -1)), 0.0).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    if ONE_CHUNK:
        partial_ptr += bag * dq_b + head * dq_h
        _store_heads(partial_ptr, dq_h, c, dq_c, c < C, dq * scale, E, BLOCK_E, HEADS)
    else:
        partial_ptr += (slot.to(tl.int64) * H + head) * C * PADDED
        _store_heads(partial_ptr, C * PADDED, c, PADDED, c < C, dq, PADDED, BLOCK_E, HEADS)


@triton.jit(do_not_specialize=["n_keys", "n_slots"])
def combine_dq_kernel(
    partial_ptr, offsets_ptr, dq_ptr, dq_b, dq_h, dq_c, n_keys, n_slots, H, scale,
    C: tl.constexpr, E: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr, RAGGED: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Add the chunks of one bag, head and latent in order: dq = scale sum_j partial_j.

    SHARED: all bags have the same queries, and the chunks of all bags are added.
    """
    program = tl.program_id(0)
    BLOCK_J: tl.constexpr = 2048 // BLOCK_E
    bag = (program // C // H).to(tl.int64)
    row = program % (C * H)
    if SHARED:
        slot, chunks = bag * 0, n_slots
    else:
        slot, chunks = chunks_of_bag(bag, offsets_ptr, n_keys, CHUNK, RAGGED)
    e = tl.arange(0, BLOCK_E)
    dq = tl.zeros([BLOCK_E], tl.float32)
    for j0 in range(0, chunks, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        at = (slot + j) * (C * H) + row
        mask = (j[:, None] < chunks) & (e[None, :] < E)
        chunk_dq = tl.load(partial_ptr + at[:, None] * PADDED + e[None, :], mask=mask, other=0.0)
        dq += tl.sum(chunk_dq, 0)
    at = bag * dq_b + row // C * dq_h + row % C * dq_c + e
    tl.store(dq_ptr + at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=e < E)


@triton.jit(do_not_specialize=["n_bags", "n_keys", "n_rows", "n_latents"])
def dkv_kernel(
    records_ptr, k_ptr, v_ptr, offsets_ptr, counts_ptr, dk_ptr, dv_ptr,
    k_b, k_h, k_n, v_b, v_h, v_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    n_bags, n_keys, n_rows, n_latents, H, scale, dropout_p, undrop,
    C: tl.constexpr, E: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    RAGGED: tl.constexpr, DROPOUT: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of BLOCK_N keys of one head, from the records of all layers' latents.

    With p and ds as in dq_kernel, dv = (kept undrop p)^T dout and dk = scale ds^T q, summed over
    the n_latents = L C rows of records [B, H, L C, .] in order. A row of zeros adds nothing: its
    dout and its delta are zero. Of n_rows ragged keys, those behind the last bag get zeros: they
    are rows of the product that gives the gradient of the weights. k, v, dk and dv stay in
    registers while the loop reads the latents: tiles are [keys, latents], not as above.
    """
    program = tl.program_id(0)
    head = program % H
    slot = program // H
    if RAGGED:
        bag, origin, start, stop = chunk_of_any_row(slot, offsets_ptr, n_bags, n_rows, BLOCK_N)
    else:
        bag, origin, start, stop = chunk_of_slot(slot, offsets_ptr, n_bags, n_keys, BLOCK_N, RAGGED)
    if start >= stop:
        return
    first = origin + start
    n = tl.arange(0, BLOCK_N)
    valid = n < stop - start
    k = _load_rows(k_ptr + bag * k_b + head * k_h + first * k_n, n, k_n, valid, PADDED, BLOCK_E)
    v = _load_rows(v_ptr + bag * v_b + head * v_h + first * v_n, n, v_n, valid, PADDED, BLOCK_E)
    if COUNTS:
        log2_counts = _log2_counts(counts_ptr + bag * n_keys + first, n, stop - start)
    R: tl.constexpr = (E + 15) // 16 * 16
    records_ptr += (bag * H + head) * n_latents * (2 * R + 8)
    dk = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for r0 in range(0, tl.where(bag < n_bags, n_latents, 0), BLOCK_C):
        r = r0 + tl.arange(0, BLOCK_C)
        valid_r = r < n_latents
        q = _load_rows(records_ptr, r, 2 * R + 8, valid_r, R, BLOCK_E).to(k.dtype)
        dout = _load_rows(records_ptr + R, r, 2 * R + 8, valid_r, R, BLOCK_E).to(k.dtype)
        tail_ptr = records_ptr + 2 * R + r * (2 * R + 8)
        lse = tl.load(tail_ptr, mask=valid_r, other=0.0)
        delta = tl.load(tail_ptr + 1, mask=valid_r, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2_E)
        if COUNTS:
            s += log2_counts[:, None]
        p = tl.exp2(s - lse[None, :])
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        dropped = p
        if DROPOUT:
            seed = _seed_of(tail_ptr, valid_r)[:, None]
            row = head * C + r % C
            kept = kept_weights(seed, start, row, bag.to(tl.int32), dropout_p, BLOCK_N)
            kept = tl.trans(kept)
            dropped = tl.where(kept, p * undrop, 0.0)
            dp = tl.where(kept, dp * undrop, 0.0)
        dv = tl.dot(dropped.to(k.dtype), dout, dv, input_precision=PRECISION)
        # As in dq_kernel.
        ds = tl.where(stop > 1, p * (dp - delta[None, :]), 0.0).to(k.dtype)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    dk_ptr += bag * dk_b + head * dk_h + first * dk_n
    dv_ptr += bag * dv_b + head * dv_h + first * dv_n
    _store_rows(dk_ptr, n, dk_n, valid, dk * scale, PADDED, BLOCK_E)
    _store_rows(dv_ptr, n, dv_n, valid, dv, PADDED, BLOCK_E)


@triton.jit(do_not_specialize=["n_bags", "n_keys"])
def weights_kernel(
    q_ptr, k_ptr, offsets_ptr, lse_ptr, out_ptr,
    q_b, q_h, q_c, k_b, k_h, k_n, out_b, out_h, out_c, out_n,
    n_bags, n_keys, H, scale,
    C: tl.constexpr, E: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Write exp(scale q k^T - lse) of one chunk of keys, one head and up to BLOCK_C latents."""
    program = tl.program_id(0)
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    head = program // tiles % H
    slot = program // tiles // H
    bag, origin, start, stop = chunk_of_slot(slot, offsets_ptr, n_bags, n_keys, CHUNK, RAGGED)
    if start >= stop:
        return
    c = program % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    q = _load_rows(q_ptr + bag * q_b + head * q_h, c, q_c, c < C, E, BLOCK_E)
    lse = tl.load(lse_ptr + (bag * H + head) * C + c, mask=c < C, other=0.0) * LOG2_E
    first = origin + start
    k_ptr += bag * k_b + head * k_h + first * k_n
    out_ptr += bag * out_b + head * out_h + first * out_n
    length = stop - start
    for n0 in range(0, length, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        k = _load_rows(k_ptr, n, k_n, n < length, E, BLOCK_E)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        p = tl.exp2(s - lse[:, None])
        pointer = out_ptr + c[:, None].to(tl.int64) * out_c + n[None, :].to(tl.int64) * out_n
        mask = (c[:, None] < C) & (n[None, :] < length)
        tl.store(pointer, p.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_bags", "n_keys"])
def mean_weights_kernel(
    q_ptr, k_ptr, offsets_ptr, lse_ptr, out_ptr,
    q_b, q_h, q_c, k_b, k_h, k_n, out_b, out_h, out_c, out_n,
    n_bags, n_keys, H, scale,
    C: tl.constexpr, E: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Write the mean of exp(scale q k^T - lse) over heads and latents for one chunk of keys."""
    slot = tl.program_id(0)
    bag, origin, start, stop = chunk_of_slot(slot, offsets_ptr, n_bags, n_keys, CHUNK, RAGGED)
    if start >= stop:
        return
    first = origin + start
    k_ptr += bag * k_b + first * k_n
    out_ptr += bag * out_b + first * out_n
    length = stop - start
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    for n0 in range(0, length, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        total = tl.zeros([BLOCK_N], tl.float32)
        for i in range(H * tiles):
            head = i // tiles
            c = i % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
            q = _load_rows(q_ptr + bag * q_b + head * q_h, c, q_c, c < C, E, BLOCK_E)
            at = lse_ptr + (bag * H + head) * C + c
            lse = tl.load(at, mask=c < C, other=float("inf")) * LOG2_E  # inf: a weight of 0
            k = _load_rows(k_ptr + head * k_h, n, k_n, n < length, E, BLOCK_E)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
            total += tl.sum(tl.exp2(s - lse[:, None]), 0)
        tl.store(out_ptr + n, total / (H * C), mask=n < length)
