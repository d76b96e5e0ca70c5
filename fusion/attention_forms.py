"""Six forms of keys: what the latents of a layer attend to, as keys and values or as tokens.

`prepare` reads a context once per forward pass, decides on a form, and returns the keys of every
set of weights. All forms give the same results but for rounding; they differ in what is computed
once per forward pass, once per set of weights, and once per layer.

| form | is used for | computed per layer |
| --- | --- | --- |
| OneTokenKeys | at most one token per row | nothing: the weight of a single token is 1 |
| CachedKeys | strategy "cached" | attention over K and V, which are made once |
| AbsorbedKeys | strategy "absorbed" | queries times tokens; K and V never exist |
| BatchedKeys, BatchedAbsorbedKeys | the same two, small equal bags on a CPU | batched products |
| ReferenceKeys | strategy "reference" | the literal equation |
"""

from collections.abc import Sequence
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import choice
from ..kernels import Plan, attention_weights, context_kv, plan, row_statistics
from ..kernels.absorbed_attention.heads import absorb_queries, absorbed_heads, project_back
from ..kernels.absorbed_attention.operator import absorbed_weights
from ..kernels.backends import Backend, check_backend
from ..kernels.latent_attention.operator import latent_attention_kv
from ..kernels.latent_attention.records import kv_records
from ..kernels.latent_attention.reference import latent_attention_reference
from ..kernels.one_token.operator import one_token_values
from ..kernels.plan import Strategy
from .attention import Attention, Keys
from .context import Context


class OneTokenKeys:
    """Keys of a context with at most one token per row.

    With a single token the attention weight is always 1, so Q and K have no influence, and only V
    is computed. Rows without a token hold zeros; their V is not used, since `update` and
    `lego_pass` leave the latents of such rows as they are.
    """

    needs_queries = False

    def __init__(self, context: Context, v: Tensor, latents: int) -> None:
        self.context, self.v, self.latents = context, v, latents  # v: [B, H, 1, E]

    @classmethod
    def project(cls, context: Context, attention: Attention, latents: int) -> "OneTokenKeys":
        """Project the tokens to V, for C latents."""
        v = one_token_values(attention.token_norm(context.with_positions()), attention.to_kv.weight)
        return cls(context, attention.split_heads(v), latents)

    def attend(
        self, attention: Attention, queries: Tensor | None, seed: Tensor | None = None
    ) -> Tensor:
        p = attention.active_dropout
        if not p:
            return self.v
        # Dropout is drawn for each latent, as for any other attention weight.
        ones = self.v.new_ones(len(self.v), attention.heads, self.latents, 1)
        return F.dropout(ones, p) * self.v

    def weights(self, attention: Attention, queries: Tensor | None) -> Tensor:
        ones = self.v.new_ones(len(self.v), attention.heads, self.latents, 1)
        return self.context.zero_missing(ones)


class CachedKeys:
    """K and V [T, 2, H, E] of one set of weights, made once for all layers that use it.

    Gradients of K and V: each layer would add one of T · 2 · H · E numbers. On a GPU `kv_records`
    returns one record per layer instead; the backward passes fill them, and the gradient of all
    layers is computed from them at once.
    """

    needs_queries = True

    def __init__(
        self,
        context: Context,
        offsets: Tensor,
        kv: Tensor,
        backend: Backend = "auto",
        layers: int = 1,
    ) -> None:
        self.context, self.offsets, self.kv = context, offsets, kv
        self.backend: Backend = backend
        self._layers = layers  # number of layers whose records are still to be made
        self._records: list[Tensor] = []

    @classmethod
    def project(
        cls, context: Context, offsets: Tensor, attention: Attention, backend: Backend
    ) -> "CachedKeys":
        """Normalise and project packed tokens for one set of weights, by torch's operators."""
        kv = attention.to_kv(attention.token_norm(context.with_positions()))
        return cls(context, offsets, kv.unflatten(-1, (2, attention.heads, -1)), backend)

    def attend(
        self, attention: Attention, queries: Tensor | None, seed: Tensor | None = None
    ) -> Tensor:
        assert queries is not None
        q, counts = attention.split_heads(queries), self.context.packed_counts()
        p, scale, backend = attention.active_dropout, attention.scale, self.backend
        if not self._records:  # the first call makes those of all layers; later calls one each
            records = kv_records(
                q, self.kv, self.offsets, layers=self._layers, counts=counts, scale=scale,
                dropout_p=p, backend=backend,
            )  # fmt: skip
            self._records, self._layers = list(records), 1
        out, _ = latent_attention_kv(
            q, self.kv, self.offsets, counts=counts, scale=scale, dropout_p=p, seed=seed,
            backend=backend, record=self._records.pop() if self._records else None,
        )  # fmt: skip
        return out

    def weights(self, attention: Attention, queries: Tensor | None) -> Tensor:
        assert queries is not None
        q, k = attention.split_heads(queries).detach(), self.kv[:, 0].detach()
        q = F.pad(q, (0, k.shape[-1] - attention.head_dim))
        q = q.expand(len(self.offsets) - 1, -1, -1, -1)
        weights = attention_weights(q, k, self.offsets, scale=attention.scale, backend=self.backend)
        return self.context.unpack(weights)


