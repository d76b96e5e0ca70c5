"""HEALNet: predictions independent of batch, mask and order; attention, sharing, refusals."""

from typing import Any

import motet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from motet.fusion.attention import Attention
from motet.fusion.attention_forms import prepare
from motet.fusion.context import Context
from torch import Tensor

from .conftest import randomised

WIDE = {"dtype": torch.float64}


def model_of(**options: Any) -> motet.HEALNet:
    modalities = {
        "omic": motet.Tabular(7),
        "genes": motet.Tabular(5, tokens="features"),
        "wsi": motet.Bag(6),
        "cells": motet.Bag(4, coords=2, extent=100.0),
        "mri": motet.Grid(1, axes=3),
    }
    torch.manual_seed(0)
    options = {"num_latents": 5, "latent_dim": 12, "heads": 2, "head_dim": 4, **options}
    model = motet.HEALNet(modalities, out_features=3, **options)
    return randomised(model.double())


def inputs_of(rows: int, tokens: int = 8, seed: int = 1) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator, **WIDE)

    inputs = {
        "omic": draw(7),
        "genes": draw(5),
        "wsi": draw(tokens, 6),
        "cells": draw(3, 4),
        "mri": draw(2, 3, 2, 1),
    }
    return inputs, 100 * draw(3, 2)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("self_attention", [0, 2])
@given(st.integers(0, 1000), st.integers(1, 4))
def test_every_row_is_predicted_alone(self_attention: int, seed: int, rows: int) -> None:
    """Batch size, batch order, padding, ragged layout and masks never change a prediction."""
    model = model_of(self_attention=self_attention)
    inputs, coords = inputs_of(rows, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, 8, generator=generator) < 0.5
    present = {name: torch.rand(rows, generator=generator) < 0.6 for name in inputs}
    out = model(inputs, masks={"wsi": mask}, present=present, coords={"cells": coords})

    order = torch.randperm(rows, generator=generator)
    shuffled = model(
        {name: x[order] for name, x in inputs.items()},
        masks={"wsi": mask[order]},
        present={name: p[order] for name, p in present.items()},
        coords={"cells": coords[order]},
    )
    assert close(shuffled, out[order])

    for row in range(rows):
        alone = {
            name: x[row : row + 1] if present[name][row] else None for name, x in inputs.items()
        }
        if alone["wsi"] is not None:
            bag = alone["wsi"][:, mask[row]]
            alone["wsi"] = bag if bag.shape[1] else None
        if all(x is None for x in alone.values()):
            continue
        where = {"cells": coords[row : row + 1]} if alone["cells"] is not None else None
        assert close(model(alone, coords=where)[0], out[row])

    ragged = torch.nested.nested_tensor(
        [bag[keep] for bag, keep in zip(inputs["wsi"], mask, strict=True)], layout=torch.jagged
    )
    jagged = model({**inputs, "wsi": ragged}, present=present, coords={"cells": coords})
    assert close(jagged, out)


def test_padding_and_nan_stay_where_they_are() -> None:
    model = model_of()
    inputs, coords = inputs_of(3)
    del inputs["cells"]
    expected = model(inputs)
    padded = torch.full((3, 11, 6), float("nan"), **WIDE)
    padded[:, 2:10] = inputs["wsi"]
    mask = torch.zeros(3, 11, dtype=torch.bool)
    mask[:, 2:10] = True
    assert close(model({**inputs, "wsi": padded}, masks={"wsi": mask}), expected)

    inputs["omic"][1] = float("nan")
    out = model(inputs)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]].isnan().any(), torch.tensor(False))
    assert close(out[[0, 2]], expected[[0, 2]])
    # Values of a missing row are not read, neither forward nor backward.
    present = {"omic": torch.tensor([True, False, True])}
    out = model(inputs, present=present)
    assert out.isfinite().all()
    out.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert coords.isfinite().all()


def test_missing_in_every_spelling() -> None:
    model = model_of(self_attention=1)
    inputs, _ = inputs_of(2)
    del inputs["cells"]
    absent = {name: x for name, x in inputs.items() if name != "wsi"}
    nobody = torch.zeros(2, dtype=torch.bool)
    expected = model(absent)
    empty = torch.nested.nested_tensor([torch.zeros(0, 6, **WIDE)] * 2, layout=torch.jagged)
    for inputs_, options in (
        ({**absent, "wsi": None}, {}),
        (inputs, {"present": {"wsi": nobody}}),
        (inputs, {"masks": {"wsi": nobody[:, None].expand(2, 8)}}),
        ({**absent, "wsi": inputs["wsi"][:, :0]}, {}),
        ({**absent, "wsi": empty}, {}),
        ({**absent, "wsi": inputs["wsi"][:, None][:, :0]}, {}),
        ({**absent, "wsi": inputs["wsi"][:, None, :0]}, {}),
        ({**absent, "wsi": None}, {"present": {"wsi": nobody}}),
        ([inputs[n] if n != "wsi" and n in inputs else None for n in model.modalities], {}),
    ):
        assert torch.equal(model(inputs_, **options), expected)
    assert not torch.equal(model(inputs), expected)


