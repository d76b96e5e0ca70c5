"""slerp in C++ (csrc)."""

from types import ModuleType

import torch
from torch import Tensor


def run(module: ModuleType, vectors: list[Tensor], weights: list[float], out: Tensor) -> None:
    """Call the C++ on contiguous tensors. It writes past torch, which is told so."""
    buffers = [(v.detach() if v.requires_grad else v).numpy() for v in vectors]
    module.slerp(buffers, weights, out.numpy(), torch.get_num_threads())
    torch.autograd.graph.increment_version(out)
