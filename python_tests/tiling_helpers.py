"""The command `motet tile`, encoders, and what a store holds: for tests of tiling."""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

OPTIONS: dict[str, Any] = {"encoder": "stain-stats", "downsample": 2, "tile_px": 64}


def command(slides: Path, out: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "motet", "tile", str(slides), "--out", str(out)),
        *("--encoder", "stain-stats", "--downsample", "2", "--tile-px", "64", "--no-report"),
        *more,
    ]


def tile(slides: Path, out: Path, *more: str, code: int = 0, timeout: int = 120) -> str:
    run = command(slides, out, *more)
    done = subprocess.run(run, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def content(store: Path) -> dict[str, str]:
    """Hash every file that depends on the inputs alone: all but logs."""
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.relative_to(store).parts[0] in ("slides", "run.json", "failed")
    }


def leftovers(store: Path) -> list[Path]:
    return [p for name in ("leases", ".tmp") for p in (store / name).rglob("*") if p.is_file()]


class Overflowing:
    """An encoder whose features are too large for float16."""

    id, width, weights, transform, precision, input_px = "loud", 2, "none", "none", "fp32", None

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.full((len(pixels), 2), 1e6, np.float32)

    def spec(self) -> dict[str, Any]:
        return {"id": self.id, "width": 2, "weights": "none", "transform": "none",
                "precision": "fp32"}  # fmt: skip


class Quiet(Overflowing):
    """An encoder of constant features."""

    id = "quiet"

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.full((len(pixels), 2), 0.5, np.float32)


class NanOnce(Quiet):
    """A further encoder that gives NaN for the first slide that it sees, and then constants."""

    id = "nan/once"

    def __init__(self) -> None:
        self.first = True

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        features = super().encode(pixels)
        if self.first:
            features[:] = np.nan
        self.first = False
        return features
