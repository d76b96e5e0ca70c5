"""The pictures of a slide: its thumbnail with the outline of the tissue, its patches, their flags.

A slide has two: the large one has a caption and a scale bar, the small one is shown on the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ...._atomic import replacing
from ...errors import SlideError
from ...scale_bar import choose_scale_bar
from .facts import SlideFacts, level0_size, resolution_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont


class ReportSlide(Protocol):
    """The attributes of a slide that the report reads; `SlideFeatures` has them."""

    @property
    def attrs(self) -> Mapping[str, Any]: ...
    @property
    def coords(self) -> NDArray[np.int32]: ...
    @property
    def flags(self) -> NDArray[np.uint8]: ...
    @property
    def thumb(self) -> NDArray[np.uint8] | None: ...
    @property
    def mask(self) -> NDArray[np.bool_] | None: ...


class Ink(NamedTuple):
    """How patches with a flag are drawn."""

    colour: tuple[int, int, int]  # from Okabe and Ito's palette for all colour vision
    bit: int  # of the store's flags
    mark: str  # drawn inside of the patch, for those who cannot see the colours


OUTLINE, KEPT = (0, 158, 115), (0, 114, 178)
# Later ones are drawn over earlier ones.
INKS = {
    "edge": Ink((86, 180, 233), 1, ""),
    "blur": Ink((240, 228, 66), 4, "-"),
    "pen": Ink((230, 159, 0), 2, "/"),
    "corrupt": Ink((0, 0, 0), 8, "x"),
}
SMALL = 440
"""Longest side of the picture on the page, px. Cards are about 300 px wide."""
# Of the large picture: most and least px of its longer side, px of its caption's height.
_LONGEST, _SHORTEST, _CAPTION = 1024, 512, 66
# Patches of fewer px get one outline around all of them.
_GRID_PX = 6


class _Drawing(NamedTuple):
    """A thumbnail with outlines and patches, and what the marks on it need."""

    image: Image
    boxes: NDArray[np.int64]
    """[N, 4]: left, top, right and bottom of each patch, px."""
    px_per_level0_px: float | None


def draw_pictures(slide: ReportSlide, facts: SlideFacts, large: Path, small: Path) -> None:
    """Draw both pictures of a slide, and write them: `large` as PNG, `small` as JPEG."""
    from PIL import Image

    thumb = _thumb(slide)
    drawing = _draw(slide, thumb, min(max(*thumb.shape[:2], _SHORTEST), _LONGEST))
    picture = _add_caption(drawing, facts)
    # 256 colours take a third of the bytes and of the time.
    palette = picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    with replacing(large) as partial:
        palette.save(partial, "PNG", compress_level=1)
    card = _draw(slide, thumb, SMALL).image
    with replacing(small) as partial:
        # Without subsampling, which would blur thin coloured lines.
        card.save(partial, "JPEG", quality=82, subsampling=0)


def draw_labels(path: str | None, labels: Path, key: str) -> list[tuple[str, str]]:
    """Write the label, macro and other images of a slide file as JPEG.

    Args:
        path: the slide file.
        labels: folder to write to.
        key: of the slide.

    Returns:
        Name and file name of each; an empty list if there is none, or if the file cannot be read.
    """
    from PIL import Image

    from ...slides.openslide import read_associated

    try:
        images = read_associated(Path(path), SMALL) if path else {}
    except SlideError:
        return []
    written = []
    for n, (name, pixels) in enumerate(sorted(images.items())):
        file = labels / f"{key}-{n}.jpg"
        with replacing(file) as partial:
            Image.fromarray(pixels).save(partial, "JPEG", quality=82)
        written.append((name, file.name))
    return written


def _thumb(slide: ReportSlide) -> NDArray[np.uint8]:
    """Return the thumbnail of a slide, a grey one if the store has none."""
    import numpy as np

    thumb = slide.thumb
    return np.full((3, 4, 3), 230, np.uint8) if thumb is None else thumb


def _draw(slide: ReportSlide, thumb: NDArray[np.uint8], longest: int) -> _Drawing:
    """Draw a thumbnail with the outlines of its tissue and patches, `longest` px in size."""
    import numpy as np
    from PIL import Image, ImageDraw

    height, width = thumb.shape[:2]
    zoom = longest / max(width, height)
    across, along = (max(1, round(side * zoom)) for side in (width, height))
    image = Image.fromarray(thumb).resize(
        (across, along), Image.Resampling.BILINEAR, reducing_gap=2.0
    )
    pixels = np.array(image)
    level0, footprint = level0_size(slide.attrs), slide.attrs.get("footprint_px")
    boxes = np.empty((0, 4), np.int64)
    flags = slide.flags
    if level0 and footprint and len(flags) and slide.attrs.get("coords") != "absent":
        scale = np.array([across / level0[0], along / level0[1]])
        corners = np.asarray(slide.coords, np.float64)
        low = np.clip(np.rint(corners * scale), 0, (across - 1, along - 1))
        # Along y another side is recorded if pixels are not square.
        sides = footprint, slide.attrs.get("footprint_y_px", footprint)
        high = np.clip(np.rint((corners + sides) * scale), 0, (across - 1, along - 1))
        boxes = np.concatenate([low, high], 1).astype(np.int64)
        _overlay(pixels, boxes, flags, footprint * min(scale))
    mask = None if slide.thumb is None else slide.mask
    if mask is not None:
        resized = np.asarray(
            Image.fromarray(mask).resize((across, along), Image.Resampling.NEAREST)
        )
        edge = _boundary(resized)
        # The page shows the small picture reduced: a line of one pixel would fade.
        pixels[edge | _boundary(resized & ~edge) if longest <= SMALL else edge] = OUTLINE
    image = Image.fromarray(pixels)
    _draw_marks(ImageDraw.Draw(image), boxes, flags)
    return _Drawing(image, boxes, across / level0[0] if level0 else None)


def _add_caption(drawing: _Drawing, facts: SlideFacts) -> Image:
    """Return a drawing on a white canvas, with a scale bar and a caption below it."""
    from PIL import Image, ImageDraw

    across, along = drawing.image.size
    canvas = Image.new("RGB", (max(across, 640), along + _CAPTION), "white")
    left = (canvas.width - across) // 2
    canvas.paste(drawing.image, (left, 0))
    draw = ImageDraw.Draw(canvas)
    if facts.row["mpp"] and drawing.px_per_level0_px:
        scale = drawing.px_per_level0_px / facts.row["mpp"]
        _draw_scale_bar(draw, scale, left, along, across)
    _draw_caption(draw, facts, along)
    return canvas


def _boundary(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the pixels of a mask that have a neighbour outside of it."""
    import numpy as np

    padded = np.pad(mask, 1, "edge")
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _overlay(
    pixels: NDArray[np.uint8], boxes: NDArray[np.int64], flags: NDArray[np.uint8], side: float
) -> None:
    """Draw the outlines of the kept patches, and fill the patches with a flag.

    Small patches (`side` in px) get one outline around all of them.
    """
    import numpy as np
    from PIL import Image, ImageDraw

    def blend(mask: NDArray[np.bool_], colour: tuple[int, int, int], share: float) -> None:
        pixels[mask] = (pixels[mask] * (1 - share) + np.array(colour) * share).astype(np.uint8)

    def draw_boxes(boxes: NDArray[np.int64], *, filled: bool) -> NDArray[np.bool_]:
        canvas = Image.new("1", pixels.shape[1::-1])
        draw = ImageDraw.Draw(canvas)
        for box in boxes.tolist():
            draw.rectangle(box, 1 if filled else None, 1)
        return np.array(canvas)

    if side < _GRID_PX:
        blend(_boundary(draw_boxes(boxes, filled=True)), KEPT, 0.8)
    else:
        # Fainter if the lines lie closer together, so that the tissue stays visible.
        blend(draw_boxes(boxes, filled=False), KEPT, 0.7 if side > 20 else 0.45)
    for ink in INKS.values():
        flagged = boxes[(flags & ink.bit) != 0]
        if len(flagged):
            blend(draw_boxes(flagged, filled=True), ink.colour, 0.45)


