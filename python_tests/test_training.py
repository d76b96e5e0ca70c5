"""Training: best weights restored exactly, resumed runs, seeds, losses, early stops."""

import os
import socket
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import motet
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import Precision
from motet.fusion import training
from motet.fusion.objectives import Classification, CoxSurvival
from motet.fusion.patients import (
    CACHE_BYTES,
    DeviceBags,
    PatientBatch,
    Patients,
    ScaledBags,
    modalities_of,
)
from motet.fusion.training import History, Training, predict_logits

from .conftest import ROOT
from .fake_capture import FakeCapture
from .training_helpers import (
    EVENTS,
    IDS,
    MODALITIES,
    NLL,
    SCALING,
    TIMES,
    Labs,
    model_of,
    omic,
    parts,
    run,
)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_it_learns_and_restores_the_best_weights() -> None:
    model = model_of()
    weights: list[dict] = []
    history = run(
        model, epochs=40, patience=3,
        each_epoch=lambda history: weights.append(deepcopy(model.state_dict())),
    )  # fmt: skip
    losses = history.validation_loss
    assert min(losses) < 0.95 * losses[0]
    assert history.best_epoch == 1 + losses.index(min(losses)) < len(losses)
    assert len(losses) == history.best_epoch + 3 < 40
    best = weights[history.best_epoch - 1]
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())
    # The restored weights give exactly the recorded loss.
    validation = parts()[1]
    assert NLL.loss(predict_logits(model, validation), validation.target).item() == min(losses)
    assert not model.training
    assert len(history.train_loss) == len(history.seconds) == len(losses)


def test_a_seed_gives_one_result_and_leaves_the_generator_alone() -> None:
    first, second, other = model_of(), model_of(), model_of()
    before = torch.get_rng_state()
    a, b, c = run(first, seed=3), run(second, seed=3), run(other, seed=4)
    assert torch.equal(before, torch.get_rng_state())
    assert a.train_loss == b.train_loss != c.train_loss
    assert same(first, second)


@pytest.mark.parametrize("epochs", [1, 3, 7])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(epochs: int, tmp_path: Path) -> None:
    uninterrupted, resumed = model_of(), model_of()
    expected = run(uninterrupted, patience=2)

    def stop(history: History) -> None:
        if len(history.train_loss) == epochs:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(model_of(), patience=2, resume=tmp_path, each_epoch=stop)
    history = run(resumed, patience=2, resume=tmp_path)
    assert same(uninterrupted, resumed)
    assert replace(history, seconds=[]) == replace(expected, seconds=[])
    assert not list(tmp_path.iterdir())


def test_a_run_killed_after_its_last_epoch_is_finished(tmp_path: Path, monkeypatch) -> None:
    """The run stays finished, though Lightning forgets that it had stopped, and would go on."""
    uninterrupted, resumed = model_of(), model_of()
    options = {"epochs": 40, "patience": 1, "max_lr": 0.05, "resume": tmp_path}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        expected = run(uninterrupted, **options)
    assert len(expected.validation_loss) < 40
    assert (tmp_path / "last.ckpt").exists()
    history = run(resumed, **options)
    assert history == expected
    assert same(uninterrupted, resumed)
    (tmp_path / "last.ckpt").write_bytes(b"half of it")
    with pytest.raises(ValueError, match="last.ckpt: cannot be read; remove it to start the fold"):
        run(model_of(), **options)


def test_validation_never_trains() -> None:
    training, validation = parts()
    first, second = model_of(), model_of()
    changed = replace(validation, tables={"omic": torch.zeros_like(validation.tables["omic"])})
    a = run(first, epochs=3, patience=3, data=(training, validation))
    b = run(second, epochs=3, patience=3, data=(training, changed))
    assert a.train_loss == b.train_loss
    assert a.validation_loss != b.validation_loss


def test_every_objective_and_a_block() -> None:
    cox = CoxSurvival.fit(TIMES[:90], EVENTS[:90])
    data = parts(cox)
    model = model_of(1)
    history = run(model, cox, data, epochs=12)
    assert min(history.validation_loss) < history.validation_loss[0]
    fitted = cox.fitted(predict_logits(model, data[1]))
    curves = fitted.curves(predict_logits(model, data[1]), np.array([0.0, 0.5, 1.0, 99.0]))
    assert (curves[:, 0] == 1).all()
    assert (np.diff(curves, axis=1) <= 0).all()

    labels = (omic()["a"].fillna(0).to_numpy() > 0).astype(int)
    classes = Classification.fit(labels[:90], classes=2, weighted=True)
    data = parts(classes, labels)
    model = model_of(2)
    run(model, classes, data, epochs=15)
    right = classes.probabilities(predict_logits(model, data[1])).argmax(1) == labels[90:]
    assert right.mean() > 0.75

    alone = {"labs": SCALING["labs"]}
    every = Patients.of(MODALITIES, alone, IDS, NLL.target(TIMES, EVENTS))
    first, has = torch.arange(len(IDS)) < 90, every.has("labs")
    training, validation = every.select(first & has), every.select(~first & has)
    block = motet.LegoBlock(modalities_of(SCALING)["labs"], out_features=4, num_latents=4,
                            latent_dim=8, heads=1, head_dim=8)  # fmt: skip
    assert len(run(block, data=(training, validation), epochs=2).train_loss) == 2


