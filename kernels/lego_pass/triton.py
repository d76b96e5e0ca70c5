"""Launches the Triton kernels of lego_pass: from what one attention gathered to the next queries.

A program owns some rows of the latents, from the output projection to the queries; a hidden
activation is never in memory. Where Z is normalised along the latents, its rows are those of one
sample; otherwise samples do not matter. Weights are read as they lie, through the second-level
cache, and rounded to the dtype of the products on the way.

Going back takes two kernels: one through queries and normalisation, one through the update. They
write the operands of the gradients of matrices, which torch multiplies, and sums over their rows
for the gradients of vectors, which torch adds up in order.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, launch, next_power_of_2
from .spectrum import scale_shape
from .triton_kernels import asking_backward_kernel, pass_kernel, update_backward_kernel
from .weights import Asking, Update

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# What the kernels get where nothing is asked.
_NO_ASKING = (None, None, None)


class _Blocks(NamedTuple):
    """Rows of a program; channels of the latents, of heads and of the hidden layer of a step."""

    block_c: int
    block_k: int
    block_e: int
    block_f: int
    num_warps: int
    num_stages: int


def forward(
    real: Tensor,
    imaginary: Tensor | None,
    gathered: Tensor,
    update: Update,
    asking: Asking | None,
    present: Tensor | None,
    keep: Tensor | None,
    scaled: Tensor | None,
    snn: bool,
    axes: Sequence[int],
    rows: int,
    products: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Re Z, Im Z, the queries and the scale; empty where there is none.

    Args:
        real: contiguous [B or 1, C, D]; a sample fits in a tile of 8,192 numbers, its sides rounded
            up to powers of 2, if its rows are normalised together.
        imaginary: like `real`, or None; not without axes.
        gathered: [B, H, C or 1, E], last stride 1.
        update, asking, present, keep, scaled, snn, axes: contiguous, as given to lego_pass.
        rows: of the whole spectrum.
        products: dtype of the products.
    """
    asked = 0 if asking is None else len(asking.weight)
    (bags, heads, _, width), (latents, dim) = gathered.shape, real.shape[1:]
    x = real.new_empty(bags, latents, dim)
    y = real.new_empty(0 if imaginary is None else x.shape)
    queries = real.new_empty((bags, latents, asked) if asked else 0, dtype=products)
    scale = real.new_empty(scale_shape(x.shape, axes), dtype=torch.float32)
    blocks = _pass_blocks(latents if -2 in axes else 0, dim, products)
    programs = _programs(bags, latents, axes, blocks)
    normed = real.new_empty(programs * blocks.block_c, _power(dim), dtype=products)
    if x.numel():
        launch(
            pass_kernel, x, (programs,),
            real, imaginary, gathered, *update, *(asking or _NO_ASKING), present, keep, scaled,
            x, y, queries, scale, normed,
            gathered.stride(0), gathered.stride(1), _row_stride(gathered),
            bags * latents, heads, E=width, Q=asked, SHARED=len(real) < bags, SNN=snn,
            BLOCK_K=blocks.block_k, BLOCK_F=blocks.block_f,
            **_normalising(axes, rows, latents, dim),
            **_constants(blocks, latents, dim, products),
        )  # fmt: skip
    return x, y, queries, scale


def backward(
    grad_real: Tensor | None,
    grad_imaginary: Tensor | None,
    grad_queries: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    real: Tensor,
    gathered: Tensor,
    update: Update,
    asking: Asking | None,
    present: Tensor | None,
    keep: Tensor | None,
    scaled: Tensor | None,
    snn: bool,
    axes: Sequence[int],
    rows: int,
    products: torch.dtype,
) -> tuple[Tensor, ...]:
    """Return what motet::lego_pass_backward returns, of its arguments, contiguous as in forward."""
    dy = x.new_empty(0 if y is None else x.shape)
    dask, dasks = x.new_empty(0, dtype=products), x.new_empty(0, dtype=torch.float32)
    if asking is not None or axes:
        dx, dask, dasks = _before_asking(
            grad_real, grad_imaginary, grad_queries, x, y, scale, dy, asking, scaled, axes, rows,
            products,
        )  # fmt: skip
    else:
        dx = torch.zeros_like(x) if grad_real is None else grad_real
    dreal, dgathered, *of_update = _before_update(
        dx, real, gathered, update, present, keep, snn, products
    )
    if len(real) < len(gathered):
        dreal = dreal.sum(0, keepdim=True)
        dy = dy if y is None else dy.sum(0, keepdim=True)
    return dreal, dy, dgathered, *of_update, dask, dasks


