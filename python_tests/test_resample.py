"""The area mean: exact, the same bits on every path, and errors for unusable buffers."""

import importlib.util
import os
import subprocess
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from motet.io import native
from motet.io.tiling import resample
from motet.io.tiling.resample import area_resample, area_resample_reference, area_resample_torch

from .bindings_helpers import LAYOUTS, STRANGE, Carved, outcome
from .conftest import ROOT
from .grid_helpers import noise

# The largest error of a mean before rounding, and how far below a half still rounds up.
EXACT, TIE = Fraction(1, 10**11), Fraction(1, 10**9)


def exact(image: np.ndarray, top: float, left: float, ratio: float) -> list[Fraction]:
    """Return the mean of one window per channel, as exact fractions."""
    up, side = [Fraction(top), Fraction(left)], Fraction(ratio)

    def shares(begin: Fraction, count: int) -> list[Fraction]:
        return [max(Fraction(0), min(i + 1, begin + side) - max(i, begin)) for i in range(count)]

    down, across = (shares(begin, count) for begin, count in zip(up, image.shape, strict=False))
    return [
        sum(
            (a * b * int(image[y, x, c]) for y, a in enumerate(down) for x, b in enumerate(across)),
            Fraction(0),
        )
        / side**2
        for c in range(3)
    ]


def assert_correctly_rounded(image: np.ndarray, rows: Any, columns: Any, ratio: float) -> None:
    result = area_resample(image, rows, columns, ratio)
    for i, top in enumerate(rows):
        for j, left in enumerate(columns):
            for got, mean in zip(
                result[i, j].tolist(), exact(image, top, left, ratio), strict=True
            ):
                low = got - Fraction(1, 2)
                assert low - TIE - EXACT <= mean < low + 1 + EXACT


places = st.one_of(
    st.integers(0, 100).map(float),
    st.integers(0, 800).map(lambda n: n / 8),
    st.floats(0, 100, allow_nan=False),
)
ratios = st.one_of(
    st.sampled_from([1.0, 2.0, 3.0, 4.0, 6.0, 2.5, 1.0005, 2.004008016, 1.02]),
    st.floats(1, 9, allow_nan=False),
)


