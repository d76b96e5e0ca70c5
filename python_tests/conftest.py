"""What the tests share: where data lies, how close is close enough, deterministic properties."""

import itertools
import operator
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from motet import _error_floors
from torch import Tensor

Thing = TypeVar("Thing")

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # for benchmarks/, which is in the checkout alone
IN_CI = os.environ.get("CI") == "true"
SOAK = os.environ.get("MOTET_HYPOTHESIS") == "soak"
# Of what is drawn, another part is drawn every day. In the environment, so that the processes of
# one run of tests draw the same.
SEED = int(os.environ.setdefault("MOTET_SEED", str(date.today().toordinal())))
MODELS = Path(__file__).parent / "golden"

# The seeds of a property are fixed, so that a run never fails by chance; `make soak` explores.
settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("soak", parent=settings.get_profile("fixed"), derandomize=False,
                          max_examples=2000)  # fmt: skip
settings.load_profile("soak" if SOAK else "fixed")

# What torch has compiled for this checkout alone: entries of another name the modules of its tests,
# which would be imported beside these.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / "inductor"))

# Triton reads it when it is first imported, which some part of torch may do before its tests.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)  # pytest-xdist runs one worker per core


def drawn(things: Iterable[Thing], count: int) -> list[Thing]:
    """Draw some of the things by SEED; under `make soak` return all of them."""
    return list(things) if SOAK else random.Random(SEED).sample(list(things), count)


def pytest_report_header() -> str:
    return f"drawn with MOTET_SEED={SEED}"


def data_path(*parts: str) -> Path:
    """Find shared data in $MOTET_DATA, else ../shared; skip without it, but fail in CI."""
    base = Path(os.environ.get("MOTET_DATA", ROOT.parent / "shared"))
    path = base.joinpath(*parts)
    if not path.exists():
        if IN_CI:
            pytest.fail(f"{path} is missing; CI needs the shared data")
        pytest.skip(f"{path} is not on this machine; set MOTET_DATA to the shared data")
    return path


def run_python(code: str, *arguments: str) -> str:
    """Run code in a fresh process, away from the checkout; return what it printed."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout


def golden_path(name: str) -> Path:
    """Find a parity vector: the copy in the repository, else the shared data."""
    copied = MODELS / f"{name}.safetensors"
    return copied if copied.exists() else data_path("golden", f"{name}.safetensors")


# Absolute error that a comparison may always have, by the dtype that was worked in.
FLOOR = {getattr(torch, name): floor for name, floor in _error_floors.ELEMENT.items()}
WIDE = {torch.complex64: torch.complex128} | dict.fromkeys(
    (torch.float32, torch.float16, torch.bfloat16), torch.float64
)
# What two float64 computations of the same numbers may differ by.
EXACT = {"rtol": 1e-11, "atol": 1e-11}

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def results_of(function: Function, *args: Tensor) -> tuple[Tensor, ...]:
    results = function(*args)
    return (results,) if isinstance(results, Tensor) else results


def with_gradients(function: Function) -> Function:
    """Return a function that adds to the results their gradients in all its arguments.

    What is differentiated is a fixed random sum of the results, the same in every dtype.
    """

    def both(*args: Tensor) -> tuple[Tensor, ...]:
        args = tuple(a.detach().requires_grad_() for a in args)
        results = results_of(function, *args)
        generator = torch.Generator().manual_seed(0)
        sums = [torch.randn(r.shape, generator=generator).bfloat16().to(r.dtype) for r in results]
        moving = [(r, s) for r, s in zip(results, sums, strict=True) if r.requires_grad]
        gradients = [torch.zeros_like(a) for a in args]
        if moving:
            outputs, weights = zip(*moving, strict=True)
            gradients = torch.autograd.grad(
                outputs, args, weights, allow_unused=True, materialize_grads=True
            )
        return (*(r.detach() for r in results), *gradients)

    return both


# How many runs of the reference in the working dtype an error is compared with, at most.
REFERENCES = 16


def neighbours(args: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Yield the arguments, then arguments whose numbers lie up to a unit of the last place off.

    Zeros stay zero, and float64 stays as it is.
    """
    yield tuple(args)
    generator = torch.Generator().manual_seed(0)
    for _ in range(REFERENCES - 1 if any(a.dtype in WIDE for a in args) else 0):
        steps = [torch.randint(-1, 2, a.shape, generator=generator) for a in args]
        yield tuple(
            a + a * (step * torch.finfo(a.dtype).eps).to(a.dtype) if a.dtype in WIDE else a
            for a, step in zip(args, steps, strict=True)
        )


