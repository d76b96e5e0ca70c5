"""Pseudonyms: keys of slides, and of patients, from which nobody can compute their names.

A pseudonym is an HMAC of the name of a slide or a patient under a random secret. The secret, and
the list that leads back from pseudonyms to names, are in one file outside of the store, which only
its owner can read.
The store holds a fingerprint of the secret, so that a later call with another file is refused.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ... import _atomic
from ..errors import SlideError, StoreError
from .format import json_bytes, mapping, read_json, read_run
from .leases import Leases
from .source import Source, quick_hash

FORMAT, VERSION = "motet-pseudonyms", 1
WITHHELD = "withheld"
"""What the store holds in place of a text with the name of a file."""


class Pseudonymised(NamedTuple):
    """Slides with their pseudonyms."""

    sources: list[Source]
    fingerprint: str
    """16 hex digits that tell the secret from others, but do not reveal it."""


def pseudonymise(sources: Sequence[Source], file: Path, cohort: Path) -> Pseudonymised:
    """Give slides their pseudonyms, and list them in the file of pseudonyms.

    Args:
        sources: the slides.
        file: the file of pseudonyms; created, with a new secret, if neither it nor the store
            exists. It may serve several stores: a slide has the same pseudonym in all of them.
        cohort: folder of the store.

    Raises:
        ValueError: the file lies in the store.
        StoreError: the file is no file of pseudonyms, or not the one with which the store began.
        OSError: the file cannot be written.
    """
    file = file.absolute()
    if file.resolve().is_relative_to(cohort.resolve()):
        raise ValueError(f"pseudonymise: expected a file outside of the store, got {str(file)!r}")
    run = read_run(cohort) if (cohort / "run.json").exists() else None
    if run is not None and not file.exists():
        raise StoreError(f"{file}: no such file, but {cohort} exists: pass the file with which it "
                         "was begun, or another folder")  # fmt: skip
    with Leases(file.parent).wait(f"{file.name}.lease"):
        content = _read(file) if file.exists() else _new()
        secret = bytes.fromhex(content["secret"])
        fingerprint = _hmac(secret, b"file")
        if run is not None:
            check_pseudonyms(cohort / "run.json", run, fingerprint)
        named = [replace(source, pseudonym=_pseudonym(secret, source)) for source in sources]
        slides = content["slides"] | {
            source.key: {"name": source.name, "path": str(source.path.absolute())}
            for source in named
        }
        if slides != content["slides"] or not file.exists():
            _write(file, {**content, "slides": slides})
    return Pseudonymised(named, fingerprint)


def pseudonymise_patients(patients: Iterable[str], file: Path) -> dict[str, str]:
    """Give patients their pseudonyms, and list them in the file of pseudonyms.

    Args:
        patients: the ids.
        file: the file of pseudonyms, which may be that of a store; created, with a new secret, if
            it does not exist. With the same file, a patient always has the same pseudonym.

    Returns:
        Id to pseudonym.

    Raises:
        StoreError: the file is no file of pseudonyms.
        OSError: the file cannot be written.
    """
    file = file.absolute()
    with Leases(file.parent).wait(f"{file.name}.lease"):
        content = _read(file) if file.exists() else _new()
        secret = bytes.fromhex(content["secret"])
        pseudonyms = {
            patient: f"patient-{_hmac(secret, b'patient ' + os.fsencode(patient))}"
            for patient in patients
        }
        known = {**mapping(content.get("patients"))}
        listed = known | {pseudonym: patient for patient, pseudonym in pseudonyms.items()}
        if listed != known or not file.exists():
            _write(file, {**content, "patients": listed})
    return pseudonyms


def check_pseudonyms(file: Path, run: Mapping[str, Any], fingerprint: str | None) -> None:
    """Raise StoreError unless run.json (`file`) was begun with these pseudonyms, or also without.

    Args:
        file: run.json.
        run: its content.
        fingerprint: of the secret; None for slides without pseudonyms.
    """
    begun = run.get("pseudonyms")
    if begun == fingerprint:
        return
    if fingerprint is None:
        raise StoreError(f"{file}: the slides of this store have pseudonyms: pass their file as "
                         "pseudonymise")  # fmt: skip
    how = "without pseudonyms" if begun is None else "with another file of pseudonyms"
    raise StoreError(f"{file}: this store was begun {how}: use that, or another folder")


def withhold_names(value: Any, source: Source) -> Any:
    """Return a JSON value in which each text with a name of the slide is withheld.

    Names are those of its file, with and without suffix, and of its folders below the one that was
    tiled.
    """
    if isinstance(value, str):
        names = {*Path(source.name).parts, source.path.name, source.path.stem} - {"/"}
        words = "|".join(re.escape(name) for name in sorted(names) if name)
        return WITHHELD if re.search(rf"(?<![^\W_])(?:{words})(?![^\W_])", value) else value
    if isinstance(value, Mapping):
        return {name: withhold_names(entry, source) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [withhold_names(entry, source) for entry in value]
    return value


def note_without_names(note: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """Return the note of a failure as a store with pseudonyms holds it.

    Without path and time of the file, which `quick_hash` replaces; with the general text of the
    reason, as a message may name files.
    """
    reason = note["reason"]
    kept = {name: note[name] for name in note.keys() - {"path", "mtime_ns"}}
    kept |= {"name": source.key, "message": SlideError.REASONS.get(reason, reason)}
    with suppress(OSError):
        kept["quick_hash"] = quick_hash(source.path)
    return kept


def _new() -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, "secret": secrets.token_hex(32), "slides": {}}


def _read(file: Path) -> dict[str, Any]:
    content = read_json(file)
    secret = content.get("secret")
    is_ours = content.get("format") == FORMAT and content.get("version") == VERSION
    if not is_ours or not isinstance(secret, str) or not re.fullmatch("[0-9a-f]{64}", secret):
        raise StoreError(f"{file}: expected a file of pseudonyms, or none, got another file")
    return {**content, "slides": {**mapping(content.get("slides"))}}


def _write(file: Path, content: Mapping[str, Any]) -> None:
    with _atomic.replacing(file, private=True) as partial:
        partial.write_bytes(json_bytes(content))


def _hmac(secret: bytes, message: bytes) -> str:
    return hmac.digest(secret, message, "sha256").hex()[:16]


def _pseudonym(secret: bytes, source: Source) -> str:
    return f"slide-{_hmac(secret, b'slide ' + os.fsencode(source.name))}"
