"""The output of `motet store`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ..io import FeatureStore, StoreError
from ..io.store.repair import Repair
from ..io.store.verify import Problem

_COLUMNS = ("key", "status", "patches", "corrupt", "mpp", "encoders")


def rows(store: FeatureStore) -> list[dict[str, Any]]:
    """Return one dict per slide, also of those that failed, for JSON."""
    manifest = store.manifest().astype(object)
    cells = manifest.where(manifest.notna(), None).to_numpy()
    return [dict(zip(manifest.columns, row, strict=True)) for row in cells]


def table(store: FeatureStore) -> str:
    """Return the rows as text, with a last line of counts."""
    slides = rows(store)
    cells = [[*_COLUMNS], *([_format_value(row[name]) for name in _COLUMNS] for row in slides)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    for row, i in zip(slides, range(1, len(lines)), strict=True):
        if row["status"] == "failed":
            lines[i] += f"  {row['reason']}: {row['message']}"
        elif row["message"]:
            lines[i] += f"  failed: {row['message']}"
    states = [row["status"] for row in slides]
    patches = sum(row["patches"] or 0 for row in slides)
    counted = ", ".join(f"{states.count(state)} {state}" for state in ("ok", "empty", "failed"))
    end = f"{len(slides)} slides: {counted}; {patches:,} patches"
    incomplete = sum(row["status"] != "failed" and row["message"] is not None for row in slides)
    if incomplete:
        end += f"; {incomplete} failed for an encoder"
    lines += (f"not taken: {path}: {why}" for path, why in store.not_taken.items())
    return "\n".join([*lines, end])


def details(store: FeatureStore, name: str) -> dict[str, Any]:
    """Return the metadata of one slide, failed or not, for JSON.

    Raises:
        StoreError: no such slide.
    """
    if store.find(name) is None and name in (failed := store.failed):
        return {"key": name, "status": "failed", **failed[name]}
    try:
        slide = store[name]
    except KeyError as error:
        raise StoreError(str(error.args[0])) from None
    shapes = {}
    for slug in slide.encoders:
        shapes[slug] = [len(slide), store.run["encoders"].get(slug, {}).get("width")]
    failure = store.failed.get(slide.key)
    return {**slide.attrs, "features": shapes, **({"failed": failure} if failure else {})}


def details_text(store: FeatureStore, name: str) -> str:
    """Return the metadata of one slide as text, a line per entry."""
    facts = list(_flatten(details(store, name), ""))
    width = max(len(fact) for fact, _ in facts)
    return "\n".join(f"{fact:{width}}  {_format_value(value)}" for fact, value in facts)


def problems_text(store: FeatureStore, problems: list[Problem]) -> str:
    """Return a line per problem, or a line that says that there is none."""
    if not problems:
        return f"{len(store)} slides, nothing wrong"
    lines = [f"{problem.key or store.path}: {problem.message}" for problem in problems]
    if any(problem.part for problem in problems):
        lines.append(f"motet store repair {store.path} removes what can be made anew")
    return "\n".join(lines)


def repairs_text(store: FeatureStore, repairs: list[Repair]) -> str:
    """Return a line per problem with what was done, and a last line that says what to do next."""
    if not repairs:
        return problems_text(store, [])
    lines = [f"{repair.key or store.path}: {repair.message}" for repair in repairs]
    removed = {repair.key for repair in repairs if repair.repaired and repair.key}
    left = sum(not repair.repaired for repair in repairs)
    end = f"{len(repairs) - left} problems repaired, {left} left"
    if removed:
        slides = f"{len(removed)} slide{'s'[: len(removed) != 1]}"
        end += f"; to make {slides} anew, give the commands of all encoders again"
    return "\n".join([*lines, end])


def _flatten(value: dict[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for name, entry in value.items():
        if isinstance(entry, dict):
            yield from _flatten(entry, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", entry


def _format_value(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.6g}"
    return str(value)
