"""All features of a patient as one row, which is what baselines read."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor


@dataclass(frozen=True)
class BagColumns:
    """The columns of the scaled tokens of a bag.

    Args:
        width: number of columns.
        values: the columns that hold a feature.
        flags: for each of `values`, the column that is 1 where the feature is missing; -1 if no
            token of the training patients lacked it.
        coords: number of coordinate axes; bags with one are time series.
    """

    width: int
    values: tuple[int, ...]
    flags: tuple[int, ...]
    coords: int

    @property
    def summaries(self) -> int:
        """Number of columns of `summarise`."""
        return self.width + 1 + (3 * len(self.values) if self.coords == 1 else 0)

    def summarise(self, tokens: Tensor, offsets: Tensor, coords: Tensor | None) -> Tensor:
        """Return a row of summaries of each bag, float64 [B, S].

        They are the mean of every column; for time series also the minimum, the maximum and the
        last value of every feature; and 1 if the bag has a token, else 0. The summaries of a
        feature are those of the tokens that have it, 0 if no token has it.

        Args:
            tokens: [T, width], the tokens of all bags.
            offsets: [B + 1], where the bags begin and end.
            coords: [T, coords]; the time, for time series.
        """
        tokens, lengths = tokens.double(), offsets.diff()
        rows, size = torch.arange(len(lengths), device=tokens.device), len(lengths)
        row = rows.repeat_interleave(lengths)
        has = torch.ones_like(tokens, dtype=torch.bool)
        for value, flag in zip(self.values, self.flags, strict=True):
            if flag >= 0:
                has[:, value] = tokens[:, flag] == 0
        zeros = tokens.new_zeros(size, self.width)

        def mean(mask: Tensor) -> Tensor:
            count = zeros.index_add(0, row, mask.double())
            return zeros.index_add(0, row, tokens * mask) / count.clamp(min=1)

        parts = [mean(has)]
        if self.coords == 1:
            assert coords is not None

            def reduce(x: Tensor, how: str, start: float) -> Tensor:
                index = row[:, None].expand_as(x)
                reduced = torch.full_like(zeros, start).scatter_reduce(0, index, x, how)
                return torch.where(reduced.isinf(), 0.0, reduced)

            infinity = torch.inf
            parts.append(reduce(tokens.where(has, infinity), "amin", infinity))
            parts.append(reduce(tokens.where(has, -infinity), "amax", -infinity))
            time = coords.double().expand_as(tokens)
            latest = reduce(time.where(has, -infinity), "amax", -infinity)
            parts.append(mean(has & (time == latest[row])))
            columns = list(self.values)
            parts[1:] = [part[:, columns] for part in parts[1:]]
        return torch.cat([*parts, (lengths > 0).double()[:, None]], dim=1)


@dataclass(frozen=True)
class FlatFeatures:
    """How the modalities of a patient become one row.

    The row has the columns of every table and 1 if the patient has it, else 0; then the summaries
    of every bag (`BagColumns.summarise`).

    Args:
        tables: number of columns of every table.
        bags: the columns of every bag.
    """

    tables: dict[str, int]
    bags: dict[str, BagColumns]

    @property
    def width(self) -> int:
        """Length P of the row."""
        return (
            sum(self.tables.values())
            + len(self.tables)
            + sum(bag.summaries for bag in self.bags.values())
        )

    def flatten(
        self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor],
        coords: Mapping[str, Tensor],
    ) -> Tensor:  # fmt: skip
        """Return the rows of a batch of patients, float64 [B, P].

        Args:
            inputs: tables [B, F], and bags as jagged NestedTensors [B, j, D]; all modalities.
            present: bool [B] for tables that some of the patients lack.
            coords: jagged NestedTensors [B, j, A] for bags that have coordinates.
        """
        parts = []
        for name in self.tables:
            table = inputs[name].double()
            has = present.get(name, torch.ones(len(table), dtype=torch.bool, device=table.device))
            parts += [table, has.double()[:, None]]
        for name, bag in self.bags.items():
            tokens, times = inputs[name], coords.get(name)
            times = None if times is None else times.values()
            offsets = cast(Any, tokens).offsets()
            parts.append(bag.summarise(tokens.values(), offsets, times))
        return torch.cat(parts, dim=1)

    def to_config(self) -> dict[str, Any]:
        """Return plain values for JSON; `from_config` reads them."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the features from the values of `to_config`."""
        bags = {
            name: BagColumns(bag["width"], tuple(bag["values"]), tuple(bag["flags"]), bag["coords"])
            for name, bag in config["bags"].items()
        }
        return cls(dict(config["tables"]), bags)
