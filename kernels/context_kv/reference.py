"""context_kv as its equation says: the fast forms are compared with this one."""

import torch
from torch import Tensor

from ..dtypes import wide


def context_kv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Compute context_kv in torch, as its equation says; weight [S, O, D + P]."""
    z = x
    if positions is not None:
        shared = positions.repeat(len(x) // len(positions), 1) if len(x) else positions[:0]
        z = torch.cat([x, shared.to(x.dtype)], dim=1)
    z = torch.nn.functional.layer_norm(z.to(wide(x.dtype)), z.shape[1:], eps=eps)
    y = z.to(weight.dtype) @ weight.transpose(1, 2)
    return y if bias is None else y + bias[:, None]