class AbsorbedKeys:
    """The tokens themselves as keys and values.

    Q K^T = (Q W_k) X^T and weights · V = (weights · X) W_v^T: the projections are applied to the C
    queries and to the C pooled tokens instead of to all N tokens. This is less work if the queries
    (H · C) are fewer than the channels (H · E), but it reads the tokens in every layer, see
    docs/design/algebra.md.
    """

    needs_queries = True

    def __init__(
        self,
        context: Context,
        packed: tuple[Tensor, Tensor | None, Tensor],
        statistics: tuple[Tensor, Tensor] | None,
        backend: Backend,
    ) -> None:
        self.context, self.statistics = context, statistics
        self.backend: Backend = backend
        self.x, self.positions, self.offsets = packed
        self._folded: dict[Attention, tuple[Tensor, Tensor]] = {}

    def attend(
        self, attention: Attention, queries: Tensor | None, seed: Tensor | None = None
    ) -> Tensor:
        assert queries is not None
        return absorbed_heads(
            attention.split_heads(queries),
            *self._fold_weights(attention),
            self.x,
            self.offsets,
            scale=attention.scale,
            positions=self.positions,
            counts=self.context.packed_counts(),
            statistics=self.statistics,
            eps=attention.token_norm.eps,
            dropout_p=attention.active_dropout,
            seed=seed,
            backend=self.backend,
        )

    def weights(self, attention: Attention, queries: Tensor | None) -> Tensor:
        weights = absorbed_weights(
            self._absorbed_queries(attention, queries).detach(),
            self.x.detach(),
            self.offsets,
            positions=self.positions,
            statistics=self.statistics,
            eps=attention.token_norm.eps,
            backend=self.backend,
        )
        return self.context.unpack(weights.unflatten(1, (attention.heads, -1)))

    def _absorbed_queries(self, attention: Attention, queries: Tensor | None) -> Tensor:
        """Return scale · Q W_k diag(γ), [B, H·C, W].

        β adds the same number to all scores of a query, which the softmax does not change.
        """
        assert queries is not None
        weights, _ = self._fold_weights(attention)
        absorbed = absorb_queries(attention.split_heads(queries), weights, attention.scale)
        return absorbed.expand(len(self.offsets) - 1, -1, -1)

    def _fold_weights(self, attention: Attention) -> tuple[Tensor, Tensor]:
        """Return `Attention.fold_token_norm`, computed once for all layers."""
        if attention not in self._folded:
            dtype = _product_dtype(attention.to_kv.weight)
            self._folded[attention] = attention.fold_token_norm(0, dtype, self.backend)
        return self._folded[attention]