def test_a_row_without_anything_is_predicted_from_the_initial_latents() -> None:
    model = model_of()
    omic = torch.randn(2, 7, **WIDE)
    out = model({"omic": omic}, present={"omic": torch.tensor([False, True])}, return_latents=True)
    assert torch.equal(out.latents[0], model.latents)
    assert close(out.logits[0], model.head(model.latents[None])[0])


def test_attention() -> None:
    model = model_of(depth=3)
    inputs, coords = inputs_of(2)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, 3:] = False
    arguments = {"masks": {"wsi": mask}, "coords": {"cells": coords}}
    out = model(inputs, return_attention=True, **arguments)
    assert out.latents is None
    assert torch.equal(
        out.logits, model(inputs, **arguments)
    )  # return_attention changes no prediction
    assert {name: len(layers) for name, layers in out.attention.items()} == dict.fromkeys(inputs, 3)
    tokens = {"omic": 1, "genes": 5, "wsi": 8, "cells": 3, "mri": 12}
    for name, layers in out.attention.items():
        for weights in layers:
            assert weights.shape == (2, 2, 5, tokens[name])
            assert close(weights.sum(-1), torch.ones(2, 2, 5, **WIDE))
    assert torch.equal(out.attention["wsi"][0][0, ..., 3:], torch.zeros(2, 5, 5, **WIDE))

    bags = torch.nested.nested_tensor([inputs["wsi"][0, :3], inputs["wsi"][1]], layout=torch.jagged)
    ragged = model(
        {**inputs, "wsi": bags},
        present={"wsi": torch.tensor([True, False]), "omic": torch.tensor([True, False])},
        coords=arguments["coords"],
        return_attention=True,
    )
    first, second = ragged.attention["wsi"][0].unbind()
    assert close(first.permute(1, 2, 0), out.attention["wsi"][0][0, ..., :3])
    assert second.shape == (8, 2, 5)
    assert torch.equal(second, torch.zeros_like(second))
    assert torch.equal(ragged.attention["omic"][0][1], torch.zeros(2, 5, 1, **WIDE))
    only = model({"omic": inputs["omic"]}, return_attention=True)
    assert list(only.attention) == ["omic"]


def test_several_items_per_patient_are_one_bag() -> None:
    model = model_of()
    inputs, _ = inputs_of(2)
    slides = inputs["wsi"].reshape(2, 2, 4, 6)
    assert close(model({"wsi": slides}), model({"wsi": inputs["wsi"]}))
    mask = torch.tensor([[True, False], [True, True]])
    out = model({"wsi": slides}, masks={"wsi": mask})
    assert close(out[:1], model({"wsi": slides[:1, 0]}))
    visits = torch.randn(2, 3, 7, **WIDE)
    seen = torch.tensor([[True, False, False], [True, True, True]])
    out = model({"omic": visits}, masks={"omic": seen})
    assert close(out[:1], model({"omic": visits[:1, 0]}))
    scans = torch.randn(2, 2, 2, 3, 2, 1, **WIDE)
    weights = model({"mri": scans}, return_attention=True).attention["mri"][0]
    assert weights.shape == (2, 2, 5, 24)


def test_jagged_layouts() -> None:
    model = model_of()
    padded = torch.randn(2, 9, 6, **WIDE, requires_grad=True)
    start, size = torch.tensor([0, 2]), torch.tensor([3, 4])
    holes = torch.nested.narrow(padded, 1, start, size, layout=torch.jagged)
    out = model({"wsi": holes})
    assert close(out[1:], model({"wsi": padded[1:, 2:6]}))
    out.sum().backward()
    used = padded.grad.abs().sum(-1) > 0
    assert used.sum(1).tolist() == [3, 4]
    values = torch.randn(6, 6, **WIDE)
    narrow = torch.tensor([0, 2, 6], dtype=torch.int32)
    bags = torch.nested.nested_tensor_from_jagged(values, narrow)
    assert close(model({"wsi": bags})[:1], model({"wsi": values[None, :2]}))
    with pytest.raises(ValueError, match="ragged in its second axis"):
        model({"wsi": bags.transpose(1, 2)})
    with pytest.raises(ValueError, match="expected offsets from 0 to 6"):
        model({"wsi": torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 2, 4]))})


