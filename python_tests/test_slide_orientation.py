"""Orientation: EXIF turns photographs upright; a TIFF that is not upright is refused by name."""

from pathlib import Path

import numpy as np
import pytest
from motet.io.errors import SlideError
from motet.io.slides.open_slide import open_slide
from PIL import Image, ImageOps

from .slides import draw_tissue

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")


@pytest.mark.parametrize("kind", ["png", "jpeg"])
@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_photographs_are_turned_upright(orientation: int, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"photo.{kind}"
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(draw_tissue(300, 200)).save(path, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    with open_slide(path) as slide:
        sides = slide.levels[0]
        assert (sides.height, sides.width) == expected.shape[:2]
        pixels = slide.read(0, 0, 0, sides.width, sides.height)
        np.testing.assert_array_equal(pixels, expected)
        np.testing.assert_array_equal(slide.read(0, 20, 40, 30, 50), expected[40:90, 20:50])
        assert slide.thumbnail(60).shape[:2] == ((60, 40) if 5 <= orientation <= 8 else (40, 60))


def test_a_tiff_that_is_not_upright(tmp_path: Path) -> None:
    image, path = draw_tissue(300, 200), tmp_path / "slide.tif"
    for orientation in range(10):
        extratags = [(274, "H", 1, orientation, True)]
        tifffile.imwrite(path, image, tile=(64, 64), photometric="rgb", metadata=None,
                         extratags=extratags)  # fmt: skip
        if orientation in (0, 1):
            with open_slide(path) as slide:
                np.testing.assert_array_equal(slide.read(0, 0, 0, 300, 200), image)
            continue
        for reader in ("auto", "openslide", "tifffile"):
            with pytest.raises(
                SlideError, match="orientation .* expected TOPLEFT: turn it"
            ) as error:
                open_slide(path, reader=reader)
            assert error.value.reason == "unsupported"
