"""Whether the C++ module was built: the only place that imports it."""

import warnings
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

CURE = (
    "install a C++20 compiler, then repeat pip install with "
    "--force-reinstall --no-deps --no-cache-dir"
)

try:  # not `from . import _C`, whose error would speak of a circular import
    _module, _reason = import_module("._C", __package__), ""
except ImportError as error:
    _module, _reason = None, str(error)


def native() -> ModuleType | None:
    """Return motet.kernels._C; or None, with one warning that torch computes instead."""
    if _module is None:
        _warn_once()
    return _module


def direct(*tensors: Tensor) -> ModuleType | None:
    """Return the C++ module if it can be called without torch's dispatcher, else None.

    It can for contiguous CPU tensors of class torch.Tensor which need no gradient, outside of
    torch.compile, tracing, function transforms and dispatch modes. The dispatcher takes 15 µs
    through Python, as long as merging 15,000 numbers.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
        or torch._C._get_tracing_state() is not None
    ):
        return None
    grad = torch.is_grad_enabled()
    for x in tensors:
        if (
            type(x) is not Tensor
            or not x.is_cpu
            or (grad and x.requires_grad)
            or not x.is_contiguous()
            or x.is_conj()
            or x.is_neg()
        ):
            return None
    return native()


def status() -> str:
    """Return "" if the C++ module is loaded, else the error of its import."""
    return _reason


@cache
def _warn_once() -> None:
    warnings.warn(
        f"motet.kernels._C is not available ({_reason}): torch computes instead, more slowly, and "
        f"results differ in their last digits. To build it: {CURE}.",
        RuntimeWarning,
        stacklevel=2,
    )
