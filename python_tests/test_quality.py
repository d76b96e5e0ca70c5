"""The quality report: pictures, tables, hostile names, updates, and bounded memory."""

import csv
import os
import re
import tracemalloc
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from motet.io import write_report
from motet.io.tiling.quality import INKS, KEPT, OUTLINE
from PIL import Image

HOSTILE = "<script>alert(1)</script>\n\"'&\u202e/../../x" + "long" * 100


class Slides:
    """Stands in for a FeatureStore, and makes each slide when it is read."""

    def __init__(self, folder: Path, count: int, **changes: Any) -> None:
        self.folder, self.count, self.changes = folder, count, changes
        self.failed: dict[str, dict[str, Any]] = {}
        for key in self:
            (folder / "slides" / f"{key}.zarr").mkdir(parents=True)

    def __iter__(self) -> Iterator[str]:
        return (f"slide-{n:05}" for n in range(self.count))

    def __getitem__(self, key: str) -> SimpleNamespace:
        return made(key, **self.changes)


def made(key: str, side: int = 40, **attrs: Any) -> SimpleNamespace:
    """Make a slide of 10 x 7.5 patches of 100 px: tissue on the left, flags in the first row."""
    thumb = np.full((side * 3 // 4, side, 3), 240, np.uint8)
    thumb[:, : side // 2] = (200, 120, 170)
    mask = np.zeros(thumb.shape[:2], bool)
    mask[:, : side // 2] = True
    x, y = np.meshgrid(np.arange(5) * 100, np.arange(7) * 100)
    flags = np.zeros(35, np.uint8)
    flags[:5] = 0, 1, 2, 4, 8
    counts = {"grid": 70, "tissue": 35, "patches": 35, "edge": 1, "pen": 1, "blur": 1, "corrupt": 1}
    known = {
        "name": f"{key}.svs", "source": {"path": f"/data/{key}.svs"}, "status": "ok", "mpp": 0.5,
        "mpp_source": "file", "level": 0, "reader": "cucim", "vendor": "aperio", "width": 1000,
        "height": 750, "footprint_px": 100.0, "counts": counts,
    }  # fmt: skip
    coords = np.stack([x.ravel(), y.ravel()], 1).astype(np.int32)
    return SimpleNamespace(attrs=known | attrs, coords=coords, flags=flags, thumb=thumb, mask=mask)


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "slides.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Page(HTMLParser):
    """The tags and links of a page, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_picture_shows_tissue_patches_and_flags(tmp_path: Path) -> None:
    store = Slides(tmp_path, 1)
    index = write_report(tmp_path, store=store)
    assert index == tmp_path / "report" / "index.html"
    with Image.open(tmp_path / "report" / "slides" / "slide-00000.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert pixels.shape == (384 + 66, 640, 3)  # 512 px of slide, 640 for the caption

    def near(place: np.ndarray, colour: tuple[int, int, int], within: int = 40) -> np.ndarray:
        return (np.abs(place - colour).max(-1) <= within).any()

    left, patch = 64, 51.2
    boundary = pixels[370, left + 250 : left + 262]
    assert near(boundary, OUTLINE)
    line = pixels[225, left + 148 : left + 160]
    assert near(line, tuple(0.7 * np.array(KEPT) + 0.3 * np.array((200, 120, 170))))
    tissue = pixels[75, left + 20]
    assert np.abs(tissue - (200, 120, 170)).max() < 12
    for column, name in ((1, "edge"), (2, "pen"), (3, "blur"), (4, "corrupt")):
        inside = pixels[12, left + round((column + 0.3) * patch)]
        expected = 0.55 * np.array((200, 120, 170)) + 0.45 * np.array(INKS[name].colour)
        assert np.abs(inside - expected).max() < 16, name
    assert near(
        pixels[26, left + round(4.5 * patch) - 2 : left + round(4.5 * patch) + 3], (255,) * 3
    )
    scale_bar = pixels[350:384, left + 5 : left + 120]
    assert (scale_bar > 240).all(-1).any()
    assert (pixels[384:] < 100).all(-1).sum() > 300  # the caption's text


def test_the_table_tells_all_slides(tmp_path: Path) -> None:
    store = Slides(tmp_path, 2)
    store.failed = {
        "bad-1": {"path": "/data/bad.svs", "name": "bad.svs", "reason": "unreadable",
                  "message": "not an image", "attempts": 2},
    }  # fmt: skip
    write_report(tmp_path, tmp_path / "elsewhere", store=store)
    first, _, failed = table(tmp_path / "elsewhere")
    assert first == {
        "key": "slide-00000", "name": "slide-00000.svs", "status": "ok", "reason": "", "mpp": "0.5",
        "mpp_source": "file", "level": "0", "reader": "cucim", "vendor": "aperio", "grid": "70",
        "tissue": "35", "kept": "35", "corrupt": "1", "pen": "1", "blur": "1", "edge": "1",
        "path": "/data/slide-00000.svs",
    }  # fmt: skip
    assert (failed["status"], failed["reason"]) == ("failed", "unreadable")
    page = Page(tmp_path / "elsewhere" / "index.html")
    assert "Slides: 2 ok, 0 empty, 1 failed" in page.text
    assert "70 kept, of these 2 edge, 2 blur, 2 pen, 2 corrupt" in page.text
    assert "not an image" in page.text
    assert not (tmp_path / "report").exists()


def test_failures_and_empty_slides_come_first(tmp_path: Path) -> None:
    nothing = {"grid": 70, "tissue": 0, "patches": 0}
    store = Slides(tmp_path, 1, status="empty", counts=nothing)
    store.failed = {"bad-1": {"path": "bad.svs", "reason": "damaged", "message": "cut"}}
    index = write_report(tmp_path, store=store)
    text = index.read_text()
    assert text.index("Failed") < text.index("Without patches") < text.index("<h2>Slides")
    assert table(index.parent)[0]["reason"] == "no patch has enough tissue"


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    store = Slides(tmp_path, 1, name=HOSTILE, mpp_source=HOSTILE, status="empty", reason=HOSTILE)
    store.failed = {"bad-1": {"path": HOSTILE, "reason": HOSTILE, "message": HOSTILE}}
    index = write_report(tmp_path, store=store)
    page = Page(index)
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text
    assert "\u202e" not in page.text
    lines = (index.parent / "slides.csv").read_text().splitlines()
    assert len(lines) == 3  # one per slide
    assert table(index.parent)[0]["name"].startswith("<script>alert(1)</script> \"'& /../../x")


def test_links_are_relative_and_lead_somewhere(tmp_path: Path) -> None:
    index = write_report(tmp_path, store=Slides(tmp_path, 3, status="empty"))
    links = Page(index).links
    assert len(links) == 1 + 2 * 3 + 1 + 3
    for link in links:
        assert not re.match(r"[a-z]+:|/", link)
        assert (index.parent / link).is_file(), link


@pytest.mark.parametrize(
    "change",
    [
        {"width": None}, {"footprint_px": None}, {"coords": "absent"}, {"mpp": None},
        {"counts": None}, {"source": None}, {"side": 3000}, {"side": 4}, {"footprint_px": 1e9},
        {"mpp": 1e-9}, {"mpp": 1e9}, {"mpp": "?"}, {"footprint_px": 1e-3},
    ],
)  # fmt: skip
def test_what_a_slide_does_not_tell_is_left_out(tmp_path: Path, change: dict[str, Any]) -> None:
    store = Slides(tmp_path, 1, **change)
    write_report(tmp_path, store=store)
    with Image.open(tmp_path / "report" / "slides" / "slide-00000.png") as picture:
        assert 640 <= picture.width <= 1024
        assert picture.height <= 1024 + 66


def test_slides_without_thumbnail_or_patches_are_drawn(tmp_path: Path) -> None:
    store = Slides(tmp_path, 1)
    slide = made("slide-00000")
    slide.thumb = slide.mask = None
    slide.coords, slide.flags = np.empty((0, 2), np.int32), np.empty(0, np.uint8)
    store.__class__ = type("One", (Slides,), {"__getitem__": lambda self, key: slide})
    write_report(tmp_path, store=store)
    assert (tmp_path / "report" / "slides" / "slide-00000.png").stat().st_size > 1000


def test_only_what_is_newer_is_drawn_again(tmp_path: Path) -> None:
    store = Slides(tmp_path, 50)
    report = write_report(tmp_path, store=store).parent
    pictures = sorted((report / "slides").iterdir()) + sorted((report / "sheets").iterdir())
    assert len(pictures) == 50 + 2
    for path in pictures:
        os.utime(path, ns=(0, path.stat().st_mtime_ns - 5))
    before = {path: path.stat().st_mtime_ns for path in pictures}
    write_report(tmp_path, store=store)
    assert {path: path.stat().st_mtime_ns for path in pictures} == before
    os.utime(tmp_path / "slides" / "slide-00049.zarr")
    write_report(tmp_path, store=store)
    changed = {path.name for path in pictures if path.stat().st_mtime_ns != before[path]}
    assert changed == {"slide-00049.png", "page-0002.png"}
    store.count = 48  # the second page has no slide any more
    write_report(tmp_path, store=store)
    assert [path.name for path in (report / "sheets").iterdir()] == ["page-0001.png"]
    assert not [path for path in report.rglob(".*") if path.is_file()]  # no temporary file is left


def test_a_sheet_that_is_half_a_file_is_drawn_again(tmp_path: Path) -> None:
    store = Slides(tmp_path, 2)
    report = write_report(tmp_path, store=store).parent
    sheet = report / "sheets" / "page-0001.png"
    content = sheet.read_bytes()
    for part in (b"", content[:20], b"not a picture"):
        sheet.write_bytes(part)
        write_report(tmp_path, store=store)
        assert sheet.read_bytes() == content


def test_a_large_cohort_takes_no_more_memory_than_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("motet.io.tiling.quality._PAGE", 8)

    def peak(count: int) -> float:
        folder = tmp_path / str(count)
        store = Slides(folder, count, side=600)
        tracemalloc.start()
        write_report(folder, store=store)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(1)  # loads the imports
    assert peak(36) < peak(8) + 3e5
