"""Other tools' files: TRIDENT's and CLAM's features and coordinates, read, imported and written."""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ... import _atomic
from ..errors import SlideError, StoreError, listed
from .array import UNREADABLE
from .disk import FULL
from .format import read_run, run_hash
from .leases import Leases
from .read import FeatureStore
from .read_slide import SlideFeatures
from .source import Source, described
from .write import StoreWriter, note_failure

SUFFIXES = (".h5", ".pt", ".npz")
# What an array may be larger than the file it is in: beyond it the file means harm.
RATIO = 1000
_UNREADABLE = (*UNREADABLE, zipfile.BadZipFile, pickle.UnpicklingError)


class Foreign(NamedTuple):
    """What another tool's file holds."""

    features: NDArray[Any] | None
    """[N, D], of any kind of float."""
    coords: NDArray[np.int32] | None
    """[N, 2]: (x, y) in level-0 px, top-left, in the order of the file."""
    footprint_px: float | None
    """Side of a patch in level-0 px, where the file says it."""
    attrs: dict[str, Any]
    """What else it says of the coordinates."""


def read_trident(path: str | os.PathLike[str]) -> Foreign:
    """Read a file of TRIDENT or CLAM.

    `.h5` with features [N, D] or [1, N, D], coords [N, 2], or both; `.pt` with a tensor [N, D] or a
    dict of tensors, of which nothing is executed; `.npz` likewise.

    Raises:
        SlideError: "missing", "unreadable", "unsupported", "too-large", "no-reader" without h5py.
    """
    path = Path(path)
    if not path.is_file():
        raise SlideError(path, "missing", "no such file")
    readers = {".h5": _read_h5, ".hdf5": _read_h5, ".pt": _read_pt, ".npz": _read_npz}
    if path.suffix not in readers:
        raise SlideError(path, "unsupported", f"expected {listed(SUFFIXES)}, got {path.suffix!r}")
    try:
        arrays, attrs = readers[path.suffix](path)
    except SlideError:
        raise
    except _UNREADABLE as error:
        raise SlideError(path, "unreadable", f"{type(error).__name__}: {error}") from None
    features, coords = arrays.get("features", arrays.get("feats")), arrays.get("coords")
    if features is None and coords is None:
        raise SlideError(path, "unsupported", f"expected features or coords, got {listed(arrays)}")
    if features is not None:
        features = _two_axes(path, "features", features)
        if features.dtype.kind not in "fiu":
            raise SlideError(path, "unsupported", f"expected numbers, got {features.dtype}")
    places = None if coords is None else _level_0(path, _two_axes(path, "coords", coords))
    if features is not None and places is not None and len(features) != len(places):
        raise SlideError(
            path, "unreadable", f"expected coords of {len(features)} patches, got {len(places)}"
        )
    return Foreign(features, places, _footprint(attrs), attrs)


def read_coords(path: str | os.PathLike[str]) -> Foreign:
    """Read the coordinates of TRIDENT's or CLAM's patches, to tile a slide by them.

    Raises:
        SlideError: as `read_trident`; "unsupported" where there are none.
    """
    found = read_trident(path)
    if found.coords is None:
        raise SlideError(path, "unsupported", "expected coords [N, 2], got features alone")
    return found


def import_features(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    encoder: str,
    coords: str | os.PathLike[str] | None = None,
) -> FeatureStore:
    """Import features that another tool made into a feature store.

    Files of TRIDENT and CLAM (`.h5`, `.pt`) or `.npz`: features [N, D] and, if they are there,
    coords [N, 2]. What such files do not say is null or absent in the store (mpp, thumbnail, mask;
    tissue is taken as all). Features become float16. Without coordinates these are -1, and the
    slide's attribute `coords` is "absent". A file that cannot be used is named in `failed`, and the
    rest goes on; the same call again goes on where it stopped, and tries again what failed.

    Args:
        paths: files, or folders to search; of a CLAM folder `h5_files` is preferred to `pt_files`.
        out: the store; made if it is not there.
        encoder: name of what made the features.
        coords: folder with `.h5` files of coordinates, `<slide>.h5` or `<slide>_patches.h5`, for
            files that have none.

    Returns:
        The store, opened.

    Raises:
        StoreError: no file could be used, or `out` is another kind of store.
        OSError: the disk is full.

    Example:
        >>> import numpy as np
        >>> np.savez("b.npz", features=np.ones((4, 16)), coords=np.arange(8).reshape(4, 2))
        >>> store = motet.io.import_features(["b.npz"], "imported", encoder="uni")
        >>> store["b"].features.shape, store["b"].attrs["coords"], store.failed
        ((4, 16), 'level-0 px', {})
    """
    sources = _sources(paths)
    writer = _writer(Path(out), encoder, sources)
    leases = Leases(writer.path / "leases")
    writer.clean(leases)
    for source in sources:
        if writer.state(source) in ("done", "empty"):
            continue
        with leases.wait(source.key):
            state = writer.state(source)
            if state not in ("done", "empty"):
                _import_or_note(writer, source, coords, replace=state == "changed")
    store = FeatureStore(out, encoder)
    store.write_manifest()
    return store


