"""Launches the two products with the tokens: `project` (onto outputs) and `pool` (over rows).

Row t of the context is z_t = [x_t | p_(t mod Np)], of width W = D + P, and zhat_t = (z_t - mean_t)
rstd_t. Neither the concatenation nor zhat is ever written to memory: LayerNorm is folded into the
products. The mean drops out of them (docs/design/algebra.md derives this). With centred weights,
w_c = w - mean(w), w zhat = rstd w_c z; and for any a, with s = sum_t a_t rstd_t z_t,
sum_t a_t zhat_t = s - mean(s). Ragged rows are cut in chunks that are counted from the start of
each bag, so that a bag alone gives the bits that it gives in any batch.

Beside the product with x, `pool` needs two sums that are small: that of a, and that of a with the
positions. The kernel that writes a computes them too, for each chunk of SIDE_CHUNK rows (`Side`).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..backends import capability, multiprocessors
from ..launch import cdiv, launch, next_power_of_2
from ..ragged import count_slots
from .blocks import HALF, HOPPER, SINGLE, TMA, WIDE, ColumnBlocks, columns_of, pool_chunk
from .tma_kernels import pool_tma_kernel, project_tma_kernel
from .triton_kernels import (
    centre_weights_kernel,
    combine_pool_kernel,
    pool_kernel,
    project_kernel,
    scale_gradient_kernel,
)

# Dtypes in which x is multiplied as it lies in memory, by centred weights. Otherwise
# their mean is subtracted in registers first, which loses fewer digits.
_DIRECT = (torch.bfloat16, torch.float16)
# Dtypes in which the weights that rows are pooled by may be multiplied by rstd. Not float16: a
# weight of 1e-4 times an rstd of 1e-4 is below its smallest number.
_SCALED = (torch.bfloat16,)
# Rows of a chunk of `Side`: those of one program of the kernels that write the weights.
SIDE_CHUNK = 1024


class Side(NamedTuple):
    """Sums of the weights a that rows are pooled by, over chunks of SIDE_CHUNK rows."""

    sums: Tensor
    """fp32 [slots, O, 1 + P]: sum_t a[t, o], and sum_t a[t, o] phat[t]."""
    channels: int
    """P."""


class MeanToken(NamedTuple):
    """The pooled token of the forward pass, which removes the rounding from the gradient."""

    pooled: Tensor
    """[B, R, W], contiguous."""
    mass: Tensor
    """[B, R], contiguous."""


class Centred(NamedTuple):
    """Weights minus their mean over the width, in the dtype of the products."""

    weight: Tensor
    """[S, O, D]. Apart from weight_p: rows of D numbers begin at multiples of 16 bytes, as
    asynchronous copies need it, where rows of D + P would not."""
    weight_p: Tensor
    """[S, O, P]"""
    sums: Tensor
    """fp32 [S, O]: the sum of each row over D and P, not zero since the weights are rounded."""


def scaled(x: Tensor, dtype: torch.dtype) -> bool:
    """Return whether rows x are pooled by weights of `dtype` that have been multiplied by rstd."""
    return x.dtype == dtype and dtype in _SCALED


def centre(
    weight: Tensor, width: int, forward_pass: tuple[Tensor, MeanToken] | None
) -> tuple[Centred, Tensor | None]:
    """Return weight - mean(weight).

    Args:
        weight: contiguous [S, O, W].
        width: D.
        forward_pass: if `weight` is the gradient of pooled: dmass [S, O], contiguous, and what was
            pooled; else None.

    Returns:
        The centred weights; and, with `forward_pass`, delta = sum(weight pooled) + dmass mass,
        fp32 [S, O], else None.
    """
    *rows, total = weight.shape
    centred, centred_p = weight.new_empty(*rows, width), weight.new_empty(*rows, total - width)
    sums = weight.new_empty(rows, dtype=torch.float32)
    delta = None if forward_pass is None else torch.empty_like(sums)
    dmass, (pooled, mass) = (None, (None, None)) if forward_pass is None else forward_pass
    if weight.numel():
        launch(
            centre_weights_kernel, weight, (sums.numel(),),
            weight, centred, centred_p, sums, pooled, dmass, mass, delta, D=width, P=total - width,
            BLOCK_W=next_power_of_2(total), num_warps=_row_warps(total),
        )  # fmt: skip
    return Centred(centred, centred_p, sums), delta


def project(
    x: Tensor,
    p: Tensor | None,
    centred: Centred,
    bias: Tensor | None,
    offsets: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
) -> Tensor:
    """Return weight zhat + bias, reading x from memory once.

    One program's registers hold at most some 256 outputs of its rows, and 1,648 may be needed. The
    programs of the same rows are neighbours in the grid: they run at the same time, so that all but
    the first read the rows from the second-level cache.

    Args:
        x: [T, D], last stride 1.
        p: [Np, P] positional channels, T a multiple of Np; or None.
        centred: `centre` of weight [S, O, W], of the dtype of the products.
        bias: [S, O] or None.
        offsets: None: every weight set is applied to every row. int64 [S + 1] on the device: set s
            is applied to rows offsets[s] to offsets[s + 1], and results behind the last are not
            written.
        mean, rstd: fp32 [T], those of the rows, contiguous.
        eps: LayerNorm's. A row whose variance is not above the rounding counts as constant.

    Returns:
        [S, T, O], or [T, O] with offsets, of weight's dtype.
    """
    (sets, outputs, _), rows = centred.weight_p.shape, x.shape[0]
    y = centred.weight.new_empty((rows, outputs) if offsets is not None else (sets, rows, outputs))
    if rows and y.numel():
        by_tma = _direct(x, centred.weight) and _tma(x, centred.weight)
        # Triton 3.7.1 cannot compile the second product, that of the positions, for sm_100.
        by_tma = by_tma and (p is None or capability(x) == 90)
        write = _project_by_tma if by_tma else _project_by_pointers
        write(x, p, centred, bias, offsets, mean, rstd, eps, y)
    return y


def _project_by_pointers(
    x: Tensor,
    p: Tensor | None,
    centred: Centred,
    bias: Tensor | None,
    offsets: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    y: Tensor,
) -> None:
    """Write the result of `project` to y."""
    weight, weight_p, weight_sum = centred
    (rows, width), (sets, outputs, channels) = x.shape, weight_p.shape
    grouped = offsets is not None
    columns = outputs if grouped else sets * outputs
    half = weight.element_size() == 2 and x.element_size() == 2
    # A main and a narrow block spill registers on sm_100 (2 stores).
    block = columns_of(columns, HALF if half and capability(x) <= 90 else SINGLE)
    block_t, block_d = (128, 64) if half else (64, 32)
    slots = count_slots(rows, sets, block_t) if grouped else cdiv(rows, block_t)
    launch(
        project_kernel, x, (slots * cdiv(columns, block.width),),
        x, p, weight, weight_p, weight_sum, bias, offsets, mean, rstd, y,
        x.stride(0), 0 if p is None else p.stride(0), sets, rows, 0 if grouped else rows,
        1 if p is None else p.shape[0], eps,
        COLUMNS=columns, OUTPUTS=outputs, D=width, P=channels,
        BLOCK_T=block_t, BLOCK_O=block.main, NARROW=block.narrow, BLOCK_D=block_d,
        BLOCK_P=max(16, next_power_of_2(channels)), GROUPED=grouped, DIRECT=_direct(x, weight),
        num_warps=8 if block_t * block.main > 64 * 64 else 4, num_stages=3,
    )  # fmt: skip


def _project_by_tma(
    x: Tensor,
    p: Tensor | None,
    centred: Centred,
    bias: Tensor | None,
    offsets: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    y: Tensor,
) -> None:
    """Write the result of `project` to y."""
    weight, weight_p, weight_sum = centred
    (rows, width), (sets, outputs, channels) = x.shape, weight_p.shape
    grouped = offsets is not None
    columns = outputs if grouped else sets * outputs
    chip = capability(x)
    block = columns_of(columns, HOPPER if chip == 90 else HALF)
    block_t = _long_side(block, chip)
    # Four buffers of the operands of 144 outputs and 256 rows, or of 272 and 128, leave no shared
    # memory for the results on their way to memory.
    stages = 3 if block.main >= 128 and block.narrow == 16 else 4
    slots = count_slots(rows, sets, block_t) if grouped else cdiv(rows, block_t)
    tiles = cdiv(columns, block.width)
    programs, full_tiles, half_tiles = _waves(slots, tiles, multiprocessors(x))
    weights = weight.flatten(0, 1)
    launch(
        project_tma_kernel, x, (programs,),
        TensorDescriptor.from_tensor(x, [block_t, 64]),
        TensorDescriptor.from_tensor(x, [block_t // 2, 64]),
        TensorDescriptor.from_tensor(weights, [block.main, 64]),
        TensorDescriptor.from_tensor(weights, [block.narrow, 64]) if block.narrow else None,
        p, weight_p, weight_sum, bias, offsets, mean, rstd, y,
        0 if p is None else p.stride(0), sets, rows, 0 if grouped else rows,
        1 if p is None else p.shape[0], eps, full_tiles, half_tiles,
        COLUMNS=columns, OUTPUTS=outputs, D=width, P=channels, BLOCK_T=block_t,
        BLOCK_O=block.main, NARROW=block.narrow, BLOCK_D=64,
        BLOCK_P=max(16, next_power_of_2(channels)), GROUPED=grouped,
        BAGS=max(16, next_power_of_2(sets)), num_warps=8, num_stages=stages,
        # Without it, Triton 3.6's compiler takes 128 registers on sm_100, and spills (2 stores).
        maxnreg=None if chip == 90 else 255,
    )  # fmt: skip


def _waves(slots: int, tiles: int, programs: int) -> tuple[int, int, int]:
    """Divide tiles of rows and outputs among programs that run at a time, one a multiprocessor.

    Args:
        slots: blocks of rows.
        tiles: tiles of each block of rows, one for each block of outputs.
        programs: how many run at a time.

    Returns:
        How many programs to launch; how many full tiles they compute in turns; and how many half
        tiles (half as many rows) are computed after these, at most one for each program. With them,
        938 tiles on 132 multiprocessors take the time of seven and a half turns, not of eight.
    """
    total = slots * tiles
    full_tiles = total // programs * programs // tiles * tiles
    half_tiles = 2 * (total - full_tiles)
    if half_tiles > programs:
        full_tiles, half_tiles = total, 0
    return min(programs, max(full_tiles, half_tiles)), full_tiles, half_tiles


def weight_gradient(
    grad: Tensor, x: Tensor, p: Tensor | None, mean: Tensor, rstd: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the weights and the bias, [S, O, W] and [S, O], of grad's dtype.

    In bf16 the sum over the rows is one product of torch's library, which is allowed to choose its
    own order: these gradients are sums over all bags, not results of one. Otherwise it is `pool`.

    Args:
        grad: contiguous [S, T, O].
        x, p, mean, rstd, eps: as for `project`.
    """
    (sets, rows, outputs), width = grad.shape, x.shape[1]
    columns, channels = sets * outputs, 0 if p is None else p.shape[1]
    slots = cdiv(rows, SIDE_CHUNK)
    scaled_grad = grad.new_empty(rows, columns) if scaled(x, grad.dtype) else None
    side = grad.new_empty(slots, columns, 1 + channels, dtype=torch.float32)
    # Blocks of 64 spill registers where positions are normalised (sm_80).
    block_t = 32 if scaled_grad is None else 64
    if side.numel():
        launch(
            scale_gradient_kernel, x, (slots, cdiv(columns, 64)),
            grad, p, mean, rstd, scaled_grad, side, 0 if p is None else p.stride(0), rows,
            1 if p is None else p.shape[0], eps, COLUMNS=columns, OUTPUTS=outputs, P=channels,
            CHUNK=SIDE_CHUNK, BLOCK_T=block_t, BLOCK_O=64,
            BLOCK_P=max(16, next_power_of_2(channels)), num_warps=4,
        )  # fmt: skip
    out, sums = grad.new_empty(sets, outputs, width + channels), grad.new_empty(sets, outputs)
    if scaled_grad is None:
        pool(grad, x, mean, rstd, None, Side(side, channels), out, sums, None)
    else:
        product = _product_in_fp32(scaled_grad.t(), x)
        _combine(product, Side(side, channels), None, 1, 1, rows, out, sums, None)
    return out, sums


