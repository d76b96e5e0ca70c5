"""Readers of slides: correct pixels and metadata, or one named error; no crash, no hang."""

import io
import os
import socket
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from motet.io.errors import SlideError
from motet.io.slides import jpeg_tiles
from motet.io.slides import levels as module
from motet.io.slides.levels import Level, make_levels
from motet.io.slides.open_slide import open_slide
from motet.io.slides.slide import Slide
from motet.io.store.source import Source, quick_hash
from motet.io.tiling.find_slides import dicom_series, find_slides
from numpy.typing import NDArray
from PIL import Image

from .conftest import SOAK, data_path
from .processes import run_python
from .slides import draw_tissue, make_pyramid, reduce_by

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")
openslide = pytest.importorskip("openslide")

APERIO = "Aperio Image Library v12\n900x700 (256x256) J2K|AppMag = 20|MPP = 0.2527"
Pixels = NDArray[np.uint8]


def near(image: Pixels, other: Pixels) -> float:
    return float(np.abs(image.astype(int) - other).mean())


def inside(image: Pixels, x: int, y: int, width: int, height: int) -> Pixels:
    """Cut a region out of an image; pixels outside of the image are white."""
    out = np.full((height, width, 3), 255, np.uint8)
    rows = slice(max(y, 0), max(0, min(y + height, image.shape[0])))
    columns = slice(max(x, 0), max(0, min(x + width, image.shape[1])))
    part = image[rows, columns]
    if part.size:
        top, left = rows.start - y, columns.start - x
        out[top : top + part.shape[0], left : left + part.shape[1]] = part
    return out


def pages_of(path: Path) -> list[Pixels]:
    with tifffile.TiffFile(path) as tiff:
        return [page.asarray() for page in tiff.pages]


# Real slides

DICOM = "CMU-1-Small-Region_dicom/1.2.826.0.1.3680043.8.498.58740178995208579534253317996600852419"
REAL = {  # reader, vendor, mpp, (width, height, downsample) of each level; or the reason of refusal
    "CMU-1-Small-Region.svs": ("libjpeg", "aperio", 0.499, [(2220, 2967, 1)]),
    f"{DICOM}.dcm": ("openslide", "dicom", 0.499, [(2220, 2967, 1)]),
    "tcga-cr-7395-01a-01-ts1.svs": (
        "tifffile", "aperio", None, [(4443, 3567, 1), (2221, 1783, 2)],
    ),
    "1065626.svs": ("openslide", "aperio", 0.5026, [(11952, 10249, 1), (2988, 2562, 4)]),
    "test3-DAPI-2-387.ndpi": (
        "openslide", "hamamatsu", 0.228175,
        [(3968 >> n, 4864 >> n, 1 << n) for n in range(7)],
    ),
    "kidney-48-5.tif": ("tifffile", "generic-tiff", None, [(1493, 901, 1)]),
    "patch.tif": (
        "tifffile", "generic-tiff", None,
        [(256, 256, 1), (128, 128, 2), (64, 64, 4), (32, 32, 8), (1, 1, 256)],
    ),
    "os_small.svs": ("libjpeg", "aperio", 0.499, [(16, 16, 1)]),
    "pen/tcga-green-pen.png": ("pillow", "png", None, [(754, 631, 1)]),
    "pen/tcga-red-pen.png": ("pillow", "png", None, [(471, 448, 1)]),
    "pen/wsi-blue-pen.png": ("pillow", "png", None, [(174, 133, 1)]),
    "broken.svs": "unreadable",
    "unopenable.tiff": "unsupported",
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_slides(name: str) -> None:
    """The metadata are the known ones, and level 0 is as OpenSlide reads it."""
    path, expected = data_path("slides", name), REAL[name]
    if isinstance(expected, str):
        with pytest.raises(SlideError) as raised:
            open_slide(path)
        assert raised.value.reason == expected
        return
    reader, vendor, mpp, levels = expected
    with open_slide(path) as slide:
        assert (slide.reader, slide.vendor) == (reader, vendor)
        assert slide.mpp == (mpp if mpp is None else pytest.approx(mpp, rel=1e-5))
        assert slide.levels == tuple(Level(w, h, float(d)) for w, h, d in levels)
        if openslide.OpenSlide.detect_format(path) is None:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            np.testing.assert_array_equal(slide.read(0, 0, 0, *pixels.shape[1::-1]), pixels)
            return
        other = openslide.OpenSlide(path)
        random = np.random.default_rng(0)
        for _ in range(8):
            x, y = random.integers(levels[0][:2])
            seen = np.asarray(other.read_region((int(x), int(y)), 0, (300, 200)))
            np.testing.assert_array_equal(
                slide.read(0, x, y, 300, 200),
                np.where(seen[..., 3:] == 255, seen[..., :3], 255),
            )


def test_a_slide_whose_tiles_are_damaged() -> None:
    with open_slide(data_path("slides", "unreadable.svs")) as slide:
        assert slide.damaged(0).tolist() == [[0, 0, 16, 16]]
        with pytest.raises(SlideError, match="16 x 16 px at .0, 0. of level 0"):
            slide.read(0, 0, 0, 16, 16)
        with pytest.raises(SlideError, match="nothing can be read"):
            slide.thumbnail()


@pytest.mark.parametrize("name", ["tcga-cr-7395-01a-01-ts1.svs", "1065626.svs"])
@pytest.mark.parametrize("reader", ["auto", "openslide", "tifffile"])
def test_lower_levels_of_real_slides(name: str, reader: str) -> None:
    """Levels are not interpolated; OpenSlide alone is 1.2 grey levels off (downsample 4.0002)."""
    path = data_path("slides", name)
    with open_slide(path, reader=reader) as slide:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages[2].asarray()
        np.testing.assert_array_equal(slide.read(1, 1100, 900, 700, 600), page[900:1500, 1100:1800])


# Made slides


def module_has(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


KINDS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "libjpeg": ("libjpeg", lambda path: make_pyramid(path, (1001, 703))),
    "libjpeg without an ending": ("libjpeg", lambda path: make_pyramid(path, (1001, 703))),
    "libjpeg aperio": ("libjpeg", lambda path: make_pyramid(path, (1001, 703), description=APERIO)),
    "libjpeg 240": ("libjpeg", lambda path: make_pyramid(path, (1001, 703), (240, 240), (1, 2, 3))),
    "deflate": ("tifffile", lambda p: make_pyramid(p, (1001, 703), compression="deflate")),
    "lzw": ("tifffile", lambda p: make_pyramid(p, (1001, 703), compression="lzw")),
    "none": ("tifffile", lambda p: make_pyramid(p, (1001, 703), compression="none")),
    "packbits": ("tifffile", lambda p: make_pyramid(p, (1001, 703), compression="packbits")),
    "jpeg 2000": (
        "tifffile", lambda p: make_pyramid(p, (1001, 703), compression="aperio_jp2000_rgb"),
    ),
    "jpeg 2000 ycbcr": (
        "tifffile",
        lambda p: make_pyramid(
            p, image=np.asarray(Image.fromarray(draw_tissue(1001, 703)).convert("YCbCr")),
            factors=(1, 4), compression="aperio_jp2000_ycbc", description=APERIO,
        ),
    ),
    "strips": ("tifffile", lambda p: tifffile.imwrite(p, draw_tissue(1001, 703), rowsperstrip=40)),
    "packed strips": (
        "tifffile",
        lambda p: tifffile.imwrite(p, draw_tissue(1001, 703), rowsperstrip=37, compression="lzw"),
    ),
    "jpeg strips": (
        "tifffile",
        lambda p: tifffile.imwrite(
            p, draw_tissue(1001, 703), rowsperstrip=64, compression="jpeg", photometric="rgb"
        ),
    ),
    "png": ("pillow", lambda p: Image.fromarray(draw_tissue(1001, 703)).save(p, format="png")),
    "jpeg": ("pillow", lambda p: Image.fromarray(draw_tissue(1001, 703)).save(p, format="jpeg")),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Slide, list[Pixels]]]:
    slides = {}
    for kind, (reader, make) in KINDS.items():
        name = "SLIDE.X" if kind == "libjpeg without an ending" else "slide.tif"
        path = tmp_path_factory.mktemp("made") / name
        make(path)
        slide = open_slide(path)
        if reader != "cucim" or module_has("cucim"):
            assert slide.reader == reader, kind
        if reader == "pillow":
            with Image.open(path) as image:
                pages = [np.asarray(image.convert("RGB"))]
        else:
            pages = pages_of(path)
        if kind == "jpeg 2000 ycbcr":
            pages = [np.asarray(Image.fromarray(page, "YCbCr").convert("RGB")) for page in pages]
        slides[kind] = slide, pages
    return slides


