"""The reader of JPEG tiles: its pixels are OpenSlide's, and it reports what libjpeg reports."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from motet.io import SlideError, open_slide
from motet.io.native import native
from motet.io.slides.slide import Slide
from numpy.typing import NDArray
from PIL import Image, _imaging

from .bindings_helpers import LAYOUTS, REFUSALS, STRANGE, Carved
from .slides import draw_tissue

tifffile = pytest.importorskip("tifffile")
pytestmark = pytest.mark.native

SIDE = 64


def encode(image: NDArray[np.uint8], subsampling: int = 2, **options: Any) -> bytes:
    """Return a JPEG; subsampling 0 is 4:4:4, 1 is 4:2:2, 2 is 4:2:0."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "jpeg", quality=85, subsampling=subsampling, **options)
    return file.getvalue()


def divide(jpeg: bytes) -> tuple[bytes, bytes]:
    """Return the tables of a JPEG as JPEGTables, and the JPEG without them."""
    tables, others, at = b"", b"", 2
    while jpeg[at + 1] != 0xDA:  # the scan
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if jpeg[at + 1] in (0xC4, 0xDB):
            tables += jpeg[at:end]
        elif jpeg[at + 1] not in (0xE0, 0xEE):  # APP0, APP14
            others += jpeg[at:end]
        at = end
    return b"\xff\xd8" + tables + b"\xff\xd9", b"\xff\xd8" + others + jpeg[at:]


def write(
    path: Path, image: NDArray[np.uint8], jpegs: list[bytes], subsampling: int, tables: bytes = b""
) -> None:
    photometric = "rgb" if subsampling < 0 else "ycbcr"
    factors = {-1: (1, 1), 0: (1, 1), 1: (2, 1), 2: (2, 2)}[subsampling]
    chroma: dict[str, Any] = {"subsampling": factors}
    if subsampling < 0:
        chroma = {"compressionargs": {"outcolorspace": "rgb"}}
    options: dict[str, Any] = {"jpegtables": tables} if tables else {}
    tifffile.imwrite(
        path, iter(jpegs), shape=image.shape, dtype=np.uint8, tile=(SIDE, SIDE),
        photometric=photometric, compression="jpeg", metadata=None, **chroma, **options,
    )  # fmt: skip


