"""Images in a folder or a zip file, as bags of patches. `where` is explained in bags.py."""

from __future__ import annotations

import io
import os
import warnings
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any
from zipfile import ZipFile

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ..errors import CohortError, counted, listed
from ..slides.library_errors import DAMAGE, error_text
from .bags import Bag, Float, LazyBags

Pixels = NDArray[np.uint8]

# Other formats of Pillow start programs (EPS) or are rare.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MAX_FILE_BYTES = 1 << 30  # of an image in a zip file, unpacked


@dataclass(frozen=True)
class Cut:
    """How an image is cut into patches.

    Args:
        patch: the side of a patch, px.
        size: (width, height) to which each image is resized first; None does not resize. An image
            whose sides are not multiples of `patch` loses the rest at its edges, half on each side.
    """

    patch: int
    size: tuple[int, int] | None = None

    @property
    def features(self) -> int:
        """Return the numbers of a patch: three colours per pixel."""
        return 3 * self.patch**2

    def count(self, width: int, height: int) -> int:
        """Return the number of patches of an image of these sides, px."""
        return (width // self.patch) * (height // self.patch)

    def patches(self, pixels: Pixels) -> tuple[Pixels, NDArray[np.int32]]:
        """Cut an image, row by row.

        Args:
            pixels: uint8 [height, width, 3].

        Returns:
            Patches uint8 [N, patch, patch, 3], and int32 [N, 2]: (x, y) of their upper left corners
            in the image, px.
        """
        side = self.patch
        rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
        top, left = (pixels.shape[0] - rows * side) // 2, (pixels.shape[1] - columns * side) // 2
        kept = pixels[top : top + rows * side, left : left + columns * side]
        blocks = kept.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
        y, x = np.divmod(np.arange(rows * columns, dtype=np.int32), np.int32(columns))
        corners = np.stack([left + x * side, top + y * side], axis=1)
        return blocks.reshape(-1, side, side, 3), corners


class ImageSet(ABC):
    """Images by name. A name is a path below a folder or in a zip file, with forward slashes.

    Args:
        path: the folder or the zip file.
        where: place in the cohort's YAML file, for errors.
    """

    def __init__(self, path: Path, where: str) -> None:
        self.path, self.where = path, where

    @abstractmethod
    def has(self, name: str) -> bool:
        """Return True if there is a file of this name.

        Raises:
            CohortError: the name is that of a file outside the folder.
        """

    @abstractmethod
    def file_of(self, name: str) -> Path:
        """Return the file on the disk that holds an image."""

    @abstractmethod
    def examples(self) -> Iterable[str]:
        """Return some names of files, for errors."""

    @abstractmethod
    def _open_file(self, name: str) -> IO[bytes]: ...

    def sides(self, name: str) -> tuple[int, int]:
        """Return the sides of an image, px, from its header: width and height, or exchanged."""
        with self._opened(name) as image:
            return image.size

    def patches(self, name: str, cut: Cut) -> tuple[Pixels, NDArray[np.int32]]:
        """Return the patches of an image, and their corners; see `Cut.patches`.

        Raises:
            CohortError: the image cannot be read, or is smaller than a patch.
        """
        with self._opened(name) as image:
            pixels = _as_rgb(image, cut.size)
        height, width = pixels.shape[:2]
        if min(height, width) < cut.patch:
            raise CohortError(
                f"{self.where}: image {name!r}: expected at least one patch of {cut.patch} px, got "
                f"{width} x {height} px: give a smaller `patch`, or a `size` to resize to"
            )
        return cut.patches(pixels)

    @contextmanager
    def _opened(self, name: str) -> Iterator[Image.Image]:
        """Open an image. What goes wrong in the block is raised as a CohortError that names it."""
        try:
            with self._open_file(name) as file, Image.open(file, formats=FORMATS) as image:
                yield image
        except (*DAMAGE, zipfile.BadZipFile, zlib.error, Image.DecompressionBombError) as error:
            raise CohortError(
                f"{self.where}: image {name!r} in {self.path} cannot be read: {error_text(error)}: "
                "replace the file; or remove it, and the patient lacks it"
            ) from None


class ImageFolder(ImageSet):
    """The images in a folder and the folders below it."""

    def has(self, name: str) -> bool:
        path = PurePath(name)
        if path.is_absolute() or path.drive or ".." in path.parts:
            raise CohortError(
                f"{self.where}: expected names of files in {self.path}, got {name!r}, which is "
                "outside"
            )
        return (self.path / path).is_file()

    def file_of(self, name: str) -> Path:
        return self.path / name

    def examples(self) -> Iterable[str]:
        return sorted(path.name for path in self.path.iterdir() if path.is_file())

    def _open_file(self, name: str) -> IO[bytes]:
        return open(self.path / name, "rb")


class ImageZip(ImageSet):
    """The images in a zip file. It is opened once in each process."""

    def __init__(self, path: Path, where: str) -> None:
        super().__init__(path, where)
        self._archive: ZipFile | None = None
        self._pid = 0
        try:
            self._names = frozenset(self._opened_archive().namelist())
        except (OSError, zipfile.BadZipFile) as error:
            raise CohortError(f"{where}: {path} cannot be read: {error}") from None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_archive": None, "_pid": 0}

    def has(self, name: str) -> bool:
        return name in self._names

    def file_of(self, name: str) -> Path:
        return self.path

    def examples(self) -> Iterable[str]:
        return sorted(self._names)

    def _open_file(self, name: str) -> IO[bytes]:
        archive = self._opened_archive()
        if (size := archive.getinfo(name).file_size) > MAX_FILE_BYTES:
            raise ValueError(f"{size} bytes; at most {MAX_FILE_BYTES}")
        return io.BytesIO(archive.read(name))

    def _opened_archive(self) -> ZipFile:
        # Forked processes share the position in an open file, so each opens its own.
        if self._archive is None or self._pid != os.getpid():
            self._archive, self._pid = ZipFile(self.path), os.getpid()
        return self._archive


class ImageBags(LazyBags):
    """Bags of raw patches: the tokens of a patient are the patches of all images of the patient.

    A token is the RGB values 0 to 255 of its pixels, row by row. Its two coordinates are the centre
    of the patch, (x, y) from the centre of the image, divided by half the longer side. An image is
    read and decoded each time that its bag is used.

    Args:
        images: the folder or zip file.
        files: patient to the names of the images.
        cut: how images are cut into patches.
    """

    def __init__(self, images: ImageSet, files: dict[str, list[str]], cut: Cut) -> None:
        super().__init__(files)
        self._images, self._cut = images, cut

    def __getitem__(self, patient: str) -> Bag:
        bags = [self._bag(name) for name in self._locations[patient]]
        tokens, coords = zip(*bags, strict=True)
        return np.concatenate(tokens), np.concatenate(coords)

    def _bag(self, name: str) -> tuple[Float, Float]:
        patches, corners = self._images.patches(name, self._cut)
        centres = corners + self._cut.patch / 2
        # The patches lie in the middle of the image, so its centre is halfway between their edges.
        middle = (centres.min(axis=0) + centres.max(axis=0)) / 2
        half = (centres - middle).max() + self._cut.patch / 2
        coords = (centres - middle) / half
        return patches.reshape(len(patches), -1).astype(np.float32), coords.astype(np.float32)

    def tokens(self, patient: str) -> int:
        names = self._locations[patient]
        return sum(self._cut.count(*(self._cut.size or self._images.sides(n))) for n in names)


def open_images(path: Path, where: str) -> ImageSet:
    """Return the images of a folder or a zip file.

    Raises:
        CohortError: it is neither, or cannot be read.
    """
    if path.is_dir():
        return ImageFolder(path, where)
    return ImageZip(path, where)


def find_images(
    images: ImageSet, files: dict[str, list[str]], *, must_exist: bool
) -> dict[str, list[str]]:
    """Return the names of the images that exist, by patient; patients without any are left out.

    Missing files are counted in one warning.

    Args:
        images: the folder or zip file.
        files: patient to names of images.
        must_exist: True to raise an error if no image exists.

    Raises:
        CohortError: no image exists, or a name is that of a file outside the folder.
    """
    missing = [name for names in files.values() for name in names if not images.has(name)]
    absent = set(missing)
    existing = {
        patient: [name for name in names if name not in absent] for patient, names in files.items()
    }
    existing = {patient: names for patient, names in existing.items() if names}
    if must_exist and not existing:
        raise CohortError(
            f"{images.where}: no image of a patient is in {images.path}: expected names such as "
            f"{listed(missing, 2)}, it has {listed(images.examples(), 2)}; `file` makes the name "
            'of a cell, for example "{}.jpg"'
        )
    if missing:
        warnings.warn(
            f"{images.where}: {counted(missing, 'file')} not in {images.path}; patients without "
            f"any image, {len(files) - len(existing)}, lack the modality",
            stacklevel=2,
        )
    return existing


def _as_rgb(image: Image.Image, size: tuple[int, int] | None) -> Pixels:
    """Return an image as uint8 [height, width, 3], resized to `size`, (width, height).

    The orientation that EXIF gives is applied. Grey, palettes and CMYK become RGB; 16-bit grey
    loses its lower 8 bits; transparent pixels are composed over white.
    """
    if size:  # JPEG only: the decoder returns a smaller image, of at least twice the size
        image.draft(None, (2 * max(size), 2 * max(size)))
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    elif upright.mode in ("I", "F"):
        raise ValueError(f"samples of mode {upright.mode}; expected 8 or 16 bits")
    if upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    upright = upright.convert("RGB")
    if size and upright.size != size:
        upright = upright.resize(size, Image.Resampling.BILINEAR)  # antialiased
    return np.asarray(upright)
