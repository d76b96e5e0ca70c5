"""Read zarr v3 arrays: mapped into memory where possible, sizes and checksums checked."""

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

UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError, IndexError,
    MemoryError,
)  # fmt: skip
"""Exceptions that zarr, pyarrow, numpy, h5py and torch raise for a damaged or hostile file."""
_DTYPES = {
    "float16": "<f2", "float32": "<f4", "float64": "<f8", "int32": "<i4", "int64": "<i8",
    "uint8": "u1", "bool": "?",
}  # fmt: skip


class StoredArray:
    """A zarr v3 array on disk, memory-mapped if its chunks are raw bytes.

    The size of each file is compared with the metadata before the file is mapped or memory is
    allocated. Reading a map beyond the end of its file would kill the process (SIGBUS), and a
    damaged shape could ask for any amount of memory.
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
            codecs = [(codec["name"], codec.get("configuration", {})) for codec in meta["codecs"]]
            slashes = keys.get("configuration", {}).get("separator", "/") == "/"
            if min(self.shape, default=0) < 0 or len(chunk) != len(self.shape) or min(chunk) < 1:
                raise ValueError(f"shape {self.shape} in chunks of {chunk}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"{path}/zarr.json: expected a zarr v3 array, got {error!r}") from None
        names = [name for name, _ in codecs]
        self.has_checksums = names[-1:] == ["crc32c"]
        self.chunk_rows = chunk[0]
        # Raw: a chunk file is consecutive rows of the array in C order, then maybe a checksum.
        self._raw = (
            grid.get("name") == "regular"
            and keys.get("name") == "default"
            and slashes
            and names in (["bytes"], ["bytes", "crc32c"])
            and (self.dtype.itemsize == 1 or codecs[0][1].get("endian") == "little")
            and chunk[1:] == self.shape[1:]
        )
        self._chunk = chunk
        # The size of a chunk file, if it is raw.
        self._file_bytes = math.prod(chunk) * self.dtype.itemsize + 4 * self.has_checksums
        self._maps: list[NDArray[Any]] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> NDArray[Any]:
        """Return the array: a memory map if it is one raw chunk, else a copy."""
        if not self._raw:
            return self._read_with_zarr()
        maps = self._map_chunks()
        if len(maps) == 1:
            return maps[0].view(np.memmap)
        out = np.empty(self.shape, self.dtype)
        for i, part in enumerate(maps):
            out[i * self.chunk_rows : (i + 1) * self.chunk_rows] = part
        return out

    def values(self) -> NDArray[Any]:
        """Return a copy of the array in memory."""
        return np.array(self.read(), subok=False)

    def rows(self, indices: NDArray[Any]) -> NDArray[Any]:
        """Return the rows `indices`, in that order."""
        if not self._raw:
            return self._read_with_zarr()[indices]
        maps = self._map_chunks()
        if len(maps) == 1:
            return maps[0][indices]
        # Negative indices count from the end; an index beyond the array is an IndexError.
        indices = np.arange(self.shape[0])[indices]
        out = np.empty((len(indices), *self.shape[1:]), self.dtype)
        chunk_of_row = indices // self.chunk_rows
        for i, chunk in enumerate(maps):
            in_chunk = np.flatnonzero(chunk_of_row == i)
            out[in_chunk] = chunk[indices[in_chunk] - i * self.chunk_rows]
        return out

    def check(self) -> Iterator[str]:
        """Read every byte; yield which chunk files are damaged and which files do not belong."""
        if not self._raw:
            try:
                self._read_with_zarr()
            except StoreError as error:
                yield str(error)
        expected = {f"{self.path}/zarr.json", *self._chunk_paths()}
        for path in self._chunk_paths():
            if not os.path.isfile(path):
                yield f"{path}: no such file"
            elif self.has_checksums and not _checksum_is_right(path):
                yield f"{path}: its checksum is not that of its bytes"
        if self._raw:
            try:
                self._map_chunks()
            except StoreError as error:
                yield str(error)
        for folder, _, names in os.walk(self.path):
            for name in names:
                if f"{folder}/{name}" not in expected:
                    yield f"{folder}/{name}: not of the array"

    def _chunk_paths(self) -> list[str]:
        counts = [-(-n // c) for n, c in zip(self.shape, self._chunk, strict=True)]
        if math.prod(counts) > 2**20:
            raise StoreError(f"{self.path}: expected at most 2^20 chunks, got {math.prod(counts)}")
        places = product(*map(range, counts))
        return [f"{self.path}/c/{'/'.join(map(str, place))}" for place in places]

    def find_missing_chunk(self) -> str | None:
        """Return which chunk file is missing or of a wrong size, None if none is.

        Reads only the sizes of the files.
        """
        for path in self._chunk_paths():
            try:
                got = os.stat(path).st_size
            except OSError as error:
                return f"{path}: {error.strerror}"
            if self._raw and got != self._file_bytes:
                return _wrong_size(path, self._file_bytes, got)
        return None

    def _map_chunks(self) -> list[NDArray[Any]]:
        if self._maps is None:
            maps = []
            for i, path in enumerate(self._chunk_paths()):
                rows = min(self.chunk_rows, self.shape[0] - i * self.chunk_rows)
                shape = (rows, *self.shape[1:])
                try:
                    # The same as np.memmap in a fifth of its time (60 µs, two thirds of the time
                    # of opening a slide).
                    with open(path, "rb", buffering=0) as file:
                        got = os.fstat(file.fileno()).st_size
                        if got != self._file_bytes:
                            raise StoreError(_wrong_size(path, self._file_bytes, got))
                        content = mmap(file.fileno(), 0, access=ACCESS_READ)
                except (OSError, ValueError) as error:  # ValueError: an empty file (width 0)
                    raise StoreError(f"{path}: cannot be mapped: {error}") from None
                maps.append(np.ndarray(shape, self.dtype, content))
            # An array without rows has no chunk files.
            self._maps = maps or [np.empty(self.shape, self.dtype)]
        return self._maps

    def _read_with_zarr(self) -> NDArray[Any]:
        """Read an array that is not raw: compressed, or in chunks of another form."""
        import zarr

        if problem := self.find_missing_chunk():
            raise StoreError(problem)
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


def _wrong_size(path: str, expected: int, got: int) -> str:
    return f"{path}: expected {expected} bytes, got {got}"


def _checksum_is_right(path: str) -> bool:
    """Return True if the last 4 bytes of a file are the crc32c of those before."""
    file = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(file).st_size - 4
        if size < 0:
            return False
        return crc_of(file, size).to_bytes(4, "little") == os.pread(file, 4, size)
    finally:
        os.close(file)
