"""Tissue, pen marks and blur on real slides, and on images without them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from motet.io import blur_mask, pen_mask, tissue_mask
from motet.io.tiling.background import find_background
from motet.io.tiling.tissue import otsu
from PIL import Image, ImageDraw
from scipy import ndimage

from .conftest import data_path, drawn
from .stains import STAINS, stained, unmix
from .tissue_pictures import CHANGES, ORIGINALS, PICTURES, original, overlap, picture


def slide_thumb(*parts: str, longest: int = 1024) -> tuple[np.ndarray, float]:
    """Return a thumbnail by OpenSlide, or an unscaled picture, and its level-0 px per px."""
    path = data_path("slides", *parts)
    if path.suffix in (".png", ".tif"):
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB")), 1.0
    import openslide

    with openslide.OpenSlide(path) as slide:
        thumb = slide.get_thumbnail((longest, longest)).convert("RGB")
        return np.asarray(thumb), max(slide.dimensions) / max(thumb.size)


def ihc() -> np.ndarray:
    """Return tissue from scikit-image in haematoxylin and DAB, about 0.5 um per px."""
    from skimage import data

    return data.immunohistochemistry()


def plain(colour: tuple[float, ...], noise: float, seed: int = 0) -> np.ndarray:
    pixels = np.array(colour) + np.random.default_rng(seed).normal(0, noise, (400, 600, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8)


# Tissue judged by eye: mpp, the smallest and largest share of the slide, places (x, y in shares of
# the slide) inside of the tissue, and places outside.
SEEN = {
    "CMU-1-Small-Region.svs": (0.499, 0.38, 0.44, [(0.45, 0.6), (0.5, 0.9), (0.2, 0.36)],
                               [(0.1, 0.1), (0.9, 0.5)]),
    "tcga-cr-7395-01a-01-ts1.svs": (None, 0.6, 0.66, [(0.3, 0.5), (0.6, 0.4), (0.72, 0.15)],
                                    [(0.1, 0.1), (0.636, 0.57), (0.5, 0.02)]),
    "1065626.svs": (0.5026, 0.005, 0.011, [(0.417, 0.622), (0.687, 0.712), (0.245, 0.18)],
                    [(0.5, 0.5), (0.1, 0.9)]),
    "kidney-48-5.tif": (None, 0.002, 0.006, [(0.23, 0.595)], [(0.78, 0.19), (0.5, 0.5)]),
    "test3-DAPI-2-387.ndpi": (0.228, 0.7, 0.85, [(0.5, 0.72), (0.2, 0.2)],
                              [(0.05, 0.1), (0.5, 0.97)]),
    "patch.tif": (None, 0.82, 0.9, [(0.3, 0.5)], [(0.9, 0.95)]),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_tissue_of_real_slides_is_what_the_eye_sees(name: str) -> None:
    mpp, least, most, within, outside = SEEN[name]
    thumb, downsample = slide_thumb(name)
    mask = tissue_mask(thumb, mpp * downsample if mpp else None)
    assert least < mask.mean() < most
    assert find_background(thumb).is_dark == ("DAPI" in name)
    for places, expected in ((within, True), (outside, False)):
        for x, y in places:
            assert mask[int(y * mask.shape[0]), int(x * mask.shape[1])] == expected, (x, y)
    assert not (pen_mask(thumb) & mask).sum() > 0.005 * mask.sum()


@pytest.mark.parametrize(
    "thumb",
    [
        plain((243, 243, 242), 1), plain((243, 243, 242), 6), plain((240, 226, 236), 3),
        plain((0, 0, 0), 0), plain((255, 255, 255), 0), plain((4, 4, 6), 3), plain((4, 4, 4), 9),
        np.zeros((1, 1, 3), np.uint8), np.full((90, 1, 3), 220, np.uint8),
    ],
)  # fmt: skip
@pytest.mark.parametrize("um_per_px", [8.0, None])
def test_a_slide_without_tissue_has_none(thumb: np.ndarray, um_per_px: float | None) -> None:
    assert not tissue_mask(thumb, um_per_px).any()
    assert not pen_mask(thumb).any()


def test_uneven_light_is_no_tissue() -> None:
    down, right = np.mgrid[:400, :600] / 600
    light = 1 - 0.08 * ((down - 0.33) ** 2 + (right - 0.5) ** 2)[..., None] / 0.36
    assert not tissue_mask((plain((243, 243, 242), 2) * light).astype(np.uint8), 8.0).any()


def test_a_slide_full_of_tissue_is_all_tissue() -> None:
    thumb, _ = slide_thumb("pen", "tcga-red-pen.png")
    assert tissue_mask(thumb[130:440, 250:470], 2.0).all()
    assert tissue_mask(plain((220, 140, 180), 20), 8.0).all()


def test_black_and_white_padding_is_no_tissue() -> None:
    thumb = plain((243, 243, 242), 2)
    thumb[100:200, 100:200] = (200, 120, 170)
    expected = tissue_mask(thumb, 8.0)
    assert expected.mean() == pytest.approx(1 / 24, rel=0.06)
    for level in (0, 255):
        padded = thumb.copy()
        padded[:, 300:] = level
        padded[:100] = level  # touches the tissue
        padded[100:128, 100:200] = level  # hides a strip of the tissue
        mask = tissue_mask(padded, 8.0)
        assert not mask[:, 300:].any()
        assert not mask[:128, 102:198].any()
        assert mask[132:196, 104:196].all()
    for frame in (3, 30):  # black after JPEG; a dark frame over most of the slide
        framed = thumb.copy()
        framed[:, 210:] = plain((frame,) * 3, 2)[:, 210:]
        mask = tissue_mask(framed, 8.0)
        assert not find_background(framed).is_dark
        assert mask[:, 214:].sum() == 0
        assert mask[104:196, 104:196].all()


def test_pale_tissue_and_grey_stroma_are_tissue() -> None:
    thumb = plain((243, 243, 242), 2)
    thumb[100:200, 100:200] -= np.array([3, 17, 8], np.uint8)  # fat: (240, 226, 234)
    thumb[100:200, 300:400] = plain((217, 217, 218), 2)[100:200, 300:400]  # stroma in IHC
    thumb[300:350, 300:420] = plain((150, 80, 130), 2)[300:350, 300:420]  # deeply stained tissue
    mask = tissue_mask(thumb, 4.0)
    for place in (np.s_[104:196, 104:196], np.s_[104:196, 304:396], np.s_[304:346, 304:416]):
        assert mask[place].all()
    assert mask.mean() < 0.12


def test_small_holes_are_filled_and_small_pieces_dropped() -> None:
    thumb = plain((243, 243, 242), 1)
    thumb[50:350, 50:350] = (200, 120, 170)
    thumb[100:110, 100:110] = (243, 243, 242)  # 40 um at 4 um per px
    thumb[200:280, 200:280] = (243, 243, 242)  # 320 um
    thumb[50:60, 500:510] = (200, 120, 170)  # 40 um
    thumb[200:240, 500:540] = (200, 120, 170)  # 160 um
    mask = tissue_mask(thumb, 4.0)
    assert mask[105, 105]
    assert not mask[240, 240]
    assert not mask[:100, 450:].any()
    assert mask[220, 520]


@pytest.mark.slow
def test_tissue_of_40_changed_pictures_is_that_outlined_by_hand() -> None:
    """Intersection over union of at least 0.85 on at least 36; never the whole slide."""
    assert len(PICTURES) == len(set(PICTURES)) == 40
    assert {change for _, change in PICTURES} == set(CHANGES)
    assert {name for name, _ in PICTURES} == set(ORIGINALS)
    overlaps = {}
    for name, change in PICTURES:
        thumb, truth, um_per_px = picture(name, change)
        mask = tissue_mask(thumb, um_per_px) & ~pen_mask(thumb)
        assert not mask.all(), (name, change)
        overlaps[name, change] = overlap(mask, truth)
    poor = {case: round(value, 2) for case, value in overlaps.items() if value < 0.85}
    assert len(poor) <= 4, poor


@pytest.mark.parametrize(
    ("name", "change"),
    [("1065626-biopsy", "yellow"), ("CMU-1-Small-Region-macro", "grey"), ("patch", "blue"),
     ("1065626-biopsy", "faded"), ("CMU-1-Small-Region-macro", "black"), ("patch", "dark"),
     ("CMU-1-Small-Region-macro", "inverted")],
)  # fmt: skip
def test_glass_of_any_colour_is_no_tissue(name: str, change: str) -> None:
    thumb, truth, um_per_px = picture(name, change)
    assert overlap(tissue_mask(thumb, um_per_px), truth) > 0.84


@pytest.mark.parametrize("glass", [(228, 220, 198), (210, 225, 242), (160, 160, 160), (30, 20, 10)])
def test_flat_glass_has_no_tissue(glass: tuple[int, int, int]) -> None:
    assert not tissue_mask(plain(glass, 1), 8.0).any()
    assert find_background(plain(glass, 1)).colour == pytest.approx(np.array(glass) / 255, abs=0.01)


def test_a_threshold_finds_paler_tissue_or_leaves_dirt_out() -> None:
    thumb = plain((243, 243, 242), 1)
    thumb[100:200, 100:200] -= np.array([0, 4, 2], np.uint8)  # contrast 0.017
    thumb[100:200, 300:400] -= np.array([0, 17, 8], np.uint8)  # contrast 0.07
    assert tissue_mask(thumb, 4.0)[150, [150, 350]].tolist() == [False, True]
    assert tissue_mask(thumb, 4.0, 0.012)[150, [150, 350]].tolist() == [True, True]
    assert tissue_mask(thumb, 4.0, 0.1)[150, [150, 350]].tolist() == [False, False]
    for wrong in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match="threshold: expected a number between 0 and 1, got"):
            tissue_mask(thumb, 4.0, wrong)


def test_black_tissue_is_tissue_and_a_frame_is_not() -> None:
    thumb = plain((243, 243, 242), 2)
    down, right = np.mgrid[:400, :600]
    ragged = 12 * np.sin(right[0] / 9) + np.random.default_rng(0).normal(0, 2, 600)
    tissue = (
        (down > 180 + ragged) & (right > 60) & (right < 400 + 0.1 * down)
    )  # to the lower border
    thumb[tissue] = plain((14, 13, 15), 4)[tissue]
    mask = tissue_mask(thumb, 4.0)
    assert overlap(mask, tissue) > 0.95
    thumb[:, 480:] = plain((25, 25, 25), 2)[:, 480:]
    assert overlap(tissue_mask(thumb, 4.0), tissue) > 0.95


@given(st.integers(0, 9), st.integers(1, 5), st.integers(1, 5))
def test_masks_take_any_thumbnail(seed: int, height: int, width: int) -> None:
    random = np.random.default_rng(seed)
    thumb = random.integers(0, 256, (height**3, width**3, 3), np.uint8)
    for um_per_px in (None, 0.01, 3.0, 1e6):
        tissue = tissue_mask(thumb, um_per_px)
        assert tissue.shape == pen_mask(thumb).shape == thumb.shape[:2]
        assert not (blur_mask(thumb, tissue, um_per_px) & ~tissue).any()
    turned = thumb.transpose(1, 0, 2)  # not contiguous
    assert np.array_equal(tissue_mask(turned), tissue_mask(np.ascontiguousarray(turned)))


def test_otsu_is_scikit_images() -> None:
    from skimage.filters import threshold_otsu

    values = ihc()[..., 1].astype(np.float32)
    assert abs(otsu(values) - threshold_otsu(values)) <= np.ptp(values) / 256
    assert otsu(np.full(3, 0.5, np.float32)) == 0.5


# Outlines of the ink, drawn by hand: x, y.
INK = {
    "tcga-green-pen.png": (0.72, 0.01, [  # green ink over eosin looks like haematoxylin
        [(335, 0), (490, 0), (470, 60), (440, 130), (425, 220), (400, 240), (360, 290), (330, 340),
         (325, 400), (328, 500), (320, 570), (285, 631), (170, 631), (172, 480), (165, 410),
         (155, 400), (175, 340), (215, 300), (250, 230), (290, 130), (320, 60)],
    ]),
    "tcga-red-pen.png": (0.80, 0.06, [
        [(80, 110), (160, 105), (185, 150), (165, 190), (140, 235), (165, 300), (180, 330),
         (130, 360), (135, 400), (115, 448), (25, 448), (20, 420), (60, 400), (75, 370), (60, 340),
         (0, 330), (0, 260), (25, 200), (40, 150)],
        [(0, 0), (105, 0), (90, 20), (20, 30), (0, 15)],
        [(120, 30), (190, 0), (240, 0), (235, 20), (150, 45)],
        [(0, 405), (20, 430), (20, 448), (0, 448)],
    ]),
    "wsi-blue-pen.png": (0.95, 0.01, [
        [(158, 0), (174, 0), (174, 3), (160, 3)],
        [(143, 62), (147, 57), (152, 57), (152, 64), (174, 67), (174, 78), (150, 73), (144, 68)],
        [(151, 133), (151, 108), (153, 101), (158, 100), (162, 104), (160, 107), (162, 133)],
    ]),
}  # fmt: skip


@pytest.mark.parametrize("name", INK)
def test_ink_is_found_and_tissue_beside_it_left(name: str) -> None:
    caught, beside, polygons = INK[name]
    thumb, _ = slide_thumb("pen", name)
    drawing = Image.new("1", thumb.shape[1::-1])
    for polygon in polygons:
        ImageDraw.Draw(drawing).polygon(polygon, fill=1)
    ink, mask = np.asarray(drawing), pen_mask(thumb)
    assert mask[ink].mean() > caught
    assert mask[~ink].mean() < beside


@pytest.mark.parametrize(
    ("colour", "opacity"),
    [((30, 30, 34), 0.9), ((40, 140, 60), 0.8), ((20, 60, 160), 0.8), ((200, 20, 20), 0.9)],
)
def test_a_stroke_over_tissue_is_found(colour: tuple[int, int, int], opacity: float) -> None:
    thumb = ihc()
    assert not pen_mask(thumb).any()  # blue haematoxylin and brown DAB are no ink
    drawn = thumb * (1 - opacity) + np.array(colour) * opacity
    thumb[200:300] = drawn[200:300].astype(np.uint8)
    mask = pen_mask(thumb)
    assert mask[205:295].mean() > 0.95
    assert not mask[:170].any()  # the mask may exceed the stroke by 30 rows
    assert not mask[330:].any()


@pytest.mark.parametrize("stain", STAINS)
def test_a_stain_with_the_colour_of_ink_is_no_ink(stain: str) -> None:
    for name in ("patch", "CMU-1-Small-Region-macro"):  # 0.86 and 0.23 of them are tissue
        thumb = stained(unmix(original(name).thumb), stain, 1.5)
        assert not pen_mask(thumb).any()
        assert tissue_mask(thumb, 4.0).mean() > 0.15


STAINED = [
    (name, stain, depth)
    for name in ("CMU-1-Small-Region", "tcga-cr-7395-01a-01-ts1", "1065626-biopsy")
    for stain in STAINS
    for depth in (0.5, 1.0, 2.0)
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stain", "depth"), drawn(STAINED, 8))
def test_stains_of_any_depth_are_no_ink(name: str, stain: str, depth: float) -> None:
    amounts = unmix(original(name).thumb)
    assert pen_mask(stained(amounts, stain, depth))[amounts.sum(0) > 0.05].mean() < 0.01


@pytest.mark.parametrize("stain", ["H&E", "IHC, DAB", "Masson, light green", "Alcian blue, PAS"])
def test_a_stroke_on_a_stained_slide_is_found(stain: str) -> None:
    """Recall over 0.95, precision over 0.7: a mask may exceed the stroke by the smoothing."""
    thumb = stained(unmix(original("CMU-1-Small-Region-macro").thumb), stain, 1.5)
    ink = np.zeros(thumb.shape[:2], bool)
    ink[90:110, 20:330] = ink[20:230, 160:175] = True
    for colour in ((40, 140, 60), (20, 60, 160), (25, 25, 28), (200, 20, 20)):
        drawn_on = thumb.copy()
        drawn_on[ink] = (0.1 * thumb[ink] + 0.9 * np.array(colour)).astype(np.uint8)
        mask = pen_mask(drawn_on)
        assert mask[ink].mean() > 0.95
        assert ink[mask].mean() > 0.7


def blurred_right(thumb: np.ndarray, sigma: float) -> np.ndarray:
    soft, half = thumb.copy(), thumb.shape[1] // 2
    soft[:, half:] = ndimage.gaussian_filter(thumb, (sigma, sigma, 0))[:, half:]
    return soft


@pytest.mark.parametrize(
    ("um_per_px", "um", "least"),
    [(0.997, 3, 0.8), (2.01, 4, 0.85), (2.01, 12, 0.85), (5.01, 10, 0.6)],
)
def test_the_blurred_half_of_real_tissue_is_found(
    um_per_px: float, um: float, least: float
) -> None:
    """Blur from 1.5 px of the thumbnail is found; misses are near the sharp half and in pieces."""
    thumb, downsample = slide_thumb(
        "CMU-1-Small-Region.svs", longest=round(2967 * 0.499 / um_per_px)
    )
    assert downsample * 0.499 == pytest.approx(um_per_px, rel=0.01)
    tissue, half = tissue_mask(thumb, um_per_px), thumb.shape[1] // 2
    assert not blur_mask(thumb, tissue, um_per_px).any()
    mask = blur_mask(blurred_right(thumb, um / um_per_px), tissue, um_per_px)
    assert mask[:, :half].sum() == 0
    assert mask[:, half:].sum() > least * tissue[:, half:].sum()


def test_sharp_slides_are_not_called_blurred() -> None:
    for name, mpp in (("tcga-cr-7395-01a-01-ts1.svs", 0.5), ("1065626.svs", 0.5026),
                      ("test3-DAPI-2-387.ndpi", 0.228)):  # fmt: skip
        thumb, downsample = slide_thumb(name, longest=700)
        tissue = tissue_mask(thumb, mpp * downsample)
        assert blur_mask(thumb, tissue, mpp * downsample).sum() < 0.005 * tissue.sum(), name
    assert not blur_mask(plain((200, 120, 170), 0), np.ones((400, 600), bool), 2.0).any()


def test_what_a_thumbnail_cannot_show_is_not_flagged() -> None:
    thumb = blurred_right(ihc(), 20)
    tissue = np.ones(thumb.shape[:2], bool)
    assert blur_mask(thumb, tissue, 2.0).any()
    for um_per_px in (None, 8.1, 1e9):
        assert not blur_mask(thumb, tissue, um_per_px).any()
    assert not blur_mask(thumb, ~tissue, 2.0).any()


def test_what_is_no_thumbnail_is_refused() -> None:
    thumb = ihc()
    for wrong in (thumb[..., 0], thumb / 255, thumb[:0], np.dstack([thumb, thumb]), "a.png"):
        with pytest.raises(ValueError, match=r"thumb: expected uint8 \[height, width, 3\], got"):
            tissue_mask(wrong)
        with pytest.raises(ValueError, match="thumb: expected uint8"):
            pen_mask(wrong)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="um_per_px: expected a positive number"):
            tissue_mask(thumb, wrong)
    with pytest.raises(ValueError, match=r"tissue: expected bool \[512, 512\], got bool \[3, 3\]"):
        blur_mask(thumb, np.ones((3, 3), bool), 2.0)


def test_black_may_be_the_background_of_fluorescence() -> None:
    """Pixels of exactly 0 give the same masks as the noise of a camera, if nothing is glass."""
    y, x = np.mgrid[:512, :512]
    spots = np.zeros((512, 512, 3), np.uint8)
    for down, across in np.random.default_rng(0).normal(200, 40, (60, 2)):
        spots[(y - down) ** 2 + (x - across) ** 2 < 25, 2] = 200
    noise = np.random.default_rng(1).integers(1, 5, spots.shape)
    noisy = np.maximum(spots, noise).astype(np.uint8)
    masks = [tissue_mask(picture, 1.0) for picture in (spots, noisy)]
    assert 0.05 < masks[0].mean() < 0.3
    assert (masks[0] & masks[1]).sum() > 0.8 * (masks[0] | masks[1]).sum()
    assert not tissue_mask(np.zeros_like(spots), 1.0).any()
