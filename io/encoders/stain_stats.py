"""The built-in encoder: stain densities and texture of a patch, without weights or torch.

Pixels are averaged in cells of 4 x 4, and the mean colours converted to four planes per patch: the
densities of three stains, and the mean optical density. All features are statistics of these planes
(docs/how-to/encoders.md). The arrays of the planes are [4, b, h, w] or [4, b, h * w]: b patches of
h x w cells.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ..native import native
from .base import Encoder, as_numpy, check_pixels, digest

if TYPE_CHECKING:
    from torch import Tensor

# If it is None, numpy computes the same bits, more slowly.
_native: Callable[..., None] | None = getattr(native(), "stain_planes", None)

SHRINK = 4
"""Pixels per side of a cell. Averaging makes the rest 16 times less work; finer structure is only
in the three features `detail`."""

STAINS = ("haematoxylin", "eosin", "residual")
# Ruifrok & Johnston 2001: optical density of each stain in red, green and blue. The third is DAB;
# on H&E slides it receives the colours that are not a mixture of the first two.
VECTORS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
UNMIX = np.linalg.inv(VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)).astype(np.float32)

LEVELS = 16 * 255
"""The mean of a cell is kept as the sum of its 16 pixels, an integer up to this: it is exact."""
# Half a grey level (8 of LEVELS) is added, so that black has a finite density, 2.7.
DENSITY = -np.log10((np.arange(LEVELS + 1) + 8) / (LEVELS + 8)).astype(np.float32)

PLANES = (*STAINS, "density")
# A plane is a sum over red, green and blue of a function of the level: float32 [3, LEVELS + 1, 4].
TABLE = np.stack([DENSITY[:, None] * np.append(row, np.float32(1 / 3)) for row in UNMIX])

# Densities: for each of them, the share of the area above it is a feature.
THRESHOLDS = {
    "haematoxylin": (0.05, 0.1, 0.2, 0.3, 0.45, 0.65, 0.9),
    "eosin": (0.05, 0.1, 0.2, 0.3, 0.45, 0.65, 0.9),
    "residual": (0.0, 0.1, 0.25, 0.5),
}
GLASS_DENSITY = 0.05  # a cell with less is glass
SCALES = (1, 2, 4)  # distances of neighbours that are compared, in cells
# Added to denominators, so that a patch without contrast gives 0, not noise divided by noise.
EPSILON = np.float32(1e-4)

BLOCK_CELLS = 1 << 16
"""Cells that are computed together: about ten planes of them fit the caches, and numpy's calls are
few. Half as many take a tenth more time."""

MAX_WORDS = 255
"""Words of 8 bytes, each byte 0 or 1, that can be added before a byte overflows."""


class _Scratch(threading.local):
    """Memory that each thread keeps, by name. Fresh memory each time took a fifth of the time."""

    MAX_BYTES = 1 << 20  # larger arrays are not kept

    def __init__(self) -> None:
        self.kept: dict[str, np.ndarray] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size > self.MAX_BYTES:
            return np.empty(shape, dtype)
        kept = self.kept.get(name)
        if kept is None or kept.size < size:
            kept = self.kept[name] = np.empty(size, np.uint8)
        return kept[:size].view(dtype).reshape(shape)


_scratch = _Scratch()


class StainStats(Encoder):
    """The encoder "stain-stats"; docs/how-to/encoders.md lists its features."""

    id = "stain-stats"
    weights = "none"
    precision = "fp32"
    input_px = None
    transform = digest(
        {
            "shrink": SHRINK,
            "vectors": VECTORS.tolist(),
            "shares": {stain: list(limits) for stain, limits in THRESHOLDS.items()},
            "glass": GLASS_DENSITY,
            "scales": list(SCALES),
            "version": 1,
        }
    )

    def __init__(self) -> None:
        blank = np.full((1, SHRINK, SHRINK, 3), 255, np.uint8)
        self.names = tuple(name for name, _ in _features(blank))
        self.width = len(self.names)

    def encode(self, pixels: np.ndarray | Tensor) -> np.ndarray:
        pixels = np.ascontiguousarray(as_numpy(check_pixels(pixels)))
        out = np.empty((len(pixels), self.width), np.float32)
        # The features of a patch are sums over its pixels, in an order that does not depend on the
        # number of patches in a block: a row has the same bits in every batch.
        step = 1
        if len(pixels):
            step = max(1, BLOCK_CELLS * SHRINK**2 // max(1, pixels[0, ..., 0].size))
        for start in range(0, len(pixels), step):
            block = slice(start, start + step)
            for column, (_, values) in enumerate(_features(pixels[block])):
                out[block, column] = values
        return out


def _features(pixels: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the values [b] of each feature of patches uint8 [b, H, W, 3]."""
    planes, within = _planes(pixels)
    _, b, h, w = planes.shape
    planes = planes.reshape(4, b, h * w)
    means = _mean(planes)
    shares = iter(_shares(planes))
    planes -= means[..., None]
    spreads = np.sqrt(_mean_product(planes, planes, h * w))
    for plane, mean, spread in zip(PLANES, means, spreads, strict=True):
        yield f"{plane} mean", mean
        yield f"{plane} std", spread
        for limit in THRESHOLDS.get(plane, ()):
            yield f"{plane} > {limit:g}", next(shares)
    yield f"density < {GLASS_DENSITY:g}", next(shares)

    for i, j in ((0, 1), (0, 2), (1, 2)):
        covariance = _mean_product(planes[i], planes[j], h * w)
        correlation = covariance / (spreads[i] * spreads[j] + EPSILON)
        yield f"{STAINS[i]} ~ {STAINS[j]}", correlation
    yield "haematoxylin > 0.3 and > eosin", next(shares)
    yield "eosin > 0.15 and > haematoxylin", next(shares)
    yield "haematoxylin and eosin > 0.3", next(shares)

    yield from _texture(planes[:2], h, w)
    deviations = np.sqrt(np.maximum(within, 0) / 256 / pixels[0, ..., 0].size) / 255
    for colour, values in zip(("red", "green", "blue"), deviations.T, strict=True):
        yield f"{colour} detail", values


