"""The commit protocol: what a store holds after commits, kills, full disks and rival workers."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from motet.io import FeatureStore, StoreError
from motet.io.errors import SlideError
from motet.io.store import disk
from motet.io.store.disk import clean
from motet.io.store.failures import note_failure
from motet.io.store.leases import Leases
from motet.io.store.source import describe
from motet.io.store.write import StoreWriter

from .conftest import ROOT, SOAK
from .store_helpers import TILING, Slide, numbers, put, spec, tree


@pytest.fixture
def source(tmp_path: Path) -> Slide:
    path = tmp_path / "a.svs"
    path.write_bytes(b"pixels")
    return Slide(path, "a.svs")


def opened(folder: Path, name: str = "made", width: int = 3, **tiling: object) -> StoreWriter:
    return StoreWriter.open(folder, {**TILING, **tiling}, "0" * 16, spec(name, width))


def test_states(tmp_path: Path, source: Slide) -> None:
    out = tmp_path / "cohort"
    writer = opened(out)
    assert writer.state(source) == "todo"
    note_failure(writer.path, "made", source, SlideError(source.path, "damaged", "too many"), 1)
    assert writer.state(source) == "failed"
    assert writer.attempts(source) == 1
    note = FeatureStore(out).failed[source.key]
    assert (note["reason"], note["message"], note["name"]) == ("damaged", "too many", "a.svs")
    source.path.write_bytes(b"other pixels")
    assert writer.state(source) == "todo"  # the file has changed, so it is tried again

    put(writer, source, numbers(4, 3))
    assert writer.state(source) == "done"
    assert FeatureStore(out).failed == {}
    assert not list((out / "failed").iterdir())
    os.utime(source.path, ns=(0, 0))
    assert writer.state(source) == "done"  # the same bytes, copied
    further = opened(out, "further", 2)
    assert further.state(source) == "features"
    assert writer.state(Slide(tmp_path / "gone.svs", "a.svs")) == "done"
    source.path.write_bytes(b"other pixelz")
    assert writer.state(source) == "changed"

    empty = Slide(source.path, "empty.svs")
    put(writer, empty, numbers(0, 3))
    assert writer.state(empty) == "empty"
    assert further.state(empty) == "features"
    with further.begin_features(empty.key, 2) as slide:
        slide.commit()
    assert further.state(empty) == "empty"
    assert FeatureStore(out).verify() == []


@pytest.mark.parametrize("part", ["zarr.json", "features/made/zarr.json", "features/made/c/0/0"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_slide_that_is_not_whole_is_done_again(
    tmp_path: Path, source: Slide, part: str, damage: str
) -> None:
    writer = opened(tmp_path / "cohort")
    put(writer, source, numbers(4, 3))
    before = tree(tmp_path / "cohort")
    path = tmp_path / "cohort" / "slides" / f"{source.key}.zarr" / part
    path.write_bytes(path.read_bytes()[:-2]) if damage == "cut" else path.unlink()
    assert writer.state(source) == "changed"
    with writer.begin(
        source.key, describe(source), np.stack([np.arange(4), np.zeros(4)], 1) * 256, np.ones(4),
        np.zeros(4, np.uint8), None, None, 3,
    ) as slide:  # fmt: skip
        slide.write(np.arange(4), numbers(4, 3))
        assert slide.commit(replace=True)
    assert tree(tmp_path / "cohort") == before


def test_another_specification_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "cohort"
    opened(out)
    with pytest.raises(StoreError, match=r"tiling.tile_px: .* begun with 256, got 512: use"):
        opened(out, tile_px=512)
    with pytest.raises(StoreError, match=r"tiling.colour: .* begun with None, got 'red'"):
        opened(out, colour="red")
    with pytest.raises(StoreError, match=r"tiling_hash: .* begun with '0000000000000000', got 'x'"):
        StoreWriter.open(out, TILING, "x", spec("made", 3))
    with pytest.raises(StoreError, match=r"encoders.made.weights: .* begun with 'none', got 'w'"):
        StoreWriter.open(out, TILING, "0" * 16, {**spec("made", 3), "weights": "w"})
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.doc").touch()
    with pytest.raises(StoreError, match="expected a new or empty folder.*'thesis.doc'"):
        opened(full)
    with pytest.raises(StoreError, match="expected a folder, got a file"):
        opened(full / "thesis.doc")


def test_encoders_have_folders_of_their_own(tmp_path: Path) -> None:
    names = ("hf:owl/vit", "hf:owl-vit", "HF:owl/vit", "../../etc", ":", "x" * 500)
    slugs = [opened(tmp_path / "cohort", name).slug for name in names]
    assert slugs[0] == "hf-owl-vit"
    assert slugs[3:5] == ["etc", "encoder"]
    assert len({slug.lower() for slug in slugs}) == len(slugs)
    assert all(len(slug) < 100 and slug[0] not in ".-" for slug in slugs)
    assert [opened(tmp_path / "cohort", name).slug for name in names] == slugs
    assert FeatureStore(tmp_path / "cohort").encoders == sorted(
        names, key=lambda name: slugs[names.index(name)]
    )


def test_rows_are_written_once_each(tmp_path: Path, source: Slide) -> None:
    writer = opened(tmp_path / "cohort")

    def begin(n: int = 4):
        flags = np.array([8, 0, 0, 0], np.uint8)[:n]
        return writer.begin(
            source.key, describe(source), np.zeros((n, 2)), np.ones(n), flags, None, None, 3
        )

    x = numbers(4, 3)
    with begin() as slide:
        for rows, message in (
            ([4], "expected 0 to 3, got 4 to 4"),
            ([-1], "expected 0 to 3"),
            ([1, 1], "got one twice"),
            ([0], "got 0, of a corrupt patch"),
        ):
            with pytest.raises(ValueError, match=message):
                slide.write(rows, x[: len(rows)])
        with pytest.raises(ValueError, match=r"expected \[2, 3\], got \[2, 2\]"):
            slide.write([1, 2], x[:2, :2])
        slide.write([2], x[2:3])
        slide.write([], x[:0])
        with pytest.raises(ValueError, match="got 2, written before"):
            slide.write([2], x[2:3])
        with pytest.raises(StoreError, match=r"all 4 patches, got 2 \(the first without.*: 1\)"):
            slide.commit()
    assert not list((tmp_path / "cohort/.tmp").iterdir())
    for value, message in (
        (70_000.0, "made: feature 2 of patch 3 is 70000.0: beyond float16"),
        (np.nan, "patch 3 is nan: not finite"),
        (-np.inf, "patch 3 is -inf: not finite"),
    ):
        with begin() as slide, pytest.raises(SlideError, match=message) as caught:
            slide.write([1, 3], [[1, 1, 1], [1, 1, value]])
        assert caught.value.reason == "encoder"
    for arguments in (
        {"coords": np.zeros((4, 3))}, {"flags": np.zeros(3)}, {"coords": np.full((4, 2), 2**31)},
        {"attrs": {}}, {"width": 4},
    ):  # fmt: skip
        valid = {
            "attrs": describe(source), "coords": np.zeros((4, 2)), "tissue": np.ones(4),
            "flags": np.zeros(4), "thumb": None, "mask": None, "width": 3, **arguments,
        }  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            writer.begin(source.key, **valid)
    for key in ("../x", "", ".x", "a/b", "x\0", "a" * 200):
        with pytest.raises(StoreError, match="expected a key"):
            writer.begin(
                key, describe(source), np.zeros((1, 2)), [1], [0], None, None, 3
            )  # fmt: skip
        named = SimpleNamespace(path=source.path, name="a.svs", key=key, pseudonym=None)
        with pytest.raises(StoreError, match="expected a key"):
            note_failure(writer.path, "made", named, OSError(), 1)
    assert writer.state(source) == "todo"


def test_patches_that_turn_out_corrupt(tmp_path: Path, source: Slide) -> None:
    out = tmp_path / "cohort"
    writer = opened(out)
    with writer.begin(
        source.key, describe(source), np.zeros((4, 2)), np.ones(4), [1, 8, 0, 0], None, None, 3
    ) as slide:
        slide.corrupt([3, 0])
        slide.write([2], numbers(1, 3))
        slide.commit()
    stored = FeatureStore(out)["a"]
    assert stored.flags.tolist() == [9, 8, 0, 8]
    assert stored.attrs["counts"] == {"blur": 0, "corrupt": 3, "edge": 1, "patches": 4, "pen": 0}
    np.testing.assert_array_equal(np.isnan(stored.features).all(1), [True, True, False, True])
    further = opened(out, "further", 2)
    with further.begin_features(source.key, 2) as slide:
        with pytest.raises(SlideError, match="patch 2 cannot be decoded any more") as caught:
            slide.corrupt([2])
        assert caught.value.reason == "damaged"
        slide.write([2], [[1, 2]])
        slide.commit()
    np.testing.assert_array_equal(
        np.isnan(FeatureStore(out, "further")["a"].features).all(1), [True, True, False, True]
    )
    assert FeatureStore(out).verify() == []


def test_rivals(tmp_path: Path, source: Slide) -> None:
    """If two workers write a slide, the first wins; a worker whose files vanish raises an error."""
    out = tmp_path / "cohort"
    writer = opened(out)
    arguments = (describe(source), np.zeros((2, 2)), [1, 1], [0, 0], None, None, 3)
    slow = writer.begin(source.key, *arguments)
    slow.write([0, 1], numbers(2, 3))
    moved = next((out / ".tmp").iterdir())
    aside = moved.rename(out / "aside")
    with writer.begin(source.key, *arguments) as quick:
        quick.write([1, 0], numbers(2, 3)[::-1])
        assert quick.commit()
    aside.rename(moved)
    before = tree(out)
    assert not slow.commit()
    assert {name: text for name, text in before.items() if ".tmp" not in name} == tree(out)

    shutil.rmtree(out / "slides" / f"{source.key}.zarr")
    slow = writer.begin(source.key, *arguments)
    slow.write([0, 1], numbers(2, 3))
    quick = writer.begin(source.key, *arguments)  # the lease's holder: removes the other's files
    with pytest.raises((StoreError, FileNotFoundError)):
        slow.commit()
    quick.write([0, 1], numbers(2, 3))
    assert quick.commit()
    further = opened(out, "further", 3).begin_features(source.key, 3)
    further.write([0, 1], numbers(2, 3))
    path = out / "slides" / f"{source.key}.zarr" / "zarr.json"
    path.write_bytes(path.read_bytes().replace(b"a.svs", b"b.svs"))
    with pytest.raises(StoreError, match="another worker replaced it meanwhile"):
        further.commit()


@pytest.mark.parametrize("renames", range(4))
def test_replacing_loses_neither(
    tmp_path: Path, source: Slide, renames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a kill between any two renames, the next holder of the lease repairs the store."""
    out = tmp_path / "cohort"
    writer = opened(out)
    put(writer, source, numbers(4, 3))
    source.path.write_bytes(b"changed")
    assert writer.state(source) == "changed"
    slide = writer.begin(
        source.key, describe(source), np.zeros((2, 2)), [1, 1], [0, 0], None, None, 3
    )
    slide.write([0, 1], numbers(2, 3))
    done: list[int] = []
    rename = os.rename

    def dies(old: Path, new: Path) -> None:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(1)
        rename(old, new)

    monkeypatch.setattr(disk.os, "rename", dies)
    if renames < 3:
        monkeypatch.setattr(slide, "abort", lambda: None)  # a killed process does not clean up
        with pytest.raises(KeyboardInterrupt):
            slide.commit(replace=True)
    else:
        assert slide.commit(replace=True)
    monkeypatch.undo()
    clean(out, Leases(out / "leases"))
    assert not list((out / ".tmp").iterdir())
    assert len(FeatureStore(out)["a"]) == (4 if renames < 2 else 2)
    assert writer.state(source) == ("changed" if renames < 2 else "done")
    assert FeatureStore(out).verify() == []


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.svs")
    path.write_bytes(b"pixels")
    writer = opened(tmp_path / "cohort")
    put(writer, Slide(path, "a.svs"), numbers(2, 3))
    store = FeatureStore(tmp_path / "cohort")
    store.write_manifest()
    assert store.verify() == []
    assert store["a"].attrs["source"]["path"] == str(path)


