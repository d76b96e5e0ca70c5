"""The public operators and HEALNet on their Triton kernels, run by Triton's interpreter."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
pytest.importorskip("triton", reason="triton is not installed; it comes with motet on Linux")

import motet
from benchmarks.launches import LAUNCHERS, context_launchers
from motet.kernels import (
    absorbed_attention,
    attention_weights,
    context_kv,
    harmonic_merge,
    latent_attention,
    row_statistics,
    slerp,
)
from motet.kernels.absorbed_attention.operator import absorbed_weights
from motet.kernels.absorbed_attention.reference import absorbed_attention_reference
from motet.kernels.context_kv.reference import context_kv_reference
from motet.kernels.harmonic_merge.reference import harmonic_merge_reference
from motet.kernels.latent_attention.operator import latent_attention_kv, latent_self_attention
from motet.kernels.latent_attention.reference import latent_attention_reference
from motet.kernels.row_statistics.reference import row_statistics_reference

from .comparison import Function, assert_as_good_as, with_gradients

pytestmark = [pytest.mark.interpreted, pytest.mark.sampled]

OFFSETS = torch.tensor([0, 40, 40, 41, 130])
ON, EAGER = {"backend": "triton"}, {"backend": "eager"}


def check(fast: Function, reference: Function, *inputs: Tensor) -> None:
    """Compare results and the gradients of all inputs."""
    assert_as_good_as(with_gradients(fast), with_gradients(reference), *inputs)


@pytest.mark.parametrize("width", [37, 64])
@pytest.mark.parametrize("places", [None, 65, 130])
def test_context_kv(width: int, places: int | None) -> None:
    positions = None if places is None else torch.randn(places, 5)
    x, total = 3 + torch.randn(130, width), width + (0 if places is None else 5)
    weight, bias = torch.randn(2, 24, total) / 8, torch.randn(2, 24)

    def wide(like: Tensor) -> Tensor | None:
        return None if positions is None else positions.to(like.dtype)

    check(
        lambda x, w, b: context_kv(x, w, b, positions=wide(x), offsets=OFFSETS, **ON),
        lambda x, w, b: context_kv_reference(x, w, b, positions=wide(x)),
        x, weight, bias,
    )  # fmt: skip


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("ragged", [True, False])
def test_latent_attention(ragged: bool, counted: bool) -> None:
    if ragged:
        shape, offsets = (130, 3, 27), OFFSETS
    else:
        shape, offsets = (4, 3, 33, 27), None
    q, k, v = torch.randn(4, 3, 7, 27), torch.randn(shape), torch.randn(shape)
    counts = torch.randint(1, 5, (130,) if ragged else (33, 4)).float().t() if counted else None

    def wide(like: Tensor) -> Tensor | None:
        return None if counts is None else counts.to(like.dtype)

    check(
        lambda *t: latent_attention(*t, offsets, counts=counts, **ON),
        lambda *t: latent_attention_reference(*t, offsets, counts=wide(t[0])),
        q, k, v,
    )  # fmt: skip


def test_latent_attention_in_one_tensor() -> None:
    """Queries shared by all bags, and rows of K and V wider than the heads, are right."""
    q, kv = torch.randn(1, 7, 3, 27).transpose(1, 2), torch.randn(130, 2, 3, 27)

    def apart(q: Tensor, kv: Tensor) -> Tensor:
        q = q.expand(4, -1, -1, -1)
        return latent_attention_reference(q, *kv.unbind(1), OFFSETS, scale=0.3)

    def together(q: Tensor, kv: Tensor) -> Tensor:
        kv = torch.nn.functional.pad(kv, (0, 5))
        return latent_attention_kv(q, kv, OFFSETS, scale=0.3, **ON)[0]

    check(together, apart, q, kv)
    q.requires_grad_()
    (dq,) = torch.autograd.grad(together(q, kv).sum(), q)
    assert dq.stride() == q.stride()  # other strides would cost a copy in the backward pass


def test_latent_self_attention() -> None:
    def apart(qkv: Tensor) -> Tensor:
        return latent_attention_reference(*qkv.permute(2, 0, 3, 1, 4).unbind(), scale=0.3)

    check(lambda x: latent_self_attention(x, scale=0.3, **ON), apart, torch.randn(4, 33, 3, 2, 27))


@pytest.mark.parametrize("ragged", [True, False])
def test_attention_weights(ragged: bool) -> None:
    q, k = torch.randn(4, 3, 7, 27), torch.randn(*((130, 3) if ragged else (4, 3, 33)), 27)
    offsets = OFFSETS if ragged else None
    actual = attention_weights(q, k, offsets, reduce="mean", **ON)
    literal = attention_weights(q, k, offsets)
    mean = literal.mean((1, 2))
    torch.testing.assert_close(actual, mean, rtol=1e-4, atol=1e-7)
    lse = (q @ k.transpose(-1, -2) * 27**-0.5).logsumexp(-1) if not ragged else None
    if lse is not None:
        full = attention_weights(q, k, offsets, lse=lse, **ON)
        torch.testing.assert_close(full, literal, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("part", [0, 1])
def test_absorbed_attention(part: int, counted: bool) -> None:
    queries, x, positions = torch.randn(4, 14, 42) / 3, torch.randn(130, 37), torch.randn(65, 5)
    counts = torch.randint(1, 5, (130,)).float() if counted else None

    def wide(like: Tensor) -> dict[str, Tensor | None]:
        converted = None if counts is None else counts.to(like.dtype)
        return {"positions": positions.to(like.dtype), "counts": converted}

    check(
        lambda q: absorbed_attention(q, x, OFFSETS, **wide(q), **ON)[part],
        lambda q: absorbed_attention_reference(q, x.to(q.dtype), OFFSETS, **wide(q))[part],
        queries,
    )  # fmt: skip


@pytest.mark.parametrize("places", [None, 65])
def test_row_statistics(places: int | None) -> None:
    x, positions = 3 + torch.randn(130, 37), None if places is None else torch.randn(places, 5)
    actual = row_statistics(x, positions=positions, **ON)
    wide = None if positions is None else positions.double()
    exact = row_statistics_reference(x.double(), positions=wide)
    for a, b in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=1e-6)


def test_given_statistics_change_no_bit() -> None:
    """Strided statistics, the columns of a loader's tensor, give the same bits."""
    x, positions = torch.randn(130, 37), torch.randn(65, 5)
    pair = torch.stack(row_statistics(x, positions=positions, **ON), 1).unbind(1)
    queries, weight = torch.randn(4, 14, 42) / 3, torch.randn(2, 8, 42)

    def run(statistics: tuple[Tensor, ...] | None) -> list[Tensor]:
        options = {"positions": positions, "statistics": statistics, **ON}
        return [
            *with_gradients(lambda w: context_kv(x, w, offsets=OFFSETS, **options))(weight),
            *with_gradients(lambda q: absorbed_attention(q, x, OFFSETS, **options))(queries),
            absorbed_weights(queries, x, OFFSETS, **options),
        ]

    assert all(map(torch.equal, run(pair), run(None)))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("stale", [1, 700])
