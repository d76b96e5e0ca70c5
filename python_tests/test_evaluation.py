"""Evaluation equals scikit-survival, scikit-learn and plain loops; intervals cover the truth."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from motet.fusion.concordance import concordance, harrell_pairs
from motet.fusion.evaluation import (
    compare_classes,
    compare_survival,
    evaluate_classes,
    evaluate_survival,
)
from motet.fusion.held_out import ClassFold, SurvivalFold
from motet.fusion.reliability import survival_calibration
from motet.fusion.resampling import (
    Resampling,
    complement_of_ratio,
    resample,
    resampled_mean,
)
from scipy.stats import kstest, norm
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    brier_score_loss,
    roc_auc_score,
)
from sksurv.compare import compare_survival as log_rank
from sksurv.datasets import load_gbsg2, load_whas500
from sksurv.linear_model import CoxPHSurvivalAnalysis
from sksurv.metrics import (
    brier_score,
    concordance_index_censored,
    concordance_index_ipcw,
    cumulative_dynamic_auc,
    integrated_brier_score,
)
from sksurv.nonparametric import (
    CensoringDistributionEstimator,
    SurvivalFunctionEstimator,
    kaplan_meier_estimator,
)
from sksurv.preprocessing import OneHotEncoder
from sksurv.util import Surv

from .conftest import SOAK, data_path


def hancock() -> tuple[pd.DataFrame, np.ndarray]:
    target, clinical, pathological = (
        pd.read_csv(data_path("data", "hancock", f"{name}.csv"), index_col="patient_id")
        for name in ("targets", "clinical", "pathological")
    )
    table = clinical.join(pathological).select_dtypes("number")
    outcome = Surv.from_arrays(
        target["survival_status"] == "deceased", target["days_to_last_information"]
    )
    return table.fillna(table.median()), outcome


COHORTS = {"gbsg2": load_gbsg2, "whas500": load_whas500, "hancock": hancock}


def halves(name: str) -> tuple[SurvivalFold, np.ndarray, np.ndarray]:
    """Fit Cox on one half; return the other half as a fold, and both outcomes."""
    table, outcome = COHORTS[name]()
    table = OneHotEncoder().fit_transform(table)
    event, time = outcome.dtype.names
    train = np.random.default_rng(0).permutation(len(outcome)) % 2 == 0
    train[np.argmax(outcome[time])] = (
        True  # scikit-survival refuses test times beyond the training times
    )
    scaled = (table - table[train].mean()) / table[train].std()
    cox = CoxPHSurvivalAnalysis(alpha=1.0).fit(scaled[train], outcome[train])
    curves = cox.predict_survival_function(scaled[~train], return_array=True)
    fold = SurvivalFold(
        outcome[time][~train],
        outcome[event][~train],
        cox.predict(scaled[~train]),
        outcome[time][train],
        outcome[event][train],
        cut=np.median(cox.predict(scaled[train])),
        grid=cox.unique_times_,
        curves=curves,
    )
    return fold, outcome[train], outcome[~train]


@pytest.mark.parametrize("name", COHORTS)
def test_one_fold_equals_scikit_survival(name: str) -> None:
    fold, train, test = halves(name)
    figures = evaluate_survival([fold], draws=50)
    assert figures == json.loads(json.dumps(figures))
    assert (figures["patients"], figures["folds"]) == (len(test), 1)
    same = pytest.approx
    harrell = concordance_index_censored(fold.events, fold.times, fold.risks)[0]
    assert figures["harrell_c"]["value"] == same(harrell, abs=1e-9)
    assert figures["harrell_c"]["per_fold"] == [same(harrell, abs=1e-9)]
    tau = figures["uno_c"]["tau"]
    uno = concordance_index_ipcw(train, test, fold.risks, tau)[0]
    assert figures["uno_c"]["value"] == same(uno, abs=1e-9)
    for key in ("harrell_c", "uno_c", "integrated_brier"):
        assert figures[key]["low"] < figures[key]["value"] < figures[key]["high"]
    # The default tau is the last time at which more than a fifth are uncensored.
    censoring = CensoringDistributionEstimator().fit(train)
    uncensored = censoring.predict_proba(np.unique(fold.train_times))
    assert tau == np.unique(fold.train_times)[uncensored > 0.2].max()

    values, mean = cumulative_dynamic_auc(train, test, fold.risks, figures["auc"]["times"])
    assert figures["auc"]["values"] == same(values, abs=1e-9)
    assert figures["auc"]["mean"]["value"] == same(mean, abs=1e-9)

    def curves(times: list[float] | np.ndarray) -> np.ndarray:
        return np.array([np.interp(times, [0, *fold.grid], [1, *curve]) for curve in fold.curves])

    def reference(times: list[float] | np.ndarray) -> np.ndarray:
        flat = SurvivalFunctionEstimator().fit(train).predict_proba(np.asarray(times))
        return np.broadcast_to(flat, (len(test), len(times)))

    times = figures["brier"]["times"]
    assert figures["brier"]["values"] == same(
        brier_score(train, test, curves(times), times)[1], abs=1e-9
    )
    assert figures["brier"]["kaplan_meier"] == same(
        brier_score(train, test, reference(times), times)[1], abs=1e-9
    )
    integrated = figures["integrated_brier"]
    # scikit-survival refuses times before the first time of a test patient.
    steps = np.linspace(integrated["start"], integrated["end"], 100)
    first = SurvivalFold(
        np.append(fold.times, steps[0] / 2), np.append(fold.events, True),
        np.append(fold.risks, 0.0), fold.train_times, fold.train_events, grid=fold.grid,
        curves=np.vstack([fold.curves, fold.curves[0]]),
    )  # fmt: skip
    early = evaluate_survival([first], draws=1)["integrated_brier"]
    assert early["value"] == same(
        integrated_brier_score(
            train,
            Surv.from_arrays(first.events, first.times),
            np.vstack([curves(steps), curves(steps)[0]]),
            steps,
        ),
        abs=1e-9,
    )
    assert early["scaled"] == same(1 - early["value"] / early["kaplan_meier"])


@pytest.mark.parametrize("name", COHORTS)
def test_risk_groups_equal_scikit_survival(name: str) -> None:
    fold, _, test = halves(name)
    groups = evaluate_survival([fold], draws=1)["risk_groups"]
    high = fold.risks > fold.cut
    assert groups["high_risk"] == {"patients": high.sum(), "events": fold.events[high].sum()}
    assert groups["low_risk"] == {"patients": (~high).sum(), "events": fold.events[~high].sum()}
    assert groups["log_rank_p"] == pytest.approx(log_rank(test, high)[1], rel=1e-9)
    cox = CoxPHSurvivalAnalysis(ties="breslow", tol=1e-12).fit(high[:, None].astype(float), test)
    ratio = groups["hazard_ratio"]
    assert ratio["value"] == pytest.approx(np.exp(cox.coef_[0]), rel=1e-6)
    assert ratio["low"] < ratio["value"] < ratio["high"]
    # With the same patients in two folds, the statistic doubles and the ratio stays.
    twice = evaluate_survival([fold, fold], draws=1)["risk_groups"]
    assert norm.isf(twice["log_rank_p"] / 2) == pytest.approx(
        2**0.5 * norm.isf(groups["log_rank_p"] / 2), rel=1e-9
    )
    assert twice["hazard_ratio"]["value"] == pytest.approx(ratio["value"], rel=1e-9)


def test_follow_up_beyond_the_training_part() -> None:
    """Events after tau and the horizons count as if censored just after them."""
    rng = np.random.default_rng(3)
    train = Surv.from_arrays(rng.random(80) < 0.6, rng.exponential(size=80).clip(max=2))
    times, events, risks = 3 * rng.exponential(size=60), rng.random(60) < 0.7, rng.normal(size=60)
    fold = SurvivalFold(times, events, risks, train["time"], train["event"])
    figures = evaluate_survival([fold], tau=1.5, horizons=[0.5, 1.5, 1.0], draws=1)
    inside = Surv.from_arrays(events & (times <= 1.5), times.clip(max=1.6))
    with pytest.raises(ValueError, match="censoring survival function is zero"):
        cumulative_dynamic_auc(train, Surv.from_arrays(events, times), risks, [0.5])
    assert figures["auc"]["times"] == [0.5, 1.0, 1.5]
    assert figures["auc"]["values"] == pytest.approx(
        cumulative_dynamic_auc(train, inside, risks, [0.5, 1.0, 1.5])[0], abs=1e-9
    )
    assert figures["uno_c"]["value"] == pytest.approx(
        concordance_index_ipcw(train, Surv.from_arrays(events, times), risks, 1.5)[0], abs=1e-9
    )


def small_folds(seed: int = 0, count: int = 3, n: int = 20) -> list[SurvivalFold]:
    """Return small folds with ties of times and of risks."""
    rng = np.random.default_rng(seed)
    folds = []
    for _ in range(count):
        times, train = rng.integers(1, 12, n) / 2, rng.integers(1, 16, 40) / 2
        grid = np.arange(1, 8.0)
        curves = np.sort(rng.random((n, 7)), axis=1)[:, ::-1]
        folds.append(
            SurvivalFold(
                times, rng.random(n) < 0.6, np.round(-times / 4 + rng.normal(size=n), 1), train,
                rng.random(40) < 0.6, cut=-0.5, grid=grid, curves=curves,
            )
        )  # fmt: skip
    return folds


def test_folds_pool_pairs() -> None:
    folds, tau, horizon = small_folds(), 4.0, 3.0
    figures = evaluate_survival(folds, tau=tau, horizons=[horizon], draws=20)
    sums = np.zeros((3, 2))
    brier = 0.0
    for fold in folds:
        censoring = CensoringDistributionEstimator().fit(
            Surv.from_arrays(fold.train_events, fold.train_times)
        )
        patients = list(zip(fold.times, fold.events, fold.risks, strict=True))
        for (t, e, r), (u, d, s) in product(patients, patients):
            if not e:
                continue
            right = 0.5 if abs(r - s) <= 1e-8 else float(r > s)
            g = censoring.predict_proba(np.array([t]))[0]
            if t < u or (t == u and not d):
                sums[0] += right, 1
                sums[1] += np.array([right, 1]) / g**2 * (t < tau)
            if t <= horizon < u:
                sums[2] += np.array([right, 1]) / g
        for (t, e, _), curve in zip(patients, fold.curves, strict=True):
            survival = curve[2]
            if t <= horizon and e:
                brier += survival**2 / censoring.predict_proba(np.array([t]))[0]
            elif t > horizon:
                brier += (1 - survival) ** 2 / censoring.predict_proba(np.array([horizon]))[0]
    harrell, uno, auc = sums[:, 0] / sums[:, 1]
    assert figures["harrell_c"]["value"] == pytest.approx(harrell, abs=1e-9)
    assert figures["uno_c"]["value"] == pytest.approx(uno, abs=1e-9)
    assert figures["auc"]["values"] == [pytest.approx(auc, abs=1e-9)]
    assert figures["auc"]["mean"]["value"] == pytest.approx(auc, abs=1e-9)
    assert figures["brier"]["values"] == [pytest.approx(brier / 60, abs=1e-9)]
    lone = [evaluate_survival([f], tau=tau, horizons=[horizon], draws=1) for f in folds]
    for key in ("harrell_c", "uno_c"):
        assert figures[key]["per_fold"] == [one[key]["value"] for one in lone]
    counts = np.sum([one["d_calibration"]["counts"] for one in lone], axis=0)
    assert figures["d_calibration"]["counts"] == pytest.approx(counts)


@given(st.integers(0, 1000), st.floats(-100, 100))
def test_folds_are_never_compared(seed: int, shift: float) -> None:
    folds = small_folds(seed)

    def figures(folds: list[SurvivalFold]) -> dict:
        return evaluate_survival(folds, tau=4.0, horizons=[3.0], draws=20)

    moved = SurvivalFold(
        folds[0].times, folds[0].events, folds[0].risks + shift, folds[0].train_times,
        folds[0].train_events, cut=folds[0].cut + shift, grid=folds[0].grid,
        curves=folds[0].curves,
    )  # fmt: skip
    one, other = figures(folds), figures([moved, *folds[1:]])
    # Rounding may change only the group of a patient whose risk equals the cut.
    del one["risk_groups"], other["risk_groups"]
    assert one == other
    assert one["harrell_c"]["low"] <= one["harrell_c"]["value"] <= one["harrell_c"]["high"]


def test_resampling_keeps_folds_and_events() -> None:
    folds = small_folds()
    resampling = resample([fold.events for fold in folds], 50, 0)
    events = np.concatenate([fold.events for fold in folds])
    for number, fold in enumerate(folds):
        rows = np.repeat(np.arange(3), 20) == number
        assert (resampling.counts[:, rows].sum(1) == 20).all()
        assert (resampling.counts[:, rows & events].sum(1) == fold.events.sum()).all()
    first, again, other = (evaluate_survival(folds, draws=30, seed=s) for s in (0, 0, 1))
    assert first == again
    assert first["harrell_c"]["low"] != other["harrell_c"]["low"]


def test_draws_are_the_figure_of_the_drawn_patients() -> None:
    """The vectorised bootstrap equals evaluating each resampled cohort."""
    folds = small_folds()
    resampling = resample([fold.events for fold in folds], 20, 0)
    figure = concordance(harrell_pairs(folds), resampling)
    for counts, value in zip(resampling.counts, figure.draws, strict=True):
        drawn = []
        for fold, times in zip(folds, counts.reshape(3, 20).astype(int), strict=True):
            rows = np.repeat(np.arange(20), times)
            drawn.append(
                SurvivalFold(fold.times[rows], fold.events[rows], fold.risks[rows],
                             fold.train_times, fold.train_events)
            )  # fmt: skip
        pairs = harrell_pairs(drawn)
        right, weight = (sum(getattr(p, x).sum() for p in pairs) for x in ("right", "weight"))
        assert value == pytest.approx(right / weight, abs=1e-9)
    # A patient's influence is the derivative of the figure with respect to the patient's weight.
    assert figure.influence.sum() == pytest.approx(0, abs=1e-12)
    more = Resampling(np.ones((1, 60)), resampling.fold, resampling.stratum)
    more.counts[0, 7] += 1e-6
    moved = concordance(harrell_pairs(folds), more).draws[0]
    assert (moved - figure.value) / 1e-6 == pytest.approx(figure.influence[7], rel=1e-3)


# D-calibration


def calibration(scale: float, censored: bool, n: int = 2000) -> dict:
    """Return the D-calibration of a model whose hazards are `scale` times the true ones."""
    rng = np.random.default_rng(4)
    hazard = np.exp(rng.normal(size=n))
    times = rng.exponential(1 / hazard)
    ends = rng.exponential(2.0, size=n) if censored else np.full(n, np.inf)
    grid = np.quantile(times, np.linspace(0.002, 1, 400)) * 1.01
    events, seen = times <= ends, np.minimum(times, ends)
    curves = np.exp(-scale * hazard[:, None] * grid)
    fold = SurvivalFold(seen, events, hazard, seen, events, grid=grid, curves=curves)
    return evaluate_survival([fold], draws=1)["d_calibration"]


@pytest.mark.parametrize("censored", [False, True])
def test_d_calibration(censored: bool) -> None:
    good, bad = calibration(1.0, censored), calibration(1.5, censored)
    assert sum(good["counts"]) == pytest.approx(2000)
    assert good["counts"] == pytest.approx(np.full(10, 200.0), abs=45)
    assert good["p"] > 0.05
    assert bad["p"] < 1e-6


def test_d_calibration_spreads_the_censored() -> None:
    """Haider et al.: a patient censored at S = 0.25 adds 0.1 / 0.25 to each lower bin.

    The bin that holds 0.25 gets the rest.
    """
    fold = SurvivalFold([1.0, 2.0], [1, 0], [1.0, 0.0], [1.0, 2.0, 3.0], [1, 0, 1], grid=[1.0, 2.0],
                        curves=[[0.95, 0.9], [0.5, 0.25]])  # fmt: skip
    result = evaluate_survival([fold], tau=2.0, horizons=[1.0], draws=1)["d_calibration"]
    assert result["counts"] == pytest.approx([0.4, 0.4, 0.2, 0, 0, 0, 0, 0, 0, 1])
    assert result["statistic"] == pytest.approx((2 * 0.2**2 + 0 + 6 * 0.2**2 + 0.8**2) / 0.2)


# Classes


def class_folds(classes: int, n: int = 150, seed: int = 0) -> list[ClassFold]:
    rng = np.random.default_rng(seed)
    folds = []
    for _ in range(2):
        labels = np.append(np.arange(classes), rng.integers(classes, size=n - classes))
        scores = rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[labels]
        probabilities = np.round(np.exp(scores) / np.exp(scores).sum(1, keepdims=True), 3)
        probabilities[:, 0] += 1 - probabilities.sum(1)
        folds.append(ClassFold(labels, probabilities.clip(0)))
    return folds


@pytest.mark.parametrize("classes", [2, 4])
def test_classes_equal_scikit_learn(classes: int) -> None:
    fold, other = class_folds(classes)
    figures = evaluate_classes([fold], draws=50)
    assert figures == json.loads(json.dumps(figures))
    predicted = fold.probabilities.argmax(1)
    assert figures["accuracy"]["value"] == pytest.approx(accuracy_score(fold.labels, predicted))
    assert figures["balanced_accuracy"]["value"] == pytest.approx(
        balanced_accuracy_score(fold.labels, predicted), abs=1e-9
    )
    aucs = [
        [roc_auc_score(f.labels == k, f.probabilities[:, k]) for k in range(classes)]
        for f in (fold, other)
    ]
    both = evaluate_classes([fold, other], draws=50)
    if classes == 2:
        assert figures["auc"]["value"] == pytest.approx(aucs[0][1], abs=1e-9)
        assert both["auc"]["per_fold"] == pytest.approx([aucs[0][1], aucs[1][1]], abs=1e-9)
    else:
        assert figures["macro_auc"]["value"] == pytest.approx(np.mean(aucs[0]), abs=1e-9)
        assert figures["macro_auc"]["per_class"] == pytest.approx(aucs[0], abs=1e-9)
        pairs = [[(f.labels == k).sum() * (f.labels != k).sum() for k in range(classes)]
                 for f in (fold, other)]  # fmt: skip
        pooled = np.average(aucs, axis=0, weights=pairs)
        assert both["macro_auc"]["per_class"] == pytest.approx(pooled, abs=1e-9)
    for key in ("balanced_accuracy", "accuracy", "auc" if classes == 2 else "macro_auc"):
        assert figures[key]["low"] < figures[key]["value"] < figures[key]["high"]


def test_a_class_may_lack_in_a_fold() -> None:
    fold = class_folds(3)[0]
    without = ClassFold([0, 1], [[0.5, 0.3, 0.2], [0.2, 0.5, 0.3]])
    one, both = evaluate_classes([fold], draws=5), evaluate_classes([fold, without], draws=5)
    assert both["macro_auc"]["per_class"][2] == one["macro_auc"]["per_class"][2]
    two = class_folds(2)[0]
    figures = evaluate_classes([two, ClassFold([1], [[0.5, 0.5]])], draws=5)
    assert figures["auc"]["per_fold"][1] is None
    assert figures["auc"]["value"] == evaluate_classes([two], draws=5)["auc"]["value"]


# Calibration and scaled scores


def test_scaled_brier_scores() -> None:
    """A draw of the scaled score is a ratio of both scores on the same patients."""
    rng = np.random.default_rng(0)
    score, reference = rng.random((2, 30))
    resampling = resample([np.arange(30) % 3], 40, 0)
    scaled = complement_of_ratio(
        resampled_mean(score, resampling), resampled_mean(reference, resampling)
    )
    assert scaled.value == pytest.approx(1 - score.mean() / reference.mean())
    rows = np.repeat(np.arange(30), resampling.counts[7].astype(int))
    assert scaled.draws[7] == pytest.approx(1 - score[rows].mean() / reference[rows].mean())
    weights = np.ones(30)
    weights[4] += 1e-6
    moved = 1 - weights @ score / (weights @ reference)
    assert scaled.influence[4] == pytest.approx((moved - scaled.value) / 1e-6, rel=1e-4)

    figures = evaluate_survival(small_folds(), tau=4.0, horizons=[3.0], draws=100)
    brier = figures["scaled_brier"]
    assert brier["value"] == figures["integrated_brier"]["scaled"]
    assert brier["low"] < brier["value"] < brier["high"]


@pytest.mark.parametrize("classes", [2, 3])
def test_scaled_brier_scores_of_classes(classes: int) -> None:
    shares = np.arange(1, classes + 1) / np.arange(1, classes + 1).sum()
    folds = [replace(fold, train_shares=shares) for fold in class_folds(classes)]
    figures = evaluate_classes(folds, draws=100)
    labels = np.concatenate([fold.labels for fold in folds])
    predicted = np.concatenate([fold.probabilities for fold in folds])
    same = pytest.approx
    if classes == 2:
        model, reference = (
            brier_score_loss(labels, p) for p in (predicted[:, 1], np.full(len(labels), shares[1]))
        )
    else:
        truth = np.eye(classes)[labels]
        model, reference = (((p - truth) ** 2).sum(1).mean() for p in (predicted, shares))
    assert figures["brier"]["value"] == same(model)
    assert figures["brier"]["class_shares"] == same(reference)
    brier = figures["scaled_brier"]
    assert brier["value"] == same(1 - model / reference)
    assert brier["low"] < brier["value"] < brier["high"]
    assert "scaled_brier" not in evaluate_classes([folds[0], class_folds(classes)[1]], draws=5)


def test_calibration_of_survival() -> None:
    fold, _, _ = halves("gbsg2")
    figures = evaluate_survival([fold], draws=1)
    rows = [row for row in figures["calibration"] if row["time"] == figures["brier"]["times"][1]]
    sizes = [row["patients"] for row in rows]
    assert (len(sizes), sum(sizes)) == (5, len(fold))
    assert max(sizes) - min(sizes) == 1
    assert figures["calibration"] == sorted(
        figures["calibration"], key=lambda row: (row["time"], row["predicted"])
    )
    time = rows[0]["time"]
    risk = 1 - np.array([np.interp(time, [0, *fold.grid], [1, *c]) for c in fold.curves])
    members = risk >= np.quantile(risk, 0.8)
    times, survival, interval = kaplan_meier_estimator(
        fold.events[members], fold.times[members], conf_type="log-log"
    )
    last = np.searchsorted(times, time, side="right") - 1
    assert rows[-1]["predicted"] == pytest.approx(risk[members].mean())
    assert rows[-1]["observed"] == pytest.approx(1 - survival[last])
    assert (rows[-1]["low"], rows[-1]["high"]) == pytest.approx(1 - interval[::-1, last], abs=0.03)


def test_calibration_of_few_patients() -> None:
    """Without an event, without censoring, or with nobody followed so long."""
    grid, train = np.array([1.0, 10.0]), ([2.0, 10.0, 10.0], [1, 1, 0])

    def rows(times: list[float], events: list[int], risk: list[float]) -> list[dict]:
        curves = 1 - np.outer(risk, [0.1, 1.0])
        fold = SurvivalFold(times, events, risk, *train, grid=grid, curves=curves)
        return survival_calibration([fold], np.array([5.0]))

    # Equal predictions are one group; the interval is Wilson's of 0 of 3.
    (row,) = rows([6.0, 7.0, 8.0], [0, 0, 1], [0.5, 0.5, 0.5])
    assert (row["patients"], row["observed"], row["low"]) == (3, 0, 0)
    assert row["high"] == pytest.approx(1.96**2 / (3 + 1.96**2), abs=1e-4)
    (row,) = rows([1.0, 2.0], [1, 1], [0.5, 0.5])
    assert (row["observed"], row["high"]) == (1, 1)
    assert row["low"] == pytest.approx(2 / (2 + 1.96**2), abs=1e-4)
    (row,) = rows([1.0, 2.0, 3.0], [1, 0, 0], [0.5, 0.5, 0.5])
    assert (row["observed"], row["low"], row["high"]) == (None, None, None)
    groups = rows([6.0, 1.0], [1, 1], [0.1, 0.9])
    assert [row["observed"] for row in groups] == [0, 1]
    # Without censoring the effective number of patients is their number.
    (row,) = rows([1.0, 2.0, 6.0, 7.0], [1, 1, 1, 1], [0.5] * 4)
    assert (row["low"], row["high"]) == pytest.approx((0.1500, 0.8500), abs=1e-4)


def test_calibration_of_classes() -> None:
    figures = evaluate_classes(class_folds(3), draws=5)
    rows = figures["calibration"]
    assert {row["class"] for row in rows} == {0, 1, 2}
    labels, predicted = (
        np.concatenate([getattr(fold, name) for fold in class_folds(3)])
        for name in ("labels", "probabilities")
    )
    highest = predicted[:, 2] >= np.quantile(predicted[:, 2], 0.8)
    assert rows[-1]["predicted"] == pytest.approx(predicted[highest, 2].mean())
    assert rows[-1]["observed"] == pytest.approx((labels[highest] == 2).mean())
    assert rows[-1]["low"] < rows[-1]["observed"] < rows[-1]["high"]
    gaps = [row["patients"] * abs(row["predicted"] - row["observed"]) for row in rows]
    assert figures["calibration_error"]["value"] == pytest.approx(sum(gaps) / (3 * len(labels)))
    assert {row["class"] for row in evaluate_classes(class_folds(2), draws=5)["calibration"]} == {1}


def test_censoring_of_other_patients() -> None:
    """Weights come from the censoring patients, the reference from the training part."""
    fold = small_folds()[0]
    rng = np.random.default_rng(1)
    times, events = rng.integers(2, 20, 50) / 2, np.arange(50) < 25
    external = replace(fold, censoring_times=times, censoring_events=events)
    settings = {"tau": 4.0, "horizons": [3.0], "draws": 5}
    figures = evaluate_survival([external], **settings)
    swapped = replace(fold, train_times=times, train_events=events)
    for key in ("uno_c", "auc"):
        assert figures[key] == evaluate_survival([swapped], **settings)[key]
        assert figures[key] != evaluate_survival([fold], **settings)[key]
    np.testing.assert_array_equal(
        external.kaplan_meier(np.array([1.0, 3.0])), fold.kaplan_meier(np.array([1.0, 3.0]))
    )
    with pytest.raises(ValueError, match="censoring_times: expected together with"):
        replace(external, censoring_times=None)
    # The Kaplan-Meier reference ends with the training part.
    late = replace(external, grid=np.arange(1, 8.0) * 5)
    assert evaluate_survival([late], draws=5)["integrated_brier"]["end"] <= fold.train_times.max()


# Comparisons


def test_comparisons_are_paired_and_change_sign() -> None:
    folds = small_folds(n=40)
    worse = [
        SurvivalFold(f.times, f.events, np.random.default_rng(0).normal(size=40), f.train_times,
                     f.train_events)
        for f in folds
    ]  # fmt: skip
    assert compare_survival(folds, folds, draws=50) == (0.0, 0.0, 0.0, 1.0)
    ab, ba = compare_survival(folds, worse), compare_survival(worse, folds)
    values = [evaluate_survival(x, tau=4.0, horizons=[3.0], draws=1) for x in (folds, worse)]
    assert ab.difference == pytest.approx(
        values[0]["harrell_c"]["value"] - values[1]["harrell_c"]["value"], abs=1e-12
    )
    assert ab.difference == -ba.difference
    assert (ab.low, ab.high) == pytest.approx((-ba.high, -ba.low), abs=1e-12)
    assert ab.p == pytest.approx(ba.p, rel=1e-9)
    assert (ab.p < 0.05) == (ab.low > 0 or ab.high < 0)

    # If all draws agree, p is the smallest that this number of draws can show.
    times, events = np.arange(1.0, 9.0), np.ones(8, bool)
    right, wrong = ([SurvivalFold(times, events, r, times, events)] for r in (-times, times))
    assert compare_survival(right, wrong, draws=99) == (1.0, 1.0, 1.0, 0.02)

    good = class_folds(3, seed=1)
    poor = [ClassFold(f.labels, np.roll(f.probabilities, 7, axis=0)) for f in good]
    assert compare_classes(good, good, draws=50) == (0.0, 0.0, 0.0, 1.0)
    ab, ba = compare_classes(good, poor), compare_classes(poor, good)
    assert ab.low > 0
    assert ab.p < 0.01
    assert (ab.low, ab.high) == pytest.approx((-ba.high, -ba.low), abs=1e-12)


# Coverage: the share of cohorts whose 95 % interval holds the truth of a known model. For R cohorts
# its standard error is sqrt(0.95 * 0.05 / R); 3.66 standard errors are allowed. `make soak` tests
# about 40 shares: if all intervals were exact, one share would exceed this in 1 of 100 runs.
# Seeds are fixed. `make soak` takes 1000 cohorts and more sizes.


def assert_covers(hits: list[bool]) -> None:
    error = (0.95 * 0.05 / len(hits)) ** 0.5
    assert abs(np.mean(hits) - 0.95) <= 3.66 * error, f"{np.mean(hits):.4f}, error {error:.4f}"


def simulated(
    rng: np.random.Generator, n: int, beta: float, noise: float = 0.3, models: int = 1
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return (times, events, risks) per model: one outcome, risks with half of the noise shared."""
    x = rng.normal(size=n)
    times, ends = rng.exponential(np.exp(-beta * x)), rng.exponential(0.8, size=n)
    common = rng.normal(size=n)
    return [
        (np.minimum(times, ends), times <= ends,
         beta * x + noise * 0.5**0.5 * (common + rng.normal(size=n)))
        for _ in range(models)
    ]  # fmt: skip


