"""Training and evaluation steps as CUDA graphs.

A step is some hundred small kernels, and the host needs longer to launch them than the GPU to run
them. A CUDA graph launches all of them at once. It can be replayed for every batch of the same
sizes, since the kernels then do not depend on the batch. Sizes are rounded up to buckets, so that
ragged batches share graphs.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Capture
from .context import Context, ModalityInput
from .graph_cache import GraphCache, uncached_autocast
from .graph_inputs import (
    Model,
    compute_latents,
    copy_all,
    make_graph_inputs,
    read_batches,
    read_patients,
)
from .lego_block import LegoBlock
from .patients import PatientBatch

Loss = Callable[[Tensor, dict[str, Tensor]], Tensor]


def logits_of(model: nn.Module, batch: PatientBatch) -> Tensor:
    """Return the logits [B, K] of any of motet's models; a LegoBlock's batch has one modality."""
    inputs, options = batch.arguments()
    if isinstance(model, LegoBlock):
        ((name, x),) = inputs.items()
        logits = model(x, **{key: value.get(name) for key, value in options.items()})
    else:
        logits = model(inputs, **options)
    return _widen(logits)


class StepGraphs:
    """Compute the loss of a batch and all gradients as one CUDA graph.

    The graph holds everything that has weights: projections, layers, head, loss, backward pass, L1.
    The second call with the same sizes captures it, later calls replay it. The first call runs the
    same kernels on the same tensors without a graph. Bags are packed and their number of tokens is
    rounded up to a bucket (at most 6.25 % or 127 tokens more), so that ragged batches share graphs.
    Training and evaluation, each set of frozen parameters and each precision of autocast have their
    own graphs.

    Some calls cannot be captured and run without a graph: encoders other than SNN and ABMIL, and
    these two for ragged, masked or missing bags; a LegoMerge whose rows miss modalities; hooks;
    several processes; more than `max_graphs` sizes; every call after a capture that failed. A
    warning says so once, and `report` counts them.

    Args:
        model: on a CUDA device. Its parameters may change in place, as optimisers change them;
            after a move or a conversion, graphs are captured anew.
        loss: a function of logits [B, K] (float32 or float64) and a batch's targets: the `loss` of
            an objective, or another function that never waits for the device.
        autocast: dtype of torch.autocast to compute in; None for the autocast of the caller.
        l1: weight of `l1_penalty`; its gradient is added, its value is not part of the loss.
        max_graphs: the largest number of sizes that are captured.
        capture: what captures, instead of CUDA.

    Raises:
        TypeError: something that is none of motet's models.
        ValueError: a model that is not on a CUDA device, or an argument outside its range.

    Note:
        Gradients are written, not added: a call replaces those in `.grad`. They lie in the same
        tensors from call to call; to keep one, clone it. If no patient of a batch has a modality,
        the `.grad` of that modality's parameters is None, as after a step without a graph; with L1
        it is the gradient of L1. The memory of the largest step stays reserved.

    Example:
        >>> model = motet.HEALNet({"wsi": motet.Bag(32)}, out_features=4)
        >>> motet.StepGraphs(model, lambda logits, target: logits.sum())
        Traceback (most recent call last):
        ValueError: model: expected it on a CUDA device, got cpu
    """

    def __init__(
        self,
        model: Model,
        loss: Loss,
        *,
        autocast: torch.dtype | None = None,
        l1: float = 0.0,
        max_graphs: int = 16,
        capture: Capture | None = None,
    ) -> None:
        self.loss, self.autocast, self.l1 = loss, autocast, l1
        self._graphs = GraphCache(type(self).__name__, model, max_graphs, capture)
        self._gradients: dict[int, Tensor] = {}

    @property
    def model(self) -> Model:
        return self._graphs.model

    def __call__(self, batch: PatientBatch, *, scale: Tensor | None = None) -> Tensor:
        """Return the loss of a batch, detached, on the device; leave the gradients in `.grad`.

        Nothing waits for the device, except where bags have to be cut apart: for a spectrum as
        context, and for an encoder with ragged bags.

        Args:
            batch: of patients, on the model's device.
            scale: a scalar on the device by which all gradients are multiplied, for float16; the
                loss that is returned is not.

        Raises:
            ValueError: a batch that does not fit the model, or a model with nothing to train.
            TypeError: something in the batch that is not a tensor.
        """
        graphs = self._graphs
        state = graphs.inspect_model()
        if state.moved:
            self._gradients.clear()
        trained = [p for p in state.parameters if p.requires_grad]
        if not trained:
            raise ValueError("model: expected at least one trainable parameter, got none")
        reason = graphs.never or state.hooks or _why_several_processes()
        if not reason:
            with torch.no_grad(), self._autocast():
                inputs = make_graph_inputs(self.model, read_patients(self.model, batch))
            if not isinstance(inputs, str):
                # "" is no name of a target, so the scale of the loss travels under it.
                extra = dict(batch.target) | ({} if scale is None else {"": scale})
                key = (tuple(p.requires_grad for p in state.parameters), self._dtype())

                def compute(
                    rows: int, read: Mapping[str, Context | ModalityInput], extra: dict[str, Tensor]
                ) -> Any:
                    static_scale = extra.pop("", None)
                    return self._step(rows, read, extra, static_scale, trained)

                loss, has_gradient = graphs.call(state, key, inputs, extra, compute)
                for parameter in state.parameters:
                    parameter.grad = None
                for parameter, has in zip(trained, has_gradient, strict=True):
                    parameter.grad = self._gradients[id(parameter)] if has else None
                return loss.clone()  # the next replay overwrites the static loss
            reason = inputs
        graphs.note_fallback(reason)
        for parameter in state.parameters:
            parameter.grad = None
        return self._step_without_graph(batch, scale, trained)

    def report(self) -> list[dict[str, Any]]:
        """Return one dict for all calls of the same sizes.

        `sizes`, `how` ("graph" or "eager"), `why` (the reason for "eager"), `calls`, `replays`, and
        `mib`, the memory of the graph. `sizes` is empty for calls that cannot be captured at all.
        """
        return self._graphs.report()

    @property
    def fell_back(self) -> dict[str, int]:
        """Number of calls without a graph by reason; first calls of new sizes are not counted."""
        return dict(self._graphs.fell_back)

    def _dtype(self) -> torch.dtype | None:
        return self.autocast or self._graphs.autocast_dtype()

    def _autocast(self) -> torch.autocast:
        return uncached_autocast(self._graphs.device, self._dtype())

    def _step(
        self,
        rows: int,
        read: Mapping[str, Context | ModalityInput],
        target: dict[str, Tensor],
        scale: Tensor | None,
        trained: Sequence[nn.Parameter],
    ) -> tuple[Tensor, tuple[bool, ...]]:
        """Write all gradients; return the loss, and for each parameter whether it has a gradient.

        This is what a graph captures. autograd allocates gradients in the graph's memory pool,
        which all graphs share and whose contents no call may rely on afterwards. So they are copied
        to tensors outside of the pool, which all graphs of the model write (`_gradients`).
        """
        with torch.enable_grad():
            with self._autocast():
                logits = _widen(_compute_logits(self.model, rows, read))
                loss = self.loss(logits, target)
            scaled = loss if scale is None else loss * scale
            with uncached_autocast(self._graphs.device, None):
                gradients = torch.autograd.grad(scaled, trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            if id(parameter) not in self._gradients and (self.l1 or gradient is not None):
                self._gradients[id(parameter)] = torch.zeros_like(parameter)
        pairs = [
            (self._gradients[id(parameter)], gradient)
            for parameter, gradient in zip(trained, gradients, strict=True)
            if gradient is not None
        ]
        copy_all((target for target, _ in pairs), (gradient for _, gradient in pairs))
        if not self.l1:
            return loss.detach(), tuple(gradient is not None for gradient in gradients)
        for parameter, gradient in zip(trained, gradients, strict=True):
            if gradient is None:
                self._gradients[id(parameter)].zero_()
        _add_signs([self._gradients[id(p)] for p in trained], trained, self.l1, scale)
        return loss.detach(), (True,) * len(trained)

    def _step_without_graph(
        self, batch: PatientBatch, scale: Tensor | None, trained: Sequence[nn.Parameter]
    ) -> Tensor:
        device = self._graphs.device
        cast = nullcontext()
        if self.autocast is not None:
            cast = torch.autocast(device.type, self.autocast)
        with torch.enable_grad():
            with cast:
                loss = self.loss(logits_of(self.model, batch), batch.target)
            with uncached_autocast(device, None):
                (loss if scale is None else loss * scale).backward()
        if self.l1:
            add_l1(trained, self.l1, scale)
        return loss.detach()


class CudaGraphs:
    """Call a model without gradients, with everything that has weights as one CUDA graph.

    `StepGraphs`, which is for training, says how sizes are rounded and what cannot be captured.

    Args:
        model: on a CUDA device. Its parameters may change in place; after a move or a conversion,
            graphs are captured anew.
        max_graphs: the largest number of sizes that are captured.
        capture: what captures, instead of CUDA.

    Raises:
        TypeError: something that is none of motet's models.
        ValueError: a model that is not on a CUDA device, or an argument outside its range.

    Example:
        >>> model = motet.HEALNet({"wsi": motet.Bag(32)}, out_features=4)
        >>> motet.CudaGraphs(model)
        Traceback (most recent call last):
        ValueError: model: expected it on a CUDA device, got cpu
    """

    def __init__(
        self, model: Model, *, max_graphs: int = 16, capture: Capture | None = None
    ) -> None:
        self._graphs = GraphCache(type(self).__name__, model, max_graphs, capture)

    @property
    def model(self) -> Model:
        return self._graphs.model

    def __call__(
        self,
        inputs: Any,
        *,
        masks: Any = None,
        present: Any = None,
        coords: Any = None,
        statistics: Any = None,
    ) -> Tensor:
        """Predict logits [B, out_features]; arguments and errors as of HEALNet.forward.

        A LegoBlock takes a dict or a sequence as well, of its one modality "x".

        Raises:
            RuntimeError: autograd is on, and a parameter requires a gradient.
        """
        graphs, model = self._graphs, self.model
        state = graphs.inspect_model()
        if torch.is_grad_enabled() and any(p.requires_grad for p in state.parameters):
            raise RuntimeError(
                "CudaGraphs: expected to be called under torch.no_grad(), since it has no "
                "gradients; motet.StepGraphs has"
            )
        options = {
            "masks": masks,
            "present": present,
            "coords": coords,
            "statistics": statistics,
        }
        # A tensor made in inference mode can be written in inference mode only. The static tensors
        # are written in later calls too, so they are made outside of it.
        with torch.inference_mode(False), torch.no_grad():
            reason = graphs.never or state.hooks
            if not reason:
                graph_inputs = make_graph_inputs(model, read_batches(model, inputs, options))
                if not isinstance(graph_inputs, str):
                    dtype = graphs.autocast_dtype()

                    def compute(
                        rows: int, read: Mapping[str, Context | ModalityInput], _: Any
                    ) -> Tensor:
                        with uncached_autocast(graphs.device, dtype):
                            return _compute_logits(model, rows, read)

                    return graphs.call(state, (dtype,), graph_inputs, {}, compute).clone()
                reason = graph_inputs
            graphs.note_fallback(reason)
            if isinstance(model, LegoBlock):
                (x,) = inputs.values() if isinstance(inputs, Mapping) else inputs
                options["mask"] = options.pop("masks")
                return model(x, **{key: _only_value(value) for key, value in options.items()})
            return model(inputs, **options)

    def report(self) -> list[dict[str, Any]]:
        """Return what `StepGraphs.report` returns."""
        return self._graphs.report()


def add_l1(parameters: Sequence[nn.Parameter], l1: float, scale: Tensor | None = None) -> None:
    """Add the gradient of `l1 * l1_penalty`, that is l1 · sign(w), to the `.grad` of parameters.

    A few launches serve all parameters; autograd would need several for each of them.
    """
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    _add_signs(gradients, parameters, l1, scale)


def _add_signs(
    gradients: Sequence[Tensor],
    parameters: Sequence[nn.Parameter],
    l1: float,
    scale: Tensor | None,
) -> None:
    values = [parameter.detach() for parameter in parameters]
    signs = torch._foreach_sign(values)  # pyright: ignore[reportPrivateImportUsage]
    if scale is not None:
        torch._foreach_mul_(signs, scale)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_add_(  # pyright: ignore[reportPrivateImportUsage]
        list(gradients), signs, alpha=l1
    )


def _compute_logits(model: Model, rows: int, read: Mapping[str, Context | ModalityInput]) -> Tensor:
    latents = compute_latents(model, rows, read)
    real = latents.real.contiguous() if latents.is_complex() else latents
    return real if model.head is None else model.head(real)


def _widen(logits: Tensor) -> Tensor:
    """Return logits in float32 or wider, the precision in which losses are computed."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _only_value(value: Any) -> Any:
    """Return the one value of a dict or a sequence; None for None."""
    if value is None:
        return None
    return value.get("x") if isinstance(value, Mapping) else value[0]


def _why_several_processes() -> str:
    distributed = torch.distributed
    several = distributed.is_available() and distributed.is_initialized()
    return "several processes exchange gradients" if several else ""
