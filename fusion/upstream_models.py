"""Build models from the authors' constructor arguments; check what their code can express."""

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .encoders import BagSelfAttention, UpstreamEncoder
from .healnet import HEALNet
from .layers import Head, ShareWeights
from .lego_block import LegoBlock
from .lego_fuse import LegoFuse
from .lego_heads import merge_heads
from .lego_merge import LegoMerge
from .modalities import Bag, Grid
from .upstream_names import fill, head_tensors

UpstreamModel = HEALNet | LegoBlock | LegoMerge | LegoFuse

_TEMPERATURE = 0.5
_HEADS, _HEAD_DIM = 8, 64  # of every LegoBlock

# Arguments of the authors' constructors without an effect, and keys that the golden files add.
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
_FFT: dict[Any, Literal["latents", "width"]] = {
    1: "latents", -2: "latents", 2: "width", -1: "width",
}  # fmt: skip
_SHARE_WEIGHTS = (False, "all-but-first")
# For each class of motet: the authors' name for it, and the argument values their code can express.
_EXPRESSIBLE: dict[type[nn.Module], tuple[str, dict[str, tuple[Any, ...]]]] = {
    HEALNet: (
        "HealNet",
        {
            "temperature": (_TEMPERATURE,),
            "share_weights": _SHARE_WEIGHTS,
            "self_attention": (0, 1),
        },
    ),
    LegoBlock: (
        "LegoBlock",
        {
            "temperature": (_TEMPERATURE,),
            "share_weights": _SHARE_WEIGHTS,
            "heads": (_HEADS,),
            "head_dim": (_HEAD_DIM,),
            "fft": ("latents", "width", None),
            "context": ("spectrum",),
            "snn": (True,),
        },
    ),
    LegoMerge: ("LegoMerge", {"method": ("upstream-harmonic", "sum", "mean", "product")}),
    LegoFuse: ("LegoFuse", {"mode": ("stack", "upstream-weave")}),
}


def build_healnet(config: Mapping[str, Any]) -> HEALNet:
    """Build the authors' HealNet."""
    channels, axes = require(config, "channel_dims"), require(config, "num_spatial_axes")
    if len(channels) != len(axes) or len(channels) != config.get("n_modalities", len(channels)):
        raise ValueError(
            f"config: expected n_modalities channel_dims and num_spatial_axes, got {channels} and "
            f"{axes}"
        )
    arguments = _fill_defaults(
        config, _HEALNET_DEFAULTS, "n_modalities", "channel_dims", "num_spatial_axes", "out_dims"
    )
    if arguments["self_per_cross_attn"] > 1:
        raise ValueError(
            "config['self_per_cross_attn']: expected 0 or 1, since the authors' code fails above"
        )
    return HEALNet(
        {str(i): Grid(c, axes=a) for i, (c, a) in enumerate(zip(channels, axes, strict=True))},
        out_features=require(config, "out_dims") if arguments["final_classifier_head"] else None,
        depth=arguments["depth"],
        num_latents=arguments["l_c"],
        latent_dim=arguments["l_d"],
        heads=arguments["x_heads"],
        head_dim=arguments["cross_dim_head"],
        attn_dropout=arguments["attn_dropout"],
        ff_dropout=arguments["ff_dropout"],
        share_weights="all-but-first" if arguments["weight_tie_layers"] else False,
        self_attention=arguments["self_per_cross_attn"],
        self_heads=arguments["l_heads"],
        self_head_dim=arguments["latent_dim_head"],
        snn=arguments["snn"],
        temperature=_TEMPERATURE,
        latent_init="normal",
        num_freq_bands=arguments["num_freq_bands"],
        max_freq=arguments["max_freq"],
        fourier_encode=arguments["fourier_encode_data"],
    )


