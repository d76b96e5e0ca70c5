"""The format on the disk (docs/reference/store-format.md): names, JSON, flags."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from enum import IntFlag
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import StoreError, listed

FORMAT, VERSION = "motet-store", 1
ARRAYS = ("coords", "tissue", "flags", "thumb", "mask")
KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,120}")


class FLAGS(IntFlag):
    """The bits of `flags`, which say what is known of a patch.

    Args:
        values: the bits of several, added.

    Example:
        >>> motet.io.FLAGS(9)
        <FLAGS.EDGE|CORRUPT: 9>
    """

    EDGE = 1
    """Reaches beyond the slide, or was moved inwards at its border."""
    PEN = 2
    BLUR = 4
    CORRUPT = 8
    """Its pixels could not be decoded. It was not embedded, and its features are NaN."""


def flag_counts(flags: NDArray[np.uint8]) -> dict[str, int]:
    """Return how many patches each flag has."""
    names = ("edge", "pen", "blur", "corrupt")
    return {
        name: int(np.count_nonzero(flags & np.uint8(flag)))
        for name, flag in zip(names, FLAGS, strict=True)
    }


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        StoreError: there is none.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            content = json.loads(file.read())
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise StoreError(f"{path}: cannot be read: {why}") from None
    if not isinstance(content, dict):
        raise StoreError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def read_run(folder: Path) -> dict[str, Any]:
    """Read run.json, of a format that is known."""
    path = folder / "run.json"
    run = read_json(path)
    if run.get("format") != FORMAT or not isinstance(run.get("version"), int):
        raise StoreError(f"{path}: expected format {FORMAT!r}, got {run.get('format')!r}")
    if run["version"] > VERSION:
        raise StoreError(
            f"{path}: expected format version {VERSION}, got {run['version']}: upgrade motet"
        )
    encoders = run.get("encoders")
    sound = isinstance(encoders, dict) and all(
        KEY.fullmatch(slug) and isinstance(spec, dict) and isinstance(spec.get("id"), str)
        for slug, spec in encoders.items()
    )
    if not sound or not isinstance(run.get("tiling"), dict) or "tiling_hash" not in run:
        raise StoreError(f"{path}: expected tiling, tiling_hash and encoders, got {listed(run)}")
    return run


def names_in(folder: Path) -> list[str]:
    """Return what a folder holds, sorted; nothing where it is not there."""
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def run_hash(run: Mapping[str, Any]) -> str:
    """Return 16 hex digits of SHA-256 over all of run.json but the hash itself."""
    text = json.dumps(
        {name: value for name, value in run.items() if name != "hash"},
        sort_keys=True, separators=(",", ":"),
    )  # fmt: skip
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_key(key: str) -> None:
    """Raise StoreError unless a slide's key can name its folder."""
    if not KEY.fullmatch(key):
        raise StoreError(f"expected a key of letters, digits, '.', '_' and '-', got {key!r}")


def plain(value: Any) -> Any:
    """Return what JSON gives back for it, so that what is compared is what is stored."""
    return json.loads(json_bytes(value))


def json_bytes(value: object) -> bytes:
    """Write JSON as the same bytes each time."""

    def native(other: object) -> object:
        if isinstance(other, np.generic | np.ndarray):
            return other.tolist()
        if isinstance(other, os.PathLike):
            return os.fspath(other)
        raise TypeError(f"expected what JSON can hold, got {type(other).__name__}")

    text = json.dumps(value, sort_keys=True, allow_nan=False, default=native, indent=1)
    return text.encode() + b"\n"


def mapping(value: object) -> Mapping[str, Any]:
    """Return a JSON object as it is, anything else as an empty one."""
    return value if isinstance(value, dict) else {}
