"""Pseudonyms: no name of a file enters a store, and a later call finds the same keys."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from motet import cli
from motet.io import FeatureStore, StoreError, tile_slides
from motet.io.store.pseudonyms import pseudonymise, withhold_names
from motet.io.store.source import Source
from PIL import Image

from .slides import draw_tissue, make_pyramid
from .store_helpers import tree

OPTIONS: dict[str, Any] = {
    "encoder": "stain-stats", "downsample": 2, "tile_px": 64, "workers": 0,
}  # fmt: skip
NAMES = ("JaneDoe", "Ward-Seven", "S99-1234", "broken-one")


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose names must not be seen: three slides, one empty, one that is no image."""
    folder = tmp_path_factory.mktemp("JaneDoe")
    (folder / "Ward-Seven").mkdir()
    for n in range(2):
        path = folder / "Ward-Seven" / f"S99-1234-{n}.tif"
        make_pyramid(path, image=draw_tissue(512, 512, seed=n), factors=(1, 4), mpp=None)
    blank = np.full((512, 512, 3), 242, np.uint8)
    make_pyramid(folder / "S99-1234-blank.tif", image=blank, factors=(1, 4))
    (folder / "broken-one.svs").write_bytes(b"II*\0 JaneDoe")
    (folder / "S99-1234.vsi").write_bytes(b"not taken")
    return folder


def names_in(folder: Path) -> list[tuple[str, str]]:
    """Return each name of NAMES that a path or a file below a folder holds."""
    return [
        (name, str(path))
        for path in folder.rglob("*")
        for name in NAMES
        if name in str(path.relative_to(folder))
        or (path.is_file() and name.encode() in path.read_bytes())
    ]


