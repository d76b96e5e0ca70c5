"""head as its equation says: the fast forms are compared with this one."""

import torch
import torch.nn.functional as F
from torch import Tensor


def head_reference(
    latents: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, *, eps: float
) -> Tensor:
    """Compute head in torch's operators."""
    mean, device = latents.mean(dim=1), latents.device.type
    if torch.is_autocast_enabled(device):
        mean = mean.to(weight.dtype)
    with torch.autocast(device, enabled=False):
        return F.linear(F.layer_norm(mean, gain.shape, gain, shift, eps), weight, bias)
