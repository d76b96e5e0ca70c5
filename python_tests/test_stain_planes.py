"""Planes of stains: C++ has the bits of numpy, and raises for buffers that do not fit."""

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from motet.io import load_encoder
from motet.io.encoders import stain_stats

from .bindings_helpers import LAYOUTS, STRANGE, Carved, outcome
from .conftest import ROOT

stain_planes: Any = stain_stats._native

SIDES = [*range(1, 20), 30, 63, 64, 129]


def noise(*shape: int) -> np.ndarray:
    """Make random grey levels, many of them 0 and 255."""
    generator = np.random.default_rng(shape)
    return np.clip(generator.integers(-100, 356, shape), 0, 255).astype(np.uint8)


def computed(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    planes, within = stain_stats._planes(pixels)
    return planes.copy(), within


@pytest.mark.native
@pytest.mark.parametrize("height", SIDES)
def test_both_ways_give_the_same_bits(height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for width in SIDES:
        for pixels in (noise(3, height, width, 3), np.full((1, height, width, 3), 255, np.uint8)):
            planes, within = computed(pixels)
            with monkeypatch.context() as patch:
                patch.setattr(stain_stats, "_native", None)
                expected = computed(pixels)
            assert np.array_equal(planes, expected[0])
            assert np.array_equal(within, expected[1])


def test_what_the_planes_are() -> None:
    pixels = noise(2, 30, 21, 3)
    down, across = stain_stats._cuts(30), stain_stats._cuts(21)
    planes, within = computed(pixels)
    left = np.zeros((2, 3))
    for i, j in np.ndindex(planes.shape[2:]):
        piece = pixels[:, down[i] : down[i + 1], across[j] : across[j + 1]].astype(float)
        mean = np.floor(piece.mean((1, 2)) * 16 + 0.5) / 16
        density = -np.log10((mean + 0.5) / 255.5)
        stains = density @ stain_stats.UNMIX
        np.testing.assert_allclose(planes[:3, :, i, j], stains.T, atol=2e-6)
        np.testing.assert_allclose(planes[3, :, i, j], density.mean(1), atol=1e-6)
        left += (piece**2 - mean[:, None, None] ** 2).sum((1, 2))
    assert np.array_equal(within, 256 * left)


def test_without_the_module_rows_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, patches = load_encoder("stain-stats"), [noise(3, 64, 48, 3), noise(2, 61, 47, 3)]
    expected = [encoder.encode(pixels) for pixels in patches]
    monkeypatch.setattr(stain_stats, "_native", None)
    for pixels, rows in zip(patches, expected, strict=True):
        assert np.array_equal(encoder.encode(pixels), rows)


def test_squares_of_many_rows_do_not_overflow() -> None:
    """The squares of 66,052 rows of white sum to 2**32 or more."""
    pixels = np.full((1, 70_000, 1, 3), 255, np.uint8)
    planes, within = computed(pixels)
    assert (within == 0).all()
    assert (planes == planes[..., :1, :1]).all()


@pytest.mark.native
@pytest.mark.parametrize(
    ("down", "words"),
    [
        ([0, 4, 7], "down: expected 0 to 8 in steps of 1 to 7"),
        ([0, 8], "in steps of 1 to 7"),
        ([1, 4, 8], "in steps of 1 to 7"),
        ([0, 5, 4, 8], "in steps of 1 to 7"),
        ([0, 2**62, 8], "in steps of 1 to 7"),
        ([0, -(2**63), 8], "in steps of 1 to 7"),
        ([8], "in steps of 1 to 7"),
        ([], "in steps of 1 to 7"),
    ],
)
def test_cuts_that_do_not_fit_are_refused(down: list[int], words: str) -> None:
    planes = np.empty((4, 1, max(0, len(down) - 1), 1), np.float32)
    with pytest.raises(ValueError, match=words):
        stain_planes(
            np.zeros((1, 8, 4, 3), np.uint8), np.array(down, np.int64), np.array([0, 4]),
            stain_stats.TABLE, planes, np.empty((1, 3), np.int64),
        )  # fmt: skip


@pytest.mark.native
@settings(max_examples=3 * settings().max_examples)
@given(st.data())
def test_bindings_fuzz(data: st.DataObject) -> None:
    """For any buffers the function computes or raises, and writes to its results only."""
    patches, height, width = (data.draw(st.integers(0, n)) for n in (3, 12, 12))
    made: list[Carved] = []

    def array(kind: str, *shape: int, given: Any = None) -> Any:
        valid = True
        if not data.draw(st.integers(0, 31)):
            kind, valid = data.draw(st.sampled_from(["u1", "i1", "f4", "f8", ">i8", "S1"])), False
        if not data.draw(st.integers(0, 31)):
            shape, valid = data.draw(st.lists(st.integers(0, 6), max_size=5).map(tuple)), False
        layout = "plain" if data.draw(st.integers(0, 15)) else data.draw(st.sampled_from(LAYOUTS))
        made.append(Carved(data.draw(st.integers(0, 9999)), kind, shape, layout))
        if valid and given is not None and made[-1].array.flags.writeable:
            made[-1].array[...] = given
        return made[-1].array

    cuts = [stain_stats._cuts(side) if side else np.array([0]) for side in (height, width)]
    h, w = (len(places) - 1 for places in cuts)
    pixels = array("u1", patches, height, width, 3)
    down, across = (array("i8", len(places), given=places) for places in cuts)
    planes, within = array("f4", 4, patches, h, w), array("i8", patches, 3)
    for carved in made:
        carved.before = carved.memory.copy()
    arguments: list[Any] = [pixels, down, across, stain_stats.TABLE, planes, within]
    choice = data.draw(st.integers(0, 31))
    if choice < 6:
        arguments[choice] = data.draw(st.sampled_from(STRANGE))
    elif choice < 8:
        arguments[choice - 2].flags.writeable = False
    elif choice == 8 and not data.draw(st.booleans()):
        arguments[5] = down
    fine = outcome(stain_planes, *arguments)
    for carved in made:
        if fine and any(carved.array is written for written in arguments[4:]):
            assert carved.changed_within()
        else:
            assert carved.untouched()
    if fine:
        alone = np.empty_like(planes, order="C"), np.empty((patches, 3), np.int64)
        stain_planes(*map(np.array, arguments[:4]), *alone)
        assert np.array_equal(planes, alone[0])
        assert np.array_equal(within, alone[1])


# Results have the same bits for all widths of registers.
SCRIPT = """
import sys
import numpy as np
from motet.io.encoders import stain_stats
assert stain_stats._native is not None
generator, results = np.random.default_rng(0), {}
for size in (*range(1, 40), 64, 129, 256):
    pixels = generator.integers(0, 256, (2, size, size, 3), np.uint8)
    planes, within = stain_stats._planes(pixels)
    results |= {f"{size} planes": planes.copy(), f"{size} within": within}
np.savez(sys.argv[1], **results)
"""


@pytest.mark.native
def test_every_width_of_registers(tmp_path: Any) -> None:
    results = []
    for simd in (16, 32, 64):
        file = tmp_path / f"{simd}.npz"
        subprocess.run(
            [sys.executable, "-c", SCRIPT, str(file)],
            env=os.environ | {"MOTET_SIMD": str(simd)}, check=True, cwd=ROOT,
        )  # fmt: skip
        results.append(np.load(file))
    for name in results[0]:
        for other in results[1:]:
            assert np.array_equal(results[0][name], other[name]), name
