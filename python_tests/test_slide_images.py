"""Which image of a TIFF is the slide, which pages are its levels, and files of several slides."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from motet.io.errors import SlideError
from motet.io.slides.open_slide import open_slide
from motet.io.store.read import FeatureStore
from motet.io.store.source import Source
from motet.io.tiling.find_slides import find_slides
from motet.io.tiling.tile_slides import tile_slides
from numpy.typing import NDArray

from .slides import draw_tissue, reduce_by

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")

Pixels = NDArray[np.uint8]
Writer = Any
TILES = {"tile": (128, 128), "photometric": "rgb", "compression": "deflate"}
CM = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
SLIDE = draw_tissue(1024, 768)
MACRO = np.full((300, 1600, 3), 120, np.uint8)


def ome(name: str, mpp: float = 0.5) -> dict[str, Any]:
    unit = {"PhysicalSizeXUnit": "µm", "PhysicalSizeYUnit": "µm"}
    return {"axes": "YXS", "Name": name, "PhysicalSizeX": mpp, "PhysicalSizeY": mpp, **unit}


def macro_first(t: Writer) -> None:
    t.write(np.repeat(MACRO, 4, 0), metadata=ome("Macro image", 40.0), **TILES)
    t.write(SLIDE, subifds=2, metadata=ome("main"), **TILES)
    for factor in (2, 4):
        t.write(reduce_by(SLIDE, factor), subfiletype=1, **TILES)


def smallest_first(t: Writer) -> None:
    for factor in (4, 2):
        t.write(reduce_by(SLIDE, factor), subfiletype=1, metadata=None, **TILES)
    t.write(SLIDE, metadata=None, **TILES, **CM)


def unmarked(t: Writer) -> None:
    for factor in (4, 1, 2):
        t.write(reduce_by(SLIDE, factor), metadata=None, **TILES, **CM)


def thumbnail_first(t: Writer) -> None:
    t.write(reduce_by(SLIDE, 8), photometric="rgb", rowsperstrip=16, metadata=None)
    t.write(SLIDE, metadata=None, **TILES, **CM)
    for factor in (2, 4):
        t.write(reduce_by(SLIDE, factor), subfiletype=1, metadata=None, **TILES)


def levels_as_images(t: Writer) -> None:
    t.write(reduce_by(SLIDE, 4), metadata=ome("slide #3"), **TILES)
    t.write(SLIDE, metadata=ome("slide #1"), **TILES)
    t.write(reduce_by(SLIDE, 2), metadata=ome("slide #2"), **TILES)
    t.write(reduce_by(SLIDE, 3), metadata=ome("label image"), **TILES)


def named_by_description(t: Writer) -> None:
    t.write(MACRO, description="Macro", metadata=None, **TILES)
    t.write(SLIDE, metadata=None, **TILES, **CM)
    for factor in (2, 4):
        t.write(reduce_by(SLIDE, factor), subfiletype=1, metadata=None, **TILES)


def small_extra(t: Writer) -> None:
    t.write(np.full((40, 50, 3), 9, np.uint8), metadata=None, **TILES)
    unmarked(t)


@pytest.mark.parametrize(
    ("make", "page"),
    [
        (macro_first, 1), (smallest_first, 2), (unmarked, 1), (thumbnail_first, 1),
        (levels_as_images, 1), (named_by_description, 1), (small_extra, 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("reader", ["auto", "tifffile"])
def test_the_slide_is_chosen_by_structure(
    make: Callable[[Writer], None], page: int, reader: str, tmp_path: Path
) -> None:
    path = tmp_path / ("slide.ome.tif" if "ome" in make.__code__.co_names else "slide.tif")
    with tifffile.TiffWriter(path) as writer:
        make(writer)
    with open_slide(path, reader=reader) as slide:
        assert slide.mpp == pytest.approx(0.5)
        assert [level.downsample for level in slide.levels] == [1, 2, 4]
        for number, level in enumerate(slide.levels):
            pixels = slide.read(number, 0, 0, level.width, level.height)
            np.testing.assert_array_equal(pixels, reduce_by(SLIDE, int(level.downsample)))
        assert (slide.image["page"], slide.image["number"], slide.image["slides"]) == (page, 1, 1)
        assert bool(slide.image["associated"]) == (make not in (smallest_first, unmarked))
    if make is not thumbnail_first:  # which OpenSlide does not recognise
        return
    with pytest.raises(SlideError):
        open_slide(path, reader="openslide")


def test_openslide_takes_no_other_image(tmp_path: Path) -> None:
    pytest.importorskip("openslide")
    with tifffile.TiffWriter(tmp_path / "slide.tif") as writer:
        writer.write(MACRO, description="macro", metadata=None, **TILES)
        writer.write(SLIDE, metadata=None, **TILES)
    with pytest.raises(SlideError, match="OpenSlide takes an image of 1600 x 300 px .* 1024 x 768"):
        open_slide(tmp_path / "slide.tif", reader="openslide")


def two_regions(path: Path) -> tuple[Pixels, Pixels]:
    parts = SLIDE[:384], SLIDE[384:]
    with tifffile.TiffWriter(path) as writer:
        writer.write(np.repeat(MACRO, 4, 0), metadata=ome("macro", 40.0), **TILES)
        for name, part in zip(("left", "right"), parts, strict=True):
            writer.write(part, subifds=1, metadata=ome(name), **TILES)
            writer.write(reduce_by(part, 2), subfiletype=1, **TILES)
    return parts


def test_several_slides_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "two.ome.tif"
    parts = two_regions(path)
    message = (
        "expected one slide, got 2 images (1: 'left', 1024 x 384 px, 2: 'right', 1024 x 384 px): "
        "name them two.ome.tif#1 to two.ome.tif#2, or use open_slide(..., image=1)"
    )
    with pytest.raises(SlideError) as raised:
        open_slide(path)
    assert (raised.value.reason, raised.value.message) == ("several", message)
    for number, part in enumerate(parts, 1):
        with open_slide(path, image=number) as slide:
            assert slide.image["name"] == ("left", "right")[number - 1]
            np.testing.assert_array_equal(slide.read(0, 0, 0, 1024, 384), part)
            np.testing.assert_array_equal(slide.read(1, 0, 0, 512, 192), reduce_by(part, 2))
    for number in (0, 3):
        with pytest.raises(SlideError, match=f"expected an image from 1 to 2, got {number}"):
            open_slide(path, image=number)


def test_several_slides_in_one_generic_tiff(tmp_path: Path) -> None:
    """Pages of one size, and a smaller one that shows something else, are slides; levels follow."""
    path = tmp_path / "slide.tif"
    others = [draw_tissue(1024, 768, seed=1), draw_tissue(512, 384, seed=2)]
    with tifffile.TiffWriter(path) as writer:
        for image in (SLIDE, *others):
            writer.write(image, metadata=None, **TILES, **CM)
            writer.write(reduce_by(image, 2), subfiletype=1, metadata=None, **TILES)
    with pytest.raises(SlideError, match="got 3 images") as raised:
        open_slide(path)
    assert raised.value.reason == "several"
    for number, image in enumerate((SLIDE, *others), 1):
        with open_slide(path, image=number) as slide:
            for level, factor in enumerate((1, 2)):
                part = reduce_by(image, factor)
                pixels = slide.read(level, 0, 0, part.shape[1], part.shape[0])
                np.testing.assert_array_equal(pixels, part)


def test_slides_of_a_file_are_tiled_by_number(tmp_path: Path) -> None:
    two_regions(tmp_path / "two.ome.tif")
    (tmp_path / "list.csv").write_text("path\ntwo.ome.tif#1\ntwo.ome.tif#2\n")
    options: Any = {"encoder": "stain-stats", "mpp": 0.5, "tile_px": 64, "workers": 0}
    tiled = tile_slides(tmp_path / "list.csv", tmp_path / "store", **options)
    assert (tiled.done, tiled.failed) == (2, {})
    store = FeatureStore(tmp_path / "store")
    assert sorted(key.rpartition("-")[0] for key in store) == ["two.ome_1", "two.ome_2"]
    for key, slide in store.items():
        number = int(key.rpartition("-")[0][-1])
        assert slide.attrs["name"] == f"two.ome.tif#{number}"
        assert slide.attrs["source"]["path"] == str(tmp_path / "two.ome.tif")
        assert slide.attrs["image"] == {
            "page": number, "name": ("left", "right")[number - 1], "number": number, "slides": 2,
            "associated": ["'macro', 1600 x 1200 px"],
        }  # fmt: skip
        assert slide.features.shape[0] > 5
    tiled = tile_slides(tmp_path / "two.ome.tif", tmp_path / "other", **options)
    (message,) = tiled.failed.values()
    assert "got 2 images" in message


def test_numbers_of_images_in_names(tmp_path: Path) -> None:
    """A number after # is that of an image, unless a file has this name."""
    for name in ("a.tif", "b#2", "c #3.tif"):
        (tmp_path / name).write_bytes(b"x")
    paths = [tmp_path / name for name in ("a.tif#2", "a.tif#1", "a.tif", "b#2", "c #3.tif")]
    sources = find_slides(paths)
    assert [(source.name, source.image, source.path.name) for source in sources] == [
        ("a.tif#1", 1, "a.tif"), ("a.tif#2", 2, "a.tif"), ("b#2", None, "b#2"),
        ("c #3.tif", None, "c #3.tif"),
    ]  # fmt: skip
    assert [source.name for source in find_slides([tmp_path])] == ["a.tif", "c #3.tif"]
    assert sources[0].key.startswith("a_1-")
    with pytest.raises(SlideError, match="no such file or folder"):
        find_slides([tmp_path / "none.tif#1"])
    assert Source(tmp_path / "a.tif", "x/a.tif#12").image == 12