def test_rows_behind_the_last_bag(stale: int, backend: str) -> None:
    """Rows after the last bag, as in a CUDA graph's larger buffer, change no bit of a bag."""
    x, q = torch.randn(130 + stale, 37), torch.randn(4, 2, 70, 16)
    weight, bias = torch.randn(1, 64, 37) / 6, torch.randn(1, 64)

    def run(rows: int) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (q, weight, bias)]
        statistics = (None, None, 1e-5, backend)
        y, *_ = torch.ops.motet.context_kv(x[:rows], None, *leaves[1:], OFFSETS, *statistics)
        kv = y[0].unflatten(1, (2, 2, 16))
        out, _ = latent_attention_kv(leaves[0], kv, OFFSETS, scale=0.3, backend=backend)
        return [y, out, *torch.autograd.grad(out.square().sum(), [kv, *leaves])]

    y, out, dkv, dq, *sums = run(130 + stale)
    assert y.isfinite().all()
    assert not dkv[130:].any()
    alone = run(130)
    for actual, expected in zip((y[:, :130], out, dkv[:130], dq), alone, strict=False):
        assert torch.equal(actual, expected)
    torch.testing.assert_close(sums, alone[4:])


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_absorbed_rows_behind_the_last_bag(dropout_p: float) -> None:
    queries, x = torch.randn(4, 14, 42) / 3, torch.randn(130, 37)
    places, seed = torch.randn(130, 5), torch.tensor([3]) if dropout_p else None

    def run(*tokens: Tensor) -> tuple[Tensor, ...]:
        def absorbed(queries: Tensor) -> tuple[Tensor, Tensor]:
            options = (None, None, None, 1e-5, dropout_p, seed, "triton")
            return torch.ops.motet.absorbed_attention(queries, *tokens, OFFSETS, *options)[:2]

        return with_gradients(absorbed)(queries)

    padded = (torch.cat([t, torch.full((70, t.shape[1]), torch.nan)]) for t in (x, places))
    assert all(map(torch.equal, run(*padded), run(x, places)))


