"""CudaCapture with a fake torch.cuda: the order of its calls, and captures that fail."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import motet
import pytest
import torch
from motet.fusion import capture
from motet.fusion.capture import WARM_UPS, CaptureError, CudaCapture
from torch import Tensor

from .graph_helpers import batch_of, eager, graphed, healnet, loss_of

CUDA = torch.device("cuda", 0)


class Generator:
    """A random generator whose state stays marked as capturing after a capture that failed."""

    def __init__(self) -> None:
        self.state = SimpleNamespace(capturing=False, offset=0)

    def clone_state(self) -> Any:
        self.state.drawn = torch.get_rng_state()  # models on the CPU use torch's generator
        return SimpleNamespace(**vars(self.state))

    def graphsafe_set_state(self, state: Any) -> None:
        self.state = state
        torch.set_rng_state(state.drawn)

    def get_state(self) -> tuple[int, Tensor]:
        return self.state.offset, torch.get_rng_state()

    def set_state(self, state: tuple[int, Tensor]) -> None:
        self.state.offset = state[0]
        torch.set_rng_state(state[1])

    def draw(self, capturing: bool) -> None:
        if self.state.capturing and not capturing:
            raise RuntimeError("Offset increment outside graph capture")
        self.state.offset += not capturing


class Cuda:
    """The parts of torch.cuda that captures use. Fails at the "begin", "body" or "end" if set."""

    def __init__(self) -> None:
        self.fails = ""
        self.generator = Generator()
        self.default = self.current = SimpleNamespace(wait_stream=lambda other: None)
        self.capturing = False
        self.pools = 0
        self.allocating: set[int] = set()
        self.taken: dict[int, int] = {}
        self.events: list[str] = []

    def pool(self) -> int:
        self.pools += 1
        return self.pools

    def set_stream(self, stream: Any) -> None:
        self.current = stream

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        yield  # as in torch, the stream is not restored if the body raises
        self.current = before

    @contextmanager
    def graph(
        self, graph: Any, *, pool: int, stream: Any, capture_error_mode: str
    ) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        assert not gc.isenabled()
        self.events.append("capture")
        self.current = stream
        if self.fails == "begin":
            raise RuntimeError("begin: out of memory")
        self.allocating.add(pool)
        self.taken[pool] = self.taken.get(pool, 0) + 1
        self.capturing = self.generator.state.capturing = True
        broken = ""
        try:
            yield
        except RuntimeError:
            broken = "body"
        self.capturing = False
        if broken or self.fails == "end":  # cudaStreamEndCapture raises
            raise RuntimeError("operation failed due to a previous error during capture\nat line 3")
        self.generator.state.capturing = False
        self.allocating.remove(pool)
        self.current = self.default

    def end_allocate(self, index: int, pool: int) -> None:
        if pool not in self.allocating:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.allocating.remove(pool)

    def release(self, index: int, pool: int) -> None:
        self.taken[pool] -= 1

    def kernel(self) -> None:
        """Run a fake kernel that draws a random number."""
        self.generator.draw(self.capturing)
        if self.capturing and self.fails == "body":
            raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    fake = Cuda()
    for name, value in {
        "current_device": lambda: 0,
        "Stream": lambda index: SimpleNamespace(wait_stream=lambda other: None),
        "graph_pool_handle": fake.pool,
        "default_generators": (fake.generator,),
        "current_stream": lambda index: fake.current,
        "set_stream": fake.set_stream,
        "stream": fake.stream,
        "device": lambda index: nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: fake.events.append("replay")),
        "graph": fake.graph,
        "memory_reserved": lambda index: (len(fake.events) + 1) << 20,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name, value in {
        "_cuda_clearCublasWorkspaces": lambda: fake.events.append("clear"),
        "_cuda_endAllocateToPool": fake.end_allocate,
        "_cuda_releasePool": fake.release,
    }.items():
        monkeypatch.setattr(torch._C, name, value, raising=False)
    monkeypatch.setattr(capture, "_failures", {})
    return fake


def test_a_capture(cuda: Cuda) -> None:
    mean = torch.zeros(2)

    def planned_for_graphs() -> bool:
        sizes = {"bags": 8, "latents": 5, "heads": 2, "head_dim": 8, "layers": 2}
        return motet.kernels.plan(300, 64, **sizes, device="H200").graph

    def run() -> Tensor:
        cuda.events.append("run")
        cuda.kernel()
        assert planned_for_graphs()  # in the warm-ups too: they compile the kernels
        mean.add_(1)
        return mean * 2

    cuda_capture = CudaCapture(torch.device("cuda"))
    first = cuda_capture.pool
    recording = cuda_capture(run, [mean])
    assert cuda.events == [*["run"] * WARM_UPS, "clear", "capture", "run", "clear"]
    assert recording.mib == 1  # the fake's memory grows by 1 MiB per event: "run" is one
    assert torch.equal(recording.result, torch.full((2,), 2.0))
    assert mean[0] == 1  # warm-ups were undone; the fake runs what it captures
    assert cuda.generator.state.offset == 0
    assert cuda.current is cuda.default
    assert gc.isenabled()
    assert cuda_capture.refused == ""
    assert not planned_for_graphs()
    recording.replay()
    assert cuda.events[-1] == "replay"
    cuda_capture.release()
    assert cuda_capture.pool != first


def test_a_collector_that_was_off_stays_off(cuda: Cuda) -> None:
    gc.disable()
    try:
        CudaCapture(CUDA)(cuda.kernel, [])
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("where", ["begin", "body", "end"])
def test_a_capture_that_fails_leaves_nothing_behind(where: str, cuda: Cuda) -> None:
    cuda_capture = CudaCapture(CUDA)
    cuda_capture(cuda.kernel, [])
    cuda.fails = where
    with pytest.raises(CaptureError, match="a capture failed: RuntimeError: (begin|operation)"):
        cuda_capture(cuda.kernel, [])
    assert cuda.current is cuda.default
    assert gc.isenabled()
    assert not cuda.allocating
    assert cuda.taken == {cuda_capture.pool: 1}  # the first capture keeps its memory
    assert not cuda.generator.state.capturing
    assert cuda.generator.state.offset == 0
    cuda.kernel()  # draws
    assert cuda.events[-1] == "clear"
    # The failure holds for the whole process: older graphs draw from the generator's old state.
    assert CudaCapture(CUDA).refused == cuda_capture.refused != ""
    assert "\n" not in cuda_capture.refused
    assert CudaCapture(torch.device("cuda", 1)).refused == ""


def test_an_interrupt_is_handed_on(cuda: Cuda) -> None:
    def run() -> None:
        if cuda.capturing:
            raise KeyboardInterrupt

    cuda_capture = CudaCapture(CUDA)
    with pytest.raises((KeyboardInterrupt, CaptureError)):
        cuda_capture(run, [])
    assert gc.isenabled()
    assert cuda.current is cuda.default


@pytest.mark.parametrize("where", ["begin", "body", "end"])
def test_steps_go_on_without_graphs(where: str, cuda: Cuda) -> None:
    """After a capture that failed, steps compute the same as if none had been tried."""
    model = healnet(ff_dropout=0.3).train()

    def loss(logits: Tensor, target: dict[str, Tensor]) -> Tensor:
        cuda.kernel()
        return loss_of(logits, target)

    steps = motet.StepGraphs(model, loss, capture=CudaCapture(CUDA))
    batch = batch_of(9, 0, 30)
    steps(batch)
    cuda.fails = where
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        if not results:
            with pytest.warns(RuntimeWarning, match="StepGraphs: a capture failed: RuntimeError"):
                results.append(steps(batch))
            continue
        results.append(steps(batch))
    assert results[0] == results[1] != results[2]
    assert steps.report()[0]["how"] == "eager"
    assert sum(steps.fell_back.values()) == 3
    assert cuda.events.count("capture") == 1
    model.eval()
    for _ in range(2):
        assert_close(graphed(steps, batch), eager(model, batch))


def assert_close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a[0], b[0])
    torch.testing.assert_close(a[1], b[1])


def test_a_model_on_cuda_is_captured_by_cuda(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models on CUDA get CudaCapture, and the reason why one without Triton gets no graph."""
    model = healnet().float()
    here = torch.device("cpu")
    monkeypatch.setattr(torch.nn.Parameter, "device", property(lambda self: CUDA), raising=False)
    steps = motet.StepGraphs(model, loss_of)
    assert isinstance(steps._graphs.capture, CudaCapture)
    assert steps._graphs.never == ""
    waits = "without Triton, torch waits for the lengths of bags"
    assert motet.CudaGraphs(model.double())._graphs.never == waits
    steps._graphs.inspect_model()
    monkeypatch.setattr(torch.nn.Parameter, "device", property(lambda self: here), raising=False)
    model.latents.data = model.latents.data.clone()
    with pytest.raises(ValueError, match="model: expected it on a CUDA device, got cpu"):
        steps._graphs.inspect_model()
