"""Small slides for tests: tissue-like pictures, written as the pyramids that scanners write."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

# Optical density of haematoxylin and eosin in red, green, blue.
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]], np.float32)


def draw_tissue(width: int, height: int, *, seed: int = 0, background: int = 242) -> Pixels:
    """Draw pink blobs with purple dots on a light background, [height, width, 3]."""
    from scipy.ndimage import gaussian_filter

    random = np.random.default_rng(seed)

    def clouds(grain: float) -> NDArray[np.float32]:
        """Return smooth noise with mean 0 and deviation 1 whose blobs are about `grain` px."""
        step = max(1, int(grain // 4))
        rows, columns = height // step + 3, width // step + 3
        noise = random.standard_normal((rows, columns), np.float32)
        noise = gaussian_filter(noise, grain / step / 2, mode="wrap")
        noise = (noise - noise.mean()) / max(float(noise.std()), 1e-6)
        for axis, size in enumerate((height, width)):
            at = np.arange(size, dtype=np.float32) / step
            low = at.astype(int)
            part = (at - low).reshape((-1, 1) if axis == 0 else (1, -1))
            noise = noise.take(low, axis) * (1 - part) + noise.take(low + 1, axis) * part
        return noise

    short = min(width, height)
    tissue = np.clip(8 * clouds(max(short / 4, 2)), 0, 1)
    eosin = tissue * (0.45 + 0.1 * clouds(max(short / 40, 2)))
    nuclei = tissue * np.clip(3 * (clouds(6) - 1), 0, 1)
    density = np.stack([nuclei, np.clip(eosin, 0, 1)], -1) @ STAINS
    light = background * np.exp(-density) + random.standard_normal((height, width, 1), np.float32)
    return np.clip(light + 0.5, 0, 255).astype(np.uint8)


def reduce_by(image: Pixels, factor: int) -> Pixels:
    """Return the rounded means of factor x factor blocks; leftover rows and columns are cut."""
    height, width = image.shape[0] // factor, image.shape[1] // factor
    blocks = image[: height * factor, : width * factor]
    blocks = blocks.reshape(height, factor, width, factor, image.shape[2])
    return (blocks.mean((1, 3), dtype=np.float32) + 0.5).astype(np.uint8)


def make_pyramid(
    path: str | PathLike[str],
    size: tuple[int, int] = (1500, 1100),
    tile: tuple[int, int] = (256, 256),
    factors: Sequence[int] = (1, 4, 16),
    compression: str = "jpeg",
    mpp: float | None = 0.5,
    image: Pixels | None = None,
    quality: int = 80,
    seed: int = 0,
    *,
    description: str | None = None,
) -> Pixels:
    """Write a tiled pyramidal TIFF; the same arguments give the same bytes.

    Args:
        path: path of the file to write.
        size: (width, height) of level 0; ignored if `image` is set.
        tile: (width, height) of the tiles, multiples of 16.
        factors: whole numbers that level 0 is reduced by; leftover rows are cut, so that
            odd sizes give downsamples such as 2.0005.
        compression: "jpeg", "deflate", "lzw", "none", or another name that tifffile knows, such as
            "aperio_jp2000_rgb".
        mpp: micrometres per px, written as resolution tags; None writes none.
        image: level 0, uint8 [height, width, 3]; by default `draw_tissue`.
        quality: quality of lossy compression.
        seed: seed of the drawn tissue.
        description: ImageDescription of level 0, such as "Aperio Image Library|MPP = 0.5".

    Returns:
        Level 0 before compression, uint8 [height, width, 3].
    """
    import tifffile

    if image is None:
        image = draw_tissue(*size, seed=seed)
    lossy = compression == "jpeg" or "jp2000" in compression or "jpeg_2000" in compression
    with tifffile.TiffWriter(path) as writer:
        for number, factor in enumerate(factors):
            resolution = {} if mpp is None else {
                "resolution": (1e4 / (mpp * factor),) * 2, "resolutionunit": "CENTIMETER",
            }  # fmt: skip
            writer.write(
                image if factor == 1 else reduce_by(image, factor),
                tile=tile[::-1],
                photometric="rgb",  # "ycbcr" would mean that the pixels already are YCbCr
                compression=None if compression == "none" else compression,
                compressionargs={"level": quality} if lossy else None,
                subfiletype=1 if number else 0,
                description=description if number == 0 else None,
                metadata=None,
                maxworkers=1,
                **resolution,
            )
    return image
