"""Triton kernels of latent_attention: few queries, very many ragged keys, no atomics.

Keys are worked off in chunks of a fixed length, counted from the start of each bag. A program
reduces one chunk for one head and writes a partial result; a second kernel adds the partial results
of a bag in order. So a bag alone gives what it gives in any batch, bit for bit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .context_kv_triton import capability, chunk_of_slot, chunks_of_bag, count_slots

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# One tf32 product costs 1e-2 absolute; three are as good as fp32. Half precision ignores it.
PRECISION = tl.constexpr("tf32x3")


class _Blocks(NamedTuple):
    """How a pass over the keys is cut. Never depends on the number of keys."""

    chunk: int
    block_c: int
    block_n: int
    block_e: int
    num_warps: int
    num_stages: int


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None,
    counts: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | int,
) -> tuple[Tensor, Tensor]:
    """Return softmax(scale q k^T + log counts) v with dropout on the weights, and the log-sum-exp.

    Args:
        q: [B, H, C, E], last stride 1.
        k: [T, H, E] with `offsets`, else [B, H, N, E]; any strides, the last 1.
        v: like `k`.
        offsets: int64 [B + 1] on the device, or None.
        counts: fp32 [T] with `offsets`, else [B, N], how many tokens each key stands for; or None.
        scale: factor on the scores.
        dropout_p: probability of dropping a weight, in [0, 1).
        seed: int64 [1] on the device, or an int; see dropout_mask.

    Returns:
        fp32 [B, H, C, E], zeros for an empty bag, and fp32 [B, H, C] before dropout, -inf for one.
    """
    bags, heads, latents, width = q.shape
    blocks = _forward_blocks(q)
    slots = _slots(k, offsets, bags, blocks.chunk)
    own = {"dtype": torch.float32, "device": q.device}
    partial = torch.empty(slots, heads, latents, width, **own)
    peak, total = (torch.empty(slots, heads, latents, **own) for _ in range(2))
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty(bags, heads, latents, **own)
    shared = _constants(q, offsets, blocks)
    counts = None if counts is None else counts.contiguous()
    with torch.cuda.device_of(q):
        if slots:
            _attend[(slots * heads * triton.cdiv(latents, blocks.block_c),)](
                q, k, v, offsets, counts, partial, peak, total, _seed(seed, dropout_p, q),
                *q.stride()[:3], *_strides(k, offsets), *_strides(v, offsets),
                bags, _keys(k, offsets), heads, scale, _representable(dropout_p), **shared,
                BLOCK_N=blocks.block_n, DROPOUT=dropout_p > 0, COUNTS=counts is not None,
                num_warps=blocks.num_warps, num_stages=blocks.num_stages,
            )  # fmt: skip
        if out.numel():
            _combine_attend[(bags * heads * latents,)](
                partial, peak, total, offsets, out, lse, _keys(k, offsets), heads,
                1 / (1 - dropout_p), C=latents, E=width, CHUNK=blocks.chunk,
                BLOCK_E=blocks.block_e, RAGGED=offsets is not None, num_warps=4,
            )  # fmt: skip
    return out, lse


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None,
    counts: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | int,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    """Write the gradients of `attend` into `dk` and `dv`, all of them, and return that of `q`.

    Args:
        dout: [B, H, C, E], the gradient of out.
        q, k, v, offsets, counts, scale, dropout_p, seed: as given to attend.
        out, lse: what attend returned.
        dk, dv: where to write, shaped like `k`; any strides, the last 1.

    Returns:
        [B, H, C, E] of q's dtype.
    """
    bags, heads, latents, width = q.shape
    blocks = _backward_blocks(q, counted=counts is not None)
    slots = _slots(k, offsets, bags, blocks.chunk)
    partial = torch.empty(slots, heads, latents, width, dtype=torch.float32, device=q.device)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    shared = _constants(q, offsets, blocks)
    dout, counts = dout.contiguous(), None if counts is None else counts.contiguous()
    # From the float32 result: what half precision rounds off it would be multiplied by the keys.
    delta = (dout * out).sum(-1)
    with torch.cuda.device_of(q):
        for c0 in range(0, latents if slots else 0, blocks.block_c):
            _attend_backward[(slots * heads,)](
                dout, q, k, v, offsets, counts, delta, lse, dk, dv, partial,
                _seed(seed, dropout_p, q), *q.stride()[:3],
                *_strides(k, offsets), *_strides(v, offsets),
                *_strides(dk, offsets), *_strides(dv, offsets),
                bags, _keys(k, offsets), heads, scale,
                _representable(dropout_p), 1 / (1 - dropout_p), c0, **shared,
                BLOCK_N=blocks.block_n, DROPOUT=dropout_p > 0, ADD=c0 > 0,
                COUNTS=counts is not None, num_warps=blocks.num_warps,
                num_stages=blocks.num_stages,
            )  # fmt: skip
        if dq.numel():
            _combine_dq[(bags * heads * latents,)](
                partial, offsets, dq, _keys(k, offsets), heads, scale, C=latents, E=width,
                CHUNK=blocks.chunk, BLOCK_E=blocks.block_e, RAGGED=offsets is not None,
                num_warps=4,
            )  # fmt: skip
    return dq


def weights(
    q: Tensor,
    k: Tensor,
    offsets: Tensor | None,
    lse: Tensor,
    scale: float,
    reduce: str | None,
) -> Tensor:
    """Return the softmax weights that `attend` uses, before dropout.

    Args:
        q, k, offsets, scale: as given to attend.
        lse: what attend returned.
        reduce: "mean" averages over heads and latents on the way; None returns all.

    Returns:
        [T, H, C], or [B, H, C, N] without offsets, of q's dtype; "mean": fp32 [T] or [B, N].
    """
    bags, heads, latents, _ = q.shape
    blocks = _forward_blocks(q)
    slots = _slots(k, offsets, bags, blocks.chunk)
    ragged = offsets is not None
    shared = _constants(q, offsets, blocks)
    mean = reduce == "mean"
    if mean:
        shape = k.shape[:1] if ragged else (bags, k.shape[2])
        out = torch.empty(shape, dtype=torch.float32, device=q.device)
        strides = (0, 0, 0, 1) if ragged else (out.stride(0), 0, 0, 1)
        programs = slots
    else:
        shape = (k.shape[0], heads, latents) if ragged else (bags, heads, latents, k.shape[2])
        out = torch.empty(shape, dtype=q.dtype, device=q.device)
        strides = (0, latents, 1, heads * latents) if ragged else out.stride()
        programs = slots * heads * triton.cdiv(latents, blocks.block_c)
    with torch.cuda.device_of(q):
        if programs:
            (_mean_weights if mean else _weights)[(programs,)](
                q, k, offsets, lse, out, *q.stride()[:3], *_strides(k, offsets), *strides,
                bags, _keys(k, offsets), heads, scale, **shared, BLOCK_N=blocks.block_n,
                num_warps=blocks.num_warps, num_stages=blocks.num_stages,
            )  # fmt: skip
    return out


def dropout_mask(
    q: Tensor, k: Tensor, offsets: Tensor | None, dropout_p: float, seed: Tensor | int
) -> Tensor:
    """Return which weights `attend` keeps, in plain torch on any device.

    Weight (key position n in bag b, head h, latent c) is kept if word n % 4 of
    Philox4x32-10(key seed, counter (n // 4, h C + c, b, 0)) is at least 2^32 dropout_p, so that the
    mask does not depend on how the work is cut (Salmon et al. 2011, Parallel random numbers).

    Args:
        q: [B, H, C, E], for its shape.
        k: [T, H, E] with `offsets`, else [B, H, N, E], for its shape.
        offsets: int64 [B + 1], or None.
        dropout_p: probability of dropping a weight, in [0, 1).
        seed: int64 [1], or an int.

    Returns:
        bool [T, H, C], or [B, H, C, N] without offsets.
    """
    bags, heads, latents, _ = q.shape
    row = torch.arange(heads * latents, device=k.device).view(heads, latents)
    if offsets is None:
        position = torch.arange(k.shape[2], device=k.device)
        bag = torch.arange(bags, device=k.device)[:, None, None, None]
        row = row[:, :, None]
    else:
        token = torch.arange(k.shape[0], device=k.device)
        bag = torch.searchsorted(offsets[1:], token, right=True)
        position = (token - offsets[bag])[:, None, None]
        bag = bag[:, None, None]
    words = _philox(seed, position // 4, row, bag)
    lane = (position % 4).expand_as(words[0])
    word = torch.stack(words).gather(0, lane[None])[0]
    return word >= int(_representable(dropout_p) * 2**32)


def _philox(seed: Tensor | int, c0: Tensor, c1: Tensor, c2: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10 in int64, which holds 32-bit words without a sign."""
    low = 0xFFFFFFFF
    key_0, key_1 = seed & low, (seed >> 32) & low
    c0, c1, c2 = torch.broadcast_tensors(c0, c1, c2)
    c3 = torch.zeros_like(c0)
    for _ in range(10):
        left, right = 0xCD9E8D57 * c2, 0xD2511F53 * c0
        c0, c1, c2, c3 = (
            ((left >> 32) & low) ^ c1 ^ key_0,
            left & low,
            ((right >> 32) & low) ^ c3 ^ key_1,
            right & low,
        )
        key_0, key_1 = (key_0 + 0x9E3779B9) & low, (key_1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def _representable(dropout_p: float) -> float:
    """Round to fp32, as a launch does, but stay below 1."""
    return min(torch.tensor(dropout_p, dtype=torch.float32).item(), 1 - 2**-24)


def _forward_blocks(q: Tensor) -> _Blocks:
    return _blocks(q, backward=False)


def _backward_blocks(q: Tensor, *, counted: bool) -> _Blocks:
    return _blocks(q, backward=True, counted=counted)


def _blocks(q: Tensor, *, backward: bool, counted: bool = False) -> _Blocks:
    """Choose blocks that spill no register on sm_80, sm_90 or sm_100 (benchmarks/registers.py)."""
    _, heads, latents, width = q.shape
    block_e = max(16, triton.next_power_of_2(width))
    block_c = max(16, min(64, triton.next_power_of_2(latents)))
    # A bag of 15,000 patches and one head fills 59 of 132 multiprocessors with chunks of 256.
    chunk = 256 if heads <= 2 and latents <= 64 else 512
    if q.element_size() == 2:
        if not backward:
            # 64 keys spill for heads of 32 (4 to 10 stores on sm_80 and sm_90).
            block_n = 32 if block_e in (32, 256) else 64
            warps, stages = 8 if block_e == 256 else 4, 2 if block_e <= 32 else 3
            return _Blocks(chunk, block_c, block_n, block_e, warps, stages)
        # Otherwise 1 to 54 stores spill, most of them on sm_80.
        chip = capability(q)
        hopper = chip == 90
        block_c = min(block_c, 64 if hopper and block_e <= 64 else 32)
        block_n = 64 if block_c < 64 and block_e <= (128 if hopper else 64) else 32
        # With counts 4 warps spill twice for heads of 64 on sm_100.
        widest = 64 if chip == 90 or (chip > 90 and not counted) else 32
        warps = 8 if block_c == 64 or block_e > widest else 4
        return _Blocks(chunk, block_c, block_n, block_e, warps, 2)
    # tf32x3 keeps two parts of every operand in registers.
    block_c = min(block_c, 16 if backward or block_e > 32 else 32)
    block_n = 16 if backward or block_e == 256 else 32
    warps = 4 if block_e <= (32 if backward else 64) else 8
    # 4 and 8 warps spill once with dropout, on sm_80 and sm_100; 2 once with counts, on sm_100.
    if backward and block_e == 16 and not counted:
        warps = 2
    return _Blocks(chunk, block_c, block_n, block_e, warps, 2)


def _constants(q: Tensor, offsets: Tensor | None, blocks: _Blocks) -> dict[str, int | bool]:
    return {
        "C": q.shape[2],
        "E": q.shape[3],
        "CHUNK": blocks.chunk,
        "BLOCK_C": blocks.block_c,
        "BLOCK_E": blocks.block_e,
        "RAGGED": offsets is not None,
    }


def _slots(k: Tensor, offsets: Tensor | None, bags: int, chunk: int) -> int:
    if offsets is None:
        return bags * triton.cdiv(k.shape[2], chunk)
    return count_slots(k.shape[0], bags, chunk)


def _keys(k: Tensor, offsets: Tensor | None) -> int:
    """Keys per bag; 0 stands for what the offsets say."""
    return k.shape[2] if offsets is None else 0


def _strides(x: Tensor, offsets: Tensor | None) -> tuple[int, int, int]:
    """Strides of bag, head and key."""
    return x.stride()[:3] if offsets is None else (0, x.stride(1), x.stride(0))


def _seed(seed: Tensor | int, dropout_p: float, q: Tensor) -> Tensor | None:
    if not dropout_p:
        return None
    if isinstance(seed, int):  # full() fills on the device; tensor() would copy from the host
        return torch.full((1,), seed, dtype=torch.int64, device=q.device)
    return seed


@triton.jit
def _kept(seed, n0, row, bag, dropout_p, BLOCK_N: tl.constexpr):
    """Return which weights [BLOCK_C, BLOCK_N] are kept; one Philox call serves four keys."""
    quad = n0 // 4 + tl.arange(0, BLOCK_N // 4)
    zero = row[:, None] * 0
    w0, w1, w2, w3 = tl.philox(seed, quad[None, :] + zero, row[:, None] + quad[None, :] * 0,
                               bag, 0)  # fmt: skip
    word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    threshold = tl.full([1, 1], dropout_p, tl.float32) * 4294967296.0
    return word >= threshold.to(tl.uint32)


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
def _log2_counts(base, n, length):
    """Return log2 of the counts of keys n, which raise their scores; 0 from `length` on."""
    return tl.log2(tl.load(base + n, mask=n < length, other=1.0))


@triton.jit(do_not_specialize=["n_bags", "n_keys"])
def _attend(
    q_ptr, k_ptr, v_ptr, offsets_ptr, counts_ptr, partial_ptr, peak_ptr, total_ptr, seed_ptr,
    q_b, q_h, q_c, k_b, k_h, k_n, v_b, v_h, v_n,
    n_bags, n_keys, H, scale, dropout_p,
    C: tl.constexpr, E: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    RAGGED: tl.constexpr, DROPOUT: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """Reduce one chunk of keys for one head and up to BLOCK_C latents.

    With s = scale q k^T + log counts over the chunk's keys n: peak = max_n s log2(e),
    total = sum_n 2^(s log2(e) - peak), partial = sum_n dropped 2^(s log2(e) - peak) v_n.
    partial [slots, H, C, E], peak and total [slots, H, C].
    """
    program = tl.program_id(0)
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    head = program // tiles % H
    slot = program // tiles // H
    bag, origin, start, stop = chunk_of_slot(slot, offsets_ptr, n_bags, n_keys, CHUNK, RAGGED)
    if start >= stop:
        return
    c = program % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    q = _load_rows(q_ptr + bag * q_b + head * q_h, c, q_c, c < C, E, BLOCK_E)
    first = origin + start
    k_ptr += bag * k_b + head * k_h + first * k_n
    v_ptr += bag * v_b + head * v_h + first * v_n
    if COUNTS:
        counts_ptr += bag * n_keys + first
    length = stop - start
    if DROPOUT:
        seed = tl.load(seed_ptr)
    peak = tl.full([BLOCK_C], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_C], tl.float32)
    partial = tl.zeros([BLOCK_C, BLOCK_E], tl.float32)
    for n0 in range(0, length, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        k = _load_rows(k_ptr, n, k_n, n < length, E, BLOCK_E)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        if COUNTS:
            s += _log2_counts(counts_ptr, n, length)[None, :]
        s = tl.where(n[None, :] < length, s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        shrink = tl.exp2(peak - new_peak)
        p = tl.exp2(s - new_peak[:, None])
        total = total * shrink + tl.sum(p, 1)
        if DROPOUT:
            kept = _kept(seed, start + n0, head * C + c, bag.to(tl.int32), dropout_p, BLOCK_N)
            p = tl.where(kept, p, 0.0)
        v = _load_rows(v_ptr, n, v_n, n < length, E, BLOCK_E)
        partial = partial * shrink[:, None]
        partial = tl.dot(p.to(v.dtype), v, partial, input_precision=PRECISION)
        peak = new_peak
    row = (slot.to(tl.int64) * H + head) * C
    _store_rows(partial_ptr + row * E, c, E, c < C, partial, E, BLOCK_E)
    tl.store(peak_ptr + row + c, peak, mask=c < C)
    tl.store(total_ptr + row + c, total, mask=c < C)


@triton.jit(do_not_specialize=["n_keys"])
def _combine_attend(
    partial_ptr, peak_ptr, total_ptr, offsets_ptr, out_ptr, lse_ptr, n_keys, H, undrop,
    C: tl.constexpr, E: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """Add the chunks of one bag, head and latent in order.

    out = undrop sum_j 2^(peak_j - max) partial_j / sum_j 2^(peak_j - max) total_j, and lse.
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
        own_peak = tl.load(peak_ptr + at, mask=j < chunks, other=float("-inf"))
        own_total = tl.load(total_ptr + at, mask=j < chunks, other=0.0)
        mask = (j[:, None] < chunks) & (e[None, :] < E)
        own = tl.load(partial_ptr + at[:, None] * E + e[None, :], mask=mask, other=0.0)
        new_peak = tl.maximum(peak, tl.max(own_peak, 0))
        shrink = tl.exp2(peak - new_peak)
        factor = tl.exp2(own_peak - new_peak)
        total = total * shrink + tl.sum(factor * own_total, 0)
        out = out * shrink + tl.sum(factor[:, None] * own, 0)
        peak = new_peak
    total = tl.where(chunks > 0, total, 1.0)  # an empty bag: out = 0, lse = -inf
    at = program.to(tl.int64)
    out = out * (undrop / total)
    tl.store(out_ptr + at * E + e, out.to(out_ptr.dtype.element_ty), mask=e < E)
    tl.store(lse_ptr + at + tl.arange(0, 1), (peak + tl.log2(total)) * LN_2)


@triton.jit(do_not_specialize=["n_bags", "n_keys", "c0"])
def _attend_backward(
    dout_ptr, q_ptr, k_ptr, v_ptr, offsets_ptr, counts_ptr, delta_ptr, lse_ptr, dk_ptr, dv_ptr,
    partial_ptr, seed_ptr,
    q_b, q_h, q_c, k_b, k_h, k_n, v_b, v_h, v_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    n_bags, n_keys, H, scale, dropout_p, undrop, c0,
    C: tl.constexpr, E: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    RAGGED: tl.constexpr, DROPOUT: tl.constexpr, ADD: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """Own one chunk of keys of one head: write its dk and dv, and its part of dq / scale.

    p = exp(scale q k^T + log counts - lse), dropped(p) = kept undrop p, dv = dropped(p)^T dout,
    ds = p (kept undrop dout v^T - delta) with delta = rowsum(dout out), which dropout has gone into
    already, dk = scale ds^T q and partial = ds k [slots, H, C, E], for the latents c0 to
    c0 + BLOCK_C. ADD: earlier launches have written dk and dv of the latents before c0.
    """
    program = tl.program_id(0)
    head = program % H
    slot = program // H
    bag, origin, start, stop = chunk_of_slot(slot, offsets_ptr, n_bags, n_keys, CHUNK, RAGGED)
    if start >= stop:
        return
    first = origin + start
    k_ptr += bag * k_b + head * k_h + first * k_n
    v_ptr += bag * v_b + head * v_h + first * v_n
    dk_ptr += bag * dk_b + head * dk_h + first * dk_n
    dv_ptr += bag * dv_b + head * dv_h + first * dv_n
    q_ptr += bag * q_b + head * q_h
    row = (bag * H + head) * C
    dout_ptr += row * E
    delta_ptr += row
    lse_ptr += row
    partial_ptr += (slot.to(tl.int64) * H + head) * C * E
    if COUNTS:
        counts_ptr += bag * n_keys + first
    length = stop - start
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    bag = bag.to(tl.int32)
    c = c0 + tl.arange(0, BLOCK_C)
    q = _load_rows(q_ptr, c, q_c, c < C, E, BLOCK_E)
    dout = _load_rows(dout_ptr, c, E, c < C, E, BLOCK_E)
    delta = tl.load(delta_ptr + c, mask=c < C, other=0.0)
    lse = tl.load(lse_ptr + c, mask=c < C, other=0.0) * LOG2_E
    dq = tl.zeros([BLOCK_C, BLOCK_E], tl.float32)
    for n0 in range(0, length, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        k = _load_rows(k_ptr, n, k_n, n < length, E, BLOCK_E)
        v = _load_rows(v_ptr, n, v_n, n < length, E, BLOCK_E)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        if COUNTS:
            s += _log2_counts(counts_ptr, n, length)[None, :]
        p = tl.exp2(s - lse[:, None])
        p = tl.where((c < C)[:, None] & (n < length)[None, :], p, 0.0)
        dropped = p
        if DROPOUT:
            kept = _kept(seed, start + n0, head * C + c, bag, dropout_p, BLOCK_N)
            dropped = tl.where(kept, p * undrop, 0.0)
        dv = tl.dot(tl.trans(dropped.to(v.dtype)), dout, input_precision=PRECISION)
        if ADD:
            dv += _load_rows(dv_ptr, n, dv_n, n < length, E, BLOCK_E).to(tl.float32)
        _store_rows(dv_ptr, n, dv_n, n < length, dv, E, BLOCK_E)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            dp = tl.where(kept, dp * undrop, 0.0)
        # The weight of a bag's only key is 1 whatever q and k are; rounding would leave 1e-6.
        ds = tl.where(stop > 1, p * (dp - delta[:, None]), 0.0).to(k.dtype)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * scale
        if ADD:
            dk += _load_rows(dk_ptr, n, dk_n, n < length, E, BLOCK_E).to(tl.float32)
        _store_rows(dk_ptr, n, dk_n, n < length, dk, E, BLOCK_E)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    _store_rows(partial_ptr, c, E, c < C, dq, E, BLOCK_E)


@triton.jit(do_not_specialize=["n_keys"])
def _combine_dq(
    partial_ptr, offsets_ptr, dq_ptr, n_keys, H, scale,
    C: tl.constexpr, E: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """Add the chunks of one bag, head and latent in order: dq = scale sum_j partial_j."""
    program = tl.program_id(0)
    bag = program // C // H
    row = program % (C * H)
    slot, chunks = chunks_of_bag(bag, offsets_ptr, n_keys, CHUNK, RAGGED)
    BLOCK_J: tl.constexpr = 2048 // BLOCK_E
    e = tl.arange(0, BLOCK_E)
    dq = tl.zeros([BLOCK_E], tl.float32)
    for j0 in range(0, chunks, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        at = (slot + j) * (C * H) + row
        mask = (j[:, None] < chunks) & (e[None, :] < E)
        dq += tl.sum(tl.load(partial_ptr + at[:, None] * E + e[None, :], mask=mask, other=0.0), 0)
    at = program.to(tl.int64) * E + e
    tl.store(dq_ptr + at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=e < E)


@triton.jit(do_not_specialize=["n_bags", "n_keys"])
def _weights(
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
def _mean_weights(
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
            lse = tl.load(at, mask=c < C, other=float("inf")) * LOG2_E
            k = _load_rows(k_ptr + head * k_h, n, k_n, n < length, E, BLOCK_E)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
            total += tl.sum(tl.exp2(s - lse[:, None]), 0)
        tl.store(out_ptr + n, total / (H * C), mask=n < length)
