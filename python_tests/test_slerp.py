"""slerp: the paper's formula, edge cases, the n-way form, gradients, C++ against torch."""

import math

import motet
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from motet.kernels import native
from motet.kernels.slerp.reference import slerp_reference
from torch.library import opcheck

from .comparison import assert_as_good_as

slerp = motet.kernels.slerp


def formula(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Compute the paper's two-vector form as written."""
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.acos(cosine)
    return a * torch.sin((1 - t) * angle) / torch.sin(angle) + b * torch.sin(t * angle) / torch.sin(
        angle
    )


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(-6, 6))
def test_two_vectors(seed: int, t: float, exponent: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(4, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    b = b * 10**exponent
    got = slerp([a, b], t)
    expected = formula(a, b, t)
    assert torch.allclose(got, expected, rtol=1e-9, atol=1e-12 * expected.abs().max())
    # The n-way form with a third vector of weight 0 is the same at any norms.
    third = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    n_way = slerp([a, b, third], [1 - t, t, 0.0])
    assert torch.allclose(n_way, got, rtol=1e-9, atol=1e-10 * got.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_end_points_are_exact(dtype: torch.dtype) -> None:
    a, b = torch.randn(3, 4, dtype=dtype), 100 * torch.randn(3, 4, dtype=dtype)
    assert torch.equal(slerp([a, b], 0), a)
    assert torch.equal(slerp([a, b], 1), b)
    assert torch.equal(slerp([a]), a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_vectors_are_interpolated_linearly(dtype: torch.dtype) -> None:
    a = torch.randn(10, dtype=dtype)
    zero = torch.zeros_like(a)
    for b in (a, 2 * a, -a, zero, a + torch.finfo(dtype).eps * a):
        for t in (0.0, 0.3, 1.0):
            expected = (1 - t) * a.double() + t * b.double()
            assert torch.allclose(slerp([a, b], t).double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(slerp([zero, zero]), zero)
    three = slerp([a, a, -a], [0.25, 0.25, 0.5])
    assert three.isfinite().all()
    assert slerp([a * 1e30, a * 1e-30]).isfinite().all()
    if dtype == torch.float64:
        big, small = torch.eye(2, dtype=dtype) * 1e200
        assert slerp([big, small * 1e-300], 0.5).isfinite().all()
    assert slerp([a[:0], a[:0]]).shape == (0,)


def test_karcher_mean() -> None:
    """At the mean of unit vectors the weighted logarithms sum to zero."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(8, dtype=torch.float64, generator=generator)
    for count in (3, 6, 16):
        vectors = [
            base + torch.randn(8, dtype=torch.float64, generator=generator) for _ in range(count)
        ]
        units = [v / v.norm() for v in vectors]
        weights = torch.rand(count, dtype=torch.float64, generator=generator)
        weights = (weights / weights.sum()).tolist()
        mean = slerp(units, weights)
        assert mean.norm().item() == pytest.approx(1, abs=1e-12)
        tangent = torch.zeros_like(mean)
        for w, u in zip(weights, units, strict=True):
            cosine = (mean @ u).clamp(-1, 1)
            angle = torch.acos(cosine)
            tangent += w * angle / torch.sin(angle) * (u - cosine * mean)
        assert tangent.norm() < 1e-12
        order = torch.randperm(count, generator=generator).tolist()
        shuffled = slerp([units[i] for i in order], [weights[i] for i in order])
        assert torch.allclose(shuffled, mean, atol=1e-12)


@pytest.mark.parametrize(("count", "dim"), [(3, 3), (3, 4), (5, 4), (5, 8), (8, 64)])
def test_widely_spread_vectors_have_one_mean(count: int, dim: int) -> None:
    """Also for vectors far apart, the mean depends on neither their order nor the backend."""
    generator = torch.Generator().manual_seed(count * dim)
    linear = 0
    for _ in range(50):
        vectors = [torch.randn(dim, dtype=torch.float64, generator=generator) for _ in range(count)]
        weights = [1 / count] * count
        mean = slerp(vectors, weights)
        assert torch.allclose(slerp(vectors[::-1], weights), mean, atol=1e-9)
        assert torch.allclose(slerp_reference(vectors, weights), mean, atol=1e-9)
        linear += torch.allclose(mean, torch.stack(vectors).mean(0), atol=1e-9)
    assert linear <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_native_is_as_good_as_torch(dtype: torch.dtype, count: int) -> None:
    weights = [1 / count] * count
    vectors = [torch.randn(17, 5, dtype=dtype) for _ in range(count)]
    assert_as_good_as(
        lambda *v: slerp(v, weights), lambda *v: slerp_reference(v, weights), *vectors
    )


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_gradients(count: int) -> None:
    vectors = [torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(count)]
    weights = torch.rand(count, dtype=torch.float64).tolist()
    weights = [w / math.fsum(weights) for w in weights]
    assert torch.autograd.gradcheck(lambda *v: slerp(v, weights), vectors)


def test_gradients_of_nearly_equal_vectors() -> None:
    a = torch.randn(6, dtype=torch.float64, requires_grad=True)
    b = (a.detach() + 1e-3 * torch.randn(6, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda *v: slerp(v, 0.3), (a, b), eps=1e-7, atol=1e-5)


def test_derivatives_that_are_not_there_say_so() -> None:
    a, b = (torch.randn(6, requires_grad=True) for _ in range(2))
    (first,) = torch.autograd.grad(slerp([a, b]).square().sum(), a, create_graph=True)
    with pytest.raises(NotImplementedError, match="expected one derivative"):
        first.sum().backward()
    with pytest.raises(NotImplementedError, match="expected reverse mode"):
        torch.func.jvp(lambda x: slerp([x, b]), (a.detach(),), (torch.ones(6),))


def test_registration() -> None:
    vectors = [torch.randn(4, 3, requires_grad=True) for _ in range(3)]
    weights = [0.2, 0.5, 0.3]
    opcheck(torch.ops.motet.slerp, (vectors, weights, "auto"))
    detached = [v.detach() for v in vectors]
    out = torch.empty_like(detached[0])
    opcheck(torch.ops.motet.slerp_out, (detached, weights, out, "auto"))
    opcheck(torch.ops.motet.slerp_backward, (detached[0], detached, weights))
    compiled = torch.compile(lambda a, b: slerp([a, b]) * 2, fullgraph=True, backend="aot_eager")
    out = compiled(*vectors[:2])
    assert torch.equal(out, slerp(vectors[:2]) * 2)
    out.sum().backward()
    assert vectors[0].grad is not None


def test_layouts() -> None:
    vectors = torch.randn(6, 8, dtype=torch.float64)
    for view in (vectors.t(), vectors[::2, ::2], vectors[:1].expand(6, 8)):
        other = torch.randn_like(view)
        assert torch.allclose(slerp([view, other]), slerp_reference([view, other], [0.5, 0.5]))


def test_dense_layouts_are_kept() -> None:
    a, b = (torch.randn(4, 3, 5).permute(2, 0, 1) for _ in range(2))
    got = slerp([a, b])
    assert got.stride() == a.stride()
    torch.testing.assert_close(got, slerp([a.contiguous(), b.contiguous()]))
    assert slerp([a, b.contiguous()]).stride() == a.stride()


def test_out() -> None:
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    expected = slerp([a, b], 0.3)
    out = torch.full_like(a, float("nan"))
    assert slerp([a, b], 0.3, out=out) is out
    assert torch.equal(out, expected)
    turned = torch.empty(3, 4).t()
    torch.testing.assert_close(slerp([a, b], 0.3, out=turned), expected)
    first = a.clone()
    slerp([first, b], 0.3, out=first)
    assert torch.equal(first, expected)
    with pytest.raises(ValueError, match="out: expected a tensor without gaps"):
        slerp([a, b], out=torch.empty(4, 6)[:, ::2])
    with pytest.raises(ValueError, match="out: expected torch.float32"):
        slerp([a, b], out=out.double())
    with pytest.raises(ValueError, match="out: expected no argument that requires grad"):
        slerp([a.requires_grad_(), b], out=out)


def test_out_that_overlaps_an_input() -> None:
    row = torch.randn(9)
    for backend in ("auto", "eager"):
        with pytest.raises(ValueError, match="apart from out, or out itself"):
            slerp([row[:8], row[:8]], out=row[1:], backend=backend)


def test_threads_change_no_bit() -> None:
    """Sums are computed in chunks of a fixed size, whichever thread computes a chunk."""
    vectors = [torch.randn(300_001) for _ in range(3)]
    expected = slerp(vectors)
    torch.set_num_threads(3)
    try:
        assert torch.equal(slerp(vectors), expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("count", [2, 5, 9])
@pytest.mark.parametrize("scale", [1.0, 1e-300, 1e300, 5e-324])
def test_double_range(count: int, scale: float) -> None:
    """Vectors whose squares leave the range of doubles keep their directions."""
    vectors = [torch.randn(1000, dtype=torch.float64) for _ in range(count)]
    if scale == 5e-324:
        vectors = [(v * 100).round() for v in vectors]
    expected = slerp(vectors)
    got = slerp([v * scale for v in vectors])
    # Each product is rounded to a multiple of 5e-324.
    floor = 0.5 * (count + 1) if scale == 5e-324 else 1e-12
    torch.testing.assert_close(got / scale, expected, rtol=1e-12, atol=floor)


def test_bad_arguments() -> None:
    a = torch.randn(3)
    cases = [
        (ValueError, "weights: expected one number in \\[0, 1\\]", ([a, a], 1.5)),
        (ValueError, "weights: expected one number in \\[0, 1\\]", ([a, a, a], 0.5)),
        (ValueError, "weights: expected 2 values", ([a, a], [1.0])),
        (ValueError, "vectors\\[0\\]: expected torch.float32 or torch.float64", ([a.long()],)),
        (ValueError, "vectors\\[1\\]: expected the shape", ([a, a[:2]],)),
        (TypeError, "vectors: expected a sequence", (a,)),
        (ValueError, "weights: expected non-negative", ([a, a, a], [1e308, 1e308, -1])),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            slerp(*arguments)


@pytest.mark.native
def test_bindings_refuse_what_does_not_fit() -> None:
    module = native.native()
    a = np.ones(8, np.float32)
    with pytest.raises(ValueError, match="apart"):
        module.slerp([a[:4]], [1.0], a[2:6])
    with pytest.raises(ValueError, match="shape"):
        module.slerp([a[:7]], [1.0], a)
    with pytest.raises(ValueError, match="float32 or float64"):
        module.slerp([a.astype(np.int32)], [1.0], a.astype(np.int32))
    with pytest.raises(TypeError):
        module.slerp([3], [1.0], a)
