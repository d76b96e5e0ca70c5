"""What failed is listed per encoder: in the store, the table, the last line and the exit code."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from motet import cli
from motet.io import FeatureStore, tile_slides
from motet.io.store.failures import read_attempts

from .slides import make_pyramid
from .tiling_helpers import OPTIONS, NanOnce, Quiet, content

MORE = """
def mean(pixels):
    return pixels.reshape(len(pixels), -1).mean(1, dtype="f4")[:, None]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with three slides and the store of their features."""
    folder = tmp_path_factory.mktemp("tiled")
    (folder / "slides").mkdir()
    for i in range(3):
        make_pyramid(folder / "slides" / f"{i}.tif", size=(700, 700), factors=(1, 4), seed=i)
    assert tile_slides(folder / "slides", folder / "store", workers=0, **OPTIONS).done == 3
    return folder


@pytest.fixture
def tiled(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "tiled")


def test_a_further_encoder_that_fails_for_a_slide(tiled: Path) -> None:
    slides, out = tiled / "slides", tiled / "store"
    before = content(out)
    options: dict[str, Any] = {**OPTIONS, "encoder": NanOnce(), "workers": 0}
    again = tile_slides(slides, out, **options)
    assert (again.slides, again.done, len(again.failed)) == (3, 2, 1)
    (key,) = again.failed
    assert str(again).endswith("2 done, 1 failed")
    store = FeatureStore(out, "nan/once")
    assert list(store.failed) == [key]
    assert (store.failed[key]["encoder"], store.failed[key]["reason"]) == ("nan/once", "encoder")
    assert list(FeatureStore(out).failed) == [key], "of all encoders"
    assert FeatureStore(out, "stain-stats").failed == {}
    row = store.manifest().set_index("key").loc[key]
    assert (row["status"], row["encoders"], row["attempts"]) == ("ok", "stain-stats", 1)
    assert row["message"].startswith("nan/once: nan/once: feature 0 of patch 0 is nan")
    assert store.verify() == []
    assert {name: digest for name, digest in content(out).items() if name in before} | {
        "run.json": before["run.json"]
    } == before

    options["encoder"] = Quiet()
    options["encoder"].id = "nan/once"
    assert tile_slides(slides, out, **options).failed == {}
    assert FeatureStore(out).failed == {}
    assert not list((out / "failed").iterdir())


def test_a_slide_that_is_gone_when_a_further_encoder_comes(
    tiled: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command lists it, retries it once per call, and ends with exit code 3."""
    slides, out = tiled / "slides", tiled / "store"
    shutil.move(slides / "1.tif", tiled / "1.tif")
    (tiled / "list.txt").write_text("0.tif\n1.tif\n2.tif\n")
    shutil.move(tiled / "list.txt", slides / "list.txt")
    (tiled / "further.py").write_text(MORE)
    monkeypatch.syspath_prepend(tiled)
    monkeypatch.setenv("PYTHONPATH", str(tiled), prepend=os.pathsep)
    command = ["tile", str(slides / "list.txt"), "--out", str(out), "--no-report", "--workers", "0"]
    command += ["--encoder", "further:mean", "--downsample", "2", "--tile-px", "64"]
    for attempts in (1, 2):
        assert cli.main(command) == 3
        printed = capsys.readouterr()
        assert "3 slides: 2 done, 1 failed" in printed.out
        assert "no such file" in printed.err
        (count,) = read_attempts(out).values()
        assert count == attempts
    assert cli.main(["store", "ls", str(out)]) == 0
    listed = capsys.readouterr().out
    assert "failed: further:mean: no such file" in listed
    assert listed.endswith("; 1 failed for an encoder\n")
    assert cli.main(["store", "show", str(out), "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["failed"]["encoder"] == "further:mean"
    # The first encoder has all of it: for its command nothing has failed.
    first = [*command[:-5], "stain-stats", *command[-4:]]
    assert cli.main(first) == 0
    shutil.move(tiled / "1.tif", slides / "1.tif")
    assert cli.main(command) == 0


def test_a_changed_slide_that_fails_is_not_done(tiled: Path) -> None:
    """The store keeps the features of the old file, and says that the new one failed."""
    slides, out = tiled / "slides", tiled / "store"
    before = content(out)
    (slides / "1.tif").write_bytes(b"no slide any more")
    again = tile_slides(slides, out, workers=0, **OPTIONS)
    assert (again.done, len(again.failed)) == (2, 1)
    store = FeatureStore(out)
    assert [note["reason"] for note in store.failed.values()] == ["unreadable"]
    assert len(store) == 3
    assert {name: digest for name, digest in content(out).items() if name in before} == before
    make_pyramid(slides / "1.tif", size=(700, 700), factors=(1, 4), seed=7)
    assert tile_slides(slides, out, workers=0, **OPTIONS).failed == {}
    assert store.failed == {}


def test_failures_of_several_encoders_are_joined(tiled: Path) -> None:
    (tiled / "slides" / "1.tif").unlink()
    encoders = Quiet(), NanOnce()
    for encoder in encoders:
        options: dict[str, Any] = {**OPTIONS, "encoder": encoder, "workers": 0}
        listed = tiled / "slides" / "list.txt"
        listed.write_text("0.tif\n1.tif\n")
        tile_slides(listed, tiled / "store", **options)
    failed = FeatureStore(tiled / "store").failed
    by_name = {note["name"]: note for note in failed.values()}
    assert by_name["1.tif"]["encoder"] == "nan/once, quiet"
    assert by_name["1.tif"]["message"] == "no such file"
    assert by_name["0.tif"]["encoder"] == "nan/once"