def test_half_precision_keeps_its_losses_whole() -> None:
    history = run(model_of(), epochs=3, precision="bf16-mixed")
    exact = run(model_of(), epochs=3)
    np.testing.assert_allclose(history.validation_loss, exact.validation_loss, rtol=0.02)
    assert len({loss * 256 % 1 for loss in history.validation_loss}) > 1  # not rounded to bfloat16


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[motet.StepGraphs]:
    """Train as on a GPU, where steps are graphs; a stand-in for the capture repeats them."""
    made: list[motet.StepGraphs] = []

    def graphs_for(model, objective, settings):
        made.append(motet.StepGraphs(model, objective.loss, l1=settings.l1, capture=FakeCapture()))
        return made[-1]

    def ready(patients, validation, settings):
        dtype = torch.bfloat16 if settings.precision == "bf16-mixed" else torch.float32
        cpu = torch.device("cpu")
        return tuple(part.with_device_bags(cpu, dtype, 1 << 20) for part in (patients, validation))

    monkeypatch.setattr(training, "graphs_for", graphs_for)
    monkeypatch.setattr(training, "use_device_bags", ready)
    return made


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_steps_as_graphs_train_the_same_model(graphs: list, precision: str, monkeypatch) -> None:
    """Graphs cycle momentum, decay weights, add L1 and draw the dropout masks of eager steps."""
    options = {"l1": 1e-4, "l2": 1e-3, "epochs": 6, "precision": precision, "modality_dropout": 0.2}
    history = run(model := model_of(), **options)
    (steps,) = graphs
    assert sum(known["replays"] for known in steps.report()) > 10
    assert history.without_graph == []
    monkeypatch.setattr(training, "graphs_for", lambda *_: None)
    expected = run(other := model_of(), **options)
    within = 1e-4 if precision == "32-true" else 0.02
    np.testing.assert_allclose(history.train_loss, expected.train_loss, rtol=within)
    np.testing.assert_allclose(history.validation_loss, expected.validation_loss, rtol=within)
    if precision == "32-true":
        for actual, reference in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(actual, reference, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("epochs", [1, 4])
def test_a_stopped_run_of_graphs_goes_on_as_if_nothing_had_happened(
    graphs: list, epochs: int, tmp_path: Path
) -> None:
    """After a stop every size runs first without a graph, and gives the bits of the graph."""
    test_a_stopped_run_goes_on_as_if_nothing_had_happened(epochs, tmp_path)
    assert all(sum(known["replays"] for known in steps.report()) for steps in graphs)


def test_what_is_not_finite_stops_graphs(graphs: list) -> None:
    test_what_is_not_finite_stops_it()


def test_a_scaled_loss_scales_l1_too(graphs: list, monkeypatch) -> None:
    """Scaling loss and L1 together changes nothing: Adam ignores a common factor of gradients."""
    options = {"l1": 1e-3, "epochs": 3, "patience": 3}
    expected = run(model_of(), **options)
    scaler = SimpleNamespace(scale=lambda one: one * 1024)
    monkeypatch.setattr(Precision, "scaler", scaler, raising=False)
    scaled = run(model_of(), **options)
    np.testing.assert_allclose(scaled.train_loss, expected.train_loss, rtol=1e-3)
    assert scaled.train_loss != expected.train_loss


def test_a_run_says_what_had_no_graph(graphs: list) -> None:
    alone = {"labs": SCALING["labs"]}
    every = Patients.of(MODALITIES, alone, IDS, NLL.target(TIMES, EVENTS))
    first, has = torch.arange(len(IDS)) < 90, every.has("labs")
    data = every.select(first & has), every.select(~first & has)
    block = motet.LegoBlock(
        modalities_of(SCALING)["labs"], out_features=4, num_latents=4, latent_dim=8, heads=1,
        head_dim=8,
    )  # fmt: skip
    block.head.register_forward_hook(lambda *_: None)
    with pytest.warns(RuntimeWarning, match="StepGraphs: hooks would not be called in a graph"):
        history = run(block, data=data, epochs=2)
    assert history.without_graph == ["hooks would not be called in a graph"]


def test_steps_are_graphs_on_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "StepGraphs", lambda model, loss, l1: (model, loss, l1))
    settings, model = Training(l1=0.5), model_of()
    assert training.graphs_for(model, NLL, settings) is None
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", True, raising=False)
    assert training.graphs_for(model, NLL, settings) == (model, NLL.loss, 0.5)
    assert training.graphs_for(torch.nn.Linear(2, 2), NLL, settings) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert training.graphs_for(model, NLL, settings) is None


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_bags_are_made_ready_for_a_gpu(precision: str, workers: int, monkeypatch) -> None:
    patients = Patients.of(MODALITIES, SCALING, IDS, NLL.target(TIMES, EVENTS))
    settings = Training(precision=precision, workers=workers)
    assert training.use_device_bags(patients, patients, settings) == (patients, patients)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8000, 9000))
    monkeypatch.setenv("LOCAL_RANK", "3")
    ready = training.use_device_bags(patients, patients, settings)
    dtype = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(precision, torch.float32)
    device = torch.device("cpu" if workers else "cuda:3")  # other processes cannot use the GPU
    rooms = (CACHE_BYTES,) * 2 if workers else (2000, 1000)
    for part, room in zip(ready, rooms, strict=True):
        bags = part.bags["labs"]
        assert isinstance(bags, DeviceBags)
        assert (bags.dtype, bags.device, bags.limit) == (dtype, device, room)


