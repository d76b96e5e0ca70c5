"""The cost of a step grows linearly with the data; picture, page and numbers agree."""

import json
import re
import sys
from importlib import import_module

import pytest

from .conftest import ROOT


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT)
    return import_module("benchmarks.cost_growth")


def test_picture_page_and_numbers_agree(growth) -> None:
    report, again = json.loads(growth.RESULT.read_text()), "run `benchmarks/cost_growth.py --draw`"
    assert growth.digest(report) in growth.PICTURE.read_text(), again
    page = growth.PAGE.read_text()
    assert growth.with_table(page, report) == page, again
    for row, predicted in zip(report["h200"], growth.predict_h200(), strict=True):
        assert row.pop("predicted_ms") == pytest.approx(predicted.pop("predicted_ms"), rel=1e-6), (
            again
        )
        assert row == predicted, again


def test_the_measured_cost_is_linear(growth) -> None:
    """Measured times grow linearly from 4,000 to 480,000 tokens and from 1 to 16 modalities."""
    report = json.loads(growth.RESULT.read_text())
    assert {(r["bags"], r["patches"], r["modalities"]) for r in report["cpu"]} == set(
        growth.batches()
    )
    grown = growth.slopes(report)
    assert len(grown) == 6
    for name, exponent in grown.items():
        if name.startswith("motet"):
            assert 0.85 <= exponent <= 1.15, name
    for row in report["cpu"]:
        assert row["error"]["motet"] <= 2 * row["error"]["literal"] + 1e-6


def test_the_predicted_cost_is_linear(growth) -> None:
    """Predictions for an H200 are linear from 8 bags of 8,000 patches on.

    For smaller batches, launches and latents take most of the time.
    """
    h200_rows = json.loads(growth.RESULT.read_text())["h200"]
    long = [
        r for r in h200_rows if r["bags"] == 8 and r["patches"] >= 8000 and r["modalities"] == 1
    ]
    times = [row["predicted_ms"] for row in long]
    assert 0.8 <= growth.slope([row["patches"] for row in long], times) <= 1.0
    rows = growth.modality_rows(h200_rows)
    times = [row["predicted_ms"] for row in rows]
    assert 0.9 <= growth.slope([row["modalities"] for row in rows], times) <= 1.0
    measured = [row for row in h200_rows if "measured_ms" in row]
    assert len(measured) == 8


def test_it_measures(growth, monkeypatch, tmp_path, capsys) -> None:
    """The script runs and writes its files, at sizes too small for real timings."""
    monkeypatch.setattr(growth, "PATCHES", (5, 10))
    monkeypatch.setattr(growth, "MODALITIES", (1, 2))
    for name in ("FEW", "MANY"):
        monkeypatch.setattr(growth, name, 10)
    monkeypatch.setattr(growth, "LINEAR_FROM", 1)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{growth.BEGIN}old\n{growth.END}after\n")
    for name, path in (("RESULT", "numbers.json"), ("PICTURE", "picture.svg"), ("PAGE", page)):
        monkeypatch.setattr(growth, name, tmp_path / path)
    monkeypatch.setattr(sys, "argv", ["cost_growth.py"])
    assert growth.main() == 0
    assert re.search(r"8 x 10, 2 modalities: motet .* ms, literal", capsys.readouterr().out)
    report = json.loads(growth.RESULT.read_text())
    assert growth.digest(report) in growth.PICTURE.read_text()
    first = page.read_text()
    assert first.startswith("before\n")
    assert first.endswith("after\n")
    assert "| 2 | " in first
    assert "old" not in first
    monkeypatch.setattr(sys, "argv", ["cost_growth.py", "--draw"])
    assert growth.main() == 0
    assert page.read_text() == first
    assert json.loads(growth.RESULT.read_text()) == report
