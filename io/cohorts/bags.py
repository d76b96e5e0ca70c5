"""Bags: the tokens of each patient, any number of them, read at first use.

`where` in this folder is the place in the cohort's YAML file, such as "modalities.wsi"; it begins
each error message.
"""

from __future__ import annotations

import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import CohortError, StoreError, counted, listed
from ..store.read import FeatureStore
from ..store.read_slide import SlideFeatures

T = TypeVar("T")
Float = NDArray[np.float32]
Bag = tuple[Float, Float | None]


class Bags:
    """One bag of tokens per patient; a bag is read each time it is used.

    Patients without tokens have no bag: `bags[patient]` raises KeyError.

    Args:
        source: patient to (features float32 [N, D], coords float32 [N, A] or None); a dict, or a
            mapping that reads files.
        features: width D of a token.
        coords: number A of coordinate axes, 0 for none.
        extent: about the largest coordinate; models divide coordinates by it.
        names: names of the features, if known.

    Raises:
        CohortError: a bag of a dict is not [N, D] with the width D = `features`.

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
        if isinstance(source, dict):  # its bags are in memory: a mapping checks what it reads
            for patient, (tokens, _) in source.items():
                if np.ndim(tokens) != 2 or np.shape(tokens)[1] != features:
                    raise CohortError(
                        f"bag of patient {patient!r}: expected [N, {features}], got "
                        f"{list(np.shape(tokens))}"
                    )
        self._source = source
        self.features, self.coords, self.extent, self.names = features, coords, extent, names

    @property
    def patients(self) -> tuple[str, ...]:
        """Return the ids of the patients who have a bag."""
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
        """Return (N, D) of a patient. The tokens of files are not read for it."""
        source = self._source
        is_lazy = isinstance(source, LazyBags)
        tokens = source.tokens(patient) if is_lazy else len(source[patient][0])
        return tokens, self.features

    def slides(self, patient: str) -> list[SlideFeatures]:
        """Return the slides of a patient, if the bags are in feature stores; else none.

        The tokens of the patient are the patches of these slides, one slide after the other,
        without corrupt patches.
        """
        source = self._source
        return source.slides(patient) if isinstance(source, FileBags) else []


class LazyBags(Mapping[str, Bag]):
    """Bags whose patients and numbers of tokens are known before they are read.

    Args:
        locations: patient to where the tokens are; its type is that of the derived class.
    """

    def __init__(self, locations: Mapping[str, Any]) -> None:
        self._locations = locations

    def __contains__(self, patient: object) -> bool:  # the method of Mapping would read the bag
        return patient in self._locations

    def __iter__(self) -> Iterator[str]:
        return iter(self._locations)

    def __len__(self) -> int:
        return len(self._locations)

    @abstractmethod
    def tokens(self, patient: str) -> int:
        """Return the number of tokens of a patient."""


class BagFile(Protocol):
    """A file or folder that holds bags by key."""

    name: str
    """Of the file or folder."""

    @property
    def keys(self) -> tuple[str, ...]: ...
    def has(self, key: str) -> bool: ...
    def shape(self, key: str) -> tuple[int, ...]: ...
    def coords(self, key: str) -> Any: ...
    def read(self, key: str) -> Bag: ...


class NpzBags:
    """Bags in an npz file: one array per key. The file is read completely, so it must be small."""

    def __init__(self, path: Path, features: int | None, where: str) -> None:
        self.name = path.name
        self._arrays: dict[str, Float] = {}
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {key: archive[key] for key in archive.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise CohortError(f"{where}: {path} cannot be read: {error}") from None
        for key, array in arrays.items():
            if array.ndim == 1 and features and array.size % features == 0:
                array = array.reshape(-1, features)
            self._arrays[key.strip()] = _as_tokens(array, features, f"{where}: {path.name}: {key}")
        self.keys = tuple(self._arrays)

    def has(self, key: str) -> bool:
        return key in self._arrays

    def shape(self, key: str) -> tuple[int, ...]:
        return self._arrays[key].shape

    def coords(self, key: str) -> None:
        return None

    def read(self, key: str) -> Bag:
        return self._arrays[key], None


class ZarrBags:
    """Bags in a zarr group: arrays [N, D], or groups with arrays `features` and `coords`."""

    def __init__(self, path: Path, features: int | None, where: str) -> None:
        import zarr

        try:
            self._group = zarr.open_group(str(path), mode="r")
        except (OSError, ValueError, KeyError) as error:
            raise CohortError(f"{where}: {path} is no zarr group: {error}") from None
        self.name = path.name
        self._features, self._where = features, f"{where}: {path.name}"
        # The names of the folders, as zarr would open the metadata of each member to list them.
        self.keys = tuple(sorted(p.name for p in path.iterdir() if p.is_dir() and p.name[0] != "."))
        self._key_set = frozenset(self.keys)

    def has(self, key: str) -> bool:
        return key in self._key_set

    def arrays(self, key: str) -> tuple[Any, Any]:
        """Open the arrays of features and coordinates of a key, without reading them."""
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
        where = f"{self._where}: {key}"
        try:
            features, coords = features[...], None if coords is None else coords[...]
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: raised by codecs
            raise CohortError(f"{where}: cannot be read: {error}") from None
        tokens = _as_tokens(features, self._features, where)
        if coords is None:
            return tokens, None
        positions = _as_tokens(coords, None, f"{where}: coords")
        if len(positions) != len(tokens):
            raise CohortError(
                f"{where}: expected coords of {len(tokens)} tokens, got {len(positions)}"
            )
        return tokens, positions


class SlideBags:
    """Bags in a feature store: one per slide, without the corrupt patches.

    A key is the key of a slide, its name, its file name or its stem.
    """

    def __init__(self, path: Path, features: int | None, where: str, encoder: str | None) -> None:
        self.name = path.name
        self._features, self._where = features, f"{where}: {path.name}"
        try:
            self._store = FeatureStore(path, encoder)
            self._slug = self._store.slug
        except StoreError as error:
            raise CohortError(f"{where}: {error}") from None

    @property
    def keys(self) -> tuple[str, ...]:
        """Return for each slide the stem of its file, or its key if two slides share the stem."""
        names: list[str] = []
        for key in self._store:
            stem = PurePosixPath(str(self.slide(key).attrs.get("name"))).stem
            names.append(stem if self._store.find(stem) == key else key)
        return tuple(names)

    def has(self, key: str) -> bool:
        """Return True if the store has the slide, with at least one patch.

        Raises:
            CohortError: several slides have this name, or the slide has no features of the encoder.
        """
        matches = self._store.matches(key)
        if len(matches) > 1:
            raise CohortError(f"{self._where}: {key!r} is the name of slides {listed(matches)}")
        if not matches:
            return False
        slide = self.slide(matches[0])
        if self._slug not in slide.encoders:
            raise CohortError(
                f"{self._where}: {key}: no features of {self._slug!r} yet: tile the cohort again"
            )
        return self.shape(key)[0] > 0

    def shape(self, key: str) -> tuple[int, ...]:
        slide = self.slide(key)
        return self._read(lambda: (int((~slide.corrupt).sum()), slide.width))

    def coords(self, key: str) -> Any:
        slide = self.slide(key)
        if slide.attrs.get("coords") == "absent":
            return None
        return self._read(lambda: slide.coords[~slide.corrupt])

    def read(self, key: str) -> Bag:
        slide = self.slide(key)
        features, coords = self._read(slide.bag)
        tokens = _as_tokens(features, self._features, f"{self._where}: {key}")
        return tokens, None if slide.attrs.get("coords") == "absent" else coords

    def slide(self, key: str) -> SlideFeatures:
        """Open the slide of a key."""
        return self._read(lambda: self._store[key])

    def _read(self, function: Callable[[], T]) -> T:
        """Call a function, and raise its StoreError as a CohortError that names the place."""
        try:
            return function()
        except StoreError as error:
            raise CohortError(f"{self._where}: {error}") from None


class FileBags(LazyBags):
    """Bags in files: the bag of a patient is the tokens of all his keys, in order.

    Args:
        files: the files.
        keys: patient to (index of the file, key).
        features: width of a token in the files.
        coords: number of coordinate axes.
        source: True to append to each token, one-hot, the file that it is from.
        where: see the head of this file.
    """

    def __init__(
        self,
        files: list[BagFile],
        keys: dict[str, list[tuple[int, str]]],
        *,
        features: int,
        coords: int,
        source: bool,
        where: str,
    ) -> None:
        super().__init__(keys)
        self._files, self._where = files, where
        self._features, self._coords, self._source = features, coords, source

    def __getitem__(self, patient: str) -> Bag:
        all_tokens, all_coords = [], []
        for i, key in self._locations[patient]:
            tokens, coords = self._files[i].read(key)
            axes = 0 if coords is None else coords.shape[1]
            if tokens.shape[1] != self._features or axes != self._coords:
                raise CohortError(
                    f"{self._where}: {self._files[i].name}: {key} of patient {patient}: expected "
                    f"{self._features} features and {self._coords} coordinates per token, as the "
                    f"first bag has, got {tokens.shape[1]} and {axes}"
                )
            if self._source:
                one_hot = np.zeros((len(tokens), len(self._files)), np.float32)
                one_hot[:, i] = 1
                tokens = np.concatenate([tokens, one_hot], axis=1)
            all_tokens.append(tokens)
            all_coords.append(coords)
        return np.concatenate(all_tokens), np.concatenate(all_coords) if self._coords else None

    def slides(self, patient: str) -> list[SlideFeatures]:
        """Return the slides of a patient; none if one of the files is no feature store."""
        files = [(self._files[i], key) for i, key in self._locations[patient]]
        slides = [file.slide(key) for file, key in files if isinstance(file, SlideBags)]
        return slides if len(slides) == len(files) else []

    def tokens(self, patient: str) -> int:
        return sum(self._files[i].shape(key)[0] for i, key in self._locations[patient])


def open_bags(
    paths: list[Path],
    keys_of: dict[str, list[str]] | None,
    keep: set[str] | None,
    *,
    features: int | None,
    source: bool,
    encoder: str | None,
    where: str,
) -> Bags:
    """Open the bags in npz files, zarr groups or feature stores.

    Args:
        paths: the files or folders.
        keys_of: patient to keys; None if the keys are the patients.
        keep: the patients to read; None for all.
        features: expected width of a token, None for any.
        source: True to append to each token, one-hot, the file that it is from.
        encoder: of the feature stores, None for their only one.
        where: see the head of this file.

    Raises:
        CohortError: a file cannot be read, or no patient of `keep` has a bag.
    """
    files = [_open(path, features, where, encoder) for path in paths]
    if keys_of is None:
        keys_of = {key: [key] for file in files for key in file.keys}
    keys = {
        patient: [(i, key) for i, file in enumerate(files) for key in names if file.has(key)]
        for patient, names in keys_of.items()
        if keep is None or patient in keep
    }
    keys = {patient: located for patient, located in keys.items() if located}
    source_width = source * len(files)
    if not keys and keep is None:  # for prediction: the new patients do not have this modality
        return Bags({}, features=(features or 0) + source_width)
    if not keys:
        raise CohortError(
            f"{where}: no patient of the outcome has a bag: {paths[0].name} has keys such as "
            f"{listed(files[0].keys, 2)}, the cohort needs keys such as "
            f"{listed((key for names in keys_of.values() for key in names), 2)}"
            f" (patients such as {listed(sorted(keep or ()), 2)})"
        )
    locations = [location for located in keys.values() for location in located]
    width, axes, extent = _measure(files, locations)
    width = features or width
    _check_widths(files, keys, width, where)
    bags = FileBags(files, keys, features=width, coords=axes, source=source, where=where)
    return Bags(bags, features=width + source_width, coords=axes, extent=extent)


def _open(path: Path, features: int | None, where: str, encoder: str | None) -> BagFile:
    if (path / "run.json").is_file():
        return SlideBags(path, features, where, encoder)
    if encoder is not None:
        raise CohortError(f"{where}.encoder: expected a feature store, got {path}")
    return (NpzBags if path.suffix == ".npz" else ZarrBags)(path, features, where)


def _check_widths(
    files: list[BagFile], keys: dict[str, list[tuple[int, str]]], width: int, where: str
) -> None:
    """Check the width of each bag of npz files: they are in memory; others are checked as read."""
    for patient, located in keys.items():
        for i, key in located:
            if isinstance(files[i], NpzBags) and files[i].shape(key)[-1] != width:
                raise CohortError(
                    f"{where}: {files[i].name}: {key} of patient {patient}: expected {width} "
                    f"features per token, as the first bag has, got {files[i].shape(key)[-1]}"
                )


def _measure(files: list[BagFile], locations: list[tuple[int, str]]) -> tuple[int, int, float]:
    """Return the width, the number of coordinate axes, and about the largest coordinate.

    From at most 16 bags, so that a large cohort is not read for it.
    """
    i, key = locations[0]
    shape = files[i].shape(key)
    axes, extent = 0, 0.0
    for i, key in locations[:: -(-len(locations) // 16)]:
        coords = files[i].coords(key)
        if coords is not None:
            lengths = np.abs(np.asarray(coords[...], np.float64))
            axes = lengths.shape[-1]
            extent = max(extent, lengths[np.isfinite(lengths)].max(initial=0))
    return shape[-1], axes, float(extent) or 1.0


def _as_tokens(array: Any, features: int | None, where: str) -> Float:
    """Return an array as float32 [N, D]; raise CohortError if it has another shape, NaN or Inf."""
    if (
        array.ndim != 2
        or (features and array.shape[1] != features)
        or array.dtype.kind not in "fiub"
    ):
        raise CohortError(
            f"{where}: expected numbers [N, {features or 'D'}], got {array.dtype} "
            f"{list(array.shape)}"
        )
    with np.errstate(over="ignore"):  # numbers beyond float32 become Inf, which is refused below
        array = array.astype(np.float32)
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        tokens = np.flatnonzero(~finite)
        raise CohortError(f"{where}: expected finite numbers, got NaN or Inf in "
                          f"{counted(tokens, 'token')}")  # fmt: skip
    return array
