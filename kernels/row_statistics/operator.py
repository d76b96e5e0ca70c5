"""Means and 1 / SDs of context rows, computed before the products that need them."""

import torch
from torch import Tensor

from ..backends import Backend, check_backend, on_triton
from ..checks import check_rows
from ..dtypes import wide
from ..layout import rows_apart
from . import cpu

_LIBRARY = torch.library.Library("motet", "FRAGMENT")
_LIBRARY.define(
    "row_statistics(Tensor x, Tensor? positions, float eps, str backend) -> (Tensor, Tensor)"
)


def row_statistics(
    x: Tensor,
    *,
    positions: Tensor | None = None,
    eps: float = 1e-5,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Return the means and 1 / SDs by which a LayerNorm normalises context tokens.

    .. math:: \mu_t, \quad \frac{1}{\sqrt{\sigma_t^2 + \epsilon}}
        \quad\text{of}\quad z_t = [x_t \,|\, p_t]

    context_kv and absorbed_attention take them as `statistics`: for tokens that are read several
    times, by the layers of a model or in every epoch, they need to be computed once only. A row's
    statistics do not depend on other rows. Rows whose mean is far above their standard deviation
    lose no digits.

    Args:
        x: [T, D] tokens; [B, N, D] counts as B·N of them.
        positions: [T, P], joined to the tokens; or [N, P] for every N tokens, T a multiple of N.
        eps: ε.
        backend: "auto", "triton" or "eager" ("compile" counts as "eager").

    Returns:
        μ and 1/√(σ² + ε), [T] each, float32 (float64 for float64 tokens). They have no gradient,
        because the operators that take them include it in their gradient of the tokens.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        TypeError: something that is not a tensor.

    Example:
        >>> x, weight = torch.randn(70, 32), torch.randn(2, 64, 32)
        >>> statistics = motet.kernels.row_statistics(x)
        >>> motet.kernels.context_kv(x, weight, statistics=statistics).shape
        torch.Size([2, 70, 64])
    """
    x = x.flatten(0, 1) if isinstance(x, Tensor) and x.ndim == 3 else x
    check_rows(x, positions, None)
    check_backend(backend)
    with torch.no_grad():
        return torch.ops.motet.row_statistics(x, positions, eps, backend)


def _forward(
    x: Tensor, positions: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "compile" or not on_triton(backend, x.device.type, x.dtype):
        return cpu.forward(x, positions, eps)
    from . import triton as launchers

    return launchers.forward(
        rows_apart(x), None if positions is None else rows_apart(positions), eps
    )


def _fake(x, positions, eps, backend):
    return tuple(x.new_empty(x.shape[0], dtype=wide(x.dtype)) for _ in range(2))


_LIBRARY.impl("row_statistics", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("motet::row_statistics", _fake, lib=_LIBRARY)
