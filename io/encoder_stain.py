"""The built-in encoder: stain densities and texture of a patch, without weights or torch."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .encoders import Encoder, as_numpy, checked, digest

if TYPE_CHECKING:
    from torch import Tensor

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
    """Describe a patch by its stains: docs/encoders.md lists the features."""

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
    means, areas = _shrink(pixels)
    index = _scratch("index", means.shape, np.intp)
    index[:] = means
    densities = _scratch("densities", means.shape)  # optical density in red, green and blue
    np.take(DENSITY, index, out=densities, mode="clip")
    shape = means.shape[1:]
    term = _scratch("term", shape)
    stains = {}
    for i, stain in enumerate(STAINS):
        plane = np.multiply(densities[0], UNMIX[0, i], out=_scratch(stain, shape))
        plane += np.multiply(densities[1], UNMIX[1, i], out=term)
        plane += np.multiply(densities[2], UNMIX[2, i], out=term)
        stains[stain] = plane

    centred, spread = {}, {}
    for stain, plane in stains.items():
        mean = _mean(plane)
        centred[stain] = _scratch(f"{stain} centred", shape)
        np.subtract(plane, mean[:, None, None], out=centred[stain])
        spread[stain] = np.sqrt(_mean_product(centred[stain], centred[stain]))
        yield f"{stain} mean", mean
        yield f"{stain} std", spread[stain]
        for above in SHARES[stain]:
            yield f"{stain} > {above:g}", _share(plane > np.float32(above))

    total = np.add(densities[0], densities[1], out=term)
    total += densities[2]
    total /= np.float32(3)
    mean = _mean(total)
    glass = _share(total < np.float32(GLASS))
    total -= mean[:, None, None]
    yield "density mean", mean
    yield "density std", np.sqrt(_mean_product(total, total))
    yield f"density < {GLASS:g}", glass

    haematoxylin, eosin = stains["haematoxylin"], stains["eosin"]
    for one, other in (STAINS[:2], STAINS[::2], STAINS[1:]):
        covariance = _mean_product(centred[one], centred[other])
        yield f"{one} ~ {other}", covariance / (spread[one] * spread[other] + STILL)
    more = haematoxylin > eosin
    yield "haematoxylin > 0.3 and > eosin", _share(more & (haematoxylin > np.float32(0.3)))
    yield "eosin > 0.15 and > haematoxylin", _share(~more & (eosin > np.float32(0.15)))
    both = np.minimum(haematoxylin, eosin, out=term)
    yield "haematoxylin and eosin > 0.3", _share(both > np.float32(0.3))

    yield from _texture(centred["haematoxylin"], centred["eosin"])
    for colour, values in zip(("red", "green", "blue"), _detail(pixels, means, areas), strict=True):
        yield f"{colour} detail", values


def _texture(haematoxylin: np.ndarray, eosin: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Give the features of neighbours at several distances, of planes [b, h, w] with mean 0."""
    # Sums of neighbours are left unscaled, four times as large at each step.
    unit = np.float32(2)
    for scale in SCALES:
        haematoxylin, *of_haematoxylin = _haar(haematoxylin, scale, "haematoxylin")
        eosin, *of_eosin = _haar(eosin, scale, "eosin")
        energies, name = [], f"{scale * SHRINK} px"
        for stain, (down, across, corner) in zip(
            STAINS[:2], (of_haematoxylin, of_eosin), strict=True
        ):
            xx, yy = _mean_product(across, across), _mean_product(down, down)
            energies.append(xx + yy)
            yield f"{stain} edges {name}", np.sqrt(xx + yy) / unit
            # Of the structure tensor: 1 where all edges run one way, 0 where they run all ways.
            aligned = np.sqrt((xx - yy) ** 2 + 4 * _mean_product(across, down) ** 2)
            yield f"{stain} alignment {name}", aligned / (xx + yy + STILL**2)
            if stain == "haematoxylin":
                yield f"{stain} steps {name}", (_size(across) + _size(down)) / unit
                yield f"{stain} corners {name}", np.sqrt(_mean_product(corner, corner)) / unit
        both = _mean_product(of_haematoxylin[0], of_eosin[0])
        both += _mean_product(of_haematoxylin[1], of_eosin[1])
        yield f"shared edges {name}", both / (np.sqrt(energies[0] * energies[1]) + STILL**2)
        unit *= 4
    for stain, sums in zip(STAINS[:2], (haematoxylin, eosin), strict=True):
        deviation = np.sqrt(_mean_product(sums, sums)) / (unit / 2)
        yield f"{stain} std of {2 * SCALES[-1] * SHRINK} px means", deviation


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


