"""Baselines: equal to other implementations, kept as arrays, fitted to training and validation."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import motet
import numpy as np
import pandas as pd
import pytest
import torch
from motet import experiments
from motet.experiments.fold import Fold
from motet.experiments.settings import BASELINES, Goal
from motet.experiments.task import task_of
from motet.fusion.baselines import cox, cross_validation, trees
from motet.fusion.baselines.cross_validation import FittingData
from motet.fusion.baselines.features import BagColumns, FlatFeatures
from motet.fusion.baselines.fit import CLASS_BASELINES, SURVIVAL_BASELINES, flatten
from motet.fusion.baselines.models import LinearModel
from motet.fusion.baselines.partial_likelihood import PartialLikelihood
from motet.fusion.objectives import CoxSurvival
from motet.fusion.predictions import SurvivalPredictions, time_grid
from motet.fusion.splits import draw_folds
from motet.fusion.survival import breslow_hazard
from motet.io import Bags, Classes, Cohort, Split, Survival
from sksurv.linear_model import CoxPHSurvivalAnalysis
from sksurv.linear_model.coxph import BreslowEstimator, CoxPHOptimizer
from sksurv.util import Surv

ROWS = 90


def survival_data(columns: int, *, rows: int = ROWS, ties: bool = True) -> FittingData:
    """Return patients whose first two columns act on the hazard; a third is censored."""
    generator = np.random.default_rng(columns)
    x = generator.normal(size=(rows, columns))
    times = generator.exponential(np.exp(-x[:, 0] + 0.5 * x[:, 1]))
    ends = generator.exponential(2.0, rows)
    events, times = times <= ends, np.minimum(times, ends)
    if ties:
        times = times.round(1) + 0.1
    return FittingData(x, (times, events), np.arange(rows), 0)


def features(columns: int) -> FlatFeatures:
    """Return the features of a table; its flag is the last of the columns."""
    return FlatFeatures({"omic": columns - 1}, {})


def sksurv_likelihood(data: FittingData, beta: np.ndarray) -> float:
    """Return scikit-survival's log partial likelihood."""
    times, events = data.outcome
    none = np.zeros(data.x.shape[1])
    optimizer = CoxPHOptimizer(data.x, events, times, none, "efron")
    return -optimizer.nlog_likelihood(beta) * len(times)


@pytest.mark.parametrize("ties", [True, False])
def test_the_partial_likelihood_is_scikit_survivals(ties: bool) -> None:
    data = survival_data(4, ties=ties)
    times, events = data.outcome
    beta = np.random.default_rng(1).normal(size=4)
    likelihood = PartialLikelihood.of(times, events)
    expected = sksurv_likelihood(data, beta)
    assert likelihood.values((data.x @ beta)[None])[0] == pytest.approx(expected, abs=1e-10)
    # A shift changes nothing, also where exponentials overflow.
    assert likelihood.values((data.x @ beta + 1e4)[None])[0] == pytest.approx(expected, abs=1e-7)
    optimizer = CoxPHOptimizer(data.x, events, times, np.zeros(4), "efron")
    optimizer.update(beta)
    derivatives = likelihood.derivatives(data.x @ beta)
    gradient, information = data.x.T @ derivatives.gradient, derivatives.information(data.x)
    np.testing.assert_allclose(gradient, -ROWS * optimizer.gradient, atol=1e-10)
    np.testing.assert_allclose(information, ROWS * optimizer.hessian, atol=1e-10)


