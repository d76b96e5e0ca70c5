"""Corrections of Triton's interpreter where it computes differently from a GPU.

The interpreter multiplies with numpy's matmul, which calls a BLAS. A BLAS adds the products of a
block's last rows and columns in another order than those of the others. On a GPU, `tl.dot` adds
in the same order for every element. With `create_dot`, the bits of a row depend neither on the
processor nor on the row's position.

The interpreter gives a comparison the dtype of the numbers compared. A scalar comparison that is
broadcast then becomes numbers, which Triton 3.9 and later do not accept as a mask.
"""

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_create_dot = InterpreterBuilder.create_dot
_create_splat = InterpreterBuilder.create_splat


def product(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return a [..., M, K] times b [..., K, N], each element summed over K from first to last.

    Each product is rounded before it is added (IEEE 754), so only one result is possible.
    """
    a, b = a.astype(dtype), b.astype(dtype)
    total = np.zeros((*a.shape[:-1], b.shape[-1]), dtype)
    term = np.empty_like(total)
    for k in range(a.shape[-1]):
        np.multiply(a[..., k, None], b[..., None, k, :], out=term)
        np.add(total, term, out=total)
    return total


def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """Replace InterpreterBuilder.create_dot, except for 8-bit numbers, which motet does not use."""
    if min(a.dtype.primitive_bitwidth, b.dtype.primitive_bitwidth) == 8:
        return _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc)
    return TensorHandle(product(a.data, b.data, d.data.dtype) + d.data, d.dtype.scalar)


def create_splat(self, ret_ty, arg):
    """Replace InterpreterBuilder.create_splat, so that a boolean stays a boolean."""
    splat = _create_splat(self, ret_ty, arg)
    if arg.data.dtype == np.bool_:
        splat.data = splat.data.astype(np.bool_)
    return splat
