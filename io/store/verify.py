"""Check a store: read every byte and list the problems."""

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
    """A problem that `FeatureStore.verify` reports; key is "" if it concerns the whole store."""

    key: str
    message: str
    part: str = ""
    """What has to be made anew: "slide", "features/<encoder>", "table" (slides.parquet), "note" (of
    a failure), or "" for nothing."""


class CheckedStore(Protocol):
    """The attributes of a store that `store_problems` reads; `FeatureStore` has them."""

    @property
    def path(self) -> Path: ...
    @property
    def slug(self) -> str: ...
    @property
    def run(self) -> Mapping[str, Any]: ...
    def __iter__(self) -> Iterator[str]: ...
    def manifest(self) -> pd.DataFrame: ...


def store_problems(store: CheckedStore) -> Iterator[Problem]:
    """Read every byte and yield the problems; see `FeatureStore.verify`."""
    if store.run.get("hash") != run_hash(store.run):
        yield Problem("", "run.json: its hash is not that of its content")
    slides = store.path / "slides"
    for name in names_in(slides):
        if not (name.endswith(".zarr") and KEY.fullmatch(name[:-5])):
            yield Problem("", f"slides/{name}: not a slide")
    for key in store:
        yield from slide_problems(store, key)
    temporary = store.path / ".tmp"
    for name in names_in(temporary):
        yield Problem("", f".tmp/{name}: left by a worker that died, or being written")
    try:
        stale = _manifest_problem(store)
    except StoreError:
        stale = ""  # a problem of a slide, reported above, or of failed/, reported below
    if stale:
        yield Problem("", f"slides.parquet: {stale}; write_manifest() makes it again", "table")
    folder = store.path / "failed"
    for name in names_in(folder):
        try:
            read_json(folder / name)
        except StoreError as error:
            yield Problem(name.removesuffix(".json"), str(error), "note")


def slide_problems(store: CheckedStore, key: str) -> Iterator[Problem]:
    """Read every byte of a slide and yield the problems; none if the slide is not in the store."""
    try:
        if (store.path / "slides" / f"{key}.zarr").exists():
            yield from _slide_problems(SlideFeatures(store, key), store.run)
    except StoreError as error:
        yield Problem(key, str(error), "slide")


def _manifest_problem(store: CheckedStore) -> str:
    """Return what is wrong with slides.parquet; empty if it is up to date or does not exist."""
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
        yield _condemn(slide, f"status: expected {status!r}, got {attrs.get('status')!r}")
    if attrs.get("tiling_hash") != run["tiling_hash"]:
        yield _condemn(slide, "tiled with another specification than run.json's")
    for name, count in ({"patches": n} | flag_counts(slide.flags)).items():
        if counts.get(name) != count:
            yield _condemn(slide, f"counts.{name}: expected {count}, got {counts.get(name)}")
    names = set(os.listdir(slide.path))
    yield from (
        Problem(slide.key, f"{name}: not of a slide")
        for name in sorted(names - {*ARRAYS, "features", "zarr.json"})
    )
    for name in (*ARRAYS[:3], *sorted(names & {*ARRAYS[3:]})):  # thumb and mask may be absent
        try:
            array = StoredArray(f"{slide.path}/{name}")
            yield from (_condemn(slide, problem) for problem in array.check())
        except StoreError as error:
            yield _condemn(slide, str(error))
    _ = slide.tissue, slide.thumb, slide.mask  # raise StoreError if of another dtype or shape
    if read_json(f"{slide.path}/features/zarr.json").get("node_type") != "group":
        yield _condemn(slide, "features/zarr.json: not of a zarr group")
    if not slide.encoders:
        yield _condemn(slide, "no features of any encoder")
    corrupt = slide.corrupt
    for slug in slide.encoders:
        try:
            yield from _features_problems(slide, slug, run["encoders"].get(slug), corrupt)
        except StoreError as error:
            yield _condemn(slide, str(error), f"features/{slug}")


def _condemn(slide: SlideFeatures, message: str, part: str = "slide") -> Problem:
    return Problem(slide.key, message, part)


def _features_problems(
    slide: SlideFeatures, slug: str, spec: object, corrupt: NDArray[np.bool_]
) -> Iterator[Problem]:
    array = slide.array(f"features/{slug}", np.float16, (len(corrupt), None))
    part = f"features/{slug}"
    if spec is None or array.attrs != spec:
        yield Problem(slide.key, f"{part}: of another encoder than run.json's", part)
    yield from (Problem(slide.key, problem, part) for problem in array.check())
    for first in range(0, len(corrupt), 4096):
        features = array.rows(np.arange(first, min(first + 4096, len(corrupt))))
        wrong = np.isfinite(features).all(axis=1) == corrupt[first : first + 4096]
        # All features of a corrupt patch must be NaN, not only one.
        wrong |= corrupt[first : first + 4096] & ~np.isnan(features).all(axis=1)
        if wrong.any():
            row = first + int(np.flatnonzero(wrong)[0])
            expected = "NaN, as of a corrupt patch" if corrupt[row] else "finite numbers"
            yield Problem(slide.key, f"{part}: row {row}: expected {expected}", part)
            return
