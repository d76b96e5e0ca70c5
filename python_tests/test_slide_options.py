"""Options that change the result of a slide: recorded, compared on resume, done again by redo."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from motet import cli
from motet.io import FeatureStore, StoreError, tile_slides
from motet.io.store.source import Source
from motet.io.tiling.mask_files import find_masks
from PIL import Image

from .slides import make_pyramid
from .tiling_helpers import OPTIONS, Quiet, content


def draw_mask(path: Path, left: int) -> None:
    """Write a mask whose left half, or `left` of 64 columns, is tissue."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :left] = 255
    Image.fromarray(mask).save(path)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make two slides of one stem in two folders, and a third one, of 36 patches each."""
    folder = tmp_path_factory.mktemp("slides")
    for i, name in enumerate(("a/slide001", "b/slide001", "b/slide002")):
        (folder / name).parent.mkdir(exist_ok=True)
        make_pyramid(folder / f"{name}.tif", size=(768, 768), factors=(1, 4), mpp=None, seed=i)
    return folder


@pytest.fixture
def cohort(slides: Path, tmp_path: Path) -> Path:
    shutil.copytree(slides, tmp_path / "slides")
    return tmp_path


def tile(cohort: Path, out: str = "store", **options: Any) -> dict[str, Any]:
    """Tile the cohort; return the attributes of each slide by name."""
    tile_slides(cohort / "slides", cohort / out, workers=0, **{**OPTIONS, **options})
    return {slide.attrs["name"]: slide.attrs for slide in FeatureStore(cohort / out).values()}


def test_masks_go_to_their_slides(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By relative path, then by a stem that one slide has; slides without a mask are named."""
    masks = cohort / "masks"
    draw_mask(masks / "a" / "slide001.png", 16)
    draw_mask(masks / "slide001.png", 64)  # the stem of two slides: it belongs to neither
    draw_mask(masks / "slide002.png", 32)
    command = ["tile", str(cohort / "slides"), "--out", str(cohort / "store"), "--masks"]
    command += [str(masks), "--encoder", "stain-stats", "--downsample", "2", "--tile-px", "64"]
    assert cli.main([*command, "--workers", "0", "--no-report", "--json"]) == 0
    printed = capsys.readouterr()
    assert "no mask: 1 slide (the first: b/slide001.tif)" in printed.err
    assert json.loads(printed.out)["without_mask"] == ["b/slide001.tif"]
    slides = {slide.attrs["name"]: slide for slide in FeatureStore(cohort / "store").values()}
    used = {name: slide.attrs["mask"] for name, slide in slides.items()}
    assert used == {
        "a/slide001.tif": "a/slide001.png", "b/slide001.tif": None,
        "b/slide002.tif": "slide002.png",
    }  # fmt: skip
    assert slides["a/slide001.tif"].attrs["counts"]["patches"] == 12
    assert slides["b/slide002.tif"].attrs["counts"]["patches"] == 18
    assert slides["b/slide001.tif"].attrs["counts"]["patches"] not in (12, 18, 36)


def test_names_never_leave_the_folder_of_masks(tmp_path: Path) -> None:
    draw_mask(tmp_path / "outside.png", 8)
    draw_mask(tmp_path / "masks" / "x.png", 8)
    (tmp_path / "masks" / "x.geojson").touch()
    names = ["../outside.svs", str(tmp_path / "outside.tif"), "deep/x.svs"]
    slides = [Source(Path(name), name) for name in names]
    assert find_masks(tmp_path / "masks", slides) == {"deep/x.svs": "x.geojson"}


