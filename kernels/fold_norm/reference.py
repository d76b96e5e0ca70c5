"""fold_norm as its equation says: the fast forms are compared with this one."""

from torch import Tensor


def fold_norm_reference(weight: Tensor, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return W diag(γ), [G, E, W], and W β, [G, E], of weights [G, E, W]."""
    return weight * gain, weight @ shift
