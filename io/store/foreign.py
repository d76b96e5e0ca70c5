"""Read, import and write the features and coordinates of other tools: TRIDENT and CLAM."""

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
from .disk import FULL, clean
from .failures import note_failure
from .format import drop_bits, read_run, run_hash
from .leases import Leases
from .read import FeatureStore
from .read_slide import SlideFeatures
from .source import Source, describe
from .write import StoreWriter

SUFFIXES = (".h5", ".pt", ".npz")
MAX_COMPRESSION = 1000
"""An array may be this many times larger than its file. A larger one is refused: it would be a file
made to fill the memory."""
_UNREADABLE = (*UNREADABLE, zipfile.BadZipFile, pickle.UnpicklingError)


class ForeignFile(NamedTuple):
    """The content of another tool's file."""

    features: NDArray[Any] | None
    """[N, D], numbers of any dtype."""
    coords: NDArray[np.int32] | None
    """[N, 2]: (x, y) of the top-left corners in level-0 px, in the order of the file."""
    footprint_px: float | None
    """Side of a patch in level-0 px, None if the file does not say it."""
    attrs: dict[str, Any]
    """The attributes of the coordinates in the file."""


def read_trident(path: str | os.PathLike[str]) -> ForeignFile:
    """Read a file of TRIDENT or CLAM.

    `.h5` with features [N, D] or [1, N, D], coords [N, 2], or both; `.pt` with a tensor [N, D] or a
    dict of tensors; `.npz` with arrays of these names. No code in a file is executed.

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
    corners = None if coords is None else _check_corners(path, _two_axes(path, "coords", coords))
    if features is not None and corners is not None and len(features) != len(corners):
        raise SlideError(
            path, "unreadable", f"expected coords of {len(features)} patches, got {len(corners)}"
        )
    return ForeignFile(features, corners, _footprint(attrs), attrs)


def read_coords(path: str | os.PathLike[str]) -> ForeignFile:
    """Read a file of TRIDENT or CLAM that must have coordinates.

    Raises:
        SlideError: as `read_trident`; "unsupported" if the file has no coordinates.
    """
    file = read_trident(path)
    if file.coords is None:
        raise SlideError(path, "unsupported", "expected coords [N, 2], got only features")
    return file


def import_features(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    encoder: str,
    coords: str | os.PathLike[str] | None = None,
) -> FeatureStore:
    """Import features that another tool computed into a feature store.

    Reads files of TRIDENT and CLAM (`.h5`, `.pt`) and `.npz`: features [N, D] and, if present,
    coords [N, 2]. Features become float16. What such files do not hold is null or absent in the
    store (mpp, thumbnail, mask); the tissue share of each patch is taken as 1. If a file has no
    coordinates, they are -1 and the slide's attribute `coords` is "absent". A file that cannot be
    used is listed in `failed`; the other files are still imported. The same call again imports what
    is missing and retries files that failed.

    Args:
        paths: files, or folders to search. In a CLAM folder `h5_files` is preferred to `pt_files`.
        out: folder of the store; created if it does not exist.
        encoder: name of the encoder that computed the features.
        coords: folder with `.h5` files of coordinates, `<slide>.h5` or `<slide>_patches.h5`, for
            files without coordinates.

    Returns:
        The store, opened.

    Raises:
        StoreError: no file has features, or `out` is another kind of store.
        OSError: the disk is full.

    Example:
        >>> import numpy as np
        >>> np.savez("b.npz", features=np.ones((4, 16)), coords=np.arange(8).reshape(4, 2))
        >>> store = motet.io.import_features(["b.npz"], "imported", encoder="uni")
        >>> store["b"].features.shape, store["b"].attrs["coords"], store.failed
        ((4, 16), 'level-0 px', {})
    """
    sources = _find_sources(paths)
    writer = _open_writer(Path(out), encoder, sources)
    leases = Leases(writer.path / "leases")
    clean(writer.path, leases)
    for source in sources:
        if writer.state(source) in ("done", "empty"):
            continue
        with leases.wait(source.key):
            left = writer.work_left(source)
            if left not in ("done", "empty"):
                _import_or_note(writer, source, coords, replace=left == "changed")
    store = FeatureStore(out, encoder)
    store.write_manifest()
    return store


def export(
    store: FeatureStore,
    name: str,
    folder: str | os.PathLike[str],
    kind: str = "npz",
    drop: Iterable[str] = (),
) -> Path:
    """Write the features of a slide to a file; return the path of the file.

    Args:
        store: the store, opened with the encoder whose features to write.
        name: key or name of the slide.
        folder: where to write `<slide>.<kind>`, or `<key>.<kind>` if several slides of the store
            have this file name.
        kind: "npz": features float16, coords, tissue and flags of all patches. "h5": TRIDENT's
            layout; "pt": CLAM's layout; both float32 and without the corrupt patches, since these
            layouts have no flag for them.
        drop: leave out patches with these flags, "pen" and "blur".

    Raises:
        ValueError: another flag.
        StoreError: the slide does not exist or cannot be read.
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
            coords = slide.coords[slide.without(drop)]
            _write_h5(partial, slide.bag(drop=drop)[0], coords, slide.attrs)
        else:
            # An open file: to a path numpy would add `.npz`, and torch would store its name.
            with open(partial, "wb") as file:
                _write_zip(file, slide, kind, drop)
    return path


