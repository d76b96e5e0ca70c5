"""The events that a worker sends: dicts of plain values, which pass between processes as JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import SlideError
from ..store.source import Source

Emit = Callable[[dict[str, Any]], None]


def slide_event(event: str, source: Source) -> dict[str, Any]:
    """Return an event that concerns a slide; `bytes` is the size of its file."""
    return {"event": event, "key": source.key, "name": source.name, "bytes": source.bytes}


def hung_error(source: Source, timeout_s: float | None) -> SlideError:
    """Return the error of a slide without progress for `timeout_s` seconds."""
    return SlideError(
        source.path, "unreadable",
        f"the process that read it hung: no progress for {timeout_s:g} s (--slide-timeout)",
    )  # fmt: skip
