"""A trained model together with its scaling, its objective and the scale of its risks."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .._atomic import write_text
from .calibration import Calibrations, fit_calibration
from .checkpoint import load, save
from .objectives import (
    FittedObjective,
    Objective,
    objective_from_config,
    objective_to_config,
)
from .patients import Patients
from .predictions import Predictions, RiskScale
from .preprocessing import BagSource, Scaling, scaling_from_config
from .training import predict_logits


@dataclass(frozen=True)
class Fitted:
    """A trained model with everything that predictions for new patients need.

    Args:
        model: HEALNet, LegoBlock, LegoMerge or LegoFuse, or a fitted baseline.
        scaling: of each modality, fitted on the training patients.
        objective: fitted on the training patients; of a baseline, on the patients of training and
            validation.
        scale: of the risks of the same patients; None for classes.
        grid: times of the survival curves; None for classes.
        calibrations: fitted on the validation patients; None in older files.
    """

    model: nn.Module
    scaling: dict[str, Scaling]
    objective: FittedObjective
    scale: RiskScale | None
    grid: NDArray[np.float64] | None
    calibrations: Calibrations | None = None

    @classmethod
    def finish(
        cls,
        model: nn.Module,
        scaling: dict[str, Scaling],
        objective: Objective,
        patients: Patients,
        outcome: tuple[NDArray[Any], ...],
        validation: Patients,
    ) -> Self:
        """Fit what needs a trained model: calibration, baseline hazard and the scale of the risks.

        Args:
            model: the trained model.
            scaling: the scaling of its inputs.
            objective: the objective it was trained for.
            patients: the training part.
            outcome: times and events, or labels, of the training part, [n] each.
            validation: the validation part, with targets.
        """

        def compute_logits(patients: Patients) -> NDArray[np.float64]:
            return predict_logits(model, patients).double().numpy()

        # A baseline hazard needs logits on their final scale; the offsets of the maps need it.
        logits = compute_logits(validation)
        first = fit_calibration(objective, logits, validation.target)
        objective = objective.fitted(torch.from_numpy(first.apply(logits)))
        calibrations = Calibrations.fit(objective, compute_logits, validation, [patients])
        calibrated = calibrations.apply(patients, compute_logits(patients))
        scale, grid = objective.risk_scale(torch.from_numpy(calibrated), *outcome)
        return cls(model, scaling, objective, scale, grid, calibrations)

    def patients(
        self, modalities: Mapping[str, pd.DataFrame | BagSource], ids: Sequence[str]
    ) -> Patients:
        """Return new patients, scaled as the training patients were."""
        return Patients.of(modalities, self.scaling, ids)

    def predict(self, patients: Patients) -> Predictions:
        """Predict scaled patients; an empty part gives empty predictions."""
        return self.objective.predictions(patients.ids, self.logits(patients), self.grid)

    def logits(self, patients: Patients) -> Tensor:
        """Return the calibrated logits [n, K], float64, of scaled patients."""
        if not len(patients):
            return torch.zeros(0, self.objective.out_features, dtype=torch.float64)
        logits = predict_logits(self.model, patients).double()
        if self.calibrations is None:
            return logits
        return torch.from_numpy(self.calibrations.apply(patients, logits.numpy()))

    def save(self, folder: Path) -> None:
        """Write model.safetensors, then fitted.json; a folder with both is complete."""
        save(self.model, folder / "model.safetensors")
        content = {
            "objective": objective_to_config(self.objective),
            "scale": None if self.scale is None else asdict(self.scale),
            "grid": None if self.grid is None else self.grid.tolist(),
            "calibrations": None if self.calibrations is None else self.calibrations.to_config(),
            "scaling": {name: asdict(fitted) for name, fitted in self.scaling.items()},
        }
        write_text(folder / "fitted.json", json.dumps(content))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: one of the two files is missing.
            ValueError: one of them is corrupt.
        """
        model = load(folder / "model.safetensors")
        path = folder / "fitted.json"
        try:
            content = json.loads(path.read_text())
            scale, grid = content["scale"], content["grid"]
            calibrations = content.get("calibrations")
            return cls(
                model,
                {name: scaling_from_config(config) for name, config in content["scaling"].items()},
                objective_from_config(content["objective"]),
                None if scale is None else RiskScale.from_config(scale),
                None if grid is None else np.asarray(grid),
                None if calibrations is None else Calibrations.from_config(calibrations),
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: corrupt, or of another version ({error})") from error