def test_absorbed_weights() -> None:
    queries, x, positions = torch.randn(4, 14, 42) / 3, torch.randn(130, 37), torch.randn(65, 5)
    fast = absorbed_weights(queries, x, OFFSETS, positions=positions, **ON)
    eager = absorbed_weights(queries, x, OFFSETS, positions=positions, backend="eager")
    torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("counted", [False, True])
def test_absorbed_gradient_of_the_tokens(counted: bool) -> None:
    queries, x = torch.randn(4, 14, 37) / 3, torch.randn(130, 37)
    counts = torch.randint(1, 5, (130,)) if counted else None

    def wide(like: Tensor) -> Tensor | None:
        return None if counts is None else counts.to(like.dtype)

    check(
        lambda q, x: absorbed_attention(q, x, OFFSETS, counts=wide(q), **ON)[0],
        lambda q, x: absorbed_attention_reference(q, x, OFFSETS, counts=wide(q))[0],
        queries, x,
    )  # fmt: skip


def test_absorbed_dropout() -> None:
    """The result is linear in the mask, and the mask is latent_attention's for one head."""
    from motet.kernels.dropout import dropout_mask

    queries, x, seed = torch.randn(4, 14, 37) / 3, torch.randn(130, 37), torch.tensor([11])
    like = torch.empty(4, 1, 14, 1), torch.empty(130, 1, 1)
    kept = dropout_mask(*like, OFFSETS, 0.3, seed)[:, 0] / 0.7  # [T, R]
    (z,) = context_kv_reference(x, torch.eye(37)[None])

    def literal(q: Tensor, part: int) -> Tensor:
        rows = []
        for queries_of_bag, start, stop in zip(q, OFFSETS[:-1], OFFSETS[1:], strict=True):
            bag = z.to(q.dtype)[start:stop]
            weights = torch.softmax(queries_of_bag @ bag.t(), -1) * kept[start:stop].t().to(q.dtype)
            rows.append(weights @ bag if part == 0 else weights.sum(-1))
        return torch.stack(rows)

    for part in (0, 1):
        check(
            lambda q, part=part: absorbed_attention(
                q, x, OFFSETS, dropout_p=0.3, seed=seed, **ON
            )[part],
            lambda q, part=part: literal(q, part),
            queries,
        )  # fmt: skip


