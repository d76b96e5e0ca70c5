"""The commit protocol: how slides get into a store whole, whatever is killed and whenever.

A slide is built in `.tmp/<key>.<token>/`, all its files and folders are synced to the disk, and
one rename puts it into `slides/`. A reader sees it whole or not at all. Nothing in it depends on
time or chance, so whoever commits it commits the same bytes; where two do, the first wins and the
other's is dropped. What a worker that died left in `.tmp/` is removed by the next holder of the
key's lease (leases.py).

Replacing a slide, whose source changed, takes three renames: the new one becomes `.ready`, the old
one leaves as `.old`, the new one takes its place. A kill in between loses neither: where a slide is
missing, `_recover` puts `.ready` there, else `.old`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import SlideError, StoreError
from .leases import Leases
from .read import (
    FLAGS,
    FORMAT,
    KEY,
    VERSION,
    FeatureStore,
    SlideFeatures,
    StoredArray,
    crc_of,
    flag_counts,
    read_json,
    read_run,
    run_hash,
)
from .source import Source, is_same

# An array is one chunk, which is a memory map, up to this size; beyond it, chunks of so many rows.
ONE_CHUNK_BYTES, CHUNK_ROWS = 2**28, 65_536
# A full disk fails every slide alike: the run stops rather than to list them all as failed.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LEFT = re.compile(r"(.+)\.[0-9a-f]{16}(\.ready|\.old)?")


class StoreWriter:
    """Write slides into a cohort folder, beside any number of other workers.

    For each source: `state`; unless it is done, take the key's lease and ask for the state again;
    then `begin` (or `begin_features` where the state is "features"), `write`, `commit`.
    """

    def __init__(self, path: Path, slug: str, run: Mapping[str, Any]) -> None:
        self.path, self.slug = path, slug
        self.encoder: dict[str, Any] = run["encoders"][slug]
        self.tiling_hash: str = run["tiling_hash"]

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        tiling: Mapping[str, Any],
        tiling_hash: str,
        encoder: Mapping[str, Any],
    ) -> StoreWriter:
        """Create a cohort folder, or go on with one of the same specification.

        Args:
            path: the cohort folder; made if it is not there, with its parents.
            tiling: what was asked for, as JSON.
            tiling_hash: of it.
            encoder: `Encoder.spec()`: id, width, weights, transform, precision.

        Raises:
            StoreError: the cohort has another specification: field, expected, got.
        """
        folder = Path(path)
        asked = {"tiling": _plain(tiling), "tiling_hash": tiling_hash}
        spec: dict[str, Any] = _plain(encoder)
        if folder.exists() and not folder.is_dir():
            raise StoreError(f"{folder}: expected a folder, got a file")
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "run.json"
        if not file.exists():
            strange = {*os.listdir(folder)} - {"leases", "logs", "run.json"}
            if strange := sorted(name for name in strange if name[0] != "."):
                raise StoreError(
                    f"{folder}: expected a new or empty folder, or a store, got one with "
                    f"{strange[0]!r}"
                )
        slug = _matching(file, asked, spec) if file.exists() else None
        if slug is None:  # new here: the cohort, or the encoder
            with Leases(folder / "leases").wait("run.json"):
                slug = _matching(file, asked, spec) if file.exists() else None
                if slug is None:
                    slug = _add(file, asked, spec)
        for name in ("slides", "failed", "logs", "leases", ".tmp"):
            (folder / name).mkdir(exist_ok=True)
        return cls(folder, slug, read_run(folder))

    def state(self, source: Source) -> str:
        """Say what is to be done for a source, from a few small reads.

        Returns:
            "done"; "empty": done, no patch has tissue; "failed"; "todo"; "features": tiled, but not
            with this encoder; "changed": there, but of another source file, size of arrays or
            specification than it should be: begin anew, and commit with replace=True.
        """
        folder = self.path / "slides" / f"{source.key}.zarr"
        if not folder.exists():
            try:
                note = read_json(self.path / "failed" / f"{source.key}.json")
            except StoreError:
                return "todo"
            return "failed" if is_same(source, note) else "todo"
        try:
            meta = read_json(folder / "zarr.json")
            attrs = meta.get("attributes")
            if not isinstance(attrs, dict) or attrs.get("tiling_hash") != self.tiling_hash:
                return "changed"
            if not is_same(source, attrs.get("source")):
                return "changed"
            features = folder / "features" / self.slug
            if not features.exists():
                return "features"
            array, n = StoredArray(str(features)), _count(attrs)
            whole = array.shape == (n, self.encoder["width"]) and array.dtype == np.float16
            if not whole or array.attrs != self.encoder or array.missing():
                return "changed"
        except StoreError:
            return "changed"
        return "done" if n else "empty"

    def begin(
        self,
        key: str,
        attrs: Mapping[str, Any],
        coords: ArrayLike,
        tissue: ArrayLike,
        flags: ArrayLike,
        thumb: NDArray[np.uint8] | None,
        mask: NDArray[np.bool_] | None,
        width: int,
    ) -> SlideWriter:
        """Begin a slide. Its space on the disk is taken at once, so that a full disk says so now.

        Args:
            key: of the slide, whose lease the caller holds.
            attrs: JSON; `described(source)` must be part of it, and what else is known of the
                slide. `counts` may name further numbers; those of patches and flags are added.
            coords: int32 [N, 2], in row-major order.
            tissue: the share of each patch that is tissue, [N] from 0 to 1; uint8 is in 255ths.
            flags: uint8 [N], bits of FLAGS. Corrupt patches get NaN and must not be written.
            thumb: uint8 [h, w, 3].
            mask: bool [h, w].
            width: D.

        Raises:
            OSError: the disk is full, or cannot be written to; nothing is left behind.
        """
        _check_key(key)
        if "name" not in attrs or "source" not in attrs:
            raise ValueError(f"attrs: expected those of described(source), got {sorted(attrs)}")
        places, states = np.asarray(coords), np.asarray(flags)
        share = np.asarray(tissue)
        if share.dtype != np.uint8:
            share = np.clip(np.rint(np.asarray(share, np.float64) * 255), 0, 255).astype(np.uint8)
        n = len(places)
        if places.shape != (n, 2) or share.shape != (n,) or states.shape != (n,):
            raise ValueError(
                f"expected coords [N, 2], tissue [N], flags [N], got {list(places.shape)}, "
                f"{list(share.shape)}, {list(states.shape)}"
            )
        bounds = np.iinfo(np.int32)
        if n and not (bounds.min <= places.min() and places.max() <= bounds.max):
            raise ValueError(f"coords: expected int32, got up to {places.max()}")
        arrays: dict[str, NDArray[Any] | None] = {
            "coords": places.astype("<i4"), "tissue": share, "flags": states.astype(np.uint8),
            "thumb": thumb, "mask": mask,
        }  # fmt: skip
        _recover(self.path, key)
        return SlideWriter(self, key, width, arrays, _plain(attrs))

    def begin_features(self, key: str, width: int) -> SlideWriter:
        """Begin the features of a further encoder, on the patches that a slide has.

        Raises:
            StoreError: the slide is not there, or not whole.
            OSError: as of `begin`.
        """
        _check_key(key)
        _recover(self.path, key)
        slide = SlideFeatures(FeatureStore(self.path, self.slug), key)
        return SlideWriter(self, key, width, {"flags": slide.flags}, slide.attrs, further=True)

    def attempts(self, key: str) -> int | None:
        """Return how often a slide has failed, None if it is not noted as failed."""
        return attempts_at_failed(self.path, [key]).get(key)

    def log(self, key: str, entries: Mapping[str, Any]) -> None:
        """Note what differs between two runs: seconds, host. Never read by motet."""
        _write_json(self.path, "logs", key, entries)

    def clean(self, leases: Leases) -> None:
        """Remove what dead workers left, leases too, of all keys whose lease can be had now."""
        left = map(_LEFT.fullmatch, _listed(self.path / ".tmp"))
        held = filter(KEY.fullmatch, _listed(leases.folder))
        for key in sorted({found[1] for found in left if found} | {*held}):
            lease = leases.take(key)
            if lease is not None:
                with lease:
                    _recover(self.path, key)


def note_failure(
    cohort: Path, key: str, source: Source, error: BaseException, attempts: int
) -> None:
    """Note that a slide failed, and why; a later success removes the note."""
    reason = error.reason if isinstance(error, SlideError) else type(error).__name__
    message = error.message if isinstance(error, SlideError) else str(error)
    note = {
        "attempts": attempts, "message": message, "name": source.name, "path": str(source.path),
        "reason": reason, "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    with suppress(OSError):  # gone: that may be why it failed
        status = source.path.stat()
        note |= {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    _write_json(cohort, "failed", key, note)


def attempts_at_failed(cohort: Path, keys: Iterable[str] | None = None) -> dict[str, int]:
    """Return how often each of the slides that are noted as failed has failed."""
    folder = cohort / "failed"
    if keys is None:
        keys = [name.removesuffix(".json") for name in _listed(folder) if name.endswith(".json")]
    found = {}
    for key in keys:
        if (folder / f"{key}.json").exists():
            found[key] = int(read_json(folder / f"{key}.json").get("attempts", 0))
    return found


def _write_json(cohort: Path, folder: str, key: str, content: Mapping[str, Any]) -> None:
    _check_key(key)
    with replacing(cohort, key, cohort / folder / f"{key}.json") as partial:
        partial.write_bytes(_json(content))


class SlideWriter:
    """One slide on its way into the store. A context manager that aborts what is not committed."""

    def __init__(
        self,
        writer: StoreWriter,
        key: str,
        width: int,
        arrays: Mapping[str, NDArray[Any] | None],
        attrs: Mapping[str, Any],
        *,
        further: bool = False,
    ) -> None:
        if width != writer.encoder["width"]:
            raise ValueError(f"width: expected {writer.encoder['width']}, got {width}")
        self.key, self.width, self._writer, self._further = key, width, writer, further
        self._arrays, self._attrs = dict(arrays), dict(attrs)
        flags = arrays["flags"]
        assert flags is not None
        self._flags = flags.copy()
        self._written = np.zeros(len(flags), bool)
        self._files: list[int] = []
        self._temporary = writer.path / ".tmp" / f"{key}.{secrets.token_hex(8)}"
        part = "" if further else f"features/{writer.slug}"
        self._features = self._temporary / part
        shape = (len(flags), width)
        self._chunk_rows = _chunk_rows(shape, 2)
        try:
            with _clear(f"{key}: {len(flags)} features of {width} numbers", self._temporary):
                self._features.mkdir(parents=True)
                size = self._chunk_rows * width * 2 + 4
                for i in range(-(-len(flags) // self._chunk_rows)):
                    self._files.append(_allocated(self._features / "c" / str(i) / "0", size))
                self._blank(np.flatnonzero(self._flags & FLAGS.CORRUPT))
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> SlideWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def write(self, rows: ArrayLike, features: ArrayLike) -> None:
        """Write features [b, D] of the patches `rows` [b]: in any order, each once.

        Raises:
            SlideError: "encoder", a feature is NaN or beyond float16.
            ValueError: no such row, one that was written, or one of a corrupt patch.
            OSError: the disk is full.
        """
        rows, given = np.asarray(rows, np.int64), np.asarray(features)
        if rows.ndim != 1 or given.shape != (len(rows), self.width):
            raise ValueError(
                f"features: expected [{len(rows)}, {self.width}], got {list(given.shape)}"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            half = given.astype("<f2")
        finite = np.isfinite(half)
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            value = given[row, column]
            why = "beyond float16, which ends at 65504" if np.isfinite(value) else "not finite"
            raise SlideError(
                _path_of(self._attrs), "encoder",
                f"{self._writer.encoder['id']}: feature {column} of patch {rows[row]} is {value}: "
                f"{why}",
            )  # fmt: skip
        self._claim(rows)
        order = np.argsort(rows)
        rows, half = rows[order], half[order]
        with _clear(f"{self.key}: features", self._temporary):
            for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) != 1) + 1):
                if len(part):
                    self._put(int(rows[part[0]]), half[part])

    def corrupt(self, rows: ArrayLike) -> None:
        """Flag patches whose pixels turned out not to decode: their features are NaN.

        Raises:
            SlideError: "damaged", as they did decode when the slide was tiled for another encoder.
        """
        rows = np.asarray(rows, np.int64)
        if not len(rows):
            return
        if self._further:
            raise SlideError(
                _path_of(self._attrs), "damaged",
                f"patch {rows[0]} cannot be decoded any more; it could when the slide was tiled",
            )  # fmt: skip
        self._blank(rows)
        self._flags[rows] |= np.uint8(FLAGS.CORRUPT)

    def commit(self, *, replace: bool = False) -> bool:
        """Put the slide into the store, synced to the disk.

        Args:
            replace: True to replace the slide that is there, with all its features.

        Returns:
            False if another worker had committed it meanwhile: theirs stays, which is the same.

        Raises:
            StoreError: rows are missing, or another worker took over and removed this one's files.
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
        writer = self._writer
        with _clear(self.key, self._temporary):
            self._seal()
            if not self._further:
                self._describe()
            _sync_tree(self._temporary)
        with suppress(FileNotFoundError):
            (writer.path / "failed" / f"{self.key}.json").unlink()
        slide = writer.path / "slides" / f"{self.key}.zarr"
        if self._further and read_json(slide / "zarr.json").get("attributes") != self._attrs:
            raise StoreError(f"{slide}: another worker replaced it meanwhile")
        target = slide / "features" / writer.slug if self._further else slide
        if replace and not self._further and target.exists():
            _swap(self._temporary, target)
            return True
        try:
            os.rename(self._temporary, target)
        except OSError as error:
            if target.exists():
                return False
            if isinstance(error, FileNotFoundError):
                raise StoreError(
                    f"{self.key}: another worker took over and removed {self._temporary}"
                ) from None
            raise
        _sync(target.parent)
        return True

    def abort(self) -> None:
        """Remove what was written, unless it is committed; a second time does nothing."""
        while self._files:
            os.close(self._files.pop())
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _claim(self, rows: NDArray[np.int64]) -> None:
        n = len(self._written)
        if len(rows) and not (rows.min() >= 0 and rows.max() < n):
            raise ValueError(f"rows: expected 0 to {n - 1}, got {rows.min()} to {rows.max()}")
        again = rows[self._written[rows]]
        if len(again):
            corrupt = self._flags[again[0]] & FLAGS.CORRUPT
            why = "of a corrupt patch" if corrupt else "written before"
            raise ValueError(f"rows: expected each once, got {again[0]}, {why}")
        if len(np.unique(rows)) != len(rows):
            raise ValueError("rows: expected each once, got one twice")
        self._written[rows] = True

    def _blank(self, rows: NDArray[np.int64]) -> None:
        self._claim(rows)
        blank = np.full((1, self.width), np.nan, "<f2")
        for row in rows:
            self._put(int(row), blank)

    def _put(self, row: int, half: NDArray[np.float16]) -> None:
        """Write consecutive rows, which may lie in two chunks."""
        while len(half):
            i, at = divmod(row, self._chunk_rows)
            fit = min(len(half), self._chunk_rows - at)
            _write_all(self._files[i], np.ascontiguousarray(half[:fit]).data, at * self.width * 2)
            row, half = row + fit, half[fit:]

    def _seal(self) -> None:
        """Fill the last chunk, append checksums, and say what kind of array it is."""
        n, size = len(self._written), self._chunk_rows * self.width * 2
        for i, file in enumerate(self._files):
            beyond = np.full(self.width, np.nan, "<f2")
            for row in range(n - i * self._chunk_rows, self._chunk_rows):
                _write_all(file, beyond.data, row * self.width * 2)
            _write_all(file, _crc_bytes(crc_of(file, size)), size)
        meta = _array_json(
            (n, self.width), "float16", (self._chunk_rows, self.width), self._writer.encoder
        )
        (self._features / "zarr.json").write_bytes(_json(meta))

    def _describe(self) -> None:
        n, attrs = len(self._flags), self._attrs
        attrs |= {
            "counts": {**attrs.get("counts", {}), "patches": n, **flag_counts(self._flags)},
            "format": "motet-slide",
            "key": self.key,
            "status": "ok" if n else "empty",
            "tiling_hash": self._writer.tiling_hash,
            "version": VERSION,
        }
        for name, array in (self._arrays | {"flags": self._flags}).items():
            if array is not None:
                _write_array(self._temporary / name, array, packed=name in ("thumb", "mask"))
        group = {"node_type": "group", "zarr_format": 3}
        (self._temporary / "features" / "zarr.json").write_bytes(_json({**group, "attributes": {}}))
        (self._temporary / "zarr.json").write_bytes(_json({**group, "attributes": attrs}))


