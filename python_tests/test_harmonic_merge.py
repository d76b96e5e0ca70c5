"""harmonic_merge equals Eq. 4 in float64; gradients, registration, C++ and torch forms."""

import cmath
import math

import motet
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from motet.kernels import native
from motet.kernels.harmonic_merge.reference import harmonic_merge_reference
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

harmonic_merge = motet.kernels.harmonic_merge
DTYPES = [torch.complex64, torch.complex128]
PHASES = ["principal", "circular"]


def equation_4(values: list[complex], weights: list[float]) -> complex:
    """Return Eq. 4 for one element; scaling keeps the magnitudes from overflowing."""
    sizes = [math.hypot(z.real, z.imag) for z in values]
    if min(sizes) == 0:
        return 0j
    low = min(sizes)
    size = low / sum(w * (low / m) for w, m in zip(weights, sizes, strict=True))
    angle = sum(w * math.atan2(z.imag, z.real) for w, z in zip(weights, values, strict=True))
    return cmath.rect(size, angle)


def floats32(low: float = -(2.0**60), high: float = 2.0**60) -> st.SearchStrategy[float]:
    return st.one_of(
        st.floats(low, high, width=32),
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 1e-38, 3e37, -3e37, 1e-45]),
    )


@given(st.lists(st.tuples(floats32(), floats32()), min_size=2, max_size=4), st.data())
def test_equals_equation_4(parts: list[tuple[float, float]], data: st.DataObject) -> None:
    values = [complex(np.float32(x), np.float32(y)) for x, y in parts]
    equal = data.draw(st.booleans())
    raw = [1.0 if equal else data.draw(st.floats(0.01, 1)) for _ in values]
    weights = [w / math.fsum(raw) for w in raw]
    expected = equation_4(values, weights)
    got = harmonic_merge([torch.tensor([z], dtype=torch.complex64) for z in values], weights)
    # Results below the smallest normal float are rounded to a multiple of 1.4e-45.
    assert abs(complex(got.item()) - expected) <= 2e-6 * abs(expected) + 1.5e-45


