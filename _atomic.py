"""Write files atomically: completely or not at all. All files that motet keeps are written here."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, partial: Path | None = None, *, private: bool = False) -> Iterator[Path]:
    """Yield a partial file to write; when the block ends without an error, it replaces `path`.

    A reader sees the old content or the new one, even after a power failure: the file is synced
    before it is renamed, and its folder afterwards.

    Args:
        path: the file to write or to replace.
        partial: the partial file, on the same file system; an older one, left by a killed process,
            is overwritten. None for a hidden file beside `path` with a random name. It is removed
            if the block raises.
        private: True if only the owner may read the file.

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: the file cannot be written.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder")
    mode = "xb" if partial is None else "wb"
    if partial is None:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        most = 0o600 if private else 0o666
        # This gives it the default permissions.
        with open(partial, mode, opener=lambda name, flags: os.open(name, flags, most)) as file:
            permissions = os.fstat(file.fileno()).st_mode
        yield partial
        os.chmod(partial, permissions)  # safetensors makes its files private
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; line ends are not changed."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    if os.name == "nt":  # Windows cannot sync folders, and files only if they are open for writing
        if path.is_dir():
            return
        file = os.open(path, os.O_RDWR)
    else:
        file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
