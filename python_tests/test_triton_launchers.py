"""Run without a GPU every line of kernels/ that only a GPU runs.

Tensors without memory go through the launchers and the operators; launches are recorded, not run.
torch.cuda is an autospecced fake: an attribute that torch.cuda lacks raises, and so does a call
with wrong arguments.
"""

import ast
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, get_type_hints
from unittest import mock

import pytest
import torch
import torch._dynamo  # before torch.cuda is faked: it imports from there

from .conftest import require_interpreter

require_interpreter()

from benchmarks.launches import (
    CELLS,
    LAUNCHERS,
    attention_launchers,
    context_launchers,
    merge_launchers,
    statistics_launchers,
)
from motet.kernels import attention_weights, backends, plan
from motet.kernels.absorbed_attention import heads as heads_operator
from motet.kernels.absorbed_attention import operator as absorbed
from motet.kernels.chips import CHIPS
from motet.kernels.context_kv import operator as context
from motet.kernels.fold_norm import operator as fold
from motet.kernels.harmonic_merge import operator as merge
from motet.kernels.head import operator as head
from motet.kernels.latent_attention import operator as attention
from motet.kernels.latent_attention import records
from motet.kernels.lego_pass import operator as lego
from motet.kernels.row_statistics import operator as statistics_operator
from motet.kernels.slerp import operator as slerp
from triton.runtime.interpreter import InterpretedFunction

from .conftest import ROOT

pytestmark = pytest.mark.interpreted

