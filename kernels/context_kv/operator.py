"""Keys and values of context tokens: LayerNorm and all projections in one pass over the tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import Backend, check_backend, compiled, on_triton, refuse_second_derivative
from ..checks import check_rows, check_statistics, refuse_forward_mode
from ..dtypes import wide
from ..layout import rows_apart
from . import cpu
from .reference import context_kv_reference

_LIBRARY = torch.library.Library("motet", "FRAGMENT")
_LIBRARY.define(
    "context_kv(Tensor x, Tensor? positions, Tensor weight, Tensor? bias, Tensor? offsets, "
    "Tensor? mean, Tensor? rstd, float eps, str backend) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "context_kv_backward(Tensor grad, Tensor x, Tensor? positions, Tensor weight, Tensor? offsets, "
    "Tensor mean, Tensor rstd, bool statistics_given, float eps, str backend, bool[3] needed) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def context_kv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    offsets: Tensor | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
    backend: Backend = "auto",
) -> Tensor:
    r"""Normalise context tokens and project them by several weight sets, reading them once.

    .. math:: y_{s,t} = W_s \frac{z_t - \mu_t}{\sqrt{\sigma_t^2 + \epsilon}} + b_s,
        \quad z_t = [x_t \,|\, p_t]

    The K and V of HEALNet's Eq. 2 for all layers at once. The gain γ and shift β of a LayerNorm
    belong in the weights: W = W₀ diag(γ), b = W₀ β. Neither the normalised tokens nor their
    concatenation with the positions is ever stored. Rows whose mean is far above their standard
    deviation lose no digits: the rows, or else the weights, are centred before the product.

    Args:
        x: [T, D] tokens; [B, N, D] counts as B·N of them.
        weight: [S, O, D + P], or [O, D + P] for one set; its dtype is that of the product.
        bias: [S, O] or [O], like `weight`.
        positions: [T, P], joined to the tokens; or [N, P] for every N tokens, T a multiple of N.
        offsets: int64 [B + 1], the bags. They change no number in exact arithmetic; with them a
            bag gives the same bits in any batch. Results behind the last bag are undefined.
        statistics: what row_statistics returned for these rows; None computes them.
        eps: ε.
        backend: "auto", "triton", "compile" (without statistics; with them "eager") or "eager".

    Returns:
        [S, T, O], or [T, O] for one set, in the dtype of `weight`. Differentiable once, in reverse
        mode, in `x`, `positions`, `weight` and `bias`.

    Raises:
        ValueError: shapes, dtypes, devices or offsets that do not fit.
        TypeError: something that is not a tensor.

    Example:
        >>> x, weight = torch.randn(70, 32), torch.randn(2, 64, 32)
        >>> motet.kernels.context_kv(x, weight).shape
        torch.Size([2, 70, 64])
    """
    x = x.flatten(0, 1) if isinstance(x, Tensor) and x.ndim == 3 else x
    check_rows(x, positions, offsets)
    _check_types(weight, bias)
    mean, rstd = check_statistics(statistics, x)
    if one := weight.ndim == 2:
        weight, bias = weight[None], None if bias is None else bias[None]
    _check(x, positions, weight, bias)
    check_backend(backend)
    refuse_forward_mode("context_kv")
    if backend == "compile" and statistics is None:
        y = compiled(context_kv_reference)(x, weight, bias, positions=positions, eps=eps)
    else:
        arguments = (x, positions, weight, bias, offsets, mean, rstd, eps, backend)
        y = torch.ops.motet.context_kv(*arguments)[0]
    return y[0] if one else y


def _check_types(weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless these are tensors."""
    for name, part in {"weight": weight, "bias": bias}.items():
        if not isinstance(part, Tensor) and (name == "weight" or part is not None):
            raise TypeError(f"{name}: expected a tensor, got {type(part).__name__}")


