"""Workers that crash, hang, stop or wait: the slide is named, the others are done."""

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from motet import cli
from motet.io import FeatureStore, tile_slides
from motet.io.store.leases import Leases
from motet.io.store.source import Source
from motet.io.store.write_slide import SlideWriter
from motet.io.tiling.watchdog import Watchdog
from numpy.typing import NDArray
from PIL import Image

from .conftest import SOAK
from .slides import draw_tissue, make_pyramid
from .tiling_helpers import OPTIONS, Quiet, leftovers

FAULTS = """
import ctypes, os, signal, time

def mean(pixels):
    return pixels.reshape(len(pixels), -1).mean(1, dtype="f4")[:, None]

def crash(pixels):  # as a C library does
    if pixels.max() == 0:
        os.kill(os.getpid(), signal.SIGSEGV)
    return mean(pixels)

def abort(pixels):
    if pixels.max() == 0:
        os.abort()
    return mean(pixels)

def hang(pixels):
    if pixels.max() == 0:
        time.sleep(1000)
    return mean(pixels)

def freeze(pixels):  # holds Python's lock, so no thread of the worker runs
    if pixels.max() == 0:
        ctypes.PyDLL(None).sleep(1000)
    return mean(pixels)
"""


@pytest.fixture
def black(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make four slides, of which the second and the third are black, and encoders that fail."""
    slides, masks = tmp_path / "slides", tmp_path / "masks"
    slides.mkdir()
    masks.mkdir()
    for i in range(4):
        image = draw_tissue(512, 512, seed=i)
        image = np.zeros_like(image) if i in (1, 2) else image
        make_pyramid(slides / f"slide-{i}.tif", image=image, factors=(1, 4))
        Image.fromarray(np.full((64, 64), 255, np.uint8)).save(masks / f"slide-{i}.png")
    (tmp_path / "faults.py").write_text(FAULTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path


@pytest.mark.slow
def test_an_encoder_that_ends_its_process(black: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The slides are named, the others done; the command goes on to its last line."""
    command = ["tile", str(black / "slides"), "--out", str(black / "store"), "--json"]
    command += ["--encoder", "faults:abort", "--downsample", "1", "--tile-px", "64"]
    command += ["--masks", str(black / "masks"), "--workers", "2"]
    assert cli.main(command) == 3
    printed = capsys.readouterr()
    end = json.loads(printed.out)
    assert (end["slides"], end["done"], len(end["failed"])) == (4, 2, 2)
    assert all("died of SIGABRT" in message for message in end["failed"].values())
    assert printed.err.count("died of SIGABRT") == 2
    assert len(FeatureStore(black / "store")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["hang", *("crash", "freeze") * SOAK])
def test_a_slide_that_takes_the_process_with_it(
    black: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Two slides crash or hang both workers, which may wait for each other: both are named."""
    monkeypatch.setattr("motet.io.tiling.workers.GRACE_S", 1.0)
    options: dict[str, Any] = {
        "encoder": f"faults:{fault}", "downsample": 1, "tile_px": 64, "masks": black / "masks",
        "workers": 2, "slide_timeout": 3.0,
    }  # fmt: skip
    tiled = tile_slides(black / "slides", black / "store", **options)
    assert tiled.done == 2
    assert sorted(key[:7] for key in tiled.failed) == ["slide-1", "slide-2"]
    expected = "died of SIGSEGV" if fault == "crash" else "no progress for 3 s (--slide-timeout)"
    assert all(expected in message for message in tiled.failed.values())
    assert {note["reason"] for note in FeatureStore(black / "store").failed.values()} == {
        "unreadable"
    }
    assert not leftovers(black / "store")


def test_the_watchdog_names_the_oldest_slide_in_work() -> None:
    reported: list[Source] = []
    called = threading.Event()

    def report(source: Source) -> None:
        reported.append(source)
        called.set()

    slides = [Source(Path(name), name) for name in "abc"]
    watchdog = Watchdog(0.4, report)
    watchdog.start()
    with watchdog.paused():
        watchdog.begin(slides[0])
        assert not called.wait(0.8), "time in which the receiver is awaited does not count"
    for source in slides[1:]:
        watchdog.begin(source)
    watchdog.finish(slides[0])
    assert called.wait(20)
    assert reported == [slides[1]]
    idle = Watchdog(0.1, report)
    called.clear()
    idle.start()
    assert not called.wait(0.5), "without a slide in work nothing hangs"
    idle.close()
    watchdog.close()


class Failing(Quiet):
    """An encoder that fails as soon as only slides of other workers remain."""

    def __init__(self) -> None:
        self.waiting = threading.Event()

    def note(self, event: dict[str, Any]) -> None:
        if event["event"] == "waiting":
            self.waiting.set()

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        assert self.waiting.wait(20)
        raise OSError("no encoder any more")


def error_beside_another_worker(folder: Path, encoder: Quiet, **more: Any) -> BaseException:
    """Return the error of a tiling of two slides, one of which another worker holds."""
    for i in range(2):
        make_pyramid(folder / f"slide-{i}.tif", size=(700, 700), factors=(1, 4), seed=i)
    out = folder / "store"
    held = Leases(out / "leases").take(Source(folder / "slide-1.tif", "slide-1.tif").key)
    assert held is not None
    raised: list[BaseException] = []

    def run() -> None:
        try:
            slides = [folder / f"slide-{i}.tif" for i in range(2)]
            options = {**OPTIONS, "encoder": encoder, "batch": 1000, **more}
            tile_slides(slides, out, workers=0, **options)
        except BaseException as error:
            raised.append(error)

    worker = threading.Thread(target=run, daemon=True)  # a daemon, so that a hang fails the test
    with held:
        worker.start()
        worker.join(20)
        assert not worker.is_alive()
    assert [lease.name for lease in (out / "leases").iterdir()] == []
    return raised[0]


def test_an_error_ends_a_worker_that_others_hold_slides_from(tmp_path: Path) -> None:
    encoder = Failing()
    error = error_beside_another_worker(tmp_path, encoder, progress=encoder.note)
    assert "no encoder any more" in str(error)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "no space"), TypeError("a fault of motet")], ids=["full", "bug"]
)
def test_an_error_of_a_commit_stops_the_worker_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Two workers, each of which waits for the slide of the other, would wait for ever."""

    def commit(*_: object, **__: object) -> bool:
        raise error

    monkeypatch.setattr(SlideWriter, "commit", commit)
    assert error_beside_another_worker(tmp_path, Quiet()) is error
