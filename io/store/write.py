"""The commit protocol: how slides get into a store whole, whatever is killed and whenever.

A slide (write_slide.py) is built in `.tmp/<key>.<token>/`, all its files and folders are synced to
the disk, and one rename puts it into `slides/`. A reader sees it whole or not at all. Nothing in it
depends on time or chance, so whoever commits it commits the same bytes; where two do, the first
wins and the other's is dropped. What a worker that died left in `.tmp/` is removed by the next
holder of the key's lease (leases.py).

Replacing a slide, whose source changed, takes three renames: the new one becomes `.ready`, the old
one leaves as `.old`, the new one takes its place. A kill in between loses neither: where a slide is
missing, `recover` (disk.py) puts `.ready` there, else `.old`.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import SlideError, StoreError
from .array import StoredArray
from .disk import LEFT, recover, replacing
from .format import (
    FORMAT,
    KEY,
    VERSION,
    check_key,
    json_bytes,
    names_in,
    plain,
    read_json,
    read_run,
    run_hash,
)
from .leases import Leases
from .read import FeatureStore
from .read_slide import SlideFeatures
from .source import Source, is_same
from .write_slide import SlideWriter, Target


class StoreWriter:
    """Write slides into a cohort folder, beside any number of other workers.

    For each source: `state`; unless it is done, take the key's lease and ask for the state again;
    then `begin` (or `begin_features` where the state is "features"), `write`, `commit`.
    """

    def __init__(self, path: Path, slug: str, run: Mapping[str, Any]) -> None:
        self.path, self.slug = path, slug
        self.encoder: dict[str, Any] = run["encoders"][slug]
        self.tiling_hash: str = run["tiling_hash"]
        self._target = Target(path, slug, self.encoder, self.tiling_hash)

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
        asked = {"tiling": plain(tiling), "tiling_hash": tiling_hash}
        spec: dict[str, Any] = plain(encoder)
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
        check_key(key)
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
        recover(self.path, key)
        return SlideWriter(self._target, key, width, arrays, plain(attrs))

    def begin_features(self, key: str, width: int) -> SlideWriter:
        """Begin the features of a further encoder, on the patches that a slide has.

        Raises:
            StoreError: the slide is not there, or not whole.
            OSError: as of `begin`.
        """
        check_key(key)
        recover(self.path, key)
        slide = SlideFeatures(FeatureStore(self.path, self.slug), key)
        return SlideWriter(
            self._target, key, width, {"flags": slide.flags}, slide.attrs, further=True
        )

    def attempts(self, key: str) -> int | None:
        """Return how often a slide has failed, None if it is not noted as failed."""
        return attempts_at_failed(self.path, [key]).get(key)

    def log(self, key: str, entries: Mapping[str, Any]) -> None:
        """Note what differs between two runs: seconds, host. Never read by motet."""
        _write_json(self.path, "logs", key, entries)

    def clean(self, leases: Leases) -> None:
        """Remove what dead workers left, leases too, of all keys whose lease can be had now."""
        left = map(LEFT.fullmatch, names_in(self.path / ".tmp"))
        held = filter(KEY.fullmatch, names_in(leases.folder))
        for key in sorted({found[1] for found in left if found} | {*held}):
            lease = leases.take(key)
            if lease is not None:
                with lease:
                    recover(self.path, key)


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
        keys = [name.removesuffix(".json") for name in names_in(folder) if name.endswith(".json")]
    found = {}
    for key in keys:
        if (folder / f"{key}.json").exists():
            found[key] = int(read_json(folder / f"{key}.json").get("attempts", 0))
    return found


def _write_json(cohort: Path, folder: str, key: str, content: Mapping[str, Any]) -> None:
    check_key(key)
    with replacing(cohort, key, cohort / folder / f"{key}.json") as partial:
        partial.write_bytes(json_bytes(content))


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
        partial.write_bytes(json_bytes(run))
    return slug


def _version() -> str:
    try:
        return version("motet")
    except PackageNotFoundError:
        return "unknown"


def _count(attrs: Mapping[str, Any]) -> object:
    counts = attrs.get("counts")
    return counts.get("patches") if isinstance(counts, dict) else None
