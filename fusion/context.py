"""Turn the tensors of the caller into contexts: the tokens that the latents attend to.

`read` checks a batch of one modality, and `ModalityInput.make_context` makes a `Context` of it.
A context is dense, [B, N, D], if every row has N real tokens; otherwise it is packed, [T, D], with
offsets. A missing modality is an empty bag. So padding, missing rows and ragged bags are the same
from here on. One exception: if no row has more than one token, the context stays dense, [B, 1, D],
with zeros in rows without a token. Its shape then does not depend on which rows miss the modality.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from ..kernels.dtypes import wide
from .modalities import Bag, Modality, Positions, Tabular, input_shape
from .statistics import layer_norm_statistics

T = TypeVar("T")


class Context(NamedTuple):
    """The tokens that a batch of latents attends to."""

    tokens: Tensor
    """[B, N, D]; or [T, D] with offsets. Positions not included."""
    positions: Tensor | None = None
    """Encoded positions: [N, P], the same in all rows; or [B, N, P]; or [T, P] with offsets."""
    offsets: Tensor | None = None
    """int64 [B + 1]: the tokens of row b are offsets[b] to offsets[b + 1]. None if dense."""
    single: bool = False
    """True if no row has more than one token; the context is then dense."""
    counts: Tensor | None = None
    """[B, N], or [T] with offsets: the number of equal tokens that each token stands for (adds its
    logarithm to the attention score). None if each counts once."""
    statistics: Tensor | None = None
    """[B, N, 2], or [T, 2] with offsets: mean and variance of each of `tokens`; None if unknown."""
    present: Tensor | None = None
    """Bool [B], only of a dense context with one token per row: False for rows that hold zeros in
    place of a token. None if every row has a token."""

    @property
    def nonempty(self) -> Tensor | None:
        """Bool [B], whether a row has a token; None if every row has one."""
        return self.present if self.offsets is None else self.offsets.diff() > 0

    def rows(self) -> list[Tensor]:
        """Return the tokens of each row of a packed context, [N_b, D] each."""
        assert self.offsets is not None
        return list(self.with_positions().split(self.offsets.diff().tolist()))

    def with_positions(self) -> Tensor:
        """Return tokens and positions concatenated, [B, N, D + P] or [T, D + P]."""
        if self.positions is None:
            return self.tokens
        positions = self.positions.expand(*self.tokens.shape[:-1], -1)
        return torch.cat([self.tokens, positions.to(self.tokens.dtype)], dim=-1)

    def packed(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return all tokens [T, D], positions [T, P] (or shared [N, P]), and offsets [B + 1]."""
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
        """Return mean and 1 / sqrt(variance + eps) of all tokens, [T] each; None if unknown."""
        if self.statistics is None:
            return None
        x, positions, _ = self.packed()
        return layer_norm_statistics(self.statistics.view(-1, 2), x.shape[1], positions, eps)

    def unpack(self, weights: Tensor) -> Tensor:
        """Return weights [T, H, C] as [B, H, C, N] if the context is dense, else unchanged."""
        if self.offsets is not None:
            return weights
        return weights.unflatten(0, self.tokens.shape[:2]).permute(0, 2, 3, 1)

    def zero_missing(self, weights: Tensor) -> Tensor:
        """Return the weights [B, H, C, N] with zeros where a row has no token."""
        if self.present is None:
            return weights
        return weights.masked_fill(~self.present[:, None, None, None], 0)


