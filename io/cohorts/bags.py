"""Bags: a patient's tokens, of any number, read when asked for."""

from __future__ import annotations

import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..errors import CohortError, StoreError, counted, listed
from ..store.read import FeatureStore
from ..store.read_slide import SlideFeatures

T = TypeVar("T")
Float = NDArray[np.float32]
Bag = tuple[Float, Float | None]


class Bags:
    """Hold one bag of tokens per patient, read when asked for.

    A patient without tokens is not in it; asking for one raises KeyError.

    Args:
        source: patient to (features float32 [N, D], coords float32 [N, A] or None); a dict, or what
            reads files.
        features: width D of a token.
        coords: number A of coordinate axes, 0 for none.
        extent: about the largest coordinate, by which to scale.
        names: what the features are, if known.

    Example:
        >>> import numpy as np
        >>> bags = motet.io.Bags({"001": (np.ones((5, 3), np.float32), None)}, features=3)
        >>> "001" in bags, "002" in bags, bags["001"][0].shape
        (True, False, (5, 3))
    """

    def __init__(
        self,
        source: Mapping[str, Bag],
        *,
        features: int,
        coords: int = 0,
        extent: float = 1.0,
        names: tuple[str, ...] | None = None,
    ) -> None:
        self._source = source
        self.features, self.coords, self.extent, self.names = features, coords, extent, names

    @property
    def patients(self) -> tuple[str, ...]:
        """Return the patients who have a bag."""
        return tuple(self._source)

    def __len__(self) -> int:
        """Return the number of patients who have a bag."""
        return len(self._source)

    def __contains__(self, patient: object) -> bool:
        """Return True if the patient has a bag."""
        return patient in self._source

    def __getitem__(self, patient: str) -> Bag:
        """Return features float32 [N, D] and coords float32 [N, A] or None of a patient."""
        return self._source[patient]

    def shape(self, patient: str) -> tuple[int, int]:
        """Return (N, D) of a patient, without reading the tokens of a store."""
        source = self._source
        tokens = source.tokens(patient) if isinstance(source, Lazy) else len(source[patient][0])
        return tokens, self.features


class Lazy(Mapping[str, Bag]):
    """Bags that know whose they are, and their size, before they are read."""

    def __init__(self, places: Mapping[str, Any]) -> None:
        self._places = places

    def __contains__(self, patient: object) -> bool:  # Mapping's own would read the bag
        return patient in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    @abstractmethod
    def tokens(self, patient: str) -> int:
        """Return the number of tokens of a patient."""


class Measured(Lazy):
    """Irregular measurements: a token per time stamp, a feature per item, NaN where unmeasured.

    `rows` has columns patient, hours, item and value; an item measured twice at a time stamp counts
    with its mean.
    """

    def __init__(self, rows: pd.DataFrame, items: tuple[str, ...]) -> None:
        rows = rows.groupby(["patient", "hours", "item"], as_index=False, sort=False).mean()
        patient, patients = pd.factorize(rows["patient"])
        order = np.lexsort((rows["hours"], patient))
        self._hours = rows["hours"].to_numpy(np.float64)[order]
        self._value = rows["value"].to_numpy(np.float32)[order]
        self._item = pd.Index(items).get_indexer(pd.Index(rows["item"]))[order]
        self._width = len(items)
        bounds = np.searchsorted(patient[order], np.arange(len(patients) + 1))
        super().__init__({one: slice(*bounds[i : i + 2]) for i, one in enumerate(patients)})

    def __getitem__(self, patient: str) -> Bag:
        rows = self._places[patient]
        hours, token = np.unique(self._hours[rows], return_inverse=True)
        features = np.full((len(hours), self._width), np.nan, np.float32)
        features[token, self._item[rows]] = self._value[rows]
        return features, hours.astype(np.float32)[:, None]

    def tokens(self, patient: str) -> int:
        return len(np.unique(self._hours[self._places[patient]]))


class Store(Protocol):
    """A file of bags by key."""

    @property
    def keys(self) -> tuple[str, ...]: ...
    def holds(self, key: str) -> bool: ...
    def shape(self, key: str) -> tuple[int, ...]: ...
    def coords(self, key: str) -> Any: ...
    def read(self, key: str) -> Bag: ...


