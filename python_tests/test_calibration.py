"""Calibration: planted slopes, mean predictions, sets of modalities, files, Kaplan-Meier curves."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from motet.fusion.calibration import (
    SMALLEST_SPREAD,
    Calibration,
    Calibrations,
    fit_calibration,
    solve_decreasing,
    spread_of,
)
from motet.fusion.fitted import Fitted
from motet.fusion.objectives import (
    Classification,
    CoxSurvival,
    DiscreteSurvival,
    objective_from_config,
    objective_to_config,
)
from motet.fusion.patients import Patients
from motet.fusion.survival import KaplanMeier
from motet.fusion.training import predict_logits
from scipy.special import softmax
from sksurv.metrics import integrated_brier_score
from sksurv.nonparametric import kaplan_meier_estimator
from sksurv.util import Surv

from .training_helpers import (
    EVENTS,
    IDS,
    MODALITIES,
    NLL,
    SCALING,
    TIMES,
    model_of,
    parts,
)

COX = CoxSurvival.fit(TIMES[:90], EVENTS[:90])
CLASSES = Classification(3, None, (0.5, 0.3, 0.2))


def planted(n: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return log hazard ratios with standard deviation 1, times and events of n patients."""
    generator = np.random.default_rng(seed)
    risk = generator.normal(size=n)
    times = generator.exponential(np.exp(-risk)) + 1e-3
    censored = generator.exponential(3.0, size=n) + 1e-3
    return risk, np.minimum(times, censored), times <= censored


def discrete(times: np.ndarray, events: np.ndarray, bins: int = 4) -> DiscreteSurvival:
    return DiscreteSurvival.fit(times, events, bins=bins, alpha=0.0, weighted=False)


def survival_at_ends(logits: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, logits).cumsum(1))


# The map


@pytest.mark.parametrize("factor", [0.3, 1.0, 8.0])
def test_cox_recovers_a_planted_slope(factor: float) -> None:
    risk, times, events = planted()
    cox = CoxSurvival.fit(times, events)
    overconfident = factor * risk[:, None] + 5.0
    calibration = fit_calibration(cox, overconfident, cox.target(times, events))
    # The standard error of the slope is 1 / sqrt(1,400 events) = 0.027.
    assert calibration.slope * factor == pytest.approx(1.0, abs=0.08)
    fitted = cox.fitted(torch.from_numpy(calibration.apply(overconfident)))
    again = fit_calibration(fitted, overconfident, cox.target(times, events))
    assert again.slope == pytest.approx(calibration.slope, rel=0.01)


@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_discrete_survival_recovers_slope_and_offsets(factor: float) -> None:
    """Patients are drawn from known hazards; the model's logits are these, scaled and shifted."""
    generator = np.random.default_rng(1)
    n, base = 8000, np.array([-1.5, -1.0, -0.5, 0.0])
    true = base + generator.normal(size=n)[:, None]
    failed = generator.random((n, 4)) < 1 / (1 + np.exp(-true))
    events = failed.any(1)
    bins = np.where(events, failed.argmax(1), 3)
    times, events = np.where(events, bins + 0.5, 4.0), events
    objective = replace(
        discrete(times, events),
        bins=type(NLL.bins)((1.0, 2.0, 3.0)),
        end=4.0,
        kaplan_meier=KaplanMeier(
            (1.0, 2.0, 3.0, 4.0), tuple(-np.log(survival_at_ends(true).mean(0)))
        ),
    )
    shift = np.array([3.0, -2.0, 1.0, 0.5])
    logits = factor * (true + shift)
    calibration = fit_calibration(objective, logits, objective.target(times, events))
    assert calibration.slope * factor == pytest.approx(1.0, abs=0.06)
    np.testing.assert_allclose(calibration.apply(logits).mean(0), true.mean(0), atol=0.1)


