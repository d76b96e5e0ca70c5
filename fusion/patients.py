"""The patients of one part of a split as a torch dataset; bags are read when a batch needs them."""

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

# Scaled bags of a modality are kept in memory up to this size; further ones are read every epoch.
CACHE_BYTES = 2 << 30


@dataclass(frozen=True)
class Ragged:
    """The bags of a batch, packed: values [T, D], offsets [B + 1]."""

    values: Tensor
    offsets: Tensor

    def nested(self) -> Tensor:
        """Return the jagged NestedTensor [B, j, D]."""
        return jagged(self.values, self.offsets)


@dataclass(frozen=True)
class PatientBatch:
    """The inputs of some patients, as models take them, and their targets."""

    x: dict[str, Tensor | Ragged]
    coords: dict[str, Ragged]
    present: dict[str, Tensor]
    """Bool [B] of each table that some of these patients miss."""
    target: dict[str, Tensor]
    statistics: dict[str, Ragged] = field(default_factory=dict)
    """Mean and variance of every token, for bags that keep them."""

    def to(self, device: Any, **options: Any) -> Self:
        """Return the batch on a device; Lightning calls this.

        From pinned memory the copy to a GPU does not block the host.
        """
        options.setdefault("non_blocking", torch.device(device).type == "cuda")
        return self._map_tensors(lambda tensor: tensor.to(device, **options))

    def pin_memory(self) -> Self:
        """Return the batch in pinned memory; torch's DataLoader calls this."""
        return self._map_tensors(lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory())

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        def apply(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            if isinstance(value, Ragged):
                return Ragged(change(value.values), change(value.offsets))
            return {name: apply(part) for name, part in value.items()}

        return replace(
            self, **{part.name: apply(getattr(self, part.name)) for part in fields(self)}
        )

    def arguments(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the inputs and the keyword arguments for HEALNet, LegoMerge and LegoFuse."""
        inputs = {n: x.nested() if isinstance(x, Ragged) else x for n, x in self.x.items()}
        coords = {name: c.nested() for name, c in self.coords.items()}
        statistics = {name: s.nested() for name, s in self.statistics.items()}
        return inputs, {"present": self.present, "coords": coords, "statistics": statistics}


@dataclass(frozen=True)
class Patients(Dataset):
    """Patients with scaled modalities and targets; batches of them are a PatientBatch.

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
        """Scale the modalities of the patients `ids`; all miss a modality that is not passed.

        Raises:
            ValueError: a modality that does not fit its scaling.
        """
        tables, present, bags = {}, {}, {}
        for name, fitted in scaling.items():
            source = modalities.get(name)
            if isinstance(fitted, BagScaling):
                if isinstance(source, pd.DataFrame):
                    raise ValueError(f"modality {name!r}: expected bags, got a table")
                if source is not None and not any(patient in source for patient in ids):
                    source = None
                if source is not None and source.coords != fitted.coords:
                    raise ValueError(
                        f"modality {name!r}: expected {fitted.coords} coordinates per token, as in "
                        f"training, got {source.coords}"
                    )
                by_name = (
                    fitted.names is not None and source is not None and source.names is not None
                )
                if source is not None and source.features != fitted.width and not by_name:
                    raise ValueError(
                        f"modality {name!r}: expected {fitted.width} features per token, got "
                        f"{source.features}"
                    )
                bags[name] = ScaledBags(source, fitted)
                continue
            if source is None:
                x = np.zeros((len(ids), len(fitted.features)), np.float32)
                has = np.zeros(len(ids), bool)
            elif not isinstance(source, pd.DataFrame):
                raise ValueError(f"modality {name!r}: expected a table, got bags")
            else:
                try:
                    x, has = fitted.transform(source.loc[list(ids)])
                except ValueError as error:
                    raise ValueError(f"modality {name!r}: {error}") from error
            tables[name], present[name] = torch.from_numpy(x), torch.from_numpy(has)
        return cls(tuple(ids), tables, present, bags, target or {})

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> PatientBatch:
        return self.__getitems__([row])

    def __getitems__(self, rows: Sequence[int]) -> PatientBatch:
        """Return the batch of these row numbers; torch's DataLoader calls this."""
        return self.batch(rows)

    def batch(
        self, rows: Sequence[int], dropped: Sequence[Sequence[str]] | None = None
    ) -> PatientBatch:
        """Return the batch of some patients.

        Args:
            rows: their row numbers.
            dropped: for each of them the modalities that the batch shall not have; None for none.
        """
        index = torch.as_tensor(rows)
        without: list[Sequence[str]] = [()] * len(rows) if dropped is None else list(dropped)
        x: dict[str, Tensor | Ragged] = {n: table[index] for n, table in self.tables.items()}
        present = {
            name: has[index] & torch.tensor([name not in names for names in without])
            for name, has in self.present.items()
        }
        coords, statistics = {}, {}
        for name, bags in self.bags.items():
            patients = [
                None if name in names else self.ids[row]
                for row, names in zip(rows, without, strict=True)
            ]
            x[name], token_coords, token_statistics = bags.read_packed(patients)
            if token_coords is not None:
                coords[name] = token_coords
            if token_statistics is not None:
                statistics[name] = token_statistics
        return PatientBatch(
            x,
            coords,
            {name: has for name, has in present.items() if not has.all()},
            {name: value[index] for name, value in self.target.items()},
            statistics,
        )

    def with_device_bags(self, device: torch.device, dtype: torch.dtype, limit: int) -> Self:
        """Return these patients with DeviceBags in place of their bags.

        Args:
            device: where bags are kept.
            dtype: of the tokens.
            limit: bytes to keep there, shared equally by the modalities.
        """
        each = limit // max(1, len(self.bags))
        bags = {name: DeviceBags(bags, device, dtype, each) for name, bags in self.bags.items()}
        return replace(self, bags=bags)

    def has(self, modality: str) -> Tensor:
        """Return bool [n], whether each patient has the modality."""
        if modality in self.present:
            return self.present[modality]
        return torch.tensor([patient in self.bags[modality] for patient in self.ids])

    @property
    def modalities(self) -> tuple[str, ...]:
        """The names of all modalities: tables, then bags."""
        return (*self.tables, *self.bags)

    def held(self) -> Tensor:
        """Return bool [n, M], whether each patient has each of `modalities`."""
        return torch.stack([self.has(name) for name in self.modalities], dim=1)

    def sets_of_modalities(self) -> list[tuple[str, ...]]:
        """Return the names of the modalities of each patient, in the order of `modalities`."""
        return [
            tuple(name for name, has_it in zip(self.modalities, row, strict=True) if has_it)
            for row in self.held().tolist()
        ]

    def only(self, names: Sequence[str]) -> Self:
        """Return the same patients, who now lack every modality but `names`."""
        removed = [name for name in self.tables if name not in names]
        return replace(
            self,
            tables={n: torch.zeros_like(x) if n in removed else x for n, x in self.tables.items()},
            present={
                n: torch.zeros_like(has) if n in removed else has for n, has in self.present.items()
            },
            bags={
                name: bags if name in names else ScaledBags(None, bags.scaling)
                for name, bags in self.bags.items()
            },
        )

    def select(self, rows: Tensor) -> Self:
        """Return the patients at some rows: row numbers, or bool [n]."""
        index = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
        return replace(
            self,
            ids=tuple(self.ids[i] for i in index.tolist()),
            tables={name: x[index] for name, x in self.tables.items()},
            present={name: has[index] for name, has in self.present.items()},
            target={name: value[index] for name, value in self.target.items()},
        )


class BagTensors(NamedTuple):
    """The bag of one patient."""

    values: Tensor
    """The tokens, [N, F]."""
    coords: Tensor | None = None
    """[N, A]."""
    statistics: Tensor | None = None
    """Mean and variance of each token, [N, 2]."""


class ScaledBags:
    """Scaled bags of one modality; they are kept in memory up to a limit.

    Args:
        source: the bags before scaling; None if no patient has the modality.
        scaling: fitted on the training patients.
        limit: bytes to keep.
    """

    def __init__(
        self, source: BagSource | None, scaling: BagScaling, limit: int = CACHE_BYTES
    ) -> None:
        self.source, self.scaling, self.limit = source, scaling, limit
        # The features of new patients may differ from those of training (lab items that were not
        # measured, other ones that were). Entry i is the column of training feature i; -1 if the
        # new patients lack it.
        self.columns: NDArray[np.intp] | None = None
        if source is not None and scaling.names and source.names and source.names != scaling.names:
            self.columns = pd.Index(source.names).get_indexer(pd.Index(scaling.names))
        self.cache: dict[str, BagTensors] = {}
        self.bytes = 0

    def __contains__(self, patient: str | None) -> bool:
        return self.source is not None and patient is not None and patient in self.source

    def __getitem__(self, patient: str | None) -> BagTensors:
        """Return the bag of a patient; an empty one if the patient lacks the modality, or None."""
        if patient in self.cache:
            return self.cache[patient]
        bag = self._read(patient)
        size = _bytes_of(bag)
        if patient is not None and patient in self and self.bytes + size <= self.limit:
            self.cache[patient] = bag
            self.bytes += size
        return bag

    def _read(self, patient: str | None) -> BagTensors:
        if patient is None or patient not in self:
            no_coords = torch.zeros(0, self.scaling.coords) if self.scaling.coords else None
            return BagTensors(torch.zeros(0, len(self.scaling.features)), no_coords)
        assert self.source is not None
        features, coords = self.source[patient]
        if self.columns is not None:
            # The column that index -1 selects: NaN for features that were not measured.
            unmeasured = np.full((len(features), 1), np.nan, np.float32)
            features = np.concatenate([features, unmeasured], axis=1)[:, self.columns]
        values = torch.from_numpy(self.scaling.transform(features))
        return BagTensors(values, None if coords is None else torch.from_numpy(coords))

    def read_packed(
        self, patients: Sequence[str | None]
    ) -> tuple[Ragged, Ragged | None, Ragged | None]:
        """Return the bags of some patients, packed: tokens, coordinates, statistics.

        None is a patient who lacks the modality.
        """
        values, coords, statistics = zip(*(self[patient] for patient in patients), strict=True)
        offsets = torch.tensor([0, *map(len, values)]).cumsum(0)

        def pack(tensors: Sequence[Tensor | None]) -> Ragged | None:
            known = [tensor for tensor in tensors if tensor is not None]
            return Ragged(torch.cat(known), offsets) if known else None

        return (
            Ragged(torch.cat(values), offsets),
            pack(coords) if self.scaling.coords else None,
            pack(statistics),
        )


class DeviceBags(ScaledBags):
    """Bags in the dtype of the products, with the statistics of their tokens, on a device.

    Three things are then done once per bag instead of in every step: the rounding to the dtype, the
    pass over the tokens for the mean and variance of a LayerNorm, and the copy to the device, as
    long as the bags fit there.

    Args:
        bags: the same bags, in float32 in main memory.
        device: bags are kept there up to `limit`; the others are copied there for every batch.
        dtype: of the tokens.
        limit: bytes to keep.
    """

    def __init__(
        self, bags: ScaledBags, device: torch.device, dtype: torch.dtype, limit: int = CACHE_BYTES
    ) -> None:
        self.bags, self.device, self.dtype = bags, device, dtype
        super().__init__(bags.source, bags.scaling, limit)

    def _read(self, patient: str | None) -> BagTensors:
        values, coords, _ = self.bags[patient]
        values = values.to(self.dtype)
        statistics = token_statistics(values).to(self.device)
        coords = None if coords is None else coords.to(self.device)
        return BagTensors(values.to(self.device), coords, statistics)


class BagsReadOnce:
    """Bags that are read twice, but from disk once.

    The first read fits the scaling, the second one scales the bags. Bags of the first read are kept
    until the second one. `hand_over` marks the change: after it no bag is kept any more, and a bag
    that was kept is returned and forgotten.

    Args:
        source: the bags before scaling.
        limit: bytes to keep.
    """

    def __init__(self, source: BagSource, limit: int = CACHE_BYTES) -> None:
        self.features, self.coords, self.names = source.features, source.coords, source.names
        self._source, self._free_bytes = source, limit
        self._bags: dict[str, tuple[NDArray[np.float32], NDArray[np.float32] | None]] = {}
        self._handed_over = False

    def __contains__(self, patient: object) -> bool:
        return patient in self._source

    def __getitem__(self, patient: str) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Return the tokens and coordinates of a patient."""
        if self._handed_over:
            return self._bags.pop(patient, None) or self._source[patient]
        bag = self._source[patient]
        if _bytes_of(bag) <= self._free_bytes:
            self._bags[patient] = bag
            self._free_bytes -= _bytes_of(bag)
        return bag

    def hand_over(self) -> None:
        """Keep no further bags; from now on every bag is read for the last time."""
        self._handed_over = True


def _bytes_of(bag: tuple[Any, ...]) -> int:
    return sum(part.nbytes for part in bag if part is not None)


def modalities_of(scaling: Mapping[str, Scaling]) -> dict[str, Modality]:
    """Return the modalities, with the shapes after scaling, from which models are built."""
    return {
        name: Tabular(len(fitted.features))
        if isinstance(fitted, TableScaling)
        else Bag(len(fitted.features), coords=fitted.coords, extent=fitted.extent)
        for name, fitted in scaling.items()
    }
