"""Remove from a store what `verify` condemns, so that the next tiling or import makes it anew."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..._atomic import sync
from ..errors import StoreError
from .disk import clean, recover
from .format import mapping, names_in, read_json
from .leases import Leases
from .verify import CheckedStore, slide_problems, store_problems


class Repair(NamedTuple):
    """What `FeatureStore.repair` did about a problem; key is "" if it concerns the whole store."""

    key: str
    message: str
    """The problem, and what was done or why nothing was."""
    repaired: bool
    """False if the problem is still there."""


class RepairedStore(CheckedStore, Protocol):
    """The attributes of a store that `repair_store` uses; `FeatureStore` has them."""

    def write_manifest(self) -> Path: ...


def repair_store(store: RepairedStore) -> Iterator[Repair]:
    """Repair the store and yield what was done; see `FeatureStore.repair`."""
    leases = Leases(store.path / "leases")
    before = names_in(store.path / ".tmp")
    clean(store.path, leases)
    remains = names_in(store.path / ".tmp")
    for name in before:
        if name not in remains:
            yield Repair("", f".tmp/{name}: removed: a worker that died had left it", True)
    keys: set[str] = set()
    for key, message, part in [*store_problems(store)]:  # all of them, before the first repair
        if part == "note":
            (store.path / "failed" / f"{key}.json").unlink(missing_ok=True)
            yield Repair(key, f"{message}: removed", True)
        elif part == "":
            yield Repair(key, f"{message}: left as it is", False)
        elif part != "table" and key not in keys:
            keys.add(key)
            yield from _repair_slide(store, key, leases)
    if (store.path / "slides.parquet").exists():
        with suppress(StoreError):  # a damaged slide was kept, see above
            store.write_manifest()


def _repair_slide(store: CheckedStore, key: str, leases: Leases) -> Iterator[Repair]:
    """Remove the parts of a slide that have to be made anew."""
    lease = leases.take(key)
    if lease is None:
        yield Repair(key, "left as it is: a worker has it in work", False)
        return
    with lease:
        recover(store.path, key)
        problems = [problem for problem in slide_problems(store, key) if problem.part]
        folder = store.path / "slides" / f"{key}.zarr"
        if missing := _missing_source(folder):
            for problem in problems:
                text = f"{problem.message}: kept, as {missing} is gone and nothing can replace it"
                yield Repair(key, text, False)
            return
        parts = {problem.part for problem in problems}
        for part in ["slide"] if "slide" in parts else sorted(parts):
            _remove(store.path, key, folder if part == "slide" else folder / part)
        for problem in problems:
            what = "the slide" if "slide" in parts else problem.part
            yield Repair(key, f"{problem.message}: {what} was removed", True)


def _missing_source(folder: Path) -> str | None:
    """Return the path of a slide's source if that does not exist; None if it does or is unknown."""
    try:
        attrs: Mapping[str, Any] = mapping(read_json(folder / "zarr.json").get("attributes"))
    except StoreError:
        return None
    path = mapping(attrs.get("source")).get("path")
    return path if isinstance(path, str) and not os.path.exists(path) else None


def _remove(cohort: Path, key: str, folder: Path) -> None:
    """Remove a folder of a slide: at once for readers, completely also after a crash."""
    temporary = cohort / ".tmp" / f"{key}.{secrets.token_hex(8)}"
    os.rename(folder, temporary)
    sync(folder.parent)
    shutil.rmtree(temporary, ignore_errors=True)
