"""Parts of HEALNet and of LegoBlocks: gated feed-forward, update, head, sharing of weights."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import choice
from ..kernels.backends import Backend
from ..kernels.head.operator import head
from .attention import Attention, Keys

ShareWeights = bool | Literal["all-but-first"]


class FeedForward(nn.Module):
    """Pre-norm gated feed-forward: d -> 8d, halves a · act(b), 4d -> d, dropout.

    Args:
        dim: width.
        dropout: probability of dropping an output in training.
        snn: gate with SELU (self-normalising, the papers' choice) instead of GELU.
    """

    def __init__(self, dim: int, *, dropout: float = 0.0, snn: bool = True) -> None:
        super().__init__()
        self.dropout, self.snn = dropout, snn
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 8 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the update of x [..., D], residual not added."""
        value, gate = self.up(self.norm(x)).chunk(2, dim=-1)
        gate = F.selu(gate) if self.snn else F.gelu(gate)
        return F.dropout(self.down(value * gate), self.active_dropout)

    @property
    def active_dropout(self) -> float:
        return self.dropout if self.training else 0.0


class Head(nn.Module):
    """Take the mean over the latents, LayerNorm, Linear: [B, C, D] -> [B, out_features].

    Autocast does not change its dtype, see `kernels.head`.

    Args:
        dim: width D of the latents.
        out_features: width of the logits.

    Example:
        >>> motet.Head(8, 4)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 4])
    """

    def __init__(self, dim: int, out_features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, out_features)

    def forward(self, latents: Tensor, *, backend: Backend = "auto") -> Tensor:
        """Return logits [B, out_features] of latents [B, C, D]; `backend` as of `HEALNet`."""
        norm, linear = self.norm, self.linear
        return head(
            latents, norm.weight, norm.bias, linear.weight, linear.bias, eps=norm.eps,
            backend=backend,
        )  # fmt: skip


def update(attention: Attention, feed_forward: FeedForward, latents: Tensor, keys: Keys) -> Tensor:
    """Update latents [B, C, D] from a context; rows without a token keep their latents."""
    updated = attention(latents, keys) + latents
    updated = feed_forward(updated) + updated
    nonempty = keys.context.nonempty
    if nonempty is None:
        return updated
    return torch.where(nonempty[:, None, None], updated, latents)


def layer_order(depth: int, share_weights: ShareWeights) -> list[int]:
    """Return the index of the set of weights of each of `depth` layers."""
    choice("share_weights", share_weights, (True, False, "all-but-first"))
    if share_weights == "all-but-first":
        return [min(i, 1) for i in range(depth)]
    return [0] * depth if share_weights else list(range(depth))


def initial_latents(num_latents: int, latent_dim: int, init: str) -> nn.Parameter:
    """Return S_0 as a parameter [num_latents, latent_dim], drawn from U(0, 1) or N(0, 1)."""
    choice("latent_init", init, ("uniform", "normal"))
    draw = torch.rand if init == "uniform" else torch.randn
    return nn.Parameter(draw(num_latents, latent_dim))
