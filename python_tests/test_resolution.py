"""The resolution of slides: the user's and the file's, and pixels that are not square."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from motet.io.errors import SlideError, StoreError
from motet.io.slides.open_slide import open_slide
from motet.io.store.foreign import export
from motet.io.store.read import FeatureStore
from motet.io.tiling import patches
from motet.io.tiling.grid import PatchGrid, Tiling, damaged_patches, make_grid
from motet.io.tiling.patches import read_patches
from motet.io.tiling.resample import area_resample, area_resample_reference, area_resample_torch
from motet.io.tiling.tile_slides import tile_slides

from .grid_helpers import ArraySlide, noise, pyramid
from .slides import draw_tissue, make_pyramid, reduce_by

tifffile = pytest.importorskip("tifffile")


def test_the_users_mpp_wins(tmp_path: Path) -> None:
    """A value of the user is used and recorded; a contradiction with the file is reported."""
    for name in ("wrong", "right", "none"):
        mpp = {"wrong": 0.05, "right": 0.5, "none": None}[name]
        make_pyramid(tmp_path / f"{name}.tif", (600, 500), factors=(1,), mpp=mpp)
    (tmp_path / "list.csv").write_text("path,mpp\nwrong.tif,0.505\nright.tif,\nnone.tif,0.5\n")
    options: dict[str, Any] = {"encoder": "stain-stats", "mpp": 1.0, "tile_px": 64, "workers": 0}

    def run(out: str, slides: str, **more: Any) -> tuple[dict[str, Any], list[str]]:
        events: list[dict[str, Any]] = []
        tiled = tile_slides(tmp_path / slides, tmp_path / out, progress=events.append, **options,
                            **more)  # fmt: skip
        assert tiled.done == (3 if slides == "list.csv" else 1)
        attrs = {
            s.attrs["name"].split(".")[0]: s.attrs for s in FeatureStore(tmp_path / out).values()
        }
        return attrs, [event["message"] for event in events if event["event"] == "warning"]

    attrs, warnings = run("a", "list.csv")
    values = {name: (one["mpp"], one["mpp_source"]) for name, one in attrs.items()}
    assert values == {"wrong": (0.505, "list"), "right": (0.5, "file"), "none": (0.5, "list")}
    assert attrs["wrong"]["mpp_file"] == pytest.approx(0.05)
    assert attrs["none"]["mpp_file"] is None
    assert "mpp_file" not in attrs["right"]
    (message,) = warnings
    assert message.startswith(f"{tmp_path / 'wrong.tif'}: its file says 0.05 micrometres per px")
    assert message.endswith(", and the list says 0.505, which is used")
    attrs, warnings = run("b", "list.csv", slide_mpp=0.5)
    values = {name: (one["mpp"], one["mpp_source"]) for name, one in attrs.items()}
    assert values == {"wrong": (0.505, "list"), "right": (0.5, "user"), "none": (0.5, "list")}
    assert len(warnings) == 1  # 0.5 is what the file of right.tif says
    attrs, _ = run("c", "list.csv", slide_mpp={"wrong": 0.5})
    assert (attrs["wrong"]["mpp"], attrs["wrong"]["mpp_source"]) == (0.5, "table")
    attrs, warnings = run("d", "right.tif", slide_mpp=0.25)
    assert (attrs["right"]["mpp"], attrs["right"]["footprint_px"]) == (0.25, 256)
    assert len(warnings) == 1
    (tmp_path / "list.csv").write_text("path,mpp\nwrong.tif,0\n")
    with pytest.raises(SlideError, match="line 2, column mpp: expected a number above 0, got '0'"):
        run("e", "list.csv")


# Pixels that are not square


@given(data=st.data())
@settings(max_examples=settings().max_examples // 2)
def test_two_ratios(data: st.DataObject) -> None:
    """The mean over windows of other width than height is that of the reference, everywhere."""
    ratio = data.draw(st.tuples(st.floats(1, 6), st.floats(1, 6)))
    image = noise(*(int(np.ceil(40 * side)) + 2 for side in ratio[::-1]), 3)
    columns, rows = (
        begin + side * np.arange(20) for begin, side in zip((0.3, 1.7), ratio, strict=True)
    )
    expected = area_resample_reference(image, rows, columns, ratio)
    np.testing.assert_array_equal(area_resample(image, rows, columns, ratio), expected)
    on_torch = area_resample_torch(torch.from_numpy(image), rows, columns, ratio)
    np.testing.assert_array_equal(on_torch.numpy(), expected)
    square = area_resample_reference(image, rows[:5], columns[:5], 1.5)
    np.testing.assert_array_equal(area_resample(image, rows[:5], columns[:5], (1.5, 1.5)), square)
    for wrong in ((0.5, 1.0), (1.0, 0.5), (1.0, 1000.0)):
        with pytest.raises(ValueError, match="expected"):
            area_resample(image, rows, columns, wrong)


@pytest.mark.parametrize(
    ("mpp", "target", "ratios", "footprint"),
    [
        ((0.25, 0.5), 1.0, (4, 2), (256, 128)),
        ((0.5, 0.25), 1.0, (2, 4), (128, 256)),
        ((0.25, 0.5), 0.5, (2, 1), (128, 64)),
        ((0.25, 0.5), 0.495, (1.98, 1), (126.72, 64)),  # y within 2 %: its pixels as they are
        ((0.25, 0.26), 0.5, (2, 0.5 / 0.26), (128, 64 / 0.52)),
        ((0.25, 0.254), 0.5, (0.5 / 0.252,) * 2, (64 / 0.504,) * 2),  # within 2 %: the mean
    ],
)  # fmt: skip
def test_the_footprint_along_each_axis(
    mpp: tuple[float, float], target: float, ratios: tuple[float, ...], footprint: tuple[float, ...]
) -> None:
    slide: Any = pyramid(5000, 3000, 1)
    grid = make_grid(slide, Tiling(mpp=target, tile_px=64), mpp)
    assert grid.ratios == pytest.approx(ratios)
    assert grid.footprint == pytest.approx(footprint)
    assert grid.read_size == pytest.approx(footprint)
    rows, columns = grid.shape
    assert (columns, rows) == (int(5000 / footprint[0]), int(3000 / footprint[1]))
    x, y = grid.coords.reshape(rows, columns, 2)[-1, -1]
    assert abs(x - (columns - 1) * footprint[0]) <= 0.5
    assert abs(y - (rows - 1) * footprint[1]) <= 0.5
    with pytest.raises(SlideError, match="expected 0.2 .* or finer, got"):
        make_grid(slide, Tiling(mpp=0.2), mpp)


def read(slide: Any, grid: PatchGrid, **options: Any) -> np.ndarray:
    pixels = np.zeros((len(grid.coords), grid.tile_px, grid.tile_px, 3), np.uint8)
    for batch in read_patches(slide, grid, np.arange(len(grid.coords)), **options):
        pixels[batch.rows] = batch.pixels
    return pixels


@pytest.mark.parametrize(
    ("target", "axis", "border"),
    [(1.0, 0, "drop"), (1.0, 1, "pad"), (1.3, 1, "shift"), (2.0, 0, "pad")],
)
def test_a_stretched_slide_has_the_patches_of_the_square_one(
    target: float, axis: int, border: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slide of which every two rows (or columns) were averaged shows the same patches."""
    square: Any = pyramid(1400, 1000, 1, 2)
    image = noise(1000, 1400, 3)
    means = image.reshape((500, 2, 1400, 3) if axis == 0 else (1000, 700, 2, 3)).mean(axis + 1)
    square.pixels[0] = image
    square.pixels[1] = reduce_by(image, 2)
    flat: Any = ArraySlide(list(pyramid(means.shape[1], means.shape[0], 1).levels))
    flat.pixels[0] = np.floor(means + 0.5).astype(np.uint8)
    tiling = Tiling(mpp=target, tile_px=40, border=border)
    expected = make_grid(square, tiling, 0.5)
    grid = make_grid(flat, tiling, (0.5, 1.0) if axis == 0 else (1.0, 0.5))
    assert grid.shape == expected.shape
    stretch = (1, 2) if axis == 0 else (2, 1)
    inner = ~expected.edge if border == "shift" else slice(None)
    assert np.abs(grid.coords * stretch - expected.coords)[inner].max() <= 1
    pixels = read(flat, grid)
    if target == 1.0:  # with other targets, coordinates are rounded to other pixels
        difference = pixels.astype(int) - read(square, expected)
        assert np.abs(difference)[inner].max() <= 1
    level = np.full((1500, 1500, 3), 255, np.uint8)
    level[: means.shape[0], : means.shape[1]] = flat.pixels[0]
    steps = np.arange(40)
    for n in np.random.default_rng(0).integers(len(grid.coords), size=8):
        (x, y), (across, down) = grid.coords[n], grid.ratios
        exact = area_resample_reference(level, y + down * steps, x + across * steps, (across, down))
        np.testing.assert_array_equal(pixels[n], exact)
    monkeypatch.setattr(patches, "READ_PX", 50)  # patches in parts
    in_parts = read(flat, grid, batch=7, workers=2).astype(int) - pixels
    assert np.abs(in_parts).max() <= 1
    assert (in_parts != 0).mean() < 1e-4


