"""From what the caller passes to the tokens that the latents attend to.

A batch of one modality is checked once (`read`), and becomes a `Context`: dense where every row has
the same number of real tokens, else packed with offsets. A missing modality is an empty bag, so
that padding, missing rows and ragged bags are one thing from here on; but where no row has a second
token, all rows keep a place, so that the shape does not depend on who is missing.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from ..kernels.dtypes import wide
from .modalities import Bag, Modality, Positions, Tabular
from .statistics import layer_norm_statistics

T = TypeVar("T")


class Context(NamedTuple):
    """Tokens that a batch of latents attends to."""

    tokens: Tensor
    """[B, N, D]; or [T, D] with offsets. Without their positions."""
    positions: Tensor | None = None
    """[N, P], which every row shares; or [B, N, P]; or [T, P] with offsets. None without any."""
    offsets: Tensor | None = None
    """int64 [B + 1]: row b owns tokens offsets[b] to offsets[b + 1]. None if dense."""
    single: bool = False
    """Whether it is known that no row has a second token; then the context is dense."""
    counts: Tensor | None = None
    """[B, N], or [T] with offsets: how many tokens each one stands for. None for one."""
    statistics: Tensor | None = None
    """[B, N, 2], or [T, 2] with offsets: mean and variance of each of `tokens`; None if unknown."""
    present: Tensor | None = None
    """Bool [B], of a dense context with one token per row: False where the row has none and holds
    zeros instead. None if every row has its own."""

    @property
    def nonempty(self) -> Tensor | None:
        """Bool [B], whether a row has a token; None if every row has."""
        return self.present if self.offsets is None else self.offsets.diff() > 0

    def rows(self) -> list[Tensor]:
        """Return the tokens of each row of a packed context, [N_b, D] each."""
        assert self.offsets is not None
        return list(self.joined().split(self.offsets.diff().tolist()))

    def joined(self) -> Tensor:
        """Return the tokens with their positions, [B, N, D + P] or [T, D + P]."""
        if self.positions is None:
            return self.tokens
        positions = self.positions.expand(*self.tokens.shape[:-1], -1)
        return torch.cat([self.tokens, positions.to(self.tokens.dtype)], dim=-1)

    def packed(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return all tokens [T, D], their positions [T or N, P], and offsets [B + 1]."""
        if self.offsets is not None:
            return self.tokens, self.positions, self.offsets
        rows, count = self.tokens.shape[:2]
        offsets = count * torch.arange(rows + 1, device=self.tokens.device)
        positions = self.positions
        if positions is not None and positions.ndim == 3:
            positions = positions.flatten(0, 1)
        return self.tokens.flatten(0, 1), positions, offsets

    def packed_counts(self) -> Tensor | None:
        """Return the counts of all tokens, [T]."""
        return None if self.counts is None else self.counts.flatten()

    def packed_statistics(self, eps: float) -> tuple[Tensor, Tensor] | None:
        """Return mean and 1 / sqrt(variance + eps) of all tokens with their positions, [T] each."""
        if self.statistics is None:
            return None
        x, positions, _ = self.packed()
        return layer_norm_statistics(self.statistics.view(-1, 2), x.shape[1], positions, eps)

    def unpacked(self, weights: Tensor) -> Tensor:
        """Return weights [T, H, C] as [B, H, C, N] for a dense context, else as they are."""
        if self.offsets is not None:
            return weights
        return weights.unflatten(0, self.tokens.shape[:2]).permute(0, 2, 3, 1)

    def without_missing(self, weights: Tensor) -> Tensor:
        """Return the weights [B, H, C, N] with zeros where a row has no token."""
        if self.present is None:
            return weights
        return weights.masked_fill(~self.present[:, None, None, None], 0)