class BatchedAbsorbedKeys(AbsorbedKeys):
    """AbsorbedKeys of small bags of one length: one product for all bags, tokens normalised."""

    def __init__(self, context: Context, normed: Tensor) -> None:
        super().__init__(context, context.packed(), None, "eager")
        self.normed = normed  # [B, N, W]

    @classmethod
    def normalise(cls, context: Context, attention: Attention) -> "BatchedAbsorbedKeys":
        """Normalise the tokens of a dense context, once for all attentions of the modality."""
        tokens = context.with_positions()
        return cls(context, F.layer_norm(tokens, tokens.shape[-1:], eps=attention.token_norm.eps))

    def attend(
        self, attention: Attention, queries: Tensor | None, seed: Tensor | None = None
    ) -> Tensor:
        scores = self._absorbed_queries(attention, queries) @ self.normed.transpose(1, 2)
        if self.context.counts is not None:
            scores = scores + self.context.counts.log()[:, None]
        weights = F.dropout(scores.softmax(-1), attention.active_dropout)
        pooled, mass = weights @ self.normed, weights.sum(-1)
        return project_back(pooled, mass, *self._fold_weights(attention))


class BatchedKeys:
    """K and V of one set of weights for small bags of one length: one product for all bags."""

    needs_queries = True

    def __init__(self, context: Context, attention: Attention) -> None:
        self.context = context
        kv = attention.to_kv(attention.token_norm(context.with_positions()))
        kv = kv.unflatten(-1, (2, attention.heads, -1)).permute(2, 0, 3, 1, 4)
        self.k, self.v = kv.contiguous().flatten(1, 2)  # [B·H, N, E]
        counts = context.counts
        bias = kv.new_zeros(1) if counts is None else counts.log().to(kv.dtype)[:, None, None]
        self.bias = bias.expand(*kv.shape[1:3], 1, kv.shape[3]).flatten(0, 1)

    def attend(
        self, attention: Attention, queries: Tensor | None, seed: Tensor | None = None
    ) -> Tensor:
        weights = F.dropout(self._weights(attention, queries), attention.active_dropout)
        return torch.bmm(weights, self.v).unflatten(0, (-1, attention.heads))

    def weights(self, attention: Attention, queries: Tensor | None) -> Tensor:
        weights = self._weights(attention, queries).detach()
        return weights.unflatten(0, (-1, attention.heads))

    def _weights(self, attention: Attention, queries: Tensor | None) -> Tensor:
        """Return the weights before dropout, [B·H, C, N]."""
        assert queries is not None
        bags = len(self.k) // attention.heads
        q = attention.split_heads(queries).expand(bags, -1, -1, -1).flatten(0, 1)
        scores = torch.baddbmm(self.bias, q, self.k.transpose(1, 2), alpha=attention.scale)
        return scores.softmax(-1)


class ReferenceKeys:
    """The literal equation for every layer; the other forms are tested against it."""

    needs_queries = True

    def __init__(self, context: Context, attention: Attention) -> None:
        self.context = context
        kv = attention.to_kv(attention.token_norm(context.with_positions()))
        k, v = kv.unflatten(-1, (2, attention.heads, -1)).unbind(-3)
        if context.offsets is None:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        self.k, self.v = k, v

    def attend(
        self, attention: Attention, queries: Tensor | None, seed: Tensor | None = None
    ) -> Tensor:
        assert queries is not None
        return latent_attention_reference(
            attention.split_heads(queries), self.k, self.v, self.context.offsets,
            counts=self.context.counts, scale=attention.scale, dropout_p=attention.active_dropout,
        )  # fmt: skip

    def weights(self, attention: Attention, queries: Tensor | None) -> Tensor:
        assert queries is not None
        q, context = attention.split_heads(queries), self.context
        weights = attention_weights(q, self.k, context.offsets, scale=attention.scale)
        return context.zero_missing(weights)


