"""Find slides in folders and lists, and give each one its name."""

from __future__ import annotations

import csv
import errno
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import SlideError
from ..store.source import Source

SUFFIXES = {
    ".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi",
    ".dcm", ".png", ".jpg", ".jpeg",
}  # fmt: skip


class _Reached(NamedTuple):
    """A slide and how it was reached: by a list (0), by a folder (1), or named itself (2)."""

    order: int
    is_link: bool
    source: Source
    real: str
    """Its path without links."""

    @property
    def rank(self) -> tuple[int, bool, str, str]:
        """Of one file, the slide with the least rank is taken."""
        return self.order, self.is_link, self.source.name, str(self.source.path)


def find_slides(
    paths: Iterable[str | os.PathLike[str]], *, not_taken: dict[str, str] | None = None
) -> list[Source]:
    """Find the slides in folders and lists of slides, sorted by name.

    Folders are searched with their subfolders for files with the suffix of a slide. Hidden files
    and folders, feature stores, and the folder that belongs to a .mrxs file are left out. Of the
    DICOM files of one series in a folder, the one with the largest image is the slide. A .txt file
    lists slides, one per line, a .csv file in its column `path`, with their micrometres per px in
    its column `mpp` if it has one; paths are relative to the list's folder. Any other file counts
    as a slide. "slide.tif#2" is the second of several slides in a file; if one of them is named,
    the file without a number is left out.

    A file that is reached several times, by links or by several paths, is one slide. Its name is
    that of a list before that of a folder, and one without links before one with links; it does not
    depend on the order of `paths`.

    Args:
        paths: folders, slides and lists.
        not_taken: receives what was reached and is no slide of its own: path to reason.

    Returns:
        One Source per slide.

    Raises:
        SlideError: "missing", for a path that does not exist; "unreadable", for a pipe or device,
            or a list that cannot be used.
        ValueError: two slides have the same key.
    """
    left_out = {} if not_taken is None else not_taken
    by_file: dict[str, list[_Reached]] = {}
    for path in map(Path, paths):
        for reached in _reach(path, left_out):
            by_file.setdefault(reached.real, []).append(reached)
    source_of_key: dict[str, Source] = {}
    for several in by_file.values():
        source = min(several, key=lambda reached: reached.rank).source
        taken = os.path.abspath(source.path)
        for other in several:
            if os.path.abspath(other.source.path) != taken:
                left_out[str(other.source.path)] = f"the same file as {source.name!r}"
        rival = source_of_key.setdefault(source.key, source)
        if rival is not source:
            first, second = sorted((str(rival.path), str(source.path)))
            raise ValueError(
                f"paths: {first!r} and {second!r} are both called {source.name!r}; give the "
                "folder that holds both"
            )
    with_images = {source.path for source in source_of_key.values() if source.image}
    sources = []
    for source in source_of_key.values():
        if source.image is None and source.path in with_images:
            left_out[str(source.path)] = "slides in it are given by number"
        else:
            sources.append(source)
    return sorted(sources, key=lambda source: source.name)


def _reach(path: Path, left_out: dict[str, str]) -> Iterator[_Reached]:
    if path.is_dir():
        real_top = os.path.realpath(path)
        for source, real in _search(path, left_out):
            is_link = real != os.path.join(real_top, source.name)
            yield _Reached(1, is_link, source, real)
        return
    file = _file_of(path)
    sources = [Source(file, path.name)]
    order = 2
    if path.suffix.lower() in (".txt", ".csv") and path.is_file():
        order = 0
        sources = [
            Source(_file_of(path.parent / name), Path(name).as_posix(), mpp)
            for name, mpp in _read_list(path)
        ]
    elif not file.exists():
        raise SlideError(path, "missing", "no such file or folder")
    elif not file.is_file():  # opening a pipe would wait for a writer
        raise SlideError(path, "unreadable", "expected a file or folder, got a pipe or device")
    for source in sources:
        real = os.path.realpath(source.path)
        if source.image is not None:
            real += f"#{source.image}"
        yield _Reached(order, os.path.islink(source.path), source, real)


def _search(top: Path, left_out: dict[str, str]) -> Iterator[tuple[Source, str]]:
    """Yield the slides in a folder and its subfolders, each with its path without links."""
    visited: set[tuple[int, int]] = set()  # device and inode: a link may lead back to a folder
    folders, links = [top], []
    while folders or links:
        # Links last: a folder is then searched by its name, not by that of a link to it.
        folder = folders.pop() if folders else links.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            names = sorted(os.listdir(folder))
        except OSError as error:
            left_out[str(folder)] = f"cannot be read: {error.strerror}"
            continue
        if {"run.json", "slides", "leases"} <= set(names):
            continue  # a feature store: its report has pictures
        subfolders, slides = [], []
        for name in names:
            if not name.startswith("."):
                path = folder / name
                kind = _kind_of(path)
                if kind == "folder" and f"{name}.mrxs" not in names:
                    (links if path.is_symlink() else subfolders).append(path)
                elif kind == "slide":
                    slides.append(path)
                elif kind != "folder":
                    left_out[str(path)] = kind
        folders += reversed(subfolders)
        real = os.path.realpath(folder)
        for path in _one_per_series(slides):
            real_path = os.path.realpath(path) if path.is_symlink() else f"{real}/{path.name}"
            yield Source(path, path.relative_to(top).as_posix()), real_path


