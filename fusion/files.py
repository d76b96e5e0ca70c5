"""Files on disk, whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a file to write, which replaces the one at `path` when the block ends without an error.

    Raises:
        FileNotFoundError: no such folder.
        OSError: the file cannot be written.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder")
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(partial, "xb") as file:  # with the permissions that a new file gets
            mode = os.fstat(file.fileno()).st_mode
        yield partial
        os.chmod(partial, mode)  # safetensors makes what it writes private
        with open(partial, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all, line ends as they are."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")
