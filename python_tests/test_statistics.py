"""Statistics of tokens, computed in advance and passed to a model or kept with bags."""

from collections.abc import Callable
from typing import Any

import motet
import numpy as np
import pytest
import torch
from motet.fusion.context import jagged
from motet.fusion.patients import DeviceBags, Patients, ScaledBags
from motet.fusion.preprocessing import BagScaling
from motet.fusion.statistics import layer_norm_statistics
from motet.io.cohorts.bags import Bags as CohortBags
from torch import Tensor

STRATEGIES = ("cached", "absorbed")


def test_they_are_mean_and_variance() -> None:
    x = torch.randn(3, 50, 7) * 3 + 100
    actual = motet.token_statistics(x)
    assert actual.shape == (3, 50, 2)
    assert actual.dtype == torch.float32
    expected = torch.stack([x.double().mean(-1), x.double().var(-1, correction=0)], -1)
    assert torch.allclose(actual.double(), expected, rtol=1e-5)
    half = motet.token_statistics(x.bfloat16())
    assert half.dtype == torch.float32
    assert torch.equal(half, motet.token_statistics(x.bfloat16().float()))
    assert motet.token_statistics(x.double()).dtype == torch.float64


@pytest.mark.parametrize("shape", [(0, 7), (7,), (2, 0, 7)])
def test_of_any_shape(shape: tuple[int, ...]) -> None:
    assert motet.token_statistics(torch.randn(shape)).shape == (*shape[:-1], 2)


def test_long_bags_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(50, 7)
    expected = motet.token_statistics(x)
    monkeypatch.setattr("motet.fusion.statistics._ROWS", 16)
    assert torch.equal(motet.token_statistics(x), expected)


