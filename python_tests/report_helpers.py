"""Made stores for the tests of the report: their slides exist only while they are read."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

HOSTILE = "<script>alert(1)</script>\n\"'&\u202e/../../x" + "long" * 100


class MadeSlides:
    """Stands in for a FeatureStore, and makes each slide when it is read."""

    def __init__(self, folder: Path, count: int, **changes: Any) -> None:
        self.folder, self.count, self.changes = folder, count, changes
        self.failed: dict[str, dict[str, Any]] = {}
        self.run: dict[str, Any] = {}
        self.not_taken: dict[str, str] = {}
        self.others: dict[str, SimpleNamespace] = {}
        for key in self:
            (folder / "slides" / f"{key}.zarr").mkdir(parents=True)

    def __iter__(self) -> Iterator[str]:
        return (f"slide-{n:05}" for n in range(self.count))

    def __getitem__(self, key: str) -> SimpleNamespace:
        return self.others.get(key) or made_slide(key, **self.changes)


def made_slide(
    key: str, side: int = 40, encoders: list[str] | None = None, **attrs: Any
) -> SimpleNamespace:
    """Make a slide of 10 x 7.5 patches of 100 px: tissue on the left, flags in the first row."""
    thumb = np.full((side * 3 // 4, side, 3), 240, np.uint8)
    thumb[:, : side // 2] = (200, 120, 170)
    mask = np.zeros(thumb.shape[:2], bool)
    mask[:, : side // 2] = True
    x, y = np.meshgrid(np.arange(5) * 100, np.arange(7) * 100)
    flags = np.zeros(35, np.uint8)
    flags[:5] = 0, 1, 2, 4, 8
    counts = {"grid": 70, "tissue": 35, "patches": 35, "edge": 1, "pen": 1, "blur": 1, "corrupt": 1}
    known = {
        "name": f"{key}.svs", "source": {"path": f"/data/{key}.svs"}, "status": "ok", "mpp": 0.5,
        "mpp_source": "file", "level": 0, "reader": "cucim", "vendor": "aperio", "width": 1000,
        "height": 750, "footprint_px": 100.0, "counts": counts,
    }  # fmt: skip
    coords = np.stack([x.ravel(), y.ravel()], 1).astype(np.int32)
    return SimpleNamespace(
        attrs=known | attrs, coords=coords, flags=flags, thumb=thumb, mask=mask, encoders=encoders
    )
