"""Masks in and out: GeoJSON and PNG to the thumbnail's cells and back, coverage of patches."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._checks import positive
from ..errors import StoreError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Mask = NDArray[np.bool_]
    Floats = NDArray[np.float64]

Size = tuple[int, int]
_MOST_BYTES = 128 << 20
_MOST_PX = 1 << 26
_CROSSINGS, _MOST_CROSSINGS = 1 << 22, 1 << 28  # of edges and rows: at once, in one polygon


def coverage(mask: Mask, coords: NDArray[Any], footprint_px: float, size: Size) -> Floats:
    """Return the exact share of every patch that a mask covers.

    What of a patch lies beyond the slide counts as not covered. Cells of the mask that a patch's
    edge crosses count in part. The sums of whole cells are integers, so the error is that of the
    parts.

    Args:
        mask: bool [h, w], of the whole slide; its cells need not be square.
        coords: [G, 2] top left corners of the patches, (x, y) in level-0 px; may be negative or
            beyond.
        footprint_px: side of the patches in level-0 px.
        size: (width, height) of the slide in level-0 px.

    Returns:
        Float64 [G], between 0 and 1.

    Raises:
        ValueError: an empty mask, other shapes, sizes that are not positive.

    Example:
        >>> import numpy as np
        >>> mask = np.array([[True, False]])  # the left half of a slide of 200 x 100 px
        >>> motet.io.coverage(mask, np.array([[0, 0], [50, 0], [60, 0], [150, 0]]), 100, (200, 100))
        array([1. , 0.5, 0.4, 0. ])
    """
    import numpy as np

    _check_mask(mask, size)
    corners = np.asarray(coords, np.float64)
    if corners.ndim != 2 or corners.shape[1] != 2 or not np.isfinite(corners).all():
        raise ValueError(f"coords: expected finite numbers [G, 2], got {list(corners.shape)}")
    positive("footprint_px", footprint_px)
    height, width = mask.shape
    kind = np.int32 if mask.size < 2**30 else np.int64  # half the time
    sums = np.zeros((height + 2, width + 2), kind)  # one more, so that the last edge has a cell
    np.cumsum(mask, axis=1, out=sums[1:-1, 1:-1])
    for row in range(2, height + 1):  # a fifth of the time of cumsum along that axis
        sums[row] += sums[row - 1]
    sums[-1], sums[:, -1] = sums[-2], sums[:, -2]
    scale = np.array([width / size[0], height / size[1]])
    low = np.clip(corners * scale, 0, (width, height))
    high = np.clip((corners + footprint_px) * scale, 0, (width, height))
    whole = np.zeros(len(corners), np.int64)
    part = np.zeros(len(corners))
    for x, y, sign in ((high, high, 1), (low, high, -1), (high, low, -1), (low, low, 1)):
        i, j = y[:, 1].astype(np.int64), x[:, 0].astype(np.int64)
        down, right = y[:, 1] - i, x[:, 0] - j
        corner = sums[i, j]
        row, column = sums[i + 1, j] - corner, sums[i, j + 1] - corner
        cell = sums[i + 1, j + 1] - corner - row - column
        whole += sign * corner
        part += sign * (down * row + right * column + down * right * cell)
    return np.clip((whole + part) / (footprint_px**2 * scale[0] * scale[1]), 0, 1)


def coverage_reference(mask: Mask, coords: NDArray[Any], footprint_px: float, size: Size) -> Floats:
    """Do the same by a loop over patches and cells."""
    import numpy as np

    height, width = mask.shape
    cell_width, cell_height = size[0] / width, size[1] / height
    shares = np.zeros(len(coords))
    for n, (x, y) in enumerate(coords):
        for i, j in np.argwhere(mask):
            across = min(x + footprint_px, (j + 1) * cell_width) - max(x, j * cell_width)
            along = min(y + footprint_px, (i + 1) * cell_height) - max(y, i * cell_height)
            shares[n] += max(across, 0) * max(along, 0) / footprint_px**2
    return shares


def read_mask(path: str | PathLike[str], size: Size, shape: tuple[int, int]) -> Mask:
    """Read a mask of one's own: polygons in GeoJSON (as of QuPath), or a picture.

    GeoJSON holds level-0 px in a FeatureCollection, Feature, Polygon, MultiPolygon,
    GeometryCollection or a list of these; later rings of a polygon are holes, polygons are joined,
    points and lines, which have no area, are passed over. A cell belongs to the mask if its centre
    lies inside. A picture (PNG) of the whole slide may have any size of the slide's aspect ratio; a
    cell belongs to the mask if at least half of it is neither black nor transparent.

    Args:
        path: a file; what begins with the signature of a PNG is a picture, all else GeoJSON.
        size: (width, height) of the slide in level-0 px.
        shape: (height, width) of the mask, that of the slide's thumbnail.

    Returns:
        Bool [height, width].

    Raises:
        StoreError: neither of both, empty, too large, with coordinates that are no finite numbers,
            wholly outside of the slide, or of another aspect ratio.
        OSError: the file cannot be read.

    Example:
        >>> import json, pathlib
        >>> ring = [[0, 0], [600, 0], [600, 800], [0, 800]]
        >>> text = json.dumps({"type": "Polygon", "coordinates": [ring]})
        >>> _ = pathlib.Path("tumour.geojson").write_text(text)
        >>> motet.io.read_mask("tumour.geojson", (800, 800), (2, 4))
        array([[ True,  True,  True, False],
               [ True,  True,  True, False]])
    """
    path = Path(path)
    bytes_ = path.stat().st_size
    if not bytes_:
        raise StoreError(f"{path}: expected a mask in GeoJSON or PNG, got an empty file")
    if bytes_ > _MOST_BYTES:
        raise StoreError(
            f"{path}: expected a mask of at most {_MOST_BYTES >> 20} MiB, got {bytes_ >> 20} MiB; "
            "simplify its outlines"
        )
    with path.open("rb") as file:
        head = file.read(24)
    if not head.startswith(b"\x89PNG\r\n\x1a\n"):
        return _read_geojson(path, size, shape)
    width, height = (int.from_bytes(head[at : at + 4]) for at in (16, 20))
    if width * height > _MOST_PX:
        raise StoreError(
            f"{path}: expected a mask of at most {_MOST_PX:,} px, got {width} x {height}; "
            "scale it down"
        )
    if abs(width - height * size[0] / size[1]) > 0.01 * width + 1 + size[0] / size[1]:
        raise StoreError(
            f"{path}: expected the aspect ratio of the slide, {size[0]} x {size[1]}, got "
            f"{width} x {height}"
        )
    return _read_picture(path, shape)


def outlines(mask: Mask, size: Size) -> dict[str, Any]:
    """Return a mask as GeoJSON: one polygon per piece, with its holes, in level-0 px.

    Outlines follow the edges of cells, so that `read_mask` gives the same mask again. Cells that
    touch by a corner alone belong to different pieces.

    Args:
        mask: bool [h, w], of the whole slide.
        size: (width, height) of the slide in level-0 px.

    Returns:
        A FeatureCollection for `json.dump`; QuPath reads it as annotations named "tissue".

    Raises:
        ValueError: an empty mask or a size that is not positive.

    Example:
        >>> import numpy as np
        >>> collection = motet.io.outlines(np.array([[False, True, True]]), (300, 100))
        >>> collection["features"][0]["geometry"]["coordinates"]
        [[[100.0, 0.0], [300.0, 0.0], [300.0, 100.0], [100.0, 100.0], [100.0, 0.0]]]
    """
    import numpy as np
    from scipy import ndimage

    _check_mask(mask, size)
    across, along = size[0] / mask.shape[1], size[1] / mask.shape[0]
    labels = np.empty(mask.shape, np.int32)
    ndimage.label(mask, output=labels)
    polygons: list[list[list[list[float]]]] = [[] for _ in range(labels.max())]
    for ring, (row, column), is_outer in _rings(mask):
        line = [[x * across, y * along] for x, y in ring]
        polygon = polygons[labels[row, column] - 1]
        polygon.insert(0 if is_outer else len(polygon), [*line, line[0]])
    return {
        "type": "FeatureCollection",
        "features": [
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": polygon},
                "properties": {"objectType": "annotation", "classification": {"name": "tissue"}},
            }
            for polygon in polygons
        ],
    }


def _rings(mask: Mask) -> Iterator[tuple[list[tuple[int, int]], tuple[int, int], bool]]:
    """Yield the corners (x, y) of every outline, a cell inside, and whether it is an outer one.

    Edges run with the mask on their right: east above a cell, south on its right, west, north.
    """
    import numpy as np

    padded = np.pad(mask, 1)
    inside = padded[1:-1, 1:-1]
    neighbours = (padded[:-2, 1:-1], padded[1:-1, 2:], padded[2:, 1:-1], padded[1:-1, :-2])
    starts = ((0, 0), (0, 1), (1, 1), (1, 0))  # row and column of an edge's start, from its cell
    steps = ((0, 1), (1, 0), (0, -1), (-1, 0))  # and where it leads
    edges: set[tuple[int, int, int]] = set()
    for direction, (other, (down, right)) in enumerate(zip(neighbours, starts, strict=True)):
        rows, columns = np.nonzero(inside & ~other)
        edges.update((i + down, j + right, direction) for i, j in
                     zip(rows.tolist(), columns.tolist(), strict=True))  # fmt: skip
    for first in sorted(edges):
        if first not in edges:
            continue
        # The topmost of its edges, and of these the leftmost, heads east on an outer outline alone.
        cell = (first[0] - starts[first[2]][0], first[1] - starts[first[2]][1])
        corners: list[tuple[int, int]] = []
        row, column, direction = first
        before = -1
        while (row, column, direction) in edges:
            edges.remove((row, column, direction))
            if direction != before:
                corners.append((column, row))
            before = direction
            row, column = row + steps[direction][0], column + steps[direction][1]
            # To the right first: the piece stays with its own cells where two touch by a corner.
            for turn in (1, 0, 3):
                if (row, column, (direction + turn) % 4) in edges:
                    direction = (direction + turn) % 4
                    break
        yield corners, cell, first[2] == 0


def _read_geojson(path: Path, size: Size, shape: tuple[int, int]) -> Mask:
    import numpy as np

    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: expected a mask in GeoJSON or PNG, got {error}") from error
    mask = np.zeros(shape, bool)
    scale = np.array([shape[1] / size[0], shape[0] / size[1]])
    low, high, polygons = np.full(2, np.inf), np.full(2, -np.inf), 0
    for rings in _polygons(content, path):
        corners = [_corners(ring, path) for ring in rings]
        for ring in corners:
            low, high = np.minimum(low, ring.min(0)), np.maximum(high, ring.max(0))
        _fill(mask, [ring * scale for ring in corners], path)
        polygons += 1
    if not polygons:
        raise StoreError(f"{path}: expected at least one Polygon or MultiPolygon, got none")
    if (high <= 0).any() or (low >= size).any():
        raise StoreError(
            f"{path}: expected polygons in level-0 px of a slide of {size[0]} x {size[1]}, got x "
            f"from {low[0]:g} to {high[0]:g} and y from {low[1]:g} to {high[1]:g}"
        )
    return mask


def _polygons(thing: Any, path: Path) -> Iterator[list[Any]]:
    """Yield the rings of every polygon, without recursion: files may be nested on purpose."""
    left = [thing]
    while left:
        thing = left.pop()
        if isinstance(thing, list):
            left += reversed(thing)
            continue
        kind = thing.get("type") if isinstance(thing, dict) else None
        parts = {
            "FeatureCollection": "features", "Feature": "geometry", "Polygon": "coordinates",
            "GeometryCollection": "geometries", "MultiPolygon": "coordinates",
        }  # fmt: skip
        if isinstance(kind, str) and kind in parts:
            content = thing.get(parts[kind])
            if kind == "Feature":
                left += (
                    [content] if content is not None else []
                )  # without a place, says the standard
                continue
            if not isinstance(content, list):
                raise StoreError(
                    f"{path}: expected a list of {parts[kind]} in a {kind}, got {_named(content)}"
                )
            if "olygon" not in kind:
                left += reversed(content)
                continue
            for rings in [content] if kind == "Polygon" else content:
                if not isinstance(rings, list):
                    raise StoreError(f"{path}: expected a list of rings, got {_named(rings)}")
                if rings:
                    yield rings
        elif kind not in ("Point", "MultiPoint", "LineString", "MultiLineString"):
            raise StoreError(f"{path}: expected GeoJSON, got {_named(thing)}")


def _corners(ring: Any, path: Path) -> Floats:
    import numpy as np

    try:
        corners = np.array([point[:2] for point in ring])  # a third number is the height
    except (TypeError, ValueError, KeyError):
        corners = np.empty(0)
    if corners.dtype.kind not in "iuf" or corners.shape[1:] != (2,) or len(corners) < 3:
        raise StoreError(
            f"{path}: expected rings of three or more corners, each two numbers, got {_named(ring)}"
        )
    if not (np.abs(corners) < 2**31).all():  # NaN is not less either
        raise StoreError(f"{path}: expected finite coordinates below 2^31, got {_named(ring)}")
    return corners.astype(np.float64)


def _fill(mask: Mask, rings: list[Floats], path: Path) -> None:
    """Add the cells whose centre is inside of a polygon: those left of an odd number of crossings.

    Every edge crosses the centre lines of the rows from its upper end, included, to its lower end.
    """
    import numpy as np

    height, width = mask.shape
    ends = [(ring, np.roll(ring, -1, 0)) for ring in rings]
    one, other = (np.concatenate(parts) for parts in zip(*ends, strict=True))
    upper = np.where((one[:, 1] <= other[:, 1])[:, None], one, other)
    lower = np.where((one[:, 1] <= other[:, 1])[:, None], other, one)
    first = np.ceil(np.clip(upper[:, 1] - 0.5, 0, height)).astype(np.int64)
    last = np.ceil(np.clip(lower[:, 1] - 0.5, 0, height)).astype(np.int64)
    crossed = last > first
    upper, lower, first, last = upper[crossed], lower[crossed], first[crossed], last[crossed]
    if not len(first):
        return
    top, bottom = first.min(), last.max()
    odd = np.zeros((bottom - top) * (width + 1), bool)
    slope = (lower[:, 0] - upper[:, 0]) / (lower[:, 1] - upper[:, 1])
    total = np.cumsum(last - first)
    if total[-1] > _MOST_CROSSINGS:
        raise StoreError(
            f"{path}: expected outlines that cross the thumbnail's rows at most "
            f"{_MOST_CROSSINGS:,} times, got {total[-1]:,}; simplify them"
        )
    begin = 0
    while begin < len(first):
        done = total[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(total, done + _CROSSINGS, "right")))
        several = slice(begin, end)
        count = (last - first)[several]
        edge = np.repeat(np.arange(begin, end), count)
        row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
        x = upper[edge, 0] + (row + 0.5 - upper[edge, 1]) * slope[edge]
        column = np.ceil(np.clip(x - 0.5, 0, width)).astype(np.int64)
        odd ^= np.bincount((row - top) * (width + 1) + column, minlength=len(odd)) % 2 == 1
        begin = end
    odd = np.logical_xor.accumulate(odd.reshape(-1, width + 1), 1)
    mask[top:bottom] |= odd[:, :width]


def _read_picture(path: Path, shape: tuple[int, int]) -> Mask:
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as picture:
            single = picture.mode in ("1", "L", "I", "I;16", "F")
            pixels = np.asarray(picture if single else picture.convert("RGBA"))
    except (OSError, SyntaxError, ValueError) as error:
        raise StoreError(f"{path}: expected a PNG, got one that cannot be read: {error}") from error
    if pixels.ndim == 3:
        pixels = (pixels[..., :3] != 0).any(2) & (pixels[..., 3] != 0)
    covered = _means((pixels != 0).astype(np.float32), shape[0])
    return np.ascontiguousarray(_means(covered.T, shape[1]).T >= 0.5 - 1e-5)


def _means(values: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Return the exact mean of the values over `count` equal parts of their first axis."""
    import numpy as np

    n = len(values)
    means = np.empty((count, values.shape[1]), np.float32)
    for i in range(count):
        begin, end = i * n / count, (i + 1) * n / count
        first, last = int(begin), min(math.ceil(end), n)
        places = np.arange(first, last)
        weights = np.minimum(places + 1, end) - np.maximum(places, begin)
        means[i] = weights.astype(np.float32) @ values[first:last] / np.float32(end - begin)
    return means


def _named(thing: Any) -> str:
    text = (
        repr(thing) if not isinstance(thing, list) else f"[{', '.join(map(repr, thing[:2]))}, ...]"
    )
    return text if len(text) < 80 else f"{text[:80]}..."


def _check_mask(mask: Mask, size: Size) -> None:
    import numpy as np

    if not (isinstance(mask, np.ndarray) and mask.dtype == bool and mask.ndim == 2 and mask.size):
        kind, shape = getattr(mask, "dtype", type(mask).__name__), getattr(mask, "shape", ())
        raise ValueError(f"mask: expected bool [height, width], got {kind} {list(shape)}")
    if len(size) != 2 or not all(side > 0 for side in size):
        raise ValueError(f"size: expected a positive width and height, got {size}")
