"""Read TIFF: the structure of the file, and its pixels tile by tile with tifffile.

The structure is read here for the other readers too, so that no C library reads a file before its
header has been checked.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import ceil, log2
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import SlideError
from .codestreams import Header, Tiles, parse_jpeg
from .colours import Colours
from .integrity import find_damaged
from .levels import MAX_TILE_BYTES, MAX_TILES, Pixels, make_levels
from .library_errors import DAMAGE, opening
from .slide import Slide
from .tiff_images import SCANNERS, FileImages, SlideImage, find_images
from .tiff_metadata import are_rgb, mpp_of, name_of, planes_of, properties_of, vendor_of
from .tiff_planes import decoder_of, find_channels, pages_of_size

CACHE_BYTES = 32 << 20  # of decoded tiles: patches of a row read the same strips several times

MAX_RATIO = 32  # of the sides of two pages that are compared
SAME = 0.8  # least correlation of two pages that show the same picture; levels have 0.95 and more

CODINGS = {
    1: "none", 5: "lzw", 7: "jpeg", 8: "deflate", 32946: "deflate", 32773: "packbits",
    33003: "jpeg2000", 33005: "jpeg2000", 34712: "jpeg2000",
}  # fmt: skip
JPEG2000_YCBCR = 33003

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # else it prints to stderr


@dataclass(eq=False)
class TiffLevel:
    """One page of the pyramid: where its tiles lie, how they are decoded, which are damaged."""

    width: int
    height: int
    tile: tuple[int, int]  # (width, height); of strips: the image's width, and rows per strip
    tiled: bool
    in_place: bool  # one block of uncompressed pixels: rows are read without reading a strip
    tiles: Tiles
    colours: Colours
    decode: Callable[[bytes, int], Any]
    file: int
    planes: int  # each colour has tiles of its own: first all of red, then green, then blue; else 1
    _damage: NDArray[np.bool_] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def columns(self) -> int:
        return ceil(self.width / self.tile[0])

    @property
    def rows(self) -> int:
        return ceil(self.height / self.tile[1])

    def damage(self) -> NDArray[np.bool_] | None:
        """Return bool [rows, columns], True for damaged tiles; None if no tile is damaged.

        The tiles are scanned at the first call.
        """
        with self._lock:
            damage = self._damage
            if damage is None:
                damaged = find_damaged(self.file, self.tiles)
                planes = damaged.reshape(self.planes, self.rows, self.columns)
                damage = self._damage = np.asarray(planes.any(0))
        return damage if damage.any() else None

    def hit(self, left: int, top: int, right: int, bottom: int) -> bool:
        """Return True if a region inside of the level touches a damaged tile."""
        damage = self.damage()
        if damage is None:
            return False
        w, h = self.tile
        touched = damage[top // h : (bottom - 1) // h + 1, left // w : (right - 1) // w + 1]
        return bool(touched.any())

    def damaged_tiles(self) -> NDArray[np.int64]:
        """Return the damaged tiles, int64 [k, 4]: x, y, width, height."""
        damage = self.damage()
        if damage is None:
            return np.zeros((0, 4), np.int64)
        rows, columns = np.nonzero(damage)
        x, y = columns * self.tile[0], rows * self.tile[1]
        width = np.minimum(self.tile[0], self.width - x)
        return np.stack([x, y, width, np.minimum(self.tile[1], self.height - y)], 1)

    def read(self, number: int) -> Pixels:
        """Decode one tile, RGB over white, in its full size or cut at the image's edge."""
        places = range(number, len(self.tiles.counts), self.rows * self.columns)
        if not self.tiles.counts[places].any():
            return np.full((self.tile[1], self.tile[0], 3), 255, np.uint8)
        planes = [self._decode_tile(place) for place in places]
        return self.colours.rgb(planes[0] if self.planes == 1 else np.concatenate(planes, 2))

    def _decode_tile(self, number: int) -> Pixels:
        """Return the samples [h, w, S] of one tile of the file."""
        count = int(self.tiles.counts[number])
        data = os.pread(self.file, count, int(self.tiles.offsets[number]))
        return self.decode(data, number)[0][0]


