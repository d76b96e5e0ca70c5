"""The authors' name of every tensor of motet's models, to read and to write their checkpoints."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from .attention import Attention
from .encoders import BagSelfAttention, UpstreamEncoder
from .healnet import FusionLayer, HEALNet
from .layers import FeedForward, Head
from .lego_block import LegoBlock
from .lego_fuse import LegoFuse
from .lego_merge import LegoMerge


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the authors' names and the tensors of a model; several names may be one tensor."""
    if isinstance(model, HEALNet):
        yield "latents", model.latents
        for i, index in enumerate(model.order):
            layer = model.layers[index]
            assert isinstance(layer, FusionLayer)
            for j, name in enumerate(model.modalities):
                yield from _attention_tensors(f"layers.{i}.{2 * j}.", layer.attention[name])
                yield from _feed_forward_tensors(
                    f"layers.{i}.{2 * j + 1}.", layer.feed_forward[name]
                )
            if layer.self_attention:
                prefix = f"layers.{i}.{2 * len(model.modalities)}."
                yield from _attention_tensors(f"{prefix}0.", layer.self_attention[0])
                yield from _feed_forward_tensors(f"{prefix}1.", layer.self_feed_forward[0])
        if model.head is not None:
            yield from head_tensors("to_logits.", model.head)
    elif isinstance(model, LegoBlock):
        yield from _block_tensors("", model)
    elif isinstance(model, (LegoMerge, LegoFuse)):
        if len(model.blocks) != 2 or model.head is None:
            raise ValueError("model: the authors' code joins exactly 2 blocks, with a head")
        latents = model.latents if isinstance(model, LegoFuse) else None
        latents = model.upstream_latents if latents is None else latents
        if isinstance(latents, Tensor):
            yield "L", latents
        for i, block in enumerate(model.blocks.values()):
            assert isinstance(block, LegoBlock)
            yield from _block_tensors(f"layers.{i}.", block)
        for i, block in enumerate(model.blocks.values(), 1):
            assert isinstance(block, LegoBlock)
            assert block.head is not None
            yield from head_tensors(f"to_logits.head{i}.", block.head)
        yield from head_tensors("to_logits.combined_layers.", model.head)
    else:
        raise TypeError(
            f"model: expected HEALNet, LegoBlock, LegoMerge or LegoFuse, got {type(model).__name__}"
        )


def _block_tensors(prefix: str, block: LegoBlock) -> Iterator[tuple[str, Tensor]]:
    yield f"{prefix}latent", block.latents
    encoder = block.encoder
    if isinstance(encoder, UpstreamEncoder):
        for name, tensor in encoder.module.state_dict(keep_vars=True).items():
            yield f"{prefix}encoder.{name}", tensor
    elif not isinstance(encoder, BagSelfAttention):
        raise ValueError(
            "model: expected blocks made by from_upstream, since the authors' blocks always have "
            "an encoder or attend over the bag"
        )
    for i, index in enumerate(block.order):
        layer_prefix = f"{prefix}layers.{i}."
        if isinstance(encoder, BagSelfAttention):
            weight_set = encoder.order[i]
            yield from _attention_tensors(f"{layer_prefix}0.", encoder.attention[weight_set])
            yield from _feed_forward_tensors(f"{layer_prefix}1.", encoder.feed_forward[weight_set])
            first = 2
        else:
            for name, tensor in encoder.module.state_dict(keep_vars=True).items():
                yield f"{layer_prefix}0.{name}", tensor
            first = 1
        yield from _attention_tensors(f"{layer_prefix}{first}.", block.sets[index].attention)
        yield from _feed_forward_tensors(
            f"{layer_prefix}{first + 1}.", block.sets[index].feed_forward
        )
    if block.head is not None:
        yield from head_tensors(f"{prefix}to_logits.", block.head)


def _attention_tensors(prefix: str, attention: nn.Module) -> Iterator[tuple[str, Tensor]]:
    assert isinstance(attention, Attention)
    yield f"{prefix}fn.to_q.weight", attention.to_q.weight
    yield f"{prefix}fn.to_kv.weight", attention.to_kv.weight
    yield from _pair(f"{prefix}fn.to_out.0", attention.to_out)
    yield from _pair(f"{prefix}norm", attention.norm)
    if attention.norm_context is not None:
        yield from _pair(f"{prefix}norm_context", attention.norm_context)


def _feed_forward_tensors(prefix: str, feed_forward: nn.Module) -> Iterator[tuple[str, Tensor]]:
    assert isinstance(feed_forward, FeedForward)
    yield from _pair(f"{prefix}fn.net.0", feed_forward.up)
    yield from _pair(f"{prefix}fn.net.2", feed_forward.down)
    yield from _pair(f"{prefix}norm", feed_forward.norm)


def head_tensors(prefix: str, head: Head) -> Iterator[tuple[str, Tensor]]:
    """Yield the authors' names and the tensors of a head."""
    yield from _pair(f"{prefix}1", head.norm)
    yield from _pair(f"{prefix}2", head.linear)


def _pair(name: str, module: nn.Linear | nn.LayerNorm) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", module.weight
    yield f"{name}.bias", module.bias


def fill(names: Iterable[tuple[str, Tensor]], state: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a checkpoint into the model's tensors of the same names."""
    filled: dict[int, str] = {}
    with torch.no_grad():
        for name, tensor in names:
            source = state.get(name)
            alias = filled.get(id(tensor))
            if source is None:
                if alias is None and not _is_alias(name):
                    raise ValueError(f"state_dict: expected {name} {tuple(tensor.shape)}, got none")
                continue
            if source.shape != tensor.shape:
                raise ValueError(
                    f"state_dict[{name!r}]: expected {tuple(tensor.shape)}, got "
                    f"{tuple(source.shape)}"
                )
            if alias is None:
                tensor.copy_(source)
            elif not torch.equal(tensor, source.to(tensor)):
                raise ValueError(f"state_dict[{name!r}]: expected the values of {alias}, its alias")
            filled[id(tensor)] = name


def _is_alias(name: str) -> bool:
    """Return whether the golden files may omit a name because another one holds the same tensor."""
    return name.startswith(("to_logits.head1.", "to_logits.head2.")) or ".encoder." in f".{name}"


def real_name(name: str) -> str:
    """Return the name in real checkpoints for a name in the golden files."""
    for golden, real in (
        ("blocks.", "layers."),
        ("merged_head.", "to_logits."),
        ("model.L", "L"),
    ):
        if name == golden or (golden.endswith(".") and name.startswith(golden)):
            return real + name[len(golden) :]
    return name
