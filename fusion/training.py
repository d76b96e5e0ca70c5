"""Train a model with Lightning: Adam, one cycle, early stopping that restores the best weights.

An epoch's order is drawn from (seed, epoch) and a step's dropout from (seed, step), so that a run
that was killed and resumed gives the very weights of one that was not. On one GPU the loss and the
gradients of a step are one CUDA graph (`StepGraphs`), and the host waits only at an epoch's end.
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
from .._checks import choice, integer, positive
from .graphs import StepGraphs, add_l1, logits_of
from .healnet import HEALNet
from .lego_block import LegoBlock
from .lego_fuse import LegoFuse
from .lego_merge import LegoMerge
from .objectives import Objective
from .patients import CACHE_BYTES, PatientBatch, Patients

PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")


@dataclass(frozen=True)
class Training:
    """How to train.

    Args:
        epochs: at most; the length of the one cycle.
        max_lr: its peak.
        batch_size: patients per step and process.
        patience: epochs without a lower validation loss after which training stops.
        l1: weight of `l1_penalty`.
        l2: weight decay of Adam.
        momentum: highest momentum of the cycle, at its ends; the lowest is 0.07 less.
        seed: of the patients' order and of dropout.
        precision: "32-true", "16-mixed" or "bf16-mixed", as Lightning calls them.
        workers: processes that read bags ahead.

    Raises:
        ValueError: an argument outside its range.
    """

    epochs: int = 50
    max_lr: float = 0.008
    batch_size: int = 8
    patience: int = 5
    l1: float = 0.0
    l2: float = 0.0
    momentum: float = 0.92
    seed: int = 0
    precision: str = "32-true"
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience"):
            integer(name, getattr(self, name))
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
    """What happened in training: losses and seconds per epoch, the best epoch (from 1)."""

    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    best_epoch: int = 0
    without_graph: list[str] = field(default_factory=list)
    """Why steps on a GPU ran without a CUDA graph; empty if none did, and on a CPU."""


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
    """Train `model` in place; leave it with the weights of the lowest validation loss, exactly.

    Under torchrun every process trains on its share of the patients (DDP); all end with the same
    weights and validation losses.

    Args:
        model: what is trained, on any device.
        objective: fitted on the training part.
        patients: the training part, with targets.
        validation: decides when to stop; with targets.
        settings: see `Training`.
        resume: a folder to keep the state in after every epoch, and to continue from if it holds
            one; emptied at the end.
        each_epoch: called after every epoch.

    Returns:
        The History.

    Raises:
        FloatingPointError: a loss of the epoch is not finite, in training or on validation.
        ValueError: nobody to train on or to validate with.
    """
    _check_not_empty(patients=patients, validation=validation)
    patients, validation = ready_for_gpu(patients, validation, settings)
    loader = _loader(patients, settings, share=True)
    # Validation runs whole on every process, so that all agree when to stop.
    checking = _loader(validation, settings, share=False)
    fit = _Fit(model, objective, settings, steps=len(loader))
    best = _BestWeights(fit.history, each_epoch)
    last = None if resume is None else resume / "last.ckpt"
    known = None if last is None else _kept(last)
    # Dropout draws from torch's global generators, which are left as they were found.
    with _quiet(), torch.random.fork_rng():
        trainer = _trainer(settings, best, last)
        if known is not None:
            fit.on_load_checkpoint(known)
            best.load_state_dict(known["callbacks"][best.state_key])
        if not (known is not None and _stopped(fit.history, settings)):
            at = None if known is None else str(last)
            try:
                trainer.fit(fit, loader, checking, ckpt_path=at, weights_only=True)
            except SystemExit as error:  # Lightning's answer to Ctrl-C and SIGTERM, which exits 0
                raise KeyboardInterrupt from error
    model.cpu()
    model.load_state_dict(best.weights)
    model.eval()
    if last is not None and not rank():
        last.unlink(missing_ok=True)
    return fit.history


def _check_not_empty(**parts: Patients) -> None:
    for name, part in parts.items():
        if not len(part):
            raise ValueError(f"{name}: expected at least 1, got 0")


def _world() -> int:
    """Return the number of processes under torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def graphs_for(model: nn.Module, objective: Objective, settings: Training) -> StepGraphs | None:
    """Return what computes steps; None, for torch's autograd, without a GPU or with several."""
    if _world() > 1 or not next(model.parameters()).is_cuda:
        return None
    if not isinstance(model, (HEALNet, LegoBlock, LegoMerge, LegoFuse)):
        return None
    return StepGraphs(model, objective.loss, l1=settings.l1)