def test_classes_recover_a_planted_slope() -> None:
    generator = np.random.default_rng(2)
    true = generator.normal(size=(4000, 3))
    labels = (true + generator.gumbel(size=true.shape)).argmax(1)
    objective = Classification.fit(labels, classes=3, weighted=False)
    logits = 5 * true + [2.0, -1.0, 0.0]
    calibration = fit_calibration(objective, logits, objective.target(labels))
    assert calibration.slope * 5 == pytest.approx(1.0, abs=0.08)
    offset = np.array(calibration.offset) + calibration.slope * np.array([2.0, -1.0, 0.0])
    np.testing.assert_allclose(offset - offset.mean(), 0, atol=0.1)


@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0])
def test_the_mean_prediction_is_that_of_training(spread: float) -> None:
    generator = np.random.default_rng(3)
    logits = spread * generator.normal(size=(40, 4))

    calibration = fit_calibration(NLL, logits, parts()[1].target)
    assert NLL.kaplan_meier is not None
    curves = NLL.curves(torch.from_numpy(calibration.apply(logits)), NLL._edges[1:])
    expected = np.exp(-NLL.kaplan_meier.cumulative(NLL._edges[1:]))
    np.testing.assert_allclose(curves.mean(0), expected, rtol=0, atol=1e-8)

    assert COX.kaplan_meier is not None
    fitted = COX.fitted(torch.from_numpy(logits[:, :1] / spread))
    curves = fitted.curves(torch.from_numpy(logits[:, :1] / spread), np.array(fitted.times))
    expected = np.exp(-np.array(COX.kaplan_meier.hazard))
    np.testing.assert_allclose(curves.mean(0), expected, rtol=0, atol=1e-8)
    assert (np.diff(fitted.hazard) > 0).all()
    other = generator.normal(size=(25, 1)) + 3
    shifted = other + fitted.match_mean(other)
    middle = len(fitted.times) // 2
    curves = fitted.curves(torch.from_numpy(shifted), np.array([fitted.times[middle]]))
    assert curves.mean() == pytest.approx(expected[middle], abs=1e-8)

    labels = generator.integers(0, 3, size=40)
    calibration = fit_calibration(CLASSES, logits[:, :3], CLASSES.target(labels))
    mean = softmax(calibration.apply(logits[:, :3]), axis=1).mean(0)
    np.testing.assert_allclose(mean, CLASSES.shares, rtol=0, atol=1e-8)


@given(st.integers(0, 10_000), st.integers(2, 8), st.floats(-3, 3))
def test_the_order_of_patients_is_kept(seed: int, patients: int, log_spread: float) -> None:
    """Also if the outcomes say that the order is wrong: a few patients cannot judge it."""
    generator = np.random.default_rng(seed)
    logits = np.sort(10**log_spread * generator.normal(size=(patients, 1)), axis=0)
    times = np.arange(1.0, patients + 1)  # the highest risk lives longest
    events = np.ones(patients, bool)
    calibration = fit_calibration(COX, logits, COX.target(times, events))
    assert calibration.slope > 0
    calibrated = calibration.apply(logits)
    assert (np.diff(calibrated[:, 0]) > 0).all()
    spread = np.sqrt(calibrated.var())
    assert spread >= SMALLEST_SPREAD * (1 - 1e-6)


@pytest.mark.parametrize("objective", [NLL, COX, CLASSES], ids=lambda o: o.kind)
@pytest.mark.parametrize("patients", [1, 2, 40])
def test_equal_logits_and_one_patient(objective: Any, patients: int) -> None:
    """They say nothing about the spread: the slope is 1, so that others keep their order."""
    target = {
        name: values[:patients]
        for name, values in (
            CLASSES.target(np.arange(40) % 3)
            if objective is CLASSES
            else objective.target(TIMES[90:], EVENTS[90:])
        ).items()
    }
    logits = np.full((patients, objective.out_features), 7.0)
    logits[::2] += 1e-6  # rounding
    calibration = fit_calibration(objective, logits, target)
    assert calibration.slope == 1
    assert np.isfinite(calibration.offset).all()
    calibrated = torch.from_numpy(calibration.apply(logits))
    if objective is NLL:
        curves = NLL.curves(calibrated, NLL._edges[1:])
        expected = np.exp(-NLL.kaplan_meier.cumulative(NLL._edges[1:]))
        np.testing.assert_allclose(curves, np.tile(expected, (patients, 1)), atol=1e-6)
    elif objective is CLASSES:
        np.testing.assert_allclose(CLASSES.probabilities(calibrated)[0], CLASSES.shares, atol=1e-6)


