"""Modality dropout: its rate, what stays, what it depends on, and batches without a modality."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from motet.fusion.graphs import logits_of
from motet.fusion.modality_dropout import ModalityDropout
from motet.fusion.patients import PatientBatch, Patients
from motet.fusion.training import History, Training

from .training_helpers import EVENTS, IDS, MODALITIES, NLL, SCALING, TIMES, model_of, parts, run

EVERY = Patients.of(MODALITIES, SCALING, IDS, NLL.target(TIMES, EVENTS))


def tables(n: int, names: str, share: float = 1.0, seed: int = 0) -> Patients:
    """Return patients with tables of one column; each patient has each with probability `share`."""
    generator = torch.Generator().manual_seed(seed)
    present = {name: torch.rand(n, generator=generator) < share for name in names}
    present[names[0]] |= ~torch.stack(list(present.values())).any(0)
    x = {name: torch.randn(n, 1, generator=generator) for name in names}
    return Patients(tuple(map(str, range(n))), x, present, {})


def draws_of(sampler: ModalityDropout, epoch: int = 0) -> dict[int, tuple[str, ...]]:
    sampler.set_epoch(epoch)
    return dict(sampler)


def sampler_of(patients: Patients, rate: float, seed: int = 0, **options) -> ModalityDropout:
    return ModalityDropout(
        patients, rate, options.get("processes", 1), options.get("rank", 0), seed=seed
    )


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_rate_is_what_was_asked_for(rate: float) -> None:
    """Less the draws in which no modality would be left, of which one stays."""
    patients = tables(20_000, "abc")
    dropped = draws_of(sampler_of(patients, rate))
    expected = rate - rate**3 / 3
    for name in "abc":
        share = np.mean([name in names for names in dropped.values()])
        assert share == pytest.approx(expected, abs=4 * np.sqrt(expected / 20_000))
    # They are drawn independently, unless all would be dropped.
    both = np.mean([{"a", "b"} <= set(names) for names in dropped.values()])
    assert both == pytest.approx(rate**2 - rate**3 + rate**3 / 3, abs=0.012)
    assert not any(draws_of(sampler_of(patients, 0.0)).values())


@given(st.integers(0, 1000), st.floats(0, 0.999), st.floats(0.2, 1), st.integers(0, 5))
def test_one_modality_stays(seed: int, rate: float, share: float, epoch: int) -> None:
    patients = tables(40, "abcd", share, seed)
    held = patients.sets_of_modalities()
    dropped = draws_of(sampler_of(patients, rate, seed), epoch)
    assert sorted(dropped) == list(range(40))
    for row, names in dropped.items():
        assert set(names) < set(held[row])  # one is left; and none is dropped that is not there
        if len(held[row]) == 1:
            assert names == ()


def test_draws_depend_on_seed_and_epoch_only() -> None:
    patients = tables(60, "abc")
    before = torch.get_rng_state()
    first = draws_of(sampler_of(patients, 0.4), 2)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(7)
    other = sampler_of(patients, 0.4)
    draws_of(other, 0)
    assert list(draws_of(other, 2).items()) == list(first.items())  # also in the same order
    assert draws_of(other, 3) != first
    assert draws_of(sampler_of(patients, 0.4, seed=1), 2) != first
    # Processes share the rows, each with the draw that it has in one process.
    shares = [draws_of(sampler_of(patients, 0.4, processes=2, rank=rank), 2) for rank in (0, 1)]
    assert {**shares[0], **shares[1]} == first
    assert not set(shares[0]) & set(shares[1])


def same(a: PatientBatch, b: PatientBatch) -> None:
    """Assert that a model sees the same in two batches."""
    model = model_of().eval()
    with torch.no_grad():
        assert torch.equal(logits_of(model, a), logits_of(model, b))
    assert {name: has.tolist() for name, has in a.present.items()} == {
        name: has.tolist() for name, has in b.present.items()
    }
    for part in ("x", "coords", "statistics"):
        for name, ragged in getattr(a, part).items():
            if name in EVERY.bags:
                assert torch.equal(ragged.values, getattr(b, part)[name].values)
                assert torch.equal(ragged.offsets, getattr(b, part)[name].offsets)


@pytest.mark.parametrize("name", ["omic", "labs"])
def test_a_batch_without_a_modality_is_that_of_patients_who_lack_it(name: str) -> None:
    both = [row for row, held in enumerate(EVERY.sets_of_modalities()) if len(held) == 2][:6]
    (other,) = {"omic", "labs"} - {name}
    lacking = EVERY.batch(both, [(name,)] * 6)
    same(lacking, EVERY.only([other]).__getitems__(both))
    same(EVERY.batch(both, [()] * 6), EVERY.__getitems__(both))
    # In one batch some patients lack it, some have it.
    mixed = EVERY.batch(both, [(name,), ()] * 3)
    with torch.no_grad():
        model = model_of().eval()
        some, without = logits_of(model, mixed), logits_of(model, lacking)
        full = logits_of(model, EVERY.__getitems__(both))
    torch.testing.assert_close(some[::2], without[::2], rtol=0, atol=1e-6)
    torch.testing.assert_close(some[1::2], full[1::2], rtol=0, atol=1e-6)
    assert not torch.allclose(without, full, atol=1e-4)
    assert all(torch.equal(mixed.target[key], EVERY.target[key][both]) for key in EVERY.target)


def test_a_dropped_bag_is_still_read_once() -> None:
    """The empty bag in its place does not enter the memory of read bags."""
    row = EVERY.sets_of_modalities().index(("omic", "labs"))
    EVERY.batch([row], [("labs",)])
    assert len(EVERY.batch([row]).x["labs"].values) == len(MODALITIES["labs"].bags[IDS[row]])
    assert not len(EVERY.batch([row], [("labs",)]).x["labs"].values)


def test_patients_with_fewer_modalities() -> None:
    assert EVERY.modalities == ("omic", "labs")
    held = EVERY.held()
    assert torch.equal(held[:, 0], EVERY.has("omic"))
    assert torch.equal(held[:, 1], EVERY.has("labs"))
    alone = EVERY.only(["labs"])
    assert set(alone.sets_of_modalities()) == {("labs",), ()}
    assert torch.equal(alone.has("labs"), EVERY.has("labs"))
    assert EVERY.only(["omic", "labs"]).sets_of_modalities() == EVERY.sets_of_modalities()
    assert EVERY.has("omic").sum() == len(IDS) - 1  # `only` changes a copy


# Training


def test_training_with_it_differs_and_is_repeatable() -> None:
    models = [model_of() for _ in range(3)]
    rates = (0.0, 0.4, 0.4)
    first, second, third = (
        run(model, epochs=3, modality_dropout=rate)
        for model, rate in zip(models, rates, strict=True)
    )
    assert first.train_loss != second.train_loss == third.train_loss
    weights = [list(model.state_dict().values()) for model in models]
    assert all(map(torch.equal, weights[1], weights[2]))


def test_workers_draw_the_same() -> None:
    alone, helped = model_of(), model_of()
    run(alone, epochs=2, modality_dropout=0.4)
    run(helped, epochs=2, modality_dropout=0.4, workers=2)
    assert all(map(torch.equal, alone.state_dict().values(), helped.state_dict().values()))


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_stopped_run_goes_on_with_the_same_draws(epochs: int, tmp_path: Path) -> None:
    uninterrupted, resumed = model_of(), model_of()
    options = {"epochs": 5, "modality_dropout": 0.4}
    expected = run(uninterrupted, **options)

    def stop(history: History) -> None:
        if len(history.train_loss) == epochs:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(model_of(), **options, resume=tmp_path, each_epoch=stop)
    history = run(resumed, **options, resume=tmp_path)
    assert replace(history, seconds=[]) == replace(expected, seconds=[])
    assert all(map(torch.equal, uninterrupted.state_dict().values(), resumed.state_dict().values()))


def test_without_a_patience_the_last_weights_stay() -> None:
    """All epochs run, also if the validation loss rises from the first one on."""
    training, validation = parts()
    upside_down = replace(validation, tables={"omic": -20 * validation.tables["omic"]})
    model, seen = model_of(), []
    history = run(
        model, epochs=6, data=(training, upside_down),
        each_epoch=lambda _: seen.append([p.detach().clone() for p in model.parameters()]),
    )  # fmt: skip
    assert len(history.validation_loss) == history.best_epoch == 6
    assert min(history.validation_loss) < history.validation_loss[-1]
    assert all(map(torch.equal, model.parameters(), seen[-1]))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"modality_dropout": 1.0}, r"modality_dropout: expected .*, got 1.0"),
        ({"modality_dropout": -0.1}, r"modality_dropout: expected .*, got -0.1"),
        ({"patience": 0}, "patience: expected a positive integer, got 0"),
    ],
)
def test_settings_are_checked(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Training(**setting)
