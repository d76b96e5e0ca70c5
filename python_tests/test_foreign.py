"""Files of TRIDENT and CLAM are read, imported and written; damaged ones raise a clear error."""

import os
import pickle
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from motet.io import FeatureStore, StoreError, import_features
from motet.io.errors import SlideError
from motet.io.store.foreign import export, read_coords, read_trident

from .store_helpers import numbers, tree

PLACES = np.array([[512, 0], [1024, 512], [0, 1024]], np.int64)


def write_trident(
    path: Path, features: np.ndarray | None, coords: np.ndarray | None = PLACES
) -> Path:
    """Write a file as TRIDENT does: 512 px patches at 20x of a 40x slide."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        if features is not None:
            file["features"] = features
        if coords is not None:
            file["coords"] = coords
            file["coords"].attrs.update(
                patch_size=256, patch_size_level0=512, level0_magnification=40,
                target_magnification=20, overlap=0, name=path.stem, savetodir="out",
            )  # fmt: skip
    return path


def write_clam(folder: Path, name: str, features: np.ndarray, *, h5: bool = True) -> None:
    """Write h5_files, pt_files and patches as CLAM does: patches of level 1 of a 1/4 pyramid."""
    for part in ("h5_files", "pt_files", "patches"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    if h5:
        with h5py.File(folder / "h5_files" / f"{name}.h5", "w") as file:
            file["features"], file["coords"] = features, PLACES.astype(np.int32)
    torch.save(torch.from_numpy(features), folder / "pt_files" / f"{name}.pt")
    with h5py.File(folder / "patches" / f"{name}.h5", "w") as file:
        file["coords"] = PLACES
        file["coords"].attrs.update(
            patch_size=256, patch_level=1, downsample=np.array([4.0, 4.0]), name=name,
            level_dim=np.array([1000, 2000]),
        )  # fmt: skip


def reason(path: Path) -> str:
    with pytest.raises(SlideError) as caught:
        read_trident(path)
    assert str(path) in str(caught.value)
    return caught.value.reason


def test_layouts(tmp_path: Path) -> None:
    features = numbers(3, 4)
    for array in (features, features[None], features.astype(np.float16)):
        patches = read_trident(write_trident(tmp_path / "a.h5", array))
        assert patches.features is not None
        assert patches.coords is not None
        np.testing.assert_array_equal(patches.features, features)
        np.testing.assert_array_equal(patches.coords, PLACES)
        assert patches.coords.dtype == np.int32
        assert patches.footprint_px == 512
        assert patches.attrs["target_magnification"] == 20
    alone = read_coords(write_trident(tmp_path / "a_patches.h5", None))
    assert alone.features is None
    assert alone.footprint_px == 512
    write_clam(tmp_path / "clam", "b", features)
    assert read_coords(tmp_path / "clam/patches/b.h5").footprint_px == 1024
    assert (
        read_coords(tmp_path / "clam/h5_files/b.h5").footprint_px is None
    )  # the file has no footprint
    tensor = read_trident(tmp_path / "clam/pt_files/b.pt")
    assert tensor.coords is None
    np.testing.assert_array_equal(tensor.features, features)  # pyright: ignore[reportArgumentType]
    torch.save({"feats": torch.ones(2, 3, dtype=torch.bfloat16), "coords": torch.ones(2, 2)},
               tmp_path / "d.pt")  # fmt: skip
    assert read_trident(tmp_path / "d.pt").coords is not None
    with pytest.raises(SlideError, match="expected coords .* got only features"):
        read_coords(tmp_path / "clam/pt_files/b.pt")


class Harm:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("harmed",)


def test_hostile_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert reason(tmp_path / "none.h5") == "missing"
    (tmp_path / "a.csv").touch()
    assert reason(tmp_path / "a.csv") == "unsupported"
    with h5py.File(tmp_path / "huge.h5", "w") as file:
        file.create_dataset("features", (10**9, 1024), "f4", chunks=(1, 1024))
    assert reason(tmp_path / "huge.h5") == "too-large"
    with h5py.File(tmp_path / "group.h5", "w") as file:
        file.create_group("features")
    assert reason(tmp_path / "group.h5") == "unsupported"
    for name, features, coords in (
        ("slide", np.ones(8), None), ("cube", np.ones((2, 2, 2)), None), ("neither", None, None),
        ("text", np.array([[b"a"]]), None), ("far", np.ones((1, 2)), np.array([[0, 2**40]])),
        ("wide", np.ones((1, 2)), np.zeros((1, 3))), ("nan", None, np.array([[0, np.nan]])),
    ):  # fmt: skip
        assert reason(write_trident(tmp_path / f"{name}.h5", features, coords)) == "unsupported"
    assert reason(write_trident(tmp_path / "few.h5", np.ones((2, 2)))) == "unreadable"
    for harm in (tmp_path / "harm.pt", tmp_path / "harm.npz"):
        if harm.suffix == ".pt":
            torch.save(Harm(), harm)
        else:
            np.savez(harm, features=np.array([Harm()], object))
        assert reason(harm) == "unreadable"
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Harm()))
    assert reason(tmp_path / "raw.pt") == "unreadable"
    assert not (tmp_path / "harmed").exists()
    np.savez_compressed(tmp_path / "bomb.npz", features=np.zeros((40_000, 1000), np.float32))
    assert reason(tmp_path / "bomb.npz") == "too-large"
    torch.save([1, 2], tmp_path / "list.pt")
    assert reason(tmp_path / "list.pt") == "unsupported"
    draw = np.random.default_rng(0)
    np.savez(tmp_path / "whole.npz", features=numbers(3, 4), coords=PLACES)
    torch.save(torch.ones(3, 4), tmp_path / "whole.pt")
    write_trident(tmp_path / "whole.h5", numbers(3, 4))
    for suffix in ("h5", "pt", "npz"):
        data = (tmp_path / f"whole.{suffix}").read_bytes()
        mutated = tmp_path / f"mutated.{suffix}"
        for turn in range(20):
            content = bytearray(data[: int(draw.integers(len(data)))] if turn % 2 else data)
            for at in draw.integers(max(1, len(content)), size=8):
                if content:
                    content[at] = int(draw.integers(256))
            mutated.write_bytes(content)
            with suppress(SlideError):
                read_trident(mutated)


def test_import(tmp_path: Path) -> None:
    folder, out = tmp_path / "trident", tmp_path / "out"
    for site in ("x", "y"):
        write_trident(folder / site / "s.h5", numbers(3, 4))
    write_trident(folder / "empty.h5", np.zeros((0, 4)), PLACES[:0])
    write_trident(folder / "wide.h5", np.ones((3, 5)))
    write_trident(folder / "large.h5", np.full((3, 4), 1e6))
    (folder / "broken.h5").write_bytes(b"nothing")
    store = import_features(folder, out, encoder="uni_v1")
    assert [slide.attrs["name"] for slide in store.values()] == ["empty.h5", "x/s.h5", "y/s.h5"]
    assert {note["name"]: note["reason"] for note in store.failed.values()} == {
        "broken.h5": "unreadable", "large.h5": "encoder", "wide.h5": "unsupported",
    }  # fmt: skip
    slide = store["x/s.h5"]
    np.testing.assert_array_equal(slide.features, numbers(3, 4))
    np.testing.assert_array_equal(slide.coords, PLACES)
    assert slide.tissue.tolist() == [1, 1, 1]
    assert slide.thumb is slide.mask is None
    assert (slide.attrs["mpp"], slide.attrs["footprint_px"]) == (None, 512)
    assert slide.attrs["imported"]["level0_magnification"] == 40
    assert store.verify() == []

    before = tree(out)
    assert import_features(folder, out, encoder="uni_v1").failed.keys() == store.failed.keys()
    assert all(
        tree(out)[name] == text for name, text in before.items() if name.startswith("slides/")
    )
    assert {note["attempts"] for note in store.failed.values()} == {2}
    write_trident(folder / "wide.h5", np.ones((3, 4)))
    assert len(import_features(folder, out, encoder="uni_v1")) == 4
    assert len(store.failed) == 2
    with pytest.raises(StoreError, match=r"two files of one name, .*x.s\.h5 and .*y.s\.h5"):
        import_features([folder / "x/s.h5", folder / "y/s.h5"], tmp_path / "o", encoder="e")
    with pytest.raises(StoreError, match=r"expected files of features .* got none"):
        (tmp_path / "o").mkdir()
        import_features(tmp_path / "o", tmp_path / "o", encoder="e")
    with pytest.raises(StoreError, match=r"no file has features: .*broken\.h5"):
        import_features(folder / "broken.h5", tmp_path / "o", encoder="e")


def test_import_of_clam(tmp_path: Path) -> None:
    write_clam(tmp_path / "clam", "a", numbers(3, 4))
    write_clam(tmp_path / "clam", "b", numbers(3, 4) + 1, h5=False)
    features = [tmp_path / "clam" / part for part in ("h5_files", "pt_files")]
    store = import_features(tmp_path / "clam", tmp_path / "one", encoder="e")
    assert [slide.attrs["name"] for slide in store.values()] == ["h5_files/a.h5", "pt_files/b.pt"]
    assert [note["name"] for note in store.failed.values()] == ["patches/a.h5", "patches/b.h5"]
    assert store["b"].attrs["coords"] == "absent"
    assert (store["b"].coords == -1).all()

    store = import_features(
        features[1], tmp_path / "two", encoder="e", coords=tmp_path / "clam" / "patches"
    )
    assert store.failed == {}
    for name in ("a", "b"):
        np.testing.assert_array_equal(store[name].coords, PLACES)
        assert store[name].attrs["footprint_px"] == 1024
    (tmp_path / "clam/patches/a.h5").unlink()
    store = import_features(
        features[1], tmp_path / "three", encoder="e", coords=tmp_path / "clam" / "patches"
    )
    assert ["no coordinates of it" in note["message"] for note in store.failed.values()] == [True]


def test_export_is_read_again(tmp_path: Path) -> None:
    store = FeatureStore(Path(__file__).parent / "golden" / "store-v1", "stain-stats")
    slide = store["tissue"]
    paths = {kind: export(store, "tissue", tmp_path, kind) for kind in ("npz", "h5", "pt")}
    assert {path.name for path in tmp_path.iterdir()} == {"tissue.npz", "tissue.h5", "tissue.pt"}
    with np.load(paths["npz"]) as archive:
        for name in ("features", "coords", "tissue", "flags"):
            np.testing.assert_array_equal(archive[name], getattr(slide, name))
    patches = read_trident(paths["h5"])
    np.testing.assert_array_equal(patches.features, slide.bag()[0])  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(patches.coords, slide.bag()[1])  # pyright: ignore[reportArgumentType]
    assert patches.footprint_px == 1024
    tensor = torch.load(paths["pt"], weights_only=True)
    assert tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor, slide.bag()[0])
    assert read_trident(export(store, "blank", tmp_path, "h5")).features.shape == (0, 6)  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(StoreError, match="no slide 'tisue'.*did you mean 'tissue'"):
        export(store, "tisue", tmp_path)
    with pytest.raises(StoreError, match="kind: expected npz, h5 or pt, got 'csv'"):
        export(store, "tissue", tmp_path, "csv")
