"""The Triton kernels of absorbed_attention; triton.py says how they are launched."""

import triton
import triton.language as tl

from ..dropout_kernels import kept_weights
from ..ragged_kernels import chunk_of_slot, chunks_of_bag


@triton.jit
def _tile(slot, offsets_ptr, n_bags, R: tl.constexpr, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr):
    """Return a program's bag, the bag's first row, its own rows, and its columns with a mask."""
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
    """Store max_t s and sum_t e^(s - max) of one chunk of a bag, [slots, R] each.

    Here and below, s is the score plus the logarithm of the token's count.
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
        base = tl.where(valid, highest, 0.0)  # a column beyond R has no highest score
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(s - base[None, :]), 0)
        peak = highest
    at = slot.to(tl.int64) * R + r
    tl.store(peak_ptr + at, peak, mask=valid & (start < stop))
    tl.store(total_ptr + at, total, mask=valid & (start < stop))


@triton.jit
def combine_softmax_kernel(
    peak_ptr, total_ptr, offsets_ptr, lse_ptr,
    R: tl.constexpr, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Join the chunks of a bag in order: lse [B, R], -inf for an empty bag."""
    bag = tl.program_id(0)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = r < R
    slot, chunks = chunks_of_bag(bag, offsets_ptr, 0, CHUNK, True)
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for j in range(0, chunks):
        at = (slot + j) * R + r
        own_peak = tl.load(peak_ptr + at, mask=valid, other=0.0)
        own_total = tl.load(total_ptr + at, mask=valid, other=0.0)
        highest = tl.maximum(peak, own_peak)
        total = total * tl.exp(peak - highest) + own_total * tl.exp(own_peak - highest)
        peak = highest
    total = tl.where(total > 0, total, 1.0)
    tl.store(lse_ptr + bag.to(tl.int64) * R + r, peak + tl.log(total), mask=valid)


@triton.jit(do_not_specialize=["n_bags"])
def softmax_weights_kernel(
    scores_ptr, lse_ptr, offsets_ptr, counts_ptr, seed_ptr, weights_ptr, mass_ptr, n_bags,
    dropout_p, undrop,
    R: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """Store the weights after dropout, e^(s - lse) [T, R], and their sum over the chunk."""
    slot = tl.program_id(0)
    bag, origin, start, stop, r, valid = _tile(slot, offsets_ptr, n_bags, R, CHUNK, BLOCK_R)
    lse = tl.load(lse_ptr + bag * R + r, mask=valid, other=0.0)
    mass = tl.zeros([BLOCK_R], tl.float32)
    for n0 in range(start, stop, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        mask = (n[:, None] < stop) & valid[None, :]
        at = (origin + n)[:, None] * R + r[None, :]
        s = tl.load(scores_ptr + at, mask=mask, other=float("-inf")).to(tl.float32)
        if COUNTS:
            s += _log_counts(counts_ptr + origin, n, stop)[:, None]
        weight = tl.exp(s - lse[None, :])
        if DROPOUT:
            kept = tl.trans(
                kept_weights(tl.load(seed_ptr), n0, r, bag.to(tl.int32), dropout_p, BLOCK_N)
            )
            weight = tl.where(kept, weight * undrop, 0.0)
        mass += tl.sum(weight, 0)
        tl.store(weights_ptr + at, weight.to(weights_ptr.dtype.element_ty), mask=mask)
    tl.store(mass_ptr + slot.to(tl.int64) * R + r, mass, mask=valid & (start < stop))


@triton.jit
def combine_sums_kernel(
    partial_ptr, offsets_ptr, out_ptr, R: tl.constexpr, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """Add the chunks of a bag in order, [B, R]."""
    bag = tl.program_id(0)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = r < R
    slot, chunks = chunks_of_bag(bag, offsets_ptr, 0, CHUNK, True)
    total = tl.zeros([BLOCK_R], tl.float32)
    for j in range(0, chunks):
        total += tl.load(partial_ptr + (slot + j) * R + r, mask=valid, other=0.0)
    tl.store(out_ptr + bag.to(tl.int64) * R + r, total, mask=valid)


@triton.jit(do_not_specialize=["n_bags"])
def softmax_gradient_kernel(
    scores_ptr, lse_ptr, dweights_ptr, dmass_ptr, delta_ptr, offsets_ptr, counts_ptr,
    seed_ptr, rest_ptr, n_bags, dropout_p, undrop,
    R: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """Replace dweights [T, R] by the gradient of the scores, A (mask (dA + dmass) - delta).

    The sums over each chunk, of what is stored, go to rest.
    """
    slot = tl.program_id(0)
    bag, origin, start, stop, r, valid = _tile(slot, offsets_ptr, n_bags, R, CHUNK, BLOCK_R)
    lse = tl.load(lse_ptr + bag * R + r, mask=valid, other=0.0)
    dmass = tl.load(dmass_ptr + bag * R + r, mask=valid, other=0.0)
    delta = tl.load(delta_ptr + bag * R + r, mask=valid, other=0.0)
    rest = tl.zeros([BLOCK_R], tl.float32)
    for n0 in range(start, stop, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        mask = (n[:, None] < stop) & valid[None, :]
        at = (origin + n)[:, None] * R + r[None, :]
        s = tl.load(scores_ptr + at, mask=mask, other=float("-inf")).to(tl.float32)
        if COUNTS:
            s += _log_counts(counts_ptr + origin, n, stop)[:, None]
        grad = tl.load(dweights_ptr + at, mask=mask, other=0.0).to(tl.float32) + dmass[None, :]
        if DROPOUT:
            kept = tl.trans(
                kept_weights(tl.load(seed_ptr), n0, r, bag.to(tl.int32), dropout_p, BLOCK_N)
            )
            grad = tl.where(kept, grad * undrop, 0.0)
        grad = tl.exp(s - lse[None, :]) * (grad - delta[None, :])
        grad = grad.to(dweights_ptr.dtype.element_ty)
        rest += tl.sum(grad.to(tl.float32), 0)
        tl.store(dweights_ptr + at, grad, mask=mask)
    tl.store(rest_ptr + slot.to(tl.int64) * R + r, rest, mask=valid & (start < stop))
