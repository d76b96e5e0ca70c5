"""The encoder of a LegoBlock: its configuration in a file, and the width of its output."""

import inspect
from typing import Any

import torch
from torch import nn

from .._checks import integer
from .encoders import ABMIL, SNN, BagSelfAttention, UpstreamEncoder
from .modalities import Bag, Grid, Modality, Tabular

# Encoders that a file can name; others are passed to `load`.
_ENCODERS: dict[str, type[nn.Module]] = {
    "motet.SNN": SNN,
    "motet.ABMIL": ABMIL,
    "motet.BagSelfAttention": BagSelfAttention,
}


def encoder_to_config(encoder: nn.Module | None) -> dict[str, Any] | None:
    """Return the configuration of an encoder; for encoders of motet, enough to build them again."""
    if encoder is None:
        return None
    name = f"motet.{type(encoder).__name__}"
    if _ENCODERS.get(name) is type(encoder):
        config: Any = encoder.config
        return {"type": name, **config}
    return {"type": type(encoder).__name__}


def encoder_from_config(
    config: dict[str, Any] | None, encoder: nn.Module | None
) -> nn.Module | None:
    """Return `encoder` if the caller passed one, else build the encoder that the config names."""
    if config is None:
        if encoder is not None:
            raise ValueError("encoders: expected none, since the block has none")
        return None
    if encoder is not None:
        upstream = config["type"] == UpstreamEncoder.__name__
        wrapped = isinstance(encoder, UpstreamEncoder)
        return UpstreamEncoder(encoder) if upstream and not wrapped else encoder
    arguments = {key: value for key, value in config.items() if key != "type"}
    if config["type"] not in _ENCODERS:
        raise ValueError(
            f"encoders: expected the block's own encoder, a {config['type']}, of which the file "
            "has only the tensors; got none"
        )
    return _ENCODERS[config["type"]](**arguments)


def probe_encoder(encoder: Any, modality: Modality, width: int | None) -> tuple[int, bool]:
    """Run an encoder once on zeros; return the width of its output, and whether bags are padded.

    Bags are padded if the encoder takes a mask and returns one token per bag. If it returns several
    tokens, nothing tells which of them come from padding; bags are then encoded one by one.
    """
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"encoder: expected a torch.nn.Module or None, got {encoder!r}")
    if isinstance(modality, Bag) and modality.coords:
        raise ValueError(
            "encoder: expected None for a Bag with coords, since encoders get no coords"
        )
    sizes = {Tabular: (), Bag: (2,), Grid: (32,) * (modality.item_ndim - 1)}
    shape = sizes[type(modality)]
    parameter = next((p for p in encoder.parameters() if p.is_floating_point()), torch.empty(0))
    zeros = torch.zeros(
        1, *shape, modality.channels, dtype=parameter.dtype, device=parameter.device
    )
    modes = {module: module.training for module in encoder.modules()}
    try:
        with torch.no_grad():
            out = encoder.eval()(zeros)
        output_width, one_token = int(out.shape[-1]), out.ndim <= 2
    except Exception as error:
        if width is None:
            raise ValueError(
                "encoder_dim: the width of the encoder's output could not be found by running it "
                f"on zeros {tuple(zeros.shape)} ({type(error).__name__}: {error}); pass encoder_dim"
            ) from error
        return integer("encoder_dim", width), False
    finally:
        for module, mode in modes.items():
            module.training = mode
    if output_width < 3:
        raise ValueError(
            f"encoder: expected an output of at least 3 features, got {output_width}: a LayerNorm "
            "of one or two features erases their values; add a Linear layer that widens it"
        )
    if width is not None and width != output_width:
        raise ValueError(f"encoder_dim: expected {output_width}, the encoder's output, got {width}")
    return output_width, one_token and "mask" in inspect.signature(encoder.forward).parameters
