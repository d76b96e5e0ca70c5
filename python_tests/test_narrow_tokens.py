"""Tokens of few features keep their values: the two constants beside them (`keep_scale`)."""

from typing import Any

import motet
import pytest
import torch
from motet.fusion.modalities import NARROW, Positions, modality_from_config, modality_to_config
from torch import Tensor, nn

from .capture_lint import CaptureLint
from .conftest import randomised
from .fake_capture import FakeCapture
from .lego_helpers import block_of

WIDE = {"dtype": torch.float64}
STRATEGIES = ("reference", "cached", "absorbed")
TABLES = [motet.Tabular(1), motet.Tabular(2), motet.Tabular(1, tokens="features")]
BAGS = [motet.Bag(1), motet.Bag(2), motet.Bag(1, coords=2, extent=10.0)]


def healnet(modality: Any, **options: Any) -> motet.HEALNet:
    torch.manual_seed(0)
    options = {"num_latents": 4, "latent_dim": 8, "heads": 2, "head_dim": 4, **options}
    return randomised(motet.HEALNet({"x": modality}, out_features=2, **options).double())


def values(modality: Any) -> Tensor:
    """Return inputs [7, ...] which differ only in their scale: 0.5, 1, ... 3.5 in each feature."""
    sizes = torch.arange(1, 8, **WIDE)[:, None] / 2
    x = sizes * torch.linspace(1, 1.3, modality.features, **WIDE)
    return x if isinstance(modality, motet.Tabular) else x[:, None].repeat(1, 3, 1)


def logits_of(model: nn.Module, modality: Any, x: Any, **options: Any) -> Tensor:
    if getattr(modality, "coords", 0):
        places = torch.arange(3 * modality.coords, **WIDE).view(3, -1).repeat(7, 1, 1)
        places = nested(places) if x.is_nested else places
        options["coords"] = places if isinstance(model, motet.LegoBlock) else {"x": places}
    return model(x if isinstance(model, motet.LegoBlock) else {"x": x}, **options)


def nested(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(x), layout=torch.jagged)


def least_difference(logits: Tensor) -> float:
    """Return the smallest distance between the logits of two patients."""
    return torch.pdist(logits).min().item()


