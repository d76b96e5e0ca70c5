"""harmonic_merge as its equation says: the fast forms are compared with this one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import normalised_weights


def harmonic_merge_reference(
    latents: Sequence[Tensor], weights: Sequence[float] | None = None, phase: str = "principal"
) -> Tensor:
    """Compute harmonic_merge in torch, as its equation says."""
    if len(latents) == 1:
        return latents[0].clone()
    z = torch.stack(list(latents))
    shares = normalised_weights(weights, len(latents))
    w = torch.tensor(shares, dtype=z.real.dtype, device=z.device)
    w = w.reshape(-1, *[1] * latents[0].ndim)
    magnitude = torch.hypot(z.real, z.imag)
    low = magnitude.amin(0)  # ratios low / magnitude are at most 1, and cannot overflow
    mean = low / (w * (low / magnitude)).sum(0)
    mean = torch.where(low == 0, torch.zeros_like(mean), mean)
    if phase == "principal":
        angle = (w * torch.atan2(z.imag, z.real)).sum(0)
    else:
        x, y = ((w * part / magnitude).sum(0) for part in (z.real, z.imag))
        angle = torch.where(low == 0, torch.zeros_like(x), torch.atan2(y, x))
    return torch.complex(mean * angle.cos(), mean * angle.sin())
