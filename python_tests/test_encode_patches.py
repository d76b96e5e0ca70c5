"""Folders of patches that were cut before: one bag each, with the positions of the names."""

import json
from pathlib import Path

import numpy as np
import pytest
from motet import cli
from motet.io import FeatureStore, encode_patches, load_encoder
from PIL import Image

from .slides import Pixels, draw_tissue
from .tiling_helpers import Quiet, content


def cut(folder: Path, name: str, side: int = 64, seed: int = 0) -> dict[tuple[int, int], Pixels]:
    """Write the 3 x 2 patches of a picture; return their pixels by (x, y)."""
    folder.mkdir(parents=True, exist_ok=True)
    image = draw_tissue(3 * side, 2 * side, seed=seed)
    patches = {}
    for x in range(0, 3 * side, side):
        for y in range(0, 2 * side, side):
            patches[x, y] = image[y : y + side, x : x + side]
            Image.fromarray(patches[x, y]).save(folder / f"{name.format(x=x, y=y)}.png")
    return patches


@pytest.mark.parametrize("name", ["case7_x{x}_y{y}", "{x},{y}", "patch-X{x}-Y{y}_40x"])
def test_a_folder_is_a_bag(tmp_path: Path, name: str) -> None:
    patches = cut(tmp_path / "patches" / "case7", name)
    encoded = encode_patches(
        tmp_path / "patches", tmp_path / "store", encoder="stain-stats", batch=4
    )
    assert (encoded.bags, encoded.done, encoded.failed, encoded.patches) == (1, 1, {}, 6)
    store = FeatureStore(tmp_path / "store")
    slide = store["case7"]
    assert slide.coords.tolist() == [[x, y] for y in (0, 64) for x in (0, 64, 128)]
    pixels = np.stack([patches[x, y] for x, y in slide.coords.tolist()])
    expected = load_encoder("stain-stats").encode(pixels)
    np.testing.assert_array_equal(slide.features, expected.astype(np.float16))
    assert store.verify() == []
    assert (
        encode_patches(tmp_path / "patches", tmp_path / "store", encoder="stain-stats").patches == 0
    )


@pytest.mark.parametrize("name", ["{x}_{y}", "day_2019_12_{x}{y}", "x{x}"])
def test_names_without_positions(tmp_path: Path, name: str) -> None:
    """Two numbers are no position, nor is one, nor a position that two images have."""
    folder = tmp_path / "case7"
    cut(folder, name)
    (folder / "x1_y1.png").hardlink_to(next(folder.iterdir()))
    (folder / "b_x1_y1.png").hardlink_to(next(folder.iterdir()))
    encode_patches(folder, tmp_path / "store", encoder="stain-stats")
    slide = FeatureStore(tmp_path / "store")["case7"]
    assert (slide.coords == -1).all()
    assert slide.attrs["coords"] == "absent"
    assert len(slide) == len(list(folder.iterdir()))


def test_damage_changes_and_a_further_encoder(tmp_path: Path) -> None:
    folder, out = tmp_path / "patches", tmp_path / "store"
    cut(folder / "a", "x{x}_y{y}", seed=1)
    cut(folder / "b" / "deep", "x{x}_y{y}", side=32, seed=2)
    (folder / "a" / "x64_y64.png").write_bytes(b"")
    (folder / "a" / "notes.md").touch()
    (folder / "c").mkdir()
    (folder / "c" / "x.png").write_bytes(b"no image")
    encoded = encode_patches(folder, out, encoder="stain-stats")
    assert (encoded.bags, encoded.done, encoded.patches) == (3, 2, 11)
    assert encoded.not_taken == {str(folder / "a" / "notes.md"): "no image"}
    assert [*encoded.failed.values()] == ["none of 1 images can be read"]
    store = FeatureStore(out)
    assert [slide.attrs["name"] for slide in store.values()] == ["a", "b/deep"]
    assert store["a"].corrupt.tolist() == [False] * 4 + [True, False]
    further = encode_patches(folder, out, encoder=Quiet())
    assert (further.done, further.patches) == (2, 11)
    assert FeatureStore(out).verify() == []
    before = content(out)
    cut(folder / "a", "x{x}_y{y}", seed=3)
    assert encode_patches(folder, out, encoder="stain-stats").patches == 6
    assert content(out) != before
    assert not FeatureStore(out, "stain-stats")["a"].corrupt.any()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut(tmp_path / "patches" / "a", "x{x}_y{y}")
    (tmp_path / "patches" / "b").mkdir()
    (tmp_path / "patches" / "b" / "x.png").touch()
    command = ["tile", str(tmp_path / "patches"), "--bags", "folder", "--out"]
    command += [str(tmp_path / "store"), "--encoder", "stain-stats"]
    assert cli.main([*command, "--json"]) == 3
    end = json.loads(capsys.readouterr().out)
    assert (end["bags"], end["done"], end["patches"]) == (2, 1, 6)
    assert (tmp_path / "store" / "report" / "index.html").exists()
    assert cli.main([*command, "--no-report"]) == 3
    assert capsys.readouterr().out.startswith("2 bags: 1 done, 1 failed; 0 patches")
    for option in (["--mpp", "1"], ["--tile-px", "64"], ["--workers", "2"], ["--redo"]):
        assert cli.main([*command, *option]) == 2
        assert f"{option[0]}: one process takes the patches" in capsys.readouterr().err
    assert cli.main(["tile", str(tmp_path), *command[4:], "--bags", "folder"]) == 3