@pytest.mark.parametrize("dtype", DTYPES)
def test_branch_cut_and_signed_zeros(dtype: torch.dtype) -> None:
    signs = [0.0, -0.0]
    for re_a in (-2.0, 2.0, 0.0, -0.0):
        for re_b in (-8.0, 8.0):
            for im_a in signs:
                for im_b in (*signs, 1e-3, -1e-3):
                    a, b = complex(re_a, im_a), complex(re_b, im_b)
                    pair = [torch.complex(*(torch.tensor([x], dtype=torch.float64)
                                            for x in (z.real, z.imag))).to(dtype)
                            for z in (a, b)]  # fmt: skip
                    got = complex(harmonic_merge(pair).item())
                    assert got == pytest.approx(equation_4([a, b], [0.5, 0.5]), rel=2e-6, abs=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_native_is_as_good_as_torch(dtype, phase: str, count: int, scale: float) -> None:
    from .comparison import assert_as_good_as

    latents = [(scale * torch.randn(7, 13, dtype=torch.complex128)).to(dtype) for _ in range(count)]
    weights = (torch.rand(count, dtype=torch.float64) + 0.1).tolist()
    weights = [w / math.fsum(weights) for w in weights]
    rescaled = 1 / scale
    assert_as_good_as(
        lambda *z: harmonic_merge(z, weights, phase) * rescaled,
        lambda *z: harmonic_merge_reference(z, weights, phase) * rescaled,
        *latents,
    )


def anywhere(size: int, dtype: torch.dtype) -> Tensor:
    """Return numbers from the whole range of a dtype; some of similar size, some zero."""
    real = torch.empty((), dtype=dtype).real.dtype
    lowest, highest = (-149, 128) if real == torch.float32 else (-1074, 1024)
    shape = (2, size)
    exponent = lowest + (highest - lowest) * torch.rand(shape, dtype=torch.float64)
    exponent = torch.where(torch.rand(shape) < 0.5, 6 * torch.rand(shape) - 3, exponent)
    # Two factors, because exp2 returns zero below the smallest normal number.
    half = (exponent / 2).to(torch.float64)
    values = (half.exp2() * (exponent - half).exp2()).clamp(max=torch.finfo(real).max)
    values = values * (1 - 2 * torch.randint(2, shape))
    values = torch.where(torch.rand(shape) < 0.05, 0 * values, values).to(real)
    return torch.complex(*values)


def exact(latents: list[Tensor], weights: list[float], phase: str) -> np.ndarray:
    """Return Eq. 4 in clongdouble, in which no intermediate result overflows."""
    z = [x.numpy().astype(np.clongdouble) for x in latents]
    size = [np.hypot(x.real, x.imag) for x in z]
    low = np.minimum.reduce(size)
    with np.errstate(all="ignore"):
        mean = low / sum(w * (low / m) for w, m in zip(weights, size, strict=True))
        pairs = list(zip(weights, z, size, strict=True))
        if phase == "principal":
            angle = sum(w * np.arctan2(x.imag, x.real) for w, x, _ in pairs)
        else:
            angle = np.arctan2(sum(w * x.imag / m for w, x, m in pairs),
                               sum(w * x.real / m for w, x, m in pairs))  # fmt: skip
    angle, mean = np.where(low == 0, 0, angle), np.where(low == 0, 0, mean)
    return mean * np.cos(angle) + 1j * (mean * np.sin(angle))


@pytest.mark.native  # what torch computes instead over- and underflows earlier
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.3, 0.7], [0.2, 0.3, 0.5]])
def test_over_the_whole_range(weights: list[float], phase: str) -> None:
    """No intermediate result over- or underflows; results are exact to the last digits."""
    for dtype, bound, smallest in (
        (torch.complex64, 3e-7, 1.5e-45), (torch.complex128, 3e-15, 1e-323)
    ):  # fmt: skip
        latents = [anywhere(20_001, dtype) for _ in weights]
        # Opposite, conjugate and mirrored phases give sums at 0 and at the branch cuts.
        a, b = latents[:2]
        b[:300], b[300:600], b[600:900] = -a[:300], a[300:600].conj(), -a[600:900].conj()
        expected = exact(latents, weights, phase)
        got = harmonic_merge(latents, weights, phase)
        error = np.abs(got.numpy().astype(np.clongdouble) - expected)
        if phase == "circular":  # if phasors cancel, rounding decides the phase
            units = [z.numpy().astype(np.clongdouble) for z in latents]
            with np.errstate(all="ignore"):
                units = [z / np.abs(z) for z in units]
            resultant = np.abs(sum(w * u for w, u in zip(weights, units, strict=True)))
            error, expected = (x[~(resultant < 0.1)] for x in (error, expected))
        assert (error <= bound * np.abs(expected) + smallest).all()


@pytest.mark.parametrize("phase", PHASES)
def test_what_is_not_finite_stays_where_it_is(phase: str) -> None:
    """Infinite numbers and NaN change only their own element, in the last SIMD vector too."""
    for size in (1, 7, 16, 61):
        latents = [torch.randn(size, dtype=torch.complex64) for _ in range(3)]
        clean = harmonic_merge(latents, phase=phase)
        spoilt = [z.clone() for z in latents]
        spoilt[0][::5] = complex("inf")
        spoilt[1][1::7] = complex("nan")
        spoilt[2][2::9] = 0
        for count in (2, 3):
            expected = harmonic_merge_reference(spoilt[:count], phase=phase)
            got = harmonic_merge(spoilt[:count], phase=phase)
            assert torch.allclose(got, expected, equal_nan=True, rtol=1e-4)
        untouched = torch.ones(size, dtype=torch.bool)
        untouched[::5] = untouched[1::7] = untouched[2::9] = False
        assert torch.equal(got[untouched], clean[untouched])


@pytest.mark.parametrize("count", [2, 3])
def test_threads_change_no_bit(count: int) -> None:
    latents = [torch.randn(70_001, dtype=torch.complex64) for _ in range(count)]
    expected = harmonic_merge(latents)
    torch.set_num_threads(3)
    try:
        assert torch.equal(harmonic_merge(latents), expected)
    finally:
        torch.set_num_threads(1)


