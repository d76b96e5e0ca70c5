"""Convert models from and to the authors' published code (HEALNet v0.1.0, MM-Lego v0.1.0).

Where that code deviates from the papers, upstream_models.py sets the options that reproduce it.
One list of name pairs, in upstream_names.py, serves both directions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .upstream_models import (
    UpstreamModel,
    build_block,
    build_healnet,
    build_joined,
    check_expressible,
    require,
)
from .upstream_names import fill, named_tensors, real_name


def from_upstream(
    config: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    encoders: Sequence[nn.Module | None] = (),
) -> UpstreamModel:
    """Build a model from a checkpoint of the authors' code, with the same outputs.

    Inputs (and masks) are passed as a sequence in the authors' order; a LegoBlock takes one tensor.
    Modalities are named "0", "1" and so on. The model has the dtype of the checkpoint.

    Args:
        config: the authors' constructor arguments, with "model": "HealNet", "LegoBlock",
            "LegoMerge" or "LegoFuse". LegoBlock has "in_shape"; LegoMerge and LegoFuse have
            "in_shapes" and the blocks' own arguments under "block".
        state_dict: tensors under names of real checkpoints or of the golden files; not changed.
        encoders: the encoder of each block in order, None for a block without one. The model gets
            copies, with the tensors of the checkpoint.

    Returns:
        HEALNet, LegoBlock, LegoMerge or LegoFuse, in evaluation mode.

    Raises:
        ValueError: an unknown model; an argument or tensor that is missing, unused or of the wrong
            shape; or a block that lost its latents in the authors' LegoFuse.
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
    state = dict(state_dict)
    match config.get("model"):
        case "HealNet":
            if encoders:
                raise ValueError("encoders: expected none for HealNet")
            model: UpstreamModel = build_healnet(config)
        case "LegoBlock":
            model = build_block(
                require(config, "in_shape"), config, state, "", _only_encoder(encoders)
            )
        case "LegoMerge" | "LegoFuse":
            state = {real_name(name): tensor for name, tensor in state.items()}
            model = build_joined(config, state, encoders)
        case kind:
            raise ValueError(
                f"config['model']: expected HealNet, LegoBlock, LegoMerge or LegoFuse, got {kind!r}"
            )
    floating = [t.dtype for t in state.values() if t.is_floating_point()]
    model = model.to(floating[0] if floating else torch.get_default_dtype())
    _fill_all(model, state)
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
    check_expressible(model)
    return {name: tensor.detach() for name, tensor in named_tensors(model)}


def _only_encoder(encoders: Sequence[nn.Module | None]) -> nn.Module | None:
    if len(encoders) > 1:
        raise ValueError(f"encoders: expected at most one for a LegoBlock, got {len(encoders)}")
    return encoders[0] if encoders else None


def _fill_all(model: UpstreamModel, state: dict[str, Tensor]) -> None:
    """Copy a checkpoint into the model; raise if a tensor of either side is not used."""
    names = list(named_tensors(model))
    fill(names, state)
    unused = sorted(set(state) - {name for name, _ in names})
    if unused:
        raise ValueError(
            f"state_dict: the model has no {', '.join(unused[:5])} ({len(unused)} in all)"
        )
