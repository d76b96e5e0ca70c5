"""LegoBlock, LegoMerge, LegoFuse: the paper's equations, merging properties, missing modalities."""

import copy
from typing import Any

import motet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from motet.fusion.attention_forms import prepare
from torch import Tensor, nn

from .conftest import randomised
from .lego_helpers import Convolution, block_of, blocks_of, inputs_of

WIDE = {"dtype": torch.float64}
TRANSFORMS = ["2d", "latents", "width", None]


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-10)


class TokenMixer(nn.Module):
    """An encoder that adds the mean of its bag to every token, so that padding would change it."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + x.mean(dim=1, keepdim=True))


class Narrow(nn.Module):
    """An encoder whose output has another dtype than its block."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


class Fickle(nn.Module):
    """An encoder whose output has another width for bags of 3 tokens or more."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : 7 - x.shape[1]] if x.shape[1] < 3 else x[..., :2]


class FourTokens(nn.Module):
    """An encoder that takes a mask and pools every bag to four tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = self.queries @ x.transpose(1, 2)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        return scores.softmax(-1) @ x


def literal(block: motet.LegoBlock, tokens: Tensor) -> Tensor:
    """The paper's loop on one row, as written."""
    axes = {"2d": (0, 1), "latents": (0,), "width": (1,)}[block.fft]
    latents, imaginary = block.latents, None
    for index in range(len(block.order)):
        spectrum = torch.fft.fftn(latents, dim=axes)
        real, imaginary = spectrum.real, spectrum.imag
        layer = block.layers[block.order[index]]
        context = motet.fusion.context.Context(tokens[None])
        (keys,) = prepare(context, [layer.attention], latents=len(real), strategy="reference")
        real = real + layer.attention(real[None], keys)[0]
        real = real + layer.feed_forward(real)
        latents = torch.fft.ifftn(torch.complex(real, imaginary), dim=axes)
    return torch.complex(real, imaginary)


@pytest.mark.parametrize("fft", ["2d", "latents", "width"])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_equals_the_papers_loop(fft: str, depth: int) -> None:
    block = block_of(motet.Bag(4, keep_scale=False), fft=fft, depth=depth)
    bag = torch.randn(2, 5, 4, **WIDE)
    out = block(bag, return_latents=True)
    for row in range(2):
        assert close(out.latents[row], literal(block, bag[row]))
    assert close(out.logits, block.head(out.latents.real))
    assert torch.equal(block(bag), out.logits)


@pytest.mark.parametrize("fft", TRANSFORMS)
@pytest.mark.parametrize("context", ["features", "spectrum"])
@pytest.mark.parametrize("normalise", [False, True])
def test_every_row_is_predicted_alone(fft, context: str, normalise: bool) -> None:
    options = {"fft": fft, "context": context, "normalise": normalise}
    bag = torch.randn(4, 9, 6, **WIDE)
    mask = torch.zeros(4, 9, dtype=torch.bool)
    for row, size in enumerate((9, 1, 4, 7)):
        mask[row, 9 - size :] = True
    poisoned = bag.masked_fill(~mask[..., None], float("nan"))
    present = torch.tensor([True, True, False, True])
    ragged = torch.nested.nested_tensor(
        [x[keep] for x, keep in zip(bag, mask, strict=True)], layout=torch.jagged
    )
    encoders = [
        None,
        motet.ABMIL(6, hidden=8, attention=5),
        TokenMixer(6, 3),
        nn.Linear(6, 4),
        FourTokens(),
    ]
    for encoder in encoders:
        block = block_of(motet.Bag(6), encoder, **options)
        out = block(poisoned, mask=mask, present=present, return_latents=True)
        for row in range(4):
            alone = block(bag[row : row + 1, mask[row]], return_latents=True)
            if present[row]:
                assert close(out.latents[row], alone.latents[0])
            else:
                real, imaginary = block.untouched(1)
                expected = real if imaginary is None else torch.complex(real, imaginary)
                assert close(out.latents[row], expected[0])
        assert close(block(ragged, present=present), out.logits)
        order = torch.tensor([2, 0, 3, 1])
        assert close(block(bag[order], mask=mask[order], present=present[order]), out.logits[order])


def test_missing_items_never_reach_the_encoder() -> None:
    seen: list[Tensor] = []

    class Recorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(7, 4)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return self.linear(x)

    block = block_of(motet.Tabular(7), Recorder())
    x = torch.randn(3, 7, **WIDE)
    seen.clear()
    block(x, present=torch.tensor([True, False, True]))
    assert torch.equal(seen.pop(), x[[0, 2]])
    block(x, present=torch.zeros(3, dtype=torch.bool))
    assert not seen