SIZES = [(0.45, 1, 60), (1.5, 1, 60), (1.5, 5, 60)]
if SOAK:
    SIZES += [(0.45, 1, 200), (0.45, 5, 60), (0.45, 5, 114), (1.5, 1, 200), (1.5, 5, 114)]


@pytest.mark.slow
@pytest.mark.parametrize(("beta", "folds", "n"), SIZES)
def test_survival_intervals_cover(beta: float, folds: int, n: int) -> None:
    """Intervals of both c and the AUC cover; the truth comes from 300 folds of 300 patients."""
    rng = np.random.default_rng(11)
    train = simulated(rng, 100, beta)[0][:2]

    def figures(cohorts: int, n: int, draws: int, seed: int) -> list[dict]:
        parts = [SurvivalFold(*simulated(rng, n, beta)[0], *train) for _ in range(cohorts)]
        result = evaluate_survival(parts, tau=1.0, horizons=[0.3, 0.8], draws=draws, seed=seed)
        return [result["harrell_c"], result["uno_c"], result["auc"]["mean"]]

    truth = [figure["value"] for figure in figures(300, 300, 1, 0)]
    assert truth[0] == pytest.approx({0.45: 0.60, 1.5: 0.80}[beta], abs=0.01)
    hits = []
    for seed in range(1000 if SOAK else 300):
        result = figures(folds, n, 300, seed)
        hits.append([f["low"] <= t <= f["high"] for f, t in zip(result, truth, strict=True)])
    for column in zip(*hits, strict=True):
        assert_covers(list(column))


