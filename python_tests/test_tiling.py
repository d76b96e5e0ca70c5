"""Slides to a store: correct, complete, resumed after kills, full disks and damage."""

import json
import os
import resource
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import motet
import numpy as np
import pytest
import torch
from motet.io import FeatureStore, StoreError, tile_slides
from motet.io.store.format import FLAGS
from motet.io.tiling.workers import _gpu_environment
from numpy.typing import NDArray

from .conftest import SOAK, data_path
from .slides import draw_tissue, make_pyramid
from .tiling_helpers import OPTIONS, Overflowing, Quiet, command, content, leftovers, tile


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make five slides with some hundred patches each."""
    folder = tmp_path_factory.mktemp("cohort")
    for i in range(5):
        make_pyramid(folder / f"slide-{i}.tif", size=(1300 + 64 * i, 1100), seed=i)
    return folder


@pytest.fixture(scope="module")
def undisturbed(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "store"
    tiled = tile_slides(cohort, out, workers=0, **OPTIONS)
    assert (tiled.done, tiled.failed) == (5, {})
    return out


def test_features_are_those_of_the_patches(cohort: Path, undisturbed: Path) -> None:
    """Each row is the encoder's output for the area mean of the pixels at its coordinates."""
    store = FeatureStore(undisturbed)
    encoder = motet.io.load_encoder("stain-stats")
    assert len(store) == 5
    for key, slide in store.items():
        with motet.io.open_slide(slide.attrs["source"]["path"]) as source:
            side = 128
            for row in np.random.default_rng(0).integers(len(slide.coords), size=6):
                x, y = slide.coords[row]
                pixels = source.read(0, int(x), int(y), side, side).astype(np.float64)
                patch = pixels.reshape(64, 2, 64, 2, 3).mean((1, 3))
                exact = encoder.encode(np.floor(patch + 0.5).astype(np.uint8)[None])[0]
                np.testing.assert_allclose(slide.features[row], exact, rtol=2e-3, atol=2e-3)
        assert slide.attrs["counts"]["patches"] == len(slide.coords) > 30, key
        order = np.lexsort((slide.coords[:, 0], slide.coords[:, 1]))
        assert (order == np.arange(len(order))).all()


def test_the_same_again_does_nothing(cohort: Path, undisturbed: Path) -> None:
    before = content(undisturbed)
    times = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.json")}
    again = tile_slides(cohort, undisturbed, workers=0, **OPTIONS)
    assert (again.done, again.patches) == (5, 0)
    assert content(undisturbed) == before
    assert all(p.stat().st_mtime_ns == t for p, t in times.items() if p.parent.name != "leases")


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_write_the_same_bytes(
    cohort: Path, undisturbed: Path, tmp_path: Path, workers: int
) -> None:
    out = tile(cohort, tmp_path / "store", "--workers", str(workers))
    assert "5 slides: 5 done; " in out
    assert out.count("\n") == 1
    assert content(tmp_path / "store") == content(undisturbed)
    assert not leftovers(tmp_path / "store")


def test_shards_make_the_whole(cohort: Path, undisturbed: Path, tmp_path: Path) -> None:
    parts = [tile_slides(cohort, tmp_path, workers=0, shard=(i, 3), **OPTIONS) for i in range(3)]
    assert sorted(part.slides for part in parts) == [1, 2, 2]
    assert content(tmp_path) == content(undisturbed)