def retag(path: Path, tag: int, value: int) -> None:
    """Overwrite a tag of all pages."""
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for page in tiff.pages:
            page.tags[tag].overwrite(value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_level_is_exact(kind: str, made: dict[str, tuple[Slide, list[Pixels]]]) -> None:
    slide, pages = made[kind]
    assert len(slide.levels) == len(pages)
    for level, page in enumerate(pages):
        pixels = slide.read(level, 0, 0, page.shape[1], page.shape[0])
        if kind == "jpeg 2000 ycbcr":  # Pillow's rounding
            assert np.abs(pixels.astype(int) - page).max() <= 1
        else:
            np.testing.assert_array_equal(pixels, page)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_reads(kind: str, made: dict[str, tuple[Slide, list[Pixels]]], data: st.DataObject) -> None:
    """Any region of any level reads right, white outside; single reads and many at once."""
    slide, pages = made[kind]
    level = data.draw(st.integers(0, len(pages) - 1))
    sides = slide.levels[level]
    page = slide.read(level, 0, 0, sides.width, sides.height)
    place = st.tuples(st.integers(-300, sides.width + 50), st.integers(-300, sides.height + 50))
    places = data.draw(st.lists(place, max_size=40))
    width, height = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    corners = np.array(places, np.int64).reshape(-1, 2)
    items = slide.read_many(level, corners, width, height, workers=data.draw(st.integers(1, 3)))
    for (x, y), item in zip(places, items, strict=True):
        assert not isinstance(item, SlideError)
        np.testing.assert_array_equal(item, inside(page, x, y, width, height))
    for x, y in places[:2]:
        one = slide.read(level, x, y, width, height)
        np.testing.assert_array_equal(one, inside(page, x, y, width, height))
        one[:] = 0  # the array belongs to the caller


@pytest.mark.parametrize("factors", [(1, 2), (1, 3), (1, 4, 16), (1, 2, 5)])
def test_odd_pyramids(factors: tuple[int, ...], tmp_path: Path) -> None:
    """At downsamples such as 2.0005 each reader returns the exact pixels of each level."""
    path = tmp_path / "slide.tif"
    make_pyramid(path, (2051, 1037), factors=factors)
    pages = pages_of(path)
    for reader in ("auto", "openslide", "tifffile"):
        with open_slide(path, reader=reader) as slide:
            assert [level.downsample for level in slide.levels] == list(factors)
            for level, page in enumerate(pages):
                random = np.random.default_rng(0)
                for _ in range(20):
                    x, y = int(random.integers(page.shape[1])), int(random.integers(page.shape[0]))
                    np.testing.assert_array_equal(
                        slide.read(level, x, y, 40, 30), inside(page, x, y, 40, 30)
                    )


def test_a_stream_that_is_left(made: dict[str, tuple[Slide, list[Pixels]]]) -> None:
    corners = np.array([[x, y] for y in range(0, 700, 20) for x in range(0, 1000, 20)])
    for kind in ("libjpeg", "deflate", "jpeg 2000"):
        slide, pages = made[kind]
        for workers in (1, 2):
            items = slide.read_many(0, corners, 256, 256, workers=workers)
            first = next(items)
            assert not isinstance(first, SlideError)
            np.testing.assert_array_equal(first, pages[0][:256, :256])
            del items
        assert next(slide.read_many(0, corners[:0], 9, 9), None) is None


def test_threads_may_share_a_slide(made: dict[str, tuple[Slide, list[Pixels]]]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    random = np.random.default_rng(0)
    places = random.integers(0, 600, (200, 2)).tolist()
    for kind in ("libjpeg", "lzw", "jpeg 2000 ycbcr", "png"):
        slide, _ = made[kind]
        pixels = slide.read(0, 0, 0, 1001, 703)
        with ThreadPoolExecutor(4) as pool:
            parts = list(pool.map(lambda place, slide=slide: slide.read(0, *place, 90, 80), places))
        for (x, y), part in zip(places, parts, strict=True):
            np.testing.assert_array_equal(part, inside(pixels, x, y, 90, 80))


def test_what_cannot_be_asked(made: dict[str, tuple[Slide, list[Pixels]]]) -> None:
    slide, _ = made["libjpeg"]
    with pytest.raises(ValueError, match="level: expected 0 to 2, got 3"):
        slide.read(3, 0, 0, 9, 9)
    with pytest.raises(ValueError, match="width and height: expected at least 1, got 0 and 5"):
        slide.read(0, 0, 0, 0, 5)
    with pytest.raises(ValueError, match="width and height: expected at least 1, got 9 and -1"):
        next(slide.read_many(0, np.zeros((1, 2), int), 9, -1))
    with pytest.raises(TypeError, match="float"):
        slide.read(0, 0.5, 0, 9, 9)  # pyright: ignore[reportArgumentType]
    for corners in (np.zeros((2, 3), int), np.zeros((2, 2)), np.zeros(4, int)):
        with pytest.raises(ValueError, match="corners: expected integers"):
            next(slide.read_many(0, corners, 9, 9))
    with pytest.raises(ValueError, match="longest_px: expected at least 1, got 0"):
        slide.thumbnail(0)
    with pytest.raises(ValueError, match="reader: expected auto, libjpeg, cucim.* got 'zarr'"):
        open_slide("slide.svs", reader="zarr")


def test_levels() -> None:
    """The downsample is the integer divisor if there was one, else the mean of both ratios."""
    sides = [(4097, 3001), (1024, 750), (1025, 751), (256, 188), (1000, 750), (3, 2)]
    downsamples = [level.downsample for level in make_levels(Path("a"), sides)]
    assert downsamples == [1.0, 4.0, 4.0, 16.0, (4.097 + 3001 / 750) / 2, 2048.0]
    assert make_levels(Path("a"), [(4443, 3567), (2221, 1783)])[1].downsample == 2.0
    assert make_levels(Path("a"), [(46000, 32914), (2875, 2057)])[1].downsample == 16.0


@pytest.mark.parametrize("kind", ["libjpeg", "deflate", "jpeg 2000 ycbcr", "jpeg"])
@pytest.mark.parametrize("longest", [1, 37, 200, 256, 640, 1000, 5000])
def test_thumbnails(kind: str, longest: int, made: dict[str, tuple[Slide, list[Pixels]]]) -> None:
    """Thumbnails are area means of the coarsest level that is large enough, to 0.5 grey levels."""
    slide, _ = made[kind]
    thumb = slide.thumbnail(longest)
    width = min(longest, 1001)
    height = max(1, round(703 * width / 1001))
    assert thumb.shape == (height, width, 3)
    enough = [n for n, level in enumerate(slide.levels)
              if level.width >= width and level.height >= height]  # fmt: skip
    level = slide.levels[enough[-1]]
    means = slide.read(enough[-1], 0, 0, level.width, level.height).astype(np.float64)
    for axis, size, full in ((0, height, 703), (1, width, 1001)):
        length = means.shape[axis]
        edges = np.minimum(np.arange(size + 1) * (full / level.downsample / size), length)
        low = np.minimum(edges.astype(int), length - 1)
        sums = np.insert(means.cumsum(axis), 0, 0, axis)
        shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
        total = sums.take(low, axis) + (edges - low).reshape(shape) * means.take(low, axis)
        means = np.diff(total, axis=axis) / np.diff(edges).reshape(shape)
    assert np.abs(means - thumb).max() <= 0.501


# Pixel formats


def saved(path: Path, image: Pixels, **options: object) -> Slide:
    tifffile.imwrite(path, image, metadata=None, **options)
    return open_slide(path)


def test_alpha_is_composed_over_white(tmp_path: Path) -> None:
    image = draw_tissue(300, 200)
    alpha = np.tile(np.linspace(0, 255, 300).astype(np.uint8)[None, :, None], (200, 1, 1))
    share = alpha / 255
    expected = image * share + 255 * (1 - share)
    path = tmp_path / "slide.tif"
    with saved(path, np.dstack([image, alpha]), photometric="rgb", extrasamples=[2]) as slide:
        assert np.abs(slide.read(0, 0, 0, 300, 200) - expected).max() <= 0.5
    before = (image * share + 0.5).astype(np.uint8)
    with saved(path, np.dstack([before, alpha]), photometric="rgb", extrasamples=[1]) as slide:
        assert np.abs(slide.read(0, 0, 0, 300, 200) - expected).max() <= 1
    Image.fromarray(np.dstack([image, alpha])).save(tmp_path / "photo.png")
    with open_slide(tmp_path / "photo.png") as slide:
        assert np.abs(slide.read(0, 0, 0, 300, 200) - expected).max() <= 0.5


def test_grey_and_palette(tmp_path: Path) -> None:
    grey = draw_tissue(300, 200)[..., 1]
    path = tmp_path / "slide.tif"
    rgb = np.repeat(grey[..., None], 3, 2)
    with saved(path, grey, photometric="minisblack", tile=(64, 64)) as slide:
        np.testing.assert_array_equal(slide.read(0, 0, 0, 300, 200), rgb)
    with saved(path, grey, photometric="miniswhite", compression="deflate") as slide:
        np.testing.assert_array_equal(slide.read(0, 0, 0, 300, 200), 255 - rgb)
    colours = Image.fromarray(draw_tissue(300, 200)).quantize(64)
    for name in ("slide.tif", "photo.png"):
        colours.save(tmp_path / name)
        with open_slide(tmp_path / name) as slide:
            pixels = slide.read(0, 0, 0, 300, 200)
            np.testing.assert_array_equal(pixels, np.asarray(colours.convert("RGB")))
    for name in ("photo.png", "photo.jpg"):
        Image.fromarray(grey).save(tmp_path / name)
        with open_slide(tmp_path / name) as slide, Image.open(tmp_path / name) as image:
            pixels = slide.read(0, 0, 0, 300, 200)
            np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))
    Image.fromarray(draw_tissue(300, 200)).convert("CMYK").save(tmp_path / "photo.jpg")
    with open_slide(tmp_path / "photo.jpg") as slide:
        assert near(slide.read(0, 0, 0, 300, 200), draw_tissue(300, 200)) < 8


