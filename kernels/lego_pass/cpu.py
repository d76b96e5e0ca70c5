"""lego_pass in torch's operators, on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dropout import keep_mask
from .spectrum import normalise_columns
from .weights import QueryWeights, UpdateWeights


def update_and_query(
    real: Tensor,
    attended: Tensor | None,
    update: UpdateWeights | None,
    imaginary: Tensor | None,
    present: Tensor | None,
    snn: bool,
    dropout_p: float,
    seed: Tensor | None,
    axes: tuple[int, ...],
    rows: int | None,
    scaled: Tensor | None,
    query_weights: QueryWeights | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute lego_pass; see there for the arguments and the results."""
    x = real
    if attended is not None and update is not None:
        x = _updated(x, attended, update, snn, dropout_p, seed)
        if present is not None:
            x = torch.where(present[:, None, None], x, real)
    if axes:
        x, imaginary = normalise_columns(x, imaginary, axes, rows, scaled)
    return x, imaginary, None if query_weights is None else compute_queries(x, query_weights)


def _updated(
    real: Tensor,
    attended: Tensor,
    update: UpdateWeights,
    snn: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    flat = attended.transpose(1, 2).flatten(2)
    if not torch.is_autocast_enabled(flat.device.type):
        flat = flat.to(real.dtype)
    x = real + F.leaky_relu(F.linear(flat, update.out_weight, update.out_bias))
    normed = F.layer_norm(x, x.shape[-1:], update.norm_weight, update.norm_bias)
    value, gate = F.linear(normed, update.up_weight, update.up_bias).chunk(2, dim=-1)
    if torch.is_grad_enabled():
        gated = value * (F.selu(gate) if snn else F.gelu(gate))
    else:  # in place: no backward pass needs the factors
        gated = value.mul_(F.selu(gate, inplace=True) if snn else F.gelu(gate))
    out = F.linear(gated, update.down_weight, update.down_bias)
    if not dropout_p:
        return x + out
    if seed is None:
        return x + F.dropout(out, dropout_p)
    # keep_mask takes all rows as one bag.
    return x + out * keep_mask(seed, 0, out.shape, dropout_p, out)


def compute_queries(real: Tensor, query_weights: QueryWeights) -> Tensor:
    """Return the queries [..., C, Q] of latents [..., C, D]."""
    normed = F.layer_norm(real, real.shape[-1:], query_weights.norm_weight, query_weights.norm_bias)
    return F.linear(normed, query_weights.weight)
