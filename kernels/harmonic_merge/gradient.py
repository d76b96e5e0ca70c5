"""The derivative of harmonic_merge, in torch."""

import torch
from torch import Tensor


def _polar(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return |z| and z / |z|, 0 at 0; parts are divided: complex division loses tiny numbers."""
    size = torch.hypot(z.real, z.imag)
    safe = torch.where(size > 0, size, 1)
    return size, torch.complex(z.real / safe, z.imag / safe)


def gradient(
    grad: Tensor, merged: Tensor, latents: list[Tensor], weights: list[float], phase: str
) -> list[Tensor]:
    """Return the gradients of the latents, given that of the merge, M exp(iφ).

    dM = M² Σ w_i dm_i / m_i², dφ = Σ v_i dθ_i, where v_i = w_i for the principal mean of phases.
    For the circular one, φ = arg s with s = Σ w_i u_i, it is w_i Re(u_i conj(s)) / |s|². With
    r_i = M / m_i, at most 1 / w_i, and p = conj(grad) exp(iφ), the gradient of z_i is
    u_i r_i (w_i Re(p) r_i - i v_i Im(p)): no quotient that could overflow.
    """
    if len(latents) == 1:
        return [grad]
    size, turn = _polar(merged)
    rotated = grad.conj() * turn
    sizes, units = zip(*(_polar(z) for z in latents), strict=True)
    phase_weights: list[float] | list[Tensor] = weights
    if phase == "circular":
        total = torch.stack([w * u for w, u in zip(weights, units, strict=True)]).sum(0)
        square = total.real**2 + total.imag**2
        phase_weights = [
            torch.where(square > 0, w * (u * total.conj()).real / square, 0)
            for w, u in zip(weights, units, strict=True)
        ]
    grads = []
    for m, unit, w, v in zip(sizes, units, weights, phase_weights, strict=True):
        ratio = torch.where(m > 0, size / m, 0)
        grads.append(
            unit * torch.complex(w * rotated.real * ratio * ratio, -v * rotated.imag * ratio)
        )
    return grads
