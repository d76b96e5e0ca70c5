"""Attention of latents to a context: the weights, and the interface of keys (`Keys`)."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import attention_weights
from ..kernels.backends import Backend
from ..kernels.fold_norm.operator import fold_norm
from ..kernels.latent_attention.operator import latent_self_attention
from ..kernels.lego_pass.weights import QueryWeights
from .context import Context


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
        self.heads, self.head_dim, self.dropout = heads, head_dim, dropout
        self.scale = head_dim**-0.5 / temperature
        inner = heads * head_dim
        self.norm = nn.LayerNorm(dim)
        self.norm_context = None if context_dim is None else nn.LayerNorm(context_dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(context_dim or dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim)

    def forward(self, latents: Tensor, keys: "Keys") -> Tensor:
        """Return the update of latents [B, C, D], residual not added.

        Args:
            latents: [B, C, D].
            keys: made by `attention_forms.prepare` for this attention.

        Returns:
            [B, C, D]; or [B, 1, D] if the update is the same for every latent.
        """
        heads = keys.attend(self, self.compute_queries(latents) if keys.needs_queries else None)
        return F.leaky_relu(self.to_out(heads.transpose(1, 2).flatten(2)))

    def compute_queries(self, latents: Tensor) -> Tensor:
        """Return unscaled queries Q [B, C, H·E]; for self-attention Q, K and V [B, C, 3·H·E]."""
        normed = self.norm(latents)
        q = self.to_q(normed)
        return q if self.norm_context is not None else torch.cat([q, self.to_kv(normed)], dim=-1)

    @property
    def query_weights(self) -> QueryWeights:
        """The weights of `compute_queries`."""
        weight = self.to_q.weight
        if self.norm_context is None:
            weight = torch.cat([weight, self.to_kv.weight])
        return QueryWeights(self.norm.weight, self.norm.bias, weight)

    def split_heads(self, x: Tensor) -> Tensor:
        """Return x [B, C, H·E] as [B, H, C, E]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def fold_token_norm(
        self, padding: int, dtype: torch.dtype, backend: Backend
    ) -> tuple[Tensor, Tensor]:
        """Return the weights [2 H, E, W] and shifts [2 H, E] of K and V, LayerNorm included.

        With W = W₀ diag(γ) and b = W₀ β the gain γ and shift β of the LayerNorm are part of the
        projection: a token only has to be normalised to mean 0 and variance 1. Each head gets
        `padding` more outputs, which are zero.
        """
        norm, weight = self.token_norm, self.to_kv.weight.unflatten(0, (2 * self.heads, -1))
        return fold_norm(
            weight, norm.weight, norm.bias, padding=padding, dtype=dtype, backend=backend
        )

    @property
    def token_norm(self) -> nn.LayerNorm:
        """The LayerNorm of the context's tokens; self-attention has none."""
        assert self.norm_context is not None
        return self.norm_context

    @property
    def active_dropout(self) -> float:
        return self.dropout if self.training else 0.0


class Keys(Protocol):
    """What the latents of a batch attend to in one layer, in one of the forms of `attention_forms`.

    Queries are [B, C, Q] as `Attention.compute_queries` returns them, or [1, C, Q] for all rows.
    """

    context: Context
    needs_queries: bool
    """Whether the result depends on the queries; if not, None is passed for them."""

    def attend(
        self, attention: Attention, queries: Tensor | None, seed: Tensor | None = None
    ) -> Tensor:
        """Return the output of each head, [B, H, C or 1, E], float32 or wider if it is summed so.

        `seed`, int64 [1], determines the dropout masks of the kernels; None draws a seed.
        """
        ...

    def weights(self, attention: Attention, queries: Tensor | None) -> Tensor:
        """Return the attention weights before dropout, [B, H, C, N]; [T, H, C] if packed."""
        ...


class LatentKeys:
    """The keys of latent self-attention: the latents attend to themselves."""

    needs_queries = True

    def __init__(self, latents: Tensor, backend: Backend = "auto") -> None:
        self.context = Context(latents)  # [1, C, D]; only used to tell that no row is empty
        self.backend: Backend = backend

    def attend(
        self, attention: Attention, queries: Tensor | None, seed: Tensor | None = None
    ) -> Tensor:
        assert queries is not None
        qkv = queries.unflatten(-1, (3, attention.heads, -1))  # [B, C, 3, H, E]
        p, scale = attention.active_dropout, attention.scale
        if qkv.is_cuda:  # the same bits in every run, and for a row in every batch
            return latent_self_attention(
                qkv, scale=scale, dropout_p=p, seed=seed, backend=self.backend
            )
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p, scale=scale)

    def weights(self, attention: Attention, queries: Tensor | None) -> Tensor:
        assert queries is not None
        qkv = queries.unflatten(-1, (3, attention.heads, -1))
        q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind()
        return attention_weights(q, k, scale=attention.scale)
