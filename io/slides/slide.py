"""The base class of all readers of slides: levels, regions, thumbnail, damage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import index
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import SlideError
from .levels import Level, Mpp, Pixels, mean_mpp
from .library_errors import DAMAGE, error_text
from .thumbnails import thumbnail


class ScannedLevel(Protocol):
    """A level whose damaged tiles can be found by a scan of their bytes; `TiffLevel` is one."""

    def hit(self, left: int, top: int, right: int, bottom: int) -> bool: ...
    def damaged_tiles(self) -> NDArray[np.int64]: ...


class ScannedFile(Protocol):
    """The structure of a file, as far as a slide reads it; `tiff.TiffFile` is one."""

    @property
    def levels(self) -> Sequence[ScannedLevel]: ...
    def close(self) -> None: ...


class Slide(ABC):
    """An open image of one or more levels, of any format; returned by `open_slide`.

    Args:
        path: the file.
        reader: "libjpeg", "cucim", "openslide", "tifffile" or "pillow".
        vendor: name of the format as OpenSlide has it ("aperio", "generic-tiff", ...), "png" or
            "jpeg".
        levels: of the pyramid, finest first.
        tile_px: (width, height) of the file's tiles at level 0; None if the file is not tiled.
        mpp_axes: micrometres per level-0 px by the file, along x and along y; None if not known.
            `mpp` is their mean, or None if they differ by more than 2 %.
        properties: further properties by the file.
        tiff: the structure of the file, if it is a TIFF whose tiles can be scanned for damage.
        image: which image of a TIFF is the slide: `page`, from 0; `name`; `number`, from 1, of
            `slides`; `associated`, images that are no slides; `missing_tiles`, of level 0, which
            have no bytes, if there are any. Empty for other formats.
        bounds: the part of level 0 that was scanned, (x, y, width, height); None if all of it was.

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
        mpp_axes: Mpp | None,
        properties: dict[str, str],
        tiff: ScannedFile | None = None,
        image: dict[str, Any] | None = None,
        bounds: tuple[int, int, int, int] | None = None,
    ) -> None:
        self.path, self.reader, self.vendor = path, reader, vendor
        self.levels, self.tile_px = levels, tile_px
        self.mpp_axes, self.mpp = mpp_axes, mean_mpp(mpp_axes)
        self.properties, self.image, self.bounds = properties, image or {}, bounds
        self._tiff = tiff

    @abstractmethod
    def _pixels(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """Read a region inside of the level, RGB over white; raise one of DAMAGE if it fails."""

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """Read a region of a level.

        Args:
            level: index of the level.
            x: left edge, in px of the level; may be negative or beyond the level.
            y: upper edge, in px of the level.
            width: in px of the level.
            height: in px of the level.

        Returns:
            uint8 [height, width, 3], RGB; white outside of the slide and where it is transparent.
            A new array, which the caller may change.

        Raises:
            SlideError: "damaged", if the pixels cannot be decoded. Other regions can still be read.

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
        if right <= left or bottom <= top:  # outside of the level
            return np.full((height, width, 3), 255, np.uint8)
        if self._hits_damage(level, left, top, right, bottom):
            why = "the bytes of its tiles are damaged"
            raise self._damage_error(level, x, y, width, height, why)
        try:
            pixels = self._pixels(level, left, top, right - left, bottom - top)
        except SlideError:
            raise
        except DAMAGE as error:
            raise self._damage_error(level, x, y, width, height, error_text(error)) from error
        if pixels.shape[:2] == (height, width):
            return pixels
        out = np.full((height, width, 3), 255, np.uint8)
        out[top - y : bottom - y, left - x : right - x] = pixels
        return out

    def read_many(
        self, level: int, corners: NDArray[np.int64], width: int, height: int, *, workers: int = 1
    ) -> Iterator[Pixels | SlideError]:
        """Read regions of the same size, in order.

        Args:
            level: index of the level.
            corners: int64 [n, 2], upper left corners (x, y) in px of the level.
            width: in px of the level.
            height: in px of the level.
            workers: threads that decode. At most 2 regions per thread are decoded ahead.

        Yields:
            For each corner uint8 [height, width, 3], valid until the next one is yielded (copy it
            to keep it), or a SlideError if this region cannot be decoded.

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

        def read_region(corner: list[int]) -> Pixels | SlideError:
            try:
                return self.read(level, corner[0], corner[1], width, height)
            except SlideError as error:
                return error

        places = check_corners(corners).tolist()
        if workers <= 1:
            yield from map(read_region, places)
            return
        with ThreadPoolExecutor(workers) as pool:
            futures = deque(pool.submit(read_region, place) for place in places[: 2 * workers])
            try:
                for place in places[2 * workers :]:
                    yield futures.popleft().result()
                    futures.append(pool.submit(read_region, place))
                while futures:
                    yield futures.popleft().result()
            finally:
                for future in futures:
                    future.cancel()

    def read_into(
        self, level: int, corners: NDArray[np.int64], out: Sequence[Pixels]
    ) -> list[SlideError | None]:
        """Read regions into arrays of the caller, such as parts of a batch.

        Args:
            level: index of the level.
            corners: int64 [n, 2], upper left corners (x, y) in px of the level.
            out: n arrays uint8 [height, width, 3], each as large as its region.

        Returns:
            For each region None, or a SlideError if it cannot be decoded; its array then has any
            content.

        Example:
            >>> import numpy as np
            >>> from PIL import Image
            >>> Image.new("RGB", (300, 200), "pink").save("skin.png")
            >>> batch = np.empty((2, 64, 64, 3), np.uint8)
            >>> with motet.io.open_slide("skin.png") as slide:
            ...     slide.read_into(0, np.array([[0, 0], [64, 0]]), list(batch))
            [None, None]
            >>> batch[1, 0, 0].tolist()
            [255, 192, 203]
        """
        errors: list[SlideError | None] = []
        for (x, y), pixels in zip(check_corners(corners).tolist(), out, strict=True):
            try:
                pixels[:] = self.read(level, x, y, pixels.shape[1], pixels.shape[0])
                errors.append(None)
            except SlideError as error:
                errors.append(error)
        return errors

    def damaged(self, level: int) -> NDArray[np.int64]:
        """Return the damaged tiles of the file, found by a scan of their bytes (once per level).

        Only TIFF files are scanned (not NDPI). Other damage is found when the pixels are read.

        Args:
            level: index of the level.

        Returns:
            x, y, width, height of each tile, int64 [k, 4], in pixels of the level.
        """
        level = self._level(level)
        if self._tiff is None:
            return np.zeros((0, 4), np.int64)
        return self._tiff.levels[level].damaged_tiles()

    def thumbnail(self, longest_px: int = 2048) -> Pixels:
        """Return the whole slide as a small image, averaged from the coarsest level that is larger.

        Args:
            longest_px: px of the longer side; a smaller slide is not enlarged.

        Returns:
            uint8 [h, w, 3], RGB; white where the file is damaged.

        Raises:
            SlideError: "damaged", if no part of the slide can be read.
        """
        return thumbnail(self.levels, self.read_many, longest_px, self.tile_px)

    def close(self) -> None:
        """Close the file. A further call does nothing; reading afterwards is undefined."""
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
        mpp = self.mpp_axes if self.mpp is None else self.mpp
        return (
            f"Slide({self.path.name!r}, {sides.width} x {sides.height} px, "
            f"{len(self.levels)} levels, mpp={mpp}, {self.vendor}, {self.reader})"
        )

    def _level(self, level: int) -> int:
        level = index(level)
        if not 0 <= level < len(self.levels):
            raise ValueError(f"level: expected 0 to {len(self.levels) - 1}, got {level}")
        return level

    def _hits_damage(self, level: int, left: int, top: int, right: int, bottom: int) -> bool:
        return self._tiff is not None and self._tiff.levels[level].hit(left, top, right, bottom)

    def _damage_error(
        self, level: int, x: int, y: int, width: int, height: int, why: str
    ) -> SlideError:
        region = f"{width} x {height} px at ({x}, {y}) of level {level}"
        return SlideError(self.path, "damaged", f"{region}: {why}")


def check_sides(width: int, height: int) -> None:
    """Check the sides of a region."""
    if width < 1 or height < 1:
        raise ValueError(f"width and height: expected at least 1, got {width} and {height}")


def check_corners(corners: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return corners as int64 [n, 2]; raise ValueError unless they are integers [n, 2]."""
    array = np.asarray(corners)
    if array.ndim != 2 or array.shape[1] != 2 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(
            f"corners: expected integers [n, 2], got {array.dtype} {list(array.shape)}"
        )
    return array.astype(np.int64, copy=False)
