"""The Triton kernels of absorbed_attention: the softmax of the scores, and its gradient.

triton.py launches them, between the products with the tokens, which context_kv's kernels compute.
The scores are [T, R], R = heads x latents: a token's row has the scores of all queries of its bag.
The softmax goes along T, within a bag, so that it takes two launches: softmax_statistics_kernel
writes the maximum and the sum of each chunk of a bag, softmax_weights_kernel joins those of all
chunks of the bag and writes the weights. In all three kernels a program has CHUNK rows of one bag
(see ragged_kernels.py) and BLOCK_R columns; it reads BLOCK_N rows at a time and keeps one number
for each column in registers. Chunks are counted from the start of the bag and joined in
order: a bag gives the same bits in any batch. Masks are false for rows behind the chunk's end and
for columns behind R.
"""

import triton
import triton.language as tl

from ..context_kv.triton_kernels import add_positions, store_side
from ..dropout_kernels import kept_weights
from ..ragged_kernels import chunk_of_slot, chunks_of_bag
from ..tile_kernels import row_factors


@triton.jit
def _tile(slot, offsets_ptr, n_bags, R: tl.constexpr, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr):
    """Return a program's bag, the bag's first row, the first row and the end of its chunk, its
    columns, and which of them exist.

    Rows `start` to `stop` are counted from the bag's first one, `origin`.
    """
    bag, origin, start, stop = chunk_of_slot(slot, offsets_ptr, n_bags, 0, CHUNK, True)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    return bag, origin, start, stop, r, r < R


@triton.jit
def _log_counts(base, n, stop):
    """Return the logarithms of the counts of rows n, 0 from `stop` on."""
    return tl.log(tl.load(base + n, mask=n < stop, other=1.0))


@triton.jit(do_not_specialize=["n_bags"])
def softmax_statistics_kernel(
    scores_ptr, offsets_ptr, counts_ptr, peak_ptr, total_ptr, n_bags,
    R: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    COUNTS: tl.constexpr,
):  # fmt: skip
    """Store peak = max_t s and total = sum_t e^(s - peak) of one chunk of a bag, [slots, R] each.

    Here and below, s is the score plus the logarithm of the token's count. The sum is relative to
    the highest score so far, and shrinks when a higher one comes, so that no exponential overflows.
    """
    slot = tl.program_id(0)
    _, origin, start, stop, r, valid = _tile(slot, offsets_ptr, n_bags, R, CHUNK, BLOCK_R)
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for n0 in range(start, stop, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        mask = (n[:, None] < stop) & valid[None, :]
        at = (origin + n)[:, None] * R + r[None, :]
        s = tl.load(scores_ptr + at, mask=mask, other=float("-inf")).to(tl.float32)
        if COUNTS:
            s += _log_counts(counts_ptr + origin, n, stop)[:, None]
        highest = tl.maximum(peak, tl.max(s, 0))
        # Columns behind R have only scores of -inf: minus their maximum, they would be NaN.
        base = tl.where(valid, highest, 0.0)
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(s - base[None, :]), 0)
        peak = highest
    at = slot.to(tl.int64) * R + r
    tl.store(peak_ptr + at, peak, mask=valid & (start < stop))
    tl.store(total_ptr + at, total, mask=valid & (start < stop))


