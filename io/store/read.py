"""Feature stores: what a cohort folder holds, read and checked (docs/store-format.md)."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from enum import IntFlag
from functools import cached_property
from itertools import product
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import StoreError, listed, suggest

if TYPE_CHECKING:
    import pandas as pd

FORMAT, VERSION = "motet-store", 1
ARRAYS = ("coords", "tissue", "flags", "thumb", "mask")
KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,120}")


class FLAGS(IntFlag):
    """What is known of a patch: bits of `flags`.

    Args:
        values: the bits of several, added.

    Example:
        >>> motet.io.FLAGS(9)
        <FLAGS.EDGE|CORRUPT: 9>
    """

    EDGE = 1
    """Reaches beyond the slide, or was moved inwards at its border."""
    PEN = 2
    BLUR = 4
    CORRUPT = 8
    """Its pixels could not be decoded: it was not embedded, its features are NaN."""


class Problem(NamedTuple):
    """A finding of `FeatureStore.verify`; key is "" where it is about the store as a whole."""

    key: str
    what: str


class FeatureStore(Mapping[str, "SlideFeatures"]):
    """Open a folder of slides' features, which `motet tile` or `import_features` wrote.

    A mapping of slide keys to slides. Opening reads one small file; a slide's files are opened when
    it is asked for, its features are memory-mapped. Besides its key, a slide is found by its name
    (the path below the folder that was tiled), its file name, and that without its suffix, where
    only one slide has it. Slides that failed are in `failed` alone. Bytes that cannot be right
    (missing, cut, of another shape) raise StoreError when they are read; `verify` reads them all.

    Args:
        path: the cohort folder.
        encoder: whose features to read, by its id or folder; may be left out where there is one.

    Raises:
        StoreError: no store, of a later format, or without this encoder.

    Example:
        >>> import numpy as np
        >>> np.savez("a.npz", features=np.eye(3, 8), coords=np.zeros((3, 2), int))
        >>> store = motet.io.import_features("a.npz", "cohort", encoder="mine")
        >>> slide = store["a"]
        >>> slide.features.shape, slide.coords.dtype, store.encoders
        ((3, 8), dtype('int32'), ['mine'])
        >>> features, coords = slide.bag()  # float32, without corrupt patches
        >>> store.verify()
        []
    """

    def __init__(self, path: str | os.PathLike[str], encoder: str | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise StoreError(f"{self.path}: expected a feature store, got no such folder")
        if not (self.path / "run.json").exists():
            raise StoreError(f"{self.path}: expected a feature store, got no run.json in it")
        self.run = read_run(self.path)
        """Format, tiling and encoders, as in run.json."""
        self._slug = None if encoder is None else self._slug_of(encoder)
        self._named: dict[str, list[str]] = {}
        self._named_at = -1

    def _slug_of(self, encoder: str) -> str:
        encoders = self.run["encoders"]
        if encoder in encoders:
            return encoder
        slugs = [slug for slug, spec in encoders.items() if spec["id"] == encoder]
        if not slugs:
            raise StoreError(
                f"{self.path}: no features of {encoder!r}: {suggest(encoder, self.encoders)}"
            )
        return slugs[0]

    @property
    def encoders(self) -> list[str]:
        """Return the ids of the encoders."""
        return [spec["id"] for _, spec in sorted(self.run["encoders"].items())]

    @property
    def slug(self) -> str:
        """Return the folder name of the encoder that features are read of."""
        if self._slug is not None:
            return self._slug
        slugs = list(self.run["encoders"])
        if len(slugs) != 1:
            raise StoreError(
                f"{self.path}: expected encoder=, one of {listed(self.encoders)}, got none"
            )
        return slugs[0]

    def __iter__(self) -> Iterator[str]:
        """Give the keys of slides, sorted; no slide is opened."""
        try:
            with os.scandir(self.path / "slides") as entries:
                names = [entry.name for entry in entries]
        except FileNotFoundError:
            return
        except OSError as error:
            raise StoreError(f"{self.path}/slides: cannot be listed: {error}") from None
        for name in sorted(names):
            key = name.removesuffix(".zarr")
            if key != name and KEY.fullmatch(key):
                yield key

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.find(name) is not None

    def __getitem__(self, name: str) -> SlideFeatures:
        key = self.find(name)
        if key is not None:
            return SlideFeatures(self, key)
        if len(keys := self.matches(name)) > 1:
            raise KeyError(f"{name!r} is the name of {len(keys)} slides: {listed(keys)}")
        if name in (failed := self.failed):
            raise KeyError(f"{name!r} failed: {failed[name].get('message')}")
        raise KeyError(
            f"no slide {name!r} in {self.path}: {suggest(name, [*self._names(), *self])}"
        )

    def find(self, name: str) -> str | None:
        """Return the key of the slide of this key, name, file name or stem; None if not one."""
        keys = self.matches(name)
        return keys[0] if len(keys) == 1 else None

    def matches(self, name: str) -> list[str]:
        """Return the keys of all slides of this key, name, file name or stem."""
        if KEY.fullmatch(name) and os.path.isdir(f"{self.path}/slides/{name}.zarr"):
            return [name]
        return self._names().get(name, [])

    def _names(self) -> dict[str, list[str]]:
        """Return keys by all that they may be called, read again where slides came or went."""
        try:
            changed_ns = os.stat(f"{self.path}/slides").st_mtime_ns
        except OSError:
            return {}
        if changed_ns != self._named_at:
            self._named = {}
            for key in self:
                name = str(SlideFeatures(self, key).attrs.get("name", ""))
                file = name.rpartition("/")[2]
                for one in {name, file, file.rpartition(".")[0]} - {""}:
                    self._named.setdefault(one, []).append(key)
            self._named_at = changed_ns
        return self._named

    @property
    def failed(self) -> dict[str, dict[str, Any]]:
        """Return what is known of the slides that failed: name, path, reason, message, attempts."""
        folder = self.path / "failed"
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
        keys = [name.removesuffix(".json") for name in names if name.endswith(".json")]
        return {key: read_json(folder / f"{key}.json") for key in keys if key not in _Keys(self)}

    def manifest(self) -> pd.DataFrame:
        """Return a row per slide, failed ones too, from the store itself, sorted by key."""
        import pandas as pd

        columns: dict[str, list[Any]] = {name: [] for name in MANIFEST}

        def add(row: Mapping[str, Any]) -> None:
            for name, column in columns.items():
                column.append(row.get(name))

        for key in self:
            slide = SlideFeatures(self, key)
            attrs, source = slide.attrs, _mapping(slide.attrs.get("source"))
            add({
                **attrs, **source, **_mapping(attrs.get("counts")), "key": key,
                "encoders": " ".join(slide.encoders),
            })  # fmt: skip
        for key, record in self.failed.items():
            add({**record, "key": key, "status": "failed", "encoders": ""})
        table = pd.DataFrame(
            {name: _column(columns[name], kind) for name, kind in MANIFEST.items()}
        )
        return table.sort_values("key", ignore_index=True)

    def write_manifest(self) -> Path:
        """Write `manifest()` to slides.parquet, whole or not at all; return its path."""
        from .leases import Leases
        from .write import replacing

        path, name = self.path / "slides.parquet", "slides.parquet"
        lease = Leases(self.path / "leases").wait(name)
        with lease, replacing(self.path, name, path) as partial:
            self.manifest().to_parquet(partial, index=False)
        return path

    def verify(self) -> list[Problem]:
        """Read every byte and return what is wrong: an empty list says that all is well.

        Checks that slides open, that shapes and counts agree, the checksum of every chunk, that
        features are finite but for those of corrupt patches, which are NaN, the hashes of run.json,
        that slides.parquet, if there, is in step, and that nothing else lies about. What a
        worker is writing at this moment counts as lying about.
        """
        return [*self._verify()]

    def _verify(self) -> Iterator[Problem]:
        if self.run.get("hash") != run_hash(self.run):
            yield Problem("", "run.json: its hash is not that of what it says")
        slides = self.path / "slides"
        for name in sorted(os.listdir(slides)) if slides.is_dir() else []:
            if not (name.endswith(".zarr") and KEY.fullmatch(name[:-5])):
                yield Problem("", f"slides/{name}: not a slide")
        for key in self:
            try:
                yield from SlideFeatures(self, key)._verify()
            except StoreError as error:
                yield Problem(key, str(error))
        temporary = self.path / ".tmp"
        for name in sorted(os.listdir(temporary)) if temporary.is_dir() else []:
            yield Problem("", f".tmp/{name}: left by a worker that ended, or being written")
        try:
            stale = self._manifest_differs()
        except StoreError:
            stale = ""  # said above, or of failed/
        if stale:
            yield Problem("", f"slides.parquet: {stale}; write_manifest() makes it again")
        folder = self.path / "failed"
        for name in sorted(os.listdir(folder)) if folder.is_dir() else []:
            try:
                read_json(folder / name)
            except StoreError as error:
                yield Problem(name.removesuffix(".json"), str(error))

    def _manifest_differs(self) -> str:
        import pandas as pd

        path = self.path / "slides.parquet"
        if not path.exists():
            return ""
        try:
            written = pd.read_parquet(path)
        except UNREADABLE as error:
            return f"cannot be read: {error}"
        return "" if written.equals(self.manifest()) else "not in step with the slides"


# Columns of the manifest, and what they hold.
MANIFEST = {
    "key": "str", "name": "str", "status": "str", "patches": "int", "edge": "int", "pen": "int",
    "blur": "int", "corrupt": "int", "grid": "int", "tissue": "int", "encoders": "str",
    "width": "int", "height": "int", "mpp": "float", "mpp_source": "str", "footprint_px": "float",
    "vendor": "str", "reader": "str", "path": "str", "bytes": "int", "quick_hash": "str",
    "reason": "str", "message": "str", "attempts": "int",
}  # fmt: skip


class SlideFeatures:
    """The features of one slide, and what is known of its patches.

    N patches in row-major order; all arrays have a row for each.
    """

    def __init__(self, store: FeatureStore, key: str) -> None:
        self.key, self._store = key, store
        self.path = f"{store.path}/slides/{key}.zarr"
        meta = read_json(f"{self.path}/zarr.json")
        attrs = meta.get("attributes")
        if meta.get("node_type") != "group" or not isinstance(attrs, dict):
            raise StoreError(f"{self.path}: expected a zarr group with attributes, got another")
        self.attrs: dict[str, Any] = attrs
        """What is known of the slide: source, resolution, counts, status; docs/store-format.md."""

    def __repr__(self) -> str:
        return f"SlideFeatures({self.key!r})"

    def __len__(self) -> int:
        """Return N."""
        n = _mapping(self.attrs.get("counts")).get("patches")
        if not isinstance(n, int) or n < 0:
            raise StoreError(f"{self.path}: counts.patches: expected a number, got {n!r}")
        return n

    @property
    def encoders(self) -> list[str]:
        """Return the folders of the encoders that this slide has features of."""
        try:
            with os.scandir(f"{self.path}/features") as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except OSError:
            return []

    @property
    def features(self) -> NDArray[np.float16]:
        """Return float16 [N, D]: a read-only memory map of the file where that is one raw chunk."""
        return self._features.read()

    def rows(self, indices: ArrayLike) -> NDArray[np.float16]:
        """Return the features float16 [n, D] of some patches, in the order asked for.

        Raises:
            IndexError: no such row.
        """
        wanted = np.asarray(indices)
        return self._features.rows(wanted if wanted.size else wanted.astype(np.intp))  # [] is float

    @cached_property
    def coords(self) -> NDArray[np.int32]:
        """Return int32 [N, 2]: (x, y) of the patches' top-left corners in level-0 px."""
        return self._array("coords", np.int32, (len(self), 2)).values()

    @cached_property
    def tissue(self) -> NDArray[np.float32]:
        """Return float32 [N]: the share of each patch that is tissue, in steps of 1/255."""
        share = self._array("tissue", np.uint8, (len(self),)).values().astype(np.float32)
        share /= 255
        return share

    @cached_property
    def flags(self) -> NDArray[np.uint8]:
        """Return uint8 [N]: bits of FLAGS."""
        return self._array("flags", np.uint8, (len(self),)).values()

    @property
    def corrupt(self) -> NDArray[np.bool_]:
        """Return bool [N]: True where there are no features, as the pixels did not decode."""
        return (self.flags & np.uint8(FLAGS.CORRUPT)) != 0

    @property
    def thumb(self) -> NDArray[np.uint8] | None:
        """Return the slide as uint8 [h, w, 3], None if it is not known."""
        return self._image("thumb", np.uint8, (None, None, 3))

    @property
    def mask(self) -> NDArray[np.bool_] | None:
        """Return the tissue as bool [h, w] over the whole slide, None if it is not known."""
        return self._image("mask", np.bool_, (None, None))

    def bag(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return features float32 [K, D] and coords float32 [K, 2] of all but corrupt patches."""
        features, coords, corrupt = self.features, self.coords, self.corrupt
        if corrupt.any():
            features, coords = features[~corrupt], coords[~corrupt]
        return features.astype(np.float32), coords.astype(np.float32)

    @property
    def width(self) -> int:
        """Return D."""
        return self._features.shape[1]

    @cached_property
    def _features(self) -> StoredArray:
        slug = self._store.slug
        try:
            return self._array(f"features/{slug}", np.float16, (len(self), None))
        except StoreError:
            if slug in (have := self.encoders):
                raise
            raise StoreError(
                f"{self.path}: no features of {slug!r} yet, only of: {listed(have)}"
            ) from None

    def _array(self, name: str, dtype: type, shape: tuple[int | None, ...]) -> StoredArray:
        array = StoredArray(f"{self.path}/{name}")
        fits = len(shape) == len(array.shape) and all(
            want in (None, got) for want, got in zip(shape, array.shape, strict=True)
        )
        if array.dtype != dtype or not fits:
            want = ", ".join("any" if one is None else str(one) for one in shape)
            raise StoreError(
                f"{array.path}: expected {np.dtype(dtype)} [{want}], got {array.dtype} "
                f"{list(array.shape)}"
            )
        return array

    def _image(self, name: str, dtype: type, shape: tuple[int | None, ...]) -> NDArray[Any] | None:
        if not os.path.exists(f"{self.path}/{name}"):
            return None
        return self._array(name, dtype, shape).values()

    def _verify(self) -> Iterator[Problem]:
        attrs, n = self.attrs, len(self)
        counts = _mapping(attrs.get("counts"))
        status = "ok" if n else "empty"
        if attrs.get("status") != status:
            yield Problem(self.key, f"status: expected {status!r}, got {attrs.get('status')!r}")
        if attrs.get("tiling_hash") != self._store.run["tiling_hash"]:
            yield Problem(self.key, "tiled with another specification than run.json's")
        for name, count in ({"patches": n} | flag_counts(self.flags)).items():
            if counts.get(name) != count:
                yield Problem(self.key, f"counts.{name}: expected {count}, got {counts.get(name)}")
        held = set(os.listdir(self.path))
        yield from (
            Problem(self.key, f"{one}: not of a slide")
            for one in sorted(held - {*ARRAYS, "features", "zarr.json"})
        )
        for name in (*ARRAYS[:3], *sorted(held & {*ARRAYS[3:]})):
            try:
                array = StoredArray(f"{self.path}/{name}")
                yield from (Problem(self.key, what) for what in array.check())
            except StoreError as error:
                yield Problem(self.key, str(error))
        _ = self.tissue, self.thumb, self.mask
        if read_json(f"{self.path}/features/zarr.json").get("node_type") != "group":
            yield Problem(self.key, "features/zarr.json: not of a zarr group")
        if not self.encoders:
            yield Problem(self.key, "no features of any encoder")
        corrupt = self.corrupt
        for slug in self.encoders:
            try:
                yield from self._verify_features(slug, corrupt)
            except StoreError as error:
                yield Problem(self.key, str(error))

    def _verify_features(self, slug: str, corrupt: NDArray[np.bool_]) -> Iterator[Problem]:
        spec = self._store.run["encoders"].get(slug)
        array = self._array(f"features/{slug}", np.float16, (len(corrupt), None))
        if spec is None or array.attrs != spec:
            yield Problem(self.key, f"features/{slug}: of another encoder than run.json's")
        yield from (Problem(self.key, what) for what in array.check())
        for first in range(0, len(corrupt), 4096):
            part = array.rows(np.arange(first, min(first + 4096, len(corrupt))))
            unlike = np.isfinite(part).all(axis=1) == corrupt[first : first + 4096]
            # Of a corrupt patch nothing may be there: all NaN.
            unlike |= corrupt[first : first + 4096] & ~np.isnan(part).all(axis=1)
            if unlike.any():
                row = first + int(np.flatnonzero(unlike)[0])
                want = "NaN, as of a corrupt patch" if corrupt[row] else "finite numbers"
                yield Problem(self.key, f"features/{slug}: row {row}: expected {want}")
                return


class StoredArray:
    """A zarr v3 array on disk, memory-mapped where its chunks are raw bytes.

    Sizes of files are compared with the metadata before they are mapped or memory is allocated:
    touching a map beyond the end of its file would kill the process.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        meta = read_json(f"{path}/zarr.json")
        try:
            if meta["node_type"] != "array":
                raise ValueError(meta["node_type"])
            self.shape = tuple(int(n) for n in meta["shape"])
            self.dtype = np.dtype(_DTYPES[meta["data_type"]])
            self.attrs: dict[str, Any] = meta.get("attributes", {})
            grid, keys = meta["chunk_grid"], meta["chunk_key_encoding"]
            chunk = tuple(int(n) for n in grid["configuration"]["chunk_shape"])
            codecs = [(one["name"], one.get("configuration", {})) for one in meta["codecs"]]
            slashes = keys.get("configuration", {}).get("separator", "/") == "/"
            if min(self.shape, default=0) < 0 or len(chunk) != len(self.shape) or min(chunk) < 1:
                raise ValueError(f"shape {self.shape} in chunks of {chunk}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"{path}/zarr.json: expected a zarr v3 array, got {error!r}") from None
        names = [name for name, _ in codecs]
        self.checked = names[-1:] == ["crc32c"]
        self.chunk_rows = chunk[0]
        self._raw = (
            grid.get("name") == "regular"
            and keys.get("name") == "default"
            and slashes
            and names in (["bytes"], ["bytes", "crc32c"])
            and (self.dtype.itemsize == 1 or codecs[0][1].get("endian") == "little")
            and chunk[1:] == self.shape[1:]
        )
        self._chunk = chunk
        self._file_bytes = math.prod(chunk) * self.dtype.itemsize + 4 * self.checked  # if raw
        self._maps: list[NDArray[Any]] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> NDArray[Any]:
        """Return the numbers: a map of one raw chunk as it is, else a copy."""
        if not self._raw:
            return self._by_zarr()
        maps = self._mapped()
        if len(maps) == 1:
            return maps[0].view(np.memmap)
        out = np.empty(self.shape, self.dtype)
        for i, part in enumerate(maps):
            out[i * self.chunk_rows : (i + 1) * self.chunk_rows] = part
        return out

    def values(self) -> NDArray[Any]:
        """Return the numbers in memory."""
        return np.array(self.read(), subok=False)

    def rows(self, indices: NDArray[Any]) -> NDArray[Any]:
        """Return some rows, in the order asked for."""
        if not self._raw:
            return self._by_zarr()[indices]
        maps = self._mapped()
        if len(maps) == 1:
            return maps[0][indices]
        indices = np.arange(self.shape[0])[indices]  # counts negative ones, refuses others
        out = np.empty((len(indices), *self.shape[1:]), self.dtype)
        place = indices // self.chunk_rows
        for i, part in enumerate(maps):
            here = np.flatnonzero(place == i)
            out[here] = part[indices[here] - i * self.chunk_rows]
        return out

    def check(self) -> Iterator[str]:
        """Say which chunk files are not whole, and which files are none."""
        if not self._raw:
            try:
                self._by_zarr()
            except StoreError as error:
                yield str(error)
        expected = {f"{self.path}/zarr.json", *self._files()}
        for path in self._files():
            if not os.path.isfile(path):
                yield f"{path}: no such file"
            elif self.checked and not _crc_holds(path):
                yield f"{path}: its checksum is not that of its bytes"
        if self._raw:
            try:
                self._mapped()
            except StoreError as error:
                yield str(error)
        for folder, _, names in os.walk(self.path):
            for name in names:
                if f"{folder}/{name}" not in expected:
                    yield f"{folder}/{name}: not of the array"

    def _files(self) -> list[str]:
        counts = [-(-n // c) for n, c in zip(self.shape, self._chunk, strict=True)]
        if math.prod(counts) > 2**20:
            raise StoreError(f"{self.path}: expected at most 2^20 chunks, got {math.prod(counts)}")
        return [f"{self.path}/c/{'/'.join(map(str, one))}" for one in product(*map(range, counts))]

    def missing(self) -> str | None:
        """Say which chunk file is missing or of a wrong size, None if none is; reads no chunk."""
        for path in self._files():
            try:
                got = os.stat(path).st_size
            except OSError as error:
                return f"{path}: {error.strerror}"
            if self._raw and got != self._file_bytes:
                return _sizes(path, self._file_bytes, got)
        return None

    def _mapped(self) -> list[NDArray[Any]]:
        if self._maps is None:
            maps = []
            for i, path in enumerate(self._files()):
                rows = min(self.chunk_rows, self.shape[0] - i * self.chunk_rows)
                shape = (rows, *self.shape[1:])
                try:
                    # What np.memmap does, in a fifth of its 60 µs: two thirds of opening a slide.
                    with open(path, "rb", buffering=0) as file:
                        got = os.fstat(file.fileno()).st_size
                        if got != self._file_bytes:
                            raise StoreError(_sizes(path, self._file_bytes, got))
                        content = mmap(file.fileno(), 0, access=ACCESS_READ)
                except (OSError, ValueError) as error:  # ValueError: empty, as of width 0
                    raise StoreError(f"{path}: cannot be mapped: {error}") from None
                maps.append(np.ndarray(shape, self.dtype, content))
            # Without rows there is nothing to map.
            self._maps = maps or [np.empty(self.shape, self.dtype)]
        return self._maps

    def _by_zarr(self) -> NDArray[Any]:
        """Read an array in another form, as others may write: compressed, or otherwise cut."""
        import zarr

        if wrong := self.missing():
            raise StoreError(wrong)
        if self.nbytes > 2**40:
            raise StoreError(f"{self.path}: expected less than 1 TiB, got {self.nbytes} bytes")
        try:
            return np.asarray(zarr.open_array(self.path, mode="r", zarr_format=3)[...])
        except UNREADABLE as error:
            raise StoreError(f"{self.path}: cannot be read: {error}") from None


# What reading a damaged or hostile file raises, by zarr, pyarrow, numpy, h5py and torch.
UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError, IndexError,
    MemoryError,
)  # fmt: skip
_DTYPES = {
    "float16": "<f2", "float32": "<f4", "float64": "<f8", "int32": "<i4", "int64": "<i8",
    "uint8": "u1", "bool": "?",
}  # fmt: skip


class _Keys:
    """Whether a slide is there, without a list of them."""

    def __init__(self, store: FeatureStore) -> None:
        self._slides = store.path / "slides"

    def __contains__(self, key: str) -> bool:
        return (self._slides / f"{key}.zarr").exists()


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        StoreError: there is none.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            content = json.loads(file.read())
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise StoreError(f"{path}: cannot be read: {why}") from None
    if not isinstance(content, dict):
        raise StoreError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def read_run(folder: Path) -> dict[str, Any]:
    """Read run.json, of a format that is known."""
    path = folder / "run.json"
    run = read_json(path)
    if run.get("format") != FORMAT or not isinstance(run.get("version"), int):
        raise StoreError(f"{path}: expected format {FORMAT!r}, got {run.get('format')!r}")
    if run["version"] > VERSION:
        raise StoreError(
            f"{path}: expected format version {VERSION}, got {run['version']}: upgrade motet"
        )
    encoders = run.get("encoders")
    sound = isinstance(encoders, dict) and all(
        KEY.fullmatch(slug) and isinstance(spec, dict) and isinstance(spec.get("id"), str)
        for slug, spec in encoders.items()
    )
    if not sound or not isinstance(run.get("tiling"), dict) or "tiling_hash" not in run:
        raise StoreError(f"{path}: expected tiling, tiling_hash and encoders, got {listed(run)}")
    return run


def run_hash(run: Mapping[str, Any]) -> str:
    """Return 16 hex digits of SHA-256 over all of run.json but the hash itself."""
    text = json.dumps(
        {name: value for name, value in run.items() if name != "hash"},
        sort_keys=True, separators=(",", ":"),
    )  # fmt: skip
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def crc_of(file: int, size: int) -> int:
    """Return the crc32c of the first bytes of an open file."""
    import google_crc32c

    crc = 0
    for at in range(0, size, 1 << 22):
        crc = google_crc32c.extend(crc, os.pread(file, min(1 << 22, size - at), at))
    return crc


def _sizes(path: str, expected: int, got: int) -> str:
    return f"{path}: expected {expected} bytes, got {got}"


def _crc_holds(path: str) -> bool:
    file = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(file).st_size - 4
        if size < 0:
            return False
        return crc_of(file, size).to_bytes(4, "little") == os.pread(file, 4, size)
    finally:
        os.close(file)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def flag_counts(flags: NDArray[np.uint8]) -> dict[str, int]:
    """Return how many patches each flag has."""
    names = ("edge", "pen", "blur", "corrupt")
    return {
        name: int(np.count_nonzero(flags & np.uint8(flag)))
        for name, flag in zip(names, FLAGS, strict=True)
    }


def _column(values: list[Any], kind: str) -> pd.Series:
    """Return a column; what is of another kind than it says is missing."""
    import pandas as pd

    def fitting(value: Any) -> Any:
        if isinstance(value, str) and kind == "str":
            # A path that is not UTF-8 has characters that no table can hold.
            return value.encode(errors="replace").decode()
        if isinstance(value, float) and kind == "float":
            return value
        if isinstance(value, int) and kind != "str" and not isinstance(value, bool):
            return value if abs(value) < 2**63 else None
        return None

    dtype = {"str": pd.StringDtype(), "int": pd.Int64Dtype(), "float": pd.Float64Dtype()}[kind]
    return pd.Series([fitting(value) for value in values], dtype=dtype)