def test_forms_that_would_be_read_wrongly(tmp_path: Path) -> None:
    image, path = draw_tissue(300, 200), tmp_path / "slide.tif"
    deep = image.astype(np.uint16) * 257
    for pixels, options, message in [
        (deep, {"photometric": "rgb", "tile": (64, 64)}, "16 bits per sample; expected 8"),
        (deep[..., 0], {"photometric": "minisblack"}, "16 bits per sample"),
        (image / np.float32(255), {"photometric": "rgb"}, "32 bits per sample"),
        (np.dstack([image, image[..., 0]]), {"photometric": "separated"}, "4 samples of SEPARATED"),
        (image, {"photometric": "rgb", "compression": "zstd"}, "compression ZSTD; convert it"),
    ]:
        tifffile.imwrite(path, pixels, metadata=None, **options)
        with pytest.raises(SlideError, match=message) as raised:
            open_slide(path)
        assert raised.value.reason == "unsupported"
    tifffile.imwrite(tmp_path / "a.ome.tif", np.stack([image[..., 0]] * 4),
                     photometric="minisblack", metadata={"axes": "CYX"})  # fmt: skip
    with pytest.raises(SlideError, match="4 channels or focal planes"):
        open_slide(tmp_path / "a.ome.tif")
    Image.fromarray(deep[..., 0]).save(tmp_path / "photo.png")
    with pytest.raises(SlideError, match="mode I;16; expected 8 bits"):
        open_slide(tmp_path / "photo.png")