@pytest.mark.parametrize("objective", [NLL, COX, CLASSES], ids=lambda o: o.kind)
def test_extreme_logits_stay_finite(objective: Any) -> None:
    generator = np.random.default_rng(4)
    logits = generator.normal(size=(40, objective.out_features))
    logits[::7] *= 1e4
    target = (
        CLASSES.target(np.arange(40) % 3)
        if objective is CLASSES
        else objective.target(TIMES[90:], EVENTS[90:])
    )
    for given_logits in (logits, 1e4 * np.sign(logits), 1e4 * logits):
        calibration = fit_calibration(objective, given_logits, target)
        assert np.isfinite([calibration.slope, *calibration.offset]).all()
        calibrated = calibration.apply(given_logits)
        fitted = objective.fitted(torch.from_numpy(calibrated))
        new = torch.tensor([[1e4], [-1e4], [0.0]]).double().expand(3, objective.out_features)
        for some in (torch.from_numpy(calibrated), new):
            if objective is CLASSES:
                assert np.isfinite(fitted.probabilities(some)).all()
            else:
                curves = fitted.curves(some, np.linspace(0, 9, 7))
                assert ((curves >= 0) & (curves <= 1)).all()
                assert np.isfinite(fitted.risk(some)).all()


def test_match_mean_of_extreme_logits() -> None:
    """Offsets are finite, though no patient has a probability of one of the classes above 0."""
    generator = np.random.default_rng(5)
    logits = np.where(generator.random((40, 3)) < 0.3, 1e4, -1e4)
    logits[:, 2] = -3e4
    assert np.isfinite(CLASSES.match_mean(logits)).all()
    assert np.isfinite(NLL.match_mean(1e4 * generator.normal(size=(40, 4)))).all()
    fitted = COX.fitted(torch.zeros(3, 1))
    assert np.isfinite(fitted.match_mean(np.array([[1e4], [-1e4], [0.0]]))).all()


def test_the_root_of_a_decreasing_function() -> None:
    assert solve_decreasing(lambda x: 3.0 - x) == pytest.approx(3, abs=1e-9)
    assert solve_decreasing(lambda x: -1.0) == -60
    assert solve_decreasing(lambda x: 1.0) == 60


# The objectives


def test_kaplan_meier() -> None:
    _, times, events = planted(200, seed=6)
    times = np.round(times, 1) + 0.1  # ties
    curve = KaplanMeier.fit(times, events)
    steps, survival = kaplan_meier_estimator(events, times)[:2]
    at_events = dict(zip(steps, survival, strict=True))
    assert set(curve.times) == set(times[events])
    for time, hazard in zip(curve.times, curve.hazard, strict=True):
        assert np.exp(-hazard) == pytest.approx(max(at_events[time], 0.5 / 200), abs=1e-12)
    between = (curve.times[0] + curve.times[1]) / 2
    assert curve.cumulative(between) == pytest.approx((curve.hazard[0] + curve.hazard[1]) / 2)
    assert curve.cumulative([0.0, 1e9]).tolist() == [0.0, curve.hazard[-1]]


def test_kaplan_meier_does_not_fall_to_zero() -> None:
    curve = KaplanMeier.fit([1.0, 2.0, 4.0, 4.0], [1, 0, 1, 1])
    assert curve.times == (1.0, 4.0)
    np.testing.assert_allclose(np.exp(-np.array(curve.hazard)), [0.75, 1 / 8])


