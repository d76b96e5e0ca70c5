"""Capture work on a GPU as CUDA graphs; undo everything if a capture fails.

While a graph is captured, launches are recorded, not run. The captured function must not wait for
the device, must not copy from or to pageable host memory, and must not allocate outside the graph's
memory pool. Random numbers come from the default generator, whose state torch registers with the
graph. `Capture` is the interface that `graph_cache` uses, so that tests can do without a GPU.
"""

import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..kernels.plan import for_graphs

# Number of runs before a capture. The first one compiles kernels and sets up libraries, which a
# capture does not permit.
WARM_UPS = 3
# By device index: why nothing more is captured there. A failure concerns the whole process, since
# recovery replaces the state of the generator (`_recover`), and the graphs captured before it draw
# their random numbers from the old state.
_failures: dict[int, str] = {}


class CaptureError(RuntimeError):
    """A capture failed; streams, generators and memory are as before."""


class Recording(NamedTuple):
    """A captured function."""

    replay: Callable[[], None]
    """Runs the function again on the present contents of its static tensors."""
    result: Any
    """What the function returned; every replay overwrites its tensors."""
    mib: float
    """By how many MiB the memory of all graphs grew."""


class Capture(Protocol):
    """Captures the work of a function."""

    @property
    def refused(self) -> str:
        """Why nothing can be captured; empty if captures are possible."""
        ...

    def __call__(self, run: Callable[[], Any], state: Sequence[Tensor]) -> Recording:
        """Capture `run()`; the tensors `state`, which it may change, are restored afterwards.

        Raises:
            CaptureError: the capture failed.
        """
        ...

    def release(self) -> None:
        """Take a new memory pool; called after all graphs have been dropped."""
        ...


class CudaCapture:
    """Capture on one device.

    All graphs share one memory pool, so their memory is that of the largest. This is safe since
    callers copy every result before the next replay.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.index = torch.cuda.current_device() if device.index is None else device.index
        self.stream = torch.cuda.Stream(self.index)
        self.pool = torch.cuda.graph_pool_handle()

    @property
    def refused(self) -> str:
        """Why nothing can be captured; empty if captures are possible."""
        return _failures.get(self.index, "")

    def __call__(self, run: Callable[[], Any], state: Sequence[Tensor]) -> Recording:
        """Capture `run()`; the tensors `state`, which it may change, are restored afterwards.

        Raises:
            CaptureError: the capture failed. Nothing more is captured on this device.
        """
        generator = torch.cuda.default_generators[self.index]
        clean_state = generator.clone_state()
        current, gc_was_on = torch.cuda.current_stream(self.index), gc.isenabled()
        graph = torch.cuda.CUDAGraph()
        # If the garbage collector frees an old graph during a capture, the capture fails.
        gc.collect()
        gc.disable()
        try:
            with torch.cuda.device(self.index), for_graphs():
                self._warm_up(run, state, generator)
                # cuBLAS keeps its workspaces for later calls. Those of the warm-up lie outside of
                # the graph's pool, so the capture must not use them; those of the capture lie in
                # it, so later calls must not use them. Both are cleared.
                torch._C._cuda_clearCublasWorkspaces()
                # In the mode "global" a CUDA call of any other thread, such as a data loader's,
                # would make the capture fail.
                with torch.cuda.graph(
                    graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
                ):
                    before = torch.cuda.memory_reserved(self.index)
                    result = run()
                grown = torch.cuda.memory_reserved(self.index) - before
                torch._C._cuda_clearCublasWorkspaces()
        except BaseException as error:
            self._recover(current, generator, clean_state)
            lines = str(error).splitlines() or [""]
            _failures[self.index] = f"a capture failed: {type(error).__name__}: {lines[0]}"
            if not isinstance(error, Exception):
                raise
            raise CaptureError(self.refused) from error
        finally:
            if gc_was_on:
                gc.enable()
        return Recording(graph.replay, result, grown / 2**20)

    def release(self) -> None:
        """Take a new memory pool; called after all graphs have been dropped."""
        self.pool = torch.cuda.graph_pool_handle()  # torch frees a pool with its last graph

    def _warm_up(
        self, run: Callable[[], Any], state: Sequence[Tensor], generator: torch.Generator
    ) -> None:
        """Run it on the capture's stream; restore `state` and the generator afterwards."""
        random_state, copies = generator.get_state(), [tensor.clone() for tensor in state]
        current = torch.cuda.current_stream(self.index)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                run()
        current.wait_stream(self.stream)
        generator.set_state(random_state)
        for tensor, value in zip(state, copies, strict=True):
            tensor.copy_(value)

    def _recover(
        self, current: Any, generator: torch.Generator, clean_state: torch.Generator
    ) -> None:
        """Undo what a failed capture leaves; torch's context manager does only a part of it."""
        torch.cuda.set_stream(current)
        # The old state may stay marked as "being captured", and would then refuse to draw.
        generator.graphsafe_set_state(clean_state)
        # RuntimeError: the capture had not begun to use the pool, or had ended.
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self.index, self.pool)
            torch._C._cuda_releasePool(self.index, self.pool)  # taken at its beginning
        torch._C._cuda_clearCublasWorkspaces()
