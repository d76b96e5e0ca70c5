"""The scan of tiles reports all damage that it can prove, and nothing else."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from motet.io.errors import SlideError
from motet.io.slides.integrity import find_damaged
from motet.io.slides.open_slide import open_slide
from motet.io.slides.tiff import TiffFile

from .conftest import data_path
from .slides import draw_tissue, make_pyramid

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")

CODINGS = ["jpeg", "aperio_jp2000_rgb", "lzw", "packbits", "none"]


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("slides")
    image = draw_tissue(900, 700)
    for coding in [*CODINGS, "deflate"]:
        make_pyramid(folder / coding, image=image, factors=(1, 4), compression=coding)
    return {coding: (folder / coding).read_bytes() for coding in [*CODINGS, "deflate"]}


def ranges(path: Path, level: int = 0) -> list[tuple[int, int]]:
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[level]
        return list(zip(page.dataoffsets, page.databytecounts, strict=True))


def damaged(path: Path, level: int = 0) -> list[int]:
    tiff = TiffFile(path)
    try:
        if tiff.refusal:
            raise tiff.refusal
        return np.flatnonzero(find_damaged(tiff.file, tiff.levels[level].tiles)).tolist()
    finally:
        tiff.close()


def touched(places: list[tuple[int, int]], start: int, stop: int) -> list[int]:
    return [i for i, (at, count) in enumerate(places) if at < stop and start < at + count]


@pytest.mark.parametrize("coding", [*CODINGS, "deflate"])
def test_whole_files_are_whole(coding: str, slides: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    path.write_bytes(slides[coding])
    assert damaged(path) == damaged(path, 1) == []


@pytest.mark.parametrize("coding", [coding for coding in CODINGS if coding != "none"])
def test_zeroed_ranges(coding: str, slides: dict[str, bytes], tmp_path: Path) -> None:
    """Zeros from the middle of one tile into the next are reported for every tile they touch."""
    path = tmp_path / "slide.tif"
    path.write_bytes(slides[coding])
    places = ranges(path)
    random = np.random.default_rng(0)
    for _ in range(12):
        first = int(random.integers(len(places) - 1))
        start, stop = places[first][0], sum(places[first + 1])
        start += int(random.integers(40, places[first][1] - 40))
        stop -= int(random.integers(places[first + 1][1] - 40))
        content = bytearray(slides[coding])
        content[start:stop] = bytes(stop - start)
        path.write_bytes(content)
        assert damaged(path) == touched(places, start, stop)


@pytest.mark.parametrize("coding", ["jpeg", "aperio_jp2000_rgb", "lzw"])
def test_a_hole_within_one_tile(coding: str, slides: dict[str, bytes], tmp_path: Path) -> None:
    """64 zero bytes within a tile are reported, although both end markers are intact."""
    path = tmp_path / "slide.tif"
    path.write_bytes(slides[coding])
    for i, (at, count) in enumerate(ranges(path)):
        if count < 2500:
            continue
        content = bytearray(slides[coding])
        content[at + 1500 : at + 1564] = bytes(64)
        path.write_bytes(content)
        assert damaged(path) == [i]


@pytest.mark.parametrize("coding", ["jpeg", "aperio_jp2000_rgb"])
def test_other_bytes_and_lost_markers(
    coding: str, slides: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "slide.tif"
    path.write_bytes(slides[coding])
    places = ranges(path)
    random = np.random.default_rng(0)
    for i, (at, count) in enumerate(places):
        changes = {at: b"\0\0", at + count - 2: b"\0\0", at + 20: b"\xff" * 8}
        if count > 6000:
            changes |= {at + 2000: random.bytes(3000), at + 1500: b"\xff" * 64}
        for start, new in changes.items():
            content = bytearray(slides[coding])
            content[start : start + len(new)] = new
            path.write_bytes(content)
            assert damaged(path) == [i]


@pytest.mark.parametrize("coding", [*CODINGS, "deflate"])
def test_truncated(coding: str, slides: dict[str, bytes], tmp_path: Path) -> None:
    """All tiles that end after the cut are reported, if the directory comes first."""
    path = tmp_path / "slide.tif"
    image = draw_tissue(900, 700)
    tifffile.imwrite(path, image, tile=(256, 256), photometric="rgb", metadata=None,
                     compression=None if coding == "none" else coding)  # fmt: skip
    places = ranges(path)
    content = path.read_bytes()
    for keep in (places[3][0] + 1, sum(places[5]), sum(places[7]) - 1):
        path.write_bytes(content[:keep])
        assert damaged(path) == [i for i, place in enumerate(places) if sum(place) > keep]


def test_ranges_that_cannot_be(slides: dict[str, bytes], tmp_path: Path) -> None:
    """Offsets beyond the file, overlaps and impossible lengths are reported."""
    path = tmp_path / "slide.tif"
    path.write_bytes(slides["jpeg"])
    tiff = TiffFile(path)
    tiles = tiff.levels[0].tiles
    offsets, counts = tiles.offsets.copy(), tiles.counts.copy()
    try:
        for place, value in [(2, 1 << 62), (3, 10**9), (4, -5), (5, int(offsets[6]) + 1)]:
            tiles.offsets[:] = offsets
            tiles.offsets[place] = value
            assert place in np.flatnonzero(find_damaged(tiff.file, tiles))
        tiles.offsets[:] = offsets
        for place, value in [(2, 1 << 62), (3, 10**9), (4, -5)]:
            tiles.counts[:] = counts
            tiles.counts[place] = value
            assert np.flatnonzero(find_damaged(tiff.file, tiles)).tolist() == [place]
    finally:
        tiff.close()


@pytest.mark.parametrize("optimise", [False, True], ids=["standard", "optimised"])
def test_pictures_whose_codes_are_zeros(optimise: bool, tmp_path: Path) -> None:
    """Plain areas coded with optimised Huffman tables are runs of zero bytes, but no damage.

    With the standard tables no run has 16 zero bytes, so that 32 prove a hole.
    """
    path = tmp_path / "slide.tif"
    tissue = draw_tissue(512, 256)
    random = np.random.default_rng(0)
    pictures = [tissue, np.full_like(tissue, 255), np.zeros_like(tissue), tissue // 64 * 64,
                random.integers(0, 256, tissue.shape, np.uint8)]  # fmt: skip
    longest = 0
    for image in pictures:
        for quality in (1, 30, 80, 100):
            for subsampling in ((1, 1), (2, 2)):
                tifffile.imwrite(
                    path, image, tile=(256, 256), photometric="rgb", compression="jpeg",
                    subsampling=subsampling, metadata=None,
                    compressionargs={"level": quality, "optimize": optimise},
                )  # fmt: skip
                assert damaged(path) == []
                content = path.read_bytes()
                for at, count in ranges(path):
                    coded = content[at + content[at : at + count].index(b"\xff\xda") : at + count]
                    longest = max([longest, *map(len, re.findall(rb"\0+", coded))])
    assert longest > 256 if optimise else longest < 16


def test_a_hole_in_a_tile_with_its_own_tables(tmp_path: Path) -> None:
    """A run of zeros longer than the code of all blocks of the tile is damage with any tables."""
    path = tmp_path / "slide.tif"
    tifffile.imwrite(
        path, draw_tissue(512, 256), tile=(256, 256), photometric="rgb", compression="jpeg",
        subsampling=(2, 2), metadata=None, compressionargs={"level": 95, "optimize": True},
    )  # fmt: skip
    content = bytearray(path.read_bytes())
    at, count = ranges(path)[1]
    assert count > 4000
    content[at + 1000 : at + 3000] = bytes(2000)
    path.write_bytes(content)
    assert damaged(path) == [1]


@pytest.mark.parametrize(
    "name", ["CMU-1-Small-Region.svs", "tcga-cr-7395-01a-01-ts1.svs", "1065626.svs", "patch.tif"]
)
def test_real_slides_are_whole(name: str) -> None:
    with open_slide(data_path("slides", name)) as slide:
        for level in range(len(slide.levels)):
            assert slide.damaged(level).shape == (0, 4)


@pytest.mark.parametrize("coding", [*CODINGS, "deflate"])
def test_damage_never_becomes_pixels(coding: str, slides: dict[str, bytes], tmp_path: Path) -> None:
    """Reads of damaged tiles raise, others do not change; the thumbnail is white there."""
    path = tmp_path / "slide.tif"
    path.write_bytes(slides[coding])
    at, count = ranges(path)[5]  # second row, second column
    with open_slide(path) as slide:
        before = slide.read(0, 0, 0, 900, 700)
    content = bytearray(slides[coding])
    if coding == "none":  # zeros are pixels there: let the tile lie beyond the end of the file
        with tifffile.TiffFile(path, mode="r+") as tiff:
            offsets = list(tiff.pages[0].dataoffsets)
            offsets[5] = len(content)
            tiff.pages[0].tags["TileOffsets"].overwrite(offsets)
    else:
        content[at : at + count] = bytes(count)
        path.write_bytes(content)
    corners = np.array([[x, y] for y in range(0, 700, 128) for x in range(0, 900, 128)])
    with open_slide(path) as slide:
        if coding != "deflate":  # its checksum fails only when it is decoded
            assert slide.damaged(0).tolist() == [[256, 256, 256, 256]]
        for workers in (1, 2):
            items = slide.read_many(0, corners, 100, 100, workers=workers)
            for (x, y), item in zip(corners.tolist(), items, strict=True):
                if 156 < x < 512 and 156 < y < 512:
                    assert isinstance(item, SlideError)
                    assert item.reason == "damaged"
                else:
                    assert not isinstance(item, SlideError)
                    part = before[y : y + 100, x : x + 100]
                    np.testing.assert_array_equal(item[: len(part), : part.shape[1]], part)
        with pytest.raises(SlideError, match="100 x 100 px at .200, 200. of level 0: ") as raised:
            slide.read(0, 200, 200, 100, 100)
        assert raised.value.reason == "damaged"
        thumb = slide.thumbnail(900)
        assert (thumb[256:512, 256:512] == 255).all()
        np.testing.assert_array_equal(thumb[:256], before[:256])
        np.testing.assert_array_equal(thumb[512:], before[512:])


def test_tiles_left_out(tmp_path: Path) -> None:
    """Tiles without data are white in most files, and damaged in Aperio's."""
    path = tmp_path / "slide.tif"
    image = draw_tissue(900, 700)
    for description, lost in ((None, False), ("Aperio Image Library|MPP = 0.5", True)):
        make_pyramid(path, image=image, factors=(1,), description=description)
        with tifffile.TiffFile(path, mode="r+") as tiff:
            counts = list(tiff.pages[0].databytecounts)
            counts[5] = 0
            tiff.pages[0].tags["TileByteCounts"].overwrite(counts)
        with open_slide(path) as slide:
            assert slide.reader == "tifffile"  # cuCIM would make it black
            assert len(slide.damaged(0)) == lost
            assert slide.image["missing_tiles"] == 1
            if not lost:
                assert (slide.read(0, 256, 256, 256, 256) == 255).all()


