"""row_statistics against means and variances in float64; its users; error messages."""

import motet
import pytest
import torch
from motet.kernels import ragged, standardise
from motet.kernels.row_statistics.reference import row_statistics_reference
from torch import Tensor
from torch.library import opcheck

from .comparison import EXACT
from .conftest import assert_compiles, views_of

row_statistics = motet.kernels.row_statistics
LOW = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[pytest.param("native", marks=pytest.mark.native), "torch"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compute with the C++ module, or with torch as if the module were not built."""
    if request.param == "torch":
        monkeypatch.setattr(standardise, "native", lambda: None)
    return request.param


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged, "CHUNK_ELEMENTS", 1)  # 64 rows


@pytest.mark.usefixtures("_poisoned", "_small_chunks", "arithmetic")
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (131, 17), (267, 3)])
@pytest.mark.parametrize("positions", [None, 0, 3])
def test_equals_the_reference(tokens: int, width: int, positions: int | None) -> None:
    x = torch.randn(tokens, width).double()
    for rows in (tokens, tokens // 3):
        if not rows or tokens % rows:
            continue
        places = None if positions is None else torch.randn(rows, positions).double()
        actual, expected = (
            f(x, positions=places) for f in (row_statistics, row_statistics_reference)
        )
        torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("ratio", [0.0, 1.0, 1000.0])
def test_rows_far_from_zero(arithmetic: str, dtype: torch.dtype, ratio: float) -> None:
    """Rows far from zero lose no digits in C++, and in torch no more than expected."""
    x = (torch.randn(40, 300) + ratio).to(dtype)
    mean, rstd = row_statistics(x)
    assert mean.dtype == rstd.dtype == torch.float32
    exact = row_statistics_reference(x.double())
    torch.testing.assert_close(mean.double(), exact[0], rtol=1e-6, atol=1e-6)
    rtol = 2e-6 + (2e-8 * ratio if arithmetic == "torch" else 0)
    torch.testing.assert_close(rstd.double(), exact[1], rtol=rtol, atol=0)


@pytest.mark.usefixtures("_small_chunks", "arithmetic")
def test_a_row_does_not_see_its_neighbours() -> None:
    x, places = torch.randn(200, 33), torch.randn(200, 3)
    batch = row_statistics(x, positions=places)
    for part in (slice(0, 1), slice(70, 71), slice(63, 200)):
        alone = row_statistics(x[part], positions=places[part])
        assert all(torch.equal(a, b[part]) for a, b in zip(alone, batch, strict=True))


@pytest.mark.usefixtures("arithmetic")
def test_forms_of_the_arguments() -> None:
    assert [part.shape for part in row_statistics(torch.empty(0, 5))] == [(0,), (0,)]
    x = torch.randn(6, 5).double()
    expected = row_statistics_reference(x)
    for view in (x.view(2, 3, 5), *views_of(x).values()):
        torch.testing.assert_close(row_statistics(view), expected, **EXACT)
    for backend in ("eager", "compile"):
        torch.testing.assert_close(row_statistics(x, backend=backend), expected, **EXACT)
    wide = row_statistics(x, eps=10.0)
    torch.testing.assert_close(wide, row_statistics_reference(x, eps=10.0), **EXACT)


def test_no_gradient_flows_through_them() -> None:
    x = torch.randn(6, 5, requires_grad=True)
    assert not any(part.requires_grad for part in row_statistics(x))


@pytest.mark.parametrize("positions", [None, 2])
def test_registration(positions: int | None) -> None:
    x = torch.randn(6, 5)
    places = None if positions is None else torch.randn(3, positions)
    opcheck(torch.ops.motet.row_statistics, (x, places, 1e-5, "auto"))


def test_compiles_whole_for_any_size() -> None:
    def run(x: Tensor, positions: Tensor) -> Tensor:
        mean, rstd = row_statistics(x, positions=positions)
        return x * (mean * rstd)[:, None]

    assert_compiles(run, *((torch.randn(3 * n, 5), torch.randn(n, 2)) for n in (4, 9)))


@pytest.mark.parametrize(
    ("error", "message", "x", "options"),
    [
        (TypeError, "x: expected a tensor, got list", [1.0], {}),
        (ValueError, "x: expected floating-point \\[T, D\\]", torch.ones(3), {}),
        (ValueError, "x: expected floating-point", torch.ones(3, 2).long(), {}),
        (TypeError, "positions: expected a tensor", torch.ones(3, 2), {"positions": [1.0]}),
        (ValueError, "positions: expected \\[N, P\\]", torch.ones(3, 2),
         {"positions": torch.ones(2, 2)}),
        (ValueError, "backend: expected 'auto'", torch.ones(3, 2), {"backend": "cuda"}),
        (ValueError, "backend: 'triton' needs CUDA tensors, got cpu", torch.ones(3, 2),
         {"backend": "triton"}),
    ],
)  # fmt: skip
def test_refusals(error, message: str, x, options: dict) -> None:
    with pytest.raises(error, match=message):
        row_statistics(x, **options)