def tiles_of(image: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    for y in range(0, len(image), SIDE):
        for x in range(0, image.shape[1], SIDE):
            yield image[y : y + SIDE, x : x + SIDE]


@pytest.mark.parametrize("with_tables", [False, True])
@pytest.mark.parametrize("subsampling", [-1, 0, 1, 2])  # -1: red, green and blue
def test_pixels_are_those_of_openslide(subsampling: int, with_tables: bool, tmp_path: Path) -> None:
    openslide = pytest.importorskip("openslide")
    image = draw_tissue(4 * SIDE, 3 * SIDE)
    jpegs = []
    for tile in tiles_of(image):
        if subsampling < 0:
            jpegs.append(encode(tile, 0, keep_rgb=True))
        else:
            jpegs.append(encode(tile, subsampling))
    tables = b""
    if with_tables:
        parts = [divide(jpeg) for jpeg in jpegs]
        tables, jpegs = parts[0][0], [jpeg for _, jpeg in parts]
    path = tmp_path / "slide.tif"
    write(path, image, jpegs, subsampling, tables)
    expected = np.asarray(openslide.OpenSlide(path).read_region((0, 0), 0, image.shape[1::-1]))
    with open_slide(path) as slide:
        assert slide.reader == "libjpeg"
        np.testing.assert_array_equal(slide.read(0, 0, 0, *image.shape[1::-1]), expected[..., :3])
        for x, y, width, height in [
            (0, 0, 1, 1),
            (63, 63, 2, 2),
            (10, 70, 128, 20),
            (64, 5, 64, 99),
        ]:
            np.testing.assert_array_equal(
                slide.read(0, x, y, width, height), expected[y : y + height, x : x + width, :3]
            )
        assert np.abs(expected[..., :3].astype(int) - image).mean() < 5


@pytest.fixture
def slide_path(tmp_path: Path) -> Path:
    image = draw_tissue(4 * SIDE, 3 * SIDE)
    write(tmp_path / "slide.tif", image, [encode(tile) for tile in tiles_of(image)], 2)
    return tmp_path / "slide.tif"


def places_of(path: Path) -> list[tuple[int, int]]:
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        return list(zip(page.dataoffsets, page.databytecounts, strict=True))


def read_both(slide: Slide, corners: list[tuple[int, int]]) -> list[SlideError | None]:
    """Read regions together and one by one; both must have the same errors and pixels."""
    out = np.zeros((len(corners), 40, 50, 3), np.uint8)
    errors = slide.read_into(0, np.array(corners), list(out))
    for (x, y), pixels, error in zip(corners, out, errors, strict=True):
        if error is None:
            np.testing.assert_array_equal(pixels, slide.read(0, x, y, 50, 40))
        else:
            with pytest.raises(SlideError) as raised:
                slide.read(0, x, y, 50, 40)
            assert (raised.value.reason, raised.value.message) == (error.reason, error.message)
    return errors


def test_what_libjpeg_reports_is_damage(slide_path: Path) -> None:
    """Foreign bytes that the scan does not see cost the regions on this tile alone."""
    at, count = places_of(slide_path)[5]  # x from 64 to 127, y likewise
    content = bytearray(slide_path.read_bytes())
    foreign = np.random.default_rng(0).integers(1, 255, 40, np.uint8)  # without 0xFF
    content[at + count - 100 : at + count - 60] = foreign.tobytes()
    slide_path.write_bytes(content)
    corners = [(0, 0), (60, 60), (70, 70), (128, 70), (-5, -5)]
    with open_slide(slide_path) as slide:
        assert not len(slide.damaged(0))
        errors = read_both(slide, corners)
    assert [error is not None for error in errors] == [False, True, True, False, False]
    assert errors[1] is not None
    assert errors[1].reason == "damaged"
    assert "50 x 40 px at (60, 60) of level 0: Corrupt JPEG data" in errors[1].message


def test_a_file_that_is_cut_later(slide_path: Path) -> None:
    at, _ = places_of(slide_path)[-1]
    with open_slide(slide_path) as slide:
        assert not len(slide.damaged(0))
        with open(slide_path, "r+b") as file:
            file.truncate(at + 10)
        errors = read_both(slide, [(0, 0), (200, 140)])
        assert errors[0] is None
        assert "a tile ends beyond the end of the file" in str(errors[1])


def test_a_tile_of_another_size(slide_path: Path) -> None:
    """The scan finds it; C++ alone refuses it too, before it writes anything."""
    at, count = places_of(slide_path)[1]
    small = encode(np.full((32, 32, 3), 200, np.uint8))
    content = bytearray(slide_path.read_bytes())
    content[at : at + len(small)] = small
    slide_path.write_bytes(content)
    assert len(small) <= count
    with open_slide(slide_path) as slide:
        assert slide.damaged(0).tolist() == [[64, 0, 64, 64]]
        tiles: Any = slide._tiles[0]  # pyright: ignore[reportAttributeAccessIssue]
        out = np.full((64, 64, 3), 7, np.uint8)
        assert tiles.read([(64, 0)], [out]) == ["a tile of another size or number of samples"]
        assert (out == 7).all()


def arguments(path: Path, **others: Any) -> dict[str, Any]:
    """Return the arguments of JpegTiles for the slide of a file, which stays open."""
    slide: Any = open_slide(path)
    level = slide._pages[0]
    return {
        "library": _imaging.__file__, "file": level.file, "offsets": level.tiles.offsets,
        "counts": level.tiles.counts, "columns": 4, "size": (SIDE, SIDE), "tables": b"",
        "ycbcr": True, "slide": slide, **others,
    }  # fmt: skip


def make_tiles(path: Path, **others: Any) -> tuple[Any, Any]:
    """Return JpegTiles and the open slide."""
    keywords = arguments(path, **others)
    slide = keywords.pop("slide")
    module: Any = native()
    return module.JpegTiles(**keywords), slide


@pytest.mark.parametrize(
    ("others", "error", "message"),
    [
        ({"library": "/nowhere.so"}, RuntimeError, "nowhere"),
        ({"library": "libm.so.6"}, RuntimeError, "it has no function jpeg_skip_scanlines"),
        ({"columns": 5}, ValueError, "columns: expected a divisor of the 12 tiles, got 5"),
        ({"columns": 0}, ValueError, "columns: expected a divisor"),
        ({"size": (0, 64)}, ValueError, "size: expected sides of 1 to 65535 px, got 0"),
        ({"size": (64, 70_000)}, ValueError, "size: expected sides of 1 to 65535 px, got 70000"),
        ({"counts": np.ones(11, np.int64)}, ValueError, "counts: expected .* int64"),
        ({"offsets": np.ones(12)}, ValueError, "offsets: expected .* int64"),
    ],
)
def test_arguments_that_do_not_fit(
    others: dict[str, Any], error: type[Exception], message: str, slide_path: Path
) -> None:
    with pytest.raises(error, match=message):
        make_tiles(slide_path, **others)


def test_tiles_that_cannot_be_read(slide_path: Path) -> None:
    """Counts and offsets of a damaged file, and a file that was closed, are reported."""
    out = np.zeros((SIDE, SIDE, 3), np.uint8)
    counts = places_of(slide_path)
    for column, value, message in [
        ("counts", 0, "a tile of 0 bytes"), ("counts", -5, "a tile of -5 bytes"),
        ("counts", 1 << 60, f"a tile of {1 << 60} bytes"), ("offsets", -1, "a tile of "),
        ("offsets", 1 << 50, "beyond the end of the file"),
    ]:  # fmt: skip
        numbers = np.array(counts, np.int64)[:, 0 if column == "offsets" else 1].copy()
        numbers[0] = value
        tiles, slide = make_tiles(slide_path, **{column: numbers})
        (why,) = tiles.read([(0, 0)], [out])
        assert message in why
        assert tiles.read([(64, 0)], [out]) == [""]
        slide.close()
    tiles, slide = make_tiles(slide_path, file=-1)
    assert tiles.read([(0, 0)], [out]) == ["Bad file descriptor"]
    slide.close()


corner = st.tuples(st.integers(-3, 260), st.integers(-3, 200))


@settings(suppress_health_check=[], deadline=None)
@given(data=st.data())
def test_reads_write_nothing_but_their_arrays(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.tif"
    if not path.exists():
        image = draw_tissue(4 * SIDE, 3 * SIDE)
        write(path, image, [encode(tile) for tile in tiles_of(image)], 2)
    tiles, slide = make_tiles(path)
    corners: list[Any] = data.draw(st.lists(corner, max_size=3))
    made: list[Carved] = []
    out: list[Any] = []
    for _ in range(len(corners) + (not data.draw(st.integers(0, 5)))):
        if not data.draw(st.integers(0, 9)):
            out.append(data.draw(st.sampled_from(STRANGE)))
            continue
        shape = data.draw(
            st.tuples(st.integers(0, 90), st.integers(0, 90), st.sampled_from([3, 3, 3, 4]))
        )
        layout = "plain" if data.draw(st.integers(0, 3)) else data.draw(st.sampled_from(LAYOUTS))
        made.append(Carved(data.draw(st.integers(0, 999)), "u1", shape, layout))
        out.append(made[-1].array)
    image = slide.read(0, 0, 0, 4 * SIDE, 3 * SIDE)
    try:
        reasons = tiles.read(corners, out)
    except REFUSALS:
        assert all(carved.untouched() for carved in made)
    else:
        assert reasons == [""] * len(corners)
        assert all(carved.changed_within() for carved in made)
        for (x, y), pixels in zip(corners, out, strict=True):
            part = image[y : y + pixels.shape[0], x : x + pixels.shape[1]]
            np.testing.assert_array_equal(pixels, part)
    slide.close()