def test_double_range() -> None:
    values = [1e300 + 1e300j, 1e-300 - 1e-300j, 5e-324 + 0j, 1e-200j]
    a = torch.tensor(values, dtype=torch.complex128)
    got = harmonic_merge([a, a])
    assert torch.allclose(got, a, rtol=1e-15, atol=0)
    got = harmonic_merge([a, 1e-8 * a])
    assert torch.allclose(got[:2], 2e-8 / (1 + 1e-8) * a[:2], rtol=1e-14, atol=0)


def test_zeros_and_nan() -> None:
    zero, one = torch.zeros(1, dtype=torch.complex64), torch.ones(1, dtype=torch.complex64)
    nan = torch.full((1,), float("nan"), dtype=torch.complex64)
    for weights in (None, [0.3, 0.7]):
        assert harmonic_merge([zero, one], weights).item() == 0
        assert harmonic_merge([zero, zero], weights).item() == 0
        assert harmonic_merge([nan, one], weights).isnan().all()
        assert harmonic_merge([zero, nan], weights).isnan().any()


def test_one_is_the_identity_and_order_is_free() -> None:
    latents = [torch.randn(5, 4, dtype=torch.complex128) for _ in range(4)]
    assert torch.equal(harmonic_merge(latents[:1]), latents[0])
    for phase in PHASES:
        merged = harmonic_merge(latents, phase=phase)
        shuffled = harmonic_merge([latents[i] for i in (2, 0, 3, 1)], phase=phase)
        assert torch.allclose(merged, shuffled, rtol=1e-13)
    a, b = latents[:2]
    assert torch.equal(harmonic_merge([a, b]), harmonic_merge([b, a]))
    assert torch.allclose(harmonic_merge([a, a]), a, rtol=1e-14)


def test_circular_phase_has_no_branch_cut() -> None:
    a = torch.polar(torch.ones(1), torch.tensor([math.pi - 0.1]))
    b = torch.polar(torch.ones(1), torch.tensor([-math.pi + 0.1]))
    assert harmonic_merge([a, b], phase="circular").real.item() == pytest.approx(-1, abs=1e-6)
    assert harmonic_merge([a, b]).real.item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_gradients(phase: str, count: int) -> None:
    latents = [torch.randn(3, 2, dtype=torch.complex128, requires_grad=True) for _ in range(count)]
    weights = [0.2, 0.5, 0.3][:count]
    call = lambda *z: harmonic_merge(z, weights, phase)  # noqa: E731
    assert torch.autograd.gradcheck(call, latents)
    assert torch.autograd.gradgradcheck(call, latents)


def test_infinite_inputs_are_the_same_in_both() -> None:
    infinity, one = float("inf"), torch.tensor([1 + 1j], dtype=torch.complex64)
    for z in (complex(infinity, 0), complex(0, -infinity), complex(infinity, infinity)):
        other = torch.tensor([z], dtype=torch.complex64)
        for pair in ([one, other], [other, one], [other, other], [0 * one, other]):
            for weights in ([0.5, 0.5], [0.3, 0.7]):
                expected = harmonic_merge_reference(pair, weights)
                assert torch.allclose(harmonic_merge(pair, weights), expected, equal_nan=True)


def test_what_has_no_weight_takes_no_part() -> None:
    a = torch.tensor([1e-30 + 0j, 0j], requires_grad=True)
    b = torch.tensor([1e10 + 0j, 2j], requires_grad=True)
    merged = harmonic_merge([a, b], [0.0, 1.0])
    assert torch.equal(merged, b)
    assert torch.autograd.grad(merged.real.sum(), a, allow_unused=True) == (None,)
    huge = harmonic_merge([a, b], [1e308, 1e308])
    assert torch.equal(huge, harmonic_merge([a, b]))


def test_forward_mode_says_that_it_is_not_there() -> None:
    a, b = torch.randn(2, 3, dtype=torch.complex64)
    with pytest.raises(NotImplementedError, match="expected reverse mode"):
        torch.func.jvp(lambda z: harmonic_merge([z, b]), (a,), (b,))


