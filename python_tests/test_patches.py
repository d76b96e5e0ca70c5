"""Patches have the pixels at their coordinates, each comes once, and memory stays bounded."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from motet.io.errors import SlideError
from motet.io.slides.open_slide import open_slide
from motet.io.tiling import patches
from motet.io.tiling.grid import PatchGrid, Tiling, damaged_patches, make_grid
from motet.io.tiling.patches import PatchBatch, probe_decoder, read_patches
from motet.io.tiling.resample import area_resample_reference

from .grid_helpers import ArraySlide, Level, grid_of, pyramid, slides, tilings
from .slides import draw_tissue


def read(
    slide: Any, grid: PatchGrid, indices: Any, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels of the patches, zero where lost, and which patches were lost."""
    indices = np.asarray(indices, np.int64)
    size = grid.tile_px
    pixels, seen = np.zeros((len(indices), size, size, 3), np.uint8), np.zeros(len(indices), int)
    lost = np.zeros(len(indices), bool)
    for batch in read_patches(slide, grid, indices, **options):
        assert (np.diff(batch.rows) > 0).all()
        assert (np.diff(batch.lost) > 0).all()
        assert 0 < len(batch.rows) + len(batch.lost) <= options.get("batch", 64)
        assert batch.pixels.shape == (len(batch.rows), size, size, 3)
        pixels[batch.rows] = batch.pixels
        lost[batch.lost] = True
        seen[batch.rows] += 1
        seen[batch.lost] += 1
    assert (seen == 1).all()
    return pixels, lost


def expected(slide: ArraySlide, grid: PatchGrid, patch: int) -> np.ndarray:
    """The area mean of the level over the footprint that coords say; white beyond the slide."""
    level, image = slide.levels[grid.level], slide.image(grid.level)
    begin = grid.coords[patch] / level.downsample
    if grid.ratio == 1.0:
        begin = np.rint(begin)
    side = int(np.ceil(begin.max() + grid.read_px)) + 1
    padded = np.full((max(side, image.shape[0]), max(side, image.shape[1]), 3), 255, np.uint8)
    padded[: image.shape[0], : image.shape[1]] = image
    steps = grid.ratio * np.arange(grid.tile_px)
    low = np.floor(begin).astype(int)
    crop = padded[low[1] : low[1] + side, low[0] : low[0] + side]
    y, x = begin[1] - low[1], begin[0] - low[0]
    return area_resample_reference(crop, y + steps, x + steps, grid.ratio)