@contextmanager
def replacing(cohort: Path, name: str, path: Path) -> Iterator[Path]:
    """Give a file in .tmp/ to write, which replaces `path` once it is written and synced.

    `name` is the lease under which a killed worker's is removed.
    """
    folder = cohort / ".tmp"
    folder.mkdir(exist_ok=True)
    partial = folder / f"{name}.{secrets.token_hex(8)}"
    try:
        with _clear(path.name, path):
            yield partial
            _sync(partial)
            os.replace(partial, path)
            _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _matching(file: Path, asked: Mapping[str, Any], spec: Mapping[str, Any]) -> str | None:
    """Return the encoder's folder in run.json, None if it is new; refuse any other difference."""
    run = read_run(file.parent)
    for name, value in asked.items():
        _refuse(file, name, run[name], value)
    for slug, known in run["encoders"].items():
        if known["id"] == spec["id"]:
            _refuse(file, f"encoders.{slug}", known, spec)
            return slug
    return None


def _refuse(file: Path, name: str, expected: object, got: object) -> None:
    if isinstance(expected, dict) and isinstance(got, dict):
        for part in sorted({*expected, *got}):
            _refuse(file, f"{name}.{part}", expected.get(part), got.get(part))
    elif expected != got:
        raise StoreError(
            f"{file}: {name}: this store was begun with {expected!r}, got {got!r}: "
            "ask for the same, or for another folder"
        )


