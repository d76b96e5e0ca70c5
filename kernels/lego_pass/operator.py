"""What HEALNet and a LegoBlock do between two attentions (MM-Lego, Eq. 2 and 3)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import Backend, check_backend, on_triton, refuse_second_derivative
from ..checks import refuse_forward_mode
from ..dropout import check_dropout
from ..layout import rows_apart
from .cpu import compute_queries, update_and_query
from .spectrum import AXES, normalise_columns, scale_shape
from .weights import QueryWeights, UpdateWeights

_LIBRARY = torch.library.Library("motet", "FRAGMENT")
# Registered for the Triton form only. The last result is the scale of `column_scale`, which the
# backward pass needs.
_OF_PASS = (
    "Tensor? attended, Tensor? update, Tensor? query_weights, Tensor? present, Tensor? scaled, "
    "Tensor? seed, float dropout_p, bool snn, int[] axes, SymInt rows, ScalarType products"
)
_LIBRARY.define(
    f"lego_pass(Tensor real, Tensor? imaginary, {_OF_PASS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
# The gradients of real, imaginary, attended, `UpdateWeights.flat` and `QueryWeights.flat`.
_LIBRARY.define(
    "lego_pass_backward(Tensor? grad_real, Tensor? grad_imaginary, Tensor? grad_queries, "
    f"Tensor x, Tensor? y, Tensor scale, Tensor real, {_OF_PASS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def lego_pass(
    real: Tensor,
    attended: Tensor | None = None,
    update: UpdateWeights | None = None,
    *,
    imaginary: Tensor | None = None,
    present: Tensor | None = None,
    snn: bool = True,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    axes: tuple[int, ...] = (),
    rows: int | None = None,
    scaled: Tensor | None = None,
    query_weights: QueryWeights | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    r"""Compute the latents and the queries of the next attention from the result of the last one.

    .. math::
        x &= \mathrm{Re} Z + \mathrm{LeakyReLU}(W_o h + b_o), \quad
        \mathrm{Re} Z \leftarrow x + \mathrm{FF}(\mathrm{LN}(x)), \\
        Z &\leftarrow \sqrt n \, Z / \lVert Z \rVert, \quad
        q = W_q \, \mathrm{LN}(\mathrm{Re} Z)

    MM-Lego, Eq. 3, with the residual and the gated feed-forward of the authors' code; the second
    line is their normalisation, applied to the spectrum. Without axes it is what HEALNet does
    between two attentions (Eq. 1 and 2). On a GPU it is one Triton kernel, and three backward.

    Args:
        real: Re Z, [B, C, D]; or [1, C, D], shared by all samples.
        attended: h, [B, H, C or 1, E], outputs of heads in any dtype; None skips the first line.
        update: the weights of the first line; None without `attended`.
        imaginary: Im Z, [B, C, D] or [1, C, D]; None for zero.
        present: bool [B], False where a sample keeps its real part; None to update all.
        snn: gate the feed-forward with SELU instead of GELU.
        dropout_p: probability of dropping an output of the feed-forward, in [0, 1).
        seed: int64 [1], what the mask is drawn from; None draws one. On Triton the mask is the
            `dropout_mask` of one head with D keys, however the work is cut.
        axes: along which Z is normalised, see AXES; () for no normalisation.
        rows: C of the full spectrum if `real` has its first rows // 2 + 1; None if it has all.
        scaled: bool [B], False where a sample is not normalised; None to normalise all.
        query_weights: of the next queries, or of queries, keys and values; None for no queries.
        backend: "auto", "triton" (latents of up to 256 numbers, up to 32 bits; differentiable
            once, in reverse mode), "compile" or "eager" (these two run the same operators here).

    Returns:
        Re Z and Im Z, [B, C, D] (Im Z is the argument itself without axes), and the queries
        [B, C, Q], not scaled; None without `imaginary`, or without `query_weights`.

    Raises:
        ValueError: an unknown backend, or "triton" where it cannot compute; on Triton also shapes,
            dtypes or devices that do not fit.
        TypeError: on Triton, something that is not a tensor.
    """
    check_backend(backend)
    wide = "takes latents of up to 256 numbers" if real.shape[-1] > 256 else ""
    options = (present, snn, dropout_p, seed, axes, rows, scaled, query_weights)
    if backend != "compile" and on_triton(backend, real.device.type, real.dtype, wide):
        return _on_triton(real, attended, update, imaginary, *options)
    return update_and_query(real, attended, update, imaginary, *options)


def _check(
    real: Tensor,
    attended: Tensor | None,
    update: UpdateWeights | None,
    imaginary: Tensor | None,
    present: Tensor | None,
    axes: tuple[int, ...],
    rows: int | None,
    scaled: Tensor | None,
    query_weights: QueryWeights | None,
) -> None:
    if attended is not None and not isinstance(attended, Tensor):
        raise TypeError(f"attended: expected a tensor, got {type(attended).__name__}")
    if real.ndim != 3 or not real.is_floating_point():
        raise ValueError(
            f"real: expected floating-point [B, C, D], got {real.dtype} {tuple(real.shape)}"
        )
    first, latents, dim = real.shape
    shape = (first, 0, latents, 0) if attended is None else attended.shape
    if len(shape) != 4 or first not in (1, shape[0]) or shape[2] not in (1, latents):
        raise ValueError(
            f"attended: expected [B, H, C, E] or [B, H, 1, E] for real {tuple(real.shape)}, got "
            f"{tuple(shape)}"
        )
    if (attended is None) != (update is None):
        raise ValueError("update: expected weights if attended is given, and None if it is not")
    bags, device = shape[0], real.device
    expected = [] if attended is None else [("attended", attended, shape)]
    expected += _expected_weights(update, query_weights, dim, shape[1] * shape[3])
    if imaginary is not None:
        is_shared = isinstance(imaginary, Tensor) and imaginary.shape[:1] == (1,)
        expected.append(("imaginary", imaginary, (1 if is_shared else bags, latents, dim)))
    for name, part, shape in expected:
        if not isinstance(part, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(part).__name__}")
        if part.shape != shape:
            raise ValueError(f"{name}: expected {tuple(shape)}, got {tuple(part.shape)}")
        if part.device != device or not part.is_floating_point():
            raise ValueError(
                f"{name}: expected floating-point numbers on {device} as real, got {part.dtype} "
                f"on {part.device}"
            )
    _check_flags({"present": present, "scaled": scaled}, bags, device)
    if axes not in AXES.values():
        raise ValueError(f"axes: expected one of {list(AXES.values())}, got {axes!r}")
    if axes and rows not in (None, latents) and (axes != (-2,) or rows // 2 + 1 != latents):
        raise ValueError(
            f"rows: expected {latents}, or C of which {latents} are the first C // 2 + 1 with "
            f"axes (-2,), got {rows} with axes {axes}"
        )


def _expected_weights(
    update: UpdateWeights | None, query_weights: QueryWeights | None, dim: int, inner: int
) -> list[tuple[str, Any, Sequence[int]]]:
    """Return names, tensors and shapes of the weights for latents of `dim` and H · E = inner."""
    flat, expected = (dim,), []
    if update is not None:
        expected += [
            ("update.out_weight", update.out_weight, (dim, inner)),
            ("update.out_bias", update.out_bias, flat),
            ("update.norm_weight", update.norm_weight, flat),
            ("update.norm_bias", update.norm_bias, flat),
            ("update.up_weight", update.up_weight, (8 * dim, dim)),
            ("update.up_bias", update.up_bias, (8 * dim,)),
            ("update.down_weight", update.down_weight, (dim, 4 * dim)),
            ("update.down_bias", update.down_bias, flat),
        ]
    if query_weights is not None:
        expected += [
            ("query_weights.norm_weight", query_weights.norm_weight, flat),
            ("query_weights.norm_bias", query_weights.norm_bias, flat),
            ("query_weights.weight", query_weights.weight, (query_weights.weight.shape[0], dim)),
        ]
    return expected


def _check_flags(flags: dict[str, Tensor | None], bags: int, device: torch.device) -> None:
    for name, part in flags.items():
        if part is None:
            continue
        if not isinstance(part, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(part).__name__}")
        if (part.shape, part.dtype, part.device) != ((bags,), torch.bool, device):
            raise ValueError(
                f"{name}: expected bool [{bags}] on {device}, got {part.dtype} "
                f"{tuple(part.shape)} on {part.device}"
            )


def _on_triton(
    real: Tensor,
    attended: Tensor | None,
    update: UpdateWeights | None,
    imaginary: Tensor | None,
    present: Tensor | None,
    snn: bool,
    dropout_p: float,
    seed: Tensor | None,
    axes: tuple[int, ...],
    rows: int | None,
    scaled: Tensor | None,
    query_weights: QueryWeights | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run the kernels; normalise and query in torch if a sample is too large for one program."""
    scaled = scaled if axes else None
    if attended is None and isinstance(scaled, Tensor) and len(real) == 1:
        # Samples are equal until some of them are normalised and others are not.
        real = real.expand(len(scaled), -1, -1)
        imaginary = None if imaginary is None else imaginary.expand(len(scaled), -1, -1)
    # The kernels do not check: they would read behind the end of a tensor.
    _check(real, attended, update, imaginary, present, axes, rows, scaled, query_weights)
    seed = check_dropout(dropout_p, seed, real.device)
    refuse_forward_mode("lego_pass")
    rows = rows or real.shape[1]
    if axes and -2 in axes and not _fits(real.shape[1], real.shape[2]):
        x = real
        if attended is not None:
            x, _, _ = _on_triton(
                real, attended, update, None, present, snn, dropout_p, seed, (), rows, None, None
            )
        x, imaginary = normalise_columns(x, imaginary, axes, rows, scaled)
        return x, imaginary, None if query_weights is None else compute_queries(x, query_weights)
    weights = update if query_weights is None else query_weights
    if weights is None and not axes:
        return real, imaginary, None
    if imaginary is not None and axes and attended is not None and len(imaginary) != len(real):
        imaginary, real = (
            imaginary.expand(len(attended), -1, -1),
            real.expand(len(attended), -1, -1),
        )
    x, y, queries, _ = torch.ops.motet.lego_pass(
        real, imaginary if axes else None, attended, None if update is None else update.flat,
        None if query_weights is None else query_weights.flat, present, scaled, seed, dropout_p,
        snn, axes, rows, _products(real if weights is None else weights.norm_weight),
    )  # fmt: skip
    return (
        x,
        y if axes and imaginary is not None else imaginary,
        None if query_weights is None else queries,
    )


