"""What the report states of each slide: a row of slides.csv, and the facts on the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ...page import one_line

FLAGS = ("edge", "blur", "pen", "corrupt")
"""Names of the flags, in the order in which they are drawn."""
STATES = ("failed", "incomplete", "empty", "ok")
"""The states of a slide, in the order of the page. A slide is incomplete if features of an
encoder are absent."""
COUNTS = ("grid", "tissue", "kept", "corrupt", "pen", "blur", "edge")
COLUMNS: tuple[str, ...] = (
    "key", "name", "status", "reason", "message", "image", "reader", "vendor", "mpp", "mpp_source",
    "mask", "level", *COUNTS, "encoders", "absent_encoders", "path",
)  # fmt: skip
"""The columns of slides.csv."""
SEARCHED = "searched on the thumbnail"
"""The column `mask` of a slide whose tissue was searched."""
_MPP_SOURCES = {
    "file": "from the file",
    "user": "from --slide-mpp",
    "table": "from the table of --slide-mpp",
    "list": "from the list of slides",
}


class SlideFacts(NamedTuple):
    """What the report knows of a slide."""

    row: dict[str, Any]
    """The row of slides.csv; texts have one line, unknown values are None."""
    size: tuple[int, int] | None
    """Width and height of level 0, px."""
    encoders: tuple[str, ...]
    """Ids of the encoders of which it has features."""
    absent: tuple[str, ...]
    """Ids of the encoders of the store of which it has no features."""
    associated: tuple[str, ...]
    """Label, macro and other images of the file that are no slides."""
    mpp_file: float | None
    """Micrometres per px by the file, if another value is used."""
    attempts: int | None
    """How many times the slide failed; None if it did not."""
    failed_for_encoder: bool
    """True if the slide is in the store, but failed for an encoder, or could not be made anew."""
    labels: Sequence[tuple[str, str]] = ()
    """Name and file of each label and macro image that the page shows."""

    @property
    def state(self) -> str:
        """Return one of STATES."""
        status = self.row["status"]
        is_incomplete = self.failed_for_encoder or (status == "ok" and self.absent)
        return "incomplete" if is_incomplete else status

    @property
    def flags(self) -> dict[str, int]:
        """Return the number of kept patches with each flag, without those that are 0."""
        return {name: self.row[name] for name in FLAGS if self.row[name]}


def slide_facts(
    key: str,
    attrs: Mapping[str, Any],
    encoders: Iterable[str] | None = None,
    expected: Mapping[str, str] | None = None,
    failure: Mapping[str, Any] | None = None,
) -> SlideFacts:
    """Collect the facts of a slide from its attributes; what is absent or malformed is unknown.

    Args:
        key: of the slide.
        attrs: the slide's attributes, or the note of its failure with a `status`.
        encoders: folders of the encoders of which the slide has features; None if unknown.
        expected: folder to id of all encoders of the store.
        failure: the note of a slide that is in the store and failed for an encoder.
    """
    counts, source = (_mapping(attrs.get(name)) for name in ("counts", "source"))
    counts = {name: value for name, value in counts.items() if _is_count(value)}
    kept, status = counts.get("kept", counts.get("patches")), attrs.get("status")
    row: dict[str, Any] = {
        **{name: attrs.get(name) for name in COLUMNS if name not in COUNTS},
        **{name: counts.get(name) for name in COUNTS},
        "key": key,
        "kept": kept,
        "status": status if status in STATES else ("ok" if kept else "empty"),
        "path": attrs.get("path") or source.get("path"),
    }
    row["name"] = attrs.get("name") or row["path"] or key
    row["mpp"] = _mpp(row["mpp"])
    if row["status"] == "empty":
        row["reason"] = row["reason"] or ("no patch has enough tissue" if counts.get("grid")
                                          else "no patch fits into it")  # fmt: skip
    ids = expected or {}
    present = list(encoders or ())
    named = tuple(ids.get(slug, slug) for slug in present)
    row["encoders"] = " ".join(named)
    absent = () if encoders is None else tuple(ids[slug] for slug in ids if slug not in present)
    row["absent_encoders"] = " ".join(absent)
    row["image"] = _image_text(attrs.get("image"))
    # None in a store says that there was no mask; where the attribute is absent, that is unknown.
    row["mask"] = attrs.get("mask") or (SEARCHED if "mask" in attrs else None)
    note = failure or attrs
    if failure is not None:
        row["message"] = f"{failure.get('encoder', '')}: {failure.get('message', '')}".strip(": ")
    cells = {name: _cell(value) for name, value in row.items()}
    return SlideFacts(
        cells, level0_size(attrs), named, absent, _associated(attrs), _mpp(attrs.get("mpp_file")),
        _count(note.get("attempts")), failed_for_encoder=failure is not None,
    )  # fmt: skip


def level0_size(attrs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return width and height of level 0 in px, None if the store does not have them."""
    width, height = _count(attrs.get("width")), _count(attrs.get("height"))
    return (width, height) if width and height else None


