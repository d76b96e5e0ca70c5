"""The Triton kernels of fold_norm; triton.py says how they are launched."""

import triton
import triton.language as tl


@triton.jit
def fold_kernel(
    weight_ptr, gain_ptr, shift_ptr, folded_ptr, bias_ptr,
    E: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write one row of weight diag(gain), and its number of weight shift.

    Results have PADDED rows for each head, of which the rows behind the Eth become zeros.
    """
    row = tl.program_id(0)
    exists = row % PADDED < E
    weight_ptr += (row // PADDED * E + row % PADDED) * D
    folded_ptr += row * D
    total = tl.zeros([BLOCK_D], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        weight = tl.load(weight_ptr + d, mask=(d < D) & exists, other=0.0).to(tl.float32)
        gain = tl.load(gain_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(folded_ptr + d, (weight * gain).to(folded_ptr.dtype.element_ty), mask=d < D)
        total += weight * shift
    tl.store(bias_ptr + row, tl.sum(total, 0).to(bias_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["n_rows"])
def fold_backward_kernel(
    dfolded_ptr, dbias_ptr, weight_ptr, gain_ptr, shift_ptr, dweight_ptr, dgain_ptr, dshift_ptr,
    n_rows, E: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the gradients of BLOCK_D columns of the weights, and of their gains and shifts.

    A program reads all rows of its columns, so that the sums over rows, which are the gradients of
    gain and shift, need no second launch. They have BLOCK_N partial sums a column in registers.
    """
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    gain = tl.load(gain_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    shift = tl.load(shift_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    dgain = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dshift = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for n0 in range(0, n_rows, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        padded = n // E * PADDED + n % E
        mask = (n < n_rows)[:, None] & (d < D)[None, :]
        at = n[:, None] * D + d[None, :]
        weight = tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
        from_folded = padded[:, None] * D + d[None, :]
        dfolded = tl.load(dfolded_ptr + from_folded, mask=mask, other=0.0).to(tl.float32)
        dbias = tl.load(dbias_ptr + padded, mask=n < n_rows, other=0.0).to(tl.float32)[:, None]
        dweight = dfolded * gain + dbias * shift
        tl.store(dweight_ptr + at, dweight.to(dweight_ptr.dtype.element_ty), mask=mask)
        dgain += dfolded * weight
        dshift += dbias * weight
    tl.store(dgain_ptr + d, tl.sum(dgain, 0).to(dgain_ptr.dtype.element_ty), mask=d < D)
    tl.store(dshift_ptr + d, tl.sum(dshift, 0).to(dshift_ptr.dtype.element_ty), mask=d < D)
