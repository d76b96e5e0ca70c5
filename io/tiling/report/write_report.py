"""The quality report of a store: a picture of each slide, a table, and a page that shows all.

It is drawn from the store, slide by slide: its memory is that of one picture, and about 2 KB per
slide for its facts. Slide files are read only for their labels, if these are asked for.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol, cast

from ...._atomic import replacing
from ...page import one_line
from .facts import COLUMNS, SlideFacts, slide_facts
from .page import LABELS, ReportFacts, page_lines
from .picture import ReportSlide, draw_labels, draw_pictures


class ReportStore(Protocol):
    """The attributes of a store that the report reads; `FeatureStore` has them.

    A store may also have `run`, the content of run.json, and `not_taken`, path to reason of what
    was named and is no slide; its slides may have `encoders`, the folders of the encoders of which
    they have features.
    """

    def __iter__(self) -> Iterator[str]: ...
    def __getitem__(self, key: str, /) -> ReportSlide: ...
    @property
    def failed(self) -> Mapping[str, Mapping[str, Any]]: ...


def write_report(
    cohort: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    labels: bool = False,
    store: ReportStore | None = None,
) -> Path:
    """Write the quality report of a cohort: its patches, their flags, empty and failed slides.

    `index.html` shows all slides, failed ones first, with counts and histograms; the slides can be
    searched, filtered and sorted. It also works without scripts, its links are relative, and it
    loads nothing from the internet. `slides/<key>.png` is a slide's thumbnail with the outlines of
    its tissue and its patches; `thumbs/<key>.jpg` is the same, smaller. Patches with a flag are
    filled: orange for pen, yellow for blur, black for corrupt, light blue for edge. `slides.csv`
    has one line per slide, failed ones too. A further call draws only slides that have changed.

    Args:
        cohort: folder of the store.
        out: folder of the report; None for `report` in the cohort folder.
        labels: True also shows the label and macro images of the slide files, which may name
            patients. OpenSlide reads them. A call without this removes them.
        store: the store, if it is already open.

    Returns:
        The path of index.html.

    Raises:
        StoreError: the folder is no store.
        ValueError: labels of a store whose slides have pseudonyms.
        OSError: the report cannot be written.

    Example:
        >>> class Empty(dict):
        ...     failed = {"a-1": {"path": "a.svs", "reason": "missing", "message": "no such file"}}
        >>> index = motet.io.write_report("cohort", store=Empty())
        >>> print(index.with_name("slides.csv").read_text().splitlines()[1])
        a-1,a.svs,failed,missing,no such file,,,,,,,,,,,,,,,,,a.svs
    """
    cohort = Path(cohort)
    out = cohort / "report" if out is None else Path(out)
    store = _open_store(cohort) if store is None else store
    run: Mapping[str, Any] = getattr(store, "run", {})
    if labels and "pseudonyms" in run:
        raise ValueError("labels: the slides of this store have pseudonyms; labels may name them")
    encoders = {slug: str(spec.get("id", slug)) for slug, spec in run.get("encoders", {}).items()}
    for folder in ("slides", "thumbs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for picture in (out / LABELS).glob("*.jpg"):
        picture.unlink()
    slides = _report_slides(store, encoders, cohort, out)
    if labels:
        slides = _with_labels(slides, out / LABELS)
    _write_table(out / "slides.csv", slides)
    report = ReportFacts(
        one_line(cohort.resolve().name), run.get("tiling", {}), encoders, slides,
        sorted(getattr(store, "not_taken", {}).items()),
    )  # fmt: skip
    with _text_file(out / "index.html") as index:
        index.writelines(page_lines(report))
    return out / "index.html"


def _open_store(cohort: Path) -> ReportStore:
    from ...store.read import FeatureStore

    # A cast, as type checkers do not accept a cached_property for a property of a Protocol.
    return cast("ReportStore", FeatureStore(cohort))


def _report_slides(
    store: ReportStore, encoders: Mapping[str, str], cohort: Path, out: Path
) -> list[SlideFacts]:
    """Return the facts of all slides, those that failed last; draw the pictures."""
    failed = dict(store.failed)
    slides = [
        _report_slide(store[key], key, encoders, failed.pop(key, None), cohort, out)
        for key in store
    ]
    for key, note in sorted(failed.items()):
        name = note.get("name") or note.get("path")
        slides.append(slide_facts(key, {**note, "status": "failed", "name": name}))
    return slides


def _report_slide(
    slide: ReportSlide,
    key: str,
    encoders: Mapping[str, str],
    failure: Mapping[str, Any] | None,
    cohort: Path,
    out: Path,
) -> SlideFacts:
    """Return the facts of a slide; draw its pictures unless they are up to date."""
    facts = slide_facts(key, slide.attrs, getattr(slide, "encoders", None), encoders, failure)
    large, small = out / "slides" / f"{key}.png", out / "thumbs" / f"{key}.jpg"
    changed = cohort / "slides" / f"{key}.zarr"
    if not (_is_newer(large, changed) and _is_newer(small, changed)):
        draw_pictures(slide, facts, large, small)
    return facts


def _with_labels(slides: list[SlideFacts], folder: Path) -> list[SlideFacts]:
    """Read the label and macro images of the slides, and return the facts with them.

    Files that failed are not opened again: they may crash a C library.
    """
    folder.mkdir(exist_ok=True)
    return [
        slide if slide.state == "failed"
        else slide._replace(labels=draw_labels(slide.row["path"], folder, slide.row["key"]))
        for slide in slides
    ]  # fmt: skip


def _write_table(path: Path, slides: list[SlideFacts]) -> None:
    with _text_file(path) as table:
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(slide.row for slide in slides)


def _is_newer(picture: Path, slide: Path) -> bool:
    try:
        return picture.stat().st_mtime_ns > slide.stat().st_mtime_ns
    except FileNotFoundError:
        return False


@contextmanager
def _text_file(path: Path) -> Iterator[IO[str]]:
    with replacing(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        yield file
