"""Spherical linear interpolation of whole tensors (MM-Lego, section 3.3)."""

import math
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

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
_LIBRARY.define("slerp(Tensor[] vectors, float[] weights, str backend) -> Tensor")
_LIBRARY.define("slerp_out(Tensor[] vectors, float[] weights, Tensor(a!) out, str backend) -> ()")
_LIBRARY.define("slerp_backward(Tensor grad, Tensor[] vectors, float[] weights) -> Tensor[]")

# Closer than this to opposite, the great circle between two vectors is undefined in practice.
_OPPOSITE = 1e-7
# Less of the weighted logarithms along the mean than this cannot stand for its direction.
_FLAT = 1e-3


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
    returned: at two it is the formula above, whatever the norms. Vectors of which one is zero, two
    are opposite, or which spread so far that no mean stands out are interpolated linearly.
    Differentiable in `vectors`, once, in reverse mode.

    Args:
        vectors: one or more float32 or float64 tensors of one shape, dtype and device; there is no
            broadcasting. Any strides: read as they lie where all are contiguous, or dense in one
            order of axes (all transposed, say); else those that differ are copied.
        weights: one non-negative number per tensor, normalised to sum to 1; None means equal. For
            two tensors also t in [0, 1], the weight of the second: 0 returns the first, 1 the
            second.
        out: where to write the result, without gaps; may be one of `vectors`. Not differentiable.
        backend: "auto" is C++ on the CPU, Triton for up to eight float32 vectors on CUDA, else
            torch; "triton"; or "eager", which is torch, as is "compile".

    Returns:
        A tensor of the same shape and dtype, its axes in memory in the order of the first of
        `vectors` where that has no gaps; `out` if given.

    Raises:
        ValueError: tensors that differ in shape, dtype or device, weights that do not fit, a t
            outside [0, 1], a `backend` that cannot be had, or an `out` that does not match, that
            has gaps, or that shares memory with a part of a vector.
        TypeError: something that is not a tensor.

    Example:
        >>> motet.kernels.slerp([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], 0.5)
        tensor([0.7071, 0.7071])
    """
    vectors = same_tensors(vectors, "vectors", (torch.float32, torch.float64))
    check_backend(backend)
    refuse_forward_mode("slerp")
    shares = _shares(weights, len(vectors))
    first = vectors[0] if out is None else out
    if out is not None:
        same_tensors([vectors[0], out], "out", (vectors[0].dtype,), each=("vectors[0]", "out"))
        if out.is_neg() or not (out.is_contiguous() or dense_order(out)):
            raise ValueError("out: expected a tensor without gaps, not lazily negated")
        if torch.is_grad_enabled() and (out.requires_grad or any(v.requires_grad for v in vectors)):
            raise ValueError("out: expected no argument that requires grad; leave it out to train")
    module = direct(*vectors, first) if backend == "auto" else None
    if module is not None:
        result = torch.empty_like(first) if out is None else out
        _run(module, vectors, shares, result)
        return result
    if first.device.type == "mps":  # which has no float64, in which angles are taken
        result = torch.ops.motet.slerp([v.cpu() for v in vectors], shares, backend).to(first.device)
        return result if out is None else out.copy_(result)
    order = None if all(v.is_contiguous() for v in [*vectors, first]) else dense_order(first)
    if order is not None:
        vectors, first = [v.permute(order) for v in vectors], first.permute(order)
    if out is None:
        result = torch.ops.motet.slerp(vectors, shares, backend)
        return result if order is None else original_order(result, order)
    torch.ops.motet.slerp_out(vectors, shares, first, backend)
    return out


def slerp_reference(
    vectors: Sequence[Tensor], weights: Sequence[float] | float | None = None
) -> Tensor:
    """Compute slerp in torch, literally."""
    cosines, _ = _cosines(vectors)
    coefficients = slerp_coefficients(cosines, _shares(weights, len(vectors))).tolist()
    terms = [c * v.double() for c, v in zip(coefficients, vectors, strict=True)]
    return torch.stack(terms).sum(0).to(vectors[0].dtype)


def _shares(weights: Sequence[float] | float | None, count: int) -> list[float]:
    """Return one weight per vector, summing to 1; one number is the weight of the second of two."""
    if weights is None or (isinstance(weights, Iterable) and getattr(weights, "ndim", 1) > 0):
        return normalised_weights(weights, count)
    t = float(cast(float, weights))
    if count != 2 or not 0 <= t <= 1:
        raise ValueError(
            "weights: expected one number in [0, 1] with two vectors, or one number per vector, "
            f"got {t} with {count}"
        )
    return [1.0 - t, t]


def slerp_coefficients(cosines: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the c_i of the weighted Karcher mean Σ c_i u_i, float64 [n].

    Args:
        cosines: float64 [n, n] on the CPU, cosines between the vectors; 0 with itself for a zero
            vector.
        weights: n numbers that sum to 1.
    """
    w = torch.tensor(list(weights), dtype=torch.float64)
    # Negated, so that NaN is caught too.
    if not (cosines.diagonal() > 0.5).all() or not (cosines > _OPPOSITE - 1.0).all():
        return w
    if len(w) == 2:
        angle = math.acos(max(-1.0, min(1.0, cosines[0, 1].item())))
        if math.sin(angle) < 1e-8:
            return w
        return (w * angle).sin() / math.sin(angle)
    # Riemannian gradient steps, in coefficients: the mean of the logarithms of the u_i at u is
    # Σ t_i u_i with t = y - (y·p) c, p the cosines to u and y_i = w_i Θ_i / sin Θ_i.
    c = w
    for _ in range(1000):
        square = c @ cosines @ c
        if not square > 1e-14:
            return w
        c = c / square.sqrt()
        p = cosines @ c
        if p.min() < _OPPOSITE - 1.0:
            return w
        y = w * _inverse_sinc(p)
        t = y - (y @ p) * c
        step = (t @ cosines @ t).clamp_min(0).sqrt().item()
        if step < 1e-13:
            # Where vectors depend on each other c is not unique; this form, which the mean
            # satisfies, is. Without a component along the mean there is no such form.
            return y / (y @ p) if y @ p > _FLAT else w
        c = math.cos(step) * c + math.sin(step) / step * t
    return w