def export(
    store: FeatureStore, name: str, folder: str | os.PathLike[str], kind: str = "npz"
) -> Path:
    """Write a slide's features to a file of their own; return its path.

    Args:
        store: opened with the encoder wanted.
        name: key or name of the slide.
        folder: where to write `<slide>.<kind>`; of slides of one file name, `<key>.<kind>`.
        kind: "npz": features float16, coords, tissue and flags of all patches. "h5": TRIDENT's
            layout, and "pt": CLAM's, both float32 and without corrupt patches, for which they have
            no word.

    Raises:
        StoreError: no such slide, or it cannot be read.
    """
    if kind not in ("npz", "h5", "pt"):
        raise StoreError(f"kind: expected npz, h5 or pt, got {kind!r}")
    try:
        slide = store[name]
    except KeyError as error:
        raise StoreError(str(error.args[0])) from None
    stem = PurePosixPath(str(slide.attrs.get("name", ""))).stem
    path = Path(folder) / f"{stem if store.find(stem) == slide.key else slide.key}.{kind}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _atomic.replacing(path) as partial:
        if kind == "h5":
            _write_h5(partial, slide.bag()[0], slide.coords[~slide.corrupt], slide.attrs)
        else:
            with open(partial, "wb") as file:  # given a name, both would write it into the file
                _write_zip(file, slide, kind)
    return path


def _write_zip(file: IO[bytes], slide: SlideFeatures, kind: str) -> None:
    if kind == "npz":
        np.savez(
            file, features=slide.features, coords=slide.coords, tissue=slide.tissue,
            flags=slide.flags,
        )  # fmt: skip
    else:
        import torch

        torch.save(torch.from_numpy(slide.bag()[0]), file)


def _found(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
) -> list[tuple[Path, str]]:
    """Return files and their names, which are relative to the folder that was given."""
    found: list[tuple[Path, str]] = []
    for given in [paths] if isinstance(paths, str | os.PathLike) else paths:
        path = Path(given)
        if path.is_dir():
            files = sorted(one for one in path.rglob("*") if one.suffix in SUFFIXES)
            stems = {one.stem for one in files if one.parent.name == "h5_files"}
            found += (
                (one, one.relative_to(path).as_posix())
                for one in files
                if one.is_file() and not (one.parent.name == "pt_files" and one.stem in stems)
            )
        else:
            found.append((path, path.name))
    if not found:
        raise StoreError(f"expected files of features ({listed(SUFFIXES)}), got none in {paths!r}")
    return found


def _sources(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
) -> list[Source]:
    """Return the files, no two of one key."""
    sources = [Source(path, name) for path, name in _found(paths)]
    names: dict[str, str] = {}
    for one in sources:
        if one.key in names:
            raise StoreError(
                f"two files of one name, {names[one.key]} and {one.path}: give the folder of both"
            )
        names[one.key] = str(one.path)
    return sources


def _writer(out: Path, encoder: str, sources: Iterable[Source]) -> StoreWriter:
    """Open the store; the width is that of the store, else of the first file that can be read."""
    width, error = None, None
    if (out / "run.json").exists():
        specs = read_run(out)["encoders"].values()
        width = next((spec.get("width") for spec in specs if spec["id"] == encoder), None)
    for source in sources:
        if width is not None:
            break
        try:
            features = read_trident(source.path).features
            width = None if features is None else features.shape[1]
        except SlideError as caught:
            error = error or caught
    if width is None:
        raise StoreError(f"no file has features: {error or 'coordinates alone'}")
    tiling = {"imported": True}
    unknown = dict.fromkeys(("weights", "transform", "precision"), "unknown")
    return StoreWriter.open(
        out, tiling, run_hash(tiling), {"id": encoder, "width": width, **unknown}
    )


