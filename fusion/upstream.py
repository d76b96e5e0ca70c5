"""Models from and to the authors' published code (HEALNet v0.1.0, MM-Lego v0.1.0).

Every deviation of that code from the papers is set here, or is an option that only this file uses.
One list of name pairs serves both directions.
"""

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .attention import Attention
from .encoders import BagSelfAttention, UpstreamEncoder
from .healnet import FusionLayer, HEALNet
from .layers import FeedForward, Head, ShareWeights
from .lego_block import LegoBlock
from .lego_fuse import LegoFuse
from .lego_heads import merge_heads
from .lego_merge import LegoMerge
from .modalities import Bag, Grid

_TEMPERATURE = 0.5
_HEADS, _HEAD_DIM = 8, 64  # of every LegoBlock

# Arguments of the authors' constructors that change nothing, and what the golden files add.
_IGNORED = {
    "model", "name", "freeze", "missing", "masked", "encoder", "heads", "dim_head", "final_head",
    "in_shapes", "block", "blocks",
}  # fmt: skip
_BLOCK_DEFAULTS: dict[str, Any] = {
    "num_classes": 4,
    "l_c": 64,
    "l_d": 64,
    "depth": 2,
    "attn_dropout": 0.0,
    "ff_dropout": 0.0,
    "fourier_encode_data": True,
    "fourier_dim": 1,
    "final_classifier_head": True,
    "weight_sharing": True,
    "track_imaginary": True,
    "normalise": True,
    "frequency_domain": True,
}
_HEALNET_DEFAULTS: dict[str, Any] = {
    "depth": 3,
    "num_freq_bands": 2,
    "max_freq": 10.0,
    "l_c": 128,
    "l_d": 128,
    "x_heads": 8,
    "l_heads": 8,
    "cross_dim_head": 64,
    "latent_dim_head": 64,
    "attn_dropout": 0.0,
    "ff_dropout": 0.0,
    "weight_tie_layers": False,
    "fourier_encode_data": True,
    "self_per_cross_attn": 1,
    "final_classifier_head": True,
    "snn": True,
}

UpstreamModel = HEALNet | LegoBlock | LegoMerge | LegoFuse


def from_upstream(
    config: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    encoders: Sequence[nn.Module | None] = (),
) -> UpstreamModel:
    """Build a model from a checkpoint of the authors' code, which it reproduces.

    Inputs (and masks) are then passed as a sequence in the authors' order; a LegoBlock takes one
    tensor. Modalities are named "0", "1" and so on. The model is in the dtype of the checkpoint.

    Args:
        config: the authors' constructor arguments, with "model": "HealNet", "LegoBlock",
            "LegoMerge" or "LegoFuse". LegoBlock has "in_shape"; LegoMerge and LegoFuse have
            "in_shapes" and the blocks' own arguments under "block".
        state_dict: the checkpoint's tensors; names of real checkpoints and of the golden files are
            both understood. Not changed.
        encoders: the encoder of each block, in order, None for a block without; copied, and filled
            from the checkpoint.

    Returns:
        HEALNet, LegoBlock, LegoMerge or LegoFuse, in evaluation mode.

    Raises:
        ValueError: an unknown model, an argument or tensor that is missing, left over or of the
            wrong shape, or a block that lost its own latents in the authors' LegoFuse.
        TypeError: encoders that are not a sequence.

    Example:
        >>> config = {"model": "HealNet", "n_modalities": 1, "channel_dims": [8],
        ...           "num_spatial_axes": [1], "out_dims": 4, "depth": 1, "l_c": 5, "l_d": 12,
        ...           "x_heads": 2, "cross_dim_head": 4, "self_per_cross_attn": 0}
        >>> ours = motet.HEALNet({"0": motet.Grid(8, axes=1)}, out_features=4, depth=1,
        ...                      num_latents=5, latent_dim=12, heads=2, head_dim=4,
        ...                      temperature=0.5, share_weights=False)
        >>> model = motet.from_upstream(config, motet.to_upstream(ours))
        >>> model([torch.randn(2, 50, 8)]).shape
        torch.Size([2, 4])
    """
    if isinstance(encoders, nn.Module):
        raise TypeError("encoders: expected a sequence of modules, one per block, got a module")
    kind = config.get("model")
    state = dict(state_dict)
    if kind == "HealNet":
        if encoders:
            raise ValueError("encoders: expected none for HealNet")
        model: UpstreamModel = _healnet(config, state)
    elif kind == "LegoBlock":
        model = _block(_required(config, "in_shape"), config, state, "", _one(encoders))
    elif kind in ("LegoMerge", "LegoFuse"):
        state = {_real_name(name): tensor for name, tensor in state.items()}
        model = _joined(config, state, encoders)
    else:
        raise ValueError(
            f"config['model']: expected HealNet, LegoBlock, LegoMerge or LegoFuse, got {kind!r}"
        )
    floating = [t.dtype for t in state.values() if t.is_floating_point()]
    model = model.to(floating[0] if floating else torch.get_default_dtype())
    _load(model, state)
    return model.eval()


