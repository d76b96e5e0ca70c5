"""What the store does to the disk: space is taken first, files are synced, folders swapped."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ... import _atomic
from ..._atomic import sync
from .format import names_in

# A full disk fails every slide alike: the run stops rather than to list them all as failed.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LEFT = re.compile(r"(.+)\.[0-9a-f]{16}(\.ready|\.old)?")


@contextmanager
def replacing(cohort: Path, name: str, path: Path) -> Iterator[Path]:
    """Give a file in .tmp/ to write, which replaces `path` once it is written and synced.

    `name` is the lease under which a killed worker's is removed.
    """
    folder = cohort / ".tmp"
    folder.mkdir(exist_ok=True)
    partial = folder / f"{name}.{secrets.token_hex(8)}"
    with saying_full(path.name, path), _atomic.replacing(path, partial):
        yield partial


def swap(temporary: Path, target: Path) -> None:
    """Replace a slide; `recover` ends it if this is killed between two renames."""
    ready, old = (temporary.with_name(temporary.name + end) for end in (".ready", ".old"))
    os.rename(temporary, ready)
    sync(ready.parent)
    os.rename(target, old)
    os.rename(ready, target)
    sync(target.parent)
    sync(ready.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(cohort: Path, key: str) -> None:
    """End the replacement that a dead worker began, and remove what else it left."""
    folder, slide = cohort / ".tmp", cohort / "slides" / f"{key}.zarr"
    left = [name for name in names_in(folder) if (m := LEFT.fullmatch(name)) and m[1] == key]
    for end in (".ready", ".old"):
        for name in left:
            if name.endswith(end) and not slide.exists():
                os.rename(folder / name, slide)
                sync(slide.parent)
    for name in left:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name, ignore_errors=True)
        else:
            (folder / name).unlink(missing_ok=True)


def allocate(path: Path, size: int) -> int:
    """Create a file with its space on the disk, so that a full one is an error now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
    except BaseException:
        os.close(file)
        raise
    return file


def write_all(file: int, content: Any, at: int) -> None:
    """Write all of a buffer at a place of an open file."""
    view = memoryview(content).cast("B")
    while len(view):
        done = os.pwrite(file, view, at)
        view, at = view[done:], at + done


@contextmanager
def saying_full(what: str, path: Path) -> Iterator[None]:
    """Make a full disk say what it was full for, and that nothing is lost."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(
            error.errno,
            f"no space for {what} ({error.strerror}); nothing half-written is left: make space and "
            "run again",
            str(path),
        ) from None


def sync_tree(folder: Path) -> None:
    """Sync all files, then the folders that name them."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))
