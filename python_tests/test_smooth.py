"""The smoothing of thumbnails: C++ has the bits of scipy, and refuses buffers that do not fit."""

from typing import Any

import numpy as np
import pytest
from motet.io.native import native
from motet.io.tiling import background

from .bindings_helpers import LAYOUTS, STRANGE, Carved, outcome

pytestmark = pytest.mark.native
module: Any = native()


@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (70, 3), (40, 1025), (600, 13)])
def test_both_ways_give_the_same_bits(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = 255 * np.random.default_rng(0).random(shape, np.float32)
    for sigma in (0.3, 1.0, 2.7, 8.0):
        smooth = background.smooth(image, sigma)
        with monkeypatch.context() as patch:
            patch.setattr(background, "native", lambda: None)
            expected = background.smooth(image, sigma)
        assert smooth.dtype == expected.dtype == np.float32
        assert np.array_equal(smooth, expected)


def test_what_a_smoothing_is() -> None:
    image = np.zeros((9, 11), np.float32)
    image[4, 5] = 1
    out = np.empty_like(image)
    module.smooth(image, [0.5, 0.25], out)
    kernel = np.array([0.25, 0.5, 0.25])
    assert np.array_equal(out[3:6, 4:7], np.outer(kernel, kernel).astype(np.float32))
    assert out.sum() == 1
    image[:] = 7  # edges are continued
    module.smooth(image, [0.5, 0.125, 0.125], out)
    assert (out == 7).all()


@pytest.mark.parametrize("layout", sorted({*LAYOUTS}))
def test_only_the_result_is_written(layout: str) -> None:
    for seed, (kind, shape) in enumerate([("f4", (5, 6)), ("f8", (5, 6)), ("f4", (30,))]):
        image, out = Carved(seed, "f4", (5, 6), "plain"), Carved(seed + 9, kind, shape, layout)
        if outcome(module.smooth, image.array, [0.5, 0.25], out.array):
            assert out.changed_within()
        else:
            assert out.untouched()
        assert image.untouched()


def test_arguments_that_do_not_fit() -> None:
    image = np.zeros((5, 6), np.float32)
    for strange in STRANGE:
        assert not outcome(module.smooth, strange, [1.0], image)
        assert not outcome(module.smooth, image, [1.0], strange)
    for weights, out, message in [
        ([], np.empty_like(image), "weights: expected at least one"),
        ([1.0], image, "out: expected a buffer apart from the image"),
        (
            [1.0],
            np.empty((5, 7), np.float32),
            r"out: expected a contiguous array of float32 \[5, 6\]",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            module.smooth(image, weights, out)
