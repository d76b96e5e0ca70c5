"""latent_attention as its equation says: the fast forms are compared with this one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ragged import slices_of


def latent_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None = None,
    *,
    counts: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Compute latent_attention in torch, as its equation says, bag after bag."""
    if offsets is None:
        bag_counts = None if counts is None else counts[:, None, None]
        return F.dropout(softmax_weights(q, k, scale, bag_counts), dropout_p) @ v
    bags = []
    for b, bag in enumerate(slices_of(offsets)):
        bag_counts = None if counts is None else counts[bag]
        weights = softmax_weights(q[b], k[bag].transpose(0, 1), scale, bag_counts)
        bags.append(F.dropout(weights, dropout_p) @ v[bag].transpose(0, 1))
    return torch.stack(bags) if bags else torch.empty_like(q)


def softmax_weights(
    q: Tensor, k: Tensor, scale: float | None, counts: Tensor | None = None
) -> Tensor:
    """Return the attention weights [..., C, N] of queries [..., C, E] on keys [..., N, E]."""
    scores = q @ k.transpose(-1, -2) * scale_of(q, scale)
    if counts is not None:
        scores = scores + counts.log().to(scores.dtype)
    return torch.softmax(scores, dim=-1)


def scale_of(q: Tensor, scale: float | None) -> float:
    """Return the factor on the scores, E ** -0.5 for None."""
    if scale is not None:
        return scale
    if q.shape[-1] == 0:
        raise ValueError("q: expected [B, H, C, E] with E > 0, or a scale")
    return q.shape[-1] ** -0.5
