"""harmonic_merge in C++ (csrc)."""

from types import ModuleType

import torch
from torch import Tensor


def run(
    module: ModuleType, latents: list[Tensor], weights: list[float], phase: str, out: Tensor
) -> None:
    """Call the C++ on contiguous tensors.

    torch does not see that `out` is written; so its version is raised, which autograd checks.
    """
    buffers = [(z.detach() if z.requires_grad else z).numpy() for z in latents]
    module.harmonic_merge(buffers, weights, phase, out.numpy(), torch.get_num_threads())
    torch.autograd.graph.increment_version(out)
