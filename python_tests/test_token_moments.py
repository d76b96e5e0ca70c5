"""Shared moments: one for all weights that read a token, Adam's for all others."""

from copy import deepcopy

import motet
import pytest
import torch
from motet.fusion.token_moments import share_moments, token_parameters

MODALITIES = {"omic": motet.Tabular(40), "wsi": motet.Bag(6, coords=2)}


def healnet(**options) -> motet.HEALNet:
    torch.manual_seed(0)
    return motet.HEALNet(
        MODALITIES, out_features=2, num_latents=4, latent_dim=8, heads=1, head_dim=8,
        self_attention=1, **options,
    )  # fmt: skip


def batch(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "omic": torch.randn(5, 40, generator=generator),
        "wsi": torch.randn(5, 3, 6, generator=generator),
    }


class SharingAdam(torch.optim.Adam):
    """Adam that shares the moments after every step, as the training does after every epoch."""

    def __init__(self, model: torch.nn.Module, **options) -> None:
        options = {"lr": 0.01, "weight_decay": 0.01, "fused": False, **options}
        super().__init__(model.parameters(), **options)
        self.tokens = token_parameters(model)

    def step(self, closure=None):
        loss = super().step(closure)
        share_moments(self, self.tokens)
        return loss


def step(model: torch.nn.Module, optimiser: torch.optim.Optimizer, seed: int) -> None:
    optimiser.zero_grad()
    inputs = batch(seed)
    coords = {"wsi": torch.ones(5, 3, 2)}
    model(inputs, coords=coords).square().sum().backward()
    optimiser.step()


@pytest.mark.parametrize("share", [True, False])
def test_the_weights_that_read_tokens(share: bool) -> None:
    model = healnet(share_weights=share, depth=2)
    projections = [p for p in token_parameters(model) if p.ndim == 2]
    # Rows of 40 features; bags of 6, with encoded coordinates and two constants. Not the latents.
    widths = {modality.token_dim(model.positions) for modality in MODALITIES.values()}
    assert widths == {40, 6 + model.positions.width(2) + 2}
    assert {p.shape[1] for p in projections} == widths
    assert len({id(p) for p in projections}) == (2 if share else 4)
    norms = [p for p in token_parameters(model) if p.ndim == 1]
    assert {len(p) for p in norms} == widths


@pytest.mark.parametrize("fused", [False, True])
def test_one_second_moment_for_tokens_and_adams_for_others(fused: bool) -> None:
    model = healnet()
    twin = deepcopy(model)
    optimiser = SharingAdam(model, fused=fused)
    adam = torch.optim.Adam(twin.parameters(), lr=0.01, weight_decay=0.01, fused=fused)
    step(model, optimiser, 0)
    step(twin, adam, 0)
    tokens = {id(parameter) for parameter in token_parameters(model)}
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        # The first step is Adam's for all weights, bit for bit.
        assert torch.equal(mine, theirs)
        if mine.grad is None:  # the queries for a single token have no influence
            assert id(mine) not in tokens
            continue
        moments = optimiser.state[mine]["exp_avg_sq"]
        if id(mine) in tokens:
            assert (moments == moments.flatten()[0]).all()
            reference = adam.state[theirs]["exp_avg_sq"].mean()
            torch.testing.assert_close(moments.flatten()[0], reference, rtol=1e-6, atol=0)
        else:
            assert torch.equal(moments, adam.state[theirs]["exp_avg_sq"])


def test_the_others_have_adams_steps_bit_for_bit() -> None:
    """Given equal gradients, which the second step of two models does not have."""
    model = healnet()
    twin = deepcopy(model)
    optimiser = SharingAdam(model)
    adam = torch.optim.Adam(twin.parameters(), lr=0.01, weight_decay=0.01, fused=False)
    tokens = {id(parameter) for parameter in token_parameters(model)}
    differ = 0
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            theirs.grad = mine.grad.clone()
        optimiser.step()
        adam.step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        if id(mine) in tokens:
            differ += not torch.equal(mine, theirs)
        else:
            assert torch.equal(mine, theirs)
    assert differ


def test_features_move_in_proportion_to_their_gradients() -> None:
    """Adam moves a feature whose gradient is ten times smaller as fast as the others."""
    model = healnet()
    (weight, *_) = (p for p in token_parameters(model) if p.ndim == 2)
    optimiser = SharingAdam(model, weight_decay=0.0)
    gradient = torch.ones_like(weight)
    gradient[:, 0] = 0.1
    weight.grad = gradient.clone()
    optimiser.step()  # the first step has no earlier moment, and is Adam's
    before = weight.detach().clone()
    for _ in range(20):
        optimiser.step()
    moved = (weight.detach() - before).abs().mean(0)
    assert moved[0] / moved[1] == pytest.approx(0.1, abs=0.01)


def test_a_state_that_is_loaded_goes_on_with_the_same_steps() -> None:
    model = healnet()
    optimiser = SharingAdam(model)
    for seed in range(2):
        step(model, optimiser, seed)
    twin = deepcopy(model)
    resumed = SharingAdam(twin)
    resumed.load_state_dict(deepcopy(optimiser.state_dict()))
    for seed in range(2, 4):
        step(model, optimiser, seed)
        step(twin, resumed, seed)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_weights_without_a_gradient() -> None:
    """A modality that a batch lacks, and frozen weights, are left alone."""
    model = healnet()
    optimiser = SharingAdam(model, weight_decay=0.0)
    frozen = next(p for p in token_parameters(model) if p.ndim == 2)
    frozen.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model({"omic": batch(0)["omic"]}).square().sum().backward()
    optimiser.step()
    step_free = [name for name, p in model.named_parameters() if p.grad is None]
    assert step_free
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) or name not in step_free
    # A model without attention over tokens trains with plain Adam.
    linear = torch.nn.Linear(3, 1)
    optimiser = SharingAdam(linear)
    linear(torch.ones(2, 3)).sum().backward()
    optimiser.step()
    assert len(optimiser.state) == 2