class ModalityInput(NamedTuple):
    """One modality of a batch, checked."""

    x: Tensor
    """[I, ...] items of the modality's shape, I = B·K; or [T, D], the values of a jagged tensor."""
    rows: int
    """B."""
    items: int
    """K, items per row; 1 if jagged."""
    keep: Tensor | None
    """Bool, which tokens are real: [I, N], or [T] if jagged. None if all are."""
    offsets: Tensor | None
    """int64 [B + 1] of the caller's jagged tensor, else None."""
    coords: Tensor | None
    """Coordinates in the layout of x."""
    statistics: Tensor | None = None
    """Mean and variance of the tokens, [..., 2] in the layout of x."""

    def context(self, modality: Modality, positions: Positions) -> Context:
        """Turn the batch into tokens and their positions."""
        tokens, places = modality.tokenise(self.x, positions, self.coords)
        if self.offsets is None:
            return self.pack(tokens, self.keep, places, self.statistics)
        if self.keep is None:
            return Context(tokens, places, self.offsets, statistics=self.statistics)
        kept = offsets_of(self.keep.long())  # how many real tokens lie before each
        places, statistics = (
            None if part is None else part[self.keep] for part in (places, self.statistics)
        )
        return Context(tokens[self.keep], places, kept[self.offsets], statistics=statistics)

    def pack(
        self,
        tokens: Tensor,
        keep: Tensor | None,
        positions: Tensor | None = None,
        statistics: Tensor | None = None,
    ) -> Context:
        """Gather the tokens [I, N, D] of each row's items, those where `keep` [I, N] is True.

        Positions are [I, N, P], or [N, P] for all items alike; statistics [I, N, 2]. With one place
        per row nothing is attended: what `keep` leaves out is zero.
        """
        items, per_item = tokens.shape[:2]
        count = self.items * per_item
        tokens = tokens.reshape(self.rows, count, tokens.shape[-1])
        if positions is not None and (positions.ndim == 3 or keep is not None or self.items > 1):
            positions = positions.expand(items, per_item, -1)
            positions = positions.reshape(self.rows, count, positions.shape[-1])
        if statistics is not None:
            statistics = statistics.reshape(self.rows, count, 2)
        if keep is None:
            return Context(tokens, positions, single=count == 1, statistics=statistics)
        keep = keep.reshape(self.rows, count)
        if count == 1:
            missing = ~keep[..., None]
            positions = None if positions is None else positions.masked_fill(missing, 0)
            tokens = tokens.masked_fill(missing, 0)
            return Context(tokens, positions, single=True, present=keep[:, 0])
        positions, statistics = (
            None if part is None else part[keep] for part in (positions, statistics)
        )
        return Context(tokens[keep], positions, offsets_of(keep.sum(1)), statistics=statistics)

    def spread(self, weights: Tensor, context: Context) -> Tensor:
        """Return attention weights in the caller's layout.

        Args:
            weights: [B, H, C, N], or [T, H, C] for packed tokens.
            context: the context they belong to.

        Returns:
            [B, H, C, N], zero at tokens that are not real; for a jagged input, jagged [B, j, H, C].
        """
        if context.offsets is None:
            return weights
        if self.offsets is not None:
            if self.keep is not None:
                full = weights.new_zeros(len(self.keep), *weights.shape[1:])
                full[self.keep] = weights
                weights = full
            return jagged(weights, self.offsets)
        assert self.keep is not None
        keep = self.keep.reshape(self.rows, self.items * self.keep.shape[1])
        full = weights.new_zeros(*keep.shape, *weights.shape[1:])
        full[keep] = weights
        return full.permute(0, 2, 3, 1)


class Names(NamedTuple):
    """What the caller called the parts of one modality; errors name them so."""

    x: str = "x"
    mask: str = "mask"
    present: str = "present"
    coords: str = "coords"
    statistics: str = "statistics"

    @classmethod
    def of(cls, modality: str) -> Self:
        whole = ("inputs", "masks", "present", "coords", "statistics")
        return cls(*(f"{part}[{modality!r}]" for part in whole))