@pytest.mark.slow
@pytest.mark.parametrize(("folds", "n"), [(1, 100), (5, 60)])
def test_paired_intervals_cover(folds: int, n: int) -> None:
    """Intervals of the difference cover 0 for two equal models whose errors correlate."""
    rng = np.random.default_rng(12)
    hits, p = [], []
    for seed in range(1000 if SOAK else 300):
        models = zip(*(simulated(rng, n, 1.0, 1.0, models=2) for _ in range(folds)), strict=True)
        a, b = ([SurvivalFold(*part, *part[:2]) for part in model] for model in models)
        comparison = compare_survival(a, b, draws=300, seed=seed)
        hits.append(comparison.low <= 0 <= comparison.high)
        p.append(comparison.p)
        # p is resolved only to 1 / draws: near 0.05 it may disagree with the interval.
        assert hits[-1] == (comparison.p >= 0.05) or abs(comparison.p - 0.05) < 0.02
    assert_covers(hits)
    assert kstest(p, "uniform").pvalue > 0.001


@pytest.mark.parametrize(("auc", "folds"), [(0.6, 1), pytest.param(0.8, 5, marks=pytest.mark.slow)])
def test_class_intervals_cover(auc: float, folds: int) -> None:
    """Normal scores of two classes, apart by d: AUC = Φ(d / √2), balanced accuracy = Φ(d / 2)."""
    rng = np.random.default_rng(13)
    d = 2**0.5 * norm.ppf(auc)
    hits = []
    for seed in range(1000 if SOAK else 300):
        parts = []
        for _ in range(folds):
            labels = (np.arange(60) < rng.integers(15, 25)).astype(int)
            p = norm.cdf(rng.normal(size=60) + d * (labels - 0.5))
            parts.append(ClassFold(labels, np.column_stack([1 - p, p])))
        figures = evaluate_classes(parts, draws=300, seed=seed)
        truths = {"auc": auc, "balanced_accuracy": norm.cdf(d / 2)}
        hits.append([figures[key]["low"] <= truths[key] <= figures[key]["high"] for key in truths])
    for column in zip(*hits, strict=True):
        assert_covers(list(column))


