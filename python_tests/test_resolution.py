"""The resolution of slides: the user's and the file's, and pixels that are not square."""

from pathlib import Path
from typing import Any

import pytest
from motet.io.errors import SlideError
from motet.io.store.read import FeatureStore
from motet.io.tiling.tile_slides import tile_slides

from .slides import make_pyramid

pytest.importorskip("tifffile")


def test_the_users_mpp_wins(tmp_path: Path) -> None:
    """A value of the user is used and recorded; a contradiction with the file is reported."""
    for name in ("wrong", "right", "none"):
        mpp = {"wrong": 0.05, "right": 0.5, "none": None}[name]
        make_pyramid(tmp_path / f"{name}.tif", (600, 500), factors=(1,), mpp=mpp)
    (tmp_path / "list.csv").write_text("path,mpp\nwrong.tif,0.505\nright.tif,\nnone.tif,0.5\n")
    options: dict[str, Any] = {"encoder": "stain-stats", "mpp": 1.0, "tile_px": 64, "workers": 0}

    def run(out: str, slides: str, **more: Any) -> tuple[dict[str, Any], list[str]]:
        events: list[dict[str, Any]] = []
        tiled = tile_slides(tmp_path / slides, tmp_path / out, progress=events.append, **options,
                            **more)  # fmt: skip
        assert tiled.done == (3 if slides == "list.csv" else 1)
        attrs = {
            s.attrs["name"].split(".")[0]: s.attrs for s in FeatureStore(tmp_path / out).values()
        }
        return attrs, [event["message"] for event in events if event["event"] == "warning"]

    attrs, warnings = run("a", "list.csv")
    values = {name: (one["mpp"], one["mpp_source"]) for name, one in attrs.items()}
    assert values == {"wrong": (0.505, "list"), "right": (0.5, "file"), "none": (0.5, "list")}
    assert attrs["wrong"]["mpp_file"] == pytest.approx(0.05)
    assert attrs["none"]["mpp_file"] is None
    assert "mpp_file" not in attrs["right"]
    (message,) = warnings
    assert message.startswith(f"{tmp_path / 'wrong.tif'}: its file says 0.05 micrometres per px")
    assert message.endswith(", and the list says 0.505, which is used")
    attrs, warnings = run("b", "list.csv", slide_mpp=0.5)
    values = {name: (one["mpp"], one["mpp_source"]) for name, one in attrs.items()}
    assert values == {"wrong": (0.505, "list"), "right": (0.5, "user"), "none": (0.5, "list")}
    assert len(warnings) == 1  # 0.5 is what the file of right.tif says
    attrs, _ = run("c", "list.csv", slide_mpp={"wrong": 0.5})
    assert (attrs["wrong"]["mpp"], attrs["wrong"]["mpp_source"]) == (0.5, "table")
    attrs, warnings = run("d", "right.tif", slide_mpp=0.25)
    assert (attrs["right"]["mpp"], attrs["right"]["footprint_px"]) == (0.25, 256)
    assert len(warnings) == 1
    (tmp_path / "list.csv").write_text("path,mpp\nwrong.tif,0\n")
    with pytest.raises(SlideError, match="line 2, column mpp: expected a number above 0, got '0'"):
        run("e", "list.csv")
