"""Read a feature store: its slides, and those that failed (docs/reference/store-format.md)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StoreError, listed, suggest
from .failures import read_failures, read_not_taken
from .format import KEY, mapping, read_run
from .manifest import MANIFEST, make_column
from .read_slide import SlideFeatures
from .repair import Repair, repair_store
from .verify import Problem, store_problems

if TYPE_CHECKING:
    import pandas as pd


class FeatureStore(Mapping[str, "SlideFeatures"]):
    """Open a feature store, the folder that `motet tile` or `import_features` wrote.

    A mapping of slide keys to slides. Opening reads one small file. The files of a slide are opened
    when the slide is read; its features are memory-mapped. `store[name]` takes the key of a slide,
    its name (the path relative to the folder that was tiled), its file name, or its file name
    without suffix, if only one slide has it. Slides that failed are only in `failed`. Damaged files
    (missing, cut, of another shape) raise StoreError when they are read; `verify` reads all files.

    Args:
        path: the cohort folder.
        encoder: id or folder of the encoder whose features to read; optional if the store has one.

    Raises:
        StoreError: the folder is no store, is of a later format, or lacks this encoder.

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
        self._keys_by_name: dict[str, list[str]] = {}
        self._keys_read_ns = -1

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
        """Return the folder name of the encoder whose features are read."""
        if self._slug is not None:
            return self._slug
        slugs = list(self.run["encoders"])
        if len(slugs) != 1:
            raise StoreError(
                f"{self.path}: expected encoder=, one of {listed(self.encoders)}, got none"
            )
        return slugs[0]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys of the slides, sorted. No slide is opened."""
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
        """Return the key of the one slide with this key, name, file name or stem, else None."""
        keys = self.matches(name)
        return keys[0] if len(keys) == 1 else None

    def matches(self, name: str) -> list[str]:
        """Return the keys of all slides with this key, name, file name or stem."""
        if KEY.fullmatch(name) and os.path.isdir(f"{self.path}/slides/{name}.zarr"):
            return [name]
        return self._names().get(name, [])

    def _names(self) -> dict[str, list[str]]:
        """Return the keys by name, file name and stem.

        Cached; read again once the folder of slides has changed.
        """
        try:
            changed_ns = os.stat(f"{self.path}/slides").st_mtime_ns
        except OSError:
            return {}
        if changed_ns != self._keys_read_ns:
            self._keys_by_name = {}
            for key in self:
                name = str(SlideFeatures(self, key).attrs.get("name", ""))
                file = name.rpartition("/")[2]
                for alias in {name, file, file.rpartition(".")[0]} - {""}:
                    self._keys_by_name.setdefault(alias, []).append(key)
            self._keys_read_ns = changed_ns
        return self._keys_by_name

    @property
    def failed(self) -> dict[str, dict[str, Any]]:
        """Return name, path, reason, message and attempts of what failed, by key of the slide.

        A slide that is in the store, and failed for a further encoder or could not be made anew, is
        here too; `encoder` is then the id of the encoder. If the store was opened with an encoder,
        failures of others are left out; otherwise the ids and messages of all encoders are joined.
        """
        return read_failures(self.path, self.run["encoders"], self._slug)

    @property
    def not_taken(self) -> dict[str, str]:
        """Return path to reason, of what the last tiling was given and did not take as a slide."""
        return read_not_taken(self.path)

    def manifest(self) -> pd.DataFrame:
        """Return a table with one row per slide, failed ones too, sorted by key.

        The row of a slide that is in the store, and failed for an encoder, has the encoder and the
        reason in `message`. The table is read from the slides, not from slides.parquet.
        """
        import pandas as pd

        columns: dict[str, list[Any]] = {name: [] for name in MANIFEST}

        def add(row: Mapping[str, Any]) -> None:
            for name, column in columns.items():
                column.append(row.get(name))

        failed = read_failures(self.path, self.run["encoders"], None)
        for key in self:
            slide = SlideFeatures(self, key)
            attrs, source = slide.attrs, mapping(slide.attrs.get("source"))
            row = {
                **attrs, **source, **mapping(attrs.get("counts")), "key": key,
                "encoders": " ".join(slide.encoders),
            }  # fmt: skip
            if note := failed.pop(key, None):
                row |= {
                    "attempts": note.get("attempts"),
                    "message": f"{note['encoder']}: {note.get('message')}",
                    "reason": row.get("reason") or note.get("reason"),
                }
            add(row)
        for key, record in failed.items():
            add({**record, "key": key, "status": "failed", "encoders": ""})
        table = pd.DataFrame(
            {name: make_column(columns[name], kind) for name, kind in MANIFEST.items()}
        )
        return table.sort_values("key", ignore_index=True)

    def write_manifest(self) -> Path:
        """Write `manifest()` to slides.parquet, completely or not at all; return its path."""
        from .disk import replacing  # here, as those who only read a store do not need it
        from .leases import Leases

        path, name = self.path / "slides.parquet", "slides.parquet"
        lease = Leases(self.path / "leases").wait(name)
        with lease, replacing(self.path, name, path) as partial:
            self.manifest().to_parquet(partial, index=False)
        return path

    def verify(self) -> list[Problem]:
        """Read every byte and return the problems; an empty list if there are none.

        Checks that slides can be opened; that shapes and counts agree; the checksum of every chunk;
        that features of corrupt patches are NaN and all others finite; the hash of run.json; that
        slides.parquet, if it exists, is up to date; and that there are no other files. Files that
        a worker is writing at this moment are reported too.
        """
        return [*store_problems(self)]

    def repair(self) -> list[Repair]:
        """Remove what `verify` condemns, so that the next tiling or import makes it anew.

        A slide is removed, or only the features of an encoder if nothing else of it is damaged.
        What workers that died have left and notes of failures that cannot be read are removed too,
        and slides.parquet is written anew. Kept are: a slide whose source is gone, since nothing
        could replace it; slides that a worker has in work; run.json; files that are not motet's.

        Returns:
            What was done about each problem, or why nothing was.
        """
        return [*repair_store(self)]
