"""Slides in memory and tilings of all shapes, for tests of where patches lie and what they hold."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from motet.io.errors import SlideError
from motet.io.tiling.grid import PatchGrid, Tiling, make_grid


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Return random grey levels, many of them 0 or 255."""
    generator = np.random.default_rng(seed)
    return np.clip(generator.integers(-100, 356, shape), 0, 255).astype(np.uint8)


class Level(NamedTuple):
    width: int
    height: int
    downsample: float


class ArraySlide:
    """A slide in memory. Each item of read_many overwrites the one before, in the same buffer."""

    path, reader, vendor = Path("made.svs"), "pillow", "made"
    bounds: tuple[int, int, int, int] | None = None

    def __init__(
        self,
        levels: list[Level],
        *,
        tile_px: tuple[int, int] | None = (256, 256),
        faults: tuple[tuple[int, int, int, int], ...] = (),
    ) -> None:
        self.levels, self.tile_px, self.faults = tuple(levels), tile_px, faults
        self.pixels: dict[int, np.ndarray] = {}
        self.reads: list[tuple[int, int, int, int]] = []

    def image(self, level: int) -> np.ndarray:
        if level not in self.pixels:
            self.pixels[level] = noise(self.levels[level].height, self.levels[level].width, 3)
        return self.pixels[level]

    def damaged(self, level: int) -> np.ndarray:
        return np.array(self.faults, np.int64).reshape(-1, 4)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        self.reads.append((x, y, width, height))
        for left, top, w, h in self.faults:
            if x < left + w and left < x + width and y < top + h and top < y + height:
                raise SlideError(self.path, "damaged", "made so")
        result, image = np.full((height, width, 3), 255, np.uint8), self.image(level)
        (y0, y1), (x0, x1) = (
            (min(max(0, begin), side), min(max(0, begin + length), side))
            for begin, length, side in ((y, height, len(image)), (x, width, image.shape[1]))
        )
        result[y0 - y : y1 - y, x0 - x : x1 - x] = image[y0:y1, x0:x1]
        return result

    def read_many(
        self, level: int, corners: np.ndarray, width: int, height: int, *, workers: int = 1
    ) -> Iterator[Any]:
        assert corners.dtype == np.int64
        buffer = np.empty((height, width, 3), np.uint8)
        for x, y in corners.tolist():
            try:
                buffer[:] = self.read(level, x, y, width, height)
            except SlideError as error:
                yield error
            else:
                yield buffer
            buffer[:] = 77

    def read_into(
        self, level: int, corners: np.ndarray, out: list[np.ndarray]
    ) -> list[SlideError | None]:
        assert corners.dtype == np.int64
        errors: list[SlideError | None] = []
        for (x, y), pixels in zip(corners.tolist(), out, strict=True):
            try:
                pixels[:] = self.read(level, x, y, pixels.shape[1], pixels.shape[0])
                errors.append(None)
            except SlideError as error:
                pixels[:] = 77
                errors.append(error)
        return errors


def pyramid(width: int, height: int, *factors: float) -> ArraySlide:
    """Return a slide with levels of these downsamples; sides are rounded down."""
    return ArraySlide([Level(int(width / f), int(height / f), float(f)) for f in factors])


def grid_of(slide: Any, own_mpp: float | None = None, **tiling: Any) -> PatchGrid:
    return make_grid(slide, Tiling(**tiling), own_mpp)


@st.composite
def slides(draw: st.DrawFn) -> ArraySlide:
    """Draw pyramids of one or several levels, of various factors, sides rounded up or down."""
    width, height = (draw(st.sampled_from([16, 255, 256, 4097, 4443, 1000, 771])) for _ in range(2))
    levels = [Level(width, height, 1.0)]
    for factor in draw(st.sampled_from([[], [4, 16], [2, 4, 8], [2.0005], [4], [3.7, 11.2], [32]])):
        up = draw(st.booleans()) * (factor - 1)
        sides = [max(1, int((side + up) / factor)) for side in (width, height)]
        true = factor if factor == int(factor) else (width / sides[0] + height / sides[1]) / 2
        levels.append(Level(sides[0], sides[1], float(true)))
    return ArraySlide(
        levels, tile_px=draw(st.sampled_from([None, (256, 256), (240, 512), (64, 8)]))
    )


tilings = st.builds(
    Tiling,
    downsample=st.one_of(st.sampled_from([1.0, 2.0, 4.0, 16.0, 1.5, 2.004]), st.floats(1, 40)),
    tile_px=st.sampled_from([1, 16, 30, 64, 100]),
    border=st.sampled_from(["drop", "shift", "pad"]),
)
