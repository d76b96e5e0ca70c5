"""Triton's interpreter, corrected where it computes otherwise than a GPU.

It multiplies by numpy's matmul, and that by a BLAS, whose kernels for the last rows and columns of
a block add in another order than those for the others. On a GPU every number of `tl.dot` is
computed alike: here neither the processor nor a row's place changes its bits.

It keeps a comparison's type as that of the numbers that are compared, so that a scalar comparison
that is broadcast becomes numbers, which are no mask from Triton 3.9 on.
"""

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_create_dot = InterpreterBuilder.create_dot
_create_splat = InterpreterBuilder.create_splat


def product(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return a [..., M, K] times b [..., K, N]: every number a sum over K from first to last.

    Element by element, products rounded before they are added, as IEEE 754 has it: no order is left
    to choose.
    """
    a, b = a.astype(dtype), b.astype(dtype)
    total = np.zeros((*a.shape[:-1], b.shape[-1]), dtype)
    term = np.empty_like(total)
    for k in range(a.shape[-1]):
        np.multiply(a[..., k, None], b[..., None, k, :], out=term)
        np.add(total, term, out=total)
    return total


def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """Replace InterpreterBuilder's own, but for numbers of 8 bits, which motet has none of."""
    if min(a.dtype.primitive_bitwidth, b.dtype.primitive_bitwidth) == 8:
        return _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc)
    return TensorHandle(product(a.data, b.data, d.data.dtype) + d.data, d.dtype.scalar)


def create_splat(self, ret_ty, arg):
    """Replace InterpreterBuilder's own: the same, but a truth value stays one."""
    splat = _create_splat(self, ret_ty, arg)
    if arg.data.dtype == np.bool_:
        splat.data = splat.data.astype(np.bool_)
    return splat
