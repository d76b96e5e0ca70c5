"""Make report.png: `python docs/figures/report.py`. It needs Chromium and motet[wsi].

The slides are made from scikit-image's picture of colonic glands.
"""

import subprocess
import tempfile
from pathlib import Path

import motet
import numpy as np
import tifffile
from PIL import Image, ImageDraw, ImageFilter
from skimage.color import hed2rgb, rgb2hed
from skimage.data import immunohistochemistry


def draw_slide(seed: int) -> Image.Image:
    """Draw pieces of tissue on glass: mirrored copies of the picture, stained in some strength."""
    random = np.random.default_rng(seed)
    stains = rgb2hed(immunohistochemistry())
    # Of haematoxylin, eosin, and DAB, which stands for eosin in most slides.
    hem, _, dab = np.moveaxis(stains, -1, 0)
    mixed = np.stack([hem, dab * 1.2, np.zeros_like(dab)] if seed % 3 else [hem, 0 * hem, dab], -1)
    tile = (hed2rgb(mixed * random.uniform(0.8, 1.3)) * 255).astype(np.uint8)
    row = np.concatenate([tile, tile[:, ::-1]] * 3, 1)
    tissue = np.concatenate([row, row[::-1], row, row[::-1]], 0)
    height, width = tissue.shape[:2]
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    for _ in range(random.integers(1, 4)):
        x, y = random.uniform(0.3, 0.7, 2) * (width, height)
        angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        waves = sum(random.uniform(0, 0.12) * np.cos(k * angles + k * seed) for k in (2, 3, 5))
        radius = random.uniform(350, 800) * (1 + waves)
        points = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], 1)
        draw.polygon([tuple(point) for point in points.tolist()], fill=255)
    glass = Image.new("RGB", (width, height), (243, 242, 244))
    return Image.composite(Image.fromarray(tissue), glass, mask.filter(ImageFilter.GaussianBlur(3)))


def write_slide(path: Path, image: Image.Image, mpp: float | None) -> None:
    """Write a tiled TIFF; its resolution is left out if it is None."""
    known = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": 3}
    tifffile.imwrite(
        path, np.asarray(image), tile=(256, 256), photometric="rgb", compression="jpeg", **known
    )


def make_slides(folder: Path) -> None:
    """Write twelve slides: with pen, out of focus, empty, of unknown resolution, damaged."""
    for n in range(1, 13):
        image, mpp = draw_slide(n), 0.25 if n in (3, 8) else 0.5
        if n == 5:
            draw = ImageDraw.Draw(image)
            draw.line([(900, 500), (1500, 650), (2100, 1500)], (40, 90, 230), 90, "curve")
        if n == 7:
            half = image.crop((1500, 0, 3072, 2048)).filter(ImageFilter.GaussianBlur(14))
            image.paste(half, (1500, 0))
        if n == 9:
            image = Image.new("RGB", image.size, (243, 242, 244))
        path = folder / f"biopsy-{n:02}.tif"
        write_slide(path, image, None if n == 11 else mpp)
        if n == 12:
            path.write_bytes(b"no image")


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        slides, cohort = Path(temporary, "slides"), Path(temporary, "biopsies")
        slides.mkdir()
        make_slides(slides)
        motet.io.tile_slides(slides, cohort, encoder="stain-stats", mpp=1.0, tile_px=64, workers=0)
        index = motet.io.write_report(cohort)
        picture = Path(__file__).with_suffix(".png")
        subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             "--window-size=1280,1500", "--virtual-time-budget=5000", f"--screenshot={picture}",
             f"--user-data-dir={temporary}/profile", index.as_uri()],
            check=True,
        )  # fmt: skip
        with Image.open(picture) as shot:
            shot.convert("RGB").save(picture, optimize=True)


if __name__ == "__main__":
    main()
