"""Launches the Triton kernels that read a context once: LayerNorm folded into products.

Row t of the context is z_t = [x_t | p_(t mod Np)], of width W = D + P, and zhat_t = (z_t - mean_t)
rstd_t. Neither the concatenation nor zhat is ever written. The mean leaves the products: with
centred weights, w_c = w - mean(w), w zhat = rstd w_c z, and for any a, with P = sum_t a_t rstd_t
z_t, sum_t a_t zhat_t = P - mean(P). Ragged rows are cut in chunks that are counted from the start
of each bag, so that a bag alone gives what it gives in any batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..backends import capability, multiprocessors
from ..launch import cdiv, launch, next_power_of_2
from ..ragged import count_slots
from .blocks import HALF, HOPPER, SINGLE, TMA, WIDE, Columns, columns_of, pool_chunk
from .tma_kernels import pool_tma_kernel, project_tma_kernel
from .triton_kernels import (
    centre_weights_kernel,
    combine_pool_kernel,
    pool_kernel,
    project_kernel,
    scale_gradient_kernel,
)

# Dtypes whose raw x goes to the matrix units with centred weights.
_DIRECT = (torch.bfloat16, torch.float16)
# Dtypes in which what is pooled by may be multiplied by rstd: fp16 has no room for 1e-4 of a weight
# of 1e-4.
_SCALED = (torch.bfloat16,)
# Rows of a program that sums up what is pooled by, over the rows and with the positions.
SIDE_CHUNK = 1024


class Side(NamedTuple):
    """Sums over chunks of SIDE_CHUNK rows of what is pooled by, beside its product with x."""

    sums: Tensor
    """fp32 [slots, O, 1 + P]: sum_t a[t, o], and sum_t a[t, o] phat[t]."""
    channels: int
    """P."""


class MeanToken(NamedTuple):
    """What the forward pass pooled, by which the gradient's rounding is taken out."""

    pooled: Tensor
    """[B, R, W], contiguous."""
    mass: Tensor
    """[B, R], contiguous."""


class Centred(NamedTuple):
    """Weights less their mean over the width, in the dtype to work in."""

    weight: Tensor
    """[S, O, D], whose rows asynchronous copies can read where those of an odd W could not."""
    weight_p: Tensor
    """[S, O, P]"""
    sums: Tensor
    """fp32 [S, O], over D and P: what rounding left."""


def scaled(x: Tensor, dtype: torch.dtype) -> bool:
    """Return whether rows x are pooled by weights of `dtype` that are multiplied by rstd."""
    return x.dtype == dtype and dtype in _SCALED