def _import_or_note(
    writer: StoreWriter, source: Source, coords: str | os.PathLike[str] | None, *, replace: bool
) -> None:
    """Import a file, or note why it cannot be; a full disk is no fault of the file."""
    try:
        _import(writer, source, coords, replace=replace)
    except (SlideError, StoreError, OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        attempts = (writer.attempts(source.key) or 0) + 1
        note_failure(writer.path, source.key, source, error, attempts)


def _import(
    writer: StoreWriter, source: Source, coords: str | os.PathLike[str] | None, *, replace: bool
) -> None:
    found = read_trident(source.path)
    if found.features is None:
        raise SlideError(source.path, "unsupported", "expected features, got coords alone")
    n, width = found.features.shape
    if width != writer.encoder["width"]:
        expected = writer.encoder["width"]
        raise SlideError(source.path, "unsupported", f"expected width {expected}, got {width}")
    places = found if found.coords is not None or coords is None else _beside(source, Path(coords))
    if places.coords is not None and len(places.coords) != n:
        raise SlideError(
            source.path, "unreadable", f"expected coords of {n} patches, got {len(places.coords)}"
        )
    attrs = {
        **described(source), "coords": "absent" if places.coords is None else "level-0 px",
        "footprint_px": places.footprint_px, "imported": places.attrs, "mpp": None,
        "reader": "import",
    }  # fmt: skip
    where = np.full((n, 2), -1, np.int32) if places.coords is None else places.coords
    with writer.begin(
        source.key, attrs, where, np.ones(n), np.zeros(n, np.uint8), None, None, width
    ) as slide:
        for first in range(0, n, 4096):
            part = found.features[first : first + 4096]
            slide.write(np.arange(first, first + len(part)), part)
        slide.commit(replace=replace)


def _beside(source: Source, folder: Path) -> Foreign:
    """Read the coordinates of a file that has none."""
    for name in (f"{source.path.stem}.h5", f"{source.path.stem}_patches.h5"):
        if (folder / name).is_file():
            return read_coords(folder / name)
    raise SlideError(source.path, "missing", f"no coordinates of it in {folder}")


def _read_h5(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    try:
        import h5py
    except ImportError:
        raise SlideError(path, "no-reader", "expected h5py: pip install 'motet[wsi]'") from None
    arrays, attrs, size = {}, {}, path.stat().st_size
    with h5py.File(path, "r") as file:
        for name in ("features", "feats", "coords"):
            if name not in file:
                continue
            data = file[name]
            if not isinstance(data, h5py.Dataset):
                raise SlideError(path, "unsupported", f"{name}: expected a dataset")
            if data.nbytes > RATIO * size:
                raise SlideError(path, "too-large", f"{name} {list(data.shape)} of {size} bytes")
            arrays[name] = data[()]
            if name == "coords":
                attrs = {str(key): _plain(value) for key, value in data.attrs.items()}
    return arrays, attrs


def _read_pt(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    import torch

    with warnings.catch_warnings():  # of how it was pickled: it loads, or is refused
        warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
        content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, torch.Tensor):
        content = {"features": content}
    if not isinstance(content, dict):
        raise SlideError(path, "unsupported", f"expected a tensor, got {type(content).__name__}")
    wide = (torch.bfloat16,)  # numpy has none
    arrays = {
        str(name): (one.float() if one.dtype in wide else one).numpy()
        for name, one in content.items()
        if isinstance(one, torch.Tensor)
    }
    return arrays, {}


def _read_npz(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    with zipfile.ZipFile(path) as archive:
        size = sum(one.file_size for one in archive.infolist())
    if size > RATIO * path.stat().st_size:
        raise SlideError(path, "too-large", f"{size} bytes in {path.stat().st_size}")
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files if name in ("features", "coords")}, {}


def _write_h5(
    path: Path, features: NDArray[Any], coords: NDArray[Any], attrs: Mapping[str, Any]
) -> None:
    try:
        import h5py
    except ImportError:
        raise StoreError("expected h5py to write .h5: pip install 'motet[wsi]'") from None
    side = attrs.get("footprint_px")
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = features, coords
        told = {
            "name": PurePosixPath(str(attrs.get("name", ""))).stem,
            "patch_size": attrs.get("tile_px"),
            "patch_size_level0": round(side) if isinstance(side, int | float) else None,
            "level0_width": attrs.get("width"), "level0_height": attrs.get("height"),
        }  # fmt: skip
        for name, value in told.items():
            if value is not None:
                file["coords"].attrs[name] = value


def _two_axes(path: Path, name: str, array: NDArray[Any]) -> NDArray[Any]:
    if array.ndim == 3 and len(array) == 1:
        array = array[0]
    if array.ndim != 2:
        what = " (one vector for the whole slide)" if array.ndim == 1 else ""
        raise SlideError(
            path, "unsupported", f"{name}: expected [N, D], got {list(array.shape)}{what}"
        )
    return array


def _level_0(path: Path, coords: NDArray[Any]) -> NDArray[np.int32]:
    bound = 2**31
    if coords.shape[1] != 2 or coords.dtype.kind not in "iuf" or not (np.abs(coords) < bound).all():
        raise SlideError(
            path, "unsupported", f"coords: expected int32 [N, 2], got {coords.dtype} "
            f"{list(coords.shape)}",
        )  # fmt: skip
    return np.rint(coords).astype(np.int32)


def _footprint(attrs: Mapping[str, Any]) -> float | None:
    """Return the side of a patch in level-0 px: TRIDENT says it, CLAM by size and downsample."""
    side, downsample = attrs.get("patch_size_level0"), attrs.get("downsample")
    if isinstance(side, int | float):
        return float(side)
    if isinstance(downsample, list) and downsample:
        downsample = downsample[0]
    side = attrs.get("patch_size")
    if isinstance(side, int | float) and isinstance(downsample, int | float):
        return float(side * downsample)
    return None


def _plain(value: object) -> object:
    """Return an attribute as JSON can hold it."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)
