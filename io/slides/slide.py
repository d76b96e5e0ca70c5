"""Open slides: one interface for all readers, chosen by what the file holds, not by its name."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, isfinite
from operator import index
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import SlideError

if TYPE_CHECKING:
    from .tiff import TiffFile

Pixels = NDArray[np.uint8]

# What is sane. Beyond it: SlideError "too-large", before any memory is taken for it.
MOST_SIDE_PX = 2_000_000  # of a slide
MOST_TILES = 1 << 24  # of a level
MOST_TILE_BYTES = 1 << 29  # of a tile or strip, decoded
MOST_PHOTO_PX = 100_000_000  # of a PNG or JPEG, which is held whole: 700 MB while it is read
MOST_LEVELS = 64

# What libraries raise on files that are damaged or made to harm.
DAMAGE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, NotImplementedError,
    OSError, RuntimeError, SyntaxError, TypeError, ValueError, struct.error,
)  # fmt: skip

# Names that no file can have.
_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)

READERS = ("cucim", "openslide", "tifffile", "pillow")


@dataclass(frozen=True)
class Level:
    """One resolution of a slide: its sides in px, and level-0 px per px of this level."""

    width: int
    height: int
    downsample: float


class Slide(ABC):
    """Read an image of one or more levels, in whichever format; `open_slide` makes them.

    Args:
        path: the file.
        reader: "cucim", "openslide", "tifffile" or "pillow".
        vendor: who wrote it, in OpenSlide's words ("aperio", "generic-tiff", ...), "png" or "jpeg".
        levels: of the pyramid, finest first.
        tile_px: (width, height) of the file's own tiles at level 0; None where it is not tiled.
        mpp: micrometres per level-0 px, mean of both axes, as the file says; None: not known.
        properties: what else the file says.
        tiff: the file's structure, if it is a TIFF whose tiles can be scanned for damage.

    Example:
        >>> from PIL import Image
        >>> Image.new("RGB", (300, 200), "pink").save("skin.png")
        >>> with motet.io.open_slide("skin.png") as slide:
        ...     slide.levels, slide.mpp, slide.read(0, 200, 0, 256, 256).shape
        ((Level(width=300, height=200, downsample=1.0),), None, (256, 256, 3))
    """

    def __init__(
        self,
        path: Path,
        reader: str,
        vendor: str,
        levels: tuple[Level, ...],
        tile_px: tuple[int, int] | None,
        mpp: float | None,
        properties: dict[str, str],
        tiff: TiffFile | None = None,
    ) -> None:
        self.path, self.reader, self.vendor = path, reader, vendor
        self.levels, self.tile_px, self.mpp = levels, tile_px, mpp
        self.properties = properties
        self._tiff = tiff

    @abstractmethod
    def _pixels(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """Read a region that lies within the level, RGB over white; raise one of DAMAGE."""

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """Read a region of a level.

        Args:
            level: which.
            x: left edge, in px of that level; may be negative or beyond.
            y: upper edge.
            width: in px of that level.
            height: in px of that level.

        Returns:
            uint8 [height, width, 3], RGB; white outside the slide and where it is transparent. The
            caller's own.

        Raises:
            SlideError: "damaged", where its pixels cannot be decoded. Other reads still work.

        Example:
            >>> from PIL import Image
            >>> Image.new("RGB", (300, 200), "pink").save("skin.png")
            >>> with motet.io.open_slide("skin.png") as slide:
            ...     slide.read(0, 298, 0, 4, 1).tolist()
            [[[255, 192, 203], [255, 192, 203], [255, 255, 255], [255, 255, 255]]]
        """
        level = self._level(level)
        x, y, width, height = index(x), index(y), index(width), index(height)
        check_sides(width, height)
        sides = self.levels[level]
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, sides.width), min(y + height, sides.height)
        inside = right > left and bottom > top
        if not inside:
            return np.full((height, width, 3), 255, np.uint8)
        if self._hits_damage(level, left, top, right, bottom):
            raise self._damaged(level, x, y, width, height, "the bytes of its tiles are damaged")
        try:
            pixels = self._pixels(level, left, top, right - left, bottom - top)
        except SlideError:
            raise
        except DAMAGE as error:
            raise self._damaged(level, x, y, width, height, _said(error)) from error
        if pixels.shape[:2] == (height, width):
            return pixels
        out = np.full((height, width, 3), 255, np.uint8)
        out[top - y : bottom - y, left - x : right - x] = pixels
        return out

    def read_many(
        self, level: int, corners: NDArray[np.int64], width: int, height: int, *, workers: int = 1
    ) -> Iterator[Pixels | SlideError]:
        """Read regions of one size, in order.

        Args:
            level: which.
            corners: int64 [n, 2], upper left corners (x, y) in px of that level.
            width: in px of that level.
            height: in px of that level.
            workers: threads that decode; what is decoded ahead is bounded.

        Yields:
            Per corner uint8 [height, width, 3], valid until the next is asked for (copy it to keep
            it), or the SlideError of the region that cannot be decoded; the others go on.

        Example:
            >>> import numpy as np
            >>> from PIL import Image
            >>> Image.new("RGB", (300, 200), "pink").save("skin.png")
            >>> with motet.io.open_slide("skin.png") as slide:
            ...     corners = np.array([[0, 0], [256, 0]])
            ...     [tile.mean().round(1).item() for tile in slide.read_many(0, corners, 256, 256)]
            [225.1, 249.9]
        """
        level = self._level(level)

        def one(corner: list[int]) -> Pixels | SlideError:
            try:
                return self.read(level, corner[0], corner[1], width, height)
            except SlideError as error:
                return error

        places = whole_corners(corners).tolist()
        if workers <= 1:
            yield from map(one, places)
            return
        with ThreadPoolExecutor(workers) as pool:
            ahead = deque(pool.submit(one, place) for place in places[: 2 * workers])
            try:
                for place in places[2 * workers :]:
                    yield ahead.popleft().result()
                    ahead.append(pool.submit(one, place))
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def damaged(self, level: int) -> NDArray[np.int64]:
        """Say which of the file's tiles are damaged, from a scan of their bytes (once per level).

        Holds for TIFF (not NDPI); other damage shows when its pixels are read.

        Args:
            level: which.

        Returns:
            int64 [k, 4]: x, y, width, height of each in px of that level, within its bounds.
        """
        level = self._level(level)
        if self._tiff is None:
            return np.zeros((0, 4), np.int64)
        return self._tiff.levels[level].damaged_tiles()

    def thumbnail(self, longest_px: int = 2048) -> Pixels:
        """Return the whole slide, averaged from the coarsest level that is at least that large.

        Args:
            longest_px: of the longer side; a smaller slide is not enlarged.

        Returns:
            uint8 [h, w, 3], RGB; white where the file is damaged.

        Raises:
            SlideError: "damaged", if nothing of it can be read.
        """
        from .thumbnails import thumbnail

        return thumbnail(self, longest_px)

    def close(self) -> None:
        """Let go of the file; reads afterwards are undefined. May be called again."""
        if self._tiff is not None:
            self._tiff.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        sides = self.levels[0]
        return (
            f"Slide({self.path.name!r}, {sides.width} x {sides.height} px, "
            f"{len(self.levels)} levels, mpp={self.mpp}, {self.vendor}, {self.reader})"
        )

    def _level(self, level: int) -> int:
        level = index(level)
        if not 0 <= level < len(self.levels):
            raise ValueError(f"level: expected 0 to {len(self.levels) - 1}, got {level}")
        return level

    def _hits_damage(self, level: int, left: int, top: int, right: int, bottom: int) -> bool:
        return self._tiff is not None and self._tiff.levels[level].hit(left, top, right, bottom)

    def _damaged(self, level: int, x: int, y: int, width: int, height: int, why: str) -> SlideError:
        where = f"{width} x {height} px at ({x}, {y}) of level {level}"
        return SlideError(self.path, "damaged", f"{where}: {why}")


def open_slide(path: str | os.PathLike[str], *, reader: str = "auto") -> Slide:
    """Open a slide or photograph with the reader that is right and fastest for it.

    What the file holds decides, not its name: cuCIM for tiled JPEG whose tiles a scan can prove,
    OpenSlide for scanners' own formats and DICOM, tifffile for other TIFF, Pillow for PNG and JPEG.

    Args:
        path: the file; of a DICOM series or a MIRAX slide, one of its files or the .mrxs.
        reader: "cucim", "openslide", "tifffile" or "pillow" to insist on one, else "auto".

    Returns:
        The open slide, which is a context manager.

    Raises:
        SlideError: with its reason: "missing", "unreadable", "unsupported", "no-reader" or
            "too-large".

    Example:
        >>> from PIL import Image
        >>> Image.new("RGB", (300, 200), "pink").save("skin.png")
        >>> slide = motet.io.open_slide("skin.png")
        >>> slide.reader, slide.vendor, slide.thumbnail(30).shape
        ('pillow', 'png', (20, 30, 3))
        >>> slide.close()
    """
    path = Path(path)
    if reader not in ("auto", *READERS):
        raise ValueError(f"reader: expected auto, {', '.join(READERS)}, got {reader!r}")
    kind = _probe(path)
    if kind in ("png", "jpeg"):
        if reader not in ("auto", "pillow"):
            raise _refused(path, reader, f"a {kind.upper()} image")
        from .photo import PhotoSlide

        return PhotoSlide(path, kind)
    if reader == "pillow":
        raise _refused(path, reader, "a slide")
    if kind == "tiff":
        return _open_tiff(path, reader)
    if reader in ("cucim", "tifffile"):
        raise _refused(path, reader, "no TIFF")
    from .openslide import OpenSlideSlide

    return OpenSlideSlide(path, None)


def _open_tiff(path: Path, reader: str) -> Slide:
    """Choose among the readers of TIFF; the file has been found sane before C code sees it."""
    from .cucim import CuCimSlide, has_cucim, why_not
    from .openslide import OpenSlideSlide, has_openslide
    from .tiff import TiffFile, TiffSlide

    tiff = TiffFile(path)
    try:
        if reader == "cucim":
            if why := why_not(tiff):
                raise _refused(path, reader, why)
            return CuCimSlide(path, tiff)
        if reader == "auto" and has_cucim() and not why_not(tiff):
            try:
                return CuCimSlide(path, tiff)
            except SlideError:
                pass  # tifffile reads the same tiles
        if reader == "openslide" or (reader == "auto" and tiff.needs_openslide):
            return OpenSlideSlide(path, tiff)
        if reader == "auto" and has_openslide() and (tiff.better_openslide or tiff.refusal):
            try:
                return OpenSlideSlide(path, tiff)
            except SlideError:
                if tiff.refusal:
                    raise tiff.refusal from None
        return TiffSlide(path, tiff)
    except BaseException:
        tiff.close()
        raise


def _probe(path: Path) -> str:
    """Say what a file is by its first bytes: "png", "jpeg", "tiff" or "other"."""
    try:
        mode = os.stat(path).st_mode
        head = b""
        if stat.S_ISREG(mode):  # a pipe would wait for who writes
            with open(path, "rb") as file:
                head = file.read(16)
    except (FileNotFoundError, NotADirectoryError):
        raise SlideError(path, "missing", "no such file") from None
    except (PermissionError, ValueError) as error:  # ValueError: a null character in the name
        raise SlideError(path, "unreadable", _said(error)) from None
    except OSError as error:
        if error.errno in _NAMES:
            raise SlideError(path, "missing", _said(error)) from None
        raise
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise SlideError(path, "unreadable", f"expected a file, got {what}")
    if not head:
        raise SlideError(path, "unreadable", "the file is empty")
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        # The .mrxs of a MIRAX slide is a small JPEG beside a folder of its name.
        return "other" if (path.with_suffix("") / "Slidedat.ini").is_file() else "jpeg"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tiff"
    return "other"


def _refused(path: Path, reader: str, what: str) -> SlideError:
    message = f"{reader} does not read it: {what}; leave reader='auto'"
    return SlideError(path, "unsupported", message)


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


def make_levels(path: Path, sides: list[tuple[int, int]]) -> tuple[Level, ...]:
    """Make levels from their sides (width, height), finest first; refuse what is not sane."""
    if not sides or any(side < 1 for pair in sides for side in pair):
        raise SlideError(path, "unreadable", f"expected an image, got sides {sides[:1]}")
    if max(sides[0]) > MOST_SIDE_PX:
        raise SlideError(
            path, "too-large", f"{sides[0][0]} x {sides[0][1]} px; at most {MOST_SIDE_PX} a side"
        )
    return tuple(Level(*pair, downsample=_downsample(sides[0], pair)) for pair in sides)


def _downsample(base: tuple[int, int], sides: tuple[int, int]) -> float:
    """Return the whole number that level 0 was divided by, if one was, else the mean ratio."""
    ratios = [whole / side for whole, side in zip(base, sides, strict=True)]
    mean = sum(ratios) / 2

    def divides(k: int) -> bool:
        return all(
            side in (whole // k, ceil(whole / k)) for whole, side in zip(base, sides, strict=True)
        )

    low, high = int(min(ratios) * 0.5) or 1, int(max(ratios) * 2) + 1
    powers = [2**n for n in range(22) if low <= 2**n <= high and divides(2**n)]
    # Of the small levels several numbers could be right: scanners use powers of two.
    near = powers or [k for k in (int(mean), int(mean) + 1) if k >= 1 and divides(k)]
    return float(min(near, key=lambda k: abs(k - mean))) if near else mean


def sane_mpp(*values: float) -> float | None:
    """Return the mean of resolutions in micrometres per px, None if one cannot be."""
    if not values or not all(isfinite(value) and 1e-3 < value < 1e3 for value in values):
        return None
    return sum(values) / len(values)


def check_sides(width: int, height: int) -> None:
    """Check the sides of a region."""
    if width < 1 or height < 1:
        raise ValueError(f"width and height: expected at least 1, got {width} and {height}")


def whole_corners(corners: NDArray[np.int64]) -> NDArray[np.int64]:
    """Check corners: whole numbers [n, 2]."""
    array = np.asarray(corners)
    if array.ndim != 2 or array.shape[1] != 2 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(
            f"corners: expected whole numbers [n, 2], got {array.dtype} {list(array.shape)}"
        )
    return array.astype(np.int64, copy=False)


def _said(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


@contextmanager
def opening(path: Path, *others: type[Exception]) -> Iterator[None]:
    """Turn what a library raises on opening, DAMAGE or others, into SlideError "unreadable"."""
    try:
        yield
    except SlideError:
        raise
    except (*DAMAGE, *others) as error:
        raise SlideError(path, "unreadable", _said(error)) from error
