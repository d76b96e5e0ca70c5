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

from ..backends import capability
from ..launch import cdiv, launch, next_power_of_2
from ..ragged import count_slots
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
    cache: 128 outputs, on Hopper 256, fit in one program's registers, and 1,648 are needed.

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
    weight, weight_p, weight_sum = centred
    rows, width = x.shape
    sets, outputs, channels = weight_p.shape
    grouped = offsets is not None
    direct = x.dtype == weight.dtype and x.dtype in _DIRECT
    columns = outputs if grouped else sets * outputs
    block_t, block_o, block_d = _project_blocks(x, weight, columns, direct=direct)
    y = weight.new_empty((rows, outputs) if grouped else (sets, rows, outputs))
    slots = count_slots(rows, sets, block_t) if grouped else cdiv(rows, block_t)
    if rows and y.numel():
        launch(
            project_kernel, x, (slots * cdiv(columns, block_o),),
            x, p, weight, weight_p, weight_sum, bias, offsets, mean, rstd, y,
            x.stride(0), 0 if p is None else p.stride(0), sets, rows, 0 if grouped else rows,
            1 if p is None else p.shape[0], eps,
            COLUMNS=columns, OUTPUTS=outputs, D=width, P=channels,
            BLOCK_T=block_t, BLOCK_O=block_o, BLOCK_D=block_d,
            BLOCK_P=max(16, next_power_of_2(channels)), GROUPED=grouped, DIRECT=direct,
            num_warps=8 if block_t * block_o > 64 * 64 else 4, num_stages=3,
        )  # fmt: skip
    return y


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

    Rows are cut in chunks of 16 times the number of outputs, 512 to 16,384 rows, so that the
    partial results take an eighth of a 16-bit x at most (a fifth for 1,648 outputs), and one more
    result per bag.

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
    chunk = max(512, min(16384, next_power_of_2(16 * columns)))
    slots = cdiv(rows, chunk) if offsets is None else count_slots(rows, bags, chunk)
    if not out.numel():
        return
    partial = x.new_empty(slots, columns, width, dtype=torch.float32)
    # Triton takes no notice of strides that 8 divides but not 16, such as 200 outputs'.
    unit = 8 if a.stride(-2) % 8 == 0 else 1
    if slots:
        grid, blocks = _pool_blocks(a, x, columns, slots)
        launch(
            pool_kernel, x, grid,
            a, x, mean, rstd, offsets, partial, a.stride(0) if a.ndim == 3 else 0,
            a.stride(-2) // unit, x.stride(0), bags, 0 if offsets is not None else rows,
            A_UNIT=unit, COLUMNS=columns, OUTPUTS=a.shape[-1], D=width, CHUNK=chunk,
            RAGGED=offsets is not None, SCALED=scaled(x, a.dtype), **blocks,
        )  # fmt: skip
    _combine(partial, side, offsets, chunk, rows, rows, out, sums, mean_token)


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


def _project_blocks(
    x: Tensor, weight: Tensor, columns: int, *, direct: bool
) -> tuple[int, int, int]:
    """Return the rows, outputs and channels of a step of project_kernel."""
    # 256 outputs spill on sm_80 (2 stores) and sm_100 (16), where operands pass through registers.
    widest = 256 if direct and capability(x) == 90 else 128
    block_o = _output_block(columns, widest)
    if weight.element_size() > 2 or x.element_size() > 2:
        return 64, block_o, 32
    return 128, block_o, 64


def _output_block(columns: int, widest: int) -> int:
    """Return the block that reads least from cache, 128 rows and its own columns per program."""
    if columns <= 64:
        return max(16, next_power_of_2(columns))
    blocks = [block for block in (64, 128, 256) if block <= widest]
    return min(blocks, key=lambda block: cdiv(columns, block) * (128 + block))


def _pool_blocks(
    a: Tensor, x: Tensor, columns: int, slots: int
) -> tuple[tuple[int], dict[str, int]]:
    """Return the grid of pool_kernel, and the blocks of a step."""
    width = x.shape[1]
    half = a.element_size() == 2 and x.element_size() == 2
    # 128 outputs that do not fill the last block spill in float32 on sm_100 (2 stores).
    block_o = _output_block(columns, 128 if half or capability(x) <= 90 else 64)
    block_d, stages = 64 if width > 32 else 32, 3
    if scaled(x, a.dtype) and width > 64:
        # Operands that nothing is done to leave the registers to the sums.
        hopper = capability(x) == 90 and width > 128
        block_d, stages = (256, 4) if hopper else (128, 3)
    blocks = {"BLOCK_T": 64 if half else 32, "BLOCK_O": block_o, "BLOCK_D": block_d}
    blocks |= {"num_warps": 8 if block_d * block_o > 64 * 64 else 4, "num_stages": stages}
    return (slots * cdiv(width, block_d) * cdiv(columns, block_o),), blocks
