"""Open a slide: the reader is chosen by the content of the file, not by its name."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from ..errors import SlideError
from .library_errors import error_text
from .slide import Slide

# Errors of a name that no file can have.
_BAD_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)

READERS = ("libjpeg", "cucim", "openslide", "tifffile", "pillow")


def open_slide(
    path: str | os.PathLike[str], *, reader: str = "auto", image: int | None = None
) -> Slide:
    """Open a slide or photograph with the fastest reader that reads it correctly.

    The content of the file decides, not its name: libjpeg-turbo for tiled JPEG whose damage a scan
    can find (cuCIM where the C++ of motet was not built), OpenSlide for the formats of scanners and
    for DICOM, tifffile for other TIFF, Pillow for PNG and JPEG.

    Args:
        path: the file; for a DICOM series any one of its files, for a MIRAX slide the .mrxs file.
        reader: "auto", or "libjpeg", "cucim", "openslide", "tifffile" or "pillow" to use only this
            one. cuCIM can decode on a GPU.
        image: number of the image that is the slide, from 1, if a TIFF holds several slides.

    Returns:
        The open slide, which is a context manager.

    Raises:
        SlideError: its reason is "missing", "unreadable", "unsupported", "no-reader", "too-large",
            or "several" if `image` is needed.

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
    if image not in (None, 1) and kind != "tiff":
        raise SlideError(path, "unsupported", f"expected image 1, its only one, got {image}")
    if kind in ("png", "jpeg"):
        if reader not in ("auto", "pillow"):
            raise _wrong_reader(path, reader, f"a {kind.upper()} image")
        from .photo import PhotoSlide

        return PhotoSlide(path, kind)
    if reader == "pillow":
        raise _wrong_reader(path, reader, "a slide")
    if kind == "tiff":
        return _open_tiff(path, reader, image)
    if reader in ("libjpeg", "cucim", "tifffile"):
        raise _wrong_reader(path, reader, "no TIFF")
    from .openslide import OpenSlideSlide

    return OpenSlideSlide(path, None)


def _open_tiff(path: Path, reader: str, image: int | None) -> Slide:
    """Choose among the readers of TIFF. `TiffFile` checks the file before a C library reads it."""
    from .cucim import CuCimSlide, cucim_obstacle, has_cucim
    from .jpeg_tiles import JpegSlide, jpeg_obstacle
    from .openslide import OpenSlideSlide, has_openslide
    from .tiff import TiffFile, TiffSlide

    tiff = TiffFile(path, image)
    try:
        of_jpeg_tiles = [("libjpeg", JpegSlide, jpeg_obstacle, True),
                         ("cucim", CuCimSlide, cucim_obstacle, has_cucim())]  # fmt: skip
        for name, slide_class, obstacle_of, is_installed in of_jpeg_tiles:
            if reader == name:
                if obstacle := obstacle_of(tiff):
                    raise _wrong_reader(path, reader, obstacle)
                return slide_class(path, tiff)
            if reader == "auto" and is_installed and not obstacle_of(tiff):
                try:
                    return slide_class(path, tiff)
                except SlideError:
                    pass  # the next one reads the same tiles, more slowly
        if reader == "openslide" or (reader == "auto" and tiff.needs_openslide):
            return OpenSlideSlide(path, tiff)
        if reader == "auto" and has_openslide() and (tiff.prefers_openslide or tiff.refusal):
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
    """Return the kind of a file by its first bytes: "png", "jpeg", "tiff" or "other"."""
    try:
        mode = os.stat(path).st_mode
        head = b""
        if stat.S_ISREG(mode):  # opening a pipe would wait for a writer
            with open(path, "rb") as file:
                head = file.read(16)
    except (FileNotFoundError, NotADirectoryError):
        raise SlideError(path, "missing", "no such file") from None
    except (PermissionError, ValueError) as error:  # ValueError: a null character in the name
        raise SlideError(path, "unreadable", error_text(error)) from None
    except OSError as error:
        if error.errno in _BAD_NAME:
            raise SlideError(path, "missing", error_text(error)) from None
        raise
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise SlideError(path, "unreadable", f"expected a file, got {kind}")
    if not head:
        raise SlideError(path, "unreadable", "the file is empty")
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        # The .mrxs file of a MIRAX slide is a small JPEG, beside a folder of the same name.
        return "other" if (path.with_suffix("") / "Slidedat.ini").is_file() else "jpeg"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tiff"
    return "other"


def _wrong_reader(path: Path, reader: str, reason: str) -> SlideError:
    message = f"{reader} does not read it: {reason}; leave reader='auto'"
    return SlideError(path, "unsupported", message)
