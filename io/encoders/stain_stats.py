"""The built-in encoder: stain densities and texture of a patch, without weights or torch."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ..native import native
from .base import Encoder, as_numpy, checked, digest

if TYPE_CHECKING:
    from torch import Tensor

# Where it is None numpy computes the same, to the bit.
_native: Callable[..., None] | None = getattr(native(), "stain_planes", None)

SHRINK = 4
"""Pixels per side that are averaged first: 16 times less work, and what is finer is summed up in
three figures (`detail`)."""

STAINS = ("haematoxylin", "eosin", "residual")
# Ruifrok & Johnston 2001: optical density of each stain in red, green and blue. The third is DAB,
# to which H&E slides give what fits neither of their two.
VECTORS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
UNMIX = np.linalg.inv(VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)).astype(np.float32)

LEVELS = 16 * 255
"""A mean of pixels is kept as an integer up to this: exact, as it is the sum of 16."""
# Half a grey level is added, so that black has a density too, 2.7.
DENSITY = -np.log10((np.arange(LEVELS + 1) + 8) / (LEVELS + 8)).astype(np.float32)

PLANES = (*STAINS, "density")
# What each level of red, green and blue adds to each plane: float32 [3, LEVELS + 1, 4].
TABLE = np.stack([DENSITY[:, None] * np.append(of, np.float32(1 / 3)) for of in UNMIX])

SHARES = {
    "haematoxylin": (0.05, 0.1, 0.2, 0.3, 0.45, 0.65, 0.9),
    "eosin": (0.05, 0.1, 0.2, 0.3, 0.45, 0.65, 0.9),
    "residual": (0.0, 0.1, 0.25, 0.5),
}
GLASS = 0.05
SCALES = (1, 2, 4)
# What is added to a denominator, so that a patch with no contrast gives 0 instead of noise.
STILL = np.float32(1e-4)

AT_ONCE = 1 << 15
"""Averaged pixels that are worked on together: about ten such planes stay in the second cache."""

WORDS = 255
"""Words of 8 truths that are added without a carry from byte to byte."""


class _Scratch(threading.local):
    """Memory that each thread keeps, by name: fresh pages took a fifth of the time."""

    KEPT = 1 << 20

    def __init__(self) -> None:
        self.kept: dict[str, np.ndarray] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size > self.KEPT:
            return np.empty(shape, dtype)
        kept = self.kept.get(name)
        if kept is None or kept.size < size:
            kept = self.kept[name] = np.empty(size, np.uint8)
        return kept[:size].view(dtype).reshape(shape)


_scratch = _Scratch()


class StainStats(Encoder):
    """Describe a patch by its stains: docs/how-to/encoders.md lists the features."""

    id = "stain-stats"
    weights = "none"
    precision = "fp32"
    input_px = None
    transform = digest(
        {
            "shrink": SHRINK,
            "vectors": VECTORS.tolist(),
            "shares": {stain: list(above) for stain, above in SHARES.items()},
            "glass": GLASS,
            "scales": list(SCALES),
            "version": 1,
        }
    )

    def __init__(self) -> None:
        blank = np.full((1, SHRINK, SHRINK, 3), 255, np.uint8)
        self.names = tuple(name for name, _ in _features(blank))
        self.width = len(self.names)

    def encode(self, pixels: np.ndarray | Tensor) -> np.ndarray:
        pixels = np.ascontiguousarray(as_numpy(checked(pixels)))
        out = np.empty((len(pixels), self.width), np.float32)
        # A patch's numbers are sums over its own pixels in an order that does not depend on how
        # many patches are worked on together: a row has the same bits in every batch.
        step = max(1, AT_ONCE * SHRINK**2 // max(1, pixels[0, ..., 0].size)) if len(pixels) else 1
        for start in range(0, len(pixels), step):
            block = slice(start, start + step)
            for column, (_, values) in enumerate(_features(pixels[block])):
                out[block, column] = values
        return out


def _features(pixels: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Give name and values [b] of every feature of uint8 [b, H, W, 3]."""
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
        for above in SHARES.get(plane, ()):
            yield f"{plane} > {above:g}", next(shares)
    yield f"density < {GLASS:g}", next(shares)

    for one, other in ((0, 1), (0, 2), (1, 2)):
        covariance = _mean_product(planes[one], planes[other], h * w)
        correlation = covariance / (spreads[one] * spreads[other] + STILL)
        yield f"{STAINS[one]} ~ {STAINS[other]}", correlation
    yield "haematoxylin > 0.3 and > eosin", next(shares)
    yield "eosin > 0.15 and > haematoxylin", next(shares)
    yield "haematoxylin and eosin > 0.3", next(shares)

    yield from _texture(planes[:2], h, w)
    deviations = np.sqrt(np.maximum(within, 0) / 256 / pixels[0, ..., 0].size) / 255
    for colour, values in zip(("red", "green", "blue"), deviations.T, strict=True):
        yield f"{colour} detail", values


