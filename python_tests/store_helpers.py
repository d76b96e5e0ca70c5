"""Feature stores for tests: synthetic slides, written with the library."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
from motet.io.store.source import describe
from motet.io.store.write import StoreWriter

GOLDEN = Path(__file__).parent / "golden" / "store-v1"
TILING = {"border": "drop", "downsample": 4.0, "min_tissue": 0.1, "mpp": None, "tile_px": 256}


@dataclasses.dataclass(frozen=True)
class Slide:
    """A source slide, with the fields that the commit protocol reads."""

    path: Path
    name: str
    pseudonym: str | None = None

    @property
    def key(self) -> str:
        return f"{Path(self.name).stem}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"


def spec(name: str, width: int) -> dict[str, object]:
    return {"id": name, "width": width, "weights": "none", "transform": "0", "precision": "fp32"}


def numbers(n: int, width: int) -> np.ndarray:
    """Return features that float16 represents exactly."""
    return (np.arange(n * width, dtype=np.float32).reshape(n, width) - 7) / 8


def put(
    writer: StoreWriter, source: Slide, features: np.ndarray, flags: list[int] | None = None,
    **attrs: object,
) -> None:  # fmt: skip
    """Write a slide of synthetic features to the store."""
    n, width = features.shape
    states = np.asarray(flags or [0] * n, np.uint8)
    rows = np.flatnonzero((states & 8) == 0)
    places = np.stack([np.arange(n) % 7, np.arange(n) // 7], axis=1) * 256
    fields = attrs if "source" in attrs else {**describe(source), **attrs}
    with writer.begin(source.key, fields, places, np.ones(n), states, None, None, width) as slide:
        slide.write(rows[::-1], features[rows[::-1]])
        slide.commit()


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
