"""TIFF whose colours lie in planes or in pages of their own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from motet.io.errors import SlideError
from motet.io.slides.open_slide import open_slide
from motet.io.slides.slide import Slide

from .slides import draw_tissue, reduce_by

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")

IMAGE = draw_tissue(600, 500)
PLANES = np.moveaxis(IMAGE, -1, 0)
FORMS = {
    "jpeg": {"tile": (128, 128), "compression": "jpeg"},
    "tiles": {"tile": (128, 128)},
    "deflate": {"tile": (128, 128), "compression": "deflate"},
    "lzw": {"tile": (128, 128), "compression": "lzw", "predictor": True},
    "packbits": {"tile": (128, 128), "compression": "packbits"},
    "strips": {"rowsperstrip": 37},
    "one strip": {"rowsperstrip": 500},
}


def assert_same(slide: Slide, *, lossy: bool = False) -> None:
    assert slide.reader == "tifffile"
    assert slide.damaged(0).shape == (0, 4)
    if lossy:
        assert np.abs(slide.read(0, 0, 0, 600, 500).astype(int) - IMAGE).mean() < 2
        return
    np.testing.assert_array_equal(slide.read(0, 0, 0, 600, 500), IMAGE)
    np.testing.assert_array_equal(slide.read(0, 101, 203, 77, 50), IMAGE[203:253, 101:178])


@pytest.mark.parametrize("form", FORMS)
def test_colours_in_planes(form: str, tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    options: dict[str, Any] = {"photometric": "rgb", "planarconfig": "separate", **FORMS[form]}
    tifffile.imwrite(path, PLANES, metadata=None, **options)
    with open_slide(path) as slide:
        assert_same(slide, lossy=form == "jpeg")
    if form == "jpeg":
        return
    alpha = np.full_like(PLANES[:1], 255)
    alpha[:, :100] = 0
    tifffile.imwrite(
        path, np.concatenate([PLANES, alpha]), metadata=None, extrasamples=[2], **options
    )
    with open_slide(path) as slide:
        pixels = slide.read(0, 0, 0, 600, 500)
    assert (pixels[:100] == 255).all()
    np.testing.assert_array_equal(pixels[100:], IMAGE[100:])


@pytest.mark.parametrize("names", [None, ["Red", "green", "B"], ["Channel 0", "Channel 1", ""]])
def test_colours_in_pages(names: list[str] | None, tmp_path: Path) -> None:
    """OME with three one-byte channels, each with its pyramid."""
    path = tmp_path / "slide.ome.tif"
    metadata: dict[str, Any] = {"axes": "CYX", "Name": "scan"}
    if names:
        names[2] = {"B": "blue"}.get(names[2], names[2])
        metadata["Channel"] = {"Name": names}
    options: dict[str, Any] = {"photometric": "minisblack", "tile": (128, 128)}
    with tifffile.TiffWriter(path) as writer:
        writer.write(PLANES, subifds=1, metadata=metadata, compression="deflate", **options)
        small = np.moveaxis(reduce_by(IMAGE, 2), -1, 0)
        writer.write(small, subfiletype=1, metadata=None, compression="deflate", **options)
    with open_slide(path) as slide:
        assert_same(slide)
        np.testing.assert_array_equal(slide.read(1, 0, 0, 300, 250), reduce_by(IMAGE, 2))


def test_channels_that_are_no_colours(tmp_path: Path) -> None:
    path = tmp_path / "slide.ome.tif"
    metadata = {"axes": "CYX", "Channel": {"Name": ["DAPI", "FITC", "Cy5"]}}
    tifffile.imwrite(path, PLANES, photometric="minisblack", metadata=metadata)
    with pytest.raises(SlideError, match="3 channels .* expected one RGB image") as raised:
        open_slide(path)
    assert raised.value.reason == "unsupported"
    tifffile.imwrite(path, PLANES, photometric="minisblack", metadata={"axes": "ZYX"})
    with pytest.raises(SlideError, match="3 channels or focal planes"):
        open_slide(path)
    cmyk = np.concatenate([PLANES, PLANES[:1]])
    tifffile.imwrite(path, cmyk, photometric="separated", planarconfig="separate", metadata=None)
    with pytest.raises(SlideError, match="SEPARATED in separate planes; expected RGB"):
        open_slide(path)


def test_a_damaged_tile_of_one_plane(tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, PLANES, photometric="rgb", planarconfig="separate", metadata=None,
                     tile=(128, 128), compression="lzw")  # fmt: skip
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        at, count = page.dataoffsets[20 + 7], page.databytecounts[20 + 7]  # of 5 x 4 tiles, green
    content = bytearray(path.read_bytes())
    content[at + count // 2 : at + count] = bytes(count - count // 2)
    path.write_bytes(content)
    with open_slide(path) as slide:
        assert slide.damaged(0).tolist() == [[256, 128, 128, 128]]
        with pytest.raises(SlideError, match="damaged"):
            slide.read(0, 256, 128, 10, 10)
        np.testing.assert_array_equal(slide.read(0, 0, 0, 256, 500), IMAGE[:, :256])


def test_tiles_left_out_of_all_planes_are_white(tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, PLANES, photometric="rgb", planarconfig="separate", metadata=None,
                     tile=(128, 128), compression="deflate")  # fmt: skip
    with tifffile.TiffFile(path, mode="r+") as tiff:
        counts = list(tiff.pages[0].databytecounts)
        counts[0::20] = [0, 0, 0]
        tiff.pages[0].tags["TileByteCounts"].overwrite(counts)
    with open_slide(path) as slide:
        assert (slide.read(0, 0, 0, 128, 128) == 255).all()
        np.testing.assert_array_equal(slide.read(0, 128, 0, 472, 500), IMAGE[:, 128:])