@settings(max_examples=settings().max_examples // 4)
@given(slides(), tilings, st.data())
def test_pixels_are_those_of_the_coordinates(
    slide: ArraySlide, tiling: Tiling, data: st.DataObject
) -> None:
    grid = make_grid(slide, tiling, None)  # pyright: ignore[reportArgumentType]
    count = len(grid.coords)
    indices = data.draw(st.lists(st.integers(0, max(0, count - 1)), max_size=12 * bool(count)))
    got, lost = read(slide, grid, indices, batch=data.draw(st.sampled_from([1, 3, 64])))
    assert not lost.any()
    for pixels, patch in zip(got, indices, strict=True):
        difference = pixels.astype(int) - expected(slide, grid, patch)
        assert np.abs(difference).max() <= 1
        assert np.abs(difference).mean() < 0.01  # a corner rounded to 1e-13 px, near a tie
    for x, y, width, height in slide.reads:
        assert max(width, height) <= patches.READ_PX + 1
        assert x >= 0
        assert y >= 0


@pytest.mark.parametrize("factor", [1.0, 2.0, 4.0, 1.3, 2.004])
@pytest.mark.parametrize("border", ["drop", "shift", "pad"])
def test_a_whole_slide(factor: float, border: str) -> None:
    slide = pyramid(701, 530, 1)
    slide.tile_px = (64, 64)
    grid = grid_of(slide, downsample=factor, tile_px=32, border=border)
    got, _ = read(slide, grid, np.arange(len(grid.coords)), batch=7)
    for patch in range(len(grid.coords)):
        assert np.array_equal(got[patch], expected(slide, grid, patch))


def test_patches_are_read_in_blocks_that_suit_the_file() -> None:
    """Aligned patches are read in whole tiles, others in blocks that decode few tiles twice."""
    slide = pyramid(4480, 2304, 1)

    def tiles() -> int:
        return sum(
            (min(x + w - 1, 4479) // 256 - x // 256 + 1)
            * (min(y + h - 1, 2303) // 256 - y // 256 + 1)
            for x, y, w, h in slide.reads
        )

    everything = grid_of(slide, downsample=1, tile_px=224)
    read(slide, everything, np.arange(len(everything.coords)))
    assert {(w, h) for *_, w, h in slide.reads} == {(1792, 1792)}  # eight patches, seven tiles
    assert tiles() == 18 * 9  # each once

    slide.reads.clear()
    grid = grid_of(slide, downsample=1)
    alone = [3, 40, 100, 150]
    read(slide, grid, alone)
    assert sorted(slide.reads) == sorted((*grid.coords[i].tolist(), 256, 256) for i in alone)

    slide.reads.clear()
    grid = grid_of(slide, downsample=2.004)
    read(slide, grid, np.arange(len(grid.coords)))
    assert tiles() <= 1.3 * 17 * 9


def test_batches_depend_on_the_arguments_alone() -> None:
    slide = pyramid(1500, 1500, 1)
    grid = grid_of(slide, downsample=1.5, tile_px=64)
    indices = np.random.default_rng(0).permutation(len(grid.coords))[:150]
    first, second = (
        [batch.rows.tolist() for batch in read_patches(slide, grid, indices, workers=workers)]  # pyright: ignore[reportArgumentType]
        for workers in (1, 4)
    )
    assert first == second
    assert [len(rows) for rows in first] == [64, 64, 22]
    backwards, _ = read(slide, grid, indices[::-1])
    assert np.array_equal(backwards[::-1], read(slide, grid, indices)[0])


def test_what_cannot_be_decoded_is_lost_alone() -> None:
    slide = pyramid(2000, 1500, 1)
    for factor, tile_px in ((1, 64), (1.7, 40), (2, 30)):
        slide.faults = ()
        grid = grid_of(slide, downsample=factor, tile_px=tile_px)
        everything = np.arange(len(grid.coords))
        intact, lost = read(slide, grid, everything)
        assert not lost.any()
        slide.faults = ((256, 512, 256, 256), (1280, 0, 256, 256))
        got, lost = read(slide, grid, everything)
        damaged = damaged_patches(slide, grid)  # pyright: ignore[reportArgumentType]
        # A read ends at whole pixels, so that it may touch a tile of which a patch needs nothing.
        assert (lost >= damaged).all()
        assert lost.sum() - damaged.sum() <= (0 if factor != 1.7 else 8)
        assert np.array_equal(got[~lost], intact[~lost])
    (batch,) = read_patches(slide, grid, np.flatnonzero(damaged)[:3])  # pyright: ignore[reportArgumentType]
    assert batch.pixels.shape == (0, 30, 30, 3)
    assert batch.lost.tolist() == [0, 1, 2]


@pytest.mark.native
@pytest.mark.parametrize("colours", ["ycbcr", "rgb"])
@pytest.mark.parametrize("border", ["drop", "pad"])
def test_tiles_of_the_file_are_read_into_the_batch(
    border: str, colours: str, tmp_path: Path
) -> None:
    """Pixels, batches and lost patches equal those of single reads, also at the edges."""
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "slide.tif"
    image = draw_tissue(700, 600)
    jpeg_options = {} if colours == "ycbcr" else {"compressionargs": {"outcolorspace": "rgb"}}
    tifffile.imwrite(path, image, tile=(64, 64), photometric="rgb", compression="jpeg",
                     metadata=None, **jpeg_options)  # fmt: skip
    with tifffile.TiffFile(path) as tiff:
        ranges = list(zip(tiff.pages[0].dataoffsets, tiff.pages[0].databytecounts, strict=True))
    content = bytearray(path.read_bytes())
    for tile, part in ((0, slice(None)), (25, slice(300, 500)), (53, slice(0, 2))):
        at, count = ranges[tile]
        start, stop, _ = part.indices(count)
        content[at + start : at + stop] = bytes(stop - start)
    path.write_bytes(content)

    def batches(workers: int) -> list[PatchBatch]:
        return list(read_patches(slide, grid, indices, batch=16, workers=workers))

    results = []
    for reader in ("libjpeg", "tifffile"):
        with open_slide(path, reader=reader) as slide:
            grid = make_grid(slide, Tiling(downsample=1, tile_px=64, border=border), None)
            indices = np.random.default_rng(0).permutation(len(grid.coords))
            results += [batches(workers) for workers in (1, 3)]
            damaged = damaged_patches(slide, grid)
    for one, other in pairwise(results):
        for a, b in zip(one, other, strict=True):
            assert a.rows.tolist() == b.rows.tolist()
            assert a.lost.tolist() == b.lost.tolist()
            assert np.array_equal(a.pixels, b.pixels)
    lost = np.concatenate([indices[batch.lost] for batch in results[0]])
    assert sorted(lost) == np.flatnonzero(damaged).tolist()
    assert len(lost) == 3


def test_memory_serves_again_when_nothing_refers_to_it() -> None:
    slide = pyramid(3000, 3000, 1)
    grid = grid_of(slide, downsample=1, tile_px=64)
    everything = np.arange(len(grid.coords))
    places: set[int] = set()
    held: list[tuple[PatchBatch, Any, np.ndarray]] = []
    for i, batch in enumerate(read_patches(slide, grid, everything, batch=16)):  # pyright: ignore[reportArgumentType]
        places.add(batch.pixels.ctypes.data)
        if i % 20 == 0:  # part of one; as torch has it; a view of a view
            kept = [batch.pixels[3:5], torch.from_numpy(batch.pixels)[3:5], batch.pixels[1:][2:4]]
            held.append((batch, kept[i // 20 % 3], batch.pixels[3:5].copy()))
            held[-1] = (PatchBatch(batch.rows, None, batch.lost), *held[-1][1:])
    assert len(everything) / 16 > 130
    assert len(places) < 60  # three blocks of 16 x 16 patches, and those held
    for batch, kept, copy in held:
        assert np.array_equal(np.asarray(kept), copy)
        fresh, _ = read(slide, grid, everything[batch.rows[3:5]])
        assert np.array_equal(copy, fresh)


def test_memory_may_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, asked = torch.empty, []

    def unpinned(shape: tuple[int, ...], *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        asked.append(pin_memory)
        return empty(shape, dtype=dtype)

    slide = pyramid(2000, 1800, 1)
    slide.tile_px = (64, 64)
    grid = grid_of(slide, downsample=1, tile_px=64)
    everything = np.arange(len(grid.coords))
    expected, _ = read(slide, grid, everything)
    monkeypatch.setattr(torch, "empty", unpinned)
    got, _ = read(slide, grid, everything, batch=4, pinned=True)
    assert np.array_equal(got, expected)
    assert asked == [True] * len(asked)
    assert 0 < len(asked) < 20 < len(everything) / 4  # memory is used again


def test_a_patch_too_large_for_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "READ_PX", 100)
    slide = pyramid(1100, 900, 1)
    for factor, border in ((20.0, "drop"), (7.3, "pad"), (240.5, "pad")):
        slide.faults = ()
        grid = grid_of(slide, downsample=factor, tile_px=15, border=border)
        indices = np.arange(len(grid.coords))[::-1]
        slide.reads.clear()
        got, lost = read(slide, grid, indices)
        assert not lost.any()
        assert max(max(read[2:]) for read in slide.reads) <= max(100, factor) + 2
        for pixels, patch in zip(got, indices, strict=True):
            assert np.abs(pixels.astype(int) - expected(slide, grid, patch)).max() <= 1
        slide.faults = ((0, 0, 5, 5),)
        assert read(slide, grid, indices)[1].tolist() == [i == 0 for i in indices]


def test_nothing_is_wanted() -> None:
    for slide in (pyramid(1000, 1000, 1), pyramid(16, 16, 1)):
        grid = grid_of(slide, downsample=1)
        assert list(read_patches(slide, grid, np.empty(0, np.int64))) == []  # pyright: ignore[reportArgumentType]


class TensorSlide(ArraySlide):
    """Returns torch tensors if the device is not the CPU."""

    reader, delay, shift = "cucim", 0.0, 0

    def read_many(self, *args: Any, device: str | None = None, **options: Any) -> Iterator[Any]:
        for image in super().read_many(*args, **options):
            if device is None or isinstance(image, SlideError):
                yield image
            elif device != "cuda":
                raise RuntimeError(f"no such device {device}")
            else:
                yield (torch.from_numpy(image.copy()).int() + self.shift).clamp(0, 255).byte()


@pytest.mark.parametrize("factor", [1.0, 1.37, 4.0])
def test_tensors_have_the_same_pixels(factor: float) -> None:
    slide = TensorSlide([Level(900, 700, 1.0)], faults=((256, 0, 256, 256),))
    grid = grid_of(slide, downsample=factor, tile_px=32)
    everything = np.arange(len(grid.coords))
    on_cpu, lost = read(slide, grid, everything)
    on_gpu, also = read(slide, grid, everything, device="cuda")
    assert lost.any()
    assert np.array_equal(lost, also)
    assert np.array_equal(on_cpu, on_gpu)
    batch = next(read_patches(slide, grid, everything, device="cuda"))  # pyright: ignore[reportArgumentType]
    assert isinstance(batch.pixels, torch.Tensor)


def test_the_decoder_is_chosen_by_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    slide = TensorSlide([Level(900, 700, 1.0)])
    grid = grid_of(slide, downsample=1.37, tile_px=32)
    clock = {"now": 0.0, "cuda": 1.0, "cpu": 2.0}
    real = read_patches

    def timed(*args: Any, device: str = "cpu", **options: Any) -> Any:
        for batch in real(*args, device=device, **options):
            clock["now"] += clock[device]
            yield batch

    monkeypatch.setattr(patches, "read_patches", timed)
    monkeypatch.setattr(patches.time, "perf_counter", lambda: clock["now"])
    probe: Any = probe_decoder
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert probe(slide, grid) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert probe(slide, grid) == "cuda"
    clock["cuda"] = 3.0
    assert probe(slide, grid) == "cpu"
    clock["cuda"] = 1.0
    slide.shift = 1
    assert probe(slide, grid) == "cuda"  # within 2 grey levels
    slide.shift = 5
    assert probe(slide, grid) == "cpu"
    slide.shift = 0

    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("nvjpeg")

    with monkeypatch.context() as patch:
        patch.setattr(TensorSlide, "read_many", lambda *args, device=None, **options: (
            broken() if device else ArraySlide.read_many(*args, **options)))  # fmt: skip
        assert probe(slide, grid) == "cpu"
    assert probe(slide, grid_of(pyramid(16, 16, 1), downsample=1)) == "cpu"
    slide.reader = "openslide"
    assert probe(slide, grid) == "cpu"
