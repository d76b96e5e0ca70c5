"""Pictures of the report: matplotlib figures that are also written into the page as SVG."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

from ...io.page import escape, one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED = "#1b1d21", "#5a606b"
"""Colours of texts and lines; the style sheet of the page replaces them in its dark scheme."""
# Of Okabe and Ito's colours, which the colour-blind can tell apart; yellow is too pale for a line.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# With the colours, so that lines also differ where they are printed in grey.
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
WIDTH, HEIGHT = 4.6, 3.3  # inches
LONGEST_NAME = 30
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"


class Picture(NamedTuple):
    """One picture."""

    name: str
    """Of its files, without the ending; unique in a report."""
    title: str
    caption: str
    figure: Figure


@contextmanager
def drawing_style() -> Iterator[None]:
    """Set fonts and colours of the figures that are made or saved inside."""
    import matplotlib

    # Names are not formulas ("$"). Without `hashsalt`, equal runs would not have equal pictures.
    style: dict[Any, Any] = {
        "font.size": 9, "text.parse_math": False, "text.color": INK, "axes.labelcolor": INK,
        "axes.edgecolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED, "axes.titlesize": 9,
        "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.spines.top": False,
        "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8,
        "svg.fonttype": "none", "svg.hashsalt": "motet",
    }  # fmt: skip
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # Characters that matplotlib's font lacks: a browser takes them from another font.
        warnings.filterwarnings("ignore", message="Glyph ")
        yield


def new_axes(
    x_label: str, y_label: str, width: float = WIDTH, height: float = HEIGHT
) -> tuple[Figure, Axes]:
    """Return a figure with one set of axes; to be called inside of `drawing_style`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x_label, ylabel=y_label)
    return figure, axes


def short(name: object) -> str:
    """Return a name in one line for a picture, shortened to 30 characters."""
    text = one_line(name)
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"


def inline_svg(picture: Picture) -> str:
    """Return a picture as an element of a page.

    The security policy of the page forbids style sheets and style attributes in it, so these become
    attributes of their own (`fill`, `stroke`). Ids begin with the name of the picture.
    """
    content = io.BytesIO()
    with drawing_style():
        picture.figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(content.getvalue())
    view = root.get("viewBox", "")
    for parent in list(root.iter()):
        for child in list(parent):
            if not child.tag.startswith(_SVG) or child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    for element in root.iter():
        _rewrite(element, f"{picture.name}-")
    root.attrib.clear()
    root.attrib.update(
        {"viewBox": view, "role": "img", "aria-label": one_line(picture.title), "class": "plot"}
    )
    return ElementTree.tostring(root, encoding="unicode")


def _rewrite(element: ElementTree.Element, prefix: str) -> None:
    """Turn the style of an element into attributes, and make its ids those of its picture."""
    element.tag = element.tag.removeprefix(_SVG)
    attributes = dict(element.attrib)
    element.attrib.clear()
    for name, value in attributes.items():
        if name == "style":
            for declaration in value.split(";"):
                key, _, setting = (part.strip() for part in declaration.partition(":"))
                if key == "font":  # the family is that of the page
                    size = re.search(r"[\d.]+px", setting)
                    key, setting = "font-size", size.group() if size else ""
                if setting:
                    element.set(key, setting)
        elif name == "id":
            element.set("id", prefix + value)
        elif name == _LINK:
            element.set("href", "#" + prefix + value.removeprefix("#"))
        else:
            element.set(name, re.sub(r"url\(#", f"url(#{prefix}", value))


def write_picture(picture: Picture, folder: Path) -> None:
    """Write a picture to NAME.svg and NAME.png."""
    with drawing_style():
        picture.figure.savefig(folder / f"{picture.name}.svg", metadata={"Date": None})
        picture.figure.savefig(folder / f"{picture.name}.png", dpi=200)


def figure_element(picture: Picture) -> str:
    """Return a picture with its title and its caption as an element of a page."""
    return (
        f"<figure><h3>{escape(picture.title)}</h3>{inline_svg(picture)}"
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>\n"
    )
