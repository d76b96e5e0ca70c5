"""StepGraphs and CudaGraphs, as far as a machine without a GPU can test them.

FakeCapture runs the captured function again on the same static tensors, as a CUDA graph does.
The code that only a GPU runs is tested in test_capture.py.
"""

import gc
import warnings
import weakref
from dataclasses import replace
from typing import Any

import motet
import pytest
import torch
from motet.fusion.graph_inputs import bucket
from motet.fusion.graphs import logits_of
from motet.fusion.patients import PatientBatch, Ragged
from torch import Tensor, nn

from .fake_capture import FakeCapture
from .graph_helpers import (
    MODELS,
    SIZES,
    batch_of,
    eager,
    graphed,
    healnet,
    lego,
    loss_of,
    only,
    rename,
)


def assert_same(a: tuple[Tensor, Any], b: tuple[Tensor, Any], within: float = 1e-10) -> None:
    torch.testing.assert_close(a[0], b[0], rtol=within, atol=within)
    for actual, expected in zip(a[1], b[1], strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            torch.testing.assert_close(actual, expected, rtol=within, atol=within)


LENGTHS = ((9, 0, 30), (20, 18, 1), (0, 0, 40), (1, 80, 9))


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_of_ragged_batches_that_share_one_graph(name: str) -> None:
    make, of = MODELS[name]
    model, capture = make().train(), FakeCapture()
    for module in model.modules():
        if isinstance(module, nn.AlphaDropout):
            module.p = 0.0
    graphs = motet.StepGraphs(model, loss_of, capture=capture)
    # A LegoBlock with an encoder is captured only for batches in which no row misses its modality.
    complete = name in ("a table alone", "an encoder")
    coords = "weights" in name
    for seed, lengths in enumerate(LENGTHS):
        batch = of(batch_of(*lengths, coords=coords, missing=not complete, seed=seed))
        assert_same(graphed(graphs, batch), eager(model, batch))
    assert capture.captured == 1
    (entry,) = graphs.report()
    assert (entry["how"], entry["calls"], entry["replays"]) == ("graph", 4, 3)
    assert graphs.fell_back == {}


def test_the_first_call_and_the_replays_give_the_same_bits() -> None:
    """So a resumed run, which captures its sizes anew, ends with the same bits."""
    model = healnet(attn_dropout=0.3, ff_dropout=0.3).train()
    graphs = motet.StepGraphs(model, loss_of, capture=FakeCapture())
    batch = batch_of(9, 0, 30)
    results = []
    for seed in (1, 1, 2, 1):
        torch.manual_seed(seed)
        results.append(graphed(graphs, batch))
    first, again, other, last = results
    for same in (again, last):
        assert_same(first, same, within=0)
    assert first[0] != other[0]
    assert [entry["replays"] for entry in graphs.report()] == [3]


def test_what_lies_behind_the_last_bag_does_not_matter() -> None:
    model = healnet(share_weights=False).train()
    graphs = motet.StepGraphs(model, loss_of, capture=FakeCapture())
    results = []
    for filling in (1.0, 1.0, -3e5, 7e-9):
        for flat in graphs._graphs._static._flat.values():
            if flat.is_floating_point():
                flat.fill_(filling)
        results.append(graphed(graphs, batch_of(9, 0, 30)))
    for other in results[1:]:
        assert_same(results[0], other, within=0)


def test_dense_bags_share_graphs_with_ragged_ones() -> None:
    model, capture = healnet().train(), FakeCapture()
    graphs = motet.StepGraphs(model, loss_of, capture=capture)
    for lengths in ((9, 0, 30), (10, 10, 10), (10, 10, 10)):
        batch = batch_of(*lengths)
        if lengths[1]:  # the loader makes ragged batches; a user may make dense ones
            dense, places = (
                part["wsi"].values.unflatten(0, (3, 10)) for part in (batch.x, batch.coords)
            )
            batch = Plain({**batch.x, "wsi": dense}, {"wsi": places}, batch.present, batch.target)
        assert_same(graphed(graphs, batch), eager(model, batch))
    assert capture.captured == 1


def test_bags_that_are_said_to_be_missing() -> None:
    model, capture = healnet().train(), FakeCapture()
    graphs = motet.StepGraphs(model, loss_of, capture=capture)
    full = batch_of(9, 20, 30)
    without = {**full.present, "wsi": torch.tensor([True, False, True])}
    for batch in (full, replace(full, present=without)):
        assert_same(graphed(graphs, batch), eager(model, batch))
    assert capture.captured == 1


class Plain(PatientBatch):
    """A batch whose bags are dense tensors."""

    def arguments(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return dict(self.x), {"present": self.present, "coords": dict(self.coords)}


@pytest.mark.parametrize("l1", [0.0, 0.1])
def test_weights_that_a_batch_does_not_touch(l1: float) -> None:
    """They get no gradient, or only that of L1, as without a graph; batches may have no bags."""
    model = healnet().train()
    graphs = motet.StepGraphs(model, loss_of, l1=l1, capture=FakeCapture())
    full = batch_of(9, 0, 30, missing=False)
    for batch in (full, only(full, "omic"), only(full, "omic"), batch_of(0, 0, 0), full):
        loss, expected = eager(model, batch)
        assert any(gradient is None for gradient in expected)
        if l1:
            expected = [
                (0 if gradient is None else gradient) + l1 * parameter.detach().sign()
                for parameter, gradient in zip(model.parameters(), expected, strict=True)
            ]
        assert_same(graphed(graphs, batch), (loss, expected))


def test_a_scale_multiplies_the_gradients_and_not_the_loss() -> None:
    model = healnet().train()
    batch = batch_of(9, 0, 30)
    plain = motet.StepGraphs(model, loss_of, l1=0.1, capture=FakeCapture())
    loss, expected = graphed(plain, batch)
    graphs = motet.StepGraphs(model, loss_of, l1=0.1, capture=FakeCapture())
    for scale in (4.0, 4.0, 0.5):
        result = graphed(graphs, batch, scale=torch.tensor(scale))
        assert_same(result, (loss, [scale * gradient for gradient in expected]))


def test_results_outlive_the_next_call() -> None:
    model = healnet().train()
    graphs = motet.StepGraphs(model, loss_of, capture=FakeCapture())
    batches = [batch_of(9, 0, 30, seed=seed) for seed in range(4)]
    losses = [graphs(batch) for batch in batches]
    assert not any(loss.requires_grad for loss in losses)
    torch.testing.assert_close(
        torch.stack(losses), torch.stack([eager(model, b)[0] for b in batches])
    )


def test_what_has_a_graph_of_its_own() -> None:
    model, capture = healnet().train(), FakeCapture()
    graphs = motet.StepGraphs(model, loss_of, capture=capture)

    def captured(batch: PatientBatch | None = None, **options: Any) -> int:
        before = capture.captured
        for _ in range(3):
            graphs(batch or batch_of(9, 0, 30), **options)
        return capture.captured - before

    assert captured() == 1
    assert captured(batch_of(1, 60, 60)) == 0  # 121 tokens fit into 128
    assert captured(batch_of(9, 0, 30, missing=False)) == 0
    assert captured(batch_of(100, 20, 9)) == 1  # 129 need 256; smaller sizes are then captured anew
    assert captured() == 1
    assert captured(batch_of(100, 20, 9)) == 0
    assert captured(batch_of(9, 30)) == 1
    assert captured(scale=torch.tensor(1.0)) == 1
    model.layers[0].eval()
    assert captured() == 1
    model.head.requires_grad_(False)
    assert captured() == 1
    assert all(parameter.grad is None for parameter in model.head.parameters())
    assert captured(only(batch_of(9, 0, 30), "omic")) == 1
    model.float()
    half = single(batch_of(9, 0, 30))
    assert captured(half) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert captured(half) == 1
    assert model.latents.grad.dtype == torch.float32


def test_buckets() -> None:
    sizes = [bucket(n) for n in range(100_000)]
    assert sizes == sorted(sizes)
    assert all(n <= size <= max(1.0625 * n, n + 128) for n, size in enumerate(sizes))
    assert len(set(sizes[2048:])) <= 16 * 6
    assert bucket(120_000) == 122_880


def test_larger_batches_take_the_place_of_graphs_and_their_memory() -> None:
    model, capture = healnet().train(), FakeCapture()
    graphs = motet.StepGraphs(model, loss_of, capture=capture)
    small, large = batch_of(9, 0, 30), batch_of(200, 5, 90)
    for _ in range(2):
        graphs(small)
    (entry,) = graphs._graphs._entries.values()
    old = weakref.ref(entry.recording.result[0])
    graphs(large)
    gc.collect()
    assert old() is None
    assert capture.forgotten == 1
    flat = dict(graphs._graphs._static._flat)
    for batch in (small, large, small):
        assert_same(graphed(graphs, batch), eager(model, batch))
    assert capture.captured == 3
    assert all(flat[name] is block for name, block in graphs._graphs._static._flat.items())


def test_weights_that_move_are_captured_anew() -> None:
    model, capture = healnet().train(), FakeCapture()
    graphs = motet.StepGraphs(model, loss_of, capture=capture)
    for _ in range(2):
        graphs(batch_of(9, 0, 30))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    optimiser.step()  # in place
    assert_same(graphed(graphs, batch_of(9, 0, 30)), eager(model, batch_of(9, 0, 30)))
    assert capture.captured == 1
    with torch.no_grad():
        model.latents.data = model.latents.data.clone()
    for _ in range(2):
        assert_same(graphed(graphs, batch_of(9, 0, 30)), eager(model, batch_of(9, 0, 30)))
    assert (capture.captured, capture.forgotten) == (2, 1)


def test_no_more_than_max_graphs() -> None:
    model, capture = healnet().train(), FakeCapture()
    graphs = motet.StepGraphs(model, loss_of, max_graphs=1, capture=capture)
    large, small = batch_of(100, 20, 9), batch_of(9, 0, 30)
    for batch in (large, large, small):
        graphs(batch)
    with pytest.warns(
        RuntimeWarning, match="StepGraphs: more than 1 sizes; such calls run without"
    ):
        assert_same(graphed(graphs, small), eager(model, small))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a second warning would raise
        graphs(small)
    assert capture.captured == 1
    assert graphs.fell_back == {"more than 1 sizes": 2}
    assert [(row["how"], row["why"], row["calls"], row["replays"]) for row in graphs.report()] == [
        ("graph", "", 2, 1), ("eager", "more than 1 sizes", 3, 0),
    ]  # fmt: skip
    assert graphs.report()[0]["sizes"] == "3 rows: omic 3 x 1 x 7, wsi 256 x 6"
    assert graphs.report()[0]["mib"] == 1.5


def test_after_a_capture_that_failed_all_goes_on_without() -> None:
    model, capture = healnet(ff_dropout=0.3).train(), FakeCapture()
    graphs = motet.StepGraphs(model, loss_of, capture=capture)
    small, large = batch_of(9, 0, 30), batch_of(100, 20, 9)
    graphs(large)
    graphs(large)
    graphs(small)
    capture.fails = "a capture failed: out of memory"
    with pytest.warns(RuntimeWarning, match="a capture failed: out of memory"):
        torch.manual_seed(3)
        result = graphed(graphs, small)
    torch.manual_seed(3)
    assert_same(result, graphed(motet.StepGraphs(model, loss_of, capture=FakeCapture()), small))
    assert capture.forgotten == 1
    for _ in range(2):
        graphs(large)
    assert capture.captured == 1
    assert {entry["how"] for entry in graphs.report()} == {"eager"}
    assert graphs.fell_back == {capture.fails: 3}


def test_a_capture_that_failed_elsewhere_ends_the_replays_here() -> None:
    capture = FakeCapture()
    graphs = motet.StepGraphs(healnet().train(), loss_of, capture=capture)
    for _ in range(2):
        graphs(batch_of(9, 0, 30))
    capture.refused = "a capture failed: elsewhere"
    with pytest.warns(RuntimeWarning, match="elsewhere"):
        graphs(batch_of(9, 0, 30))
    assert graphs.report()[0]["how"] == "eager"


def falls_back(model: nn.Module, batch: PatientBatch, why: str, **options: Any) -> None:
    """Check that a step runs without a graph, warns once with the reason, and computes the same."""
    capture = FakeCapture()
    graphs = motet.StepGraphs(model, loss_of, capture=capture, **options)
    with pytest.warns(RuntimeWarning, match=f"StepGraphs: {why}; such calls run without a CUDA"):
        result = graphed(graphs, batch)
    assert_same(result, eager(model, batch), within=0)
    assert_same(graphed(graphs, batch), eager(model, batch), within=0)
    assert capture.captured == 0
    (entry,) = graphs.report()
    assert (entry["sizes"], entry["how"], entry["calls"]) == ("", "eager", 2)


def test_what_is_not_captured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, table = batch_of(9, 0, 30), only(batch_of(9, 0, 30, missing=False), "omic")
    bags = only(batch, "wsi")
    wide = {"out_features": 3, **SIZES}

    custom = motet.LegoBlock(motet.Tabular(7), nn.Linear(7, 4), **wide).double()
    falls_back(custom, table, "the encoder Linear may not fit into a graph")
    encoded = motet.LegoBlock(motet.Bag(6), motet.ABMIL(6, hidden=8), **wide).double().eval()
    falls_back(encoded, bags, "an encoder takes ragged or missing bags one by one")
    falls_back(
        lego("merge"),
        batch_of(9, 0, 30, coords=False),
        "a LegoMerge has to read which rows miss a modality",
    )

    class Other(motet.HEALNet):
        pass

    other = Other({"wsi": motet.Bag(6)}, out_features=3, **SIZES).double()
    falls_back(other, bags, "the subclass Other may compute something else")
    hooks = "hooks would not be called in a graph"
    for hook in (
        lambda model: model.head.register_forward_hook(lambda *_: None),
        lambda model: model.latents.register_hook(lambda gradient: None),
        lambda model: model.latents.register_post_accumulate_grad_hook(lambda parameter: None),
    ):
        hooked = healnet()
        hook(hooked)
        falls_back(hooked, batch, hooks)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    falls_back(healnet(), batch, hooks)
    handle.remove()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    falls_back(healnet(), batch, "several processes exchange gradients")
    monkeypatch.setenv("MOTET_CHECK", "1")
    falls_back(healnet(), batch, "MOTET_CHECK=1 reads the values of tensors")


def test_without_a_graph_l1_and_the_scale_count_all_the_same() -> None:
    model, batch = healnet(), batch_of(9, 0, 30)
    expected = graphed(motet.StepGraphs(model, loss_of, l1=0.1, capture=FakeCapture()), batch)[1]
    model.head.register_forward_hook(lambda *_: None)
    graphs = motet.StepGraphs(model, loss_of, l1=0.1, capture=FakeCapture())
    with pytest.warns(RuntimeWarning, match="hooks"):
        result = graphed(graphs, batch, scale=torch.tensor(2.0))
    torch.testing.assert_close(result[1], [2 * gradient for gradient in expected])
    graphs(only(batch, "omic"))
    assert all(parameter.grad is not None for parameter in model.parameters())


def single(batch: PatientBatch) -> PatientBatch:
    """Return a batch in float32."""
    (wsi, at) = (
        Ragged(part["wsi"].values.float(), part["wsi"].offsets) for part in (batch.x, batch.coords)
    )
    target = {name: value.float() for name, value in batch.target.items()}
    return PatientBatch(
        {"omic": batch.x["omic"].float(), "wsi": wsi}, {"wsi": at}, batch.present, target
    )


def test_autocast_is_asked_for_or_found() -> None:
    model, batch = healnet().float().train(), batch_of(9, 0, 30)
    batch = single(batch)
    explicit = motet.StepGraphs(model, loss_of, autocast=torch.bfloat16, capture=FakeCapture())
    ambient = motet.StepGraphs(model, loss_of, capture=FakeCapture())
    by_option = [graphed(explicit, batch) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        by_context = [graphed(ambient, batch) for _ in range(2)]
    for one in (*by_option, *by_context):
        assert_same(one, by_option[0], within=0)
    model.head.register_forward_hook(lambda *_: None)
    with pytest.warns(RuntimeWarning, match="hooks"):
        assert_same(graphed(explicit, batch), by_option[0], within=0.05)
        assert graphed(ambient, batch)[0] != by_option[0][0]


# Predictions


@pytest.mark.parametrize("name", MODELS)
def test_predictions_of_ragged_batches_share_one_graph(name: str) -> None:
    make, of = MODELS[name]
    model, capture = make().eval(), FakeCapture()
    graphs = motet.CudaGraphs(model, capture=capture)
    complete = name in ("a table alone", "an encoder")
    results = []
    with torch.no_grad():
        for seed, lengths in enumerate(LENGTHS):
            batch = of(
                batch_of(*lengths, coords="weights" in name, missing=not complete, seed=seed)
            )
            inputs, options = batch.arguments()
            results.append(
                (graphs(rename(model, inputs), **rename(model, options, deep=True)), batch)
            )
        for result, batch in results:  # results stay valid after the next replay
            torch.testing.assert_close(result, logits_of(model, batch), rtol=1e-10, atol=1e-10)
    assert capture.captured == 1


def test_predictions_under_inference_mode_and_without() -> None:
    model, capture = healnet().eval(), FakeCapture()
    graphs = motet.CudaGraphs(model, capture=capture)
    batch = batch_of(9, 0, 30)
    inputs, options = batch.arguments()
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            result = graphs(inputs, **options)
            torch.testing.assert_close(result, model(inputs, **options))
    assert capture.captured == 1
    with pytest.raises(RuntimeError, match="under torch.no_grad.*motet.StepGraphs has"):
        graphs(inputs, **options)
    model.requires_grad_(False)
    graphs(inputs, **options)
    assert graphs.report()[0]["sizes"].endswith("wsi 128 x 6 (evaluation)")


def test_dense_bags_and_a_merge_of_whole_rows() -> None:
    model, capture = lego("merge").eval(), FakeCapture()
    graphs = motet.CudaGraphs(model, capture=capture)
    with torch.no_grad():
        for seed in range(3):
            torch.manual_seed(seed)
            inputs = {"omic": torch.randn(3, 7).double(), "wsi": torch.randn(3, 9, 6).double()}
            torch.testing.assert_close(graphs(inputs), model(inputs), rtol=1e-12, atol=1e-12)
        assert capture.captured == 1
        with pytest.warns(RuntimeWarning, match="CudaGraphs: a LegoMerge has to read"):
            torch.testing.assert_close(
                graphs({"omic": inputs["omic"]}), model({"omic": inputs["omic"]})
            )


def test_grids_and_tables_of_tokens() -> None:
    """Tokens that share positions stay dense while no row is missing."""
    shapes = {"mri": motet.Grid(2, axes=2), "labs": motet.Tabular(5, tokens="features")}
    model, capture = motet.HEALNet(shapes, out_features=3, **SIZES).double().eval(), FakeCapture()
    graphs = motet.CudaGraphs(model, capture=capture)
    inputs = {"mri": torch.randn(3, 4, 5, 2).double(), "labs": torch.randn(3, 5).double()}
    for present in (
        None,
        None,
        torch.tensor([True, False, True]),
        torch.tensor([True, True, False]),
    ):
        options = {"present": {} if present is None else {"mri": present}}
        with torch.no_grad():
            torch.testing.assert_close(graphs(inputs, **options), model(inputs, **options))
    assert capture.captured == 2


def test_predictions_of_a_block_without_a_graph() -> None:
    block = motet.LegoBlock(motet.Bag(6), motet.ABMIL(6, hidden=8), out_features=3, **SIZES).eval()
    graphs = motet.CudaGraphs(block, capture=FakeCapture())
    x, mask = torch.randn(2, 9, 6), torch.arange(9) < torch.tensor([[4], [9]])
    with torch.no_grad():
        with pytest.warns(RuntimeWarning, match="an encoder takes ragged"):
            torch.testing.assert_close(graphs([x], masks=[mask]), block(x, mask=mask))
        torch.testing.assert_close(graphs({"x": x}, masks={"x": mask}), block(x, mask=mask))


def test_refusals() -> None:
    for kind, arguments in ((motet.CudaGraphs, ()), (motet.StepGraphs, (loss_of,))):
        with pytest.raises(TypeError, match="model: expected a HEALNet, LegoBlock, LegoMerge or"):
            kind(nn.Linear(1, 1), *arguments)
        with pytest.raises(ValueError, match="model: expected it on a CUDA device, got cpu"):
            kind(healnet(), *arguments)
        with pytest.raises(ValueError, match="max_graphs: expected a positive integer, got 0"):
            kind(healnet(), *arguments, max_graphs=0, capture=FakeCapture())
    graphs = motet.StepGraphs(healnet(), loss_of, capture=FakeCapture())
    good = batch_of(9, 0, 30)
    for message, change in {
        r"inputs\['wsi'\]: expected \(39, 6\), got \(39, 7\)": {
            "x": {"wsi": Ragged(torch.randn(39, 7).double(), good.x["wsi"].offsets)}
        },
        r"inputs\['wsi'\]: expected torch.float64 as the model": {
            "x": {"wsi": Ragged(torch.randn(39, 6), good.x["wsi"].offsets)}
        },
        r"coords\['wsi'\]: expected \(39, 2\), got \(39, 0\)": {"coords": {}},
        r"inputs\['omic'\]: expected a tensor for Tabular": {
            "x": {"omic": good.x["wsi"]}, "present": {},
        },
        r"inputs\['other'\]: expected a tensor for None": {"x": {"other": good.x["wsi"]}},
        r"inputs: expected one batch size, got {'omic': 2, 'wsi': 3}": {
            "x": {**good.x, "omic": torch.randn(2, 7).double()}, "present": {},
        },
        r"inputs: expected one batch size, got {}": {"x": {}},
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            graphs(replace(good, **change))
    with pytest.raises(ValueError, match="model: expected at least one trainable parameter"):
        motet.StepGraphs(healnet().requires_grad_(False), loss_of, capture=FakeCapture())(good)
    with pytest.raises(ValueError, match=r"inputs\['omic'\]: expected \[B, 7\], got \(3, 8\)"):
        graphs(PatientBatch({"omic": torch.randn(3, 8).double()}, {}, {}, {}))
