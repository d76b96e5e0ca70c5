"""Arrays in guarded memory and invalid arguments, for tests of what the C++ modules write."""

from typing import Any

import numpy as np

REFUSALS = (ValueError, TypeError, BufferError, OverflowError)
GUARD = 64  # bytes on both sides of every array
LAYOUTS = ["plain", "plain", "plain", "sliced", "reversed", "turned", "repeated", "unaligned"]
STRANGE: list[Any] = [None, 3, "text", b"bytes", bytearray(8), memoryview(b"1234"), [1.0], object()]


class Carved:
    """An array with guard bytes around it, and a copy of the memory's first content."""

    def __init__(self, seed: int, kind: str, shape: tuple[int, ...], layout: str) -> None:
        dtype = np.dtype(kind)
        generator = np.random.default_rng(seed)
        wide = (2, *shape) if layout in ("sliced", "reversed") else shape
        count = int(np.prod(wide, dtype=int)) * dtype.itemsize
        self.memory = generator.integers(0, 256, count + 2 * GUARD + 1, np.uint8)
        start = GUARD + (layout == "unaligned")
        # Mostly normal numbers for float and complex dtypes; random bits for all others.
        inner = self.memory[start : start + count]
        if dtype.kind in "fc" and dtype.isnative and seed % 4:
            numbers = generator.standard_normal(count // dtype.itemsize * (1 + (dtype.kind == "c")))
            real = np.dtype(f"f{dtype.itemsize // (1 + (dtype.kind == 'c'))}")
            inner[:] = np.frombuffer(numbers.astype(real).tobytes(), np.uint8)
        array = inner.view(dtype).reshape(wide)
        if layout == "sliced":
            array = np.moveaxis(array.reshape(*shape, 2), -1, 0)[0] if shape else array[0]
        elif layout == "reversed":
            array = array[0][::-1] if shape else array[0]
        elif layout == "turned":
            array = array.T
        elif layout == "repeated" and shape:
            array = np.broadcast_to(array[:1], shape)
        self.array, self.before = array, self.memory.copy()

    def untouched(self) -> bool:
        return np.array_equal(self.memory, self.before)

    def changed_within(self) -> bool:
        """Return whether no byte outside the array changed."""
        now, inner = self.memory.copy(), np.zeros(len(self.memory), bool)
        start = self.array.__array_interface__["data"][0] - self.memory.ctypes.data
        inner[start : start + self.array.nbytes] = True
        return np.array_equal(now[~inner], self.before[~inner])


def outcome(call: Any, *arguments: Any) -> bool:
    """Return whether a call computed a result; False if it raised one of REFUSALS."""
    try:
        call(*arguments)
    except REFUSALS:
        return False
    return True
