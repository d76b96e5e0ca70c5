"""Harmonic merge of complex latents (MM-Lego, Eq. 4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._checks import choice
from ..backends import Backend, check_backend, on_triton
from ..checks import normalised_weights, refuse_forward_mode, same_tensors
from ..layout import check_out, dense_order, original_order, refuse_overlap
from ..native import direct, native
from .cpu import run
from .gradient import gradient
from .reference import harmonic_merge_reference

_LIBRARY = torch.library.Library("motet", "FRAGMENT")
_LIBRARY.define(
    "harmonic_merge(Tensor[] latents, float[] weights, str phase, str backend) -> Tensor"
)
_LIBRARY.define(
    "harmonic_merge_out(Tensor[] latents, float[] weights, str phase, Tensor(a!) out, "
    "str backend) -> ()"
)
# Registered for the Triton form only.
_LIBRARY.define(
    "harmonic_merge_backward(Tensor grad, Tensor merged, Tensor[] latents, float[] weights, "
    "str phase) -> Tensor[]"
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
    `2|a||b| / (|a| + |b|) · exp(i (arg a + arg b) / 2)`. The result is zero where any input is
    zero; one tensor alone is copied. Differentiable in `latents` in reverse mode; at zeros
    the gradient is zero.

    Args:
        latents: one or more complex64 or complex128 tensors of one shape, dtype and device, without
            broadcasting. They are read in place if all are contiguous, or dense in the same order
            of axes (all transposed, say); tensors with other strides are copied.
        weights: one non-negative number per tensor, normalised to sum to 1; None means equal. A
            tensor of weight zero has no effect.
        phase: "principal", the mean of the angles in (-π, π], where a negative real number with an
            imaginary part of -0.0 counts as -π; or "circular", the angle of the mean of the unit
            phasors, which has no branch cut (0 where the phasors cancel exactly).
        out: where to write the result, without gaps; may be one of `latents`. Not differentiable.
        backend: "auto" is C++ on the CPU, Triton for up to eight complex64 tensors on CUDA, else
            torch; "triton"; or "eager", which is torch, as is "compile".

    Returns:
        A complex tensor of the same shape and dtype, in memory in the order of axes of the first of
        `latents` if that has no gaps; `out` if given.

    Raises:
        ValueError: tensors that differ in shape, dtype or device, weights that do not fit, an
            unknown `phase`, a `backend` that cannot compute them, or an `out` that does not match,
            that has gaps, or that shares only a part of its memory with a latent.
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
    latents, weights = _with_weight(latents, weights)
    first = latents[0] if out is None else out
    if out is not None:
        check_out(out, latents, "latents", "conjugated")
    module = direct(*latents, first) if backend == "auto" else None
    if module is not None:
        result = torch.empty_like(first) if out is None else out
        run(module, latents, weights, phase, result)
        return result
    return _dispatched(latents, weights, phase, out, backend)


def _with_weight(latents: list[Tensor], weights: list[float]) -> tuple[list[Tensor], list[float]]:
    """Return the tensors whose weight is not zero, and their weights."""
    if 0.0 not in weights:
        return latents, weights
    return [z for z, w in zip(latents, weights, strict=True) if w], [w for w in weights if w]


def _dispatched(
    latents: list[Tensor], weights: list[float], phase: str, out: Tensor | None, backend: str
) -> Tensor:
    """Call the torch.library operator, with axes permuted so that dense tensors are contiguous."""
    first = latents[0] if out is None else out
    order = None if all(z.is_contiguous() for z in [*latents, first]) else dense_order(first)
    if order is not None:
        latents, first = [z.permute(order) for z in latents], first.permute(order)
    if out is None:
        result = torch.ops.motet.harmonic_merge(latents, weights, phase, backend)
        return result if order is None else original_order(result, order)
    torch.ops.motet.harmonic_merge_out(latents, weights, phase, first, backend)
    return out


def _forward(latents: list[Tensor], weights: list[float], phase: str, backend: str) -> Tensor:
    out = torch.empty(latents[0].shape, dtype=latents[0].dtype, device=latents[0].device)
    _forward_out(latents, weights, phase, out, backend)
    return out


def _forward_out(
    latents: list[Tensor], weights: list[float], phase: str, out: Tensor, backend: str
) -> None:
    latents = [_plain(z) for z in latents]
    if backend == "auto" and out.device.type == "cpu":
        module = native()
        if module is not None:
            return run(module, latents, weights, phase, out.detach())
    refuse_overlap("latents", latents, out)
    if _takes_triton(latents, backend):
        from . import triton as launchers

        launchers.merge(latents, weights, phase, out.detach())
    else:
        out.copy_(harmonic_merge_reference(latents, weights, phase))


def _plain(z: Tensor) -> Tensor:
    """Return z detached and contiguous, with its lazy conjugation and negation carried out."""
    return z.detach().resolve_conj().resolve_neg().contiguous()


def _takes_triton(latents: list[Tensor], backend: str) -> bool:
    first = latents[0]
    why_not = "" if first.dtype == torch.complex64 else f"takes complex64, got {first.dtype}"
    if len(latents) > 8:
        why_not = f"takes up to 8 tensors, got {len(latents)}"
    takes = on_triton(backend, first.device.type, first.dtype.to_real(), why_not)
    return takes and len(latents) > 1


def _backward_of(
    grad: Tensor, merged: Tensor, latents: list[Tensor], weights: list[float], phase: str
) -> list[Tensor]:
    from . import triton as launchers

    parts = [_plain(z) for z in latents]
    return launchers.merge_backward(_plain(grad), _plain(merged), parts, weights, phase)


def _fake_backward(
    grad: Tensor, merged: Tensor, latents: list[Tensor], weights: list[float], phase: str
) -> list[Tensor]:
    return [z.new_empty(z.shape) for z in latents]


def _fake(latents: list[Tensor], weights: list[float], phase: str, backend: str) -> Tensor:
    return torch.empty(latents[0].shape, dtype=latents[0].dtype, device=latents[0].device)


def _setup_context(ctx, inputs, output) -> None:
    latents, ctx.weights, ctx.phase, ctx.backend = inputs
    ctx.save_for_backward(output, *latents)


def _backward(ctx, grad: Tensor):
    merged, *latents = ctx.saved_tensors
    # The kernel has no derivative: torch's operators compute where a second one may follow.
    if not torch.is_grad_enabled() and _takes_triton(latents, ctx.backend):
        operator = torch.ops.motet.harmonic_merge_backward
    else:
        operator = gradient
    return operator(grad, merged, latents, ctx.weights, ctx.phase), None, None, None


_LIBRARY.impl("harmonic_merge", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("harmonic_merge_out", _forward_out, "CompositeExplicitAutograd")
_LIBRARY.impl("harmonic_merge_backward", _backward_of, "CompositeExplicitAutograd")
torch.library.register_fake("motet::harmonic_merge", _fake, lib=_LIBRARY)
torch.library.register_fake("motet::harmonic_merge_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_fake(
    "motet::harmonic_merge_out",
    lambda latents, weights, phase, out, backend: None,
    lib=_LIBRARY,
)
torch.library.register_autograd(
    "motet::harmonic_merge", _backward, setup_context=_setup_context, lib=_LIBRARY
)
