"""The gradient of K and V is computed once for all layers: it equals the sum over the layers."""

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from .conftest import KERNEL_TESTS, require_interpreter

require_interpreter()

import motet
from motet.fusion.attention import Attention
from motet.fusion.attention_forms import CachedKeys
from motet.fusion.context import Context
from motet.kernels.latent_attention import triton as launchers
from motet.kernels.latent_attention.operator import latent_attention_kv
from motet.kernels.latent_attention.records import kv_records, record_width
from motet.kernels.latent_attention.reference import latent_attention_reference

from .comparison import assert_as_good_as, with_gradients
from .conftest import offsets_of

pytestmark = KERNEL_TESTS
LENGTHS = [40, 0, 1, 89]
SCALE, LAYERS = 0.3, 3
ON: dict[str, Any] = {"backend": "triton", "scale": SCALE}


def layers_of(
    q: Tensor, kv: Tensor, *, recorded: bool, counts: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    """Return the outputs of layers, each with queries of its own and a mask of its own."""
    width, offsets = q.shape[-1], offsets_of(LENGTHS)
    kv = torch.nn.functional.pad(kv, (0, -width % 16, *4 * [0], 0, 30))  # rows behind the last bag
    counts = None if counts is None else torch.cat([counts, counts.new_ones(30)])
    options = {"counts": counts, "dropout_p": dropout_p, **ON}
    records = (
        kv_records(q[0], kv, offsets, layers=len(q), **options) if recorded else len(q) * [None]
    )
    assert len(records) == len(q)
    outs = [
        latent_attention_kv(
            queries, kv, offsets, record=record,
            seed=torch.tensor([2**61 + i]) if dropout_p else None, **options,
        )[0]
        for i, (queries, record) in enumerate(zip(q, records, strict=True))
    ]  # fmt: skip
    return torch.stack([out.to(q.dtype) for out in outs])


def literal(q: Tensor, kv: Tensor, counts: Tensor | None) -> Tensor:
    offsets, bags = offsets_of(LENGTHS), len(LENGTHS)
    converted = None if counts is None else counts.to(torch.promote_types(q.dtype, torch.float32))
    return torch.stack([
        latent_attention_reference(
            queries.expand(bags, -1, -1, -1), *kv.unbind(1), offsets, counts=converted, scale=SCALE
        )
        for queries in q
    ])  # fmt: skip


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize(
    ("shared", "latents", "width", "dtype"),
    [
        (True, 7, 27, torch.float32),
        pytest.param(False, 25, 16, torch.float32, marks=pytest.mark.slow),
        (False, 17, 63, torch.float16),
        pytest.param(True, 40, 16, torch.float16, marks=pytest.mark.slow),
    ],
)
def test_of_all_layers(
    shared: bool, latents: int, width: int, dtype: torch.dtype, counted: bool
) -> None:
    q = torch.randn(LAYERS, 1 if shared else len(LENGTHS), 2, latents, width).to(dtype)
    kv = torch.randn(sum(LENGTHS), 2, 2, width).to(dtype)
    counts = 4 * torch.rand(sum(LENGTHS)) if counted else None
    assert_as_good_as(
        with_gradients(partial(layers_of, recorded=True, counts=counts)),
        with_gradients(partial(literal, counts=counts)),
        q, kv,
    )  # fmt: skip


@pytest.mark.parametrize("latents", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_every_layer_drops_by_its_own_seed(latents: int) -> None:
    q, kv = torch.randn(LAYERS, 1, 2, latents, 16), torch.randn(sum(LENGTHS), 2, 2, 16)
    once, each = (
        with_gradients(partial(layers_of, recorded=recorded, dropout_p=0.4))(q, kv)
        for recorded in (True, False)
    )
    assert torch.equal(once[0], each[0])
    assert torch.equal(once[1], each[1])
    torch.testing.assert_close(once[2], each[2], rtol=0, atol=2e-5)


def test_layers_that_nobody_differentiates_add_nothing() -> None:
    """Their records are zeros: then p is 1, but dout and delta are 0."""
    q, kv = torch.randn(LAYERS, 1, 2, 7, 16), torch.randn(sum(LENGTHS), 2, 2, 16)
    kv.requires_grad_()
    middle = [
        torch.autograd.grad(layers_of(q[layers], kv, recorded=True)[at].cos().sum(), kv)[0]
        for layers, at in ((slice(None), 1), (slice(1, 2), 0))
    ]
    assert torch.equal(*middle)
    assert not torch.autograd.grad((0 * layers_of(q, kv, recorded=True)).sum(), kv)[0].any()


def test_a_bag_alone_is_the_bag_in_a_batch() -> None:
    records = torch.randn(3, 2, LAYERS, 7, record_width(16))
    records[..., 32] = 3 + records[..., 32].abs()  # log-sum-exp
    kv, bounds = torch.randn(300, 2, 2, 16), [0, 140, 141, 290]

    def run(records: Tensor, kv: Tensor, offsets: Tensor) -> Tensor:
        dkv = torch.full_like(kv, torch.nan)
        rest = (offsets, None, 16, SCALE, 0.0)
        launchers.kv_gradient(records, *kv.unbind(1), *rest, *dkv.unbind(1))
        return dkv

    batch = run(records, kv, torch.tensor(bounds))
    assert not batch[290:].any()
    for bag, (start, stop) in enumerate(pairwise(bounds)):
        alone = run(records[bag, None], kv[start:stop], torch.tensor([0, stop - start]))
        assert torch.equal(alone, batch[start:stop])


@pytest.mark.parametrize("lengths", [[4, 0, 3], [0, 0], []], ids=str)
@pytest.mark.parametrize("option", [None, "dropout", "counts"])
def test_registration(lengths: list[int], option: str | None) -> None:
    operators, offsets = torch.ops.motet, offsets_of(lengths)
    q, kv = torch.randn(len(lengths), 2, 3, 5), torch.randn(sum(lengths) + 2, 2, 2, 16)
    kv[..., 5:] = 0
    counts = 1 + torch.rand(len(kv)) if option == "counts" else None
    dropout_p, seed = (0.5, torch.tensor([5])) if option == "dropout" else (0.0, None)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    args_of_records = (kv.clone().requires_grad_(), offsets, counts, LAYERS, 3, 5, SCALE, dropout_p)
    opcheck(operators.kv_records, args_of_records, test_utils=tests)  # its values are uninitialised
    record = torch.zeros(len(lengths), 2, 3, record_width(5))
    options = (SCALE, dropout_p, seed, "triton")
    args = [x.clone().requires_grad_() for x in (q, kv)]
    opcheck(
        operators.latent_attention_kv,
        (*args, offsets, counts, *options, record.clone().requires_grad_()),
        test_utils=tests,
    )
    made = operators.latent_attention_kv(q, kv, offsets, counts, *options, record)
    backward = (torch.randn_like(q), q, kv, offsets, counts, *made, *options, True)
    opcheck(operators.latent_attention_kv_backward, backward, test_utils=tests)
    opcheck(
        operators.kv_records_backward,
        (record[:, :, None], kv, offsets, counts, 5, SCALE, dropout_p), test_utils=tests,
    )  # fmt: skip


@pytest.mark.slow
def test_compiles_whole() -> None:
    def run(q: Tensor, kv: Tensor) -> Tensor:
        offsets = torch.arange(3) * (len(kv) // 2)
        records = kv_records(
            q[0], kv, offsets, layers=2, counts=None, dropout_p=0.0, backend="triton", scale=SCALE
        )
        outs = [
            latent_attention_kv(queries, kv, offsets, record=record, **ON)[0]
            for queries, record in zip(q, records, strict=True)
        ]
        return torch.stack(outs).cos()

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (40, 66):
        q, kv = torch.randn(2, 2, 2, 3, 16), torch.randn(tokens, 2, 2, 16)
        made, expected = (with_gradients(f)(q, kv) for f in (compiled, run))
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-6)


def keys_of(layers: int, **options: Any) -> tuple[Attention, CachedKeys]:
    attention = Attention(12, 6, heads=2, head_dim=16)
    kv = torch.randn(30, 2, 2, 16, requires_grad=True)
    context = Context(torch.randn(30, 6), offsets=offsets_of([10, 20]))
    return attention, CachedKeys(context, offsets_of([10, 20]), kv, layers=layers, **options)


@pytest.mark.parametrize("asked", [2, 3, 5])
def test_asked_less_or_more_than_planned(asked: int) -> None:
    attention, keys = keys_of(3, backend="triton")
    grads = []
    queries = torch.randn(asked, 2, 7, 32)
    for backend in ("triton", "eager"):
        cached = CachedKeys(keys.context, keys.offsets, keys.kv, backend, 3)
        outs = [cached.attend(attention, x) for x in queries]
        grads.append(torch.autograd.grad(torch.stack(outs).cos().sum(), keys.kv)[0])
    torch.testing.assert_close(*grads, rtol=0, atol=1e-5)


def test_where_there_are_none() -> None:
    q, kv, offsets = torch.randn(2, 2, 7, 16), torch.randn(30, 2, 2, 16), offsets_of([10, 20])
    options = {"layers": 2, "counts": None, "scale": SCALE, "dropout_p": 0.0}
    given = kv.clone().requires_grad_()
    for backend in ("eager", "compile"):
        assert not kv_records(q, given, offsets, backend=backend, **options)
    assert not kv_records(q, kv, offsets, backend="triton", **options)
    assert not kv_records(q.double(), given.double(), offsets, backend="auto", **options)
    with torch.no_grad():
        assert not kv_records(q, given, offsets, backend="triton", **options)
    made = kv_records(q, given, offsets, backend="triton", **options)
    with pytest.raises(ValueError, match=r"record: expected \(2, 2, 3, 40\), got \(2, 2, 7, 40\)"):
        latent_attention_kv(q[:, :, :3], kv, offsets, record=made[0], **ON)
    out, _ = latent_attention_kv(q, given, offsets, record=made[0], **ON)
    (first,) = torch.autograd.grad(out.cos().sum(), given, create_graph=True)
    with pytest.raises(NotImplementedError, match="expected one derivative"):
        torch.autograd.grad(first.sum(), given)


@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "share",
    [True, *(pytest.param(share, marks=pytest.mark.slow) for share in (False, "all-but-first"))],
)
def test_healnet_reads_k_and_v_once(
    monkeypatch: pytest.MonkeyPatch, share: Any, dropout: float
) -> None:
    """One launch computes the gradient for all layers that share a weight set."""
    model = motet.HEALNet(
        {"wsi": motet.Bag(24)}, out_features=2, depth=3, num_latents=5, latent_dim=12, heads=2,
        head_dim=16, share_weights=share, attn_dropout=dropout,
    )  # fmt: skip
    layer_counts, gradient = [], launchers.kv_gradient

    def watched(records: Tensor, *rest: Any) -> None:
        layer_counts.append(records.shape[2])
        gradient(records, *rest)

    monkeypatch.setattr(launchers, "kv_gradient", watched)
    x = torch.randn(2, 300, 24)
    model({"wsi": x}, strategy="cached", backend="triton").sum().backward()
    assert sorted(layer_counts) == {True: [3], False: [1, 1, 1], "all-but-first": [1, 2]}[share]
