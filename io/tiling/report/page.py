"""The page of the report, index.html: one file that loads only pictures from its folder.

All texts of files and slides are escaped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from ...page import escape, frame_page
from .charts import flag_chart, histogram, percent
from .facts import FLAGS, STATES, SlideFacts, fact_lines, share

LABELS = "label-images"
"""Folder of the label and macro images, beside the page."""
_SYMBOLS = {"ok": "✓", "empty": "○", "incomplete": "◐", "failed": "✕"}
_STATE_WORDS = {
    "ok": "ok",
    "empty": "without patches",
    "incomplete": "incomplete",
    "failed": "failed",
}
_SORTS = {
    "state": "Failed first",
    "name": "Name",
    "most": "Most patches",
    "fewest": "Fewest patches",
    "tissue": "Least tissue",
    "flagged": "Most flagged",
    "finest": "Finest resolution",
    "coarsest": "Coarsest resolution",
}
# What a patch of each kind looks like in the pictures.
_LEGEND = {
    "outline of the tissue": '<path d="M2 9q2-7 6-6t6 6-6 5-6-5z" fill="none" stroke="#009e73" '
    'stroke-width="2"/>',
    "kept patches": '<path d="M2 2h12v12H2zM8 2v12M2 8h12" fill="none" stroke="#0072b2"/>',
    "edge": '<path class="edge" d="M2 2h12v12H2z"/>',
    "blur": '<path class="blur" d="M2 2h12v12H2z"/><path d="M4 8h8" stroke="#000"/>',
    "pen": '<path class="pen" d="M2 2h12v12H2z"/><path d="M4 12l8-8" stroke="#000"/>',
    "corrupt": '<path fill="#000" d="M2 2h12v12H2z"/><path d="M4 12l8-8M4 4l8 8" stroke="#fff"/>',
}


class ReportFacts(NamedTuple):
    """All that the page shows."""

    title: str
    tiling: Mapping[str, Any]
    """What was requested, as in run.json."""
    encoders: Mapping[str, str]
    """Folder to id of the encoders."""
    slides: Sequence[SlideFacts]
    not_taken: Sequence[tuple[str, str]]
    """Name and reason of each file that was named and is no slide of the store."""


def page_lines(report: ReportFacts) -> Iterator[str]:
    """Yield the lines of index.html."""
    slides = sorted(report.slides, key=lambda slide: STATES.index(slide.state))
    folder = Path(__file__).parent
    before, after = frame_page(f"{report.title}: slides", folder, images="'self' file:")
    yield (
        f"{before}<header>\n<h1>{escape(report.title)}</h1>\n"
        f'<p class="muted">{_requested(report)}</p>\n</header>\n'
    )
    yield from _summary(slides, len(report.not_taken))
    yield from _encoders(slides, report.encoders)
    yield '<h2>Slides</h2>\n<ul class="legend">'
    for name, mark in _LEGEND.items():
        yield f'<li><svg viewBox="0 0 16 16" aria-hidden="true">{mark}</svg>{name}</li>'
    yield "</ul>\n"
    yield from _controls(slides)
    yield '<main class="slides" id="slides">\n'
    for slide in slides:
        yield _card(slide)
    yield "</main>\n"
    yield from _not_taken(report.not_taken)
    yield (
        '<footer>Written by motet. <a href="slides.csv">slides.csv</a> has a line per '
        f"slide.</footer>\n{after}"
    )


def _requested(report: ReportFacts) -> str:
    """Return one line on the patches and encoders that were requested."""
    tiling, parts = report.tiling, []
    for name, form in (
        ("tile_px", "patches of {} px"), ("mpp", "{} µm per px"), ("downsample", "downsample {}"),
        ("min_tissue", "at least {} tissue"), ("border", "border: {}"),
    ):  # fmt: skip
        if (value := tiling.get(name)) is not None:
            known = name == "min_tissue" and isinstance(value, int | float)
            parts.append(form.format(percent(value) if known else escape(value)))
    if tiling.get("imported"):
        parts.append("features of another tool")
    if report.encoders:
        parts.append("encoded by " + ", ".join(map(escape, report.encoders.values())))
    return "Slides of a feature store" + "".join(f" · {part}" for part in parts)


def _summary(slides: Sequence[SlideFacts], not_taken: int) -> Iterator[str]:
    """Yield the counts and the charts."""
    states = Counter(slide.state for slide in slides)
    tiled = [slide for slide in slides if slide.state != "failed"]
    kept = sum(slide.row["kept"] or 0 for slide in tiled)
    flags = {name: sum(slide.row[name] or 0 for slide in tiled) for name in FLAGS}
    tiles = [("Slides", f"{len(slides):,}", "")]
    for state in reversed(STATES):
        if states[state] or state in ("ok", "empty", "failed"):
            of = percent(states[state] / len(slides)) + " of slides" if slides else ""
            tiles.append((f"{_SYMBOLS[state]} {_STATE_WORDS[state]}", f"{states[state]:,}", of))
    if not_taken:
        tiles.append(("− not taken", f"{not_taken:,}", '<a href="#not-taken">files</a>'))
    tiles.append(("Patches kept", f"{kept:,}", f"n = {len(tiled):,} slides"))
    yield '<dl class="tiles">'
    for name, count, note in tiles:
        yield f"<div><dt>{name}</dt><dd>{count}<small>{note}</small></dd></div>"
    yield '</dl>\n<div class="charts">\n'
    patches = [slide.row["kept"] for slide in tiled if slide.row["kept"] is not None]
    shares = [_tissue_share(slide) for slide in tiled]
    mpp = [float(slide.row["mpp"]) for slide in tiled if slide.row["mpp"]]
    yield histogram("Patches per slide", patches, "patches kept")
    tissue = [100 * value for value in shares if value is not None]
    yield histogram("Tissue", tissue, "patches that touch tissue, % of the grid", 100.0)
    yield histogram("Resolution of level 0", mpp, "µm per px")
    yield flag_chart(flags, kept)
    yield "</div>\n"


def _encoders(slides: Sequence[SlideFacts], encoders: Mapping[str, str]) -> Iterator[str]:
    """Yield a table of the encoders, if slides lack features of one, or if there are several."""
    tiled = [slide for slide in slides if slide.state != "failed"]
    lacking = Counter(name for slide in tiled for name in slide.absent)
    if len(encoders) < 2 and not lacking:
        return
    yield (
        '<h2>Encoders</h2>\n<div class="panel scroll"><table><tr><th>Encoder</th>'
        f'<th class="n">Features (n = {len(tiled):,} slides)</th><th class="n">Absent</th></tr>'
    )
    for name in encoders.values():
        absent = lacking[name]
        yield (
            f'<tr><td>{escape(name)}</td><td class="n">{len(tiled) - absent:,}</td>'
            f'<td class="n">{absent:,}</td></tr>'
        )
    yield "</table></div>\n"


def _not_taken(files: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Yield a table of the files that were named and are no slide of the store."""
    if not files:
        return
    yield (
        f'<h2 id="not-taken">Not taken (n = {len(files):,})</h2>\n'
        '<div class="panel"><table class="files"><tr><th>File</th><th>Reason</th></tr>'
    )
    for name, reason in files:
        yield f"<tr><td><bdi>{escape(name)}</bdi></td><td>{escape(reason)}</td></tr>\n"
    yield "</table></div>\n"


