"""row_statistics as its equation says: the fast forms are compared with this one."""

import torch
from torch import Tensor

from ..dtypes import wide


def row_statistics_reference(
    x: Tensor, *, positions: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Compute row_statistics in torch, as its equation says."""
    z = x.to(wide(x.dtype))
    if positions is not None:
        shared = positions.repeat(len(x) // len(positions), 1) if len(x) else positions[:0]
        z = torch.cat([z, shared.to(z.dtype)], dim=1)
    variance, mean = torch.var_mean(z, 1, correction=0)
    return mean, (variance + eps).rsqrt()