def _add(file: Path, asked: Mapping[str, Any], spec: dict[str, Any]) -> str:
    """Create run.json or add an encoder to it; return the encoder's folder."""
    if file.exists():
        run = read_run(file.parent)
    else:
        made_by = {"motet": _version(), "python": platform.python_version()}
        run = {"format": FORMAT, "version": VERSION, "encoders": {}, "made_by": made_by, **asked}
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", spec["id"]).strip("-.")[-80:].lstrip("-.") or "encoder"
    taken = {one.lower() for one in run["encoders"]}
    if slug.lower() in taken:  # of another id
        slug = f"{slug}-{sha256(spec['id'].encode()).hexdigest()[:8]}"
    run["encoders"][slug] = spec
    run["hash"] = run_hash(run)
    with replacing(file.parent, "run.json", file) as partial:
        partial.write_bytes(_json(run))
    return slug


def _version() -> str:
    try:
        return version("motet")
    except PackageNotFoundError:
        return "unknown"


def _count(attrs: Mapping[str, Any]) -> object:
    counts = attrs.get("counts")
    return counts.get("patches") if isinstance(counts, dict) else None


def _swap(temporary: Path, target: Path) -> None:
    """Replace a slide; `_recover` ends it if this is killed between two renames."""
    ready, old = (temporary.with_name(temporary.name + end) for end in (".ready", ".old"))
    os.rename(temporary, ready)
    _sync(ready.parent)
    os.rename(target, old)
    os.rename(ready, target)
    _sync(target.parent)
    _sync(ready.parent)
    shutil.rmtree(old, ignore_errors=True)


