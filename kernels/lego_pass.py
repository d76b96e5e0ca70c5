"""What a LegoBlock does between two attentions, without a transform (MM-Lego, Eq. 2 and 3).

A pass transforms the latents, updates the real part and transforms back; the next pass begins with
the transform of that. Between passes F(F⁻¹ z) = z, so one transform of the first latents is all it
takes (`spectrum`), and the loop carries Re z and Im z as two real tensors. Dividing the latents by
their norm along the transformed axes before a transform is, by Parseval, a factor per column of z.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import Backend, check_backend

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


def spectrum(
    latents: Tensor, axes: tuple[int, ...], *, half: bool = False
) -> tuple[Tensor, Tensor]:
    """Return Re F and Im F of real latents [..., C, D] along `axes`.

    Where F is real in exact numbers, Im F is exactly zero: rounding noise there would decide the
    phase of a merge, since a negative real number has phase π or -π.

    Args:
        latents: float32 or float64.
        axes: of AXES, not empty.
        half: of a transform along the latents alone, return rows 0 to C // 2, [..., C // 2 + 1, D];
            the others follow from these (`whole`).
    """
    if half:
        z = torch.fft.rfft(latents, dim=-2)
    elif latents.numel():
        z = torch.fft.fftn(latents, dim=axes)
    else:  # which MKL refuses
        z = torch.complex(latents, latents)
    rows, columns = latents.shape[-2:]
    own = self_conjugate(rows, columns, axes, latents.device)[: z.shape[-2]]
    return z.real, z.imag.masked_fill(own, 0)


def self_conjugate(
    rows: int, columns: int, axes: tuple[int, ...], device: torch.device
) -> Tensor:
    """Mark the frequencies, [rows, columns], at which the spectrum of a real array is real."""
    marks = torch.ones(rows, columns, dtype=torch.bool, device=device)
    for axis in axes:
        frequency = torch.arange(marks.shape[axis], device=device)
        own = frequency == -frequency % len(frequency)
        marks = marks & (own[:, None] if axis == -2 else own)
    return marks


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
    square = real.square() if imaginary is None else real.square() + imaginary.square()
    total = square.sum(axes, keepdim=True)
    if square.shape[-2] < rows:  # all but the self-conjugate rows stand for two
        once = square[..., :1, :] if rows % 2 else square[..., :1, :] + square[..., -1:, :]
        total = 2 * total - once
    n = math.prod(rows if axis == -2 else real.shape[-1] for axis in axes)
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
        imaginary: Im Z, like `real`; None for zero.
        present: bool [B], False where a row keeps its real part; None if none does.
        snn: gate the feed-forward with SELU instead of GELU.
        keep: [B, C, D], what the feed-forward's output is multiplied by: dropout.
        axes: along which Z is normalised, see AXES; () for no normalisation.
        rows: C of the whole spectrum where `real` holds its first rows // 2 + 1; None if all.
        scaled: bool [B], False where a row is not normalised; None if all are.
        asking: the weights of the next queries; None for none.
        backend: "auto", "triton", "compile" or "eager" (these two run the same operators here).

    Returns:
        Re Z and Im Z, [B, C, D] (Im Z as it came where nothing is normalised), and the queries
        [B, C, H · E], not scaled. Each is None where it has no input.

    Raises:
        ValueError: an unknown backend, or Triton where it cannot be had.
    """
    check_backend(backend)
    flat = gathered.transpose(1, 2).flatten(2)
    x = real + F.leaky_relu(F.linear(flat, update.out_weight, update.out_bias))
    normed = F.layer_norm(x, x.shape[-1:], update.norm_weight, update.norm_bias)
    value, gate = F.linear(normed, update.up_weight, update.up_bias).chunk(2, dim=-1)
    gated = value * (F.selu(gate) if snn else F.gelu(gate))
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
