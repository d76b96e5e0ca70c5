"""A trained model with all that was fitted beside it: scaling, objective, what its risks mean."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from .._atomic import write_text
from .checkpoint import load, save
from .objectives import (
    Classification,
    Objective,
    objective_from_config,
    objective_to_config,
)
from .patients import Patients
from .preprocessing import BagSource, Scaling, scaling_from_config
from .training import predict_logits

# Times at which survival curves are given, evenly up to the longest training follow-up.
GRID = 32


@dataclass(frozen=True)
class Predictions:
    """What a model says of some patients: risks and curves, or probabilities.

    Args:
        ids: [n].
        risk: [n], higher is worse; None for classes.
        curves: [n, G], S(t) at the times `grid`; None for classes.
        grid: [G]; None for classes.
        probabilities: [n, K]; None for survival.
    """

    ids: tuple[str, ...]
    risk: NDArray[np.float64] | None = None
    curves: NDArray[np.float64] | None = None
    grid: NDArray[np.float64] | None = None
    probabilities: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class RiskScale:
    """The risks of the training patients: their middle and spread, to place new ones among them.

    Args:
        cut: median, above which a patient counts as high risk.
        mean: mean.
        sd: standard deviation.
    """

    cut: float
    mean: float
    sd: float

    @classmethod
    def fit(cls, risks: NDArray[np.float64]) -> Self:
        """Learn from the risks [n] of the training patients."""
        return cls(float(np.median(risks)), float(risks.mean()), max(float(risks.std()), 1e-12))


def time_grid(times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the times at which curves are given, from the training follow-up."""
    return np.linspace(0.0, float(times.max()), GRID + 1)[1:]


@dataclass(frozen=True)
class Fitted:
    """A trained model, ready for new patients.

    Args:
        model: HEALNet, LegoBlock, LegoMerge or LegoFuse.
        scaling: by modality, fitted on the training patients.
        objective: likewise.
        scale: of the training patients' risks; None for classes.
        grid: times of the curves; None for classes.
    """

    model: nn.Module
    scaling: dict[str, Scaling]
    objective: Objective
    scale: RiskScale | None
    grid: NDArray[np.float64] | None

    @classmethod
    def finish(
        cls,
        model: nn.Module,
        scaling: dict[str, Scaling],
        objective: Objective,
        patients: Patients,
        outcome: tuple[NDArray[Any], ...],
    ) -> Self:
        """Learn, after training, what the logits of the training patients say.

        Args:
            model: trained.
            scaling: as the model's inputs were scaled.
            objective: as the model was trained for.
            patients: the training part.
            outcome: times and events, or labels, [n] each.
        """
        logits = predict_logits(model, patients)
        objective = objective.fitted(logits, *outcome)
        if isinstance(objective, Classification):
            return cls(model, scaling, objective, None, None)
        scale = RiskScale.fit(objective.risk(logits))
        return cls(model, scaling, objective, scale, time_grid(outcome[0]))

    def patients(
        self, modalities: Mapping[str, pd.DataFrame | BagSource], ids: Sequence[str]
    ) -> Patients:
        """Scale new patients as the training patients were."""
        return Patients.of(modalities, self.scaling, ids)

    def predict(self, patients: Patients) -> Predictions:
        """Predict scaled patients; there may be none."""
        logits = torch.zeros(0, self.objective.out_features)
        if len(patients):
            logits = predict_logits(self.model, patients)
        if isinstance(self.objective, Classification):
            probabilities = self.objective.probabilities(logits)
            return Predictions(patients.ids, probabilities=probabilities)
        assert self.grid is not None
        curves = self.objective.curves(logits, self.grid)
        return Predictions(patients.ids, self.objective.risk(logits), curves, self.grid)

    def save(self, folder: Path) -> None:
        """Write model.safetensors and, complete only after it, fitted.json."""
        save(self.model, folder / "model.safetensors")
        content = {
            "objective": objective_to_config(self.objective),
            "scale": None if self.scale is None else asdict(self.scale),
            "grid": None if self.grid is None else self.grid.tolist(),
            "scaling": {name: asdict(how) for name, how in self.scaling.items()},
        }
        write_text(folder / "fitted.json", json.dumps(content))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: one of the two files is not there.
            ValueError: one of them is corrupt.
        """
        model = load(folder / "model.safetensors")
        path = folder / "fitted.json"
        try:
            content = json.loads(path.read_text())
            scale, grid = content["scale"], content["grid"]
            return cls(
                model,
                {name: scaling_from_config(how) for name, how in content["scaling"].items()},
                objective_from_config(content["objective"]),
                None if scale is None else RiskScale(**scale),
                None if grid is None else np.asarray(grid),
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: corrupt, or of another version ({error})") from error
