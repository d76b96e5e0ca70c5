"""Which files of folders and lists are slides, under which names, and what is not taken."""

import itertools
import json
import os
from pathlib import Path

import pytest
from motet import cli
from motet.cli.tile import notes
from motet.io import FeatureStore, SlideError
from motet.io.tiling.find_slides import find_slides

from .slides import make_pyramid


def search(*paths: Path) -> tuple[dict[str, Path], dict[str, str]]:
    not_taken: dict[str, str] = {}
    slides = find_slides(paths, not_taken=not_taken)
    return {slide.name: slide.path for slide in slides}, not_taken


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_what_is_not_taken_has_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.svs", "b.vsi", "sub/c.VSI", "README", "closed/d.svs", ".hidden.svs")
    touch(tmp_path, "m.mrxs", "m/Data0000.dat", "m/Slidedat.ini", "other/x.dat")
    touch(tmp_path, "store/run.json", "store/slides/x.png", "store/leases/x", "store/report/y.png")
    (tmp_path / "gone.svs").symlink_to("nothing")
    (tmp_path / "itself.svs").symlink_to("itself.svs")
    os.mkfifo(tmp_path / "pipe.svs")
    listdir = os.listdir

    def closed(path: Path) -> list[str]:  # root may read any folder
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", closed)
    slides, not_taken = search(tmp_path)
    assert list(slides) == ["a.svs", "m.mrxs"]
    assert {str(Path(path).relative_to(tmp_path)): why for path, why in not_taken.items()} == {
        "README": "no extension",
        "b.vsi": "unknown extension .vsi",
        "closed": "cannot be read: Permission denied",
        "gone.svs": "a link to nothing",
        "itself.svs": "a link to nothing",
        "other/x.dat": "unknown extension .dat",
        "pipe.svs": "a pipe or device",
        "sub/c.VSI": "unknown extension .vsi",
    }


@pytest.mark.parametrize("name", ["pipe.svs", "pipe.txt", "pipe"])
def test_a_pipe_that_is_named_is_refused(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(SlideError, match="expected a file or folder, got a pipe or device"):
        find_slides([tmp_path / name])


def test_a_file_that_is_reached_twice_is_one_slide(tmp_path: Path) -> None:
    """Its name does not depend on the order of the arguments."""
    touch(tmp_path, "all/sub/a.svs", "all/sub/b.svs", "list.txt")
    (tmp_path / "list.txt").write_text("all/sub/b.svs\n")
    (tmp_path / "all" / "z.svs").symlink_to("sub/a.svs")
    (tmp_path / "all" / "sub" / "0.svs").symlink_to("b.svs")
    arguments = [tmp_path / "all", tmp_path / "all" / "sub" / "a.svs", tmp_path / "list.txt"]
    for order in itertools.permutations(arguments):
        slides, not_taken = search(*order)
        assert list(slides) == ["all/sub/b.svs", "sub/a.svs"]
        assert slides["sub/a.svs"] == tmp_path / "all" / "sub" / "a.svs"
        assert not_taken == {
            str(tmp_path / "all" / "z.svs"): "the same file as 'sub/a.svs'",
            str(tmp_path / "all" / "sub" / "0.svs"): "the same file as 'all/sub/b.svs'",
        }
    assert search(tmp_path / "all", tmp_path / "all")[0] == {
        name: tmp_path / "all" / name for name in ("sub/a.svs", "sub/b.svs")
    }


def test_links_to_folders_take_no_names(tmp_path: Path) -> None:
    """Slides of a linked folder have the names of the folder itself, if that is searched."""
    touch(tmp_path, "top/a/1.svs", "top/b/2.svs", "outside/3.svs")
    (tmp_path / "top" / "a" / "loop").symlink_to("../b")
    (tmp_path / "top" / "b" / "back").symlink_to("..")
    (tmp_path / "top" / "0").symlink_to("../outside")
    assert list(search(tmp_path / "top")[0]) == ["0/3.svs", "a/1.svs", "b/2.svs"]
    assert list(search(tmp_path / "top" / "a")[0]) == [
        "1.svs", "loop/2.svs", "loop/back/0/3.svs",
    ]  # fmt: skip
    (tmp_path / "link").symlink_to("top")
    assert list(search(tmp_path / "link")[0]) == ["0/3.svs", "a/1.svs", "b/2.svs"]
    assert search(tmp_path / "top")[1] == {}


def test_the_command_tells_what_is_not_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr by reason, in the JSON, in the store; with --strict by the exit code."""
    folder, out = tmp_path / "slides", tmp_path / "store"
    touch(folder, "x.vsi", "deep/y.vsi")
    os.mkfifo(folder / "pipe.tif")
    make_pyramid(folder / "a.tif", size=(300, 300), factors=(1,))
    command = ["tile", str(folder), "--out", str(out), "--encoder", "stain-stats", "--workers", "0"]
    command += ["--downsample", "2", "--tile-px", "64", "--no-report"]
    assert cli.main(command) == 0
    printed = capsys.readouterr()
    assert sorted(printed.err.splitlines()) == [
        f"not taken: 1 path (the first: {folder}/pipe.tif): a pipe or device",
        f"not taken: 2 paths (the first: {folder}/x.vsi): unknown extension .vsi",
    ]
    assert "; 3 not taken: " in printed.out
    assert cli.main([*command, "--strict", "--json"]) == 3
    not_taken = json.loads(capsys.readouterr().out)["not_taken"]
    assert not_taken[f"{folder}/pipe.tif"] == "a pipe or device"
    assert FeatureStore(out).not_taken == not_taken
    assert FeatureStore(out).verify() == []
    assert cli.main(["store", "ls", str(out)]) == 0
    assert f"not taken: {folder}/x.vsi: unknown extension .vsi" in capsys.readouterr().out
    for path in (folder / "x.vsi", folder / "deep" / "y.vsi", folder / "pipe.tif"):
        path.unlink()
    assert cli.main([*command, "--strict"]) == 0
    assert FeatureStore(out).not_taken == {}
    (folder / "a.tif").rename(folder / "a.vsi")
    assert cli.main(command) == 2
    assert f"no slide in [{str(folder)!r}]; not taken: " in capsys.readouterr().err


def test_many_reasons_are_few_lines() -> None:
    lines = notes({f"{i}.svs": f"the same file as '{i}'" for i in range(99)}, ["a", "b"])
    assert len(lines) == 11
    assert lines[-2:] == [
        "not taken: 90 more reasons, in not_taken.json of the store",
        "no mask: 2 slides (the first: a); tissue is searched on them",
    ]
