"""Parity with the authors' published code: outputs, latents, attention, gradients, tensors."""

import copy

import motet
import pytest
import torch
from torch import Tensor, nn

from .upstream_helpers import HEALNETS, TOLERANCE, load

BLOCKS = [
    "legoblock_default",
    "legoblock_no_encoder",
    "legoblock_no_imaginary",
    "legoblock_spatial_domain",
    "legoblock_unnormalised_tab",
]
JOINED = [
    "lego_fuse_stack_slerp",
    "lego_fuse_weave_no_encoder",
    "lego_fuse_weave_slerp",
    "lego_merge_harmonic_slerp",
    "lego_merge_sum_linear",
]


def real_name(name: str) -> str:
    for golden, real in (("blocks.", "layers."), ("model.L", "L"), ("merged_head.", "to_logits.")):
        if name.startswith(golden):
            return real + name.removeprefix(golden)
    return name


def close(got: Tensor, expected: Tensor) -> bool:
    return got.shape == expected.shape and bool((got - expected).abs().max() <= TOLERANCE)


@pytest.mark.parametrize("name", HEALNETS + BLOCKS + JOINED)
def test_outputs_and_latents(name: str) -> None:
    golden = load(name)
    out = golden.run(golden.model())
    latents = torch.view_as_real(out.latents) if out.latents.is_complex() else out.latents
    assert close(out.logits, golden.tensors["logits"])
    assert close(latents, golden.tensors.get("latents_complex", golden.tensors["latents"]))


@pytest.mark.parametrize("name", HEALNETS + BLOCKS)
def test_every_gradient(name: str) -> None:
    golden = load(name)
    model = golden.model()
    (golden.run(model).logits * golden.tensors["r"]).sum().backward()
    holder = copy.deepcopy(model)
    for held, parameter in zip(holder.parameters(), model.parameters(), strict=True):
        held.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradients = motet.to_upstream(holder)
    expected = {k[5:]: v for k, v in golden.tensors.items() if k.startswith("grad.")}
    assert len(expected) >= 33
    for key, value in expected.items():
        assert close(gradients[key], value), key


@pytest.mark.parametrize("name", [n for n in HEALNETS if n != "healnet_missing_second"])
def test_attention(name: str) -> None:
    golden = load(name)
    masks = [golden.tensors["mask"]] if "mask" in golden.tensors else None
    out = golden.model()(golden.inputs, masks=masks, return_attention=True)
    depth, tied = golden.config["depth"], golden.config["weight_tie_layers"]
    compared = 0
    for i, (modality, layers) in enumerate(out.attention.items()):
        assert modality == str(i)
        assert len(layers) == depth
        # The vectors hold only the last call of a module that several layers share.
        for index in {0, depth - 1} if tied else range(depth):
            name = "1" if tied and index else str(index)
            expected = golden.tensors[f"attn.layers.{name}.{2 * i}.fn"]
            assert close(layers[index].flatten(0, 1), expected)
            compared += 1
    assert compared >= 2


@pytest.mark.parametrize("name", HEALNETS + BLOCKS + JOINED)
def test_tensors_survive_the_round_trip(name: str) -> None:
    golden = load(name)
    before = {key: value.clone() for key, value in golden.state.items()}
    inputs = [None if x is None else x.clone() for x in golden.inputs]
    model = golden.model()
    golden.run(model)
    state = motet.to_upstream(model)
    joined = golden.config["model"] in ("LegoMerge", "LegoFuse")
    for key, value in golden.state.items():
        assert torch.equal(state[real_name(key) if joined else key], value), key
        assert torch.equal(value, before[key]), key
    for x, old in zip(golden.inputs, inputs, strict=True):
        assert x is None or torch.equal(x, old)
    again = motet.from_upstream(golden.config, state, golden.encoders())
    assert torch.equal(golden.run(again).logits, golden.run(model).logits)


@pytest.mark.parametrize("name", JOINED)
def test_merged_heads(name: str) -> None:
    golden = load(name)
    state = motet.to_upstream(golden.model())
    heads = {k: v for k, v in golden.tensors.items() if k.startswith("merged_head.")}
    assert heads
    for key, value in heads.items():
        assert close(state[real_name(key)], value)
    # A checkpoint's merged head is used unchanged.
    given = {**golden.state, **{k: torch.full_like(v, 0.5) for k, v in heads.items()}}
    model = motet.from_upstream(golden.config, given, golden.encoders())
    assert torch.equal(model.head.linear.weight, torch.full_like(model.head.linear.weight, 0.5))