def _write_zip(file: IO[bytes], slide: SlideFeatures, kind: str, drop: Iterable[str]) -> None:
    if kind == "npz":
        rows = np.flatnonzero((slide.flags & np.uint8(drop_bits(drop))) == 0)
        np.savez(
            file, features=slide.rows(rows), coords=slide.coords[rows], tissue=slide.tissue[rows],
            flags=slide.flags[rows],
        )  # fmt: skip
    else:
        import torch

        torch.save(torch.from_numpy(slide.bag(drop=drop)[0]), file)


def _find_files(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
) -> list[tuple[Path, str]]:
    """Return the files and their names: the path relative to the folder that was searched."""
    named_files: list[tuple[Path, str]] = []
    for path in map(Path, [paths] if isinstance(paths, str | os.PathLike) else paths):
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
            h5_stems = {file.stem for file in files if file.parent.name == "h5_files"}
            named_files += (
                (file, file.relative_to(path).as_posix())
                for file in files
                if file.is_file() and not (file.parent.name == "pt_files" and file.stem in h5_stems)
            )
        else:
            named_files.append((path, path.name))
    if not named_files:
        raise StoreError(f"expected files of features ({listed(SUFFIXES)}), got none in {paths!r}")
    return named_files


def _find_sources(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
) -> list[Source]:
    """Return the files as sources; raise StoreError if two of them have the same key."""
    sources = [Source(path, name) for path, name in _find_files(paths)]
    path_of_key: dict[str, str] = {}
    for source in sources:
        if source.key in path_of_key:
            raise StoreError(
                f"two files of one name, {path_of_key[source.key]} and {source.path}: give the "
                "folder of both"
            )
        path_of_key[source.key] = str(source.path)
    return sources


def _open_writer(out: Path, encoder: str, sources: Iterable[Source]) -> StoreWriter:
    """Open the store. The width of the features is the store's, else that of the first file."""
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
        raise StoreError(f"no file has features: {error or 'only coordinates'}")
    tiling = {"imported": True}
    unknown = dict.fromkeys(("weights", "transform", "precision"), "unknown")
    return StoreWriter.open(
        out, tiling, run_hash(tiling), {"id": encoder, "width": width, **unknown}
    )


