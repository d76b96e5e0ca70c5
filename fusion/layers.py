"""The parts that HEALNet and MM-Lego share: attention, gated feed-forward, head, layer sharing."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import attention_weights, latent_attention
from ..kernels.checks import choice
from .context import Context

ShareWeights = bool | Literal["all-but-first"]


class Attention(nn.Module):
    r"""Pre-norm multi-head attention of latents to a context, or to themselves.

    .. math:: \mathrm{LeakyReLU}(W_o \, \mathrm{softmax}(Q K^\top / (\sqrt{E} \, \tau)) V + b)

    HEALNet, Eq. 2, with Q from the normalised latents and K, V from the normalised context.

    Args:
        dim: width of the latents.
        context_dim: width of the context tokens; None for self-attention.
        heads: number of heads H.
        head_dim: width of each head E.
        dropout: probability of dropping an attention weight in training.
        temperature: τ above.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int | None,
        *,
        heads: int,
        head_dim: int,
        dropout: float = 0.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.scale = head_dim**-0.5 / temperature
        inner = heads * head_dim
        self.norm = nn.LayerNorm(dim)
        self.norm_context = None if context_dim is None else nn.LayerNorm(context_dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(context_dim or dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim)

    def forward(self, latents: Tensor, context: Context | None = None) -> Tensor:
        """Return the update [B, C, D] of latents [B, C, D], residual not added."""
        if context is not None and context.single:
            return self._only_token(latents, context)
        q, k, v, offsets = self._project(latents, context)
        dropout = self.dropout if self.training else 0.0
        out = latent_attention(q, k, v, offsets, scale=self.scale, dropout_p=dropout)
        return F.leaky_relu(self.to_out(out.transpose(1, 2).flatten(2)))

    def _only_token(self, latents: Tensor, context: Context) -> Tensor:
        """Attend to one token: its weight is 1 whatever Q and K are, so that only V is needed.

        [B, 1, D] where all latents get the same; the rows without a token get what `update` drops.
        """
        assert self.norm_context is not None
        inner = self.to_out.in_features
        v = F.linear(self.norm_context(context.tokens), self.to_kv.weight[inner:])
        nonempty = context.nonempty
        if nonempty is not None:
            v = v.new_zeros(len(nonempty), 1, inner).index_put((nonempty,), v[:, None])
        if self.training and self.dropout:
            kept = v.new_ones(len(v), self.heads, latents.shape[1], 1)
            kept = F.dropout(kept, self.dropout).transpose(1, 2)  # [B, C, H, 1]
            v = (kept * v.unflatten(-1, (self.heads, -1))).flatten(2)
        return F.leaky_relu(self.to_out(v))

    def weights(self, latents: Tensor, context: Context) -> Tensor:
        """Return the attention weights, [B, H, C, N], or [T, H, C] for a packed context."""
        q, k, _, offsets = self._project(latents, context)
        return attention_weights(q, k, offsets, scale=self.scale)

    def _project(
        self, latents: Tensor, context: Context | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        normed = self.norm(latents)
        offsets = None
        tokens = normed
        if context is not None:
            assert self.norm_context is not None
            tokens, offsets = self.norm_context(context.tokens), context.offsets
        q = self.to_q(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (
            part.unflatten(-1, (self.heads, -1)) for part in self.to_kv(tokens).chunk(2, dim=-1)
        )
        if offsets is None:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        return q, k, v, offsets


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
        return F.dropout(self.down(value * gate), self.dropout, self.training)


class Head(nn.Module):
    """Take the mean over the latents, LayerNorm, Linear: [B, C, D] -> [B, out_features].

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

    def forward(self, latents: Tensor) -> Tensor:
        return self.linear(self.norm(latents.mean(dim=1)))


def update(
    attention: Attention, feed_forward: FeedForward, latents: Tensor, context: Context
) -> Tensor:
    """Update latents [B, C, D] from a context; rows without a token keep theirs."""
    updated = attention(latents, context) + latents
    updated = feed_forward(updated) + updated
    nonempty = context.nonempty
    if nonempty is None:
        return updated
    return torch.where(nonempty[:, None, None], updated, latents)


def layer_order(depth: int, share_weights: ShareWeights) -> list[int]:
    """Return which set of weights each of `depth` layers uses."""
    choice("share_weights", share_weights, (True, False, "all-but-first"))
    if share_weights == "all-but-first":
        return [min(i, 1) for i in range(depth)]
    return [0] * depth if share_weights else list(range(depth))


def initial_latents(num_latents: int, latent_dim: int, init: str) -> nn.Parameter:
    """Return S_0 as a parameter [num_latents, latent_dim], drawn from U(0, 1) or N(0, 1)."""
    choice("latent_init", init, ("uniform", "normal"))
    draw = torch.rand if init == "uniform" else torch.randn
    return nn.Parameter(draw(num_latents, latent_dim))
