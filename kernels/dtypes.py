"""Dtypes that the operators take, and those that they sum up in."""

import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over tensors of `dtype`: statistics, softmax, gradients."""
    return torch.float64 if dtype == torch.float64 else torch.float32