@triton.jit
def _lse(
    bag, peak_ptr, total_ptr, offsets_ptr, r, valid, R: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Return the log-sum-exp of a bag from peak and total of its chunks; -inf for an empty bag."""
    slot, chunks = chunks_of_bag(bag, offsets_ptr, 0, CHUNK, True)
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for j in range(0, chunks):
        at = (slot + j) * R + r
        chunk_peak = tl.load(peak_ptr + at, mask=valid, other=0.0)
        chunk_total = tl.load(total_ptr + at, mask=valid, other=0.0)
        highest = tl.maximum(peak, chunk_peak)
        total = total * tl.exp(peak - highest) + chunk_total * tl.exp(chunk_peak - highest)
        peak = highest
    return peak + tl.log(tl.where(total > 0, total, 1.0))


@triton.jit(do_not_specialize=["n_bags", "n_positions"])
def softmax_weights_kernel(
    scores_ptr, peak_ptr, total_ptr, offsets_ptr, counts_ptr, seed_ptr, p_ptr, mean_ptr, rstd_ptr,
    weights_ptr, lse_ptr, side_ptr, p_t, n_positions, n_bags, eps, dropout_p, undrop,
    R: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
    DROPOUT: tl.constexpr, COUNTS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Store the weights after dropout, D = keep e^(s - lse) [T, R], times rstd if SCALED.

    side[slot, r] = [sum_t D | sum_t D phat[t]] over the chunk: the mass, and the positional part of
    what is pooled, which takes few numbers and so is summed here; pool_kernel pools x alone.
    SCALED: the weights are multiplied by the token's rstd, since the pooling reads x as it lies in
    memory, not normalised. Every program computes the bag's lse, so that no launch is needed
    in between; the program of the bag's first chunk stores it.
    """
    slot = tl.program_id(0)
    bag, origin, start, stop, r, valid = _tile(slot, offsets_ptr, n_bags, R, CHUNK, BLOCK_R)
    lse = _lse(bag, peak_ptr, total_ptr, offsets_ptr, r, valid, R, CHUNK, BLOCK_R)
    tl.store(lse_ptr + bag * R + r, lse, mask=valid & (start == 0))
    mass = tl.zeros([BLOCK_R], tl.float32)
    places = tl.zeros([BLOCK_R, BLOCK_P], tl.float32)
    for n0 in range(start, stop, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        mask = (n[:, None] < stop) & valid[None, :]
        t = origin + n
        at = t[:, None] * R + r[None, :]
        s = tl.load(scores_ptr + at, mask=mask, other=float("-inf")).to(tl.float32)
        if COUNTS:
            s += _log_counts(counts_ptr + origin, n, stop)[:, None]
        weight = tl.where(mask, tl.exp(s - lse[None, :]), 0.0)
        if DROPOUT:
            kept = tl.trans(
                kept_weights(tl.load(seed_ptr), n0, r, bag.to(tl.int32), dropout_p, BLOCK_N)
            )
            weight = tl.where(kept, weight * undrop, 0.0)
        mass += tl.sum(weight, 0)
        if SCALED:
            weight *= row_factors(rstd_ptr, t, n < stop, eps)[:, None]
        weight = weight.to(weights_ptr.dtype.element_ty)
        tl.store(weights_ptr + at, weight, mask=mask)
        if P > 0:
            places = add_positions(
                places, weight, p_ptr, p_t, t, n < stop, n_positions, mean_ptr, rstd_ptr, P,
                BLOCK_P, SCALED,
            )  # fmt: skip
    store_side(side_ptr, slot, r, mass, places, start, stop, R, P, BLOCK_P)


@triton.jit(do_not_specialize=["n_bags", "n_positions"])
def softmax_gradient_kernel(
    scores_ptr, lse_ptr, dweights_ptr, dmass_ptr, delta_ptr, offsets_ptr, counts_ptr,
    seed_ptr, p_ptr, mean_ptr, rstd_ptr, side_ptr, p_t, n_positions, n_bags, eps, dropout_p, undrop,
    R: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
    DROPOUT: tl.constexpr, COUNTS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Replace dweights [T, R] by the gradient of the scores, dS = A (mask (dA + dmass) - delta).

    It is multiplied by rstd if SCALED. side[slot, r] = [sum_t dS | sum_t dS phat[t]] over the chunk
    of dS after its rounding: combine_pool_kernel removes with these sums what rounding added.
    """
    slot = tl.program_id(0)
    bag, origin, start, stop, r, valid = _tile(slot, offsets_ptr, n_bags, R, CHUNK, BLOCK_R)
    lse = tl.load(lse_ptr + bag * R + r, mask=valid, other=0.0)
    dmass = tl.load(dmass_ptr + bag * R + r, mask=valid, other=0.0).to(tl.float32)
    delta = tl.load(delta_ptr + bag * R + r, mask=valid, other=0.0)
    sums = tl.zeros([BLOCK_R], tl.float32)
    places = tl.zeros([BLOCK_R, BLOCK_P], tl.float32)
    for n0 in range(start, stop, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        mask = (n[:, None] < stop) & valid[None, :]
        t = origin + n
        at = t[:, None] * R + r[None, :]
        s = tl.load(scores_ptr + at, mask=mask, other=float("-inf")).to(tl.float32)
        if COUNTS:
            s += _log_counts(counts_ptr + origin, n, stop)[:, None]
        grad = tl.load(dweights_ptr + at, mask=mask, other=0.0).to(tl.float32) + dmass[None, :]
        if DROPOUT:
            kept = tl.trans(
                kept_weights(tl.load(seed_ptr), n0, r, bag.to(tl.int32), dropout_p, BLOCK_N)
            )
            grad = tl.where(kept, grad * undrop, 0.0)
        grad = tl.where(mask, tl.exp(s - lse[None, :]) * (grad - delta[None, :]), 0.0)
        if SCALED:
            factor = row_factors(rstd_ptr, t, n < stop, eps)[:, None]
            rounded = (grad * factor).to(dweights_ptr.dtype.element_ty)
            sums += tl.sum(tl.where(factor > 0, rounded.to(tl.float32) / factor, grad), 0)
        else:
            rounded = grad.to(dweights_ptr.dtype.element_ty)
            sums += tl.sum(rounded.to(tl.float32), 0)
        tl.store(dweights_ptr + at, rounded, mask=mask)
        if P > 0:
            places = add_positions(
                places, rounded, p_ptr, p_t, t, n < stop, n_positions, mean_ptr, rstd_ptr, P,
                BLOCK_P, SCALED,
            )  # fmt: skip
    store_side(side_ptr, slot, r, sums, places, start, stop, R, P, BLOCK_P)
