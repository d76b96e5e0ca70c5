"""The patches of a slide with the largest and the smallest values, as pictures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from ..._atomic import replacing, write_text
from ..._checks import integer
from ..errors import SlideError
from ..slides.open_slide import open_slide
from ..slides.slide import Slide
from ..store.format import mapping
from ..store.read_slide import SlideFeatures
from ..store.source import Source, is_same
from .geometry import check_values, geometry_of

if TYPE_CHECKING:
    import pandas as pd


def extreme_patches(
    slide: SlideFeatures, values: ArrayLike, folder: str | os.PathLike[str], *, count: int = 8
) -> pd.DataFrame:
    """Write the patches with the largest and the smallest values as PNG, and a table of them.

    The pixels are read from the file that was tiled, at the resolution of the patches. If that file
    is gone, has changed, or cannot be read there, the table has no picture for the patch.

    Args:
        slide: a slide of a `FeatureStore`.
        values: [N], one per patch, NaN for patches without a value.
        folder: written: patches.csv, top-1.png, ..., bottom-1.png, ...
        count: how many of each; fewer if there are fewer than twice as many.

    Returns:
        The content of patches.csv, with the columns rank (top-1 has the largest value), x and y of
        the upper left corner, width and height in level-0 px, value, and file ("" if there is no
        picture).

    Raises:
        ValueError: values of another length, infinite, or all NaN.
        StoreError: a slide without patches or coordinates.

    Example:
        >>> import numpy as np
        >>> np.savez("a.npz", features=np.eye(2, 8), coords=[[0, 0], [512, 0]])
        >>> slide = motet.io.import_features("a.npz", "cohort", encoder="mine")["a"]
        >>> motet.io.extreme_patches(slide, [0.2, 0.8], "patches", count=1)["x"].tolist()
        [512, 0]
    """
    import pandas as pd

    numbers, place, folder = check_values(slide, values), geometry_of(slide), Path(folder)
    order = np.argsort(-numbers, kind="stable")  # NaN last
    order = order[: np.isfinite(numbers).sum()]
    each = min(integer("count", count), -(-len(order) // 2))
    chosen = [(f"top-{i + 1}", row) for i, row in enumerate(order[:each].tolist())]
    smallest = order[each:][::-1][:each].tolist()
    chosen += [(f"bottom-{i + 1}", row) for i, row in enumerate(smallest)]
    folder.mkdir(parents=True, exist_ok=True)
    opened, rows = _open_source(slide), []
    try:
        for rank, row in chosen:
            x, y = place.corners[row].astype(int).tolist()
            file = folder / f"{rank}.png"
            is_written = opened is not None and _write_patch(
                opened, (x, y), place.footprint, slide.attrs.get("tile_px"), file
            )
            rows.append((rank, x, y, *place.footprint, numbers[row], file.name * is_written))
    finally:
        if opened is not None:
            opened.close()
    table = pd.DataFrame(rows, columns=["rank", "x", "y", "width", "height", "value", "file"])
    write_text(folder / "patches.csv", table.to_csv(index=False, float_format="%.6g"))
    return table


def _open_source(slide: SlideFeatures) -> Slide | None:
    """Open the file that was tiled; None if it is gone, has changed or cannot be opened."""
    recorded = mapping(slide.attrs.get("source"))
    path = Path(str(recorded.get("path")))
    source = Source(path, str(slide.attrs.get("name")))
    try:
        if not (path.is_file() and is_same(source, recorded)):
            return None
        return open_slide(path, image=source.image)
    except SlideError:
        return None


def _write_patch(
    opened: Slide, corner: tuple[int, int], sides: tuple[float, float], tile_px: object, file: Path
) -> bool:
    """Write a patch (corner and sides in level-0 px) of a slide; return whether it can be read."""
    from PIL import Image

    pixels = tile_px if isinstance(tile_px, int) and tile_px > 0 else min(round(sides[0]), 512)
    finest = min(sides) / pixels * 1.01
    level = max((i for i, one in enumerate(opened.levels) if one.downsample <= finest), default=0)
    down = opened.levels[level].downsample
    x, y = (round(place / down) for place in corner)
    width, height = (max(1, round(side / down)) for side in sides)
    try:
        read = opened.read(level, x, y, width, height)
    except SlideError:
        return False
    image = Image.fromarray(read).resize((pixels, pixels), Image.Resampling.BOX)
    with replacing(file) as partial:
        image.save(partial, "PNG")
    return True