class ModalityInput(NamedTuple):
    """The checked input of one modality of a batch."""

    x: Tensor
    """[I, ...] items of the modality's shape, I = B·K; or [T, D], the values of a jagged tensor."""
    rows: int
    """B."""
    items: int
    """K, items per row; 1 if jagged."""
    keep: Tensor | None
    """Bool, which tokens are real: [I, N], or [T] if jagged. None if all are."""
    offsets: Tensor | None
    """int64 [B + 1], the offsets of a jagged tensor; None if x is dense."""
    coords: Tensor | None
    """Coordinates in the layout of x."""
    statistics: Tensor | None = None
    """Mean and variance of the tokens, [..., 2] in the layout of x."""

    def make_context(self, modality: Modality, positions: Positions) -> Context:
        """Return the tokens and their encoded positions."""
        tokens, encoded = modality.tokenise(self.x, positions, self.coords)
        if self.offsets is None:
            return self.pack_tokens(tokens, self.keep, encoded, self.statistics)
        if self.keep is None:
            return Context(tokens, encoded, self.offsets, statistics=self.statistics)
        # Entry t is the number of real tokens before token t: it maps old offsets to new ones.
        real_before = offsets_of(self.keep.long())
        encoded, statistics = (
            None if part is None else part[self.keep] for part in (encoded, self.statistics)
        )
        return Context(tokens[self.keep], encoded, real_before[self.offsets], statistics=statistics)

    def pack_tokens(
        self,
        tokens: Tensor,
        keep: Tensor | None,
        positions: Tensor | None = None,
        statistics: Tensor | None = None,
    ) -> Context:
        """Return the context of tokens [I, N, D]: those of each row's items where `keep` is True.

        The context is packed; dense if `keep` [I, N] is None, or if there is one token per row:
        rows without it then hold zeros. Positions are [I, N, P], or [N, P] for all items alike;
        statistics are [I, N, 2].
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

    def restore_layout(self, weights: Tensor, context: Context) -> Tensor:
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


class ArgumentNames(NamedTuple):
    """The names of the arguments that describe one modality, for error messages."""

    x: str = "x"
    mask: str = "mask"
    present: str = "present"
    coords: str = "coords"
    statistics: str = "statistics"

    @classmethod
    def for_modality(cls, modality: str) -> Self:
        """Return the names for a model with several modalities: inputs['wsi'] and so on."""
        arguments = ("inputs", "masks", "present", "coords", "statistics")
        return cls(*(f"{argument}[{modality!r}]" for argument in arguments))


def offsets_of(lengths: Tensor) -> Tensor:
    """Return int64 [B + 1] offsets of bags with the given lengths [B]."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def jagged(values: Tensor, offsets: Tensor) -> Tensor:
    """Return the jagged NestedTensor [B, j, ...] of values [T, ...]."""
    # At the first call torch 2.13 logs a warning that concerns its developers only.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    return torch.nested.nested_tensor_from_jagged(values, offsets)


def by_name(
    values: Mapping[str, T] | Sequence[T] | None, names: Sequence[str], argument: str
) -> dict[str, T]:
    """Return `values` as a dict without None; a sequence has one value per name, in their order."""
    if values is None:
        return {}
    if isinstance(values, Mapping):
        unknown = [name for name in values if name not in names]
        if unknown:
            raise ValueError(
                f"{argument}: unknown modality {unknown[0]!r}; this model has {', '.join(names)}"
            )
        items = dict(values)
    elif isinstance(values, Sequence) and not isinstance(values, str):
        if len(values) != len(names):
            raise ValueError(
                f"{argument}: expected {len(names)} entries, one for each of {', '.join(names)}, "
                f"got {len(values)}"
            )
        items = dict(zip(names, values, strict=True))
    else:
        raise TypeError(
            f"{argument}: expected a dict of modality name to tensor, or a sequence in the order "
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
    arguments = {name: ArgumentNames.for_modality(name) for name in names}
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
            names=arguments[name],
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
    # Masks, coordinates and so on of a modality without a tensor are checked as well.
    for name in masks.keys() - inputs.keys():
        _check_bool(masks[name], arguments[name].mask, like)
    for name in coords.keys() - inputs.keys():
        check_tensor(coords[name], arguments[name].coords, like)
    for name in statistics.keys() - inputs.keys():
        _check_statistics(modalities[name], statistics[name], arguments[name], like)
    for name in present.keys() - inputs.keys():
        _check_present(present[name], arguments[name], rows, like)
        if present[name].any():
            raise ValueError(f"present[{name!r}]: says present, but inputs has no {name!r}")
    return batches


def read(
    modality: Modality,
    x: Any,
    *,
    names: ArgumentNames,
    mask: Any = None,
    present: Any = None,
    coords: Any = None,
    statistics: Any = None,
    like: Tensor,
) -> ModalityInput:
    """Check the tensor of one modality and the tensors that describe its tokens."""
    name = names.x
    check_tensor(x, name, like)
    _check_coords(modality, coords, names, like)
    _check_statistics(modality, statistics, names, like)
    if x.is_nested:
        return _read_jagged(modality, x, names, mask, present, coords, statistics)

    items = x.ndim == modality.item_ndim + 2  # [B, K, ...]: K items per row
    if (x.ndim != modality.item_ndim + 1 and not items) or x.shape[-1] != modality.channels:
        raise ValueError(f"{name}: expected {input_shape(modality)}, got {tuple(x.shape)}")
    rows, per_row = x.shape[0], x.shape[1] if items else 1
    for part, width, argument in _per_token(modality, coords, statistics, names):
        if part.is_nested or tuple(part.shape) != (*x.shape[:-1], width):
            got = "a nested tensor" if part.is_nested else tuple(part.shape)
            raise ValueError(f"{argument}: expected {(*x.shape[:-1], width)}, got {got}")

    count = math.prod(modality.token_shape(x))
    keep = None
    if mask is not None:
        keep = _read_mask(modality, x, mask, names.mask, items=items)
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
    modality: Modality, coords: Tensor | None, statistics: Tensor | None, names: ArgumentNames
) -> list[tuple[Tensor, int, str]]:
    """Return the per-token tensors: tensor, its numbers per token, name of its argument."""
    axes = modality.coords if isinstance(modality, Bag) else 0
    parts = [(coords, axes, names.coords), (statistics, 2, names.statistics)]
    return [(part, width, name) for part, width, name in parts if part is not None]


