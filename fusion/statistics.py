"""Mean and variance of tokens: needed by every LayerNorm, the same for all models."""

from typing import Any

import torch
from torch import Tensor

from ..kernels.dtypes import wide

# Number of rows that are converted to full precision at a time: 128 MiB at 2,048 features.
_ROWS = 1 << 14


def token_statistics(x: Tensor) -> Tensor:
    """Return the mean and the variance of every token, for the `statistics` argument of models.

    They do not depend on a model. If they are computed once per bag and kept with it, no later step
    on a GPU has to read the tokens for them.

    Args:
        x: [..., D] tokens, or jagged [B, j, D]; in the dtype in which the model will get them.

    Returns:
        [..., 2] or jagged [B, j, 2], float32 (float64 for float64 tokens); without a gradient.

    Raises:
        TypeError: something that is not a floating-point tensor.
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
        statistics = x.new_empty(x[..., 0].numel(), 2, dtype=full)
        rows = x.reshape(-1, x.shape[-1])
        for start in range(0, len(rows), _ROWS):
            block = slice(start, start + _ROWS)
            variance, mean = torch.var_mean(rows[block].to(full), -1, correction=0)
            statistics[block, 0], statistics[block, 1] = mean, variance
        return statistics.view(*x.shape[:-1], 2)


def layer_norm_statistics(
    statistics: Tensor, width: int, positions: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    r"""Return the mean and 1 / sqrt(variance + eps) of tokens concatenated with positions.

    .. math:: \mu = \frac{D \mu_x + P \mu_p}{D + P}, \quad
        \sigma^2 = \frac{D \sigma_x^2 + P \sigma_p^2}{D + P}
        + \frac{D P}{(D + P)^2} (\mu_x - \mu_p)^2

    Args:
        statistics: [T, 2], the result of `token_statistics` on the tokens without positions.
        width: D, the width of the tokens without positions.
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
        share = width / (width + extra)
        position_mean, position_variance = of_positions.unbind(-1)
        gap = mean - position_mean
        mean = torch.lerp(position_mean, mean, share)
        variance = (
            torch.lerp(position_variance, variance, share) + share * (1 - share) * gap.square()
        )
    return mean, (variance + eps).rsqrt()
