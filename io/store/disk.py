"""Disk operations of the store: allocate space, sync files, replace folders, clean up."""

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
from .format import KEY, names_in
from .leases import Leases

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk. Every slide would fail with them, so they stop the run instead."""
REMAINS = re.compile(r"(.+)\.[0-9a-f]{16}(\.ready|\.old)?")
"""Names in .tmp/: a key (or the name of a file), a token, and the step of `swap`."""


@contextmanager
def replacing(cohort: Path, name: str, path: Path) -> Iterator[Path]:
    """Yield the path of a file in .tmp/ to write; it replaces `path` once it is written and synced.

    A killed worker leaves the file in .tmp/. The next holder of the lease `name` removes it.
    """
    folder = cohort / ".tmp"
    folder.mkdir(exist_ok=True)
    partial = folder / f"{name}.{secrets.token_hex(8)}"
    with explain_full_disk(path.name, path), _atomic.replacing(path, partial):
        yield partial


def swap(temporary: Path, target: Path) -> None:
    """Replace the slide `target` by the new one, `temporary`, whose files are synced.

    No single rename can replace a folder that is not empty, so this takes three. After a crash,
    `recover` finishes the work; neither slide is lost:

    =============  ===================================  ========================================
    crash after    on the disk                          `recover` then
    =============  ===================================  ========================================
    first rename   target (old), .tmp/…ready (new)      keeps the old slide, removes `.ready`
    second rename  no target, …ready (new), …old (old)  renames `.ready` to the target
    third rename   target (new), .tmp/…old (old)        removes `.old`
    =============  ===================================  ========================================
    """
    ready, old = (temporary.with_name(temporary.name + end) for end in (".ready", ".old"))
    os.rename(temporary, ready)
    # `.ready` must be on the disk before the old slide goes: it tells `recover` that the new slide
    # is complete, which a plain `.tmp/<key>.<token>` is not.
    sync(ready.parent)
    os.rename(target, old)
    os.rename(ready, target)
    # Both folders, before the only other copy is removed.
    sync(target.parent)
    sync(ready.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(cohort: Path, key: str) -> None:
    """Finish the replacement that a dead worker began, and remove its other files in `.tmp/`.

    The caller holds the lease on the key, so no living worker should use these files.
    """
    folder, slide = cohort / ".tmp", cohort / "slides" / f"{key}.zarr"
    names = [name for name in names_in(folder) if (m := REMAINS.fullmatch(name)) and m[1] == key]
    for end in (".ready", ".old"):  # the new slide is preferred, if both are there
        for name in names:
            if name.endswith(end) and not slide.exists():
                os.rename(folder / name, slide)
                sync(slide.parent)
    for name in names:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name, ignore_errors=True)
        else:
            (folder / name).unlink(missing_ok=True)


def allocate(path: Path, size: int) -> int:
    """Create a file and allocate its space, so that a full disk is an error now, not later."""
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
    """Write a buffer completely, at byte `at` of an open file. One pwrite may write less."""
    view = memoryview(content).cast("B")
    while len(view):
        written = os.pwrite(file, view, at)
        view, at = view[written:], at + written


@contextmanager
def explain_full_disk(content: str, path: Path) -> Iterator[None]:
    """Raise the error of a full disk again, with what was to be written and the cure."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(
            error.errno,
            f"no space for {content} ({error.strerror}): make space and run again; the slides "
            "that were in work are begun anew, and until then .tmp/ may hold parts of them",
            str(path),
        ) from None


def sync_tree(folder: Path) -> None:
    """Sync all files of a folder, then each folder, after its subfolders."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


def clean(cohort: Path, leases: Leases) -> None:
    """Remove what dead workers left in `.tmp/` and `leases/` of a cohort folder.

    The files of keys whose lease a living worker holds are kept.
    """
    leases.clean()
    remains = map(REMAINS.fullmatch, names_in(cohort / ".tmp"))
    leased_keys = filter(KEY.fullmatch, names_in(leases.folder))
    for key in sorted({match[1] for match in remains if match} | {*leased_keys}):
        lease = leases.take(key)
        if lease is not None:
            with lease:
                recover(cohort, key)
