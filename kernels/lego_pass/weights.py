"""The weights that a pass takes."""

from typing import NamedTuple

from torch import Tensor


class Update(NamedTuple):
    """The weights of what follows an attention: its output projection, and the feed-forward."""

    out_weight: Tensor
    """[D, H · E]."""
    out_bias: Tensor
    """[D]."""
    norm_weight: Tensor
    """[D], as `norm_bias`: LayerNorm before the feed-forward."""
    norm_bias: Tensor
    up_weight: Tensor
    """[8 D, D]: values, then gates."""
    up_bias: Tensor
    """[8 D]."""
    down_weight: Tensor
    """[D, 4 D]."""
    down_bias: Tensor
    """[D]."""


class Asking(NamedTuple):
    """The weights that make the queries of an attention."""

    norm_weight: Tensor
    """[D], as `norm_bias`: LayerNorm of the latents."""
    norm_bias: Tensor
    weight: Tensor
    """[H · E, D]."""