def build_block(
    in_shape: Sequence[int],
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    prefix: str,
    encoder: nn.Module | None,
) -> LegoBlock:
    """Build the authors' LegoBlock, whose tensors have names that begin with `prefix`."""
    arguments = _fill_defaults(config, _BLOCK_DEFAULTS, "in_shape")
    latent = state.get(f"{prefix}latent")
    if latent is not None and latent.ndim == 3:
        raise ValueError(
            f"state_dict[{prefix + 'latent'!r}]: expected "
            f"[{arguments['l_c']}, {arguments['l_d']}], got {tuple(latent.shape)}: this block went "
            "through the authors' LegoFuse and lost its own latents; take its checkpoint from "
            "before fusing"
        )
    fft = _FFT.get(arguments["fourier_dim"]) if arguments["frequency_domain"] else None
    if arguments["frequency_domain"] and fft is None:
        raise ValueError(f"config['fourier_dim']: expected 1 or 2, got {arguments['fourier_dim']}")
    share: ShareWeights = False if arguments["weight_sharing"] else "all-but-first"
    over_bag = f"{prefix}layers.0.3.norm.weight" in state  # attention and feed-forward come first
    wrapped = (
        _make_bag_self_attention(in_shape[1], arguments, share, encoder)
        if over_bag
        else _wrap(encoder)
    )
    width = state.get(f"{prefix}layers.0.{2 if over_bag else 1}.norm_context.weight")
    if width is None:
        raise ValueError(f"state_dict: no {prefix}layers.0.1.norm_context.weight")
    return LegoBlock(
        Bag(in_shape[1], keep_scale=False),
        wrapped,
        out_features=arguments["num_classes"] if arguments["final_classifier_head"] else None,
        num_latents=arguments["l_c"],
        latent_dim=arguments["l_d"],
        depth=arguments["depth"],
        heads=_HEADS,
        head_dim=_HEAD_DIM,
        attn_dropout=arguments["attn_dropout"],
        ff_dropout=arguments["ff_dropout"],
        share_weights=share,
        fft=fft,
        context="spectrum",
        normalise=arguments["normalise"],
        track_imaginary=arguments["track_imaginary"],
        temperature=_TEMPERATURE,
        encoder_dim=len(width),
    )


def _make_bag_self_attention(
    features: int, arguments: dict[str, Any], share: ShareWeights, encoder: nn.Module | None
) -> BagSelfAttention:
    """Return the layer that the authors' block has instead of an encoder."""
    if encoder is not None:
        raise ValueError("encoders: expected None, since the checkpoint's block has no encoder")
    return BagSelfAttention(
        features,
        depth=arguments["depth"],
        share_weights=share,
        dropout=arguments["attn_dropout"],
        ff_dropout=arguments["ff_dropout"],
        temperature=_TEMPERATURE,
    )


def _wrap(encoder: nn.Module | None) -> UpstreamEncoder:
    if encoder is None:
        raise ValueError("encoders: expected the block's encoder, since it was trained with one")
    return UpstreamEncoder(copy.deepcopy(encoder))


