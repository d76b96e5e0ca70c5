"""Which backend computes: Triton on a GPU, else torch."""

import importlib
import os
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from .._checks import choice

Backend = Literal["auto", "triton", "compile", "eager"]
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_backend(backend: str) -> None:
    """Raise unless `backend` is the name of a backend."""
    choice("backend", backend, ("auto", "triton", "compile", "eager"))


def on_triton(backend: str, device: str, dtype: torch.dtype, why_not: str = "") -> bool:
    """Return whether Triton computes tensors on this type of device and of this dtype; else torch.

    "auto" takes Triton for CUDA tensors of up to 32 bits; Triton has no matrix product in float64.
    `why_not` is the operator's reason against Triton, "" if it has none: it completes a sentence
    that begins with "'triton'".

    Raises:
        ValueError: `backend` is "triton", and Triton cannot compute these tensors.
    """
    if backend == "eager":
        return False
    reason = why_not or _why_not(device, dtype)
    if reason and backend == "triton":
        raise ValueError(f"backend: 'triton' {reason}; 'auto' falls back to torch")
    return not reason


# torch.compile traces neither imports nor caches. The decorator that sets this mark,
# torch.compiler.assume_constant_result, would import the compiler: 1.4 s for every program.
on_triton._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


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


def capability(x: Tensor) -> int:
    """Return 90 for compute capability 9.0; 0 where the interpreter runs the kernels."""
    if not x.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def multiprocessors(x: Tensor) -> int:
    """Return the number of multiprocessors: of programs that run at a time, if each fills one.

    3 in the interpreter, so that tests have some programs.
    """
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3


def refuse_second_derivative(library: torch.library.Library, operator: str) -> None:
    """Make a second derivative of an operator an error; torch would silently take it as zero."""

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
