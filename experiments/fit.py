"""Fit a network, joined blocks or a baseline on one fold, and predict its test part."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..fusion.baselines.cross_validation import FittingData
from ..fusion.baselines.fit import FitBaseline, features_of, flatten
from ..fusion.encoders import ABMIL, SNN
from ..fusion.fitted import Fitted
from ..fusion.healnet import HEALNet
from ..fusion.lego_block import LegoBlock
from ..fusion.modalities import Tabular
from ..fusion.patients import modalities_of
from ..fusion.predictions import Predictions, RiskScale
from ..fusion.training import History, Training, train
from .fold import Fold
from .settings import Settings

EachEpoch = Callable[[History], None]


@dataclass(frozen=True)
class FoldResult:
    """The result of one fold.

    Args:
        predictions: of the test part.
        scale: of the risks of the patients the model was fitted to; None for classes.
        parameters: number of trained parameters; of trees, of numbers that describe them.
        fitted: the model with its scaling and objective.
        history: of the training; empty for models that are not trained in epochs.
    """

    predictions: Predictions
    scale: RiskScale | None
    parameters: int
    fitted: Fitted
    history: History = field(default_factory=History)

    def facts(self) -> dict[str, Any]:
        """Return the content of `done.json`, except for the time and the sizes of files."""
        grid = self.predictions.grid
        return {
            "parameters": self.parameters,
            "history": asdict(self.history),
            "cut": None if self.scale is None else self.scale.cut,
            "tertiles": None if self.scale is None else self.scale.tertiles,
            "grid": None if grid is None else grid.tolist(),
        }


def fold_seed(seed: int, number: int) -> int:
    """Return the seed of a fold: different for every fold, the same in every run."""
    return seed * 1_009 + number


def build_network(fold: Fold, settings: Settings) -> nn.Module:
    """Return HEALNet for the modalities of a fold, with new weights."""
    options = dict(settings.model)
    tokens = options.pop("tokens", "row")
    shapes = {
        name: replace(shape, tokens=tokens) if isinstance(shape, Tabular) else shape
        for name, shape in modalities_of(fold.scaling).items()
    }
    torch.manual_seed(fold_seed(settings.training.seed, fold.number))
    return HEALNet(shapes, out_features=fold.objective.out_features, **options)


def build_block(fold: Fold, settings: Settings) -> nn.Module:
    """Return a LegoBlock for the one modality of a fold, with new weights."""
    options = dict(settings.model)
    (shape,) = modalities_of(fold.scaling).values()
    encoders = options.pop("encoders", None)
    if encoders not in (None, "paper"):
        raise ValueError(f"--set encoders: expected null or paper, got {encoders!r}")
    torch.manual_seed(fold_seed(settings.training.seed, fold.number))
    encoder = None
    if encoders == "paper":
        kind = SNN if isinstance(shape, Tabular) else ABMIL
        encoder = kind(shape.channels)
    return LegoBlock(shape, encoder, out_features=fold.objective.out_features, **options)


def fit_network(
    model: nn.Module, fold: Fold, training: Training, folder: Path, each_epoch: EachEpoch
) -> FoldResult:
    """Train a model on a fold, then predict its test part.

    Args:
        model: the model with its initial weights; it is trained in place.
        fold: the patients.
        training: settings of the training, with the seed of the run.
        folder: the state of the training is saved there after every epoch, and resumed from there.
        each_epoch: called after every epoch.

    Raises:
        ValueError: no patient to train on or to validate with.
    """
    _check_parts(fold)
    folder.mkdir(parents=True, exist_ok=True)
    history = train(
        model,
        fold.objective,
        fold.train.patients,
        fold.validation.patients,
        replace(training, seed=fold_seed(training.seed, fold.number)),
        resume=folder,
        each_epoch=each_epoch,
    )
    return finish_network(model, fold, history)


def finish_network(model: nn.Module, fold: Fold, history: History) -> FoldResult:
    """Fit what needs a trained model (`Fitted.finish`), and predict the test part of its fold."""
    train = fold.train
    fitted = Fitted.finish(
        model, fold.scaling, fold.objective, train.patients, train.outcome, fold.validation.patients
    )
    parameters = sum(p.numel() for p in model.parameters())
    predictions = fitted.predict(fold.test.patients)
    return FoldResult(predictions, fitted.scale, parameters, fitted, history)


def fit_baseline(fit: FitBaseline, fold: Fold, seed: int) -> FoldResult:
    """Fit a baseline to the training and validation parts of a fold, then predict its test part.

    Args:
        fit: fits the baseline; one of those of the task.
        fold: the patients.
        seed: seed of the run.

    Raises:
        ValueError: patients to whom the baseline cannot be fitted.
    """
    _check_parts(fold)
    features, parts = features_of(fold.scaling), (fold.train, fold.validation)
    x = np.concatenate([flatten(features, part.patients) for part in parts])
    outcome = tuple(np.concatenate(each) for each in zip(*(p.outcome for p in parts), strict=True))
    groups = np.concatenate([part.groups for part in parts])
    data = FittingData(x, outcome, groups, fold_seed(seed, fold.number))
    model, objective = fit(features, data, fold.objective)
    scale, grid = objective.risk_scale(model.logits(torch.from_numpy(x)), *outcome)
    fitted = Fitted(model, fold.scaling, objective, scale, grid)
    parameters = sum(p.numel() for p in model.parameters())
    return FoldResult(fitted.predict(fold.test.patients), scale, parameters, fitted)


def _check_parts(fold: Fold) -> None:
    for name, part in (("train", fold.train), ("validation", fold.validation)):
        if not len(part.patients):
            raise ValueError(f"no patient in its {name} part has {' or '.join(fold.scaling)}")
