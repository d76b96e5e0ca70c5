"""Train a model with Lightning: Adam and one cycle of the learning rate.

The order of an epoch and the modalities that are dropped in it are drawn from (seed, epoch), the
dropout of a step from (seed, step). So a run that was killed and resumed gives exactly the weights
of one that was not. On one GPU the loss and the gradients of a step are one CUDA graph
(`StepGraphs`), and the host waits for the GPU only at the end of an epoch.
"""

import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from .._atomic import replacing
from .._checks import choice, integer, positive, rate
from .graphs import StepGraphs, add_l1, logits_of
from .healnet import HEALNet
from .lego_block import LegoBlock
from .lego_fuse import LegoFuse
from .lego_merge import LegoMerge
from .modality_dropout import ModalityDropout, WithDroppedModalities
from .objectives import Objective
from .patients import CACHE_BYTES, PatientBatch, Patients
from .token_moments import share_moments, token_parameters

PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")


@dataclass(frozen=True)
class Training:
    """The settings of a training.

    Args:
        epochs: largest number of epochs; also the length of the one cycle.
        max_lr: highest learning rate, at the peak of the cycle.
        batch_size: patients per step and process.
        patience: training stops after this number of epochs without a lower validation loss, and
            ends with the weights of the lowest. None for all epochs and the last weights: the
            validation loss of small cohorts is too noisy to choose an epoch by, and it measures
            overconfidence, which the calibration removes, more than the order of the patients.
        modality_dropout: probability of dropping a modality of a patient in a training step; a
            patient keeps at least one.
        l1: weight of `l1_penalty`.
        l2: weight decay of Adam.
        momentum: highest momentum (beta 1 of Adam), at both ends of the cycle; the lowest, at its
            peak, is 0.07 less.
        seed: of the order of the patients and of dropout.
        precision: "32-true", "16-mixed" or "bf16-mixed", Lightning's names.
        workers: number of processes that read bags in advance.

    Raises:
        ValueError: an argument outside its range.
    """

    epochs: int = 50
    max_lr: float = 0.008
    batch_size: int = 8
    patience: int | None = None
    modality_dropout: float = 0.0
    l1: float = 0.0
    l2: float = 0.0
    momentum: float = 0.92
    seed: int = 0
    precision: str = "32-true"
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            integer(name, getattr(self, name))
        if self.patience is not None:
            integer("patience", self.patience)
        rate("modality_dropout", self.modality_dropout)
        for name in ("seed", "workers"):
            integer(name, getattr(self, name), 0)
        if self.workers > (cores := max(8, os.cpu_count() or 1)):
            raise ValueError(f"workers: expected at most {cores} here, got {self.workers}")
        positive("max_lr", self.max_lr)
        for name in ("l1", "l2"):
            if getattr(self, name) != 0:
                positive(name, getattr(self, name))
        positive("momentum", self.momentum)
        if not 0.07 <= self.momentum < 1:
            raise ValueError(f"momentum: expected a number in [0.07, 1), got {self.momentum!r}")
        choice("precision", self.precision, PRECISIONS)


@dataclass
class History:
    """The course of a training: losses and seconds per epoch."""

    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    best_epoch: int = 0
    """The epoch, from 1, of the weights that are kept."""
    without_graph: list[str] = field(default_factory=list)
    """Why steps on a GPU ran without a CUDA graph; empty if all ran as graphs, and on a CPU."""


