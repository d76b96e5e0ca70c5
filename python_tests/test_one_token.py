"""one_token_values against torch: sizes, threads, registers, strides, gradients, their memory."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from motet.kernels import native
from motet.kernels.one_token.operator import one_token_values
from torch import Tensor

from .comparison import assert_as_good_as, with_gradients
from .conftest import assert_compiles, views_of

SIZES = [(1, 1), (2, 3), (7, 15), (16, 16), (17, 33), (33, 129), (5, 255), (40, 513), (3, 1100)]


def reference(tokens: Tensor, weight: Tensor) -> Tensor:
    return F.linear(tokens, weight[len(weight) // 2 :])


@pytest.fixture(params=[1, 2])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equation(size: tuple[int, int]) -> None:
    for rows in range(1, 18):
        x = torch.randn(rows, size[1], dtype=torch.float64)
        weight = torch.randn(2 * size[0], size[1], dtype=torch.float64)
        actual = with_gradients(one_token_values)(x, weight)
        for a, b in zip(actual, with_gradients(reference)(x, weight), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("rows", [1, 5, 8, 16, 17])
def test_float32(rows: int) -> None:
    x, weight = torch.randn(rows, 1, 2181), torch.randn(198, 2181)
    assert_as_good_as(with_gradients(one_token_values), with_gradients(reference), x, weight)


@pytest.mark.native
def test_a_row_has_the_same_bits_beside_any_others() -> None:
    x, weight, grad = torch.randn(16, 700), torch.randn(512, 700), torch.randn(16, 256)

    def both(count: int) -> tuple[Tensor, Tensor]:
        rows = x[:count].clone().requires_grad_()
        y = one_token_values(rows, weight)
        return y.detach(), torch.autograd.grad(y, rows, grad[:count])[0]

    y, dx = both(16)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for count in range(1, 17):
            own_y, own_dx = both(count)
            assert torch.equal(own_y, y[:count])
            assert torch.equal(own_dx, dx[:count])
    torch.set_num_threads(1)


def test_gradients() -> None:
    for rows in (3, 17):
        x = torch.randn(rows, 1, 9, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(one_token_values, (x, weight))
        assert torch.autograd.gradgradcheck(one_token_values, (x, weight))
        assert torch.autograd.gradcheck(one_token_values, (x, weight.detach()))
        assert torch.autograd.gradcheck(one_token_values, (x.detach(), weight))


def test_strides() -> None:
    x = torch.randn(6, 40, dtype=torch.float64)
    weight = torch.randn(10, 40, dtype=torch.float64)
    expected = with_gradients(reference)(x, weight)
    layouts = [(v, weight) for v in views_of(x).values()]
    layouts += [(x, v) for v in views_of(weight).values()]
    wide = torch.randn(10, 50, dtype=torch.float64)
    wide[:, 3:43] = weight
    for pair in [*layouts, (x, wide[:, 3:43]), (x[:1].expand(6, 40), weight)]:
        exact = expected if pair[0].stride(0) else with_gradients(reference)(*pair)
        for a, b in zip(with_gradients(one_token_values)(*pair), exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for shape in ((40,), (6, 40), (2, 3, 40), (2, 1, 3, 40)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(
            one_token_values(x, weight), reference(x, weight), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 5, 0), (0, 0, 0)], ids=str)
def test_nothing(shape: tuple[int, int, int]) -> None:
    rows, inputs, outputs = shape
    x, weight = torch.randn(rows, 1, inputs), torch.randn(2 * outputs, inputs)
    actual, expected = (with_gradients(f)(x, weight) for f in (one_token_values, reference))
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b)


def test_infinities_and_nan() -> None:
    """Infinities and NaN of the next row, loaded with a row's incomplete end, have no effect."""
    weight = torch.randn(8, 19, dtype=torch.float64)
    weight[4, 0], weight[5, 18], weight[6, 3], weight[7, 17] = torch.inf, -torch.inf, torch.nan, 1
    x = torch.ones(3, 19, dtype=torch.float64)
    torch.testing.assert_close(one_token_values(x, weight), reference(x, weight), equal_nan=True)
    x[1, 18] = torch.nan
    torch.testing.assert_close(one_token_values(x, weight), reference(x, weight), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_torch(dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 30, dtype=dtype), torch.randn(12, 30, dtype=dtype)
    assert_as_good_as(with_gradients(one_token_values), with_gradients(reference), x, weight)


def test_without_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_module", None)
    x = torch.randn(4, 30, dtype=torch.float64)
    weight = torch.randn(12, 30, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="is not available"):
        native._warn_once.cache_clear()
        actual = with_gradients(one_token_values)(x, weight)
    native._warn_once.cache_clear()
    for a, b in zip(actual, with_gradients(reference)(x, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_compile_autocast_and_transforms() -> None:
    x, weight = torch.randn(4, 1, 30), torch.randn(12, 30)
    assert_compiles(one_token_values, (x, weight), (torch.randn(6, 1, 30), weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(one_token_values(x, weight), reference(x, weight))
    args = (x.double(), weight.double())
    for transform in (
        lambda f: torch.func.vmap(f, (0, None)),
        torch.func.jacrev,
        torch.func.jacfwd,
    ):
        actual, expected = (transform(f)(*args) for f in (one_token_values, reference))
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = one_token_values(mode.from_tensor(x), mode.from_tensor(weight))
    assert fake.shape == (4, 1, 6)


def test_refusals() -> None:
    x, weight = torch.randn(4, 30), torch.randn(12, 30)
    bad: list[tuple[Any, Any, type[Exception], str]] = [
        (None, weight, TypeError, "tokens: expected a tensor, got NoneType"),
        (x, [1], TypeError, "weight: expected a tensor, got list"),
        (x.long(), weight, ValueError, "tokens: expected floating-point"),
        (x, weight[:11], ValueError, r"weight: expected \[2 M, K\], got \(11, 30\)"),
        (x, weight[0], ValueError, r"weight: expected \[2 M, K\]"),
        (x[:, :29], weight, ValueError, r"tokens: expected \[..., 30\], got \(4, 29\)"),
        (torch.tensor(1.0), weight, ValueError, "tokens: expected"),
        (x.double(), weight, ValueError, "weight: expected torch.float64 as tokens"),
        (x.to("meta"), weight, ValueError, "weight: expected meta as tokens, got cpu"),
    ]
    for tokens, matrix, error, match in bad:
        with pytest.raises(error, match=match):
            one_token_values(tokens, matrix)


def test_operator_is_internal() -> None:
    assert "one_token_values" not in importlib.import_module("motet.kernels").__all__
