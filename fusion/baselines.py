"""The models to beat, on the features that the networks get: linear ones and forests.

Tables are joined; a bag counts by the mean of its tokens, without their coordinates; each modality
adds a column that says whether a patient has it. Penalties are chosen on the validation part.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sksurv.ensemble import RandomSurvivalForest
from sksurv.linear_model import CoxPHSurvivalAnalysis
from sksurv.util import Surv

from .patients import Patients
from .predictions import ClassPredictions, RiskScale, SurvivalPredictions
from .survival import concordance_index

Outcome = tuple[NDArray[np.float64], NDArray[np.bool_]]
"""Times and events, [n] each."""
Labels = NDArray[np.int64]

PENALTIES = (1, 10, 100, 1000, 10000)
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
TREES = 500


@dataclass(frozen=True)
class SurvivalBaseline:
    """A fitted survival model on flat features."""

    risk: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    """Features [n, P] to risks [n]."""
    curves: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
    """Features [n, P] and times [G] to S(t) [n, G]."""
    parameters: int

    def predictions(self, patients: Patients, grid: NDArray[np.float64]) -> SurvivalPredictions:
        """Predict some patients, with curves at the times `grid` [G]; there may be none."""
        if not len(patients):
            return SurvivalPredictions((), np.zeros(0), np.zeros((0, len(grid))), grid)
        x = flat(patients)
        return SurvivalPredictions(patients.ids, self.risk(x), self.curves(x, grid), grid)

    def scale(self, train: Patients) -> RiskScale:
        """Return the scale of the training patients' risks."""
        return RiskScale.fit(self.risk(flat(train)))


@dataclass(frozen=True)
class ClassBaseline:
    """A fitted classifier on flat features."""

    probabilities: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    """Features [n, P] to probabilities [n, K]."""
    classes: int
    """K."""
    parameters: int

    def predictions(self, patients: Patients) -> ClassPredictions:
        """Predict some patients; there may be none."""
        if not len(patients):
            return ClassPredictions((), np.zeros((0, self.classes)))
        return ClassPredictions(patients.ids, self.probabilities(flat(patients)))


def flat(patients: Patients) -> NDArray[np.float64]:
    """Return all modalities of some patients side by side, [n, P]."""
    parts = []
    for name, table in patients.tables.items():
        parts += [table.double(), patients.present[name].double()[:, None]]
    for bags in patients.bags.values():
        rows = []
        for patient in patients.ids:
            tokens = bags[patient][0].double()
            there = tokens.new_tensor([float(len(tokens) > 0)])
            mean = tokens.mean(0) if len(tokens) else tokens.new_zeros(tokens.shape[1])
            rows.append(torch.cat([mean, there]))
        parts.append(torch.stack(rows))
    return torch.cat(parts, dim=1).numpy()


def ridge_cox(
    train: Patients, outcome: Outcome, validation: Patients, held: Outcome
) -> SurvivalBaseline:
    """Fit Cox's model with a ridge penalty, chosen by the concordance on validation.

    The penalty does not change under rotation, so the model is fitted on the principal axes of the
    training patients, of which there are at most as many as patients: the same model, in
    milliseconds for thousands of features.
    """
    x = flat(train)
    centre = x.mean(0)
    axes = np.linalg.svd(x - centre, full_matrices=False)[2].T

    def turned(features: NDArray[np.float64]) -> NDArray[np.float64]:
        return (features - centre) @ axes

    features, held_features = turned(x), turned(flat(validation))
    times, events = outcome
    best, best_c = None, -1.0
    for penalty in PENALTIES:
        cox = CoxPHSurvivalAnalysis(alpha=penalty, ties="efron", n_iter=200)
        with np.errstate(over="ignore"):  # Newton's steps overshoot, and are halved
            cox.fit(features, Surv.from_arrays(events, times))
        c = concordance_index(*held, cox.predict(held_features))
        if c > best_c:
            best, best_c = cox, c
    assert best is not None
    chosen = best
    return SurvivalBaseline(
        lambda features: np.asarray(chosen.predict(turned(features)), float),
        lambda features, grid: _steps(chosen.predict_survival_function(turned(features)), grid),
        x.shape[1],
    )


def survival_forest(train: Patients, outcome: Outcome, seed: int) -> SurvivalBaseline:
    """Fit a random survival forest (Ishwaran et al. 2008)."""
    forest = RandomSurvivalForest(
        TREES, min_samples_leaf=10, max_features="sqrt", n_jobs=-1, random_state=seed
    )
    times, events = outcome
    forest.fit(flat(train), Surv.from_arrays(events, times))
    return SurvivalBaseline(
        lambda features: np.asarray(forest.predict(features), float),
        lambda features, grid: _steps(forest.predict_survival_function(features), grid),
        _nodes(forest),
    )


def logistic(
    train: Patients, labels: Labels, validation: Patients, held_labels: Labels
) -> ClassBaseline:
    """Fit (multinomial) logistic regression, the ridge penalty chosen by log loss on validation."""
    x, held = flat(train), flat(validation)
    classes = np.unique(labels)
    best, best_loss = None, np.inf
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=5000).fit(x, labels)
        loss = log_loss(held_labels, model.predict_proba(held), labels=classes)
        if loss < best_loss:
            best, best_loss = model, loss
    assert best is not None
    parameters = best.coef_.size + best.intercept_.size
    return ClassBaseline(best.predict_proba, len(classes), parameters)


def class_forest(train: Patients, labels: Labels, seed: int) -> ClassBaseline:
    """Fit a random forest."""
    forest = RandomForestClassifier(
        TREES, min_samples_leaf=3, max_features="sqrt", n_jobs=-1, random_state=seed
    ).fit(flat(train), labels)
    return ClassBaseline(forest.predict_proba, len(forest.classes_), _nodes(forest))


def _steps(functions: Any, grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """Read step functions at the times `grid`; 1 before their first step, flat after the last."""
    first = functions[0]
    values = np.column_stack([np.ones(len(functions)), [f.y for f in functions]])
    return values[:, np.searchsorted(first.x, grid, side="right")]


def _nodes(forest: Any) -> int:
    return sum(tree.tree_.node_count for tree in forest.estimators_)
