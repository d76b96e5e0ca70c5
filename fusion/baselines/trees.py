"""Forests and gradient boosting: fitted with scikit-learn and scikit-survival, kept as arrays.

Of a tree, the splits and the values of its leaves are kept. A leaf of a survival forest has a
cumulative hazard at every time of its patients; kept are what predictions need, its risk and its
survival curve at the times of the curves (33 numbers).
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
from sksurv.ensemble import GradientBoostingSurvivalAnalysis, RandomSurvivalForest
from sksurv.util import Surv

from .cross_validation import (
    FittingData,
    Floats,
    choose,
    log_likelihood_score,
    partial_likelihood_score,
)
from .features import FlatFeatures
from .models import TreeEnsemble

TREES = 500
# Boosting: slow learning by small trees, each of half the patients and of some features.
BOOSTING: dict[str, Any] = {
    "learning_rate": 0.05, "n_estimators": 200, "max_depth": 3, "min_samples_leaf": 5,
    "subsample": 0.5, "max_features": "sqrt",
}  # fmt: skip


def survival_forest(features: FlatFeatures, data: FittingData, grid: Floats) -> TreeEnsemble:
    """Fit a random survival forest (Ishwaran et al. 2008).

    Args:
        features: of the patients.
        data: the patients.
        grid: times of the survival curves, [G].

    Returns:
        A model whose logits are the risk (the sum of the cumulative hazard over the event times),
        then S(t) at the times `grid`.
    """
    forest = RandomSurvivalForest(
        TREES, min_samples_leaf=10, max_features="sqrt", n_jobs=-1, random_state=data.seed
    )
    times, events = data.outcome
    forest.fit(data.x, Surv.from_arrays(events, times))
    steps = np.searchsorted(forest.unique_times_, grid, side="right")

    def read_leaf(values: Floats) -> Floats:
        hazard, survival = values[:, forest.is_event_time_, 0], values[..., 1]
        survival = np.concatenate([np.ones((len(survival), 1)), survival], axis=1)
        return np.concatenate([hazard.sum(1, keepdims=True), survival[:, steps]], axis=1) / TREES

    trees = ((each.tree_, read_leaf) for each in forest.estimators_)
    return stack_trees(features, trees, np.zeros(1 + len(grid)))


def class_forest(features: FlatFeatures, data: FittingData) -> TreeEnsemble:
    """Fit a random forest; the logits are the logarithms of its probabilities."""
    forest = RandomForestClassifier(
        TREES, min_samples_leaf=3, max_features="sqrt", n_jobs=-1, random_state=data.seed
    ).fit(data.x, data.outcome[0])

    def read_leaf(values: Floats) -> Floats:
        return values[:, 0] / values[:, 0].sum(1, keepdims=True) / TREES

    trees = ((each.tree_, read_leaf) for each in forest.estimators_)
    return stack_trees(features, trees, np.zeros(len(forest.classes_)), log=True)


def survival_boosting(features: FlatFeatures, data: FittingData) -> TreeEnsemble:
    """Fit Cox's model by gradient boosting, the logit is the log hazard ratio.

    The number of trees is that of the best cross-validated partial likelihood.
    """

    def fit(part: FittingData, trees: int | None = None) -> GradientBoostingSurvivalAnalysis:
        settings = BOOSTING if trees is None else {**BOOSTING, "n_estimators": trees}
        times, events = part.outcome
        model = GradientBoostingSurvivalAnalysis(**settings, random_state=data.seed)
        return model.fit(part.x, Surv.from_arrays(events, times))

    def fit_numbers(part: FittingData) -> Callable[[Floats], Floats]:
        model = fit(part)
        return lambda x: np.stack([*model.staged_predict(x)])

    chosen = choose(data, fit_numbers, partial_likelihood_score, "gradient boosting")
    model = fit(data, chosen + 1)
    return _of_boosting(features, model, np.zeros(1))


def class_boosting(features: FlatFeatures, data: FittingData) -> TreeEnsemble:
    """Fit gradient boosting of the log loss; the number of trees has the best cross-validated one.

    Raises:
        ValueError: a single class.
    """
    labels = data.outcome[0]
    classes = int(labels.max()) + 1

    def fit(part: FittingData, trees: int | None = None) -> GradientBoostingClassifier:
        settings = BOOSTING if trees is None else {**BOOSTING, "n_estimators": trees}
        model = GradientBoostingClassifier(**settings, random_state=data.seed)
        return model.fit(part.x, part.outcome[0])

    def fit_numbers(part: FittingData) -> Callable[[Floats], Floats]:
        model = fit(part)

        def predict(x: Floats) -> Floats:
            probabilities = np.zeros((model.n_estimators, len(x), classes))
            for stage, of_stage in zip(probabilities, model.staged_predict_proba(x), strict=True):
                stage[:, np.asarray(model.classes_)] = of_stage
            return probabilities

        return predict

    chosen = choose(data, fit_numbers, log_likelihood_score, "gradient boosting")
    model = fit(data, chosen + 1)
    return _of_boosting(features, model, np.zeros(classes))


def _of_boosting(features: FlatFeatures, model: Any, zeros: Floats) -> TreeEnsemble:
    """Return the arrays of boosted trees; two classes have one column of trees, of the second."""
    width, rate = len(zeros), model.learning_rate
    columns = [1] if width == 2 else range(width)

    def reader(column: int) -> Callable[[Floats], Floats]:
        return lambda values: rate * values[:, 0] * (np.arange(width) == column)

    trees = (
        (tree.tree_, reader(column))
        for stage in model.estimators_
        for column, tree in zip(columns, stage, strict=True)
    )
    ensemble = stack_trees(features, trees, zeros)
    if width > 1:  # the logits before the first tree, which are those of one row less its trees
        row = np.zeros((1, features.width))
        start = model.decision_function(row) - ensemble.logits(torch.from_numpy(row)).numpy()[
            :, columns
        ].reshape(np.shape(model.decision_function(row)))
        ensemble.offset.data[list(columns)] = torch.from_numpy(start.reshape(-1))
    return ensemble


def stack_trees(
    features: FlatFeatures,
    trees: Iterable[tuple[Any, Callable[[Floats], Floats]]],
    offset: Floats,
    *,
    log: bool = False,
) -> TreeEnsemble:
    """Return the arrays of several trees.

    Args:
        features: of the patients.
        trees: trees of scikit-learn (`tree_`); each with the function from the values of its leaves
            [leaves, ...] to rows [leaves, V].
        offset: added to the sums of leaves, [V].
        log: whether the sums are probabilities, of which the logits are the logarithms.
    """
    arrays: dict[str, list[NDArray[Any]]] = {
        name: [] for name in ("feature", "threshold", "left", "right", "leaf", "values", "root")
    }
    nodes = leaves = depth = 0
    for tree, read_leaf in trees:
        is_leaf = tree.children_left < 0
        itself = np.arange(tree.node_count)
        arrays["feature"].append(np.where(is_leaf, 0, tree.feature))
        arrays["threshold"].append(np.where(is_leaf, 0.0, tree.threshold))
        for name in ("left", "right"):
            children = getattr(tree, f"children_{name}")
            arrays[name].append(nodes + np.where(is_leaf, itself, children))
        arrays["leaf"].append(np.where(is_leaf, leaves + is_leaf.cumsum() - 1, 0))
        arrays["values"].append(read_leaf(tree.value[is_leaf]))
        arrays["root"].append(np.array([nodes]))
        nodes, leaves = nodes + tree.node_count, leaves + int(is_leaf.sum())
        depth = max(depth, int(tree.max_depth))
    model = TreeEnsemble(
        features,
        trees=len(arrays["root"]),
        nodes=nodes,
        leaves=leaves,
        outputs=len(offset),
        depth=depth,
        log=log,
    )
    for name, parts in arrays.items():
        parameter = getattr(model, name)
        parameter.data = torch.from_numpy(np.concatenate(parts)).to(parameter.dtype)
    model.offset.data = torch.from_numpy(offset)
    return model
