"""Latent attention that takes the projections into the queries: K and V never exist."""

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
    "Tensor? positions, Tensor offsets, Tensor? counts, Tensor mean, Tensor rstd, bool given, "
    "Tensor pooled, Tensor mass, Tensor scores, Tensor lse, float eps, float dropout_p, "
    "Tensor? seed, str backend, bool rows) -> (Tensor, Tensor, Tensor)"
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
    r"""Attend to normalised context tokens themselves, each bag with queries of its own.

    .. math:: \mathrm{pooled} = D \hat z, \quad D = \mathrm{dropout}(A), \quad
        A = \mathrm{softmax}(\tilde q \hat z^\top), \quad
        \hat z_t = \frac{z_t - \mu_t}{\sqrt{\sigma_t^2 + \epsilon}}, \quad z_t = [x_t \,|\, p_t]

    With the key projection taken into the queries, :math:`\tilde q = \mathrm{scale} \cdot q W_k`,
    and the value projection applied afterwards, :math:`\mathrm{pooled}\, W_v^\top + \mathrm{mass}
    \, b_v^\top`, this is HEALNet's Eq. 2. (The softmax does not see a key's bias.) It pays where
    there are fewer queries than key channels. The backward pass keeps the scores [T, R].

    Args:
        queries: [B, R, D + P], R = heads x latents; their dtype is that of the products.
        x: [T, D] tokens.
        offsets: int64 [B + 1]: bag b owns tokens offsets[b] to offsets[b + 1].
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
    # Nothing to launch without bags or queries; torch says what comes of them.
    nothing = "needs bags and queries" if 0 in queries.shape[:2] else ""
    if nothing and backend == "triton":
        return False
    return on_triton(backend, queries.device.type, queries.dtype, nothing)


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
    """Return pooled, mass, the scores [T, R], their lse [B, R], and the statistics of the tokens.

    The latter, [T] each, are empty where they were given.
    """
    given = mean is not None
    if not _takes_triton(backend, queries):
        return cpu.forward(queries, x, positions, offsets, counts, mean, rstd, eps, dropout_p, seed)
    from ..row_statistics.triton import statistics_of
    from . import triton as launchers

    x, positions = rows_apart(x), None if positions is None else rows_apart(positions)
    mean, rstd = statistics_of(x, positions, mean, rstd, eps)
    tokens = launchers.Tokens.of(x, positions, offsets, counts, mean, rstd, eps, dropout_p, seed)
    made = launchers.attend(queries.contiguous(), tokens)
    if given:  # an operator returns no argument
        mean, rstd = x.new_empty(0, dtype=mean.dtype), x.new_empty(0, dtype=mean.dtype)
    return made.pooled, made.mass, made.scores, made.lse, mean, rstd


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
    given: bool,
    pooled: Tensor,
    mass: Tensor,
    scores: Tensor,
    lse: Tensor,
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
    fast = _takes_triton(backend, queries)
    if fast and not of_rows:
        from . import triton as launchers

        statistics = mean.contiguous(), rstd.contiguous()
        tokens = launchers.Tokens.of(
            x, positions, offsets, counts, *statistics, eps, dropout_p, seed
        )
        made = launchers.Attended(pooled, mass, scores, lse)
        dqueries = launchers.attend_backward(
            grad_pooled.contiguous(), grad_mass.contiguous(), made, tokens
        )
        return dqueries, x.new_empty(0), x.new_empty(0)
    delta = (grad_pooled * pooled).sum(-1, dtype=lse.dtype) + grad_mass * mass
    kept = None
    if fast and seed is not None:  # the mask that Triton drew in the forward pass
        shapes = lse.new_empty(len(queries), 1, lse.shape[1], 1), lse.new_empty(len(x), 1, 1)
        kept = dropout_mask(*shapes, offsets, dropout_p, seed)[:, 0]
    dqueries, rest, drows = cpu.backward(
        grad_pooled, grad_mass, queries, x, positions, offsets, counts, delta, scores, lse,
        mean, rstd, given, eps, dropout_p, seed, kept, of_rows=of_rows,
    )  # fmt: skip
    dqueries -= (rest / torch.where(mass > 0, mass, 1))[..., None] * pooled
    if not of_rows:
        return dqueries.to(queries.dtype), x.new_empty(0), x.new_empty(0)
    return dqueries.to(queries.dtype), *split_gradient(drows, x, positions)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, mean, rstd, ctx.eps, ctx.dropout_p, seed, ctx.backend = inputs
    *made, own_mean, own_rstd = output
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # zeros [T, R] for what nobody differentiates
    ctx.given = mean is not None
    statistics = (mean, rstd) if ctx.given else (own_mean, own_rstd)
    ctx.save_for_backward(*tensors, *statistics, *made, seed)


def _backward(ctx, grad_pooled: Tensor | None, grad_mass: Tensor | None, *_: None):
    *saved, seed = ctx.saved_tensors
    pooled, mass = saved[-4:-2]
    grad_pooled = torch.zeros_like(pooled) if grad_pooled is None else grad_pooled
    grad_mass = torch.zeros_like(mass) if grad_mass is None else grad_mass
    of_queries, of_x, of_positions = ctx.needs_input_grad[:3]
    dqueries, dx, dpositions = torch.ops.motet.absorbed_attention_backward(
        grad_pooled,
        grad_mass,
        *saved[:-4],
        ctx.given,
        *saved[-4:],
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