def _kind_of(path: Path) -> str:
    """Return "folder", "slide", or the reason why a path is neither."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        dangling = path.is_symlink() and error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR)
        return "a link to nothing" if dangling else f"cannot be read: {error.strerror}"
    if stat.S_ISDIR(mode):
        return "folder"
    if not stat.S_ISREG(mode):
        return "a pipe or device"
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return "slide"
    return f"unknown extension {suffix}" if suffix else "no extension"


def _file_of(path: Path) -> Path:
    """Return the path of a file, without the number of an image at its end."""
    file, _, number = str(path).rpartition("#")
    return Path(file) if number.isdecimal() and not path.exists() else path


def _read_list(path: Path) -> list[tuple[str, float | None]]:
    """Return the paths that a .txt or .csv file lists, and their micrometres per px."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise SlideError(path, "unreadable", "expected a list of slides in UTF-8") from None
    if path.suffix.lower() == ".txt":
        return [(line.strip(), None) for line in text.splitlines() if line.strip()]
    rows = list(csv.DictReader(text.splitlines()))
    if rows and "path" not in rows[0]:
        raise SlideError(
            path, "unreadable", f"expected a column 'path', got {', '.join(map(str, rows[0]))}"
        )
    slides = []
    for line, row in enumerate(rows, 2):
        if name := (row["path"] or "").strip():
            slides.append((name, _mpp_of(row.get("mpp"), path, line)))
    return slides


def _mpp_of(text: str | None, path: Path, line: int) -> float | None:
    """Read the column `mpp` of a list; None if the cell is empty."""
    if not (text or "").strip():
        return None
    try:
        mpp = float(text or "")
    except ValueError:
        mpp = 0.0
    if not 0 < mpp < float("inf"):
        raise SlideError(
            path, "unreadable", f"line {line}, column mpp: expected a number above 0, got {text!r}"
        )
    return mpp


def _one_per_series(paths: list[Path]) -> list[Path]:
    """Keep the largest image of each DICOM series, and all files that are not DICOM slides."""
    largest: dict[str, tuple[int, Path]] = {}
    kept = []
    for path in paths:
        series = dicom_series(path) if path.suffix.lower() == ".dcm" else None
        if series is None:
            kept.append(path)
        elif series[0] not in largest or series[1] > largest[series[0]][0]:
            largest[series[0]] = series[1], path
    return sorted([*kept, *(path for _, path in largest.values())])


# Types of elements with a length of 4 bytes, after 2 reserved ones; all others have 2 bytes.
_LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"UC", b"UN", b"UR", b"UT"}
_SERIES, _COLUMNS, _ROWS = (0x0020, 0x000E), (0x0048, 0x0006), (0x0048, 0x0007)


def dicom_series(path: Path) -> tuple[str, int] | None:
    """Read the SeriesInstanceUID of a DICOM slide and the number of px of its image.

    Only explicit little endian is read, the transfer syntax of slides: an element is a tag (group,
    element), two letters for its type, its length, and that many bytes. Sequences and their items
    may have the length 0xFFFFFFFF, which means that an end tag follows; elements inside of them are
    skipped.

    Args:
        path: the file.

    Returns:
        Both, or None if the file is no DICOM slide, or of another transfer syntax.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(1 << 20)
    except OSError:
        return None
    if data[128:132] != b"DICM":
        return None
    values: dict[tuple[int, int], bytes] = {}
    at, depth = 132, 0  # depth: open sequences and items of unknown length
    try:
        while len(values) < 3:
            group, element = struct.unpack_from("<HH", data, at)
            if group == 0xFFFE:  # an item of a sequence (E000), or the end of either
                (length,) = struct.unpack_from("<I", data, at + 4)
                at += 8
                if element == 0xE000 and length != 0xFFFFFFFF:
                    at += length
                else:
                    depth += 1 if element == 0xE000 else -1
                continue
            kind = data[at + 4 : at + 6]
            if kind in _LONG:
                (length,), start = struct.unpack_from("<I", data, at + 8), at + 12
            else:
                (length,), start = struct.unpack_from("<H", data, at + 6), at + 8
            if length == 0xFFFFFFFF:
                depth += 1
                length = 0
            elif depth == 0 and (group, element) in (_SERIES, _COLUMNS, _ROWS):
                values[group, element] = data[start : start + length]
            at = start + length
        sides = [struct.unpack("<I", values[tag])[0] for tag in (_COLUMNS, _ROWS)]
    except struct.error:  # beyond the end of the data, or of a value of another length
        return None
    return values[_SERIES].decode("ascii", "replace").strip("\0 "), sides[0] * sides[1]
