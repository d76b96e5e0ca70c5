"""Patches that are flagged as pen or blur, left out when slides are tiled or stores are read."""

from pathlib import Path

import numpy as np
import pytest
from motet.io import FLAGS, FeatureStore, tile_slides
from motet.io.store.foreign import export
from motet.io.tiling.grid import Tiling
from PIL import Image
from scipy import ndimage

OPTIONS = {"encoder": "stain-stats", "downsample": 1, "tile_px": 64, "workers": 0, "slide_mpp": 1.5}


def slide(folder: Path) -> Path:
    """Write a stained picture with a stroke of ink; its lower part is out of focus."""
    from skimage import data

    pixels = data.immunohistochemistry()
    pixels[320:] = ndimage.gaussian_filter(pixels, (8, 8, 0))[320:]
    pixels[100:160] = (40, 140, 60)
    folder.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / "a.png")
    return folder / "a.png"


def test_dropped_patches_are_not_embedded(tmp_path: Path) -> None:
    path = slide(tmp_path / "in")
    tile_slides(path, tmp_path / "all", **OPTIONS)
    every = FeatureStore(tmp_path / "all")["a"]
    flags = np.asarray(every.flags)
    assert (flags & FLAGS.PEN).any()
    assert (flags & FLAGS.BLUR).any()
    assert "dropped" not in every.attrs["counts"]
    for drop, bits in (("pen", FLAGS.PEN), (("blur", "pen"), FLAGS.PEN | FLAGS.BLUR)):
        out = tmp_path / f"{int(bits)}"
        tile_slides(path, out, drop=drop, **OPTIONS)
        store = FeatureStore(out)
        used = (flags & bits) == 0
        assert np.array_equal(store["a"].coords, every.coords[used])
        assert np.array_equal(store["a"].features, every.features[used])
        assert store["a"].attrs["counts"]["dropped"] == (~used).sum()
        assert store.run["tiling"]["drop"] == sorted([drop] if isinstance(drop, str) else drop)
        assert store.run["tiling_hash"] == Tiling(**store.run["tiling"]).hash
        assert store.verify() == []


def test_a_slide_whose_patches_are_all_dropped_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("motet.io.tiling.find_patches.BLUR_SHARE", 0.0)  # each patch is flagged
    tiled = tile_slides(slide(tmp_path / "in"), tmp_path / "out", drop=["blur"], **OPTIONS)
    assert (tiled.done, tiled.empty) == (0, 1)
    reason = FeatureStore(tmp_path / "out")["a"].attrs["reason"]
    assert reason == "all patches with tissue have a flag that is dropped"


@pytest.mark.parametrize("kind", ["npz", "h5", "pt"])
def test_flagged_patches_are_left_out_on_request(tmp_path: Path, kind: str) -> None:
    tile_slides(slide(tmp_path / "in"), tmp_path / "out", **OPTIONS)
    store = FeatureStore(tmp_path / "out")
    read = store["a"]
    used = (read.flags & (FLAGS.PEN | FLAGS.BLUR)) == 0
    assert 0 < used.sum() < len(read)
    features, coords = read.bag(drop=("pen", "blur"))
    assert np.array_equal(features, read.features[used].astype(np.float32))
    assert np.array_equal(coords, read.coords[used])
    assert len(read.bag()[0]) == len(read)
    for wrong in ("edge", ["corrupt"]):
        with pytest.raises(ValueError, match="drop: expected pen, blur, got"):
            read.bag(drop=wrong)

    from motet.io.store.foreign import read_trident

    file = read_trident(export(store, "a", tmp_path, kind, ("pen", "blur")))
    assert file.features is not None
    assert np.array_equal(np.asarray(file.features, np.float32), features)
    assert kind == "pt" or np.array_equal(file.coords, coords)


def test_commands_take_drop(tmp_path: Path) -> None:
    from motet.cli.entry import main

    path, out = slide(tmp_path / "in"), tmp_path / "out"
    tile = ["tile", str(path), "--encoder", "stain-stats", "--downsample", "1", "--tile-px", "64"]
    assert (
        main([*tile, "--out", str(out), "--slide-mpp", "1.5", "--drop", "pen", "--no-report"]) == 0
    )
    store = FeatureStore(out)
    assert store.run["tiling"]["drop"] == ["pen"]
    assert (store["a"].flags & FLAGS.BLUR).any()
    options = ["store", "export", str(out), "--out", str(tmp_path), "--drop", "blur"]
    assert main(options) == 0
    with np.load(tmp_path / "a.npz") as file:
        assert not (file["flags"] & (FLAGS.PEN | FLAGS.BLUR)).any()
