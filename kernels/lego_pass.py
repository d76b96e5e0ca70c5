"""What a LegoBlock does between two attentions, without a transform (MM-Lego, Eq. 2 and 3).

A pass transforms the latents, updates the real part and transforms back; the next pass begins with
the transform of that. Between passes F(F⁻¹ z) = z, so one transform of the first latents is all it
takes (`spectrum`), and the loop carries Re z and Im z as two real tensors. Dividing the latents by
their norm along the transformed axes before a transform is, by Parseval, a factor per column of z.
"""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import (
    Backend,
    check_backend,
    on_triton,
    refuse_second_derivative,
    rows_apart,
    triton_kernels,
)
from .checks import refuse_forward_mode

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

# The axes of latents [B, C, D] along which each transform, and so its normalisation, runs.
AXES: dict[str | None, tuple[int, ...]] = {
    "2d": (-2, -1),
    "latents": (-2,),
    "width": (-1,),
    None: (),
}


class Update(NamedTuple):
    """The weights of what follows an attention: its output projection, and the feed-forward."""

    out_weight: Tensor
    """[D, H · E]."""
    out_bias: Tensor
    """[D]."""
    norm_weight: Tensor
    """[D], as `norm_bias`: LayerNorm before the feed-forward."""
    norm_bias: Tensor
    up_weight: Tensor
    """[8 D, D]: values, then gates."""
    up_bias: Tensor
    """[8 D]."""
    down_weight: Tensor
    """[D, 4 D]."""
    down_bias: Tensor
    """[D]."""


class Asking(NamedTuple):
    """The weights that make the queries of an attention."""

    norm_weight: Tensor
    """[D], as `norm_bias`: LayerNorm of the latents."""
    norm_bias: Tensor
    weight: Tensor
    """[H · E, D]."""