def train(
    model: nn.Module,
    objective: Objective,
    patients: Patients,
    validation: Patients,
    settings: Training,
    *,
    resume: Path | None = None,
    each_epoch: Callable[[History], None] = lambda history: None,
) -> History:
    """Train `model` in place; at the end it has the last weights, or the best with `patience`.

    Under torchrun every process trains on its share of the patients (DDP); all processes end with
    the same weights and validation losses.

    Args:
        model: the model to train, on any device.
        objective: fitted on the training part.
        patients: the training part, with targets.
        validation: the validation part, with targets; with `patience` its loss decides when to
            stop.
        settings: see `Training`.
        resume: folder for the state after every epoch. If it holds a state, training continues from
            it; the state is removed at the end.
        each_epoch: called after every epoch.

    Returns:
        The History.

    Raises:
        FloatingPointError: a training loss or the validation loss of an epoch is not finite.
        ValueError: no patient to train on or to validate with.
    """
    _check_not_empty(patients=patients, validation=validation)
    patients, validation = use_device_bags(patients, validation, settings)
    loader = _make_loader(patients, settings, share=True)
    # Every process validates on all patients, so that all stop at the same epoch.
    val_loader = _make_loader(validation, settings, share=False)
    fit = _Fit(model, objective, settings, steps=len(loader))
    kept = _KeptWeights(fit.history, settings.patience, each_epoch)
    state_file = None if resume is None else resume / "last.ckpt"
    state = None if state_file is None else _read_state(state_file)
    # Dropout draws from torch's global generators; their states are restored afterwards.
    with _silence_lightning(), torch.random.fork_rng():
        trainer = _make_trainer(settings, kept, state_file)
        if state is not None:
            fit.on_load_checkpoint(state)
            kept.load_state_dict(state["callbacks"][kept.state_key])
        if not (state is not None and _has_ended(fit.history, settings)):
            resumed_from = None if state is None else str(state_file)
            try:
                trainer.fit(fit, loader, val_loader, ckpt_path=resumed_from, weights_only=True)
            except SystemExit as error:  # Lightning turns Ctrl-C and SIGTERM into an exit with 0
                raise KeyboardInterrupt from error
    model.cpu()
    model.load_state_dict(kept.weights)
    model.eval()
    if state_file is not None and not rank():
        state_file.unlink(missing_ok=True)
    return fit.history


def _check_not_empty(**parts: Patients) -> None:
    for name, part in parts.items():
        if not len(part):
            raise ValueError(f"{name}: expected at least 1, got 0")


def _world_size() -> int:
    """Return the number of processes under torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def graphs_for(model: nn.Module, objective: Objective, settings: Training) -> StepGraphs | None:
    """Return the StepGraphs of a training; None without a GPU and with several processes."""
    if _world_size() > 1 or not next(model.parameters()).is_cuda:
        return None
    if not isinstance(model, (HEALNet, LegoBlock, LegoMerge, LegoFuse)):
        return None
    return StepGraphs(model, objective.loss, l1=settings.l1)


def use_device_bags(
    patients: Patients, validation: Patients, settings: Training
) -> tuple[Patients, Patients]:
    """Return both parts with DeviceBags; unchanged if there is no GPU.

    Training bags are kept on the GPU up to a quarter of its free memory, validation bags up to an
    eighth. With `workers` they are kept in main memory, in the process of each worker.
    """
    if not torch.cuda.is_available():
        return patients, validation
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    free = torch.cuda.mem_get_info(device)[0]
    limits = free // 4, free // 8
    if settings.workers:
        device, limits = torch.device("cpu"), (CACHE_BYTES, CACHE_BYTES)
    dtype = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(settings.precision)
    return tuple(
        part.with_device_bags(device, dtype or torch.float32, limit)
        for part, limit in zip((patients, validation), limits, strict=True)
    )  # pyright: ignore[reportReturnType]


def _make_loader(patients: Patients, settings: Training, *, share: bool) -> DataLoader:
    """Return a loader of all patients in order; if `share`, of this process's share, shuffled."""
    sampler, dataset = None, patients
    if share and settings.modality_dropout and len(patients.modalities) > 1:
        dataset = WithDroppedModalities(patients)
        sampler = ModalityDropout(
            patients, settings.modality_dropout, _world_size(), rank(), seed=settings.seed
        )
    elif share:
        sampler = DistributedSampler(
            patients, _world_size(), rank(), shuffle=True, seed=settings.seed
        )
    return DataLoader(
        dataset,
        settings.batch_size,
        sampler=sampler,
        num_workers=settings.workers,
        persistent_workers=settings.workers > 0,  # they keep the bags that they have read
        collate_fn=_return_batch,
        pin_memory=torch.cuda.is_available(),  # for tensors that are not on the GPU already
    )