class TiffFile:
    """Read the structure of a TIFF slide: the pages of its pyramid, its vendor, its resolution.

    Args:
        path: a file that begins with the signature of a TIFF.
        number: of the image that is the slide, from 1; None if the file has only one.

    Raises:
        SlideError: "unreadable", "unsupported", "too-large" or "no-reader". If OpenSlide may be
            able to read the file, the error is not raised but kept as `refusal`, and `levels` is
            empty.
    """

    def __init__(self, path: Path, number: int | None = None) -> None:
        tifffile = _tifffile(path)
        self.path, self.number = path, number
        self.refusal: SlideError | None = None
        self.prefers_openslide = False
        self.file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            with opening(path), tifffile.TiffFile(path) as tiff:
                self._read(tiff)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def _read(self, tiff: Any) -> None:
        base = tiff.pages[0]
        description = base.description if isinstance(base.description, str) else ""
        self.vendor, self.needs_openslide = vendor_of(tiff, base, description)
        self.is_first = True  # the slide is the first image of the file
        self.image: dict[str, Any] = {}
        pages, text = [base], description
        channels: list[Any] = []
        if not self.needs_openslide:
            images = find_images(
                tiff, self.vendor, description, self._shows_same, file_name=self.path.name
            )
            image = images.choose(self.path, self.number)
            base, pages, self.is_first = image.page, image.levels, image.number == 0
            text = description if self.vendor in SCANNERS else image.text
            self.image = _describe_image(image, images)
            channels = find_channels(self.path, tiff, image)
        elif self.number not in (None, 1):
            raise SlideError(
                self.path, "unsupported", f"expected an image from 1 to 1, got {self.number}"
            )
        self.sides = [(int(page.imagewidth), int(page.imagelength)) for page in pages]
        self.pyramid = make_levels(self.path, self.sides)
        if self.vendor == "philips":
            # Each level has half the resolution of the one before, but its sides are padded to
            # full tiles, so their ratios are not powers of two.
            self.pyramid = tuple(
                replace(level, downsample=2.0 ** round(log2(base.imagewidth / level.width)))
                for level in self.pyramid
            )
        self.mpp = mpp_of(base, text, self.vendor)
        self.properties = properties_of(base, description)
        self.tile_px = (base.tilewidth, base.tilelength) if base.is_tiled else None
        self.levels: list[TiffLevel] = []
        if self.needs_openslide:
            self._set_refusal(f"only OpenSlide reads the format of {self.vendor}")
        elif base.compression not in CODINGS:
            self._set_refusal(f"compression {name_of(base.compression)}; {_CONVERT}")
        else:
            self._check_page(base, text)
            self.levels = [
                self._make_level(page, *pages_of_size(self.path, channels, page)) for page in pages
            ]
            if not self.levels[0].tiles.counts.any():
                raise SlideError(self.path, "unreadable", "its tiles are empty")
            if missing := int(np.count_nonzero(self.levels[0].tiles.counts == 0)):
                self.image["missing_tiles"] = missing
            # imagecodecs rounds the colours of subsampled YCbCr down, OpenSlide to the nearest.
            is_ycbcr = base.compression == JPEG2000_YCBCR
            self.prefers_openslide = is_ycbcr and not self.levels[0].colours.ycbcr

    def _set_refusal(self, why: str) -> None:
        self.refusal = SlideError(self.path, "unsupported", why)

    def _check_page(self, base: Any, text: str) -> None:
        """Raise SlideError for pixels that all readers, OpenSlide too, would read wrongly."""
        bits, samples = base.bitspersample, base.samplesperpixel
        form = int(base.photometric) if base.photometric is not None else -1
        orientation, why = base.tags.valueof(274, 1), None
        if orientation not in (0, 1):  # 0 is no valid value, and means that it was not set
            why = (
                f"orientation {name_of(orientation)} (tag 274); expected TOPLEFT: turn it with "
                "vips autorot, or, if the pixels are upright as stored, run tiffset -s 274 1 FILE"
            )
        elif bits != 8 or base.sampleformat not in (1, None):
            why = f"{bits} bits per sample; expected 8: scale them by the range of your scanner"
        elif samples > 1 and base.planarconfig != 1 and form != 2:
            why = f"{name_of(base.photometric)} in separate planes; expected RGB; {_CONVERT}"
        elif (form, samples) not in _FORMS:
            why = f"{samples} samples of {name_of(base.photometric)}; expected RGB, grey or palette"
        elif form == 6 and CODINGS[base.compression] not in ("jpeg", "jpeg2000"):
            why = f"YCbCr with compression {name_of(base.compression)}; {_CONVERT}"
        elif (planes := planes_of(text, samples)) > 1 and not (samples == 1 and are_rgb(text)):
            why = f"{planes} channels or focal planes in separate images; expected one RGB image"
            why += ", or three channels without names or named red, green and blue"
        if why:
            raise SlideError(self.path, "unsupported", why)

    def _make_level(self, page: Any, *channels: Any) -> TiffLevel:
        """Make a level from its page, or from the pages of its colours."""
        width, height = int(page.imagewidth), int(page.imagelength)
        if page.is_tiled:
            tile = int(page.tilewidth), int(page.tilelength)
        else:
            tile = width, min(int(page.rowsperstrip), height)
        if min(tile) < 1:
            raise SlideError(self.path, "unreadable", f"tiles of {tile[0]} x {tile[1]} px")
        columns, rows = ceil(width / tile[0]), ceil(height / tile[1])
        pages = (page, *channels)
        in_planes = page.samplesperpixel > 1 and page.planarconfig != 1
        planes = page.samplesperpixel if in_planes else len(pages)
        samples = 1 if in_planes else page.samplesperpixel
        raw = tile[0] * tile[1] * samples
        uncompressed = page.compression == 1 and page.predictor == 1
        in_place = bool(uncompressed and planes == 1 and not page.is_tiled and page.is_contiguous)
        if columns * rows > MAX_TILES or (raw > MAX_TILE_BYTES and not in_place):
            raise SlideError(
                self.path, "too-large", f"{columns * rows} tiles of {tile[0]} x {tile[1]} px"
            )
        offsets, counts = (
            [value for page in pages for value in getattr(page, name)]
            for name in ("dataoffsets", "databytecounts")
        )
        if not len(offsets) == len(counts) == columns * rows * planes:
            raise SlideError(
                self.path, "unreadable", f"expected {columns * rows * planes} tiles, got "
                f"{len(offsets)} and {len(counts)} lengths",
            )  # fmt: skip
        coding = CODINGS[page.compression]
        sizes = {(w, h) for w in (tile[0], width % tile[0] or tile[0])
                 for h in (tile[1], height % tile[1] or tile[1])}  # fmt: skip
        tiles = Tiles(
            np.array(offsets, np.int64), np.array(counts, np.int64), coding, frozenset(sizes), raw,
            samples, page.jpegtables or b"", sparse=self.vendor != "aperio",
        )  # fmt: skip
        form = 2 if channels else int(page.photometric)
        palette = None
        if form == 3:
            palette = (np.asarray(page.colormap) >> 8).astype(np.uint8).T.copy()
            if palette.shape != (256, 3):
                raise SlideError(self.path, "unreadable", f"palette of {list(palette.shape)}")
        is_ycbcr = page.compression == JPEG2000_YCBCR and self._is_not_subsampled(tiles)
        colours = Colours(form, 1 in (page.extrasamples or ()), palette, is_ycbcr)
        return TiffLevel(
            width, height, tile, page.is_tiled, in_place, tiles, colours, decoder_of(pages),
            self.file, planes,
        )  # fmt: skip

    def _is_not_subsampled(self, tiles: Tiles) -> bool:
        """Return True if all components of a JPEG 2000 tile have the full number of px.

        imagecodecs then leaves YCbCr as it is; if they are subsampled, it converts to RGB. The
        segment SIZ has three bytes per component from byte 42 on, of which the second and third are
        the subsampling factors.
        """
        for at in tiles.offsets[tiles.counts > 0][:1]:
            head = os.pread(self.file, 42 + 3 * tiles.samples, int(at))
            return head[:4] == b"\xff\x4f\xff\x51" and {*head[43::3], *head[44::3]} == {1}
        return False

    def _shows_same(self, base: Any, page: Any) -> bool:
        """Return True if a smaller page shows the same picture as a page.

        They are compared where the smaller one has the most bytes, which is no empty glass.
        """
        ratio = base.imagewidth / page.imagewidth
        if ratio > MAX_RATIO or base.compression not in CODINGS:
            return False
        try:
            fine, coarse = self._make_level(base), self._make_level(page)
            row, column = divmod(int(coarse.tiles.counts.argmax()), coarse.columns)
            x, y = column * coarse.tile[0], row * coarse.tile[1]
            width, height = min(128, coarse.width - x), min(128, coarse.height - y)
            small = read_tiles(coarse, TileCache(), 0, x, y, width, height)
            edges = [
                np.minimum(np.rint(ratio * np.arange(start, start + size + 1)), limit).astype(int)
                for start, size, limit in ((y, height, fine.height), (x, width, fine.width))
            ]
            top, left, bottom, right = *(edge[0] for edge in edges), *(edge[-1] for edge in edges)
            large = read_tiles(fine, TileCache(), 0, left, top, right - left, bottom - top)
        except (SlideError, *DAMAGE):
            return False
        mean = large.mean(2)
        for axis, edge in enumerate(edges):
            sums = np.add.reduceat(mean, edge[:-1] - edge[0], axis)
            mean = sums / np.maximum(np.diff(edge), 1).reshape((-1, 1) if axis == 0 else (1, -1))
        pair = np.stack([mean.ravel(), small.mean(2).ravel()])
        return bool(pair.std(1).min() > 0 and np.corrcoef(pair)[0, 1] > SAME)

    def header(self, level: TiffLevel, number: int) -> Header | None:
        """Read the JPEG header of one tile."""
        data = os.pread(
            self.file, min(int(level.tiles.counts[number]), 1 << 16),
            int(level.tiles.offsets[number]),
        )  # fmt: skip
        return parse_jpeg(data, level.tiles)


