"""The weights that a pass takes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class _Flat:
    """Weights that kernels take as one tensor."""

    _flat: Tensor | None = None

    @property
    def flat(self) -> Tensor:
        """All of them beside each other, in the order of `_parts`.

        Made once, so that passes which share the weights add up one gradient, and not one for each.
        """
        if self._flat is None:
            self._flat = torch.cat([part.flatten() for part in self._parts()])
        return self._flat

    def _parts(self) -> Sequence[Tensor]:
        raise NotImplementedError


@dataclass(eq=False)
class Update(_Flat):
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

    def _parts(self) -> Sequence[Tensor]:
        return (
            self.up_weight, self.down_weight, self.out_weight,
            self.up_bias, self.out_bias, self.norm_weight, self.norm_bias, self.down_bias,
        )  # fmt: skip


@dataclass(eq=False)
class QueryWeights(_Flat):
    """The weights that make the queries of an attention."""

    norm_weight: Tensor
    """[D], as `norm_bias`: LayerNorm of the latents."""
    norm_bias: Tensor
    weight: Tensor
    """[Q, D], Q = H · E; of self-attention 3 H · E, of queries, keys and values."""

    def _parts(self) -> Sequence[Tensor]:
        return self.weight, self.norm_weight, self.norm_bias