def to_upstream(model: UpstreamModel) -> dict[str, Tensor]:
    """Return the model's tensors under the names of the authors' code, aliases included.

    Args:
        model: made by `from_upstream`, or of the same architecture.

    Returns:
        Name to tensor, detached, sharing memory with the model.

    Raises:
        ValueError: a model that the authors' code cannot express.

    Example:
        >>> ours = motet.HEALNet({"0": motet.Grid(8, axes=1)}, out_features=4, temperature=0.5,
        ...                      share_weights=False)
        >>> motet.to_upstream(ours)["layers.1.0.fn.to_q.weight"].shape
        torch.Size([128, 119])
    """
    _check_expressible(model)
    return {name: tensor.detach() for name, tensor in _names(model)}


def _required(config: Mapping[str, Any], key: str) -> Any:
    if key not in config:
        raise ValueError(f"config: expected {key!r} for {config.get('model')}, got none")
    return config[key]


def _arguments(
    config: Mapping[str, Any], defaults: dict[str, Any], *further: str
) -> dict[str, Any]:
    """Return the known arguments with the authors' defaults; warn of others, which are ignored."""
    unknown = sorted(set(config) - set(defaults) - _IGNORED - set(further))
    if unknown:
        warnings.warn(f"config: ignored {', '.join(unknown)}", stacklevel=3)
    return {key: config.get(key, default) for key, default in defaults.items()}


def _one(encoders: Sequence[nn.Module | None]) -> nn.Module | None:
    if len(encoders) > 1:
        raise ValueError(f"encoders: expected at most one for a LegoBlock, got {len(encoders)}")
    return encoders[0] if encoders else None


def _healnet(config: Mapping[str, Any], state: dict[str, Tensor]) -> HEALNet:
    channels, axes = _required(config, "channel_dims"), _required(config, "num_spatial_axes")
    if len(channels) != len(axes) or len(channels) != config.get("n_modalities", len(channels)):
        raise ValueError(
            f"config: expected n_modalities channel_dims and num_spatial_axes, got {channels} and "
            f"{axes}"
        )
    given = _arguments(
        config, _HEALNET_DEFAULTS, "n_modalities", "channel_dims", "num_spatial_axes", "out_dims"
    )
    if given["self_per_cross_attn"] > 1:
        raise ValueError("config['self_per_cross_attn']: expected 0 or 1, which the code can run")
    return HEALNet(
        {str(i): Grid(c, axes=a) for i, (c, a) in enumerate(zip(channels, axes, strict=True))},
        out_features=_required(config, "out_dims") if given["final_classifier_head"] else None,
        depth=given["depth"],
        num_latents=given["l_c"],
        latent_dim=given["l_d"],
        heads=given["x_heads"],
        head_dim=given["cross_dim_head"],
        attn_dropout=given["attn_dropout"],
        ff_dropout=given["ff_dropout"],
        share_weights="all-but-first" if given["weight_tie_layers"] else False,
        self_attention=given["self_per_cross_attn"],
        self_heads=given["l_heads"],
        self_head_dim=given["latent_dim_head"],
        snn=given["snn"],
        temperature=_TEMPERATURE,
        latent_init="normal",
        num_freq_bands=given["num_freq_bands"],
        max_freq=given["max_freq"],
        fourier_encode=given["fourier_encode_data"],
    )