def test_two_open_a_cohort_at_once(tmp_path: Path) -> None:
    """If workers open a store with two specifications, one wins, with all of its encoders."""
    code = """
import sys
from motet.io import StoreError
from motet.io.store.write import StoreWriter
tile, name = int(sys.argv[2]), sys.argv[3]
spec = {"id": name, "width": 1, "weights": "", "transform": "", "precision": ""}
sys.stdin.read()
try:
    StoreWriter.open(sys.argv[1], {"tile_px": tile}, str(tile), spec)
    print("opened", tile)
except StoreError as error:
    print(error)
"""
    out = tmp_path / "cohort"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, out, str(tile), f"e{i}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for i in range(4)
        for tile in (256, 512)
    ]  # fmt: skip
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()  # starts all at once
    outputs = []
    for process in processes:
        assert process.stdout is not None
        outputs.append(process.stdout.read())
        process.stdout.close()
        assert process.wait() == 0
    run = json.loads((out / "run.json").read_bytes())
    won = run["tiling"]["tile_px"]
    assert outputs.count(f"opened {won}\n") == 4
    assert sum("tiling.tile_px: this store was begun with" in text for text in outputs) == 4
    assert FeatureStore(out).encoders == ["e0", "e1", "e2", "e3"]
    assert FeatureStore(out).verify() == []


