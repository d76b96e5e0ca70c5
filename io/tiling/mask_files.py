"""Find the user's own mask of each slide in a folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ..store.source import Source

SUFFIXES = (".geojson", ".png")
"""Suffixes of masks; the first that exists is taken."""


def find_masks(folder: Path, slides: Iterable[Source]) -> dict[str, str]:
    """Find the mask of each slide: `<folder>/a/b.geojson` for the slide named "a/b.svs".

    A mask may also lie in the folder itself, `<folder>/b.geojson`, if only one of the slides has
    the stem "b".

    Args:
        folder: the folder of masks.
        slides: all slides of the call.

    Returns:
        Name of the slide to the mask's path in the folder, of the slides that have a mask.
    """
    slides = list(slides)
    stems = Counter(Path(slide.name).stem for slide in slides)
    masks = {}
    for slide in slides:
        name = Path(slide.name)
        places = [name.stem] if stems[name.stem] == 1 else []
        if not name.is_absolute() and ".." not in name.parts:
            places.insert(0, name.with_name(name.stem).as_posix())
        files = (place + suffix for place in places for suffix in SUFFIXES)
        mask = next((file for file in files if (folder / file).is_file()), None)
        if mask is not None:
            masks[slide.name] = mask
    return masks
