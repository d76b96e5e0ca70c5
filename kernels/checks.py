"""Checks of tensors and weights that operators share; each error names the argument."""

import math
import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .dtypes import DTYPES, wide


def same_tensors(
    tensors: Sequence[Tensor],
    name: str,
    dtypes: tuple[torch.dtype, ...],
    *,
    each: tuple[str, ...] = (),
) -> list[Tensor]:
    """Return `tensors` as a list after checking that they agree in shape, dtype and device.

    Errors call the sequence `name` and its tensors by `each`, or name[0], name[1] and so on.
    """
    if isinstance(tensors, Tensor):
        raise TypeError(f"{name}: expected a sequence of tensors, got one tensor")
    tensors = list(tensors)
    if not tensors:
        raise ValueError(f"{name}: expected at least one tensor, got none")
    first = tensors[0]
    for i, tensor in enumerate(tensors):
        if (
            isinstance(tensor, Tensor)
            and tensor.dtype in dtypes
            and tensor.shape == first.shape
            and tensor.dtype == first.dtype
            and tensor.device == first.device
        ):
            continue
        this, other = (each[j] if each else f"{name}[{j}]" for j in (i, 0))
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{this}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in dtypes:
            expected = " or ".join(str(dtype) for dtype in dtypes)
            raise ValueError(f"{this}: expected {expected}, got {tensor.dtype}")
        for attribute in ("shape", "dtype", "device"):
            got, expected = getattr(tensor, attribute), getattr(first, attribute)
            if got != expected:
                if attribute == "shape":
                    got, expected = tuple(got), tuple(expected)
                raise ValueError(
                    f"{this}: expected the {attribute} of {other}, {expected}, got {got}"
                )
    return tensors


