"""TIFF whose colours have tiles of their own: in planes of one page, or in a page each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import SlideError
from .tiff_images import SlideImage
from .tiff_metadata import are_rgb


def find_channels(path: Path, tiff: Any, image: SlideImage) -> list[Any]:
    """Return the pages of green and blue, if the page of the slide is that of red; else none.

    They follow it, and OME lists them under the same image.

    Raises:
        SlideError: "unreadable" if there are no such pages.
    """
    if image.page.samplesperpixel != 1 or not are_rgb(image.text):
        return []
    try:
        pages = [tiff.pages[image.number + i] for i in (1, 2)]
    except IndexError:
        pages = []
    if len(pages) != 2 or any(page.shape != image.page.shape for page in pages):
        raise SlideError(
            path, "unreadable", "expected three pages of one size: red, green and blue"
        )
    return pages


def pages_of_size(path: Path, channels: list[Any], page: Any) -> list[Any]:
    """Return for each channel its page, or SubIFD, of the size and form of a page.

    Raises:
        SlideError: "unreadable" if a channel has no such page.
    """
    pages = []
    for channel in channels:
        levels = [channel, *(channel.pages or () if channel.subifds else ())]
        same = [
            level for level in levels if level.shape == page.shape
            and level.compression == page.compression and level.is_tiled == page.is_tiled
        ]  # fmt: skip
        if not same:
            width, height = page.imagewidth, page.imagelength
            message = f"expected a level of {width} x {height} px in each of its channels"
            raise SlideError(path, "unreadable", message)
        pages.append(same[0])
    return pages


def decoder_of(pages: tuple[Any, ...]) -> Callable[[bytes, int], Any]:
    """Return a function that decodes a tile by its number, counted over all pages."""
    tables = [page.jpegtables or None for page in pages]
    if len(pages) == 1:
        decode = pages[0].decode
        return lambda data, number: decode(data, number, jpegtables=tables[0])
    count = len(pages[0].dataoffsets)

    def decode_of_page(data: bytes, number: int) -> Any:
        at, number = divmod(number, count)
        return pages[at].decode(data, number, jpegtables=tables[at])

    return decode_of_page
