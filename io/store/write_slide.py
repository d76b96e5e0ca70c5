"""Write one slide: its files in `.tmp/`, then the rename into the store (protocol: write.py)."""

from __future__ import annotations

import math
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..._atomic import sync
from ..errors import SlideError, StoreError
from .array import crc_of
from .disk import allocate, explain_full_disk, swap, sync_tree, write_all
from .failures import forget_failures
from .format import FLAGS, VERSION, flag_counts, json_bytes, read_json

ONE_CHUNK_BYTES, CHUNK_ROWS = 2**28, 65_536
"""An array of up to 256 MiB is one chunk, which readers map into memory; a larger one has chunks of
65,536 rows. Both numbers are part of the format (docs/reference/store-format.md)."""


@dataclass(frozen=True)
class Target:
    """The cohort folder and the encoder for which slides are written.

    Args:
        path: the cohort folder.
        slug: folder of the encoder's features in a slide.
        encoder: the encoder's entry in run.json: id, width, weights, transform, precision.
        tiling_hash: the entry of run.json.
    """

    path: Path
    slug: str
    encoder: dict[str, Any]
    tiling_hash: str


class SlideWriter:
    """Write one slide. A context manager: at its end, files that are not committed are removed.

    The file of features is created first, with all its space. `write` puts rows into it at their
    places, so rows may come in any order and no copy of the features is held in memory.

    Args:
        target: the cohort folder and the encoder.
        key: key of the slide.
        width: D.
        arrays: the other arrays by name; "flags" must be there.
        attrs: attributes of the slide.
        further: True to add features of a further encoder to a slide that is in the store.
    """

    def __init__(
        self,
        target: Target,
        key: str,
        width: int,
        arrays: Mapping[str, NDArray[Any] | None],
        attrs: Mapping[str, Any],
        *,
        further: bool = False,
    ) -> None:
        if width != target.encoder["width"]:
            raise ValueError(f"width: expected {target.encoder['width']}, got {width}")
        self.key, self.width, self._target, self._further = key, width, target, further
        self._arrays, self._attrs = dict(arrays), dict(attrs)
        flags = arrays["flags"]
        assert flags is not None
        self._flags = flags.copy()
        self._written = np.zeros(len(flags), bool)
        self._files: list[int] = []
        # For a further encoder the folder in .tmp/ becomes features/<slug>, else the whole slide.
        self._temporary = target.path / ".tmp" / f"{key}.{secrets.token_hex(8)}"
        self._features = self._temporary / ("" if further else f"features/{target.slug}")
        shape = (len(flags), width)
        self._chunk_rows = _chunk_rows(shape, 2)
        try:
            with explain_full_disk(
                f"{key}: {len(flags)} features of {width} numbers", self._temporary
            ):
                self._features.mkdir(parents=True)
                size = self._chunk_rows * width * 2 + 4  # float16, and 4 bytes of checksum
                for i in range(-(-len(flags) // self._chunk_rows)):
                    self._files.append(allocate(self._features / "c" / str(i) / "0", size))
                self._write_nan(np.flatnonzero(self._flags & FLAGS.CORRUPT))
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> SlideWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def write(self, rows: ArrayLike, features: ArrayLike) -> None:
        """Write features [b, D] of the patches `rows` [b]. Rows may come in any order, each once.

        Raises:
            SlideError: "encoder", a feature is NaN or beyond float16.
            ValueError: a row does not exist, was written before, or is of a corrupt patch.
            OSError: the disk is full.
        """
        rows, values = np.asarray(rows, np.int64), np.asarray(features)
        if rows.ndim != 1 or values.shape != (len(rows), self.width):
            raise ValueError(
                f"features: expected [{len(rows)}, {self.width}], got {list(values.shape)}"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            half = values.astype("<f2")
        finite = np.isfinite(half)
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            value = values[row, column]
            why = "beyond float16, which ends at 65504" if np.isfinite(value) else "not finite"
            raise SlideError(
                _path_of(self._attrs), "encoder",
                f"{self._target.encoder['id']}: feature {column} of patch {rows[row]} is {value}: "
                f"{why}",
            )  # fmt: skip
        self._mark_written(rows)
        order = np.argsort(rows)
        rows, half = rows[order], half[order]
        with explain_full_disk(f"{self.key}: features", self._temporary):
            # One write per sequence of consecutive rows.
            for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) != 1) + 1):
                if len(part):
                    self._write_rows(int(rows[part[0]]), half[part])

    def corrupt(self, rows: ArrayLike) -> None:
        """Flag patches whose pixels could not be decoded as corrupt; their features are NaN.

        Raises:
            SlideError: "damaged", if the features are of a further encoder: the same patches could
                be decoded when the slide was tiled, and its flags are in the store already.
        """
        rows = np.asarray(rows, np.int64)
        if not len(rows):
            return
        if self._further:
            raise SlideError(
                _path_of(self._attrs), "damaged",
                f"patch {rows[0]} cannot be decoded any more; it could when the slide was tiled",
            )  # fmt: skip
        self._write_nan(rows)
        self._flags[rows] |= np.uint8(FLAGS.CORRUPT)

    def commit(self, *, replace: bool = False) -> bool:
        """Put the slide into the store, synced to the disk.

        Args:
            replace: True to replace the slide in the store, and its features of all encoders.

        Returns:
            False if another worker committed the slide meanwhile. The other's slide stays; it has
            the same bytes.

        Raises:
            StoreError: rows are missing, or another worker took over the lease and removed this
                one's files.
            OSError: the disk is full.
        """
        try:
            return self._commit(replace)
        finally:
            self.abort()

    def _commit(self, replace: bool) -> bool:
        if not self._written.all():
            missing = np.flatnonzero(~self._written)
            raise StoreError(
                f"{self.key}: expected all {len(self._written)} patches, got "
                f"{len(self._written) - len(missing)} (the first without features: {missing[0]})"
            )
        with explain_full_disk(self.key, self._temporary):
            self._finish_features()
            if not self._further:
                self._write_other_arrays()
            sync_tree(self._temporary)  # before the rename, or it could outlive the content
        slug = self._target.slug if self._further else None
        forget_failures(self._target.path, self.key, slug)
        slide = self._target.path / "slides" / f"{self.key}.zarr"
        if self._further and read_json(slide / "zarr.json").get("attributes") != self._attrs:
            raise StoreError(f"{slide}: another worker replaced it meanwhile")
        final = slide / "features" / self._target.slug if self._further else slide
        if replace and not self._further and final.exists():
            swap(self._temporary, final)
            return True
        try:
            os.rename(self._temporary, final)  # fails if a folder that is not empty is there
        except OSError as error:
            if final.exists():
                return False
            if isinstance(error, FileNotFoundError):
                raise StoreError(
                    f"{self.key}: another worker took over and removed {self._temporary}"
                ) from None
            raise
        sync(final.parent)  # so that the rename survives a power failure
        return True

    def abort(self) -> None:
        """Remove the files in .tmp/. After a commit, or a second time, this does nothing."""
        while self._files:
            os.close(self._files.pop())
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _mark_written(self, rows: NDArray[np.int64]) -> None:
        """Mark rows as written; raise ValueError if one does not exist or was written before."""
        n = len(self._written)
        if len(rows) and not (rows.min() >= 0 and rows.max() < n):
            raise ValueError(f"rows: expected 0 to {n - 1}, got {rows.min()} to {rows.max()}")
        repeated = rows[self._written[rows]]
        if len(repeated):
            corrupt = self._flags[repeated[0]] & FLAGS.CORRUPT
            why = "of a corrupt patch" if corrupt else "written before"
            raise ValueError(f"rows: expected each once, got {repeated[0]}, {why}")
        if len(np.unique(rows)) != len(rows):
            raise ValueError("rows: expected each once, got one twice")
        self._written[rows] = True

    def _write_nan(self, rows: NDArray[np.int64]) -> None:
        self._mark_written(rows)
        nan = np.full((1, self.width), np.nan, "<f2")
        for row in rows:
            self._write_rows(int(row), nan)

    def _write_rows(self, row: int, half: NDArray[np.float16]) -> None:
        """Write consecutive rows, from `row` on; they may lie in several chunks."""
        while len(half):
            i, row_in_chunk = divmod(row, self._chunk_rows)
            count = min(len(half), self._chunk_rows - row_in_chunk)
            content = np.ascontiguousarray(half[:count]).data
            write_all(self._files[i], content, row_in_chunk * self.width * 2)
            row, half = row + count, half[count:]

    def _finish_features(self) -> None:
        """Fill the last chunk with NaN, append the checksums, and write the array's zarr.json."""
        n, size = len(self._written), self._chunk_rows * self.width * 2
        for i, file in enumerate(self._files):
            nan = np.full(self.width, np.nan, "<f2")
            for row in range(n - i * self._chunk_rows, self._chunk_rows):
                write_all(file, nan.data, row * self.width * 2)
            write_all(file, _crc_bytes(crc_of(file, size)), size)
        meta = _array_json(
            (n, self.width), "float16", (self._chunk_rows, self.width), self._target.encoder
        )
        (self._features / "zarr.json").write_bytes(json_bytes(meta))

    def _write_other_arrays(self) -> None:
        """Write all arrays but the features, and the attributes of the slide."""
        n, attrs = len(self._flags), self._attrs
        attrs |= {
            "counts": {**attrs.get("counts", {}), "patches": n, **flag_counts(self._flags)},
            "format": "motet-slide",
            "key": self.key,
            "status": "ok" if n else "empty",
            "tiling_hash": self._target.tiling_hash,
            "version": VERSION,
        }
        for name, array in (self._arrays | {"flags": self._flags}).items():
            if array is not None:
                _write_array(self._temporary / name, array, packed=name in ("thumb", "mask"))
        group = {"node_type": "group", "zarr_format": 3}
        (self._temporary / "features" / "zarr.json").write_bytes(
            json_bytes({**group, "attributes": {}})
        )
        (self._temporary / "zarr.json").write_bytes(json_bytes({**group, "attributes": attrs}))


