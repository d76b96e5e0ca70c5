"""Harmonic merge of complex latents (MM-Lego, Eq. 4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import choice, normalised_weights, refuse_forward_mode, same_tensors
from .native import native

_LIBRARY = torch.library.Library("motet", "FRAGMENT")
_LIBRARY.define("harmonic_merge(Tensor[] latents, float[] weights, str phase) -> Tensor")
_LIBRARY.define(
    "harmonic_merge_out(Tensor[] latents, float[] weights, str phase, Tensor(a!) out) -> ()"
)


def harmonic_merge(
    latents: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    phase: str = "principal",
    out: Tensor | None = None,
) -> Tensor:
    r"""Merge complex tensors: weighted harmonic mean of magnitudes, weighted mean of phases.

    .. math:: \frac{1}{\sum_i w_i / |z_i|} \exp\Big(i \sum_i w_i \arg z_i\Big)

    MM-Lego, Eq. 4, which is the case of two tensors at equal weights:
    2|a||b| / (|a| + |b|) · exp(i (arg a + arg b) / 2). The result is zero where any input is
    zero; one tensor alone is copied. Differentiable in `latents` in reverse mode; at zeros
    the gradient is zero.

    Args:
        latents: one or more complex64 or complex128 tensors of one shape, dtype and device.
        weights: one non-negative number per tensor, normalised to sum to 1; None means equal. A
            tensor of weight zero takes no part.
        phase: "principal", the mean of the angles in (-π, π], where a negative real number with an
            imaginary part of -0.0 counts as -π; or "circular", the angle of the mean of the unit
            phasors, which has no branch cut (0 where the phasors cancel exactly).
        out: where to write the result, contiguous; may be one of `latents`. Not differentiable.

    Returns:
        A complex tensor of the same shape and dtype; `out` if given.

    Raises:
        ValueError: tensors that differ in shape, dtype or device, weights that do not fit, an
            unknown `phase`, or an `out` that does not match.
        TypeError: something that is not a tensor.

    Example:
        >>> a, b = torch.tensor([1 + 0j]), torch.tensor([0 + 3j])
        >>> motet.kernels.harmonic_merge([a, b])
        tensor([1.0607+1.0607j])
    """
    latents = same_tensors(latents, "latents", (torch.complex64, torch.complex128))
    weights = normalised_weights(weights, len(latents))
    choice("phase", phase, ("principal", "circular"))
    refuse_forward_mode("harmonic_merge")
    if 0.0 in weights:  # what has no weight takes no part
        latents = [z for z, w in zip(latents, weights, strict=True) if w]
        weights = [w for w in weights if w]
    if out is None:
        return torch.ops.motet.harmonic_merge(latents, weights, phase)
    same_tensors([latents[0], out], "out", (latents[0].dtype,), each=("latents[0]", "out"))
    if not out.is_contiguous() or out.is_conj() or out.is_neg():
        raise ValueError("out: expected a contiguous tensor without lazy conjugation")
    if torch.is_grad_enabled() and (out.requires_grad or any(z.requires_grad for z in latents)):
        raise ValueError("out: expected no argument that requires grad; leave out=None to train")
    torch.ops.motet.harmonic_merge_out(latents, weights, phase, out)
    return out


def harmonic_merge_reference(
    latents: Sequence[Tensor], weights: Sequence[float] | None = None, phase: str = "principal"
) -> Tensor:
    """Compute harmonic_merge in torch, literally."""
    if len(latents) == 1:
        return latents[0].clone()
    z = torch.stack(list(latents))
    shares = normalised_weights(weights, len(latents))
    w = torch.tensor(shares, dtype=z.real.dtype, device=z.device)
    w = w.reshape(-1, *[1] * latents[0].ndim)
    magnitude = torch.hypot(z.real, z.imag)
    low = magnitude.amin(0)  # ratios to the smallest, so that nothing over- or underflows
    mean = low / (w * (low / magnitude)).sum(0)
    mean = torch.where(low == 0, torch.zeros_like(mean), mean)
    if phase == "principal":
        angle = (w * torch.atan2(z.imag, z.real)).sum(0)
    else:
        x, y = ((w * part / magnitude).sum(0) for part in (z.real, z.imag))
        angle = torch.where(low == 0, torch.zeros_like(x), torch.atan2(y, x))
    return torch.complex(mean * angle.cos(), mean * angle.sin())


def _fallback(latents: list[Tensor], weights: list[float], phase: str) -> Tensor:
    return harmonic_merge_reference(latents, weights, phase).contiguous()


def _fallback_out(latents: list[Tensor], weights: list[float], phase: str, out: Tensor) -> None:
    out.copy_(harmonic_merge_reference(latents, weights, phase))


def _cpu_out(latents: list[Tensor], weights: list[float], phase: str, out: Tensor) -> None:
    module = native()
    if module is None:
        return _fallback_out(latents, weights, phase, out)
    buffers = [z.detach().resolve_conj().resolve_neg().contiguous().numpy() for z in latents]
    module.harmonic_merge(
        buffers, weights, phase, out.detach().numpy(), torch.get_num_threads()
    )


def _cpu(latents: list[Tensor], weights: list[float], phase: str) -> Tensor:
    out = torch.empty(latents[0].shape, dtype=latents[0].dtype)
    _cpu_out(latents, weights, phase, out)
    return out


def _fake(latents: list[Tensor], weights: list[float], phase: str) -> Tensor:
    return torch.empty(latents[0].shape, dtype=latents[0].dtype, device=latents[0].device)


def _polar(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return |z| and z / |z|, 0 at 0; by parts, since complex division loses tiny numbers."""
    size = torch.hypot(z.real, z.imag)
    safe = torch.where(size > 0, size, 1)
    return size, torch.complex(z.real / safe, z.imag / safe)


