"""Bins, survival curves, risk and Harrell's c."""

import motet
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sksurv.datasets import load_gbsg2, load_whas500
from sksurv.metrics import concordance_index_censored


def test_bins_are_quartiles_of_the_uncensored_times() -> None:
    _, outcome = load_gbsg2()
    times, events = outcome["time"], outcome["cens"]
    bins = motet.TimeBins.fit(times, events)
    assert bins.count == 4
    assert np.allclose(bins.edges, np.quantile(times[events], [0.25, 0.5, 0.75]))
    index = bins.index(times)
    counts = np.bincount(index[events], minlength=4)
    assert counts.max() - counts.min() <= 3
    assert bins.index([-1.0, bins.edges[0], 1e9]).tolist() == [0, 1, 3]
    # Censored times have no influence on the bins.
    changed = np.where(events, times, times * 3 + 1)
    assert motet.TimeBins.fit(changed, events) == bins


def test_bins_refusals() -> None:
    with pytest.raises(ValueError, match="at least 4 events for 4 bins, got 1"):
        motet.TimeBins.fit([1, 2, 3, 4], [1, 0, 0, 0])
    with pytest.raises(ValueError, match="distinct enough"):
        motet.TimeBins.fit([1, 1, 1, 1, 2], [1, 1, 1, 1, 1])
    with pytest.raises(ValueError, match="expected the shape of times"):
        motet.TimeBins.fit([1, 2], [1])
    with pytest.raises(ValueError, match="times: expected finite"):
        motet.TimeBins.fit([1, 2, float("nan"), 4], [1] * 4, 2)
    with pytest.raises(ValueError, match="events: expected 0 or 1"):
        motet.TimeBins.fit([1, 2, 3, 4], [1, 2, 0, 1], 2)
    with pytest.raises(ValueError, match="edges: expected rising"):
        motet.TimeBins((2.0, 1.0))
    with pytest.raises(ValueError, match="times: expected numbers"):
        motet.TimeBins((1.0, 2.0)).index([float("nan")])
    with pytest.raises(ValueError, match="times: expected finite"):
        motet.concordance_index([1.0, float("nan")], [1, 1], [0.0, 1.0])


@given(st.integers(0, 1000))
def test_survival_is_the_product_of_what_is_left(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(5, 4, dtype=torch.float64, generator=generator)
    expected = torch.cumprod(1 - torch.sigmoid(logits), 1)
    assert torch.allclose(motet.survival(logits), expected, rtol=1e-12)
    assert torch.equal(motet.hazards(logits), torch.sigmoid(logits))
    assert torch.allclose(motet.risk(logits), -expected.sum(1))
    worse = motet.risk(logits + 1)
    assert (worse > motet.risk(logits)).all()


@pytest.mark.parametrize("load", [load_gbsg2, load_whas500])
def test_concordance_equals_scikit_survival(load) -> None:
    _, outcome = load()
    event, time = (outcome[name] for name in outcome.dtype.names)
    risks = np.round(np.random.default_rng(0).normal(size=len(time)), 1)  # with ties
    expected = concordance_index_censored(event, time, risks)[0]
    assert motet.concordance_index(time, event, risks) == expected
    assert motet.concordance_index(time, event, torch.tensor(risks)) == expected