def _check_coords(modality: Modality, coords: Any, names: ArgumentNames, like: Tensor) -> None:
    """Raise unless coordinates are passed exactly if the modality has them, in a fitting dtype."""
    if isinstance(modality, Bag) and modality.coords:
        if coords is None:
            raise ValueError(
                f"{names.coords}: expected {modality.coords} coordinates per token, got none"
            )
        # Half precision has too few digits for pixels: such models take float32 coordinates too.
        single = isinstance(coords, Tensor) and coords.dtype == torch.float32
        check_tensor(coords, names.coords, like.float() if single and like.itemsize == 2 else like)
    elif coords is not None:
        raise ValueError(f"{names.coords}: expected none for {modality}, got a value")


def _check_statistics(
    modality: Modality, statistics: Any, names: ArgumentNames, like: Tensor
) -> None:
    """Raise unless statistics are None, or for a Bag a tensor as `token_statistics` returns it."""
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


def _read_mask(modality: Modality, x: Tensor, mask: Any, name: str, *, items: bool) -> Tensor:
    """Return the mask as bool [I, N], or as [I, 1] if it masks whole items.

    `items` is True if x is [B, K, ...] with K items per row.
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
    masks_items = items and tuple(mask.shape) == leading
    return mask.reshape(math.prod(leading), 1 if masks_items else count)


def _read_jagged(
    modality: Modality,
    x: Tensor,
    names: ArgumentNames,
    mask: Any,
    present: Any,
    coords: Tensor | None,
    statistics: Tensor | None,
) -> ModalityInput:
    name = names.x
    if not isinstance(modality, Bag):
        raise ValueError(f"{name}: expected {input_shape(modality)}, got a nested tensor")
    if mask is not None:
        raise ValueError(f"{names.mask}: expected none, since a nested tensor has no padding")
    values, offsets = _split_jagged(x, name)
    if values.ndim != 2 or values.shape[-1] != modality.features:
        raise ValueError(
            f"{name}: expected {input_shape(modality)}, got a nested tensor with values of "
            f"shape {tuple(values.shape)}"
        )
    rows = len(offsets) - 1
    per_token = {}
    for part, width, argument in _per_token(modality, coords, statistics, names):
        if not part.is_nested:
            raise ValueError(f"{argument}: expected a nested tensor as {name} is, got a dense one")
        part_values, part_offsets = _split_jagged(part, argument)
        # On a GPU only the shapes are compared: comparing values would wait for the device.
        same_bags = part_offsets.shape == offsets.shape
        same_bags = same_bags and (x.is_cuda or torch.equal(offsets, part_offsets))
        if part_values.shape != (len(values), width) or not same_bags:
            raise ValueError(
                f"{argument}: expected {width} numbers for each token of {name}, got values of "
                f"shape {tuple(part_values.shape)}"
            )
        per_token[argument] = part_values
    keep = None
    if present is not None:
        _check_present(present, names, rows, x)
        keep = present.repeat_interleave(offsets.diff(), output_size=len(values))
    return ModalityInput(
        values, rows, 1, keep, offsets, per_token.get(names.coords), per_token.get(names.statistics)
    )


def _split_jagged(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
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


def check_tensor(x: Any, name: str, like: Tensor) -> None:
    """Raise unless x is a tensor with the device of `like` and its dtype (or one for autocast)."""
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


def _check_present(present: Any, names: ArgumentNames, rows: int, like: Tensor) -> None:
    _check_bool(present, names.present, like)
    if present.shape != (rows,):
        raise ValueError(f"{names.present}: expected ({rows},), got {tuple(present.shape)}")