def test_jpeg_forms(tmp_path: Path) -> None:
    """Colours and subsampling are as in OpenSlide; progressive JPEG is read by tifffile."""
    image, path = draw_tissue(500, 400), tmp_path / "slide.tif"
    for subsampling in ((1, 1), (2, 1), (2, 2)):
        options = {"compression": "jpeg", "photometric": "rgb", "subsampling": subsampling}
        with saved(path, image, tile=(256, 256), **options) as slide:
            assert slide.reader == "libjpeg"
            pixels = slide.read(0, 0, 0, 500, 400)
        seen = np.asarray(openslide.OpenSlide(path).read_region((0, 0), 0, (500, 400)))
        np.testing.assert_array_equal(pixels, seen[..., :3])
        assert near(pixels, image) < 4
    tiles = []
    for seed in range(4):
        tile = io.BytesIO()
        Image.fromarray(draw_tissue(256, 256, seed=seed)).save(
            tile, "jpeg", quality=90, progressive=True
        )
        tiles.append(tile.getvalue())
    tifffile.imwrite(path, iter(tiles), shape=(512, 512, 3), dtype=np.uint8, tile=(256, 256),
                     photometric="ycbcr", compression="jpeg", subsampling=(2, 2))  # fmt: skip
    with open_slide(path) as slide:
        assert slide.reader == "tifffile"
        assert near(slide.read(0, 0, 0, 256, 256), draw_tissue(256, 256)) < 5
    for reader in ("libjpeg", "cucim"):
        with pytest.raises(SlideError, match=f"{reader} does not read it: its JPEG is progressive"):
            open_slide(path, reader=reader)


# Resolution