@pytest.mark.parametrize("workers", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_no_name_of_a_file_enters_the_store_its_report_or_its_exports(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    out, file, masks = tmp_path / "out", tmp_path / "secret" / "names.json", tmp_path / "masks"
    file.parent.mkdir()
    masks.mkdir()
    Image.fromarray(np.full((64, 64), 255, np.uint8)).save(masks / "S99-1234-0.png")
    (tmp_path / "mpp.csv").write_text("slide,mpp\nWard-Seven/S99-1234-1.tif,0.5\n")
    command = [
        "tile", str(slides), "--out", str(out), "--encoder", "stain-stats", "--downsample", "2",
        "--tile-px", "64", "--masks", str(masks), "--slide-mpp", str(tmp_path / "mpp.csv"),
        "--pseudonymise", str(file), "--workers", workers,
    ]  # fmt: skip
    assert cli.main(command) == 3
    assert "broken-one.svs" in capsys.readouterr().err  # the terminal is the user's
    for kind in ("npz", "h5", "pt"):
        assert (
            cli.main(["store", "export", str(out), "--out", f"{out}/{kind}", "--format", kind]) == 0
        )
    assert names_in(out) == []
    assert len(list((out / "npz").iterdir())) == 3
    store = FeatureStore(out)
    assert store.verify() == []
    known = json.loads(file.read_text())["slides"]
    assert {*store, *store.failed} == {*known}
    assert sorted(entry["name"] for entry in known.values()) == [
        "S99-1234-blank.tif", "Ward-Seven/S99-1234-0.tif", "Ward-Seven/S99-1234-1.tif",
        "broken-one.svs",
    ]  # fmt: skip
    assert all(Path(entry["path"]).is_file() for entry in known.values())
    by_name = {entry["name"]: key for key, entry in known.items()}
    # The user's table still applies, by the real name.
    assert store[by_name["Ward-Seven/S99-1234-1.tif"]].attrs["mpp_source"] == "table"
    (note,) = store.failed.values()
    assert note["message"] == "not an image, or so damaged that no reader opens it"
    index = (out / "report" / "index.html").read_text()
    assert all(key in index for key in known)
    assert (tmp_path / "secret" / "names.json.logs").is_dir()


def test_a_later_call_finds_the_same_keys(slides: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "names.json"
    copy = tmp_path / "slides"
    shutil.copytree(slides, copy, ignore=shutil.ignore_patterns("*-1.tif"))
    first = tile_slides(copy, out, pseudonymise=file, **OPTIONS)
    assert (first.slides, first.done, first.empty, len(first.failed)) == (3, 1, 1, 1)
    before, secret = tree(out / "slides"), json.loads(file.read_text())["secret"]
    if os.name == "posix":
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert secret not in "".join(path.read_text("latin1") for path in out.rglob("*.json"))
    again = tile_slides(copy, out, pseudonymise=file, **OPTIONS)
    assert (again.patches, again.done, again.failed.keys()) == (0, 1, first.failed.keys())
    assert tree(out / "slides") == before
    # Touched, the files are recognised by their content; a new slide is added.
    for path in copy.rglob("*.tif"):
        os.utime(path, (1, 1))
    shutil.copy(slides / "Ward-Seven" / "S99-1234-1.tif", copy / "Ward-Seven")
    more = tile_slides(copy, out, pseudonymise=file, **OPTIONS)
    assert (more.slides, more.done) == (4, 2)
    after = tree(out / "slides")
    assert {name: after[name] for name in before} == before
    assert len(json.loads(file.read_text())["slides"]) == 4
    # In another store the same slides have the same pseudonyms, with another file they do not.
    for name, shared in (("names.json", True), ("other.json", False)):
        other = tmp_path / f"store of {name}"
        tile_slides(slides, other, pseudonymise=tmp_path / name, **OPTIONS)
        assert ({*FeatureStore(out)} == {*FeatureStore(other)}) is shared


def test_another_file_of_pseudonyms_is_refused(slides: Path, tmp_path: Path) -> None:
    one, plain, file = tmp_path / "one", tmp_path / "plain", tmp_path / "names.json"
    slide = slides / "Ward-Seven" / "S99-1234-0.tif"
    tile_slides(slide, one, pseudonymise=file, **OPTIONS)
    tile_slides(slide, plain, **OPTIONS)
    with pytest.raises(StoreError, match=r"have pseudonyms: pass their file as pseudonymise"):
        tile_slides(slide, one, **OPTIONS)
    with pytest.raises(StoreError, match="begun without pseudonyms"):
        tile_slides(slide, plain, pseudonymise=file, **OPTIONS)
    with pytest.raises(StoreError, match=r"new.json: no such file, but .* exists: pass the file"):
        tile_slides(slide, one, pseudonymise=tmp_path / "new.json", **OPTIONS)
    tile_slides(slide, tmp_path / "two", pseudonymise=tmp_path / "two.json", **OPTIONS)
    listed = (tmp_path / "two.json").read_bytes()
    with pytest.raises(StoreError, match="begun with another file of pseudonyms"):
        tile_slides(slides, one, pseudonymise=tmp_path / "two.json", **OPTIONS)
    assert (tmp_path / "two.json").read_bytes() == listed
    with pytest.raises(ValueError, match="expected a file outside of the store"):
        tile_slides(slide, one, pseudonymise=one / "names.json", **OPTIONS)
    for content in (b"II*\0", b"{}", b'{"format": "motet-pseudonyms", "version": 2}'):
        other = tmp_path / "other.json"
        other.write_bytes(content)
        with pytest.raises(StoreError, match=r"other.json: (cannot be read|expected a file of)"):
            tile_slides(slide, tmp_path / "three", pseudonymise=other, **OPTIONS)
        assert other.read_bytes() == content
    assert not (tmp_path / "three").exists()


def test_pseudonyms_are_keys_and_differ(tmp_path: Path) -> None:
    names = [f"{'long' * 60}-{n}.svs" for n in range(300)] + ["a/x.svs", "b/x.svs", "\udcff.svs"]
    sources = [Source(tmp_path / name, name) for name in names]
    named = pseudonymise(sources, tmp_path / "names.json", tmp_path / "store")
    keys = [source.key for source in named.sources]
    assert len({*keys}) == len(names)
    assert all(key[:6] == "slide-" and len(key) == 22 for key in keys)
    again = pseudonymise(sources[::-1], tmp_path / "names.json", tmp_path / "store")
    assert [source.key for source in again.sources] == keys[::-1]
    assert again.fingerprint == named.fingerprint


@pytest.mark.slow
def test_commands_at_the_same_time_share_one_secret(slides: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "names.json", tmp_path / "out"
    code = (
        "import sys; from motet.io import tile_slides; part = int(sys.argv[4]);"
        "tile_slides(*sys.argv[1:3], pseudonymise=sys.argv[3], shard=(part, 2), workers=0,"
        "encoder='stain-stats', downsample=2, tile_px=64)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, slides, out, file, str(part)])
        for part in range(2)
    ]
    assert [process.wait() for process in running] == [0, 0]
    known = json.loads(file.read_text())["slides"]
    store = FeatureStore(out)
    assert len(known) == 4
    assert {*store, *store.failed} == {*known}
    assert not list(tmp_path.glob("*.lease"))


def test_texts_with_names_are_withheld() -> None:
    source = Source(Path("/data/ward/S1.svs"), "ward/S1.svs", "slide-1")
    value = {"a": "masks/S1.geojson", "b": [1, None, "S12", "of ward 7"], "c": {"d": "aperio"}}
    assert withhold_names(value, source) == {
        "a": "withheld", "b": [1, None, "S12", "withheld"], "c": {"d": "aperio"}
    }  # fmt: skip