def _shares(planes: np.ndarray) -> np.ndarray:
    """Return the shares [22, b] of the area of planes [4, b, n] for which the comparisons are true.

    Each comparison gives n bytes of 0 or 1, which are counted 8 at a time: 8 bytes are viewed as
    one integer, and up to 255 such words are added without a carry from one byte into the next.
    Then the 8 bytes of each sum are added.
    """
    _, b, n = planes.shape
    haematoxylin, eosin, _, density = planes
    counts_of_limits = [len(limits) for limits in THRESHOLDS.values()]
    pieces = -(-n // (8 * MAX_WORDS))
    words = -(-n // (8 * pieces))
    padded = _scratch("comparisons", (sum(counts_of_limits) + 4, b, pieces * words * 8), np.bool_)
    padded[..., n:] = False
    comparisons = padded[..., :n]
    *stains, (glass, nuclei, stroma, both) = np.split(comparisons, np.cumsum(counts_of_limits))
    for plane, limits, above in zip(planes, THRESHOLDS.values(), stains, strict=False):
        np.greater(plane, np.array(limits, np.float32)[:, None, None], out=above)
    above_03 = [stains[i][THRESHOLDS[STAINS[i]].index(0.3)] for i in (0, 1)]
    np.less(density, np.float32(GLASS_DENSITY), out=glass)
    # `more_haematoxylin` uses the memory of `both` until that is computed.
    more_haematoxylin = np.greater(haematoxylin, eosin, out=both)
    np.logical_and(above_03[0], more_haematoxylin, out=nuclei)
    np.greater(eosin, np.float32(0.15), out=stroma)
    np.greater(stroma, more_haematoxylin, out=stroma)  # stroma and not more_haematoxylin
    np.logical_and(*above_03, out=both)
    sums = np.add.reduce(padded.view(np.uint64).reshape(-1, pieces, words), axis=2)
    counts = np.add.reduce(sums.view(np.uint8), axis=1, dtype=np.uint32)
    return counts.reshape(-1, b) / np.float32(n)


def _texture(pair: np.ndarray, h: int, w: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the features of texture of two planes [2, b, h * w], haematoxylin and eosin, of mean 0.

    For each scale s, four neighbours a = p[y, x], b = p[y, x + s], c = p[y + s, x] and
    d = p[y + s, x + s] give a sum a + b + c + d, and the differences across (b + d - a - c), down
    (c + d - a - b) and crosswise (a - b - c + d). The sums are the plane of the next scale. This is
    the undecimated Haar transform, up to its factors: sums are four times as large at each scale
    (`unit`).

    Layout: all planes are one vector, in which the neighbour to the right is s, the one below s * w
    numbers further on. At the right and the lower edge that is a number of the next row or plane,
    which is no neighbour: `_crop` then sets these columns to 0 and leaves out these rows. The
    planes are overwritten.
    """
    sums, steps = (_scratch(name, (pair.size,)) for name in ("sums", "steps"))
    edges = _scratch("edges", (2, *pair.shape))  # differences across, down
    corner = _scratch("corner", pair[0].shape)  # differences crosswise, of haematoxylin only
    plane, across, down, crosswise = (x.reshape(-1) for x in (pair, *edges, corner))
    size, tall, wide = pair.size, h, w  # tall, wide: rows and columns that have all neighbours
    unit = np.float32(2)
    for scale in SCALES:
        size = max(0, size - scale * w)
        upper, lower = plane[:size], plane[scale * w :][:size]
        np.add(upper, lower, out=sums[:size])
        np.subtract(lower, upper, out=steps[:size])
        size = max(0, size - scale)
        half = min(size, corner.size)
        np.add(sums[scale:][:size], sums[:size], out=plane[:size])
        np.subtract(sums[scale:][:size], sums[:size], out=across[:size])
        np.add(steps[scale:][:size], steps[:size], out=down[:size])
        np.subtract(steps[scale:][:half], steps[:half], out=crosswise[:half])
        tall, wide = max(0, tall - scale), max(0, wide - scale)
        n = max(1, tall * wide)
        both, corners = (_crop(x, h, w, tall, wide) for x in (edges, corner))
        xx, yy = _mean_product(both, both, n)
        energies = xx + yy
        # Coherence of the structure tensor [[xx, xy], [xy, yy]]: 1 if all edges have the same
        # direction, 0 if no direction prevails.
        coherence = np.sqrt((xx - yy) ** 2 + 4 * _mean_product(both[0], both[1], n) ** 2)
        coherence /= energies + EPSILON**2
        strengths = np.sqrt(energies)
        shared = _mean_product(both[:, 0], both[:, 1], n).sum(0)
        steepness = _mean_abs(both[:, 0], n).sum(0)
        name = f"{scale * SHRINK} px"
        yield f"haematoxylin edges {name}", strengths[0] / unit
        yield f"haematoxylin alignment {name}", coherence[0]
        yield f"haematoxylin steps {name}", steepness / unit
        yield f"haematoxylin corners {name}", np.sqrt(_mean_product(corners, corners, n)) / unit
        yield f"eosin edges {name}", strengths[1] / unit
        yield f"eosin alignment {name}", coherence[1]
        yield f"shared edges {name}", shared / (strengths[0] * strengths[1] + EPSILON**2)
        unit *= 4
    means = _crop(pair, h, w, tall, wide)
    n = max(1, tall * wide)
    deviations = np.sqrt(_mean_product(means, means, n)) / (unit / 2)
    for stain, deviation in zip(STAINS, deviations, strict=False):
        yield f"{stain} std of {2 * SCALES[-1] * SHRINK} px means", deviation


def _crop(planes: np.ndarray, h: int, w: int, tall: int, wide: int) -> np.ndarray:
    """Return the first `tall` rows of planes [..., h * w], the columns from `wide` on set to 0."""
    rows = planes.reshape(-1, h, w)[:, :tall]
    rows[..., wide:] = 0
    return planes[..., : tall * w]


def _planes(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the planes float32 [4, b, h, w] of the cells, and the contrast within cells.

    The latter is int64 [b, 3]: for each colour 256 times the sum of squared deviations of pixels
    from the mean of their cell.
    """
    b, height, width, _ = pixels.shape
    down, across = _cuts(height), _cuts(width)
    planes = _scratch("planes", (len(PLANES), b, len(down) - 1, len(across) - 1))
    if _native is None:
        return planes, _planes_reference(pixels, planes)
    within = np.empty((b, 3), np.int64)
    _native(pixels, down, across, TABLE, planes, within)
    return planes, within


def _planes_reference(pixels: np.ndarray, planes: np.ndarray) -> np.ndarray:
    """Compute `_planes` with numpy: write the planes, return the contrast within cells."""
    means, areas = _shrink(pixels)
    index = _scratch("index", means.shape, np.intp)
    index[:] = means
    term = _scratch("term", means.shape[1:])
    for plane, (red, green, blue) in zip(planes, TABLE.transpose(2, 0, 1), strict=True):
        np.take(red, index[0], out=plane, mode="clip")
        plane += np.take(green, index[1], out=term, mode="clip")
        plane += np.take(blue, index[2], out=term, mode="clip")
    return _within(pixels, means, areas)


def _shrink(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the means of cells, uint16 [3, b, h, w] from 0 to LEVELS, and their areas in pixels.

    A side that is no multiple of 4 is cut symmetrically into pieces of about 4, so that a patch has
    the same features if it is turned or mirrored.
    """
    b, height, width, _ = pixels.shape
    if height % SHRINK == 0 and width % SHRINK == 0:
        h, w = height // SHRINK, width // SHRINK
        lines = pixels.reshape(b, h, SHRINK, width * 3)
        rows = _scratch("rows", (b, h, width * 3), np.uint16)
        np.add(lines[:, :, 0], lines[:, :, 1], out=rows, dtype=np.uint16)
        rows += lines[:, :, 2]
        rows += lines[:, :, 3]
        cells = rows.reshape(b, h, w, SHRINK, 3)
        means = _scratch("means", (3, b, h, w), np.uint16)
        for colour, plane in enumerate(means):
            np.add(cells[..., 0, colour], cells[..., 1, colour], out=plane)
            plane += cells[..., 2, colour]
            plane += cells[..., 3, colour]
        return means, np.full((1, 1), SHRINK**2)
    down, across = _cuts(height), _cuts(width)
    sums = np.add.reduceat(pixels, down[:-1], axis=1, dtype=np.uint32)
    sums = np.add.reduceat(sums, across[:-1], axis=2)
    areas = np.diff(down)[:, None] * np.diff(across)
    means = (sums * 16 + areas[..., None] // 2) // areas[..., None]
    means = np.ascontiguousarray(means.transpose(3, 0, 1, 2).astype(np.uint16))
    return means, areas


@lru_cache(64)
def _cuts(side: int) -> np.ndarray:
    """Return the starts of the pieces of a side, and its end."""
    pieces = max(1, side // SHRINK)
    # An odd side has a middle pixel, which must be in a middle piece: their number must be odd.
    pieces += side % 2 == 1 and pieces % 2 == 0
    first_half = np.round(np.arange(pieces // 2 + 1) * side / pieces).astype(np.intp)
    cuts = np.concatenate([first_half, side - first_half[::-1][pieces % 2 == 0 :]])
    cuts.flags.writeable = False  # the cached array is shared by all callers
    return cuts


def _within(pixels: np.ndarray, means: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """Return 256 times the squared deviations within cells, int64 [b, 3], by integers.

    Of one cell with area A and mean m / 16: sum (p - m / 16)^2 = sum p^2 - A (m / 16)^2.
    """
    b, height, width, _ = pixels.shape
    squares = _scratch("squares", (height, width * 3), np.uint16)
    columns = np.empty((b, width * 3), np.uint64)
    for patch, sums in zip(pixels.reshape(b, height, width * 3), columns, strict=True):
        np.multiply(patch, patch, out=squares, dtype=np.uint16)
        np.sum(squares, axis=0, dtype=np.uint64, out=sums)
    total = columns.reshape(b, width, 3).sum(axis=1, dtype=np.int64)
    between = _scratch("between", means.shape, np.uint32)
    np.square(means, out=between, dtype=np.uint32)
    between *= areas.astype(np.uint32)
    return 256 * total - between.reshape(3, b, -1).sum(axis=2, dtype=np.int64).T


def _mean(planes: np.ndarray) -> np.ndarray:
    return planes.sum(-1) / np.float32(planes.shape[-1])


def _mean_abs(plane: np.ndarray, n: int) -> np.ndarray:
    return np.abs(plane, out=_scratch("term", plane.shape)).sum(-1) / np.float32(n)


def _mean_product(one: np.ndarray, other: np.ndarray, n: int) -> np.ndarray:
    # Not by BLAS, whose order of summation depends on the number of threads.
    return np.einsum("...n,...n->...", one, other) / np.float32(n)