class TiffSlide(Slide):
    """Read the tiles (or strips) of a TIFF by tifffile: exact at every level."""

    def __init__(self, path: Path, tiff: TiffFile) -> None:
        if tiff.refusal:
            raise tiff.refusal
        super().__init__(
            path, "tifffile", tiff.vendor, tiff.pyramid, tiff.tile_px, tiff.mpp, tiff.properties,
            tiff, tiff.image,
        )  # fmt: skip
        self._pages, self._cache = tiff.levels, TileCache()

    def _pixels(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        return read_tiles(self._pages[level], self._cache, level, x, y, width, height)

    def close(self) -> None:
        """Close the file."""
        self._cache.clear()
        super().close()


class TileCache:
    """The tiles that were used last, up to CACHE_BYTES of decoded pixels, and at least one."""

    def __init__(self) -> None:
        self._tiles: OrderedDict[tuple[int, int], Pixels] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, level: TiffLevel, number: int, level_index: int) -> Pixels:
        """Return a tile of a level, which is decoded if it is not in the cache."""
        with self._lock:
            tile = self._tiles.get((level_index, number))
            if tile is not None:
                self._tiles.move_to_end((level_index, number))
                return tile
        tile = level.read(number)  # without the lock, so that threads decode at the same time
        with self._lock:
            if (level_index, number) not in self._tiles:
                self._tiles[level_index, number] = tile
                self._bytes += tile.nbytes
            while self._bytes > CACHE_BYTES and len(self._tiles) > 1:
                self._bytes -= self._tiles.popitem(last=False)[1].nbytes
        return tile

    def clear(self) -> None:
        with self._lock:
            self._tiles.clear()
            self._bytes = 0