def _block(
    in_shape: Sequence[int],
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    prefix: str,
    encoder: nn.Module | None,
) -> LegoBlock:
    given = _arguments(config, _BLOCK_DEFAULTS, "in_shape")
    latent = state.get(f"{prefix}latent")
    if latent is not None and latent.ndim == 3:
        raise ValueError(
            f"state_dict[{prefix + 'latent'!r}]: expected [{given['l_c']}, {given['l_d']}], got "
            f"{tuple(latent.shape)}: this block went through the authors' LegoFuse and lost its "
            "own latents; take its checkpoint from before fusing"
        )
    width = state.get(f"{prefix}layers.0.1.norm_context.weight")
    share: ShareWeights = False if given["weight_sharing"] else "all-but-first"
    fft: Literal["latents", "width"] | None = None
    if given["frequency_domain"]:
        axes: dict[Any, Literal["latents", "width"]] = {
            1: "latents",
            -2: "latents",
            2: "width",
            -1: "width",
        }
        if given["fourier_dim"] not in axes:
            raise ValueError(f"config['fourier_dim']: expected 1 or 2, got {given['fourier_dim']}")
        fft = axes[given["fourier_dim"]]
    wrapped: nn.Module
    if f"{prefix}layers.0.3.norm.weight" in state:  # attention and feed-forward over the bag
        if encoder is not None:
            raise ValueError("encoders: expected None, since the checkpoint's block has no encoder")
        wrapped = BagSelfAttention(
            in_shape[1],
            depth=given["depth"],
            share_weights=share,
            dropout=given["attn_dropout"],
            ff_dropout=given["ff_dropout"],
            temperature=_TEMPERATURE,
        )
        width = state.get(f"{prefix}layers.0.2.norm_context.weight")
    elif encoder is None:
        raise ValueError("encoders: expected the block's encoder, since it was trained with one")
    else:
        wrapped = UpstreamEncoder(copy.deepcopy(encoder))
    if width is None:
        raise ValueError(f"state_dict: no {prefix}layers.0.1.norm_context.weight")
    return LegoBlock(
        Bag(in_shape[1]),
        wrapped,
        out_features=given["num_classes"] if given["final_classifier_head"] else None,
        num_latents=given["l_c"],
        latent_dim=given["l_d"],
        depth=given["depth"],
        heads=_HEADS,
        head_dim=_HEAD_DIM,
        attn_dropout=given["attn_dropout"],
        ff_dropout=given["ff_dropout"],
        share_weights=share,
        fft=fft,
        context="spectrum",
        normalise=given["normalise"],
        track_imaginary=given["track_imaginary"],
        temperature=_TEMPERATURE,
        encoder_dim=len(width),
    )


def _joined(
    config: Mapping[str, Any],
    state: dict[str, Tensor],
    encoders: Sequence[nn.Module | None],
) -> LegoMerge | LegoFuse:
    shapes = _required(config, "in_shapes")
    if len(shapes) != 2:
        raise ValueError(f"config['in_shapes']: expected 2 blocks, got {len(shapes)}")
    if encoders and len(encoders) != 2:
        raise ValueError(f"encoders: expected one per block, 2, got {len(encoders)}")
    blocks = {
        str(i): _block(
            shape,
            config.get("block") or {},
            state,
            f"layers.{i}.",
            encoders[i] if encoders else None,
        )
        for i, shape in enumerate(shapes)
    }
    merge = config["model"] == "LegoMerge"
    defaults = {"head_method": "slerp", "alpha": 0.8 if merge else 0.5}
    further = {"merge_method": "sum"} if merge else {"fuse_method": "stack", "depth": 2}
    given = _arguments(config, defaults | further)
    # LegoFuse takes no alpha: its heads are always merged at 0.5.
    alpha = given["alpha"] if merge else 0.5
    heads = []
    for i, block in enumerate(blocks.values()):
        if block.head is None:
            raise ValueError("config['block']: expected blocks with a head to merge")
        if f"layers.{i}.latent" not in state:
            raise ValueError(f"state_dict: expected layers.{i}.latent, got none")
        block.to(state[f"layers.{i}.latent"].dtype)
        _fill(_head_names(f"layers.{i}.to_logits.", block.head), state)
        heads.append(block.head)
    head = copy.deepcopy(heads[0])
    merged = list(_head_names("to_logits.combined_layers.", head))
    if not any(name in state for name, _ in merged):  # as the authors' constructor makes them
        _merge_head(head, heads[1], alpha, given["head_method"])
        state |= {name: tensor.detach() for name, tensor in merged}
    if merge:
        method: Any = given["merge_method"]
        method = "upstream-harmonic" if method == "harmonic" else method
        # Only the harmonic merge is weighted in the authors' code.
        weights = [alpha, 1 - alpha] if method == "upstream-harmonic" else None
        model: LegoMerge | LegoFuse = LegoMerge(blocks, method=method, head=head, weights=weights)
    else:
        mode: Any = given["fuse_method"]
        mode = "upstream-weave" if mode == "weave" else mode
        model = LegoFuse(
            blocks, mode=mode, head=head, depth=given["depth"] if mode != "stack" else None
        )
    if "L" in state and _own_latents(model) is None:
        model.upstream_latents = torch.zeros_like(state["L"])
    return model


