"""The file that a slide of the store came from: its name, its key, and how it is known again."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Source:
    """One slide of a cohort: where it is, and what it is called.

    Args:
        path: the file.
        name: its path below the folder that was given, with forward slashes, or its file name.
    """

    path: Path
    name: str

    @property
    def bytes(self) -> int:
        """Return the size of its file, 0 where that cannot be told: opening it will say why."""
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    @property
    def key(self) -> str:
        """Name its folder in a store: letters, digits, '.', '_' and '-' only, and never a path."""
        stem = re.sub(r"[^A-Za-z0-9._-]", "_", Path(self.name).stem).lstrip(".")[:80]
        name = self.name.encode("utf-8", "surrogateescape")
        return f"{stem}-{hashlib.sha256(name).hexdigest()[:8]}"


def quick_hash(path: str | os.PathLike[str]) -> str:
    """Hash a file's size and its first, middle and last 64 KiB.

    Args:
        path: the file.

    Returns:
        16 hex digits of SHA-256: enough to see that a slide has been exchanged, not for security.
    """
    part = 1 << 16
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        for offset in (0, max(0, size // 2 - part // 2), max(0, size - part)):
            file.seek(offset)
            digest.update(file.read(part))
    return digest.hexdigest()[:16]


def described(source: Source) -> dict[str, Any]:
    """Return what a slide's attributes say of its source: how it is known again."""
    status = source.path.stat()
    return {
        "name": source.name,
        "source": {
            "bytes": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "path": str(source.path),
            "quick_hash": quick_hash(source.path),
        },
    }


def is_same(source: Source, known: object) -> bool:
    """Return True if a source is the file that was known: size and time, else quick hash."""
    if not isinstance(known, dict):
        return False
    try:
        status = source.path.stat()
        if (status.st_size, status.st_mtime_ns) == (known.get("bytes"), known.get("mtime_ns")):
            return True
        if status.st_size != known.get("bytes") or "quick_hash" not in known:
            return False
        return quick_hash(source.path) == known["quick_hash"]
    except OSError:  # gone: what is stored of it is all there is
        return True
