"""lego_pass on its Triton kernels, run by Triton's interpreter, against the torch form."""

from contextlib import nullcontext
from dataclasses import fields

import numpy as np
import pytest
import torch

from .conftest import KERNEL_TESTS, require_interpreter

require_interpreter()

import triton.language as tl
from motet.kernels.dropout import dropout_mask
from motet.kernels.lego_pass import cpu, operator
from motet.kernels.lego_pass import triton as launchers
from motet.kernels.lego_pass.operator import lego_pass
from motet.kernels.lego_pass.weights import QueryWeights, UpdateWeights
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from .comparison import assert_as_good_as, with_gradients
from .conftest import (
    assert_compiles,
    assert_differentiable_once,
    assert_leaves_no_trace,
    views_of,
)

pytestmark = KERNEL_TESTS

TWO_D, LATENTS, WIDTH, NONE = (-2, -1), (-2,), (-1,), ()


@pytest.fixture
def _large_blocks(monkeypatch):
    """Use large blocks, with which the interpreter is faster."""
    for name in ("_pass_blocks", "_query_blocks", "_update_blocks"):
        real = getattr(launchers, name)

        def large(*args, real=real):
            blocks, dim = real(*args), launchers._power(args[-2])
            rows = max(64, blocks.block_c)
            return blocks._replace(block_c=rows, block_k=dim, block_e=64, block_f=256)

        monkeypatch.setattr(launchers, name, large)


def randn_weights(*shape):
    """Draw weights or biases that keep the magnitude of their inputs."""
    return torch.randn(shape) / (shape[-1] ** 0.5 if len(shape) > 1 else 3)


def inputs(size, heads=(2, 5), *, one=False, shared=False, imaginary=True, query_weights=True):
    """Return real, attended, imaginary if any, and the weights."""
    bags, latents, dim = size
    inner, first = heads[0] * heads[1], 1 if shared else bags
    real = torch.randn(first, latents, dim)
    attended = torch.randn(bags, heads[0], 1 if one else latents, heads[1])
    parts = [torch.randn(first, latents, dim)] if imaginary else []
    shapes = [
        (dim, inner), (dim,), (dim,), (dim,), (8 * dim, dim), (8 * dim,), (dim, 4 * dim), (dim,)
    ]  # fmt: skip
    shapes += [(dim,), (dim,), (inner, dim)] if query_weights else []
    return [real, attended, *parts, *(randn_weights(*shape) for shape in shapes)]


def weights_of(tensors):
    return UpdateWeights(*tensors[:8]), QueryWeights(*tensors[8:]) if len(tensors) > 8 else None


def passing(backend, *, imaginary=True, autocast=None, **options):
    """Return lego_pass as a function of `inputs`."""

    def run(real, attended, *rest):
        parts = {"imaginary": rest[0]} if imaginary else {}
        weights = rest[1:] if imaginary else rest
        update, query_weights = weights_of(weights)
        low = autocast is not None and real.dtype != torch.float64
        with torch.autocast("cpu", autocast) if low else nullcontext():
            results = lego_pass(
                real,
                attended,
                update,
                query_weights=query_weights,
                backend=backend,
                **parts,
                **options,
            )
        return tuple(part for part in results if part is not None)

    return run


def check(args, *, worked_in=None, **options):
    """Compare results and the gradients of every input."""
    assert_as_good_as(
        with_gradients(passing("triton", **options)),
        with_gradients(passing("eager", **options)),
        *args,
        worked_in=worked_in,
    )


@pytest.mark.parametrize(
    ("latents", "dim", "axes", "rows"),
    [
        (17, 126, TWO_D, None),
        (25, 119, LATENTS, None),
        (64, 64, TWO_D, None),
        (9, 126, LATENTS, 17),
        (33, 64, LATENTS, 64),
        pytest.param(40, 200, WIDTH, None, marks=pytest.mark.slow),
        (90, 33, NONE, None),
    ],
)
@pytest.mark.usefixtures("_large_blocks")
def test_sizes_that_are_shipped(latents, dim, axes, rows):
    check(inputs((2, latents, dim), (2, 63)), axes=axes, rows=rows)