@pytest.mark.parametrize(
    ("options", "mpp"),
    [
        ({"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}, 0.5),
        ({"resolution": (20000, 20200), "resolutionunit": "CENTIMETER"}, (0.5 + 0.5 / 1.01) / 2),
        ({"resolution": (20000, 40000), "resolutionunit": "CENTIMETER"}, (0.5, 0.25)),
        ({"resolution": (50800, 50800), "resolutionunit": "INCH"}, 0.5),
        ({"resolution": (20000, 20000), "resolutionunit": "NONE"}, None),
        ({"resolution": (72, 72), "resolutionunit": "INCH"}, None),
        ({"resolution": (300, 300), "resolutionunit": "INCH"}, None),
        ({"resolution": (10**7, 10**7), "resolutionunit": "CENTIMETER"}, None),
        ({"resolution": ((0, 1), (0, 1)), "resolutionunit": "CENTIMETER"}, None),
        ({}, None),
        ({"description": "Aperio Image Library|AppMag = 20|MPP = 0.2527"}, 0.2527),
        ({"description": "Aperio Image Library|MPP = 0,2527|X = 1"}, 0.2527),
        ({"description": "Aperio Image Library|AppMag = 20"}, None),
        ({"description": "Aperio Image Library|MPP = nan"}, None),
        ({"description": "Aperio Image Library|MPP = -1"}, None),
        (
            {"description": '<OME><Pixels PhysicalSizeX="250" PhysicalSizeXUnit="nm" '
             'PhysicalSizeY="0.25" SizeC="3"/></OME>'},
            0.25,
        ),
    ],
)  # fmt: skip
def test_mpp(
    options: dict[str, object], mpp: float | tuple[float, float] | None, tmp_path: Path
) -> None:
    """The mpp is the file's; a default resolution in dpi of a scanner or printer is ignored.

    Axes that differ by more than 2 % are not averaged.
    """
    with saved(tmp_path / "slide.tif", draw_tissue(64, 64), photometric="rgb", **options) as slide:
        if isinstance(mpp, tuple):
            assert slide.mpp is None
            assert slide.mpp_axes == pytest.approx(mpp, rel=1e-6)
        else:
            assert slide.mpp == (None if mpp is None else pytest.approx(mpp, rel=1e-6))


def test_philips(tmp_path: Path) -> None:
    """Each level halves the last; empty tiles of 0 bytes fill it up; spacing is in mm."""
    path = tmp_path / "slide.tiff"
    image = draw_tissue(1024, 640)
    spacing = '<Attribute Name="DICOM_PIXEL_SPACING">"0.00025" "0.000252"</Attribute>'
    with tifffile.TiffWriter(path) as writer:
        for level in range(4):
            small = reduce_by(image, 2**level)
            filled = np.zeros((-(-small.shape[0] // 256) * 256, -(-small.shape[1] // 256) * 256, 3))
            filled[: small.shape[0], : small.shape[1]] = small
            writer.write(
                filled.astype(np.uint8), tile=(256, 256), photometric="rgb", compression="jpeg",
                subfiletype=1 if level else 0, software="Philips DP v1.0", metadata=None,
                description=f"<DataObject>{spacing}</DataObject>" if level == 0 else None,
            )  # fmt: skip
    with open_slide(path) as slide:
        assert (slide.vendor, slide.reader, slide.mpp) == ("philips", "libjpeg", 0.251)
        assert slide.mpp_axes == (0.252, 0.25)  # rows first: their distance is along y
        sides = [(level.width, level.height, level.downsample) for level in slide.levels]
        assert sides == [(1024, 768, 1), (512, 512, 2), (256, 256, 4)]
        for level, page in enumerate(pages_of(path)[:3]):
            np.testing.assert_array_equal(slide.read(level, 30, 20, 200, 230), page[20:250, 30:230])


# Hostile files


def refused(path: Path) -> str:
    with pytest.raises(SlideError) as raised:
        open_slide(path)
    assert "\n" not in raised.value.message
    return raised.value.reason


def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(tmp_path / "none.svs") == "missing"
    assert refused(tmp_path / ("n" * 300 + ".svs")) == "missing"
    with pytest.raises(SlideError, match="[^:]*: expected a file, got a folder"):
        open_slide(tmp_path)
    assert refused(tmp_path / "a\0b.svs") == "unreadable"
    os.mkfifo(tmp_path / "pipe.svs")
    assert refused(tmp_path / "pipe.svs") == "unreadable"  # does not wait for a writer
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)
        server.bind("socket.svs")
        assert refused(tmp_path / "socket.svs") == "unreadable"
    (tmp_path / "loop.svs").symlink_to("loop.svs")
    assert refused(tmp_path / "loop.svs") == "missing"
    (tmp_path / "file").write_bytes(b"II*\0")
    assert refused(tmp_path / "file" / "below.svs") == "missing"
    for content in (b"", b"x", b"II*\0", b"MM\0*" + bytes(60), b"\x89PNG\r\n\x1a\n",
                    b"\xff\xd8\xff", bytes(1000), bytes(128) + b"DICM" + bytes(50)):  # fmt: skip
        (tmp_path / "file").write_bytes(content)
        assert refused(tmp_path / "file") == "unreadable", content
    make_pyramid(tmp_path / "locked.tif", (64, 64), factors=(1,))
    (tmp_path / "locked.tif").chmod(0)
    if not os.access(tmp_path / "locked.tif", os.R_OK):  # root can read it nevertheless
        assert refused(tmp_path / "locked.tif") == "unreadable"


def test_names(tmp_path: Path) -> None:
    for name in (
        "with\nbreak.tif",
        "größe 組織 🔬.tif",
        "percent %s {0}.tif",
        "-rf.tif",
        "n" * 250,
    ):
        path = tmp_path / name
        image = make_pyramid(path, (300, 200), factors=(1,))
        for reader in ("auto", "openslide", "tifffile"):
            with open_slide(path, reader=reader) as slide:
                assert near(slide.read(0, 0, 0, 300, 200), image) < 4
    path.write_bytes(b"")
    assert refused(path) == "unreadable"
    assert refused(tmp_path / "none\nsuch.svs") == "missing"


def test_declared_sizes(tmp_path: Path) -> None:
    """Impossible sizes are refused before any memory is allocated for them."""
    path = tmp_path / "slide.tif"
    for side in (2**31 - 1, 2**31, 2**32 - 1, module.MAX_SIDE_PX + 1):
        for compression in ("jpeg", "none"):
            make_pyramid(path, (300, 200), factors=(1,), compression=compression)
            retag(path, 256, side)
            retag(path, 257, side)
            assert refused(path) == "too-large"
    make_pyramid(path, (300, 200), factors=(1,))
    retag(path, 322, 60_000 // 16 * 16)
    retag(path, 323, 60_000 // 16 * 16)
    assert refused(path) == "too-large"
    for width, height in ((30_000, 30_000), (2**31 - 1, 1), (60_000, 5_000)):
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(10**6))), (b"IEND", b"")]
        content = b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
            for name, body in chunks
        )
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert refused(path) == "too-large"


def test_a_tile_that_declares_more_than_it_is(tmp_path: Path) -> None:
    """A JPEG of 65,000 px a side in place of a tile is damage, not 12 GB."""
    path = tmp_path / "slide.tif"
    make_pyramid(path, (300, 200), factors=(1,))
    content = path.read_bytes()
    frame = content.index(b"\xff\xc0\x00\x11\x08")
    path.write_bytes(content[: frame + 5] + b"\xfd\xe8\xfd\xe8" + content[frame + 9 :])
    with open_slide(path, reader="tifffile") as slide, pytest.raises(SlideError, match="damaged"):
        slide.read(0, 0, 0, 100, 100)


def test_circles_of_directories(tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    make_pyramid(path, (300, 200), factors=(1, 2))
    with tifffile.TiffFile(path) as tiff:
        first, last = tiff.pages[0].offset, tiff.pages[1]
        at = last.offset + 2 + 12 * len(last.tags)
    content = bytearray(path.read_bytes())
    content[at : at + 4] = struct.pack("<I", first)
    path.write_bytes(content)
    with open_slide(path) as slide:
        assert len(slide.levels) == 2


def test_a_truncated_photograph(tmp_path: Path) -> None:
    """A truncated photograph is damaged: which of its rows are valid is not known."""
    for kind in ("png", "jpeg"):
        path = tmp_path / f"photo.{kind}"
        Image.fromarray(draw_tissue(300, 200)).save(path)
        path.write_bytes(path.read_bytes()[:5000])
        with open_slide(path) as slide:
            for _ in range(2):
                with pytest.raises(SlideError, match="at .0, 0. of level 0"):
                    slide.read(0, 0, 0, 10, 10)
            with pytest.raises(SlideError, match="nothing can be read") as raised:
                slide.thumbnail()
            assert raised.value.reason == "damaged"


def test_openslide_goes_on_after_an_error(tmp_path: Path) -> None:
    """A handle of OpenSlide repeats its first error for ever, so the file is opened again."""
    path = tmp_path / "slide.svs"
    make_pyramid(
        path, (900, 700), factors=(1,), compression="aperio_jp2000_rgb", description=APERIO
    )
    with tifffile.TiffFile(path) as tiff:
        at = tiff.pages[0].dataoffsets[5]
    content = bytearray(path.read_bytes())
    with open_slide(path, reader="openslide") as slide:
        before = slide.read(0, 0, 0, 256, 256)
    content[at + 2 : at + 60] = bytes(58)
    path.write_bytes(content)
    with open_slide(path, reader="openslide") as slide:
        slide._tiff, tiff = None, slide._tiff  # as for a format whose tiles cannot be checked
        for _ in range(3):
            with pytest.raises(SlideError, match="OpenJPEG error"):
                slide.read(0, 300, 300, 100, 100)
            np.testing.assert_array_equal(slide.read(0, 0, 0, 256, 256), before)
        slide._tiff = tiff


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small slides of all kinds, and real ones, to be mutated."""
    folder = tmp_path_factory.mktemp("originals")
    for coding in ("jpeg", "deflate", "lzw", "none", "packbits", "aperio_jp2000_rgb"):
        make_pyramid(folder / f"{coding}.tif", (700, 500), factors=(1, 4), compression=coding)
    make_pyramid(folder / "aperio.svs", (700, 500), factors=(1, 4), description=APERIO)
    photo = Image.fromarray(draw_tissue(300, 200))
    for name in ("photo.png", "photo.jpg"):
        photo.save(folder / name)
    photo.quantize(64).save(folder / "palette.tif")
    photo.putalpha(128)
    photo.save(folder / "alpha.png")
    real = data_path("slides")
    for path in sorted(real.rglob("*")):
        if path.suffix == ".md" or path.parent.name == "pen" or not path.is_file():
            continue
        if SOAK or path.stat().st_size < 2_000_000 or path.suffix == ".ndpi":  # to be quick
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_mutated_files(originals: Path, tmp_path: Path) -> None:
    """No mutated file (200, or 2,000 in `make soak`) crashes, hangs or fills the memory."""
    program = Path(__file__).parent / "hostile_slides.py"
    count = 2000 if SOAK else 200
    done = subprocess.run(
        [sys.executable, program, originals, tmp_path, "0", str(count)],
        capture_output=True, timeout=60 * 60 if SOAK else 240, check=False,
    )  # fmt: skip
    lines = done.stdout.decode(errors="replace").splitlines()
    assert done.returncode == 0, f"{lines[-1:]}, {done.stderr.decode(errors='replace')[-2000:]}"


# Costs

OPENING = """
import sys, motet
with motet.io.open_slide(sys.argv[1]) as slide:
    slide.read(0, 0, 0, 256, 256)
print(*{name.split(".")[0] for name in sys.modules})
"""

MANY = """
import os, resource, sys
from motet.io.slides.open_slide import open_slide
from motet.io.errors import SlideError

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

def once():
    for path in sys.argv[1:]:
        with open_slide(path) as slide:
            slide.read(0, 0, 0, 256, 256)
            slide.thumbnail(200)

for _ in range(10):
    once()
before = resident()
for _ in range({count}):
    once()
print(resident() - before, len(os.listdir("/proc/self/fd")))
"""


@pytest.mark.parametrize("kind", ["libjpeg", "jpeg 2000", "jpeg 2000 ycbcr", "png"])
def test_a_first_tile_loads_readers_alone(
    kind: str, made: dict[str, tuple[Slide, list[Pixels]]]
) -> None:
    """A reader imports no slow library: a process reads its first tile after 0.15 s."""
    loaded = {*run_python(OPENING, str(made[kind][0].path)).split()}
    assert not loaded & {"torch", "lightning", "scipy", "pandas", "pyarrow", "zarr", "matplotlib"}


@pytest.mark.slow
def test_memory_and_files_after_200_slides(made: dict[str, tuple[Slide, list[Pixels]]]) -> None:
    kinds = ("libjpeg", "deflate", "jpeg 2000 ycbcr", "png")
    paths = [str(made[kind][0].path) for kind in kinds]
    grown, files = map(float, run_python(MANY.format(count=200 // len(paths)), *paths).split())
    assert grown < 8
    assert files < 12


@pytest.mark.skipif(not module_has("cucim"), reason="cuCIM is not installed")
@pytest.mark.parametrize("kind", ["libjpeg", "libjpeg aperio", "libjpeg 240"])
def test_cucim_reads_the_same(kind: str, made: dict[str, tuple[Slide, list[Pixels]]]) -> None:
    slide, pages = made[kind]
    with open_slide(slide.path, reader="cucim") as other:
        corners = np.array([[0, 0], [37, 101], [-20, 300]])
        for level in range(len(pages)):
            items = other.read_many(level, corners, 120, 90, workers=2)
            for (x, y), item in zip(corners.tolist(), items, strict=True):
                np.testing.assert_array_equal(item, slide.read(level, x, y, 120, 90))


@pytest.mark.skipif(not module_has("cucim"), reason="cuCIM is not installed")
def test_cucim_decodes_batches_on_a_gpu(
    made: dict[str, tuple[Slide, list[Pixels]]], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """On a fake of cuCIM's image: order, damage, errors of a batch, and messages in the log."""
    import torch
    from motet.io.slides import cucim

    slide, pages = made["libjpeg"]
    asked: list[str] = []
    fails = [False, True]

    class Image:
        """cuCIM's image, whose GPU is the CPU; in the second slide a batch fails."""

        def __init__(self, image: Any) -> None:
            self.image, self.fails, self.close = image, fails[len(asked)], image.close

        def read_region(self, places: Any, size: Any, level: int, **options: Any) -> Any:
            if not options:
                return self.image.read_region(places, size, level)
            asked.append(options["device"])
            return self.batches(places, size, options["batch_size"])

        def batches(self, places: Any, size: Any, count: int) -> Iterator[torch.Tensor]:
            os.write(2, b"[Error] cuFile is missing\n")
            for start in range(0, len(places), count):
                if start and self.fails:
                    raise RuntimeError("nvJPEG")
                part = [inside(pages[0], *at, *size) for at in places[start : start + count]]
                yield torch.from_numpy(np.stack(part))

    monkeypatch.setattr(cucim, "_tensor", lambda image, device: torch.as_tensor(image))
    corners = np.array([[x, y] for y in (-9, 0, 300) for x in range(0, 900, 90)])
    caplog.set_level("INFO", logger="motet.io.slides.cucim")
    for _ in fails:
        with open_slide(slide.path, reader="cucim") as other:
            assert isinstance(other, cucim.CuCimSlide)
            other._image = Image(other._image)
            items = list(other.read_many(0, corners, 64, 64, workers=2, device="cuda"))
        for (x, y), item in zip(corners.tolist(), items, strict=True):
            assert isinstance(item, torch.Tensor)
            np.testing.assert_array_equal(item.numpy(), inside(pages[0], x, y, 64, 64))
    assert asked == ["cuda", "cuda"]
    assert "cuFile" not in capfd.readouterr().err
    assert caplog.messages.count("cuCIM: [Error] cuFile is missing") == 2


# Missing packages


def test_without_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "slide.tif"
    image = make_pyramid(path, (300, 200))
    Image.fromarray(image).save(tmp_path / "photo.png")
    monkeypatch.setattr(jpeg_tiles, "native", lambda: None)
    with pytest.raises(SlideError, match=r"the C\+\+ of motet was not built") as raised:
        open_slide(path, reader="libjpeg")
    assert raised.value.reason == "no-reader"
    with open_slide(path) as slide:
        assert slide.reader == ("cucim" if module_has("cucim") else "tifffile")
    monkeypatch.setitem(sys.modules, "cucim", None)
    with open_slide(path) as slide:
        assert slide.reader == "tifffile"
    with pytest.raises(SlideError, match="--no-deps cucim-cu13") as raised:
        open_slide(path, reader="cucim")
    assert raised.value.reason == "no-reader"
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(SlideError, match=r"pip install 'motet\[wsi\]'") as raised:
        open_slide(path, reader="openslide")
    assert raised.value.reason == "no-reader"
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(SlideError, match=r"tifffile is not installed: pip install") as raised:
        open_slide(path)
    assert raised.value.reason == "no-reader"
    with open_slide(tmp_path / "photo.png") as slide:
        assert slide.reader == "pillow"


def test_a_reader_that_does_not_fit(tmp_path: Path) -> None:
    make_pyramid(tmp_path / "slide.tif", (300, 200), compression="deflate")
    Image.fromarray(draw_tissue(30, 20)).save(tmp_path / "photo.png")
    for name, reader in [("slide.tif", "cucim"), ("slide.tif", "pillow"), ("photo.png", "cucim"),
                         ("photo.png", "openslide"), ("photo.png", "tifffile")]:  # fmt: skip
        with pytest.raises(SlideError, match="leave reader='auto'") as raised:
            open_slide(tmp_path / name, reader=reader)
        assert raised.value.reason == "unsupported"


# Finding slides


def test_folders(tmp_path: Path) -> None:
    for name in (
        "b/2.svs",
        "b/1.SVS",
        "a.tif",
        "notes.txt",
        ".hidden.svs",
        ".git/x.svs",
        "c/x.doc",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "b" / "loop").symlink_to("..")
    (tmp_path / "c" / "gone.svs").symlink_to("nothing")
    sources = find_slides([tmp_path])
    assert [source.name for source in sources] == ["a.tif", "b/1.SVS", "b/2.svs"]
    assert [source.path for source in sources] == [tmp_path / source.name for source in sources]
    assert find_slides([tmp_path, tmp_path]) == sources
    assert find_slides([str(tmp_path / "a.tif")]) == [Source(tmp_path / "a.tif", "a.tif")]
    with pytest.raises(SlideError, match="no such file or folder"):
        find_slides([tmp_path / "none"])


def test_lists(tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    (tmp_path / "list.txt").write_text("slides/b.svs\n\n slides/a.svs \n")
    (tmp_path / "list.csv").write_text('patient,path\n1,slides/b.svs\n2,"slides/a.svs"\n')
    for name in ("list.txt", "list.csv"):
        sources = find_slides([tmp_path / name])
        assert [source.name for source in sources] == ["slides/a.svs", "slides/b.svs"]
        assert sources[0].path == tmp_path / "slides" / "a.svs"
    (tmp_path / "list.csv").write_text("patient,file\n1,a.svs\n")
    with pytest.raises(SlideError, match="expected a column 'path', got patient, file"):
        find_slides([tmp_path / "list.csv"])
    (tmp_path / "list.csv").write_bytes(b"path\n\xff\xfe\n")
    with pytest.raises(SlideError, match="expected a list of slides in UTF-8"):
        find_slides([tmp_path / "list.csv"])


def test_one_name_for_two_slides(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "slide.svs").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a/slide.svs' and .*b/slide.svs' are both called"):
        find_slides([tmp_path / "a", tmp_path / "b"])
    assert len(find_slides([tmp_path])) == 2


@given(name=st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=400))
def test_keys_are_names_of_folders(name: str) -> None:
    key = Source(Path("x"), name).key
    assert 9 <= len(key) <= 89
    assert not key.startswith(".")
    assert set(key) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert key == Source(Path("y"), name).key


def test_keys_differ() -> None:
    names = ["a/s.svs", "b/s.svs", "../s.svs", "/s.svs", "s.svs", "s.tif", "S.svs", "s\n.svs"]
    assert len({Source(Path("x"), name).key for name in names}) == len(names)
    assert Source(Path("x"), "../../etc/passwd").key.startswith("passwd-")


def test_a_dicom_series_is_one_slide(tmp_path: Path) -> None:
    """A DICOM series opens as its largest image, whichever of its files is given."""
    folder = data_path("slides", "CMU-1-Small-Region_dicom")
    (source,) = find_slides([folder])
    assert source.path.stat().st_size == max(path.stat().st_size for path in folder.iterdir())
    assert dicom_series(source.path) == (
        "1.2.826.0.1.3680043.8.498.21577574112843936045397065457192622591", 2220 * 2967,
    )  # fmt: skip
    content = source.path.read_bytes()[:20_000]
    end = content.index(b"\x48\x00\x07\x00UL") + 12  # the last element that is read
    for keep in [*range(0, end, 7), end - 1]:
        (tmp_path / "cut.dcm").write_bytes(content[:keep])
        assert dicom_series(tmp_path / "cut.dcm") is None


def test_quick_hash(tmp_path: Path) -> None:
    path = tmp_path / "file"
    seen = set()
    content = bytearray(os.urandom(400_000))
    for place in (None, 0, 200_000, 399_999):
        if place is not None:
            content[place] ^= 1
        path.write_bytes(content)
        seen.add(quick_hash(path))
    path.write_bytes(content[:-1])
    seen.add(quick_hash(path))
    assert len(seen) == 5
    assert all(len(one) == 16 for one in seen)
    path.write_bytes(b"")
    assert quick_hash(path) == quick_hash(path)


def test_reduce_by_is_the_mean() -> None:
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    np.testing.assert_array_equal(reduce_by(image, 4)[0, 0], image.mean((0, 1)) + 0.5)