@pytest.mark.parametrize("modality", [*TABLES, *BAGS], ids=str)
@pytest.mark.parametrize("kind", ["healnet", "block"])
def test_every_value_has_logits_that_differ(modality: Any, kind: str) -> None:
    make = healnet if kind == "healnet" else block_of
    model, x = make(modality), values(modality)
    logits = logits_of(model, modality, x)
    assert least_difference(logits) > 1e-4
    if isinstance(modality, motet.Bag):
        ragged = logits_of(model, modality, nested(x))
        torch.testing.assert_close(ragged, logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("modality", [motet.Tabular(1, keep_scale=False),
                                      motet.Bag(2, keep_scale=False)], ids=str)  # fmt: skip
def test_the_authors_form_erases_the_scale(modality: Any) -> None:
    """The reason for the constants; the small rest is the epsilon of the LayerNorm."""
    logits = logits_of(healnet(modality), modality, 1000 * values(modality))
    assert (logits - logits[0]).abs().max() < 1e-6


@pytest.mark.parametrize("modality", [motet.Tabular(1), motet.Tabular(2), *BAGS], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_strategies_agree(modality: Any, strategy: str) -> None:
    x = values(modality).requires_grad_()
    for make in (healnet, block_of):
        model = make(modality)
        out, reference = (
            logits_of(model, modality, x, strategy=name) for name in (strategy, "reference")
        )
        torch.testing.assert_close(out, reference, rtol=0, atol=1e-9)
        gradients = [torch.autograd.grad(part.square().sum(), x)[0] for part in (out, reference)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
        assert gradients[0].abs().min() > 0


@pytest.mark.parametrize("modality", [motet.Tabular(2), *BAGS], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES[1:])
@pytest.mark.parametrize("backend", ["eager", pytest.param("compile", marks=pytest.mark.slow)])
def test_backends_agree(modality: Any, strategy: str, backend: Any) -> None:
    model, x = healnet(modality).eval(), values(modality)
    with torch.no_grad():
        expected = logits_of(model, modality, x, strategy="reference")
        out = logits_of(model, modality, x, strategy=strategy, backend=backend)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)


def test_the_default_depends_on_the_width() -> None:
    positions = Positions(2, 10.0, True)
    for kind in (motet.Tabular, motet.Bag):
        for features in (1, 2, NARROW - 1):
            assert kind(features).keep_scale is True
            assert kind(features).token_dim(positions) == features + 2
            assert kind(features, keep_scale=False).token_dim(positions) == features
        for features in (NARROW, 2000):
            assert kind(features).keep_scale is False
            assert kind(features).token_dim(positions) == features
            assert kind(features, keep_scale=True).token_dim(positions) == features + 2
        with pytest.raises(ValueError, match="keep_scale: expected None, True or False, got 'no'"):
            kind(4, keep_scale="no")
    assert motet.Tabular(4, tokens="features").keep_scale is False


def test_the_constants_have_the_size_of_the_features() -> None:
    x = torch.randn(3, 6, **WIDE)
    tokens, constants = motet.Tabular(6).tokenise(x, Positions(2, 10.0, True), None)
    assert torch.equal(tokens, x[:, None])
    assert constants.dtype == x.dtype
    assert constants.flatten().tolist() == [3**0.5, -(3**0.5)]  # squares sum to 6, the mean is 0


@pytest.mark.parametrize("modality", [motet.Tabular(3), motet.Bag(3, coords=1)], ids=str)
def test_older_files_have_no_constants(modality: Any) -> None:
    config = modality_to_config(modality)
    assert modality_from_config(config) == modality
    del config["keep_scale"]
    older = modality_from_config(config)
    assert older.keep_scale is False
    assert modality_from_config(modality_to_config(motet.Grid(1, axes=2))) == motet.Grid(1, axes=2)


class Widen(nn.Module):
    def __init__(self, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize("modality", [motet.Tabular(4), motet.Bag(4)], ids=str)
def test_encoders_get_what_the_caller_passes(modality: Any) -> None:
    """Their input has no constants, and an output of one or two features would be erased."""
    for width in (1, 2):
        with pytest.raises(ValueError, match=f"at least 3 features, got {width}: .* Linear layer"):
            motet.LegoBlock(modality, Widen(width), out_features=2)
    block = motet.LegoBlock(modality, Widen(3), out_features=2)
    assert block.modality.keep_scale is False
    assert block.config["modality"]["keep_scale"] is False


def test_blocks_with_constants_are_not_exported() -> None:
    block = motet.LegoBlock(motet.Bag(4), out_features=2, temperature=0.5, context="spectrum",
                            fft="latents")  # fmt: skip
    with pytest.raises(ValueError, match=r"keep_scale=False, got Bag\(features=4"):
        motet.to_upstream(block)


@pytest.mark.parametrize(
    "modality",
    [
        motet.Bag(1, coords=2),
        pytest.param(motet.Tabular(1), marks=pytest.mark.slow),
        pytest.param(motet.Bag(2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_compiles_and_can_be_captured(modality: Any) -> None:
    model, x = healnet(modality).eval(), values(modality)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = logits_of(model, modality, x)
        torch.testing.assert_close(logits_of(compiled, modality, x), expected, rtol=0, atol=1e-10)
        with CaptureLint():
            modality.tokenise(x, Positions(2, 10.0, True), None)
        graphs = motet.CudaGraphs(model, capture=FakeCapture())
        for _ in range(2):
            torch.testing.assert_close(logits_of(graphs, modality, x), expected, rtol=0, atol=1e-10)