def _controls(slides: Sequence[SlideFacts]) -> Iterator[str]:
    """Yield the fields to search, filter and sort; the script shows them."""
    states = Counter(slide.state for slide in slides)
    flags = Counter(name for slide in slides for name in slide.flags)
    readers = Counter(slide.row["reader"] for slide in slides if slide.row["reader"])
    yield (
        '<form class="controls" id="controls" hidden>'
        '<input name="search" type="search" placeholder="Search names, reasons, readers"'
        ' aria-label="Search">'
    )
    yield _select("state", "Every status", [
        (state, f"{_STATE_WORDS[state]} ({states[state]:,})") for state in STATES if states[state]
    ])  # fmt: skip
    yield _select("flag", "Any flag", [
        (name, f"with {name} ({flags[name]:,})") for name in FLAGS if flags[name]
    ])  # fmt: skip
    yield _select("reader", "Every reader", [
        (name, f"{name} ({count:,})") for name, count in sorted(readers.items())
    ])  # fmt: skip
    options = "".join(f'<option value="{name}">{text}</option>' for name, text in _SORTS.items())
    yield (
        f'<select name="sort" aria-label="Sort by" data-first="state">{options}</select>'
        '<button type="reset">Reset</button><output id="shown" aria-live="polite"></output>'
        "</form>\n"
    )


def _select(name: str, all_of_them: str, choices: Sequence[tuple[str, str]]) -> str:
    options = "".join(
        f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in choices
    )
    return (
        f'<select name="{name}" aria-label="{all_of_them}"><option value="">{all_of_them}</option>'
        f"{options}</select>"
    )


def _card(slide: SlideFacts) -> str:
    """Return the card of a slide: its picture, name, state and facts."""
    row, state = slide.row, slide.state
    numbers = {
        "kept": row["kept"], "tissue": _tissue_share(slide), "mpp": row["mpp"],
        "flagged": share([row[name] for name in FLAGS], row["kept"]),
    }  # fmt: skip
    data = "".join(
        f' data-{name}="{value:.6g}"' for name, value in numbers.items() if value is not None
    )
    lines = [
        f'<article class="slide" data-state="{state}" data-flags="{" ".join(slide.flags)}" '
        f'data-reader="{escape(row["reader"] or "")}"{data}>'
    ]
    if state != "failed":
        name = quote(row["key"])
        lines.append(
            f'<a class="picture" href="slides/{name}.png"><img loading="lazy" decoding="async" '
            f'src="thumbs/{name}.jpg" alt="Tissue and patches of {escape(row["name"])}"></a>'
        )
    reason = f": {escape(row['reason'])}" if row["reason"] else ""
    lines.append(
        f'<div class="head"><h3><bdi>{escape(row["name"])}</bdi></h3>'
        f'<span class="state {state}">{_SYMBOLS[state]} {_STATE_WORDS[state]}{reason}</span></div>'
    )
    if row["message"]:
        lines.append(f'<p class="why"><bdi>{escape(row["message"])}</bdi></p>')
    facts = "".join(f"<dt>{label}</dt><dd>{escape(text)}</dd>" for label, text in fact_lines(slide))
    lines.append(f"<dl>{facts}</dl>" if facts else "")
    if slide.labels:
        pictures = "".join(
            f'<figure><img loading="lazy" decoding="async" src="{LABELS}/{quote(file)}" '
            f'alt="{escape(name)}"><figcaption>{escape(name)}</figcaption></figure>'
            for name, file in slide.labels
        )
        lines.append(f'<div class="labels">{pictures}</div>')
    lines.append("</article>\n")
    return "\n".join(lines)


def _tissue_share(slide: SlideFacts) -> float | None:
    return share([slide.row["tissue"]], slide.row["grid"])