@pytest.mark.parametrize("axes", [TWO_D, LATENTS, WIDTH, NONE])
@pytest.mark.parametrize(
    ("snn", "imaginary", "query_weights"),
    [(True, True, True), (False, False, True), (False, True, False)],
)
def test_every_form(axes, snn, imaginary, query_weights):
    args = inputs((3, 7, 13), imaginary=imaginary, query_weights=query_weights)
    check(args, imaginary=imaginary, axes=axes, snn=snn)


@pytest.mark.parametrize(
    ("size", "axes"),
    [
        ((1, 1, 1), TWO_D), ((1, 5, 3), WIDTH), ((3, 1, 7), LATENTS), ((2, 19, 17), NONE),
        ((5, 3, 17), WIDTH),
    ],
)  # fmt: skip
def test_sizes_between_blocks(size, axes):
    check(inputs(size, (3, 7)), axes=axes)


@pytest.mark.parametrize(
    ("axes", "one", "shared"),
    [(LATENTS, True, False), (LATENTS, False, True), (NONE, True, True), (NONE, False, True)],
)
def test_one_attended_row_and_shared_latents(axes, one, shared):
    check(inputs((3, 7, 13), one=one, shared=shared), axes=axes)


@pytest.mark.parametrize("axes", [TWO_D, WIDTH])
@pytest.mark.parametrize("present", [[True, False, True], [False] * 3])
def test_rows_that_are_not_updated_or_not_scaled(axes, present):
    masks = {"present": torch.tensor(present), "scaled": torch.tensor([False, True, True])}
    args = inputs((3, 7, 13))
    check(args, axes=axes, **masks)
    real, *_ = passing("triton", axes=axes, **masks)(*args)
    bare, *_ = passing("triton", axes=NONE, **masks)(*args)
    assert torch.equal(bare[1], args[0][1])
    assert torch.equal(real[0], bare[0])


@pytest.mark.parametrize("axes", [TWO_D, NONE])
def test_dropout(axes, monkeypatch):
    """Forward and backward kernels use the mask of `dropout_mask`, for any block sizes."""
    args, seed, p = inputs((3, 7, 13)), torch.tensor([2**40 + 3]), 0.3
    shapes = torch.empty(3, 1, 7, 1), torch.empty(3, 1, 13, 1)
    kept = dropout_mask(*shapes, None, p, seed)[:, 0]
    assert 0.6 < kept.double().mean() < 0.8
    assert not torch.equal(kept[0], kept[1])
    monkeypatch.setattr(cpu, "keep_mask", lambda *_: kept / (1 - p))
    check(args, axes=axes, dropout_p=p, seed=seed, present=torch.tensor([True, True, False]))
    batch = passing("triton", axes=axes, dropout_p=p, seed=seed)(*args)
    first = passing("triton", axes=axes, dropout_p=p, seed=seed)(
        *(a[:1] for a in args[:3]), *args[3:]
    )
    assert torch.equal(first[0][0], batch[0][0])
    torch.manual_seed(0)
    drawn = [passing("triton", axes=axes, dropout_p=p)(*args)[0] for _ in range(2)]
    assert not torch.equal(*drawn)


def test_dropout_in_torch():
    args = inputs((3, 7, 13))
    runs = [passing("eager", dropout_p=0.3, seed=torch.tensor([n]))(*args)[0] for n in (5, 5, 6)]
    assert torch.equal(*runs[:2])
    assert not torch.equal(*runs[1:])
    torch.manual_seed(0)
    assert not torch.equal(*(passing("eager", dropout_p=0.3)(*args)[0] for _ in range(2)))


@pytest.mark.parametrize("axes", [TWO_D, WIDTH, NONE])
@pytest.mark.parametrize("imaginary", [True, False])
@pytest.mark.parametrize("scaled", [None, [False, True, True]])
def test_first_queries(axes, imaginary, scaled):
    """Without `attended` latents are only normalised and projected to queries, not updated."""
    flags = None if scaled is None else torch.tensor(scaled)

    def first_queries(backend):
        def run(real, other, *weights):
            results = lego_pass(
                real, imaginary=other if imaginary else None, axes=axes, scaled=flags,
                query_weights=QueryWeights(*weights), backend=backend,
            )  # fmt: skip
            return tuple(part for part in results if part is not None)

        return run

    real, _, other, *weights = inputs((3, 7, 13), shared=True)
    args = (real, other, *weights[8:])
    assert_as_good_as(
        with_gradients(first_queries("triton")), with_gradients(first_queries("eager")), *args
    )
    bare = lego_pass(real, axes=axes, backend="triton")
    assert bare[1] is None
    assert bare[2] is None
    torch.testing.assert_close(bare[0], lego_pass(real, axes=axes, backend="eager")[0])


