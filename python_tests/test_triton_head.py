"""head: the literal form, and its Triton kernels in the interpreter against it."""

import pytest
import torch

from .conftest import KERNEL_TESTS, require_interpreter

require_interpreter()

import motet
from motet.kernels.head.operator import head
from torch.library import opcheck

from .comparison import assert_as_good_as, with_gradients
from .conftest import assert_differentiable_once

pytestmark = KERNEL_TESTS


def inputs(rows, count, dim, outputs):
    """Return latents, gain and shift of the LayerNorm, weights and bias, none of them trivial."""
    vectors = 1 + torch.randn(2, dim)
    return torch.randn(rows, count, dim), *vectors, torch.randn(outputs, dim), torch.randn(outputs)


def run(backend, eps=1e-5):
    return with_gradients(lambda *t: head(*t, eps=eps, backend=backend))


# The smallest; widths and outputs that fill no block; many samples; the widest.
SIZES = [
    (1, 1, 2, 1),
    (3, 17, 33, 4),
    (2, 25, 119, 40),
    (40, 3, 17, 17),
    (2, 5, 256, 20),
    (1, 2, 3, 1024),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_triton(size, eps):
    assert_as_good_as(run("triton", eps), run("eager", eps), *inputs(*size))


def test_latents_of_any_strides():
    latents, *weights = inputs(3, 7, 20, 4)
    strange = latents.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(
        head(strange, *weights, eps=1e-5, backend="triton"),
        head(latents, *weights, eps=1e-5, backend="triton"),
    )
    shared = latents[:1].expand(3, -1, -1)
    assert_as_good_as(run("triton"), run("eager"), shared, *weights)


def test_no_sample():
    results = run("triton")(*inputs(0, 3, 5, 4))
    assert [len(part) for part in results] == [0, 0, 5, 5, 4, 4]
    assert not any(part.any() for part in results)


def test_a_sample_alone_has_its_bits_in_any_batch():
    latents, *weights = inputs(20, 7, 33, 4)
    grad = torch.randn(20, 4)

    def forth_and_back(rows):
        logits, normal, rstd = torch.ops.motet.head(latents[rows], *weights, 1e-5)
        back = torch.ops.motet.head_backward(
            grad[rows], normal, rstd, *weights[:3], 7, torch.float32
        )
        return logits, back[0]

    batch = forth_and_back(slice(None))
    for i in range(20):
        alone = forth_and_back(slice(i, i + 1))
        assert all(
            torch.equal(actual[0], other[i]) for actual, other in zip(alone, batch, strict=True)
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    """Half-precision models work, and half-precision latents in float32 models under autocast."""
    parts = [t.to(dtype) for t in inputs(3, 17, 33, 4)]
    assert_as_good_as(run("triton"), run("eager"), *parts)
    latents, *weights = inputs(3, 17, 33, 4)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = (
            run(backend)(latents.to(dtype), *weights) for backend in ("triton", "eager")
        )
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_registration():
    args = [a.requires_grad_() for a in inputs(2, 3, 5, 4)]
    opcheck(torch.ops.motet.head, (*args, 1e-5))
    plain = [a.detach() for a in args]
    _, normal, rstd = torch.ops.motet.head(*plain, 1e-5)
    grad = torch.randn(2, 4)
    opcheck(torch.ops.motet.head_backward, (grad, normal, rstd, *plain[1:4], 3, torch.float32))
    assert_differentiable_once(lambda *t: head(*t, eps=1e-5, backend="triton"), *inputs(1, 2, 3, 4))


def test_what_does_not_fit():
    latents, gain, shift, weight, bias = inputs(2, 3, 5, 4)
    for match, given in (
        (r"weight: expected \[K, D\], got \(5,\)", (latents, gain, shift, weight[0], bias)),
        (
            r"latents: expected \[B, C, 5\], got \(2, 5\)",
            (latents[:, 0], gain, shift, weight, bias),
        ),
        (
            r"latents: expected \[B, C, 5\], got \(2, 0, 5\)",
            (latents[:, :0], gain, shift, weight, bias),
        ),
        ("latents: expected floating-point", (latents.long(), gain, shift, weight, bias)),
        (r"gain: expected torch.float32 \[5\] on cpu", (latents, gain[:4], shift, weight, bias)),
        (r"shift: expected .* got torch.float64", (latents, gain, shift.double(), weight, bias)),
        (r"bias: expected torch.float32 \[4\]", (latents, gain, shift, weight, bias[:3])),
    ):
        with pytest.raises(ValueError, match=match):
            head(*given, eps=1e-5, backend="triton")
    with pytest.raises(ValueError, match="backend: 'triton' takes up to 256 numbers a latent"):
        head(*inputs(2, 3, 257, 4), eps=1e-5, backend="triton")
    with pytest.raises(ValueError, match="and 1,024 outputs"):
        head(*inputs(2, 3, 5, 1025), eps=1e-5, backend="triton")


def test_the_module_is_the_operator():
    module, latents = motet.Head(33, 4), torch.randn(3, 17, 33)
    actual = module(latents, backend="triton")
    assert actual.grad_fn.name() == "GeneratedBackwardFor_motet_head_defaultBackward"
    torch.testing.assert_close(actual, module(latents, backend="eager"), rtol=1e-5, atol=1e-6)