def test_damage_of_a_stretched_slide() -> None:
    slide: Any = pyramid(900, 700, 1)
    slide.faults = ((256, 256, 256, 256),)
    grid = make_grid(slide, Tiling(mpp=1.0, tile_px=32), (0.25, 0.5))
    lost = np.zeros(len(grid.coords), bool)
    for batch in read_patches(slide, grid, np.arange(len(grid.coords))):
        lost[batch.lost] = True
    x, y = grid.coords.T
    touched = (x + 128 > 256) & (x < 512) & (y + 64 > 256) & (y < 512)
    np.testing.assert_array_equal(lost, touched)
    np.testing.assert_array_equal(damaged_patches(slide, grid), touched)


def test_a_stretched_slide_in_a_store(tmp_path: Path) -> None:
    """Patches are square in micrometres; both sides are recorded; a second encoder joins."""
    image = draw_tissue(1024, 1024)
    flat = np.floor(image.reshape(512, 2, 1024, 3).mean(1) + 0.5).astype(np.uint8)
    for name, pixels, mpp in (("square", image, (0.25, 0.25)), ("flat", flat, (0.25, 0.5))):
        tifffile.imwrite(
            tmp_path / f"{name}.tif", pixels, tile=(256, 256), photometric="rgb", metadata=None,
            resolution=tuple(1e4 / axis for axis in mpp), resolutionunit="CENTIMETER",
        )  # fmt: skip
    options: Any = {"mpp": 1.0, "tile_px": 32, "workers": 0}
    slides = [tmp_path / "square.tif", tmp_path / "flat.tif"]
    assert tile_slides(slides, tmp_path / "store", encoder="stain-stats", **options).done == 2
    store = FeatureStore(tmp_path / "store")
    square, stretched = store["square"], store["flat"]
    attrs = stretched.attrs
    assert (attrs["mpp"], attrs["mpp_y"], attrs["mpp_source"]) == (0.25, 0.5, "file")
    assert (attrs["footprint_px"], attrs["footprint_y_px"], attrs["patch_mpp"]) == (128, 64, 1.0)
    assert not {"mpp_y", "footprint_y_px"} & set(square.attrs)
    places = {tuple(corner): row for row, corner in enumerate(square.coords.tolist())}
    rows = [places.get((x, 2 * y), -1) for x, y in stretched.coords.tolist()]
    both = [(i, row) for i, row in enumerate(rows) if row >= 0]
    assert len(both) > 0.9 * max(len(square.coords), len(stretched.coords)) > 20
    mine, other = np.array(both).T
    assert np.abs(stretched.tissue[mine].astype(int) - square.tissue[other]).mean() < 8

    encoder = SecondEncoder()
    assert tile_slides(slides, tmp_path / "store", encoder=encoder, **options).done == 2
    second = FeatureStore(tmp_path / "store", "second")
    assert second["flat"].features.shape == (len(rows), 3)
    difference = second["flat"].features[mine] - second["square"].features[other]
    assert np.abs(difference).max() <= 0.5  # grey levels
    with pytest.raises(StoreError, match="expected square patches .* got 128 x 64"):
        export(store, "flat", tmp_path / "export", kind="h5")
    with open_slide(slides[1]) as slide:
        assert slide.mpp is None
        assert "mpp=(0.25, 0.5)" in repr(slide)
    warnings: list[str] = []

    def note(event: dict[str, Any]) -> None:
        warnings.extend([event["message"]] if event["event"] == "warning" else [])

    tiled = tile_slides(slides[1], tmp_path / "b", encoder="stain-stats", slide_mpp=0.25,
                        progress=note, **options)  # fmt: skip
    assert tiled.done == 1
    assert "its file says 0.25 x 0.5 micrometres per px, and the user says 0.25" in warnings[0]
    attrs = FeatureStore(tmp_path / "b")["flat"].attrs
    assert (attrs["mpp"], attrs["mpp_file"], attrs["mpp_file_y"]) == (0.25, 0.25, 0.5)
    assert "footprint_y_px" not in attrs


class SecondEncoder:
    """The mean colour of a patch."""

    id, width, weights, transform, precision, input_px = "second", 3, "none", "none", "fp32", None

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        return pixels.mean((1, 2), dtype=np.float32)

    def spec(self) -> dict[str, Any]:
        return {"id": self.id, "width": 3, "weights": "none", "transform": "none",
                "precision": "fp32"}  # fmt: skip