def test_killed_workers(tmp_path: Path) -> None:
    """Workers killed at random moments and restarted write the bytes of an undisturbed run."""
    seeds = 200 if SOAK else 10
    memory = Path("/dev/shm")  # syncing to a disk takes 50 times longer than the rest
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        script = ROOT / "python_tests" / "kill_store.py"
        ran = subprocess.run(
            [sys.executable, script, folder, str(seeds)], capture_output=True, text=True,
            timeout=60 * seeds,
        )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == ""


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Make the folder a disk of 2 MB; without rights to mount one, limit files to 1 MB."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "motet-test", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if mounted:
            subprocess.run(["umount", folder], check=True)


def test_full_disk(tmp_path: Path, source: Slide) -> None:
    with small_disk(tmp_path / "small"):
        out = tmp_path / "small" / "cohort"
        writer = opened(out, width=1024)
        put(writer, source, numbers(20, 1024) % 64)
        large = Slide(source.path, "large.svs")
        before = tree(out)
        with pytest.raises(OSError, match="no space for large-.*1500 features of 1024 numbers"):
            put(writer, large, numbers(1500, 1024) % 64)
        assert tree(out) == before
        assert FeatureStore(out).verify() == []
        # The disk fills after the features, whose space is reserved, at the data that follow them.
        slide = writer.begin(
            large.key, describe(large), np.zeros((100, 2)), np.ones(100), np.zeros(100),
            np.random.default_rng(0).integers(256, size=(1500, 800, 3), dtype=np.uint8), None, 1024,
        )  # fmt: skip
        slide.write(np.arange(100), np.zeros((100, 1024)))
        with pytest.raises(
            OSError, match="no space for large-.*make space and run again"
        ) as caught:
            slide.commit()
        assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
        assert tree(out) == before
        put(writer, large, numbers(300, 1024) % 64)
        assert FeatureStore(out).verify() == []
        assert sorted(store_names(out)) == ["a.svs", "large.svs"]


def store_names(out: Path) -> list[str]:
    return [slide.attrs["name"] for slide in FeatureStore(out).values()]


def test_logs_and_leftovers(tmp_path: Path, source: Slide) -> None:
    out = tmp_path / "cohort"
    writer = opened(out)
    writer.log(source.key, {"seconds": np.float32(1.5), "host": "here"})
    assert json.loads((out / "logs" / f"{source.key}.json").read_bytes())["seconds"] == 1.5
    leases = Leases(out / "leases")
    for name in (f"{source.key}.{'0' * 16}", f"run.json.{'1' * 16}", "unknown"):
        (out / ".tmp" / name).mkdir()
    with leases.wait(source.key):
        clean(out, Leases(out / "leases"))  # keeps files under another worker's lease
        assert sorted(os.listdir(out / ".tmp")) == [f"{source.key}.{'0' * 16}", "unknown"]
    clean(out, leases)
    assert os.listdir(out / ".tmp") == ["unknown"]
    with pytest.raises(TypeError, match="expected what JSON can hold, got object"):
        writer.log(source.key, {"x": object()})
