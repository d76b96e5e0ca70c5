"""The training loop: best weights restored exactly, seeds, bins, what stops it."""

import copy
import dataclasses

import motet
import pytest
import torch
from motet.fusion.training import Patients, train


def patients(rows: int, seed: int) -> Patients:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator)
    bins = (x[:, 0] * -1.5 + 2).round().clamp(0, 3).long()
    events = torch.rand(rows, generator=generator) < 0.7
    return Patients({"omic": x}, bins, events)


def model_of(seed: int = 0) -> motet.HEALNet:
    torch.manual_seed(seed)
    return motet.HEALNet({"omic": motet.Tabular(6)}, out_features=4, num_latents=4, latent_dim=8,
                         heads=1, head_dim=8, ff_dropout=0.2)  # fmt: skip


def run(model: motet.HEALNet, **options):
    options = {"epochs": 12, "max_lr": 0.01, **options}
    return train(model, lambda p: model(p.inputs), patients(64, 1), patients(32, 2), **options)


def test_it_learns_and_restores_the_best_weights() -> None:
    model = model_of()
    history = run(model, epochs=40, patience=3)
    assert min(history.validation_loss) < 0.8 * history.validation_loss[0]
    assert history.best_epoch == 1 + history.validation_loss.index(min(history.validation_loss))
    assert len(history.validation_loss) <= history.best_epoch + 3
    # Evaluated again, the restored weights give the very loss that was recorded.
    validation, training = patients(32, 2), patients(64, 1)
    weights = 1 / torch.bincount(training.bins, minlength=4).clamp_min(1)
    with torch.no_grad():
        loss = motet.nll_loss(
            model(validation.inputs), validation.bins, validation.events, weights=weights
        )
    assert loss.item() == min(history.validation_loss)
    assert not model.training


def test_a_seed_gives_one_result() -> None:
    first, second, other = model_of(), model_of(), model_of()
    a, b, c = run(first, seed=3), run(second, seed=3), run(other, seed=4)
    assert a.train_loss == b.train_loss != c.train_loss
    assert all(
        torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True)
    )


def test_validation_never_trains() -> None:
    first, second = model_of(), model_of()
    a = run(first, epochs=3)
    changed = dataclasses.replace(patients(32, 2), inputs={"omic": torch.zeros(32, 6)})
    b = train(second, lambda p: second(p.inputs), patients(64, 1), changed, epochs=3, max_lr=0.01)
    assert a.train_loss == b.train_loss


def test_nan_stops_it() -> None:
    model = model_of()
    bad = patients(64, 1)
    bad.inputs["omic"][5] = float("nan")
    with pytest.raises(FloatingPointError, match="training loss: expected a finite"):
        train(model, lambda p: model(p.inputs), bad, patients(32, 2), epochs=2)


def test_nan_on_validation_stops_it_too() -> None:
    model = model_of()
    bad = patients(8, 2)
    bad.inputs["omic"][0] = float("nan")
    with pytest.raises(FloatingPointError, match="validation loss: expected a finite"):
        train(model, lambda p: model(p.inputs), patients(64, 1), bad, epochs=2)
    nobody = patients(8, 2).take(torch.arange(0))
    with pytest.raises(ValueError, match="validation: expected at least 1, got 0"):
        train(model, lambda p: model(p.inputs), patients(64, 1), nobody)
    with pytest.raises(ValueError, match="batch_size: expected at least 1"):
        run(model, batch_size=0)


def test_take_keeps_rows_together() -> None:
    everyone = dataclasses.replace(patients(10, 1), present={"omic": torch.arange(10) % 2 == 0})
    some = copy.deepcopy(everyone).take(torch.tensor([4, 7]))
    assert len(some) == 2
    assert torch.equal(some.inputs["omic"], everyone.inputs["omic"][[4, 7]])
    assert some.present["omic"].tolist() == [True, False]
