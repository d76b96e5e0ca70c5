"""For any arguments, the C++ module computes or raises, and writes to nothing but its results.

A few seconds in `make test`, long in `make soak`. `make sanitize` builds the module so that every
invalid read or write is reported, even if it changes no value.
"""

import importlib.util
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from motet.kernels import native

from .bindings_helpers import LAYOUTS, REFUSALS, STRANGE, Carved, outcome
from .conftest import ROOT

pytestmark = pytest.mark.native
_C: Any = native.native()

# Most combinations are refused at once, and a call takes only a millisecond.
fuzzed = settings(max_examples=6 * settings().max_examples)
KINDS = ["c8", "c16", "f4", "f8", ">c8", ">f4", "f2", "i4", "i2", "?", "S4", "c8,f4"]


shapes = st.one_of(
    st.just(()), st.tuples(st.integers(0, 70)), st.tuples(st.integers(0, 9), st.integers(0, 9))
)
weights = st.one_of(
    st.just(None), st.lists(st.floats(width=32), max_size=4), st.sampled_from(STRANGE)
)
threads = st.sampled_from([1, 1, 2, 5, 0, -3, 2**31 - 1, 2**40])


@st.composite
def operands(draw: st.DrawFn) -> tuple[list[Any], Any, list[Carved]]:
    """Draw inputs and an output; most fit together, others differ in dtype, shape or layout."""
    kind, shape = draw(st.sampled_from(KINDS)), draw(shapes)
    kind = draw(st.sampled_from([kind, "c8", "c16", "f4", "f8"]))
    made: list[Carved] = []

    def array() -> Any:
        own_kind = kind if draw(st.integers(0, 7)) else draw(st.sampled_from(KINDS))
        own_shape = shape if draw(st.integers(0, 7)) else draw(shapes)
        layout = "plain" if draw(st.integers(0, 4)) else draw(st.sampled_from(LAYOUTS))
        made.append(Carved(draw(st.integers(0, 9999)), own_kind, own_shape, layout))
        return made[-1].array

    inputs: list[Any] = [array() for _ in range(draw(st.sampled_from([0, 1, 2, 2, 2, 3, 4, 40])))]
    out = array()
    choice = draw(st.integers(0, 9))
    if choice == 0 and inputs:
        out = inputs[-1]
    elif choice == 1 and out.ndim == 1 and len(out) > 2:
        inputs, out = [*inputs, out[:-1]], out[1:]
    elif choice == 2:
        inputs.append(draw(st.sampled_from(STRANGE)))
    elif choice == 3:
        out = draw(st.sampled_from(STRANGE))
    elif choice == 4 and isinstance(out, np.ndarray):
        out.flags.writeable = False
    return inputs, out, made


def check(call: Any, inputs: list[Any], out: Any, made: list[Carved], *, alone: Any) -> None:
    """Call and check all memory; if it computed, a call on copies must give the same bits."""
    copies = [np.array(x) for x in inputs if isinstance(x, np.ndarray | np.generic)]
    computed = outcome(call, inputs, out)
    for carved in made:
        if computed and np.shares_memory(carved.array, out):
            assert carved.changed_within()
        else:
            assert carved.untouched()
    if computed and isinstance(out, np.ndarray):
        assert len(copies) == len(inputs)
        expected = np.empty_like(out)
        alone(copies, expected)
        assert np.array(out).tobytes() == expected.tobytes()


@fuzzed
@given(operands(), weights, st.sampled_from(["principal", "circular", "other"]), threads)
def test_harmonic_merge(drawn: Any, weights: Any, phase: str, threads: int) -> None:
    inputs, out, made = drawn
    shares = [1 / max(1, len(inputs))] * len(inputs) if weights is None else weights
    check(
        lambda i, o: _C.harmonic_merge(i, shares, phase, o, threads), inputs, out, made,
        alone=lambda i, o: _C.harmonic_merge(i, shares, phase, o, 1),
    )  # fmt: skip


@fuzzed
@given(operands(), weights, threads)
def test_slerp(drawn: Any, weights: Any, threads: int) -> None:
    inputs, out, made = drawn
    shares = [1 / max(1, len(inputs))] * len(inputs) if weights is None else weights
    check(
        lambda i, o: _C.slerp(i, shares, o, threads), inputs, out, made,
        alone=lambda i, o: _C.slerp(i, shares, o, 1),
    )  # fmt: skip


@fuzzed
@given(st.data())
def test_standardise(data: st.DataObject) -> None:
    kind, out_kind = (
        data.draw(st.sampled_from(["float32", "float64", "bfloat16", "float16", "int8"]))
        for _ in range(2)
    )
    size = {"float32": "f4", "float64": "f8", "bfloat16": "i2", "float16": "i2", "int8": "i1"}
    full = "f8" if kind == "float64" else "f4"
    rows, dim, width, period = (data.draw(st.integers(0, n)) for n in (9, 40, 5, 4))
    made: list[Carved] = []

    def array(kind: str, *shape: int) -> Any:
        if not data.draw(st.integers(0, 15)):
            shape = data.draw(shapes)
        layout = "plain" if data.draw(st.integers(0, 7)) else data.draw(st.sampled_from(LAYOUTS))
        made.append(Carved(data.draw(st.integers(0, 9999)), kind, shape, layout))
        return made[-1].array

    x, out = array(size[kind], rows, dim), array(size[out_kind], rows, dim + width)
    positions = array(full, period, width) if width else None
    mean, rstd = array(full, rows), array(full, rows)
    first = data.draw(st.sampled_from([0, 1, 2**40, -1]))
    computed = outcome(
        _C.standardise, x, kind, positions, first, 1e-5, out, out_kind, mean, rstd,
        data.draw(threads),
    )  # fmt: skip
    for carved in made:
        results = computed and any(carved.array is result for result in (out, mean, rstd))
        assert carved.changed_within() if results else carved.untouched()


