"""`motet store repair`: what verify condemns is made anew, and nothing else is lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from motet import cli
from motet.io import FeatureStore, tile_slides
from motet.io.store.leases import Leases

from .slides import make_pyramid
from .tiling_helpers import OPTIONS, Quiet, content


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of two slides and the store of their features, of two encoders."""
    folder = tmp_path_factory.mktemp("intact")
    (folder / "slides").mkdir()
    for i in range(2):
        make_pyramid(folder / "slides" / f"{i}.tif", size=(700, 700), factors=(1, 4), seed=i)
    tile(folder / "slides", folder / "store")
    return folder


def tile(slides: Path, store: Path) -> None:
    for encoder in ("stain-stats", Quiet()):
        options = {**OPTIONS, "encoder": encoder, "workers": 0}
        assert tile_slides(slides, store, **options).done == 2


@pytest.fixture
def store(intact: Path, tmp_path: Path) -> Path:
    return shutil.copytree(intact / "store", tmp_path / "store")


def turn_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "features": lambda slide: turn_a_bit(slide / "features/stain-stats/c/0/0"),
    "features cut": lambda slide: (slide / "features/quiet/c/0/0").write_bytes(b""),
    "features gone": lambda slide: (slide / "features/quiet/zarr.json").unlink(),
    "flags": lambda slide: turn_a_bit(slide / "flags/c/0"),
    "coords gone": lambda slide: shutil.rmtree(slide / "coords"),
    "attributes": lambda slide: (slide / "zarr.json").write_bytes(b"{"),
    "thumb": lambda slide: turn_a_bit(slide / "thumb/c/0/0/0"),
    "all": lambda slide: [turn_a_bit(path) for path in slide.rglob("0") if path.is_file()],
}


@pytest.mark.parametrize(
    "damage",
    [
        name if name in ("features", "flags") else pytest.param(name, marks=pytest.mark.slow)
        for name in DAMAGES
    ],
)
def test_what_is_damaged_is_made_anew(
    intact: Path, store: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """After repair and the same commands, the store has the bytes that it had."""
    before = content(store)
    (slide,) = (store / "slides").glob("1-*.zarr")
    DAMAGES[damage](slide)
    assert FeatureStore(store).verify()
    kept = {"stain-stats", "quiet"} if "features" in damage else set()
    kept -= {"stain-stats"} if damage == "features" else {"quiet"}
    assert cli.main(["store", "repair", str(store)]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith(
        "repaired, 0 left; to make 1 slide anew, give the commands of all encoders again\n"
    )
    assert slide.exists() == bool(kept), "sound features of another encoder are kept"
    assert {path.name for path in slide.glob("features/*") if path.is_dir()} == kept
    assert FeatureStore(store).verify() == []
    tile(intact / "slides", store)
    assert content(store) == before
    assert FeatureStore(store).verify() == []
    assert cli.main(["store", "repair", str(store)]) == 0
    assert capsys.readouterr().out == "2 slides, nothing wrong\n"


def test_what_cannot_be_made_anew_is_kept(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone, held = sorted((store / "slides").iterdir())
    meta = json.loads((gone / "zarr.json").read_bytes())
    meta["attributes"]["source"]["path"] = "/gone/0.tif"
    (gone / "zarr.json").write_text(json.dumps(meta))
    for slide in (gone, held):
        turn_a_bit(slide / "flags/c/0")
    (store / "slides" / "notes").mkdir()
    (held / "notes.txt").write_text("mine")
    (store / "failed" / "x-1.json").write_text("{")
    (store / ".tmp" / f"{gone.stem}.{'0' * 16}").mkdir()
    (store / "run.json").write_text((store / "run.json").read_text().replace("0.1", "0.2"))
    with Leases(store / "leases").wait(held.stem):
        assert cli.main(["store", "repair", str(store), "--json"]) == 1
    repairs = {repair["key"] + "|" + repair["message"] for repair in json.loads(
        capsys.readouterr().out)}  # fmt: skip

    def is_listed(key: str, *parts: str) -> bool:
        return any(
            one.startswith(f"{key}|") and all(part in one for part in parts) for one in repairs
        )

    assert is_listed(gone.stem, "kept, as /gone/0.tif is gone and nothing can replace it")
    assert is_listed(held.stem, "left as it is: a worker has it in work")
    assert is_listed(held.stem, "notes.txt: not of a slide: left as it is")
    assert is_listed("", "slides/notes: not a slide: left as it is")
    assert is_listed("", "run.json: its hash is not that of its content: left as it is")
    assert is_listed("x-1", "removed")
    assert is_listed("", f".tmp/{gone.stem}.{'0' * 16}: removed")
    assert gone.exists()
    assert held.exists()
    assert not (store / "failed" / "x-1.json").exists()
    assert FeatureStore(store).repair()[-1].repaired is False
    assert not held.exists(), "its worker has ended"


def test_the_table_is_written_anew(store: Path) -> None:
    opened = FeatureStore(store)
    (opened.path / "slides.parquet").write_bytes(b"")
    assert len(opened.verify()) == 1
    assert opened.repair() == []
    assert opened.verify() == []