def prepare(
    context: Context,
    attentions: Sequence[Attention],
    *,
    latents: int,
    layers: Sequence[int] | None = None,
    strategy: Strategy | None = None,
    backend: Backend = "auto",
) -> list[Keys]:
    """Read a context once for all layers; return the keys of each set of weights.

    Args:
        context: the tokens of a batch.
        attentions: one per set of weights, of the same sizes.
        latents: number of latents C that will attend.
        layers: the number of layers that use each set of weights; None for one each.
        strategy, backend: see `kernels.plan`; None for the strategy that the plan chooses.
    """
    choice("strategy", strategy, (None, *get_args(Strategy)))
    check_backend(backend)
    if strategy == "reference":
        return [ReferenceKeys(context, attention) for attention in attentions]
    if context.single:
        return [OneTokenKeys.project(context, attention, latents) for attention in attentions]
    first, layers = attentions[0], layers or [1] * len(attentions)
    x, positions, offsets = packed = context.packed()
    eps = first.token_norm.eps
    planned = _plan(
        x, len(offsets) - 1, first, strategy, backend,
        latents=latents, layers=sum(layers), weight_sets=len(attentions),
    )  # fmt: skip
    statistics = context.packed_statistics(eps)
    if planned.strategy == "absorbed":
        if planned.by_torch and context.offsets is None:
            return [BatchedAbsorbedKeys.normalise(context, first)] * len(attentions)
        if statistics is None and x.is_cuda and backend in ("auto", "triton"):
            # Computed here once instead of in every layer. On a CPU the rows are normalised on
            # their way into the product, which gives the statistics at no cost.
            statistics = row_statistics(x, positions=positions, eps=eps, backend=backend)
        return [AbsorbedKeys(context, packed, statistics, backend)] * len(attentions)
    if planned.by_torch:
        if context.offsets is None:
            return [BatchedKeys(context, attention) for attention in attentions]
        return [CachedKeys.project(context, offsets, a, backend) for a in attentions]
    by_bag = not planned.one_product
    kv = _kv_of_all_layers(packed, attentions, statistics, bag_by_bag=by_bag, backend=backend)
    pairs = zip(kv, layers, strict=True)
    return [CachedKeys(context, offsets, kv_of_set, backend, uses) for kv_of_set, uses in pairs]


def _plan(
    x: Tensor,
    bags: int,
    attention: Attention,
    strategy: Strategy | None,
    backend: Backend,
    *,
    latents: int,
    layers: int,
    weight_sets: int,
) -> Plan:
    """Return the plan for tokens [T, D] of these bags."""
    return plan(
        len(x),
        attention.to_kv.in_features,
        bags=bags,
        latents=latents,
        layers=layers,
        weight_sets=weight_sets,
        heads=attention.heads,
        head_dim=attention.head_dim,
        dtype=_product_dtype(attention.to_kv.weight),
        device="cuda" if x.is_cuda else "cpu",
        training=torch.is_grad_enabled(),
        dropout=attention.active_dropout,
        tokens_need_grad=x.requires_grad,
        strategy=strategy,
        backend=backend,
    )


def _kv_of_all_layers(
    packed: tuple[Tensor, Tensor | None, Tensor],
    attentions: Sequence[Attention],
    statistics: tuple[Tensor, Tensor] | None,
    *,
    bag_by_bag: bool,
    backend: Backend,
) -> Sequence[Tensor]:
    """Return K and V [T, 2, H, E] of each attention, all from one product with the tokens.

    If `bag_by_bag` is True, each bag gets the same bits as if it were alone in the batch.
    """
    x, positions, offsets = packed
    first = attentions[0]
    # Each head's row of K and V begins at a multiple of 32 bytes: GPUs load asynchronously only
    # from aligned addresses.
    padding = -first.head_dim % 16 if x.is_cuda else 0
    dtype = _product_dtype(first.to_kv.weight)
    folded = [attention.fold_token_norm(padding, dtype, backend) for attention in attentions]
    weights, biases = (_stack(tensors) for tensors in zip(*folded, strict=True))
    y = context_kv(
        x, weights.flatten(1, 2), biases.flatten(1), positions=positions,
        offsets=offsets if bag_by_bag else None, statistics=statistics,
        eps=first.token_norm.eps, backend=backend,
    )  # fmt: skip
    y = y.unflatten(2, (2, first.heads, -1))
    # `unbind` has one backward pass that stacks the gradients; indexing y[i] would give each set a
    # gradient of the size of y, mostly zeros, to be summed. One set needs only a view.
    return [y.squeeze(0)] if len(attentions) == 1 else y.unbind(0)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def _product_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which torch multiplies by this weight under the present autocast."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype == torch.float32:
        return torch.get_autocast_dtype(device)
    return weight.dtype
