"""One slide of a store: its features and the arrays of its patches."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import StoreError, listed
from .array import StoredArray
from .format import FLAGS, drop_bits, mapping, read_json


class OpenedStore(Protocol):
    """The attributes of a store that a slide reads; `FeatureStore` has them."""

    @property
    def path(self) -> Path: ...
    @property
    def slug(self) -> str: ...


class SlideFeatures:
    """The features of one slide and the arrays of its N patches.

    Patches are in row-major order (by rows, from the top left); each array has one row per patch.
    """

    def __init__(self, store: OpenedStore, key: str) -> None:
        self.key, self._store = key, store
        self.path = f"{store.path}/slides/{key}.zarr"
        meta = read_json(f"{self.path}/zarr.json")
        attrs = meta.get("attributes")
        if meta.get("node_type") != "group" or not isinstance(attrs, dict):
            raise StoreError(f"{self.path}: expected a zarr group with attributes, got another")
        self.attrs: dict[str, Any] = attrs
        """Attributes (docs/reference/store-format.md): source, resolution, counts, status."""

    def __repr__(self) -> str:
        return f"SlideFeatures({self.key!r})"

    def __len__(self) -> int:
        """Return N, the number of patches."""
        n = mapping(self.attrs.get("counts")).get("patches")
        if not isinstance(n, int) or n < 0:
            raise StoreError(f"{self.path}: counts.patches: expected a number, got {n!r}")
        return n

    @property
    def encoders(self) -> list[str]:
        """Return the folders of the encoders for which this slide has features."""
        try:
            with os.scandir(f"{self.path}/features") as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except OSError:
            return []

    @property
    def features(self) -> NDArray[np.float16]:
        """Return float16 [N, D]: a read-only memory map of the file if that is one raw chunk."""
        return self._features.read()

    def rows(self, indices: ArrayLike) -> NDArray[np.float16]:
        """Return the features float16 [n, D] of the patches `indices` [n], in that order.

        Raises:
            IndexError: a row does not exist.
        """
        rows = np.asarray(indices)
        return self._features.rows(rows if rows.size else rows.astype(np.intp))  # [] is float

    @cached_property
    def coords(self) -> NDArray[np.int32]:
        """Return int32 [N, 2]: (x, y) of the patches' top-left corners in level-0 px."""
        return self.array("coords", np.int32, (len(self), 2)).values()

    @cached_property
    def tissue(self) -> NDArray[np.float32]:
        """Return float32 [N]: the share of each patch that is tissue, in steps of 1/255."""
        share = self.array("tissue", np.uint8, (len(self),)).values().astype(np.float32)
        share /= 255
        return share

    @cached_property
    def flags(self) -> NDArray[np.uint8]:
        """Return uint8 [N]: bits of FLAGS."""
        return self.array("flags", np.uint8, (len(self),)).values()

    @property
    def corrupt(self) -> NDArray[np.bool_]:
        """Return bool [N]: True if the pixels could not be decoded; such features are NaN."""
        return (self.flags & np.uint8(FLAGS.CORRUPT)) != 0

    @property
    def thumb(self) -> NDArray[np.uint8] | None:
        """Return the thumbnail of the slide, uint8 [h, w, 3], None if the store has none."""
        return self._image("thumb", np.uint8, (None, None, 3))

    @property
    def mask(self) -> NDArray[np.bool_] | None:
        """Return the tissue of the whole slide, bool [h, w], None if the store has no mask."""
        return self._image("mask", np.bool_, (None, None))

    def bag(self, *, drop: Iterable[str] = ()) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return features float32 [K, D] and coords float32 [K, 2] of all but corrupt patches.

        Args:
            drop: also leave out patches with these flags, "pen" and "blur".

        Raises:
            ValueError: another flag.
        """
        features, coords, used = self.features, self.coords, self.without(drop)
        if not used.all():
            features, coords = features[used], coords[used]
        return features.astype(np.float32), coords.astype(np.float32)

    def without(self, drop: Iterable[str] = ()) -> NDArray[np.bool_]:
        """Return bool [N]: True for patches that are not corrupt and have none of these flags.

        Args:
            drop: "pen" and "blur".

        Raises:
            ValueError: another flag.
        """
        return (self.flags & np.uint8(FLAGS.CORRUPT | drop_bits(drop))) == 0

    @property
    def width(self) -> int:
        """Return D."""
        return self._features.shape[1]

    @cached_property
    def _features(self) -> StoredArray:
        slug = self._store.slug
        try:
            return self.array(f"features/{slug}", np.float16, (len(self), None))
        except StoreError:
            if slug in (slugs := self.encoders):
                raise
            raise StoreError(
                f"{self.path}: no features of {slug!r} yet, only of: {listed(slugs)}"
            ) from None

    def array(self, name: str, dtype: type, shape: tuple[int | None, ...]) -> StoredArray:
        """Open one of its arrays and check its dtype and shape (None for any length).

        Raises:
            StoreError: it does not exist, or has another dtype or shape.
        """
        array = StoredArray(f"{self.path}/{name}")
        fits = len(shape) == len(array.shape) and all(
            expected in (None, got) for expected, got in zip(shape, array.shape, strict=True)
        )
        if array.dtype != dtype or not fits:
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            raise StoreError(
                f"{array.path}: expected {np.dtype(dtype)} [{sizes}], got {array.dtype} "
                f"{list(array.shape)}"
            )
        return array

    def _image(self, name: str, dtype: type, shape: tuple[int | None, ...]) -> NDArray[Any] | None:
        if not os.path.exists(f"{self.path}/{name}"):
            return None
        return self.array(name, dtype, shape).values()
