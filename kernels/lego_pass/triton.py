"""Launches the Triton kernels of lego_pass: from the result of one attention to the next queries.

A program has some rows of the latents, from the output projection to the queries; no hidden
activation is written to memory. Where Z is normalised along the latents, a program has all rows of
one sample; otherwise it may have rows of several samples. Weights are read through the second-level
cache, and rounded to the dtype of the products on the way.

The backward pass has three kernels: one through the queries and the normalisation, one through the
update, and one for the gradients of all weights. The first two write the operands of the products
that are the gradients of matrices, and sums over their rows for the gradients of vectors. The third
multiplies the former and adds the latter up.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..dropout import representable
from ..launch import cdiv, launch, next_power_of_2
from .gradients_kernels import gradients_kernel
from .spectrum import scale_shape
from .triton_kernels import pass_kernel, query_backward_kernel, update_backward_kernel

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Numbers of a vector's gradient that a program of gradients_kernel adds up.
_VECTOR = 128


class _Blocks(NamedTuple):
    """How the work of a kernel is cut."""

    block_c: int
    """Rows of a program."""
    block_k: int
    """Channels of the latents in a step of a product over them."""
    block_e: int
    """Channels of a head, or of the queries, in a step."""
    block_f: int
    """Channels of the hidden layer in a step."""
    num_warps: int
    num_stages: int


class _Operands(NamedTuple):
    """The operands of the gradients of a set of weights; rows are those of all samples, B C.

    The gradient of a matrix is left^T right.
    """

    weights: Tensor
    """UpdateWeights.flat or QueryWeights.flat."""
    left: Sequence[Tensor]
    """[B C, ...], for each matrix the gradient of its product."""
    right: Sequence[Tensor]
    """[B C, ...], for each matrix the rows that it was applied to."""
    partial: Tensor
    """fp32 [programs, ...], sums over a program's rows for the gradients of the vectors."""


