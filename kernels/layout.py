"""How tensors lie in memory: strides, orders of axes, and the `out` of the merges."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import same_tensors


def rows_apart(x: Tensor) -> Tensor:
    """Return x, or a contiguous copy if its last stride is not 1, which the kernels require."""
    return x if x.stride(-1) == 1 else x.contiguous()


def dense_order(x: Tensor) -> list[int] | None:
    """Return the order of axes in which x is contiguous, or None if it has gaps."""
    order = sorted(range(x.ndim), key=lambda axis: -x.stride(axis))
    return order if x.permute(order).is_contiguous() else None


def original_order(x: Tensor, order: list[int]) -> Tensor:
    """Return the tensor t with t.permute(order) = x."""
    return x.permute(sorted(range(x.ndim), key=order.__getitem__))


def refuse_overlap(name: str, tensors: Sequence[Tensor], out: Tensor) -> None:
    """Raise if a contiguous tensor shares a part of its memory with `out`, but not all of it."""
    start, size = out.data_ptr(), out.numel() * out.itemsize
    for i, x in enumerate(tensors):
        if 0 < abs(x.data_ptr() - start) < size:
            raise ValueError(f"{name}[{i}]: expected memory apart from out, or out itself")


def check_out(out: Tensor, tensors: Sequence[Tensor], name: str, lazily: str) -> None:
    """Raise unless a merge of `tensors`, called `name`, can be written to `out`.

    `lazily` is "conjugated" or "negated", for the error: torch may mark a view so and do it only
    when the view is read.
    """
    first = tensors[0]
    same_tensors([first, out], "out", (first.dtype,), each=(f"{name}[0]", "out"))
    if out.is_conj() or out.is_neg() or not (out.is_contiguous() or dense_order(out)):
        raise ValueError(f"out: expected a tensor without gaps, not lazily {lazily}")
    if torch.is_grad_enabled() and (out.requires_grad or any(x.requires_grad for x in tensors)):
        raise ValueError("out: expected no argument that requires grad; leave it out to train")
