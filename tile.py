"""What `motet tile` shows while it works, and at its end."""

import csv
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .io.tiling import Tiled


class Progress:
    """A bar on a terminal; in a pipe, a line per slide that failed, and no more.

    The bar goes by bytes of slides, since the largest come first.
    """

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.patches = self.slides = self.failed = 0
        self.over: set[str] = set()
        self.decode_s = self.encode_s = 0.0
        self.bar: Any = None

    def __call__(self, event: dict[str, Any]) -> None:
        """Take an event of `tile_slides`."""
        what = event["event"]
        if what == "begin":
            self.slides = event["slides"]
            self.bar = tqdm(
                total=event["bytes"], unit="B", unit_scale=True, disable=None, file=sys.stderr,
                bar_format="{percentage:3.0f}% |{bar}| {desc}, {elapsed} so far, {remaining} left",
            )  # fmt: skip
        elif what == "patches":
            self.patches += event["patches"]
            self.decode_s += event["decode_s"]
            self.encode_s += event["encode_s"]
        elif what in ("known", "done", "failed") and event["key"] not in self.over:
            self.over.add(event["key"])  # workers may know of one another's
            self.bar.update(event["bytes"])
        if what == "failed":
            self.failed += 1
            self.bar.write(f"failed: {event['message']}", file=sys.stderr)
        self.bar.set_description_str(self.describe(), refresh=False)
        self.bar.update(0)

    def describe(self) -> str:
        """Return slides, patches per second and what holds the rest up."""
        text = f"{len(self.over)}/{self.slides} slides"
        if self.failed:
            text += f" ({self.failed} failed)"
        if self.patches:
            rate = self.patches / (time.perf_counter() - self.started)
            slowest = "decoding" if self.decode_s > self.encode_s else "encoding"
            text += f", {rate:,.0f} patches/s, {slowest} is slowest"
        return text

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def last_line(tiled: Tiled, out: Path, seconds: float) -> str:
    """Return the one line that says how it ended."""
    text = f"{tiled}; {tiled.patches:,} patches embedded in {seconds:.1f} s"
    if tiled.patches:
        text += f" ({tiled.patches / seconds:,.0f}/s)"
    return f"{text}: {out}"


def read_slide_mpp(text: str) -> dict[str, float] | float:
    """Read --slide-mpp: a number, or a CSV file with the columns slide and mpp.

    Raises:
        ValueError: neither.
    """
    try:
        return float(text)
    except ValueError:
        pass
    known: dict[str, float] = {}
    with open(text, newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        if not {"slide", "mpp"} <= set(table.fieldnames or ()):
            raise ValueError(f"--slide-mpp: {text}: expected the columns slide and mpp, got "
                             f"{', '.join(table.fieldnames or ()) or 'none'}")  # fmt: skip
        for number, row in enumerate(table, 2):
            try:
                known[row["slide"]] = float(row["mpp"])
            except (TypeError, ValueError):
                raise ValueError(
                    f"--slide-mpp: {text}, line {number}: mpp: expected a number, "
                    f"got {row['mpp']!r}"
                ) from None
    return known


def read_shard(text: str) -> tuple[int, int]:
    """Read --shard: i/n.

    Raises:
        ValueError: it is not of that form.
    """
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise ValueError(f"--shard: expected i/n with i from 0 to n - 1, got {text!r}")
    return int(i), int(n)
