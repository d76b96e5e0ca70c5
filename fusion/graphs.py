"""CUDA graphs of whole steps, for which a GPU otherwise waits on launches.

A step is some hundred small kernels whatever the bags hold, as long as sizes are the same, and the
host needs longer to launch them than the GPU to run them. A graph launches them all at once. Sizes
are rounded up to buckets, so that ragged batches share graphs.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Capture
from .context import Context, ModalityInput
from .graph_cache import GraphCache, precision
from .graph_inputs import Model, copy_all, given_of, latents_from, read_batches, read_patients
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
    return _widened(logits)


class StepGraphs:
    """Compute the loss of a batch and all gradients as one CUDA graph.

    Everything that has weights is in it: projections, layers, head, loss, backward pass, L1. Sizes
    that come a second time are captured, later calls with them replay the graph. Bags are packed
    and their tokens rounded up to buckets (at most 6.25 %, or 127 tokens, more), so that ragged
    batches share graphs; training and evaluation, frozen parameters and every precision of autocast
    have their own. The first call with new sizes runs the same kernels on the same tensors.

    What cannot be captured runs as without: encoders other than SNN and ABMIL, and these two for
    ragged, masked or missing bags; a LegoMerge whose rows miss modalities; hooks; several
    processes; more than `max_graphs` sizes; all that comes after a capture that failed. A warning
    says so once, `report` says how often.

    Args:
        model: on a CUDA device. Its parameters may change in place, as optimisers change them;
            after a move or a conversion, graphs are captured anew.
        loss: of logits [B, K] (float32 or float64) and a batch's targets; the `loss` of an
            objective, or a function that never waits for the device.
        autocast: dtype to compute in, as of torch.autocast; None for what holds where it is called.
        l1: weight of `l1_penalty`, of which the gradient is added, not the value.
        max_graphs: how many sizes are captured at most.
        capture: what captures, instead of CUDA.

    Raises:
        TypeError: something that is none of motet's models.
        ValueError: a model that is not on a CUDA device, or an argument outside its range.

    Note:
        Gradients are written, not added: a call replaces those in `.grad`. They lie in the same
        tensors from call to call; keep a clone. A parameter that takes no part in a batch, since
        nobody has its modality, has None, as after a step without a graph (with L1, which concerns
        it all the same, its own). The memory of the largest batch's step stays taken.

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

        Nothing waits for the device, but where bags have to be cut: a spectrum as context, ragged
        bags for an encoder.

        Args:
            batch: of patients, on the model's device.
            scale: a scalar on the device by which all gradients are multiplied, for float16; the
                loss that is returned is not.

        Raises:
            ValueError: a batch that does not fit the model, or a model with nothing to train.
            TypeError: something in the batch that is not a tensor.
        """
        graphs = self._graphs
        now = graphs.look()
        if now.moved:
            self._gradients.clear()
        trained = [p for p in now.parameters if p.requires_grad]
        if not trained:
            raise ValueError("model: expected at least one trainable parameter, got none")
        why = graphs.never or now.hooks or _several_processes()
        if not why:
            with torch.no_grad(), self._precision():
                given = given_of(self.model, read_patients(self.model, batch))
            if not isinstance(given, str):
                more = dict(batch.target) | ({} if scale is None else {"": scale})
                key = (tuple(p.requires_grad for p in now.parameters), self._dtype())

                def run(
                    rows: int, read: Mapping[str, Context | ModalityInput], own: dict[str, Tensor]
                ) -> Any:
                    factor = own.pop("", None)
                    return self._step(rows, read, own, factor, trained)

                loss, written = graphs.call(now, key, given, more, run)
                for parameter in now.parameters:
                    parameter.grad = None
                for parameter, wrote in zip(trained, written, strict=True):
                    parameter.grad = self._gradients[id(parameter)] if wrote else None
                return loss.clone()
            why = given
        graphs.fall_back(why)
        for parameter in now.parameters:
            parameter.grad = None
        return self._without_graph(batch, scale, trained)

    def report(self) -> list[dict[str, Any]]:
        """Return, for all sizes that came: how they run, why, calls, replays, memory in MiB.

        `sizes` is empty, and `why` says the reason, for calls that could not be captured at all.
        """
        return self._graphs.report()

    @property
    def fell_back(self) -> dict[str, int]:
        """Why calls ran without a graph, other than being the first of their sizes; how many."""
        return dict(self._graphs.fell_back)

    def _dtype(self) -> torch.dtype | None:
        return self.autocast or self._graphs.ambient()

    def _precision(self) -> torch.autocast:
        return precision(self._graphs.device, self._dtype())

    def _step(
        self,
        rows: int,
        read: Mapping[str, Context | ModalityInput],
        target: dict[str, Tensor],
        scale: Tensor | None,
        trained: Sequence[nn.Parameter],
    ) -> tuple[Tensor, tuple[bool, ...]]:
        """Write all gradients; return the loss, and which parameters have one."""
        with torch.enable_grad():
            with self._precision():
                logits = _widened(_logits(self.model, rows, read))
                loss = self.loss(logits, target)
            scaled = loss if scale is None else loss * scale
            with precision(self._graphs.device, None):
                found = torch.autograd.grad(scaled, trained, allow_unused=True)
        for parameter, gradient in zip(trained, found, strict=True):
            if id(parameter) not in self._gradients and (self.l1 or gradient is not None):
                self._gradients[id(parameter)] = torch.zeros_like(parameter)
        pairs = [
            (self._gradients[id(parameter)], gradient)
            for parameter, gradient in zip(trained, found, strict=True)
            if gradient is not None
        ]
        copy_all((into for into, _ in pairs), (gradient for _, gradient in pairs))
        if not self.l1:
            return loss.detach(), tuple(gradient is not None for gradient in found)
        for parameter, gradient in zip(trained, found, strict=True):
            if gradient is None:
                self._gradients[id(parameter)].zero_()
        _add_signs([self._gradients[id(p)] for p in trained], trained, self.l1, scale)
        return loss.detach(), (True,) * len(trained)

    def _without_graph(
        self, batch: PatientBatch, scale: Tensor | None, trained: Sequence[nn.Parameter]
    ) -> Tensor:
        device = self._graphs.device
        cast = nullcontext()
        if self.autocast is not None:
            cast = torch.autocast(device.type, self.autocast)
        with torch.enable_grad():
            with cast:
                loss = self.loss(logits_of(self.model, batch), batch.target)
            with precision(device, None):
                (loss if scale is None else loss * scale).backward()
        if self.l1:
            add_l1(trained, self.l1, scale)
        return loss.detach()


class CudaGraphs:
    """Call a model without gradients so that everything that has weights is one CUDA graph.

    Sizes, what is captured and what is not: as in `StepGraphs`, which trains.

    Args:
        model: on a CUDA device. Its parameters may change in place; after a move or a conversion,
            graphs are captured anew.
        max_graphs: how many sizes are captured at most.
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

        A LegoBlock, too, takes a dict or a sequence, of the one modality "x".

        Raises:
            RuntimeError: gradients are wanted: autograd is on, and a parameter is trained.
        """
        graphs, model = self._graphs, self.model
        now = graphs.look()
        if torch.is_grad_enabled() and any(p.requires_grad for p in now.parameters):
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
        # The static tensors are written to in other calls, in which inference mode may be off.
        with torch.inference_mode(False), torch.no_grad():
            why = graphs.never or now.hooks
            if not why:
                given = given_of(model, read_batches(model, inputs, options))
                if not isinstance(given, str):
                    dtype = graphs.ambient()

                    def run(
                        rows: int, read: Mapping[str, Context | ModalityInput], _: Any
                    ) -> Tensor:
                        with precision(graphs.device, dtype):
                            return _logits(model, rows, read)

                    return graphs.call(now, (dtype,), given, {}, run).clone()
                why = given
            graphs.fall_back(why)
            if isinstance(model, LegoBlock):
                (x,) = inputs.values() if isinstance(inputs, Mapping) else inputs
                options["mask"] = options.pop("masks")
                return model(x, **{key: _only(value) for key, value in options.items()})
            return model(inputs, **options)

    def report(self) -> list[dict[str, Any]]:
        """Return, for all sizes that came, what `StepGraphs.report` says."""
        return self._graphs.report()


def add_l1(parameters: Sequence[nn.Parameter], l1: float, scale: Tensor | None = None) -> None:
    """Add the gradient of `l1 * l1_penalty` to `.grad`, at a fraction of what autograd takes."""
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


def _logits(model: Model, rows: int, read: Mapping[str, Context | ModalityInput]) -> Tensor:
    latents = latents_from(model, rows, read)
    real = latents.real.contiguous() if latents.is_complex() else latents
    return real if model.head is None else model.head(real)


def _widened(logits: Tensor) -> Tensor:
    """Return logits in which losses are taken: in full precision."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _only(value: Any) -> Any:
    """Return what a dict or a sequence of one modality holds."""
    if value is None:
        return None
    return value.get("x") if isinstance(value, Mapping) else value[0]


def _several_processes() -> str:
    distributed = torch.distributed
    several = distributed.is_available() and distributed.is_initialized()
    return "several processes exchange gradients" if several else ""
