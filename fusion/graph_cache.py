"""Graphs of one model by the sizes of its batches, in static tensors that they share."""

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
from .graph_inputs import Buffers, Given, Model, copy_all, why_never

# Rows, what is read of each modality, and further tensors, to whatever the computation returns.
Run = Callable[[int, Mapping[str, Context | ModalityInput], dict[str, Tensor]], Any]


def precision(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Return autocast to a dtype, or none at all, without its cache.

    Weights that autocast has converted are kept for later; a graph cannot rely on them.
    """
    if dtype is None:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype, cache_enabled=False)


class Now(NamedTuple):
    """A model as a call finds it."""

    training: tuple[bool, ...]
    """Of every module."""
    parameters: list[nn.Parameter]
    moved: bool
    """Whether parameters lie elsewhere than at the last call."""
    hooks: str
    """Why hooks rule a graph out; empty without any."""


@dataclass
class _Entry:
    """The calls of one key."""

    sizes: str
    calls: int = 0
    replays: int = 0
    recording: Recording | None = None
    why: str = "sizes seen once are not captured"


class GraphCache:
    """Run computations of one model: at the first sight of their sizes as they are, then as graphs.

    Args:
        name: of whom warnings speak.
        model: see `StepGraphs`.
        max_graphs: how many keys are captured at most.
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
        self.name, self.model, self._given = name, model, capture
        self._check_device()
        self.max_graphs = integer("max_graphs", max_graphs)
        self.never = why_never(model)
        if capture is None and not on_triton("auto", "cuda", next(model.parameters()).dtype):
            self.never = "what torch computes instead of Triton waits for the lengths of bags"
        if os.environ.get("MOTET_CHECK") == "1":
            self.never = "MOTET_CHECK=1 looks at values"
        self.capture: Capture = capture or CudaCapture(self.device)
        self.fell_back: Counter[str] = Counter()
        self._entries: dict[Any, _Entry] = {}
        self._buffers = Buffers(self.device)
        self._addresses: tuple[int, ...] = ()

    def look(self) -> Now:
        """Look at the model; drop all graphs if its parameters lie elsewhere than before."""
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
        every: list[Any] = list(parameters.values())
        hooked = hooked or any(p._backward_hooks or p._post_accumulate_grad_hooks for p in every)
        addresses = tuple(parameter.data_ptr() for parameter in every)
        moved = addresses != self._addresses
        if moved:
            self._drop()
            self._entries.clear()
            self._addresses = addresses
            if every[0].device != self.device:
                self.device = every[0].device
                self._check_device()
                self.capture = self._given or CudaCapture(self.device)
            self._buffers = Buffers(self.device)
        why = "hooks would not be called in a graph" if hooked else ""
        return Now(tuple(training), every, moved, why)

    def ambient(self) -> torch.dtype | None:
        """Return the dtype of the autocast that holds here; None without one."""
        kind = self.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def call(
        self,
        now: Now,
        key: tuple[Any, ...],
        given: Mapping[str, Given],
        more: Mapping[str, Tensor],
        run: Run,
    ) -> Any:
        """Return `run(rows, read, more)` of static tensors that these are copied to.

        Args:
            now: what `look` returned.
            key: what tells computations apart, other than sizes and modes.
            given: of each modality.
            more: further tensors, in their own sizes.
            run: the computation, which waits for nothing and makes no shape of its values.
        """
        wanted = {
            (name, field): (shape, own.tensors[field].dtype)
            for name, own in given.items()
            for field, shape in own.shapes.items()
        }
        wanted |= {("", name): (tuple(x.shape), x.dtype) for name, x in more.items()}
        if self._buffers.moves(wanted) or self.capture.refused:
            self._drop()
        self._buffers.fit(wanted)
        static = {name: self._buffers.view(name, *size) for name, size in wanted.items()}
        sources = [x for own in given.values() for x in own.tensors.values()]
        with torch.no_grad():
            copy_all(static.values(), [*sources, *more.values()])
        read = {
            name: own.made_of({field: static[name, field] for field in own.tensors})
            for name, own in given.items()
        }
        rows = _rows(next(iter(read.values())))
        further = {name: static["", name] for name in more}
        sizes = tuple((name, own.key) for name, own in given.items())
        others = tuple((name, *wanted["", name]) for name in more)
        whole = (*key, now.training, rows, sizes, others)
        if whole not in self._entries:
            self._entries[whole] = _Entry(_said(rows, given, now.training[0]))
        return self._run(self._entries[whole], lambda: run(rows, read, dict(further)))

    def fall_back(self, why: str) -> None:
        """Note that a call runs without a graph; warn the first time."""
        if not self.fell_back[why]:
            warnings.warn(
                f"{self.name}: {why}; such calls run without a CUDA graph", RuntimeWarning,
                stacklevel=3,
            )  # fmt: skip
        self.fell_back[why] += 1

    def report(self) -> list[dict[str, Any]]:
        """Return what is known of every key, and of the calls that have none."""
        known = [
            {
                "sizes": entry.sizes,
                "how": "graph" if entry.recording else "eager",
                "why": "" if entry.recording else entry.why,
                "calls": entry.calls,
                "replays": entry.replays,
                "mib": entry.recording.mib if entry.recording else 0.0,
            }
            for entry in self._entries.values()
        ]
        kept = {entry["why"] for entry in known}
        return known + [
            {"sizes": "", "how": "eager", "why": why, "calls": n, "replays": 0, "mib": 0.0}
            for why, n in self.fell_back.items()
            if why not in kept
        ]

    def _check_device(self) -> None:
        if self._given is None and self.device.type != "cuda":
            raise ValueError(f"model: expected it on a CUDA device, got {self.device}")

    def _run(self, entry: _Entry, run: Callable[[], Any]) -> Any:
        entry.calls += 1
        if entry.recording is None and entry.calls > 1:
            self._record(entry, run)
        if entry.recording is None:
            return run()
        entry.recording.replay()
        entry.replays += 1
        return entry.recording.result

    def _record(self, entry: _Entry, run: Callable[[], Any]) -> None:
        """Capture `run`, or note why it is not."""
        if self.capture.refused:
            entry.why = self.capture.refused
        elif sum(own.recording is not None for own in self._entries.values()) >= self.max_graphs:
            entry.why = f"more than {self.max_graphs} sizes"
        else:
            try:
                entry.recording = self.capture(run, list(self.model.buffers()))
                return
            except CaptureError as error:
                self._drop()
                entry.why = str(error)
        self.fall_back(entry.why)

    def _drop(self) -> None:
        """Give up all graphs."""
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


def _said(rows: int, given: Mapping[str, Given], training: bool) -> str:
    """Return the sizes of a key for people."""
    parts = []
    for name, own in given.items():
        shape = own.shapes["tokens" if own.kind is Context else "x"]
        parts.append(f"{name} {' x '.join(map(str, shape))}")
    return f"{rows} rows: {', '.join(parts)}{'' if training else ' (evaluation)'}"
