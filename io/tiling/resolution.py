"""The resolution of a slide: what the user says, else what its file says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .grid import CLOSE

if TYPE_CHECKING:
    from ..slides.levels import Mpp
    from ..slides.slide import Slide
    from ..store.source import Source


@dataclass(frozen=True)
class Resolution:
    """The micrometres per level-0 px of a slide, and where the value comes from.

    Args:
        mpp: along x and along y; None if not known.
        source: "table" (the user's, by slide), "list" (column `mpp` of a list of slides), "user"
            (one value for all slides) or "file"; None if not known.
        file_mpp: by the file, None if it does not say.
    """

    mpp: Mpp | None
    source: str | None
    file_mpp: Mpp | None

    @property
    def contradiction(self) -> str | None:
        """Return what the file says instead, if it differs by more than 2 %; else None."""
        if self.mpp is None or self.file_mpp is None:
            return None
        ratios = [file / user for file, user in zip(self.file_mpp, self.mpp, strict=True)]
        if all(1 / CLOSE <= ratio <= CLOSE for ratio in ratios):
            return None
        return (
            f"its file says {_text(self.file_mpp)} micrometres per px, and the {self.source} says "
            f"{_text(self.mpp)}, which is used"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the attributes of a slide in a store."""
        attrs = {**_axes("mpp", self.mpp), "mpp_source": self.source}
        if self.source not in ("file", None):
            attrs |= _axes("mpp_file", self.file_mpp)
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
    file_mpp = slide.mpp_axes
    mpp, origin = given_mpp(slide_mpp, source)
    if mpp is not None:
        return Resolution((mpp, mpp), origin, file_mpp)
    return Resolution(file_mpp, None if file_mpp is None else "file", file_mpp)


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


def recorded_mpp(attrs: Mapping[str, Any]) -> Mpp | None:
    """Return the resolution that a store has of a slide."""
    mpp = attrs.get("mpp")
    return None if mpp is None else (mpp, attrs.get("mpp_y", mpp))


def _is_square(mpp: Mpp) -> bool:
    return max(mpp) <= CLOSE * min(mpp)


def _axes(name: str, mpp: Mpp | None) -> dict[str, float | None]:
    """Return the attribute of a resolution, with a further one for y if px are not square."""
    if mpp is None:
        return {name: None}
    if _is_square(mpp):
        return {name: (mpp[0] + mpp[1]) / 2}
    return {name: mpp[0], f"{name}_y": mpp[1]}


def _text(mpp: Mpp) -> str:
    return f"{(mpp[0] + mpp[1]) / 2:.6g}" if _is_square(mpp) else f"{mpp[0]:.6g} x {mpp[1]:.6g}"
