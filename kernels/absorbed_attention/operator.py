"""Latent attention that takes the projections into the queries: K and V never exist."""

import torch
from torch import Tensor

from ..backends import Backend, check_backend, compiled, on_triton, refuse_second_derivative
from ..checks import check_counts, check_rows, refuse_forward_mode
from ..dropout import check_dropout, dropout_mask
from ..dtypes import wide
from ..layout import rows_apart
from ..standardise import split_gradient
from . import cpu
from .reference import absorbed_attention_reference

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
        >>> pooled, mass = motet.kernels.absorbed_attention(queries, x, torch.tensor([0, 50, 70]))
        >>> pooled.shape, mass.shape
        (torch.Size([2, 200, 32]), torch.Size([2, 200]))
    """
    _check(queries, x, offsets, positions, backend)
    seed = check_dropout(dropout_p, seed, x.device)
    check_counts(counts, x.shape[:1], x, dropout_p)
    refuse_forward_mode("absorbed_attention")
    if backend == "compile" and not dropout_p:
        return compiled(absorbed_attention_reference)(
            queries, x, offsets, positions=positions, counts=counts, eps=eps
        )
    return torch.ops.motet.absorbed_attention(
        queries, x, positions, offsets, counts, eps, dropout_p, seed, backend
    )[:2]


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
    _check(queries, x, offsets, positions, backend)
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
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return pooled, mass, the scores [T, R], their lse [B, R], mean and rstd [T] of the tokens."""
    if _takes_triton(backend, queries):
        from . import triton as launchers

        queries, places = queries.contiguous(), None if positions is None else rows_apart(positions)
        return launchers.attend(
            queries, rows_apart(x), places, offsets, counts, eps, dropout_p, seed
        )
    return cpu.forward(queries, x, positions, offsets, counts, eps, dropout_p, seed)


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
    fast = _takes_triton(backend, queries)
    if fast and not of_rows:
        from . import triton as launchers

        places = None if positions is None else rows_apart(positions)
        dqueries, rest = launchers.attend_backward(
            grad_pooled, grad_mass, delta, queries, rows_apart(x), places, offsets, counts, scores,
            lse, mean, rstd, eps, dropout_p, seed,
        )  # fmt: skip
        dqueries -= _times_mean_token(rest, pooled, mass)
        return dqueries.to(queries.dtype), x.new_empty(0), x.new_empty(0)
    kept = None
    if fast and seed is not None:  # the mask that Triton drew in the forward pass
        shapes = lse.new_empty(len(queries), 1, lse.shape[1], 1), lse.new_empty(len(x), 1, 1)
        kept = dropout_mask(*shapes, offsets, dropout_p, seed)[:, 0]
    dqueries, rest, drows = cpu.backward(
        grad_pooled, grad_mass, queries, x, positions, offsets, counts, delta, scores, lse, mean,
        rstd, eps, dropout_p, seed, kept, of_rows=of_rows,
    )  # fmt: skip
    dqueries -= _times_mean_token(rest, pooled, mass)
    if not of_rows:
        return dqueries.to(queries.dtype), x.new_empty(0), x.new_empty(0)
    return dqueries.to(queries.dtype), *split_gradient(drows, x, positions)


def _times_mean_token(rest: Tensor, pooled: Tensor, mass: Tensor) -> Tensor:
    return (rest / torch.where(mass > 0, mass, 1))[..., None] * pooled


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