def forward(
    real: Tensor,
    imaginary: Tensor | None,
    attended: Tensor | None,
    update: Tensor | None,
    query_weights: Tensor | None,
    present: Tensor | None,
    scaled: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    snn: bool,
    axes: Sequence[int],
    rows: int,
    products: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Re Z, Im Z, the queries and the scale, each empty if it is not computed.

    Args:
        real: contiguous [B or 1, C, D]. If the axes include the latents, a sample must fit in a
            tile of 8,192 numbers, its sides rounded up to powers of 2.
        imaginary: like `real`, or None; only with axes.
        attended: [B, H, C or 1, E], last stride 1; None for no update.
        update: `UpdateWeights.flat`, None without attended.
        query_weights: `QueryWeights.flat`, None for no queries.
        present, scaled, seed, dropout_p, snn, axes: contiguous, as given to lego_pass.
        rows: C of the full spectrum.
        products: dtype of the products.
    """
    latents, dim = real.shape[1:]
    bags = len(real if attended is None else attended)
    query_width = _query_width(query_weights, dim)
    x = real.new_empty(bags, latents, dim)
    y = real.new_empty(0 if imaginary is None else x.shape)
    queries = real.new_empty((bags, latents, query_width) if query_width else 0, dtype=products)
    scale = real.new_empty(scale_shape(x.shape, axes), dtype=torch.float32)
    blocks = _pass_blocks(latents if -2 in axes else 0, dim, products)
    programs = _programs(bags, latents, axes, blocks)
    scratch = (programs * blocks.block_c, _power(dim))
    normed, kept = real.new_empty(scratch, dtype=products), _kept_scratch(real, scratch, seed)
    if x.numel():
        launch(
            pass_kernel, x, (programs,),
            real, imaginary, attended, update, query_weights, present, scaled, seed,
            x, y, queries, scale, normed, kept, *_strides(attended), bags * latents,
            **_normalisation(axes, rows, latents, dim), **_dropout(dropout_p), **_heads(attended),
            Q=query_width, SHARED=len(real) < bags, SNN=snn, BLOCK_K=blocks.block_k,
            BLOCK_F=blocks.block_f, **_constants(blocks, latents, dim, products),
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
    attended: Tensor | None,
    update: Tensor | None,
    query_weights: Tensor | None,
    present: Tensor | None,
    scaled: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    snn: bool,
    axes: Sequence[int],
    rows: int,
    products: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute motet::lego_pass_backward; tensors are contiguous where those of `forward` are."""
    dy = x.new_empty(0 if y is None else x.shape)
    dx, query_operands, update_operands = grad_real, None, None
    if dx is None or grad_queries is not None or axes or attended is None:
        dx, query_operands = _query_backward(
            grad_real, grad_imaginary, grad_queries, x, y, scale, dy, query_weights, scaled, axes,
            rows, products,
        )  # fmt: skip
    dreal, dattended = dx.to(real.dtype), x.new_empty(0)
    if attended is not None:
        assert update is not None
        dreal, dattended, update_operands = _update_backward(
            dx, real, attended, update, present, seed, dropout_p, snn, products
        )
    if len(real) < len(x):
        dreal = dreal.sum(0, keepdim=True)
        dy = dy if y is None else dy.sum(0, keepdim=True)
    dweights = _weight_gradients(x, update_operands, query_operands, products)
    return dreal, dy, dattended, *dweights


def _query_backward(
    grad_real: Tensor | None,
    grad_imaginary: Tensor | None,
    grad_queries: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    dy: Tensor,
    query_weights: Tensor | None,
    scaled: Tensor | None,
    axes: Sequence[int],
    rows: int,
    products: torch.dtype,
) -> tuple[Tensor, _Operands | None]:
    """Write dy; return dx and the operands of the query weights' gradients, None without queries.

    dx and dy are the gradients of Re Z and Im Z before the normalisation.
    """
    bags, latents, dim = x.shape
    query_width = 0 if grad_queries is None else _query_width(query_weights, dim)
    blocks = _query_blocks(latents if -2 in axes else 0, dim, products)
    programs = _programs(bags, latents, axes, blocks)
    dx = x.new_empty(x.shape, dtype=torch.float32)
    normed = x.new_empty((bags * latents, _power(dim)) if query_width else 0, dtype=products)
    partial = x.new_empty((programs, 2 * dim) if query_width else 0, dtype=torch.float32)
    if x.numel():
        launch(
            query_backward_kernel, x, (programs,),
            grad_real, grad_imaginary, grad_queries, x, y, scale, scaled, query_weights,
            dx, dy, normed, partial, bags * latents, Q=query_width,
            **_normalisation(axes, rows, latents, dim),
            **_constants(blocks, latents, dim, products),
        )  # fmt: skip
    if grad_queries is None or query_weights is None:
        return dx, None
    return dx, _Operands(query_weights, [grad_queries], [normed], partial)


def _update_backward(
    dx: Tensor,
    real: Tensor,
    attended: Tensor,
    update: Tensor,
    present: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    snn: bool,
    products: torch.dtype,
) -> tuple[Tensor, Tensor, _Operands]:
    """Return the gradients of real [B, C, D] and attended, and the operands for the weights."""
    (bags, heads, _, width), (latents, dim) = attended.shape, real.shape[1:]
    count, is_shared = bags * latents, attended.shape[2] < latents
    blocks = _update_blocks(dim, products)
    programs = cdiv(count, blocks.block_c)
    dreal = real.new_empty(bags, latents, dim)
    dattended = attended.new_empty(
        (bags, heads, latents, width), dtype=torch.float32 if is_shared else attended.dtype
    )
    scratch = (programs * blocks.block_c, _power(dim))
    normed, dout, dpre = (real.new_empty(scratch, dtype=products) for _ in range(3))
    flat, gated, dhidden = (
        real.new_empty(count, size, dtype=products) for size in (heads * width, 4 * dim, 8 * dim)
    )
    partial = real.new_empty(programs, 12 * dim, dtype=torch.float32)
    kept = _kept_scratch(real, scratch, seed)
    if count * dim:
        launch(
            update_backward_kernel, real, (programs,),
            dx, real, attended, update, present, seed,
            dreal, dattended, flat, normed, gated, dhidden, dout, dpre, partial, kept,
            *_strides(attended), count, **_dropout(dropout_p), **_heads(attended),
            SHARED=len(real) < bags, SNN=snn, BLOCK_K=blocks.block_k, BLOCK_F=blocks.block_f,
            **_constants(blocks, latents, dim, products),
        )  # fmt: skip
    if is_shared:  # all latents took the same outputs of the heads
        dattended = dattended.sum(2, keepdim=True).to(attended.dtype)
    operands = _Operands(update, [dhidden, dout, dpre], [normed, gated, flat], partial)
    return dreal, dattended, operands


def _weight_gradients(
    x: Tensor,
    update_operands: _Operands | None,
    query_operands: _Operands | None,
    products: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of UpdateWeights.flat and QueryWeights.flat, fp32.

    Each is empty if there are no operands for it.
    """
    bags, latents, dim = x.shape
    inner = 0 if update_operands is None else update_operands.right[2].shape[1]
    query_width = 0 if query_operands is None else query_operands.left[0].shape[2]
    block_m, block_n, block_t = _gradient_blocks(products)
    # Of both sets: the matrices, and how many numbers the vectors have, in the kernel's order.
    shapes = [[(8 * dim, dim), (dim, 4 * dim), (dim, inner)], [(query_width, dim)]]
    tiles, grads, pointers, programs = 0, [], [], []
    for operands, matrices, vectors in zip(
        (update_operands, query_operands), shapes, (12 * dim, 2 * dim), strict=True
    ):
        shape = 0 if operands is None else operands.weights.shape
        grads.append(x.new_empty(shape, dtype=torch.float32))
        if operands is None:
            pointers += [None] * (2 * len(matrices) + 2)
            programs.append(0)
            continue
        tiles += sum(cdiv(m, block_m) * cdiv(n, block_n) for m, n in matrices)
        tiles += cdiv(vectors, _VECTOR)
        pointers += [grads[-1], *operands.left, *operands.right, operands.partial]
        programs.append(len(operands.partial))
    if tiles:
        launch(
            gradients_kernel, x, (tiles,), *pointers, bags * latents, *programs, D=dim,
            INNER=inner, Q=query_width, PADDED=_power(dim), DTYPE=_DTYPES[products],
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_T=block_t, BLOCK_V=_VECTOR,
            num_warps=4, num_stages=2,
        )  # fmt: skip
    dupdate, dquery_weights = grads
    return dupdate, dquery_weights


def _gradient_blocks(products: torch.dtype) -> tuple[int, int, int]:
    """Return the sides of a tile of a matrix's gradient, and the rows of a step."""
    return (32, 32, 32) if products == torch.float32 else (64, 64, 16)


def _pass_blocks(latents: int, dim: int, products: torch.dtype) -> _Blocks:
    """Choose blocks that spill no registers.

    With `latents` > 0 a program has all rows of one sample of so many latents; with 0, any rows.
    """
    rows = _power(latents) if latents else (32 if dim <= 64 else 16)
    if products == torch.float32:  # registers hold two parts of every operand (tf32x3)
        return _Blocks(rows, min(32, _power(dim)), 16, 16, 8, 2)
    # Other steps spill on sm_100 (3 to 8 stores), and so do 8 warps for 16 rows of 128. With all
    # rows of a sample in 16 rows, steps of 64 in the hidden layer spill too (2 stores on sm_90).
    few = rows == 16 and 64 < dim <= 128
    block_k = min(64 if dim <= 64 else 32, _power(dim))
    if few and latents:
        return _Blocks(rows, block_k, 16, 32, 4, 2)
    return _Blocks(rows, block_k, 32, 64 if few else 32, 4 if few else 8, 2)


def _query_blocks(latents: int, dim: int, products: torch.dtype) -> _Blocks:
    """Choose blocks for query_backward_kernel."""
    blocks = _pass_blocks(latents, dim, products)
    # In fp32, steps of 16 queries spill for 32 rows of 128 (1 store on sm_80), and steps of 32 for
    # rows of 256 (2 stores on sm_90).
    if dim > 128:
        return blocks._replace(block_e=16)
    return blocks._replace(block_e=32) if dim > 64 else blocks


def _update_blocks(dim: int, products: torch.dtype) -> _Blocks:
    """Choose blocks for update_backward_kernel."""
    if products == torch.float32:  # steps of 32 in the hidden layer spill on sm_100 (3 stores)
        return _Blocks(16, min(32, _power(dim)), 32, 16, 8, 2)
    # Steps of 32 channels of a head spill with 62 channels of the latents (2 stores on sm_90).
    return _Blocks(16, min(64, _power(dim)), 16 if dim <= 64 else 32, 32, 8, 2)


def _power(size: int) -> int:
    """Return the block that holds `size`: a power of 2, at least 16, as products need it."""
    return max(16, next_power_of_2(size))


def _programs(bags: int, latents: int, axes: Sequence[int], blocks: _Blocks) -> int:
    """Return one program a sample if the axes include the latents, else one a block of rows."""
    return bags if -2 in axes else cdiv(bags * latents, blocks.block_c)


def _query_width(query_weights: Tensor | None, dim: int) -> int:
    """Return Q of QueryWeights.flat, [Q D + 2 D]."""
    return 0 if query_weights is None else len(query_weights) // dim - 2


def _strides(attended: Tensor | None) -> tuple[int, int, int]:
    """Return the strides of bag, head and latent."""
    if attended is None:
        return 0, 0, 0
    return attended.stride(0), attended.stride(1), attended.stride(2) * (attended.shape[2] > 1)


def _heads(attended: Tensor | None) -> dict[str, int]:
    heads, width = (0, 0) if attended is None else (attended.shape[1], attended.shape[3])
    return {"H": heads, "E": width}


def _kept_scratch(like: Tensor, shape: tuple[int, int], seed: Tensor | None) -> Tensor | None:
    """Return memory for the dropout mask, None without dropout."""
    return None if seed is None else like.new_empty(shape, dtype=torch.int8)


def _dropout(dropout_p: float) -> dict[str, float]:
    return {"dropout_p": representable(dropout_p), "kept_scale": 1 / (1 - dropout_p)}


def _normalisation(axes: Sequence[int], rows: int, latents: int, dim: int) -> dict[str, Any]:
    """Return what the kernels take about the normalisation; `count` is n of √n Z / ‖Z‖."""
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