@pytest.mark.parametrize("rows", [60, 20])
def test_joined_with_positions(rows: int) -> None:
    """Statistics of joined rows are exact, with one position per token or 20 positions repeated."""
    x = torch.randn(60, 9, dtype=torch.float64) + 30
    positions = torch.randn(rows, 5, dtype=torch.float64) * 4
    joined = torch.cat([x, positions.repeat(60 // rows, 1)], 1)
    mean, rstd = layer_norm_statistics(motet.token_statistics(x), 9, positions, 1e-5)
    assert torch.allclose(mean, joined.mean(1), rtol=1e-12)
    assert torch.allclose(rstd, (joined.var(1, correction=0) + 1e-5).rsqrt(), rtol=1e-12)


def _layouts() -> dict[str, Callable[[Tensor], tuple[Tensor, dict[str, Any]]]]:
    """Return ways to pass a bag [3, 300, F], each with the keywords it goes with."""
    lengths = torch.tensor([300, 120, 7])
    mask = torch.arange(300) < lengths[:, None]
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    present = torch.tensor([True, False, True])

    def of_items(x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return x.unflatten(1, (3, 100)), {}

    return {
        "dense": lambda x: (x, {}),
        "several items": of_items,
        "masked": lambda x: (x, {"masks": {"wsi": mask}}),
        "jagged": lambda x: (jagged(x[mask], offsets), {}),
        "jagged, absent": lambda x: (jagged(x[mask], offsets), {"present": {"wsi": present}}),
        "dense, absent": lambda x: (x, {"present": {"wsi": present}}),
    }


@pytest.mark.parametrize("coords", [0, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layout", list(_layouts()))
def test_a_model_gives_the_same_with_them(layout: str, strategy: Any, coords: int) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"out_features": 4, "num_latents": 5, "latent_dim": 16, "heads": 2}
    model = motet.HEALNet({"wsi": motet.Bag(24, coords=coords)}, **options).double()
    x, keywords = _layouts()[layout](torch.randn(3, 300, 24, dtype=torch.float64) + 2)
    if coords:
        at, _ = _layouts()[layout](torch.rand(3, 300, coords, dtype=torch.float64))
        keywords["coords"] = {"wsi": at}
    statistics = {"wsi": motet.token_statistics(x)}
    parameters = list(model.parameters())

    def compute(**more: Any) -> list[Tensor]:
        logits = model({"wsi": x}, strategy=strategy, **keywords, **more)
        return [logits, *torch.autograd.grad(logits.square().sum(), parameters)]

    for given, expected in zip(compute(statistics=statistics), compute(), strict=True):
        assert torch.allclose(given, expected, rtol=1e-9, atol=1e-11)
    # The model uses them: statistics of other rows give other results.
    other = {"wsi": motet.token_statistics(x * 2 + 1 if not x.is_nested else x * 2)}
    assert not torch.allclose(compute(statistics=other)[0], compute()[0], rtol=1e-3)


def test_lego_models_take_them() -> None:
    torch.manual_seed(0)
    block = motet.LegoBlock(motet.Bag(24), out_features=4, num_latents=5, latent_dim=16, heads=2)
    omic = motet.LegoBlock(motet.Tabular(6), out_features=4, num_latents=5, latent_dim=16, heads=2)
    merged = motet.LegoMerge({"wsi": block, "omic": omic}).eval()
    x, row = torch.randn(2, 300, 24), torch.randn(2, 6)
    statistics = motet.token_statistics(x)
    given = block(x, statistics=statistics)
    assert torch.allclose(given, block(x), rtol=1e-4, atol=1e-6)
    inputs = {"wsi": x, "omic": row}
    given = merged(inputs, statistics={"wsi": statistics})
    assert torch.allclose(given, merged(inputs), rtol=1e-4, atol=1e-6)


X = torch.randn(2, 30, 24)


@pytest.mark.parametrize(
    ("error", "message", "statistics"),
    [
        (TypeError, r"statistics\['wsi'\]: expected a tensor or None, got list", {"wsi": [1]}),
        (ValueError, r"statistics: unknown modality 'mri'", {"mri": X}),
        (ValueError, r"statistics\['omic'\]: expected none for Tabular", {"omic": X[0, :, :2]}),
        (ValueError, r"expected \(2, 30, 2\), got \(2, 29, 2\)", {"wsi": X[:, 1:, :2]}),
        (ValueError, r"expected torch.float32 on cpu, got torch.float64", {"wsi": X.double()}),
        (
            ValueError,
            r"expected \(2, 30, 2\), got a nested tensor",
            {"wsi": jagged(torch.zeros(60, 2), torch.tensor([0, 30, 60]))},
        ),
    ],
)
def test_refusals(error: type[Exception], message: str, statistics: Any) -> None:
    model = motet.HEALNet({"wsi": motet.Bag(24), "omic": motet.Tabular(6)}, out_features=4)
    with pytest.raises(error, match=message):
        model({"wsi": X, "omic": torch.randn(2, 6)}, statistics=statistics)


def test_refusals_of_jagged_ones() -> None:
    model = motet.HEALNet({"wsi": motet.Bag(24)}, out_features=4)
    offsets = torch.tensor([0, 20, 60])
    bags = {"wsi": jagged(X.flatten(0, 1), offsets)}
    with pytest.raises(ValueError, match="expected a nested tensor as inputs"):
        model(bags, statistics={"wsi": torch.zeros(60, 2)})
    for values, at in ((torch.zeros(60, 2), torch.tensor([0, 30, 60])), (X[0, :20, :2], None)):
        other = jagged(values, torch.tensor([0, 10, 20]) if at is None else at)
        with pytest.raises(ValueError, match="expected 2 numbers for each token"):
            model(bags, statistics={"wsi": other})


@pytest.mark.parametrize("x", [[1.0], torch.arange(3)])
def test_what_is_no_floating_point_tensor_is_refused(x: Any) -> None:
    with pytest.raises(TypeError, match="x: expected a floating-point tensor, got"):
        motet.token_statistics(x)


def test_tokens_without_a_feature_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one feature"):
        motet.token_statistics(torch.zeros(3, 0))


def _patients(coords: int = 2) -> Patients:
    rng = np.random.default_rng(0)
    bags = {
        f"p{i}": (
            rng.normal(3, 2, (n, 6)).astype(np.float32),
            rng.random((n, coords)).astype(np.float32) if coords else None,
        )
        for i, n in enumerate((5, 9, 2))
    }
    source = CohortBags(bags, features=6, coords=coords, extent=1.0)
    scaling = {"wsi": BagScaling.fit(source, list(bags))}
    return Patients.of({"wsi": source}, scaling, ("p0", "nobody", "p1", "p2"))


@pytest.mark.parametrize("coords", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bags_keep_them(dtype: torch.dtype, coords: int) -> None:
    patients = _patients(coords)
    ready = patients.with_device_bags(torch.device("cpu"), dtype, 1 << 20)
    plain, batch = patients.__getitems__([0, 1, 2]), ready.__getitems__([0, 1, 2])
    bag: Any = batch.x["wsi"]
    assert bag.values.dtype == dtype
    assert bag.offsets.tolist() == [0, 5, 5, 14]
    assert torch.equal(bag.values, plain.x["wsi"].values.to(dtype))
    assert torch.equal(batch.statistics["wsi"].values, motet.token_statistics(bag.values))
    assert torch.equal(batch.statistics["wsi"].offsets, bag.offsets)
    assert set(batch.coords) == ({"wsi"} if coords else set())
    assert not plain.statistics
    assert "statistics" in batch.arguments()[1]


def test_ready_bags_are_converted_once_as_far_as_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[str] = []
    getitem = ScaledBags.__getitem__

    def watched(self: ScaledBags, patient: str) -> Any:
        if not isinstance(self, DeviceBags):
            read.append(patient)
        return getitem(self, patient)

    monkeypatch.setattr(ScaledBags, "__getitem__", watched)
    one = 5 * (6 * 2 + 2 * 4 + 2 * 4)  # p0 in bfloat16, its coordinates and its statistics
    ready = _patients().with_device_bags(torch.device("cpu"), torch.bfloat16, one)
    for _ in range(2):
        ready.__getitems__([0, 2])
    assert read == ["p0", "p1", "p1"]