def _inverse_sinc(cosine: Tensor) -> Tensor:
    """Return Θ / sin Θ of cos Θ, continuous at 1."""
    cosine = cosine.clamp(-1, 1)
    sine = ((1 - cosine) * (1 + cosine)).sqrt()
    return torch.where(sine < 1e-6, 1 + (1 - cosine) / 3, cosine.acos() / sine)


def _cosines(vectors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return cosines [n, n] and norms [n], float64 on the CPU; a zero vector has cosine 0."""
    flat = torch.stack([v.detach().double().flatten() for v in vectors])
    scale = flat.abs().amax(1) if flat.shape[1] else flat.new_zeros(len(flat))
    scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)
    flat = flat / scale[:, None]
    cosines, norms = _cosines_of(flat @ flat.T)
    return cosines.cpu(), (norms * scale).cpu()


def _cosines_of(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and norms of the products [n, n] between vectors."""
    norms = gram.diagonal().sqrt()
    product = norms[:, None] * norms
    cosines = torch.where(product > 0, gram / product, 0.0)
    cosines.diagonal().copy_(torch.where(norms > 0, norms / norms, 0.0))
    return cosines, norms


def _forward(vectors: list[Tensor], weights: list[float], backend: str) -> Tensor:
    out = torch.empty(vectors[0].shape, dtype=vectors[0].dtype, device=vectors[0].device)
    _forward_out(vectors, weights, out, backend)
    return out


def _forward_out(vectors: list[Tensor], weights: list[float], out: Tensor, backend: str) -> None:
    vectors = [v.detach().resolve_neg().contiguous() for v in vectors]
    if backend == "auto" and out.device.type == "cpu":
        module = native()
        if module is not None:
            return _run(module, vectors, weights, out.detach())
    wrong = "" if out.dtype == torch.float32 else f"takes float32, got {out.dtype}"
    if len(vectors) > 8:
        wrong = f"takes up to 8 vectors, got {len(vectors)}"
    fast = triton_kernels("slerp", backend, out, why_not=wrong)
    if fast is None:
        out.copy_(slerp_reference(vectors, weights))
    else:
        refuse_overlap("vectors", vectors, out)
        cosines, _ = _cosines_of(fast.products(vectors).cpu())
        fast.combine(vectors, slerp_coefficients(cosines, weights), out.detach())


def _run(module: ModuleType, vectors: list[Tensor], weights: list[float], out: Tensor) -> None:
    """Call the C++ on contiguous tensors. It writes past torch, which is told so."""
    buffers = [(v.detach() if v.requires_grad else v).numpy() for v in vectors]
    module.slerp(buffers, weights, out.numpy(), torch.get_num_threads())
    torch.autograd.graph.increment_version(out)


def _fake(vectors: list[Tensor], weights: list[float], backend: str) -> Tensor:
    return torch.empty(vectors[0].shape, dtype=vectors[0].dtype, device=vectors[0].device)


def _backward_op(grad: Tensor, vectors: list[Tensor], weights: list[float]) -> list[Tensor]:
    """Differentiate Σ c_i v_i: directly, and through the c_i by the implicit function theorem.

    With p = G c (G the cosines) and y_i = w_i Θ_i / sin Θ_i at cos Θ_i = p_i, the coefficients
    satisfy c = y / (y·p). Hence (I - J G) dc = J dG c with J = dc/dp, and for h_i = <grad, v_i>:
    dL = λᵀ dG c with λ = Jᵀ (I - J G)^-T h.
    """
    n = len(vectors)
    cosines, norms = _cosines(vectors)
    direct = slerp_coefficients(cosines, weights)
    w = torch.tensor(weights, dtype=torch.float64)
    grads = [c * grad.double() for c in direct.tolist()]
    if n > 1 and not torch.equal(direct, w):  # linear weights do not depend on the vectors
        p = (cosines @ direct).clamp(-1, 1)
        y = w * _inverse_sinc(p)
        square = (1 - p) * (1 + p)
        slope = torch.where(square < 1e-8, -1 / 3 + 0 * p, (p * _inverse_sinc(p) - 1) / square)
        jacobian = (torch.diag(w * slope) - torch.outer(direct, w * slope * p + y)) / (y @ p)
        h = torch.stack([(grad.double() * v.double()).sum() for v in vectors]).cpu()
        system = torch.eye(n, dtype=torch.float64) - jacobian @ cosines
        adjoint = jacobian.T @ torch.linalg.solve(system.T, h)
        pull = torch.outer(adjoint, direct) + torch.outer(direct, adjoint)
        pull = (pull - torch.diag(pull.diagonal())) / (norms[:, None] * norms)
        own = -(pull * cosines * norms[:, None] * norms).sum(1) / norms**2
        weight = (pull + torch.diag(own)).tolist()
        for i in range(n):
            for j in range(n):
                grads[i] = grads[i] + weight[i][j] * vectors[j].double()
    return [g.to(grad.dtype).contiguous() for g in grads]


def _twice(ctx, grads):
    raise NotImplementedError("slerp: expected one derivative, got a request for the second")


def _setup_context(ctx, inputs, output) -> None:
    vectors, ctx.weights, _ = inputs
    ctx.save_for_backward(*vectors)


def _backward(ctx, grad: Tensor):
    return torch.ops.motet.slerp_backward(grad, list(ctx.saved_tensors), ctx.weights), None, None


_LIBRARY.impl("slerp", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("slerp_out", _forward_out, "CompositeExplicitAutograd")
_LIBRARY.impl("slerp_backward", _backward_op, "CompositeExplicitAutograd")
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
torch.library.register_autograd("motet::slerp_backward", _twice, lib=_LIBRARY)
torch.library.register_autograd(
    "motet::slerp", _backward, setup_context=_setup_context, lib=_LIBRARY
)