def pool(
    a: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    offsets: Tensor | None,
    side: Side,
    out: Tensor,
    sums: Tensor | None,
    mean_token: MeanToken | None,
) -> None:
    """Write sum_t a[t] zhat[t]^T over the rows t of each bag, added up in fp32, in a fixed order.

    Each chunk of rows (`pool_chunk`) is pooled by itself, into memory of its own; a second launch
    adds the chunks of a bag up in order. Atomic additions would come in another order in every run.

    Args:
        a: [T, O], or [S, T, O] with one bag; its dtype is that of the products. It has been
            multiplied by rstd if `scaled`.
        x, mean, rstd: as for `project`.
        offsets: int64 [G + 1] on the device: bag g has rows offsets[g] to offsets[g + 1]; None for
            one bag.
        side: the sums of a, written with it.
        out: where to write, contiguous [G, O, W], or [S, O, W] for a of three axes.
        sums: where to write the sums of a, contiguous, out's shape without W; or None.
        mean_token: removes the rounding of the sums of a from the result; or None.
    """
    rows, width = x.shape
    columns = a.shape[-1] * (a.shape[0] if a.ndim == 3 else 1)
    bags = 1 if offsets is None else offsets.shape[0] - 1
    chunk = pool_chunk(columns)
    slots = cdiv(rows, chunk) if offsets is None else count_slots(rows, bags, chunk)
    if not out.numel():
        return
    partial = x.new_empty(slots, columns, width, dtype=torch.float32)
    if slots:
        by_tma = scaled(x, a.dtype) and a.ndim == 2 and _tma(x, a)
        (_pool_by_tma if by_tma else _pool_by_pointers)(a, x, mean, rstd, offsets, partial, chunk)
    _combine(partial, side, offsets, chunk, rows, rows, out, sums, mean_token)