@st.composite
def windows(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Draw an image, windows anywhere in it and in any order, and their size."""
    ratio = draw(ratios)
    least = int(np.ceil(ratio))
    height, width = (draw(st.integers(least, least + 12)) for _ in range(2))
    rows, columns = (
        np.array([min(x, side - ratio) for x in draw(st.lists(places, max_size=5))], float)
        for side in (height, width)
    )
    return noise(height, width, 3, seed=draw(st.integers(0, 9))), rows, columns, ratio


@given(windows())
def test_means_are_correctly_rounded(drawn: Any) -> None:
    assert_correctly_rounded(*drawn)


@given(windows())
def test_all_forms_are_equal(drawn: Any) -> None:
    image, rows, columns, ratio = drawn
    expected = area_resample_reference(image, rows, columns, ratio)
    assert expected.shape == (len(rows), len(columns), 3)
    assert np.array_equal(area_resample(image, rows, columns, ratio), expected)
    from_torch = area_resample_torch(torch.from_numpy(image), rows, columns, ratio)
    assert from_torch.dtype == torch.uint8
    assert np.array_equal(from_torch.numpy(), expected)
    # Strided input and output work, and no byte beside the output is written.
    wide, target = noise(image.shape[0] + 2, image.shape[1] + 3, 3), noise(len(rows) + 2, 9, 3)
    wide[1:-1, 2:-1] = image
    before = target.copy()
    area_resample(wide[1:-1, 2:-1], rows, columns, ratio, out=target[1:-1, 1 : 1 + len(columns)])
    assert np.array_equal(target[1:-1, 1 : 1 + len(columns)], expected)
    target[1:-1, 1 : 1 + len(columns)] = before[1:-1, 1 : 1 + len(columns)]
    assert np.array_equal(target, before)


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 300])
def test_whole_ratios_round_halves_up(ratio: int) -> None:
    """Means equal those of integer arithmetic: ties round up, however 1 / ratio^2 is rounded."""
    count = max(2, 600 // ratio)
    image = noise(ratio * count + 1, ratio * count + 2, 3)
    image[: ratio * count : 2] = image[: ratio * count : 2] // 200 * 255
    for shift in (0, 1):
        blocks = image[shift:, shift:][: ratio * count, : ratio * count].astype(np.int64)
        sums = blocks.reshape(count, ratio, count, ratio, 3).sum((1, 3))
        at = np.arange(count) * ratio + float(shift)
        expected = (2 * sums + ratio**2) // (2 * ratio**2)
        assert np.array_equal(area_resample(image, at, at, ratio), expected)


@given(st.integers(0, 255), ratios, st.floats(0, 3))
@example(255, 2.004008016, 0.3)
def test_constant_images_stay_what_they_are(level: int, ratio: float, begin: float) -> None:
    image = np.full((40, 40, 3), level, np.uint8)
    at = begin + ratio * np.arange(int((40 - begin) / ratio))
    assert (area_resample(image, at, at, ratio) == level).all()


def test_a_window_may_end_beyond_by_rounding_alone() -> None:
    image = noise(9, 9, 3)
    last = np.array([9 - 2.004 + 1e-7])
    assert np.array_equal(
        area_resample(image, last, last, 2.004),
        area_resample(image, last - 1e-7, last - 1e-7, 2.004),
    )


@pytest.mark.parametrize("native", [True, False])
def test_refusals(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(resample, "_module", None)
    image, zero = noise(8, 8, 3), np.zeros(1)
    for rows, ratio, words in [
        (zero, 0.5, "ratio: expected a number of 1 or more, got 0.5"),
        (zero, np.nan, "ratio: expected a number of 1 or more, got nan"),
        (zero, 9.0, "within the 8 px of the image"),
        (zero - 0.1, 2.0, "within the 8 px of the image"),
        (zero + 6.1, 2.0, "within the 8 px of the image"),
        (zero + np.nan, 2.0, "within the 8 px of the image"),
    ]:
        with pytest.raises(ValueError, match=words):
            area_resample(image, rows, zero, ratio)
        with pytest.raises(ValueError, match=words):
            area_resample(image, zero, rows, ratio)


def test_without_the_module_numpy_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    image, at = noise(30, 30, 3), 2.1 * np.arange(14)
    expected = area_resample(image, at, at, 2.1)
    monkeypatch.setattr(resample, "_module", None)
    assert np.array_equal(area_resample(image, at, at, 2.1), expected)


@pytest.mark.native
def test_the_module_is_built_where_the_other_one_is() -> None:
    assert native.status() == ""


@pytest.mark.native
@settings(max_examples=6 * settings().max_examples)
@given(st.data())
def test_bindings_fuzz(data: st.DataObject) -> None:
    """For any buffers the function computes or raises, and writes to its result only."""
    ratio = data.draw(st.sampled_from([1.0, 2.0, 4.0, 1.7, 3.0, 0.5, np.nan, np.inf, 1e300]))
    height, width, h, w = (data.draw(st.integers(0, n)) for n in (12, 12, 4, 4))
    made: list[Carved] = []

    def array(kind: str, *shape: int) -> Any:
        if not data.draw(st.integers(0, 15)):
            kind = data.draw(st.sampled_from(["u1", "i1", "f4", "f8", ">f8", "i8", "S1", "?"]))
        if not data.draw(st.integers(0, 15)):
            shape = data.draw(st.lists(st.integers(0, 6), max_size=4).map(tuple))
        layout = "plain" if data.draw(st.integers(0, 7)) else data.draw(st.sampled_from(LAYOUTS))
        made.append(Carved(data.draw(st.integers(0, 9999)), kind, shape, layout))
        return made[-1].array

    image, out = array("u1", height, width, 3), array("u1", h, w, 3)
    rows, columns = array("f8", h), array("f8", w)
    for begins, side in ((rows, height), (columns, width)):
        if data.draw(st.integers(0, 7)) and begins.dtype == np.float64 and begins.flags.writeable:
            span = max(0.0, side - ratio) if ratio < 1e9 else 0.0
            begins[...] = data.draw(st.sampled_from([0.0, 0.3, 1.0])) * span
            begins[...] = np.floor(begins) if data.draw(st.booleans()) else begins
    for carved in made:
        carved.before = carved.memory.copy()
    choice = data.draw(st.integers(0, 15))
    arguments: list[Any] = [image, rows, columns, ratio, out]
    if choice < 5:
        arguments[choice] = data.draw(st.sampled_from(STRANGE))
    elif choice == 5:
        out.flags.writeable = False
    elif choice == 6 and image.ndim > 1:
        arguments[4] = image[:h, :w]
    module: Any = resample._module
    computed = outcome(module.area_resample, *arguments)
    for carved in made:
        if computed and np.shares_memory(carved.array, arguments[4]):
            assert carved.changed_within()
        else:
            assert carved.untouched()
    if computed:
        image, rows, columns, ratio, out = arguments
        alone = np.empty(out.shape, np.uint8)
        module.area_resample(np.array(image), np.array(rows), np.array(columns), ratio, alone)
        assert np.array_equal(out, alone)


# Results have the same bits for all widths of registers.
SCRIPT = """
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
generator, results = np.random.default_rng(0), {}
for size in (*range(8, 60), 1030):
    image = generator.integers(0, 256, (size, size, 3), np.uint8)
    for ratio in (1.0, 2.0, 4.0, 1.9, 3.2, 6.0, 2.004008016):
        for begin in (0.0, 0.2):
            at = begin + ratio * np.arange(int((size - begin) / ratio))
            out = np.empty((len(at), len(at), 3), np.uint8)
            module.area_resample(image, at, at, ratio, out)
            results[f"{size} {ratio} {begin}"] = out
np.savez(sys.argv[2], **results)
"""


@pytest.mark.native
def test_every_width_of_registers(tmp_path: Any) -> None:
    spec = importlib.util.find_spec("motet.io._C")
    assert spec is not None
    assert spec.origin is not None
    results = []
    for simd in (16, 32, 64):
        file = tmp_path / f"{simd}.npz"
        subprocess.run(
            [sys.executable, "-c", SCRIPT, spec.origin, str(file)],
            env=os.environ | {"MOTET_SIMD": str(simd)}, check=True, cwd=ROOT,
        )  # fmt: skip
        results.append(np.load(file))
    for name in results[0]:
        for other in results[1:]:
            assert np.array_equal(results[0][name], other[name]), name