@fuzzed
@given(st.data())
def test_few_rows(data: st.DataObject) -> None:
    kind, backward = data.draw(st.sampled_from(["f4", "f8", "f8", "i4"])), data.draw(st.booleans())
    rows, outputs, inputs = (data.draw(st.integers(0, n)) for n in (20, 40, 70))
    made: list[Carved] = []

    def array(*shape: int) -> Any:
        dtype = kind if data.draw(st.integers(0, 15)) else data.draw(st.sampled_from(KINDS))
        if not data.draw(st.integers(0, 15)):
            shape = data.draw(shapes)
        layout = "plain" if data.draw(st.integers(0, 7)) else data.draw(st.sampled_from(LAYOUTS))
        made.append(Carved(data.draw(st.integers(0, 9999)), dtype, shape, layout))
        return made[-1].array

    ends = (outputs, inputs) if backward else (inputs, outputs)
    left, weight, out = array(rows, ends[0]), array(outputs, inputs), array(rows, ends[1])
    choice = data.draw(st.integers(0, 15))
    if choice == 0:
        out = left
    elif choice == 1:
        left = out[:]
    elif choice == 2:
        out.flags.writeable = False
    elif choice == 3:
        weight = data.draw(st.sampled_from(STRANGE))
    call = _C.few_rows_backward if backward else _C.few_rows
    computed = outcome(call, left, weight, out, data.draw(threads))
    for carved in made:
        if computed and carved.array is out:
            assert carved.changed_within()
        else:
            assert carved.untouched()
    if computed:
        assert out.flags.writeable
        assert not np.shares_memory(left, out)
        alone = np.empty_like(out)
        call(left, weight, alone, 1)
        assert out.tobytes() == alone.tobytes()


def test_huge_counts() -> None:
    """5000 inputs are computed; a shape with more elements than any memory holds is refused."""
    many = [np.full(3, j + 1j, np.complex64) for j in range(5000)]
    out = np.empty(3, np.complex64)
    _C.harmonic_merge(many, [1 / 5000] * 5000, "principal", out)
    assert np.isfinite(out).all()
    huge = np.broadcast_to(np.complex64(1), (1 << 40, 1 << 18))
    for target in (out, huge):
        with pytest.raises(REFUSALS):
            _C.harmonic_merge([huge], [1.0], "principal", target)
    with pytest.raises(REFUSALS):
        _C.harmonic_merge(many, [], "principal", out)


# Computes results with one register width, for sizes around every width.
SCRIPT = """
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
generator, results = np.random.default_rng(0), {}
for size in (*range(1, 40), 1023, 5000):
    for kind, real in (("c8", "f4"), ("c16", "f8")):
        parts = generator.standard_normal((3, 2, size)) * 2.0 ** generator.integers(-40, 40, size)
        z, v = (parts[:, 0] + 1j * parts[:, 1]).astype(kind), parts[:, 0].astype(real)
        for count in (2, 3):
            for phase in ("principal", "circular"):
                out = np.empty(size, kind)
                module.harmonic_merge(list(z[:count]), [1 / count] * count, phase, out)
                results[f"{phase} {kind} {count} {size}"] = out
            out = np.empty(size, real)
            module.slerp(list(v[:count]), [1 / count] * count, out)
            results[f"slerp {kind} {count} {size}"] = out
    x, mean, rstd = v.astype("f4"), np.empty(3, "f4"), np.empty(3, "f4")
    out = np.empty((3, size), "f4")
    module.standardise(x, "float32", None, 0, 1e-5, out, "float32", mean, rstd, 1)
    results[f"standardise {size}"] = out
for size in (*range(1, 40), 1023):
    for real in ("f4", "f8"):
        for rows in (1, 2, 3, 4, 5, 7, 8, 11, 16):
            x, g, w = (generator.standard_normal(s).astype(real)
                       for s in ((rows, size), (rows, 21), (21, size)))
            y, dx = np.empty((rows, 21), real), np.empty((rows, size), real)
            module.few_rows(x, w, y)
            module.few_rows_backward(g, w, dx)
            results[f"few_rows {real} {rows} {size}"] = y
            results[f"few_rows_backward {real} {rows} {size}"] = dx
np.savez(sys.argv[2], **results)
"""


@pytest.mark.parametrize("width", [16, 32])
def test_every_width_of_registers(width: int, tmp_path: Any) -> None:
    """Code for registers of 16, 32 and 64 bytes, as processors have them, gives equal results."""
    spec = importlib.util.find_spec("motet.kernels._C")
    assert spec is not None
    assert spec.origin is not None
    archives = []
    for simd in (width, 64):
        file = tmp_path / f"{simd}.npz"
        subprocess.run(
            [sys.executable, "-c", SCRIPT, spec.origin, str(file)],
            env=os.environ | {"MOTET_SIMD": str(simd)}, check=True, cwd=ROOT,
        )  # fmt: skip
        archives.append(np.load(file))
    for name in archives[0]:
        narrow, widest = (results[name] for results in archives)
        scale = 1e-5 if narrow.dtype.name in ("float32", "complex64") else 1e-13
        assert np.isfinite(narrow).all() or not name.startswith("few_rows"), name
        if name.startswith("standardise"):
            bound = scale * 10
        else:  # slerp and few_rows sum many elements; harmonic_merge works per element
            by_largest = name.startswith(("slerp", "few_rows"))
            bound = scale * (np.abs(widest).max() if by_largest else np.abs(widest))
        assert (np.abs(narrow - widest) <= bound).all(), name