def resolution_text(facts: SlideFacts) -> str:
    """Return the micrometres per level-0 px of a slide, and where the value comes from."""
    mpp, source = facts.row["mpp"], facts.row["mpp_source"]
    if not mpp:
        return "unknown"
    text = f"{mpp:.4g} µm per px, {_MPP_SOURCES.get(source, source or 'source unknown')}"
    return text + (f" (by the file {facts.mpp_file:.4g})" if facts.mpp_file else "")


def fact_lines(facts: SlideFacts) -> list[tuple[str, str]]:
    """Return label and text of the facts of a slide, for the page; unknown ones are left out."""
    row, lines = facts.row, []

    def add(label: str, *parts: object) -> None:
        text = ", ".join(one_line(part) for part in parts if part not in (None, ""))
        if text:
            lines.append((label, text))

    if facts.state == "failed":
        add("Attempts", facts.attempts)
        add("File", row["path"] if row["path"] != row["name"] else None)
        return lines
    size = f"{facts.size[0]:,} × {facts.size[1]:,} px" if facts.size else None
    add("Image", row["image"], size)
    vendor = f"vendor {row['vendor']}" if row["vendor"] not in (None, row["reader"]) else None
    add("Reader", row["reader"], vendor, _labelled("level", row["level"]))
    add("Resolution", resolution_text(facts))
    add("Tissue", row["mask"] if row["mask"] in (None, SEARCHED) else f"mask {row['mask']}")
    if row["kept"] is not None:
        grid = f" of {row['grid']:,}" if row["grid"] is not None else ""
        tissue = f"{row['tissue']:,} touch tissue" if row["tissue"] is not None else None
        add("Patches", f"{row['kept']:,} kept{grid}", tissue)
    add("Flags", *(f"{count:,} {name}" for name, count in facts.flags.items()))
    add("Features", *facts.encoders)
    add("Absent", *facts.absent)
    add("Attempts", facts.attempts)
    add("Not shown", *(() if facts.labels else facts.associated))
    return lines


def share(part: Sequence[int | None], of: int | None) -> float | None:
    """Return the sum of counts divided by another, None if one is unknown or there is nothing."""
    known = [count for count in part if count is not None]
    return sum(known) / of if of and len(known) == len(part) else None


def _image_text(image: Any) -> str | None:
    """Return which image of the file is the slide, None if that is unknown."""
    if not isinstance(image, Mapping):
        return None if image is None else f"{image}"
    page, name = _labelled("page", image.get("page")), image.get("name")
    number, slides = _count(image.get("number")), _count(image.get("slides"))
    of = f"slide {number} of {slides} in the file" if number and slides and slides > 1 else None
    return ", ".join(str(part) for part in (page, name, of) if part not in (None, "")) or None


def _associated(attrs: Mapping[str, Any]) -> tuple[str, ...]:
    names = _mapping(attrs.get("image")).get("associated")
    return tuple(map(one_line, names)) if isinstance(names, list | tuple) else ()


def _mpp(value: Any) -> float | None:
    return value if isinstance(value, int | float) and 0 < value < math.inf else None


def _labelled(label: str, value: object) -> str | None:
    return None if value is None else f"{label} {value}"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _count(value: Any) -> int | None:
    return value if _is_count(value) else None


def _cell(value: Any) -> Any:
    """Return a value that has one line in the table: a number, a text, or None."""
    return value if value is None or isinstance(value, int | float) else one_line(value)
