"""Find slides in folders and lists, and give each one its name."""

from __future__ import annotations

import csv
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import SlideError
from ..store.source import Source

SUFFIXES = {
    ".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi",
    ".dcm", ".png", ".jpg", ".jpeg",
}  # fmt: skip


def find_slides(paths: Iterable[str | os.PathLike[str]]) -> list[Source]:
    """Find the slides in folders and lists of slides, sorted by name.

    Folders are searched with their subfolders for files with the suffix of a slide; hidden files
    and folders are left out, and a link to a folder that was searched already is not followed.
    Of the DICOM files of one series in a folder, the one with the largest image is the slide. A
    .txt file lists slides, one per line, a .csv file in its column `path`; paths are relative to
    the list's folder. Any other file counts as a slide.

    Args:
        paths: folders, slides and lists.

    Returns:
        One Source per slide.

    Raises:
        SlideError: "missing", for a path that does not exist.
        ValueError: two slides have the same key.
    """
    source_of_key: dict[str, Source] = {}
    for path in map(Path, paths):
        for source in _sources_of(path):
            other = source_of_key.setdefault(source.key, source)
            if other is not source and os.path.realpath(other.path) != os.path.realpath(
                source.path
            ):
                raise ValueError(
                    f"paths: {str(other.path)!r} and {str(source.path)!r} are both called "
                    f"{source.name!r}; give the folder that holds both"
                )
    return sorted(source_of_key.values(), key=lambda source: source.name)


def _sources_of(path: Path) -> Iterator[Source]:
    if path.is_dir():
        yield from _search(path)
    elif path.suffix.lower() in (".txt", ".csv") and path.is_file():
        for name in _read_list(path):
            yield Source(path.parent / name, Path(name).as_posix())
    elif path.exists():
        yield Source(path, path.name)
    else:
        raise SlideError(path, "missing", "no such file or folder")


def _search(top: Path) -> Iterator[Source]:
    visited: set[tuple[int, int]] = set()  # device and inode: a link may lead back to a folder
    for folder, subfolders, files in os.walk(top, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        slides = [
            Path(folder, name) for name in sorted(files)
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES
        ]  # fmt: skip
        for path in _one_per_series([path for path in slides if path.is_file()]):
            yield Source(path, path.relative_to(top).as_posix())


def _read_list(path: Path) -> list[str]:
    """Return the paths that a .txt or .csv file lists."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise SlideError(path, "unreadable", "expected a list of slides in UTF-8") from None
    if path.suffix.lower() == ".txt":
        return [line.strip() for line in text.splitlines() if line.strip()]
    rows = list(csv.DictReader(text.splitlines()))
    if rows and "path" not in rows[0]:
        raise SlideError(
            path, "unreadable", f"expected a column 'path', got {', '.join(map(str, rows[0]))}"
        )
    return [row["path"].strip() for row in rows if (row["path"] or "").strip()]


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