def _draw_marks(draw: ImageDraw, boxes: NDArray[np.int64], flags: NDArray[np.uint8]) -> None:
    """Draw the marks of the flags into their patches, unless these are too small."""
    for ink in INKS.values():
        light = (255, 255, 255) if sum(ink.colour) < 200 else (0, 0, 0)
        for x0, y0, x1, y1 in boxes[(flags[: len(boxes)] & ink.bit) != 0].tolist():
            if x1 - x0 < 9:
                break
            x0, y0, x1, y1 = x0 + 3, y0 + 3, x1 - 3, y1 - 3
            if ink.mark in ("/", "x"):
                draw.line((x0, y1, x1, y0), light)
            if ink.mark == "x":
                draw.line((x0, y0, x1, y1), light)
            if ink.mark == "-":
                draw.line((x0, (y0 + y1) // 2, x1, (y0 + y1) // 2), light)


def _draw_scale_bar(draw: ImageDraw, px_per_um: float, left: int, bottom: int, across: int) -> None:
    """Draw a bar of 1, 2 or 5 times a power of ten µm, at most a fifth of the picture's width."""
    length, text = choose_scale_bar(across / 5 / px_per_um)
    font = _font(13)
    width = max(length * px_per_um, draw.textlength(text, font))
    x, y = left + 10, bottom - 34
    draw.rectangle((x - 6, y - 4, x + width + 6, y + 26), "white")
    draw.rectangle((x, y + 18, x + length * px_per_um, y + 21), "black")
    draw.text((x, y), text, "black", font)


def _draw_caption(draw: ImageDraw, facts: SlideFacts, top: int) -> None:
    row = facts.row
    parts = [
        facts.state + (f": {row['reason']}" if row["reason"] else ""),
        resolution_text(facts) if row["mpp"] else "resolution unknown",
        *([f"level {row['level']}"] if row["level"] is not None else []),
        *([row["reader"]] if row["reader"] else []),
    ]
    width = draw.im.size[0]
    draw.text((8, top + 5), _shorten(row["name"], _font(15), width - 16), "black", _font(15))
    draw.text(
        (8, top + 26), _shorten(" · ".join(parts), _font(12), width - 16), (70, 70, 70), _font(12)
    )
    x = 8.0
    kept = f"{row['kept'] or 0:,} kept" + (f" of {row['grid']:,}" if row["grid"] else "")
    for colour, text in [
        (OUTLINE, "tissue"), (KEPT, kept), *((ink.colour, f"{row[name] or 0:,} {name}")
                                             for name, ink in INKS.items()),
    ]:  # fmt: skip
        draw.rectangle((x, top + 46, x + 11, top + 57), colour)
        draw.text((x + 16, top + 44), text, "black", _font(12))
        x += 30 + draw.textlength(text, _font(12))


@cache
def _font(size: int) -> FreeTypeFont:
    """Return matplotlib's DejaVu Sans, which has the letters of most names."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def _shorten(text: str, font: FreeTypeFont, width: float) -> str:
    """Return a text that is at most `width` px wide; the middle of a longer one is cut out."""
    text = text[:400]
    if font.getlength(text) <= width:
        return text
    half = len(text) // 2
    while half and font.getlength(f"{text[:half]}…{text[-half:]}") > width:
        half -= 1
    return f"{text[:half]}…{text[-half:]}" if half else "…"
