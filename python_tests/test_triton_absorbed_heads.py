"""absorbed_heads: its Triton kernels in the interpreter, against torch's operators."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from .conftest import KERNEL_TESTS, require_interpreter

require_interpreter()

import motet
from motet.kernels.absorbed_attention import heads as heads_operator
from motet.kernels.absorbed_attention import triton as launchers
from motet.kernels.absorbed_attention.heads import absorbed_heads
from motet.kernels.context_kv.triton import Centred, project
from motet.kernels.dropout import dropout_mask
from motet.kernels.row_statistics.reference import row_statistics_reference
from torch.library import opcheck

from .comparison import assert_as_good_as, with_gradients
from .conftest import assert_differentiable_once, offsets_of

pytestmark = KERNEL_TESTS
LENGTHS = [40, 0, 1, 1, 88]
BAGS, TOKENS = len(LENGTHS), sum(LENGTHS)
OFFSETS = offsets_of(LENGTHS)
SCALE = 0.3


def inputs(
    heads: int = 2, latents: int = 7, width: int = 5, channels: int = 42, bags: int = BAGS
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q as lego_pass makes it, [B, C, H·E] seen as [B, H, C, E], the weights and shifts."""
    q = torch.randn(bags, latents, heads, width).transpose(1, 2)
    weights = torch.randn(2 * heads, width, channels) / channels**0.5
    return q, weights, torch.randn(2 * heads, width)


def attended(backend: str, x: Tensor, offsets: Tensor = OFFSETS, **options: Any):
    """Return a function of q, weights and shifts that works in their dtype, and its gradients."""

    def run(q: Tensor, weights: Tensor, shifts: Tensor) -> Tensor:
        converted = dict(options)
        for name in ("positions", "counts"):
            if converted.get(name) is not None:
                converted[name] = converted[name].to(q.dtype)
        return absorbed_heads(
            q, weights, shifts, x.to(q.dtype), offsets, scale=SCALE, backend=backend, **converted
        )

    return with_gradients(run)


def assert_close(results: tuple[Tensor, ...], expected_results: tuple[Tensor, ...]) -> None:
    for result, expected in zip(results, expected_results, strict=True):
        atol = 1e-5 * max(1, expected.abs().max().item())
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=atol)


def check(args: tuple[Tensor, ...], x: Tensor, offsets: Tensor = OFFSETS, **options: Any) -> None:
    """Compare output and gradients with torch's to 1e-5, and with torch's own rounding error."""
    by_triton, by_torch = (
        attended(backend, x, offsets, **options) for backend in ("triton", "eager")
    )
    assert_close(by_triton(*args), by_torch(*args))
    assert_as_good_as(by_triton, by_torch, *args)


@pytest.mark.parametrize("places", [None, pytest.param(65, marks=pytest.mark.slow), 130])
@pytest.mark.parametrize("shared", [False, True])
def test_equals_the_composition(shared: bool, places: int | None) -> None:
    positions = None if places is None else torch.randn(places, 5)
    width = 37 + (0 if positions is None else 5)
    args = inputs(channels=width, bags=1 if shared else BAGS)
    check(args, 3 + torch.randn(TOKENS, 37), positions=positions)