class Npz:
    """Bags in an npz file, which is small enough to be read at once."""

    def __init__(self, path: Path, features: int | None, where: str) -> None:
        self._arrays: dict[str, Float] = {}
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {key: archive[key] for key in archive.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise CohortError(f"{where}: {path} cannot be read: {error}") from None
        for key, array in arrays.items():
            place = f"{where}: {path.name}: {key}"
            if array.ndim == 1 and features and array.size % features == 0:
                array = array.reshape(-1, features)
            self._arrays[key.strip()] = _checked(array, features, place)
        self.keys = tuple(self._arrays)

    def holds(self, key: str) -> bool:
        return key in self._arrays

    def shape(self, key: str) -> tuple[int, ...]:
        return self._arrays[key].shape

    def coords(self, key: str) -> None:
        return None

    def read(self, key: str) -> Bag:
        return self._arrays[key], None


class Zarr:
    """Bags in a zarr group: arrays [N, D], or groups with arrays `features` and `coords`."""

    def __init__(self, path: Path, features: int | None, where: str) -> None:
        import zarr

        try:
            self._group = zarr.open_group(str(path), mode="r")
        except (OSError, ValueError, KeyError) as error:
            raise CohortError(f"{where}: {path} is no zarr group: {error}") from None
        self._features, self._where = features, f"{where}: {path.name}"
        # Names of folders: asking zarr would open the metadata of every slide.
        self.keys = tuple(sorted(p.name for p in path.iterdir() if p.is_dir() and p.name[0] != "."))
        self._held = frozenset(self.keys)

    def holds(self, key: str) -> bool:
        return key in self._held

    def arrays(self, key: str) -> tuple[Any, Any]:
        """Open the features and coordinates of a key, unread."""
        import zarr

        try:
            member = self._group[key]
            if isinstance(member, zarr.Array):
                return member, None
            return member["features"], member.get("coords")
        except (OSError, ValueError, KeyError) as error:
            raise CohortError(
                f"{self._where}: {key}: expected an array, or a group with an array `features`, "
                f"got {error!r}"
            ) from None

    def shape(self, key: str) -> tuple[int, ...]:
        return self.arrays(key)[0].shape

    def coords(self, key: str) -> Any:
        return self.arrays(key)[1]

    def read(self, key: str) -> Bag:
        features, coords = self.arrays(key)
        place = f"{self._where}: {key}"
        try:
            features, coords = features[...], None if coords is None else coords[...]
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: what codecs raise
            raise CohortError(f"{place}: cannot be read: {error}") from None
        bag = _checked(features, self._features, place)
        if coords is None:
            return bag, None
        where = _checked(coords, None, f"{place}: coords")
        if len(where) != len(bag):
            raise CohortError(f"{place}: expected coords of {len(bag)} tokens, got {len(where)}")
        return bag, where


class Slides:
    """Bags in a feature store: slides by key, name, file name or stem, less corrupt patches."""

    def __init__(self, path: Path, features: int | None, where: str, encoder: str | None) -> None:
        self._features, self._where = features, f"{where}: {path.name}"
        try:
            self._store = FeatureStore(path, encoder)
            self._slug = self._store.slug
        except StoreError as error:
            raise CohortError(f"{where}: {error}") from None

    @property
    def keys(self) -> tuple[str, ...]:
        """Return what slides are called: the stem of the file, or the key where two share one."""
        called: dict[str, str] = {}
        for key in self._store:
            stem = PurePosixPath(str(self._slide(key).attrs.get("name"))).stem
            called[key] = stem if self._store.find(stem) == key else key
        return tuple(called.values())

    def holds(self, key: str) -> bool:
        """Return True if the slide is there and has a patch; one not embedded yet is an error."""
        found = self._store.matches(key)
        if len(found) > 1:
            raise CohortError(f"{self._where}: {key!r} is the name of slides {listed(found)}")
        if not found:
            return False
        slide = self._slide(found[0])
        if self._slug not in slide.encoders:
            raise CohortError(
                f"{self._where}: {key}: no features of {self._slug!r} yet: tile the cohort again"
            )
        return self.shape(key)[0] > 0

    def shape(self, key: str) -> tuple[int, ...]:
        slide = self._slide(key)
        return self._checked(lambda: (int((~slide.corrupt).sum()), slide.width))

    def coords(self, key: str) -> Any:
        slide = self._slide(key)
        if slide.attrs.get("coords") == "absent":
            return None
        return self._checked(lambda: slide.coords[~slide.corrupt])

    def read(self, key: str) -> Bag:
        slide = self._slide(key)
        features, coords = self._checked(slide.bag)
        bag = _checked(features, self._features, f"{self._where}: {key}")
        return bag, None if slide.attrs.get("coords") == "absent" else coords

    def _slide(self, key: str) -> SlideFeatures:
        return self._checked(lambda: self._store[key])

    def _checked(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except StoreError as error:
            raise CohortError(f"{self._where}: {error}") from None


class Stored(Lazy):
    """Bags out of stores: the keys of a patient, appended in order."""

    def __init__(
        self,
        stores: list[Store],
        keys: dict[str, list[tuple[int, str]]],
        *,
        features: int,
        coords: int,
        source: bool,
        where: str,
    ) -> None:
        super().__init__(keys)
        self._stores, self._where = stores, where
        self._features, self._coords, self._source = features, coords, source

    def __getitem__(self, patient: str) -> Bag:
        features, coords = [], []
        for place, key in self._places[patient]:
            bag, where = self._stores[place].read(key)
            axes = 0 if where is None else where.shape[1]
            if bag.shape[1] != self._features or axes != self._coords:
                raise CohortError(
                    f"{self._where}: {key}: expected {self._features} features and {self._coords} "
                    f"coordinates per token, got {bag.shape[1]} and {axes}"
                )
            if self._source:
                one_hot = np.zeros((len(bag), len(self._stores)), np.float32)
                one_hot[:, place] = 1
                bag = np.concatenate([bag, one_hot], axis=1)
            features.append(bag)
            coords.append(where)
        return np.concatenate(features), np.concatenate(coords) if self._coords else None

    def tokens(self, patient: str) -> int:
        return sum(self._stores[place].shape(key)[0] for place, key in self._places[patient])


def open_stores(
    paths: list[Path],
    wanted: dict[str, list[str]] | None,
    keep: set[str] | None,
    *,
    features: int | None,
    source: bool,
    encoder: str | None,
    where: str,
) -> Bags:
    """Open stores; `wanted` maps patients to keys, by default keys are patients."""
    stores = [_open(path, features, where, encoder) for path in paths]
    if wanted is None:
        wanted = {key: [key] for store in stores for key in store.keys}
    keys = {
        patient: [(i, key) for i, store in enumerate(stores) for key in names if store.holds(key)]
        for patient, names in wanted.items()
        if keep is None or patient in keep
    }
    keys = {patient: found for patient, found in keys.items() if found}
    extra = source * len(stores)
    if not keys and keep is None:  # to predict without this modality
        return Bags({}, features=(features or 0) + extra)
    if not keys:
        raise CohortError(
            f"{where}: no patient of the outcome has a bag: keys of {paths[0].name} are such as "
            f"{listed(stores[0].keys, 2)}, those looked for such as "
            f"{listed((key for names in wanted.values() for key in names), 2)}"
            f" (patients such as {listed(sorted(keep or ()), 2)})"
        )
    parts = [part for found in keys.values() for part in found]
    width, axes, extent = _measure(stores, parts)
    width = features or width
    bags = Stored(stores, keys, features=width, coords=axes, source=source, where=where)
    return Bags(bags, features=width + extra, coords=axes, extent=extent)


def _open(path: Path, features: int | None, where: str, encoder: str | None) -> Store:
    if (path / "run.json").is_file():
        return Slides(path, features, where, encoder)
    if encoder is not None:
        raise CohortError(f"{where}.encoder: expected a feature store, got {path}")
    return (Npz if path.suffix == ".npz" else Zarr)(path, features, where)


def _measure(stores: list[Store], parts: list[tuple[int, str]]) -> tuple[int, int, float]:
    """Return width, coordinate axes and about the largest coordinate, from at most 16 bags."""
    place, key = parts[0]
    shape = stores[place].shape(key)
    axes, extent = 0, 0.0
    for place, key in parts[:: -(-len(parts) // 16)]:
        coords = stores[place].coords(key)
        if coords is not None:
            known = np.abs(np.asarray(coords[...], np.float64))
            axes = known.shape[-1]
            extent = max(extent, known[np.isfinite(known)].max(initial=0))
    return shape[-1], axes, float(extent) or 1.0


def _checked(array: Any, features: int | None, place: str) -> Float:
    """Return tokens as float32 [N, D], finite."""
    if (
        array.ndim != 2
        or (features and array.shape[1] != features)
        or array.dtype.kind not in "fiub"
    ):
        raise CohortError(
            f"{place}: expected numbers [N, {features or 'D'}], got {array.dtype} "
            f"{list(array.shape)}"
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold is found below
        array = array.astype(np.float32)
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        tokens = np.flatnonzero(~finite)
        raise CohortError(f"{place}: expected finite numbers, got NaN or Inf in "
                          f"{counted(tokens, 'token')}")  # fmt: skip
    return array