def _products(weight: Tensor) -> torch.dtype:
    """Return the dtype in which torch would multiply by a weight."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype == torch.float32:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _fits(latents: int, dim: int) -> bool:
    """Return whether one Triton program can hold a sample [C, D], in a tile of powers of 2."""
    tile = [16, 16]
    for i, size in enumerate((latents, dim)):
        while tile[i] < size:
            tile[i] *= 2
    return tile[0] * tile[1] <= 8192


def _forward(
    real: Tensor, imaginary: Tensor | None, attended: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from . import triton as launchers

    imaginary, update, query_weights, present, scaled, seed = _contiguous((imaginary, *rest[:5]))
    return launchers.forward(
        real.contiguous(), imaginary, _apart(attended), update, query_weights, present, scaled,
        seed, *rest[5:],
    )  # fmt: skip


def _backward_of(
    grad_real: Tensor | None,
    grad_imaginary: Tensor | None,
    grad_queries: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    real: Tensor,
    attended: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    from . import triton as launchers

    dx, dy, dqueries = _contiguous((grad_real, grad_imaginary, grad_queries))
    update, query_weights, present, scaled, seed = _contiguous(rest[:5])
    return launchers.backward(
        dx, dy, dqueries, x, y, scale, real.contiguous(), _apart(attended), update, query_weights,
        present, scaled, seed, *rest[5:],
    )  # fmt: skip


def _apart(attended: Tensor | None) -> Tensor | None:
    return None if attended is None else rows_apart(attended)


def _contiguous(tensors: Sequence[Any]) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]


def _setup_context(ctx, inputs, output) -> None:
    real, imaginary, attended, *rest = inputs
    x, y, _, scale = output
    ctx.mark_non_differentiable(scale)
    ctx.set_materialize_grads(False)
    *tensors, ctx.dropout_p, ctx.snn, ctx.axes, ctx.rows, ctx.products = rest
    y = None if imaginary is None else y
    ctx.save_for_backward(x, y, scale, real, attended, *tensors)


def _backward(ctx, grad_real, grad_imaginary, grad_queries, _):
    _, y, _, _, attended, update, query_weights, *_ = saved = ctx.saved_tensors
    grad_queries = None if query_weights is None else grad_queries
    dreal, dimaginary, dattended, dupdate, dquery_weights = torch.ops.motet.lego_pass_backward(
        grad_real, grad_imaginary, grad_queries, *saved, ctx.dropout_p, ctx.snn, ctx.axes, ctx.rows,
        ctx.products,
    )  # fmt: skip
    return (
        dreal,
        None if y is None else dimaginary,
        None if attended is None else dattended,
        None if update is None else dupdate.to(update.dtype),
        None
        if query_weights is None or grad_queries is None
        else dquery_weights.to(query_weights.dtype),
        *[None] * 8,
    )


def _fake(real, imaginary, attended, update, query_weights, *rest):
    axes, products = rest[5], rest[7]
    shape = (real.shape[0] if attended is None else attended.shape[0], *real.shape[1:])
    query_width = 0 if query_weights is None else query_weights.shape[0] // real.shape[2] - 2
    return (
        real.new_empty(shape),
        real.new_empty(0 if imaginary is None else shape),
        real.new_empty((*shape[:2], query_width) if query_width else 0, dtype=products),
        real.new_empty(scale_shape(shape, axes), dtype=torch.float32),
    )


def _fake_backward(
    grad_real,
    grad_imaginary,
    grad_queries,
    x,
    y,
    scale,
    real,
    attended,
    update,
    query_weights,
    *rest,
):
    full = {"dtype": torch.float32}
    return (
        real.new_empty(real.shape),
        real.new_empty(0 if y is None else real.shape),
        real.new_empty(0) if attended is None else attended.new_empty(attended.shape),
        real.new_empty(0 if update is None else update.shape, **full),
        real.new_empty(
            0 if query_weights is None or grad_queries is None else query_weights.shape, **full
        ),
    )


_LIBRARY.impl("lego_pass", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("lego_pass_backward", _backward_of, "CompositeExplicitAutograd")
torch.library.register_fake("motet::lego_pass", _fake, lib=_LIBRARY)
torch.library.register_fake("motet::lego_pass_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd(
    "motet::lego_pass", _backward, setup_context=_setup_context, lib=_LIBRARY
)
refuse_second_derivative(_LIBRARY, "lego_pass")
