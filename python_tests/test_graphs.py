"""CudaGraphs as far as a machine without a GPU can show it: what is captured, and when.

The capture here runs the captured module on static copies of its inputs, as a CUDA graph does.
"""

from typing import Any

import motet
import pytest
import torch
from motet.fusion.graphs import bucket
from torch import Tensor, nn

from .conftest import randomised


class Recorder:
    """Stands in for torch.cuda.make_graphed_callables: one output and one set of gradients."""

    def __init__(self) -> None:
        self.captured = 0

    def __call__(self, module: nn.Module, samples: tuple[Tensor, ...], **options: Any) -> Any:
        self.captured += 1
        shapes = [sample.shape for sample in samples]
        parameters = [p for p in module.parameters() if p.requires_grad]
        static: dict[str, Any] = {}

        class Replay(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, count: int, *inputs: Tensor) -> Tensor:
                with torch.enable_grad():
                    own = [x.detach().requires_grad_(x.requires_grad) for x in inputs[:count]]
                    out = module(*own)
                static["leaves"], static["live"] = [*own, *parameters], out
                static["out"] = static.get("out", torch.empty_like(out)).copy_(out.detach())
                return static["out"].detach()

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Any:
                wanted = [x for x in static["leaves"] if x.requires_grad]
                found = iter(torch.autograd.grad(static["live"], wanted, grad, allow_unused=True))
                grads = [next(found) if x.requires_grad else None for x in static["leaves"]]
                kept = static.setdefault("grads", [None if g is None else g.clone() for g in grads])
                for own, g in zip(kept, grads, strict=True):
                    if own is not None:
                        own.copy_(g)
                return None, *(None if g is None else g.detach() for g in kept)

        def replay(*tensors: Tensor) -> Tensor:
            assert [tensor.shape for tensor in tensors] == shapes  # a graph takes no others
            return Replay.apply(len(tensors), *tensors, *parameters)

        return replay


def model_of(**options: Any) -> motet.HEALNet:
    model = motet.HEALNet(
        {"omic": motet.Tabular(7), "wsi": motet.Bag(6, coords=2)}, out_features=3, num_latents=5,
        latent_dim=12, heads=2, head_dim=4, self_attention=1, **options,
    )  # fmt: skip
    return randomised(model.double())


def batch_of(*lengths: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    total = int(offsets[-1])
    jagged = torch.nested.nested_tensor_from_jagged
    wsi, places = (torch.randn(total, n, dtype=torch.float64) for n in (6, 2))
    omic = torch.randn(len(lengths), 7, dtype=torch.float64)
    present = torch.arange(len(lengths)) % 3 > 0
    return {"omic": omic, "wsi": jagged(wsi, offsets)}, {
        "coords": {"wsi": jagged(places, offsets)}, "present": {"omic": present},
    }  # fmt: skip


@pytest.mark.parametrize("share", [True, False])
def test_ragged_batches_replay_one_graph(share: bool) -> None:
    model, recorder = model_of(share_weights=share, depth=3), Recorder()
    graphed = motet.CudaGraphs(model, capture=recorder)
    for lengths in ((9, 0, 30), (20, 18, 1), (0, 0, 40)):  # 39, 39 and 40 tokens: one bucket
        inputs, options = batch_of(*lengths)
        torch.testing.assert_close(graphed(inputs, **options), model(inputs, **options))
    assert recorder.captured == 1
    inputs, options = batch_of(30, 30, 30)
    graphed(inputs, **options)
    assert recorder.captured == 2
    graphed({"omic": inputs["omic"]})
    assert recorder.captured == 3
    with torch.no_grad():
        graphed({"omic": inputs["omic"]})
    assert recorder.captured == 4


def test_gradients_flow_to_every_parameter() -> None:
    model = model_of().train()
    graphed = motet.CudaGraphs(model, capture=Recorder())
    inputs, options = batch_of(9, 0, 30)
    wanted = list(model.parameters())

    def gradients(call: Any) -> tuple[Tensor, ...]:
        loss = call(inputs, **options).square().sum()
        return torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)

    for own, theirs in zip(gradients(graphed), gradients(model), strict=True):
        torch.testing.assert_close(own, theirs)