def _check(
    x: Tensor,
    positions: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
) -> None:
    """Raise unless the weights [S, O, W] fit the tokens."""
    width = x.shape[1] + (0 if positions is None else positions.shape[1])
    if weight.ndim != 3 or weight.shape[2] != width:
        raise ValueError(f"weight: expected [S, O, {width}], got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(f"bias: expected {tuple(weight.shape[:2])}, got {tuple(bias.shape)}")
    for name, part in (("weight", weight), ("bias", bias)):
        if part is not None and (
            (part.device, part.dtype) != (x.device, weight.dtype) or not part.is_floating_point()
        ):
            raise ValueError(
                f"{name}: expected {weight.dtype} on {x.device} as x, got {part.dtype} on "
                f"{part.device}"
            )
    if (x.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise ValueError(f"weight: expected a dtype that goes with {x.dtype}, got {weight.dtype}")


def _no_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return two empty tensors, for statistics that the caller gave.

    A torch.library operator must not return one of its arguments.
    """
    return x.new_empty(0, dtype=wide(x.dtype)), x.new_empty(0, dtype=wide(x.dtype))


def _forward(
    x: Tensor,
    positions: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, and the means and 1 / SDs of the rows, empty if the caller gave them."""
    if not on_triton(backend, weight.device.type, weight.dtype):
        return cpu.forward(x, positions, weight, bias, offsets, mean, rstd, eps)
    from ..row_statistics.triton import statistics_of
    from . import triton as launchers

    x, positions = rows_apart(x), None if positions is None else rows_apart(positions)
    statistics_given = mean is not None
    mean, rstd = statistics_of(x, positions, mean, rstd, eps)
    centred, _ = launchers.centre(weight.contiguous(), x.shape[1], None)
    bias = None if bias is None else bias.contiguous()
    y = launchers.project(x, positions, centred, bias, None, mean, rstd, eps)
    return (y, *_no_statistics(x)) if statistics_given else (y, mean, rstd)


def _backward_rows(
    grad: Tensor,
    x: Tensor,
    positions: Tensor | None,
    weight: Tensor,
    offsets: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    statistics_given: bool,
    eps: float,
    backend: str,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, positions, weight and bias, empty where they are not needed.

    `needed` says whether those of x or positions, of the weight, and of the bias are.
    """
    needs_tokens, needs_weight, needs_bias = needed
    dbias = x.new_empty(0)
    dweight = None
    if needs_weight and on_triton(backend, weight.device.type, weight.dtype):
        from . import triton as launchers

        p = None if positions is None else rows_apart(positions)
        dweight, sums = launchers.weight_gradient(
            grad, rows_apart(x), p, mean.contiguous(), rstd.contiguous(), eps
        )
        dbias = sums if needs_bias else dbias
        if not needs_tokens:
            return x.new_empty(0), x.new_empty(0), dweight, dbias
    elif needs_bias:
        dbias = grad.sum(1, dtype=wide(x.dtype)).to(weight.dtype)
    dx, dpositions, cpu_dweight = cpu.backward(
        grad, x, positions, weight, offsets, mean, rstd, statistics_given, eps,
        needs_tokens=needs_tokens, needs_weight=needs_weight and dweight is None,
    )  # fmt: skip
    return dx, dpositions, cpu_dweight if dweight is None else dweight, dbias


def _setup_context(ctx, inputs, output) -> None:
    x, positions, weight, _, offsets, *statistics, ctx.eps, ctx.backend = inputs
    ctx.statistics_given = statistics[0] is not None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else torch makes zeros as the gradient of the statistics
    statistics = statistics if ctx.statistics_given else output[1:]
    ctx.save_for_backward(x, positions, weight, offsets, *statistics)


def _backward(ctx, grad: Tensor | None, *_: None):
    if grad is None:
        return (None,) * 9
    x, positions, weight, offsets, mean, rstd = ctx.saved_tensors
    needs_x, needs_positions, needs_weight, needs_bias = ctx.needs_input_grad[:4]
    dx, dpositions, dweight, dbias = torch.ops.motet.context_kv_backward(
        grad.contiguous(), x, positions, weight, offsets, mean, rstd, ctx.statistics_given,
        ctx.eps, ctx.backend, [needs_x or needs_positions, needs_weight, needs_bias],
    )  # fmt: skip
    return (
        dx if needs_x else None,
        dpositions if needs_positions else None,
        dweight if needs_weight else None,
        dbias if needs_bias else None,
        *[None] * 5,
    )


def _fake(x, positions, weight, bias, offsets, mean, rstd, eps, backend):
    y = weight.new_empty(weight.shape[0], x.shape[0], weight.shape[1])
    if mean is not None:
        return y, *_no_statistics(x)
    return y, *(x.new_empty(x.shape[0], dtype=wide(x.dtype)) for _ in range(2))


def _fake_backward(grad, x, positions, weight, *rest):
    needs_tokens, needs_weight, needs_bias = rest[-1]
    return (
        x.new_empty(x.shape if needs_tokens else 0),
        positions.new_empty(positions.shape)
        if needs_tokens and positions is not None
        else x.new_empty(0),
        weight.new_empty(weight.shape if needs_weight else 0),
        weight.new_empty(weight.shape[:2]) if needs_bias else x.new_empty(0),
    )


_LIBRARY.impl("context_kv", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("context_kv_backward", _backward_rows, "CompositeExplicitAutograd")
torch.library.register_fake("motet::context_kv", _fake, lib=_LIBRARY)
torch.library.register_fake("motet::context_kv_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd(
    "motet::context_kv", _backward, setup_context=_setup_context, lib=_LIBRARY
)
refuse_second_derivative(_LIBRARY, "context_kv")