def test_gradients_stay_finite_at_the_edges() -> None:
    a = torch.tensor([0j, 1e-38, 1e38, 1, -1, 1e-44, 1e-44j], requires_grad=True)
    b = torch.tensor([1, 1e38, 1e-38, 0j, 1, 1e-44j, 1e38], requires_grad=True)
    for phase in PHASES:
        grads = torch.autograd.grad(harmonic_merge([a, b], phase=phase).real.sum(), (a, b))
        assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("phase", PHASES)
def test_registration(phase: str) -> None:
    latents = [torch.randn(4, 3, dtype=torch.complex64, requires_grad=True) for _ in range(3)]
    weights = [0.2, 0.5, 0.3]
    opcheck(torch.ops.motet.harmonic_merge, (latents, weights, phase, "auto"))
    detached = [z.detach() for z in latents]
    out = torch.empty_like(detached[0])
    opcheck(torch.ops.motet.harmonic_merge_out, (detached, weights, phase, out, "auto"))
    compiled = torch.compile(
        lambda a, b: harmonic_merge([a, b]) * 2, fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(*latents[:2]), harmonic_merge(latents[:2]) * 2)


def test_whoever_watches_sees_the_operators() -> None:
    """Plain CPU calls skip the dispatcher, but dispatch modes and tracing see the operators."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    z = torch.randn(3, dtype=torch.complex64)
    with Watch():
        harmonic_merge([z, z])
        motet.kernels.slerp([z.real, z.imag])
    assert {"motet::harmonic_merge", "motet::slerp"} <= set(seen)
    traced = make_fx(lambda a, b: harmonic_merge([a, b]))(z, 2 * z)
    assert torch.equal(traced(z, 1j * z), harmonic_merge([z, 1j * z]))


def test_layouts() -> None:
    matrix = torch.randn(6, 8, dtype=torch.complex128)
    views = [matrix.t(), matrix.t().conj(), matrix[::2, ::2], matrix[:1].expand(6, 8), matrix[:0]]
    for view in views:
        expected = harmonic_merge_reference([view, view * 2j], [0.5, 0.5])
        assert torch.allclose(harmonic_merge([view, view * 2j]), expected, rtol=1e-13)


def test_dense_layouts_are_kept() -> None:
    """Dense inputs of one layout give a result of it, as with torch's element-wise operators."""
    a, b = (torch.randn(4, 3, 5, dtype=torch.complex64).permute(2, 0, 1) for _ in range(2))
    merged = harmonic_merge([a, b])
    assert merged.stride() == a.stride()
    assert torch.equal(merged, harmonic_merge([a.contiguous(), b.contiguous()]))
    mixed = harmonic_merge([a, b.contiguous()])
    assert mixed.stride() == a.stride()
    assert torch.equal(mixed, merged)
    out = torch.empty_like(a)
    assert harmonic_merge([a, b], out=out) is out
    assert torch.equal(out, merged)
    gaps = torch.randn(4, 6, dtype=torch.complex64)[:, ::2]
    assert harmonic_merge([gaps, gaps]).is_contiguous()


def test_every_element_is_written() -> None:
    latents = [torch.randn(1001, dtype=torch.complex64) for _ in range(3)]
    try:
        torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
        assert torch.empty(3).isnan().all()
        for count in (1, 2, 3):
            assert harmonic_merge(latents[:count]).isfinite().all()
            assert motet.kernels.slerp([z.real for z in latents[:count]]).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_out() -> None:
    a, b = (torch.randn(4, 3, dtype=torch.complex64) for _ in range(2))
    expected = harmonic_merge([a, b])
    out = torch.full_like(a, float("nan"))
    assert harmonic_merge([a, b], out=out) is out
    assert torch.equal(out, expected)
    first = a.clone()
    harmonic_merge([first, b], out=first)
    assert torch.equal(first, expected)
    with pytest.raises(ValueError, match="requires grad"):
        harmonic_merge([a.requires_grad_(), b], out=out)
    turned = torch.empty(3, 4, dtype=torch.complex64).t()
    assert torch.equal(harmonic_merge([b, first], out=turned), harmonic_merge([b, first]))
    for wrong in (torch.empty(4, 6, dtype=torch.complex64)[:, ::2], b[:1].expand(4, 3), out.conj()):
        with pytest.raises(ValueError, match="out: expected a tensor without gaps"):
            harmonic_merge([b, b], out=wrong)
    with pytest.raises(ValueError, match="expected the shape of"):
        harmonic_merge([b, b], out=torch.empty(3, dtype=torch.complex64))


