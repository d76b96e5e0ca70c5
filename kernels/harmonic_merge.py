"""Harmonic merge of complex latents (MM-Lego, Eq. 4)."""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .._checks import choice
from .backends import (
    Backend,
    check_backend,
    dense_order,
    original_order,
    refuse_overlap,
    triton_kernels,
)
from .checks import normalised_weights, refuse_forward_mode, same_tensors
from .native import direct, native

_LIBRARY = torch.library.Library("motet", "FRAGMENT")
_LIBRARY.define(
    "harmonic_merge(Tensor[] latents, float[] weights, str phase, str backend) -> Tensor"
)
_LIBRARY.define(
    "harmonic_merge_out(Tensor[] latents, float[] weights, str phase, Tensor(a!) out, "
    "str backend) -> ()"
)


def harmonic_merge(
    latents: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    phase: str = "principal",
    out: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    r"""Merge complex tensors: weighted harmonic mean of magnitudes, weighted mean of phases.

    .. math:: \frac{1}{\sum_i w_i / |z_i|} \exp\Big(i \sum_i w_i \arg z_i\Big)

    MM-Lego, Eq. 4, which is the case of two tensors at equal weights:
    2|a||b| / (|a| + |b|) · exp(i (arg a + arg b) / 2). The result is zero where any input is
    zero; one tensor alone is copied. Differentiable in `latents` in reverse mode; at zeros
    the gradient is zero.

    Args:
        latents: one or more complex64 or complex128 tensors of one shape, dtype and device; there
            is no broadcasting. Any strides: read as they lie where all are contiguous, or dense in
            one order of axes (all transposed, say); else those that differ are copied.
        weights: one non-negative number per tensor, normalised to sum to 1; None means equal. A
            tensor of weight zero takes no part.
        phase: "principal", the mean of the angles in (-π, π], where a negative real number with an
            imaginary part of -0.0 counts as -π; or "circular", the angle of the mean of the unit
            phasors, which has no branch cut (0 where the phasors cancel exactly).
        out: where to write the result, without gaps; may be one of `latents`. Not differentiable.
        backend: "auto" is C++ on the CPU, Triton for up to eight complex64 tensors on CUDA, else
            torch; "triton"; or "eager", which is torch, as is "compile".

    Returns:
        A complex tensor of the same shape and dtype, its axes in memory in the order of the first
        of `latents` where that has no gaps; `out` if given.

    Raises:
        ValueError: tensors that differ in shape, dtype or device, weights that do not fit, an
            unknown `phase`, a `backend` that cannot be had, or an `out` that does not match, that
            has gaps, or that shares memory with a part of a latent.
        TypeError: something that is not a tensor.

    Example:
        >>> a, b = torch.tensor([1 + 0j]), torch.tensor([0 + 3j])
        >>> motet.kernels.harmonic_merge([a, b])
        tensor([1.0607+1.0607j])
    """
    latents = same_tensors(latents, "latents", (torch.complex64, torch.complex128))
    weights = normalised_weights(weights, len(latents))
    choice("phase", phase, ("principal", "circular"))
    check_backend(backend)
    refuse_forward_mode("harmonic_merge")
    if 0.0 in weights:  # what has no weight takes no part
        latents = [z for z, w in zip(latents, weights, strict=True) if w]
        weights = [w for w in weights if w]
    first = latents[0] if out is None else out
    if out is not None:
        same_tensors([latents[0], out], "out", (latents[0].dtype,), each=("latents[0]", "out"))
        if out.is_conj() or out.is_neg() or not (out.is_contiguous() or dense_order(out)):
            raise ValueError("out: expected a tensor without gaps, not lazily conjugated")
        if torch.is_grad_enabled() and (out.requires_grad or any(z.requires_grad for z in latents)):
            raise ValueError("out: expected no argument that requires grad; leave it out to train")
    module = direct(*latents, first) if backend == "auto" else None
    if module is not None:
        result = torch.empty_like(first) if out is None else out
        _run(module, latents, weights, phase, result)
        return result
    order = None if all(z.is_contiguous() for z in [*latents, first]) else dense_order(first)
    if order is not None:
        latents, first = [z.permute(order) for z in latents], first.permute(order)
    if out is None:
        result = torch.ops.motet.harmonic_merge(latents, weights, phase, backend)
        return result if order is None else original_order(result, order)
    torch.ops.motet.harmonic_merge_out(latents, weights, phase, first, backend)
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


def _forward(latents: list[Tensor], weights: list[float], phase: str, backend: str) -> Tensor:
    out = torch.empty(latents[0].shape, dtype=latents[0].dtype, device=latents[0].device)
    _forward_out(latents, weights, phase, out, backend)
    return out


def _forward_out(
    latents: list[Tensor], weights: list[float], phase: str, out: Tensor, backend: str
) -> None:
    latents = [z.detach().resolve_conj().resolve_neg().contiguous() for z in latents]
    if backend == "auto" and out.device.type == "cpu":
        module = native()
        if module is not None:
            return _run(module, latents, weights, phase, out.detach())
    wrong = "" if out.dtype == torch.complex64 else f"takes complex64, got {out.dtype}"
    if len(latents) > 8:
        wrong = f"takes up to 8 tensors, got {len(latents)}"
    fast = triton_kernels("harmonic_merge", backend, out.real, why_not=wrong)
    if fast is not None and len(latents) > 1:
        refuse_overlap("latents", latents, out)
        fast.merge(latents, weights, phase, out.detach())
    else:
        out.copy_(harmonic_merge_reference(latents, weights, phase))


def _run(
    module: ModuleType, latents: list[Tensor], weights: list[float], phase: str, out: Tensor
) -> None:
    """Call the C++ on contiguous tensors. It writes past torch, which is told so."""
    buffers = [(z.detach() if z.requires_grad else z).numpy() for z in latents]
    module.harmonic_merge(buffers, weights, phase, out.numpy(), torch.get_num_threads())
    torch.autograd.graph.increment_version(out)


def _fake(latents: list[Tensor], weights: list[float], phase: str, backend: str) -> Tensor:
    return torch.empty(latents[0].shape, dtype=latents[0].dtype, device=latents[0].device)


def _polar(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return |z| and z / |z|, 0 at 0; by parts, since complex division loses tiny numbers."""
    size = torch.hypot(z.real, z.imag)
    safe = torch.where(size > 0, size, 1)
    return size, torch.complex(z.real / safe, z.imag / safe)


def _setup_context(ctx, inputs, output) -> None:
    latents, ctx.weights, ctx.phase, _ = inputs
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
        return [grad], None, None, None
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
    return grads, None, None, None


_LIBRARY.impl("harmonic_merge", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("harmonic_merge_out", _forward_out, "CompositeExplicitAutograd")
torch.library.register_fake("motet::harmonic_merge", _fake, lib=_LIBRARY)
torch.library.register_fake(
    "motet::harmonic_merge_out",
    lambda latents, weights, phase, out, backend: None,
    lib=_LIBRARY,
)
torch.library.register_autograd(
    "motet::harmonic_merge", _backward, setup_context=_setup_context, lib=_LIBRARY
)
