"""Who computes: Triton on a GPU, else torch."""

import importlib
import os
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from .._checks import choice

Backend = Literal["auto", "triton", "compile", "eager"]
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_backend(backend: str) -> None:
    """Raise unless `backend` is one."""
    choice("backend", backend, ("auto", "triton", "compile", "eager"))


def rows_apart(x: Tensor) -> Tensor:
    """Return x, copied if the numbers of a row are not neighbours, as the Triton kernels want."""
    return x if x.stride(-1) == 1 else x.contiguous()


def dense_order(x: Tensor) -> list[int] | None:
    """Return the order of axes in which x is contiguous, None if there is none."""
    order = sorted(range(x.ndim), key=lambda axis: -x.stride(axis))
    return order if x.permute(order).is_contiguous() else None


def original_order(x: Tensor, order: list[int]) -> Tensor:
    """Return the tensor of which x is permute(order)."""
    return x.permute(sorted(range(x.ndim), key=order.__getitem__))


def refuse_overlap(name: str, tensors: Sequence[Tensor], out: Tensor) -> None:
    """Raise unless each contiguous tensor lies apart from `out`, or is the very same."""
    start, size = out.data_ptr(), out.numel() * out.itemsize
    for i, x in enumerate(tensors):
        if 0 < abs(x.data_ptr() - start) < size:
            raise ValueError(f"out: expected memory apart from {name}[{i}], or {name}[{i}] itself")


def triton_kernels(
    operator: str, backend: str, like: Tensor, *, why_not: str = ""
) -> ModuleType | None:
    """Return the module of an operator's Triton kernels, or None where torch computes.

    "auto" takes Triton for CUDA tensors of up to 32 bits; Triton has no matrix product in float64.
    `why_not` is what the operator itself knows against it.

    Raises:
        ValueError: "triton" was asked for and cannot be had.
    """
    if not on_triton(backend, like.device.type, like.dtype, why_not):
        return None
    return importlib.import_module(f"{__package__}.{operator}_triton")


@torch.compiler.assume_constant_result  # torch.compile traces neither imports nor caches
def on_triton(backend: str, device: str, dtype: torch.dtype, why_not: str = "") -> bool:
    """Return whether Triton computes; arguments and errors as of triton_kernels."""
    if backend == "eager":
        return False
    reason = why_not or _why_not(device, dtype)
    if reason and backend == "triton":
        raise ValueError(f"backend: 'triton' {reason}; 'auto' falls back to torch")
    return not reason


def _why_not(device: str, dtype: torch.dtype) -> str:
    if dtype not in _TRITON_DTYPES:
        return f"takes float32, bfloat16 and float16, got {dtype}"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs CUDA tensors, got {device}"
    return _import_error()


@cache
def _import_error() -> str:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"cannot be imported ({error})"
    return ""


def refuse_second_derivative(library: torch.library.Library, operator: str) -> None:
    """Make differentiating an operator's backward an error; torch would take it for zero."""

    def refuse(ctx, *grads):
        raise NotImplementedError(
            f"{operator}: expected one derivative, got a second; the reference has it (in HEALNet, "
            "use strategy='reference' for it)"
        )

    torch.library.register_autograd(f"motet::{operator}_backward", refuse, lib=library)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return torch.compile of a function, made once for all shapes."""
    return torch.compile(function, dynamic=True)
