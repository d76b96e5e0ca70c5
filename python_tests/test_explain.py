"""Attention by token, rollout, integrated gradients and deletion curves, on planted signals."""

from typing import Any

import motet
import pytest
import torch
from motet.fusion.explain import (
    attention_rollout,
    deletion_curve,
    integrated_gradients,
    token_attention,
)
from scipy.stats import wilcoxon
from torch import Tensor

from .conftest import drawn, randomised
from .lego_helpers import blocks_of, inputs_of

WIDE = {"dtype": torch.float64}
SMALL = {"num_latents": 5, "latent_dim": 6, "depth": 3}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def first(logits: Tensor) -> Tensor:
    return logits[:, 0]


def model_of(self_attention: int = 0) -> motet.HEALNet:
    torch.manual_seed(0)
    kinds = {
        "omic": motet.Tabular(4),
        "wsi": motet.Bag(3, coords=2),
        "mri": motet.Grid(2, axes=2),
    }
    model = motet.HEALNet(
        kinds, out_features=2, heads=2, head_dim=3, self_attention=self_attention, **SMALL
    )
    return randomised(model.double(), 1).eval()


def bags_of(lengths: list[int], width: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    bags = [torch.randn(n, width, generator=generator, **WIDE) for n in lengths]
    return torch.nested.nested_tensor(bags, layout=torch.jagged)


def batch_of(lengths: list[int]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    rows = len(lengths)
    generator = torch.Generator().manual_seed(5)
    inputs = {
        "omic": torch.randn(rows, 4, generator=generator, **WIDE),
        "wsi": bags_of(lengths),
        "mri": torch.randn(rows, 2, 3, 2, generator=generator, **WIDE),
    }
    present = {"mri": torch.tensor([i != 1 for i in range(rows)])}
    return inputs, {"present": present, "coords": {"wsi": bags_of(lengths, 2, seed=1)}}


def test_token_attention_is_the_mean_of_the_weights() -> None:
    model, (inputs, arguments) = model_of(), batch_of([4, 7, 0])
    means = token_attention(model, inputs, **arguments)
    assert list(means) == ["wsi", "mri"]  # the table has a single token
    weights = model(inputs, return_attention=True, **arguments).attention
    close(means["mri"], torch.stack(weights["mri"]).mean(dim=(0, 2, 3)))
    close(means["mri"].sum(1), torch.tensor([1.0, 0.0, 1.0], **WIDE))
    bags = means["wsi"].unbind()
    assert [len(bag) for bag in bags] == [4, 7, 0]
    close(bags[1], torch.stack([w.unbind()[1] for w in weights["wsi"]]).mean(dim=(0, 2, 3)))
    with pytest.raises(ValueError, match="'omic' has one token, and the attention to it is always"):
        token_attention(model, inputs, modalities=["omic"], **arguments)
    with pytest.raises(ValueError, match="no attention to 'ct'; expected one of omic, wsi, mri"):
        token_attention(model, inputs, modalities=["ct"], **arguments)


@pytest.mark.parametrize("self_attention", [0, 1])
def test_rollout_is_the_product_of_the_layers(self_attention: int) -> None:
    """For each row by itself, as products of matrices over all tokens and the initial latents."""
    model, (inputs, arguments) = model_of(self_attention), batch_of([4, 7])
    rollout = attention_rollout(model, inputs, **arguments)
    for row in range(2):
        x = {name: v.unbind()[row][None] for name, v in inputs.items()}
        coords = {"wsi": arguments["coords"]["wsi"].unbind()[row][None]}
        names = [name for name in x if name != "mri" or row == 0]
        counts = {"omic": 1, "wsi": x["wsi"].shape[1], "mri": 6}
        starts, total = {}, 0
        for name in names:
            starts[name], total = total, total + counts[name]
        state = torch.zeros(5, total + 5, **WIDE)  # latents over tokens, then initial latents
        state[:, total:] = torch.eye(5, **WIDE)
        seen: list[tuple[str | None, Tensor]] = []

        def see(layer_pass: Any, queries: Any, seen: Any = seen, counts: Any = counts) -> None:
            weights = layer_pass.keys.weights(layer_pass.attention, queries)
            weights = weights if weights.ndim == 4 else weights.permute(1, 2, 0)[None]
            name = {v: k for k, v in counts.items()}.get(weights.shape[-1])
            seen.append((name, weights.mean(1)[0]))

        from motet.fusion.context import read_all
        from motet.fusion.passes import PassOptions

        alone = {name: x[name] for name in names}
        batches = read_all(
            model.modalities, alone, masks=None, present=None, coords=coords, like=model.latents
        )
        with torch.no_grad():
            model.fuse(1, model.prepare(batches), PassOptions(watch=see))
        for name, weights in seen:
            if name is None:
                state = (state + weights @ state) / 2
            else:
                read = torch.zeros(5, total + 5, **WIDE)
                read[:, starts[name] : starts[name] + counts[name]] = weights
                state = (state + read) / 2
        expected = state.mean(0)
        for name in names:
            part = expected[starts[name] : starts[name] + counts[name]]
            close(rollout.tokens[name].unbind()[row], part)
        close(rollout.initial[row], expected[total:].sum())
    totals = sum(torch.stack([t.sum() for t in v.unbind()]) for v in rollout.tokens.values())
    close(totals + rollout.initial, torch.ones(2, **WIDE))
    with pytest.raises(TypeError, match="model: expected a HEALNet, got LegoMerge"):
        attention_rollout(motet.LegoMerge(blocks_of(1)), {})


def test_integrated_gradients_add_up_to_the_difference() -> None:
    pytest.importorskip("captum")
    model, (inputs, arguments) = model_of(), batch_of([4, 7, 0])
    values = integrated_gradients(model, inputs, first, steps=200, **arguments)
    assert values["omic"].shape == (3, 4)
    assert values["mri"].shape == (3, 2, 3, 2)
    assert torch.equal(values["mri"][1], torch.zeros(2, 3, 2, **WIDE))
    nothing = {
        name: torch.nested.nested_tensor_from_jagged(0 * x.values(), x.offsets())
        if x.is_nested
        else 0 * x
        for name, x in inputs.items()
    }
    with torch.no_grad():
        change = first(model(inputs, **arguments)) - first(model(nothing, **arguments))
    total = torch.stack([
        sum(v.unbind()[row].sum() for v in values.values()) for row in range(3)
    ])  # fmt: skip
    close(total, change, 2e-3)
    # Rows do not depend on each other.
    alone = integrated_gradients(
        model,
        {name: x.unbind()[0][None] for name, x in inputs.items()},
        first,
        coords={"wsi": arguments["coords"]["wsi"].unbind()[0][None]},
        steps=200,
    )
    close(alone["wsi"][0], values["wsi"].unbind()[0])


def test_blocks_with_encoders_have_gradients() -> None:
    pytest.importorskip("captum")
    merged = motet.LegoMerge(blocks_of(2)).eval()
    inputs = {name: inputs_of(2)[name] for name in ("omic", "wsi")}
    present = {"wsi": torch.tensor([True, False])}
    values = integrated_gradients(merged, inputs, first, present=present)
    assert values["omic"].abs().sum() > 0
    assert values["wsi"][0].abs().sum() > 0
    assert torch.equal(values["wsi"][1], torch.zeros(9, 6, **WIDE))
    with pytest.raises(TypeError, match="got LegoBlock; wrap it: LegoMerge"):
        integrated_gradients(blocks_of(1)["omic"], inputs, first)


def test_a_deletion_curve_removes_the_most_important_first() -> None:
    model, (inputs, arguments) = model_of(), batch_of([4, 8])
    importance = bags_of([4, 8], 1)
    importance = torch.nested.nested_tensor_from_jagged(
        importance.values()[:, 0], importance.offsets()
    )
    curve = deletion_curve(model, inputs, "wsi", importance, first, shares=(0, 0.5, 1), **arguments)
    with torch.no_grad():
        close(curve[:, 0], first(model(inputs, **arguments)))
        for row in range(2):
            scores = importance.unbind()[row]
            keep = scores.argsort()[: len(scores) // 2].sort().values
            x = {name: v.unbind()[row][None] for name, v in inputs.items()}
            coords = arguments["coords"]["wsi"].unbind()[row][None]
            here = {"mri": arguments["present"]["mri"][row : row + 1]}
            half = model(
                {**x, "wsi": x["wsi"][:, keep]}, coords={"wsi": coords[:, keep]}, present=here
            )
            close(curve[row, 1], first(half)[0])
            close(curve[row, 2], first(model({**x, "wsi": None}, present=here))[0])
    table = deletion_curve(
        model, inputs, "omic", torch.rand(2, 4, **WIDE), first, shares=(1,), **arguments
    )
    with torch.no_grad():
        mean = {**inputs, "omic": torch.zeros(2, 4, **WIDE)}
        close(table[:, 0], first(model(mean, **arguments)))
    for change, expected in (
        ({"shares": (0, 2)}, "shares: expected numbers from 0 to 1"),
        ({"modality": "ct"}, "modality: expected one of the inputs, got 'ct'"),
        (
            {"importance": torch.rand(2, 3)},
            r"importance: expected .* \[4\] numbers for each patient",
        ),
    ):
        options = {"modality": "wsi", "importance": importance, **change}
        with pytest.raises(ValueError, match=expected):
            deletion_curve(model, inputs, output=first, **options, **arguments)


# Planted signals, in models that were trained on them


def planted_slides(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return slides of 10 x 10 patches, the patches of a 5 x 5 region, and the signal in it.

    Feature 0 marks the region, feature 1 has the signal there; elsewhere both are noise.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 100, 16, generator=generator)
    signal = torch.randn(count, generator=generator)
    rows, columns = torch.arange(100) // 10, torch.arange(100) % 10
    inside = torch.zeros(count, 100, dtype=torch.bool)
    for i, (top, left) in enumerate(torch.randint(0, 6, (count, 2), generator=generator).tolist()):
        high, wide = (rows >= top) & (rows < top + 5), (columns >= left) & (columns < left + 5)
        inside[i] = high & wide
    x[..., 0] += 3 * inside
    x[..., 1] += inside * signal[:, None]
    return x, inside, signal


def learn(model: torch.nn.Module, inputs: Any, target: Tensor, steps: int, rate: float) -> None:
    optimiser = torch.optim.Adam(model.parameters(), rate)
    for _ in range(steps):
        rows = torch.randint(len(target), (32,))
        optimiser.zero_grad()
        loss = (first(model(inputs(rows))) - target[rows]).square().mean()
        loss.backward()
        optimiser.step()


@pytest.mark.slow
@pytest.mark.parametrize("seed", drawn(range(20), 1))
@pytest.mark.parametrize("kind", ["healnet", "merge", "fuse"])
def test_attention_finds_the_region_of_a_slide(kind: str, seed: int) -> None:
    x, _, signal = planted_slides(300, seed)
    new, inside, truth = planted_slides(80, seed + 1000)
    torch.manual_seed(seed)
    sizes = {"num_latents": 8, "latent_dim": 16, "heads": 4, "head_dim": 16, "depth": 2}
    if kind == "healnet":
        model = motet.HEALNet({"wsi": motet.Bag(16)}, out_features=1, **sizes)
        learn(model, lambda rows: {"wsi": x[rows]}, signal, 150, 3e-3)
    else:
        block = motet.LegoBlock(motet.Bag(16), out_features=1, **sizes)
        learn(block, lambda rows: x[rows], signal, 150, 3e-3)
        model = (
            motet.LegoMerge({"wsi": block}) if kind == "merge" else motet.LegoFuse({"wsi": block})
        )
        if kind == "fuse":
            learn(model, lambda rows: {"wsi": x[rows]}, signal, 30, 1e-3)
    model.eval()
    attention = motet.token_attention(model, {"wsi": new})["wsi"]
    top = attention.topk(20).indices
    assert inside.gather(1, top).float().mean() >= 0.8
    if kind == "healnet":
        shares = motet.attention_rollout(model, {"wsi": new}).tokens["wsi"]
        assert inside.gather(1, shares.topk(20).indices).float().mean() >= 0.8
    # The prediction goes towards that of a mean patient sooner than in a random order.
    by_attention, by_chance = (
        motet.deletion_curve(model, {"wsi": new}, "wsi", scores, first).mean(1) * truth.sign()
        for scores in (attention, torch.rand(80, 100))
    )
    assert wilcoxon(by_attention - by_chance, alternative="less").pvalue < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("seed", drawn(range(20), 1))
def test_gradients_find_the_genes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    genes = torch.randn(300, 50, generator=generator)
    planted = torch.randperm(50, generator=generator)[:3]
    signal = genes[:, planted].sum(1) / 3**0.5
    torch.manual_seed(seed)
    model = motet.HEALNet(
        {"genes": motet.Tabular(50)}, out_features=1, num_latents=8, latent_dim=16, depth=2
    )
    learn(model, lambda rows: {"genes": genes[rows]}, signal, 150, 2e-3)
    values = motet.integrated_gradients(model.eval(), {"genes": genes[:40]}, first, steps=16)
    bars = values["genes"].abs().mean(0)
    assert set(bars.topk(3).indices.tolist()) == set(planted.tolist())
