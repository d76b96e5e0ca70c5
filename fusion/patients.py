"""Patients of one part of a split as a torch dataset: rows of tables, bags read when needed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from .context import jagged
from .modalities import Bag, Modality, Tabular
from .preprocessing import BagScaling, BagSource, Scaling, TableScaling
from .statistics import token_statistics

# Scaled bags of at most this size are kept in memory; a larger store is read again every epoch.
CACHE_BYTES = 2 << 30


@dataclass(frozen=True)
class Ragged:
    """Bags of a batch: values [T, D], offsets [B + 1]."""

    values: Tensor
    offsets: Tensor

    def nested(self) -> Tensor:
        """Return the jagged NestedTensor [B, j, D]."""
        return jagged(self.values, self.offsets)


@dataclass(frozen=True)
class PatientBatch:
    """Inputs of some patients, in the form that models take, and their targets."""

    x: dict[str, Tensor | Ragged]
    coords: dict[str, Ragged]
    present: dict[str, Tensor]
    """Bool [B], for the tables that some rows miss."""
    target: dict[str, Tensor]
    statistics: dict[str, Ragged] = field(default_factory=dict)
    """Mean and variance of every token, where the bags keep them."""

    def to(self, device: Any, **options: Any) -> Self:
        """Move the batch; Lightning calls this. A GPU copies pinned memory by itself."""
        options.setdefault("non_blocking", torch.device(device).type == "cuda")
        return self._each(lambda tensor: tensor.to(device, **options))

    def pin_memory(self) -> Self:
        """Copy the batch to memory from which a GPU copies by itself; torch's loader calls this."""
        return self._each(lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        def changed(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            if isinstance(value, Ragged):
                return Ragged(change(value.values), change(value.offsets))
            return {name: changed(part) for name, part in value.items()}

        return replace(
            self, **{part.name: changed(getattr(self, part.name)) for part in fields(self)}
        )

    def arguments(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the inputs of `HEALNet`, `LegoMerge` and `LegoFuse`, and their keywords."""
        inputs = {n: x.nested() if isinstance(x, Ragged) else x for n, x in self.x.items()}
        coords = {name: c.nested() for name, c in self.coords.items()}
        statistics = {name: s.nested() for name, s in self.statistics.items()}
        return inputs, {"present": self.present, "coords": coords, "statistics": statistics}


@dataclass(frozen=True)
class Patients(Dataset):
    """Patients with scaled modalities and targets, handed out as a PatientBatch.

    Args:
        ids: [n].
        tables: modality name to scaled table, float32 [n, F].
        present: modality name to bool [n], for tables.
        bags: modality name to bags, read through `scaling`.
        target: name to tensor [n]; see the objectives.
    """

    ids: tuple[str, ...]
    tables: dict[str, Tensor]
    present: dict[str, Tensor]
    bags: dict[str, "ScaledBags"]
    target: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        modalities: Mapping[str, pd.DataFrame | BagSource],
        scaling: Mapping[str, Scaling],
        ids: Sequence[str],
        target: dict[str, Tensor] | None = None,
    ) -> Self:
        """Scale the modalities of the given patients; a modality not given is missing for all.

        Raises:
            ValueError: a modality that does not fit its scaling.
        """
        tables, present, bags = {}, {}, {}
        for name, how in scaling.items():
            source = modalities.get(name)
            if isinstance(how, BagScaling):
                if isinstance(source, pd.DataFrame):
                    raise ValueError(f"modality {name!r}: expected bags, got a table")
                if source is not None and not any(patient in source for patient in ids):
                    source = None
                if source is not None and source.coords != how.coords:
                    raise ValueError(
                        f"modality {name!r}: expected {how.coords} coordinates per token, as in "
                        f"training, got {source.coords}"
                    )
                named = how.names is not None and source is not None and source.names is not None
                if source is not None and source.features != how.width and not named:
                    raise ValueError(
                        f"modality {name!r}: expected {how.width} features per token, got "
                        f"{source.features}"
                    )
                bags[name] = ScaledBags(source, how)
                continue
            if source is None:
                x = np.zeros((len(ids), len(how.features)), np.float32)
                there = np.zeros(len(ids), bool)
            elif not isinstance(source, pd.DataFrame):
                raise ValueError(f"modality {name!r}: expected a table, got bags")
            else:
                try:
                    x, there = how.transform(source.loc[list(ids)])
                except ValueError as error:
                    raise ValueError(f"modality {name!r}: {error}") from error
            tables[name], present[name] = torch.from_numpy(x), torch.from_numpy(there)
        return cls(tuple(ids), tables, present, bags, target or {})

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> PatientBatch:
        return self.__getitems__([row])

    def __getitems__(self, rows: Sequence[int]) -> PatientBatch:
        """Return a batch; torch's DataLoader calls this with a batch's row numbers."""
        index = torch.as_tensor(rows)
        x: dict[str, Tensor | Ragged] = {n: table[index] for n, table in self.tables.items()}
        present = {name: there[index] for name, there in self.present.items()}
        coords, statistics = {}, {}
        for name, bags in self.bags.items():
            x[name], at, of_tokens = bags.take([self.ids[row] for row in rows])
            if at is not None:
                coords[name] = at
            if of_tokens is not None:
                statistics[name] = of_tokens
        return PatientBatch(
            x,
            coords,
            {name: there for name, there in present.items() if not there.all()},
            {name: value[index] for name, value in self.target.items()},
            statistics,
        )

    def ready_for(self, device: torch.device, dtype: torch.dtype, room: int) -> Self:
        """Return these patients with their DeviceBags, of at most `room` bytes."""
        limit = room // max(1, len(self.bags))
        ready = {name: DeviceBags(bags, device, dtype, limit) for name, bags in self.bags.items()}
        return replace(self, bags=ready)

    def has(self, modality: str) -> Tensor:
        """Return who has the modality, bool [n]."""
        if modality in self.present:
            return self.present[modality]
        return torch.tensor([patient in self.bags[modality] for patient in self.ids])

    def take(self, rows: Tensor) -> Self:
        """Return the patients at the given rows (numbers or bools)."""
        index = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
        return replace(
            self,
            ids=tuple(self.ids[i] for i in index.tolist()),
            tables={name: x[index] for name, x in self.tables.items()},
            present={name: there[index] for name, there in self.present.items()},
            target={name: value[index] for name, value in self.target.items()},
        )


class Tokens(NamedTuple):
    """One bag."""

    values: Tensor
    """[N, F]."""
    coords: Tensor | None = None
    """[N, A]."""
    statistics: Tensor | None = None
    """Mean and variance of each of the values, [N, 2]."""


class ScaledBags:
    """Scaled bags of one modality, kept in memory up to a limit.

    Args:
        source: the bags as they are; None if nobody has any.
        scaling: fitted on training patients.
        limit: bytes to keep.
    """

    def __init__(
        self, source: BagSource | None, scaling: BagScaling, limit: int = CACHE_BYTES
    ) -> None:
        self.source, self.scaling, self.limit = source, scaling, limit
        # New patients may have had other lab items measured: those of training, in their order.
        self.places: NDArray[np.intp] | None = None
        if source is not None and scaling.names and source.names and source.names != scaling.names:
            self.places = pd.Index(source.names).get_indexer(pd.Index(scaling.names))
        self.kept: dict[str, Tokens] = {}
        self.bytes = 0

    def __contains__(self, patient: str) -> bool:
        return self.source is not None and patient in self.source

    def __getitem__(self, patient: str) -> Tokens:
        """Return a patient's tokens; none for a patient without the modality."""
        if patient in self.kept:
            return self.kept[patient]
        bag = self._read(patient)
        size = _bytes_of(bag)
        if patient in self and self.bytes + size <= self.limit:
            self.kept[patient] = bag
            self.bytes += size
        return bag

    def _read(self, patient: str) -> Tokens:
        if patient not in self:
            at = torch.zeros(0, self.scaling.coords) if self.scaling.coords else None
            return Tokens(torch.zeros(0, len(self.scaling.features)), at)
        assert self.source is not None
        features, coords = self.source[patient]
        if self.places is not None:
            unmeasured = np.full((len(features), 1), np.nan, np.float32)
            features = np.concatenate([features, unmeasured], axis=1)[:, self.places]
        values = torch.from_numpy(self.scaling.transform(features))
        return Tokens(values, None if coords is None else torch.from_numpy(coords))

    def take(self, patients: Sequence[str]) -> tuple[Ragged, Ragged | None, Ragged | None]:
        """Return the bags of some patients, packed, with their coordinates and statistics."""
        values, coords, statistics = zip(*(self[patient] for patient in patients), strict=True)
        offsets = torch.tensor([0, *map(len, values)]).cumsum(0)

        def packed(parts: Sequence[Tensor | None]) -> Ragged | None:
            there = [part for part in parts if part is not None]
            return Ragged(torch.cat(there), offsets) if there else None

        return (
            Ragged(torch.cat(values), offsets),
            packed(coords) if self.scaling.coords else None,
            packed(statistics),
        )


class DeviceBags(ScaledBags):
    """Bags in the dtype of the products, with the statistics of their tokens, on a device.

    What is converted once need not be in every step: neither the rounding, nor the pass over the
    tokens that a LayerNorm's mean takes, nor, as long as there is room on the GPU, the copy to it.

    Args:
        bags: the same bags, in float32 in main memory.
        device: where those that fit are kept; the others are sent there every time.
        dtype: of the tokens.
        limit: bytes to keep.
    """

    def __init__(
        self, bags: ScaledBags, device: torch.device, dtype: torch.dtype, limit: int = CACHE_BYTES
    ) -> None:
        self.bags, self.device, self.dtype = bags, device, dtype
        super().__init__(bags.source, bags.scaling, limit)

    def _read(self, patient: str) -> Tokens:
        values, coords, _ = self.bags[patient]
        values = values.to(self.dtype)
        statistics = token_statistics(values).to(self.device)
        coords = None if coords is None else coords.to(self.device)
        return Tokens(values.to(self.device), coords, statistics)


class BagsReadOnce:
    """Bags that are read to learn their scaling, and kept as they are until they are scaled.

    So every bag of the training patients is read from disk once. After `hand_over` nothing more is
    kept, and what was kept is given away at the next read.

    Args:
        source: the bags as they are.
        limit: bytes to keep.
    """

    def __init__(self, source: BagSource, limit: int = CACHE_BYTES) -> None:
        self.features, self.coords, self.names = source.features, source.coords, source.names
        self._source, self._room = source, limit
        self._kept: dict[str, tuple[NDArray[np.float32], NDArray[np.float32] | None]] = {}
        self._handed_over = False

    def __contains__(self, patient: object) -> bool:
        return patient in self._source

    def __getitem__(self, patient: str) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Return a patient's tokens and coordinates, read now or before."""
        if self._handed_over:
            return self._kept.pop(patient, None) or self._source[patient]
        bag = self._source[patient]
        if _bytes_of(bag) <= self._room:
            self._kept[patient] = bag
            self._room -= _bytes_of(bag)
        return bag

    def hand_over(self) -> None:
        """Keep no further bag."""
        self._handed_over = True


def _bytes_of(bag: tuple[Any, ...]) -> int:
    return sum(part.nbytes for part in bag if part is not None)


def modalities_of(scaling: Mapping[str, Scaling]) -> dict[str, Modality]:
    """Return the shapes of scaled modalities, as models are told them."""
    return {
        name: Tabular(len(how.features))
        if isinstance(how, TableScaling)
        else Bag(len(how.features), coords=how.coords, extent=how.extent)
        for name, how in scaling.items()
    }
