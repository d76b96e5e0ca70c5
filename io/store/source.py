"""The file from which a slide was tiled: its name, its key, and how a change of it is detected."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Source:
    """The file of one slide of a cohort.

    Args:
        path: the file, or the folder of a bag of patches.
        name: its path relative to the folder that the user passed, with forward slashes, or its
            file name if the user passed the file. It ends with "#2" for the second of several
            slides in the file.
        mpp: micrometres per level-0 px by a list of slides, None if it has none.
        pseudonym: its key in a store that must not hold names of files, None in other stores.
    """

    path: Path
    name: str
    mpp: float | None = None
    pseudonym: str | None = None

    @property
    def image(self) -> int | None:
        """Return the number of the image in the file, from 1; None if the name has none."""
        number = re.search(r"#(\d{1,4})$", self.name)
        return int(number[1]) if number and not self.path.name.endswith(number[0]) else None

    @property
    def bytes(self) -> int:
        """Return the size of the file, 0 if it cannot be read: opening it will raise the error."""
        try:
            return size_and_time(self.path)[0]
        except OSError:
            return 0

    @property
    def key(self) -> str:
        """Return the key of the slide: the file's stem and 8 hex digits of the hash of its name.

        It consists of letters, digits, '.', '_' and '-', so it can be the name of a folder. The
        hash tells slides of the same file name in two folders apart. A pseudonym is the key.
        """
        if self.pseudonym is not None:
            return self.pseudonym
        file, image = self.name, self.image
        if image is not None:
            file = file.rpartition("#")[0]
        stem = re.sub(r"[^A-Za-z0-9._-]", "_", Path(file).stem).lstrip(".")[:80]
        if image is not None:
            stem += f"_{image}"
        name = self.name.encode("utf-8", "surrogateescape")
        return f"{stem}-{hashlib.sha256(name).hexdigest()[:8]}"


def quick_hash(path: str | os.PathLike[str]) -> str:
    """Hash a file's size and its first, middle and last 64 KiB.

    Args:
        path: the file; of a folder, the names and hashes of its files are hashed.

    Returns:
        16 hex digits of SHA-256. They show that a slide was replaced by another; they do not
        protect against a forged file.
    """
    if os.path.isdir(path):
        hashes = [(file.name, quick_hash(file)) for file in _files_in(path)]
        return hashlib.sha256(repr(hashes).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    part = 1 << 16
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        for offset in (0, max(0, size // 2 - part // 2), max(0, size - part)):
            file.seek(offset)
            digest.update(file.read(part))
    return digest.hexdigest()[:16]


def size_and_time(path: Path) -> tuple[int, int]:
    """Return the size of a file in bytes and its modification time in ns.

    Of a folder, the sum of the sizes and the latest time of the files in it.
    """
    if not path.is_dir():
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    states = [file.stat() for file in _files_in(path)]
    return sum(one.st_size for one in states), max((one.st_mtime_ns for one in states), default=0)


def _files_in(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the files in a folder, not in its subfolders, sorted; hidden ones are left out."""
    return sorted(
        path for path in Path(folder).iterdir() if path.is_file() and not path.name.startswith(".")
    )


def describe(source: Source) -> dict[str, Any]:
    """Return the attributes of a slide by which `is_same` recognises its source file.

    With a pseudonym, neither its path nor its time: the time of a scan is a fact about a patient.
    """
    size, mtime_ns = size_and_time(source.path)
    if source.pseudonym is not None:
        content = {"bytes": size, "quick_hash": quick_hash(source.path)}
        return {"name": source.pseudonym, "source": content}
    return {
        "name": source.name,
        "source": {
            "bytes": size,
            "mtime_ns": mtime_ns,
            "path": str(source.path),
            "quick_hash": quick_hash(source.path),
        },
    }


def is_same(source: Source, recorded: object) -> bool:
    """Return True if a source is the file that was recorded in the store.

    It is if its size and modification time are equal, or its size and quick hash (a copied file has
    another time).

    Args:
        source: the file now.
        recorded: what the store holds: `bytes`, and `mtime_ns` or `quick_hash` or both.
    """
    if not isinstance(recorded, dict):
        return False
    try:
        state = size_and_time(source.path)
        if state == (recorded.get("bytes"), recorded.get("mtime_ns")):
            return True
        if state[0] != recorded.get("bytes") or "quick_hash" not in recorded:
            return False
        return quick_hash(source.path) == recorded["quick_hash"]
    except OSError:  # the file is gone: keep what the store has of it
        return True
