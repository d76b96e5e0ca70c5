"""The weights of lego_pass: of the update of the latents, and of the next queries."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class _Flat:
    """A set of weights that kernels read from one tensor, `flat`."""

    _flat: Tensor | None = None

    @property
    def flat(self) -> Tensor:
        """All weights, flattened and concatenated in the order of `_parts`.

        It is computed once for all passes that share the weights: so autograd adds up one gradient
        of one tensor, not one of each weight.
        """
        if self._flat is None:
            self._flat = torch.cat([part.flatten() for part in self._parts()])
        return self._flat

    def _parts(self) -> Sequence[Tensor]:
        raise NotImplementedError


@dataclass(eq=False)
class UpdateWeights(_Flat):
    """The weights that update the latents: the attention's output projection, the feed-forward."""

    out_weight: Tensor
    """[D, H · E]."""
    out_bias: Tensor
    """[D]."""
    norm_weight: Tensor
    """[D]: gain of the LayerNorm before the feed-forward."""
    norm_bias: Tensor
    """[D]: its shift."""
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
    """The weights that compute the queries of an attention from the latents."""

    norm_weight: Tensor
    """[D]: gain of the LayerNorm of the latents."""
    norm_bias: Tensor
    """[D]: its shift."""
    weight: Tensor
    """[Q, D], Q = H · E; for self-attention Q = 3 H · E: queries, keys and values."""

    def _parts(self) -> Sequence[Tensor]:
        return self.weight, self.norm_weight, self.norm_bias