@pytest.mark.usefixtures("_large_blocks")
def test_half_precision_rounds_no_more_than_autocast_does():
    """This holds away from the kinks of LeakyReLU and SELU, where rounding changes the slope."""
    args = inputs((5, 17, 126), (8, 64))
    for bias in (4, 8):  # biases of the output projection, and of values and gates
        args[bias] = args[bias].sign() * (4 + torch.rand_like(args[bias]))
    args[1] /= 8
    wide = with_gradients(passing("eager", axes=TWO_D))(*(a.double() for a in args))
    errors = [
        [(a - b).norm() for a, b in zip(results, wide, strict=True)]
        for results in (
            with_gradients(passing(backend, axes=TWO_D, autocast=torch.float16))(*args)
            for backend in ("triton", "eager")
        )
    ]
    error_of_triton, error_of_torch = (torch.stack(e).norm() for e in errors)
    assert error_of_triton < error_of_torch


def test_zero_and_tiny_latents():
    """For zero columns the scale stays at its bound, and its gradient is zero."""
    args = inputs((2, 5, 7))
    args[0][0], args[2][:, :, 3], none = 0, 0, torch.tensor([False, False])
    args[0][1] *= 1e-30
    for axes in (TWO_D, LATENTS, WIDTH):
        check(args, axes=axes, present=none)


@pytest.mark.parametrize("axes", [LATENTS, NONE])
def test_no_samples(axes):
    check(inputs((0, 7, 13)), axes=axes, present=torch.ones(0, dtype=torch.bool))


def test_any_strides():
    run, args = with_gradients(passing("triton", axes=TWO_D)), inputs((2, 5, 7), (2, 3))
    expected = run(*args)
    for i in (0, 1, 7):  # real, attended, the feed-forward's weights
        for name, view in views_of(args[i]).items():
            actual = run(*args[:i], view, *args[i + 1 :])
            assert all(map(torch.equal, actual, expected)), (i, name)
    # As attention returns it: interleaved heads, columns of padded heads, one sample expanded.
    apart = torch.randn(2, 5, 2, 8).transpose(1, 2)[..., :3]
    for attended in (apart, apart[:1].expand(2, -1, -1, -1), apart[:, :, :1].expand(-1, -1, 5, -1)):
        plain = run(args[0], attended.contiguous(), *args[2:])
        assert all(map(torch.equal, run(args[0], attended, *args[2:]), plain))


def rounded(value):
    """Return float32 as the bits of bfloat16, rounded to even."""
    bits = value.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@pytest.fixture
def _bfloat16(monkeypatch):
    """Round to bf16 and multiply it as a GPU does; the interpreter truncates, and uses raw bits."""
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def casting(self, value, to):
        if value.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return TensorHandle(rounded(value.data), tl.bfloat16)
        return cast(self, value, to)

    def multiplying(self, a, b, *rest):
        a, b = (
            TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
            if x.dtype.scalar == tl.bfloat16
            else x
            for x in (a, b)
        )
        return dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", casting)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", multiplying)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("axes", "one"), [(TWO_D, False), (NONE, True)])