def test_any_strides() -> None:
    """Operators take any layout, though kernels need rows with stride 1."""
    offsets = torch.tensor([0, 4, 10])
    x, weight, bias = torch.randn(7, 10).t(), torch.randn(2, 7, 4).mT, torch.randn(4, 2).t()
    for tokens in (x, torch.randn(10, 14)[:, ::2], torch.randn(10, 1).expand(10, 7)):
        check(
            lambda x, w, b: context_kv(x, w, b, offsets=offsets, **ON),
            lambda x, w, b: context_kv_reference(x, w, b),
            tokens, weight, bias,
        )  # fmt: skip
    positions = torch.randn(2, 10).t()
    fast = context_kv(x[:, :5], weight[:, :, :7], bias, positions=positions, **ON)
    slow = context_kv_reference(x[:, :5], weight[:, :, :7], bias, positions=positions)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    q, k, v = torch.randn(2, 3, 5, 4).mT, torch.randn(5, 3, 10).permute(2, 1, 0), x.reshape(10, 7)
    k, v = k[..., :5], v[:, None, :5].expand(10, 3, 5).permute(0, 1, 2)
    check(
        lambda *t: latent_attention(*t, offsets, **ON),
        lambda *t: latent_attention_reference(*t, offsets),
        q, k, v,
    )  # fmt: skip
    queries = torch.randn(2, 7, 6).mT / 3
    check(
        lambda q: absorbed_attention(q, x, offsets, **ON)[0],
        lambda q: absorbed_attention_reference(q, x.to(q.dtype), offsets)[0],
        queries,
    )  # fmt: skip


def test_nothing_to_attend_to() -> None:
    none = torch.tensor([0])
    pooled, mass = absorbed_attention(torch.randn(0, 3, 7), torch.randn(0, 7), none, **ON)
    assert pooled.shape == (0, 3, 7)
    assert mass.shape == (0, 3)
    q, k = torch.randn(0, 2, 3, 4), torch.randn(0, 2, 4)
    assert latent_attention(q, k, k, none, **ON).shape == q.shape


def test_heads_too_wide_for_the_kernels() -> None:
    q, k = torch.randn(1, 1, 2, 257), torch.randn(5, 1, 257)
    with pytest.raises(ValueError, match="backend: 'triton' takes heads of up to 256 numbers"):
        latent_attention(q, k, k, torch.tensor([0, 5]), **ON)
    assert latent_attention(q, k, k, torch.tensor([0, 5])).isfinite().all()