@given(
    st.integers(0, 10_000),
    st.integers(2, 6),
    st.floats(0.1, 20),
    st.booleans(),
)
def test_curves_follow_kaplan_meier(seed: int, bins: int, spread: float, last: bool) -> None:
    """They fall in [0, 1], and at the ends of the bins they are the products of the hazards.

    If `last`, the last event time is the last edge too: the last bin then has a width all the same.
    """
    generator = np.random.default_rng(seed)
    times = generator.exponential(2.0, 60) + 0.01
    events = generator.random(60) < 0.6
    events[:10] = True
    objective = discrete(times, events, bins)
    if last:
        objective = replace(objective, end=objective.bins.edges[-1])
    logits = spread * generator.normal(size=(7, bins))
    edges = objective._edges
    assert (np.diff(edges) > 0).all()
    grid = np.unique(np.concatenate([np.linspace(0, edges[-1] * 1.2, 50), edges, times]))
    curves = objective.curves(torch.from_numpy(logits), grid)
    assert ((curves >= 0) & (curves <= 1)).all()
    assert (curves[:, 0] == 1).all()
    assert (np.diff(curves, axis=1) <= 1e-12).all()
    at_ends = curves[:, np.searchsorted(grid, edges[1:])]
    np.testing.assert_allclose(at_ends, survival_at_ends(logits), rtol=1e-9, atol=1e-12)
    assert (curves[:, grid >= edges[-1]] == curves[:, -1:]).all()
    # A patient whose survival is Kaplan-Meier's at the end of each bin has it at all times.
    assert objective.kaplan_meier is not None
    expected = objective.kaplan_meier.cumulative(np.minimum(grid, edges[-1]))
    steps = np.diff(objective.kaplan_meier.cumulative(edges))
    if (steps > 0).all():
        usual = torch.from_numpy(np.log(np.expm1(steps)))[None]
        np.testing.assert_allclose(-np.log(objective.curves(usual, grid)[0]), expected, atol=1e-9)


def test_objectives_in_json() -> None:
    fitted = COX.fitted(torch.randn(20, 1))
    for objective in (NLL, COX, fitted, CLASSES):
        config = json.loads(json.dumps(objective_to_config(objective)))
        assert objective_from_config(config) == objective
    assert fitted.untrained() == COX
    # Older files have no Kaplan-Meier curve.
    for objective, name in ((NLL, "kaplan_meier"), (fitted, "kaplan_meier"), (CLASSES, "shares")):
        config = json.loads(json.dumps(objective_to_config(objective)))
        del config[name]
        assert objective_from_config(config) == replace(objective, **{name: None})
    assert np.isfinite(
        replace(fitted, kaplan_meier=None).curves(torch.randn(5, 1), np.arange(4.0))
    ).all()
    old, ends = replace(NLL, kaplan_meier=None), NLL._edges[1:]
    logits = torch.randn(6, 4).double()
    np.testing.assert_allclose(
        old.curves(logits, ends), NLL.curves(logits, ends), rtol=1e-9, atol=1e-12
    )


# Sets of modalities


def lacking(tables: dict[str, float], n: int = 60, seed: int = 0) -> Patients:
    """Return patients; each has each table with the given probability, and at least one."""
    generator = torch.Generator().manual_seed(seed)
    present = {name: torch.rand(n, generator=generator) < share for name, share in tables.items()}
    none = ~torch.stack(list(present.values())).any(0)
    first = next(iter(tables))
    present[first] = present[first] | none
    x = {name: torch.randn(n, 1, generator=generator) for name in tables}
    times = np.random.default_rng(seed).exponential(size=n) + 0.01
    target = COX.target(times, np.ones(n, bool))
    return Patients(tuple(map(str, range(n))), x, present, {}, target)


def sum_of(patients: Patients) -> np.ndarray:
    """Return the logits of a model that adds what is present, and 10 for each table present."""
    total = torch.zeros(len(patients), 1)
    for name, x in patients.tables.items():
        total += (x + 10) * patients.present[name][:, None]
    return total.double().numpy()


