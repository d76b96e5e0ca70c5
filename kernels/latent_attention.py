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

    Example:
        >>> q, k, v = torch.randn(2, 8, 25, 16), torch.randn(70, 8, 16), torch.randn(70, 8, 16)
        >>> motet.kernels.latent_attention(q, k, v, offsets=torch.tensor([0, 50, 70])).shape
        torch.Size([2, 8, 25, 16])
    """
    _check(q, k, offsets, v=v)
    if not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: expected a number in [0, 1), got {dropout_p!r}")
    return latent_attention_reference(q, k, v, offsets, scale=scale, dropout_p=dropout_p)


def latent_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Compute latent_attention in torch, literally, bag after bag."""
    if offsets is None:
        return torch.nn.functional.dropout(_softmax(q, k, scale), dropout_p) @ v
    bags = [
        torch.nn.functional.dropout(_softmax(q[b], own, scale), dropout_p) @ v[bag].transpose(0, 1)
        for b, (bag, own) in enumerate(_bags(k, offsets))
    ]
    return torch.stack(bags) if bags else torch.empty_like(q)


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

    Example:
        >>> q, k = torch.randn(2, 8, 25, 16), torch.randn(2, 8, 50, 16)
        >>> motet.kernels.attention_weights(q, k).shape
        torch.Size([2, 8, 25, 50])
    """
    _check(q, k, offsets)
    if offsets is None:
        return _softmax(q, k, scale)
    bags = [_softmax(q[b], own, scale) for b, (_, own) in enumerate(_bags(k, offsets))]
    # [H, C, N] of each bag, one after the other along the tokens
    return torch.cat(bags, dim=-1).permute(2, 0, 1) if bags else k.new_empty(0, *q.shape[1:3])


def _softmax(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    return torch.softmax(scores * (q.shape[-1] ** -0.5 if scale is None else scale), dim=-1)


def _bags(k: Tensor, offsets: Tensor) -> list[tuple[slice, Tensor]]:
    """Return where each bag's tokens lie, and its keys [H, N, E]."""
    bags = [slice(start, stop) for start, stop in pairwise(offsets.tolist())]
    return [(bag, k[bag].transpose(0, 1)) for bag in bags]


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
