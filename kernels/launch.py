"""What launchers of Triton kernels share: the launch, and arithmetic on sizes."""

from typing import Any

import torch
from torch import Tensor


def launch(
    kernel: Any, device_of: Tensor, grid: tuple[int, ...], *arguments: Any, **options: Any
) -> None:
    """Launch a Triton kernel, `kernel[grid](*arguments, **options)`, on the device of a tensor.

    The arguments are not type-checked: Triton's decorator declares the parameters of the kernel,
    but not num_warps and num_stages.
    """
    with torch.cuda.device_of(device_of):
        kernel[grid](*arguments, **options)


def cdiv(size: int, block: int) -> int:
    """Return how many blocks hold `size`."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """Return the smallest power of 2 that is not less than `size`."""
    return 1 << max(size - 1, 0).bit_length()