def _setup_context(ctx, inputs, output) -> None:
    latents, ctx.weights, ctx.phase = inputs
    ctx.save_for_backward(output, *latents)


def _backward(ctx, grad: Tensor):
    """Differentiate M exp(iφ): dM = M² Σ w_i dm_i / m_i², dφ = Σ v_i dθ_i.

    v_i = w_i for the principal mean of phases. For the circular one, φ = arg s with
    s = Σ w_i u_i, it is w_i Re(u_i conj(s)) / |s|². With r_i = M / m_i, at most 1 / w_i, and
    p = conj(grad) exp(iφ), the gradient of z_i is u_i r_i (w_i Re(p) r_i - i v_i Im(p)): no
    quotient that could overflow.
    """
    merged, *latents = ctx.saved_tensors
    if len(latents) == 1:
        return [grad], None, None
    size, phase = _polar(merged)
    rotated = grad.conj() * phase
    sizes, units = zip(*(_polar(z) for z in latents), strict=True)
    phase_weights: list[float] | list[Tensor] = ctx.weights
    if ctx.phase == "circular":
        total = torch.stack([w * u for w, u in zip(ctx.weights, units, strict=True)]).sum(0)
        square = total.real**2 + total.imag**2
        phase_weights = [
            torch.where(square > 0, w * (u * total.conj()).real / square, 0)
            for w, u in zip(ctx.weights, units, strict=True)
        ]
    grads = []
    for m, unit, w, v in zip(sizes, units, ctx.weights, phase_weights, strict=True):
        ratio = torch.where(m > 0, size / m, 0)
        grads.append(
            unit * torch.complex(w * rotated.real * ratio * ratio, -v * rotated.imag * ratio)
        )
    return grads, None, None


_LIBRARY.impl("harmonic_merge", _fallback, "CompositeExplicitAutograd")
_LIBRARY.impl("harmonic_merge", _cpu, "CPU")
_LIBRARY.impl("harmonic_merge_out", _fallback_out, "CompositeExplicitAutograd")
_LIBRARY.impl("harmonic_merge_out", _cpu_out, "CPU")
torch.library.register_fake("motet::harmonic_merge", _fake, lib=_LIBRARY)
torch.library.register_fake(
    "motet::harmonic_merge_out", lambda latents, weights, phase, out: None, lib=_LIBRARY
)
torch.library.register_autograd(
    "motet::harmonic_merge", _backward, setup_context=_setup_context, lib=_LIBRARY
)