def test_predictions_are_made_on_a_gpu(monkeypatch) -> None:
    """Model and batches are moved to the GPU, and the model is moved back."""
    patients = Patients.of(MODALITIES, SCALING, IDS)
    expected, model = training.predict_logits(model_of(), patients), model_of()
    moves: list[tuple[str, str]] = []

    def to(self: Any, device: torch.device) -> Any:
        moves.append((type(self).__name__, str(device)))
        return self

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(PatientBatch, "to", to)
    assert torch.equal(training.predict_logits(model, patients, batch_size=64), expected)
    batches = -(-len(IDS) // 64)
    assert moves == [("HEALNet", "cuda"), *[("PatientBatch", "cuda")] * batches, ("HEALNet", "cpu")]


@pytest.mark.slow
def test_several_processes_train_one_model(tmp_path: Path) -> None:
    """With torchrun two processes end with the same weights, and a smaller loss."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "two.py"
    script.write_text(
        "import os, sys, torch\n"
        f"sys.path.append({str(ROOT)!r})\n"
        "from python_tests.training_helpers import model_of, run\n"
        "model = model_of()\n"
        "history = run(model, epochs=4)\n"
        f"folder = {str(tmp_path)!r}\n"
        "torch.save((model.state_dict(), vars(history)), folder + '/' + os.environ['RANK'])\n"
    )
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    subprocess.run(
        [sys.executable, *command, str(script)], check=True, capture_output=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    (a, first), (b, second) = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert first["validation_loss"] == second["validation_loss"]
    assert min(first["validation_loss"]) < first["validation_loss"][0]


def test_what_is_not_finite_stops_it() -> None:
    training, validation = parts()
    bad = training.tables["omic"].clone()
    bad[5] = float("nan")
    with pytest.raises(
        FloatingPointError, match="training loss: expected a finite number, got nan"
    ):
        run(model_of(), data=(replace(training, tables={"omic": bad}), validation))
    bad = validation.tables["omic"].clone()
    bad[0] = float("nan")
    with pytest.raises(FloatingPointError, match="validation loss: expected a finite number"):
        run(model_of(), data=(training, replace(validation, tables={"omic": bad})))
    with pytest.raises(ValueError, match="validation: expected at least 1, got 0"):
        run(model_of(), data=(training, validation.select(torch.arange(0))))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"epochs": 0}, "epochs: expected a positive integer, got 0"),
        ({"batch_size": "8"}, "batch_size: expected a positive integer, got '8'"),
        ({"max_lr": -1}, "max_lr: expected a positive finite number, got -1"),
        ({"l2": float("nan")}, "l2: expected a positive finite number, got nan"),
        ({"momentum": 1.0}, r"momentum: expected a number in \[0.07, 1\), got 1.0"),
        ({"precision": "8"}, "precision: expected '32-true', '16-mixed' or 'bf16-mixed', got '8'"),
    ],
)
def test_settings_are_checked(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Training(**setting)


def test_batches_hold_who_misses_what() -> None:
    every = Patients.of(MODALITIES, SCALING, IDS)
    batch = every.__getitems__([3, 0, 4, 9])
    assert batch.present["omic"].tolist() == [False, True, True, True]
    labs = batch.x["labs"]
    held = [len(MODALITIES["labs"].bags.get(IDS[i], ())) for i in (3, 0, 4, 9)]
    assert labs.offsets.diff().tolist() == held
    assert torch.equal(batch.coords["labs"].offsets, labs.offsets)
    assert "omic" not in every.__getitems__([0, 1]).present  # every patient of this batch has it
    # A modality that the new patients' cohort lacks is missing for all.
    fewer = Patients.of({"omic": MODALITIES["omic"]}, SCALING, IDS[:5])
    assert not fewer.has("labs").any()
    assert predict_logits(model_of(), fewer).isfinite().all()


def test_bags_are_read_once_while_they_fit_in_memory() -> None:
    source = Labs()
    small = ScaledBags(source, SCALING["labs"])
    for _ in range(3):
        small.read_packed(IDS[:10:2])
    assert source.reads == 5
    large = ScaledBags(source, SCALING["labs"], limit=100)
    before = source.reads
    for _ in range(2):
        large.read_packed(IDS[:20:2])
    assert large.bytes <= 100
    assert source.reads - before > 10
