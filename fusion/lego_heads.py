"""Merge heads parameter by parameter: by slerp, linearly, or after optimal transport of rows."""

import copy
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .._checks import choice
from ..kernels import slerp
from .layers import Head

HeadMethod = Literal["slerp", "linear", "ot"]


def merge_heads(heads: Sequence[Head], weights: Sequence[float], method: str = "slerp") -> Head:
    """Merge heads parameter by parameter.

    Args:
        heads: one or more of the same shape.
        weights: one per head, summing to 1.
        method: "slerp", "linear" or "ot", see LegoMerge.

    Returns:
        A new Head.

    Raises:
        ValueError: an unknown method.
    """
    choice("method", method, get_args(HeadMethod))
    merged = copy.deepcopy(heads[0])
    if len(heads) == 1:
        return merged
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            values = [head.get_parameter(name).detach() for head in heads]
            if method == "slerp":
                value = slerp(values, weights)
            else:
                if method == "ot":
                    values = [values[0], *(_match_rows(values[0], v) for v in values[1:])]
                value = torch.stack([w * v for w, v in zip(weights, values, strict=True)]).sum(0)
            parameter.copy_(value)
    return merged


def _match_rows(target: Tensor, other: Tensor) -> Tensor:
    """Return the rows of `other` in the order of those of `target` that they match best.

    By optimal transport with equal masses and Euclidean distances.
    """
    try:
        import ot
    except ImportError as error:
        raise ImportError("head='ot' needs POT: pip install POT") from error
    a, b = (t.reshape(len(t), -1).double().cpu().numpy() for t in (target, other))
    mass = np.ones(len(a))
    matched = ot.emd(mass, mass, ot.dist(a, b, metric="euclidean")) @ b
    return torch.from_numpy(matched).to(target).reshape(target.shape)