def _cuts(side: int) -> np.ndarray:
    """Return where the pieces of a side start, and its end."""
    pieces = max(1, side // SHRINK)
    pieces += side % 2 == 1 and pieces % 2 == 0  # an odd side has a pixel in the middle
    left = np.round(np.arange(pieces // 2 + 1) * side / pieces).astype(np.intp)
    return np.concatenate([left, side - left[::-1][pieces % 2 == 0 :]])


def _haar(
    plane: np.ndarray, scale: int, name: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Compare every 2 x 2 neighbours at a distance: sum, and differences down, across, crosswise.

    Repeated on the sums with twice the distance it is the Haar transform that keeps every
    position. A plane that is too small has no neighbours, and results without elements. The
    differences are overwritten by the next call of this name, the sums by that of this scale.
    """
    b, height, width = plane.shape
    tall, small = max(0, height - scale), max(0, width - scale)
    upper, lower = plane[:, :-scale], plane[:, scale:]
    sums = np.add(upper, lower, out=_scratch("sums", (b, tall, width)))
    differences = np.subtract(lower, upper, out=_scratch("differences", (b, tall, width)))
    left, right = sums[..., :-scale], sums[..., scale:]
    before, after = differences[..., :-scale], differences[..., scale:]
    outs = [_scratch(f"{name} {part}", (b, tall, small))
            for part in (f"sums {scale}", "down", "across", "corner")]  # fmt: skip
    return (
        np.add(left, right, out=outs[0]),
        np.add(before, after, out=outs[1]),
        np.subtract(right, left, out=outs[2]),
        np.subtract(after, before, out=outs[3]),
    )


def _detail(pixels: np.ndarray, means: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """Return the standard deviation [3, b] within averaged pixels, of white: focus and grain."""
    b, height, width, _ = pixels.shape
    squares = _scratch("squares", (height, width * 3), np.uint16)
    columns = np.empty((b, width * 3), np.uint32)
    for patch, sums in zip(pixels.reshape(b, height, width * 3), columns, strict=True):
        np.multiply(patch, patch, out=squares, dtype=np.uint16)
        np.sum(squares, axis=0, dtype=np.uint32, out=sums)
    total = columns.reshape(b, width, 3).sum(axis=1, dtype=np.int64).T
    between = _scratch("between", means.shape, np.uint32)
    np.square(means, out=between, dtype=np.uint32)
    between *= areas.astype(np.uint32)
    within = total - between.reshape(3, b, -1).sum(axis=2, dtype=np.int64) / 256
    return np.sqrt(np.maximum(within, 0) / (height * width)) / 255


def _mean(plane: np.ndarray) -> np.ndarray:
    b, h, w = plane.shape
    return plane.reshape(b, h * w).sum(1) / np.float32(max(1, h * w))


def _size(plane: np.ndarray) -> np.ndarray:
    return _mean(np.abs(plane, out=_scratch("term", plane.shape)))


def _mean_product(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    b, h, w = one.shape
    # Not the BLAS: its sums depend on the number of threads.
    sums = np.einsum("bn,bn->b", one.reshape(b, h * w), other.reshape(b, h * w))
    return sums / np.float32(max(1, h * w))


def _share(where: np.ndarray) -> np.ndarray:
    b, h, w = where.shape
    count = np.add.reduce(where.view(np.uint8).reshape(b, h * w), axis=1, dtype=np.uint32)
    return count / np.float32(h * w)