def test_empty_batch() -> None:
    model = model_of(self_attention=1)
    inputs, coords = inputs_of(1)
    nobody = {name: x[:0] for name, x in inputs.items()}
    out = model(nobody, coords={"cells": coords[:0]}, return_attention=True)
    assert out.logits.shape == (0, 3)
    assert model({"omic": nobody["omic"]}, present={"omic": torch.ones(0).bool()}).shape == (0, 3)


def test_half_precision_models_take_pixels_in_float32() -> None:
    model = motet.HEALNet({"cells": motet.Bag(4, coords=2, extent=1e5)}, out_features=2).eval()
    cells, pixels = torch.randn(1, 5, 4), 1e5 * torch.rand(1, 5, 2)
    expected = model({"cells": cells}, coords={"cells": pixels})
    out = model.bfloat16()({"cells": cells.bfloat16()}, coords={"cells": pixels})
    assert torch.allclose(out.float(), expected, atol=0.1)


def test_weight_sharing() -> None:
    def count(**options: Any) -> int:
        return sum(p.numel() for p in model_of(depth=3, **options).parameters())

    shared, first, unshared = (count(share_weights=s) for s in (True, "all-but-first", False))
    assert shared < first < unshared
    one = count(share_weights=True) - 5 * 12 - (12 * 2 + 12 * 3 + 3)
    assert unshared - shared == 2 * one
    feed_forward = 12 * 2 + 12 * 96 + 96 + 48 * 12 + 12
    # The second weight set has one feed-forward block for all modalities.
    assert first - shared == one - 4 * feed_forward
    inputs, coords = inputs_of(2)
    for share in (True, "all-but-first", False):
        model = model_of(depth=3, share_weights=share)
        out = model(inputs, coords={"cells": coords})
        model.layers[-1].attention["wsi"].to_q.weight.data.zero_()
        assert not torch.equal(model(inputs, coords={"cells": coords}), out)


def test_defaults_are_the_papers() -> None:
    model = motet.HEALNet({"omic": motet.Tabular(9)}, out_features=4)
    assert 0 <= model.latents.min() < model.latents.max() <= 1  # S_0 ~ U(0, 1)
    assert len(model.layers) == 1  # shared between layers
    assert len(model.order) == 2
    attention = model.layers[0].attention["omic"]
    assert attention.scale == pytest.approx(16**-0.5)  # temperature 1
    headless = motet.HEALNet({"omic": motet.Tabular(9)}, out_features=None)
    assert headless(torch.randn(3, 1, 9).unbind(1)).shape == (3, 25, 119)


def test_dropout_acts_in_training_only() -> None:
    model = model_of(attn_dropout=0.5, ff_dropout=0.5)
    inputs, _ = inputs_of(2)
    wsi = {"wsi": inputs["wsi"]}
    assert torch.equal(model(wsi), model(wsi))
    model.train()
    assert not torch.equal(model(wsi), model(wsi))


def test_gradients() -> None:
    model = model_of(self_attention=1)
    inputs, _ = inputs_of(2, tokens=3)
    bag = inputs["wsi"].requires_grad_()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert torch.autograd.gradcheck(lambda x: model({"wsi": x}, masks={"wsi": mask}), bag)


