"""Read and write masks (GeoJSON, PNG), and compute the share of each patch that a mask covers.

A mask is bool [h, w] over the whole slide. Its elements are called cells: each is a rectangle of
(slide width / w) x (slide height / h) level-0 px, not necessarily a square.
"""

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

Size = tuple[float, float]
_MAX_BYTES = 128 << 20  # of a file
_MAX_PX = 1 << 26  # of a picture
# Crossings of a polygon's edges with the rows of a mask: computed at a time (which bounds the
# memory), and at most in one polygon (which bounds the time).
_CROSSINGS, _MAX_CROSSINGS = 1 << 22, 1 << 28


def coverage(mask: Mask, coords: NDArray[Any], footprint_px: float, size: Size) -> Floats:
    """Return the exact share of each patch that a mask covers.

    The part of a patch beyond the slide counts as not covered. A cell of the mask that is partly in
    a patch counts with that part. Sums over whole cells are integers, so only the parts have
    rounding errors.

    Args:
        mask: bool [h, w], of the whole slide; its cells need not be square.
        coords: [G, 2], top left corners of the patches, (x, y) in level-0 px; may be negative or
            beyond the slide.
        footprint_px: side of the patches in level-0 px.
        size: (width, height) of the slide in level-0 px.

    Returns:
        Float64 [G], between 0 and 1.

    Raises:
        ValueError: the mask is empty, an array has another shape, or a size is not positive.

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
    # A summed-area table: sums[i, j] is the number of True cells in the first i rows and first j
    # columns. It has one more row and column than that needs, equal to the last ones, so that a
    # patch's edge on the slide's edge has a cell to its right. int32 takes half the time of int64.
    dtype = np.int32 if mask.size < 2**30 else np.int64
    sums = np.zeros((height + 2, width + 2), dtype)
    np.cumsum(mask, axis=1, out=sums[1:-1, 1:-1])
    for row in range(2, height + 1):  # a fifth of the time of cumsum along axis 0
        sums[row] += sums[row - 1]
    sums[-1], sums[:, -1] = sums[-2], sums[:, -2]
    scale = np.array([width / size[0], height / size[1]])
    low = np.clip(corners * scale, 0, (width, height))
    high = np.clip((corners + footprint_px) * scale, 0, (width, height))
    # The area in a patch is F(high, high) - F(low, high) - F(high, low) + F(low, low), F(x, y)
    # being the area left of x and above y. F is the sum over whole cells (an integer) and over
    # parts: of the row below, of the column to the right, and of the one cell of both.
    whole_cells = np.zeros(len(corners), np.int64)
    parts = np.zeros(len(corners))
    for x, y, sign in ((high, high, 1), (low, high, -1), (high, low, -1), (low, low, 1)):
        i, j = y[:, 1].astype(np.int64), x[:, 0].astype(np.int64)
        down, right = y[:, 1] - i, x[:, 0] - j
        corner = sums[i, j]
        row, column = sums[i + 1, j] - corner, sums[i, j + 1] - corner
        cell = sums[i + 1, j + 1] - corner - row - column
        whole_cells += sign * corner
        parts += sign * (down * row + right * column + down * right * cell)
    return np.clip((whole_cells + parts) / (footprint_px**2 * scale[0] * scale[1]), 0, 1)


def coverage_reference(mask: Mask, coords: NDArray[Any], footprint_px: float, size: Size) -> Floats:
    """Compute `coverage` by a loop over patches and cells."""
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
    """Read a mask that the user has made: polygons in GeoJSON (as from QuPath), or a picture.

    GeoJSON has coordinates in level-0 px, in a FeatureCollection, Feature, Polygon, MultiPolygon,
    GeometryCollection or a list of these. The first ring of a polygon is its outline, the others
    are holes; the mask is the union of the polygons; points and lines have no area and are ignored.
    A cell is in the mask if its centre is inside of a polygon. A picture (PNG) shows the whole
    slide, in any size with the slide's aspect ratio; a cell is in the mask if at least half of its
    area is neither black nor transparent.

    Args:
        path: a file; it is read as PNG if it begins with the signature of a PNG, else as GeoJSON.
        size: (width, height) of the slide in level-0 px.
        shape: (height, width) of the mask, that of the slide's thumbnail.

    Returns:
        Bool [height, width].

    Raises:
        StoreError: the file is no mask, is empty or too large, has coordinates that are not finite
            numbers, lies outside of the slide, or has another aspect ratio.
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
    nbytes = path.stat().st_size
    if not nbytes:
        raise StoreError(f"{path}: expected a mask in GeoJSON or PNG, got an empty file")
    if nbytes > _MAX_BYTES:
        raise StoreError(
            f"{path}: expected a mask of at most {_MAX_BYTES >> 20} MiB, got {nbytes >> 20} MiB; "
            "simplify its outlines"
        )
    with path.open("rb") as file:
        head = file.read(24)
    if not head.startswith(b"\x89PNG\r\n\x1a\n"):
        return _read_geojson(path, size, shape)
    width, height = (int.from_bytes(head[at : at + 4]) for at in (16, 20))
    if width * height > _MAX_PX:
        raise StoreError(
            f"{path}: expected a mask of at most {_MAX_PX:,} px, got {width} x {height}; "
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

    Outlines follow the edges of cells, so `read_mask` returns the same mask. Cells that touch only
    at a corner belong to different pieces.

    Args:
        mask: bool [h, w], of the whole slide.
        size: (width, height) of the slide in level-0 px.

    Returns:
        A FeatureCollection for `json.dump`; QuPath reads it as annotations named "tissue".

    Raises:
        ValueError: the mask is empty, or a size is not positive.

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
    """Yield for each outline its corners (x, y), a cell inside, and True if it is an outer one.

    An edge is (row, column, direction) of its start, in corners of cells. It has the mask on its
    right side: direction 0 is east, along the upper side of a cell, 1 south, along its right side,
    2 west, 3 north. Following the edges from start to start gives closed outlines.
    """
    import numpy as np

    padded = np.pad(mask, 1)
    inside = padded[1:-1, 1:-1]
    neighbours = (padded[:-2, 1:-1], padded[1:-1, 2:], padded[2:, 1:-1], padded[1:-1, :-2])
    starts = ((0, 0), (0, 1), (1, 1), (1, 0))  # start of an edge, relative to its cell
    steps = ((0, 1), (1, 0), (0, -1), (-1, 0))  # end of an edge, relative to its start
    edges: set[tuple[int, int, int]] = set()
    for direction, (other, (down, right)) in enumerate(zip(neighbours, starts, strict=True)):
        rows, columns = np.nonzero(inside & ~other)
        edges.update((i + down, j + right, direction) for i, j in
                     zip(rows.tolist(), columns.tolist(), strict=True))  # fmt: skip
    for first in sorted(edges):
        if first not in edges:
            continue
        # `first` is the topmost edge of its outline, and of these the leftmost. On an outer outline
        # it runs east (the mask is below it), on a hole it does not.
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
            # Where two pieces touch at a corner, two edges begin there. Turning right first stays
            # on the same piece.
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


def _polygons(content: Any, path: Path) -> Iterator[list[Any]]:
    """Yield the rings of each polygon of a GeoJSON value.

    With a stack instead of recursion: a hostile file may be nested deeper than Python's limit.
    """
    fields = {
        "FeatureCollection": "features", "Feature": "geometry", "Polygon": "coordinates",
        "GeometryCollection": "geometries", "MultiPolygon": "coordinates",
    }  # fmt: skip
    stack = [content]
    while stack:
        value = stack.pop()
        if isinstance(value, list):
            stack += reversed(value)
            continue
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind in fields:
            inner = value.get(fields[kind])
            if kind == "Feature":
                # A Feature without a place has the geometry null, by the standard.
                stack += [inner] if inner is not None else []
                continue
            if not isinstance(inner, list):
                raise StoreError(
                    f"{path}: expected a list of {fields[kind]} in a {kind}, got {_excerpt(inner)}"
                )
            if kind not in ("Polygon", "MultiPolygon"):
                stack += reversed(inner)
                continue
            for rings in [inner] if kind == "Polygon" else inner:
                if not isinstance(rings, list):
                    raise StoreError(f"{path}: expected a list of rings, got {_excerpt(rings)}")
                if rings:
                    yield rings
        elif kind not in ("Point", "MultiPoint", "LineString", "MultiLineString"):
            raise StoreError(f"{path}: expected GeoJSON, got {_excerpt(value)}")


def _corners(ring: Any, path: Path) -> Floats:
    import numpy as np

    try:
        corners = np.array([point[:2] for point in ring])  # a third number is a height
    except (TypeError, ValueError, KeyError):
        corners = np.empty(0)
    if corners.dtype.kind not in "iuf" or corners.shape[1:] != (2,) or len(corners) < 3:
        raise StoreError(
            f"{path}: expected rings of three or more corners, each two numbers, got "
            f"{_excerpt(ring)}"
        )
    if not (np.abs(corners) < 2**31).all():  # also False for NaN
        raise StoreError(f"{path}: expected finite coordinates below 2^31, got {_excerpt(ring)}")
    return corners.astype(np.float64)


def _fill(mask: Mask, rings: list[Floats], path: Path) -> None:
    """Add to a mask the cells whose centre is inside of a polygon (even-odd rule).

    A centre is inside if an odd number of edges crosses the line through the centres of its row on
    one side of it. Each edge crosses the rows whose centre lines lie between its upper end
    (included) and its lower end (excluded), so a corner on a line counts once. `odd` first holds
    the parity of the crossings at each cell; accumulated along the row it says which are inside.
    """
    import numpy as np

    height, width = mask.shape
    edges = [(ring, np.roll(ring, -1, 0)) for ring in rings]
    begins, ends = (np.concatenate(points) for points in zip(*edges, strict=True))
    goes_down = (begins[:, 1] <= ends[:, 1])[:, None]
    upper = np.where(goes_down, begins, ends)
    lower = np.where(goes_down, ends, begins)
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
    if total[-1] > _MAX_CROSSINGS:
        raise StoreError(
            f"{path}: expected outlines that cross the thumbnail's rows at most "
            f"{_MAX_CROSSINGS:,} times, got {total[-1]:,}; simplify them"
        )
    begin = 0
    while begin < len(first):
        # The edges begin to end - 1, of at most _CROSSINGS crossings (or one edge).
        before = total[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(total, before + _CROSSINGS, "right")))
        count = (last - first)[begin:end]
        # One element per crossing: its edge, its row, and the first cell to the right of it.
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
            is_single = picture.mode in ("1", "L", "I", "I;16", "F")
            pixels = np.asarray(picture if is_single else picture.convert("RGBA"))
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


def _excerpt(value: Any) -> str:
    """Return the beginning of a value, for a message."""
    text = (
        repr(value) if not isinstance(value, list) else f"[{', '.join(map(repr, value[:2]))}, ...]"
    )
    return text if len(text) < 80 else f"{text[:80]}..."


def _check_mask(mask: Mask, size: Size) -> None:
    import numpy as np

    if not (isinstance(mask, np.ndarray) and mask.dtype == bool and mask.ndim == 2 and mask.size):
        kind, shape = getattr(mask, "dtype", type(mask).__name__), getattr(mask, "shape", ())
        raise ValueError(f"mask: expected bool [height, width], got {kind} {list(shape)}")
    if len(size) != 2 or not all(side > 0 for side in size):
        raise ValueError(f"size: expected a positive width and height, got {size}")
