"""The commit protocol: a slide enters a store completely or not at all, even if workers are killed.

What is on the disk after each step, and what a crash at that point leaves:

1. `begin`: the folder `.tmp/<key>.<token>/` with the file of features, its space allocated.
   A crash leaves this folder. Readers never look into `.tmp/`.
2. `write`: features in that file. A crash leaves the same.
3. `commit`, first part: all other files of the slide, then fsync of every file, then of every
   folder (`sync_tree`). The order matters: after a power failure a name may be on the disk while
   the content of its file is not. Once the fsyncs have returned, the whole folder is on the disk.
4. `commit`, second part: remove the notes in `failed/`; rename the folder to `slides/<key>.zarr`.
   The rename is atomic: readers see no slide or the complete one. Then fsync of `slides/`, so that
   the rename too survives a power failure. A crash between the removal and the rename leaves the
   slide in neither folder: it is done again.

Only the holder of the key's lease (leases.py) removes `.tmp/<key>.*` of other workers (`recover`
in disk.py), because without the lease such a folder may belong to a worker that is still writing.
If the lease failed to keep two workers apart, both commit the same bytes, since nothing in a slide
depends on time or chance. The first rename wins; the second one fails and its folder is removed.

Replacing a slide (its source file changed) needs three renames; see `swap` in disk.py.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import StoreError
from .array import StoredArray
from .disk import recover, replacing
from .failures import attempts_of
from .format import (
    FORMAT,
    VERSION,
    check_key,
    json_bytes,
    plain,
    read_json,
    read_run,
    run_hash,
)
from .leases import Leases
from .pseudonyms import check_pseudonyms
from .read import FeatureStore
from .read_slide import SlideFeatures
from .source import Source, is_same
from .write_slide import SlideWriter, Target


class StoreWriter:
    """Write slides into a cohort folder; any number of workers may do so at the same time.

    For each source: call `state`. Unless the slide is done, take the lease on its key and call
    `state` again. Then call `begin` (or `begin_features` if the state is "features"), `write` and
    `commit`.
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
        pseudonyms: str | None = None,
    ) -> StoreWriter:
        """Create a cohort folder, or open one that has the same specification.

        Args:
            path: the cohort folder; created, with its parents, if it does not exist.
            tiling: the arguments of the tiling, as JSON.
            tiling_hash: hash of `tiling`.
            encoder: `Encoder.spec()`: id, width, weights, transform, precision.
            pseudonyms: the fingerprint of the slides' pseudonyms, None if they have none.

        Raises:
            StoreError: the cohort has another specification; the message names the field.
        """
        folder = Path(path)
        specification = {"tiling": plain(tiling), "tiling_hash": tiling_hash}
        if pseudonyms is not None:
            specification["pseudonyms"] = pseudonyms
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
        slug = _slug_in_run(file, specification, spec) if file.exists() else None
        if slug is None:  # the cohort, or this encoder of it, is new: run.json must be written
            with Leases(folder / "leases").wait("run.json"):
                # Another worker may have written it while this one waited for the lease.
                slug = _slug_in_run(file, specification, spec) if file.exists() else None
                if slug is None:
                    slug = _add_encoder(file, specification, spec)
        for name in ("slides", "failed", "logs", "leases", ".tmp"):
            (folder / name).mkdir(exist_ok=True)
        return cls(folder, slug, read_run(folder))

    def state(self, source: Source) -> str:
        """Return the state of a source in the store. Reads a few small files.

        Returns:
            "failed": not done, noted as failed, and the source file has not changed since; else
            what `work_left` returns.
        """
        left = self.work_left(source)
        is_done = left in ("done", "empty")
        return left if is_done or self.attempts(source) is None else "failed"

    def work_left(self, source: Source) -> str:
        """Return what is to be done with a source, whether it has failed before or not.

        Returns:
            "todo": not in the store. "done": complete. "empty": done, and no patch has tissue.
            "features": tiled, but without features of this encoder. "changed": in the store, but
            from another source file, with another specification, or damaged; write it again and
            commit with replace=True.
        """
        folder = self.path / "slides" / f"{source.key}.zarr"
        if not folder.exists():
            return "todo"
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
            fits = array.shape == (n, self.encoder["width"]) and array.dtype == np.float16
            if not fits or array.attrs != self.encoder or array.find_missing_chunk():
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
        """Begin a slide. Its space on the disk is allocated at once: a full disk is an error now.

        Args:
            key: key of the slide; the caller holds the lease on it.
            attrs: attributes of the slide, as JSON: those of `describe(source)` and others.
                `counts` may hold further numbers; those of patches and flags are added.
            coords: int32 [N, 2], (x, y) in level-0 px, in row-major order.
            tissue: share of each patch that is tissue, [N] from 0 to 1; uint8 is in 255ths.
            flags: uint8 [N], bits of FLAGS. The features of corrupt patches are NaN; do not write
                them.
            thumb: uint8 [h, w, 3], the thumbnail.
            mask: bool [h, w], the tissue in the thumbnail.
            width: D, the width of the features.

        Raises:
            OSError: the disk is full or cannot be written. No file is left.
        """
        check_key(key)
        if "name" not in attrs or "source" not in attrs:
            raise ValueError(f"attrs: expected those of describe(source), got {sorted(attrs)}")
        corners, flag_bits = np.asarray(coords), np.asarray(flags)
        share = np.asarray(tissue)
        if share.dtype != np.uint8:
            share = np.clip(np.rint(np.asarray(share, np.float64) * 255), 0, 255).astype(np.uint8)
        n = len(corners)
        if corners.shape != (n, 2) or share.shape != (n,) or flag_bits.shape != (n,):
            raise ValueError(
                f"expected coords [N, 2], tissue [N], flags [N], got {list(corners.shape)}, "
                f"{list(share.shape)}, {list(flag_bits.shape)}"
            )
        bounds = np.iinfo(np.int32)
        if n and not (bounds.min <= corners.min() and corners.max() <= bounds.max):
            raise ValueError(f"coords: expected int32, got up to {corners.max()}")
        arrays: dict[str, NDArray[Any] | None] = {
            "coords": corners.astype("<i4"), "tissue": share, "flags": flag_bits.astype(np.uint8),
            "thumb": thumb, "mask": mask,
        }  # fmt: skip
        recover(self.path, key)
        return SlideWriter(self._target, key, width, arrays, plain(attrs))

    def begin_features(self, key: str, width: int) -> SlideWriter:
        """Begin the features of a further encoder, for the patches of a slide in the store.

        Raises:
            StoreError: the slide does not exist, or is damaged.
            OSError: as in `begin`.
        """
        check_key(key)
        recover(self.path, key)
        slide = SlideFeatures(FeatureStore(self.path, self.slug), key)
        return SlideWriter(
            self._target, key, width, {"flags": slide.flags}, slide.attrs, further=True
        )

    def attempts(self, source: Source) -> int | None:
        """Return how many times a slide has failed, None if it has not or its file has changed."""
        return attempts_of(self.path, self.slug, source)

    def log(self, key: str, entries: Mapping[str, Any]) -> None:
        """Write what differs between two runs (seconds, host) to logs/. motet never reads it."""
        check_key(key)
        with replacing(self.path, key, self.path / "logs" / f"{key}.json") as partial:
            partial.write_bytes(json_bytes(entries))


