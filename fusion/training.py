"""Train a survival model on tensors in memory: Adam, one-cycle, early stopping on validation."""

import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .losses import l1_penalty, nll_loss


@dataclass(frozen=True)
class Patients:
    """Patients of one part of a split, as tensors.

    Args:
        inputs: modality name to tensor [n, ...].
        bins: int64 [n], the bin of each follow-up time.
        events: bool [n], True if the event was observed.
        present: modality name to bool [n]; a name left out is present throughout.
    """

    inputs: dict[str, Tensor]
    bins: Tensor
    events: Tensor
    present: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.bins)

    def take(self, rows: Tensor) -> "Patients":
        """Return the patients at the given rows."""
        return Patients(
            {name: x[rows] for name, x in self.inputs.items()},
            self.bins[rows],
            self.events[rows],
            {name: there[rows] for name, there in self.present.items()},
        )


@dataclass
class History:
    """What happened in training: losses per epoch, the best epoch (from 1), seconds."""

    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    best_epoch: int = 0
    seconds: float = 0.0


def train(
    model: nn.Module,
    forward: Callable[[Patients], Tensor],
    patients: Patients,
    validation: Patients,
    *,
    epochs: int = 50,
    max_lr: float = 0.008,
    batch_size: int = 32,
    patience: int = 5,
    alpha: float = 0.4,
    l1: float = 0.0,
    l2: float = 0.0,
    seed: int = 0,
) -> History:
    """Train `model` in place by the discrete-time likelihood; leave it with its best weights.

    Bin weights are inverse to the bins' sizes among the training patients, as in the authors' code.
    The best weights are those of the lowest validation loss, restored exactly.

    Args:
        model: what is trained.
        forward: logits [n, K] of some patients.
        patients: the training part.
        validation: decides when to stop.
        epochs: at most; training stops after `patience` epochs without a better one.
        max_lr: peak of the one-cycle schedule of Adam.
        batch_size: patients per step.
        patience: see `epochs`.
        alpha: of `nll_loss`.
        l1: weight of `l1_penalty`.
        l2: weight decay.
        seed: of the order of the patients and of dropout.

    Returns:
        The History.

    Raises:
        FloatingPointError: the loss is not finite, in training or on validation.
        ValueError: no patients to train on or to validate with, or no batch size.
    """
    started = time.perf_counter()
    for name, value in (
        ("patients", len(patients)),
        ("validation", len(validation)),
        ("batch_size", batch_size),
        ("epochs", epochs),
    ):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    model.eval()
    with torch.no_grad():
        classes = forward(patients.take(torch.arange(1))).shape[1]
    weights = 1.0 / torch.bincount(patients.bins, minlength=classes).clamp_min(1)
    optimiser = torch.optim.Adam(model.parameters(), lr=max_lr, weight_decay=l2)
    steps = -(-len(patients) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr, epochs=epochs, steps_per_epoch=steps, base_momentum=0.85,
        max_momentum=0.92,
    )  # fmt: skip

    def loss_of(part: Patients) -> Tensor:
        return nll_loss(forward(part), part.bins, part.events, alpha=alpha, weights=weights)

    history = History()
    best, best_loss = deepcopy(model.state_dict()), float("inf")
    # Dropout draws from torch's global generator, which is left as it was found.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for epoch in range(1, epochs + 1):
            model.train()
            total = 0.0
            for rows in torch.randperm(len(patients)).split(batch_size):
                loss = loss_of(patients.take(rows))
                _check_finite("training loss", loss.item())
                total += loss.item() * len(rows)
                optimiser.zero_grad()
                (loss + l1 * l1_penalty(model) if l1 else loss).backward()
                optimiser.step()
                schedule.step()
            model.eval()
            with torch.no_grad():
                validation_loss = loss_of(validation).item()
            _check_finite("validation loss", validation_loss)
            history.train_loss.append(total / len(patients))
            history.validation_loss.append(validation_loss)
            if validation_loss < best_loss:
                best, best_loss = deepcopy(model.state_dict()), validation_loss
                history.best_epoch = epoch
            elif epoch - history.best_epoch >= patience:
                break
    model.load_state_dict(best)
    model.eval()
    history.seconds = time.perf_counter() - started
    return history


def _check_finite(name: str, loss: float) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(f"{name}: expected a finite number, got {loss}")
