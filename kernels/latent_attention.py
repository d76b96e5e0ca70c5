"""Attention of a few latent queries to many context tokens, per bag."""

from itertools import pairwise

import torch
from torch import Tensor


def latent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    r"""Attend from latent queries to the tokens of each bag.

    .. math:: \mathrm{dropout}(\mathrm{softmax}(\mathrm{scale} \cdot q k^\top)) v

    HEALNet, Eq. 2. A bag without tokens gives zeros. Tokens of one bag never see another's, so
    that a bag alone gives what it gives in a batch.

    Args:
        q: [B, H, C, E] queries.
        k: [B, H, N, E] keys, or [T, H, E] for ragged bags, T tokens in all.
        v: values, like `k`.
        offsets: int64 [B + 1] for ragged bags: bag b owns tokens offsets[b] to offsets[b + 1].
        scale: factor on the scores; None means E ** -0.5.
        dropout_p: probability of dropping an attention weight, in [0, 1).

    Returns:
        [B, H, C, E].

    Raises:
        ValueError: shapes, dtypes, devices or offsets that do not fit.
        TypeError: something that is not a tensor.
    """
    _check(q, k, offsets, v=v)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: expected a number in [0, 1), got {dropout_p}")
    if offsets is None:
        weights = attention_weights(q, k, scale=scale)
        return torch.nn.functional.dropout(weights, dropout_p) @ v
    bags = [
        latent_attention(
            q[b, None],
            k[start:stop].transpose(0, 1)[None],
            v[start:stop].transpose(0, 1)[None],
            scale=scale,
            dropout_p=dropout_p,
        )
        for b, (start, stop) in enumerate(_spans(offsets))
    ]
    return torch.cat(bags) if bags else torch.empty_like(q)


def attention_weights(
    q: Tensor, k: Tensor, offsets: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """Return the attention weights of latent_attention, before dropout.

    Args:
        q: [B, H, C, E] queries.
        k: [B, H, N, E] keys, or [T, H, E] with `offsets`.
        offsets: int64 [B + 1], see latent_attention.
        scale: factor on the scores; None means E ** -0.5.

    Returns:
        [B, H, C, N], or [T, H, C] with `offsets`; they sum to 1 over the tokens of each bag.

    Raises:
        ValueError: shapes, dtypes, devices or offsets that do not fit.
        TypeError: something that is not a tensor.
    """
    _check(q, k, offsets)
    if offsets is None:
        scores = q @ k.transpose(-1, -2)
        return torch.softmax(scores * (q.shape[-1] ** -0.5 if scale is None else scale), dim=-1)
    bags = [
        attention_weights(q[b, None], k[start:stop].transpose(0, 1)[None], scale=scale)[0].permute(
            2, 0, 1
        )
        for b, (start, stop) in enumerate(_spans(offsets))
    ]
    return torch.cat(bags) if bags else k.new_empty(0, *q.shape[1:3])


def _spans(offsets: Tensor) -> list[tuple[int, int]]:
    bounds = offsets.tolist()
    return list(pairwise(bounds))


def _check(q: Tensor, k: Tensor, offsets: Tensor | None, v: Tensor | None = None) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v), ("offsets", offsets)):
        if not isinstance(tensor, Tensor) and not (tensor is None and name in ("v", "offsets")):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if not q.is_floating_point():
        raise ValueError(f"q: expected floating-point numbers, got {q.dtype}")
    if q.ndim != 4:
        raise ValueError(f"q: expected [B, H, C, E], got {tuple(q.shape)}")
    batch, heads, _, width = q.shape
    ragged = offsets is not None
    expected = ("T", heads, width) if ragged else (batch, heads, "N", width)
    fits = (
        k.ndim == 3 and k.shape[1:] == (heads, width)
        if ragged
        else k.ndim == 4 and (*k.shape[:2], k.shape[3]) == (batch, heads, width)
    )
    if not fits:
        text = ", ".join(map(str, expected))
        raise ValueError(f"k: expected [{text}] for q {tuple(q.shape)}, got {tuple(k.shape)}")
    if v is not None and v.shape != k.shape:
        raise ValueError(f"v: expected the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor is not None and (tensor.dtype, tensor.device) != (q.dtype, q.device):
            raise ValueError(
                f"{name}: expected {q.dtype} on {q.device} as q, got {tensor.dtype} on "
                f"{tensor.device}"
            )
    if offsets is not None:
        if offsets.dtype != torch.int64 or offsets.shape != (batch + 1,):
            raise ValueError(
                f"offsets: expected int64 [{batch + 1}] for {batch} bags, got {offsets.dtype} "
                f"{tuple(offsets.shape)}"
            )
        bounds = offsets.tolist()
        if bounds[0] != 0 or bounds[-1] != k.shape[0] or sorted(bounds) != bounds:
            raise ValueError(
                f"offsets: expected to rise from 0 to {k.shape[0]}, the number of tokens, got "
                f"{bounds if len(bounds) < 12 else f'{bounds[:5]} … {bounds[-5:]}'}"
            )
