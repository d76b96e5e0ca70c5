"""CUDA graphs of HEALNet's latent part, for which a GPU otherwise waits on launches.

The contexts are read outside, by one product per modality; what follows is the same few hundred
small kernels whatever the bags hold, as long as sizes are the same. So token counts are rounded up
to a bucket, and ragged batches replay one graph.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Cached, Keys, OneToken
from .context import Context, read_all
from .healnet import HEALNet

Capture = Callable[..., Callable[..., Tensor]]


def bucket(tokens: int) -> int:
    """Return `tokens` rounded up to 4, 5, 6 or 7 times a power of two: at most 25 % more."""
    if tokens <= 8:
        return 8
    step = 1 << (math.floor(math.log2(tokens)) - 2)
    return -(-tokens // step) * step


class CudaGraphs:
    """Call a HEALNet so that its latent part replays as a CUDA graph.

    A graph is captured at the first call with new sizes: the rows, the modalities at hand and the
    bucket of each one's token count (`bucket`); training and evaluation, and every precision of
    autocast, have their own. Later calls with these sizes replay it. Gradients flow as without, but
    a batch's backward pass has to come before the next batch of these sizes: a graph has one set of
    activations, and a replay writes over them.

    Args:
        model: on a CUDA device. Its parameters may change in place between calls, as optimisers
            change them; after a move or a conversion, graphs are captured anew.
        capture: makes a replaying callable of a module and its sample arguments.

    Raises:
        ValueError: a model that is not on a CUDA device.
        RuntimeError: a backward pass through activations that a later call has replaced.
        TypeError: something that is not a HEALNet.

    Note:
        What differs from the model itself is memory: a graph keeps its own copy of K and V, of the
        size of its bucket. Absorbed attention, which reads the tokens in every layer, is left to
        the model.

    Example:
        >>> model = motet.HEALNet({"wsi": motet.Bag(32)}, out_features=4)
        >>> motet.CudaGraphs(model)
        Traceback (most recent call last):
        ValueError: model: expected it on a CUDA device, got cpu
    """

    def __init__(self, model: HEALNet, *, capture: Capture | None = None) -> None:
        if not isinstance(model, HEALNet):
            raise TypeError(f"model: expected a HEALNet, got {type(model).__name__}")
        device = model.latents.device
        if capture is None and device.type != "cuda":
            raise ValueError(f"model: expected it on a CUDA device, got {device}")
        self.model = model
        self.capture: Any = capture or torch.cuda.make_graphed_callables
        self.graphs: dict[Any, _Replays] = {}
        self._hooked: set[int] = set()

    def __call__(
        self, inputs: Any, *, masks: Any = None, present: Any = None, coords: Any = None
    ) -> Tensor:
        """Predict logits [B, out_features]; arguments and errors as of HEALNet.forward."""
        model = self.model
        batches = read_all(
            model.modalities, inputs, masks=masks, present=present, coords=coords,
            like=model.latents,
        )  # fmt: skip
        keys = model.prepare(batches, strategy="cached")
        rows = next(iter(batches.values())).rows
        parts = {name: _Part.of(own) for name, own in keys.items()}
        tensors = [tensor for part in parts.values() for tensor in part.tensors]
        device = model.latents.device.type
        autocast, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        signature = (
            rows,
            tuple(
                (name, part.dense, *map(_signature, part.tensors)) for name, part in parts.items()
            ),
            tuple(module.training for module in model.modules()),
            tuple((p.requires_grad, p.data_ptr()) for p in model.parameters()),
            torch.is_grad_enabled(),
            autocast and dtype,
        )
        if signature not in self.graphs:
            latent_part = _LatentPart(model, rows, parts)
            latent_part.training = model.training  # not of the modules in it, as train() would
            samples = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in tensors)
            # Weights that autocast has converted are kept for later; a graph cannot rely on them.
            with torch.autocast(device, dtype, enabled=autocast, cache_enabled=False):
                graph = self.capture(latent_part, samples, allow_unused_input=True)
            self.graphs[signature] = _Replays(graph)
            self._own_gradients()
        return self.graphs[signature](*tensors)

    def _own_gradients(self) -> None:
        """Have gradients copied out of the graphs' memory, where the next replay writes."""
        for parameter in self.model.parameters():
            if parameter.requires_grad and id(parameter) not in self._hooked:
                parameter.register_hook(lambda grad: None if grad is None else grad.clone())
                self._hooked.add(id(parameter))


class _Replays:
    """A graph that counts its replays, so that none is differentiated after the next."""

    def __init__(self, graph: Callable[..., Tensor]) -> None:
        self.graph, self.count = graph, 0

    def __call__(self, *tensors: Tensor) -> Tensor:
        self.count += 1
        return _Owned.apply(self.graph(*tensors), self)


class _Owned(torch.autograd.Function):
    """Copy a result out of a graph's memory."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, replays: _Replays) -> Tensor:
        ctx.replays, ctx.at = replays, replays.count
        return out.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        if ctx.at != ctx.replays.count:
            raise RuntimeError(
                "CudaGraphs: expected the backward pass before the next call with batches of these "
                f"sizes, got {ctx.replays.count - ctx.at} calls in between"
            )
        return grad, None


class _Part(NamedTuple):
    """One modality's prepared contexts, as tensors whose sizes a graph can rely on."""

    tensors: list[Tensor]
    """Offsets if rows may miss the modality, then K and V, or V alone, of every set of weights."""
    single: bool
    dense: bool

    @classmethod
    def of(cls, keys: list[Keys]) -> "_Part":
        offsets, tensors = keys[0].context.offsets, []
        for own in keys:
            if isinstance(own, Cached):
                tensors.append(F.pad(own.kv, (0, 0) * 3 + (0, bucket(len(own.kv)) - len(own.kv))))
            else:
                assert isinstance(own, OneToken)
                tensors.append(own.v)
        if isinstance(keys[0], Cached):
            offsets = keys[0].offsets
        single, dense = isinstance(keys[0], OneToken), keys[0].context.offsets is None
        return cls(tensors if offsets is None else [offsets, *tensors], single, dense)


class _LatentPart(nn.Module):
    """What a HEALNet does once its contexts are read."""

    def __init__(self, model: HEALNet, rows: int, parts: Mapping[str, _Part]) -> None:
        super().__init__()
        self.model, self.rows = model, rows
        self.layout = {
            name: (part.single, part.dense, len(part.tensors)) for name, part in parts.items()
        }

    def forward(self, *tensors: Tensor) -> Tensor:
        keys, rest = {}, list(tensors)
        for name, (single, dense, count) in self.layout.items():
            own, rest = rest[:count], rest[count:]
            offsets = own.pop(0) if count > len(self.model.layers) else None
            context = Context(own[0], offsets=None if dense else offsets)
            keys[name] = [
                OneToken(context, tensor, len(self.model.latents))
                if single
                else Cached(context, _given(offsets), tensor)
                for tensor in own
            ]
        latents = self.model.fuse(self.rows, keys)
        return latents if self.model.head is None else self.model.head(latents)


def _given(offsets: Tensor | None) -> Tensor:
    assert offsets is not None
    return offsets


def _signature(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.requires_grad
