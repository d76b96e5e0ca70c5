"""Captures work on a GPU as CUDA graphs, and leaves nothing behind where that fails.

`Capture` is what `graphs` asks for, so that tests can stand in for the GPU.
"""

import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..kernels.plan import for_graphs

# Runs before a capture: kernels are compiled, and libraries set up, at the first of them.
WARM_UPS = 3
# Why nothing more is captured on a device, by its number. A failure concerns the whole process: the
# graphs that it has draw their random numbers from the state of the generator that was given up.
_failures: dict[int, str] = {}


class CaptureError(RuntimeError):
    """A capture failed; everything is as it was before."""


class Recording(NamedTuple):
    """What was captured."""

    replay: Callable[[], None]
    """Runs it again, on whatever is in its tensors by then."""
    result: Any
    """What the captured function returned; every replay writes its tensors anew."""
    mib: float
    """By how much the memory of all graphs grew."""


class Capture(Protocol):
    """Captures a function's work."""

    @property
    def refused(self) -> str:
        """Why nothing can be captured; empty if it can."""
        ...

    def __call__(self, run: Callable[[], Any], state: Sequence[Tensor]) -> Recording:
        """Capture `run()`, which may change the tensors `state`: they are put back.

        Raises:
            CaptureError: it failed.
        """
        ...

    def release(self) -> None:
        """Begin anew: the graphs that there were have been dropped."""
        ...


class CudaCapture:
    """Capture on one device, all graphs in one pool of memory: no tensor of theirs outlives a call.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.index = torch.cuda.current_device() if device.index is None else device.index
        self.stream = torch.cuda.Stream(self.index)
        self.pool = torch.cuda.graph_pool_handle()

    @property
    def refused(self) -> str:
        """Why nothing can be captured; empty if it can."""
        return _failures.get(self.index, "")

    def __call__(self, run: Callable[[], Any], state: Sequence[Tensor]) -> Recording:
        """Capture `run()`, which may change the tensors `state`: they are put back.

        Raises:
            CaptureError: it failed. Nothing more is captured on the device then.
        """
        generator = torch.cuda.default_generators[self.index]
        clean = generator.clone_state()
        current, collects = torch.cuda.current_stream(self.index), gc.isenabled()
        graph = torch.cuda.CUDAGraph()
        # A graph that is collected during the capture of another spoils that one.
        gc.collect()
        gc.disable()
        try:
            with torch.cuda.device(self.index), for_graphs():
                self._warm_up(run, state, generator)
                # The workspaces that the capture finds would not belong to the graph's pool, and
                # those that it leaves do.
                torch._C._cuda_clearCublasWorkspaces()
                # In the mode "global" other threads, that of a data loader say, would spoil it.
                with torch.cuda.graph(
                    graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
                ):
                    before = torch.cuda.memory_reserved(self.index)
                    result = run()
                grown = torch.cuda.memory_reserved(self.index) - before
                torch._C._cuda_clearCublasWorkspaces()
        except BaseException as error:
            self._recover(current, generator, clean)
            said = str(error).splitlines() or [""]
            _failures[self.index] = f"a capture failed: {type(error).__name__}: {said[0]}"
            if not isinstance(error, Exception):
                raise
            raise CaptureError(self.refused) from error
        finally:
            if collects:
                gc.enable()
        return Recording(graph.replay, result, grown / 2**20)

    def release(self) -> None:
        """Begin anew: the graphs that there were have been dropped, and their memory with them."""
        self.pool = torch.cuda.graph_pool_handle()  # torch gives a pool back with its last graph

    def _warm_up(
        self, run: Callable[[], Any], state: Sequence[Tensor], generator: torch.Generator
    ) -> None:
        """Run it as the capture will; put back what that changed, random numbers included."""
        drawn, kept = generator.get_state(), [tensor.clone() for tensor in state]
        current = torch.cuda.current_stream(self.index)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                run()
        current.wait_stream(self.stream)
        generator.set_state(drawn)
        for tensor, value in zip(state, kept, strict=True):
            tensor.copy_(value)

    def _recover(self, current: Any, generator: torch.Generator, clean: torch.Generator) -> None:
        """Undo what a broken capture leaves, since torch's context manager gives up half-way."""
        torch.cuda.set_stream(current)
        # The old state may say for ever that it is being captured, and refuse to draw.
        generator.graphsafe_set_state(clean)
        with suppress(RuntimeError):  # which says that the capture had not begun, or had ended
            torch._C._cuda_endAllocateToPool(self.index, self.pool)
            torch._C._cuda_releasePool(self.index, self.pool)  # which its begin had taken
        torch._C._cuda_clearCublasWorkspaces()