def _path_of(attrs: Mapping[str, Any]) -> str:
    return str(attrs["source"]["path"])


def _chunk_rows(shape: tuple[int, ...], itemsize: int) -> int:
    """Return the number of rows of a chunk: all of them up to ONE_CHUNK_BYTES, else CHUNK_ROWS."""
    nbytes = math.prod(shape) * itemsize
    return max(1, shape[0]) if nbytes <= ONE_CHUNK_BYTES else CHUNK_ROWS


def _array_json(
    shape: tuple[int, ...],
    dtype: str,
    chunk: tuple[int, ...],
    attrs: Mapping[str, Any],
    *packing: dict[str, Any],
) -> dict[str, Any]:
    order = {} if dtype in ("uint8", "bool") else {"configuration": {"endian": "little"}}
    fill: object = "NaN" if dtype == "float16" else False if dtype == "bool" else 0
    return {
        "attributes": dict(attrs),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "bytes", **order}, *packing, {"name": "crc32c"}],
        "data_type": dtype,
        "fill_value": fill,
        "node_type": "array",
        "shape": list(shape),
        "storage_transformers": [],
        "zarr_format": 3,
    }


def _write_array(folder: Path, array: NDArray[Any], *, packed: bool) -> None:
    """Write an array that is in memory.

    Args:
        folder: of the array; created.
        array: its values.
        packed: True for an image: one chunk, compressed.
    """
    rows = max(1, len(array)) if packed else _chunk_rows(array.shape, array.itemsize)
    chunk = (rows, *(max(1, n) for n in array.shape[1:]))
    packing = [{"name": "zstd", "configuration": {"checksum": False, "level": 3}}] if packed else []
    meta = _array_json(array.shape, array.dtype.name, chunk, {}, *packing)
    folder.mkdir()
    (folder / "zarr.json").write_bytes(json_bytes(meta))
    zeros = ["0"] * (array.ndim - 1)
    for i in range(-(-len(array) // rows) if array.size else 0):
        part = array[i * rows : (i + 1) * rows]
        if len(part) < rows:
            part = np.concatenate([part, np.zeros((rows - len(part), *part.shape[1:]), part.dtype)])
        content = np.ascontiguousarray(part).tobytes()
        if packed:
            from numcodecs.zstd import Zstd

            content = bytes(Zstd(level=3).encode(content))
        path = folder.joinpath("c", str(i), *zeros)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content + _crc_bytes(_crc(content)))


def _crc(content: bytes) -> int:
    import google_crc32c

    return google_crc32c.value(content)


def _crc_bytes(crc: int) -> bytes:
    return crc.to_bytes(4, "little")