def test_the_same_options_again_do_nothing(cohort: Path) -> None:
    draw_mask(cohort / "masks" / "slide002.png", 32)
    options = {
        "masks": cohort / "masks",
        "slide_mpp": 0.5,
        "reader": "tifffile",
        "max_damaged": 0.2,
    }
    tile(cohort, **options)
    before = content(cohort / "store")
    (cohort / "masks").rename(cohort / "moved")
    options["masks"] = cohort / "moved"
    assert tile(cohort, **options)["b/slide002.tif"]["counts"]["patches"] == 18
    # What gives the same result is the same: the reader that was used, a share without damage.
    tile(cohort, **{**options, "max_damaged": 0.1})
    assert content(cohort / "store") == before


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ({}, {"masks": 32}, r"mask: 1 slide \(the first: b/slide002.tif\) .* with none, got slide"),
        pytest.param(
            {"masks": 32},
            {},
            "mask: 1 slide .* with slide002.png, got none",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"masks": 32},
            {"masks": 48},
            "mask: 1 slide .* with slide002.png, got another slide002",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {},
            {"slide_mpp": 0.5},
            r"slide_mpp: 3 slides .* with none, got 0.5",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"slide_mpp": 0.5},
            {"slide_mpp": {"slide002": 0.25}},
            r"slide_mpp: 3 .*0.5, got none",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {},
            {"reader": "tifffile"},
            "reader: 3 slides .* with auto, got tifffile",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {},
            {"reader": "tifffile", "slide_mpp": 1.0},
            "reader: 3 slides.*; slide_mpp: 3 slides",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {},
            {"min_tissue": 0.5},
            "tiling.min_tissue: this store was begun with 0.1, got 0.5",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_options_that_give_another_result_are_refused(
    cohort: Path, first: dict[str, Any], then: dict[str, Any], message: str
) -> None:
    def options(changes: dict[str, Any]) -> dict[str, Any]:
        if "masks" not in changes:
            return changes
        draw_mask(cohort / "masks" / "slide002.png", changes["masks"])
        return {**changes, "masks": cohort / "masks"}

    tile(cohort, **options(first))
    before = content(cohort / "store")
    for more in ({}, {"encoder": Quiet()}):  # a further encoder takes the stored patches
        with pytest.raises(StoreError, match=message) as error:
            tile(cohort, **options(then), **more)
        if "tiling" not in message:
            assert "give the same options, use another folder, or do these slides" in str(error)
    assert content(cohort / "store") == before
    if "tiling" in message:
        return
    fresh = tile(cohort, "fresh", **options(then))
    tile(cohort, redo=True, **options(then))
    assert content(cohort / "store") == content(cohort / "fresh")
    tile(cohort, redo=True, **options(then))
    assert tile(cohort, **options(then)) == fresh


def test_damage_that_is_now_too_much(cohort: Path) -> None:
    """With a lower max_damaged, only slides that would fail now are refused; redo fails them."""
    path = cohort / "slides" / "b" / "slide002.tif"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.6)])
    attrs = tile(cohort, max_damaged=1.0)
    counts = attrs["b/slide002.tif"]["counts"]
    share = counts["corrupt"] / counts["patches"]
    assert 0.1 < share < 1
    tile(cohort, max_damaged=share + 0.01)
    with pytest.raises(StoreError, match=r"max_damaged: 1 slide \(the first: b/slide002.tif\)"):
        tile(cohort, max_damaged=0.05)
    folder = cohort / "slides"
    tiled = tile_slides(folder, cohort / "store", redo=True, max_damaged=0.05, workers=0, **OPTIONS)
    assert (tiled.done, [key[:8] for key in tiled.failed]) == (2, ["slide002"])
    assert [note["reason"] for note in FeatureStore(cohort / "store").failed.values()] == [
        "damaged"
    ]


def test_stores_without_recorded_options_are_not_refused(cohort: Path) -> None:
    """A store of version 1 from before; with redo its slides count as made by the defaults."""
    tile(cohort)
    for path in (cohort / "store" / "slides").glob("*/zarr.json"):
        meta = json.loads(path.read_text())
        del meta["attributes"]["options"]
        del meta["attributes"]["mask"]
        path.write_text(json.dumps(meta))
    before = content(cohort / "store")
    draw_mask(cohort / "masks" / "slide002.png", 32)
    tile(cohort, masks=cohort / "masks")
    assert content(cohort / "store") == before
    assert FeatureStore(cohort / "store").verify() == []
    assert (
        tile(cohort, redo=True, masks=cohort / "masks")["b/slide002.tif"]["counts"]["patches"] == 18
    )


def test_redo_removes_the_features_of_other_encoders(cohort: Path) -> None:
    """They are of other patches. Their command adds them again."""
    tile(cohort)
    tile(cohort, encoder=Quiet())
    tile(cohort, redo=True, slide_mpp=0.5)
    store = FeatureStore(cohort / "store", "quiet")
    assert [slide.encoders for slide in store.values()] == [["stain-stats"]] * 3
    tile(cohort, encoder=Quiet(), slide_mpp=0.5)
    assert [slide.encoders for slide in store.values()] == [["quiet", "stain-stats"]] * 3
    assert store.verify() == []