def _merge_head(a: Head, b: Head, alpha: float, method: str) -> None:
    """Merge head b into head a as the authors' PlugHeads does."""
    if method in ("linear", "ot"):
        weights = [alpha, 1 - alpha] if method == "linear" else [1 - alpha, alpha]
        a.load_state_dict(merge_heads([a, b], weights, method).state_dict())
        return
    if method != "slerp":
        raise ValueError(f"config['head_method']: expected slerp, linear or ot, got {method!r}")
    with torch.no_grad():
        for name, u in a.named_parameters():
            v = b.get_parameter(name)
            cosine = ((u * v).sum() / (u.norm() * v.norm())).clamp(-1, 1)
            rest = v - u * cosine
            angle = float(cosine.acos()) * alpha
            u.copy_(u * math.cos(angle) + rest / rest.norm() * math.sin(angle))
            if not u.isfinite().all():
                raise ValueError(
                    f"state_dict: expected merged heads (to_logits.combined_layers), since the "
                    f"authors' slerp of the blocks' own gives NaN for {name}: one is zero, or both "
                    "are the same"
                )


def _check_expressible(model: nn.Module) -> None:
    """Raise unless the authors' code computes what the model computes."""

    def expect(owner: str, config: dict[str, Any], **allowed: tuple[Any, ...]) -> None:
        for field, values in allowed.items():
            if config[field] not in values:
                raise ValueError(
                    f"model: the authors' code expects {field} {' or '.join(map(repr, values))} "
                    f"of a {owner}, got {config[field]!r}"
                )

    own_weights = (False, "all-but-first")
    if isinstance(model, HEALNet):
        expect(
            "HealNet",
            model.config,
            temperature=(_TEMPERATURE,),
            share_weights=own_weights,
            self_attention=(0, 1),
        )
        for name, modality in model.modalities.items():
            if not isinstance(modality, Grid):
                raise ValueError(f"model: the authors' code expects a Grid, got {name} {modality}")
    elif isinstance(model, LegoBlock):
        expect(
            "LegoBlock",
            model.config,
            temperature=(_TEMPERATURE,),
            share_weights=own_weights,
            heads=(_HEADS,),
            head_dim=(_HEAD_DIM,),
            fft=("latents", "width", None),
            context=("spectrum",),
            snn=(True,),
        )
    elif isinstance(model, (LegoMerge, LegoFuse)):
        if isinstance(model, LegoMerge):
            methods = ("upstream-harmonic", "sum", "mean", "product")
            expect("LegoMerge", model.config, method=methods)
            if model.method == "mean" and len(set(model.weights.values())) > 1:
                raise ValueError("model: the authors' code expects equal weights of a mean")
        else:
            expect("LegoFuse", model.config, mode=("stack", "upstream-weave"))
        for block in model.blocks.values():
            _check_expressible(block)


def _real_name(name: str) -> str:
    """Return the name that a real checkpoint has for a name of the golden files."""
    for golden, real in (
        ("blocks.", "layers."),
        ("merged_head.", "to_logits."),
        ("model.L", "L"),
    ):
        if name == golden or (golden.endswith(".") and name.startswith(golden)):
            return real + name[len(golden) :]
    return name


def _own_latents(model: LegoMerge | LegoFuse) -> Tensor | None:
    return model.latents if isinstance(model, LegoFuse) else None


def _load(model: UpstreamModel, state: dict[str, Tensor]) -> None:
    """Copy a checkpoint into the model; every tensor on either side must have its counterpart."""
    names = list(_names(model))
    _fill(names, state)
    left = sorted(set(state) - {name for name, _ in names})
    if left:
        raise ValueError(f"state_dict: the model has no {', '.join(left[:5])} ({len(left)} in all)")