@pytest.mark.usefixtures("_bfloat16")
def test_autocast(dtype, axes, one):
    """Latents stay float32; the products are in the dtype of autocast."""
    args = inputs((3, 7, 13), one=one)
    check(args, axes=axes, autocast=dtype, worked_in=dtype)
    real, imaginary, queries = passing("triton", axes=axes, autocast=dtype)(*args)
    assert (real.dtype, imaginary.dtype, queries.dtype) == (torch.float32, torch.float32, dtype)
    args[1] = args[1].to(dtype)
    _, _, other = passing("triton", axes=axes, autocast=dtype)(*args)
    torch.testing.assert_close(other, queries, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("_bfloat16")
def test_half_precision(dtype):
    check([a.to(dtype) for a in inputs((3, 7, 13))], axes=WIDTH)


@pytest.mark.usefixtures("_large_blocks")
def test_samples_too_large_for_a_program():
    """The kernel updates the rows; torch normalises them and computes the queries."""
    check(inputs((1, 65, 65)), axes=LATENTS)


def test_latents_too_wide_for_a_program():
    args = inputs((1, 2, 257))
    with pytest.raises(ValueError, match="backend: 'triton' takes latents of up to 256 numbers"):
        passing("triton")(*args)
    assert passing("auto")(*args)[0].isfinite().all()


def test_a_sample_alone_gives_the_bits_it_gives_in_a_batch():
    args = inputs((5, 7, 5))
    for axes in (TWO_D, NONE):
        batch = passing("triton", axes=axes)(*args)
        alone = passing("triton", axes=axes)(*(a[3:4] for a in args[:3]), *args[3:])
        for one, all_ in zip(alone, batch, strict=True):
            assert torch.equal(one[0], all_[3])


def test_leaves_no_trace():
    assert_leaves_no_trace(passing("triton", axes=TWO_D), *inputs((2, 7, 13)))


def test_differentiable_once():
    *args, bias = inputs((1, 2, 3), (1, 2))[:5]
    rest = inputs((1, 2, 3), (1, 2))[5:]
    assert_differentiable_once(
        lambda *moving: passing("triton", axes=TWO_D)(*moving, *rest), *args, bias
    )


@pytest.mark.parametrize("form", ["all", "few", "first queries"])
def test_opcheck(form):
    full, axes = form == "all", LATENTS if form == "all" else NONE
    real, attended, imaginary, *weights = (
        a.requires_grad_() for a in inputs((2, 3, 4), (1, 2), one=not full, shared=form == "few")
    )
    update, query_weights = (part.flat.detach().requires_grad_() for part in weights_of(weights))
    flags, seed = torch.tensor([True, False]), torch.tensor([7])
    masks = (flags, flags, seed, 0.25) if full else (None, None, None, 0.0)
    given = {"all": (attended, update, query_weights), "few": (attended, update, None)}
    rest = (*given.get(form, (None, None, query_weights)), *masks, True, axes, 3, torch.float32)
    carried = imaginary if axes else None
    opcheck(torch.ops.motet.lego_pass, (real, carried, *rest))
    with torch.no_grad():
        x, y, queries, scale = torch.ops.motet.lego_pass(real, carried, *rest)
        saved = (x, y if axes else None, scale, real, *rest)
        detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in saved)
    of_queries = None if form == "few" else queries.clone()
    grads = (x.clone(), y.clone() if axes else None, of_queries)
    opcheck(torch.ops.motet.lego_pass_backward, (*grads, *detached))


@pytest.mark.slow
def test_compiles_whole_for_any_number_of_samples():
    weights = inputs((1, 7, 13))[3:]

    def run(real, attended, imaginary):
        real, imaginary, queries = passing("triton", axes=TWO_D)(
            real, attended, imaginary, *weights
        )
        return 2 * real, imaginary, queries

    assert_compiles(run, *(tuple(inputs((bags, 7, 13))[:3]) for bags in (4, 3)))


FREE = ("empty", "new_empty", "empty_like", "detach", "_unsafe_view")
OPERATORS = {"lego_pass": operator._forward, "lego_pass_backward": operator._backward_of}