def test_several_items_per_patient() -> None:
    block = block_of(motet.Bag(6), motet.ABMIL(6, hidden=8, attention=5))
    slides = torch.randn(2, 3, 9, 6, **WIDE)
    mask = torch.ones(2, 3, 9, dtype=torch.bool)
    mask[0, 1:] = False
    mask[1, 2, 4:] = False
    out = block(slides, mask=mask)
    assert close(out[:1], block(slides[:1, 0]))
    # Each slide is pooled alone: their order has no effect, and one joint bag gives another result.
    assert close(block(slides[:, [2, 0, 1]], mask=mask[:, [2, 0, 1]]), out)
    assert not close(block(slides.flatten(1, 2), mask=mask.flatten(1, 2)), out)
    visits = block_of(motet.Tabular(7), motet.SNN(7, hidden=(4,)))
    x = torch.randn(2, 3, 7, **WIDE)
    visited = torch.tensor([[False, True, False], [True, True, True]])
    assert close(visits(x, mask=visited)[:1], visits(x[:1, 1]))
    scans = block_of(motet.Grid(3, axes=2), Convolution())
    images = torch.randn(2, 2, 4, 6, 3, **WIDE)
    kept = torch.tensor([[True, False], [True, True]])
    assert close(scans(images, mask=kept)[:1], scans(images[:1, 0]))


def test_encoder_width_is_found_without_touching_the_encoder() -> None:
    encoder = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    encoder[0].eval()
    before = copy.deepcopy(encoder.state_dict())
    block = motet.LegoBlock(motet.Bag(6), encoder, out_features=2)
    assert block.token_dim == 3
    assert [m.training for m in encoder] == [False, True, True]
    assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())
    with pytest.raises(ValueError, match="encoder_dim: the width of the encoder's output"):
        motet.LegoBlock(motet.Bag(6), nn.Linear(5, 3), out_features=2)
    assert motet.LegoBlock(motet.Bag(6), nn.LazyLinear(3), out_features=2, encoder_dim=3)


@pytest.mark.parametrize("fft", TRANSFORMS)
def test_merging_one_block_is_the_identity(fft: str | None) -> None:
    x = inputs_of(3)
    for name, block in blocks_of(4, fft=fft).items():
        for method in ("harmonic", "mean", "sum", "product"):
            merged = motet.LegoMerge({name: block}, method=method)
            out = merged({name: x[name]}, return_latents=True)
            expected = block(x[name], return_latents=True)
            assert torch.equal(out.logits, expected.logits)
            assert torch.equal(out.latents, expected.latents)
        for mode in ("stack", "weave"):
            assert close(motet.LegoFuse({name: block}, mode=mode)({name: x[name]}), block(x[name]))


@pytest.mark.parametrize("fft", TRANSFORMS)
@pytest.mark.parametrize("method", ["harmonic", "mean", "sum", "product"])
@pytest.mark.parametrize("head", ["slerp", "linear"])
def test_merging_does_not_depend_on_block_order(fft, method: str, head: str) -> None:
    blocks, x = blocks_of(4, fft=fft), inputs_of(3)
    merged = motet.LegoMerge(blocks, method=method, head=head)
    backwards = motet.LegoMerge(dict(reversed(blocks.items())), method=method, head=head)
    a, b = merged(x, return_latents=True), backwards(x, return_latents=True)
    assert close(a.logits, b.logits)
    assert torch.allclose(a.latents, b.latents, rtol=1e-10)


def test_merge_equals_equation_4() -> None:
    blocks, x = blocks_of(2), inputs_of(3)
    weights = {"omic": 1.0, "wsi": 3.0}
    merged = motet.LegoMerge(blocks, weights=weights)
    out = merged({n: x[n] for n in blocks}, return_latents=True)
    z = [block(x[name], return_latents=True).latents for name, block in blocks.items()]
    size = 1 / (0.25 / z[0].abs() + 0.75 / z[1].abs())
    angle = 0.25 * z[0].angle() + 0.75 * z[1].angle()
    assert close(out.latents, torch.polar(size, angle))
    heads = [block.head for block in blocks.values()]
    for name, parameter in merged.head.named_parameters():
        pair = [head.get_parameter(name) for head in heads]
        assert close(parameter, motet.kernels.slerp(pair, 0.75))
    assert close(out.logits, merged.head(out.latents.real))