def _fill(names: Iterable[tuple[str, Tensor]], state: Mapping[str, Tensor]) -> None:
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
    """Tell whether the golden files may leave a name out, since another holds the same tensor."""
    return name.startswith(("to_logits.head1.", "to_logits.head2.")) or ".encoder." in f".{name}"


def _names(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the authors' name and the tensor of everything in the model, aliases included."""
    if isinstance(model, HEALNet):
        yield "latents", model.latents
        for i, index in enumerate(model.order):
            layer = model.layers[index]
            assert isinstance(layer, FusionLayer)
            for j, name in enumerate(model.modalities):
                yield from _attention_names(f"layers.{i}.{2 * j}.", layer.attention[name])
                yield from _feed_forward_names(f"layers.{i}.{2 * j + 1}.", layer.feed_forward[name])
            if layer.self_attention:
                prefix = f"layers.{i}.{2 * len(model.modalities)}."
                yield from _attention_names(f"{prefix}0.", layer.self_attention[0])
                yield from _feed_forward_names(f"{prefix}1.", layer.self_feed_forward[0])
        if model.head is not None:
            yield from _head_names("to_logits.", model.head)
    elif isinstance(model, LegoBlock):
        yield from _block_names("", model)
    elif isinstance(model, (LegoMerge, LegoFuse)):
        if len(model.blocks) != 2 or model.head is None:
            raise ValueError("model: the authors' code joins exactly 2 blocks, with a head")
        latents = _own_latents(model)
        latents = model.upstream_latents if latents is None else latents
        if isinstance(latents, Tensor):
            yield "L", latents
        for i, block in enumerate(model.blocks.values()):
            assert isinstance(block, LegoBlock)
            yield from _block_names(f"layers.{i}.", block)
        for i, block in enumerate(model.blocks.values(), 1):
            assert isinstance(block, LegoBlock)
            assert block.head is not None
            yield from _head_names(f"to_logits.head{i}.", block.head)
        yield from _head_names("to_logits.combined_layers.", model.head)
    else:
        raise TypeError(
            f"model: expected HEALNet, LegoBlock, LegoMerge or LegoFuse, got {type(model).__name__}"
        )


def _block_names(prefix: str, block: LegoBlock) -> Iterator[tuple[str, Tensor]]:
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
        start = f"{prefix}layers.{i}."
        if isinstance(encoder, BagSelfAttention):
            own = encoder.order[i]
            yield from _attention_names(f"{start}0.", encoder.attention[own])
            yield from _feed_forward_names(f"{start}1.", encoder.feed_forward[own])
            first = 2
        else:
            for name, tensor in encoder.module.state_dict(keep_vars=True).items():
                yield f"{start}0.{name}", tensor
            first = 1
        yield from _attention_names(f"{start}{first}.", block.sets[index].attention)
        yield from _feed_forward_names(f"{start}{first + 1}.", block.sets[index].feed_forward)
    if block.head is not None:
        yield from _head_names(f"{prefix}to_logits.", block.head)


def _attention_names(prefix: str, attention: nn.Module) -> Iterator[tuple[str, Tensor]]:
    assert isinstance(attention, Attention)
    yield f"{prefix}fn.to_q.weight", attention.to_q.weight
    yield f"{prefix}fn.to_kv.weight", attention.to_kv.weight
    yield from _pair(f"{prefix}fn.to_out.0", attention.to_out)
    yield from _pair(f"{prefix}norm", attention.norm)
    if attention.norm_context is not None:
        yield from _pair(f"{prefix}norm_context", attention.norm_context)


def _feed_forward_names(prefix: str, feed_forward: nn.Module) -> Iterator[tuple[str, Tensor]]:
    assert isinstance(feed_forward, FeedForward)
    yield from _pair(f"{prefix}fn.net.0", feed_forward.up)
    yield from _pair(f"{prefix}fn.net.2", feed_forward.down)
    yield from _pair(f"{prefix}norm", feed_forward.norm)


def _head_names(prefix: str, head: Head) -> Iterator[tuple[str, Tensor]]:
    yield from _pair(f"{prefix}1", head.norm)
    yield from _pair(f"{prefix}2", head.linear)


def _pair(name: str, module: nn.Linear | nn.LayerNorm) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", module.weight
    yield f"{name}.bias", module.bias
