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
from .objectives import Objective, objective_from_config, objective_to_config
from .patients import Patients
from .predictions import Predictions, RiskScale
from .preprocessing import BagSource, Scaling, scaling_from_config
from .training import predict_logits


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
        scale, grid = objective.reference(logits, *outcome)
        return cls(model, scaling, objective, scale, grid)

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
        return self.objective.predictions(patients.ids, logits, self.grid)

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