def offsets_of(lengths: Tensor) -> Tensor:
    """Return int64 [B + 1] offsets of bags with the given lengths [B]."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def jagged(values: Tensor, offsets: Tensor) -> Tensor:
    """Return the jagged NestedTensor [B, j, ...] of values [T, ...]."""
    # torch 2.13 logs a warning meant for its own developers at the first call.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    return torch.nested.nested_tensor_from_jagged(values, offsets)


def by_name(
    values: Mapping[str, T] | Sequence[T] | None, names: Sequence[str], what: str
) -> dict[str, T]:
    """Return `values` as a dict over known names, None left out; a sequence follows `names`."""
    if values is None:
        return {}
    if isinstance(values, Mapping):
        unknown = [name for name in values if name not in names]
        if unknown:
            raise ValueError(
                f"{what}: unknown modality {unknown[0]!r}; this model has {', '.join(names)}"
            )
        items = dict(values)
    elif isinstance(values, Sequence) and not isinstance(values, str):
        if len(values) != len(names):
            raise ValueError(
                f"{what}: expected {len(names)} entries, one for each of {', '.join(names)}, got "
                f"{len(values)}"
            )
        items = dict(zip(names, values, strict=True))
    else:
        raise TypeError(
            f"{what}: expected a dict of modality name to tensor, or a sequence in the order "
            f"{', '.join(names)}, got {type(values).__name__}"
        )
    return {name: value for name, value in items.items() if value is not None}


def read_all(
    modalities: Mapping[str, Modality],
    inputs: Any,
    *,
    masks: Any,
    present: Any,
    coords: Any,
    statistics: Any = None,
    like: Tensor,
) -> dict[str, ModalityInput]:
    """Check the inputs of a model with several modalities; `like` has its dtype and device."""
    names = list(modalities)
    inputs = by_name(inputs, names, "inputs")
    masks = by_name(masks, names, "masks")
    present = by_name(present, names, "present")
    coords = by_name(coords, names, "coords")
    statistics = by_name(statistics, names, "statistics")
    if not inputs:
        raise ValueError(
            f"inputs: expected a tensor for at least one of {', '.join(names)}, got none"
        )
    batches = {
        name: read(
            modalities[name],
            inputs[name],
            names=Names.of(name),
            mask=masks.get(name),
            present=present.get(name),
            coords=coords.get(name),
            statistics=statistics.get(name),
            like=like,
        )
        for name in names
        if name in inputs
    }
    sizes = {name: batch.rows for name, batch in batches.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"inputs: expected one batch size, got {sizes}")
    rows = next(iter(sizes.values()))
    # What is said of modalities that all rows miss has to make sense too.
    for name in masks.keys() - inputs.keys():
        _check_bool(masks[name], Names.of(name).mask, like)
    for name in coords.keys() - inputs.keys():
        check_tensor(coords[name], Names.of(name).coords, like)
    for name in statistics.keys() - inputs.keys():
        _check_statistics(modalities[name], statistics[name], Names.of(name), like)
    for name in present.keys() - inputs.keys():
        _check_present(present[name], Names.of(name), rows, like)
        if present[name].any():
            raise ValueError(f"present[{name!r}]: says present, but inputs has no {name!r}")
    return batches


def read(
    modality: Modality,
    x: Any,
    *,
    names: Names,
    mask: Any = None,
    present: Any = None,
    coords: Any = None,
    statistics: Any = None,
    like: Tensor,
) -> ModalityInput:
    """Check one modality's tensor with what describes it."""
    name = names.x
    check_tensor(x, name, like)
    _check_coords(modality, coords, names, like)
    _check_statistics(modality, statistics, names, like)
    if x.is_nested:
        return _read_jagged(modality, x, names, mask, present, coords, statistics)

    items = x.ndim == modality.item_ndim + 2  # [B, K, ...]: K items per row
    if (x.ndim != modality.item_ndim + 1 and not items) or x.shape[-1] != modality.channels:
        raise ValueError(f"{name}: expected {_expected_shape(modality)}, got {tuple(x.shape)}")
    rows, per_row = x.shape[0], x.shape[1] if items else 1
    for part, width, called in _per_token(modality, coords, statistics, names):
        if part.is_nested or tuple(part.shape) != (*x.shape[:-1], width):
            got = "a nested tensor" if part.is_nested else tuple(part.shape)
            raise ValueError(f"{called}: expected {(*x.shape[:-1], width)}, got {got}")

    count = math.prod(modality.token_shape(x))
    keep = None
    if mask is not None:
        keep = _kept_by_mask(modality, x, mask, names.mask, items=items)
        keep = keep.expand(rows * per_row, count)
    if keep is None and (present is not None or per_row * count == 0):
        keep = torch.ones(rows * per_row, count, dtype=torch.bool, device=x.device)
    if present is not None:
        assert keep is not None
        _check_present(present, names, rows, x)
        keep = keep & present.repeat_interleave(per_row)[:, None]
    if items:
        x = x.flatten(0, 1)
        coords = None if coords is None else coords.flatten(0, 1)
        statistics = None if statistics is None else statistics.flatten(0, 1)
    return ModalityInput(x, rows, per_row, keep, None, coords, statistics)


