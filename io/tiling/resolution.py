"""The resolution of a slide: what the user says, else what its file says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .grid import CLOSE

if TYPE_CHECKING:
    from ..slides.slide import Slide
    from ..store.source import Source


@dataclass(frozen=True)
class Resolution:
    """The micrometres per level-0 px of a slide, and where the value comes from.

    Args:
        mpp: None if not known.
        source: "table" (the user's, by slide), "list" (column `mpp` of a list of slides), "user"
            (one value for all slides) or "file"; None if not known.
        file_mpp: by the file, None if it does not say.
    """

    mpp: float | None
    source: str | None
    file_mpp: float | None

    @property
    def contradiction(self) -> str | None:
        """Return what the file says instead, if it differs by more than 2 %; else None."""
        if self.mpp is None or self.file_mpp is None:
            return None
        ratio = self.file_mpp / self.mpp
        if 1 / CLOSE <= ratio <= CLOSE:
            return None
        return (
            f"its file says {self.file_mpp:.6g} micrometres per px, and the {self.source} says "
            f"{self.mpp:.6g}, which is used"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the attributes of a slide in a store."""
        attrs: dict[str, Any] = {"mpp": self.mpp, "mpp_source": self.source}
        if self.source not in ("file", None):
            attrs["mpp_file"] = self.file_mpp
        return attrs


def find_resolution(
    slide: Slide, source: Source, slide_mpp: Mapping[str, float] | float | None
) -> Resolution:
    """Find the resolution of a slide. What the user says wins over what the file says.

    Args:
        slide: the open slide.
        source: its file, with the mpp of a list of slides.
        slide_mpp: one value for all slides, or a mapping from key, name, file name or stem.
    """
    mpp, origin = given_mpp(slide_mpp, source)
    if mpp is not None:
        return Resolution(mpp, origin, slide.mpp)
    return Resolution(slide.mpp, None if slide.mpp is None else "file", slide.mpp)


def given_mpp(
    slide_mpp: Mapping[str, float] | float | None, source: Source
) -> tuple[float | None, str | None]:
    """Return the user's micrometres per px of a slide and their origin, see `Resolution`."""
    if isinstance(slide_mpp, Mapping):
        for name in (source.key, source.name, source.path.name, source.path.stem):
            if name in slide_mpp:
                return slide_mpp[name], "table"
    if source.mpp is not None:
        return source.mpp, "list"
    if isinstance(slide_mpp, float):
        return slide_mpp, "user"
    return None, None