def _import_or_note(
    writer: StoreWriter, source: Source, coords: str | os.PathLike[str] | None, *, replace: bool
) -> None:
    """Import a file, or write down why it cannot be imported."""
    try:
        _import(writer, source, coords, replace=replace)
    except (SlideError, StoreError, OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno in FULL:  # no fault of this file
            raise
        attempts = (writer.attempts(source) or 0) + 1
        note_failure(writer.path, writer.slug, source, error, attempts)


def _import(
    writer: StoreWriter, source: Source, coords: str | os.PathLike[str] | None, *, replace: bool
) -> None:
    file = read_trident(source.path)
    if file.features is None:
        raise SlideError(source.path, "unsupported", "expected features, got only coords")
    n, width = file.features.shape
    if width != writer.encoder["width"]:
        expected = writer.encoder["width"]
        raise SlideError(source.path, "unsupported", f"expected width {expected}, got {width}")
    coords_file = file
    if file.coords is None and coords is not None:
        coords_file = _read_coords_of(source, Path(coords))
    corners = coords_file.coords
    if corners is not None and len(corners) != n:
        raise SlideError(
            source.path, "unreadable", f"expected coords of {n} patches, got {len(corners)}"
        )
    attrs = {
        **describe(source), "coords": "absent" if corners is None else "level-0 px",
        "footprint_px": coords_file.footprint_px, "imported": coords_file.attrs, "mpp": None,
        "reader": "import",
    }  # fmt: skip
    if corners is None:
        corners = np.full((n, 2), -1, np.int32)
    with writer.begin(
        source.key, attrs, corners, np.ones(n), np.zeros(n, np.uint8), None, None, width
    ) as slide:
        for first in range(0, n, 4096):
            features = file.features[first : first + 4096]
            slide.write(np.arange(first, first + len(features)), features)
        slide.commit(replace=replace)


def _read_coords_of(source: Source, folder: Path) -> ForeignFile:
    """Read the coordinates of a file without coordinates from a file of the same stem."""
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
            if data.nbytes > MAX_COMPRESSION * size:
                raise SlideError(path, "too-large", f"{name} {list(data.shape)} of {size} bytes")
            arrays[name] = data[()]
            if name == "coords":
                attrs = {str(key): _plain(value) for key, value in data.attrs.items()}
    return arrays, attrs


def _read_pt(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    import torch

    # torch warns of an old pickle protocol; the file is loaded or refused all the same.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
        content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, torch.Tensor):
        content = {"features": content}
    if not isinstance(content, dict):
        raise SlideError(path, "unsupported", f"expected a tensor, got {type(content).__name__}")
    arrays = {  # numpy has no bfloat16
        str(name): (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        for name, tensor in content.items()
        if isinstance(tensor, torch.Tensor)
    }
    return arrays, {}


def _read_npz(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > MAX_COMPRESSION * path.stat().st_size:
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
    if "footprint_y_px" in attrs:
        raise StoreError(
            f"{attrs.get('name')}: expected square patches in level-0 px, got {side:.6g} x "
            f"{attrs['footprint_y_px']:.6g}: its pixels are not square, and .h5 holds one side; "
            "use kind='npz' or 'pt'"
        )
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = features, coords
        values = {
            "name": PurePosixPath(str(attrs.get("name", ""))).stem,
            "patch_size": attrs.get("tile_px"),
            "patch_size_level0": round(side) if isinstance(side, int | float) else None,
            "level0_width": attrs.get("width"), "level0_height": attrs.get("height"),
        }  # fmt: skip
        for name, value in values.items():
            if value is not None:
                file["coords"].attrs[name] = value


def _two_axes(path: Path, name: str, array: NDArray[Any]) -> NDArray[Any]:
    if array.ndim == 3 and len(array) == 1:
        array = array[0]
    if array.ndim != 2:
        hint = " (one vector for the whole slide)" if array.ndim == 1 else ""
        raise SlideError(
            path, "unsupported", f"{name}: expected [N, D], got {list(array.shape)}{hint}"
        )
    return array


def _check_corners(path: Path, coords: NDArray[Any]) -> NDArray[np.int32]:
    bound = 2**31
    if coords.shape[1] != 2 or coords.dtype.kind not in "iuf" or not (np.abs(coords) < bound).all():
        raise SlideError(
            path, "unsupported", f"coords: expected int32 [N, 2], got {coords.dtype} "
            f"{list(coords.shape)}",
        )  # fmt: skip
    return np.rint(coords).astype(np.int32)


def _footprint(attrs: Mapping[str, Any]) -> float | None:
    """Return the side of a patch in level-0 px, None if the attributes do not say it.

    TRIDENT stores it; CLAM stores the size and the downsample of the level.
    """
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
    """Return an attribute as a value that JSON can hold."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)