@pytest.mark.parametrize("columns", [5, 2 * ROWS])
@pytest.mark.parametrize("penalty", [5, 50])
def test_ridge_cox_is_scikit_survivals(columns: int, penalty: int) -> None:
    """Coefficients, likelihood and curves, with ties, with fewer and more columns than patients."""
    data = survival_data(columns)
    times, events = data.outcome
    other = CoxPHSurvivalAnalysis(alpha=penalty, ties="efron", n_iter=200, tol=1e-14)
    other.fit(data.x, Surv.from_arrays(events, times))

    axes = cox.OrthonormalAxes.of(data.x)
    beta = cox.fit_ridge(axes.rotate(data.x), PartialLikelihood.of(times, events), penalty)
    model = axes.linear_model(features(columns), beta[None])
    coefficients = model.weight[0].numpy()
    np.testing.assert_allclose(coefficients, other.coef_, atol=1e-8)
    likelihood = PartialLikelihood.of(times, events).values((data.x @ coefficients)[None])[0]
    assert likelihood == pytest.approx(sksurv_likelihood(data, other.coef_), abs=1e-8)

    new = np.random.default_rng(2).normal(size=(7, columns))
    objective = CoxSurvival().with_breslow(model.logits(torch.from_numpy(data.x)), times, events)
    grid = time_grid(times)
    curves = objective.curves(model.logits(torch.from_numpy(new)), grid)
    functions: Any = other.predict_survival_function(new)
    expected = [[f(min(max(t, f.x[0]), f.x[-1])) for t in grid] for f in functions]
    np.testing.assert_allclose(curves, expected, atol=1e-8)


def test_the_penalty_has_the_best_cross_validated_likelihood(monkeypatch: Any) -> None:
    """Σ over folds of l(β; all) - l(β; without the fold), with β fitted without it."""
    monkeypatch.setattr(cox, "PENALTIES", (1000, 30, 1))
    data = survival_data(40)
    fold = draw_folds(data.groups, data.outcome[1], count=cross_validation.FOLDS, seed=0)
    scores = []
    for penalty in cox.PENALTIES:
        score = 0.0
        for number in range(cross_validation.FOLDS):
            kept = data.select(fold != number)
            times, events = kept.outcome
            other = CoxPHSurvivalAnalysis(alpha=penalty, ties="efron", tol=1e-12, n_iter=200)
            beta = other.fit(kept.x, Surv.from_arrays(events, times)).coef_
            score += sksurv_likelihood(data, beta) - sksurv_likelihood(kept, beta)
        scores.append(score)
    assert max(scores) > min(scores) + 0.1
    chosen = cox.PENALTIES[int(np.argmax(scores))]
    times, events = data.outcome
    refitted = CoxPHSurvivalAnalysis(alpha=chosen, ties="efron", tol=1e-14, n_iter=200)
    refitted.fit(data.x, Surv.from_arrays(events, times))
    model = cox.ridge_cox(features(40), data)
    np.testing.assert_allclose(model.weight[0].numpy(), refitted.coef_, atol=1e-8)


def test_fits_that_do_not_converge_are_rejected(monkeypatch: Any) -> None:
    data = survival_data(40)
    likelihood = PartialLikelihood.of(*data.outcome)
    assert np.isfinite(cox.fit_ridge(data.x, likelihood, 1.0)).all()
    monkeypatch.setattr(cox, "STEPS", 1)
    assert np.isnan(cox.fit_ridge(data.x, likelihood, 1.0)).all()
    with pytest.raises(ValueError, match="no ridge Cox model could be fitted: none of the 13"):
        cox.ridge_cox(features(40), data)

    def fit(part: FittingData) -> Callable[[np.ndarray], np.ndarray]:
        return lambda x: np.stack([np.full(len(x), np.nan), np.zeros(len(x)), x[:, 0]])

    score = cross_validation.partial_likelihood_score
    assert cross_validation.choose(data, fit, score, "model") == 2


@pytest.mark.parametrize("scale", [1.0, 1e5])
def test_curves_are_finite_and_fall(scale: float) -> None:
    """Also of patients far from all others, and for hazard ratios that overflow."""
    data = survival_data(3 * ROWS)
    times, events = data.outcome
    model = cox.ridge_cox(features(3 * ROWS), data)
    model.weight.data *= scale
    objective = CoxSurvival().with_breslow(model.logits(torch.from_numpy(data.x)), times, events)
    assert np.isfinite(objective.hazard).all()
    assert (np.diff(objective.hazard) >= 0).all()
    new = np.concatenate([data.x, -1e3 * data.x])
    curves = objective.curves(model.logits(torch.from_numpy(new)), time_grid(times))
    assert ((curves >= 0) & (curves <= 1)).all()  # NaN is neither
    assert (np.diff(curves, axis=1) <= 0).all()


