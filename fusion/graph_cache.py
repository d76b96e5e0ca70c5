"""The graphs of one model: one per set of sizes, all on the same static tensors.

A call is looked up by its key: sizes, dtypes, training mode of every module, and what the caller
adds (trained parameters, precision). The first call with a key runs without a graph, the second one
is captured, all later ones replay. A graph holds the addresses of parameters, static tensors and
results. So all graphs are dropped when parameters move, when a static tensor has to grow, and when
a capture failed.
"""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .._checks import integer
from ..kernels.backends import on_triton
from .capture import Capture, CaptureError, CudaCapture, Recording
from .context import Context, ModalityInput
from .graph_inputs import GraphInput, Model, StaticTensors, copy_all, find_obstacle

# The function that a graph captures: number of rows, static inputs of each modality and further
# static tensors, to any result.
Computation = Callable[[int, Mapping[str, Context | ModalityInput], dict[str, Tensor]], Any]


def uncached_autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Return autocast to `dtype`, or autocast turned off if it is None; without its weight cache.

    Autocast keeps converted weights until its outermost context ends. A graph needs the memory that
    it reads for as long as it exists, so it converts the weights itself in every replay.
    """
    if dtype is None:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype, cache_enabled=False)


class ModelState(NamedTuple):
    """What a call finds out about the model."""

    training: tuple[bool, ...]
    """The training mode of every module."""
    parameters: list[nn.Parameter]
    moved: bool
    """Whether the addresses of the parameters changed since the last call."""
    hooks: str
    """Why hooks forbid a graph; empty without hooks."""


@dataclass
class _GraphEntry:
    """The calls with one key and, once captured, their graph."""

    sizes: str
    calls: int = 0
    replays: int = 0
    recording: Recording | None = None
    reason: str = "sizes seen once are not captured"
    """Why there is no graph (while `recording` is None)."""


class GraphCache:
    """Run computations of one model: without a graph at first, then as a CUDA graph per key.

    Args:
        name: the class that warnings name.
        model: see `StepGraphs`.
        max_graphs: the largest number of graphs.
        capture: what captures, instead of CUDA.

    Raises:
        TypeError: something that is none of motet's models.
        ValueError: a model that is not on a CUDA device, or a number out of its range.
    """

    def __init__(
        self, name: str, model: Model, max_graphs: int, capture: Capture | None = None
    ) -> None:
        if not isinstance(model, get_args(Model)):
            raise TypeError(
                "model: expected a HEALNet, LegoBlock, LegoMerge or LegoFuse, got "
                f"{type(model).__name__}"
            )
        self.device = next(model.parameters()).device
        self.name, self.model, self._custom_capture = name, model, capture
        self._check_device()
        self.max_graphs = integer("max_graphs", max_graphs)
        self.never = find_obstacle(model)  # why nothing is ever captured; empty if it may be
        if capture is None and not on_triton("auto", "cuda", next(model.parameters()).dtype):
            self.never = "without Triton, torch waits for the lengths of bags"
        if os.environ.get("MOTET_CHECK") == "1":
            self.never = "MOTET_CHECK=1 reads the values of tensors"
        self.capture: Capture = capture or CudaCapture(self.device)
        self.fell_back: Counter[str] = Counter()
        self._entries: dict[Any, _GraphEntry] = {}
        self._static = StaticTensors(self.device)
        self._addresses: tuple[int, ...] = ()

    def inspect_model(self) -> ModelState:
        """Return the state of the model; drop all graphs if its parameters moved.

        Every call does this, so it is one pass over the modules.
        """
        training: list[bool] = []
        parameters: dict[int, nn.Parameter] = {}
        hooked = any(getattr(torch_module, name) for name in _GLOBAL_HOOKS)
        for module in self.model.modules():
            training.append(module.training)
            hooked = bool(
                hooked
                or module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
            )
            for parameter in module._parameters.values():
                if parameter is not None:
                    parameters[id(parameter)] = parameter
        distinct: list[Any] = list(parameters.values())
        hooked = hooked or any(p._backward_hooks or p._post_accumulate_grad_hooks for p in distinct)
        addresses = tuple(parameter.data_ptr() for parameter in distinct)
        moved = addresses != self._addresses
        if moved:
            self._drop_graphs()
            self._entries.clear()
            self._addresses = addresses
            if distinct[0].device != self.device:
                self.device = distinct[0].device
                self._check_device()
                self.capture = self._custom_capture or CudaCapture(self.device)
            self._static = StaticTensors(self.device)
        reason = "hooks would not be called in a graph" if hooked else ""
        return ModelState(tuple(training), distinct, moved, reason)

    def autocast_dtype(self) -> torch.dtype | None:
        """Return the dtype of the autocast context of the caller; None without one."""
        kind = self.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def call(
        self,
        state: ModelState,
        key: tuple[Any, ...],
        inputs: Mapping[str, GraphInput],
        extra: Mapping[str, Tensor],
        compute: Computation,
    ) -> Any:
        """Copy the inputs into static tensors; return `compute(rows, read, extra)` of these.

        The first call with a key runs on the static tensors too, so that it gives the same bits as
        a replay.

        Args:
            state: what `inspect_model` returned.
            key: what tells computations apart, other than sizes and training modes.
            inputs: of each modality.
            extra: further tensors (targets, scale of the loss); their sizes are not rounded.
            compute: the computation to capture. It must not wait for the device, nor derive a shape
                from the values of a tensor: either makes a capture fail.
        """
        sizes = {
            (name, field): (shape, x.tensors[field].dtype)
            for name, x in inputs.items()
            for field, shape in x.shapes.items()
        }
        sizes |= {("", name): (tuple(x.shape), x.dtype) for name, x in extra.items()}
        # A graph whose static tensors move would read freed memory. After a failed capture the
        # graphs of this process are dropped as well, see `capture`.
        if self._static.must_grow(sizes) or self.capture.refused:
            self._drop_graphs()
        self._static.reserve(sizes)
        static = {name: self._static.view(name, *size) for name, size in sizes.items()}
        sources = [tensor for x in inputs.values() for tensor in x.tensors.values()]
        with torch.no_grad():
            copy_all(static.values(), [*sources, *extra.values()])
        read = {
            name: x.with_tensors({field: static[name, field] for field in x.tensors})
            for name, x in inputs.items()
        }
        rows = _rows(next(iter(read.values())))
        static_extra = {name: static["", name] for name in extra}
        input_keys = tuple((name, x.key) for name, x in inputs.items())
        extra_keys = tuple((name, *sizes["", name]) for name in extra)
        full_key = (*key, state.training, rows, input_keys, extra_keys)
        if full_key not in self._entries:
            description = _describe_sizes(rows, inputs, state.training[0])
            self._entries[full_key] = _GraphEntry(description)
        entry = self._entries[full_key]
        return self._replay_or_run(entry, lambda: compute(rows, read, dict(static_extra)))

    def note_fallback(self, reason: str) -> None:
        """Count a call that runs without a graph; warn at the first one of each reason."""
        if not self.fell_back[reason]:
            warnings.warn(
                f"{self.name}: {reason}; such calls run without a CUDA graph", RuntimeWarning,
                stacklevel=3,
            )  # fmt: skip
        self.fell_back[reason] += 1

    def report(self) -> list[dict[str, Any]]:
        """Return one dict for every key, and one for every reason why calls had no key."""
        by_key = [
            {
                "sizes": entry.sizes,
                "how": "graph" if entry.recording else "eager",
                "why": "" if entry.recording else entry.reason,
                "calls": entry.calls,
                "replays": entry.replays,
                "mib": entry.recording.mib if entry.recording else 0.0,
            }
            for entry in self._entries.values()
        ]
        reasons = {entry["why"] for entry in by_key}
        return by_key + [
            {"sizes": "", "how": "eager", "why": reason, "calls": n, "replays": 0, "mib": 0.0}
            for reason, n in self.fell_back.items()
            if reason not in reasons
        ]

    def _check_device(self) -> None:
        if self._custom_capture is None and self.device.type != "cuda":
            raise ValueError(f"model: expected it on a CUDA device, got {self.device}")

    def _replay_or_run(self, entry: _GraphEntry, compute: Callable[[], Any]) -> Any:
        entry.calls += 1
        if entry.recording is None and entry.calls > 1:
            self._record(entry, compute)
        if entry.recording is None:
            return compute()
        entry.recording.replay()
        entry.replays += 1
        return entry.recording.result

    def _record(self, entry: _GraphEntry, compute: Callable[[], Any]) -> None:
        """Capture `compute`, or note why it is not captured."""
        if self.capture.refused:
            entry.reason = self.capture.refused
        elif sum(e.recording is not None for e in self._entries.values()) >= self.max_graphs:
            entry.reason = f"more than {self.max_graphs} sizes"
        else:
            try:
                entry.recording = self.capture(compute, list(self.model.buffers()))
                return
            except CaptureError as error:
                self._drop_graphs()
                entry.reason = str(error)
        self.note_fallback(entry.reason)

    def _drop_graphs(self) -> None:
        """Give up all graphs, and with the last one the memory that they share."""
        if any(entry.recording for entry in self._entries.values()):
            for entry in self._entries.values():
                entry.recording = None
            self.capture.release()


_GLOBAL_HOOKS = (
    "_global_forward_hooks", "_global_forward_pre_hooks",
    "_global_backward_hooks", "_global_backward_pre_hooks",
)  # fmt: skip


def _rows(read: Context | ModalityInput) -> int:
    if isinstance(read, ModalityInput):
        return read.rows
    return len(read.tokens) if read.offsets is None else len(read.offsets) - 1


def _describe_sizes(rows: int, inputs: Mapping[str, GraphInput], training: bool) -> str:
    """Return the sizes of a key in words, for `report`."""
    parts = []
    for name, graph_input in inputs.items():
        shape = graph_input.shapes["tokens" if graph_input.kind is Context else "x"]
        parts.append(f"{name} {' x '.join(map(str, shape))}")
    return f"{rows} rows: {', '.join(parts)}{'' if training else ' (evaluation)'}"