FORMS = {  # of files with black areas
    "tiles": {"tile": (256, 256)},
    "strips": {"rowsperstrip": 1},
    "lzw": {"tile": (256, 256), "compression": "lzw"},
    "predictor": {"tile": (256, 256), "compression": "lzw", "predictor": True},
    "packbits": {"tile": (256, 256), "compression": "packbits"},
    "deflate": {"tile": (256, 256), "compression": "deflate"},
    "jpeg": {"tile": (256, 256), "compression": "jpeg"},
    "bigtiff": {"tile": (256, 256), "bigtiff": True},
    "big-endian": {"tile": (256, 256), "byteorder": ">"},
}


@pytest.mark.parametrize("form", FORMS)
def test_black_is_a_colour(form: str, tmp_path: Path) -> None:
    """Black padding, rows and fluorescence give pixels, in colour, grey and with alpha."""
    image = draw_tissue(600, 500)
    image[200:203] = 0
    image[:, 300:] = 0
    alpha = np.dstack([image, np.full_like(image[..., 0], 255)])
    for pixels in (image, image[..., 0], alpha, np.zeros_like(image)):
        grey = pixels.ndim == 2
        if form == "jpeg" and pixels.shape[-1] == 4:
            continue
        path = tmp_path / "slide.tif"
        options = {"extrasamples": [2]} if pixels.shape[-1] == 4 else {}
        tifffile.imwrite(path, pixels, photometric="minisblack" if grey else "rgb", metadata=None,
                         **options, **FORMS[form])  # fmt: skip
        with open_slide(path) as slide:
            assert slide.damaged(0).shape == (0, 4)
            read = slide.read(0, 0, 0, 600, 500)
        expected = np.repeat(pixels[..., None], 3, 2) if grey else pixels[..., :3]
        bound = 40 if form == "jpeg" else 0
        assert np.abs(read.astype(int) - expected).max() <= bound