def test_breslows_hazard_is_scikit_survivals() -> None:
    times, events = survival_data(3).outcome
    ratios = np.random.default_rng(0).normal(size=ROWS)
    other: Any = BreslowEstimator().fit(ratios, events, times).cum_baseline_hazard_
    at, hazard = breslow_hazard(ratios, times, events)
    np.testing.assert_allclose(hazard, other(at), rtol=1e-12)
    assert set(at) == set(times[events])


def test_the_elastic_net_leaves_out_columns_and_covers_every_fold(monkeypatch: Any) -> None:
    data = survival_data(30, rows=200)
    penalties = cox._fit_net(data, n_alphas=50, alpha_min_ratio=0.05).penalties
    kept = data.select(np.arange(200) % 5 > 0)
    path = cox._fit_path(kept, penalties)
    assert path.shape == (len(penalties), 30)
    for row in (3, 20, len(penalties) - 1):
        other = cox._fit_net(kept, alphas=[penalties[row]]).coefficients[0]
        np.testing.assert_allclose(path[row], other, atol=1e-3)
    weight = cox.elastic_net_cox(features(30), data).weight[0].numpy()
    assert (weight[:2] != 0).all()
    assert (weight == 0).sum() > 5

    # Penalties at which it does not converge are NaN, and never chosen.
    monkeypatch.setattr(cox, "NET_STEPS", 40)
    path = cox._fit_path(kept, penalties)
    failed = np.isnan(path).any(1)
    assert failed[-1]
    assert not failed[:3].any()
    assert np.isfinite(cox.elastic_net_cox(features(30), data).weight.numpy()).all()


# Trees


