"""Choose the image of a TIFF that is the slide, and the pages that are its levels.

A file may also hold a label, a macro, a thumbnail, or further slides ("regions"), in any order.
What a page is follows from its name, its tags, its size and its form (tiles, compression, samples).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SlideError, listed
from .levels import MAX_LEVELS
from .tiff_metadata import ome_images

MAX_PAGES = 256  # the first pages of a file; others are ignored
SCANNERS = ("aperio", "philips")  # all their tiled pages are levels, with the tag for it or not
SMALL_PX = 2048  # an image of at most this side and 1/256 of the slide's area is no slide

_ASSOCIATED = re.compile(
    r"(?<![a-z])(label|macro|overview|preview|thumb|thumbnail|barcode)(?![a-z])", re.IGNORECASE
)
_REDUCED, _MASK = 1, 4  # bits of NewSubfileType


@dataclass(eq=False)
class SlideImage:
    """An image of a file, which is the slide or one of several."""

    page: Any
    """Its finest page."""
    number: int
    """The number of this page in the file, from 0."""
    name: str
    """Its name in OME, or its short description; else empty."""
    text: str
    """Its metadata: the element of OME, else the description of the page."""
    levels: list[Any] = field(default_factory=list)
    """The pages of its levels, finest first."""

    @property
    def size(self) -> tuple[int, int]:
        return int(self.page.imagewidth), int(self.page.imagelength)

    def __str__(self) -> str:
        name = f"{self.name!r}, " if self.name else ""
        return f"{name}{self.size[0]} x {self.size[1]} px"


@dataclass(frozen=True, eq=False)
class FileImages:
    """The images of a file: slides in the order of their pages, and images that are no slides."""

    slides: list[SlideImage]
    associated: list[SlideImage]

    def choose(self, path: Path, number: int | None) -> SlideImage:
        """Return the image that is the slide.

        Args:
            path: the file.
            number: of the image, from 1; None if the file has only one.

        Raises:
            SlideError: "several" if a number is needed, "unsupported" if there is no such image.
        """
        count = len(self.slides)
        if number is None and count > 1:
            images = [f"{i}: {image}" for i, image in enumerate(self.slides, 1)]
            raise SlideError(
                path, "several",
                f"expected one slide, got {count} images ({listed(images)}): name them "
                f"{path.name}#1 to {path.name}#{count}, or use open_slide(..., image=1)",
            )  # fmt: skip
        if number is not None and not 1 <= number <= count:
            raise SlideError(
                path, "unsupported", f"expected an image from 1 to {count}, got {number}"
            )
        return self.slides[(number or 1) - 1]


def find_images(
    tiff: Any,
    vendor: str,
    description: str,
    shows_same: Callable[[Any, Any], bool],
    *,
    file_name: str,
) -> FileImages:
    """Find the slides of a TIFF and the pages that are their levels.

    * Images that are named label, macro, thumbnail, overview or the like are associated images, and
      so are masks and pages of another form than the slide.
    * Of the others, the largest is the slide.
    * A page of its form and aspect ratio that is smaller is one of its levels, if it is marked so
      (as a SubIFD, or by NewSubfileType), or shows the same picture.
    * Any further image of the same form is a slide too, except for small ones.

    Args:
        tiff: a `tifffile.TiffFile`.
        vendor: of the file.
        description: of its first page.
        shows_same: called with two pages, returns True if they show the same picture.
        file_name: of the file; OME metadata may describe several files.
    """
    pages = _first_pages(tiff)
    scanner = vendor in SCANNERS and pages[0].is_tiled
    images = _listed_images(pages, description, file_name)
    marked = [(i, page) for i, page in enumerate(pages)
              if page.subfiletype & _REDUCED or (scanner and i)]  # fmt: skip
    numbers = {number for number, _ in marked}
    unmarked = [image for image in images if image.number not in numbers]
    candidates = [image for image in unmarked if not _is_associated(image)] or images[:1]
    slides: list[SlideImage] = []
    for image in sorted(candidates, key=lambda image: -image.size[0] * image.size[1]):
        _add_image(image, slides, shows_same, only_one=scanner)
    slides.sort(key=lambda image: image.number)
    for image in slides:
        subs = [page for page in list(image.page.pages or ())[:MAX_LEVELS] if image.page.subifds]
        following = [page for number, page in marked if _slide_of(number, slides) is image]
        all_pages = [*image.levels, *subs, *following]
        image.levels = _in_order(image.page, all_pages, padded=vendor == "philips")
    used = {id(page) for image in slides for page in image.levels}
    return FileImages(slides, [image for image in images if id(image.page) not in used])


def _first_pages(tiff: Any) -> list[Any]:
    pages: dict[int, Any] = {}  # by offset: the list of a damaged file may be a circle
    for number in range(MAX_PAGES):
        try:
            page = tiff.pages[number]
        except IndexError:
            break
        if page.offset in pages:
            break
        pages[page.offset] = page
    return list(pages.values())


def _listed_images(pages: list[Any], description: str, file_name: str) -> list[SlideImage]:
    """Return the images that OME lists, else one per page."""
    images = [
        SlideImage(pages[number], number, name, text)
        for number, name, text in ome_images(description, file_name) if number < len(pages)
    ]  # fmt: skip
    if images:
        return images
    for number, page in enumerate(pages):
        text = page.description if isinstance(page.description, str) else ""
        name = text.strip() if len(text) <= 64 and text.strip().isprintable() else ""
        images.append(SlideImage(page, number, name if _ASSOCIATED.search(name) else "", text))
    return images


def _is_associated(image: SlideImage) -> bool:
    is_mask = bool(image.page.subfiletype & _MASK)
    return is_mask or min(image.size) < 1 or bool(_ASSOCIATED.search(image.name))


def _add_image(
    image: SlideImage,
    slides: list[SlideImage],
    shows_same: Callable[[Any, Any], bool],
    *,
    only_one: bool,
) -> None:
    """Add an image to the slides, or its page to the levels of one; `slides` are larger ones."""
    if not slides:
        slides.append(image)
        return
    if only_one or not _same_form(slides[0].page, image.page):
        return
    for slide in slides:
        if _is_reduced(slide.page, image.page) and shows_same(slide.page, image.page):
            slide.levels.append(image.page)
            return
    width, height = slides[0].size
    is_small = max(image.size) <= SMALL_PX and 256 * image.size[0] * image.size[1] <= width * height
    if not is_small:
        slides.append(image)


def _slide_of(number: int, slides: list[SlideImage]) -> SlideImage:
    """Return the slide to which a page belongs: the one before it, else the first."""
    before = [image for image in slides if image.number < number]
    return before[-1] if before else slides[0]


def _same_form(base: Any, page: Any) -> bool:
    return all(
        getattr(base, name) == getattr(page, name)
        for name in ("is_tiled", "compression", "samplesperpixel", "bitspersample", "planarconfig")
    )


def _is_reduced(base: Any, page: Any, *, padded: bool = False) -> bool:
    """Return True if a page is smaller and has the same aspect ratio.

    Sides are rounded to integers, by Philips up to full tiles, so the aspect ratio of a small level
    may differ much.
    """
    width, height = page.imagewidth, page.imagelength
    if min(width, height) < 1 or width >= base.imagewidth or height > base.imagelength:
        return False
    slack = max(page.tilewidth, page.tilelength) if padded else 1
    ratio = (base.imagewidth / width) / (base.imagelength / height)
    return abs(ratio - 1) <= slack * (1 / width + 1 / height)


def _in_order(base: Any, pages: list[Any], *, padded: bool) -> list[Any]:
    """Return the base and the pages that are levels of it, finest first, one of each size."""
    levels = [base]
    for page in sorted(pages, key=lambda page: -page.imagewidth):
        is_level = _same_form(base, page) and _is_reduced(base, page, padded=padded)
        last = levels[-1]
        smaller = page.imagewidth < last.imagewidth and page.imagelength <= last.imagelength
        if is_level and smaller and page.subfiletype in (0, _REDUCED):
            levels.append(page)
    return levels[:MAX_LEVELS]