def test_every_set_of_modalities_has_a_map() -> None:
    validation = lacking({"a": 0.8, "b": 0.7, "c": 0.6})
    objective = COX.fitted(torch.randn(60, 1))
    calibrations = Calibrations.fit(objective, sum_of, validation)
    assert len(calibrations.maps) == 7
    assert next(iter(calibrations.maps)) == ("a", "b", "c")
    # A missing table shifts the logits by 10, the calibrated mean survival not at all.
    assert objective.kaplan_meier is not None
    middle = objective.times[len(objective.times) // 2]
    wanted = np.exp(-objective.kaplan_meier.hazard[len(objective.times) // 2])
    rows = validation.has("a") & validation.has("b")
    for subset in (("a",), ("b",), ("a", "b")):
        patients = validation.select(rows).only(subset)
        calibrated = calibrations.apply(patients, sum_of(patients))
        curves = objective.curves(torch.from_numpy(calibrated), np.array([middle]))
        # Fitted on more patients than these, if the set is smaller.
        assert curves.mean() == pytest.approx(wanted, abs=0.05)
    # Each patient gets the map of the modalities that the patient has.
    logits = sum_of(validation)
    calibrated = calibrations.apply(validation, logits)
    for row, subset in enumerate(validation.sets_of_modalities()):
        expected = calibrations.maps[subset].apply(logits[row : row + 1])
        np.testing.assert_allclose(calibrated[row : row + 1], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_fewer_modalities_spread_no_more(seed: int) -> None:
    """Also where one modality alone fits the validation patients best."""
    validation = lacking({"a": 1.0, "b": 1.0}, n=40, seed=seed)
    risk = validation.tables["a"][:, 0].numpy()
    times = np.random.default_rng(seed).exponential(np.exp(-3 * risk)) + 0.01
    objective = COX.fitted(torch.randn(40, 1))
    validation = replace(validation, target=COX.target(times, np.ones(40, bool)))
    alone = fit_calibration(objective, sum_of(validation.only("a")), validation.target)
    calibrations = Calibrations.fit(objective, sum_of, validation)

    def spread(subset: str) -> float:
        logits = sum_of(validation.only(subset))
        return spread_of(calibrations.maps[tuple(subset)].apply(logits))

    assert spread("a") <= spread("ab") * (1 + 1e-6)
    assert spread("b") <= spread("ab") * (1 + 1e-6)
    assert spread("a") < spread_of(alone.apply(sum_of(validation.only("a"))))


def test_a_rare_set_is_fitted_on_patients_with_one_of_it() -> None:
    validation = lacking({"a": 1.0, "b": 0.1})
    both = validation.has("b")
    assert 0 < both.sum() < 20
    calibrations = Calibrations.fit(COX.fitted(torch.randn(60, 1)), sum_of, validation)
    alone = fit_calibration(
        COX.fitted(torch.randn(60, 1)), sum_of(validation.select(both)),
        {name: values[both] for name, values in validation.target.items()},
    )  # fmt: skip
    assert calibrations.maps["a", "b"].slope != pytest.approx(alone.slope, rel=1e-6)


def test_many_modalities_have_the_nearest_map() -> None:
    names = "abcdefg"
    validation = lacking(dict.fromkeys(names, 1.0), n=30)
    others = validation.only("ace")
    objective = COX.fitted(torch.randn(30, 1))
    calibrations = Calibrations.fit(objective, sum_of, validation, [others])
    # All, all but one, one alone, and the set that other patients have.
    assert len(calibrations.maps) == 1 + 7 + 7 + 1
    assert ("a", "c", "e") in calibrations.maps
    few = validation.only("abce")
    logits = sum_of(few)
    np.testing.assert_array_equal(
        calibrations.apply(few, logits), calibrations.maps["a", "c", "e"].apply(logits)
    )
    none = validation.only("")
    assert np.isfinite(calibrations.apply(none, sum_of(none))).all()


def test_calibrations_in_json() -> None:
    calibrations = Calibrations({("a", "b"): Calibration(2.0, (1.0, 0.5)),
                                 ("b",): Calibration(1.0, (0.0, -0.5))})  # fmt: skip
    config = json.loads(json.dumps(calibrations.to_config()))
    assert Calibrations.from_config(config) == calibrations


# Fitted models


def finished(objective: Any = NLL) -> tuple[Fitted, Patients]:
    training, validation = parts(objective)
    model = model_of(objective.out_features).eval()
    fitted = Fitted.finish(
        model, SCALING, objective, training, (TIMES[:90], EVENTS[:90]), validation
    )
    return fitted, Patients.of(MODALITIES, SCALING, IDS)


@pytest.mark.parametrize("objective", [NLL, COX], ids=lambda o: o.kind)
def test_a_fitted_model_keeps_its_calibration(objective: Any, tmp_path: Path) -> None:
    fitted, patients = finished(objective)
    assert fitted.calibrations is not None
    assert set(fitted.calibrations.maps) == {("omic", "labs"), ("omic",), ("labs",)}
    fitted.save(tmp_path)
    loaded = Fitted.load(tmp_path)
    assert loaded.calibrations == fitted.calibrations
    assert loaded.objective == fitted.objective
    expected, actual = fitted.predict(patients), loaded.predict(patients)
    np.testing.assert_array_equal(actual.risk, expected.risk)
    np.testing.assert_array_equal(actual.curves, expected.curves)
    assert torch.equal(loaded.logits(patients), fitted.logits(patients))
    assert fitted.predict(patients.select(torch.arange(0))).ids == ()


@pytest.mark.parametrize("objective", [NLL, COX], ids=lambda o: o.kind)
def test_older_files_predict_as_before(objective: Any, tmp_path: Path) -> None:
    fitted, patients = finished(objective)
    fitted.save(tmp_path)
    path = tmp_path / "fitted.json"
    content = json.loads(path.read_text())
    del content["calibrations"], content["objective"]["kaplan_meier"]
    path.write_text(json.dumps(content))
    old = Fitted.load(tmp_path)
    assert old.calibrations is None
    raw = predict_logits(fitted.model, patients)
    predicted = old.predict(patients)
    np.testing.assert_array_equal(predicted.risk, old.objective.risk(raw))
    if objective is NLL:
        ends = np.interp(
            old.grid, NLL._edges, np.array([1, *survival_at_ends(raw[:1].double().numpy())[0]])
        )
        np.testing.assert_allclose(predicted.curves[0], ends, rtol=1e-9)


def test_calibration_improves_the_brier_score() -> None:
    """Of an overconfident model, on patients that neither map nor curve was fitted on."""
    risk, times, events = planted(900, seed=7)
    train, validation, test = slice(0, 400), slice(400, 600), slice(600, 900)
    objective = discrete(times[train], events[train])
    # The model ranks patients as well as one can, but its logits are eight times too far apart.
    logits = 8 * risk[:, None] + np.zeros(4)
    logits += objective.match_mean(logits[train])
    target = objective.target(times[validation], events[validation])
    calibration = fit_calibration(objective, logits[validation], target)
    assert 0.05 < calibration.slope < 0.25
    grid = np.quantile(times[test], np.linspace(0.1, 0.8, 15))
    known, new = (Surv.from_arrays(events[part], times[part]) for part in (train, test))

    def brier(some: np.ndarray) -> float:
        curves = objective.curves(torch.from_numpy(some), grid)
        return float(integrated_brier_score(known, new, curves, grid))

    nothing = np.zeros((300, 4)) + objective.match_mean(np.zeros((300, 4)))
    calibrated = brier(calibration.apply(logits[test]))
    assert calibrated < brier(logits[test]) - 0.01
    assert calibrated < brier(nothing) - 0.02