def test_a_survival_forest_of_arrays_is_scikit_survivals(monkeypatch: Any) -> None:
    monkeypatch.setattr(trees, "TREES", 20)
    from sksurv.ensemble import RandomSurvivalForest

    data = survival_data(8)
    times, events = data.outcome
    grid = time_grid(times)
    model = trees.survival_forest(features(8), data, grid)
    forest = RandomSurvivalForest(20, min_samples_leaf=10, max_features="sqrt", random_state=0)
    forest.fit(data.x, Surv.from_arrays(events, times))
    x = np.random.default_rng(1).normal(size=(50, 8))
    logits = model.logits(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(logits[:, 0], forest.predict(x), rtol=1e-12)
    curves: Any = forest.predict_survival_function(x)
    expected = [[1.0 if t < f.x[0] else f(min(t, f.x[-1])) for t in grid] for f in curves]
    np.testing.assert_allclose(logits[:, 1:], expected, rtol=1e-12)


@pytest.mark.parametrize("classes", [2, 3])
def test_class_trees_of_arrays_are_scikit_learns(classes: int, monkeypatch: Any) -> None:
    from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier

    monkeypatch.setattr(trees, "TREES", 20)
    monkeypatch.setattr(trees, "BOOSTING", {**trees.BOOSTING, "n_estimators": 12})
    data = survival_data(6)
    labels = np.digitize(data.x[:, 0], [0.0, 1.0])[: len(data.x)].clip(max=classes - 1)
    data = replace(data, outcome=(labels,))
    x = np.random.default_rng(1).normal(size=(50, 6))
    x[:10] = data.x[:10]  # beside thresholds, where rounding to float32 decides

    forest = RandomForestClassifier(
        20, min_samples_leaf=3, max_features="sqrt", random_state=0
    ).fit(data.x, labels)
    logits = trees.class_forest(features(6), data).logits(torch.from_numpy(x))
    expected = forest.predict_proba(x)
    np.testing.assert_allclose(logits.softmax(1), expected, rtol=1e-12, atol=1e-15)

    model = trees.class_boosting(features(6), data)
    count = model.config["trees"] // (1 if classes == 2 else classes)
    settings = {**trees.BOOSTING, "n_estimators": count}
    boosted = GradientBoostingClassifier(**settings, random_state=0).fit(data.x, labels)
    logits = model.logits(torch.from_numpy(x))
    np.testing.assert_allclose(logits.softmax(1), boosted.predict_proba(x), rtol=1e-12)


def test_survival_boosting_of_arrays_is_scikit_survivals(monkeypatch: Any) -> None:
    from sksurv.ensemble import GradientBoostingSurvivalAnalysis

    monkeypatch.setattr(trees, "BOOSTING", {**trees.BOOSTING, "n_estimators": 25})
    data = survival_data(6)
    times, events = data.outcome
    model = trees.survival_boosting(features(6), data)
    settings = {**trees.BOOSTING, "n_estimators": model.config["trees"]}
    boosted = GradientBoostingSurvivalAnalysis(**settings, random_state=0)
    boosted.fit(data.x, Surv.from_arrays(events, times))
    x = np.random.default_rng(1).normal(size=(50, 6))
    logits = model.logits(torch.from_numpy(x))[:, 0]
    np.testing.assert_allclose(logits, boosted.predict(x), rtol=1e-12, atol=1e-14)


# Features and folds


def test_summaries_of_bags() -> None:
    """Means, minima, maxima and last values are those of the tokens that have the feature."""
    # Two features; where the first is missing, the third column is 1.
    tokens = torch.tensor(
        [[1.0, 5.0, 0.0], [3.0, 7.0, 0.0], [0.0, 6.0, 1.0], [0.0, 9.0, 1.0]], dtype=torch.float32
    )
    offsets = torch.tensor([0, 3, 3, 4])
    times = torch.tensor([[2.0], [1.0], [3.0], [0.0]])
    bag = BagColumns(3, (0, 1), (2, -1), coords=0)
    means = [[2.0, 6.0, 1 / 3, 1.0], [0.0, 0.0, 0.0, 0.0], [0.0, 9.0, 1.0, 1.0]]
    np.testing.assert_allclose(bag.summarise(tokens, offsets, None), means)
    series = replace(bag, coords=1)
    summaries = series.summarise(tokens, offsets, times).numpy()
    assert summaries.shape == (3, series.summaries) == (3, 10)
    np.testing.assert_allclose(summaries[:, :3], np.array(means)[:, :3])
    expected = [[1, 5, 3, 7, 1, 6, 1], [0] * 7, [0, 9, 0, 9, 0, 9, 1]]
    np.testing.assert_allclose(summaries[:, 3:], expected)


def test_folds_keep_groups_and_strata() -> None:
    groups, strata = np.repeat(np.arange(50), 2), np.arange(100) % 20 < 4
    fold = draw_folds(groups, strata, count=5, seed=0)
    assert (fold[::2] == fold[1::2]).all()
    assert np.bincount(fold).tolist() == [20] * 5
    assert np.bincount(fold, strata).tolist() == [4] * 5
    assert set(draw_folds([0, 1, 2], [0, 0, 1], count=5, seed=0)) == {0, 1, 2}
    with pytest.raises(ValueError, match="expected at least 2 for a cross-validation, got 1"):
        draw_folds([0, 0], [0, 1], count=5, seed=0)


# Complete runs


def planted(kind: str) -> Cohort:
    """Return 160 patients with a table and a time series, which both tell the outcome."""
    generator = np.random.default_rng(5)
    rows = 160
    ids = tuple(f"{i:03}" for i in range(rows))
    signal = generator.normal(size=(rows, 2))
    table = np.column_stack([signal[:, 0], generator.normal(size=(rows, 6))])
    frame = pd.DataFrame(table, pd.Index(ids), [f"c{i}" for i in range(7)])
    bags = {}
    for i, patient in enumerate(ids):
        if i % 16 == 15:  # ten lack it
            continue
        tokens = generator.normal(size=(4, 2)).astype(np.float32)
        tokens[-1, 0] = signal[i, 1]  # the last value tells
        bags[patient] = (tokens, np.arange(4, dtype=np.float32)[:, None])
    hazard = 1.5 * signal.sum(1)
    if kind == "survival":
        times = generator.exponential(np.exp(-hazard)) + 1e-3
        ends = generator.exponential(3.0, rows)
        outcome = Survival(np.minimum(times, ends), times <= ends, "years")
    else:
        labels = (hazard + 0.3 * generator.normal(size=rows) > 0).astype(np.int64)
        outcome = Classes(labels, ("no", "yes"))
    modalities = {"omic": frame, "labs": Bags(bags, features=2, coords=1, names=("a", "b"))}
    splits = (Split(ids[:90], ids[90:115], ids[115:]),)
    return Cohort("planted", ids, ids, outcome, modalities, splits)


CASES = [("survival", name) for name in SURVIVAL_BASELINES]
CASES += [("classes", name) for name in CLASS_BASELINES]


@pytest.fixture
def few_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "TREES", 60)
    monkeypatch.setattr(trees, "BOOSTING", {**trees.BOOSTING, "n_estimators": 60})