def same_kind(name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    """Raise unless `tensor` has the dtype and the device of `like`, which errors call by name."""
    if (tensor.dtype, tensor.device) != (like.dtype, like.device):
        raise ValueError(
            f"{name}: expected {like.dtype} on {like.device} as {like_name}, got {tensor.dtype} on "
            f"{tensor.device}"
        )


def refuse_forward_mode(operator: str) -> None:
    """Raise in forward-mode differentiation: torch would silently take the derivative as zero."""
    if getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0:
        raise NotImplementedError(f"{operator}: expected reverse mode, got forward-mode autograd")


def normalised_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return `count` weights, divided by their sum; None means equal weights."""
    if weights is None:
        return [1.0 / count] * count
    if not isinstance(weights, Iterable) or isinstance(weights, str):
        raise TypeError(f"weights: expected {count} numbers, got {type(weights).__name__}")
    values = [float(w) for w in weights]
    if len(values) != count:
        raise ValueError(f"weights: expected {count} values, one per tensor, got {len(values)}")
    if not all(math.isfinite(w) and w >= 0 for w in values) or max(values) <= 0:
        raise ValueError(f"weights: expected non-negative numbers, not all zero, got {values}")
    largest = max(values)  # so that the sum of huge weights stays finite
    total = math.fsum([w / largest for w in values])
    return [w / largest / total for w in values]


def check_offsets(
    offsets: Tensor,
    tokens: int,
    device: torch.device,
    bags: int | None = None,
    *,
    covers_all: bool = True,
) -> None:
    """Raise unless `offsets` are int64 and rise from 0 to `tokens`.

    If not `covers_all`, the last bag may end before `tokens`. The values are checked on the CPU. On
    CUDA, where reading them waits for the device, they are checked only with MOTET_CHECK=1 in
    the environment; under torch.compile never.
    """
    if not isinstance(offsets, Tensor):
        raise TypeError(f"offsets: expected a tensor, got {type(offsets).__name__}")
    expected = "[B + 1]" if bags is None else f"[{bags + 1}] for {bags} bags"
    wrong_length = offsets.ndim != 1 or len(offsets) < 1 or bags not in (None, len(offsets) - 1)
    if offsets.dtype != torch.int64 or wrong_length:
        raise ValueError(
            f"offsets: expected int64 {expected}, got {offsets.dtype} {tuple(offsets.shape)}"
        )
    if offsets.device != device:
        raise ValueError(f"offsets: expected {device} as the tokens, got {offsets.device}")
    if torch.compiler.is_compiling():
        return
    if device.type == "cpu" or os.environ.get("MOTET_CHECK") == "1":
        bounds = offsets.tolist()
        ends = bounds[-1] == tokens if covers_all else bounds[-1] <= tokens
        if bounds[0] != 0 or not ends or sorted(bounds) != bounds:
            shown = bounds if len(bounds) < 12 else f"{bounds[:5]} … {bounds[-5:]}"
            raise ValueError(
                f"offsets: expected to rise from 0 to {tokens}{'' if covers_all else ' or less'}, "
                f"the number of tokens, got {shown}"
            )


def check_counts(
    counts: Tensor | None, keys: Sequence[int], like: Tensor, dropout_p: float
) -> None:
    """Raise unless counts are None, or positive and of the shape `keys`, without dropout."""
    if counts is None:
        return
    if not isinstance(counts, Tensor):
        raise TypeError(f"counts: expected a tensor, got {type(counts).__name__}")
    expected = (tuple(keys), wide(like.dtype), like.device)
    got = (tuple(counts.shape), counts.dtype, counts.device)
    if got != expected:
        raise ValueError("counts: expected {} {} on {}, got {} {} on {}".format(*expected, *got))
    if counts.requires_grad:
        raise ValueError("counts: expected no gradient, got requires_grad=True; detach them")
    if dropout_p:
        raise ValueError(
            "dropout_p: expected 0 with counts, since the tokens that a key stands for would be "
            f"dropped together, got {dropout_p}"
        )
    if torch.compiler.is_compiling() or not counts.numel():
        return
    # When values are read: as in check_offsets.
    if counts.device.type == "cpu" or os.environ.get("MOTET_CHECK") == "1":
        lowest, highest = (bound.item() for bound in counts.aminmax())
        if not (lowest > 0 and highest < math.inf):  # with a NaN among them, both are NaN
            raise ValueError(
                f"counts: expected positive finite numbers, got {lowest:g} to {highest:g}"
            )


def check_rows(x: Tensor, positions: Tensor | None, offsets: Tensor | None) -> None:
    """Raise unless tokens, positions and offsets fit together."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.ndim != 2 or x.shape[1] == 0 or x.dtype not in DTYPES:
        raise ValueError(
            f"x: expected floating-point [T, D] with D > 0, 16 to 64 bits, got {x.dtype} "
            f"{tuple(x.shape)}"
        )
    if positions is not None:
        if not isinstance(positions, Tensor):
            raise TypeError(f"positions: expected a tensor, got {type(positions).__name__}")
        if not positions.is_floating_point():
            raise ValueError(f"positions: expected floating-point numbers, got {positions.dtype}")
        rows = positions.shape[0] if positions.ndim == 2 else -1
        if rows < 0 or (len(x) and (rows == 0 or len(x) % rows)):
            raise ValueError(
                f"positions: expected [N, P] with {len(x)} tokens a multiple of N, got "
                f"{tuple(positions.shape)}"
            )
        if positions.device != x.device:
            raise ValueError(f"positions: expected {x.device} as x, got {positions.device}")
    if offsets is not None:
        check_offsets(offsets, len(x), x.device, covers_all=False)


def check_statistics(
    statistics: tuple[Tensor, Tensor] | None, x: Tensor
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Return means and 1 / SDs of rows x, as row_statistics returned them, or two None for None.

    Raises:
        ValueError, TypeError: they do not fit x.
    """
    if statistics is None:
        return None, None
    if len(statistics) != 2:
        raise ValueError(f"statistics: expected two tensors, got {len(statistics)}")
    mean, rstd = statistics
    for name, part in {"statistics[0]": mean, "statistics[1]": rstd}.items():
        if not isinstance(part, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(part).__name__}")
        expected = (x.shape[:1], wide(x.dtype), x.device)
        if (part.shape, part.dtype, part.device) != expected:
            raise ValueError(
                f"{name}: expected {expected[1]} [{len(x)}] on {x.device}, got {part.dtype} "
                f"{tuple(part.shape)} on {part.device}"
            )
    return mean, rstd