def ready_for_gpu(
    patients: Patients, validation: Patients, settings: Training
) -> tuple[Patients, Patients]:
    """Return both with their DeviceBags; as they are where there is no GPU.

    Bags stay on the GPU as long as they take no more than a quarter and an eighth of what is free
    there. Processes that read ahead hand them out in main memory.
    """
    if not torch.cuda.is_available():
        return patients, validation
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    free = torch.cuda.mem_get_info(device)[0]
    rooms = free // 4, free // 8
    if settings.workers:
        device, rooms = torch.device("cpu"), (CACHE_BYTES, CACHE_BYTES)
    dtype = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(settings.precision)
    return tuple(
        part.ready_for(device, dtype or torch.float32, room)
        for part, room in zip((patients, validation), rooms, strict=True)
    )  # pyright: ignore[reportReturnType]


def _loader(patients: Patients, settings: Training, *, share: bool) -> DataLoader:
    """Read batches ahead; True for `share` hands out this process's share, in a drawn order."""
    sampler = None
    if share:
        sampler = DistributedSampler(patients, _world(), rank(), shuffle=True, seed=settings.seed)
    return DataLoader(
        patients,
        settings.batch_size,
        sampler=sampler,
        num_workers=settings.workers,
        persistent_workers=settings.workers > 0,  # they keep the bags that they have read
        collate_fn=_whole,
        pin_memory=torch.cuda.is_available(),  # for what is not on the GPU already
    )