def _slug_in_run(
    file: Path, specification: Mapping[str, Any], spec: Mapping[str, Any]
) -> str | None:
    """Return the encoder's folder by run.json, None if run.json does not have the encoder.

    Any other difference from run.json is a StoreError.
    """
    run = read_run(file.parent)
    check_pseudonyms(file, run, specification.get("pseudonyms"))
    for name, value in specification.items():
        _check_equal(file, name, run[name], value)
    for slug, stored_spec in run["encoders"].items():
        if stored_spec["id"] == spec["id"]:
            _check_equal(file, f"encoders.{slug}", stored_spec, spec)
            return slug
    return None


def _check_equal(file: Path, name: str, expected: object, got: object) -> None:
    """Raise StoreError, with the name of the first field that differs, unless both are equal."""
    if isinstance(expected, dict) and isinstance(got, dict):
        for field in sorted({*expected, *got}):
            _check_equal(file, f"{name}.{field}", expected.get(field), got.get(field))
    elif expected != got:
        raise StoreError(
            f"{file}: {name}: this store was begun with {expected!r}, got {got!r}: "
            "use the same value, or another folder"
        )


def _add_encoder(file: Path, specification: Mapping[str, Any], spec: dict[str, Any]) -> str:
    """Add an encoder to run.json, which is created if needed; return the encoder's folder."""
    if file.exists():
        run = read_run(file.parent)
    else:
        made_by = {"motet": _version(), "python": platform.python_version()}
        run = {
            "format": FORMAT, "version": VERSION, "encoders": {}, "made_by": made_by,
            **specification,
        }  # fmt: skip
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", spec["id"]).strip("-.")[-80:].lstrip("-.") or "encoder"
    # In lower case, as some file systems do not tell upper from lower case.
    slugs = {other.lower() for other in run["encoders"]}
    if slug.lower() in slugs:  # the folder of an encoder with another id
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
