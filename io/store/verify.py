"""What is wrong with a store: every byte is read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import StoreError
from .array import UNREADABLE, StoredArray
from .format import ARRAYS, KEY, flag_counts, mapping, names_in, read_json, run_hash
from .read_slide import SlideFeatures

if TYPE_CHECKING:
    import pandas as pd


class Problem(NamedTuple):
    """A finding of `FeatureStore.verify`; key is "" where it is about the store as a whole."""

    key: str
    what: str


class CheckedStore(Protocol):
    """What is checked of a store: `FeatureStore` is one."""

    @property
    def path(self) -> Path: ...
    @property
    def slug(self) -> str: ...
    @property
    def run(self) -> Mapping[str, Any]: ...
    def __iter__(self) -> Iterator[str]: ...
    def manifest(self) -> pd.DataFrame: ...


def store_problems(store: CheckedStore) -> Iterator[Problem]:
    """Read every byte and yield what is wrong; see `FeatureStore.verify`."""
    if store.run.get("hash") != run_hash(store.run):
        yield Problem("", "run.json: its hash is not that of what it says")
    slides = store.path / "slides"
    for name in names_in(slides):
        if not (name.endswith(".zarr") and KEY.fullmatch(name[:-5])):
            yield Problem("", f"slides/{name}: not a slide")
    for key in store:
        try:
            yield from _slide_problems(SlideFeatures(store, key), store.run)
        except StoreError as error:
            yield Problem(key, str(error))
    temporary = store.path / ".tmp"
    for name in names_in(temporary):
        yield Problem("", f".tmp/{name}: left by a worker that ended, or being written")
    try:
        stale = _manifest_differs(store)
    except StoreError:
        stale = ""  # said above, or of failed/
    if stale:
        yield Problem("", f"slides.parquet: {stale}; write_manifest() makes it again")
    folder = store.path / "failed"
    for name in names_in(folder):
        try:
            read_json(folder / name)
        except StoreError as error:
            yield Problem(name.removesuffix(".json"), str(error))


def _manifest_differs(store: CheckedStore) -> str:
    """Say what slides.parquet, if it is there, is not; empty if it is in step."""
    import pandas as pd

    path = store.path / "slides.parquet"
    if not path.exists():
        return ""
    try:
        written = pd.read_parquet(path)
    except UNREADABLE as error:
        return f"cannot be read: {error}"
    return "" if written.equals(store.manifest()) else "not in step with the slides"


def _slide_problems(slide: SlideFeatures, run: Mapping[str, Any]) -> Iterator[Problem]:
    attrs, n = slide.attrs, len(slide)
    counts = mapping(attrs.get("counts"))
    status = "ok" if n else "empty"
    if attrs.get("status") != status:
        yield Problem(slide.key, f"status: expected {status!r}, got {attrs.get('status')!r}")
    if attrs.get("tiling_hash") != run["tiling_hash"]:
        yield Problem(slide.key, "tiled with another specification than run.json's")
    for name, count in ({"patches": n} | flag_counts(slide.flags)).items():
        if counts.get(name) != count:
            yield Problem(slide.key, f"counts.{name}: expected {count}, got {counts.get(name)}")
    held = set(os.listdir(slide.path))
    yield from (
        Problem(slide.key, f"{one}: not of a slide")
        for one in sorted(held - {*ARRAYS, "features", "zarr.json"})
    )
    for name in (*ARRAYS[:3], *sorted(held & {*ARRAYS[3:]})):
        try:
            array = StoredArray(f"{slide.path}/{name}")
            yield from (Problem(slide.key, what) for what in array.check())
        except StoreError as error:
            yield Problem(slide.key, str(error))
    _ = slide.tissue, slide.thumb, slide.mask
    if read_json(f"{slide.path}/features/zarr.json").get("node_type") != "group":
        yield Problem(slide.key, "features/zarr.json: not of a zarr group")
    if not slide.encoders:
        yield Problem(slide.key, "no features of any encoder")
    corrupt = slide.corrupt
    for slug in slide.encoders:
        try:
            yield from _features_problems(slide, slug, run["encoders"].get(slug), corrupt)
        except StoreError as error:
            yield Problem(slide.key, str(error))


def _features_problems(
    slide: SlideFeatures, slug: str, spec: object, corrupt: NDArray[np.bool_]
) -> Iterator[Problem]:
    array = slide.array(f"features/{slug}", np.float16, (len(corrupt), None))
    if spec is None or array.attrs != spec:
        yield Problem(slide.key, f"features/{slug}: of another encoder than run.json's")
    yield from (Problem(slide.key, what) for what in array.check())
    for first in range(0, len(corrupt), 4096):
        part = array.rows(np.arange(first, min(first + 4096, len(corrupt))))
        unlike = np.isfinite(part).all(axis=1) == corrupt[first : first + 4096]
        # Of a corrupt patch nothing may be there: all NaN.
        unlike |= corrupt[first : first + 4096] & ~np.isnan(part).all(axis=1)
        if unlike.any():
            row = first + int(np.flatnonzero(unlike)[0])
            want = "NaN, as of a corrupt patch" if corrupt[row] else "finite numbers"
            yield Problem(slide.key, f"features/{slug}: row {row}: expected {want}")
            return
