"""Losses of the papers: discrete-time survival, Cox, classes, and the L1 penalty."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .._checks import choice

__all__ = ["cox_loss", "cross_entropy", "l1_penalty", "nll_loss"]


def nll_loss(
    logits: Tensor,
    bins: Tensor,
    events: Tensor,
    *,
    alpha: float = 0.4,
    weights: Tensor | Sequence[float] | None = None,
) -> Tensor:
    r"""Return the negative log-likelihood of discrete-time survival (Zadeh and Schmid 2020).

    .. math::
        (1-\alpha) \, w_k (\ell_e + \ell_c) + \alpha \, \ell_e, \quad
        \ell_e = -\delta (\log S_{k-1} + \log h_k), \quad \ell_c = -(1-\delta) \log S_k

    with hazards h = sigmoid(logits), S_k = Π_{j<=k} (1 - h_j), S_{-1} = 1, δ = 1 for an event and
    k the bin of the time; averaged over the batch. At alpha 0 without weights it is the
    logistic-hazard likelihood. Computed from log-sigmoids, so that no probability is clamped.

    Args:
        logits: [B, K].
        bins: int64 [B], the bin of each time, 0 to K - 1.
        events: bool or 0/1 [B], True if the event was observed, False if censored.
        alpha: extra weight of the observed events, in [0, 1]; 0.4 in the authors' code.
        weights: [K] weight per bin, normalised to sum to 1; None means none. They do not touch
            the alpha term, as in the authors' code.

    Returns:
        A scalar.

    Raises:
        ValueError: shapes, bins, weights or alpha that do not fit, or an empty batch.
        TypeError: something that is not a tensor.

    Example:
        >>> logits = torch.zeros(2, 4)
        >>> motet.nll_loss(logits, torch.tensor([0, 3]), torch.tensor([True, False]), alpha=0)
        tensor(1.7329)
    """
    _check_tensor("logits", logits)
    if logits.ndim != 2:
        raise ValueError(f"logits: expected [B, K], got {tuple(logits.shape)}")
    count, size = logits.shape
    _check_rows(count, bins=bins, events=events)
    if bins.dtype != torch.int64 or not 0 <= int(bins.min()) <= int(bins.max()) < size:
        raise ValueError(f"bins: expected int64 in 0 to {size - 1}, got {bins.dtype} {bins}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")
    log_survival = F.logsigmoid(-logits).cumsum(1)  # log S_k
    index = bins[:, None]
    log_hazard = F.logsigmoid(logits).gather(1, index).squeeze(1)
    at_bin = log_survival.gather(1, index).squeeze(1)
    before = F.pad(log_survival, (1, 0)).gather(1, index).squeeze(1)
    events = events.bool()
    zero = torch.zeros_like(at_bin)
    observed = torch.where(events, -(before + log_hazard), zero)
    censored = torch.where(events, zero, -at_bin)
    likelihood = observed + censored
    if weights is not None:
        likelihood = likelihood * _normalised_weights(weights, logits)[bins]
    return ((1 - alpha) * likelihood + alpha * observed).mean()


def _normalised_weights(weights: Tensor | Sequence[float], logits: Tensor) -> Tensor:
    """Return the weight of each bin [K], as a share of their sum."""
    size = logits.shape[1]
    weights = torch.as_tensor(weights, dtype=logits.dtype, device=logits.device)
    if weights.shape != (size,):
        raise ValueError(f"weights: expected [{size}], got {tuple(weights.shape)}")
    if not (weights >= 0).all() or not 0 < weights.sum() < torch.inf:
        raise ValueError(f"weights: expected non-negative numbers, not all zero, got {weights}")
    return weights / weights.sum()


def cox_loss(
    log_risk: Tensor, times: Tensor, events: Tensor, *, ties: Literal["efron", "breslow"] = "efron"
) -> Tensor:
    r"""Return the negative partial log-likelihood of Cox's model, divided by the batch size.

    .. math::
        -\frac{1}{B} \sum_{i: \delta_i = 1} \Big(\eta_i - \log \sum_{j: t_j \ge t_i} e^{\eta_j}\Big)

    for distinct times (Breslow's form); Efron's form for ties removes k/d of the d tied events from
    the k-th of their risk sets. Equals scikit-survival's. Zero for a batch without an event.

    Args:
        log_risk: [B] or [B, 1], η, higher for a higher risk.
        times: [B].
        events: bool or 0/1 [B], True if the event was observed.
        ties: "efron" or "breslow".

    Returns:
        A scalar.

    Raises:
        ValueError: shapes that do not fit, an empty batch, times that are not finite, or unknown
            ties.
        TypeError: something that is not a tensor.

    Example:
        >>> motet.cox_loss(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0]), torch.ones(3))
        tensor(0.5973)
    """
    choice("ties", ties, ("efron", "breslow"))
    _check_tensor("log_risk", log_risk)
    eta = log_risk.squeeze(1) if log_risk.ndim == 2 and log_risk.shape[1] == 1 else log_risk
    if eta.ndim != 1:
        raise ValueError(f"log_risk: expected [B] or [B, 1], got {tuple(log_risk.shape)}")
    _check_rows(len(eta), times=times, events=events)
    if not times.isfinite().all():
        raise ValueError("times: expected finite numbers, got NaN or infinity")
    events = events.bool()
    if not events.any():
        return eta.sum() * 0
    # log Σ exp(η) over the risk set of each time: a cumulative log-sum-exp from the latest on, read
    # at the last row of each group of tied times.
    order = times.argsort(descending=True)
    eta, events, times = eta[order], events[order], times[order]
    _, group, size = times.unique_consecutive(return_inverse=True, return_counts=True)
    at_risk = eta.logcumsumexp(0)[size.cumsum(0) - 1]
    log_set = at_risk[group[events]]
    if ties == "efron":
        log_set = _efron(log_set, eta[events], group[events], len(size))
    return (log_set - eta[events]).sum() / len(eta)


def _efron(log_set: Tensor, eta: Tensor, group: Tensor, groups: int) -> Tensor:
    """Return the log-sum-exp of each event's risk set, less its part of the events tied with it.

    Args:
        log_set: [E], of the whole risk set, events from the latest on.
        eta: [E].
        group: int64 [E], the number of each event's time.
        groups: how many times there are.
    """
    deaths = torch.zeros(groups, dtype=torch.int64, device=eta.device)
    deaths = deaths.index_add(0, group, torch.ones_like(group))
    # log Σ exp(η) over the events of each group, shifted by their largest
    highest = log_set.new_full((groups,), -torch.inf)
    highest = highest.scatter_reduce(0, group, eta, "amax").detach()
    shifted = (eta - highest[group]).exp()
    tied = highest + log_set.new_zeros(groups).index_add(0, group, shifted).log()
    # k = 0, 1, ... within each group: rows are sorted, so count from the group's first event
    first = deaths.cumsum(0) - deaths
    rank = torch.arange(len(log_set), device=eta.device) - first[group]
    share = rank.to(eta.dtype) / deaths[group]
    removed = share * (tied[group] - log_set).exp()
    return log_set + torch.log1p(-removed)


def l1_penalty(model: nn.Module) -> Tensor:
    """Return the sum of the absolute values of all trainable parameters, a scalar.

    Args:
        model: any module with at least one trainable parameter.

    Raises:
        ValueError: a model without one.

    Example:
        >>> loss = motet.l1_penalty(motet.HEALNet({"omic": motet.Tabular(20)}, out_features=4))
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model: expected at least one trainable parameter, got none")
    return torch.stack([p.abs().sum() for p in parameters]).sum()


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")


def _check_rows(rows: int, **tensors: Tensor) -> None:
    if rows == 0:
        raise ValueError("batch: expected at least one row, got none")
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
        if name == "events" and not ((tensor == 0) | (tensor == 1)).all():
            raise ValueError(f"events: expected 0 or 1, got {tensor.unique()[:5].tolist()}")
        if tensor.shape != (rows,):
            raise ValueError(f"{name}: expected ({rows},), got {tuple(tensor.shape)}")