class _Launches(TorchDispatchMode):
    """Record launches: Triton kernels, and torch operators that neither view nor allocate."""

    def __init__(self):
        super().__init__()
        self.inside, self.names = False, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "motet":
            with self:  # counts the operators that it calls
                return OPERATORS[name](*args)
        if not (self.inside or func.is_view or name in FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    def launch(self, run):
        def counted(executor, *args, **kwargs):
            self.names.append(f"triton {executor.fn.__name__}")
            self.inside = True  # the interpreter copies the arguments
            try:
                return run(executor, *args, **kwargs)
            finally:
                self.inside = False

        return counted


def launches(backend, monkeypatch):
    """Return the launches of one pass of a LegoBlock, forward and backward."""
    torch.use_deterministic_algorithms(False)  # deterministic mode would fill new tensors
    args = [a.requires_grad_() for a in inputs((3, 7, 13))]
    present = torch.tensor([True, False, True])
    mode = _Launches()
    with monkeypatch.context() as patch, mode:
        patch.setattr(GridExecutor, "__call__", mode.launch(GridExecutor.__call__))
        results = passing(backend, axes=TWO_D, present=present)(*args)
        forward = list(mode.names)
        grads = [torch.empty_like(part) for part in results]
        torch.autograd.grad(results, args, grads)
    return forward, mode.names[len(forward) :]


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # memory not yet written
def test_launches(monkeypatch):
    forward, backward = launches("triton", monkeypatch)
    # `cat` joins the weights, once for all passes.
    assert forward == ["cat", "cat", "triton pass_kernel"]
    assert backward == [
        f"triton {name}_kernel" for name in ("query_backward", "update_backward", "gradients")
    ]
    forward, backward = launches("eager", monkeypatch)
    assert (len(forward), len(backward)) == (21, 49)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"real": torch.ones(7, 13)}, ValueError, r"real: expected .*\[B, C, D\], got"),
        ({"real": torch.ones(2, 7, 13)}, ValueError, r"attended: .* for real \(2, 7, 13\), got"),
        ({"attended": 3}, TypeError, "attended: expected a tensor, got int"),
        ({"attended": None}, ValueError, "update: expected weights if .*, and None if it is not"),
        ({"attended": torch.ones(3, 2, 5, 5)}, ValueError, r"attended: .*\[B, H, 1, E\]"),
        ({"attended": torch.ones(3, 2, 7, 6)}, ValueError, r"out_weight: .* \(13, 12\), got"),
        ({"imaginary": 3}, TypeError, "imaginary: expected a tensor, got int"),
        ({"present": [True]}, TypeError, "present: expected a tensor, got list"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p: expected a number in \[0, 1\), got 1.0"),
        ({"imaginary": torch.ones(2, 7, 13)}, ValueError, r"imaginary: expected \(3, 7, 13\), got"),
        ({"dropout_p": 0.5, "seed": 3}, TypeError, "seed: expected a tensor, got int"),
        ({"update": None}, ValueError, "update: expected weights if attended is given, and None"),
        ({"present": torch.ones(3)}, ValueError, r"present: expected bool \[3\] on cpu, got"),
        ({"scaled": torch.ones(2) > 0}, ValueError, r"scaled: expected bool \[3\] on cpu, got"),
        ({"axes": (0,)}, ValueError, r"axes: expected one of .*, got \(0,\)"),
        ({"axes": LATENTS, "rows": 20}, ValueError, "rows: expected 7, or C of which 7 .* got 20"),
        ({"axes": TWO_D, "rows": 12}, ValueError, "rows: expected 7, or .* got 12 with axes"),
        ({"backend": "cuda"}, ValueError, "backend: expected 'auto'"),
    ],
)
def test_what_does_not_fit(change, error, message):
    real, attended, imaginary, *weights = inputs((3, 7, 13))
    given = {
        "real": real, "attended": attended, "update": UpdateWeights(*weights[:8]),
        "imaginary": imaginary,
        "axes": TWO_D, "backend": "triton",
    } | change  # fmt: skip
    with pytest.raises(error, match=message):
        lego_pass(**given)


@pytest.mark.parametrize("index", range(11))
def test_weights_that_do_not_fit(index):
    args = inputs((3, 7, 13))
    names = [f"update.{field.name}" for field in fields(UpdateWeights) if field.init]
    names += [f"query_weights.{field.name}" for field in fields(QueryWeights) if field.init]
    args[3 + index] = args[3 + index][..., :-1]
    with pytest.raises(ValueError, match=f"{names[index]}: expected "):
        passing("triton")(*args)


def test_dtypes_that_triton_does_not_take():
    args = [a.double() for a in inputs((3, 7, 13))]
    with pytest.raises(ValueError, match="backend: 'triton' takes float32, bfloat16 and float16"):
        passing("triton")(*args)
    assert passing("auto")(*args)[0].dtype == torch.float64