def read_tiles(
    level: TiffLevel, cache: TileCache, level_index: int, x: int, y: int, width: int, height: int
) -> Pixels:
    """Read a region inside of a level from its tiles."""
    if level.in_place:
        return _read_rows(level, x, y, width, height)
    out = np.empty((height, width, 3), np.uint8)
    across, down = level.tile
    for row in range(y // down, (y + height - 1) // down + 1):
        for column in range(x // across, (x + width - 1) // across + 1):
            tile = cache.get(level, row * level.columns + column, level_index)
            left, top = column * across, row * down
            a, b = max(x, left), max(y, top)
            c, d = min(x + width, left + across), min(y + height, top + down)
            out[b - y : d - y, a - x : c - x] = tile[b - top : d - top, a - left : c - left]
    return out


def _read_rows(level: TiffLevel, x: int, y: int, width: int, height: int) -> Pixels:
    samples = level.tiles.samples
    start = int(level.tiles.offsets[0])
    out = np.empty((height, width, samples), np.uint8)
    for row in range(height):
        at = start + ((y + row) * level.width + x) * samples
        out[row] = np.frombuffer(os.pread(level.file, width * samples, at), np.uint8).reshape(
            width, samples
        )
    return level.colours.rgb(out)


_CONVERT = "convert it, for example with vips tiffsave --tile --pyramid --compression jpeg"

# (photometric, samples) that can be read: 0 white is zero, 1 black is zero, 2 RGB, 3 palette, 6
# YCbCr; with alpha or without.
_FORMS = {(0, 1), (1, 1), (1, 2), (2, 3), (2, 4), (3, 1), (6, 3)}


def _tifffile(path: Path) -> Any:
    try:
        import imagecodecs  # noqa: F401, without it tifffile decodes almost no compression
        import tifffile
    except ImportError as error:
        raise SlideError(
            path, "no-reader", f"{error.name} is not installed: pip install 'motet[wsi]'"
        ) from None
    return tifffile


def _describe_image(image: SlideImage, images: FileImages) -> dict[str, Any]:
    """Return what a store records of the image that is the slide."""
    return {
        "page": image.number,
        "name": image.name or None,
        "number": images.slides.index(image) + 1,
        "slides": len(images.slides),
        "associated": [str(other) for other in images.associated[:8]],
    }
