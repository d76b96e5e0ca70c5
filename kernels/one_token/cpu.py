"""one_token_values in C++ (csrc), a few rows at a time."""

import torch
from torch import Tensor

from ..native import direct

# Rows of one call of the C++: the registers hold the sums of so many. More rows take several calls,
# which is as fast as torch's product, and gives a row the same bits in a batch of any size.
FEW_ROWS = 16


def few_rows(operator: str, rows: Tensor, values: Tensor, width: int) -> Tensor | None:
    """Call the C++ operator of this name; return [..., width], or None if it cannot compute it."""
    if values.dtype not in (torch.float32, torch.float64):
        return None
    matrix = as_matrix(rows.detach()).contiguous()
    module = direct(matrix, values)
    if module is None:
        return None
    out = torch.empty(len(matrix), width, dtype=values.dtype)
    call, threads = getattr(module, operator), torch.get_num_threads()
    for rows_in, rows_out in zip(matrix.split(FEW_ROWS), out.split(FEW_ROWS), strict=True):
        call(rows_in.numpy(), values.numpy(), rows_out.numpy(), threads)
    return out.view(*rows.shape[:-1], width)


def as_matrix(x: Tensor) -> Tensor:
    """Return x [..., N] as [R, N]."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])