def _make_trainer(
    settings: Training, kept: "_KeptWeights", state_file: Path | None
) -> lightning.Trainer:
    """Return Lightning's trainer; it prints nothing and writes nothing but `state_file`."""
    world, local = _world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    callbacks: list[Callback] = [kept]
    if settings.patience is not None:
        callbacks.append(
            EarlyStopping("validation_loss", patience=settings.patience, check_finite=False)
        )
    # It is the last callback, so that the file holds the state of the others after the epoch.
    if state_file is not None:
        callbacks.append(_SaveState(state_file))
    return lightning.Trainer(
        accelerator="auto",
        devices=local,
        num_nodes=world // local,
        # If all patients of a batch miss a modality, its weights get no gradient; DDP has to expect
        # that.
        strategy="ddp_find_unused_parameters_true" if world > 1 else "auto",
        precision=settings.precision,  # pyright: ignore[reportArgumentType]
        max_epochs=settings.epochs,
        callbacks=callbacks,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


@torch.no_grad()
def predict_logits(model: nn.Module, patients: Patients, *, batch_size: int = 16) -> Tensor:
    """Return the logits [n, K] of a model in evaluation mode, computed on a GPU if there is one.

    The logits of a patient do not depend on the other patients: batches only save memory.
    Afterwards the model is on its former device again.
    """
    model.eval()
    _check_not_empty(patients=patients)
    home = next(model.parameters()).device
    device = torch.device("cuda") if torch.cuda.is_available() else home
    batches = DataLoader(patients, batch_size, collate_fn=_return_batch)
    model.to(device)
    try:
        return torch.cat([logits_of(model, batch.to(device)).cpu() for batch in batches])
    finally:
        model.to(home)


class _Fit(lightning.LightningModule):
    """The training loop of Lightning around a model; with `graphs`, around its StepGraphs.

    Differences with graphs: a step has written all gradients into `.grad` when it returns, so there
    is no backward pass and nothing to set to zero, and the gradient of L1 is among them.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, settings: Training, *, steps: int
    ) -> None:
        super().__init__()
        self.model, self.objective, self.settings = model, objective, settings
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.steps = steps
        self.history = History()
        self.validated: list[tuple[Tensor, dict[str, Tensor]]] = []  # logits, targets
        self.losses: list[Tensor] = []
        self.started = 0.0
        self.graphs: StepGraphs | None = None

    def configure_optimizers(self) -> Any:
        settings = self.settings
        # Made here, since the model is on its device only now.
        self.graphs = graphs_for(self.model, self.objective, settings)
        # In "16-mixed" the loss is scaled, and so are the gradients. A fused Adam divides them by
        # the scale inside its step. The gradient of L1 is added to `.grad` before the step, and not
        # scaled, so that it would be divided as well: then Adam is not fused, and Lightning divides
        # before L1 is added. With graphs the gradient of L1 is scaled like the others.
        optimiser = torch.optim.Adam(
            self.parameters(), lr=settings.max_lr, weight_decay=settings.l2,
            fused=settings.precision != "16-mixed" or self.graphs is not None,
        )  # fmt: skip
        cycle = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, settings.max_lr, epochs=settings.epochs, steps_per_epoch=self.steps,
            base_momentum=settings.momentum - 0.07, max_momentum=settings.momentum,
        )  # fmt: skip
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        self.losses, self.started = [], time.perf_counter()
        share_moments(self.trainer.optimizers[0], token_parameters(self.model))

    def training_step(self, batch: PatientBatch, index: int) -> Tensor:
        # A seed for every (seed, step, process): a resumed run draws the same dropout.
        seed = (self.settings.seed * 1_000_003 + self.global_step) * 1_009 + self.global_rank
        torch.manual_seed(seed % 2**63)
        if self.graphs is None:
            loss = self.objective.loss(logits_of(self.model, batch), batch.target)
        else:
            loss = self.graphs(batch, scale=self._scale())
        self.losses.append(loss.detach())
        return loss

    def _scale(self) -> Tensor | None:
        """Return the factor of the gradients in "16-mixed"; None in other precisions."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return None if scaler is None else scaler.scale(torch.ones((), device=self.device))

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.graphs is None:  # with graphs, the gradients are already in `.grad`
            super().backward(loss, *args, **kwargs)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        if self.graphs is None:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the gradient of L1, unless a graph has added it."""
        if self.settings.l1 and self.graphs is None:
            add_l1(self.trained, self.settings.l1)

    def validation_step(self, batch: PatientBatch, index: int) -> None:
        self.validated.append((logits_of(self.model, batch), batch.target))

    def on_validation_epoch_end(self) -> None:
        """Compute the loss of all validation patients together, as Cox's loss needs them."""
        logits = torch.cat([logits for logits, _ in self.validated])
        targets = [target for _, target in self.validated]
        target = {name: torch.cat([part[name] for part in targets]) for name in targets[0]}
        self.validated.clear()
        history = self.history
        # Lightning validates inside the training epoch, at its end. The training losses are read
        # only here, since reading them waits for the GPU.
        losses = [
            _check_finite("training loss", loss) for loss in torch.stack(self.losses).tolist()
        ]
        loss = self.objective.loss(logits, target)
        self.log("validation_loss", loss)
        history.validation_loss.append(_check_finite("validation loss", loss.item()))
        history.train_loss.append(sum(losses) / self.steps)
        history.seconds.append(time.perf_counter() - self.started)
        if self.graphs is not None:
            history.without_graph = sorted({*history.without_graph, *self.graphs.fell_back})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["history"] = vars(self.history)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        vars(self.history).update(checkpoint["history"])


class _KeptWeights(Callback):
    """Keeps a copy of the last weights, or with a patience of those with the lowest loss.

    Of equal losses the first counts.
    """

    def __init__(
        self, history: History, patience: int | None, each_epoch: Callable[[History], None]
    ) -> None:
        self.history, self.patience, self.each_epoch = history, patience, each_epoch
        self.weights: dict[str, Any] = {}

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        losses = self.history.validation_loss
        if self.patience is None or losses.index(min(losses)) == len(losses) - 1:
            self.weights = deepcopy(pl_module.model.state_dict())
            self.history.best_epoch = len(losses)
        self.each_epoch(self.history)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.weights = state_dict["weights"]


class _SaveState(Callback):
    """Saves the state of the training after every epoch, in a file that is replaced atomically."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        # All processes must call `save_checkpoint`; only the first one writes. The partial file has
        # a fixed name, so that killed processes leave one such file at most.
        partial = self.path.with_name(f".{self.path.name}")
        with replacing(self.path, partial) if trainer.is_global_zero else nullcontext():
            trainer.save_checkpoint(partial)


def _read_state(path: Path) -> dict[str, Any] | None:
    """Return the state that `_SaveState` wrote; None if there is no file.

    Raises:
        ValueError: a file that cannot be read.
    """
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, UnpicklingError) as error:
        raise ValueError(f"{path}: cannot be read; remove it to start the fold anew") from error


def _has_ended(history: History, settings: Training) -> bool:
    """Return whether a resumed training is complete; Lightning would continue it all the same."""
    epochs = len(history.validation_loss)
    stopped = settings.patience is not None and epochs >= history.best_epoch + settings.patience
    return stopped or epochs >= settings.epochs


def rank() -> int:
    """Return the rank of this process under torchrun; only rank 0 writes files."""
    return int(os.environ.get("RANK", "0"))


def _return_batch(batch: Any) -> PatientBatch:
    """Collate nothing: `Patients.__getitems__` returns whole batches."""
    return batch


def _check_finite(name: str, loss: float) -> float:
    if not math.isfinite(loss):
        raise FloatingPointError(f"{name}: expected a finite number, got {loss}")
    return loss


@contextmanager
def _silence_lightning() -> Iterator[None]:
    """Suppress Lightning's hints about loggers, workers and devices."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            yield
    finally:
        logger.setLevel(level)
