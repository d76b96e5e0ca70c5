"""The quality report of a cohort: a picture per slide, contact sheets, a table and an HTML page.

It is drawn only from the store, slide by slide, so its memory is that of one contact sheet, however
large the cohort is.
"""

from __future__ import annotations

import csv
import html
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol, cast
from urllib.parse import quote

from ..._atomic import replacing

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


class ReportStore(Protocol):
    """The attributes of a store that the report reads; `FeatureStore` has them."""

    def __iter__(self) -> Iterator[str]: ...
    def __getitem__(self, key: str, /) -> ReportSlide: ...
    @property
    def failed(self) -> Mapping[str, Mapping[str, Any]]: ...


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
COUNTS = ("grid", "tissue", "kept", "corrupt", "pen", "blur", "edge")
COLUMNS: tuple[str, ...] = (
    "key", "name", "status", "reason", "reader", "vendor", "mpp", "mpp_source", "level",
    *COUNTS, "path",
)  # fmt: skip
# Of a slide's picture: most and least px of its longer side, px of its caption's height.
_LONGEST, _SHORTEST, _CAPTION = 1024, 512, 66
# Of a contact sheet: px of a cell's side, cells per row, cells per sheet, px of a label's height.
_CELL, _PER_ROW, _PAGE, _LABEL = 240, 8, 48, 34


def write_report(
    cohort: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    store: ReportStore | None = None,
) -> Path:
    """Write the quality report of a cohort: its patches, their flags, empty and failed slides.

    `slides/<key>.png` is a slide's thumbnail with the outlines of its tissue and its patches.
    Patches with a flag are filled: orange for pen, yellow for blur, black for corrupt, light blue
    for edge. `sheets/` holds contact sheets of 48 slides each. `slides.csv` has one line per slide,
    failed ones too. `index.html` shows all, failed and empty slides first; its links are relative,
    and it loads nothing from the internet. A further call draws only slides that have changed.

    Args:
        cohort: folder of the store.
        out: folder of the report; None for `report` in the cohort folder.
        store: the store, if it is already open.

    Returns:
        The path of index.html.

    Raises:
        StoreError: the folder is no store.
        OSError: the report cannot be written.

    Example:
        >>> class Empty(dict):
        ...     failed = {"a-1": {"path": "a.svs", "reason": "missing", "message": "no such file"}}
        >>> index = motet.io.write_report("cohort", store=Empty())
        >>> print(index.with_name("slides.csv").read_text().splitlines()[1])
        a-1,a.svs,failed,missing,,,,,,,,,,,,,a.svs
    """
    cohort = Path(cohort)
    out = cohort / "report" if out is None else Path(out)
    store = _open_store(cohort) if store is None else store
    pictures = out / "slides"
    pictures.mkdir(parents=True, exist_ok=True)
    (out / "sheets").mkdir(exist_ok=True)
    empty: list[dict[str, Any]] = []
    totals = dict.fromkeys(("ok", "empty", "failed", "kept", *INKS), 0)
    sheets: list[tuple[str, list[str]]] = []
    with _text_file(out / "slides.csv") as table:
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for page, keys in enumerate(_pages(store), 1):
            cells = _draw_page(store, keys, cohort, pictures)
            rows = [row for row, _ in cells]
            writer.writerows(rows)
            _add_to_totals(totals, rows)
            empty += (row for row in rows if row["status"] != "ok")
            sheets.append((f"page-{page:04}.png", keys))
            _write_sheet(out / "sheets" / sheets[-1][0], cells, pictures)
        failed = _failed_rows(store)
        writer.writerows({name: row[name] for name in COLUMNS} for row in failed)
    totals["failed"] = len(failed)
    _remove_other_sheets(out / "sheets", {name for name, _ in sheets})
    with _text_file(out / "index.html") as index:
        index.writelines(_html_lines(cohort, totals, failed, empty, sheets))
    return out / "index.html"


def _open_store(cohort: Path) -> ReportStore:
    from ..store.read import FeatureStore

    # A cast, as type checkers do not accept a cached_property for a property of a Protocol.
    return cast("ReportStore", FeatureStore(cohort))