@settings(max_examples=settings().max_examples // 5)  # each is 70 forward passes
@given(st.integers(0, 1000))
def test_rows_merge_the_blocks_they_have(seed: int) -> None:
    blocks = blocks_of(4)
    weights = {"omic": 1.0, "wsi": 2.0, "cells": 3.0, "mri": 4.0}
    x = inputs_of(5, seed)
    generator = torch.Generator().manual_seed(seed)
    present = {name: torch.rand(5, generator=generator) < 0.5 for name in x}
    models = [
        motet.LegoMerge(blocks, weights=weights),
        motet.LegoMerge(blocks, method="mean", head="linear"),
        motet.LegoFuse(blocks, mode="stack"),
        motet.LegoFuse(blocks, mode="weave"),
    ]
    for model in models:
        out = model(x, present=present)
        for row in range(5):
            alone = {n: v[row : row + 1] for n, v in x.items() if present[n][row]}
            if alone:
                assert close(model(alone)[0], out[row])
        everyone = {name: torch.ones(5, dtype=torch.bool) for name in x}
        assert torch.equal(model(x, present=everyone), model(x))
        nobody = {"wsi": torch.zeros(5, dtype=torch.bool)}
        without = {name: v for name, v in x.items() if name != "wsi"}
        assert torch.equal(model(x, present=nobody), model(without))
        assert torch.equal(model({**x, "wsi": None}), model(without))


@pytest.mark.parametrize("head", ["slerp", "linear", "ot"])
def test_a_row_is_predicted_as_by_a_merge_of_the_blocks_it_has(head: str) -> None:
    blocks, x = blocks_of(3), inputs_of(4)
    weights = dict(zip(blocks, (1.0, 2.0, 4.0), strict=True))
    merged = motet.LegoMerge(blocks, head=head, weights=weights)
    names = list(blocks)
    sets = [names, names[:1], names[1:], [names[0], names[2]]]
    present = {n: torch.tensor([n in names_of_row for names_of_row in sets]) for n in names}
    logits = merged({n: x[n] for n in names}, present=present)
    for row, names_of_row in enumerate(sets):
        smaller = motet.LegoMerge(
            {n: blocks[n] for n in names_of_row},
            head=head,
            weights={n: weights[n] for n in names_of_row},
        )
        alone = {n: x[n][row : row + 1] for n in names_of_row}
        assert close(logits[row], smaller(alone)[0])
    first = names[0]
    assert close(logits[1], blocks[first](x[first][1:2])[0])


def test_a_given_head_is_that_of_all_rows() -> None:
    blocks, x = blocks_of(2), inputs_of(3)
    head = motet.Head(blocks["omic"].config["latent_dim"], blocks["omic"].config["out_features"])
    head = head.to(blocks["omic"].latents.dtype)
    merged = motet.LegoMerge(blocks, head=head)
    out = merged({"omic": x["omic"], "wsi": None}, return_latents=True)
    assert close(out.logits, head(out.latents.real.contiguous()))


def test_rows_without_anything_are_predicted_from_the_initial_latents() -> None:
    blocks, x = blocks_of(2), inputs_of(2)
    given_ = {"omic": x["omic"]}
    present = {"omic": torch.tensor([False, True])}
    untouched = {name: torch.complex(*block.untouched(1)) for name, block in blocks.items()}
    merged = motet.LegoMerge(blocks)(given_, present=present, return_latents=True)
    expected = motet.kernels.harmonic_merge(list(untouched.values()))
    assert close(merged.latents[:1], expected)
    for mode in ("stack", "weave"):
        fused = motet.LegoFuse(blocks, mode=mode)
        assert close(
            fused(given_, present=present, return_latents=True).latents[:1],
            untouched["omic"].real,
        )


def test_stack_hands_the_real_part_on() -> None:
    blocks, x = blocks_of(2), inputs_of(3)
    fused = motet.LegoFuse(blocks, mode="stack")
    first = blocks["omic"](x["omic"], return_latents=True).latents.real
    second = blocks["wsi"](x["wsi"], latents=first, return_latents=True).latents.real
    out = fused({"omic": x["omic"], "wsi": x["wsi"]}, return_latents=True)
    assert close(out.latents, second)
    assert close(out.logits, fused.head(second))
    assert list(out.latents.shape) == [3, 6, 5]


def test_weave_alternates_the_layers() -> None:
    blocks, x = blocks_of(2), inputs_of(3)
    fused = motet.LegoFuse(blocks, mode="weave")
    latents = blocks["omic"].latents.expand(3, -1, -1)
    for index in range(2):
        for name, block in blocks.items():
            spectrum = torch.fft.fft2(latents)
            layer = block.layers[index]
            encoded = block.encoder(x[name])[:, None]
            context = motet.fusion.context.Context(encoded)
            (keys,) = prepare(context, [layer.attention], latents=6, strategy="reference")
            real = spectrum.real + layer.attention(spectrum.real, keys)
            real = real + layer.feed_forward(real)
            latents = torch.fft.ifft2(torch.complex(real, spectrum.imag))
    got = fused({"omic": x["omic"], "wsi": x["wsi"]}, return_latents=True).latents
    assert close(got, torch.fft.fft2(latents).real)


def test_latents_are_of_one_kind_whatever_is_missing() -> None:
    blocks, x = blocks_of(2, fft=None), inputs_of(2)
    for method, is_complex in (("harmonic", True), ("mean", False)):
        merged = motet.LegoMerge(blocks, method=method)
        for missing in (None, "wsi"):
            given_ = {name: x[name] for name in blocks if name != missing}
            assert merged(given_, return_latents=True).latents.is_complex() == is_complex


def test_empty_batches() -> None:
    blocks = blocks_of(3)
    nobody = {name: tensor[:0] for name, tensor in inputs_of(1).items() if name in blocks}
    models = [
        motet.LegoMerge(blocks),
        motet.LegoFuse(blocks),
        motet.LegoFuse(blocks, mode="weave"),
    ]
    for model in models:
        assert model(nobody).shape == (0, 3)
        present = {"wsi": torch.ones(0, dtype=torch.bool)}
        assert model(nobody, present=present).shape == (0, 3)
    assert blocks["wsi"](nobody["wsi"]).shape == (0, 3)


def test_joined_models_take_their_blocks_mode() -> None:
    blocks = blocks_of(3)
    assert not motet.LegoMerge(blocks).training
    blocks["wsi"].train()
    merged = motet.LegoMerge(blocks)
    assert merged.training
    bigger = merged.eval().add("more", blocks["wsi"])
    assert not any(module.training for module in bigger.modules())


def test_nothing_changes_the_blocks() -> None:
    blocks, x = blocks_of(3), inputs_of(3)
    before = {name: copy.deepcopy(block.state_dict()) for name, block in blocks.items()}
    inputs = {name: tensor.clone() for name, tensor in x.items()}
    merged, fused = motet.LegoMerge(blocks), motet.LegoFuse(blocks)
    woven = motet.LegoFuse(blocks, mode="weave").add("mri", blocks_of(4)["mri"])
    start = torch.randn(6, 5, **WIDE)
    blocks["omic"](x["omic"], latents=start)
    for model in (merged, fused, woven, merged.add("mri", blocks_of(4)["mri"])):
        model.train()
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        model({name: x[name] for name in model.blocks}).sum().backward()
        optimiser.step()
    for name, block in blocks.items():
        assert all(torch.equal(v, before[name][k]) for k, v in block.state_dict().items())
        assert all(p.grad is None for p in block.parameters())
    assert all(torch.equal(x[name], inputs[name]) for name in x)


def test_add() -> None:
    blocks, x = blocks_of(4), inputs_of(2)
    three = {name: block for name, block in blocks.items() if name != "mri"}
    grown = motet.LegoMerge(three).add("mri", blocks["mri"])
    merged = motet.LegoMerge(blocks)
    assert close(grown(x), merged(x))
    assert grown.config["weights"] == pytest.approx(merged.config["weights"])
    heavier = motet.LegoMerge(three).add("mri", blocks["mri"], weight=0.4)
    assert heavier.weights == pytest.approx({"omic": 0.2, "wsi": 0.2, "cells": 0.2, "mri": 0.4})

    fused = motet.LegoFuse(three, mode="weave")
    tuned = randomised(copy.deepcopy(fused), seed=5)
    bigger = tuned.add("mri", blocks["mri"])
    assert torch.equal(bigger.latents, tuned.latents)
    for name in three:
        for k, v in tuned.blocks[name].state_dict().items():
            assert torch.equal(bigger.blocks[name].state_dict()[k], v)
    pair = [tuned.head.linear.weight, blocks["mri"].head.linear.weight]
    assert close(bigger.head.linear.weight, motet.kernels.slerp(pair, 0.25))
    with pytest.raises(ValueError, match="expected a new modality"):
        fused.add("wsi", blocks["wsi"])
    other = motet.LegoBlock(motet.Bag(4), out_features=9, num_latents=6, latent_dim=5).double()
    for model in (fused, motet.LegoMerge(three)):
        with pytest.raises(ValueError, match="blocks\\['mri'\\]: expected out_features 3"):
            model.add("mri", other)
    with pytest.raises(ValueError, match="weight: expected a share"):
        fused.add("mri", blocks["mri"], weight=1.0)


def test_head_by_optimal_transport() -> None:
    pytest.importorskip("ot", reason="POT is not installed")
    blocks = blocks_of(2)
    merged = motet.LegoMerge(blocks, head="ot")
    a, b = (block.head.linear.weight.detach() for block in blocks.values())
    import itertools

    best = min(
        itertools.permutations(range(3)), key=lambda p: float((a - b[list(p)]).norm(dim=1).sum())
    )
    assert close(merged.head.linear.weight, (a + b[list(best)]) / 2)


def test_fine_tuning_through_a_merge_reaches_everything() -> None:
    blocks, x = blocks_of(2), inputs_of(3)
    for model in (motet.LegoMerge(blocks), motet.LegoFuse(blocks, mode="weave")):
        model.train()
        model({name: x[name] for name in blocks}).square().sum().backward()
        without = [n for n, p in model.named_parameters() if p.grad is None]
        # The network does not use the blocks' heads, nor in a weave the blocks' latents. With a
        # single token the attention weight is always 1, so the queries have no influence.
        query_names = (".attention.to_q.weight", ".attention.norm.weight", ".attention.norm.bias")
        assert all(".head." in n or n.endswith((".latents", *query_names)) for n in without)
        assert any("encoder" in n and p.grad.abs().sum() > 0 for n, p in model.named_parameters()
                   if p.grad is not None)  # fmt: skip


@pytest.mark.parametrize("mode", ["stack", "weave"])
def test_fine_tuning_with_rows_that_miss_any_modality(mode) -> None:
    blocks, x = blocks_of(2), inputs_of(4)
    model = motet.LegoFuse(blocks, mode=mode).train()
    for name in blocks:
        model.zero_grad()
        present = {name: torch.tensor([True, False, True, False])}
        model({n: x[n] for n in blocks}, present=present).square().sum().backward()
        gradient = model.get_parameter(f"blocks.{name}.layers.0.attention.to_kv.weight").grad
        assert gradient is not None
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


def test_gradients() -> None:
    blocks = blocks_of(2)
    merged = motet.LegoMerge({"omic": blocks["omic"], "wsi": blocks["wsi"]})
    omic = torch.randn(2, 7, requires_grad=True, **WIDE)
    bag = torch.randn(2, 3, 6, requires_grad=True, **WIDE)
    assert torch.autograd.gradcheck(lambda *t: merged(list(t)), (omic, bag), atol=1e-4)


def test_untracked_imaginary_part_is_exactly_zero() -> None:
    block = block_of(motet.Bag(4), track_imaginary=False, depth=2, fft="latents")
    out = block(torch.randn(2, 5, 4, **WIDE), return_latents=True)
    assert torch.equal(out.latents.imag, torch.zeros_like(out.latents.imag))


JOINED = {
    "merge": motet.LegoMerge,
    "stack": lambda blocks: motet.LegoFuse(blocks, mode="stack"),
    "weave": lambda blocks: motet.LegoFuse(blocks, mode="weave"),
}


@pytest.mark.parametrize(
    "kind", ["merge", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("stack", "weave"))]
)
def test_compiles_whole(kind: str) -> None:
    blocks, x = blocks_of(2), inputs_of(2)
    pair, model = {name: x[name] for name in blocks}, JOINED[kind](blocks)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert close(compiled(pair), model(pair))


