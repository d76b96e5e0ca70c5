"""Pictures of tissue in other stains: real H&E, unmixed, and mixed again with other dyes.

The optical densities (red, green, blue) of the dyes are those of Ruifrok and Johnston 2001 and of
the colour deconvolution of ImageJ, which QuPath and scikit-image use too.
"""

from __future__ import annotations

import numpy as np
from motet.io.tiling.background import find_background

DYES = {
    "haematoxylin": (0.65, 0.704, 0.286), "eosin": (0.072, 0.99, 0.105),
    "DAB": (0.268, 0.57, 0.776), "methyl green": (0.98, 0.144, 0.133),
    "light green": (0.947, 0.254, 0.197), "Feulgen": (0.464, 0.83, 0.308),
    "aniline blue": (0.853, 0.509, 0.113), "methyl blue": (0.8, 0.591, 0.105),
    "alcian blue": (0.875, 0.458, 0.158), "methylene blue": (0.835, 0.514, 0.196),
    "ponceau": (0.1, 0.737, 0.668), "azocarmine": (0.093, 0.866, 0.491),
    "eosin (Giemsa)": (0.093, 0.954, 0.283), "fast red": (0.214, 0.851, 0.478),
    "PAS": (0.175, 0.972, 0.155), "AEC": (0.274, 0.68, 0.68),
}  # fmt: skip
# The dye of the nuclei; the dye of the rest, or two dyes, each in a part of the tissue.
STAINS = {
    "H&E": ("haematoxylin", "eosin"), "IHC, DAB": ("haematoxylin", "DAB"),
    "IHC, AEC": ("haematoxylin", "AEC"), "IHC, fast red": ("haematoxylin", "fast red"),
    "PAS": ("haematoxylin", "PAS"), "methyl green": ("methyl green", "methyl green"),
    "methyl green, DAB": ("methyl green", "DAB"),
    "light green, Feulgen": ("Feulgen", "light green"),
    "Masson, light green": ("haematoxylin", "light green"),
    "Masson, aniline blue": ("haematoxylin", ("aniline blue", "ponceau")),
    "Azan": ("azocarmine", ("aniline blue", "azocarmine")),
    "Alcian blue": ("haematoxylin", "alcian blue"),
    "Alcian blue, PAS": ("haematoxylin", ("alcian blue", "PAS")),
    "Giemsa": ("methylene blue", "eosin (Giemsa)"),
    "methylene blue": ("methylene blue", "methylene blue"),
}  # fmt: skip


def unmix(thumb: np.ndarray) -> np.ndarray:
    """Return the amounts of haematoxylin and eosin in a picture, [2, h, w], at least 0."""
    glass = np.array(find_background(thumb).colour)
    density = -np.log10(np.clip(thumb / 255 / glass, 1 / 255, 1))
    dyes = np.array([DYES["haematoxylin"], DYES["eosin"]]).T
    return np.maximum(np.einsum("ij,hwj->ihw", np.linalg.pinv(dyes), density), 0)


def stained(amounts: np.ndarray, stain: str, depth: float) -> np.ndarray:
    """Return a picture with these amounts of the dyes of a stain, times `depth`."""
    nuclei, rest = STAINS[stain]
    first, second = (rest, rest) if isinstance(rest, str) else rest
    down, right = (np.linspace(0, 12, side) for side in amounts.shape[1:])
    is_first = (np.sin(down)[:, None] + np.cos(right) > 0)[..., None]
    density = amounts[0][..., None] * np.array(DYES[nuclei])
    density = density + amounts[1][..., None] * np.where(is_first, DYES[first], DYES[second])
    return np.clip(243 * 10 ** (-depth * density), 0, 255).round().astype(np.uint8)
