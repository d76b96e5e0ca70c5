"""A LayerNorm's gain and shift, folded into the weights that follow it."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..backends import Backend, on_triton, refuse_second_derivative
from ..checks import refuse_forward_mode
from .reference import fold_norm_reference

_LIBRARY = torch.library.Library("motet", "FRAGMENT")
# Registered for the Triton form only.
_LIBRARY.define(
    "fold_norm(Tensor weight, Tensor gain, Tensor shift, SymInt padding, ScalarType dtype) "
    "-> (Tensor, Tensor)"
)
_LIBRARY.define(
    "fold_norm_backward(Tensor grad_folded, Tensor grad_bias, Tensor weight, Tensor gain, "
    "Tensor shift) -> (Tensor, Tensor, Tensor)"
)


def fold_norm(
    weight: Tensor,
    gain: Tensor,
    shift: Tensor,
    *,
    padding: int = 0,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Fold a LayerNorm's gain and shift into the weights behind it: rows are only standardised.

    .. math:: W \mathrm{LN}(x) = W \mathrm{diag}(\gamma) \hat x + W \beta

    On a GPU it is one launch forward and one backward, with casts and padding.

    Args:
        weight: W, [G, E, D], for G heads of E outputs each.
        gain: γ, [D].
        shift: β, [D].
        padding: how many rows of zeros each head gets behind its E.
        dtype: of the results; None for that of the weights, in which they are computed.
        backend: "auto", "triton", "compile" or "eager".

    Returns:
        W diag(γ), [G, E + padding, D], and W β, [G, E + padding]. Differentiable once on Triton.

    Raises:
        ValueError: on Triton, shapes, dtypes or devices that do not fit; or "triton" where it
            cannot compute.
    """
    dtype = weight.dtype if dtype is None else dtype
    if backend != "compile" and on_triton(backend, weight.device.type, weight.dtype):
        _check(weight, gain, shift)
        refuse_forward_mode("fold_norm")
        return torch.ops.motet.fold_norm(weight, gain, shift, padding, dtype)
    with torch.autocast(weight.device.type, enabled=False):
        folded, bias = fold_norm_reference(weight, gain, shift)
    folded, bias = folded.to(dtype), bias.to(dtype)
    if padding:
        folded, bias = pad(folded, (0, 0, 0, padding)), pad(bias, (0, padding))
    return folded, bias


def _check(weight: Tensor, gain: Tensor, shift: Tensor) -> None:
    if weight.ndim != 3:
        raise ValueError(f"weight: expected [G, E, D], got {tuple(weight.shape)}")
    for name, part in (("gain", gain), ("shift", shift)):
        expected = (weight.shape[2:], weight.dtype, weight.device)
        if (part.shape, part.dtype, part.device) != expected:
            raise ValueError(
                f"{name}: expected {weight.dtype} [{weight.shape[2]}] on {weight.device} as "
                f"weight, got {part.dtype} {tuple(part.shape)} on {part.device}"
            )


def _forward(
    weight: Tensor, gain: Tensor, shift: Tensor, padding: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    from . import triton as launchers

    return launchers.fold(
        weight.contiguous(), gain.contiguous(), shift.contiguous(), padding, dtype
    )


def _backward_of(
    grad_folded: Tensor, grad_bias: Tensor, weight: Tensor, gain: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from . import triton as launchers

    return launchers.fold_backward(
        grad_folded.contiguous(), grad_bias.contiguous(), weight.contiguous(), gain.contiguous(),
        shift.contiguous(),
    )  # fmt: skip


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx: Any, grad_folded: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:
    return (
        *torch.ops.motet.fold_norm_backward(grad_folded, grad_bias, *ctx.saved_tensors),
        None,
        None,
    )


def _fake(
    weight: Tensor, gain: Tensor, shift: Tensor, padding: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    groups, rows, width = weight.shape
    shape = groups, rows + padding
    return weight.new_empty(*shape, width, dtype=dtype), weight.new_empty(shape, dtype=dtype)


def _fake_backward(
    grad_folded: Tensor, grad_bias: Tensor, weight: Tensor, gain: Tensor, shift: Tensor
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (weight, gain, shift))


_LIBRARY.impl("fold_norm", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("fold_norm_backward", _backward_of, "CompositeExplicitAutograd")
torch.library.register_fake("motet::fold_norm", _fake, lib=_LIBRARY)
torch.library.register_fake("motet::fold_norm_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd(
    "motet::fold_norm", _backward, setup_context=_setup_context, lib=_LIBRARY
)
refuse_second_derivative(_LIBRARY, "fold_norm")