def scale_shape(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of `column_scale` for latents [B, C, D]; (0,) without axes."""
    return tuple(1 if i - 3 in axes else n for i, n in enumerate(shape)) if axes else (0,)


def spectrum(
    latents: Tensor, axes: tuple[int, ...], *, half: bool = False, own: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return Re F and Im F of real latents [..., C, D].

    Where F is real in exact numbers, Im F is exactly zero: rounding noise there would decide the
    phase of a merge, since a negative real number has phase π or -π.

    Args:
        latents: float32 or float64.
        axes: along which to transform, of AXES, not empty.
        half: of a transform along the latents alone, return rows 0 to C // 2, [..., C // 2 + 1, D];
            the others follow from these (`whole`).
        own: what `self_conjugate` gives, where it is at hand.
    """
    if own is None:
        own = self_conjugate(latents.shape[-2], latents.shape[-1], axes, latents.device)
    z = torch.fft.rfft(latents, dim=-2) if half else fourier(latents, axes)
    return z.real, z.imag.masked_fill(own[: z.shape[-2]], 0)


def fourier(x: Tensor, axes: tuple[int, ...], *, inverse: bool = False) -> Tensor:
    """Return the transform of x along `axes`, complex; also of no rows, which MKL refuses."""
    if x.numel() == 0:
        return x if x.is_complex() else torch.complex(x, x)
    return torch.fft.ifftn(x, dim=axes) if inverse else torch.fft.fftn(x, dim=axes)


def self_conjugate(
    rows: int, columns: int, axes: tuple[int, ...], device: torch.device | None = None
) -> Tensor:
    """Mark the frequencies, bool [rows, columns], at which the spectrum of real numbers is real."""
    marks = torch.ones(rows, columns, dtype=torch.bool, device=device)
    for axis in axes:
        frequency = torch.arange(marks.shape[axis], device=device)
        own = frequency == -frequency % len(frequency)
        marks &= own[:, None] if axis == -2 else own
    return marks


# Up to so many tokens, their cosine transform is sooner done on a CPU as a product with a matrix
# than by the FFT, which puts the tokens of each feature side by side first and computes sines too.
DENSE = 256


def _cosines(tokens: Tensor) -> Tensor:
    """Return cos(2 π k n / N) for k = 0 ... N // 2 and n = 0 ... N - 1, [N // 2 + 1, N]."""
    count = tokens.shape[-2]
    n = torch.arange(count)
    # Taken from one period of the cosine in float64, so that no digits are lost in the angle.
    period = (n.double() * (2 * math.pi / count)).cos().to(tokens.dtype)
    return period[n[: count // 2 + 1, None] * n % count]


def real_spectrum(
    tokens: Tensor, axes: tuple[int, ...], *, half: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return Re F of real tokens [..., N, D] along `axes`, and how many rows each one stands for.

    Along the tokens alone, rows k and N - k are equal: with `half`, rows 0 to N // 2 are returned,
    and their counts [N // 2 + 1], which the attention operators take; else None.
    """
    if axes == (-2,) and tokens.numel():
        count = tokens.shape[-2]
        if count <= DENSE and tokens.device.type == "cpu":
            real = _cosines(tokens) @ tokens
        else:
            real = torch.fft.rfft(tokens, dim=-2).real
        if not half:
            return whole(real, None, count)[0], None
        counts = torch.full((real.shape[-2],), 2, dtype=real.dtype, device=real.device)
        counts[0] = 1
        if count % 2 == 0:
            counts[-1] = 1
        return real, counts
    return fourier(tokens, axes).real, None


def whole(real: Tensor, imaginary: Tensor | None, rows: int) -> tuple[Tensor, Tensor | None]:
    """Return all `rows` rows of a spectrum from its first rows // 2 + 1: Re is even, Im odd."""
    mirrored = rows - real.shape[-2]
    if not mirrored:
        return real, imaginary
    real = torch.cat([real, real[..., 1 : mirrored + 1, :].flip(-2)], dim=-2)
    if imaginary is not None:
        rest = imaginary[..., 1 : mirrored + 1, :].flip(-2)
        imaginary = torch.cat([imaginary, -rest], dim=-2)
    return real, imaginary


def column_scale(
    real: Tensor, imaginary: Tensor | None, axes: tuple[int, ...], rows: int
) -> Tensor:
    """Return √n / ‖z‖, which dividing latents by their norm along `axes` makes of their spectrum z.

    Args:
        real, imaginary: Re z and Im z, [..., C, D], of which `imaginary` may be None for zero.
        axes: of the transform; n is the product of their lengths.
        rows: C of the whole spectrum, of which `real` may hold the first rows // 2 + 1.

    Returns:
        Of the shape of `real`, but 1 along `axes`.
    """
    square = real.square()
    if imaginary is not None:
        square = torch.addcmul(square, imaginary, imaginary)
    total = square.sum(axes, keepdim=True)
    if square.shape[-2] < rows:  # all but the self-conjugate rows stand for two
        once = square[..., :1, :] if rows % 2 else square[..., :1, :] + square[..., -1:, :]
        total = 2 * total - once
    n = 1
    for axis in axes:
        n *= rows if axis == -2 else real.shape[-1]
    # At least the smallest normal number, whose gradient is finite.
    return (total / n).clamp_min(torch.finfo(total.dtype).tiny).rsqrt()


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
        # Before kernels that would read beyond what is there; torch's operators look themselves.
        _check(real, gathered, update, imaginary, present, keep, axes, rows, scaled, asking)
        refuse_forward_mode("lego_pass")
        whole = rows or real.shape[1]
        return _on_triton(
            real, gathered, update, imaginary, present, snn, keep, axes, whole, scaled, asking
        )
    flat = gathered.transpose(1, 2).flatten(2)
    x = real + F.leaky_relu(F.linear(flat, update.out_weight, update.out_bias))
    normed = F.layer_norm(x, x.shape[-1:], update.norm_weight, update.norm_bias)
    value, gate = F.linear(normed, update.up_weight, update.up_bias).chunk(2, dim=-1)
    if torch.is_grad_enabled():
        gated = value * (F.selu(gate) if snn else F.gelu(gate))
    else:  # nobody will ask for the factors again
        gated = value.mul_(F.selu(gate, inplace=True) if snn else F.gelu(gate))
    out = F.linear(gated, update.down_weight, update.down_bias)
    x = x + (out if keep is None else out * keep)
    if present is not None:
        x = torch.where(present[:, None, None], x, real)
    if axes:
        x, imaginary = normalised(x, imaginary, axes, rows, scaled)
    return x, imaginary, None if asking is None else ask(x, asking)


def normalised(
    real: Tensor,
    imaginary: Tensor | None,
    axes: tuple[int, ...],
    rows: int | None = None,
    scaled: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return √n Z / ‖Z‖; arguments as of `lego_pass`."""
    scale = column_scale(real, imaginary, axes, rows or real.shape[-2])
    if scaled is not None:
        scale = torch.where(scaled[:, None, None], scale, 1)
    return real * scale, None if imaginary is None else imaginary * scale


def ask(real: Tensor, asking: Asking) -> Tensor:
    """Return the queries [..., C, H · E] of latents [..., C, D]."""
    normed = F.layer_norm(real, real.shape[-1:], asking.norm_weight, asking.norm_bias)
    return F.linear(normed, asking.weight)


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
    bags, inner, device = shape[0], shape[1] * shape[3], real.device
    flat = (dim,)
    expected: list[tuple[str, Any, Sequence[int]]] = [
        ("gathered", gathered, shape),
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
    for name, part in (("present", present), ("scaled", scaled)):
        if part is None:
            continue
        if not isinstance(part, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(part).__name__}")
        if (part.shape, part.dtype, part.device) != ((bags,), torch.bool, device):
            raise ValueError(
                f"{name}: expected bool [{bags}] on {device}, got {part.dtype} "
                f"{tuple(part.shape)} on {part.device}"
            )
    if axes not in AXES.values():
        raise ValueError(f"axes: expected one of {list(AXES.values())}, got {axes!r}")
    if axes and rows not in (None, latents) and (axes != (-2,) or rows // 2 + 1 != latents):
        raise ValueError(
            f"rows: expected {latents}, or C of which {latents} are the first C // 2 + 1 with "
            f"axes (-2,), got {rows} with axes {axes}"
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
    rows: int,
    scaled: Tensor | None,
    asking: Asking | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run the kernels; normalise and ask in torch where a sample is too large for one program."""
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


def _kernels(real: Tensor) -> ModuleType:
    module = triton_kernels("lego_pass", "triton", real)
    assert module is not None
    return module


def _forward(
    real: Tensor, imaginary: Tensor | None, gathered: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    imaginary = None if imaginary is None else imaginary.contiguous()
    arguments = _contiguous(rest)
    return _kernels(real).forward(real.contiguous(), imaginary, rows_apart(gathered), *arguments)


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
    grads = _contiguous((grad_real, grad_imaginary, grad_queries))
    arguments = _contiguous(rest)
    return _kernels(real).backward(
        *grads, x, y, scale, real.contiguous(), rows_apart(gathered), *arguments
    )


def _contiguous(arguments: Sequence[Any]) -> list[Any]:
    return [a.contiguous() if isinstance(a, Tensor) else a for a in arguments]


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
