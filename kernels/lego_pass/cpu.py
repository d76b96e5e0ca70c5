"""lego_pass in torch's operators, on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .spectrum import normalised
from .weights import Asking, Update


def update_and_ask(
    real: Tensor,
    gathered: Tensor,
    update: Update,
    imaginary: Tensor | None,
    present: Tensor | None,
    snn: bool,
    keep: Tensor | None,
    axes: tuple[int, ...],
    rows: int | None,
    scaled: Tensor | None,
    asking: Asking | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return what lego_pass returns, of its arguments."""
    flat = gathered.transpose(1, 2).flatten(2)
    x = real + F.leaky_relu(F.linear(flat, update.out_weight, update.out_bias))
    normed = F.layer_norm(x, x.shape[-1:], update.norm_weight, update.norm_bias)
    value, gate = F.linear(normed, update.up_weight, update.up_bias).chunk(2, dim=-1)
    if torch.is_grad_enabled():
        gated = value * (F.selu(gate) if snn else F.gelu(gate))
    else:  # nobody will ask for the factors again
        gated = value.mul_(F.selu(gate, inplace=True) if snn else F.gelu(gate))
    out = F.linear(gated, update.down_weight, update.down_bias)
    x = x + (out if keep is None else out * keep)
    if present is not None:
        x = torch.where(present[:, None, None], x, real)
    if axes:
        x, imaginary = normalised(x, imaginary, axes, rows, scaled)
    return x, imaginary, None if asking is None else ask(x, asking)


def ask(real: Tensor, asking: Asking) -> Tensor:
    """Return the queries [..., C, H · E] of latents [..., C, D]."""
    normed = F.layer_norm(real, real.shape[-1:], asking.norm_weight, asking.norm_bias)
    return F.linear(normed, asking.weight)