KERNELS = ROOT / "kernels"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Fake a machine with a Hopper GPU; return the recorded launches with their arguments."""
    launches = []

    def record(self, *args, grid, warmup, **kwargs):
        shapes = ("num_warps", "num_stages", "maxnreg")
        options = {name: kwargs.pop(name) for name in shapes if kwargs.get(name) is not None}
        kwargs.pop("maxnreg", None)
        bound = inspect.signature(self.fn).bind(*args, **kwargs)  # as Triton does
        assert all(isinstance(size, int) and size > 0 for size in grid), grid
        assert all(isinstance(value, int) for value in options.values()), options
        assert guarded.entered, "a launch outside of torch.cuda.device_of"
        launches.append((self.fn.__name__, dict(bound.arguments)))

    cuda = mock.create_autospec(torch.cuda)
    cuda.is_available.return_value = True
    cuda.current_device.return_value = 0
    cuda.get_device_capability.return_value = (9, 0)
    cuda.get_device_properties.return_value.name = "NVIDIA H200"
    cuda.get_device_properties.return_value.multi_processor_count = 132
    guarded = mock.Mock(entered=0)

    def enter(*_: object) -> None:
        guarded.entered += 1

    def leave(*_: object) -> None:
        guarded.entered -= 1

    cuda.device_of.return_value.__enter__.side_effect = enter
    cuda.device_of.return_value.__exit__.side_effect = leave
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(InterpretedFunction, "run", record)
    return launches


@contextmanager
def on_gpu() -> Iterator[None]:
    """Create every new tensor without memory (on the meta device), with `is_cuda` true.

    A CUDA tensor would need the driver. Code that mixes devices raises, and so does code that reads
    a value, for which it would wait for the GPU.
    """
    with (
        mock.patch.object(torch.Tensor, "is_cuda", property(lambda x: x.is_meta), create=True),
        torch.device("meta"),
    ):
        yield


def attend() -> None:
    """Call what the dispatcher calls for latent_attention, and attention_weights."""
    q, offsets, seed = torch.empty(2, 3, 5, 16), torch.tensor([0, 4, 9]), torch.tensor([1])
    kv, lse = torch.empty(9, 2, 3, 16), torch.empty(2, 3, 5)
    for backend in ("auto", "eager"):
        if backend == "eager" and q.is_meta:
            continue  # which reads the offsets
        rest = (offsets, None, 0.3, 0.1, seed, backend)
        out, _ = attention._forward(q, *kv.unbind(1), *rest)
        rest = (offsets, None, out, lse, 0.3, 0.1, seed, backend)
        attention._backward_of(out, q, *kv.unbind(1), *rest)
        for recorded in (False, True)[: 2 if q.is_meta else 1]:
            attention._backward_of_kv(out, q, kv, *rest, recorded)
            no_bags = (out[:0], q[:1], kv, offsets[:1], None, out[:0], lse[:0])
            attention._backward_of_kv(*no_bags, *rest[4:], recorded)
        qkv = torch.empty(2, 5, 3, 3, 16)
        rest = (0.3, 0.1, seed, backend)
        attention._backward_of_self(*attention._forward_self(qkv, *rest)[:1], qkv, out, lse, *rest)
        rest = (offsets, None, 0.3, 0.1, seed, backend)
        out, _ = attention._forward_kv(q[:1], kv, *rest, None)
        rest = (offsets, None, out, lse, 0.3, 0.1, seed, backend, False)
        attention._backward_of_kv(out, q[:1], kv, *rest)
        for given in (lse, None):
            attention_weights(q, kv[:, 0], offsets, lse=given, reduce="mean", backend=backend)
    made = records._forward(kv, offsets, None, 2, 5, 16)
    for layers in (made, made[:0]):
        records._backward_of(layers, kv, offsets, None, 16, 0.3, 0.1)
    attention_weights(q, torch.empty(2, 3, 7, 16))


def absorb() -> None:
    """Call what the dispatcher calls for absorbed_attention."""
    queries, x, places = torch.empty(2, 5, 35), torch.empty(9, 32), torch.empty(9, 3)
    offsets, seed = torch.tensor([0, 4, 9]), torch.tensor([1])
    for backend in ("auto", "eager"):
        if backend == "eager" and x.is_meta:
            continue
        rest = (1e-5, 0.1, seed, backend)
        given = torch.empty(9, 2).unbind(1)
        bags = (queries, x, places, offsets, None)
        absorbed._forward(*bags, *given, *rest)
        pooled, mass, scores, lse, *statistics = absorbed._forward(*bags, None, None, *rest)
        rest = (None, *statistics, False, pooled, mass, scores, lse, *rest)
        for of_rows in (False, True):
            if of_rows and x.is_meta:
                continue  # in torch, which reads the offsets
            absorbed._backward_of(pooled, mass, queries, x, places, offsets, *rest, of_rows)
    absorbed._takes_triton("triton", queries[:0])


def attend_heads() -> None:
    """Call what the dispatcher calls for absorbed_heads."""
    x, offsets, seed = torch.empty(9, 32), torch.tensor([0, 4, 9]), torch.tensor([1])
    q, counts = torch.empty(2, 5, 3, 4).transpose(1, 2), torch.empty(9, 2)[:, 0]
    given = torch.empty(9, 2)
    folded = torch.empty(6, 4, 35), torch.empty(6, 4)
    for of_bags in (counts, None):
        tokens = (x, torch.empty(9, 3), offsets, of_bags, *given.unbind(1))
        options = (0.3, 1e-5, *((0.0, None) if of_bags is not None else (0.1, seed)))
        out, *made = heads_operator._forward(q, *folded, *tokens, *options)
        heads_operator._backward_of(out.mT.contiguous().mT, q, *folded, *tokens, *made, *options)


def project() -> None:
    """Call what the dispatcher calls for context_kv."""
    x, weight, bias = torch.empty(9, 32), torch.empty(2, 8, 32), torch.empty(2, 8)
    given = torch.empty(9, 2).unbind(1)
    for backend in ("auto", "eager"):
        for statistics in ((None, None), given):
            rest = (None, *statistics, 1e-5, backend)
            y, *_ = context._forward(x, None, weight, bias, *rest)
        for needed in ((True, True, True), (False, True, False), (False, False, True)):
            rest = (None, *given, True, 1e-5, backend, needed)
            context._backward_rows(y, x, None, weight, *rest)
        statistics_operator._forward(x, x[:3], 1e-5, backend)


def fold_weights() -> None:
    """Call what the dispatcher calls for fold_norm."""
    weight, gain, shift = torch.empty(4, 5, 12), torch.empty(12), torch.empty(12)
    grads = fold._forward(weight, gain, shift, 3, torch.bfloat16)
    fold._backward_of(*grads, weight, gain, shift)


def predict() -> None:
    """Call what the dispatcher calls for head."""
    vectors, weight = torch.empty(2, 12).unbind(), torch.empty(4, 12)
    made = head._forward(torch.empty(3, 5, 12), *vectors, weight, torch.empty(4), 1e-5)
    head._backward_of(*made, *vectors, weight, 5, torch.bfloat16)


def update() -> None:
    """Call what the dispatcher calls for lego_pass."""
    real, attended = torch.empty(2, 5, 12), torch.empty(2, 2, 5, 6)
    weights = torch.empty(12 * 12**2 + 12 * 12 + 12 * 12), torch.empty(12 * 12 + 2 * 12)
    rest = [*weights, None, None, None, 0.0, True, (), 5, real.dtype]
    x, _, queries, scale = lego._forward(real, None, attended, *rest)
    lego._backward_of(x, None, queries, x, None, scale, real, attended, *rest)
    none = [None, None, *rest[1:]]
    x, _, queries, scale = lego._forward(real, None, *none)
    lego._backward_of(x, None, queries, x, None, scale, real, *none)


def merge_tensors() -> None:
    """Call what the dispatcher calls for both merges, on the CPU: they read addresses."""
    latents = [torch.randn(64, dtype=torch.complex64) for _ in range(9)]
    vectors = [z.real.contiguous() for z in latents]
    for count in (2, 9):
        for backend in ("auto", "eager"):
            with mock.patch.object(merge, "native", return_value=None):
                merge._forward(latents[:count], count * [1 / count], "principal", backend)
            with mock.patch.object(slerp, "native", return_value=None):
                slerp._forward(vectors[:count], count * [1 / count], backend)
    merge._forward(latents[:2], [0.5, 0.5], "principal", "auto")
    merge._backward_of(latents[0], latents[1], latents[:2], [0.5, 0.5], "principal")
    slerp._forward(vectors[:2], [0.5, 0.5], "auto")


def launch_edges() -> None:
    """Call launchers with arguments that none of the functions above leads to."""
    q, kv = torch.empty(2, 3, 5, 16), torch.empty(9, 2, 3, 16)
    attention_launchers.attend(q, *kv.unbind(1), torch.tensor([0, 4, 9]), None, 0.3, 0.1, 7)
    x, one = torch.empty(9, 32), torch.empty(9)
    for dtype in (torch.float32, torch.bfloat16):
        for outputs, rows in ((0, 9), (4, 0), (4, 9)):
            grad, tokens = torch.empty(2, rows, outputs, dtype=dtype), x[:rows].to(dtype)
            context_launchers.weight_gradient(grad, tokens, None, one[:rows], one[:rows], 1e-5)
    context_launchers.centre(torch.empty(2, 0, 32), 32, None)
    for chip in ((8, 0), (10, 0)):
        with mock.patch.object(torch.cuda, "get_device_capability", return_value=chip):
            CELLS["absorbed fp32 136 queries dropout"]()
            CELLS["absorbed bf16 136 queries"]()
            CELLS["attended fp32 8x63 c17"]()
    # A last turn for which whole tiles are better than halves.
    x, weight = (torch.empty(rows, 32, dtype=torch.bfloat16) for rows in (210 * 256, 128))
    centred, _ = context_launchers.centre(weight[None], 32, None)
    one = torch.empty(len(x))
    context_launchers.project(x, None, centred, None, None, one, one, 1e-5)
    statistics_launchers.forward(x[:0], None, 1e-5)
    nothing = torch.empty(0, dtype=torch.complex64)
    merge_launchers.merge([nothing, nothing], [0.5, 0.5], "principal", nothing)


def choose() -> None:
    """Choose the present GPU, other chips by name, and devices that raise."""
    sizes = {"bags": 2, "latents": 5, "heads": 2, "head_dim": 8, "layers": 2}
    assert plan(300, 64, **sizes, device="cuda").machine == "H200"
    plan(300, 64, **sizes)
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=False),
        pytest.raises(ValueError, match="device: expected a CUDA device at hand"),
    ):
        plan(300, 64, **sizes, device="cuda")
    with pytest.raises(ValueError, match="device: expected one of 'cpu', 'cuda'"):
        plan(300, 64, **sizes, device="abacus")
    plan(300, 64, **sizes, device=CHIPS["B200"])
    plan(300, 64, **sizes, device="A100")
    assert backends.on_triton("auto", "cuda", torch.bfloat16)
    assert not backends.on_triton("auto", "cuda", torch.float64)
    with mock.patch.dict(os.environ, TRITON_INTERPRET="0"):
        assert backends.on_triton("auto", "cuda", torch.bfloat16)
        assert not backends.on_triton("auto", "cpu", torch.bfloat16)
    assert backends.capability(torch.empty(1, device="cpu")) == 0


def functions_of(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of every function within a module's code."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_flags & inspect.CO_NEWLOCALS:
                yield constant
            yield from functions_of(constant)


def gpu_functions(path: Path) -> list[CodeType]:
    """Return the functions for GPUs: all of a launcher's file, else those that mention CUDA."""
    text = path.read_text()
    module = compile(text, str(path), "exec")
    functions = list(functions_of(module))
    if path.name in ("triton.py", "launch.py"):
        return functions
    marked = {
        node.lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef)
        and any(
            (isinstance(part, ast.Attribute) and part.attr in ("cuda", "is_cuda"))
            or (isinstance(part, ast.Constant) and part.value == "cuda")
            or (isinstance(part, ast.ImportFrom) and "triton" in (a.name for a in part.names))
            for part in ast.walk(node)
        )
    }
    return [code for code in functions if code.co_firstlineno in marked]