def test_results_outlive_the_next_replay() -> None:
    model = model_of()
    graphed = motet.CudaGraphs(model, capture=Recorder())
    batches = [batch_of(9, 0, 30), batch_of(20, 18, 1)]
    results = [graphed(inputs, **options) for inputs, options in batches]
    for logits, (inputs, options) in zip(results, batches, strict=True):
        torch.testing.assert_close(logits, model(inputs, **options))
    with pytest.raises(RuntimeError, match="expected the backward pass before the next call"):
        results[0].sum().backward()
    expected: list[Tensor | None] = []
    for call in (graphed, model):  # gradients of two batches add up
        model.zero_grad()
        for inputs, options in batches:
            call(inputs, **options).square().sum().backward()
        own = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        expected = own if call is graphed else expected
    for mine, theirs in zip(expected, own, strict=True):
        if theirs is not None:
            torch.testing.assert_close(mine, theirs)


def test_modes_and_frozen_parameters_have_graphs_of_their_own() -> None:
    model, recorder = model_of(), Recorder()
    model.train()
    model.layers[0].eval()
    graphed = motet.CudaGraphs(model, capture=recorder)
    inputs, options = batch_of(9, 0, 30)
    graphed(inputs, **options)
    assert model.training
    assert not model.layers[0].training
    model.layers[0].train()
    graphed(inputs, **options)
    model.head.requires_grad_(False)
    graphed(inputs, **options)
    assert recorder.captured == 3


def test_dense_bags() -> None:
    model = motet.HEALNet({"wsi": motet.Bag(6)}, out_features=3, num_latents=4, latent_dim=8).eval()
    graphed = motet.CudaGraphs(model, capture=Recorder())
    bags = torch.randn(2, 21, 6)
    torch.testing.assert_close(graphed({"wsi": bags}), model({"wsi": bags}, strategy="cached"))


def test_buckets() -> None:
    sizes = [bucket(n) for n in range(1, 5000)]
    assert sizes == sorted(sizes)
    assert all(n <= size <= max(8, 1.25 * n) for n, size in enumerate(sizes, start=1))
    assert len(set(sizes)) <= 4 * 10


def test_refusals() -> None:
    with pytest.raises(
        TypeError, match="model: expected a HEALNet, LegoBlock, LegoMerge or LegoFuse, got"
    ):
        motet.CudaGraphs(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="model: expected it on a CUDA device, got cpu"):
        motet.CudaGraphs(model_of())


def lego_of(kind: str, **options: Any) -> nn.Module:
    sizes = {"num_latents": 6, "latent_dim": 5, "heads": 2, "head_dim": 4, "out_features": 3}
    wide = {"fft": "latents", "context": "spectrum", "normalise": True, **sizes, **options}
    blocks = {
        "omic": motet.LegoBlock(motet.Tabular(7), depth=3, **wide),
        "wsi": motet.LegoBlock(motet.Bag(6), motet.SNN(6, hidden=(8,)), depth=2, **wide),
    }
    if kind == "block":
        return randomised(blocks["wsi"].double())
    joined = {"merge": motet.LegoMerge, "stack": motet.LegoFuse, "weave": motet.LegoFuse}[kind]
    mode = {} if kind == "merge" else {"mode": kind}
    return randomised(joined(blocks, **mode).double())


@pytest.mark.parametrize("kind", ["block", "merge", "stack", "weave"])
def test_lego_models_replay_too(kind: str) -> None:
    """Spectra with counts included: ragged bags of one bucket replay one graph."""
    model, recorder = lego_of(kind), Recorder()
    graphed = motet.CudaGraphs(model, capture=recorder)
    captured = []
    for lengths in ((9, 9, 9), (9, 8, 10), (12, 4, 11)):
        inputs, _ = batch_of(*lengths)
        given = {"x": inputs["wsi"]} if kind == "block" else inputs
        plain = inputs["wsi"] if kind == "block" else inputs
        expected, out = model(plain), graphed(given)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        wanted = list(model.parameters())
        grads = [
            torch.autograd.grad(o.square().sum(), wanted, allow_unused=True, materialize_grads=True)
            for o in (out, expected)
        ]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)
        captured.append(recorder.captured)
    # A merge looks at which rows have tokens, so that ragged bags are not captured.
    assert captured == ([0, 0, 0] if kind == "merge" else [1, 1, 1])


def test_a_merge_of_whole_rows_is_captured() -> None:
    model, recorder = lego_of("merge"), Recorder()
    graphed = motet.CudaGraphs(model, capture=recorder)
    for seed in range(2):
        torch.manual_seed(seed)
        inputs = {"omic": torch.randn(3, 7).double(), "wsi": torch.randn(3, 9, 6).double()}
        torch.testing.assert_close(graphed(inputs), model(inputs), rtol=1e-12, atol=1e-12)
    assert recorder.captured == 1
