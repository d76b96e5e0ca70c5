"""The baselines by name, and what each is fitted with."""

from collections.abc import Callable, Mapping

import numpy as np
import torch

from ..objectives import Classification, CoxSurvival, FittedObjective, Objective, SurvivalCurves
from ..patients import Patients
from ..predictions import time_grid
from ..preprocessing import Scaling, TableScaling
from .cox import elastic_net_cox, ridge_cox
from .cross_validation import FittingData, Floats
from .features import BagColumns, FlatFeatures
from .logistic import logistic_regression
from .models import FlatModel
from .trees import class_boosting, class_forest, survival_boosting, survival_forest

Fit = Callable[[FlatFeatures, FittingData], FlatModel]
FitBaseline = Callable[[FlatFeatures, FittingData, Objective], tuple[FlatModel, FittedObjective]]
"""Fits a baseline for the objective of a fold; returns what its logits mean, too."""

_BATCH = 16  # patients whose bags are in memory together


def features_of(scaling: Mapping[str, Scaling]) -> FlatFeatures:
    """Return how the modalities of scaled patients become one row."""
    tables, bags = {}, {}
    for name, fitted in scaling.items():
        if isinstance(fitted, TableScaling):
            tables[name] = len(fitted.features)
            continue
        flag = {feature: len(fitted.kept) + i for i, feature in enumerate(fitted.flagged)}
        bags[name] = BagColumns(
            width=len(fitted.features),
            values=tuple(range(len(fitted.kept))),
            flags=tuple(flag.get(feature, -1) for feature in fitted.kept),
            coords=fitted.coords,
        )
    return FlatFeatures(tables, bags)


def flatten(features: FlatFeatures, patients: Patients) -> Floats:
    """Return all features of some patients as rows, [n, P]; `patients` may be empty."""
    rows = [np.zeros((0, features.width))]
    for start in range(0, len(patients), _BATCH):
        batch = patients.__getitems__(range(start, min(start + _BATCH, len(patients))))
        inputs, options = batch.arguments()
        flat = features.flatten(inputs, options["present"], options["coords"])
        rows.append(flat.numpy())
    return np.concatenate(rows)


def _cox(fit: Fit) -> FitBaseline:
    """Return the fit of a model whose logit is a log hazard ratio, with Breslow's baseline."""

    def fit_with_hazard(
        features: FlatFeatures, data: FittingData, objective: Objective
    ) -> tuple[FlatModel, FittedObjective]:
        model = fit(features, data)
        logits = model.logits(torch.from_numpy(data.x))
        return model, CoxSurvival().with_breslow(logits, *data.outcome)

    return fit_with_hazard


def _survival_forest(
    features: FlatFeatures, data: FittingData, objective: Objective
) -> tuple[FlatModel, FittedObjective]:
    grid = time_grid(data.outcome[0])
    return survival_forest(features, data, grid), SurvivalCurves(tuple(grid.tolist()))


def _classes(fit: Fit) -> FitBaseline:
    """Return the fit of a model whose logits are those of classes."""

    def fit_classes(
        features: FlatFeatures, data: FittingData, objective: Objective
    ) -> tuple[FlatModel, FittedObjective]:
        labels, classes = data.outcome[0], objective.out_features
        classification = Classification.fit(labels, classes=classes, weighted=False)
        return fit(features, data), classification

    return fit_classes


SURVIVAL_BASELINES: dict[str, FitBaseline] = {
    "cox": _cox(ridge_cox),
    "coxnet": _cox(elastic_net_cox),
    "rsf": _survival_forest,
    "boosting": _cox(survival_boosting),
}
CLASS_BASELINES: dict[str, FitBaseline] = {
    "logistic": _classes(logistic_regression),
    "forest": _classes(class_forest),
    "boosting": _classes(class_boosting),
}