def _before_asking(
    grad_real: Tensor | None,
    grad_imaginary: Tensor | None,
    grad_queries: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    dy: Tensor,
    asking: Asking | None,
    scaled: Tensor | None,
    axes: Sequence[int],
    rows: int,
    products: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Go back through queries and normalisation: fill dy; return dx, and the gradients of asking.

    These are of the matrix, and of the LayerNorm's vectors beside each other.
    """
    bags, latents, dim = x.shape
    count, asked = bags * latents, 0 if asking is None else len(asking.weight)
    blocks = _pass_blocks(latents if -2 in axes else 0, dim, products)
    programs = _programs(bags, latents, axes, blocks)
    dx = x.new_empty(x.shape, dtype=torch.float32)
    normed = x.new_empty((count, dim) if asked else 0, dtype=products)
    partial = x.new_empty((programs, 2 * dim) if asked else 0, dtype=torch.float32)
    if x.numel():
        launch(
            asking_backward_kernel, x, (programs,),
            grad_real, grad_imaginary, grad_queries, x, y, scale, scaled,
            *(asking or _NO_ASKING), dx, dy, normed, partial, count, Q=asked,
            **_normalising(axes, rows, latents, dim),
            **_constants(blocks, latents, dim, products),
        )  # fmt: skip
    if asking is None:
        return dx, x.new_empty(0, dtype=products), x.new_empty(0, dtype=torch.float32)
    if grad_queries is None:
        return dx, x.new_zeros(asking.weight.shape, dtype=products), partial.sum(0)
    return dx, grad_queries.to(products).view(count, asked).t() @ normed, partial.sum(0)


def _before_update(
    dx: Tensor,
    real: Tensor,
    gathered: Tensor,
    update: Update,
    present: Tensor | None,
    keep: Tensor | None,
    snn: bool,
    products: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Go back through the update: return the gradients of real, [B, C, D], and of gathered.

    And those of its three matrices, and of its vectors beside each other, [12 D].
    """
    (bags, heads, _, width), (latents, dim) = gathered.shape, real.shape[1:]
    count = bags * latents
    blocks = _update_blocks(dim, products)
    programs = cdiv(count, blocks.block_c)
    one = gathered.shape[2] < latents
    dreal = real.new_empty(bags, latents, dim)
    dgathered = gathered.new_empty(0 if one else gathered.shape)
    flat = real.new_empty(0 if one else (count, heads * width), dtype=products)
    room = (programs * blocks.block_c, _power(dim))
    normed, dout, dpre = (real.new_empty(room, dtype=products) for _ in range(3))
    gated, dhidden = (real.new_empty(count, k * dim, dtype=products) for k in (4, 8))
    partial = real.new_empty(programs, 12 * dim, dtype=torch.float32)
    if count * dim:
        launch(
            update_backward_kernel, real, (programs,),
            dx, real, gathered, *update[:-1], present, keep,
            dreal, dgathered, flat, normed, gated, dhidden, dout, dpre, partial,
            gathered.stride(0), gathered.stride(1), _row_stride(gathered), count, heads,
            E=width, SHARED=len(real) < bags, ONE=one, SNN=snn, BLOCK_K=blocks.block_k,
            BLOCK_F=blocks.block_f, **_constants(blocks, latents, dim, products),
        )  # fmt: skip
    normed, dout, dpre = (x[:count, :dim] for x in (normed, dout, dpre))
    if one:
        dpre = dpre.unflatten(0, (bags, latents)).sum(1)
        flat = gathered.to(products).reshape(bags, heads * width)
        dgathered = (dpre @ update[0].to(products)).view(gathered.shape).to(gathered.dtype)
    matrices = dpre.t() @ flat, dhidden.t() @ normed, dout.t() @ gated
    return dreal, dgathered, *matrices, partial.sum(0)


def _pass_blocks(latents: int, dim: int, products: torch.dtype) -> _Blocks:
    """Choose blocks for whole samples of `latents`, or rows of any (0), that spill no register."""
    rows = _power(latents) if latents else (32 if dim <= 64 else 16)
    if products == torch.float32:  # two parts of every operand are kept in registers
        return _Blocks(rows, min(32, _power(dim)), 16, 16, 8, 2)
    # Other steps spill on sm_100 (3 to 8 stores), and so do 8 warps for 16 rows of 128.
    few = rows == 16 and 64 < dim <= 128
    return _Blocks(rows, min(64 if dim <= 64 else 32, _power(dim)), 32, 32, 4 if few else 8, 2)


def _update_blocks(dim: int, products: torch.dtype) -> _Blocks:
    if products == torch.float32:  # 32 of the hidden layer spill on sm_100 (3 stores)
        return _Blocks(16, min(32, _power(dim)), 32, 16, 8, 2)
    return _Blocks(16, min(64, _power(dim)), 32, 32, 8, 2)


def _power(size: int) -> int:
    return max(16, next_power_of_2(size))


def _programs(bags: int, latents: int, axes: Sequence[int], blocks: _Blocks) -> int:
    return bags if -2 in axes else cdiv(bags * latents, blocks.block_c)


def _row_stride(gathered: Tensor) -> int:
    return gathered.stride(2) if gathered.shape[2] > 1 else 0


def _normalising(axes: Sequence[int], rows: int, latents: int, dim: int) -> dict[str, Any]:
    return {
        "count": float((rows if -2 in axes else 1) * (dim if -1 in axes else 1)),
        "HALF": rows if -2 in axes and rows > latents else 0,
        "ALONG_C": -2 in axes,
        "ALONG_D": -1 in axes,
    }


def _constants(blocks: _Blocks, latents: int, dim: int, products: torch.dtype) -> dict[str, Any]:
    return {
        "C": latents,
        "D": dim,
        "DTYPE": _DTYPES[products],
        "BLOCK_C": blocks.block_c,
        "BLOCK_D": _power(dim),
        "BLOCK_E": blocks.block_e,
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
    }
