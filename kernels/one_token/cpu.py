"""one_token_values in C++ (csrc), for a few rows at a time."""

import torch
from torch import Tensor

from ..native import direct

# So many rows fit the registers at once. More are taken in parts, which is as fast as torch's
# product, so that a row has the same bits in a batch of any size.
FEW_ROWS = 16


def few_rows(operator: str, rows: Tensor, values: Tensor, width: int) -> Tensor | None:
    """Call the C++ for rows that end in `width` numbers; return None where it is not for them."""
    if values.dtype not in (torch.float32, torch.float64):
        return None
    own = as_matrix(rows.detach()).contiguous()
    module = direct(own, values)
    if module is None:
        return None
    out = torch.empty(len(own), width, dtype=values.dtype)
    call, threads = getattr(module, operator), torch.get_num_threads()
    for part, into in zip(own.split(FEW_ROWS), out.split(FEW_ROWS), strict=True):
        call(part.numpy(), values.numpy(), into.numpy(), threads)
    return out.view(*rows.shape[:-1], width)


def as_matrix(x: Tensor) -> Tensor:
    """Return x [..., N] as [R, N]."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])
