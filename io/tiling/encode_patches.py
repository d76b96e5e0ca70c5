"""Folders of patches that were cut before to a feature store: each folder is one bag."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..encoders.base import digest
from ..encoders.load_encoder import load_encoder
from ..errors import SlideError, StoreError
from ..slides.open_slide import open_slide
from ..store.disk import FULL, clean
from ..store.failures import note_failure, write_not_taken
from ..store.leases import Leases
from ..store.read import FeatureStore
from ..store.source import Source, describe
from ..store.write import StoreWriter
from .events import Emit, slide_event

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..encoders.base import Encoder

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
POSITION = re.compile(r"x[_=-]?(\d+)[_,.-]*y[_=-]?(\d+)|(?<!\d)(\d+),(\d+)", re.IGNORECASE)
"""Position of a patch in its file name: "x512_y1024", or "512,1024"."""
TILING = {"bags": "folder"}
"""The tiling of a store of bags: patches were cut before."""
LARGEST_PX = 4096
"""Longest side of a patch; a larger image is a slide, for `tile_slides`."""
FAILURES = (OSError, SlideError, StoreError, MemoryError)


class Encoded(NamedTuple):
    """The result of `encode_patches`: numbers of bags."""

    bags: int
    """All bags of the call."""
    done: int
    """Bags that are stored with their features."""
    failed: dict[str, str]
    """Key to message, of the bags that failed."""
    patches: int
    """Patches embedded in this call."""
    not_taken: dict[str, str]
    """Path to reason, of what the folders hold and is no image."""

    def __str__(self) -> str:
        text = f"{self.bags} bag{'s'[: self.bags != 1]}: {self.done} done"
        return text + f", {len(self.failed)} failed" * bool(self.failed)


def encode_patches(
    folders: str | PathLike[str] | Iterable[str | PathLike[str]],
    out: str | PathLike[str],
    *,
    encoder: str | Encoder,
    batch: int = 64,
    progress: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> Encoded:
    """Embed patches that are images already, and store the features, bag by bag.

    Each folder that holds images is one bag, subfolders are bags of their own. All images count: no
    tissue is searched. Positions are read from the file names ("x512_y1024" or "512,1024", in px of
    whatever the names count), if every image of the folder has another one; otherwise the bag has
    none. An image that cannot be read is flagged as corrupt; a bag without a readable one fails.
    A call continues where an earlier one stopped.

    Args:
        folders: the folders.
        out: folder of the store.
        encoder: name as `load_encoder` takes it, or an Encoder.
        batch: most patches per call of the encoder.
        progress: called with each event, as by `tile_slides`.
        options: further arguments of `load_encoder`.

    Returns:
        The numbers of bags that are done and failed.

    Raises:
        ValueError: an argument is wrong; there is no image; two bags have the same key.
        StoreError: the folder holds a store of another specification.
        OSError: the store cannot be written.

    Example:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> Path("case7").mkdir()
        >>> Image.new("RGB", (64, 64), "pink").save("case7/x128_y0.png")
        >>> print(motet.io.encode_patches("case7", "bags", encoder="stain-stats"))
        1 bag: 1 done
    """
    not_taken: dict[str, str] = {}
    bags = _find_bags([folders] if isinstance(folders, str | PathLike) else folders, not_taken)
    if not bags:
        raise ValueError(f"folders: no image in {folders}")
    emit = progress or (lambda _: None)
    emit({
        "event": "begin", "slides": len(bags), "bytes": sum(bag.source.bytes for bag in bags),
        "without_mask": [], "not_taken": not_taken,
    })  # fmt: skip
    loaded = load_encoder(encoder, **options) if isinstance(encoder, str) else encoder
    writer = StoreWriter.open(out, TILING, digest(TILING), loaded.spec())
    clean(writer.path, Leases(writer.path / "leases"))
    patches = sum(_encode_or_note(bag, loaded, writer, batch, emit) for bag in bags)
    write_not_taken(writer.path, not_taken)
    store = FeatureStore(out, writer.slug)
    store.write_manifest()
    keys = {bag.source.key for bag in bags}
    failed = {key: str(note["message"]) for key, note in store.failed.items() if key in keys}
    return Encoded(len(bags), len(bags) - len(failed), failed, patches, not_taken)


class _Bag(NamedTuple):
    """A folder of patches; their order is that of the rows in the store."""

    source: Source
    images: list[Path]
    coords: NDArray[np.int32] | None
    """[N, 2], from the names; None if they have no positions."""


def _find_bags(folders: Iterable[str | PathLike[str]], not_taken: dict[str, str]) -> list[_Bag]:
    bags: dict[str, _Bag] = {}
    for top in map(Path, folders):
        if not top.is_dir():
            raise SlideError(top, "missing", "expected a folder of patches")
        for folder, subfolders, names in os.walk(top):
            subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
            images = []
            for path in (Path(folder, name) for name in sorted(names) if name[0] != "."):
                if path.suffix.lower() in SUFFIXES and path.is_file():
                    images.append(path)
                else:
                    not_taken[str(path)] = "no image" if path.is_file() else "no file"
            if not images:
                continue
            relative = Path(folder).relative_to(top).as_posix()
            name = top.resolve().name if relative == "." else relative
            source = Source(Path(folder).absolute(), name)
            if source.key in bags:
                raise ValueError(
                    f"folders: two are called {name!r}; give the folder that holds both"
                )
            bags[source.key] = _Bag(source, *_in_order(images))
    return sorted(bags.values(), key=lambda bag: bag.source.name)


def _in_order(images: list[Path]) -> tuple[list[Path], NDArray[np.int32] | None]:
    """Return the images by rows, and their positions; by name, and None, if some have none."""
    matches = [POSITION.search(path.stem) for path in images]
    places = [tuple(int(n) for n in match.groups() if n) for match in matches if match]
    if len(set(places)) < len(images) or max(map(max, places)) >= 2**31:
        return images, None
    rows = sorted(range(len(images)), key=lambda i: places[i][::-1])
    return [images[i] for i in rows], np.array([places[i] for i in rows], np.int32)


def _encode_or_note(
    bag: _Bag, encoder: Encoder, writer: StoreWriter, batch: int, emit: Emit
) -> int:
    """Encode a bag that is not done, or write down why it fails; return the number of patches."""
    leases = Leases(writer.path / "leases")
    with leases.wait(bag.source.key):
        left = writer.work_left(bag.source)
        if left == "done":
            emit(slide_event("known", bag.source))
            return 0
        emit({"event": "start", "key": bag.source.key, "name": bag.source.name})
        try:
            count = _encode_bag(bag, encoder, writer, batch, left)
        except FAILURES as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            attempts = (writer.attempts(bag.source) or 0) + 1
            note_failure(writer.path, writer.slug, bag.source, error, attempts)
            emit({**slide_event("failed", bag.source), "message": str(error)})
            return 0
        emit({"event": "patches", "patches": count, "decode_s": 0.0, "encode_s": 0.0})
        emit(slide_event("done", bag.source))
        return count


def _encode_bag(bag: _Bag, encoder: Encoder, writer: StoreWriter, batch: int, left: str) -> int:
    """Encode the images of a bag and commit it; return the number of patches."""
    key, n = bag.source.key, len(bag.images)
    rows = np.arange(n)
    if left == "features":
        slide = writer.begin_features(key, encoder.width)
        rows = rows[~FeatureStore(writer.path, writer.slug)[key].corrupt]
    else:
        coords = np.full((n, 2), -1, np.int32) if bag.coords is None else bag.coords
        attrs = {
            **describe(bag.source), "coords": "absent" if bag.coords is None else "names",
            "mpp": None, "reader": "patches",
        }  # fmt: skip
        slide = writer.begin(
            key, attrs, coords, np.ones(n), np.zeros(n, np.uint8), None, None, encoder.width
        )
    count = 0
    with slide:
        lost: list[int] = []
        for part, pixels in _batches(bag.images, rows, batch, lost):
            slide.write(part, encoder.encode(pixels))
            count += len(part)
        if not count:
            raise SlideError(bag.source.path, "damaged", f"none of {n} images can be read")
        slide.corrupt(lost)
        slide.commit(replace=left == "changed")
    return count


def _batches(
    images: list[Path], rows: NDArray[np.int64], batch: int, lost: list[int]
) -> Iterator[tuple[list[int], NDArray[np.uint8]]]:
    """Yield rows and pixels [b, h, w, 3] of images of one size; add unreadable rows to `lost`."""
    part: list[int] = []
    pixels: list[NDArray[np.uint8]] = []
    for row in rows.tolist():
        try:
            patch = _read(images[row])
        except SlideError:
            lost.append(row)
            continue
        if pixels and (len(pixels) == batch or patch.shape != pixels[0].shape):
            yield part, np.stack(pixels)
            part, pixels = [], []
        part.append(row)
        pixels.append(patch)
    if pixels:
        yield part, np.stack(pixels)


def _read(path: Path) -> NDArray[np.uint8]:
    with open_slide(path) as image:
        width, height = image.levels[0].width, image.levels[0].height
        if max(width, height) > LARGEST_PX:
            message = f"expected a patch of at most {LARGEST_PX} px, got {width} x {height}"
            raise SlideError(path, "too-large", message)
        return image.read(0, 0, 0, width, height)