@pytest.mark.usefixtures("few_trees")
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_baseline_learns_what_is_planted_and_is_kept(
    kind: str, name: str, tmp_path: Path
) -> None:
    cohort = planted(kind)
    run = experiments.train_run(cohort, name, tmp_path / "run")
    metrics = experiments.read_metrics(run)
    value = metrics["harrell_c" if kind == "survival" else "auc"]["value"]
    assert value > (0.85 if kind == "classes" else 0.7 if name == "rsf" else 0.75)
    if kind == "survival":
        assert metrics["integrated_brier"]["scaled"] > 0.1

    # The kept model predicts what was written.
    fitted = run.fitted(0)
    ids = tuple(run.predictions()["patient"])
    predictions = fitted.predict(fitted.patients(cohort.modalities, ids))
    table = run.task.predictions_table(predictions).set_index("patient")
    written = run.predictions().set_index("patient").drop(columns="fold")
    np.testing.assert_allclose(table, written, rtol=1e-12, atol=1e-15)
    assert (run.fold(0) / "model.safetensors").read_bytes()[:9].endswith(b"{")  # JSON, no pickle
    assert motet.load(run.fold(0) / "model.safetensors").config == fitted.model.config

    # Patients who lack a modality, and those who lack the other.
    only = experiments.predict_cohort(
        run, replace(cohort, modalities={"omic": cohort.modalities["omic"]}, outcome=None)
    )
    numbers = only.select_dtypes(float).to_numpy()
    assert np.isfinite(numbers).all()
    assert len(numbers) == len(cohort)


@pytest.mark.slow
@pytest.mark.usefixtures("few_trees")
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_same_seed_gives_the_same_bytes(kind: str, name: str, tmp_path: Path) -> None:
    cohort = planted(kind)
    runs = [experiments.train_run(cohort, name, tmp_path / each) for each in ("one", "two")]
    for file in ("model.safetensors", "fitted.json", "predictions.csv"):
        one, two = ((run.fold(0) / file).read_bytes() for run in runs)
        assert one == two


def test_every_baseline_has_a_name_of_the_command_line() -> None:
    assert set(BASELINES) == {*SURVIVAL_BASELINES, *CLASS_BASELINES}
    assert set(task_of(planted("survival")).baselines) == set(SURVIVAL_BASELINES)


