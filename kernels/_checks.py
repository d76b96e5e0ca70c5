"""Argument checks that every operator shares; each error names the argument."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def same_tensors(
    tensors: Sequence[Tensor], name: str, dtypes: tuple[torch.dtype, ...]
) -> list[Tensor]:
    """Return `tensors` as a list after checking that they agree in shape, dtype and device."""
    if isinstance(tensors, Tensor):
        raise TypeError(f"{name}: expected a sequence of tensors, got one tensor")
    tensors = list(tensors)
    if not tensors:
        raise ValueError(f"{name}: expected at least one tensor, got none")
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{i}]: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in dtypes:
            expected = " or ".join(str(dtype) for dtype in dtypes)
            raise ValueError(f"{name}[{i}]: expected {expected}, got {tensor.dtype}")
        for what in ("shape", "dtype", "device"):
            got, expected = getattr(tensor, what), getattr(tensors[0], what)
            if got != expected:
                if what == "shape":
                    got, expected = tuple(got), tuple(expected)
                raise ValueError(
                    f"{name}[{i}]: expected the {what} of {name}[0], {expected}, got {got}"
                )
    return tensors


def normalised_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return `count` weights that sum to 1; None means equal ones."""
    if weights is None:
        return [1.0 / count] * count
    values = [float(w) for w in weights]
    if len(values) != count:
        raise ValueError(f"weights: expected {count} values, one per tensor, got {len(values)}")
    if not all(math.isfinite(w) and w >= 0 for w in values) or sum(values) <= 0:
        raise ValueError(f"weights: expected non-negative numbers, not all zero, got {values}")
    total = math.fsum(values)
    return [w / total for w in values]
