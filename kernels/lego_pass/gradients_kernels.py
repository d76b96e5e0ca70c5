"""The Triton kernel that writes the gradients of all weights of a pass of lego_pass.

One launch has a program for every tile of every gradient. The number of a program runs through the
parts in order: each part takes the number counted from its own first tile, and does nothing if the
number is not one of its tiles. A program sums over all rows by itself, in fp32 registers and in
order, so that no number has two writers and the bits are the same in every run.
"""

import triton
import triton.language as tl

from ..tile_kernels import load_tile, product, store_tile


@triton.jit
def _gradient_of_matrix(
    tile, left_ptr, right_ptr, out_ptr, n_rows, M: tl.constexpr, N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Write one tile of left^T right [M, N]; rows of left and right have LEFT and RIGHT numbers.

    Rows may be longer than M and N. The numbers behind M and N are loaded, since loads that stop
    between two multiples of 16 bytes are not asynchronous, but their results are not stored.
    """
    across: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    down: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    if (tile >= 0) & (tile < down * across):
        m0, n0 = tile // across * BLOCK_M, tile % across * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for t0 in range(0, n_rows, BLOCK_T):
            t = (t0 + tl.arange(0, BLOCK_T)).to(tl.int64)
            left = load_tile(left_ptr, t, LEFT, t < n_rows, m0, LEFT, BLOCK_M).to(DTYPE)
            right = load_tile(right_ptr, t, RIGHT, t < n_rows, n0, RIGHT, BLOCK_N).to(DTYPE)
            acc = product(tl.trans(left), right, acc)
        m = m0 + tl.arange(0, BLOCK_M)
        store_tile(out_ptr, m, m < M, n0, acc, N, BLOCK_N)


@triton.jit
def _gradient_of_vectors(
    tile, partial_ptr, out_ptr, n_programs, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write BLOCK numbers of the sum of partial [programs, SIZE] over the programs, in order."""
    i = tile * BLOCK + tl.arange(0, BLOCK)
    if (tile >= 0) & (tile * BLOCK < SIZE):
        total = tl.zeros([BLOCK], tl.float32)
        for program in range(0, n_programs):
            total += tl.load(partial_ptr + program * SIZE + i, mask=i < SIZE, other=0.0)
        tl.store(out_ptr + i, total, mask=i < SIZE)


@triton.jit(do_not_specialize=["n_rows", "n_programs", "n_query_programs"])
def gradients_kernel(
    dupdate_ptr, dhidden_ptr, dout_ptr, dpre_ptr, normed_ptr, gated_ptr, flat_ptr, partial_ptr,
    dquery_weights_ptr, dqueries_ptr, query_normed_ptr, query_partial_ptr,
    n_rows, n_programs, n_query_programs,
    D: tl.constexpr, INNER: tl.constexpr, Q: tl.constexpr, PADDED: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write the gradients of `UpdateWeights.flat` and `QueryWeights.flat`.

    The operands are those that update_backward_kernel and query_backward_kernel wrote. Operands as
    wide as the latents have rows of PADDED numbers, others of their own width.
    """
    tile = tl.program_id(0)
    across: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    down: tl.constexpr = (D + BLOCK_M - 1) // BLOCK_M
    if dupdate_ptr is not None:
        _gradient_of_matrix(
            tile, dhidden_ptr, normed_ptr, dupdate_ptr, n_rows, 8 * D, D, 8 * D, PADDED, DTYPE,
            BLOCK_M, BLOCK_N, BLOCK_T,
        )  # fmt: skip
        tile -= (8 * D + BLOCK_M - 1) // BLOCK_M * across
        _gradient_of_matrix(
            tile, dout_ptr, gated_ptr, dupdate_ptr + 8 * D * D, n_rows, D, 4 * D, PADDED, 4 * D,
            DTYPE, BLOCK_M, BLOCK_N, BLOCK_T,
        )  # fmt: skip
        tile -= down * ((4 * D + BLOCK_N - 1) // BLOCK_N)
        _gradient_of_matrix(
            tile, dpre_ptr, flat_ptr, dupdate_ptr + 12 * D * D, n_rows, D, INNER, PADDED, INNER,
            DTYPE, BLOCK_M, BLOCK_N, BLOCK_T,
        )  # fmt: skip
        tile -= down * ((INNER + BLOCK_N - 1) // BLOCK_N)
        vectors_ptr = dupdate_ptr + 12 * D * D + D * INNER
        _gradient_of_vectors(tile, partial_ptr, vectors_ptr, n_programs, 12 * D, BLOCK_V)
        tile -= (12 * D + BLOCK_V - 1) // BLOCK_V
    if dquery_weights_ptr is not None:
        _gradient_of_matrix(
            tile, dqueries_ptr, query_normed_ptr, dquery_weights_ptr, n_rows, Q, D, Q, PADDED,
            DTYPE, BLOCK_M, BLOCK_N, BLOCK_T,
        )  # fmt: skip
        tile -= (Q + BLOCK_M - 1) // BLOCK_M * across
        _gradient_of_vectors(
            tile, query_partial_ptr, dquery_weights_ptr + Q * D, n_query_programs, 2 * D, BLOCK_V
        )
