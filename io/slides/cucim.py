"""The reader by cuCIM, for tiled JPEG: it can decode on a GPU.

cuCIM does not report tiles that it cannot decode, so it reads only files whose damage the scan of
integrity.py finds.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import SlideError
from .jpeg_tiles import jpeg_obstacle, set_tile_size
from .levels import Pixels
from .library_errors import DAMAGE, opening
from .slide import Slide, check_corners, check_sides
from .tiff import TiffFile

_log = logging.getLogger(__name__)
_STDERR = threading.Lock()  # held while stderr is a file: it is one for all threads

BATCH = 16  # regions per call
BATCH_BYTES = 24 << 20  # most bytes of a batch; cuCIM holds about three batches at a time


def has_cucim() -> bool:
    """Return True if cuCIM is installed, without importing it."""
    return importlib.util.find_spec("cucim") is not None


def cucim_obstacle(tiff: TiffFile) -> str:
    """Return why cuCIM must not read a file; empty if it may.

    For a tile that it cannot decode, cuCIM returns the pixels of another one. So it reads only
    files in which the scan finds such tiles.
    """
    if not tiff.is_first:
        return "the slide is not the first image of the file"
    if tiff.vendor == "philips":
        return "its levels are padded to full tiles, and where cuCIM places these is not known"
    return jpeg_obstacle(tiff)


def _open_image(image_class: Any, path: Path) -> Any:
    """Open a file of any name: cuCIM needs one of its suffixes in lower case, so link to it."""
    if path.suffix in (".tif", ".tiff", ".svs"):
        return image_class(str(path.absolute()))
    with TemporaryDirectory() as folder:
        link = Path(folder, "slide.tif")
        link.symlink_to(path.absolute())
        return image_class(str(link))


class CuCimSlide(Slide):
    """Read a TIFF by cuCIM, after a scan of the level's tiles for damage."""

    def __init__(self, path: Path, tiff: TiffFile) -> None:
        try:
            with _messages_to_log():
                from cucim import CuImage
        except ImportError as error:
            raise SlideError(
                path, "no-reader",
                f"cuCIM cannot be imported ({error}): pip install --no-deps cucim-cu13, with click "
                "and lazy-loader",
            ) from None  # fmt: skip
        with (
            opening(path, MemoryError),
            _messages_to_log(),
        ):  # std::bad_alloc, for damaged directories
            self._image: Any = _open_image(CuImage, path)
            resolutions = self._image.resolutions
        if list(map(tuple, resolutions["level_dimensions"])) != tiff.sides:
            raise SlideError(path, "unsupported", "cuCIM sees other levels than the file's header")
        # Level-0 px per px of each level, with which cuCIM computes.
        self._ratios = [float(ratio) for ratio in resolutions["level_downsamples"]]
        self._pages = tiff.levels
        for level in self._pages:
            set_tile_size(level)
        super().__init__(
            path, "cucim", tiff.vendor, tiff.pyramid, tiff.tile_px, tiff.mpp, tiff.properties, tiff,
            tiff.image,
        )  # fmt: skip

    def _pixels(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        corner = self._level0_corners(level, np.array([x, y])).tolist()
        return np.asarray(self._image.read_region(corner, (width, height), level))

    def _level0_corners(self, level: int, corners: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return level-0 coordinates that cuCIM converts to these corners of a level.

        cuCIM divides by the ratio in float32 and rounds down. The middle of the coordinates that
        give the corner is returned, so that the rounding of float32 does not matter.
        """
        ratio = self._ratios[level]
        return corners if ratio == 1 else np.rint((corners + 0.5) * ratio).astype(np.int64)

    def read_many(
        self,
        level: int,
        corners: NDArray[np.int64],
        width: int,
        height: int,
        *,
        workers: int = 1,
        device: str = "cpu",
    ) -> Iterator[Any]:
        """Read regions of the same size; see Slide.read_many.

        With device="cuda" they are decoded on the GPU in batches, and are torch tensors in cuCIM's
        memory. Regions that reach beyond the level or touch a damaged tile are read one by one.
        """
        if device == "cpu":
            yield from super().read_many(level, corners, width, height, workers=workers)
            return
        level = self._level(level)
        check_sides(width, height)
        corners = check_corners(corners)
        sides = self.levels[level]
        x, y = corners[:, 0], corners[:, 1]
        inside = (x >= 0) & (y >= 0) & (x <= sides.width - width) & (y <= sides.height - height)
        in_batches = inside & ~self._touches_damage(level, corners, inside, width, height)
        batched = self._read_batches(
            level, corners[in_batches], width, height, max(workers, 1), device
        )
        if in_batches.all():
            yield from batched
            return
        for is_batched, corner in zip(in_batches.tolist(), corners.tolist(), strict=True):
            if is_batched:
                yield next(batched)
            else:
                yield self._read_one(level, corner, width, height, device)

    def _read_batches(
        self,
        level: int,
        corners: NDArray[np.int64],
        width: int,
        height: int,
        workers: int,
        device: str,
    ) -> Iterator[Any]:
        done = 0
        batch = max(workers, min(BATCH, BATCH_BYTES // (3 * width * height)))
        if len(corners):
            try:
                with _messages_to_log():  # the first read prepares the GPU
                    batches = self._image.read_region(
                        self._level0_corners(level, corners).tolist(),  # int64 arrays are refused
                        (width, height), level, batch_size=batch, num_workers=workers,
                        device=device,
                    )  # fmt: skip
                    first = next(batches)
                for images in chain([first], batches):
                    regions = _tensor(images, device)
                    yield from regions
                    done += len(regions)
            except DAMAGE:
                pass  # the error does not name the region: read the remaining ones one by one
        for corner in corners[done:].tolist():
            yield self._read_one(level, corner, width, height, device)

    def _read_one(self, level: int, corner: list[int], width: int, height: int, device: str) -> Any:
        try:
            return _tensor(self.read(level, corner[0], corner[1], width, height), device)
        except SlideError as error:
            return error

    def _touches_damage(
        self, level: int, corners: NDArray[np.int64], inside: NDArray[np.bool_], width: int,
        height: int,
    ) -> NDArray[np.bool_]:  # fmt: skip
        """Return bool [n]: True for regions that touch a damaged tile, of those that lie inside.

        From a summed-area table: the number of damaged tiles in a rectangle is a sum of four.
        """
        page = self._pages[level]
        damage = page.damage()
        touches = np.zeros(len(corners), bool)
        if damage is not None:
            sums = np.pad(damage.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
            low = corners[inside] // page.tile
            high = (corners[inside] + (width - 1, height - 1)) // page.tile + 1
            touches[inside] = (
                sums[high[:, 1], high[:, 0]] - sums[low[:, 1], high[:, 0]]
                - sums[high[:, 1], low[:, 0]] + sums[low[:, 1], low[:, 0]]
            ) > 0  # fmt: skip
        return touches

    def close(self) -> None:
        """Close the file."""
        self._image.close()
        super().close()


@contextmanager
def _messages_to_log() -> Iterator[None]:
    """Give what C++ prints to stderr, such as errors of cuFile, to the log of this module."""
    with _STDERR, TemporaryFile() as file:
        sys.stderr.flush()
        terminal = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            file.seek(0)
            for line in file.read().decode(errors="replace").splitlines():
                _log.info("cuCIM: %s", line)


def _tensor(image: Any, device: str) -> Any:
    """Return a tensor on a device, without a copy if the image is there already.

    By DLPack, or CUDA's array interface.
    """
    import torch

    if hasattr(image, "__dlpack__") and not isinstance(image, np.ndarray):
        return torch.from_dlpack(image)
    return torch.as_tensor(image, device=device)