def build_joined(
    config: Mapping[str, Any],
    state: dict[str, Tensor],
    encoders: Sequence[nn.Module | None],
) -> LegoMerge | LegoFuse:
    """Build the authors' LegoMerge or LegoFuse; if `state` lacks the merged head, add it there."""
    shapes = require(config, "in_shapes")
    if len(shapes) != 2:
        raise ValueError(f"config['in_shapes']: expected 2 blocks, got {len(shapes)}")
    if encoders and len(encoders) != 2:
        raise ValueError(f"encoders: expected one per block, 2, got {len(encoders)}")
    blocks = {
        str(i): build_block(
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
    extra_defaults = {"merge_method": "sum"} if merge else {"fuse_method": "stack", "depth": 2}
    arguments = _fill_defaults(config, defaults | extra_defaults)
    # The authors' LegoFuse has no alpha: it always merges heads with 0.5.
    alpha = arguments["alpha"] if merge else 0.5
    heads = []
    for i, block in enumerate(blocks.values()):
        if block.head is None:
            raise ValueError("config['block']: expected blocks with a head to merge")
        if f"layers.{i}.latent" not in state:
            raise ValueError(f"state_dict: expected layers.{i}.latent, got none")
        block.to(state[f"layers.{i}.latent"].dtype)
        fill(head_tensors(f"layers.{i}.to_logits.", block.head), state)
        heads.append(block.head)
    head = copy.deepcopy(heads[0])
    merged = list(head_tensors("to_logits.combined_layers.", head))
    if not any(name in state for name, _ in merged):  # as the authors' constructor makes them
        _merge_head(head, heads[1], alpha, arguments["head_method"])
        state |= {name: tensor.detach() for name, tensor in merged}
    if merge:
        method: Any = arguments["merge_method"]
        method = "upstream-harmonic" if method == "harmonic" else method
        # In the authors' code only the harmonic merge has weights.
        weights = [alpha, 1 - alpha] if method == "upstream-harmonic" else None
        model: LegoMerge | LegoFuse = LegoMerge(blocks, method=method, head=head, weights=weights)
    else:
        mode: Any = arguments["fuse_method"]
        mode = "upstream-weave" if mode == "weave" else mode
        model = LegoFuse(
            blocks, mode=mode, head=head, depth=arguments["depth"] if mode != "stack" else None
        )
    if "L" in state and (isinstance(model, LegoMerge) or model.latents is None):
        model.upstream_latents = torch.zeros_like(state["L"])
    return model


def check_expressible(model: nn.Module) -> None:
    """Raise unless the authors' code can compute what the model computes."""
    for kind, (name, allowed) in _EXPRESSIBLE.items():
        if isinstance(model, kind):
            _check_config(name, cast(Any, model).config, allowed)
    if isinstance(model, HEALNet):
        for name, modality in model.modalities.items():
            if not isinstance(modality, Grid):
                raise ValueError(f"model: the authors' code expects a Grid, got {name} {modality}")
    elif isinstance(model, LegoBlock):
        if model.config["modality"].get("keep_scale"):
            raise ValueError(
                f"model: the authors' code expects keep_scale=False, got {model.modality}"
            )
    elif isinstance(model, (LegoMerge, LegoFuse)):
        equal = len(set(model.weights.values())) == 1
        if isinstance(model, LegoMerge) and model.method == "mean" and not equal:
            raise ValueError("model: the authors' code expects equal weights of a mean")
        for block in model.blocks.values():
            check_expressible(block)


def _check_config(
    owner: str, config: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]
) -> None:
    for field, values in allowed.items():
        if config[field] not in values:
            raise ValueError(
                f"model: the authors' code expects {field} {' or '.join(map(repr, values))} of a "
                f"{owner}, got {config[field]!r}"
            )


def require(config: Mapping[str, Any], key: str) -> Any:
    """Return an argument for which the authors' constructor has no default."""
    if key not in config:
        raise ValueError(f"config: expected {key!r} for {config.get('model')}, got none")
    return config[key]


def _fill_defaults(
    config: Mapping[str, Any], defaults: dict[str, Any], *required_names: str
) -> dict[str, Any]:
    """Return arguments and the authors' defaults; warn of unknown arguments and ignore them."""
    unknown = sorted(set(config) - set(defaults) - _IGNORED - set(required_names))
    if unknown:
        warnings.warn(f"config: ignored {', '.join(unknown)}", stacklevel=3)
    return {key: config.get(key, default) for key, default in defaults.items()}


def _merge_head(a: Head, b: Head, alpha: float, method: str) -> None:
    """Merge head b into head a in place, as the authors' PlugHeads does."""
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
            orthogonal = v - u * cosine
            angle = float(cosine.acos()) * alpha
            u.copy_(u * math.cos(angle) + orthogonal / orthogonal.norm() * math.sin(angle))
            if not u.isfinite().all():
                raise ValueError(
                    f"state_dict: expected merged heads (to_logits.combined_layers), since the "
                    f"authors' slerp of the blocks' own gives NaN for {name}: one is zero, or both "
                    "are the same"
                )
