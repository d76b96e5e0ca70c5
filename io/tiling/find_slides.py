"""Find slides in folders and lists, each with a name of its own."""

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
    """Find the slides that are meant, sorted by name.

    Folders are searched in depth for files of known slide extensions, without hidden ones; a link
    that leads back ends there. Of each series of DICOM files in a folder the largest image stands
    for the slide. A .txt or .csv file lists slides, one per line or in a column `path`, from its
    own folder. Other files are taken as they are.

    Args:
        paths: folders, slides and lists.

    Returns:
        One Source per slide.

    Raises:
        SlideError: "missing", for a path that does not exist.
        ValueError: if two slides would have one key.
    """
    found: dict[str, Source] = {}
    for path in map(Path, paths):
        for source in _below(path):
            known = found.setdefault(source.key, source)
            if known is not source and os.path.realpath(known.path) != os.path.realpath(
                source.path
            ):
                raise ValueError(
                    f"paths: {str(known.path)!r} and {str(source.path)!r} are both called "
                    f"{source.name!r}; give the folder that holds both"
                )
    return sorted(found.values(), key=lambda source: source.name)


def _below(path: Path) -> Iterator[Source]:
    if path.is_dir():
        yield from _search(path)
    elif path.suffix.lower() in (".txt", ".csv") and path.is_file():
        for name in _listed(path):
            yield Source(path.parent / name, Path(name).as_posix())
    elif path.exists():
        yield Source(path, path.name)
    else:
        raise SlideError(path, "missing", "no such file or folder")


def _search(top: Path) -> Iterator[Source]:
    seen: set[tuple[int, int]] = set()
    for folder, inner, files in os.walk(top, followlinks=True):
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in seen:
            inner.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        chosen = [
            Path(folder, name) for name in sorted(files)
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES
        ]  # fmt: skip
        for path in _one_per_series([path for path in chosen if path.is_file()]):
            yield Source(path, path.relative_to(top).as_posix())


def _listed(path: Path) -> list[str]:
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
    """Keep of the DICOM files of one series that with the most px; others as they are."""
    largest: dict[str, tuple[int, Path]] = {}
    kept = []
    for path in paths:
        series = dicom_series(path) if path.suffix.lower() == ".dcm" else None
        if series is None:
            kept.append(path)
        elif series[0] not in largest or series[1] > largest[series[0]][0]:
            largest[series[0]] = series[1], path
    return sorted([*kept, *(path for _, path in largest.values())])


_LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"UC", b"UN", b"UR", b"UT"}
_SERIES, _COLUMNS, _ROWS = (0x0020, 0x000E), (0x0048, 0x0006), (0x0048, 0x0007)


def dicom_series(path: Path) -> tuple[str, int] | None:
    """Read a DICOM file's SeriesInstanceUID and the px of its whole matrix, from its header.

    Args:
        path: the file.

    Returns:
        The two, or None where it is no slide in explicit little endian, the form that slides have.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(1 << 20)
    except OSError:
        return None
    if data[128:132] != b"DICM":
        return None
    found: dict[tuple[int, int], bytes] = {}
    at, depth = 132, 0
    try:
        while len(found) < 3:
            group, element = struct.unpack_from("<HH", data, at)
            if group == 0xFFFE:  # items of a sequence and their ends
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
                found[group, element] = data[start : start + length]
            at = start + length
        sides = [struct.unpack("<I", found[tag])[0] for tag in (_COLUMNS, _ROWS)]
    except struct.error:  # the data end
        return None
    return found[_SERIES].decode("ascii", "replace").strip("\0 "), sides[0] * sides[1]