def _per_token(
    modality: Modality, coords: Tensor | None, statistics: Tensor | None, names: Names
) -> list[tuple[Tensor, int, str]]:
    """Return what is given for each token: a tensor, how many numbers a token has, its name."""
    axes = modality.coords if isinstance(modality, Bag) else 0
    given = [(coords, axes, names.coords), (statistics, 2, names.statistics)]
    return [(part, width, name) for part, width, name in given if part is not None]


def _check_coords(modality: Modality, coords: Any, names: Names, like: Tensor) -> None:
    """Raise unless coordinates are there where the modality has them, and in a fitting dtype."""
    if isinstance(modality, Bag) and modality.coords:
        if coords is None:
            raise ValueError(
                f"{names.coords}: expected {modality.coords} coordinates per token, got none"
            )
        # Half precision cannot hold pixels: such models take coordinates in float32 too.
        single = isinstance(coords, Tensor) and coords.dtype == torch.float32
        check_tensor(coords, names.coords, like.float() if single and like.itemsize == 2 else like)
    elif coords is not None:
        raise ValueError(f"{names.coords}: expected none for {modality}, got a value")


def _check_statistics(modality: Modality, statistics: Any, names: Names, like: Tensor) -> None:
    """Raise unless statistics are a tensor as `token_statistics` makes it, of a Bag's tokens."""
    if statistics is None:
        return
    if not isinstance(modality, Bag):
        raise ValueError(f"{names.statistics}: expected none for {modality}, got a value")
    if not isinstance(statistics, Tensor):
        raise TypeError(
            f"{names.statistics}: expected a tensor or None, got {type(statistics).__name__}"
        )
    expected = (wide(like.dtype), like.device)
    if (statistics.dtype, statistics.device) != expected:
        raise ValueError(
            f"{names.statistics}: expected {expected[0]} on {expected[1]}, got "
            f"{statistics.dtype} on {statistics.device}"
        )


def _kept_by_mask(modality: Modality, x: Tensor, mask: Any, name: str, *, items: bool) -> Tensor:
    """Return bool [I, N], which tokens a mask says are real; [I, 1] where it is of whole items.

    True for `items`: x is [B, K, ...], K items per row.
    """
    _check_bool(mask, name, x)
    leading = tuple(x.shape[: 2 if items else 1])
    shape = modality.token_shape(x)
    count = math.prod(shape)
    allowed = [(*leading, count), (*leading, *shape), *([leading] if items else [])]
    if isinstance(modality, Tabular) and modality.tokens == "row":
        allowed = [leading] if items else []
    if tuple(mask.shape) not in allowed:
        expected = " or ".join(map(str, dict.fromkeys(allowed))) or "none (use present)"
        raise ValueError(f"{name}: expected {expected}, got {tuple(mask.shape)}")
    of_items = items and tuple(mask.shape) == leading
    return mask.reshape(math.prod(leading), 1 if of_items else count)


