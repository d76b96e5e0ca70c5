"""fold_norm: the literal form, and its Triton kernels in the interpreter against it."""

import pytest
import torch

from .conftest import KERNEL_TESTS, require_interpreter

require_interpreter()

import torch.nn.functional as F
from motet.kernels.fold_norm.operator import fold_norm
from torch.library import opcheck

from .comparison import assert_as_good_as, with_gradients
from .conftest import assert_differentiable_once

pytestmark = KERNEL_TESTS


def inputs(groups, rows, width):
    return torch.randn(groups, rows, width), torch.randn(width), torch.randn(width)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_equals_layer_norm_and_product(backend):
    weight, gain, shift = inputs(4, 5, 33)
    x = torch.randn(7, 33)
    folded, bias = fold_norm(weight, gain, shift, padding=3, backend=backend)
    actual = torch.einsum("gew,tw->gte", folded, F.layer_norm(x, (33,))) + bias[:, None]
    expected = torch.einsum("gew,tw->gte", weight, F.layer_norm(x, (33,), gain, shift))
    torch.testing.assert_close(actual[..., :5], expected, rtol=1e-5, atol=1e-5)
    assert not actual[..., 5:].any()


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 5, 33), (2, 27, 1030), (4, 70, 17), (2, 0, 5)])
@pytest.mark.parametrize("padding", [0, 3])
def test_triton(size, padding):
    def run(backend):
        return with_gradients(lambda *t: fold_norm(*t, padding=padding, backend=backend))

    assert_as_good_as(run("triton"), run("eager"), *inputs(*size))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtype_of_the_result(dtype):
    args = inputs(2, 5, 33)
    for backend in ("eager", "triton"):
        for part in fold_norm(*args, dtype=dtype, backend=backend):
            assert part.dtype == dtype
    actual, expected = (
        with_gradients(lambda *t, b=b: fold_norm(*t, dtype=torch.float16, backend=b))(*args)
        for b in ("triton", "eager")
    )
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)


def test_registration():
    args = [a.requires_grad_() for a in inputs(2, 3, 5)]
    opcheck(torch.ops.motet.fold_norm, (*args, 1, torch.float32))
    plain = [a.detach() for a in args]
    grads = torch.randn(2, 4, 5), torch.randn(2, 4)
    opcheck(torch.ops.motet.fold_norm_backward, (*grads, *plain))
    assert_differentiable_once(lambda *t: fold_norm(*t, backend="triton"), *inputs(1, 2, 3))


def test_what_does_not_fit():
    weight, gain, shift = inputs(2, 3, 5)
    with pytest.raises(ValueError, match=r"weight: expected \[G, E, D\], got \(3, 5\)"):
        fold_norm(weight[0], gain, shift, backend="triton")
    with pytest.raises(ValueError, match=r"gain: expected torch.float32 \[5\] on cpu as weight"):
        fold_norm(weight, gain[:4], shift, backend="triton")
    with pytest.raises(ValueError, match=r"shift: expected torch.float32 \[5\] .* torch.float64"):
        fold_norm(weight, gain, shift.double(), backend="triton")