def _pool_by_pointers(
    a: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    offsets: Tensor | None,
    partial: Tensor,
    chunk: int,
) -> None:
    """Write the sums over each chunk of rows to `partial`."""
    (slots, columns, width), bags = partial.shape, 1 if offsets is None else len(offsets) - 1
    half = a.element_size() == 2 and x.element_size() == 2
    plain = scaled(x, a.dtype)  # both operands are multiplied as they lie in memory
    # Triton looks whether 16 divides a stride, not 8: of 200 outputs it would not know that rows
    # begin at 16 bytes. So the stride is passed divided by 8, and multiplied by a constant.
    unit = 8 if a.stride(-2) % 8 == 0 else 1
    block = columns_of(columns, HALF if plain else SINGLE)
    if not plain and capability(x) > 90:  # blocks of 128 outputs spill registers (2 stores)
        block = ColumnBlocks(min(64, block.main), 0)
    block_d = 32 if width <= 32 else 128 if plain and width > 64 else 64
    launch(
        pool_kernel, x, (slots * cdiv(width, block_d) * cdiv(columns, block.width),),
        a, x, mean, rstd, offsets, partial, a.stride(0) if a.ndim == 3 else 0,
        a.stride(-2) // unit, x.stride(0), bags, 0 if offsets is not None else len(x), slots,
        A_UNIT=unit, COLUMNS=columns, OUTPUTS=a.shape[-1], D=width, CHUNK=chunk,
        BLOCK_T=64 if half else 32, BLOCK_O=block.main, NARROW=block.narrow, BLOCK_D=block_d,
        RAGGED=offsets is not None, SCALED=plain,
        num_warps=8 if block_d * block.main > 64 * 64 else 4, num_stages=3,
    )  # fmt: skip