def _read_jagged(
    modality: Modality,
    x: Tensor,
    names: Names,
    mask: Any,
    present: Any,
    coords: Tensor | None,
    statistics: Tensor | None,
) -> ModalityInput:
    name = names.x
    if not isinstance(modality, Bag):
        raise ValueError(f"{name}: expected {_expected_shape(modality)}, got a nested tensor")
    if mask is not None:
        raise ValueError(f"{names.mask}: expected none, since a nested tensor has no padding")
    values, offsets = _jagged_parts(x, name)
    if values.ndim != 2 or values.shape[-1] != modality.features:
        raise ValueError(
            f"{name}: expected {_expected_shape(modality)}, got a nested tensor with values of "
            f"shape {tuple(values.shape)}"
        )
    rows = len(offsets) - 1
    of_tokens = {}
    for part, width, called in _per_token(modality, coords, statistics, names):
        if not part.is_nested:
            raise ValueError(f"{called}: expected a nested tensor as {name} is, got a dense one")
        own, other = _jagged_parts(part, called)
        # On a GPU comparing values would wait for it; the shapes are compared all the same.
        same = other.shape == offsets.shape and (other.is_cuda or torch.equal(offsets, other))
        if own.shape != (len(values), width) or not same:
            raise ValueError(
                f"{called}: expected {width} numbers for each token of {name}, got values of shape "
                f"{tuple(own.shape)}"
            )
        of_tokens[called] = own
    keep = None
    if present is not None:
        _check_present(present, names, rows, x)
        keep = present.repeat_interleave(offsets.diff(), output_size=len(values))
    return ModalityInput(
        values, rows, 1, keep, offsets, of_tokens.get(names.coords), of_tokens.get(names.statistics)
    )


def _jagged_parts(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return the values [T, D] and offsets [B + 1] of a jagged NestedTensor."""
    if x.layout != torch.jagged:
        raise ValueError(
            f"{name}: expected layout=torch.jagged for a nested tensor, got {x.layout}"
        )
    nested: Any = x
    if nested.dim() != 3 or nested._ragged_idx != 1:
        raise ValueError(
            f"{name}: expected a nested tensor [B, j, D], ragged in its second axis, got "
            f"{tuple(nested.shape)}"
        )
    if nested.lengths() is not None:  # with holes between the bags
        return torch.cat(list(nested.unbind())), offsets_of(nested.lengths().long())
    values, offsets = nested.values(), nested.offsets().long()
    if offsets.device.type == "cpu" and (offsets[0] != 0 or offsets[-1] != len(values)):
        raise ValueError(
            f"{name}: expected offsets from 0 to {len(values)}, the number of tokens, got "
            f"{int(offsets[0])} to {int(offsets[-1])}"
        )
    return values, offsets


def _expected_shape(modality: Modality) -> str:
    width = modality.channels
    if isinstance(modality, Tabular):
        return f"[B, {width}]"
    if isinstance(modality, Bag):
        return f"[B, N, {width}] or jagged [B, j, {width}]"
    return f"[B, {', '.join(f'size {i + 1}' for i in range(modality.axes))}, {width}]"


def check_tensor(x: Any, name: str, like: Tensor) -> None:
    """Raise unless x is a tensor of the device and dtype of `like` (or autocast sees to it)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {type(x).__name__}")
    if x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} as the model, got {x.device}")
    if x.layout not in (torch.strided, torch.jagged):
        raise ValueError(f"{name}: expected a dense or jagged tensor, got {x.layout}")
    if x.dtype != like.dtype:
        half = x.dtype in (torch.float16, torch.bfloat16, torch.float32)
        if not (half and torch.is_autocast_enabled(x.device.type)):
            raise ValueError(f"{name}: expected {like.dtype} as the model, got {x.dtype}")


def _check_bool(x: Any, name: str, like: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype != torch.bool:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected a bool tensor, True for real, got {got}")
    if x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} as the model, got {x.device}")


def _check_present(present: Any, names: Names, rows: int, like: Tensor) -> None:
    _check_bool(present, names.present, like)
    if present.shape != (rows,):
        raise ValueError(f"{names.present}: expected ({rows},), got {tuple(present.shape)}")