def test_out_that_overlaps_an_input() -> None:
    row = torch.randn(9, dtype=torch.complex64)
    for backend in ("auto", "eager"):
        with pytest.raises(ValueError, match="apart from out, or out itself"):
            harmonic_merge([row[:8], row[:8]], out=row[1:], backend=backend)


def test_writing_is_seen_by_autograd() -> None:
    """Autograd raises if `out` overwrites a tensor that a gradient needs."""
    a, b = (torch.randn(5, dtype=torch.complex64) for _ in range(2))
    x = torch.randn(5, dtype=torch.complex64, requires_grad=True)
    loss = (x * a).real.sum()
    harmonic_merge([a, b], out=a)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bad_arguments() -> None:
    a = torch.randn(3, dtype=torch.complex64)
    cases = [
        (TypeError, "latents: expected a sequence", (a,)),
        (TypeError, "latents\\[0\\]: expected a tensor", ([1],)),
        (ValueError, "latents: expected at least one", ([],)),
        (ValueError, "latents\\[0\\]: expected torch.complex64", ([a.real],)),
        (ValueError, "latents\\[1\\]: expected the shape", ([a, a[:2]],)),
        (ValueError, "latents\\[1\\]: expected the dtype", ([a, a.to(torch.complex128)],)),
        (ValueError, "latents\\[1\\]: expected the device", ([a, a.to("meta")],)),
        (ValueError, "weights: expected 2 values", ([a, a], [1.0])),
        (ValueError, "weights: expected non-negative", ([a, a], [1.0, -1.0])),
        (ValueError, "weights: expected non-negative", ([a, a], [0.0, 0.0])),
        (ValueError, "weights: expected non-negative", ([a, a], [float("nan"), 1.0])),
        (ValueError, "phase: expected 'principal'", ([a, a], None, "mean")),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            harmonic_merge(*arguments)
    with pytest.raises(ValueError, match="backend: expected 'auto', 'triton'"):
        harmonic_merge([a, a], backend="gpu")
    with pytest.raises(ValueError, match="backend: 'triton' needs CUDA tensors, got cpu"):
        harmonic_merge([a, a], backend="triton")


@pytest.mark.native
def test_bindings_refuse_what_does_not_fit() -> None:
    module = native.native()
    a = np.ones(8, np.complex64)
    locked = np.ones(8, np.complex64)
    locked.flags.writeable = False
    cases = [
        ([a[:7]], [1.0], a, "shape"),
        ([a.astype(np.complex128)], [1.0], a, "format"),
        ([np.ones(16, np.complex64)[::2]], [1.0], a, "C-contiguous"),
        ([a[:4]], [1.0], a[2:6], "apart"),
        ([a], [0.5, 0.5], a, "1 values"),
        ([], [], a, "at least one"),
        ([a.real.copy()], [1.0], a.real.copy(), "complex64"),
    ]
    for inputs, weights, out, message in cases:
        with pytest.raises(ValueError, match=message):
            module.harmonic_merge(inputs, weights, "principal", out)
    with pytest.raises(ValueError, match="read-only"):
        module.harmonic_merge([a], [1.0], "principal", locked)
    with pytest.raises(ValueError, match="phase"):
        module.harmonic_merge([a], [1.0], "other", a)


def test_fallback_warns_once_and_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    latents: list[Tensor] = [torch.randn(6, dtype=torch.complex128) for _ in range(2)]
    expected = harmonic_merge(latents)
    monkeypatch.setattr(native, "_module", None)
    monkeypatch.setattr(native, "_reason", "not built")
    native._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="torch computes instead") as seen:
        for _ in range(3):
            assert torch.allclose(harmonic_merge(latents), expected, rtol=1e-13)
    assert len(seen) == 1