# Edges


def test_what_cannot_be_computed_is_absent() -> None:
    fold = small_folds()[0]
    bare = SurvivalFold(fold.times, fold.events, fold.risks, fold.train_times, fold.train_events)
    figures = evaluate_survival([bare], tau=4.0, horizons=[3.0], draws=5)
    assert set(figures) == {"patients", "events", "folds", "harrell_c", "uno_c", "auc"}
    mixed = evaluate_survival([bare, fold], tau=4.0, horizons=[3.0], draws=5)
    assert set(mixed) == set(figures)
    one_group = SurvivalFold(
        fold.times, fold.events, fold.risks, fold.train_times, fold.train_events, cut=100.0
    )
    groups = evaluate_survival([one_group], tau=4.0, horizons=[3.0], draws=5)["risk_groups"]
    assert set(groups) == {"low_risk", "high_risk"}
    lone = SurvivalFold([1.0], [True], [0.0], [1.0, 9.0], [True, True])
    pooled = evaluate_survival([bare, lone], tau=4.0, horizons=[3.0], draws=5)
    assert pooled["harrell_c"]["per_fold"][1] is None


def test_figures_without_spread() -> None:
    times, events = np.arange(1.0, 9.0), np.ones(8, bool)
    for risks, value in ((-times, 1.0), (times, 0.0), (0 * times, 0.5)):
        figures = evaluate_survival([SurvivalFold(times, events, risks, times, events)], draws=20)
        for key in ("harrell_c", "uno_c"):
            assert [figures[key][x] for x in ("value", "low", "high")] == [value] * 3


