"""Spherical linear interpolation of whole tensors (MM-Lego, section 3.3)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import Backend, check_backend, on_triton
from ..checks import refuse_forward_mode, same_tensors
from ..layout import check_out, dense_order, original_order, refuse_overlap
from ..native import direct, native
from .coefficients import cosines_of, shares_of, slerp_coefficients
from .cpu import run
from .gradient import gradient
from .reference import slerp_reference

_LIBRARY = torch.library.Library("motet", "FRAGMENT")
_LIBRARY.define("slerp(Tensor[] vectors, float[] weights, str backend) -> Tensor")
_LIBRARY.define("slerp_out(Tensor[] vectors, float[] weights, Tensor(a!) out, str backend) -> ()")
_LIBRARY.define("slerp_backward(Tensor grad, Tensor[] vectors, float[] weights) -> Tensor[]")


def slerp(
    vectors: Sequence[Tensor],
    weights: Sequence[float] | float | None = None,
    out: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    r"""Interpolate real tensors on the sphere, each tensor taken as one flat vector.

    .. math:: \frac{\sin((1-t)\Theta)}{\sin\Theta} a + \frac{\sin(t\Theta)}{\sin\Theta} b

    with Θ the angle between a and b and t the weight of b (MM-Lego, section 3.3). For more than
    two, the weighted Karcher mean of the unit vectors u_i is written as Σ c_i u_i, and Σ c_i v_i is
    returned: for two vectors this is the formula above, whatever their norms. The interpolation is
    linear if a vector is zero, if two are opposite, or if they spread so far that the mean on the
    sphere is not determined.
    Differentiable in `vectors`, once, in reverse mode.

    Args:
        vectors: one or more float32 or float64 tensors of one shape, dtype and device, without
            broadcasting. They are read in place if all are contiguous, or dense in the same order
            of axes (all transposed, say); tensors with other strides are copied.
        weights: one non-negative number per tensor, normalised to sum to 1; None means equal. For
            two tensors also t in [0, 1], the weight of the second: 0 returns the first, 1 the
            second.
        out: where to write the result, without gaps; may be one of `vectors`. Not differentiable.
        backend: "auto" is C++ on the CPU, Triton for up to eight float32 vectors on CUDA, else
            torch; "triton"; or "eager", which is torch, as is "compile".

    Returns:
        A tensor of the same shape and dtype, in memory in the order of axes of the first of
        `vectors` if that has no gaps; `out` if given.

    Raises:
        ValueError: tensors that differ in shape, dtype or device, weights that do not fit, a t
            outside [0, 1], a `backend` that cannot compute them, or an `out` that does not match,
            that has gaps, or that shares only a part of its memory with a vector.
        TypeError: something that is not a tensor.

    Example:
        >>> motet.kernels.slerp([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], 0.5)
        tensor([0.7071, 0.7071])
    """
    vectors = same_tensors(vectors, "vectors", (torch.float32, torch.float64))
    check_backend(backend)
    refuse_forward_mode("slerp")
    shares = shares_of(weights, len(vectors))
    first = vectors[0] if out is None else out
    if out is not None:
        check_out(out, vectors, "vectors", "negated")
    module = direct(*vectors, first) if backend == "auto" else None
    if module is not None:
        result = torch.empty_like(first) if out is None else out
        run(module, vectors, shares, result)
        return result
    if first.device.type == "mps":  # it has no float64, in which angles are computed
        result = torch.ops.motet.slerp([v.cpu() for v in vectors], shares, backend).to(first.device)
        return result if out is None else out.copy_(result)
    return _dispatched(vectors, shares, out, backend)


def _dispatched(
    vectors: list[Tensor], shares: list[float], out: Tensor | None, backend: str
) -> Tensor:
    """Call the torch.library operator, with axes permuted so that dense tensors are contiguous."""
    first = vectors[0] if out is None else out
    order = None if all(v.is_contiguous() for v in [*vectors, first]) else dense_order(first)
    if order is not None:
        vectors, first = [v.permute(order) for v in vectors], first.permute(order)
    if out is None:
        result = torch.ops.motet.slerp(vectors, shares, backend)
        return result if order is None else original_order(result, order)
    torch.ops.motet.slerp_out(vectors, shares, first, backend)
    return out


def _forward(vectors: list[Tensor], weights: list[float], backend: str) -> Tensor:
    out = torch.empty(vectors[0].shape, dtype=vectors[0].dtype, device=vectors[0].device)
    _forward_out(vectors, weights, out, backend)
    return out


def _forward_out(vectors: list[Tensor], weights: list[float], out: Tensor, backend: str) -> None:
    vectors = [v.detach().resolve_neg().contiguous() for v in vectors]
    if backend == "auto" and out.device.type == "cpu":
        module = native()
        if module is not None:
            run(module, vectors, weights, out.detach())
            return
    why_not = "" if out.dtype == torch.float32 else f"takes float32, got {out.dtype}"
    if len(vectors) > 8:
        why_not = f"takes up to 8 vectors, got {len(vectors)}"
    refuse_overlap("vectors", vectors, out)
    if not on_triton(backend, out.device.type, out.dtype, why_not):
        out.copy_(slerp_reference(vectors, weights))
        return
    from . import triton as launchers

    cosines, _ = cosines_of(launchers.products(vectors).cpu())
    launchers.combine(vectors, slerp_coefficients(cosines, weights), out.detach())


def _fake(vectors: list[Tensor], weights: list[float], backend: str) -> Tensor:
    return torch.empty(vectors[0].shape, dtype=vectors[0].dtype, device=vectors[0].device)


def _refuse_second(ctx, grads):
    raise NotImplementedError("slerp: expected one derivative, got a request for the second")


def _setup_context(ctx, inputs, output) -> None:
    vectors, ctx.weights, _ = inputs
    ctx.save_for_backward(*vectors)


def _backward(ctx, grad: Tensor):
    return torch.ops.motet.slerp_backward(grad, list(ctx.saved_tensors), ctx.weights), None, None


_LIBRARY.impl("slerp", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("slerp_out", _forward_out, "CompositeExplicitAutograd")
_LIBRARY.impl("slerp_backward", gradient, "CompositeExplicitAutograd")
torch.library.register_fake("motet::slerp", _fake, lib=_LIBRARY)
torch.library.register_fake(
    "motet::slerp_out", lambda vectors, weights, out, backend: None, lib=_LIBRARY
)
torch.library.register_fake(
    "motet::slerp_backward",
    lambda grad, vectors, weights: [
        torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in vectors
    ],
    lib=_LIBRARY,
)
torch.library.register_autograd("motet::slerp_backward", _refuse_second, lib=_LIBRARY)
torch.library.register_autograd(
    "motet::slerp", _backward, setup_context=_setup_context, lib=_LIBRARY
)
