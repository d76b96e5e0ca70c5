"""Latent attention without K and V: their projections are multiplied into the queries."""

import torch
from torch import Tensor

from ..backends import Backend, check_backend, compiled, on_triton, refuse_second_derivative
from ..checks import check_counts, check_rows, check_statistics, refuse_forward_mode
from ..dropout import check_dropout, dropout_mask
from ..dtypes import wide
from ..layout import rows_apart
from ..standardise import split_gradient
from . import cpu
from .reference import absorbed_attention_reference

_LIBRARY = torch.library.Library("motet", "FRAGMENT")
_LIBRARY.define(
    "absorbed_attention(Tensor queries, Tensor x, Tensor? positions, Tensor offsets, "
    "Tensor? counts, Tensor? mean, Tensor? rstd, float eps, float dropout_p, Tensor? seed, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "absorbed_attention_backward(Tensor grad_pooled, Tensor grad_mass, Tensor queries, Tensor x, "
    "Tensor? positions, Tensor offsets, Tensor? counts, Tensor mean, Tensor rstd, "
    "bool statistics_given, Tensor pooled, Tensor mass, Tensor scores, Tensor lse, float eps, "
    "float dropout_p, Tensor? seed, str backend, bool needs_rows) -> (Tensor, Tensor, Tensor)"
)


def absorbed_attention(
    queries: Tensor,
    x: Tensor,
    offsets: Tensor,
    *,
    positions: Tensor | None = None,
    counts: Tensor | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Attend to the normalised context tokens themselves, with separate queries for each bag.

    .. math:: \mathrm{pooled} = D \hat z, \quad D = \mathrm{dropout}(A), \quad
        A = \mathrm{softmax}(\tilde q \hat z^\top), \quad
        \hat z_t = \frac{z_t - \mu_t}{\sqrt{\sigma_t^2 + \epsilon}}, \quad z_t = [x_t \,|\, p_t]

    With the key projection taken into the queries, :math:`\tilde q = \mathrm{scale} \cdot q W_k`,
    and the value projection applied afterwards, :math:`\mathrm{pooled}\, W_v^\top + \mathrm{mass}
    \, b_v^\top`, this is HEALNet's Eq. 2. (A bias of the keys does not change the softmax.) It is
    less work if there are fewer queries than key channels. The scores [T, R] are kept.

    Args:
        queries: [B, R, D + P], R = heads x latents; their dtype is that of the products.
        x: [T, D] tokens.
        offsets: int64 [B + 1]: bag b has tokens offsets[b] to offsets[b + 1].
        positions, statistics: as in context_kv; gradients behind the last bag are undefined.
        counts: [T], how many tokens each of `x` stands for, as in latent_attention.
        eps: ε.
        dropout_p: probability of dropping an attention weight, in [0, 1); 0 with `counts`.
        seed: as in latent_attention.
        backend: "auto", "triton", "eager", or "compile" ("eager" with dropout or statistics).

    Returns:
        pooled [B, R, D + P]; and mass [B, R], the sum of each row of D, 1 without dropout; both 0
        for a bag without tokens. Differentiable once, in reverse mode.

    Raises:
        ValueError: shapes, dtypes, devices, offsets or counts that do not fit.
        TypeError: something that is not a tensor.

    Example:
        >>> queries, x = torch.randn(2, 200, 32), torch.randn(70, 32)
        >>> pooled, mass = motet.kernels.absorbed_attention(queries, x, torch.tensor([0, 50, 70]))
        >>> pooled.shape, mass.shape
        (torch.Size([2, 200, 32]), torch.Size([2, 200]))
    """
    _check(queries, x, offsets, positions, backend)
    seed = check_dropout(dropout_p, seed, x.device)
    check_counts(counts, x.shape[:1], x, dropout_p)
    mean, rstd = check_statistics(statistics, x)
    refuse_forward_mode("absorbed_attention")
    if backend == "compile" and not dropout_p and statistics is None:
        literal = compiled(absorbed_attention_reference)
        return literal(queries, x, offsets, positions=positions, counts=counts, eps=eps)
    return torch.ops.motet.absorbed_attention(
        queries, x, positions, offsets, counts, mean, rstd, eps, dropout_p, seed, backend
    )[:2]


def absorbed_weights(
    queries: Tensor,
    x: Tensor,
    offsets: Tensor,
    *,
    positions: Tensor | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
    backend: Backend = "auto",
) -> Tensor:
    """Return the weights A of absorbed_attention, before dropout, [T, R]; not differentiable."""
    _check(queries, x, offsets, positions, backend)
    mean, rstd = check_statistics(statistics, x)
    with torch.no_grad():
        _, _, scores, lse, _, _ = torch.ops.motet.absorbed_attention(
            queries, x, positions, offsets, None, mean, rstd, eps, 0.0, None, backend
        )
    lengths = offsets.diff()
    return (
        (scores.to(lse.dtype) - lse.repeat_interleave(lengths, 0, output_size=len(x)))
        .exp()
        .to(queries.dtype)
    )


def _check(
    queries: Tensor, x: Tensor, offsets: Tensor, positions: Tensor | None, backend: Backend
) -> None:
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
    check_backend(backend)


def _takes_triton(backend: str, queries: Tensor) -> bool:
    # Without bags or queries there is nothing to launch: torch computes the empty results.
    why_not = "needs bags and queries" if 0 in queries.shape[:2] else ""
    if why_not and backend == "triton":
        return False
    return on_triton(backend, queries.device.type, queries.dtype, why_not)


def _forward(
    queries: Tensor,
    x: Tensor,
    positions: Tensor | None,
    offsets: Tensor,
    counts: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return pooled, mass, the scores [T, R], their lse [B, R], and the tokens' means and 1 / SDs.

    The last two, [T] each, are empty if the caller gave them.
    """
    statistics_given = mean is not None
    if not _takes_triton(backend, queries):
        return cpu.forward(queries, x, positions, offsets, counts, mean, rstd, eps, dropout_p, seed)
    from ..row_statistics.triton import statistics_of
    from . import triton as launchers

    x, positions = rows_apart(x), None if positions is None else rows_apart(positions)
    mean, rstd = statistics_of(x, positions, mean, rstd, eps)
    tokens = launchers.Tokens.of(x, positions, offsets, counts, mean, rstd, eps, dropout_p, seed)
    attended = launchers.attend(queries.contiguous(), tokens)
    if statistics_given:  # a torch.library operator must not return one of its arguments
        mean, rstd = x.new_empty(0, dtype=mean.dtype), x.new_empty(0, dtype=mean.dtype)
    return attended.pooled, attended.mass, attended.scores, attended.lse, mean, rstd


def _backward_of(
    grad_pooled: Tensor,
    grad_mass: Tensor,
    queries: Tensor,
    x: Tensor,
    positions: Tensor | None,
    offsets: Tensor,
    counts: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    statistics_given: bool,
    pooled: Tensor,
    mass: Tensor,
    scores: Tensor,
    lse: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
    needs_rows: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, x and positions, the last two empty without `needs_rows`.

    dS = A ∘ (mask ∘ (dpooled ẑᵀ + dmass) - delta), delta = rowsum(dpooled ∘ pooled) + dmass mass,
    dqueries = dS ẑ. Each row of dS sums to 0 in exact arithmetic. Rounding leaves a small sum,
    which would be multiplied by the part that all tokens have in common: so the pooled token
    is subtracted from every token, dqueries = dS (ẑ - pooled / mass), which is the same number in
    exact arithmetic.
    """
    takes_triton = _takes_triton(backend, queries)
    if takes_triton and not needs_rows:
        from . import triton as launchers

        tokens = launchers.Tokens.of(
            x, positions, offsets, counts, mean, rstd, eps, dropout_p, seed
        )
        attended = launchers.Attended(pooled, mass, scores, lse)
        dqueries = launchers.attend_backward(
            grad_pooled.contiguous(), grad_mass.contiguous(), attended, tokens
        )
        return dqueries, x.new_empty(0), x.new_empty(0)
    delta = (grad_pooled * pooled).sum(-1, dtype=lse.dtype) + grad_mass * mass
    kept = None
    if takes_triton and seed is not None:  # the mask that Triton drew in the forward pass
        shapes = lse.new_empty(len(queries), 1, lse.shape[1], 1), lse.new_empty(len(x), 1, 1)
        kept = dropout_mask(*shapes, offsets, dropout_p, seed)[:, 0]
    dqueries, row_sums, drows = cpu.backward(
        grad_pooled, grad_mass, queries, x, positions, offsets, counts, delta, scores, lse,
        mean, rstd, statistics_given, eps, dropout_p, seed, kept, needs_rows=needs_rows,
    )  # fmt: skip
    dqueries -= (row_sums / torch.where(mass > 0, mass, 1))[..., None] * pooled
    if not needs_rows:
        return dqueries.to(queries.dtype), x.new_empty(0), x.new_empty(0)
    return dqueries.to(queries.dtype), *split_gradient(drows, x, positions)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, mean, rstd, ctx.eps, ctx.dropout_p, seed, ctx.backend = inputs
    *attended, computed_mean, computed_rstd = output
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # else torch makes zeros [T, R] as the gradient of the scores
    ctx.statistics_given = mean is not None
    statistics = (mean, rstd) if ctx.statistics_given else (computed_mean, computed_rstd)
    ctx.save_for_backward(*tensors, *statistics, *attended, seed)


def _backward(ctx, grad_pooled: Tensor | None, grad_mass: Tensor | None, *_: None):
    *saved, seed = ctx.saved_tensors
    pooled, mass = saved[-4:-2]
    grad_pooled = torch.zeros_like(pooled) if grad_pooled is None else grad_pooled
    grad_mass = torch.zeros_like(mass) if grad_mass is None else grad_mass
    needs_queries, needs_x, needs_positions = ctx.needs_input_grad[:3]
    dqueries, dx, dpositions = torch.ops.motet.absorbed_attention_backward(
        grad_pooled,
        grad_mass,
        *saved[:-4],
        ctx.statistics_given,
        *saved[-4:],
        ctx.eps,
        ctx.dropout_p,
        seed,
        ctx.backend,
        needs_x or needs_positions,
    )
    return (
        dqueries if needs_queries else None,
        dx if needs_x else None,
        dpositions if needs_positions else None,
        *[None] * 8,
    )


def _fake(queries, x, positions, offsets, counts, mean, *_):
    full, bags, count = wide(x.dtype), queries.shape[0], queries.shape[1]
    rows = x.shape[0] if mean is None else 0
    return (
        queries.new_empty(queries.shape),
        queries.new_empty(bags, count),
        queries.new_empty(x.shape[0], count),
        x.new_empty(bags, count, dtype=full),
        x.new_empty(rows, dtype=full),
        x.new_empty(rows, dtype=full),
    )


def _fake_backward(grad_pooled, grad_mass, queries, x, positions, *rest):
    needs_rows = rest[-1]
    return (
        queries.new_empty(queries.shape),
        x.new_empty(x.shape if needs_rows else 0),
        positions.new_empty(positions.shape)
        if needs_rows and positions is not None
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