def _remove_other_sheets(folder: Path, names: set[str]) -> None:
    """Remove the contact sheets without these names: the last ones of an earlier, longer report."""
    for sheet in folder.glob("page-*.png"):
        if sheet.name not in names:
            sheet.unlink()


@contextmanager
def _text_file(path: Path) -> Iterator[IO[str]]:
    with replacing(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        yield file


def _draw_page(
    store: ReportStore, keys: list[str], cohort: Path, pictures: Path
) -> list[tuple[dict[str, Any], Image | None]]:
    """Draw the slides of a contact sheet whose pictures are out of date.

    Returns:
        For each slide its row of the table and its cell of the contact sheet, None if its picture
        is up to date.
    """
    cells = []
    for key in keys:
        slide, picture = store[key], pictures / f"{key}.png"
        row = _table_row(key, slide.attrs)
        up_to_date = _is_newer(picture, cohort / "slides" / f"{key}.zarr")
        cells.append((row, None if up_to_date else _draw_slide(slide, row, picture)))
    return cells


def _add_to_totals(totals: dict[str, int], rows: list[dict[str, Any]]) -> None:
    for row in rows:
        totals[row["status"]] = totals.get(row["status"], 0) + 1
        for name in ("kept", *INKS):
            totals[name] += row[name] or 0


def _failed_rows(store: ReportStore) -> list[dict[str, Any]]:
    return [
        _table_row(key, {"status": "failed", "name": note.get("name") or note.get("path"), **note})
        | {"message": note.get("message")}
        for key, note in sorted(store.failed.items())
    ]


def _pages(keys: Iterable[str]) -> Iterator[list[str]]:
    keys = iter(keys)
    while page := list(islice(keys, _PAGE)):
        yield page


def _table_row(key: str, attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of a slide in the table. Texts are one line, even of a hostile name."""
    counts, source = (attrs.get(name) or {} for name in ("counts", "source"))
    kept = counts.get("kept", counts.get("patches"))
    status = attrs.get("status") or ("ok" if kept else "empty")
    path = attrs.get("path") or source.get("path")
    row = {**attrs, **counts, "kept": kept, "key": key, "status": status, "path": path}
    row["name"] = attrs.get("name") or path or key
    mpp = row.get("mpp")
    row["mpp"] = mpp if isinstance(mpp, int | float) and 0 < mpp < math.inf else None
    if status == "empty":
        row["reason"] = row.get("reason") or ("no patch has enough tissue" if counts.get("grid")
                                              else "no patch fits into it")  # fmt: skip
    cells = {name: row.get(name) for name in COLUMNS}
    return {
        name: _one_line(value) if isinstance(value, str) else value for name, value in cells.items()
    }


def _one_line(text: object) -> str:
    """Return a text in one line, each run of spaces and unprintable characters as one space."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def _draw_slide(slide: ReportSlide, row: Mapping[str, Any], path: Path) -> Image:
    """Draw a slide's picture, write it, and return its cell of the contact sheet."""
    import numpy as np
    from PIL import Image, ImageDraw

    thumb, mask = slide.thumb, slide.mask
    if thumb is None:
        thumb, mask = np.full((3, 4, 3), 230, np.uint8), None
    height, width = thumb.shape[:2]
    longest = min(max(max(width, height), _SHORTEST), _LONGEST)
    zoom = longest / max(width, height)
    across, along = (max(1, round(side * zoom)) for side in (width, height))
    image = Image.fromarray(thumb).resize((across, along), Image.Resampling.BILINEAR)
    pixels = np.array(image)
    if mask is not None:
        resized = Image.fromarray(mask).resize((across, along), Image.Resampling.NEAREST)
        pixels[_boundary(np.asarray(resized))] = OUTLINE
    level0, footprint = _level0_size(slide.attrs), slide.attrs.get("footprint_px")
    boxes = np.empty((0, 4), np.int64)
    flags = slide.flags
    if level0 and footprint and len(flags) and slide.attrs.get("coords") != "absent":
        scale = np.array([across / level0[0], along / level0[1]])
        corners = np.asarray(slide.coords, np.float64)
        low = np.clip(np.rint(corners * scale), 0, (across - 1, along - 1))
        high = np.clip(np.rint((corners + footprint) * scale), 0, (across - 1, along - 1))
        boxes = np.concatenate([low, high], 1).astype(np.int64)
        _overlay(pixels, boxes, flags, footprint * min(scale))
    canvas = Image.new("RGB", (max(across, 640), along + _CAPTION), "white")
    left = (canvas.width - across) // 2
    canvas.paste(Image.fromarray(pixels), (left, 0))
    draw = ImageDraw.Draw(canvas)
    _draw_marks(draw, boxes + np.array((left, 0, left, 0)), flags)
    if row["mpp"] and level0:
        _draw_scale_bar(draw, across / level0[0] / row["mpp"], left, along, across)
    _draw_caption(draw, row, along)
    # 256 colours take a third of the bytes and of the time.
    palette = canvas.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    with replacing(path) as partial:
        palette.save(partial, "PNG", compress_level=1)
    # From the 256 colours, as the file has them: a later report, which reads the file, gives the
    # same cell.
    return _sheet_cell(palette.convert("RGB"))


def _level0_size(attrs: Mapping[str, Any]) -> tuple[int, int] | None:
    width, height = attrs.get("width"), attrs.get("height")
    if isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0:
        return width, height
    return None


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

    Patches of less than 10 px (`side`) get one outline around all of them.
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

    if side < 10:
        blend(_boundary(draw_boxes(boxes, filled=True)), KEPT, 0.8)
    else:
        blend(draw_boxes(boxes, filled=False), KEPT, 0.7)
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
    longest_um = across / 5 / px_per_um
    power = 10.0 ** math.floor(math.log10(longest_um))
    length = next(step * power for step in (5, 2, 1) if step * power <= longest_um)
    text = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
    font = _font(13)
    width = max(length * px_per_um, draw.textlength(text, font))
    x, y = left + 10, bottom - 34
    draw.rectangle((x - 6, y - 4, x + width + 6, y + 26), "white")
    draw.rectangle((x, y + 18, x + length * px_per_um, y + 21), "black")
    draw.text((x, y), text, "black", font)


def _draw_caption(draw: ImageDraw, row: Mapping[str, Any], top: int) -> None:
    mpp = row["mpp"]
    facts = [
        row["status"] + (f": {row['reason']}" if row["reason"] else ""),
        f"{mpp:.4g} µm per px ({row['mpp_source'] or 'source unknown'})" if mpp else "mpp unknown",
        *([f"level {row['level']}"] if row["level"] is not None else []),
        *([row["reader"]] if row["reader"] else []),
    ]
    width = draw.im.size[0]
    draw.text((8, top + 5), _shorten(row["name"], _font(15), width - 16), "black", _font(15))
    draw.text(
        (8, top + 26), _shorten(" · ".join(facts), _font(12), width - 16), (70, 70, 70), _font(12)
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


def _sheet_cell(picture: Image) -> Image:
    """Return a slide's picture, without its caption, in the size of a contact sheet's cell."""
    from PIL import Image

    size = picture.width, picture.height - _CAPTION
    zoom = min((_CELL - 8) / size[0], (_CELL - 8) / size[1])
    small = max(1, round(size[0] * zoom)), max(1, round(size[1] * zoom))
    return picture.resize(small, Image.Resampling.BILINEAR, (0, 0, *size), reducing_gap=2.0)


def _write_sheet(
    path: Path, cells: list[tuple[dict[str, Any], Image | None]], pictures: Path
) -> None:
    """Write a contact sheet, unless the file exists and shows the same slides."""
    from PIL import Image, ImageDraw
    from PIL.PngImagePlugin import PngInfo

    # The content of a sheet, which is kept in the PNG file as a text.
    content = "\n".join(f"{row['key']} {row['status']} {row['kept']}" for row, _ in cells)
    if all(cell is None for _, cell in cells) and path.exists():
        try:
            with Image.open(path) as old:
                if old.info.get("motet") == content:
                    return
        except (OSError, SyntaxError):
            pass  # a damaged file: draw it again
    rows = math.ceil(len(cells) / _PER_ROW)
    sheet = Image.new("RGB", (_PER_ROW * _CELL, rows * (_CELL + _LABEL)), "white")
    draw = ImageDraw.Draw(sheet)
    for n, (row, cell) in enumerate(cells):
        if cell is None:
            with Image.open(pictures / f"{row['key']}.png") as picture:
                cell = _sheet_cell(picture.convert("RGB"))
        x, y = n % _PER_ROW * _CELL, n // _PER_ROW * (_CELL + _LABEL)
        sheet.paste(cell, (x + (_CELL - cell.width) // 2, y + (_CELL - cell.height) // 2))
        draw.text(
            (x + 5, y + _CELL), _shorten(row["name"], _font(12), _CELL - 10), "black", _font(12)
        )
        state = f"{row['kept'] or 0:,} patches" if row["status"] == "ok" else row["status"]
        colour = (90, 90, 90) if row["status"] == "ok" else (213, 94, 0)
        draw.text((x + 5, y + _CELL + 15), state, colour, _font(11))
    info = PngInfo()
    info.add_text("motet", content)
    with replacing(path) as partial:
        sheet.save(partial, "PNG", compress_level=1, pnginfo=info)


def _html_lines(
    cohort: Path,
    totals: Mapping[str, int],
    failed: list[dict[str, Any]],
    empty: list[dict[str, Any]],
    sheets: list[tuple[str, list[str]]],
) -> Iterator[str]:
    """Yield the lines of index.html."""
    title = html.escape(_one_line(cohort.resolve().name))
    yield (
        "<!doctype html>\n<html lang=en><meta charset=utf-8>\n"
        f"<title>{title}: quality report</title>\n<style>\n"
        "body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; "
        "padding: 0 1em; color: #222 }\n"
        "table { border-collapse: collapse; width: 100% } td, th { text-align: left; "
        "vertical-align: top; padding: .3em .8em .3em 0; border-bottom: 1px solid #ddd; "
        "overflow-wrap: anywhere }\n"
        "img { max-width: 100%; height: auto } td img { max-height: 120px }\n</style>\n"
        f"<h1>{title}</h1>\n"
    )
    slides = ", ".join(f"{totals[name]:,} {name}" for name in ("ok", "empty", "failed"))
    flags = ", ".join(f"{totals[name]:,} {name}" for name in INKS)
    yield f"<p>Slides: {slides}. Patches: {totals['kept']:,} kept, of these {flags}. "
    yield '<a href="slides.csv">slides.csv</a> has a line per slide.</p>\n'
    if failed:
        yield "<h2>Failed</h2>\n<table><tr><th>slide<th>reason<th>what was wrong<th>path</tr>\n"
        for row in failed:
            yield f"<tr>{_html_cells(row, 'name', 'reason', 'message', 'path')}</tr>\n"
        yield "</table>\n"
    if empty:
        yield "<h2>Without patches</h2>\n<table><tr><th>slide<th>reason<th>thumbnail</tr>\n"
        for row in empty:
            link = f"slides/{quote(row['key'])}.png"
            yield f"<tr>{_html_cells(row, 'name', 'reason')}"
            yield f'<td><a href="{link}"><img loading=lazy alt="" src="{link}"></a></tr>\n'
        yield "</table>\n"
    if sheets:
        yield "<h2>Slides</h2>\n"
    for name, keys in sheets:
        yield f'<p><img loading=lazy src="sheets/{name}" usemap="#{name}" alt=""></p>\n'
        yield f'<map name="{name}">\n'
        for n, key in enumerate(keys):
            x, y = n % _PER_ROW * _CELL, n // _PER_ROW * (_CELL + _LABEL)
            area = f"{x},{y},{x + _CELL},{y + _CELL + _LABEL}"
            link = f"slides/{quote(key)}.png"
            yield f'<area coords="{area}" href="{link}" alt="{html.escape(key)}">\n'
        yield "</map>\n"


def _html_cells(row: Mapping[str, Any], *names: str) -> str:
    return "".join(f"<td>{html.escape(_one_line(row[name] or ''))}" for name in names)


def _is_newer(picture: Path, slide: Path) -> bool:
    try:
        return picture.stat().st_mtime_ns > slide.stat().st_mtime_ns
    except FileNotFoundError:
        return False
