"""Losses of the papers: discrete-time survival, Cox, classes, and the L1 penalty.

A CUDA graph can hold their computation: no shape depends on the values of a tensor, and nothing
waits for the device. To check values on a GPU would wait for it, so they are checked only on a CPU.
"""

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
    k the bin of the time; averaged over the batch. With alpha = 0 and without weights it is the
    logistic-hazard likelihood. It is computed from log-sigmoids, so no probability is clamped.

    Args:
        logits: [B, K].
        bins: int64 [B], the bin of each time, 0 to K - 1.
        events: bool or 0/1 [B], True if the event was observed, False if censored. Values of bins,
            events and weights are checked on a CPU only; on a GPU the check would wait for it.
        alpha: extra weight of the observed events, in [0, 1]; 0.4 in the authors' code.
        weights: [K] weight per bin, normalised to sum to 1; None for no weights. As in the authors'
            code, they do not apply to the alpha term.

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
    in_range = bins.is_cuda or (bins.dtype == torch.int64 and 0 <= bins.min() <= bins.max() < size)
    if bins.dtype != torch.int64 or not in_range:
        raise ValueError(f"bins: expected int64 in 0 to {size - 1}, got {bins.dtype} {bins}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")
    if weights is not None:
        weights = _check_weights(weights, logits)
    return likelihood_of_bins(logits, bins, events, alpha=alpha, weights=weights)


def likelihood_of_bins(
    logits: Tensor, bins: Tensor, events: Tensor, *, alpha: float, weights: Tensor | None
) -> Tensor:
    """Compute `nll_loss` of checked arguments; weights [K] need not be normalised."""
    log_survival = F.logsigmoid(-logits).cumsum(1)  # log S_k = Σ_{j<=k} log(1 - h_j)
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
        likelihood = likelihood * (weights / weights.sum())[bins]
    return ((1 - alpha) * likelihood + alpha * observed).mean()


def on_device_of(like: Tensor, numbers: Sequence[float]) -> Tensor:
    """Return numbers [K] as a tensor with the dtype and device of `like`.

    Each number is written by a kernel of its own. One copy from the host would be faster, but it
    would wait for the device, and a CUDA graph cannot hold it.
    """
    return torch.stack([like.new_full((), number) for number in numbers])


def _check_weights(weights: Tensor | Sequence[float], logits: Tensor) -> Tensor:
    """Return the weights of the bins as a tensor [K], checked."""
    size = logits.shape[1]
    weights = torch.as_tensor(weights, dtype=logits.dtype, device=logits.device)
    if weights.shape != (size,):
        raise ValueError(f"weights: expected [{size}], got {tuple(weights.shape)}")
    is_valid = weights.is_cuda or ((weights >= 0).all() and 0 < weights.sum() < torch.inf)
    if not is_valid:
        raise ValueError(f"weights: expected non-negative numbers, not all zero, got {weights}")
    return weights


def cox_loss(
    log_risk: Tensor, times: Tensor, events: Tensor, *, ties: Literal["efron", "breslow"] = "efron"
) -> Tensor:
    r"""Return the negative partial log-likelihood of Cox's model, divided by the batch size.

    .. math::
        -\frac{1}{B} \sum_{i: \delta_i = 1} \Big(\eta_i - \log \sum_{j: t_j \ge t_i} e^{\eta_j}\Big)

    for distinct times. If d events are tied, Efron's form removes the share k/d of them from the
    risk set of the k-th, k = 0 to d - 1; Breslow's form removes nothing. The values are those of
    scikit-survival. The loss of a batch without an event is zero.

    Args:
        log_risk: [B] or [B, 1], η, higher for a higher risk.
        times: [B].
        events: bool or 0/1 [B], True if the event was observed. Values of times and events are
            checked on a CPU only; on a GPU the check would wait for it.
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
    if not (times.is_cuda or times.isfinite().all()):
        raise ValueError("times: expected finite numbers, got NaN or infinity")
    return partial_likelihood(eta, times, events, ties=ties)


def partial_likelihood(
    eta: Tensor, times: Tensor, events: Tensor, *, ties: Literal["efron", "breslow"] = "efron"
) -> Tensor:
    """Compute `cox_loss` of checked arguments, `eta` [B], in O(B log B)."""
    # Rows are sorted from the latest time to the earliest: the risk set of a time, {j: t_j >= t},
    # is then everything up to the last row with that time.
    order = times.argsort(descending=True)
    eta, events, times = eta[order], events.bool()[order], times[order]
    # Rows first[i] to last[i] have the time of row i. searchsorted needs ascending times, so the
    # positions are counted from the end.
    ascending, rows = times.flip(0).contiguous(), len(eta)
    first = rows - torch.searchsorted(ascending, times, right=True)
    last = rows - 1 - torch.searchsorted(ascending, times)
    # log Σ exp(η) over the risk set of each row.
    log_set = eta.logcumsumexp(0)[last]
    log_set = log_set if ties == "breslow" else _remove_ties(log_set, eta, events, first, last)
    return (log_set - eta).masked_fill(~events, 0).sum() / rows


def _remove_ties(
    log_set: Tensor, eta: Tensor, events: Tensor, first: Tensor, last: Tensor
) -> Tensor:
    """Return Efron's log Σ exp(η) of each event: that of its risk set less a share of its ties.

    Let s be the sum of exp(η) over the d events at one time, as a share of the sum over their risk
    set. The k-th of these events gets log_set + log(1 - k/d · s), k = 0 to d - 1.

    Args:
        log_set: [B], log Σ exp(η) of the risk set of each row, from the latest to the earliest.
        eta: [B].
        events: bool [B].
        first, last: int64 [B], the first and the last row with the time of each row.
    """
    # s is the difference of a running sum at both ends of the tied rows. float64 is exact enough
    # for that: the running sum is a cumulative hazard, about the logarithm of B in size.
    risk_share = (eta - log_set).exp().masked_fill(~events, 0)
    running = F.pad(risk_share.cumsum(0, dtype=torch.float64), (1, 0))
    tied = (running[last + 1] - running[first]).to(eta.dtype)
    before = F.pad(events.cumsum(0), (1, 0))  # number of events in the rows before each row
    deaths = before[last + 1] - before[first]
    rank = before[:-1] - before[first]
    removed = rank.to(eta.dtype) / deaths.clamp_min(1)
    return log_set + torch.log1p(-(removed * tied).masked_fill(~events, 0))


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
        bad = name == "events" and not tensor.is_cuda and not ((tensor == 0) | (tensor == 1)).all()
        if bad:
            raise ValueError(f"events: expected 0 or 1, got {tensor.unique()[:5].tolist()}")
        if tensor.shape != (rows,):
            raise ValueError(f"{name}: expected ({rows},), got {tuple(tensor.shape)}")
