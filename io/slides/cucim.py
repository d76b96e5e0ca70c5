"""cuCIM: the fastest reader, for tiled JPEG only, since of nothing else it says what went wrong."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import SlideError
from .levels import Pixels
from .library_errors import DAMAGE, opening
from .slide import Slide, check_sides, whole_corners
from .tiff import TiffFile

BATCH = 16  # regions in one go: 7,259 tiles/s with two workers, batches of 64 give 6,290
BATCH_BYTES = 24 << 20  # and no more than this: cuCIM holds three batches or so


def has_cucim() -> bool:
    """Tell whether cuCIM is installed, without importing it."""
    return importlib.util.find_spec("cucim") is not None


def why_not(tiff: TiffFile) -> str:
    """Say why cuCIM is not to read a file; nothing if it may.

    Tiles that it cannot decode come back as the pixels of others, so it gets only what the scan can
    prove: tiled baseline JPEG of three 8-bit samples, no tile left out, none cut at the edges.
    """
    if tiff.refusal:
        return tiff.refusal.message
    if tiff.vendor == "philips":
        return "its levels are filled up to whole tiles, of which cuCIM's places are not known"
    for level in tiff.levels:
        tiles = level.tiles
        if not level.tiled or tiles.coding != "jpeg" or tiles.samples != 3:
            return "it is given tiled JPEG in colour alone, for which damage can be proved"
        if not (tiles.offsets.all() and tiles.counts.all()):
            return "some tiles are left out, which it makes black"
        for number in (0, len(tiles.offsets) - 1):
            header = tiff.header(level, number)  # None: damaged, as the scan will say
            if header and not header.plain:
                return "its JPEG is progressive, for which damage cannot be proved"
            if header and header.size != level.tile:
                return "its tiles are cut at the edges"
    return ""


def _opened(image: Any, path: Path) -> Any:
    """Open a file by whatever name: cuCIM goes by its ending, in lower case."""
    if path.suffix in (".tif", ".tiff", ".svs"):
        return image(str(path.absolute()))
    with TemporaryDirectory() as folder:
        link = Path(folder, "slide.tif")
        link.symlink_to(path.absolute())
        return image(str(link))


class CuCimSlide(Slide):
    """Read by cuCIM, after a scan of the level's tiles."""

    def __init__(self, path: Path, tiff: TiffFile) -> None:
        try:
            from cucim import CuImage
        except ImportError as error:
            raise SlideError(
                path, "no-reader",
                f"cuCIM cannot be imported ({error}): pip install --no-deps cucim-cu13, with click "
                "and lazy-loader",
            ) from None  # fmt: skip
        with opening(path, MemoryError):  # std::bad_alloc, of damaged directories
            self._image: Any = _opened(CuImage, path)
            found = self._image.resolutions
        if list(map(tuple, found["level_dimensions"])) != tiff.sides:
            raise SlideError(path, "unsupported", "cuCIM sees other levels than the file's header")
        # Of level-0 px per px of each level, as cuCIM computes with.
        self._ratios = [float(ratio) for ratio in found["level_downsamples"]]
        self._pages = tiff.levels
        for level in self._pages:
            level.tiles = replace(level.tiles, sizes=frozenset([level.tile]))
        super().__init__(
            path, "cucim", tiff.vendor, tiff.shape, tiff.tile_px, tiff.mpp, tiff.properties, tiff
        )

    def _pixels(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        place = self._places(level, np.array([x, y])).tolist()
        return np.asarray(self._image.read_region(place, (width, height), level))

    def _places(self, level: int, at: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return level-0 coordinates that cuCIM turns into `at`: it divides, and rounds down.

        The middle of those that do, so that its rounding in float32 cannot matter.
        """
        ratio = self._ratios[level]
        return at if ratio == 1 else np.rint((at + 0.5) * ratio).astype(np.int64)

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
        """Read regions of one size in batches, whose parts are yielded; see Slide.read_many.

        With device="cuda" they are decoded there, and are torch tensors that share cuCIM's memory.
        """
        level = self._level(level)
        check_sides(width, height)
        places = whole_corners(corners)
        sides = self.levels[level]
        x, y = places[:, 0], places[:, 1]
        inside = (x >= 0) & (y >= 0) & (x <= sides.width - width) & (y <= sides.height - height)
        batched = inside & ~self._damage_at(level, places, inside, width, height)
        chosen = places[batched]
        ready = self._batches(level, chosen, width, height, max(workers, 1), device)
        if len(chosen) == len(places):
            yield from ready
            return
        for quick, place in zip(batched.tolist(), places.tolist(), strict=True):
            yield next(ready) if quick else self._one(level, place, width, height, device)

    def _batches(
        self,
        level: int,
        places: NDArray[np.int64],
        width: int,
        height: int,
        workers: int,
        device: str,
    ) -> Iterator[Any]:
        done, options = 0, {} if device == "cpu" else {"device": device}
        batch = max(workers, min(BATCH, BATCH_BYTES // (3 * width * height)))
        if len(places):
            try:
                for images in self._image.read_region(
                    self._places(level, places).tolist(),  # it refuses arrays of int64
                    (width, height), level, batch_size=batch, num_workers=workers, **options,
                ):  # fmt: skip
                    batched = np.asarray(images) if device == "cpu" else _tensor(images, device)
                    yield from batched
                    done += len(batched)
            except DAMAGE:  # it does not say in which region: one by one they tell
                pass
        for place in places[done:].tolist():
            yield self._one(level, place, width, height, device)

    def _one(self, level: int, place: list[int], width: int, height: int, device: str) -> Any:
        try:
            image = self.read(level, place[0], place[1], width, height)
            return image if device == "cpu" else _tensor(image, device)
        except SlideError as error:
            return error

    def _damage_at(
        self, level: int, places: NDArray[np.int64], inside: NDArray[np.bool_], width: int,
        height: int,
    ) -> NDArray[np.bool_]:  # fmt: skip
        """Tell which regions touch a damaged tile, of those that lie inside."""
        page = self._pages[level]
        damage = page.damage()
        found = np.zeros(len(places), bool)
        if damage is not None:
            sums = np.pad(damage.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
            low = places[inside] // page.tile
            high = (places[inside] + (width - 1, height - 1)) // page.tile + 1
            found[inside] = (
                sums[high[:, 1], high[:, 0]] - sums[low[:, 1], high[:, 0]]
                - sums[high[:, 1], low[:, 0]] + sums[low[:, 1], low[:, 0]]
            ) > 0  # fmt: skip
        return found

    def close(self) -> None:
        """Let go of the file."""
        self._image.close()
        super().close()


def _tensor(image: Any, device: str) -> Any:
    """Return a tensor on a device: over DLPack or CUDA's array interface, where it is there."""
    import torch

    if hasattr(image, "__dlpack__") and not isinstance(image, np.ndarray):
        return torch.from_dlpack(image)
    return torch.as_tensor(image, device=device)
