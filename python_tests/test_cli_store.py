"""`motet store`: its output and exit codes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from motet.cli import main
from motet.io import FeatureStore

from .store_helpers import GOLDEN

Captured = pytest.CaptureFixture[str]


def test_ls(capsys: Captured) -> None:
    assert main(["store", "ls", str(GOLDEN)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["key", "status", "patches", "corrupt", "mpp", "encoders"]
    assert lines[1].split()[:3] == ["blank-75280f0a", "empty", "0"]
    assert lines[2].endswith("StoreError: not an image")
    assert lines[3].split() == [
        "tissue-ccd5b8ee", "ok", "5", "1", "0.5", "hf-owl-vit", "stain-stats",
    ]  # fmt: skip
    assert lines[4] == "3 slides: 1 ok, 1 empty, 1 failed; 5 patches"
    assert main(["store", "ls", "--json", str(GOLDEN)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["status"] for row in rows] == ["empty", "failed", "ok"]
    assert rows[1]["patches"] is None
    assert rows[2]["bytes"] == 5


def test_show(capsys: Captured) -> None:
    assert main(["store", "show", str(GOLDEN), "tissue.svs"]) == 0
    facts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert facts["counts.patches"] == "5"
    assert facts["features.stain-stats"] == "[5, 6]"
    assert main(["store", "show", "--json", str(GOLDEN), "broken-1ca10da8"]) == 0
    assert json.loads(capsys.readouterr().out)["attempts"] == 2
    assert main(["store", "show", str(GOLDEN), "tisue"]) == 2
    assert "motet store: no slide 'tisue'" in capsys.readouterr().err


def test_verify(tmp_path: Path, capsys: Captured) -> None:
    shutil.copytree(GOLDEN, tmp_path / "store")
    assert main(["store", "verify", str(tmp_path / "store")]) == 0
    assert capsys.readouterr().out == "2 slides, nothing wrong\n"
    path = next((tmp_path / "store").glob("slides/tissue*/coords/c/0/0"))
    path.write_bytes(bytes(len(path.read_bytes())))
    assert main(["store", "verify", str(tmp_path / "store")]) == 1
    printed = capsys.readouterr().out
    assert "its checksum is not that of its bytes" in printed
    assert printed.endswith(
        f"motet store repair {tmp_path / 'store'} removes what can be made anew\n"
    )
    assert main(["store", "verify", "--json", str(tmp_path / "store")]) == 1
    assert json.loads(capsys.readouterr().out)[0]["key"] == "tissue-ccd5b8ee"
    assert main(["store", "verify", str(tmp_path)]) == 2
    assert "expected a feature store" in capsys.readouterr().err


def test_export_and_import(tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    assert main(["store", "export", str(GOLDEN), "--out", str(out)]) == 2
    assert "expected encoder=" in capsys.readouterr().err
    arguments = ["store", "export", str(GOLDEN), "--out", str(out), "--encoder", "hf:owl/vit"]
    assert main(arguments) == 0
    assert sorted(path.name for path in out.iterdir()) == ["blank.npz", "tissue.npz"]
    assert main([*arguments[:3], "tissue", "--format", "pt", *arguments[3:]]) == 0
    (out / "tissue.npz").unlink()
    again = tmp_path / "again"
    arguments = ["store", "import", str(out), "--out", str(again), "--encoder", "owl"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.endswith(f"2 slides, 0 failed: {again}\n")
    np.testing.assert_array_equal(
        FeatureStore(again)["tissue"].features,
        FeatureStore(GOLDEN, "hf:owl/vit")["tissue"].bag()[0],
    )
    (out / "x.h5").write_bytes(b"")
    assert main(arguments) == 3
    printed = capsys.readouterr()
    assert "x.h5: " in printed.err
    assert printed.out == f"2 slides, 1 failed: {again}\n"
