"""Mean and variance of tokens, which a LayerNorm needs and which belong to the data."""

from typing import Any

import torch
from torch import Tensor

from ..kernels.dtypes import wide

# Rows whose copy in full precision is in memory at a time: 128 MiB of 2,048 float32 features.
_ROWS = 1 << 14


def token_statistics(x: Tensor) -> Tensor:
    """Return the mean and the variance of every token, for the `statistics` argument of models.

    They do not depend on a model. Computed once per bag and kept with it, they spare every later
    step a pass over the tokens on a GPU.

    Args:
        x: [..., D] tokens, or jagged [B, j, D]; in the dtype in which a model will be given them.

    Returns:
        [..., 2] or jagged [B, j, 2], float32 (float64 for float64 tokens); without a gradient.

    Raises:
        TypeError: something that is no floating-point tensor.
        ValueError: tokens without a feature, or a nested tensor that is not jagged.

    Example:
        >>> model = motet.HEALNet({"wsi": motet.Bag(32)}, out_features=4)
        >>> bags = torch.randn(2, 50, 32)
        >>> model({"wsi": bags}, statistics={"wsi": motet.token_statistics(bags)}).shape
        torch.Size([2, 4])
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: expected a floating-point tensor, got {got}")
    if x.is_nested:
        nested: Any = x
        if x.layout != torch.jagged or nested.lengths() is not None or nested._ragged_idx != 1:
            raise ValueError(
                "x: expected layout=torch.jagged, ragged in the second axis and without holes, for "
                f"a nested tensor, got {x.layout}"
            )
        values = token_statistics(nested.values())
        return torch.nested.nested_tensor_from_jagged(values, nested.offsets())
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., D] with at least one feature, got {tuple(x.shape)}")
    with torch.no_grad():
        full = wide(x.dtype)
        found = x.new_empty(x[..., 0].numel(), 2, dtype=full)
        rows = x.reshape(-1, x.shape[-1])
        for start in range(0, len(rows), _ROWS):
            part = slice(start, start + _ROWS)
            variance, mean = torch.var_mean(rows[part].to(full), -1, correction=0)
            found[part, 0], found[part, 1] = mean, variance
        return found.view(*x.shape[:-1], 2)


def layer_norm_statistics(
    statistics: Tensor, width: int, positions: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    r"""Return the mean and 1 / sqrt(variance + eps) of tokens that are joined with positions.

    .. math:: \mu = \frac{D \mu_x + P \mu_p}{D + P}, \quad
        \sigma^2 = \frac{D \sigma_x^2 + P \sigma_p^2}{D + P}
        + \frac{D P}{(D + P)^2} (\mu_x - \mu_p)^2

    Args:
        statistics: [T, 2], what `token_statistics` returns of the tokens alone.
        width: D, of the tokens alone.
        positions: [T, P]; or [N, P] for every N tokens; or None.
        eps: of the LayerNorm.

    Returns:
        [T] each.
    """
    mean, variance = statistics.unbind(-1)
    if positions is not None:
        extra = positions.shape[1]
        of_positions = token_statistics(positions).to(statistics.dtype)
        if len(of_positions) != len(statistics):
            periods = len(statistics) // max(1, len(of_positions))
            of_positions = of_positions.repeat(periods, 1)
        own = width / (width + extra)
        other_mean, other_variance = of_positions.unbind(-1)
        apart = mean - other_mean
        mean = torch.lerp(other_mean, mean, own)
        variance = torch.lerp(other_variance, variance, own) + own * (1 - own) * apart.square()
    return mean, (variance + eps).rsqrt()
