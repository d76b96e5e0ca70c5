"""Encoders from the papers, for use in a LegoBlock or alone."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import integer, rate
from .attention import Attention, LatentKeys
from .layers import FeedForward, layer_order


class SNN(nn.Module):
    """Self-normalising network for a row of numbers (Klambauer et al. 2017).

    Linear, ELU and alpha dropout per hidden layer, weights from N(0, 1 / fan_in), biases zero.

    Args:
        features: width of the input.
        hidden: widths of the layers; the last one is the width of the output.
        dropout: alpha dropout in training.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> motet.SNN(20)(torch.randn(2, 20)).shape
        torch.Size([2, 256])
    """

    def __init__(
        self, features: int, hidden: Sequence[int] = (256, 256, 256, 256), dropout: float = 0.25
    ) -> None:
        super().__init__()
        if not isinstance(hidden, Iterable):
            raise ValueError(f"hidden: expected a sequence of widths, got {hidden!r}")
        widths = [integer("features", features), *(integer("hidden", width) for width in hidden)]
        dropout = rate("dropout", dropout)
        self.config: dict[str, Any] = {
            "features": widths[0],
            "hidden": widths[1:],
            "dropout": dropout,
        }
        self.layers = nn.Sequential()
        for before, after in pairwise(widths):
            linear = nn.Linear(before, after)
            nn.init.normal_(linear.weight, std=before**-0.5)
            nn.init.zeros_(linear.bias)
            self.layers.extend([linear, nn.ELU(), nn.AlphaDropout(dropout)])

    def forward(self, x: Tensor) -> Tensor:
        """Encode x [..., features] as [..., hidden[-1]]."""
        return self.layers(x)


class ABMIL(nn.Module):
    r"""Gated attention pooling of a bag (Ilse et al. 2018, Eq. 9).

    .. math:: a_n = \mathrm{softmax}_n\big(w^\top(\tanh(V h_n) \odot \sigma(U h_n))\big),
        \quad z = \sum_n a_n h_n

    Args:
        features: width of each token.
        hidden: width of the token embedding h.
        attention: width of V and U, and of the output.
        dropout: in training.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> motet.ABMIL(32)(torch.randn(2, 50, 32)).shape
        torch.Size([2, 256])
    """

    def __init__(
        self, features: int, hidden: int = 512, attention: int = 256, dropout: float = 0.25
    ) -> None:
        super().__init__()
        features, hidden = integer("features", features), integer("hidden", hidden)
        attention, dropout = integer("attention", attention), rate("dropout", dropout)
        self.config: dict[str, Any] = {
            "features": features,
            "hidden": hidden,
            "attention": attention,
            "dropout": dropout,
        }
        self.embed = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.value = nn.Sequential(nn.Linear(hidden, attention), nn.Tanh(), nn.Dropout(dropout))
        self.gate = nn.Sequential(nn.Linear(hidden, attention), nn.Sigmoid(), nn.Dropout(dropout))
        self.score = nn.Linear(attention, 1)
        self.out = nn.Sequential(nn.Linear(hidden, attention), nn.ReLU(), nn.Dropout(dropout))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool x [B, N, features] to [B, attention]; mask bool [B, N], True for real.

        Masked tokens have no influence, even if they are NaN. A bag without a real token is pooled
        as N tokens of zeros.
        """
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0)
        hidden = self.embed(x)
        score = self.score(self.value(hidden) * self.gate(hidden))
        if mask is not None:
            score = score.masked_fill(~mask[..., None], torch.finfo(score.dtype).min)
        return self.out((score.softmax(dim=1) * hidden).sum(dim=1))


class BagSelfAttention(nn.Module):
    """The layer that the authors' LegoBlock uses if it has no encoder; made by `from_upstream`.

    Note:
        The authors' forward pass uses only its feed-forward, with weights per layer; their woven
        fusion uses its attention as well. Both are kept.

    Args:
        features: width of the tokens.
        depth: number of layers of the block.
        share_weights: as in LegoBlock.
    """

    per_layer = True

    def __init__(
        self,
        features: int,
        *,
        depth: int,
        share_weights: Any = False,
        dropout: float = 0.0,
        ff_dropout: float = 0.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "features": features,
            "depth": depth,
            "share_weights": share_weights,
            "dropout": dropout,
            "ff_dropout": ff_dropout,
            "temperature": temperature,
        }
        self.order = layer_order(depth, share_weights)
        sets = max(self.order) + 1
        self.attention = nn.ModuleList(
            Attention(
                features, None, heads=8, head_dim=64, dropout=dropout, temperature=temperature
            )
            for _ in range(sets)
        )
        self.feed_forward = nn.ModuleList(
            FeedForward(features, dropout=ff_dropout) for _ in range(sets)
        )

    def forward(self, x: Tensor, layer: int = 0) -> Tensor:
        """Encode x [B, N, features] for one layer of the block."""
        return x + self.feed_forward[self.order[layer]](x)

    def weave(self, x: Tensor) -> Tensor:
        """Return the tokens for the next round of a woven fusion."""
        x = x + self.attention[0](x, LatentKeys(x))
        return x + self.feed_forward[0](x)


class UpstreamEncoder(nn.Module):
    """Call an encoder as the authors' LegoBlock does; made by `from_upstream`.

    Note:
        Their block calls the encoder with `[x]`, which their SNN and MILAttentionNet expect. If the
        encoder does not take a list, it calls it with x.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.module([x])
        except (TypeError, AttributeError):  # what torch modules raise for a list
            return self.module(x)

    def weave(self, x: Tensor) -> Tensor:
        """Return the tokens for the next round of a woven fusion."""
        return self.module(x) + x