def _trainer(settings: Training, best: "_BestWeights", last: Path | None) -> lightning.Trainer:
    """Return Lightning's trainer, which prints nothing and keeps its state in `last` alone."""
    world, local = _world(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    stop = EarlyStopping("validation_loss", patience=settings.patience, check_finite=False)
    # The last callback, so that the file holds the state of the others after the epoch.
    keep = [] if last is None else [_Keep(last)]
    return lightning.Trainer(
        accelerator="auto",
        devices=local,
        num_nodes=world // local,
        # A batch in which everyone misses a modality leaves its weights without gradient.
        strategy="ddp_find_unused_parameters_true" if world > 1 else "auto",
        precision=settings.precision,  # pyright: ignore[reportArgumentType]
        max_epochs=settings.epochs,
        callbacks=[best, stop, *keep],
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


@torch.no_grad()
def predict_logits(model: nn.Module, patients: Patients, *, batch_size: int = 16) -> Tensor:
    """Return the logits [n, K] of a model in evaluation mode, computed on a GPU where there is one.

    A patient's depend on nobody else: batches only save memory. The model stays where it is.
    """
    model.eval()
    _check_not_empty(patients=patients)
    home = next(model.parameters()).device
    there = torch.device("cuda") if torch.cuda.is_available() else home
    batches = DataLoader(patients, batch_size, collate_fn=_whole)
    model.to(there)
    try:
        return torch.cat([logits_of(model, batch.to(there)).cpu() for batch in batches])
    finally:
        model.to(home)


class _Fit(lightning.LightningModule):
    def __init__(
        self, model: nn.Module, objective: Objective, settings: Training, *, steps: int
    ) -> None:
        super().__init__()
        self.model, self.objective, self.settings = model, objective, settings
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.steps = steps
        self.history = History()
        self.checked: list[tuple[Tensor, dict[str, Tensor]]] = []
        self.losses: list[Tensor] = []
        self.started = 0.0
        self.graphs: StepGraphs | None = None

    def configure_optimizers(self) -> Any:
        own = self.settings
        self.graphs = graphs_for(self.model, self.objective, own)  # here the model has its device
        # Fused, but where autograd's loss is scaled: a fused step unscales, and L1 is added before.
        optimiser = torch.optim.Adam(
            self.parameters(), lr=own.max_lr, weight_decay=own.l2,
            fused=own.precision != "16-mixed" or self.graphs is not None,
        )  # fmt: skip
        cycle = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, own.max_lr, epochs=own.epochs, steps_per_epoch=self.steps,
            base_momentum=own.momentum - 0.07, max_momentum=own.momentum,
        )  # fmt: skip
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        self.losses, self.started = [], time.perf_counter()

    def training_step(self, batch: PatientBatch, index: int) -> Tensor:
        seed = (self.settings.seed * 1_000_003 + self.global_step) * 1_009 + self.global_rank
        torch.manual_seed(seed % 2**63)
        if self.graphs is None:
            loss = self.objective.loss(logits_of(self.model, batch), batch.target)
        else:
            loss = self.graphs(batch, scale=self._scale())
        self.losses.append(loss.detach())
        return loss

    def _scale(self) -> Tensor | None:
        """Return what the gradients are to be multiplied by for float16; None for nothing."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return None if scaler is None else scaler.scale(torch.ones((), device=self.device))

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.graphs is None:  # otherwise the gradients are there already, and new ones
            super().backward(loss, *args, **kwargs)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        if self.graphs is None:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Add L1's gradient where it is not in the graph."""
        if self.settings.l1 and self.graphs is None:
            add_l1(self.trained, self.settings.l1)

    def validation_step(self, batch: PatientBatch, index: int) -> None:
        self.checked.append((logits_of(self.model, batch), batch.target))

    def on_validation_epoch_end(self) -> None:
        """Take the loss over all patients at once: that of Cox needs them together."""
        logits = torch.cat([logits for logits, _ in self.checked])
        target = {
            name: torch.cat([part[name] for _, part in self.checked]) for name in self.checked[0][1]
        }
        self.checked.clear()
        history = self.history
        # Validation is the end of an epoch: Lightning runs it inside the training epoch. Only here
        # the losses are read, for which a GPU has to finish.
        losses = [_finite("training loss", loss) for loss in torch.stack(self.losses).tolist()]
        loss = self.objective.loss(logits, target)
        self.log("validation_loss", loss)
        history.validation_loss.append(_finite("validation loss", loss.item()))
        history.train_loss.append(sum(losses) / self.steps)
        history.seconds.append(time.perf_counter() - self.started)
        if self.graphs is not None:
            history.without_graph = sorted({*history.without_graph, *self.graphs.fell_back})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["history"] = vars(self.history)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        vars(self.history).update(checkpoint["history"])


class _BestWeights(Callback):
    """Remembers the weights of the lowest validation loss."""

    def __init__(self, history: History, each_epoch: Callable[[History], None]) -> None:
        self.history, self.each_epoch = history, each_epoch
        self.weights: dict[str, Any] = {}

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        losses = self.history.validation_loss
        if losses[-1] == min(losses) and losses.index(losses[-1]) == len(losses) - 1:
            self.weights = deepcopy(pl_module.model.state_dict())
            self.history.best_epoch = len(losses)
        self.each_epoch(self.history)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.weights = state_dict["weights"]


class _Keep(Callback):
    """Keeps the state after every epoch, in a file that is replaced whole."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        first = trainer.is_global_zero  # it alone writes; the others take part
        partial = self.path.with_name(f".{self.path.name}")  # one name: a kill leaves one file
        with replacing(self.path, partial) if first else nullcontext():
            trainer.save_checkpoint(partial)


def _kept(path: Path) -> dict[str, Any] | None:
    """Return the state that a run left behind, if it did.

    Raises:
        ValueError: a file that cannot be read.
    """
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, UnpicklingError) as error:
        raise ValueError(f"{path}: cannot be read; without it, the fold starts anew") from error


def _stopped(history: History, settings: Training) -> bool:
    """Return whether training had come to its end: Lightning would resume it all the same."""
    epochs = len(history.validation_loss)
    return epochs >= min(settings.epochs, history.best_epoch + settings.patience)


def rank() -> int:
    """Return this process's number under torchrun, where the first one alone writes files."""
    return int(os.environ.get("RANK", "0"))


def _whole(batch: Any) -> PatientBatch:
    return batch


def _finite(name: str, loss: float) -> float:
    if not math.isfinite(loss):
        raise FloatingPointError(f"{name}: expected a finite number, got {loss}")
    return loss


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's advice (loggers, workers, devices) off the user's terminal."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            yield
    finally:
        logger.setLevel(level)