def test_dropout_is_one_mask_whatever_is_differentiated() -> None:
    queries, x, seed = torch.randn(2, 6, 7), torch.randn(10, 7), torch.tensor([5])
    offsets, gradients = torch.tensor([0, 4, 10]), []
    for of_tokens in (False, True):
        q = queries.clone().requires_grad_()
        tokens = x.clone().requires_grad_(of_tokens)
        pooled, _ = absorbed_attention(q, tokens, offsets, dropout_p=0.5, seed=seed, **ON)
        gradients.append(torch.autograd.grad(pooled.square().sum(), q)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_one_latent() -> None:
    model = motet.HEALNet({"wsi": motet.Bag(8)}, out_features=2, num_latents=1, heads=2).eval()
    bags = torch.randn(3, 9, 8)
    for strategy in ("cached", "absorbed"):
        actual = model({"wsi": bags}, strategy=strategy, backend="triton")
        torch.testing.assert_close(actual, model({"wsi": bags}), rtol=1e-4, atol=1e-5)


@pytest.mark.sampled
@pytest.mark.parametrize("strategy", ["cached", "absorbed"])
@pytest.mark.parametrize("share", [True, False])
def test_healnet(strategy: str, share: bool) -> None:
    """Logits and gradients are right for bags with coordinates (one empty), a grid and a table."""
    torch.manual_seed(0)
    modalities = {"omic": motet.Tabular(9), "wsi": motet.Bag(21, coords=2), "mri": motet.Grid(1)}
    model = motet.HEALNet(
        modalities, out_features=3, num_latents=5, latent_dim=12, heads=2, head_dim=7,
        share_weights=share,
    )  # fmt: skip
    wide = motet.HEALNet.from_config(model.config).double()
    wide.load_state_dict(model.state_dict())
    offsets = torch.tensor([0, 12, 12, 30])
    inputs = (torch.randn(3, 9), torch.randn(30, 21), torch.rand(30, 2), torch.randn(3, 4, 5, 1))

    def gradients(*inputs: Tensor, **options: str) -> tuple[Tensor, ...]:
        omic, values, places, mri = inputs
        module = wide if omic.dtype == torch.float64 else model

        def nested(x: Tensor) -> Tensor:
            return torch.nested.nested_tensor_from_jagged(x, offsets)

        logits = module(
            {"omic": omic, "wsi": nested(values), "mri": mri},
            coords={"wsi": nested(places)},
            **options,
        )
        grads = torch.autograd.grad(
            logits.square().sum(), list(module.parameters()), allow_unused=True,
            materialize_grads=True,
        )  # fmt: skip
        return logits, *grads

    assert_as_good_as(
        partial(gradients, strategy=strategy, backend="triton"),
        partial(gradients, strategy="reference"),
        *inputs,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("strategy", ["cached", "absorbed"])
def test_healnet_with_the_kernels_of_hopper(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision, as bf16 is pooled; 8 heads of 17 latents take two blocks of outputs."""
    launched = set()
    for launchers in LAUNCHERS:
        if hasattr(launchers, "capability"):
            monkeypatch.setattr(launchers, "capability", lambda _: 90)
        monkeypatch.setattr(launchers, "launch", partial(record, launched, launchers.launch))
    monkeypatch.setattr(context_launchers, "_SCALED", (torch.float16,))
    model = motet.HEALNet(
        {"wsi": motet.Bag(64)}, out_features=4, num_latents=17, latent_dim=40, heads=8, head_dim=12
    )
    weights = {name: parameter.half() for name, parameter in model.named_parameters()}
    bags = [torch.randn(300, 64).half(), torch.randn(130, 64).half()]

    def logits(backend: str, chosen: str) -> Function:
        def run(*parameters: Tensor) -> Tensor:
            dtype = parameters[0].dtype
            x = torch.nested.nested_tensor([x.to(dtype) for x in bags], layout=torch.jagged)
            replaced = dict(zip(weights, parameters, strict=True))
            options = {"strategy": chosen, "backend": backend}
            return torch.func.functional_call(model, replaced, ({"wsi": x},), options).float()

        return with_gradients(run)

    assert_as_good_as(logits("triton", strategy), logits("eager", "reference"), *weights.values())
    expected = {"project_tma_kernel", "pool_tma_kernel" if strategy == "absorbed" else "dkv_kernel"}
    assert expected <= launched


def record(launched: set[str], launch: Callable[..., None], kernel: Any, *args: Any, **kw: Any):
    """Note the name of a kernel, and launch it."""
    launched.add(kernel.__name__)
    launch(kernel, *args, **kw)


@pytest.mark.parametrize("phase", ["principal", "circular"])
@pytest.mark.parametrize("count", [2, 3])
def test_harmonic_merge(count: int, phase: str) -> None:
    weights = [0.2, 0.5, 0.3][:count]
    latents = [torch.randn(7, 150, dtype=torch.complex64) for _ in range(count)]

    def parts(merge: Function, **options: str) -> Function:
        def run(*inputs: Tensor) -> Tensor:
            tensors = [torch.view_as_complex(x) for x in inputs]
            return torch.view_as_real(merge(tensors, weights, phase, **options))

        return run

    check(
        parts(harmonic_merge, **ON), parts(harmonic_merge_reference),
        *map(torch.view_as_real, latents),
    )  # fmt: skip
    out = latents[1].clone()
    harmonic_merge([latents[0], out, *latents[2:]], weights, phase, out=out, **ON)
    assert torch.equal(out, harmonic_merge(latents, weights, phase, **ON))
    assert harmonic_merge([z[:0] for z in latents], phase=phase, **ON).shape == (0, 150)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("phase", ["principal", "circular"])
def test_gradient_of_harmonic_merge_at_the_edges(phase: str) -> None:
    """Gradients are right at zeros and at squares out of range; double backward uses torch."""
    parts = torch.tensor([0.0, 1.0, -1.0, 1e-30, 1e30])
    values = torch.complex(*torch.cartesian_prod(parts, parts).t())
    latents = [z.contiguous().requires_grad_() for z in torch.cartesian_prod(values, values).t()]
    merged = harmonic_merge(latents, phase=phase, **ON)
    grad = torch.randn_like(merged.detach())
    gradients = torch.autograd.grad(merged, latents, grad, retain_graph=True)
    literal = torch.autograd.grad(merged, latents, grad, create_graph=True)
    # Where phasors cancel, rounding decides the phase.
    sure = sum(torch.sgn(z.detach()) for z in latents).abs() > 0.1 if phase == "circular" else ...
    for actual, expected in zip(gradients, literal, strict=True):
        assert actual.isfinite().all()
        torch.testing.assert_close(actual[sure], expected.detach()[sure], rtol=2e-6, atol=1e-38)
    assert literal[0].requires_grad
    plain = [z.detach() for z in latents]
    opcheck(
        torch.ops.motet.harmonic_merge_backward, (grad, merged.detach(), plain, [0.5, 0.5], phase)
    )


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter's numpy
def test_harmonic_merge_over_the_whole_range() -> None:
    """Zeros of both signs, infinities, NaN and squares out of range merge as in torch."""
    edges = torch.tensor(
        [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-38, 1e-30, 3e38, -3e38, torch.inf, -torch.inf, torch.nan]
    )
    values = torch.complex(*torch.cartesian_prod(edges, edges).t())
    a, b = torch.cartesian_prod(values, values).t().contiguous()
    finite = a.isfinite() & b.isfinite()
    for phase in ("principal", "circular"):
        for weights in ([0.5, 0.5], [0.3, 0.7]):
            wide = [z.to(torch.complex128) for z in (a, b)]
            exact = harmonic_merge_reference(wide, weights, phase)
            actual = harmonic_merge([a, b], weights, phase, **ON).to(torch.complex128)
            unsure = torch.zeros_like(finite)
            if phase == "circular":  # where phasors cancel, rounding decides the phase
                sum_ = sum(w * z / z.abs() for w, z in zip(weights, wide, strict=True))
                unsure = sum_.abs() < 0.1
            fits = exact.abs() < torch.finfo(torch.float32).max
            sure = finite & fits & ~unsure
            error, size = (actual - exact)[sure].abs(), exact[sure].abs()
            assert (error <= 2e-6 * size + 3e-45).all()
            # Elsewhere the result is that of torch's functions in the same precision.
            literal = harmonic_merge_reference([a, b], weights, phase)
            nan = a.isnan() | b.isnan()
            edge = ~finite & ~nan & literal.isfinite()
            close = torch.isclose(
                actual[edge], literal[edge].to(actual.dtype), rtol=1e-5, atol=1e-44
            )
            assert close.all()
            assert actual[nan].isnan().all()


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("size", [5, 9001])
def test_slerp(count: int, size: int) -> None:
    weights = [1 / count] * count
    vectors = [torch.randn(size) for _ in range(count)]
    check(lambda *v: slerp(v, weights, **ON), lambda *v: slerp(v, weights, **EAGER), *vectors)
    out = vectors[1].clone()
    slerp([vectors[0], out, *vectors[2:]], weights, out=out, **ON)
    assert torch.equal(out, slerp(vectors, weights, **ON))
    assert slerp([v[:0] for v in vectors], **ON).shape == (0,)


def test_merges_that_triton_does_not_take() -> None:
    z, v = torch.randn(4, dtype=torch.complex64), torch.randn(4)
    with pytest.raises(ValueError, match="'triton' takes complex64, got torch.complex128"):
        harmonic_merge([z.to(torch.complex128)] * 2, **ON)
    with pytest.raises(ValueError, match="'triton' takes up to 8 tensors, got 9"):
        harmonic_merge([z] * 9, **ON)
    with pytest.raises(ValueError, match="'triton' takes float32, got torch.float64"):
        slerp([v.double()] * 2, **ON)
    with pytest.raises(ValueError, match="'triton' takes up to 8 vectors, got 9"):
        slerp([v] * 9, **ON)
    overlapping = torch.randn(9)
    with pytest.raises(ValueError, match="expected memory apart from out"):
        slerp([overlapping[:8]] * 2, out=overlapping[1:], **ON)
