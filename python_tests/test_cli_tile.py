"""`motet tile`: its output, exit codes and refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
from motet import cli
from motet.cli import tile
from motet.io import FeatureStore
from motet.io.tiling.tile_slides import Tiled

from .slides import make_pyramid

STAIN = ["--encoder", "stain-stats"]


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    make_pyramid(folder / "good.tif", size=(900, 700), factors=(1, 4))
    make_pyramid(folder / "blank.tif", image=np.full((512, 512, 3), 242, np.uint8), factors=(1, 4))
    (folder / "bad.svs").write_bytes(b"not a slide")
    return folder


def test_one_line_and_exit_code_3(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tile", str(slides), "--out", str(tmp_path / "store"), *STAIN, "--mpp", "0.5"]
    assert cli.main(command) == 3
    printed = capsys.readouterr()
    assert printed.out.startswith("3 slides: 1 done, 1 empty, 1 failed; ")
    assert printed.out.count("\n") == 1
    assert printed.err.count("\n") == 1, "no bar in a pipe, a line per failure"
    assert "bad.svs" in printed.err
    store = FeatureStore(tmp_path / "store")
    assert store["blank"].attrs["reason"] == "no tissue was found"
    report = tmp_path / "store" / "report"
    assert {"index.html", "slides.csv"} <= {path.name for path in report.iterdir()}
    assert "bad.svs" in (report / "index.html").read_text()

    assert cli.main([*command, "--json"]) == 3
    end = json.loads(capsys.readouterr().out)
    assert (end["slides"], end["done"], end["empty"], end["patches"]) == (3, 1, 1, 0)
    (failure,) = store.failed.values()
    assert failure["attempts"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one of mpp, mag and downsample, got mpp=None"),
        (["--mpp", "1", "--mag", "20"], "not allowed with argument"),
        (["--mpp", "1", "--shard", "3/3"], "--shard: expected i/n with i from 0 to n - 1"),
        (["--mpp", "1", "--shard", "x"], "--shard: expected i/n"),
        (["--mpp", "1", "--slide-mpp", "none.csv"], "none.csv"),
        (["--mpp", "1", "--workers", "x"], "--workers"),
        (["--mpp", "-1"], "mpp"),
        (["--mpp", "1", "--show-labels", "--pseudonymise", "x"], "--show-labels: not with"),
    ],
)
def test_refusals_are_one_line(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    command = ["tile", str(slides), "--out", str(tmp_path / "store"), *STAIN, *arguments]
    try:
        code = cli.main(command)
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert code == 2
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "store").exists()


def test_slide_mpp_tables(tmp_path: Path) -> None:
    assert tile.read_slide_mpp("0.25") == 0.25
    table = tmp_path / "mpp.csv"
    table.write_text("slide,mpp\na,0.25\nb.svs,0.5\n")
    assert tile.read_slide_mpp(str(table)) == {"a": 0.25, "b.svs": 0.5}
    table.write_text("slide,mpp\na,quarter\n")
    with pytest.raises(ValueError, match=r"line 2: mpp: expected a number, got 'quarter'"):
        tile.read_slide_mpp(str(table))
    table.write_text("name,mpp\na,0.5\n")
    with pytest.raises(ValueError, match="expected the columns slide and mpp, got name, mpp"):
        tile.read_slide_mpp(str(table))


def test_progress_says_how_long_the_encoder_waits() -> None:
    progress = tile.Progress()
    progress({"event": "begin", "slides": 3, "bytes": 100, "without_mask": [], "not_taken": {}})
    progress({"event": "known", "key": "b", "name": "b", "bytes": 50})
    progress({"event": "known", "key": "b", "name": "b", "bytes": 50})
    progress({"event": "patches", "patches": 10, "decode_s": 0.2, "encode_s": 0.1})
    progress({"event": "done", "key": "a", "name": "a", "bytes": 50})
    assert progress.describe().startswith("2/3 slides, ")
    assert progress.describe().endswith(" patches/s, encoder waits 67% of the time")
    progress({"event": "patches", "patches": 10, "decode_s": 0.0, "encode_s": 0.5})
    assert progress.describe().endswith("encoder waits 25% of the time")
    assert progress.encoder_waits == pytest.approx(0.25)
    progress.close()


def test_last_line() -> None:
    tiled = Tiled(10, 7, 1, 1, {"a": "damaged"}, 1234, [], {})
    expected = (
        "10 slides: 7 done, 1 empty, 1 skipped, 1 failed; 1,234 patches embedded in 2.0 s (617/s)"
    )
    assert tile.last_line(tiled, Path("cohort"), 2.0, None) == f"{expected}: cohort"
    assert tile.last_line(tiled, Path("cohort"), 2.0, 0.034) == (
        f"{expected}, the encoder waited 3% of the time: cohort"
    )
