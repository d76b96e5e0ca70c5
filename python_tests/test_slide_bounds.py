"""Slides of which only a part was scanned: OpenSlide's bounds, as of MIRAX."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from motet.io.slides.open_slide import open_slide
from motet.io.store.read import FeatureStore
from motet.io.tiling.tile_slides import tile_slides

from .slides import draw_tissue, make_pyramid

openslide = pytest.importorskip("openslide")
pytest.importorskip("tifffile")


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Give OpenSlide's slides further properties, those of the dict that is returned."""
    values: dict[str, str] = {}
    real = openslide.OpenSlide.properties
    monkeypatch.setattr(
        openslide.OpenSlide, "properties", property(lambda self: {**real.fget(self), **values})
    )
    return values


def properties(x: int, y: int, width: int, height: int) -> dict[str, str]:
    values = {"x": x, "y": y, "width": width, "height": height}
    return {f"openslide.bounds-{name}": str(value) for name, value in values.items()}


def test_bounds_of_openslide(bounds: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    make_pyramid(path, (900, 700))
    for values, expected in [
        ({}, None),
        (properties(100, 200, 300, 400), (100, 200, 300, 400)),
        (properties(0, 0, 900, 700), None),  # all of it
        (properties(700, 0, 300, 400), None),  # beyond the slide
        (properties(-1, 0, 300, 400), None),
        (properties(0, 0, 0, 0), None),
        ({"openslide.bounds-x": "5"}, None),
    ]:
        bounds.clear()
        bounds.update(values)
        with open_slide(path, reader="openslide") as slide:
            assert slide.bounds == expected


def test_only_the_scanned_part_is_tiled(bounds: dict[str, str], tmp_path: Path) -> None:
    """The same patches as of the part alone, at coordinates of the file; no glass outside."""
    part = draw_tissue(768, 512, background=215)  # grey glass on a white canvas
    canvas = np.full((2048, 3072, 3), 255, np.uint8)
    canvas[1024:1536, 512:1280] = part
    make_pyramid(tmp_path / "canvas.tif", image=canvas, factors=(1, 2))
    make_pyramid(tmp_path / "part.tif", image=part, factors=(1, 2))
    options: Any = {"encoder": "stain-stats", "mpp": 1.0, "tile_px": 64, "reader": "openslide",
                    "workers": 0}  # fmt: skip
    tile_slides(tmp_path / "part.tif", tmp_path / "store", **options)
    bounds.update(properties(512, 1024, 768, 512))
    tile_slides(tmp_path / "canvas.tif", tmp_path / "store", **options)
    store = FeatureStore(tmp_path / "store")
    canvas_slide, part_slide = store["canvas"], store["part"]
    assert canvas_slide.attrs["bounds"] == [512, 1024, 768, 512]
    assert "bounds" not in part_slide.attrs
    assert canvas_slide.attrs["counts"]["grid"] == part_slide.attrs["counts"]["grid"] == 24
    places = {tuple(corner): row for row, corner in enumerate(part_slide.coords.tolist())}
    rows = [places.get((x - 512, y - 1024), -1) for x, y in canvas_slide.coords.tolist()]
    assert -1 not in rows
    assert len(rows) > 10
    assert canvas_slide.attrs["width"] == 3072
    np.testing.assert_allclose(
        canvas_slide.features.mean(0), part_slide.features[rows].mean(0), atol=0.1
    )