def centre(
    weight: Tensor, width: int, of: tuple[Tensor, MeanToken] | None
) -> tuple[Centred, Tensor | None]:
    """Return weight - mean(weight), of x and of the positions apart, and what rounding left.

    Args:
        weight: contiguous [S, O, W].
        width: D.
        of: of the gradient of pooled also sum(weight pooled) + dmass mass, given dmass [S, O],
            contiguous, and what belongs to it.

    Returns:
        The centred weights; and, fp32 [S, O], what is asked for by `of`, or None.
    """
    *rows, total = weight.shape
    own, own_p = weight.new_empty(*rows, width), weight.new_empty(*rows, total - width)
    sums = weight.new_empty(rows, dtype=torch.float32)
    delta = None if of is None else torch.empty_like(sums)
    dmass, (pooled, mass) = (None, (None, None)) if of is None else of
    if weight.numel():
        launch(
            centre_weights_kernel, weight, (sums.numel(),),
            weight, own, own_p, sums, pooled, dmass, mass, delta, D=width, P=total - width,
            BLOCK_W=next_power_of_2(total), num_warps=_row_warps(total),
        )  # fmt: skip
    return Centred(own, own_p, sums), delta


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

    Programs that share rows are neighbours in the grid and read them through the second-level
    cache: some 256 outputs at most fit in one program's registers, and 1,648 are needed.

    Args:
        x: [T, D], last stride 1.
        p: [Np, P] positional channels, T a multiple of Np; or None.
        centred: what `centre` makes of weight [S, O, W], of the dtype to work in.
        bias: [S, O] or None.
        offsets: None, and every weight set sees every row; or int64 [S + 1] on the device, and set
            s sees rows offsets[s] to offsets[s + 1]; what is behind the last is not written.
        mean, rstd: fp32 [T], those of the rows, contiguous.
        eps: LayerNorm's; a row of which no more than this is left is constant.

    Returns:
        [S, T, O], or [T, O] with offsets, of weight's dtype.
    """
    (sets, outputs, _), rows = centred.weight_p.shape, x.shape[0]
    y = centred.weight.new_empty((rows, outputs) if offsets is not None else (sets, rows, outputs))
    if rows and y.numel():
        by_tma = _direct(x, centred.weight) and _tma(x, centred.weight)
        # For sm_100 Triton 3.7.1 does not compile the second product that positions make.
        by_tma = by_tma and (p is None or capability(x) == 90)
        run = _project_by_tma if by_tma else _project_by_pointers
        run(x, p, centred, bias, offsets, mean, rstd, eps, y)
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
    # On sm_100 two blocks spill (2 stores).
    block = columns_of(columns, HALF if half and capability(x) <= 90 else SINGLE)
    block_t, block_d = (128, 64) if half else (64, 32)
    slots = count_slots(rows, sets, block_t) if grouped else cdiv(rows, block_t)
    launch(
        project_kernel, x, (slots * cdiv(columns, block.width),),
        x, p, weight, weight_p, weight_sum, bias, offsets, mean, rstd, y,
        x.stride(0), 0 if p is None else p.stride(0), sets, rows, 0 if grouped else rows,
        1 if p is None else p.shape[0], eps,
        COLUMNS=columns, OUTPUTS=outputs, D=width, P=channels,
        BLOCK_T=block_t, BLOCK_O=block.main, REST=block.rest, BLOCK_D=block_d,
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
    # Four buffers of 144 outputs and 256 rows, or of 272 and 128, leave no shared memory for the
    # way of the results.
    stages = 3 if block.main >= 128 and block.rest == 16 else 4
    slots = count_slots(rows, sets, block_t) if grouped else cdiv(rows, block_t)
    tiles = cdiv(columns, block.width)
    programs, whole, halves = _waves(slots, tiles, multiprocessors(x))
    weights = weight.flatten(0, 1)
    launch(
        project_tma_kernel, x, (programs,),
        TensorDescriptor.from_tensor(x, [block_t, 64]),
        TensorDescriptor.from_tensor(x, [block_t // 2, 64]),
        TensorDescriptor.from_tensor(weights, [block.main, 64]),
        TensorDescriptor.from_tensor(weights, [block.rest, 64]) if block.rest else None,
        p, weight_p, weight_sum, bias, offsets, mean, rstd, y,
        0 if p is None else p.stride(0), sets, rows, 0 if grouped else rows,
        1 if p is None else p.shape[0], eps, whole, halves,
        COLUMNS=columns, OUTPUTS=outputs, D=width, P=channels, BLOCK_T=block_t,
        BLOCK_O=block.main, REST=block.rest, BLOCK_D=64,
        BLOCK_P=max(16, next_power_of_2(channels)), GROUPED=grouped,
        BAGS=max(16, next_power_of_2(sets)), num_warps=8, num_stages=stages,
        # Left to itself the compiler of Triton 3.6 takes 128 on sm_100, and spills (2 stores).
        maxnreg=None if chip == 90 else 255,
    )  # fmt: skip


def _waves(slots: int, tiles: int, programs: int) -> tuple[int, int, int]:
    """Divide tiles of rows and outputs among programs: `tiles` for each slot of rows.

    Returns:
        How many programs to launch, how many tiles they compute whole, one after the other, and how
        many halves of tiles are left after these, at most one for each program. 938 tiles on 132
        multiprocessors take 7 turns and a half, not 8.
    """
    total = slots * tiles
    whole = total // programs * programs // tiles * tiles
    halves = 2 * (total - whole)
    if halves > programs:
        whole, halves = total, 0
    return min(programs, max(whole, halves)), whole, halves


def weight_gradient(
    grad: Tensor, x: Tensor, p: Tensor | None, mean: Tensor, rstd: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the weights and the bias, [S, O, W] and [S, O], of grad's dtype.

    Where x has the dtype of `grad`, bf16, the sum over the rows, which belongs to no bag, is a
    library's product.

    Args:
        grad: contiguous [S, T, O].
        x, p, mean, rstd, eps: as given to project.
    """
    (sets, rows, outputs), width = grad.shape, x.shape[1]
    columns, channels = sets * outputs, 0 if p is None else p.shape[1]
    slots = cdiv(rows, SIDE_CHUNK)
    draw = grad.new_empty(rows, columns) if scaled(x, grad.dtype) else None
    side = grad.new_empty(slots, columns, 1 + channels, dtype=torch.float32)
    block_t = 32 if draw is None else 64  # 64 spill where positions are normalised (sm_80)
    if side.numel():
        launch(
            scale_gradient_kernel, x, (slots, cdiv(columns, 64)),
            grad, p, mean, rstd, draw, side, 0 if p is None else p.stride(0), rows,
            1 if p is None else p.shape[0], eps, COLUMNS=columns, OUTPUTS=outputs, P=channels,
            CHUNK=SIDE_CHUNK, BLOCK_T=block_t, BLOCK_O=64,
            BLOCK_P=max(16, next_power_of_2(channels)), num_warps=4,
        )  # fmt: skip
    out, sums = grad.new_empty(sets, outputs, width + channels), grad.new_empty(sets, outputs)
    if draw is None:
        pool(grad, x, mean, rstd, None, Side(side, channels), out, sums, None)
    else:
        product = _product_in_fp32(draw.t(), x)
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

    Each chunk of rows (`pool_chunk`) is pooled by itself.

    Args:
        a: [T, O], or [S, T, O] with one bag; its dtype is the one to work in. It has been
            multiplied by rstd where `scaled`.
        x, mean, rstd: as given to project.
        offsets: int64 [G + 1] on the device: bag g owns rows offsets[g] to offsets[g + 1]; or None.
        side: what was summed while a was made.
        out: where to write, contiguous [G, O, W], or [S, O, W] for a of three axes.
        sums: where to write the sums of `side`, contiguous, out's shape but for W; or None.
        mean_token: what takes the rounding of the sums of a out; or None.
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
    """Write what each chunk of rows adds up to."""
    (slots, columns, width), bags = partial.shape, 1 if offsets is None else len(offsets) - 1
    half = a.element_size() == 2 and x.element_size() == 2
    plain = scaled(x, a.dtype)  # operands that nothing is done to
    # Triton takes no notice of strides that 8 divides but not 16, such as 200 outputs'.
    unit = 8 if a.stride(-2) % 8 == 0 else 1
    block = columns_of(columns, HALF if plain else SINGLE)
    if not plain and capability(x) > 90:  # 128 outputs spill (2 stores)
        block = Columns(min(64, block.main), 0)
    block_d = 32 if width <= 32 else 128 if plain and width > 64 else 64
    launch(
        pool_kernel, x, (slots * cdiv(width, block_d) * cdiv(columns, block.width),),
        a, x, mean, rstd, offsets, partial, a.stride(0) if a.ndim == 3 else 0,
        a.stride(-2) // unit, x.stride(0), bags, 0 if offsets is not None else len(x), slots,
        A_UNIT=unit, COLUMNS=columns, OUTPUTS=a.shape[-1], D=width, CHUNK=chunk,
        BLOCK_T=64 if half else 32, BLOCK_O=block.main, REST=block.rest, BLOCK_D=block_d,
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
    """Write what each chunk of rows adds up to, of a [T, O] that has been multiplied by rstd."""
    (slots, columns, width), bags = partial.shape, 1 if offsets is None else len(offsets) - 1
    block = columns_of(columns, HOPPER if capability(x) == 90 else WIDE)
    block_d = _long_side(block, capability(x))
    launch(
        pool_tma_kernel, x, (slots * cdiv(width, block_d) * cdiv(columns, block.width),),
        TensorDescriptor.from_tensor(a, [64, block.main]),
        TensorDescriptor.from_tensor(a, [64, block.rest]) if block.rest else None,
        TensorDescriptor.from_tensor(x, [64, block_d]),
        offsets, partial, bags, 0 if offsets is not None else len(x), slots,
        COLUMNS=columns, D=width, CHUNK=chunk, BLOCK_T=64, BLOCK_O=block.main, REST=block.rest,
        BLOCK_D=block_d, RAGGED=offsets is not None, num_warps=8, num_stages=4,
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
    """Return a b in float32. Only on CUDA torch does not round it to the dtype of a and b."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _row_warps(width: int) -> int:
    """Return the warps of a program that holds one row in registers."""
    return min(16, max(1, next_power_of_2(width) // 256))


def _direct(x: Tensor, weight: Tensor) -> bool:
    """Return whether x goes to the matrix units as it lies in memory."""
    return x.dtype == weight.dtype and x.dtype in _DIRECT


def _tma(*tensors: Tensor) -> bool:
    """Return whether the tensor memory accelerator reads these: rows apart, each on 16 bytes."""
    if capability(tensors[0]) not in TMA:
        return False
    return all(
        x.data_ptr() % 16 == 0
        and x.stride(-2) * x.element_size() % 16 == 0
        and x.stride(-2) >= x.shape[-1]
        for x in tensors
    )


def _long_side(block: Columns, capability: int) -> int:
    """Return the rows of a program, or its channels, beside its outputs, with 8 warps.

    As many as registers hold sums of: the more, the less is read from the second-level cache.
    """
    return 256 if capability == 90 and block.width <= 144 else 128
