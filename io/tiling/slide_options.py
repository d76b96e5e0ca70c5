"""The options that change the result of a slide and are recorded with it, beside the tiling.

The fields of `Tiling` are the same for all slides, so run.json has them. These options may differ
from slide to slide: one slide has a mask, another does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ..errors import StoreError, counted
from ..store.format import mapping, read_json
from ..store.source import Source, is_same
from .resolution import given_mpp


class OptionSettings(Protocol):
    """The settings that `slide_options` reads; `WorkerSettings` has them."""

    @property
    def reader(self) -> str: ...
    @property
    def max_damaged(self) -> float: ...
    @property
    def slide_mpp(self) -> Mapping[str, float] | float | None: ...
    @property
    def masks(self) -> str | None: ...
    @property
    def mask_of(self) -> Mapping[str, str]: ...


DEFAULTS = {"mask": None, "max_damaged": 0.5, "reader": "auto", "slide_mpp": None}
"""The options of a slide whose options are not recorded."""


def mask_file(settings: OptionSettings, source: Source) -> Path | None:
    """Return the path of the user's mask of a slide, None if there is none."""
    mask = settings.mask_of.get(source.name)
    return None if settings.masks is None or mask is None else Path(settings.masks) / mask


def slide_options(settings: OptionSettings, source: Source) -> dict[str, Any]:
    """Return the options of a slide, which the store records in its attribute `options`.

    `mask` is the hash of the file, so a mask may be moved but not edited.
    """
    mask = mask_file(settings, source)
    return {
        "mask": None if mask is None else _hash(mask),
        "max_damaged": settings.max_damaged,
        "reader": settings.reader,
        "slide_mpp": given_mpp(settings.slide_mpp, source)[0],
    }


def _hash(path: Path) -> str:
    """Return 16 hex digits of the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def changed_options(
    attrs: Mapping[str, Any], options: Mapping[str, Any], recorded: Mapping[str, Any]
) -> list[str]:
    """Return the names of the options that would give another result than the stored one.

    Args:
        attrs: attributes of the slide in the store.
        options: those of this call.
        recorded: those of the stored slide; what it lacks is unknown and not compared.
    """
    counts = mapping(attrs.get("counts"))
    n, corrupt = counts.get("patches") or 0, counts.get("corrupt") or 0
    same = {
        # The reader that was chosen then is the one that is asked for now.
        "reader": attrs.get("reader") == options["reader"],
        # So few patches are damaged that the slide does not fail now either.
        "max_damaged": corrupt <= options["max_damaged"] * n,
    }
    return [
        name for name in sorted(options)
        if name in recorded and recorded[name] != options[name] and not same.get(name)
    ]  # fmt: skip


def must_be_redone(store: Path, settings: OptionSettings, source: Source) -> bool:
    """Return True if a slide of the store has other options than those of this call.

    The options of a slide that has none recorded count as the defaults.
    """
    meta = read_json(store / "slides" / f"{source.key}.zarr" / "zarr.json")
    attrs = mapping(meta.get("attributes"))
    recorded = {**DEFAULTS, **mapping(attrs.get("options"))}
    return bool(changed_options(attrs, slide_options(settings, source), recorded))


def check_options(
    store: Path, tiling_hash: str, settings: OptionSettings, sources: Iterable[Source]
) -> None:
    """Check that the slides in the store were made with the options of this call.

    Args:
        store: the cohort folder.
        tiling_hash: of the tiling; slides of another one are refused elsewhere.
        settings: of this call.
        sources: the slides of this call.

    Raises:
        StoreError: some were not; the message names the options, and what to do.
    """
    changed: dict[str, list[str]] = {}
    before: dict[str, str] = {}
    for source in sources:
        try:
            meta = read_json(store / "slides" / f"{source.key}.zarr" / "zarr.json")
        except StoreError:
            continue  # not in the store, or damaged: it is done again
        attrs = mapping(meta.get("attributes"))
        recorded = mapping(attrs.get("options"))
        is_stored = attrs.get("tiling_hash") == tiling_hash and is_same(source, attrs.get("source"))
        if not recorded or not is_stored:
            continue
        options = slide_options(settings, source)
        for name in changed_options(attrs, options, recorded):
            changed.setdefault(name, []).append(source.name)
            stored = attrs.get("mask") if name == "mask" else recorded[name]
            value = settings.mask_of.get(source.name) if name == "mask" else options[name]
            if name == "mask" and value == stored:
                value = f"another {value}"
            before.setdefault(name, f"with {stored or 'none'}, got {value or 'none'}")
    if changed:
        texts = [
            f"{name}: {counted(names, 'slide')} in the store, made {before[name]}"
            for name, names in changed.items()
        ]
        raise StoreError(
            f"{store}: {'; '.join(texts)}: give the same options, use another folder, or do these "
            "slides again with --redo (redo=True)"
        )