def test_a_baseline_is_fitted_to_training_and_validation() -> None:
    """Without the validation part the coefficients differ; the test part changes nothing."""
    cohort = planted("survival")
    ids = cohort.patients
    split = Split(ids[:80], ids[80:120], ids[120:])
    fold = Fold.learn(cohort, ["omic"], split, 0, Goal())
    result = experiments.fit.fit_baseline(SURVIVAL_BASELINES["cox"], fold, 0)
    shown = replace(split, test=ids[120:140])
    other = Fold.learn(cohort, ["omic"], shown, 0, Goal())
    same = experiments.fit.fit_baseline(SURVIVAL_BASELINES["cox"], other, 0)
    fewer = replace(split, validation=ids[80:100])
    third = Fold.learn(cohort, ["omic"], fewer, 0, Goal())
    less = experiments.fit.fit_baseline(SURVIVAL_BASELINES["cox"], third, 0)
    weights = [cast_linear(each.fitted.model).weight.numpy() for each in (result, same, less)]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert np.abs(weights[0] - weights[2]).max() > 1e-4
    # The scale of the risks is that of training and validation together.
    assert isinstance(result.predictions, SurvivalPredictions)
    risks = np.concatenate(
        [result.fitted.predict(part.patients).risk for part in (fold.train, fold.validation)]  # pyright: ignore
    )
    assert result.scale is not None
    assert result.scale.cut == pytest.approx(np.median(risks), abs=1e-12)
    features_of_test = flatten(cast_linear(result.fitted.model).features, fold.test.patients)
    assert features_of_test.shape == (40, 8)


def cast_linear(model: Any) -> LinearModel:
    assert isinstance(model, LinearModel)
    return model


# Folds that fail


def test_a_failing_fold_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort = replace(planted("survival"), splits=None)
    fits: list[int] = []
    fit = SURVIVAL_BASELINES["cox"]

    def fails(number: int, error: Exception) -> Callable[..., Any]:
        def fit_or_fail(features: FlatFeatures, data: FittingData, objective: Any) -> Any:
            fits.append(data.seed)
            if data.seed == number:  # seed 0 · 1009 + number of the fold
                raise error
            return fit(features, data, objective)

        return fit_or_fail

    def train() -> experiments.Run:
        splits = experiments.Splits(3, test=0.3)
        return experiments.train_run(cohort, "cox", tmp_path / "run", splits=splits)

    monkeypatch.setitem(SURVIVAL_BASELINES, "cox", fails(1, RuntimeError("the library\ngave up")))
    with pytest.raises(ValueError, match=r"run: 1 of 3 folds failed; fold 2: RuntimeError: the "
                       r"library gave up \(the same command tries only"):  # fmt: skip
        train()
    assert fits == [0, 1, 2]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "fold 2/3 failed: RuntimeError: the library gave up" in log
    assert "Traceback" in log
    assert not (tmp_path / "run" / "metrics.json").exists()
    with pytest.raises(ValueError, match="incomplete, fold 2 of 3 is not done"):
        experiments.Run.finished(tmp_path / "run")

    fits.clear()
    monkeypatch.setitem(SURVIVAL_BASELINES, "cox", fails(-1, ValueError()))
    run = train()
    assert fits == [1]  # only the one that had failed
    assert run.predictions()["fold"].nunique() == 3


def test_folds_that_fail_alike_are_told_once(tmp_path: Path, monkeypatch: Any) -> None:
    def fail(features: FlatFeatures, data: FittingData, objective: Any) -> Any:
        raise np.linalg.LinAlgError("singular")

    monkeypatch.setitem(SURVIVAL_BASELINES, "cox", fail)
    with pytest.raises(ValueError, match="3 of 3 folds failed; folds 1, 2, 3: singular"):
        experiments.train_run(
            replace(planted("survival"), splits=None),
            "cox",
            tmp_path / "run",
            splits=experiments.Splits(3),
        )


def test_an_error_in_the_code_ends_the_run(tmp_path: Path, monkeypatch: Any) -> None:
    def fail(features: FlatFeatures, data: FittingData, objective: Any) -> Any:
        raise TypeError("a bug")

    monkeypatch.setitem(SURVIVAL_BASELINES, "cox", fail)
    with pytest.raises(TypeError, match="a bug"):
        experiments.train_run(planted("survival"), "cox", tmp_path / "run")
