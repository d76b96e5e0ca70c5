"""Replaces CUDA in tests of captures: a replay runs the captured function again."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from motet.fusion.capture import CaptureError, Recording
from torch import Tensor


class FakeCapture:
    """Behaves as a capture of a CUDA graph, as far as a CPU can.

    A replay reads the tensors of the capture and overwrites the tensors of its result.

    Args:
        fails: message of the error that each capture raises; if empty, captures succeed.
    """

    def __init__(self, fails: str = "") -> None:
        self.fails, self.refused = fails, ""
        self.captured = self.forgotten = 0

    def __call__(self, run: Callable[[], Any], state: Sequence[Tensor]) -> Recording:
        if self.fails:
            self.refused = self.fails
            raise CaptureError(self.fails)
        self.captured += 1
        with torch.random.fork_rng():  # a capture draws no random numbers
            result = run()
        return Recording(lambda: _write(result, run()), result, 1.5)

    def release(self) -> None:
        self.forgotten += 1


def _write(into: Any, of: Any) -> None:
    """Copy the tensors of one result into those of another."""
    if isinstance(into, Tensor):
        into.copy_(of)
    elif isinstance(into, tuple):
        for item, source in zip(into, of, strict=True):
            _write(item, source)
    else:
        assert into == of  # a graph can change only tensors