def test_two_commands_share_the_work(cohort: Path, undisturbed: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    commands = [
        subprocess.Popen(command(cohort, store, "--json"), stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ends = [json.loads(process.communicate(timeout=120)[0]) for process in commands]
    assert [end["done"] for end in ends] == [5, 5]
    total = sum(len(slide.coords) for slide in FeatureStore(undisturbed).values())
    assert sum(end["patches"] for end in ends) == total, "no slide was embedded twice"
    assert content(store) == content(undisturbed)
    assert not leftovers(store)


def test_a_full_disk(cohort: Path, undisturbed: Path, tmp_path: Path) -> None:
    """A full disk gives one clear line and no partial file; with space again, the run goes on."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=320k", "tmpfs", str(small)])
    if mounted.returncode:
        pytest.skip("cannot mount a small tmpfs")
    try:
        out = tile(cohort, small / "store", "--workers", "2", code=2)
        assert out.count("\n") == 1
        assert "No space left" in out
        for slide in FeatureStore(small / "store").values():
            assert np.isfinite(slide.features).all()
        assert not leftovers(small / "store")
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        tile(cohort, small / "store")
        assert content(small / "store") == content(undisturbed)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def damage(path: Path, random: np.random.Generator, share: float) -> set[int]:
    """Zero random tiles of level 0, wholly or from a random byte on; return their numbers."""
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        offsets, counts = page.dataoffsets, page.databytecounts
    hit = set(random.choice(len(offsets), int(share * len(offsets)), replace=False).tolist())
    with open(path, "r+b") as file:
        for i in hit:
            start = int(random.integers(0, counts[i] // 2)) if random.random() < 0.5 else 0
            file.seek(offsets[i] + start)
            file.write(bytes(counts[i] - start))
    return hit


@pytest.mark.sampled
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("compression", ["jpeg", "deflate", "aperio_jp2000_rgb"])
def test_damaged_tiles_are_flagged_and_never_embedded(
    tmp_path: Path, seed: int, compression: str
) -> None:
    """Every patch that touches a damaged tile is flagged; all others keep their bits."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "damaged").mkdir()
    image = draw_tissue(1024, 1024, seed=seed)
    for folder in ("whole", "damaged"):
        make_pyramid(
            tmp_path / folder / "slide.tif", image=image, tile=(128, 128), factors=(1, 4),
            compression=compression,
        )  # fmt: skip
    hit = damage(tmp_path / "damaged" / "slide.tif", np.random.default_rng(seed), 0.2)
    # A patch touches several tiles: half of all patches may be damaged.
    options = {
        "encoder": "stain-stats", "downsample": 1, "tile_px": 96, "workers": 0, "max_damaged": 0.9,
    }  # fmt: skip
    for folder in ("whole", "damaged"):
        tile_slides(tmp_path / folder, tmp_path / f"{folder}-store", **options)
    intact = FeatureStore(tmp_path / "whole-store")["slide"]
    damaged = FeatureStore(tmp_path / "damaged-store")["slide"]

    def touches(x: int, y: int) -> bool:
        return any(
            row * 8 + column in hit
            for row in range(y // 128, (y + 95) // 128 + 1)
            for column in range(x // 128, (x + 95) // 128 + 1)
        )

    rows = {tuple(corner): row for row, corner in enumerate(intact.coords.tolist())}
    seen = 0
    for row, (x, y) in enumerate(damaged.coords.tolist()):
        corrupt = bool(damaged.flags[row] & FLAGS.CORRUPT)
        assert corrupt == touches(x, y), (x, y)
        assert np.isnan(damaged.features[row]).all() == corrupt
        if not corrupt and (x, y) in rows:
            seen += 1
            assert (damaged.features[row] == intact.features[rows[x, y]]).all()
    assert seen > 10


def test_too_much_damage_fails_the_slide(tmp_path: Path) -> None:
    make_pyramid(tmp_path / "slide.tif", size=(1024, 1024), factors=(1, 4))
    damage(tmp_path / "slide.tif", np.random.default_rng(0), 0.8)
    tiled = tile_slides(tmp_path / "slide.tif", tmp_path / "store", workers=0, **OPTIONS)
    (message,) = tiled.failed.values()
    assert "patches lie on damaged tiles, more than max_damaged=0.5 of them" in message
    (failure,) = FeatureStore(tmp_path / "store").failed.values()
    assert (failure["reason"], failure["attempts"]) == ("damaged", 1)
    forgiven = {**OPTIONS, "max_damaged": 1.0}
    assert tile_slides(tmp_path / "slide.tif", tmp_path / "store", workers=0, **forgiven).done == 1
    assert FeatureStore(tmp_path / "store").failed == {}


def test_shared_slides(tmp_path: Path) -> None:
    """In a mixed cohort readable slides are done, and the others fail with a reason."""
    options: Any = {"encoder": "stain-stats", "downsample": 4, "tile_px": 112, "workers": 0}
    tiled = tile_slides(data_path("slides"), tmp_path, **options)
    store = FeatureStore(tmp_path)
    outcomes = store.manifest().set_index("name")[["status", "reason"]].T.to_dict("list")
    failures = {name: reason for name, (status, reason) in outcomes.items() if status == "failed"}
    assert failures == {
        "broken.svs": "unreadable", "unopenable.tiff": "unsupported", "unreadable.svs": "damaged",
    }  # fmt: skip
    empty = {name for name, (status, _) in outcomes.items() if status == "empty"}
    assert empty == {"os_small.svs", "patch.tif", "kidney-48-5.tif", "pen/wsi-blue-pen.png"}
    assert (tiled.slides, tiled.done) == (14, 7)
    assert store.verify() == []


def test_no_mpp(tmp_path: Path) -> None:
    """Slides without mpp fail, are skipped or get the user's mpp; its source is recorded."""
    slides = tmp_path / "slides"
    slides.mkdir()
    make_pyramid(slides / "none.tif", mpp=None)
    make_pyramid(slides / "known.tif", mpp=0.5)
    options: dict[str, Any] = {"encoder": "stain-stats", "mpp": 1.0, "tile_px": 64, "workers": 0}
    tiled = tile_slides(slides, tmp_path / "a", **options)
    assert (tiled.done, tiled.skipped, len(tiled.failed)) == (1, 0, 1)
    tiled = tile_slides(slides, tmp_path / "a", missing_mpp="skip", **options)
    assert (tiled.done, tiled.skipped, tiled.failed) == (1, 1, {})
    tiled = tile_slides(slides, tmp_path / "a", slide_mpp={"none": 0.5}, **options)
    assert (tiled.done, tiled.skipped, tiled.failed) == (2, 0, {})
    sources = {
        slide.attrs["name"]: slide.attrs["mpp_source"]
        for slide in FeatureStore(tmp_path / "a").values()
    }
    assert sources == {"known.tif": "file", "none.tif": "table"}


def test_features_that_float16_cannot_hold_fail_loudly(cohort: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "encoder": Overflowing()}
    tiled = tile_slides(cohort / "slide-0.tif", tmp_path, workers=0, **options)
    (message,) = tiled.failed.values()
    assert "float16" in message
    (failure,) = FeatureStore(tmp_path).failed.values()
    assert failure["reason"] == "encoder"


def test_a_second_encoder_joins(cohort: Path, tmp_path: Path) -> None:
    tile_slides(cohort, tmp_path, workers=0, **OPTIONS)
    before = content(tmp_path)
    tiled = tile_slides(cohort, tmp_path, workers=0, **{**OPTIONS, "encoder": Quiet()})
    assert tiled.done == 5
    store = FeatureStore(tmp_path, encoder="quiet")
    assert all(slide.features.shape == (len(slide.coords), 2) for slide in store.values())
    after = content(tmp_path)
    assert {name: after[name] for name in before if name != "run.json"} == {
        name: digest for name, digest in before.items() if name != "run.json"
    }
    assert FeatureStore(tmp_path, encoder="stain-stats").verify() == []


def test_another_specification_is_refused(cohort: Path, undisturbed: Path) -> None:
    before = content(undisturbed)
    with pytest.raises(StoreError, match=r"tiling.tile_px: this store was begun with 64, got 128"):
        tile_slides(cohort, undisturbed, workers=0, **{**OPTIONS, "tile_px": 128})
    assert content(undisturbed) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"downsample": None}, "expected one of mpp, mag and downsample, got mpp=None"),
        ({"mpp": 1.0}, "expected one of mpp, mag and downsample, got mpp=1.0"),
        ({"downsample": None, "mag": 0}, "mag: expected a number above 0, got 0"),
        ({"downsample": -1}, "downsample: expected"),
        ({"tile_px": 0}, "tile_px: expected"),
        ({"border": "wrap"}, "border: expected"),
        ({"min_tissue": 2}, "min_tissue: expected"),
        ({"max_damaged": -1}, "max_damaged: expected 0 to 1, got -1"),
        ({"workers": -1}, "workers: expected an integer of at least 0, got -1"),
        ({"batch": 0}, "batch: expected an integer of at least 1, got 0"),
        ({"shard": (3, 3)}, r"shard: expected \(i, n\) with 0 <= i < n, got \(3, 3\)"),
        ({"reader": "vips"}, "reader: expected auto, libjpeg, cucim, openslide, tifffile, pillow"),
        ({"missing_mpp": "guess"}, "missing_mpp: expected fail, skip, got 'guess'"),
        ({"slide_mpp": 0}, "slide_mpp: expected a number above 0, got 0"),
        ({"slide_mpp": {"a": "b"}}, "slide_mpp of a: expected a number above 0, got 'b'"),
        ({"masks": "nowhere"}, "masks: expected a folder, got 'nowhere'"),
        ({"encoder": "stane-stats"}, "stain-stats"),
        ({"encoder": Quiet(), "workers": 1}, "encoder: an object cannot be sent"),
        ({"slides": []}, "slides: no slide in"),
    ],
)
def test_refusals(cohort: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    options = {"slides": cohort, "out": tmp_path / "store", "workers": 0, **OPTIONS, **change}
    with pytest.raises(ValueError, match=message):
        tile_slides(options.pop("slides"), options.pop("out"), **options)
    assert not (tmp_path / "store" / "slides").exists()


@pytest.mark.slow
def test_ray_survives_a_killed_worker(cohort: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Two tasks on a local cluster; the process of one is killed while it holds a lease."""
    pytest.importorskip("ray")
    store, killed = tmp_path / "store", []

    def kill_the_first(event: dict[str, Any]) -> None:
        if event["event"] == "start" and not killed:
            for lease in (store / "leases").iterdir():
                if lease.name.startswith("slide-"):
                    killed.append(json.loads(lease.read_text())["pid"])
                    os.kill(killed[0], signal.SIGKILL)
                    return

    tiled = tile_slides(cohort, store, ray="local", workers=2, progress=kill_the_first, **OPTIONS)
    assert killed
    assert (tiled.done, tiled.failed) == (5, {})
    assert content(store) == content(undisturbed)
    assert not leftovers(store)


@pytest.mark.slow
def test_a_cohort_of_many_slides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 slides under `make soak`, 100 here: each once; resuming opens none of them."""
    count = 10_000 if SOAK else 100
    slides, store = tmp_path / "slides", tmp_path / "store"
    slides.mkdir()
    make_pyramid(slides / "slide-00000.tif", size=(700, 700), factors=(1, 4))
    for i in range(1, count):
        (slides / f"slide-{i:05}.tif").hardlink_to(slides / "slide-00000.tif")
    peaks: list[int] = []

    def note(event: dict[str, Any]) -> None:
        if event["event"] == "done":
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    tiled = tile_slides(slides, store, workers=0, progress=note, **OPTIONS)
    assert (tiled.done, tiled.failed) == (count, {})
    assert peaks[-1] - peaks[count // 5] < 64 * 1024, "a cohort is never held in memory (KiB)"
    monkeypatch.setattr("motet.io.tiling.pipeline.open_slide", None)
    began = time.perf_counter()
    again = tile_slides(slides, store, workers=0, **OPTIONS)
    assert not SOAK or time.perf_counter() - began < 5 * count / 1000, "5 s for 1,000 slides"
    assert (again.done, again.patches) == (count, 0)
    assert len(FeatureStore(store).manifest()) == count
    assert (store / "slides.parquet").exists()


def test_hostile_names_stay_inside_the_store(tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    (folder / "loop").mkdir(parents=True)
    (folder / "loop" / "again").symlink_to(folder)
    names = [
        "%2e%2e%2fevil.tif",
        "-rf.tif",
        "new\nline.tif",
        "ü ö.tif",
        "a" * 200 + ".tif",
        "...tif",
    ]
    make_pyramid(folder / "plain.tif", size=(300, 300), factors=(1,))
    for name in names:
        (folder / name).hardlink_to(folder / "plain.tif")
    listed = tmp_path / "list.txt"
    listed.write_text("slides/../slides/plain.tif\n")
    before = sorted(tmp_path.rglob("*"))
    tiled = tile_slides([folder, listed], tmp_path / "store", workers=0, **OPTIONS)
    assert not tiled.failed
    made = [path for path in tmp_path.rglob("*") if path not in before]
    assert all((tmp_path / "store") in (path, *path.parents) for path in made)
    names_stored = [slide.attrs["name"] for slide in FeatureStore(tmp_path / "store").values()]
    assert set(names) - {"...tif"} <= set(names_stored)


def test_mutated_files_do_not_stop_a_cohort(tmp_path: Path) -> None:
    """With random bytes and cut ends every slide ends as done, empty or failed."""
    random = np.random.default_rng(0)
    sources = [path for path in data_path("slides").glob("*.*") if path.suffix != ".md"]
    slides = tmp_path / "slides"
    slides.mkdir()
    count = 2000 if SOAK else 24
    for i in range(count):
        source = sources[i % len(sources)]
        bytes_ = bytearray(source.read_bytes())
        where = len(bytes_) if i % 2 else min(len(bytes_), 4096)
        for at in random.integers(0, where, 20):
            bytes_[at] = random.integers(256)
        if i % 3 == 0:
            del bytes_[int(random.integers(len(bytes_))) :]
        (slides / f"{i:03}{source.suffix}").write_bytes(bytes_)
    options = {"encoder": "stain-stats", "downsample": 8, "tile_px": 64}
    tiled = tile_slides(slides, tmp_path / "store", workers=1, **options)
    assert tiled.slides == count == tiled.done + tiled.empty + len(tiled.failed)
    assert tiled.failed
    assert FeatureStore(tmp_path / "store").verify() == []


def test_each_worker_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7")
    seen = [_gpu_environment(worker).get("CUDA_VISIBLE_DEVICES") for worker in range(4)]
    assert seen == ["2", "5", "7", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert _gpu_environment(1) == {}


def test_decoding_follows_the_encoder_to_its_gpu(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an encoder on CUDA the probe decides; its tensors reach the encoder as they are."""
    pytest.importorskip("cucim", reason="only cuCIM decodes on a GPU, and it is not installed")
    from motet.io.slides.cucim import CuCimSlide
    from motet.io.tiling import pipeline

    seen = []

    class OnGpu(Quiet):
        device = torch.device("cuda")

        def upload(self, pixels: Any) -> Any:
            return pixels

        def encode(self, pixels: Any) -> NDArray[np.float32]:
            seen.append(type(pixels))
            return super().encode(pixels)

    monkeypatch.setattr(pipeline, "probe_decoder", lambda slide, grid: "meta")

    def decoded(self: Any, level: int, corners: Any, width: int, height: int, *_: Any) -> Any:
        for x, y in corners.tolist():
            yield torch.from_numpy(self.read(level, x, y, width, height))

    monkeypatch.setattr(CuCimSlide, "_read_batches", decoded)
    options = {**OPTIONS, "encoder": OnGpu(), "reader": "cucim"}
    assert tile_slides(cohort / "slide-0.tif", tmp_path, workers=0, **options).done == 1
    assert set(seen) == {torch.Tensor}
    (log,) = (json.loads(path.read_text()) for path in (tmp_path / "logs").glob("*.json"))
    assert log["decoder"] == "meta"


class Uploading(Quiet):
    """An encoder on a GPU, which takes pixels that were uploaded in another thread."""

    device = torch.device("cuda")

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.threads, self.batches = fails, set[str](), 0

    def upload(self, pixels: NDArray[np.uint8]) -> torch.Tensor:
        self.threads.add(threading.current_thread().name)
        if self.fails:
            raise RuntimeError("CUDA out of memory")
        return torch.from_numpy(pixels.copy())

    def encode(self, pixels: Any) -> NDArray[np.float32]:
        assert isinstance(pixels, torch.Tensor)
        self.threads.add(threading.current_thread().name)
        self.batches += 1
        return pixels.float().mean((1, 2)).numpy()[:, :2]


def test_pixels_are_pinned_and_uploaded_while_the_encoder_works(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from motet.io.tiling import patches

    asked: list[bool] = []
    memory = patches._Memory.__init__

    def note(self: Any, *shape: int, pinned: bool) -> None:
        asked.append(pinned)
        memory(self, *shape, pinned=False)

    monkeypatch.setattr(patches._Memory, "__init__", note)
    encoder = Uploading()
    events: list[dict[str, Any]] = []
    options = {**OPTIONS, "encoder": encoder, "batch": 16, "progress": events.append}
    tiled = tile_slides(cohort / "slide-0.tif", tmp_path / "gpu", workers=0, **options)
    assert tiled.done == 1
    assert asked == [True]
    assert encoder.batches == -(-tiled.patches // 16) > 3
    assert encoder.threads == {"decode", threading.current_thread().name}
    batches = [event for event in events if event["event"] == "patches"]
    assert all(event["decode_s"] >= 0 and event["encode_s"] > 0 for event in batches)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        options["encoder"] = Uploading(fails=True)
        tile_slides(cohort / "slide-0.tif", tmp_path / "full", workers=0, **options)
    assert not FeatureStore(tmp_path / "full").failed
