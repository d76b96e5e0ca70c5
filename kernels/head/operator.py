"""The head of a model: from its last latents to the logits."""

from typing import Any

import torch
from torch import Tensor

from ..backends import Backend, on_triton, refuse_second_derivative
from ..checks import refuse_forward_mode
from .reference import head_reference

_LIBRARY = torch.library.Library("motet", "FRAGMENT")
# Registered for the Triton form only. The last two results are the standardised means and 1 / SD,
# which the backward pass needs.
_LIBRARY.define(
    "head(Tensor latents, Tensor gain, Tensor shift, Tensor weight, Tensor bias, float eps) "
    "-> (Tensor, Tensor, Tensor)"
)
# The gradients of latents, gain, shift, weight and bias.
_LIBRARY.define(
    "head_backward(Tensor grad, Tensor normal, Tensor rstd, Tensor gain, Tensor shift, "
    "Tensor weight, SymInt latents, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def head(
    latents: Tensor,
    gain: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    backend: Backend = "auto",
) -> Tensor:
    r"""Compute a linear layer of the LayerNorm of the mean of the latents.

    .. math:: W \, \mathrm{LN}\Big(\frac1C \sum_c S_c\Big) + b

    On a GPU it is one launch forward and one backward. It is computed in the dtype of the weights
    under autocast too: to cast a few rows and weights would take longer than to multiply them.

    Args:
        latents: S, [B, C, D].
        gain: γ of the LayerNorm, [D].
        shift: β of the LayerNorm, [D].
        weight: W, [K, D].
        bias: b, [K].
        eps: of the LayerNorm.
        backend: "auto", "triton" (up to 256 numbers a latent and 1,024 outputs), "compile" or
            "eager" (these two run the same operators here).

    Returns:
        [B, K]. Differentiable once on Triton.

    Raises:
        ValueError: "triton" where it cannot compute; on Triton also shapes, dtypes or devices that
            do not fit.
    """
    fits = weight.shape[-1] <= 256 and weight.shape[0] <= 1024
    why_not = "" if fits else "takes up to 256 numbers a latent, and 1,024 outputs"
    if backend != "compile" and on_triton(backend, weight.device.type, weight.dtype, why_not):
        _check(latents, gain, shift, weight, bias)
        refuse_forward_mode("head")
        return torch.ops.motet.head(latents, gain, shift, weight, bias, eps)[0]
    return head_reference(latents, gain, shift, weight, bias, eps=eps)


def _check(latents: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> None:
    if weight.ndim != 2:
        raise ValueError(f"weight: expected [K, D], got {tuple(weight.shape)}")
    outputs, dim = weight.shape
    if latents.ndim != 3 or not latents.shape[1] or latents.shape[2] != dim:
        raise ValueError(f"latents: expected [B, C, {dim}], got {tuple(latents.shape)}")
    if not latents.is_floating_point() or latents.device != weight.device:
        raise ValueError(
            f"latents: expected floating-point numbers on {weight.device} as weight, got "
            f"{latents.dtype} on {latents.device}"
        )
    for name, part, size in (("gain", gain, dim), ("shift", shift, dim), ("bias", bias, outputs)):
        expected = ((size,), weight.dtype, weight.device)
        if (part.shape, part.dtype, part.device) != expected:
            raise ValueError(
                f"{name}: expected {weight.dtype} [{size}] on {weight.device} as weight, got "
                f"{part.dtype} {tuple(part.shape)} on {part.device}"
            )


def _forward(
    latents: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from . import triton as launchers

    return launchers.forward(
        latents, gain.contiguous(), shift.contiguous(), weight.contiguous(), bias.contiguous(), eps
    )


def _backward_of(
    grad: Tensor,
    normal: Tensor,
    rstd: Tensor,
    gain: Tensor,
    shift: Tensor,
    weight: Tensor,
    latents: int,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    from . import triton as launchers

    return launchers.backward(
        grad.contiguous(), normal.contiguous(), rstd.contiguous(), gain.contiguous(),
        shift.contiguous(), weight.contiguous(), latents, dtype,
    )  # fmt: skip


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    latents, gain, shift, weight, *_ = inputs
    _, normal, rstd = output
    ctx.mark_non_differentiable(normal, rstd)
    ctx.set_materialize_grads(False)
    ctx.latents, ctx.dtype = latents.shape[1], latents.dtype
    ctx.save_for_backward(normal, rstd, gain, shift, weight)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    return (
        *torch.ops.motet.head_backward(grad, *ctx.saved_tensors, ctx.latents, ctx.dtype),
        None,
    )


def _fake(
    latents: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, _, dim = latents.shape
    return (
        weight.new_empty(rows, len(weight)),
        weight.new_empty(rows, dim, dtype=torch.float32),
        weight.new_empty(rows, dtype=torch.float32),
    )


def _fake_backward(
    grad: Tensor,
    normal: Tensor,
    rstd: Tensor,
    gain: Tensor,
    shift: Tensor,
    weight: Tensor,
    latents: int,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    rows, dim = normal.shape
    shapes = gain.shape, shift.shape, weight.shape, weight.shape[:1]
    return (
        normal.new_empty((rows, latents, dim), dtype=dtype),
        *(weight.new_empty(shape) for shape in shapes),
    )


_LIBRARY.impl("head", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("head_backward", _backward_of, "CompositeExplicitAutograd")
torch.library.register_fake("motet::head", _fake, lib=_LIBRARY)
torch.library.register_fake("motet::head_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd(
    "motet::head", _backward, setup_context=_setup_context, lib=_LIBRARY
)
refuse_second_derivative(_LIBRARY, "head")