def assert_as_good_as(
    fast: Function,
    reference: Function,
    *args: Tensor,
    worked_in: torch.dtype | None = None,
    rms: bool = False,
) -> None:
    """Check that err(fast) <= 2 max err(reference in the working dtype) + floor, against float64.

    To first order the error of a chain of roundings is sum_k J_k d_k, with J_k the derivative of
    the result by what was rounded in step k and |d_k| <= u: its size is that of J, which the fast
    form shares, but one run is one draw of the signs of d, and may come out near zero. So the
    reference is run at n = REFERENCES inputs, these and others a rounding away, where J is the same
    and d another, each against float64 at its own input. Were the fast form's error drawn as those
    of the reference are, it would pass twice the largest of n with a probability of 0.13 % for
    n = 16 (30 % for n = 1) in the worst case, a result that is one number with a normal error; of
    four numbers it is 5e-6. Further runs are made only while an error is above the bound of those
    before, which changes no verdict.

    Functions with several results are compared result by result.

    Args:
        worked_in: the dtype that sets the floor, where autocast makes it another than the result's.
        rms: compare root mean squares instead of maxima. Over a chain of many roundings, as in a
            model, which of two computations has the largest single error is a matter of luck.
    """

    def size(x: Tensor) -> float:
        return (x.abs().square().mean().sqrt() if rms else x.abs().max()).item() if x.numel() else 0

    def widened(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return results_of(reference, *(a.to(WIDE.get(a.dtype, a.dtype)) for a in tensors))

    results, exact_results = results_of(fast, *args), widened(args)
    floors, errors = [], []
    for result, exact in zip(results, exact_results, strict=True):
        assert result.shape == exact.shape
        real = result.real.dtype if result.is_complex() else result.dtype
        floors.append(FLOOR[worked_in or real] * max(1, size(exact)))
        errors.append(size(result - exact))
    worst = [0.0] * len(results)
    for n, near in enumerate(neighbours(args)):
        theirs, wide = results_of(reference, *near), widened(near) if n else exact_results
        found = [size(a - b) for a, b in zip(theirs, wide, strict=True)]
        worst = list(map(max, worst, found))
        allowed = [2 * w + floor for w, floor in zip(worst, floors, strict=True)]
        if all(map(operator.le, errors, allowed)):
            return
    failed = [
        f"result {i}: error {e:.2e}, allowed {a:.2e}"
        for i, (e, a) in enumerate(zip(errors, allowed, strict=True))
        if not e <= a
    ]
    raise AssertionError("; ".join(failed))


def assert_leaves_no_trace(function: Function, *args: Tensor) -> None:
    """Check that a call and its gradient change no argument and no random state, and repeat."""
    before = [(a.clone(), a._version) for a in args]
    state = torch.get_rng_state()
    first, second = (with_gradients(function)(*args) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for a, (value, version) in zip(args, before, strict=True):
        assert torch.equal(a, value)
        assert a._version == version
    assert all(map(torch.equal, first, second))


def assert_differentiable_once(function: Function, *args: Tensor) -> None:
    """Check that what is not there raises, in every argument, instead of giving zero."""
    args = tuple(a.detach().requires_grad_() for a in args)
    for i, arg in enumerate(args):
        (first,) = torch.autograd.grad(results_of(function, *args)[0].sum(), arg, create_graph=True)
        with pytest.raises(NotImplementedError, match="expected one derivative"):
            torch.autograd.grad(first.square().sum(), args, allow_unused=True)
        with pytest.raises(NotImplementedError, match="expected reverse mode"):
            torch.func.jvp(
                lambda a, i=i: results_of(function, *args[:i], a, *args[i + 1 :])[0],
                (arg.detach(),), (torch.ones_like(arg),),
            )  # fmt: skip


def assert_compiles(function: Function, *examples: tuple[Tensor, ...]) -> None:
    """Check that torch.compile takes a function whole, once for examples of several sizes."""
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, args in enumerate(examples):
        expected = with_gradients(function)(*args)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            torch.testing.assert_close(with_gradients(compiled)(*args), expected)


def offsets_of(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def rows_of(kind: float | str, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return tokens whose mean is `kind` times their standard deviation, or "constant" ones."""
    if kind == "constant":
        return (10 * torch.randn(*shape[:-1], 1)).expand(shape).to(dtype)
    return (torch.randn(shape) + kind).to(dtype)


def views_of(tensor: Tensor) -> dict[str, Tensor]:
    """Return tensors of the same numbers with other strides."""
    wide = torch.randn(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
    wide[..., ::2] = tensor
    apart = torch.randn(3, *tensor.shape, dtype=tensor.dtype)
    apart[1] = tensor
    return {
        "transposed": tensor.transpose(-1, -2).contiguous().transpose(-1, -2),
        "every second": wide[..., ::2],
        "within another": apart[1],
    }


ROWS = [0.0, 1.0, 10.0, 100.0, "constant"]


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Move every parameter away from its initial value, norms' included; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.1 * noise)
    return model.eval()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the cases of a test marked `sampled`, mark those slow that cover nothing new.

    What stays fast covers every value of every parameter of the test, or with sampled(2) every pair
    of values of two parameters.
    """
    tests: dict[tuple[str, str], list[pytest.Function]] = {}
    for item in items:
        if hasattr(item, "callspec") and item.get_closest_marker("sampled"):
            tests.setdefault((str(item.path), item.originalname), []).append(item)
    for cases in tests.values():
        for case in _covering_nothing_new(cases):
            case.add_marker("slow")


def _covering_nothing_new(cases: list[pytest.Function]) -> list[pytest.Function]:
    """Return the cases that are left when all that there is to cover is covered, greedily."""
    (strength,) = next(cases[0].iter_markers("sampled")).args or (1,)
    covers = {}
    for case in cases:
        values = sorted((name, repr(value)) for name, value in case.callspec.params.items())
        covers[case] = {*itertools.combinations(values, strength)}
    covered: set[object] = set()
    while covers:
        best = max(covers, key=lambda case: len(covers[case] - covered))
        if not covers[best] - covered:
            break
        covered |= covers.pop(best)
    return list(covers)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _no_interpreter(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave Triton's interpreter to the modules marked `interpreted`; their fixtures too."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("interpreted"):
            from . import interpreter

            builder = interpreter.InterpreterBuilder
            patch.setattr(builder, "create_dot", interpreter.create_dot)
            patch.setattr(builder, "create_splat", interpreter.create_splat)
        else:
            patch.delenv("TRITON_INTERPRET", raising=False)
        yield


@pytest.fixture
def _poisoned() -> Iterator[None]:
    """Make memory that is not written show: torch fills it with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
