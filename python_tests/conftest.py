"""Shared by all tests: paths of data, error bounds, and fixed seeds for random inputs."""

import itertools
import os
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from motet.kernels import native
from torch import Tensor

from .comparison import Function, results_of, with_gradients

Thing = TypeVar("Thing")

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # for benchmarks/, which only the checkout has
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

# A cache of compiled code for this checkout only: entries of another checkout name test modules of
# that checkout, which torch would import too.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / "inductor"))

# Triton reads this variable when it is first imported; torch may do so before the tests do.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)  # pytest-xdist runs one worker per core


def drawn(things: Iterable[Thing], count: int) -> list[Thing]:
    """Draw some of the things by SEED; under `make soak` return all of them."""
    return list(things) if SOAK else random.Random(SEED).sample(list(things), count)


def pytest_configure(config: pytest.Config) -> None:
    if native.status():  # it says so once, which would fail whichever test is the first
        ignored = "ignore:motet.kernels._C is not available:RuntimeWarning"
        config.addinivalue_line("filterwarnings", ignored)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `native` without the C++ modules; fail where these are required."""
    if native.status() and item.get_closest_marker("native"):
        why = f"the C++ modules are not built ({native.status()}); {native.CURE}"
        required = IN_CI or os.environ.get("MOTET_REQUIRE_NATIVE") == "1"
        pytest.fail(why) if required else pytest.skip(why)


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


def golden_path(name: str) -> Path:
    """Find a parity vector: the copy in the repository, else the shared data."""
    copied = MODELS / f"{name}.safetensors"
    return copied if copied.exists() else data_path("golden", f"{name}.safetensors")


def assert_leaves_no_trace(function: Function, *args: Tensor) -> None:
    """Check that a call and its gradient change no argument or random state and are repeatable."""
    before = [(a.clone(), a._version) for a in args]
    state = torch.get_rng_state()
    first, second = (with_gradients(function)(*args) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for a, (value, version) in zip(args, before, strict=True):
        assert torch.equal(a, value)
        assert a._version == version
    assert all(map(torch.equal, first, second))


def assert_differentiable_once(function: Function, *args: Tensor) -> None:
    """Check that second derivatives and forward mode raise for every argument."""
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
    """Check that torch.compile makes one full graph that serves examples of several sizes."""
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, args in enumerate(examples):
        expected = with_gradients(function)(*args)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            torch.testing.assert_close(with_gradients(compiled)(*args), expected)


def offsets_of(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def rows_of(kind: float | str, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return random tokens of mean `kind` and deviation 1; "constant": equal within each row."""
    if kind == "constant":
        return (10 * torch.randn(*shape[:-1], 1)).expand(shape).to(dtype)
    return (torch.randn(shape) + kind).to(dtype)


def views_of(tensor: Tensor) -> dict[str, Tensor]:
    """Return tensors with the same values and other strides."""
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
    """Add noise to every parameter, those of norms included; set evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.1 * noise)
    return model.eval()


# The marks of modules that run Triton's kernels in the interpreter.
KERNEL_TESTS = [
    pytest.mark.interpreted,
    pytest.mark.sampled,
    pytest.mark.usefixtures("_poisoned"),
]


def require_interpreter() -> None:
    """Skip the module that calls this, before it imports kernels, where none can be interpreted."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter would take the GPU's kernels over", allow_module_level=True)
    pytest.importorskip("triton", reason="triton is not installed; it comes with motet on Linux")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the cases of a test marked `sampled`, mark those slow that cover nothing new.

    What stays fast covers every value of every parameter of the test, or with sampled(2) every pair
    of values of two parameters.
    """
    tests: dict[tuple[str, str], list[pytest.Function]] = {}
    for item in items:
        sampled = hasattr(item, "callspec") and item.get_closest_marker("sampled")
        if sampled and not item.get_closest_marker("slow"):  # which covers nothing that is fast
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
        covers[case] = {*itertools.combinations(values, min(strength, len(values)))}
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
    """Let torch fill new memory with NaN, so that elements that are never written show."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
