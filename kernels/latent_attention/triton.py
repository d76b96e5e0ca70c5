"""Launches the Triton kernels of latent_attention: few queries, very many ragged keys, no atomics.

Few queries alone would make few programs. So the keys are cut in chunks of a fixed length, counted
from the start of each bag. A program reduces one chunk for one head, or for four narrow heads, and
writes a partial result; a second kernel adds the partial results of a bag in order. The cut
depends on nothing but the bag, so that a bag alone gives the bits that it gives in any batch. The
gradient of K and V is not a sum over programs: one program has its keys, and all latents of all
layers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import capability
from ..dropout import representable
from ..launch import cdiv, launch, next_power_of_2
from ..ragged import count_slots
from .triton_kernels import (
    attend_kernel,
    combine_attend_kernel,
    combine_dq_kernel,
    dkv_kernel,
    dq_kernel,
    mean_weights_kernel,
    weights_kernel,
)


class _Blocks(NamedTuple):
    """How a pass over the keys is cut. Must not depend on the number of keys or of bags."""

    chunk: int
    block_c: int
    block_n: int
    block_e: int
    num_warps: int
    num_stages: int
    heads: int = 1
    """Heads that a program computes."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None,
    counts: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | int | None,
) -> tuple[Tensor, Tensor]:
    """Return softmax(scale q k^T + log counts) v with dropout on the weights, and the log-sum-exp.

    Args:
        q: [B, H, C, E], or [1, H, C, E] for all bags, last stride 1.
        k: [T, H, P] with `offsets`, else [B, H, N, P]; any strides, the last 1. P is E, or E and
            numbers that are zero up to the next multiple of 16.
        v: like `k`.
        offsets: int64 [B + 1] on the device, or None.
        counts: fp32 [T] with `offsets`, else [B, N], how many tokens each key stands for; or None.
        scale: factor on the scores.
        dropout_p: probability of dropping a weight, in [0, 1).
        seed: int64 [1] on the device, or an int; see dropout_mask. None without dropout.

    Returns:
        fp32 [B, H, C, E], zeros for an empty bag; and the log-sum-exp, fp32 [B, H, C], before
        dropout, -inf for an empty bag.
    """
    bags, (heads, latents, width) = _bags(k, offsets), q.shape[1:]
    blocks = _forward_blocks(q)
    slots = _slots(k, offsets, bags, blocks.chunk)
    fp32 = {"dtype": torch.float32, "device": q.device}
    out = torch.empty(bags, heads, latents, width, **fp32)
    lse = torch.empty(bags, heads, latents, **fp32)
    one_chunk = _one_chunk(q, k, offsets, blocks)
    partial, peak, total = out, lse, lse  # total is not written then
    if not one_chunk:
        partial = torch.empty(slots, heads, latents, k.shape[-1], **fp32)
        peak, total = (torch.empty(slots, heads, latents, **fp32) for _ in range(2))
    constants = _constants(q, offsets, blocks)
    counts = None if counts is None else counts.contiguous()
    if slots:
        launch(
            attend_kernel, q, (slots * heads // blocks.heads * cdiv(latents, blocks.block_c),),
            q, k, v, offsets, counts, partial, peak, total, _seed(seed, dropout_p, q),
            *_strides_of_queries(q, bags), *_strides(k, offsets), *_strides(v, offsets),
            bags, _keys(k, offsets), heads, scale, representable(dropout_p),
            1 / (1 - dropout_p), **constants, ONE_CHUNK=one_chunk,
            PADDED=k.shape[-1], BLOCK_N=blocks.block_n, DROPOUT=dropout_p > 0,
            COUNTS=counts is not None, HEADS=blocks.heads,
            num_warps=blocks.num_warps, num_stages=blocks.num_stages,
        )  # fmt: skip
    if out.numel() and not one_chunk:
        launch(
            combine_attend_kernel, q, (bags * heads * latents,),
            partial, peak, total, offsets, out, lse, _keys(k, offsets), heads,
            1 / (1 - dropout_p), C=latents, E=width, PADDED=k.shape[-1], CHUNK=blocks.chunk,
            BLOCK_E=blocks.block_e, RAGGED=offsets is not None, num_warps=4,
        )  # fmt: skip
    return out, lse


def query_gradient(
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
    seed: Tensor | int | None,
    result: Tensor,
    record: Tensor,
) -> None:
    """Write the gradient of `attend` with respect to q, and the record for that of k and v.

    Args:
        dout: [B, H, C, E], the gradient of out, last stride 1.
        q, k, v, offsets, counts, scale, dropout_p, seed: as given to attend.
        out, lse: what attend returned, not empty.
        result: where to write the gradient, shaped like `q`, last stride 1.
        record: where to write what `kv_gradient` needs of this layer, fp32
            [B, H, C, record_width(E)], contiguous.
    """
    bags, heads, latents, width = out.shape
    blocks = _dq_blocks(q, counted=counts is not None)
    slots = _slots(k, offsets, bags, blocks.chunk)
    partial, one_chunk = result, _one_chunk(q, k, offsets, blocks)
    if not one_chunk:
        size = slots, heads, latents, k.shape[-1]
        partial = torch.empty(size, dtype=torch.float32, device=q.device)
    if slots:
        launch(
            dq_kernel, q, (slots * heads // blocks.heads * cdiv(latents, blocks.block_c),),
            dout, q, k, v, offsets, None if counts is None else counts.contiguous(), out, lse,
            partial, record, _seed(seed, dropout_p, q),
            *dout.stride()[:3], *_strides_of_queries(q, bags),
            *_strides(k, offsets), *_strides(v, offsets), *result.stride()[:3],
            bags, _keys(k, offsets), heads, scale, representable(dropout_p), 1 / (1 - dropout_p),
            ONE_CHUNK=one_chunk,
            **_constants(q, offsets, blocks), PADDED=k.shape[-1], BLOCK_N=blocks.block_n,
            DROPOUT=dropout_p > 0, COUNTS=counts is not None, HEADS=blocks.heads,
            num_warps=blocks.num_warps, num_stages=blocks.num_stages,
        )  # fmt: skip
    if one_chunk:
        return
    launch(
        combine_dq_kernel, q, (len(q) * heads * latents,),
        partial, offsets, result, *result.stride()[:3], _keys(k, offsets), slots, heads, scale,
        C=latents, E=width, PADDED=k.shape[-1], CHUNK=blocks.chunk, BLOCK_E=blocks.block_e,
        RAGGED=offsets is not None, SHARED=len(q) < bags, num_warps=4,
    )  # fmt: skip


def kv_gradient(
    records: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None,
    counts: Tensor | None,
    width: int,
    scale: float,
    dropout_p: float,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Write the gradients with respect to k and v of all layers that attended to them.

    Args:
        records: fp32 [B, H, L, C, record_width(E)], contiguous, what `query_gradient` wrote for
            every layer; zeros for a layer whose result has no gradient.
        k, v, offsets, counts, scale, dropout_p: as given to attend.
        width: E.
        dk, dv: where to write, shaped like `k`; any strides, the last 1. Rows behind the last bag
            become zero.
    """
    bags, heads, layers, latents, _ = records.shape
    blocks = _dkv_blocks(k, width, layers * latents)
    if offsets is None:
        slots = bags * cdiv(k.shape[2], blocks.block_n)
    else:  # the rows behind the last bag count as one more bag
        slots = count_slots(k.shape[0], bags + 1, blocks.block_n)
    if slots:
        launch(
            dkv_kernel, k, (slots * heads,),
            records, k, v, offsets, None if counts is None else counts.contiguous(), dk, dv,
            *_strides(k, offsets), *_strides(v, offsets),
            *_strides(dk, offsets), *_strides(dv, offsets),
            bags, _keys(k, offsets), k.shape[0], layers * latents, heads, scale,
            representable(dropout_p), 1 / (1 - dropout_p), C=latents, E=width,
            PADDED=k.shape[-1], BLOCK_C=blocks.block_c, BLOCK_N=blocks.block_n,
            BLOCK_E=blocks.block_e, RAGGED=offsets is not None, DROPOUT=dropout_p > 0,
            COUNTS=counts is not None, num_warps=blocks.num_warps, num_stages=blocks.num_stages,
        )  # fmt: skip


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
        reduce: "mean" for the mean over heads and latents; None for all weights.

    Returns:
        [T, H, C], or [B, H, C, N] without offsets, of q's dtype; with "mean" fp32 [T] or [B, N].
    """
    bags, heads, latents, _ = q.shape
    blocks = _forward_blocks(q)
    slots = _slots(k, offsets, bags, blocks.chunk)
    ragged = offsets is not None
    constants = _constants(q, offsets, blocks)
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
        programs = slots * heads * cdiv(latents, blocks.block_c)
    if programs:
        launch(
            mean_weights_kernel if mean else weights_kernel, q, (programs,),
            q, k, offsets, lse, out, *q.stride()[:3], *_strides(k, offsets), *strides,
            bags, _keys(k, offsets), heads, scale, **constants, BLOCK_N=blocks.block_n,
            num_warps=blocks.num_warps, num_stages=blocks.num_stages,
        )  # fmt: skip
    return out


def _forward_blocks(q: Tensor) -> _Blocks:
    """Choose blocks that spill no register on sm_80, sm_90 or sm_100 (benchmarks/registers.py)."""
    _, heads, latents, width = q.shape
    block_e, per_program = _block_e(width), _heads(q)
    chunk = _chunk(heads // per_program, latents)
    block_c = max(16, min(64, next_power_of_2(latents)))
    if q.element_size() == 2:
        # Blocks of 64 keys spill for heads of 32 (4 to 10 stores on sm_80 and sm_90).
        block_n = 32 if per_program > 1 or block_e in (32, 256) else 64
        # With 4 warps one store spills for heads of 128 with dropout.
        warps, stages = 8 if block_e >= 128 else 4, 2 if block_e <= 32 else 3
        return _Blocks(chunk, block_c, block_n, block_e, warps, stages, per_program)
    # A product in tf32x3 splits every operand in two parts, both in registers: blocks are smaller.
    block_c = min(block_c, 16 if block_e > 32 else 32)
    block_n = 16 if per_program > 1 or block_e == 256 else 32
    return _Blocks(chunk, block_c, block_n, block_e, 4 if block_e <= 64 else 8, 2, per_program)


def _dq_blocks(q: Tensor, *, counted: bool) -> _Blocks:
    """Choose blocks for the gradient of the queries; `counted`: there are counts."""
    _, heads, latents, width = q.shape
    block_e, per_program, chip = _block_e(width), _heads(q), capability(q)
    chunk = _chunk(heads // per_program, latents)
    if q.element_size() == 2:
        # Blocks of 64 latents take all 255 registers on sm_80, and spill with counts on sm_100.
        tall = block_e <= 64 and (chip == 90 or (chip > 90 and not counted))
        block_c = max(16, min(64 if tall else 32, next_power_of_2(latents)))
        block_n = 512 // block_e if per_program > 1 else 64 if block_e <= 128 else 32
        warps = 4 if block_e <= 64 else 8
    else:
        block_c, block_n, warps = 16, 16, 4 if block_e <= 32 else 8
    return _Blocks(chunk, block_c, block_n, block_e, warps, 2, per_program)


def _dkv_blocks(k: Tensor, width: int, latents: int) -> _Blocks:
    """Choose blocks for the gradient of K and V.

    A program has one block of keys of one head, and reads all latents of all layers: the larger the
    blocks of keys, the less often the latents are read.
    """
    block_e = _block_e(width)
    block_c = 16 if -latents % 32 >= 16 else 32
    if k.element_size() == 2:
        # Blocks of 64 keys with heads of 64 spill 24 stores with dropout on sm_80.
        small = block_e == 256 or (block_e == 64 and capability(k) < 90)
        block_n = 128 if block_e <= 32 else 32 if small else 64
        warps = 4 if block_e == 64 else 8
    else:
        block_c, block_n, warps = 16, 32 if block_e == 16 else 16, 4 if block_e <= 64 else 8
    return _Blocks(block_n, block_c, block_n, block_e, warps, 2)


def _heads(q: Tensor) -> int:
    """Return how many heads a program computes: 4 narrow heads of few latents, a warp each, or 1.

    With one such head, a program would read pieces of 32 or 64 bytes of each row of K, and two of
    its four warps would compute the same 16 of 32 latents.
    """
    _, heads, latents, width = q.shape
    narrow = _block_e(width) * q.element_size() <= 64
    return 4 if narrow and latents <= 32 and heads % 4 == 0 else 1


def _block_e(width: int) -> int:
    return max(16, next_power_of_2(width))


def _chunk(programs: int, latents: int) -> int:
    """Return the keys of a chunk; `programs` is how many share a chunk, up to 64 latents each."""
    # A bag of 15,000 patches has 59 chunks of 256 keys. With one program for each, 59 of the 132
    # multiprocessors of an H100 have work; with two, 118. With more, 512 keys make fewer partial
    # results.
    return 256 if programs <= 2 and latents <= 64 else 512


def _constants(q: Tensor, offsets: Tensor | None, blocks: _Blocks) -> dict[str, int | bool]:
    return {
        "C": q.shape[2],
        "E": q.shape[3],
        "CHUNK": blocks.chunk,
        "BLOCK_C": blocks.block_c,
        "BLOCK_E": blocks.block_e,
        "RAGGED": offsets is not None,
    }


def _bags(k: Tensor, offsets: Tensor | None) -> int:
    return len(k) if offsets is None else len(offsets) - 1


def _slots(k: Tensor, offsets: Tensor | None, bags: int, chunk: int) -> int:
    if offsets is None:
        return bags * cdiv(k.shape[2], chunk)
    return count_slots(k.shape[0], bags, chunk)


def _one_chunk(q: Tensor, k: Tensor, offsets: Tensor | None, blocks: _Blocks) -> bool:
    """Return whether every bag is one chunk, so that no partial results need to be added.

    Self-attention of the latents is the case that matters.
    """
    return offsets is None and 0 < k.shape[2] <= blocks.chunk and k.shape[-1] == q.shape[-1]


def _keys(k: Tensor, offsets: Tensor | None) -> int:
    """Return the number of keys of each bag; 0 with offsets, which say it then."""
    return k.shape[2] if offsets is None else 0


def _strides(x: Tensor, offsets: Tensor | None) -> tuple[int, ...]:
    """Return the strides of bag, head and key."""
    return x.stride()[:3] if offsets is None else (0, x.stride(1), x.stride(0))


def _strides_of_queries(q: Tensor, bags: int) -> tuple[int, ...]:
    """Return the strides of bag, head and latent; that of the bag is 0 for shared queries."""
    return (q.stride(0) if len(q) == bags else 0, *q.stride()[1:3])


def _seed(seed: Tensor | int | None, dropout_p: float, q: Tensor) -> Tensor | None:
    """Return the seed as a tensor on the device, None without dropout."""
    if not dropout_p:
        return None
    if isinstance(seed, int):  # full() writes on the device; tensor() would copy from the host
        return torch.full((1,), seed, dtype=torch.int64, device=q.device)
    return seed