def lines_of(code: CodeType) -> set[int]:
    return {line for _, _, line in code.co_lines() if line and line != code.co_firstlineno}


@contextmanager
def lines_run() -> Iterator[set[tuple[str, int]]]:
    """Collect the lines of kernels/ that run, by file and number."""
    lines: set[tuple[str, int]] = set()

    def line(frame: FrameType, event: str, _: Any) -> Callable[..., Any]:
        if event == "line":
            lines.add((frame.f_code.co_filename, frame.f_lineno))
        return line

    def call(frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        return line if frame.f_code.co_filename.startswith(str(KERNELS)) else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield lines
    finally:
        sys.settrace(before)


def test_every_line_that_only_a_gpu_runs(launched: list) -> None:
    files = [path for path in KERNELS.rglob("*.py") if not path.name.endswith("_kernels.py")]
    expected = {
        (str(path), line)
        for path in files
        for code in gpu_functions(path)
        for line in lines_of(code)
    }
    assert len(expected) > 300
    with lines_run() as run:
        with on_gpu():
            for cell in CELLS.values():
                cell()
        for call in (
            attend,
            absorb,
            attend_heads,
            project,
            fold_weights,
            predict,
            update,
            launch_edges,
            choose,
        ):
            with on_gpu():
                call()
            call()
        merge_tensors()
    assert len({name for name, _ in launched}) == len(kernels())
    missing = sorted(expected - run)
    named = "\n".join(f"{Path(path).relative_to(ROOT)}:{line}" for path, line in missing)
    assert not missing, f"no test runs these lines:\n{named}"


def kernels() -> dict[str, InterpretedFunction]:
    """Return the kernels that launchers import, by name."""
    namespaces = (vars(module).items() for module in LAUNCHERS)
    return {k: v for names in namespaces for k, v in names if isinstance(v, InterpretedFunction)}


def test_every_optional_pointer_is_recorded_none_and_given(launched: list) -> None:
    """registers.py compiles launchers with every optional argument both as None and as a value.

    The same holds for parameters of kernels that are compared with None, or are ever None.
    """
    seen: set[tuple[str, str, str]] = set()
    optional: set[tuple[str, str]] = set()

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        name, signature = f"{function.__module__}.{function.__name__}", inspect.signature(function)
        hints = get_type_hints(function)
        of = {p for p in signature.parameters if type(None) in getattr(hints[p], "__args__", ())}
        optional.update((name, parameter) for parameter in of)

        def call(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            seen.update((name, p, "None" if given[p] is None else "given") for p in of)
            return function(*args, **kwargs)

        return call

    modules = {module.__name__ for module in LAUNCHERS}
    with pytest.MonkeyPatch.context() as patch:
        for module in LAUNCHERS:
            for name, function in inspect.getmembers(module, inspect.isfunction):
                if function.__module__ in modules and not name.startswith("_"):
                    patch.setattr(module, name, watched(function))
        with on_gpu():
            for cell in CELLS.values():
                cell()
    for kernel, function in kernels().items():
        for node in (
            n
            for n in ast.walk(ast.parse(inspect.getsource(function.fn)))
            if isinstance(n, ast.Compare)
        ):
            if ast.unparse(node).endswith((" is None", " is not None")):
                optional.add((kernel, ast.unparse(node).split()[0]))
    for kernel, given in launched:
        seen |= {(kernel, p, "None" if v is None else "given") for p, v in given.items()}
    optional |= {(where, parameter) for where, parameter, kind in seen if kind == "None"}
    assert len(optional) > 50
    both = {(*pair, kind) for pair in optional for kind in ("None", "given")}
    assert not both - seen


@pytest.mark.usefixtures("launched")
def test_a_word_that_torch_does_not_have_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt attribute raises; torch.cuda.get_devicecapability once broke half precision."""

    def capability(x: torch.Tensor) -> int:
        return torch.cuda.get_devicecapability(x.device)[0]  # pyright: ignore

    monkeypatch.setattr(attention_launchers, "capability", capability)
    with on_gpu(), pytest.raises(AttributeError, match="get_devicecapability"):
        CELLS["form: attention bf16 ragged counts"]()
