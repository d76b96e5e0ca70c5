"""The losses against their literal forms, scikit-survival and the authors' expression."""

import math

import motet
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from motet.fusion.objectives import Classification, CoxSurvival, DiscreteSurvival
from motet.fusion.survival import TimeBins
from sksurv.datasets import load_gbsg2
from sksurv.linear_model.coxph import CoxPHOptimizer

from .capture_lint import CaptureLint


def draw(seed: int, rows: int = 12, bins: int = 4):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, bins, dtype=torch.float64, generator=generator)
    index = torch.randint(bins, (rows,), generator=generator)
    events = torch.rand(rows, generator=generator) < 0.5
    return logits, index, events


@given(st.integers(0, 10_000))
def test_nll_at_alpha_zero_is_the_logistic_hazard_likelihood(seed: int) -> None:
    logits, index, events = draw(seed)
    # Logistic hazard: a binary cross entropy per bin at risk, 1 only in the bin of an event.
    total = 0.0
    for row, k, event in zip(logits, index.tolist(), events.tolist(), strict=True):
        target = torch.zeros(k + 1, dtype=torch.float64)
        target[k] = float(event)
        total += torch.nn.functional.binary_cross_entropy_with_logits(
            row[: k + 1], target, reduction="sum"
        )
    assert torch.isclose(motet.nll_loss(logits, index, events, alpha=0), total / 12, rtol=1e-12)


@given(st.integers(0, 10_000), st.floats(0, 1))
def test_nll_equals_the_authors_expression(seed: int, alpha: float) -> None:
    logits, index, events = draw(seed)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    h = torch.sigmoid(logits)
    s = torch.cat([torch.ones(12, 1, dtype=torch.float64), torch.cumprod(1 - h, 1)], 1)
    rows = torch.arange(12)
    c = (~events).double()
    observed = -(1 - c) * (s[rows, index].log() + h[rows, index].log())
    likelihood = observed - c * s[rows, index + 1].log()
    expected = (1 - alpha) * likelihood * (weights / 10)[index] + alpha * observed
    got = motet.nll_loss(logits, index, events, alpha=alpha, weights=weights)
    assert torch.isclose(got, expected.mean(), rtol=1e-12)


def test_nll_stays_finite_at_extreme_logits() -> None:
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    loss = motet.nll_loss(logits, torch.tensor([1, 0]), torch.tensor([True, False]))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_nll_refusals() -> None:
    logits, index, events = draw(0)
    for message, arguments, options in (
        ("logits: expected \\[B, K\\]", (logits[0], index, events), {}),
        ("bins: expected \\(12,\\)", (logits, index[:3], events), {}),
        ("events: expected \\(12,\\)", (logits, index, events[:3]), {}),
        ("bins: expected int64 in 0 to 3", (logits, index + 4, events), {}),
        ("bins: expected int64 in 0 to 3", (logits, index.double(), events), {}),
        ("alpha: expected", (logits, index, events), {"alpha": 2.0}),
        ("weights: expected \\[4\\]", (logits, index, events), {"weights": [1.0]}),
        ("weights: expected non-negative", (logits, index, events), {"weights": [0.0] * 4}),
        ("batch: expected at least one", (logits[:0], index[:0], events[:0]), {}),
    ):
        with pytest.raises(ValueError, match=message):
            motet.nll_loss(*arguments, **options)


@pytest.mark.parametrize("ties", ["efron", "breslow"])
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 8))
def test_cox_equals_scikit_survival(ties: str, seed: int, rows: int, distinct: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 3))
    times = rng.integers(1, distinct + 1, rows).astype(float)
    events = rng.random(rows) < 0.6
    beta = rng.normal(size=3)
    expected = 0.0
    if events.any():
        optimiser = CoxPHOptimizer(x, events, times, alpha=np.zeros(3), ties=ties)
        expected = optimiser.nlog_likelihood(beta)
    eta = torch.tensor(x @ beta, requires_grad=True)
    loss = motet.cox_loss(eta, torch.tensor(times), torch.tensor(events), ties=ties)
    assert loss.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    loss.backward()
    if events.any():
        gradient, _ = CoxPHOptimizer(x, events, times, np.zeros(3), ties), None
        gradient.update(beta)
        got = torch.tensor(x).T @ eta.grad
        assert np.allclose(got.numpy(), gradient.gradient, atol=1e-10)
    else:
        assert torch.equal(eta.grad, torch.zeros_like(eta))


@pytest.mark.parametrize("ties", ["efron", "breslow"])
def test_cox_on_gbsg2(ties: str) -> None:
    features, outcome = load_gbsg2()
    x = features.select_dtypes("number").to_numpy(float)
    x = (x - x.mean(0)) / x.std(0)
    beta = np.linspace(-0.5, 0.5, x.shape[1])
    optimiser = CoxPHOptimizer(x, outcome["cens"], outcome["time"], np.zeros(x.shape[1]), ties=ties)
    times = torch.tensor(outcome["time"].astype(float))
    loss = motet.cox_loss(torch.tensor(x @ beta), times, torch.tensor(outcome["cens"]), ties=ties)
    assert loss.item() == pytest.approx(optimiser.nlog_likelihood(beta), rel=1e-12)