def test_a_block_compiles_whole() -> None:
    block, x = blocks_of(2)["wsi"], inputs_of(2)["wsi"]
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert close(compiled(x), block(x))


def test_refusals() -> None:
    blocks, x = blocks_of(3), inputs_of(2)
    block = blocks["wsi"]
    calls: list[tuple[type[Exception], str, Any]] = [
        (ValueError, "x: expected \\[B, N, 6\\]", lambda: block(x["omic"])),
        (TypeError, "x: expected a tensor", lambda: block([x["wsi"]])),
        (ValueError, "latents: expected", lambda: block(x["wsi"], latents=torch.randn(5, 5))),
        (ValueError, "expected torch.float64", lambda: block(x["wsi"].float())),
        (ValueError, "\\(2, 9\\), got \\(2, 8\\)",
         lambda: block(x["wsi"], mask=torch.ones(2, 8, dtype=torch.bool))),
        (ValueError, "blocks: expected a dict", lambda: motet.LegoMerge({})),
        (ValueError, "blocks: expected a dict", lambda: motet.LegoMerge(block)),
        (TypeError, "blocks\\['a'\\]: expected a LegoBlock",
         lambda: motet.LegoMerge({"a": nn.Linear(1, 1)})),
        (ValueError, "expected num_latents 6 as",
         lambda: motet.LegoMerge({**blocks, "a": block_of(motet.Bag(6), num_latents=7)})),
        (ValueError, "expected fft '2d' as",
         lambda: motet.LegoMerge({**blocks, "a": block_of(motet.Bag(6), fft=None)})),
        (ValueError, "method: expected 'harmonic'", lambda: motet.LegoMerge(blocks, method="max")),
        (ValueError, "method: upstream-harmonic takes 2",
         lambda: motet.LegoMerge(blocks, method="upstream-harmonic")),
        (ValueError, "head: expected", lambda: motet.LegoMerge(blocks, head="nearest")),
        (ValueError, "phase: expected", lambda: motet.LegoMerge(blocks, phase="median")),
        (ValueError, "weights: expected 3 positive",
         lambda: motet.LegoMerge(blocks, weights=[1, 2])),
        (ValueError, "weights: expected 3 positive",
         lambda: motet.LegoMerge(blocks, weights=[1, 2, 0])),
        (ValueError, "weights: expected one for each",
         lambda: motet.LegoMerge(blocks, weights={"omic": 1})),
        (ValueError, "mode: expected", lambda: motet.LegoFuse(blocks, mode="sum")),
        (ValueError, "depth: expected 1 to 2",
         lambda: motet.LegoFuse(blocks, mode="weave", depth=3)),
        (ValueError, "unknown modality", lambda: motet.LegoMerge(blocks)({"ct": x["wsi"]})),
        (ValueError, "at least one of", lambda: motet.LegoFuse(blocks)({})),
        (ValueError, "upstream-weave is for models",
         lambda: motet.LegoFuse(blocks, mode="upstream-weave")(dict(list(x.items())[:3]))),
        (ValueError, "fft: expected", lambda: block_of(motet.Bag(6), fft="1d")),
        (ValueError, "context: expected", lambda: block_of(motet.Bag(6), context="tokens")),
        (ValueError, "encoder: expected None for a Bag with coords",
         lambda: block_of(motet.Bag(6, coords=2), nn.Linear(6, 6))),
        (ValueError, "encoder_dim: expected 4",
         lambda: block_of(motet.Bag(6), nn.Linear(6, 4), encoder_dim=5)),
        (ValueError, "encoder_dim: expected None", lambda: block_of(motet.Bag(6), encoder_dim=5)),
        (TypeError, "encoder: expected a torch.nn.Module", lambda: block_of(motet.Bag(6), len)),
        (TypeError, "modality: expected a Tabular", lambda: block_of(6)),
        (ValueError, "encoder's output: expected torch.float64",
         lambda: block_of(motet.Bag(6), Narrow())(x["wsi"])),
        (ValueError, "encoder: expected it to return",
         lambda: block_of(motet.Bag(6), Fickle())(x["wsi"])),
        (ValueError, "blocks\\['b'\\]: expected torch.float64 on cpu as blocks\\['a'\\]",
         lambda: motet.LegoMerge({"a": block, "b": copy.deepcopy(block).float()})),
        (ValueError, "latents: expected torch.float64",
         lambda: block(x["wsi"], latents=torch.randn(6, 5, dtype=torch.complex128))),
        (ValueError, "dtype: expected float32 or float64",
         lambda: copy.deepcopy(blocks["cells"]).bfloat16()(x["cells"].bfloat16())),
        (ValueError, "head: expected a Head of width 5",
         lambda: motet.LegoMerge(blocks, head=motet.fusion.layers.Head(4, 3).double())),
        (TypeError, "weights: expected one number per block",
         lambda: motet.LegoMerge(blocks, weights=0.5)),
        (ValueError, "mask: expected whole items", lambda: block_of(
            motet.Grid(3, axes=2), Convolution())(
                x_image := torch.randn(1, 4, 6, 3, **WIDE),
                mask=torch.arange(24).reshape(x_image.shape[:3]) > 3)),
    ]  # fmt: skip
    for error, message, call in calls:
        with pytest.raises(error, match=message):
            call()