def test_saved_models_give_the_same(tmp_path) -> None:
    for name in ["healnet_tied_self_attention", "lego_merge_harmonic_slerp"]:
        golden = load(name)
        model = golden.model()
        motet.save(model, tmp_path / name)
        encoders = {str(i): encoder for i, encoder in enumerate(golden.encoders())} or None
        loaded = motet.load(tmp_path / name, encoders=encoders)
        assert torch.equal(golden.run(loaded).logits, golden.run(model).logits)
        before, after = motet.to_upstream(model), motet.to_upstream(loaded)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_refusals() -> None:
    golden = load("legoblock_default")
    healnet = load("healnet_tab_bag")
    fuse = load("lego_fuse_stack_slerp")
    with pytest.raises(ValueError, match="config\\['model'\\]: expected HealNet"):
        motet.from_upstream({"model": "Perceiver"}, {})
    with pytest.raises(ValueError, match="encoders: expected the block's encoder"):
        motet.from_upstream(golden.config, golden.state)
    with pytest.raises(ValueError, match="expected 'in_shape'"):
        motet.from_upstream({"model": "LegoBlock"}, golden.state)
    with pytest.raises(ValueError, match="expected layers.1.0.norm.weight .* got none"):
        state = {k: v for k, v in healnet.state.items() if k != "layers.1.0.norm.weight"}
        motet.from_upstream(healnet.config, state)
    with pytest.raises(ValueError, match="the model has no extra"):
        motet.from_upstream(healnet.config, {**healnet.state, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="expected \\(5, 12\\), got \\(6, 12\\)"):
        motet.from_upstream(healnet.config, {**healnet.state, "latents": torch.zeros(6, 12)})
    with pytest.raises(ValueError, match="went through the authors' LegoFuse"):
        latent = golden.state["latent"].expand(3, -1, -1)
        motet.from_upstream(golden.config, {**golden.state, "latent": latent}, golden.encoders())
    with pytest.raises(ValueError, match="expected the values of .* its alias"):
        name = "blocks.0.layers.0.0.1.weight"
        changed = {**fuse.state, name: fuse.state[name] + 1}
        motet.from_upstream(fuse.config, changed, fuse.encoders())
    with pytest.raises(ValueError, match="0 or 1"):
        healnet.model(self_per_cross_attn=2)
    with pytest.warns(UserWarning, match="ignored surprise"):
        healnet.model(surprise=1)
    with pytest.raises(ValueError, match="encoders: expected none for HealNet"):
        motet.from_upstream(healnet.config, healnet.state, [nn.Identity()])
    with pytest.raises(TypeError, match="encoders: expected a sequence of modules"):
        motet.from_upstream(golden.config, golden.state, golden.encoders()[0])
    with pytest.raises(ValueError, match="expected layers.0.latent, got none"):
        state = {k: v for k, v in fuse.state.items() if k != "blocks.0.latent"}
        motet.from_upstream(fuse.config, state, fuse.encoders())
    with pytest.raises(ValueError, match="gives NaN for norm.bias"):
        name = "blocks.0.to_logits.1.bias"
        state = {**fuse.state, name: torch.zeros_like(fuse.state[name])}
        motet.from_upstream(fuse.config, state, fuse.encoders())
    with pytest.raises(ValueError, match="gives NaN for norm.bias"):
        same = fuse.state["blocks.1.to_logits.1.bias"]
        motet.from_upstream(fuse.config, {**fuse.state, name: same}, fuse.encoders())
    # A checkpoint with merged heads does not need the heads of the blocks.
    merged = {k: v for k, v in fuse.tensors.items() if k.startswith("merged_head.")}
    loaded = motet.from_upstream(fuse.config, {**state, **merged}, fuse.encoders())
    assert close(fuse.run(loaded).logits, fuse.tensors["logits"])


def test_only_what_the_authors_code_computes_is_exported() -> None:
    grids = {"a": motet.Grid(3, axes=1)}
    exported = {"temperature": 0.5, "share_weights": False}
    block = {"temperature": 0.5, "context": "spectrum", "fft": "latents"}
    blocks = {name: load("legoblock_default").model() for name in "ab"}
    cases = [
        ("temperature 0.5", motet.HEALNet(grids, out_features=2, share_weights=False)),
        ("share_weights False", motet.HEALNet(grids, out_features=2, temperature=0.5)),
        (
            "self_attention 0 or 1",
            motet.HEALNet(grids, out_features=2, self_attention=2, **exported),
        ),
        ("a Grid", motet.HEALNet({"a": motet.Tabular(3)}, out_features=2, **exported)),
        ("fft", motet.LegoBlock(motet.Bag(4), out_features=2, **{**block, "fft": "2d"})),
        ("keep_scale=False, got Bag", motet.LegoBlock(motet.Bag(4), out_features=2, **block)),
        (
            "always have an encoder",
            motet.LegoBlock(motet.Bag(4, keep_scale=False), out_features=2, **block),
        ),
        ("method", motet.LegoMerge(blocks)),
        ("equal weights", motet.LegoMerge(blocks, method="mean", weights=[1, 2])),
        ("mode", motet.LegoFuse(blocks, mode="weave")),
        ("exactly 2 blocks", motet.LegoFuse({**blocks, "c": blocks["a"]})),
    ]
    for message, model in cases:
        with pytest.raises(ValueError, match=message):
            motet.to_upstream(model)
    assert motet.to_upstream(motet.LegoFuse(blocks))
    with pytest.raises(TypeError, match="model: expected HEALNet"):
        motet.to_upstream(nn.Linear(1, 1))
