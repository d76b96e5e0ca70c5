"""absorbed_attention as its equation says: the fast forms are compared with this one."""

from itertools import pairwise

import torch
from torch import Tensor

from ..context_kv.reference import context_kv_reference


def absorbed_attention_reference(
    queries: Tensor,
    x: Tensor,
    offsets: Tensor,
    *,
    positions: Tensor | None = None,
    counts: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute absorbed_attention in torch, as its equation says, bag after bag."""
    width = queries.shape[2]
    identity = torch.eye(width, dtype=queries.dtype, device=x.device)[None]
    (z,) = context_kv_reference(x, identity, positions=positions, eps=eps)
    pooled, mass = [queries[:0]], [queries[:0, :, 0]]
    for bag_queries, (start, stop) in zip(queries, pairwise(offsets.tolist()), strict=True):
        scores = bag_queries @ z[start:stop].t()
        if counts is not None:
            scores = scores + counts[start:stop].log().to(scores.dtype)
        weights = torch.softmax(scores, dim=-1)
        dropped = torch.nn.functional.dropout(weights, dropout_p)
        pooled.append((dropped @ z[start:stop])[None])
        mass.append(dropped.sum(-1)[None])
    return torch.cat(pooled), torch.cat(mass)
