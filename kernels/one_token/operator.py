"""Attention to a single token: its weight is 1, so that the result is the token's value."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import as_matrix, few_rows


def one_token_values(tokens: Tensor, weight: Tensor) -> Tensor:
    r"""Project the only token of each row to its values.

    .. math:: y_r = W_v x_r, \quad W = [W_k \,|\, W_v]

    HEALNet's Eq. 2 for one token: the softmax of a single score is 1, whatever Q and K are, so that
    the result is V. A few rows read the weights once from memory, and a row has the same bits
    beside any others; the gradient of `weight` is written once.

    Args:
        tokens: [..., K].
        weight: [2 M, K], first the M rows of the keys, which are not read. Of the dtype and device
            of the tokens; under autocast of any dtype.

    Returns:
        [..., M]. Differentiable in both, any number of times.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        TypeError: something that is not a tensor.

    Example:
        >>> from motet.kernels.one_token.operator import one_token_values
        >>> one_token_values(torch.randn(8, 1, 2181), torch.randn(1024, 2181)).shape
        torch.Size([8, 1, 512])
    """
    for name, x in (("tokens", tokens), ("weight", weight)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise ValueError(f"{name}: expected floating-point numbers, got {x.dtype}")
    if weight.ndim != 2 or len(weight) % 2:
        raise ValueError(f"weight: expected [2 M, K], got {tuple(weight.shape)}")
    if tokens.ndim < 1 or tokens.shape[-1] != weight.shape[1]:
        raise ValueError(f"tokens: expected [..., {weight.shape[1]}], got {tuple(tokens.shape)}")
    if tokens.device != weight.device:
        raise ValueError(f"weight: expected {tokens.device} as tokens, got {weight.device}")
    autocast = torch.is_autocast_enabled(tokens.device.type)
    if tokens.dtype != weight.dtype and not autocast:
        raise ValueError(f"weight: expected {tokens.dtype} as tokens, got {weight.dtype}")
    if (
        autocast
        or torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
        or torch._C._get_tracing_state() is not None
    ):
        return F.linear(tokens, weight[len(weight) // 2 :])
    return cast(Tensor, _Values.apply(tokens, weight))


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        values = weight.detach()[len(weight) // 2 :]
        y = few_rows("few_rows", tokens, values, len(values))
        return F.linear(tokens, values) if y is None else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore
        tokens, weight = ctx.saved_tensors
        values = weight[len(weight) // 2 :]
        differentiable = torch.is_grad_enabled()  # a second derivative may follow
        dtokens = dweight = None
        if ctx.needs_input_grad[0]:
            if not differentiable:
                dtokens = few_rows("few_rows_backward", grad, values.detach(), tokens.shape[-1])
            dtokens = grad @ values if dtokens is None else dtokens
        if ctx.needs_input_grad[1]:
            grad, tokens = as_matrix(grad).t(), as_matrix(tokens)
            if differentiable:
                return dtokens, F.pad(grad @ tokens, (0, 0, len(values), 0))
            dweight = weight.new_empty(weight.shape)
            dweight[: len(values)].zero_()
            torch.mm(grad, tokens, out=dweight[len(values) :])
        return dtokens, dweight