def cox_one_by_one(eta, times, events, ties: str) -> torch.Tensor:
    """Compute Cox's partial likelihood as defined: one risk set per event, by loops."""
    total = eta.sum() * 0
    for time in times[events].unique():
        tied, at_risk = (times == time) & events, eta[times >= time]
        deaths = int(tied.sum())
        for k, risk in enumerate(eta[tied]):
            gone = k / deaths * eta[tied].exp().sum() if ties == "efron" else 0
            total = total + (at_risk.exp().sum() - gone).log() - risk
    return total / len(eta)


@pytest.mark.parametrize("ties", ["efron", "breslow"])
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 9), st.sampled_from([0, 0.6, 1]))
def test_cox_and_its_gradient_one_event_at_a_time(
    ties: str, seed: int, rows: int, distinct: int, share: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    times = torch.randint(distinct, (rows,), generator=generator).double()
    events = torch.rand(rows, generator=generator) < share
    eta = (2 * torch.randn(rows, dtype=torch.float64, generator=generator)).requires_grad_()
    results = [
        (loss, *torch.autograd.grad(loss, eta))
        for loss in (
            motet.cox_loss(eta, times, events, ties=ties),
            cox_one_by_one(eta, times, events, ties),
        )
    ]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


def test_on_a_gpu_losses_never_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses read no value of a GPU tensor and copy none to the GPU, nor do their gradients."""
    logits, index, events = draw(0)
    times, weights = torch.rand(12, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    bins = DiscreteSurvival(TimeBins((1.0, 2.0, 3.0)), 9.0, (1.0, 2.0, 3.0, 4.0), 0.4)
    survival, classes = {"bins": index, "times": times, "events": events}, {"labels": index}
    losses = {
        "nll_loss": lambda x: motet.nll_loss(x, index, events, weights=weights),
        "efron": lambda x: motet.cox_loss(x[:, 0], times, events),
        "breslow": lambda x: motet.cox_loss(x[:, :1], times, events.double(), ties="breslow"),
        "discrete": lambda x: bins.loss(x, survival),
        "cox": lambda x: CoxSurvival().loss(x[:, :1], survival),
        "classes": lambda x: Classification(4, (1.0, 2.0, 3.0, 4.0)).loss(x, classes),
    }
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    for loss in losses.values():
        x = logits.clone().requires_grad_()
        with CaptureLint():
            (gradient,) = torch.autograd.grad(loss(x), x)
        assert gradient.isfinite().all()


def test_objectives_check_what_their_losses_do_not() -> None:
    """Objectives give these losses without the losses' checks, since `target` has checked all."""
    logits, index, events = draw(0)
    times = torch.rand(12, dtype=torch.float64).numpy()
    bins = DiscreteSurvival(TimeBins((0.2, 0.5, 0.8)), 1.0, (1.0, 2.0, 3.0, 4.0), 0.4)
    target = bins.target(times, events.numpy())
    expected = motet.nll_loss(logits, target["bins"], target["events"], weights=bins.weights)
    assert torch.equal(bins.loss(logits, target), expected)
    target = CoxSurvival().target(times, events.numpy())
    expected = motet.cox_loss(logits[:, :1], target["times"], target["events"])
    assert torch.equal(CoxSurvival().loss(logits[:, :1], target), expected)
    classes = Classification(4, (1.0, 2.0, 3.0, 4.0))
    weights = torch.tensor(classes.weights, dtype=torch.float64)
    expected = motet.cross_entropy(logits, index, weights)
    assert torch.equal(classes.loss(logits, classes.target(index.numpy())), expected)
    for labels in ([0, 4], [-1, 0]):
        with pytest.raises(ValueError, match="labels: expected 0 to 3, got (4|-1)"):
            classes.target(labels)


def test_cox_edges() -> None:
    eta = torch.tensor([[500.0], [-500.0], [0.0]], requires_grad=True)
    times, events = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([True, True, True])
    loss = motet.cox_loss(eta, times, events)
    loss.backward()
    assert loss.isfinite()
    assert eta.grad.isfinite().all()
    shuffled = motet.cox_loss(eta[[2, 0, 1]], times[[2, 0, 1]], events)
    assert torch.isclose(loss, shuffled)
    with pytest.raises(ValueError, match="ties: expected"):
        motet.cox_loss(eta, times, events, ties="exact")
    with pytest.raises(ValueError, match="log_risk: expected"):
        motet.cox_loss(torch.zeros(3, 2), times, events)
    with pytest.raises(ValueError, match="times: expected \\(3,\\)"):
        motet.cox_loss(eta, times[:2], events)
    with pytest.raises(ValueError, match="times: expected finite"):
        motet.cox_loss(eta, times * float("nan"), events)
    with pytest.raises(TypeError, match="times: expected a tensor"):
        motet.cox_loss(eta, [1.0, 2.0, 3.0], events)  # pyright: ignore[reportArgumentType]


def test_l1_penalty() -> None:
    model = torch.nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([1.0, -2.0]))
    penalty = motet.l1_penalty(model)
    assert penalty.item() == 3
    penalty.backward()
    assert torch.equal(model.bias.grad, torch.tensor([1.0, -1.0]))


def test_l1_penalty_needs_parameters() -> None:
    with pytest.raises(ValueError, match="at least one trainable parameter"):
        motet.l1_penalty(torch.nn.Identity())


def test_cross_entropy_is_torchs() -> None:
    loss = motet.cross_entropy(torch.zeros(1, 4), torch.tensor([2]))
    assert loss.item() == pytest.approx(math.log(4), rel=1e-6)
