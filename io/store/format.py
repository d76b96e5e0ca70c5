"""The format on the disk (docs/reference/store-format.md): names, JSON, flags."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
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
    """Bits of `flags`: the properties of a patch.

    Args:
        values: the sum of several bits.

    Example:
        >>> motet.io.FLAGS(9)
        <FLAGS.EDGE|CORRUPT: 9>
    """

    EDGE = 1
    """The patch reaches beyond the slide, or was moved inwards at its border."""
    PEN = 2
    BLUR = 4
    CORRUPT = 8
    """The pixels of the patch could not be decoded. It was not embedded; its features are NaN."""


DROPPABLE = {"pen": FLAGS.PEN, "blur": FLAGS.BLUR}
"""Flags that a user may ask to leave out, by name."""


def drop_bits(drop: Iterable[str]) -> FLAGS:
    """Return the bits of the flags of these names, "pen" and "blur".

    Raises:
        ValueError: another name.
    """
    bits = FLAGS(0)
    for name in [drop] if isinstance(drop, str) else drop:
        if name not in DROPPABLE:
            raise ValueError(f"drop: expected {listed(DROPPABLE)}, got {name!r}")
        bits |= DROPPABLE[name]
    return bits


def flag_counts(flags: NDArray[np.uint8]) -> dict[str, int]:
    """Return the number of patches with each flag."""
    names = ("edge", "pen", "blur", "corrupt")
    return {
        name: int(np.count_nonzero(flags & np.uint8(flag)))
        for name, flag in zip(names, FLAGS, strict=True)
    }


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        StoreError: the file does not exist, or does not hold a JSON object.
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
    """Read run.json and check its format and version.

    Raises:
        StoreError: it cannot be read, or is of another format or of a later version.
    """
    path = folder / "run.json"
    run = read_json(path)
    if run.get("format") != FORMAT or not isinstance(run.get("version"), int):
        raise StoreError(f"{path}: expected format {FORMAT!r}, got {run.get('format')!r}")
    if run["version"] > VERSION:
        raise StoreError(
            f"{path}: expected format version {VERSION}, got {run['version']}: upgrade motet"
        )
    encoders = run.get("encoders")
    valid = isinstance(encoders, dict) and all(
        KEY.fullmatch(slug) and isinstance(spec, dict) and isinstance(spec.get("id"), str)
        for slug, spec in encoders.items()
    )
    if not valid or not isinstance(run.get("tiling"), dict) or "tiling_hash" not in run:
        raise StoreError(f"{path}: expected tiling, tiling_hash and encoders, got {listed(run)}")
    return run


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder, sorted; an empty list if the folder does not exist."""
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def run_hash(run: Mapping[str, Any]) -> str:
    """Return 16 hex digits of the SHA-256 of run.json without its entry `hash`."""
    text = json.dumps(
        {name: value for name, value in run.items() if name != "hash"},
        sort_keys=True, separators=(",", ":"),
    )  # fmt: skip
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_key(key: str) -> None:
    """Raise StoreError unless a key can be the name of a slide's folder."""
    if not KEY.fullmatch(key):
        raise StoreError(f"expected a key of letters, digits, '.', '_' and '-', got {key!r}")


def plain(value: Any) -> Any:
    """Return the value as writing and reading JSON leaves it, to compare it with stored values."""
    return json.loads(json_bytes(value))


def json_bytes(value: object) -> bytes:
    """Return a value as JSON. Equal values give equal bytes."""

    def convert(other: object) -> object:
        if isinstance(other, np.generic | np.ndarray):
            return other.tolist()
        if isinstance(other, os.PathLike):
            return os.fspath(other)
        raise TypeError(f"expected what JSON can hold, got {type(other).__name__}")

    text = json.dumps(value, sort_keys=True, allow_nan=False, default=convert, indent=1)
    return text.encode() + b"\n"


def mapping(value: object) -> Mapping[str, Any]:
    """Return a JSON object unchanged, and an empty one for any other value."""
    return value if isinstance(value, dict) else {}
