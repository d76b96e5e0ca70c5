"""Arrays of zarr v3 on the disk: mapped, checked, never more memory than the file is large."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from itertools import product
from mmap import ACCESS_READ, mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import StoreError
from .format import read_json

# What reading a damaged or hostile file raises, by zarr, pyarrow, numpy, h5py and torch.
UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError, IndexError,
    MemoryError,
)  # fmt: skip
_DTYPES = {
    "float16": "<f2", "float32": "<f4", "float64": "<f8", "int32": "<i4", "int64": "<i8",
    "uint8": "u1", "bool": "?",
}  # fmt: skip


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
