"""The quality report: pictures, table, page, hostile names, updates, and bounded memory."""

import csv
import os
import re
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from motet.io import tile_slides, write_report
from motet.io.tiling.report.charts import histogram, percent
from motet.io.tiling.report.facts import slide_facts
from motet.io.tiling.report.page import ReportFacts, page_lines
from motet.io.tiling.report.picture import INKS, KEPT, OUTLINE
from PIL import Image

from .conftest import data_path
from .report_helpers import HOSTILE, MadeSlides, made_slide
from .slides import draw_tissue
from .store_helpers import GOLDEN


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "slides.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Page(HTMLParser):
    """The tags, attributes and links of a page, its cards, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.cards: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.cards += [dict(attrs)] if tag == "article" else []
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_picture_shows_tissue_patches_and_flags(tmp_path: Path) -> None:
    store = MadeSlides(tmp_path, 1)
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


def test_the_table_and_the_page_list_all_slides(tmp_path: Path) -> None:
    store = MadeSlides(tmp_path, 2, image=1, mask="masks/a.geojson")
    store.failed = {
        "bad-1": {"path": "/data/bad.svs", "name": "bad.svs", "reason": "unreadable",
                  "message": "not an image", "attempts": 2},
    }  # fmt: skip
    write_report(tmp_path, tmp_path / "elsewhere", store=store)
    first, _, failed = table(tmp_path / "elsewhere")
    assert first == {
        "key": "slide-00000", "name": "slide-00000.svs", "status": "ok", "reason": "", "mpp": "0.5",
        "message": "", "image": "1", "mask": "masks/a.geojson", "mpp_source": "file", "level": "0",
        "reader": "cucim", "vendor": "aperio", "grid": "70", "tissue": "35", "kept": "35",
        "corrupt": "1", "pen": "1", "blur": "1", "edge": "1", "encoders": "",
        "absent_encoders": "", "path": "/data/slide-00000.svs",
    }  # fmt: skip
    assert (failed["status"], failed["reason"]) == ("failed", "unreadable")
    assert failed["message"] == "not an image"
    page = Page(tmp_path / "elsewhere" / "index.html")
    for text in (
        "Slides3✓ ok266.7 % of slides", "○ without patches0", "✕ failed1",
        "Patches kept70n = 2 slides", "n = 70 kept patches", "not an image", "Attempts2",
        "Image1, 1,000 × 750 px", "Readercucim, vendor aperio, level 0",
        "Resolution0.5 µm per px, from the file", "Tissuemask masks/a.geojson",
        "Patches35 kept of 70, 35 touch tissue", "Flags1 edge, 1 blur, 1 pen, 1 corrupt",
    ):  # fmt: skip
        assert text in page.text, text
    assert not (tmp_path / "report").exists()


def test_features_that_are_absent_are_listed_per_encoder(tmp_path: Path) -> None:
    store = MadeSlides(tmp_path, 3, encoders=["a"])
    store.run = {
        "encoders": {"a": {"id": "A"}, "b-c": {"id": "hf:B/C"}},
        "tiling": {"mpp": 0.5, "tile_px": 224, "min_tissue": 0.1, "downsample": None},
    }
    index = write_report(tmp_path, store=store)
    row = table(index.parent)[0]
    assert (row["status"], row["encoders"], row["absent_encoders"]) == ("ok", "A", "hf:B/C")
    page = Page(index)
    assert [card["data-state"] for card in page.cards] == ["incomplete"] * 3
    assert "hf:B/C03" in page.text  # no slide has features, three lack them
    assert "patches of 224 px · 0.5 µm per px · at least 10 % tissue · encoded by A, hf:B/C" in (
        page.text
    )


def test_a_slide_that_failed_for_an_encoder_says_so(tmp_path: Path) -> None:
    store = MadeSlides(tmp_path, 2, encoders=["a"])
    store.run = {"encoders": {"a": {"id": "A"}, "b": {"id": "B"}}}
    store.failed = {
        "slide-00001": {"encoder": "B", "reason": "encoder", "message": "NaN", "attempts": 3},
    }
    index = write_report(tmp_path, store=store)
    assert [row["status"] for row in table(index.parent)] == ["ok", "ok"]
    assert table(index.parent)[1]["message"] == "B: NaN"
    page = Page(index)
    assert len(page.cards) == 2
    for text in ("B: NaN", "AbsentB", "Attempts3", "◐ incomplete2"):
        assert text in page.text, text


def test_which_image_mask_and_resolution_were_taken(tmp_path: Path) -> None:
    image = {"page": 2, "name": "Baseline", "number": 1, "slides": 2, "associated": ["Label"]}
    store = MadeSlides(
        tmp_path, 1, image=image, mask=None, mpp=0.5, mpp_source="table", mpp_file=0.25
    )
    store.not_taken = {"/data/x.vsi": "unknown extension .vsi", "/data/<b>": "a pipe or device"}
    index = write_report(tmp_path, store=store)
    row = table(index.parent)[0]
    assert row["image"] == "page 2, Baseline, slide 1 of 2 in the file"
    assert row["mask"] == "searched on the thumbnail"
    text = Page(index).text
    for part in (
        "Imagepage 2, Baseline, slide 1 of 2 in the file, 1,000 × 750 px",
        "Resolution0.5 µm per px, from the table of --slide-mpp (by the file 0.25)",
        "Tissuesearched on the thumbnail", "Not shownLabel", "Not taken (n = 2)",
        "/data/x.vsiunknown extension .vsi", "/data/<b>a pipe or device",
    ):  # fmt: skip
        assert part in text, part


def test_labels_are_shown_only_if_asked_for(tmp_path: Path) -> None:
    slide = data_path("slides", "CMU-1-Small-Region.svs")
    store = MadeSlides(tmp_path, 2)
    store.others = {
        "slide-00000": made_slide("slide-00000", path=str(slide)),
        "slide-00001": made_slide("slide-00001", path=str(tmp_path / "gone.svs")),
    }
    index = write_report(tmp_path, store=store, labels=True)
    shown = [link for link in Page(index).links if link.startswith("label-images/")]
    assert shown == ["label-images/slide-00000-0.jpg", "label-images/slide-00000-1.jpg"]
    assert "labelmacro" in Page(index).text
    for link in shown:
        with Image.open(index.parent / link) as picture:
            assert max(picture.size) == 440
    write_report(tmp_path, store=store)
    assert "label-images/" not in index.read_text()
    assert not [*(index.parent / "label-images").iterdir()]
    store.run = {"pseudonyms": "0123456789abcdef"}
    with pytest.raises(ValueError, match="labels: the slides of this store have pseudonyms"):
        write_report(tmp_path, store=store, labels=True)


def test_failures_and_empty_slides_come_first(tmp_path: Path) -> None:
    nothing = {"grid": 70, "tissue": 0, "patches": 0}
    store = MadeSlides(tmp_path, 2)
    empty = made_slide("slide-00001", status="empty", counts=nothing)
    store.others = {"slide-00001": empty}
    store.failed = {"bad-1": {"path": "bad.svs", "reason": "damaged", "message": "cut"}}
    index = write_report(tmp_path, store=store)
    assert [card["data-state"] for card in Page(index).cards] == ["failed", "empty", "ok"]
    assert table(index.parent)[1]["reason"] == "no patch has enough tissue"


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    store = MadeSlides(
        tmp_path, 1, name=HOSTILE, mpp_source=HOSTILE, status="empty", reason=HOSTILE,
        reader=HOSTILE, vendor=HOSTILE, image=HOSTILE, mask=HOSTILE, level=HOSTILE,
        encoders=[HOSTILE],
    )  # fmt: skip
    store.run = {"encoders": {"a": {"id": HOSTILE}}, "tiling": {"border": HOSTILE, "mpp": HOSTILE}}
    store.failed = {"bad-1": {"path": HOSTILE, "reason": HOSTILE, "message": HOSTILE}}
    index = write_report(tmp_path, store=store)
    page = Page(index)
    assert page.tags.count("script") == 1  # which is the page's
    assert {"img", "svg"} <= {*page.tags}
    assert not [name for name in page.attributes if name.startswith("on") or name == "style"]
    assert page.text.count("<script>alert(1)</script>") > 10
    assert "\u202e" not in index.read_text()
    lines = (index.parent / "slides.csv").read_text().splitlines()
    assert len(lines) == 3  # one per slide
    assert table(index.parent)[0]["name"].startswith("<script>alert(1)</script> \"'& /../../x")


def test_hostile_names_of_files_go_through_a_store(tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    names = ['"><img src=x onerror=alert(1)>.png', "a\nb'.png", "\udcff<b>.png", "=1+1.png"]
    for name in names:
        Image.fromarray(draw_tissue(200, 150)).save(slides / name)
    (slides / "<!-- broken.png").write_bytes(b"</script>")
    tile_slides(
        slides, tmp_path / "out", encoder="stain-stats", downsample=1, tile_px=64, workers=0
    )
    page = Page(write_report(tmp_path / "out"))
    assert sorted(str(card["data-state"]) for card in page.cards) == ["failed", *["ok"] * 4]
    for name in (names[0], "a b'.png", "<b>.png", "<!-- broken.png"):
        assert name in page.text
    assert page.tags.count("img") == 4
    assert page.tags.count("script") == 1
    assert "b" not in page.tags


def test_a_store_of_version_1_has_a_report(tmp_path: Path) -> None:
    page = Page(write_report(GOLDEN, tmp_path / "report"))
    assert sorted(str(card["data-state"]) for card in page.cards) == ["empty", "failed", "ok"]
    assert "Featureshf:owl/vit" in page.text


def test_links_are_relative_and_lead_somewhere(tmp_path: Path) -> None:
    index = write_report(tmp_path, store=MadeSlides(tmp_path, 3, status="empty"))
    links = Page(index).links
    assert len(links) == 1 + 2 * 3
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
    store = MadeSlides(tmp_path, 1, **change)
    write_report(tmp_path, store=store)
    with Image.open(tmp_path / "report" / "slides" / "slide-00000.png") as picture:
        assert 640 <= picture.width <= 1024
        assert picture.height <= 1024 + 66


def test_slides_without_thumbnail_or_patches_are_drawn(tmp_path: Path) -> None:
    store = MadeSlides(tmp_path, 1)
    slide = made_slide("slide-00000")
    slide.thumb = slide.mask = None
    slide.coords, slide.flags = np.empty((0, 2), np.int32), np.empty(0, np.uint8)
    store.__class__ = type("One", (MadeSlides,), {"__getitem__": lambda self, key: slide})
    write_report(tmp_path, store=store)
    assert (tmp_path / "report" / "slides" / "slide-00000.png").stat().st_size > 1000


def test_only_what_is_newer_is_drawn_again(tmp_path: Path) -> None:
    store = MadeSlides(tmp_path, 5)
    report = write_report(tmp_path, store=store).parent
    pictures = sorted((report / "slides").iterdir()) + sorted((report / "thumbs").iterdir())
    assert len(pictures) == 10
    for path in pictures:
        os.utime(path, ns=(0, path.stat().st_mtime_ns - 5))
    before = {path: path.stat().st_mtime_ns for path in pictures}
    write_report(tmp_path, store=store)
    assert {path: path.stat().st_mtime_ns for path in pictures} == before
    os.utime(tmp_path / "slides" / "slide-00003.zarr")
    (report / "thumbs" / "slide-00001.jpg").unlink()
    write_report(tmp_path, store=store)
    changed = [path.name for path in pictures if path.stat().st_mtime_ns != before[path]]
    assert changed == [
        "slide-00001.png", "slide-00003.png", "slide-00001.jpg", "slide-00003.jpg"
    ]  # fmt: skip
    assert not [path for path in report.rglob(".*") if path.is_file()]  # no temporary file is left


def test_a_large_cohort_takes_no_more_memory_than_a_picture(tmp_path: Path) -> None:
    def peak(count: int) -> float:
        folder = tmp_path / str(count)
        store = MadeSlides(folder, count, side=300)
        tracemalloc.start()
        write_report(folder, store=store)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(1)  # loads the imports
    assert peak(16) < peak(4) + 1e5


def test_the_page_of_1000_slides_is_small_and_loads_lazily() -> None:
    made = made_slide("slide", encoders=["a"])
    slides = [
        slide_facts(f"TCGA-{n:04}-01Z-00-DX1-01234567", made.attrs, ["a"], {"a": "A"})
        for n in range(1000)
    ]
    page = "".join(page_lines(ReportFacts("cohort", {}, {"a": "A"}, slides, [])))
    assert len(page.encode()) < 1.2e6
    assert page.count("<img ") == page.count('<img loading="lazy"') == 1000


def test_a_histogram_counts_every_value() -> None:
    text = histogram("T", [0, 1, 1, 7, 40], "patches")
    assert "n = 5 slides" in text
    bars = re.findall(r"<title>(.*?)</title>", text)
    assert bars == ["0 to 2: 3 slides", "6 to 8: 1 slide", "38 to 40: 1 slide"]
    shares = re.findall(r"<title>(.*?)</title>", histogram("T", [0.0, 5.0, 100.0], "%", 100.0))
    assert shares == ["0 to 5: 1 slide", "5 to 10: 1 slide", "95 to 100: 1 slide"]
    same = re.findall(r"<title>(.*?)</title>", histogram("T", [0.25, 0.25], "µm"))
    assert same == ["0.24 to 0.26: 2 slides"]
    assert "n = 3 slides" in histogram("T", [0, 0, 0], "patches")
    assert "not known" in histogram("T", [], "patches")


def test_a_share_is_rounded_to_0_or_100_only_if_it_is_that() -> None:
    shares = (0, 0.00001, 0.0156, 0.5, 0.99999, 1)
    assert [percent(share) for share in shares] == [
        "0 %", "< 0.1 %", "1.56 %", "50 %", "99.9 %", "100 %"
    ]  # fmt: skip
