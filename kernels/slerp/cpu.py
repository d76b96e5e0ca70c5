"""slerp in C++ (csrc)."""

from types import ModuleType

import torch
from torch import Tensor


def run(module: ModuleType, vectors: list[Tensor], weights: list[float], out: Tensor) -> None:
    """Call the C++ on contiguous tensors.

    torch does not see that `out` is written; so its version is raised, which autograd checks.
    """
    buffers = [(v.detach() if v.requires_grad else v).numpy() for v in vectors]
    module.slerp(buffers, weights, out.numpy(), torch.get_num_threads())
    torch.autograd.graph.increment_version(out)
