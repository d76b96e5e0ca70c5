"""slerp as its equation says: the fast forms are compared with this one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .coefficients import cosines_between, shares_of, slerp_coefficients


def slerp_reference(
    vectors: Sequence[Tensor], weights: Sequence[float] | float | None = None
) -> Tensor:
    """Compute slerp in torch, as its equation says."""
    cosines, _ = cosines_between(vectors)
    coefficients = slerp_coefficients(cosines, shares_of(weights, len(vectors))).tolist()
    terms = [c * v.double() for c, v in zip(coefficients, vectors, strict=True)]
    return torch.stack(terms).sum(0).to(vectors[0].dtype)
