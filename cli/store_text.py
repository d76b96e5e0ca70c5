"""What `motet store` prints of a feature store."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ..io import FeatureStore, StoreError
from ..io.store.verify import Problem

_SHOWN = ("key", "status", "patches", "corrupt", "mpp", "encoders")


def rows(store: FeatureStore) -> list[dict[str, Any]]:
    """Return a row per slide, failed ones too: JSON."""
    found = store.manifest().astype(object)
    cells = found.where(found.notna(), None).to_numpy()
    return [dict(zip(found.columns, row, strict=True)) for row in cells]


def table(store: FeatureStore) -> str:
    """Return them as text, and a last line that counts."""
    listed = rows(store)
    cells = [[*_SHOWN], *([_text(row[name]) for name in _SHOWN] for row in listed)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_SHOWN))]
    lines = [
        "  ".join(one.ljust(width) for one, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    for row, i in zip(listed, range(1, len(lines)), strict=True):
        if row["status"] == "failed":
            lines[i] += f"  {row['reason']}: {row['message']}"
    states = [row["status"] for row in listed]
    patches = sum(row["patches"] or 0 for row in listed)
    counted = ", ".join(f"{states.count(one)} {one}" for one in ("ok", "empty", "failed"))
    return "\n".join([*lines, f"{len(listed)} slides: {counted}; {patches:,} patches"])


def details(store: FeatureStore, name: str) -> dict[str, Any]:
    """Return what is known of one slide, failed or not: JSON.

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
    return {**slide.attrs, "features": shapes}


def details_text(store: FeatureStore, name: str) -> str:
    """Return it as text, a line per fact."""
    facts = list(_flat(details(store, name), ""))
    width = max(len(fact) for fact, _ in facts)
    return "\n".join(f"{fact:{width}}  {_text(value)}" for fact, value in facts)


def problems_text(store: FeatureStore, problems: list[Problem]) -> str:
    """Return a line per problem, or that there is none."""
    if not problems:
        return f"{len(store)} slides, nothing wrong"
    return "\n".join(f"{one.key or store.path}: {one.message}" for one in problems)


def _flat(value: dict[str, Any], above: str) -> Iterable[tuple[str, Any]]:
    for name, one in value.items():
        if isinstance(one, dict):
            yield from _flat(one, f"{above}{name}.")
        else:
            yield f"{above}{name}", one


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.6g}"
    return str(value)
