"""What a LegoBlock does between two attentions, without a transform (MM-Lego, Eq. 2 and 3)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import Backend, check_backend, on_triton, refuse_second_derivative
from ..checks import refuse_forward_mode
from ..layout import rows_apart
from .cpu import ask, update_and_ask
from .spectrum import AXES, normalised, scale_shape
from .weights import Asking, Update

_LIBRARY = torch.library.Library("motet", "FRAGMENT")
# The Triton form alone. The last result is the scale of `column_scale`, for the backward pass.
_WEIGHTS = (
    "Tensor out_weight, Tensor out_bias, Tensor norm_weight, Tensor norm_bias, Tensor up_weight, "
    "Tensor up_bias, Tensor down_weight, Tensor down_bias, Tensor? ask_norm_weight, "
    "Tensor? ask_norm_bias, Tensor? ask_weight, Tensor? present, Tensor? keep, Tensor? scaled, "
    "bool snn, int[] axes, SymInt rows, ScalarType products"
)
_LIBRARY.define(
    f"lego_pass(Tensor real, Tensor? imaginary, Tensor gathered, {_WEIGHTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
# The gradients of real, imaginary and gathered, of the four matrices, and of the vectors beside
# each other: [12 D], of up, out, LayerNorm (two) and down; [2 D], of the queries' LayerNorm.
_LIBRARY.define(
    "lego_pass_backward(Tensor? grad_real, Tensor? grad_imaginary, Tensor? grad_queries, "
    f"Tensor x, Tensor? y, Tensor scale, Tensor real, Tensor gathered, {_WEIGHTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def lego_pass(
    real: Tensor,
    gathered: Tensor,
    update: Update,
    *,
    imaginary: Tensor | None = None,
    present: Tensor | None = None,
    snn: bool = True,
    keep: Tensor | None = None,
    axes: tuple[int, ...] = (),
    rows: int | None = None,
    scaled: Tensor | None = None,
    asking: Asking | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    r"""Go from what one attention gathered to the queries of the next.

    .. math::
        x &= \mathrm{Re} Z + \mathrm{LeakyReLU}(W_o h + b_o), \quad
        \mathrm{Re} Z \leftarrow x + \mathrm{FF}(\mathrm{LN}(x)), \\
        Z &\leftarrow \sqrt n \, Z / \lVert Z \rVert, \quad
        q = W_q \, \mathrm{LN}(\mathrm{Re} Z)

    MM-Lego, Eq. 3, with the residual and the gated feed-forward of the authors' code; the second
    line is their normalisation, carried over to the spectrum. On a GPU it is one Triton kernel.

    Args:
        real: [B, C, D], Re Z; or [1, C, D], shared by all rows.
        gathered: [B, H, C, E] or [B, H, 1, E], what the heads of the attention gathered.
        update: the weights.
        imaginary: Im Z, [B, C, D] or [1, C, D]; None for zero.
        present: bool [B], False where a row keeps its real part; None if none does.
        snn: gate the feed-forward with SELU instead of GELU.
        keep: [B, C, D], what the feed-forward's output is multiplied by: dropout.
        axes: along which Z is normalised, see AXES; () for no normalisation.
        rows: C of the whole spectrum where `real` holds its first rows // 2 + 1; None if all.
        scaled: bool [B], False where a row is not normalised; None if all are.
        asking: the weights of the next queries; None for none.
        backend: "auto", "triton" (latents of up to 256 numbers, up to 32 bits; differentiable
            once, in reverse mode), "compile" or "eager" (these two run the same operators here).

    Returns:
        Re Z and Im Z, [B, C, D] (Im Z as it came where nothing is normalised), and the queries
        [B, C, H · E], not scaled. Each is None where it has no input.

    Raises:
        ValueError: an unknown backend, or Triton where it cannot be had; before the kernels, also
            shapes, dtypes or devices that do not fit.
        TypeError: before the kernels, something that is not a tensor.
    """
    check_backend(backend)
    wide = "takes latents of up to 256 numbers" if real.shape[-1] > 256 else ""
    if backend != "compile" and on_triton(backend, real.device.type, real.dtype, wide):
        return _on_triton(
            real, gathered, update, imaginary, present, snn, keep, axes, rows, scaled, asking
        )
    return update_and_ask(
        real, gathered, update, imaginary, present, snn, keep, axes, rows, scaled, asking
    )


def _check(
    real: Tensor,
    gathered: Tensor,
    update: Update,
    imaginary: Tensor | None,
    present: Tensor | None,
    keep: Tensor | None,
    axes: tuple[int, ...],
    rows: int | None,
    scaled: Tensor | None,
    asking: Asking | None,
) -> None:
    if not isinstance(gathered, Tensor):
        raise TypeError(f"gathered: expected a tensor, got {type(gathered).__name__}")
    if real.ndim != 3 or not real.is_floating_point():
        raise ValueError(
            f"real: expected floating-point [B, C, D], got {real.dtype} {tuple(real.shape)}"
        )
    (first, latents, dim), shape = real.shape, gathered.shape
    if len(shape) != 4 or first not in (1, shape[0]) or shape[2] not in (1, latents):
        raise ValueError(
            f"gathered: expected [B, H, C, E] or [B, H, 1, E] for real {tuple(real.shape)}, got "
            f"{tuple(shape)}"
        )
    bags, device = shape[0], real.device
    expected = [("gathered", gathered, shape)]
    expected += _expected_weights(update, asking, dim, shape[1] * shape[3])
    if imaginary is not None:
        for_all = isinstance(imaginary, Tensor) and imaginary.shape[:1] == (1,)
        expected.append(("imaginary", imaginary, (1 if for_all else bags, latents, dim)))
    if keep is not None:
        expected.append(("keep", keep, (bags, latents, dim)))
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
    update: Update, asking: Asking | None, dim: int, inner: int
) -> list[tuple[str, Any, Sequence[int]]]:
    """Return names, tensors and shapes of the weights for latents of `dim` and H · E = inner."""
    flat = (dim,)
    expected: list[tuple[str, Any, Sequence[int]]] = [
        ("update.out_weight", update[0], (dim, inner)),
        ("update.out_bias", update[1], flat),
        ("update.norm_weight", update[2], flat),
        ("update.norm_bias", update[3], flat),
        ("update.up_weight", update[4], (8 * dim, dim)),
        ("update.up_bias", update[5], (8 * dim,)),
        ("update.down_weight", update[6], (dim, 4 * dim)),
        ("update.down_bias", update[7], flat),
    ]
    if asking is not None:
        expected += [
            ("asking.norm_weight", asking[0], flat),
            ("asking.norm_bias", asking[1], flat),
            ("asking.weight", asking[2], (asking[2].shape[0], dim)),
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
    gathered: Tensor,
    update: Update,
    imaginary: Tensor | None,
    present: Tensor | None,
    snn: bool,
    keep: Tensor | None,
    axes: tuple[int, ...],
    rows: int | None,
    scaled: Tensor | None,
    asking: Asking | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run the kernels; normalise and ask in torch where a sample is too large for one program."""
    # Before kernels that would read beyond what is there; torch's operators look themselves.
    _check(real, gathered, update, imaginary, present, keep, axes, rows, scaled, asking)
    refuse_forward_mode("lego_pass")
    rows = rows or real.shape[1]
    products, device = update.out_weight.dtype, real.device.type
    if torch.is_autocast_enabled(device) and products == torch.float32:
        products = torch.get_autocast_dtype(device)
    within = -2 not in axes or _fits(real.shape[1], real.shape[2])
    if imaginary is not None and axes and len(imaginary) != len(real):
        imaginary, real = (
            imaginary.expand(len(gathered), -1, -1),
            real.expand(len(gathered), -1, -1),
        )
    x, y, queries, _ = torch.ops.motet.lego_pass(
        real, imaginary if axes and within else None, gathered, *update,
        *((asking if within else None) or (None,) * 3), present, keep, scaled, snn,
        axes if within else (), rows, products,
    )  # fmt: skip
    if not within:
        x, imaginary = normalised(x, imaginary, axes, rows, scaled)
        return x, imaginary, None if asking is None else ask(x, asking)
    return (
        x,
        y if axes and imaginary is not None else imaginary,
        None if asking is None else queries,
    )


