"""Baselines on the same scaled features as the networks: linear models and forests.

All features of a patient form one row: the columns of every table, the mean of the tokens of every
bag (without coordinates), and for each modality a column that is 1 if the patient has it. Penalties
are chosen on the validation part.
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

TimesAndEvents = tuple[NDArray[np.float64], NDArray[np.bool_]]
"""Times [n] and events [n] of some patients."""
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
        """Predict patients, with curves at the times `grid` [G]; `patients` may be empty."""
        if not len(patients):
            return SurvivalPredictions((), np.zeros(0), np.zeros((0, len(grid))), grid)
        x = flatten(patients)
        return SurvivalPredictions(patients.ids, self.risk(x), self.curves(x, grid), grid)

    def scale(self, train: Patients) -> RiskScale:
        """Return the scale of the training patients' risks."""
        return RiskScale.fit(self.risk(flatten(train)))


@dataclass(frozen=True)
class ClassBaseline:
    """A fitted classifier on flat features."""

    probabilities: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    """Features [n, P] to probabilities [n, K]."""
    classes: int
    """K."""
    parameters: int

    def predictions(self, patients: Patients) -> ClassPredictions:
        """Predict patients; `patients` may be empty."""
        if not len(patients):
            return ClassPredictions((), np.zeros((0, self.classes)))
        return ClassPredictions(patients.ids, self.probabilities(flatten(patients)))


def flatten(patients: Patients) -> NDArray[np.float64]:
    """Return all features of some patients as rows, [n, P]."""
    parts = []
    for name, table in patients.tables.items():
        parts += [table.double(), patients.present[name].double()[:, None]]
    for bags in patients.bags.values():
        rows = []
        for patient in patients.ids:
            tokens = bags[patient][0].double()
            has_tokens = tokens.new_tensor([float(len(tokens) > 0)])
            mean = tokens.mean(0) if len(tokens) else tokens.new_zeros(tokens.shape[1])
            rows.append(torch.cat([mean, has_tokens]))
        parts.append(torch.stack(rows))
    return torch.cat(parts, dim=1).numpy()


def ridge_cox(
    train: Patients,
    outcome: TimesAndEvents,
    validation: Patients,
    validation_outcome: TimesAndEvents,
) -> SurvivalBaseline:
    """Fit Cox's model with a ridge penalty, chosen by the concordance on validation.

    A ridge penalty does not change if the features are rotated. So the model is fitted on the
    principal axes of the training patients, which are at most as many as patients: it is the same
    model, and takes milliseconds for thousands of features.
    """
    x = flatten(train)
    centre = x.mean(0)
    axes = np.linalg.svd(x - centre, full_matrices=False)[2].T

    def rotate(features: NDArray[np.float64]) -> NDArray[np.float64]:
        return (features - centre) @ axes

    features, validation_features = rotate(x), rotate(flatten(validation))
    times, events = outcome
    best, best_c = None, -1.0
    for penalty in PENALTIES:
        cox = CoxPHSurvivalAnalysis(alpha=penalty, ties="efron", n_iter=200)
        with np.errstate(over="ignore"):  # Newton steps overshoot and are then halved
            cox.fit(features, Surv.from_arrays(events, times))
        c = concordance_index(*validation_outcome, cox.predict(validation_features))
        if c > best_c:
            best, best_c = cox, c
    assert best is not None
    model = best
    return SurvivalBaseline(
        lambda features: np.asarray(model.predict(rotate(features)), float),
        lambda features, grid: _read_steps(model.predict_survival_function(rotate(features)), grid),
        x.shape[1],
    )


def survival_forest(train: Patients, outcome: TimesAndEvents, seed: int) -> SurvivalBaseline:
    """Fit a random survival forest (Ishwaran et al. 2008)."""
    forest = RandomSurvivalForest(
        TREES, min_samples_leaf=10, max_features="sqrt", n_jobs=-1, random_state=seed
    )
    times, events = outcome
    forest.fit(flatten(train), Surv.from_arrays(events, times))
    return SurvivalBaseline(
        lambda features: np.asarray(forest.predict(features), float),
        lambda features, grid: _read_steps(forest.predict_survival_function(features), grid),
        _count_nodes(forest),
    )


def logistic(
    train: Patients, labels: Labels, validation: Patients, validation_labels: Labels
) -> ClassBaseline:
    """Fit (multinomial) logistic regression, the ridge penalty chosen by log loss on validation."""
    x, validation_features = flatten(train), flatten(validation)
    classes = np.unique(labels)
    best, best_loss = None, np.inf
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=5000).fit(x, labels)
        loss = log_loss(validation_labels, model.predict_proba(validation_features), labels=classes)
        if loss < best_loss:
            best, best_loss = model, loss
    assert best is not None
    parameters = best.coef_.size + best.intercept_.size
    return ClassBaseline(best.predict_proba, len(classes), parameters)


def class_forest(train: Patients, labels: Labels, seed: int) -> ClassBaseline:
    """Fit a random forest."""
    forest = RandomForestClassifier(
        TREES, min_samples_leaf=3, max_features="sqrt", n_jobs=-1, random_state=seed
    ).fit(flatten(train), labels)
    return ClassBaseline(forest.predict_proba, len(forest.classes_), _count_nodes(forest))


def _read_steps(functions: Any, grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return step functions at the times `grid`: 1 before their first step, then its values."""
    first = functions[0]
    values = np.column_stack([np.ones(len(functions)), [f.y for f in functions]])
    return values[:, np.searchsorted(first.x, grid, side="right")]


def _count_nodes(forest: Any) -> int:
    return sum(tree.tree_.node_count for tree in forest.estimators_)
