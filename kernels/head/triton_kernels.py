"""The Triton kernels of head; triton.py says how they are launched.

Products are sums of elementwise products in float32, without matrix units: a model has few outputs.
All D channels of a row are one block of BLOCK_D.
"""

import triton
import triton.language as tl


@triton.jit
def _vector(base, i, size):
    """Load numbers i of a vector in float32, zeros from `size` on."""
    return tl.load(base + i, mask=i < size, other=0.0).to(tl.float32)


@triton.jit
def _matrix(base, row, rows, column, width):
    """Load rows and columns of a contiguous matrix in float32, zeros behind its sides."""
    mask = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    return tl.load(base + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["n_outputs"])
def head_kernel(
    latents_ptr, gain_ptr, shift_ptr, weight_ptr, bias_ptr, logits_ptr, normal_ptr, rstd_ptr,
    b_stride, c_stride, d_stride, n_outputs, eps,
    C: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write the logits of one sample, and its mean latent standardised, with 1 / SD."""
    sample = tl.program_id(0).to(tl.int64)
    latents_ptr += sample * b_stride
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        mask = (c < C)[:, None] & (d < D)[None, :]
        at = c[:, None] * c_stride + d[None, :] * d_stride
        total += tl.load(latents_ptr + at, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / C
    deviation = tl.where(d < D, mean - tl.sum(mean, 0) / D, 0.0)
    rstd = tl.rsqrt(tl.sum(deviation * deviation, 0) / D + eps)
    normal = deviation * rstd
    tl.store(normal_ptr + sample * D + d, normal, mask=d < D)
    tl.store(rstd_ptr + sample, rstd)
    normed = normal * _vector(gain_ptr, d, D) + _vector(shift_ptr, d, D)
    for k0 in range(0, n_outputs, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        weight = _matrix(weight_ptr, k, n_outputs, d, D)
        logits = tl.sum(weight * normed[None, :], 1) + _vector(bias_ptr, k, n_outputs)
        at = logits_ptr + sample * n_outputs + k
        tl.store(at, logits.to(logits_ptr.dtype.element_ty), mask=k < n_outputs)


@triton.jit
def _sample_gradient(
    sample, dlogits_ptr, normal_ptr, rstd_ptr, gain_ptr, weight_ptr, dlatents_ptr, n_outputs,
    C: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the latents of one sample, which is the same for all of them."""
    sample = sample.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for k0 in range(0, n_outputs, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        dlogits = _vector(dlogits_ptr + sample * n_outputs, k, n_outputs)
        total += dlogits[:, None] * _matrix(weight_ptr, k, n_outputs, d, D)
    normal = _vector(normal_ptr + sample * D, d, D)
    grad = tl.sum(total, 0) * _vector(gain_ptr, d, D)
    grad -= tl.sum(grad, 0) / D + normal * (tl.sum(grad * normal, 0) / D)
    grad *= tl.load(rstd_ptr + sample) / C
    dlatents_ptr += sample * (C * D)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        mask = (c < C)[:, None] & (d < D)[None, :]
        at = c[:, None] * D + d[None, :]
        grads = tl.zeros([BLOCK_C, BLOCK_D], tl.float32) + grad[None, :]
        tl.store(dlatents_ptr + at, grads.to(dlatents_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _column_gradients(
    first, dlogits_ptr, normal_ptr, gain_ptr, shift_ptr, weight_ptr, dgain_ptr, dshift_ptr,
    dweight_ptr, dbias_ptr, n_samples, n_outputs,
    D: tl.constexpr, SAMPLES: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of COLUMNS columns of the weights; the first program, of the bias too.

    With M = dlogits^T normal and m = dlogits^T 1, summed over the samples in order: dW is
    M diag(gain) + m shift^T, dgain the sum over outputs of W M, and dshift that of W m.
    """
    d = first + tl.arange(0, COLUMNS)
    gain, shift = _vector(gain_ptr, d, D)[None, :], _vector(shift_ptr, d, D)[None, :]
    dgain = tl.zeros([COLUMNS], tl.float32)
    dshift = tl.zeros([COLUMNS], tl.float32)
    for k0 in range(0, n_outputs, OUTPUTS):
        k = k0 + tl.arange(0, OUTPUTS)
        moment = tl.zeros([OUTPUTS, COLUMNS], tl.float32)
        total = tl.zeros([OUTPUTS], tl.float32)
        for b0 in range(0, n_samples, SAMPLES):
            b = (b0 + tl.arange(0, SAMPLES)).to(tl.int64)
            dlogits = _matrix(dlogits_ptr, b, n_samples, k, n_outputs)
            normal = _matrix(normal_ptr, b, n_samples, d, D)
            moment += tl.sum(dlogits[:, :, None] * normal[:, None, :], 0)
            total += tl.sum(dlogits, 0)
        weight = _matrix(weight_ptr, k, n_outputs, d, D)
        dweight = moment * gain + total[:, None] * shift
        at = dweight_ptr + k[:, None] * D + d[None, :]
        mask = (k < n_outputs)[:, None] & (d < D)[None, :]
        tl.store(at, dweight.to(dweight_ptr.dtype.element_ty), mask=mask)
        dgain += tl.sum(weight * moment, 0)
        dshift += tl.sum(weight * total[:, None], 0)
        has_bias = (k < n_outputs) & (first == 0)
        tl.store(dbias_ptr + k, total.to(dbias_ptr.dtype.element_ty), mask=has_bias)
    tl.store(dgain_ptr + d, dgain.to(dgain_ptr.dtype.element_ty), mask=d < D)
    tl.store(dshift_ptr + d, dshift.to(dshift_ptr.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["n_samples", "n_outputs"])
def head_backward_kernel(
    dlogits_ptr, normal_ptr, rstd_ptr, gain_ptr, shift_ptr, weight_ptr,
    dlatents_ptr, dgain_ptr, dshift_ptr, dweight_ptr, dbias_ptr, n_samples, n_outputs,
    C: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, SAMPLES: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one sample's latents, or of COLUMNS columns of the weights."""
    program = tl.program_id(0)
    if program < n_samples:
        _sample_gradient(
            program, dlogits_ptr, normal_ptr, rstd_ptr, gain_ptr, weight_ptr, dlatents_ptr,
            n_outputs, C, D, BLOCK_C, BLOCK_D, BLOCK_K,
        )  # fmt: skip
    else:
        _column_gradients(
            (program - n_samples) * COLUMNS, dlogits_ptr, normal_ptr, gain_ptr, shift_ptr,
            weight_ptr, dgain_ptr, dshift_ptr, dweight_ptr, dbias_ptr, n_samples, n_outputs, D,
            SAMPLES, OUTPUTS, COLUMNS,
        )  # fmt: skip