# Heads of width 1, of odd width, wider than a block of the gradients; latents in many blocks.
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 1),
        (3, 17, 27, 300),
        pytest.param((1, 70, 130, 33), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sizes_at_the_edge(sizes: tuple[int, int, int, int], shared: bool) -> None:
    args = inputs(*sizes, bags=1 if shared else 3)
    check(args, torch.randn(12, sizes[3]), offsets_of([4, 0, 8]))


def test_counts() -> None:
    counts = torch.randint(1, 5, (TOKENS,)).float()
    check(inputs(channels=37), torch.randn(TOKENS, 37), counts=counts)


@pytest.mark.slow
def test_strides() -> None:
    """Queries and weights of any strides, a sliced context and a loader's statistics work."""
    x = torch.randn(TOKENS, 74)[:, ::2]
    q, weights, shifts = inputs(channels=37)
    check((q.contiguous(), weights, shifts), x)
    check((q.mT.contiguous().mT, weights.mT.contiguous().mT, shifts.t().contiguous().t()), x)
    pair = torch.stack(row_statistics_reference(x), 1).unbind(1)
    computed, precomputed = (attended("triton", x, statistics=s) for s in (None, pair))
    assert_close(precomputed(q, weights, shifts), computed(q, weights, shifts))


def test_dropout_is_that_of_the_seed() -> None:
    """The mask is that of absorbed_attention, whose rows are the bag's heads in order."""
    x, seed = torch.randn(TOKENS, 37), torch.tensor([11])
    args = inputs(channels=37)
    like = torch.empty(BAGS, 1, 14, 1), torch.empty(TOKENS, 1, 1)
    kept = dropout_mask(*like, OFFSETS, 0.3, seed)[:, 0] / 0.7  # [T, R]

    def literal(q: Tensor, weights: Tensor, shifts: Tensor) -> Tensor:
        z = torch.nn.functional.layer_norm(x.to(q.dtype), (37,))
        absorbed, rows = heads_operator.absorb_queries(q, weights, SCALE), []
        for queries, start, stop in zip(absorbed, OFFSETS[:-1], OFFSETS[1:], strict=True):
            probabilities = torch.softmax(queries @ z[start:stop].t(), -1)
            dropped = probabilities * kept[start:stop].t().to(q.dtype)
            rows.append((dropped @ z[start:stop], dropped.sum(-1)))
        pooled, mass = (torch.stack(part) for part in zip(*rows, strict=True))
        return heads_operator.project_back(pooled, mass, weights, shifts)

    compute = attended("triton", x, dropout_p=0.3, seed=seed)
    assert_close(compute(*args), with_gradients(literal)(*args))
    assert_as_good_as(compute, with_gradients(literal), *args)


def test_half_precision() -> None:
    """The error is at most twice that of torch's operators; the output is not rounded.

    The dtype is float16, since the interpreter has no products in bfloat16.
    """
    dtype = torch.float16
    x = torch.randn(TOKENS, 64)
    args = tuple(part.to(dtype) for part in inputs(channels=64, width=16))
    actual = absorbed_heads(*args, x.to(dtype), OFFSETS, scale=SCALE, backend="triton")
    assert actual.dtype == torch.float32

    def run(backend: str):
        def of(*args: Tensor) -> Tensor:
            return absorbed_heads(
                *args, x.to(dtype).to(args[0].dtype), OFFSETS, scale=SCALE, backend=backend
            ).to(args[0].dtype)  # fmt: skip

        return with_gradients(of)

    assert_as_good_as(run("triton"), run("eager"), *args)


def test_what_is_multiplied_with_tokens_is_centred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Centred weights are rounded once; their remaining sums subtract each token's mean."""
    products: list[Centred] = []

    def seen(x: Tensor, p: Tensor | None, centred: Centred, *rest: Any) -> Tensor:
        products.append(centred)
        return project(x, p, centred, *rest)

    monkeypatch.setattr(launchers, "project", seen)
    args = tuple(part.half().requires_grad_() for part in inputs(channels=42))
    q, weights, _ = args
    x, positions = torch.randn(TOKENS, 37).half(), torch.randn(TOKENS, 5)
    out = absorbed_heads(*args, x, OFFSETS, positions=positions, scale=SCALE, backend="triton")
    grad = torch.randn_like(out)
    out.backward(grad)
    rounded = q.double() * SCALE, grad.half().double()
    for product, rows, weight in zip(products, rounded, weights.chunk(2), strict=True):
        exact = (rows.unsqueeze(3) @ weight.double().unsqueeze(1)).squeeze(3).flatten(1, 2)
        exact -= exact.mean(-1, keepdim=True)
        joined = torch.cat([product.weight, product.weight_p], -1)
        assert joined.dtype == torch.float16
        torch.testing.assert_close(joined.double(), exact, rtol=2**-11 + 1e-5, atol=1e-6)
        torch.testing.assert_close(product.sums, joined.float().sum(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_bag_alone_is_the_bag_in_a_batch(dropout_p: float) -> None:
    """Outputs and gradients have the same bits; rows behind the last bag have no effect.

    Dropout depends on the bag's index, so the first bag is compared.
    """
    q, weights, shifts = inputs(channels=42, bags=3)
    x, places = torch.randn(60, 37), torch.randn(60, 5)
    seed = torch.tensor([3]) if dropout_p else None

    def run(q: Tensor, offsets: Tensor, *tokens: Tensor) -> tuple[Tensor, ...]:
        queries = q.detach().requires_grad_()
        out = absorbed_heads(
            queries, weights, shifts, tokens[0], offsets, positions=tokens[1], scale=SCALE,
            dropout_p=dropout_p, seed=seed, backend="triton",
        )  # fmt: skip
        return out.detach(), *torch.autograd.grad(out.square().sum(), queries)

    batch = run(q, offsets_of([30, 0, 25]), x, places)
    alone = run(q[:1], offsets_of([30]), x[:30], places[:30])
    stale = (torch.cat([t[:30], torch.full((70, t.shape[1]), torch.nan)]) for t in (x, places))
    followed = run(q[:1], offsets_of([30]), *stale)
    for batched, expected, padded in zip(batch, alone, followed, strict=True):
        assert torch.equal(batched[:1], expected)
        assert torch.equal(padded, expected)


def test_rows_behind_the_last_bag_have_no_gradient() -> None:
    args, x = inputs(channels=37, bags=1), torch.randn(TOKENS, 37)
    padded = torch.cat([x, torch.full((70, 37), torch.nan)])
    results = attended("triton", padded)(*args), attended("triton", x)(*args)
    assert all(map(torch.equal, *results))


@pytest.mark.slow
def test_registration() -> None:
    x, positions = torch.randn(12, 6), torch.randn(12, 2)
    offsets, seed = offsets_of([4, 0, 8]), torch.tensor([3])
    mean, rstd = row_statistics_reference(x, positions=positions)
    for bags, dropout_p in ((3, 0.0), (1, 0.2)):
        args = [part.requires_grad_() for part in inputs(channels=8, bags=bags)]
        tokens = (x, positions, offsets, None if dropout_p else torch.ones(12), mean, rstd)
        options = (SCALE, 1e-5, dropout_p, seed if dropout_p else None)
        opcheck(torch.ops.motet.absorbed_heads, (*args, *tokens, *options))
        plain = [part.detach() for part in args]
        grad, *made = torch.ops.motet.absorbed_heads(*plain, *tokens, *options)
        opcheck(torch.ops.motet.absorbed_heads_backward, (grad, *plain, *tokens, *made, *options))
    run = partial(absorbed_heads, x=torch.randn(12, 8), offsets=offsets, scale=SCALE)
    assert_differentiable_once(
        lambda *t: run(*t, backend="triton"), *inputs(channels=8, bags=3)
    )  # fmt: skip


def test_who_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token gradients, wide heads and empty queries are computed by absorbed_attention in torch."""
    calls: list[str] = []
    composition = heads_operator.absorbed_attention

    def seen(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        calls.append(options["backend"])
        return composition(*args, **options)

    monkeypatch.setattr(heads_operator, "absorbed_attention", seen)
    offsets, x = offsets_of([4, 8]), torch.randn(12, 37)
    run = partial(absorbed_heads, offsets=offsets, scale=SCALE)
    q, *folded = inputs(channels=37, bags=2)
    run(q, *folded, x, backend="triton")
    assert calls == []
    actual = run(q, *folded, x.requires_grad_(), backend="triton")
    assert torch.autograd.grad(actual.sum(), x)[0].abs().sum() > 0
    with torch.no_grad():
        run(q, *folded, x, backend="triton")
    assert calls == ["triton"]
    x = x.detach()
    assert run(*inputs(width=257, channels=37, bags=2), x, backend="triton").shape[-1] == 257
    assert run(*inputs(latents=0, channels=37, bags=2), x, backend="triton").shape[2] == 0
    run(q, *folded, x, backend="eager")
    run(q, *folded, x, backend="compile")
    assert calls == ["triton", "triton", "triton", "eager", "compile"]


def test_what_does_not_fit() -> None:
    x, offsets = torch.randn(12, 37), offsets_of([4, 8])
    run = partial(absorbed_heads, offsets=offsets, scale=SCALE, backend="triton")
    q, weights, shifts = inputs(channels=37, bags=2)
    with pytest.raises(ValueError, match=r"weights: expected torch.float32 \[4, 5, 37\] on cpu"):
        run(q, weights[:, :, :36], shifts, x)
    with pytest.raises(ValueError, match=r"shifts: expected torch.float32 \[4, 5\] on cpu"):
        run(q, weights, shifts.double(), x)
    with pytest.raises(ValueError, match=r"q: expected \[2 or 1, H, C, E\] on cpu, got \(3, 2"):
        run(inputs(bags=3)[0], weights, shifts, x)
    with pytest.raises(ValueError, match=r"x: expected a dtype that goes with torch.float32"):
        run(q, weights, shifts, x.double())
    with pytest.raises(ValueError, match=r"statistics\[0\]: expected torch.float32 \[12\]"):
        run(q, weights, shifts, x, statistics=(torch.zeros(3), torch.zeros(3)))


def test_maps_and_logits_of_a_model() -> None:
    """HEALNet with strategy "absorbed" gives the same logits and maps on both backends."""
    model = motet.HEALNet(
        {"wsi": motet.Bag(21)}, out_features=3, num_latents=5, latent_dim=12, heads=2, head_dim=7
    ).eval()
    bags = torch.randn(3, 9, 21)
    options = {"strategy": "absorbed", "return_attention": True}
    actual = model({"wsi": bags}, backend="triton", **options)
    torch.testing.assert_close(actual, model({"wsi": bags}, backend="eager", **options))
