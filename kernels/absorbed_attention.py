"""Latent attention that takes the projections into the queries: K and V never exist."""

from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from .backends import (
    Backend,
    check_backend,
    compiled,
    refuse_second_derivative,
    rows_apart,
    triton_kernels,
)
from .checks import refuse_forward_mode
from .context_kv import (
    Standardiser,
    bounds_of,
    check_rows,
    chunks,
    context_kv_reference,
    split_gradient,
    standardise_backward,
    wide,
)
from .latent_attention import check_counts, check_dropout, keep_mask

_LIBRARY = torch.library.Library("motet", "FRAGMENT")
_LIBRARY.define(
    "absorbed_attention(Tensor queries, Tensor x, Tensor? positions, Tensor offsets, "
    "Tensor? counts, float eps, float dropout_p, Tensor? seed, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "absorbed_attention_backward(Tensor grad_pooled, Tensor grad_mass, Tensor queries, Tensor x, "
    "Tensor? positions, Tensor offsets, Tensor? counts, Tensor pooled, Tensor mass, Tensor scores, "
    "Tensor lse, Tensor mean, Tensor rstd, float eps, float dropout_p, Tensor? seed, str backend, "
    "bool rows) -> (Tensor, Tensor, Tensor)"
)


def absorbed_attention(
    queries: Tensor,
    x: Tensor,
    offsets: Tensor,
    *,
    positions: Tensor | None = None,
    counts: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Attend to normalised context tokens themselves, each bag with queries of its own.

    .. math:: \mathrm{pooled} = D \hat z, \quad D = \mathrm{dropout}(A), \quad
        A = \mathrm{softmax}(\tilde q \hat z^\top), \quad
        \hat z_t = \frac{z_t - \mu_t}{\sqrt{\sigma_t^2 + \epsilon}}, \quad z_t = [x_t \,|\, p_t]

    With the key projection taken into the queries, :math:`\tilde q = \mathrm{scale} \cdot q W_k`,
    and the value projection applied afterwards, :math:`\mathrm{pooled}\, W_v^\top + \mathrm{mass}
    \, b_v^\top`, this is HEALNet's Eq. 2. (A key's bias adds one number to all scores of a query,
    which the softmax does not see.) It pays where there are fewer queries than key channels. The
    backward pass keeps the scores [T, R].

    Args:
        queries: [B, R, D + P], R = heads x latents; their dtype is that of the products.
        x: [T, D] tokens.
        offsets: int64 [B + 1]: bag b owns tokens offsets[b] to offsets[b + 1].
        positions: as in context_kv.
        counts: [T], how many tokens each of `x` stands for, as in latent_attention.
        eps: ε.
        dropout_p: probability of dropping an attention weight, in [0, 1); 0 with `counts`.
        seed: as in latent_attention.
        backend: "auto", "triton", "compile" (without dropout; with it "eager") or "eager".

    Returns:
        pooled [B, R, D + P]; and mass [B, R], the sum of each row of D, 1 without dropout; both 0
        for a bag without tokens. Differentiable once, in reverse mode.

    Raises:
        ValueError: shapes, dtypes, devices, offsets or counts that do not fit.
        TypeError: something that is not a tensor.

    Example:
        >>> queries, x = torch.randn(2, 200, 32), torch.randn(70, 32)
        >>> pooled, mass = motet.kernels.absorbed_attention(
        ...     queries, x, offsets=torch.tensor([0, 50, 70]))
        >>> pooled.shape, mass.shape
        (torch.Size([2, 200, 32]), torch.Size([2, 200]))
    """
    _check(queries, x, offsets, positions)
    check_backend(backend)
    seed = check_dropout(dropout_p, seed, x.device)
    check_counts(counts, x.shape[:1], x, dropout_p)
    refuse_forward_mode("absorbed_attention")
    if backend == "compile" and not dropout_p:
        return compiled(absorbed_attention_reference)(
            queries, x, offsets, positions=positions, counts=counts, eps=eps
        )
    pooled, mass, *_ = torch.ops.motet.absorbed_attention(
        queries, x, positions, offsets, counts, eps, dropout_p, seed, backend
    )
    return pooled, mass


def absorbed_weights(
    queries: Tensor,
    x: Tensor,
    offsets: Tensor,
    *,
    positions: Tensor | None = None,
    eps: float = 1e-5,
    backend: Backend = "auto",
) -> Tensor:
    """Return the weights A of absorbed_attention, before dropout, [T, R]; not differentiable."""
    _check(queries, x, offsets, positions)
    check_backend(backend)
    with torch.no_grad():
        _, _, scores, lse, _, _ = torch.ops.motet.absorbed_attention(
            queries, x, positions, offsets, None, eps, 0.0, None, backend
        )
    lengths = offsets.diff()
    return (
        (scores.to(lse.dtype) - lse.repeat_interleave(lengths, 0, output_size=len(x)))
        .exp()
        .to(queries.dtype)
    )


def absorbed_attention_reference(
    queries: Tensor,
    x: Tensor,
    offsets: Tensor,
    *,
    positions: Tensor | None = None,
    counts: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute absorbed_attention in torch, literally, bag after bag."""
    width = queries.shape[2]
    identity = torch.eye(width, dtype=queries.dtype, device=x.device)[None]
    (z,) = context_kv_reference(x, identity, positions=positions, eps=eps)
    pooled, mass = [queries[:0]], [queries[:0, :, 0]]
    for own, (start, stop) in zip(queries, pairwise(offsets.tolist()), strict=True):
        scores = own @ z[start:stop].t()
        if counts is not None:
            scores = scores + counts[start:stop].log().to(scores.dtype)
        weights = torch.softmax(scores, dim=-1)
        dropped = torch.nn.functional.dropout(weights, dropout_p)
        pooled.append((dropped @ z[start:stop])[None])
        mass.append(dropped.sum(-1)[None])
    return torch.cat(pooled), torch.cat(mass)


def _check(queries: Tensor, x: Tensor, offsets: Tensor, positions: Tensor | None) -> None:
    if not isinstance(offsets, Tensor):
        raise TypeError(f"offsets: expected a tensor, got {type(offsets).__name__}")
    check_rows(x, positions, offsets)
    width = x.shape[1] + (0 if positions is None else positions.shape[1])
    if not isinstance(queries, Tensor):
        raise TypeError(f"queries: expected a tensor, got {type(queries).__name__}")
    if queries.ndim != 3 or (len(queries), queries.shape[2]) != (len(offsets) - 1, width):
        raise ValueError(
            f"queries: expected [{len(offsets) - 1}, R, {width}], got {tuple(queries.shape)}"
        )
    if (
        queries.device != x.device
        or not queries.is_floating_point()
        or (x.dtype == torch.float64) != (queries.dtype == torch.float64)
    ):
        raise ValueError(
            f"queries: expected a dtype that goes with {x.dtype} on {x.device}, got "
            f"{queries.dtype} on {queries.device}"
        )


def _forward(
    queries: Tensor,
    x: Tensor,
    positions: Tensor | None,
    offsets: Tensor,
    counts: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Read the tokens once: scores, running softmax and pooling per chunk of rows."""
    fast = _fast(backend, queries)
    if fast is not None:
        places = None if positions is None else rows_apart(positions)
        return fast.attend(
            queries.contiguous(), rows_apart(x), places, offsets, counts, eps, dropout_p, seed
        )
    full, (bags, count, width) = wide(x.dtype), queries.shape
    pooled, mass = (
        queries.new_zeros(queries.shape, dtype=full),
        queries.new_zeros(bags, count, dtype=full),
    )
    total = torch.zeros_like(mass)
    top = torch.full_like(mass, float("-inf"))
    scores = queries.new_empty(len(x), count)
    mean, rstd = (x.new_empty(len(x), dtype=full) for _ in range(2))
    bounds = bounds_of(offsets, len(x))
    masks = _Masks(seed, bounds, count, dropout_p, mass)
    standardised = Standardiser(x, positions, eps, queries.dtype)
    for bag, start, stop in chunks(bounds, width):
        rows = slice(start, stop)
        z, mean[rows], rstd[rows] = standardised(rows)
        scores[rows] = own = z @ queries[bag].t()
        own = own.to(full)
        if counts is not None:
            own.add_(counts[rows].log()[:, None])
        highest = torch.maximum(top[bag], own.amax(0))
        weights = (own - highest).exp_()
        shrunk = (top[bag] - highest).exp_()  # what came before, relative to the highest score
        total[bag] = total[bag] * shrunk + weights.sum(0)
        weights = masks.apply(weights, bag, rows)
        mass[bag] = mass[bag] * shrunk + weights.sum(0)
        part = weights.to(queries.dtype).t() @ z
        pooled[bag] = part if start == bounds[bag] else pooled[bag] * shrunk[:, None] + part
        top[bag] = highest
    seen = total > 0
    total = torch.where(seen, total, 1)
    lse = torch.where(seen, top + total.log(), top)
    pooled.div_(total[..., None])
    return (
        pooled.to(queries.dtype), mass.div_(total).to(queries.dtype), scores, lse, mean, rstd
    )  # fmt: skip


def _backward_of(
    grad_pooled: Tensor,
    grad_mass: Tensor,
    queries: Tensor,
    x: Tensor,
    positions: Tensor | None,
    offsets: Tensor,
    counts: Tensor | None,
    pooled: Tensor,
    mass: Tensor,
    scores: Tensor,
    lse: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
    of_rows: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, x and positions, the last two empty without `of_rows`.

    dS = A ∘ (mask ∘ (dpooled ẑᵀ + dmass) - delta), delta = rowsum(dpooled ∘ pooled) + dmass mass,
    dqueries = dS ẑ. The rows of dS sum to 0, but for rounding, which what all tokens share would
    multiply: it is taken out with the mean token, dS (ẑ - pooled / mass).
    """
    delta = (grad_pooled * pooled).sum(-1, dtype=lse.dtype) + grad_mass * mass
    fast = _fast(backend, queries)
    if fast is not None and not of_rows:
        places = None if positions is None else rows_apart(positions)
        dqueries, rest = fast.attend_backward(
            grad_pooled, grad_mass, delta, queries, rows_apart(x), places, offsets, counts, scores,
            lse, mean, rstd, eps, dropout_p, seed,
        )  # fmt: skip
        dqueries -= _times_mean_token(rest, pooled, mass)
        return dqueries.to(queries.dtype), x.new_empty(0), x.new_empty(0)
    count, width = queries.shape[1:]
    rest = torch.zeros_like(lse)
    dqueries = torch.zeros_like(queries, dtype=lse.dtype)
    drows = mean.new_empty((len(x), width) if of_rows else 0)
    bounds = bounds_of(offsets, len(x))
    kept = None
    if fast is not None and seed is not None:  # the mask that Triton drew in the forward pass
        shapes = lse.new_empty(len(queries), 1, count, 1), lse.new_empty(len(x), 1, 1)
        latent = triton_kernels("latent_attention", backend, queries)
        assert latent is not None
        kept = latent.dropout_mask(*shapes, offsets, dropout_p, seed)[:, 0]
    masks = _Masks(seed, bounds, count, dropout_p, lse, kept)
    standardised = Standardiser(x, positions, eps, queries.dtype)
    for bag, start, stop in chunks(bounds, width):
        rows = slice(start, stop)
        # Computed again in the very bits of the forward pass, in one sweep.
        z, _, own = standardised(rows)
        weights = scores[rows].to(lse.dtype) - lse[bag]
        if counts is not None:
            weights.add_(counts[rows].log()[:, None])
        weights.exp_()
        dweights = (z @ grad_pooled[bag].t()).to(lse.dtype).add_(grad_mass[bag])
        dscores = masks.apply(dweights, bag, rows).sub_(delta[bag]).mul_(weights)
        dscores = dscores.to(queries.dtype)
        dqueries[bag] += dscores.t() @ z
        rest[bag] += dscores.sum(0, dtype=lse.dtype)
        if of_rows:
            dropped = masks.apply(weights, bag, rows).to(queries.dtype)
            dz = dscores @ queries[bag] + dropped @ grad_pooled[bag]
            full = lse.dtype
            drows[rows] = standardise_backward(dz.to(full), z.to(full), own)
    dqueries -= _times_mean_token(rest, pooled, mass)
    if not of_rows:
        return dqueries.to(queries.dtype), x.new_empty(0), x.new_empty(0)
    return dqueries.to(queries.dtype), *split_gradient(drows, x, positions)


def _times_mean_token(rest: Tensor, pooled: Tensor, mass: Tensor) -> Tensor:
    return (rest / torch.where(mass > 0, mass, 1))[..., None] * pooled


def _fast(backend: str, queries: Tensor) -> ModuleType | None:
    # Nothing to launch without bags or queries; torch says what comes of them.
    nothing = "needs bags and queries" if 0 in queries.shape[:2] else ""
    if nothing and backend == "triton":
        backend = "eager"
    return triton_kernels("absorbed_attention", backend, queries, why_not=nothing)


class _Masks:
    """The dropout masks of all bags, one drawn at a time unless all are `kept` [T, R] already."""

    def __init__(
        self,
        seed: Tensor | None,
        bounds: list[int],
        columns: int,
        dropout_p: float,
        like: Tensor,
        kept: Tensor | None = None,
    ) -> None:
        self.kept = kept
        self.seed, self.bounds, self.columns = seed, bounds, columns
        self.dropout_p, self.like = dropout_p, like
        self.bag, self.mask = -1, like

    def apply(self, weights: Tensor, bag: int, rows: slice) -> Tensor:
        """Return weights [n, R] of some rows of a bag after dropout."""
        if self.seed is None:
            return weights
        if self.kept is not None:
            return weights * self.kept[rows] / (1 - self.dropout_p)
        first, last = self.bounds[bag : bag + 2]
        if bag != self.bag:
            shape = (last - first, self.columns)
            self.bag = bag
            self.mask = keep_mask(self.seed, bag, shape, self.dropout_p, self.like)
        return weights * self.mask[rows.start - first : rows.stop - first]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.eps, ctx.dropout_p, seed, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output, seed)


def _backward(ctx, grad_pooled: Tensor, grad_mass: Tensor, *_: Tensor):
    *saved, seed = ctx.saved_tensors
    of_queries, of_x, of_positions = ctx.needs_input_grad[:3]
    dqueries, dx, dpositions = torch.ops.motet.absorbed_attention_backward(
        grad_pooled,
        grad_mass,
        *saved,
        ctx.eps,
        ctx.dropout_p,
        seed,
        ctx.backend,
        of_x or of_positions,
    )
    return (
        dqueries if of_queries else None,
        dx if of_x else None,
        dpositions if of_positions else None,
        *[None] * 6,
    )


def _fake(queries, x, *_):
    full, bags, count = wide(x.dtype), queries.shape[0], queries.shape[1]
    return (
        queries.new_empty(queries.shape),
        queries.new_empty(bags, count),
        queries.new_empty(x.shape[0], count),
        x.new_empty(bags, count, dtype=full),
        x.new_empty(x.shape[0], dtype=full),
        x.new_empty(x.shape[0], dtype=full),
    )


def _fake_backward(grad_pooled, grad_mass, queries, x, positions, *rest):
    of_rows = rest[-1]
    return (
        queries.new_empty(queries.shape),
        x.new_empty(x.shape if of_rows else 0),
        positions.new_empty(positions.shape)
        if of_rows and positions is not None
        else x.new_empty(0),
    )


_LIBRARY.impl("absorbed_attention", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("absorbed_attention_backward", _backward_of, "CompositeExplicitAutograd")
torch.library.register_fake("motet::absorbed_attention", _fake, lib=_LIBRARY)
torch.library.register_fake("motet::absorbed_attention_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd(
    "motet::absorbed_attention", _backward, setup_context=_setup_context, lib=_LIBRARY
)
refuse_second_derivative(_LIBRARY, "absorbed_attention")
