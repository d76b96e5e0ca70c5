"""Write a file whole or not at all: the one writer of everything that motet keeps."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, partial: Path | None = None) -> Iterator[Path]:
    """Give a file to write, which takes the place of `path` when the block ends without an error.

    A reader sees the old content or the new, after a power failure too: the file is synced before
    it is renamed, its folder afterwards.

    Args:
        path: the file to write or to replace.
        partial: where to write meanwhile, on the same file system, over what a killed process may
            have left there; None for a hidden file beside `path` with a name of its own. It is
            removed where the block raises.

    Raises:
        FileNotFoundError: no such folder.
        OSError: the file cannot be written.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder")
    mode = "xb" if partial is None else "wb"
    if partial is None:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(partial, mode) as file:  # with the permissions that a new file gets
            permissions = os.fstat(file.fileno()).st_mode
        yield partial
        os.chmod(partial, permissions)  # safetensors makes what it writes private
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all, line ends as they are."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    if os.name == "nt":  # Windows syncs no folder, and a file only where it may be written
        if path.is_dir():
            return
        file = os.open(path, os.O_RDWR)
    else:
        file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