def _recover(cohort: Path, key: str) -> None:
    """End the replacement that a dead worker began, and remove what else it left."""
    folder, slide = cohort / ".tmp", cohort / "slides" / f"{key}.zarr"
    left = [name for name in _listed(folder) if (m := _LEFT.fullmatch(name)) and m[1] == key]
    for end in (".ready", ".old"):
        for name in left:
            if name.endswith(end) and not slide.exists():
                os.rename(folder / name, slide)
                _sync(slide.parent)
    for name in left:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name, ignore_errors=True)
        else:
            (folder / name).unlink(missing_ok=True)


def _listed(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def _check_key(key: str) -> None:
    if not KEY.fullmatch(key):
        raise StoreError(f"expected a key of letters, digits, '.', '_' and '-', got {key!r}")


def _path_of(attrs: Mapping[str, Any]) -> str:
    return str(attrs["source"]["path"])


def _plain(value: Any) -> Any:
    """Return what JSON gives back for it, so that what is compared is what is stored."""
    return json.loads(_json(value))


def _json(value: object) -> bytes:
    """Write JSON as the same bytes each time."""

    def plain(other: object) -> object:
        if isinstance(other, np.generic | np.ndarray):
            return other.tolist()
        if isinstance(other, os.PathLike):
            return os.fspath(other)
        raise TypeError(f"expected what JSON can hold, got {type(other).__name__}")

    text = json.dumps(value, sort_keys=True, allow_nan=False, default=plain, indent=1)
    return text.encode() + b"\n"


def _chunk_rows(shape: tuple[int, ...], itemsize: int) -> int:
    """Return how many rows a chunk has: all of them where that is a sane file."""
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
    """Write a small array: one chunk, images compressed, or chunks of rows."""
    rows = max(1, len(array)) if packed else _chunk_rows(array.shape, array.itemsize)
    chunk = (rows, *(max(1, n) for n in array.shape[1:]))
    packing = [{"name": "zstd", "configuration": {"checksum": False, "level": 3}}] if packed else []
    meta = _array_json(array.shape, array.dtype.name, chunk, {}, *packing)
    folder.mkdir()
    (folder / "zarr.json").write_bytes(_json(meta))
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


def _allocated(path: Path, size: int) -> int:
    """Create a file with its space on the disk, so that a full one is an error now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
    except BaseException:
        os.close(file)
        raise
    return file


def _write_all(file: int, content: Any, at: int) -> None:
    view = memoryview(content).cast("B")
    while len(view):
        done = os.pwrite(file, view, at)
        view, at = view[done:], at + done


@contextmanager
def _clear(what: str, path: Path) -> Iterator[None]:
    """Make a full disk say what it was full for, and that nothing is lost."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(
            error.errno,
            f"no space for {what} ({error.strerror}); nothing half-written is left: make space and "
            "run again",
            str(path),
        ) from None


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _sync_tree(folder: Path) -> None:
    """Sync all files, then the folders that name them."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(parent, name))
        _sync(Path(parent))