@pytest.mark.slow
def test_compiles_whole() -> None:
    model = model_of(self_attention=1)
    inputs, coords = inputs_of(2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert close(
        compiled(inputs, coords={"cells": coords}), model(inputs, coords={"cells": coords})
    )


def test_autocast() -> None:
    model = motet.HEALNet({"wsi": motet.Bag(6)}, out_features=2).eval()
    bag = torch.randn(2, 9, 6)
    expected = model({"wsi": bag})
    with torch.autocast("cpu", torch.bfloat16):
        out = model({"wsi": bag.bfloat16()})
    assert torch.allclose(out.float(), expected, atol=0.1)


def test_refusals() -> None:
    model = model_of()
    inputs, coords = inputs_of(2)
    del inputs["cells"]
    ok, cells = torch.ones(2, dtype=torch.bool), torch.randn(2, 3, 4, **WIDE)
    jagged = torch.nested.nested_tensor([torch.randn(3, 5, **WIDE)], layout=torch.jagged)
    cases: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
        (ValueError, "inputs: unknown modality 'ct'", {"ct": None}, {}),
        (ValueError, "inputs: expected a tensor for at least one", {}, {}),
        (ValueError, "inputs: expected a tensor for at least one", {"omic": None}, {}),
        (ValueError, "inputs: expected 5 entries", [None], {}),
        (TypeError, "inputs: expected a dict", inputs["omic"], {}),
        (TypeError, "inputs\\['omic'\\]: expected a tensor", {"omic": [1.0]}, {}),
        (ValueError, "inputs\\['omic'\\]: expected \\[B, 7\\]", {"omic": inputs["omic"][:, :6]},
         {}),
        (ValueError, "expected \\[B, N, 6\\] or jagged", {"wsi": inputs["wsi"][..., :5]}, {}),
        (ValueError, "expected \\[B, N, 6\\] or jagged", {"wsi": inputs["omic"]}, {}),
        (ValueError, "values of shape \\(3, 5\\)", {"wsi": jagged}, {}),
        (ValueError, "got a nested tensor", {"omic": jagged}, {}),
        (ValueError, "size 1, size 2, size 3, 1", {"mri": inputs["wsi"]}, {}),
        (ValueError, "expected one batch size", {**inputs, "omic": inputs["omic"][:1]}, {}),
        (ValueError, "expected torch.float64 as the model", {"omic": inputs["omic"].float()}, {}),
        (ValueError, "expected torch.float64 as the model", {"omic": inputs["omic"].long()}, {}),
        (ValueError, "expected device cpu", {"omic": inputs["omic"].to("meta")}, {}),
        (ValueError, "masks: unknown modality", inputs, {"masks": {"ct": ok}}),
        (ValueError, "expected \\(2, 8\\), got \\(2, 7\\)", inputs,
         {"masks": {"wsi": ok[:, None].expand(2, 7)}}),
        (TypeError, "masks\\['wsi'\\]: expected a bool", inputs,
         {"masks": {"wsi": torch.ones(2, 8)}}),
        (ValueError, "none \\(use present\\)", inputs, {"masks": {"omic": ok[:, None]}}),
        (ValueError, "present\\['wsi'\\]: expected \\(2,\\)", inputs, {"present": {"wsi": ok[:1]}}),
        (TypeError, "present\\['wsi'\\]: expected a bool", inputs,
         {"present": {"wsi": [True, True]}}),
        (ValueError, "says present, but", {"omic": inputs["omic"]}, {"present": {"wsi": ok}}),
        (TypeError, "present\\['wsi'\\]: expected a bool", {"omic": inputs["omic"]},
         {"present": {"wsi": [True, True]}}),
        (ValueError, "present\\['wsi'\\]: expected \\(2,\\)", {"omic": inputs["omic"]},
         {"present": {"wsi": ok[:1]}}),
        (TypeError, "masks\\['wsi'\\]: expected a bool", {"omic": inputs["omic"]},
         {"masks": {"wsi": "all"}}),
        (TypeError, "coords\\['cells'\\]: expected a tensor", {"omic": inputs["omic"]},
         {"coords": {"cells": "here"}}),
        (ValueError, "expected a dense or jagged tensor", {"omic": inputs["omic"].to_sparse()}, {}),
        (ValueError, "coords\\['cells'\\]: expected 2 coordinates", {"cells": cells}, {}),
        (ValueError, "coords\\['wsi'\\]: expected none for Bag", inputs,
         {"coords": {"wsi": coords}}),
        (ValueError, "coords\\['cells'\\]: expected \\(2, 3, 2\\)", {"cells": cells},
         {"coords": {"cells": coords[:, :2]}}),
    ]  # fmt: skip
    for error, message, values, options in cases:
        with pytest.raises(error, match=message):
            model(values, **options)
    with pytest.raises(ValueError, match="expected none, since a nested tensor"):
        bag = torch.nested.nested_tensor([torch.randn(3, 6, **WIDE)], layout=torch.jagged)
        model({"wsi": bag}, masks={"wsi": ok[:1, None]})


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("depth: expected a positive integer", {"depth": 0}),
        ("num_latents: expected a positive", {"num_latents": 0}),
        ("latent_init: expected", {"latent_init": "zeros"}),
        ("share_weights: expected", {"share_weights": "some"}),
        ("attn_dropout: expected a probability", {"attn_dropout": 1.0}),
        ("fourier_encode: Tabular", {"fourier_encode": False}),
        ("heads: expected a positive integer", {"heads": 0}),
        ("heads: expected a positive integer", {"heads": 2.0}),
        ("head_dim: expected a positive integer", {"head_dim": -3}),
        ("self_heads: expected a positive integer", {"self_heads": 0}),
        ("self_attention: expected a non-negative integer", {"self_attention": -1}),
        ("num_latents: expected a positive integer", {"num_latents": True}),
        ("temperature: expected a positive finite", {"temperature": 0.0}),
        ("temperature: expected a positive finite", {"temperature": float("nan")}),
        ("num_freq_bands: expected a positive integer", {"num_freq_bands": -1}),
        ("max_freq: expected a positive finite", {"max_freq": float("inf")}),
        ("snn: expected True or False", {"snn": "yes"}),
    ],
)
def test_bad_options(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(**options)


def test_bad_modalities() -> None:
    with pytest.raises(ValueError, match="modalities: expected a dict"):
        motet.HEALNet({}, out_features=1)
    with pytest.raises(ValueError, match="features: expected a positive integer"):
        motet.Tabular(0)
    with pytest.raises(ValueError, match="tokens: expected"):
        motet.Tabular(3, tokens="columns")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="extent: expected a positive"):
        motet.Bag(3, coords=2, extent=0)
    for wrong in (5, motet.Tabular):
        with pytest.raises(TypeError, match="modalities\\['o'\\]: expected a Tabular, Bag or Grid"):
            motet.HEALNet({"o": wrong}, out_features=1)  # pyright: ignore
    for wrong in (motet.Tabular(3), [motet.Tabular(3)]):
        with pytest.raises(ValueError, match="modalities: expected a dict"):
            motet.HEALNet(wrong, out_features=1)  # pyright: ignore
    with pytest.raises(ValueError, match="'type'"):
        motet.HEALNet({"type": motet.Tabular(3)}, out_features=1)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_single_token_needs_no_query(missing: bool, dropout: float) -> None:
    """Only V is computed; results, gradients and dropout draws equal those with queries."""
    attention = Attention(6, 5, heads=2, head_dim=3, dropout=dropout).double()
    randomised(attention).train()
    latents = torch.randn(4, 7, 6, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(4, 1, 5, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([0, 1, 3] if missing else [0, 1, 2, 3])
    offsets = torch.tensor([0, 1, 2, 2, 3]) if missing else None
    present = torch.tensor([True, True, False, True]) if missing else None

    def outcome(single: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        packed = missing and not single
        context_tokens = tokens[rows, 0] if packed else tokens
        context = Context(context_tokens, offsets=offsets if packed else None, single=single)
        if single:
            context = context._replace(present=present)
        strategy = None if single else "reference"
        (keys,) = prepare(context, [attention], latents=latents.shape[-2], strategy=strategy)
        update = attention(latents, keys).expand(4, 7, 6)[rows]
        inputs = [tokens, attention.to_out.weight, attention.to_kv.weight, attention.to_q.weight]
        gradients = torch.autograd.grad(
            update.square().sum(), inputs, allow_unused=True, materialize_grads=True
        )
        return [update, *gradients]

    # Packed bags draw dropout in another layout.
    if missing and dropout:
        update = outcome(True)[0]
        assert (update != update[:, :1]).any()
        return
    for actual, expected in zip(outcome(True), outcome(False), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strategy", [None, "reference"])
def test_what_a_missing_row_holds_does_not_matter(strategy: Any) -> None:
    """NaN in the token of a missing row changes no result, gradient or attention weight."""
    shapes = {"omic": motet.Tabular(5), "wsi": motet.Bag(4, coords=1)}
    model = motet.HEALNet(shapes, out_features=2, depth=3, num_latents=3, latent_dim=6).double()
    present = torch.tensor([True, False, True])
    x, bag, at = (torch.randn(3, *shape, dtype=torch.float64) for shape in ((5,), (1, 4), (1, 1)))

    def outcome(value: float) -> list[torch.Tensor]:
        copies = [part.clone() for part in (x, bag, at)]
        for part in copies:
            part[1] = value
        out = model(
            {"omic": copies[0], "wsi": copies[1]}, coords={"wsi": copies[2]},
            present={"omic": present, "wsi": present}, strategy=strategy, return_attention=True,
        )  # fmt: skip
        assert (out.attention["omic"][0][1] == 0).all()
        assert (out.attention["omic"][0][0] == 1).all()
        gradients = torch.autograd.grad(
            out.logits.square().sum(), list(model.parameters()), allow_unused=True,
            materialize_grads=True,
        )  # fmt: skip
        return [out.logits, *gradients]

    zeros, filled = outcome(0.0), outcome(float("nan"))
    for expected, actual in zip(zeros, filled, strict=True):
        assert torch.equal(expected, actual)
        assert expected.isfinite().all()
