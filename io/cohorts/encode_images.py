"""Encode the patches of images, each once, into a feature store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..encoders.base import Encoder, digest
from ..encoders.load_encoder import load_encoder
from ..errors import CohortError, SlideError, StoreError
from ..store.leases import Leases
from ..store.read import FeatureStore
from ..store.source import Source, describe
from ..store.write import StoreWriter
from .images import Cut, ImageSet, Pixels

BATCH_PATCHES = 64


class _Job(NamedTuple):
    """An image to encode."""

    source: Source
    patches: Pixels
    corners: NDArray[np.int32]


def encode_images(
    images: ImageSet, files: dict[str, list[str]], cut: Cut, encoder: str, store: Path
) -> tuple[str, dict[str, list[str]]]:
    """Encode the images that the store lacks.

    The encoder is loaded only if an image is to be encoded. Processes that need the same store do
    not encode at the same time: the others wait for the first.

    Args:
        images: the folder or zip file.
        files: patient to names of images.
        cut: how images are cut into patches.
        encoder: name for `load_encoder`.
        store: the folder of the store; created if it does not exist.

    Returns:
        The encoder's name in the store, and patient to keys of the store.

    Raises:
        CohortError: an image cannot be read, the encoder does not load, or the store was written
            with another encoder of this name, patch or size.
    """
    sources = {
        name: Source(images.file_of(name), name) for names in files.values() for name in names
    }
    try:
        slug = _encode_missing(images, sources.values(), cut, encoder, store)
    except CohortError:
        raise
    except (StoreError, SlideError, ValueError) as error:
        raise CohortError(f"{images.where}: {error}") from None
    keys = {patient: [sources[name].key for name in names] for patient, names in files.items()}
    return slug, keys


def _encode_missing(
    images: ImageSet, sources: Iterable[Source], cut: Cut, name: str, store: Path
) -> str:
    size = None if cut.size is None else list(cut.size)
    tiling = {"images": True, "patch": cut.patch, "size": size}
    if (store / "run.json").is_file():
        opened = FeatureStore(store)
        if name in opened.encoders and opened.run["tiling"] == tiling:
            slug = FeatureStore(store, name).slug
            writer = StoreWriter(store, slug, opened.run)
            if all(writer.state(source) == "done" for source in sources):
                return slug
    encoder = load_encoder(name)
    writer = StoreWriter.open(store, tiling, digest(tiling), encoder.spec())
    with Leases(store / "leases").wait("images"):
        jobs = (
            _Job(source, *images.patches(source.name, cut))
            for source in sources
            if writer.state(source) != "done"
        )
        for batch in _batches(jobs):
            _encode(batch, encoder, writer)
    return writer.slug


def _batches(jobs: Iterable[_Job]) -> Iterator[list[_Job]]:
    """Yield lists of images that together have at least BATCH_PATCHES patches."""
    batch: list[_Job] = []
    for job in jobs:
        batch.append(job)
        if sum(len(each.patches) for each in batch) >= BATCH_PATCHES:
            yield batch
            batch = []
    if batch:
        yield batch


def _encode(batch: list[_Job], encoder: Encoder, writer: StoreWriter) -> None:
    """Encode the images of a batch, and write each to the store."""
    patches = np.concatenate([job.patches for job in batch])
    parts = [patches[i : i + BATCH_PATCHES] for i in range(0, len(patches), BATCH_PATCHES)]
    features = np.concatenate([encoder.encode(part) for part in parts])
    ends = np.cumsum([len(job.patches) for job in batch])
    for job, rows in zip(batch, np.split(features, ends[:-1]), strict=True):
        key, n = job.source.key, len(rows)
        state = writer.state(job.source)
        if state == "features":
            slide = writer.begin_features(key, encoder.width)
        else:
            slide = writer.begin(
                key, describe(job.source), job.corners, np.ones(n), np.zeros(n, np.uint8),
                None, None, encoder.width,
            )  # fmt: skip
        with slide:
            slide.write(np.arange(n), rows)
            slide.commit(replace=state == "changed")