def _fits(latents: int, dim: int) -> bool:
    """Return whether one Triton program can hold a sample [C, D]."""
    tile = [16, 16]
    for i, size in enumerate((latents, dim)):
        while tile[i] < size:
            tile[i] *= 2
    return tile[0] * tile[1] <= 8192


def _forward(
    real: Tensor, imaginary: Tensor | None, gathered: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from . import triton as launchers

    imaginary = None if imaginary is None else imaginary.contiguous()
    arguments = real.contiguous(), imaginary, rows_apart(gathered)
    return launchers.forward(*arguments, *_named(_contiguous(rest[:14])), *rest[14:])


def _backward_of(
    grad_real: Tensor | None,
    grad_imaginary: Tensor | None,
    grad_queries: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    real: Tensor,
    gathered: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    from . import triton as launchers

    of_real, of_imaginary, of_queries = _contiguous((grad_real, grad_imaginary, grad_queries))
    arguments = of_real, of_imaginary, of_queries, x, y, scale, real.contiguous()
    named = _named(_contiguous(rest[:14]))
    return launchers.backward(*arguments, rows_apart(gathered), *named, *rest[14:])


def _named(
    tensors: Sequence[Any],
) -> tuple[Update, Asking | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the weights by name, present, keep and scaled, of the tensors that an operator got."""
    asking = None if tensors[10] is None else Asking(*tensors[8:11])
    return Update(*tensors[:8]), asking, tensors[11], tensors[12], tensors[13]


def _contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _setup_context(ctx, inputs, output) -> None:
    real, imaginary, gathered, *rest = inputs
    x, y, _, scale = output
    ctx.mark_non_differentiable(scale)
    ctx.set_materialize_grads(False)
    *tensors, ctx.snn, ctx.axes, ctx.rows, ctx.products = rest
    y = None if imaginary is None else y
    ctx.save_for_backward(x, y, scale, real, gathered, *tensors)


def _backward(ctx, grad_real, grad_imaginary, grad_queries, _):
    saved = ctx.saved_tensors
    dim, weights = saved[0].shape[2], saved[5:16]
    dreal, dimaginary, dgathered, *matrices, vectors, ask, asks = (
        torch.ops.motet.lego_pass_backward(
            grad_real, grad_imaginary, grad_queries, *saved, ctx.snn, ctx.axes, ctx.rows,
            ctx.products,
        )
    )  # fmt: skip
    out, up, down = matrices
    of_up, of_out, of_gain, of_shift, of_down = vectors.split([8 * dim, dim, dim, dim, dim])
    gradients = [out, of_out, of_gain, of_shift, up, of_up, down, of_down]
    gradients += [None] * 3 if weights[-1] is None else [*asks.chunk(2), ask]
    return (
        dreal,
        None if saved[1] is None else dimaginary,
        dgathered,
        *(
            g if g is None else g.to(w.dtype) for g, w in zip(gradients, weights, strict=True)
        ),
        *[None] * 7,
    )  # fmt: skip


def _fake(real, imaginary, gathered, *rest):
    ask_weight, axes, products = rest[10], rest[15], rest[17]
    shape = (gathered.shape[0], *real.shape[1:])
    queries = 0 if ask_weight is None else (*shape[:2], ask_weight.shape[0])
    return (
        real.new_empty(shape),
        real.new_empty(0 if imaginary is None else shape),
        real.new_empty(queries, dtype=products),
        real.new_empty(scale_shape(shape, axes), dtype=torch.float32),
    )


def _fake_backward(grad_real, grad_imaginary, grad_queries, x, y, scale, real, gathered, *rest):
    out, up, down, ask_weight, products = rest[0], rest[4], rest[6], rest[10], rest[17]
    low, full = {"dtype": products}, {"dtype": torch.float32}
    dim = real.shape[2]
    return (
        real.new_empty(real.shape),
        real.new_empty(0 if y is None else real.shape),
        gathered.new_empty(gathered.shape),
        *(real.new_empty(weight.shape, **low) for weight in (out, up, down)),
        real.new_empty(12 * dim, **full),
        real.new_empty(0 if ask_weight is None else ask_weight.shape, **low),
        real.new_empty(0 if ask_weight is None else 2 * dim, **full),
    )


_LIBRARY.impl("lego_pass", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("lego_pass_backward", _backward_of, "CompositeExplicitAutograd")
torch.library.register_fake("motet::lego_pass", _fake, lib=_LIBRARY)
torch.library.register_fake("motet::lego_pass_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd(
    "motet::lego_pass", _backward, setup_context=_setup_context, lib=_LIBRARY
)
refuse_second_derivative(_LIBRARY, "lego_pass")