def _shares(planes: np.ndarray) -> np.ndarray:
    """Return the shares [22, b] of the area of planes [4, b, n] where the comparisons hold."""
    _, b, n = planes.shape
    haematoxylin, eosin, _, density = planes
    levels = [len(above) for above in SHARES.values()]
    pieces = -(-n // (8 * WORDS))
    words = -(-n // (8 * pieces))
    padded = _scratch("truths", (sum(levels) + 4, b, pieces * words * 8), np.bool_)
    padded[..., n:] = False
    truths = padded[..., :n]
    *stains, (glass, nuclei, stroma, both) = np.split(truths, np.cumsum(levels))
    for plane, above, where in zip(planes, SHARES.values(), stains, strict=False):
        np.greater(plane, np.array(above, np.float32)[:, None, None], out=where)
    dark = [stains[i][SHARES[STAINS[i]].index(0.3)] for i in (0, 1)]
    np.less(density, np.float32(GLASS), out=glass)
    more = np.greater(haematoxylin, eosin, out=both)
    np.logical_and(dark[0], more, out=nuclei)
    np.greater(eosin, np.float32(0.15), out=stroma)
    np.greater(stroma, more, out=stroma)  # and not more
    np.logical_and(*dark, out=both)
    sums = np.add.reduce(padded.view(np.uint64).reshape(-1, pieces, words), axis=2)
    counts = np.add.reduce(sums.view(np.uint8), axis=1, dtype=np.uint32)
    return counts.reshape(-1, b) / np.float32(n)


def _texture(pair: np.ndarray, h: int, w: int) -> Iterator[tuple[str, np.ndarray]]:
    """Give the features of neighbours at several distances, of planes [2, b, h * w] with mean 0.

    Every 2 x 2 neighbours at a distance are compared: sum, and differences down, across, crosswise.
    Repeated on the sums with twice the distance it is the Haar transform that keeps every position.
    All planes are one vector here, a neighbour is so many numbers further on. Where that is in
    another row or plane, which is at the right and lower ends, there is nothing to compare:
    columns are set to 0, rows left out. The planes are overwritten.
    """
    sums, steps = (_scratch(name, (pair.size,)) for name in ("sums", "steps"))
    edges = _scratch("edges", (2, *pair.shape))  # across, down
    corner = _scratch("corner", pair[0].shape)  # of haematoxylin alone
    plane, across, down, crosswise = (x.reshape(-1) for x in (pair, *edges, corner))
    size, tall, wide = pair.size, h, w
    # Sums of neighbours are left unscaled, four times as large at each step.
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
        both, corners = (_kept(x, h, w, tall, wide) for x in (edges, corner))
        xx, yy = _mean_product(both, both, n)
        energies = xx + yy
        # Of the structure tensor: 1 where all edges run one way, 0 where they run all ways.
        aligned = np.sqrt((xx - yy) ** 2 + 4 * _mean_product(both[0], both[1], n) ** 2)
        aligned /= energies + STILL**2
        strengths = np.sqrt(energies)
        shared = _mean_product(both[:, 0], both[:, 1], n).sum(0)
        steepness = _size(both[:, 0], n).sum(0)
        name = f"{scale * SHRINK} px"
        yield f"haematoxylin edges {name}", strengths[0] / unit
        yield f"haematoxylin alignment {name}", aligned[0]
        yield f"haematoxylin steps {name}", steepness / unit
        yield f"haematoxylin corners {name}", np.sqrt(_mean_product(corners, corners, n)) / unit
        yield f"eosin edges {name}", strengths[1] / unit
        yield f"eosin alignment {name}", aligned[1]
        yield f"shared edges {name}", shared / (strengths[0] * strengths[1] + STILL**2)
        unit *= 4
    means = _kept(pair, h, w, tall, wide)
    n = max(1, tall * wide)
    deviations = np.sqrt(_mean_product(means, means, n)) / (unit / 2)
    for stain, deviation in zip(STAINS, deviations, strict=False):
        yield f"{stain} std of {2 * SCALES[-1] * SHRINK} px means", deviation


def _kept(planes: np.ndarray, h: int, w: int, tall: int, wide: int) -> np.ndarray:
    """Return the first rows of planes [..., h * w], with the columns from `wide` on set to 0."""
    rows = planes.reshape(-1, h, w)[:, :tall]
    rows[..., wide:] = 0
    return planes[..., : tall * w]


def _planes(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return planes float32 [4, b, h, w] of averaged pixels, and what the averages leave out.

    That is int64 [b, 3]: for each colour 256 times the squared deviations within averaged pixels.
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
    """Return means of 4 x 4 pixels, uint16 [3, b, h, w] in 0..LEVELS, and the areas.

    A side that is no multiple of 4 is cut into pieces of about 4 that lie symmetrically, as a patch
    has to give the same when it is turned or mirrored.
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
    """Return where the pieces of a side start, and its end."""
    pieces = max(1, side // SHRINK)
    pieces += side % 2 == 1 and pieces % 2 == 0  # an odd side has a pixel in the middle
    left = np.round(np.arange(pieces // 2 + 1) * side / pieces).astype(np.intp)
    cuts = np.concatenate([left, side - left[::-1][pieces % 2 == 0 :]])
    cuts.flags.writeable = False  # as all callers get the same
    return cuts


def _within(pixels: np.ndarray, means: np.ndarray, areas: np.ndarray) -> np.ndarray:
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


def _size(plane: np.ndarray, n: int) -> np.ndarray:
    return np.abs(plane, out=_scratch("term", plane.shape)).sum(-1) / np.float32(n)


def _mean_product(one: np.ndarray, other: np.ndarray, n: int) -> np.ndarray:
    # Not the BLAS: its sums depend on the number of threads.
    return np.einsum("...n,...n->...", one, other) / np.float32(n)
