"""LayerNorm of context rows on their way into a product, in torch or C++."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from .dtypes import wide
from .native import native
from .ragged import chunk_rows


class Standardiser:
    """Normalises rows of [x | p], a chunk at a time, before a product in `dtype`.

    C++ reads x once for the statistics and the normalised rows, where it is built; else torch.
    """

    def __init__(self, x: Tensor, positions: Tensor | None, eps: float, dtype: torch.dtype) -> None:
        self.x, self.eps, self.dtype, self.full = x, eps, dtype, wide(x.dtype)
        self.positions = None if positions is None else positions.detach().to(self.full)
        self.width = x.shape[1] + (0 if positions is None else positions.shape[1])
        self.module = native() if x.device.type == "cpu" and x.stride(1) == 1 else None
        if self.module is not None:
            if self.positions is not None:
                self.positions = self.positions.contiguous()
            buffer_dtype = dtype if dtype == torch.bfloat16 else self.full
            rows = min(chunk_rows(self.width, x), len(x))
            self.buffer = x.new_empty(rows, self.width, dtype=buffer_dtype)

    def __call__(
        self, rows: slice, statistics: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the normalised rows, their means and their 1 / SDs.

        The next call overwrites the rows. `statistics`, of all rows, are used if given: then with
        torch, whose rounding is not that of C++.
        """
        x, positions = self.x[rows], self.positions
        if statistics is None and self.module is not None:
            z = self.buffer[: len(x)]
            mean, rstd = (x.new_empty(len(x), dtype=self.full) for _ in range(2))
            period = 1 if positions is None else len(positions)
            self.module.standardise(
                _buffer(x), str(x.dtype)[6:], None if positions is None else _buffer(positions),
                rows.start % period, self.eps, _buffer(z), str(z.dtype)[6:], _buffer(mean),
                _buffer(rstd), torch.get_num_threads(),
            )  # fmt: skip
            return z.to(self.dtype), mean, rstd
        z = x.to(self.full)
        if positions is not None:
            z = torch.cat([z, positions_of(positions, rows, len(self.x))], dim=1)
        if statistics is None:
            z, mean, rstd = torch.native_layer_norm(z, z.shape[1:], None, None, self.eps)
            return z.to(self.dtype), mean.flatten(), rstd.flatten()
        mean, rstd = statistics[0][rows], statistics[1][rows]
        return (z - mean[:, None]).mul_(rstd[:, None]).to(self.dtype), mean, rstd


def _buffer(x: Tensor) -> NDArray[Any]:
    """Return a view for the C++ module, of 16-bit numbers as int16: NumPy has no bfloat16."""
    return (x.detach() if x.itemsize > 2 else x.detach().view(torch.int16)).numpy()


def positions_of(positions: Tensor, rows: slice, tokens: int) -> Tensor:
    """Return the positions of some rows; `positions` are those of all tokens, or repeat."""
    if len(positions) == tokens:
        return positions[rows]
    first, last = rows.start // len(positions), (rows.stop - 1) // len(positions)
    if first == last:
        return positions[rows.start - first * len(positions) : rows.stop - first * len(positions)]
    return positions[torch.arange(rows.start, rows.stop, device=positions.device) % len(positions)]


def standardise_backward(grad: Tensor, z: Tensor, rstd: Tensor) -> Tensor:
    """Return the gradient of raw rows, given that of the normalised rows z [n, W]."""
    grad = grad - grad.mean(1, keepdim=True) - z * (grad * z).mean(1, keepdim=True)
    return grad * rstd[:, None]


def split_gradient(grad: Tensor, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and positions, given that of their rows [T, W]."""
    dx = grad[:, : x.shape[1]].to(x.dtype).contiguous()
    if positions is None:
        return dx, x.new_empty(0)
    periods = len(x) // len(positions) if len(positions) else 0
    dpositions = grad[:, x.shape[1] :].reshape(periods, *positions.shape)
    return dx, dpositions.sum(0).to(positions.dtype)
