"""The settings of a run: model, training, goal, and how the cohort is split."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, NamedTuple

from .._checks import integer
from ..fusion.healnet import HEALNet
from ..fusion.lego_block import LegoBlock
from ..fusion.training import Training

BASELINES = ("cox", "coxnet", "rsf", "logistic", "forest", "boosting")
MODELS = ("healnet", "lego", *BASELINES)

# Widths, depths and rates of dropout were chosen on the validation parts of tcga_blca, tcga_kirp,
# hancock_os and breast_cancer, among about 20 settings of HEALNet and 30 of LegoBlocks; most of
# them do not differ by more than chance. That HEALNet trains all epochs, its max_lr and its
# modality dropout were chosen on out-of-fold figures of the same cohorts, which are therefore a
# little optimistic for these settings.
DEFAULTS: dict[str, dict[str, Any]] = {
    "healnet": {
        "num_latents": 16, "latent_dim": 32, "depth": 2, "heads": 1, "head_dim": 16,
        "attn_dropout": 0.5, "ff_dropout": 0.5, "epochs": 20, "max_lr": 0.002, "batch_size": 16,
        "modality_dropout": 0.2, "l2": 1e-2,
    },
    "lego": {
        "num_latents": 16, "latent_dim": 16, "depth": 2, "heads": 8, "head_dim": 16,
        "attn_dropout": 0.1, "ff_dropout": 0.5, "epochs": 20, "max_lr": 0.002, "batch_size": 32,
        "patience": 5, "l1": 1e-4, "l2": 1e-2,
    },
    "fuse": {"epochs": 2, "max_lr": 0.002, "batch_size": 16, "modality_dropout": 0.2, "l2": 1e-2},
}  # fmt: skip


class Explained(NamedTuple):
    """What explanations explain.

    Args:
        title: of the axis of a picture, with the unit.
        label: index of the class; None for survival.
    """

    title: str
    label: int | None


@dataclass(frozen=True)
class Goal:
    """What to train for.

    Args:
        loss: "nll" (discrete time) or "cox" for survival, "cross_entropy" for classes; None for
            "nll" or "cross_entropy", as fits the cohort.
        bins: number of time bins of "nll".
        alpha: alpha of `nll_loss`.
        weighted: weight bins or classes by the inverse of their size.
    """

    loss: str | None = None
    bins: int = 4
    alpha: float = 0.0
    weighted: bool = False

    def check(self, losses: tuple[str, ...]) -> None:
        """Raise a ValueError unless every setting is in its range and the loss in `losses`."""
        if self.loss is not None and self.loss not in losses:
            raise ValueError(f"--set loss: expected {' or '.join(losses)}, got {self.loss!r}")
        if not isinstance(self.alpha, int | float) or not 0 <= self.alpha <= 1:
            raise ValueError(f"--set alpha: expected a number in [0, 1], got {self.alpha!r}")
        integer("--set bins", self.bins, 2)
        if not isinstance(self.weighted, bool):
            raise ValueError(f"--set weighted: expected true or false, got {self.weighted!r}")


@dataclass(frozen=True)
class Splits:
    """How to draw the splits of a cohort without split files; see `motet.fusion.splits.split`."""

    count: int = 5
    test: float = 0.15
    validation: float = 0.15
    seed: int = 0


@dataclass(frozen=True)
class Settings:
    """The settings of a model, its training and its goal: `DEFAULTS`, changed by `--set`."""

    model: dict[str, Any]
    training: Training
    goal: Goal

    @classmethod
    def of(cls, kind: str, changes: Mapping[str, Any], *, seed: int) -> "Settings":
        """Return the defaults of a model with some changes.

        Raises:
            ValueError: an unknown setting, or a value outside its range.
        """
        options = _find_model_options(kind)
        training = {f.name for f in fields(Training)} - {"seed"}
        training -= {"modality_dropout"} if kind == "lego" else set()  # a block has one modality
        goal = {f.name for f in fields(Goal)}
        allowed = set(options)
        allowed |= training if kind in DEFAULTS else set()
        allowed |= goal if kind in ("healnet", "lego") else set()
        for name in changes:
            if name not in allowed:
                close = get_close_matches(name, allowed, 1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ValueError(f"--set: unknown setting {name!r} of {kind}{hint}")
            if not isinstance(changes[name], str | int | float | None):
                raise ValueError(f"--set {name}: expected a number or a word, got {changes[name]}")
        values = {**DEFAULTS.get(kind, {}), **changes}

        def select(names: set[str]) -> dict[str, Any]:
            return {name: value for name, value in values.items() if name in names}

        return cls(select(options), Training(**select(training), seed=seed), Goal(**select(goal)))


def _find_model_options(kind: str) -> set[str]:
    """Return the names of the arguments of a model that a user may set."""
    builder = {"healnet": HEALNet, "lego": LegoBlock}.get(kind)
    if builder is None:
        return set()
    options = set(inspect.signature(builder).parameters)
    options -= {"modalities", "modality", "encoder", "encoder_dim", "out_features"}
    return options | ({"tokens"} if kind == "healnet" else {"encoders"})
