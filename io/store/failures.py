"""The notes of failures in `failed/`: `<key>.json`, or `<key>@<encoder>.json` for one encoder.

A slide that is not in the store has at most one note. A slide that is in the store may have one
per encoder: its features could not be added, or it could not be made anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import SlideError, StoreError
from .disk import replacing
from .format import check_key, json_bytes, names_in, read_json
from .leases import Leases
from .pseudonyms import note_without_names
from .source import Source, is_same, size_and_time

NOT_TAKEN = "not_taken.json"


def note_name(cohort: Path, key: str, slug: str) -> str:
    """Return the name of the note that a failure of a slide has now, without `.json`.

    Args:
        cohort: the cohort folder.
        key: key of the slide.
        slug: folder of the encoder.
    """
    return f"{key}@{slug}" if (cohort / "slides" / f"{key}.zarr").exists() else key


def note_failure(
    cohort: Path, slug: str, source: Source, error: BaseException, attempts: int
) -> None:
    """Write down that a slide failed for an encoder, and why. A later success removes it."""
    reason = error.reason if isinstance(error, SlideError) else type(error).__name__
    message = error.message if isinstance(error, SlideError) else str(error)
    note = {
        "attempts": attempts, "message": message, "name": source.name, "path": str(source.path),
        "reason": reason, "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    with suppress(OSError):  # the file may be gone, which may be why it failed
        size, mtime_ns = size_and_time(source.path)
        note |= {"bytes": size, "mtime_ns": mtime_ns}
    if source.pseudonym is not None:
        note = note_without_names(note, source)
    check_key(source.key)
    path = cohort / "failed" / f"{note_name(cohort, source.key, slug)}.json"
    with replacing(cohort, source.key, path) as partial:
        partial.write_bytes(json_bytes(note))


def attempts_of(cohort: Path, slug: str, source: Source) -> int | None:
    """Return how many times a slide has failed for an encoder.

    None if it has not, or if its file has changed since.
    """
    path = cohort / "failed" / f"{note_name(cohort, source.key, slug)}.json"
    try:
        note = read_json(path)
    except StoreError:
        return None
    return _attempts(note) if is_same(source, note) else None


def read_attempts(cohort: Path) -> dict[str, int]:
    """Return the number of attempts of each note, by its name without `.json`."""
    return {name: _attempts(read_json(path)) for name, path in _notes(cohort)}


def read_failures(
    cohort: Path, encoders: Mapping[str, Any], slug: str | None
) -> dict[str, dict[str, Any]]:
    """Return what failed, by key; see `FeatureStore.failed`.

    Args:
        cohort: the cohort folder.
        encoders: the specifications of run.json, by folder.
        slug: folder of the encoder, None for all encoders.
    """
    notes: dict[str, list[dict[str, Any]]] = {}
    for name, path in _notes(cohort):
        key, _, encoder = name.partition("@")
        is_stored = (cohort / "slides" / f"{key}.zarr").exists()
        if is_stored != bool(encoder) or (encoder and slug not in (None, encoder)):
            continue  # a note that another result has overtaken, or of another encoder
        note = read_json(path)
        if encoder:
            note["encoder"] = encoders.get(encoder, {}).get("id", encoder)
        notes.setdefault(key, []).append(note)
    return {key: _join(several) for key, several in notes.items()}


def forget_failures(cohort: Path, key: str, slug: str | None) -> None:
    """Remove the notes of a slide: of one encoder, or all of them if `slug` is None."""
    folder = cohort / "failed"
    if slug is not None:
        (folder / f"{key}@{slug}.json").unlink(missing_ok=True)
        return
    for path in (folder / f"{key}.json", *folder.glob(f"{key}@*.json")):
        path.unlink(missing_ok=True)


def write_not_taken(cohort: Path, not_taken: Mapping[str, str]) -> None:
    """Write `not_taken.json`: path to reason, of what the last call was given and did not take."""
    path = cohort / NOT_TAKEN
    if not_taken != read_not_taken(cohort):
        lease = Leases(cohort / "leases").wait(NOT_TAKEN)
        with lease, replacing(cohort, NOT_TAKEN, path) as partial:
            partial.write_bytes(json_bytes(not_taken))


def read_not_taken(cohort: Path) -> dict[str, str]:
    """Read `not_taken.json`; an empty dict if there is no such file."""
    path = cohort / NOT_TAKEN
    return {name: str(why) for name, why in read_json(path).items()} if path.exists() else {}


def _notes(cohort: Path) -> Iterator[tuple[str, Path]]:
    """Yield the notes: name without `.json`, and path."""
    folder = cohort / "failed"
    for name in names_in(folder):
        if name.endswith(".json"):
            yield name.removesuffix(".json"), folder / name


def _attempts(note: Mapping[str, Any]) -> int:
    return int(note.get("attempts", 0))


def _join(notes: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the notes of a slide, one per encoder, into one."""
    if len(notes) == 1:
        return notes[0]
    return {
        **notes[0],
        "encoder": ", ".join(note["encoder"] for note in notes),
        "message": "; ".join(dict.fromkeys(str(note.get("message")) for note in notes)),
        "attempts": max(map(_attempts, notes)),
    }
