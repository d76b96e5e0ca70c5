"""Grids of patches: resolution, level, borders and coordinates, on pyramids of many shapes."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from motet.io.errors import SlideError
from motet.io.tiling.grid import Tiling, damaged_patches, make_grid

from .grid_helpers import ArraySlide, Level, grid_of, pyramid, slides, tilings


def test_the_papers_patches_on_an_odd_slide() -> None:
    """The grid has 4 x 4 patches, whether the level's side, 4097 / 4, is rounded down or up.

    A footprint of 1024 px gives int(4097 / 1024) = 4; one of ceil(4097 / 4) = 1025 px gives 3.
    """
    for side in (1024, 1025):
        slide = ArraySlide([Level(4097, 4097, 1.0), Level(side, side, 4.0), Level(256, 256, 16.0)])
        grid = grid_of(slide, downsample=4)
        assert (grid.level, grid.ratio, grid.read_px, grid.footprint_px) == (1, 1.0, 256, 1024)
        assert grid.shape == (4, 4)
        assert grid.mpp is None
        assert grid.coords.dtype == np.int32
        assert grid.coords[:6].tolist() == [[0, 0], [1024, 0], [2048, 0], [3072, 0], [0, 1024],
                                            [1024, 1024]]  # fmt: skip
        assert np.array_equal(grid.corners, grid.coords / 4)
        assert not grid.edge.any()


@pytest.mark.parametrize(
    ("mpp", "level", "ratio", "true"),
    [
        (0.25, 0, 1.0, 0.25),
        (0.246, 0, 1.0, 0.25),  # within 2 %
        (0.254, 0, 1.0, 0.25),
        (0.26, 0, 1.04, 0.26),
        (0.5, 0, 2.0, 0.5),
        (0.97, 0, 3.88, 0.97),
        (0.985, 1, 1.0, 1.0),
        (1.02, 1, 1.0, 1.0),
        (1.5, 1, 1.5, 1.5),
        (2.0, 1, 2.0, 2.0),  # a pyramid of 1, 4, 16 has no level of 8
        (3.95, 2, 1.0, 4.0),
        (8.0, 2, 2.0, 8.0),
    ],
)
def test_level_and_ratio(mpp: float, level: int, ratio: float, true: float) -> None:
    grid = grid_of(pyramid(40_000, 30_000, 1, 4, 16), 0.25, mpp=mpp)
    assert grid.level == level
    assert grid.ratio == pytest.approx(ratio, rel=1e-12)
    assert (grid.ratio == 1.0) == (ratio == 1.0)
    assert grid.mpp == pytest.approx(true, rel=1e-12)
    assert grid.footprint_px == pytest.approx(256 * true / 0.25, rel=1e-12)
    assert grid.read_px == pytest.approx(256 * ratio, rel=1e-12)


def test_a_wider_tolerance_takes_the_pixels_as_they_are() -> None:
    slide = pyramid(40_000, 30_000, 1, 4)
    grid = grid_of(slide, 0.2637, mpp=0.25, mpp_tolerance=0.06)
    assert (grid.level, grid.ratio, grid.mpp, grid.footprint_px) == (0, 1.0, 0.2637, 256)
    grid = grid_of(slide, 0.2637, mpp=1.0, mpp_tolerance=0.06)
    assert (grid.level, grid.ratio, grid.mpp) == (1, 1.0, pytest.approx(4 * 0.2637))
    grid = grid_of(slide, 0.25, mpp=0.252, mpp_tolerance=0.0)
    assert (grid.level, grid.ratio) == (0, pytest.approx(1.008))


def test_noise_of_a_quotient_costs_no_patch() -> None:
    pairs = ((0.3, 0.1), (0.6, 0.2), (0.75, 0.25), (1.1, 1.0), (0.69, 0.23), (0.07, 0.01))
    for mpp, slide_mpp in pairs:
        factor = round(mpp / slide_mpp, 6)
        side = round(2560 * factor)
        grid = grid_of(pyramid(side, side, 1), slide_mpp, mpp=mpp)
        assert grid.shape == (10, 10)
        assert grid.ratio == factor


def test_a_level_of_2_0005() -> None:
    """Corners are whole pixels of the level; coordinates are their positions at level 0."""
    slide = ArraySlide([Level(4443, 3567, 1.0), Level(2221, 1783, 2.0005)])
    grid = grid_of(slide, downsample=2, tile_px=100)
    assert (grid.level, grid.ratio, grid.footprint_px) == (1, 1.0, 200.05)
    assert grid.shape == (17, 22)
    assert np.array_equal(grid.corners % 100, np.zeros_like(grid.corners))
    assert np.abs(grid.coords - grid.corners * 2.0005).max() <= 0.5


@pytest.mark.parametrize(
    ("border", "coords", "edge"),
    [
        ("drop", [0, 100], [False, False]),
        ("shift", [0, 100, 150], [False, False, True]),
        ("pad", [0, 100, 200], [False, False, True]),
    ],
)
def test_borders(border: str, coords: list[int], edge: list[bool]) -> None:
    grid = grid_of(pyramid(250, 100, 1), downsample=1, tile_px=100, border=border)
    assert grid.shape == (1, len(coords))
    assert grid.coords[:, 0].tolist() == coords
    assert grid.edge.tolist() == edge


@pytest.mark.parametrize(("border", "count"), [("drop", 0), ("shift", 1), ("pad", 1)])
def test_a_patch_larger_than_the_slide(border: str, count: int) -> None:
    grid = grid_of(pyramid(16, 16, 1), downsample=1, border=border)
    assert grid.coords.tolist() == [[0, 0]] * count
    assert grid.corners.shape == (count, 2)
    assert grid.edge.tolist() == [True] * count


def test_refusals() -> None:
    slide = pyramid(1000, 1000, 1)
    for mpp in (None, 0.0, float("nan"), 1e9):
        with pytest.raises(SlideError, match="expected its micrometres per pixel, got") as error:
            grid_of(slide, mpp, mpp=0.5)
        assert error.value.reason == "no-mpp"
    with pytest.raises(SlideError, match="expected 0.48 .* or finer, got 0.5") as error:
        grid_of(slide, 0.5, mpp=0.48)
    assert error.value.reason == "resolution"
    assert error.value.message.endswith("ask for mpp=0.5 or more, or set mpp_tolerance=0.042")
    assert grid_of(slide, 0.5, mpp=0.48, mpp_tolerance=0.042).mpp == 0.5
    with pytest.raises(SlideError, match="ask for mpp=0.5 or more$"):
        grid_of(slide, 0.5, mpp=0.25)
    assert grid_of(slide, 0.5, mpp=0.495).ratio == 1.0
    with pytest.raises(SlideError, match=f"at most {2**24} patches, got 10000000 x 10") as error:
        grid_of(pyramid(1000, 10**9, 1), downsample=1, tile_px=100)
    assert error.value.reason == "too-large"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "expected mpp or downsample, one of them, got mpp=None, downsample=None"),
        ({"mpp": 1.0, "downsample": 2}, "one of them, got mpp=1.0, downsample=2"),
        ({"mpp": 0}, "mpp: expected micrometres per pixel above 0, got 0"),
        ({"mpp": float("nan")}, "mpp: expected .*, got nan"),
        ({"mpp": float("inf")}, "mpp: expected .*, got inf"),
        ({"mpp": "1"}, "mpp: expected a number, got '1'"),
        ({"mpp": True}, "mpp: expected a number, got True"),
        ({"downsample": 0.5}, "downsample: expected 1 or more .*, got 0.5"),
        ({"downsample": 1e7}, "downsample: expected .*, got 1"),
        ({"mpp": 1, "tile_px": 0}, "tile_px: expected an int from 1 to 16384, got 0"),
        ({"mpp": 1, "tile_px": 256.0}, "tile_px: expected an int .*, got 256.0"),
        ({"mpp": 1, "border": "cut"}, "border: expected one of drop, shift, pad, got 'cut'"),
        ({"mpp": 1, "mpp_tolerance": 0.6}, "mpp_tolerance: expected 0 to 0.5, got 0.6"),
        ({"mpp": 1, "min_tissue": 1.5}, "min_tissue: expected 0 to 1, got 1.5"),
    ],
)
def test_tilings_are_checked(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Tiling(**arguments)


def test_the_hash_of_a_tiling_is_of_its_values() -> None:
    first = Tiling(downsample=4)
    assert first.hash == Tiling(downsample=4.0).hash == "aa8e6bab8f0e57ea"
    assert Tiling(**json.loads(json.dumps(first.to_json()))) == first
    assert Tiling(downsample=4, mpp_tolerance=0.02).hash == first.hash  # as in older stores
    assert Tiling(mpp=1, mpp_tolerance=0.1).to_json()["mpp_tolerance"] == 0.1
    others = [Tiling(downsample=4, mpp_tolerance=0.1)]
    others += [Tiling(mpp=4), Tiling(downsample=4, tile_px=224), Tiling(downsample=4, border="pad")]
    others += [Tiling(downsample=4, tissue_threshold=0.03), Tiling(downsample=4, drop=["pen"])]
    assert len({tiling.hash for tiling in [first, *others]}) == 7
    assert Tiling(downsample=4, drop=("pen", "blur")) == Tiling(downsample=4, drop=["blur", "pen"])
    with pytest.raises(ValueError, match="drop: expected pen, blur, got 'edge'"):
        Tiling(downsample=4, drop=["edge"])
    # Later fields are left out at their defaults: old stores keep their hash.
    assert list(first.to_json()) == ["mpp", "downsample", "tile_px", "border", "min_tissue"]
    assert Tiling(**others[-1].to_json()) == others[-1]  # pyright: ignore[reportArgumentType]
    for wrong in (0, 1, -1.0):
        with pytest.raises(ValueError, match="tissue_threshold: expected a number between 0 and"):
            Tiling(downsample=4, tissue_threshold=wrong)


@pytest.mark.parametrize("border", ["drop", "shift", "pad"])
@pytest.mark.parametrize("downsample", [1.0, 4.0, 2.5])
def test_the_grid_covers_the_part_that_was_scanned(downsample: float, border: str) -> None:
    """Coordinates are level-0 px of the file; patches begin at the corner of the bounds."""
    slide = pyramid(8000, 6000, 1, 4)
    everything = grid_of(slide, downsample=downsample, tile_px=100, border=border)
    slide.bounds = (1001, 2002, 3000, 1500)
    grid = grid_of(slide, downsample=downsample, tile_px=100, border=border)
    length = 100 * downsample
    count = np.floor if border == "drop" else np.ceil
    unit = 4 if downsample == 4 else 1
    sides = [(1001 + 3000) // unit - -(-1001 // unit), (2002 + 1500) // unit - -(-2002 // unit)]
    assert grid.shape == tuple(int(count(side * unit / length)) for side in sides[::-1])
    assert grid.shape < everything.shape
    first = grid.coords[0]
    assert (first - (1001, 2002)).tolist() == [-1001 % unit, -2002 % unit]
    np.testing.assert_allclose(grid.corners * slide.levels[grid.level].downsample, grid.coords)
    if border != "pad":
        assert (grid.coords.max(0) + length <= (4001, 3502)).all()
    slide.bounds = (0, 0, 50, 50)
    assert grid_of(slide, downsample=downsample, tile_px=100).shape == (0, 0)


@given(slides(), tilings)
def test_patches_tile_the_slide(slide: ArraySlide, tiling: Tiling) -> None:
    grid = make_grid(slide, tiling, None)  # pyright: ignore[reportArgumentType]
    level, target = slide.levels[grid.level], tiling.downsample
    assert target is not None
    # The level is the coarsest that is not coarser than the target.
    assert level.downsample <= target * 1.02
    assert not any(level.downsample < other.downsample <= target * 1.02 for other in slide.levels)
    taken = grid.ratio == 1.0
    assert taken == (target / 1.02 <= level.downsample)
    if not taken:
        assert grid.footprint_px == pytest.approx(tiling.tile_px * target, rel=1e-12)
    assert grid.read_px == tiling.tile_px * grid.ratio or not taken
    assert grid.footprint_px == pytest.approx(grid.read_px * level.downsample, rel=1e-12)

    rows, columns = grid.shape
    assert len(grid.coords) == len(grid.corners) == len(grid.edge) == rows * columns
    # Coordinates and corners agree to half a pixel of the one that is not rounded.
    assert (
        np.abs(grid.coords - grid.corners * level.downsample).max(initial=0) <= 0.5 * taken + 1e-6
    )
    assert not taken or np.array_equal(grid.corners, np.rint(grid.corners))
    sides = (slide.levels[0].width, slide.levels[0].height)
    for axis, (side, count) in enumerate(zip(sides, (columns, rows), strict=True)):
        if not rows * columns:
            break
        level_side = level[axis]
        places = grid.coords.reshape(rows, columns, 2)[..., axis]
        places = places if axis == 0 else places.T
        line = places[0]
        assert (places == line).all()  # row by row
        unit = level.downsample if taken else 1.0
        steps = np.diff(line)
        regular = steps[:-1] if tiling.border == "shift" else steps
        assert np.abs(regular - grid.footprint_px).max(initial=0) <= max(1.0, unit)
        # Rounding errors do not add up: patch n begins n footprints from the border.
        if tiling.border != "shift":
            ideal = np.arange(count) * grid.footprint_px
            assert np.abs(line - ideal).max() <= max(1.0, unit)
        ends = line + grid.footprint_px
        corners = grid.corners.reshape(rows, columns, 2)[..., axis]
        usable = min(side, level_side * level.downsample)
        if tiling.border != "pad" and grid.footprint_px <= usable:
            assert ends.max() <= side + (0.5 if taken else 1e-6)
            assert (corners + grid.read_px).max() <= level_side + 1e-6
        if tiling.border == "drop":  # no further patch would fit
            assert ends[-1] + grid.footprint_px > usable - unit - 1
        else:
            assert ends[-1] > usable - unit - 1
    if tiling.border == "drop":
        assert not grid.edge.any()
    assert (grid.coords >= 0).all()


@given(slides(), tilings, st.data())
def test_damaged_patches_are_those_that_need_the_pixels(
    slide: ArraySlide, tiling: Tiling, data: st.DataObject
) -> None:
    if tiling.tile_px < 16:
        return
    grid = make_grid(slide, tiling, None)  # pyright: ignore[reportArgumentType]
    level = slide.levels[grid.level]
    slide.faults = tuple(
        (
            data.draw(st.integers(0, level.width)), data.draw(st.integers(0, level.height)),
            data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300)),
        )
        for _ in range(data.draw(st.integers(0, 3)))
    )  # fmt: skip
    x, y = grid.corners.T
    expected = np.zeros(len(x), bool)
    for left, top, width, height in slide.faults:
        across = (x + grid.read_px > left + 1e-6) & (x < left + width - 1e-6)
        expected |= across & (y + grid.read_px > top + 1e-6) & (y < top + height - 1e-6)
    actual = damaged_patches(slide, grid)  # pyright: ignore[reportArgumentType]
    assert np.array_equal(actual, expected)
