"""context_kv equals LayerNorm and products in float64; bags, positions, statistics, refusals."""

import subprocess
import sys
from itertools import pairwise
from typing import NamedTuple
from unittest import mock

import motet
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from motet.kernels import ragged, standardise
from motet.kernels.context_kv.reference import context_kv_reference
from torch import Tensor
from torch.library import opcheck

from .comparison import EXACT, assert_as_good_as, with_gradients
from .conftest import (
    ROWS,
    assert_compiles,
    assert_differentiable_once,
    assert_leaves_no_trace,
    offsets_of,
    rows_of,
    views_of,
)

context_kv = motet.kernels.context_kv
HALF = [torch.bfloat16, torch.float16]


class Case(NamedTuple):
    tokens: int = 7
    width: int = 5
    sets: int = 2
    outputs: int = 3
    per_bag: int = 7
    """N of shared positions [N, P]."""
    positions: int = 0
    bias: bool = True

    def draw(self, kind: float | str = 1.0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        shapes = [(self.sets, self.outputs, self.width + self.positions)]
        shapes += [(self.sets, self.outputs)] * self.bias
        shapes += [(self.per_bag, self.positions)] * (self.positions > 0)
        x = rows_of(kind, self.tokens, self.width, dtype=dtype)
        return [x, *(torch.randn(shape).to(dtype) for shape in shapes)]

    def call(self, function=context_kv, **options):
        """Return `function` as a function of x, weight and optional bias and positions."""

        def called(x: Tensor, weight: Tensor, *optional: Tensor) -> Tensor:
            bias = optional[0] if self.bias else None
            positions = optional[-1] if self.positions else None
            return function(x, weight, bias, positions=positions, **options)

        return called

    @property
    def reference(self):
        return self.call(context_kv_reference)


CASES = {
    "plain": Case(),
    "no bias": Case(bias=False),
    "one of everything": Case(tokens=1, width=1, sets=1, outputs=1),
    "primes, above a chunk": Case(tokens=131, width=17, sets=3, outputs=11),
    "own positions": Case(per_bag=7, positions=3),
    "shared positions": Case(tokens=21, per_bag=7, positions=3),
    "shared positions across chunks": Case(tokens=3 * 89, per_bag=89, positions=2),
    "one position for all": Case(tokens=70, per_bag=1, positions=2),
    "no token": Case(tokens=0),
    "no token, positions": Case(tokens=0, positions=3),
    "no output": Case(outputs=0),
    "no set": Case(sets=0),
}


@pytest.fixture(params=[pytest.param("native", marks=pytest.mark.native), "torch"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Normalise rows with the C++ module, or with torch as if the module were not built."""
    if request.param == "torch":
        monkeypatch.setattr(standardise, "native", lambda: None)
    return request.param


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged, "CHUNK_ELEMENTS", 1)  # 64 rows


@pytest.mark.usefixtures("_poisoned", "_small_chunks", "arithmetic")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_reference(case: Case) -> None:
    args = case.draw()
    actual, expected = (with_gradients(f)(*args) for f in (case.call(), case.reference))
    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("positions", [0, 4])
def test_rows_with_any_mean_lose_no_digits(kind, dtype: torch.dtype, positions: int) -> None:
    case = Case(tokens=150, width=48, outputs=16, per_bag=50, positions=positions)
    args = case.draw(kind, dtype)
    assert_as_good_as(with_gradients(case.call()), with_gradients(case.reference), *args)


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("dtype", HALF)
def test_every_half_precision_number_is_read_as_what_it_is(dtype: torch.dtype) -> None:
    """Subnormal and huge numbers are read exactly; infinity and NaN make only their rows NaN."""
    numbers = torch.arange(-(2**15), 2**15).short().view(dtype)
    if dtype == torch.bfloat16:  # float32 cannot hold its largest squares
        numbers = numbers[(numbers.float().abs() < 1e15) | ~numbers.isfinite()]
    x = numbers[: len(numbers) // 64 * 64].view(-1, 64)
    finite = x.isfinite().all(1)
    weight = torch.eye(64)[None]
    assert_as_good_as(context_kv, context_kv_reference, x[finite], weight)
    y = context_kv(x, weight)[0]
    assert torch.equal(y[finite], context_kv(x[finite], weight)[0])
    assert (~finite).any()
    assert y[~finite].isnan().all()


def test_threads_change_no_bit() -> None:
    case = Case(tokens=3000, width=100, per_bag=1500, positions=5)
    args = case.draw(dtype=torch.float32)
    outcomes = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outcomes.append(
                torch.ops.motet.context_kv(
                    args[0], args[3], args[1], args[2], None, None, None, 1e-5, "eager"
                )[1:]
            )
    finally:
        torch.set_num_threads(1)
    for outcome in outcomes[1:]:
        assert all(map(torch.equal, outcome, outcomes[0]))


@pytest.mark.parametrize("dtype", HALF)
def test_weights_say_the_dtype_of_the_product(dtype: torch.dtype) -> None:
    """The product has the dtype of the weight; each gradient has the dtype of its argument."""
    x, weight = torch.randn(9, 6, dtype=torch.float32), torch.randn(2, 4, 6).to(dtype)
    for tokens in (x, x.to(dtype)):
        y, dx, dweight = with_gradients(context_kv)(tokens, weight)
        assert (y.dtype, dx.dtype, dweight.dtype) == (dtype, tokens.dtype, dtype)
        assert_as_good_as(context_kv, context_kv_reference, tokens, weight)


def test_forms_of_the_arguments() -> None:
    x, weight, bias = Case(tokens=6).draw()
    y = context_kv(x, weight, bias)
    assert torch.equal(context_kv(x, weight[1], bias[1]), y[1])
    assert torch.equal(context_kv(x.view(2, 3, 5), weight, bias), y)
    torch.testing.assert_close(context_kv(x, weight), y - bias[:, None], **EXACT)
    for places in (x[:, :0], x[:3, :0]):
        assert torch.equal(context_kv(x, weight, bias, positions=places), y)
    one, three = context_kv(x, weight, bias, eps=0.1), context_kv(x, weight, bias, eps=10.0)
    assert not torch.allclose(one, three)


@pytest.mark.parametrize(("tokens", "rows", "channels"), [(0, 0, 2), (0, 3, 2), (6, 3, 0)])
def test_no_positions_have_a_gradient_too(tokens: int, rows: int, channels: int) -> None:
    x, weight = torch.randn(tokens, 5), torch.randn(2, 4, 5 + channels)
    positions = torch.randn(rows, channels, requires_grad=True)
    y = context_kv(x, weight, positions=positions)
    (gradient,) = torch.autograd.grad(y.sum(), positions)
    assert torch.equal(gradient, torch.zeros_like(positions))


def test_shared_positions_are_own_ones_repeated() -> None:
    case = CASES["shared positions across chunks"]
    x, weight, bias, places = case.draw()
    shared = with_gradients(case.call())(x, weight, bias, places)
    y, *gradients, repeated = with_gradients(case.call())(x, weight, bias, places.repeat(3, 1))
    summed = repeated.unflatten(0, (3, 89)).sum(0)
    torch.testing.assert_close(shared, (y, *gradients, summed), **EXACT)


@given(
    st.lists(st.sampled_from([0, 1, 2, 3, 63, 64, 65, 127, 128, 129, 200]), max_size=4),
    st.sampled_from([(5, 3), (16, 8), (33, 17)]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
@example([], (5, 3), torch.float32)
def test_a_bag_has_the_same_bits_in_any_batch(
    lengths: list[int], sizes: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(sum(lengths))
    case = Case(tokens=sum(lengths), width=sizes[0], outputs=sizes[1])
    x, weight, bias = case.draw(dtype=dtype)
    offsets = offsets_of(lengths)

    def run(x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        y = context_kv(x, weight, bias, offsets=offsets)
        return y.detach(), torch.autograd.grad(y.sum(), x)[0]

    with mock.patch.object(ragged, "CHUNK_ELEMENTS", 1):
        y, dx = run(x, offsets)
        for start, stop in pairwise(offsets.tolist()):
            own_y, own_dx = run(x[start:stop], offsets_of([stop - start]))
            assert torch.equal(own_y, y[:, start:stop])
            assert torch.equal(own_dx, dx[start:stop])


def test_the_size_of_chunks_changes_rounding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tokens=3 * 89, width=9, per_bag=89, positions=2)
    args = case.draw()
    offsets = offsets_of([89, 0, 178])
    outcomes = []
    for elements in (1, 100 * 11, 150 * 11, 1 << 21):
        monkeypatch.setattr(ragged, "CHUNK_ELEMENTS", elements)
        outcomes += [with_gradients(case.call(offsets=o))(*args) for o in (None, offsets)]
    for outcome in outcomes:
        torch.testing.assert_close(outcome, outcomes[0], **EXACT)


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("positions", [0, 2])
def test_statistics_of_a_former_call_change_rounding_only(positions: int) -> None:
    case = Case(tokens=140, per_bag=70, positions=positions)
    args = case.draw()
    places, bias = (args[-1] if positions else None), args[2]
    _, mean, rstd = torch.ops.motet.context_kv(
        args[0], places, args[1], bias, None, None, None, 1e-5, "auto"
    )
    computed = motet.kernels.row_statistics(args[0], positions=places)
    assert all(map(torch.equal, computed, (mean, rstd)))
    z = context_kv_reference(args[0], torch.eye(5 + positions).double()[None], positions=places)[0]
    joined = args[0] if places is None else torch.cat([args[0], places.repeat(2, 1)], 1)
    torch.testing.assert_close((joined - mean[:, None]) * rstd[:, None], z, **EXACT)
    apart = torch.stack((mean, rstd), 1).unbind(1)
    for statistics in ((mean, rstd), apart):
        actual = with_gradients(case.call(statistics=statistics))(*args)
        torch.testing.assert_close(actual, with_gradients(case.call())(*args), **EXACT)


def test_rows_behind_the_last_bag() -> None:
    """They are computed as one more bag; with a gradient of zero they add nothing to any sum."""
    x, weight, bias = Case(tokens=140).draw()
    offsets, grad = torch.tensor([0, 70, 100]), torch.randn(2, 140, 3).double()
    grad[:, 100:] = 0

    def run(rows: int) -> tuple[Tensor, ...]:
        inputs = (x[:rows], None, weight)
        y, *statistics = torch.ops.motet.context_kv(
            *inputs, bias, offsets, None, None, 1e-5, "eager"
        )
        options = (*statistics, False, 1e-5, "eager", [True] * 3)
        dx, _, *sums = torch.ops.motet.context_kv_backward(
            grad[:, :rows], *inputs, offsets, *options
        )
        assert y.isfinite().all()
        assert not dx[100:].any()
        return y[:, :100], *(part[:100] for part in (*statistics, dx)), *sums

    torch.testing.assert_close(run(140), run(100), **EXACT)


def test_chunks_on_cuda_are_larger() -> None:
    bounds, x = [0, 100_000, 100_000, 300_000], torch.empty(0)
    on_cpu = list(ragged.chunks(bounds, 2048, x))
    with mock.patch.object(Tensor, "is_cuda", new=True, create=True):
        on_cuda = list(ragged.chunks(bounds, 2048, x))
    assert len(on_cpu) > 100
    assert on_cuda == [(0, 0, 100_000), (2, 100_000, 231_072), (2, 231_072, 300_000)]


def test_gradients() -> None:
    case = Case(tokens=4, width=3, per_bag=2, positions=2)
    args = [a.requires_grad_() for a in case.draw()]
    assert torch.autograd.gradcheck(case.call(offsets=torch.tensor([0, 1, 4])), args)


@pytest.mark.parametrize("indices", [[0], [1], [2], [3], [0, 3], [1, 2]])
def test_only_the_gradients_that_are_wanted(indices: list[int]) -> None:
    """A gradient does not depend on which other gradients are computed."""
    case = Case(tokens=6, per_bag=3, positions=2)
    args = [a.requires_grad_(i in indices) for i, a in enumerate(case.draw())]
    all_gradients = with_gradients(case.call())(*args)[1:]
    y = with_gradients(case.call())(*args)[0]
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(y.shape, generator=generator).bfloat16().double()
    gradients = torch.autograd.grad(case.call()(*args), [args[i] for i in indices], weights)
    for i, gradient in zip(indices, gradients, strict=True):
        torch.testing.assert_close(gradient, all_gradients[i], **EXACT)


@pytest.mark.parametrize("name", ["plain", "no bias", "shared positions", "no token"])
def test_registration(name: str) -> None:
    case = CASES[name]
    x, weight, *optional = (a.requires_grad_() for a in case.draw())
    bias = optional[0] if case.bias else None
    positions = optional[-1] if case.positions else None
    offsets = offsets_of([case.tokens // 2, case.tokens - case.tokens // 2])
    opcheck(
        torch.ops.motet.context_kv,
        (x, positions, weight, bias, offsets, None, None, 1e-5, "auto"),
    )
    pair = torch.randn(2, case.tokens).double().unbind()
    opcheck(torch.ops.motet.context_kv, (x, positions, weight, bias, offsets, *pair, 1e-5, "auto"))
    x, weight = x.detach(), weight.detach()
    positions = None if positions is None else positions.detach()
    statistics = torch.randn(2, case.tokens).double().unbind()
    grad = torch.randn(case.sets, case.tokens, case.outputs).double()
    for needed in ([True, True, True], [False, True, False], [True, False, False], [False] * 3):
        opcheck(
            torch.ops.motet.context_kv_backward,
            (grad, x, positions, weight, offsets, *statistics, False, 1e-5, "auto", needed),
        )


def test_compiles_whole_for_any_size() -> None:
    def run(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
        offsets = torch.arange(4) * len(positions)
        return 2 * context_kv(x, weight, bias, positions=positions, offsets=offsets)

    assert_compiles(run, *(Case(tokens=3 * n, per_bag=n, positions=2).draw() for n in (4, 9)))


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case(), Case(positions=2)], ids=["plain", "positions"])
def test_the_compiled_backend(case: Case) -> None:
    args = case.draw()
    actual = with_gradients(case.call(backend="compile"))(*args)
    torch.testing.assert_close(actual, with_gradients(case.reference)(*args), **EXACT)


def test_there_is_one_derivative() -> None:
    case = Case(positions=2)
    assert_differentiable_once(case.call(), *case.draw())


def test_no_state_survives_a_call() -> None:
    case = Case(tokens=21, per_bag=7, positions=2)
    assert_leaves_no_trace(case.call(offsets=offsets_of([7, 14])), *case.draw())


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("which", range(4))
def test_layouts_of_every_argument(which: int) -> None:
    case = Case(tokens=21, per_bag=7, positions=2)
    args = case.draw()
    expected = with_gradients(case.reference)(*args)
    for view in views_of(args[which]).values():
        changed = [*args[:which], view, *args[which + 1 :]]
        torch.testing.assert_close(with_gradients(case.call())(*changed), expected, **EXACT)


def test_expanded_arguments() -> None:
    case = Case(tokens=21, per_bag=7, positions=2)
    narrow = [a[:1] for a in case.draw()]
    expanded = [
        a.expand(n, *a.shape[1:]) for a, n in zip(narrow, (21, 2, 2, 7), strict=True)
    ]  # fmt: skip
    actual, expected = (with_gradients(f)(*expanded) for f in (case.call(), case.reference))
    torch.testing.assert_close(actual, expected, **EXACT)
    # The incoming gradient may be expanded too, as the gradient of a sum is.
    args = [a.requires_grad_() for a in case.draw()]
    pair = [torch.autograd.grad(f(*args).sum(), args) for f in (case.call(), case.reference)]
    torch.testing.assert_close(*pair, **EXACT)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak")
def test_peak_memory_is_that_of_inputs_outputs_and_some_chunks() -> None:
    code = """
import re, torch
from motet.kernels import context_kv
torch.set_num_threads(1)
def mib(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
weight = torch.randn(2, 64, 2048)
context_kv(torch.randn(4, 2048), weight)
x = torch.randn(16384, 2048)  # 128 MiB
y = torch.zeros(2, 16384, 64)  # as large as the result; allocated before
before = mib("VmRSS")
context_kv(x, weight)
print(mib("VmHWM") - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    outputs, chunk = 2 * 16384 * 64 * 4 / 2**20, 8
    # 20 to 60 MiB, depending on C++ or torch and on the allocator; a copy of x takes 128 MiB.
    assert float(out.stdout) < outputs + 6 * chunk


def refused() -> list[tuple[type[Exception], str, tuple, dict]]:
    x, weight, bias = Case(tokens=6).draw()
    offsets, ok, places = torch.tensor([0, 2, 6]), torch.ones(6).double(), torch.randn(3, 2)
    meta, numbers = x.to("meta"), [1.0]
    wide = torch.randn(2, 3, 7).double()
    return [
        (TypeError, "x: expected a tensor", (numbers, weight), {}),
        (TypeError, "weight: expected a tensor", (x, numbers), {}),
        (TypeError, "bias: expected a tensor", (x, weight, numbers), {}),
        (TypeError, "positions: expected a tensor", (x, weight), {"positions": numbers}),
        (TypeError, "offsets: expected a tensor", (x, weight), {"offsets": [0, 6]}),
        (TypeError, "statistics\\[0\\]: expected a tensor", (x, weight),
         {"statistics": (numbers, numbers)}),
        (ValueError, "x: expected floating-point", (x.long(), weight), {}),
        (ValueError, "x: expected floating-point \\[T, D\\]", (x[0], weight), {}),
        (ValueError, "x: expected floating-point \\[T, D\\] with D > 0", (x[:, :0], weight), {}),
        (ValueError, "weight: expected \\[S, O, 5\\]", (x, wide), {}),
        (ValueError, "weight: expected \\[S, O, 5\\]", (x, weight[None]), {}),
        (ValueError, "weight: expected \\[S, O, 5\\]", (x, weight[0, 0]), {}),
        (ValueError, "weight: expected", (x.float(), weight.float().long()), {}),
        (ValueError, "weight: expected", (x.float(), weight.to(torch.complex64)), {}),
        (ValueError, "weight: expected a dtype that goes with torch.float64", (x, weight.float()),
         {}),
        (ValueError, "weight: expected .* on cpu", (x, weight.to("meta")), {}),
        (ValueError, "bias: expected \\(2, 3\\)", (x, weight, bias[:1]), {}),
        (ValueError, "bias: expected torch.float64", (x, weight, bias.float()), {}),
        (ValueError, "bias: expected torch.float64 on cpu", (x, weight, bias.to("meta")), {}),
        (ValueError, "positions: expected \\[N, P\\]", (x, wide), {"positions": places[:, 0]}),
        (ValueError, "positions: expected \\[N, P\\]", (x[:5], wide), {"positions": places}),
        (ValueError, "positions: expected \\[N, P\\]", (x, wide), {"positions": places[:0]}),
        (ValueError, "positions: expected \\[N, P\\]", (x, wide), {"positions": x.repeat(2, 1)}),
        (ValueError, "positions: expected cpu as x", (x, wide), {"positions": places.to("meta")}),
        (ValueError, "positions: expected floating", (x, wide), {"positions": places.long()}),
        (ValueError, "statistics\\[0\\]: expected torch.float64 \\[6\\]", (x, weight),
         {"statistics": (ok[:3], ok)}),
        (ValueError, "statistics\\[1\\]: expected torch.float64 \\[6\\]", (x, weight),
         {"statistics": (ok, ok.float())}),
        (ValueError, "statistics\\[0\\]: expected", (x, weight),
         {"statistics": (ok.to("meta"), ok)}),
        (ValueError, "offsets: expected int64", (x, weight), {"offsets": offsets.int()}),
        (ValueError, "offsets: expected int64", (x, weight), {"offsets": offsets.double()}),
        (ValueError, "offsets: expected int64", (x, weight), {"offsets": offsets[None]}),
        (ValueError, "offsets: expected int64", (x, weight), {"offsets": offsets[:0]}),
        (ValueError, "offsets: expected cpu", (x, weight), {"offsets": offsets.to("meta")}),
        (ValueError, "offsets: expected to rise from 0 to 6", (x, weight),
         {"offsets": torch.tensor([0, 4, 2, 6])}),
        (ValueError, "offsets: expected to rise from 0 to 6", (x, weight),
         {"offsets": torch.tensor([1, 6])}),
        (ValueError, "offsets: expected to rise from 0 to 6", (x, weight),
         {"offsets": torch.tensor([0, 7])}),
        (ValueError, "weight: expected .* on meta", (meta, weight), {}),
        (ValueError, "backend: expected 'auto'", (x, weight), {"backend": "cuda"}),
        (ValueError, "backend: 'triton' takes float32", (x, weight), {"backend": "triton"}),
        (ValueError, "backend: 'triton' needs CUDA tensors, got cpu; 'auto' falls back",
         (x.float(), weight.float()), {"backend": "triton"}),
    ]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "args", "options"), refused())
def test_refusals(error, message: str, args: tuple, options: dict) -> None:
    with pytest.raises(error, match=message):
        context_kv(*args, **options)


def test_given_statistics_are_those_of_the_gradient_too() -> None:
    x = torch.randn(9, 5, dtype=torch.float64)
    weight = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    statistics = x.new_zeros(9), x.new_ones(9)
    y = context_kv(x, weight, statistics=statistics)
    torch.testing.assert_close(y, x @ weight.mT)
    (grad,) = torch.autograd.grad(y.sum(), weight)
    torch.testing.assert_close(grad, x.sum(0).expand_as(grad))


def test_tokens_behind_the_last_bag_belong_to_none() -> None:
    """Their values change no result and no gradient; static tensors of CUDA graphs have them."""
    x, weight = rows_of(1.0, 9, 5), torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    offsets, grad = torch.tensor([0, 4, 4, 7]), torch.randn(2, 9, 4, dtype=torch.float64)
    grad[:, 7:] = 0

    def outcome(count: int) -> list[torch.Tensor]:
        y = context_kv(x[:count], weight, offsets=offsets)
        return [y[:, :7], *torch.autograd.grad(y, weight, grad[:, :count])]

    for padded, exact in zip(outcome(9), outcome(7), strict=True):
        torch.testing.assert_close(padded, exact, **EXACT)