def move_tiles(path: Path, padding: bytes) -> None:
    """Write the tiles of a TIFF anew at its end, each followed by padding that it counts."""
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path, mode="r+") as tiff:
        page = tiff.pages[0]
        places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
        offsets = []
        for at, count in places:
            offsets.append(len(content))
            content += content[at : at + count] + padding
        page.tags["TileOffsets"].overwrite(offsets)
        page.tags["TileByteCounts"].overwrite([count + len(padding) for _, count in places])
    moved = path.read_bytes()
    path.write_bytes(moved + content[len(moved) :])


@pytest.mark.parametrize("coding", ["jpeg", "aperio_jp2000_rgb", "lzw", "deflate", "none"])
def test_padding_is_no_damage(coding: str, tmp_path: Path) -> None:
    """Zero bytes after the end of a tile change no pixel; in place of its end they are damage."""
    path = tmp_path / "slide.tif"
    make_pyramid(path, (600, 500), factors=(1,), compression=coding)
    with open_slide(path) as slide:
        pixels = slide.read(0, 0, 0, 600, 500)
    for zeros in (1, 64, 5000):
        make_pyramid(path, (600, 500), factors=(1,), compression=coding)
        move_tiles(path, bytes(zeros))
        for reader in ("auto", "tifffile"):
            with open_slide(path, reader=reader) as slide:
                assert slide.damaged(0).shape == (0, 4)
                np.testing.assert_array_equal(slide.read(0, 0, 0, 600, 500), pixels)
    if coding in ("deflate", "none"):
        return
    at, count = ranges(path)[0]
    content = bytearray(path.read_bytes())
    content[at + count - 5040 : at + count] = bytes(5040)  # the last 40 bytes of the data too
    path.write_bytes(content)
    assert damaged(path) == [0]


def test_lzw_that_does_not_compress(tmp_path: Path) -> None:
    """A coder of LZW that writes each byte as a code of 9 bits writes zeros for black pixels."""
    path = tmp_path / "slide.tif"
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:20] = draw_tissue(64, 20)
    codes = []
    for i, value in enumerate(pixels.ravel().tolist()):
        codes += [256, value] if i % 250 == 0 else [value]  # 256 empties the table
    codes.append(257)
    bits = (np.array(codes)[:, None] >> np.arange(8, -1, -1)) & 1
    tile = np.packbits(bits.ravel().astype(np.uint8)).tobytes()
    assert bytes(100) in tile
    tifffile.imwrite(path, iter([tile]), shape=pixels.shape, dtype=np.uint8, tile=(64, 64),
                     photometric="rgb", compression="lzw", metadata=None)  # fmt: skip
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read(0, 0, 0, 64, 64), pixels)


@pytest.mark.parametrize("coding", ["none", "jpeg", "deflate"])
def test_an_offset_in_the_header_is_damage(coding: str, tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    make_pyramid(path, (600, 500), factors=(1,), compression=coding)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tag = tiff.pages[0].tags["TileOffsets"]
        tag.overwrite([0, *tag.value[1:]])
    assert damaged(path) == [0]
