"""CUDA graphs of a model's latent part, for which a GPU otherwise waits on launches.

The contexts are read outside, by one product per modality; what follows is the same few hundred
small kernels whatever the bags hold, as long as sizes are the same. So token counts are rounded up
to a bucket, and ragged batches replay one graph.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Keys
from .attention_forms import Cached, OneToken
from .context import Batch, Context, read_all
from .healnet import HEALNet
from .lego_block import LegoBlock
from .lego_fuse import LegoFuse
from .lego_merge import LegoMerge

Capture = Callable[..., Callable[..., Tensor]]
Model = HEALNet | LegoBlock | LegoMerge | LegoFuse
# Prepared contexts by modality, and the rows that they are of, to the latents that the head sees.
Fuse = Callable[[int, Mapping[str, Sequence[Keys]]], Tensor]


def bucket(tokens: int) -> int:
    """Return `tokens` rounded up to 4, 5, 6 or 7 times a power of two: at most 25 % more."""
    if tokens <= 8:
        return 8
    step = 1 << (math.floor(math.log2(tokens)) - 2)
    return -(-tokens // step) * step


class CudaGraphs:
    """Call a HEALNet or a Lego model so that its latent part replays as a CUDA graph.

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
        TypeError: something that is none of these models.

    Note:
        What differs from the model itself is memory: a graph keeps its own copy of K and V, of the
        size of its bucket; absorbed attention, for which they would not exist, is never used.
        Encoders run outside. A LegoMerge whose rows miss modalities merges them by pattern, for
        which it has to look at them: such batches are not captured.

    Example:
        >>> model = motet.HEALNet({"wsi": motet.Bag(32)}, out_features=4)
        >>> motet.CudaGraphs(model)
        Traceback (most recent call last):
        ValueError: model: expected it on a CUDA device, got cpu
    """

    def __init__(self, model: Model, *, capture: Capture | None = None) -> None:
        if not isinstance(model, Model):
            raise TypeError(
                "model: expected a HEALNet, LegoBlock, LegoMerge or LegoFuse, got "
                f"{type(model).__name__}"
            )
        if isinstance(model, LegoFuse) and model.mode == "upstream-weave":
            raise ValueError("model: expected a LegoFuse of mode 'stack' or 'weave'")
        device = next(model.parameters()).device
        if capture is None and device.type != "cuda":
            raise ValueError(f"model: expected it on a CUDA device, got {device}")
        self.model = model
        self.capture: Any = capture or torch.cuda.make_graphed_callables
        self.graphs: dict[Any, _Replays] = {}
        self._hooked: set[int] = set()

    def __call__(
        self, inputs: Any, *, masks: Any = None, present: Any = None, coords: Any = None
    ) -> Tensor:
        """Predict logits [B, out_features]; arguments and errors as of HEALNet.forward.

        A LegoBlock, too, takes a dict or a sequence, of the one modality "x".
        """
        model = self.model
        modalities = {"x": model.modality} if isinstance(model, LegoBlock) else model.modalities
        like = next(model.parameters())
        batches = read_all(
            modalities, inputs, masks=masks, present=present, coords=coords, like=like
        )
        keys, fuse = _prepared(model, batches)
        rows = next(iter(batches.values())).rows
        if isinstance(model, LegoMerge) and not model.has_all(keys):
            return _with_head(model, fuse(rows, keys))
        parts = {name: _Part.of(own) for name, own in keys.items()}
        tensors = [tensor for part in parts.values() for tensor in part.tensors]
        device = like.device.type
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
            latent_part = _LatentPart(model, fuse, rows, parts)
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
    """K and V, or V alone, of every set of weights; then offsets and counts where there are."""
    sets: int
    single: bool
    dense: bool
    counted: bool
    latents: int
    """C of a OneToken."""

    @classmethod
    def of(cls, keys: Sequence[Keys]) -> "_Part":
        first, context, tensors = keys[0], keys[0].context, []
        for own in keys:
            if isinstance(own, Cached):
                tensors.append(_padded(own.kv))
            else:
                assert isinstance(own, OneToken)
                tensors.append(own.v)
        counts = None
        if isinstance(first, Cached):
            tensors.append(first.offsets)
            counts = context.packed_counts()
            if counts is not None:
                tensors.append(_padded(counts, 1))
        elif context.offsets is not None:
            tensors.append(context.offsets)
        latents = first.latents if isinstance(first, OneToken) else 0
        return cls(
            tensors, len(keys), isinstance(first, OneToken), context.offsets is None,
            counts is not None, latents,
        )  # fmt: skip

    def keys(self, tensors: Sequence[Tensor]) -> list[Keys]:
        """Return what was prepared, of other tensors."""
        own, rest = tensors[: self.sets], list(tensors[self.sets :])
        offsets = rest.pop(0) if rest else None
        counts = rest.pop(0) if rest else None
        context = Context(own[0], offsets=None if self.dense else offsets, counts=counts)
        if self.single:
            return [OneToken(context, v, self.latents) for v in own]
        assert offsets is not None
        return [Cached(context, offsets, kv) for kv in own]


class _LatentPart(nn.Module):
    """What a model does once its contexts are read."""

    def __init__(self, model: Model, fuse: Fuse, rows: int, parts: Mapping[str, _Part]) -> None:
        super().__init__()
        self.model, self.fuse, self.rows = model, fuse, rows
        # Of the parts only their layout: the tensors come with every call.
        self.layout = {name: part._replace(tensors=[]) for name, part in parts.items()}
        self.sizes = [len(part.tensors) for part in parts.values()]

    def forward(self, *tensors: Tensor) -> Tensor:
        keys, rest = {}, list(tensors)
        for (name, part), size in zip(self.layout.items(), self.sizes, strict=True):
            own, rest = rest[:size], rest[size:]
            keys[name] = part.keys(own)
        return _with_head(self.model, self.fuse(self.rows, keys))


def _prepared(
    model: Model, batches: Mapping[str, Batch]
) -> tuple[Mapping[str, Sequence[Keys]], Fuse]:
    """Read all contexts; return them, and what follows."""
    if isinstance(model, HEALNet):
        return model.prepare(batches, strategy="cached"), model.fuse
    how = model.how("cached")
    if isinstance(model, LegoBlock):
        block = model
        return (
            {"x": block.prepare(batches["x"], how)},
            lambda rows, keys: block.encode(rows, keys["x"], how).real,
        )
    return model.prepare(batches, how), partial(model.fuse, how=how)


def _with_head(model: Model, latents: Tensor) -> Tensor:
    real = latents.real.contiguous() if latents.is_complex() else latents
    return real if model.head is None else model.head(real)


def _padded(tokens: Tensor, value: float = 0) -> Tensor:
    """Return [T, ...] filled with `value` up to the bucket; what is behind the bags is not read."""
    missing = bucket(len(tokens)) - len(tokens)
    return F.pad(tokens, (0, 0) * (tokens.ndim - 1) + (0, missing), value=value)


def _signature(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.requires_grad