OUTCOME = ([1.0, 2.0, 3.0], [1, 1, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"events": [1, 0]}, "events: expected the shape of times"),
        ({"times": [-1.0, 2.0, 3.0]}, "times: expected times from 0"),
        ({"train_times": [], "train_events": []}, "train_times: expected .*, got none"),
        ({"train_events": [0, 0, 0]}, "train_events: expected at least one event, got none"),
        ({"risks": [0.0, np.nan, 1.0]}, "risks: expected finite numbers"),
        ({"risks": [0.0, 1.0]}, r"risks: expected \(3,\), got \(2,\)"),
        ({"cut": np.inf}, "cut: expected finite"),
        ({"grid": [1.0]}, "grid: expected together with curves"),
        ({"grid": [2.0, 1.0], "curves": np.ones((3, 2))}, "grid: expected rising positive"),
        ({"grid": [1.0, 2.0], "curves": np.ones((3, 3))}, r"curves: expected \(3, 2\)"),
        ({"grid": [1.0, 2.0], "curves": [[0.5, 0.6]] * 3}, "curves: expected falling"),
    ],
)  # fmt: skip
def test_survival_fold_refusals(change: dict, message: str) -> None:
    times, events = OUTCOME
    base = {"times": times, "events": events, "risks": [3.0, 2.0, 1.0], "train_times": times,
            "train_events": events}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        SurvivalFold(**{**base, **change})


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([0.0, 1.0], [[1.0, 0.0]] * 2, "labels: expected integers"),
        ([0, 1], [[1.0, 0.0]] * 3, r"probabilities: expected \[2, K\]"),
        ([0, 2], [[1.0, 0.0]] * 2, "labels: expected 0 to 1, got 0 to 2"),
        ([0, 1], [[1.0, 0.2]] * 2, "probabilities: expected rows that sum to 1"),
        ([0, 1], [[np.nan, 0.2]] * 2, "probabilities: expected finite"),
    ],
)
def test_class_fold_refusals(labels: list, probabilities: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassFold(labels, probabilities)


def test_refusals() -> None:
    fold = small_folds()[0]
    with pytest.raises(ValueError, match="folds: expected a list of SurvivalFold"):
        evaluate_survival([])
    with pytest.raises(ValueError, match="tau: expected times up to 6.5, .* got 99"):
        evaluate_survival([fold], tau=99)
    with pytest.raises(ValueError, match="horizons: expected times up to"):
        evaluate_survival([fold], horizons=[1.0, 7.4])
    with pytest.raises(ValueError, match="tau: expected a comparable pair before it"):
        evaluate_survival([fold], tau=0.4, horizons=[3.0])
    with pytest.raises(ValueError, match="horizons: expected test events before 0.4"):
        evaluate_survival([fold], tau=0.4)
    with pytest.raises(ValueError, match="horizons: expected an event by .* at 0.1"):
        evaluate_survival([fold], horizons=[0.1])
    with pytest.raises(ValueError, match="horizons: expected at least one time, got none"):
        evaluate_survival([fold], horizons=[])
    with pytest.raises(ValueError, match="draws: expected a positive integer"):
        evaluate_survival([fold], draws=0)
    censored = SurvivalFold(*OUTCOME, [1.0, 2.0, 3.0], *OUTCOME)
    apart = [SurvivalFold([t], [True], [0.0], *OUTCOME) for t in (1.0, 2.0)]
    with pytest.raises(ValueError, match="events: expected a comparable pair"):
        evaluate_survival(apart, tau=2.0, horizons=[1.0])
    with pytest.raises(ValueError, match="b: expected 1 folds as a, got 2"):
        compare_survival([fold], [fold, fold])
    with pytest.raises(ValueError, match="b: expected the patients of a, got others in fold 0"):
        compare_survival([fold], [censored])
    with pytest.raises(ValueError, match="labels: expected class 1 beside another"):
        evaluate_classes([ClassFold([0, 0], [[0.5, 0.5]] * 2)])
    with pytest.raises(ValueError, match="labels: expected class 2 beside another"):
        evaluate_classes([ClassFold([0, 1], [[0.5, 0.5, 0.0]] * 2)])
    with pytest.raises(ValueError, match=r"folds: expected the same number .* got \[2, 3\]"):
        evaluate_classes([class_folds(2)[0], class_folds(3)[0]])
    with pytest.raises(ValueError, match="b: expected 2 classes as a, got 3"):
        compare_classes(class_folds(2), class_folds(3))