def _pool_by_tma(
    a: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    offsets: Tensor | None,
    partial: Tensor,
    chunk: int,
) -> None:
    """Write the sums over each chunk of rows to `partial`; a [T, O] has been multiplied by rstd."""
    (slots, columns, width), bags = partial.shape, 1 if offsets is None else len(offsets) - 1
    block = columns_of(columns, HOPPER if capability(x) == 90 else WIDE)
    block_d = _long_side(block, capability(x))
    launch(
        pool_tma_kernel, x, (slots * cdiv(width, block_d) * cdiv(columns, block.width),),
        TensorDescriptor.from_tensor(a, [64, block.main]),
        TensorDescriptor.from_tensor(a, [64, block.narrow]) if block.narrow else None,
        TensorDescriptor.from_tensor(x, [64, block_d]),
        offsets, partial, bags, 0 if offsets is not None else len(x), slots,
        COLUMNS=columns, D=width, CHUNK=chunk, BLOCK_T=64, BLOCK_O=block.main,
        NARROW=block.narrow, BLOCK_D=block_d, RAGGED=offsets is not None, num_warps=8, num_stages=4,
    )  # fmt: skip


def _combine(
    partial: Tensor,
    side: Side,
    offsets: Tensor | None,
    chunk: int,
    rows: int,
    side_rows: int,
    out: Tensor,
    sums: Tensor | None,
    mean_token: MeanToken | None,
) -> None:
    """Add up the chunks of `partial`, of `rows` rows, and those of `side`; write out and sums."""
    if not out.numel():
        return
    columns, width = side.sums.shape[1], out.shape[-1] - side.channels
    pooled, mass = mean_token or (None, None)
    launch(
        combine_pool_kernel, out, (out.numel() // out.shape[-1],),
        partial, side.sums, offsets, pooled, mass, out, sums, rows, side_rows,
        COLUMNS=columns, D=width, P=side.channels, CHUNK=chunk, SIDE_CHUNK=SIDE_CHUNK,
        BLOCK_D=next_power_of_2(width), BLOCK_P=next_power_of_2(max(side.channels, 1)),
        RAGGED=offsets is not None, num_warps=_row_warps(width),
    )  # fmt: skip


def _product_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Return a b in float32. Only on CUDA can torch do so without casting a and b."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _row_warps(width: int) -> int:
    """Return the warps of a program that holds one row in registers."""
    return min(16, max(1, next_power_of_2(width) // 256))


def _direct(x: Tensor, weight: Tensor) -> bool:
    """Return whether x is multiplied as it lies in memory, by centred weights."""
    return x.dtype == weight.dtype and x.dtype in _DIRECT


def _tma(*tensors: Tensor) -> bool:
    """Return whether the tensor memory accelerator can read these.

    Rows must not overlap, and must begin at multiples of 16 bytes.
    """
    if capability(tensors[0]) not in TMA:
        return False
    return all(
        x.data_ptr() % 16 == 0
        and x.stride(-2) * x.element_size() % 16 == 0
        and x.stride(-2) >= x.shape[-1]
        for x in tensors
    )


def _long_side(block: ColumnBlocks, capability: int) -> int:
    """Return the other side of a program's tile, beside its outputs: rows, or channels of x.

    It is as long as the registers of 8 warps hold the sums of the tile: the longer, the fewer bytes
    are read from the second-level cache.
    """
    return 256 if capability == 90 and block.width <= 144 else 128
