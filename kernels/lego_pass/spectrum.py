"""The spectrum of latents and tokens, and its normalisation, without transforms between passes.

In the authors' code a pass transforms the latents, updates the real part and transforms back; the
next pass transforms the result again. Since F(F⁻¹ z) = z, only the first latents are transformed
(`compute_spectrum`), and the passes keep Re z and Im z as two real tensors. To divide the latents
by their norm along the transformed axes before a transform is to multiply each column of z by a
factor (Parseval's theorem): `column_scale`. docs/design/algebra.md, section 2, derives this.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# The axes of latents [B, C, D] of each transform, and of its normalisation.
AXES: dict[str | None, tuple[int, ...]] = {
    "2d": (-2, -1),
    "latents": (-2,),
    "width": (-1,),
    None: (),
}


def scale_shape(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of `column_scale` for latents [B, C, D]; (0,) without axes."""
    return tuple(1 if i - 3 in axes else n for i, n in enumerate(shape)) if axes else (0,)


def compute_spectrum(
    latents: Tensor, axes: tuple[int, ...], *, half: bool = False, real_at: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return Re F and Im F of real latents [..., C, D].

    Where F is real in exact arithmetic, Im F is set to zero. A negative real number has phase π or
    -π: which of them, and so the phase of a merge, would be decided by rounding noise in Im F.

    Args:
        latents: float32 or float64.
        axes: along which to transform, a value of AXES, not empty.
        half: return rows 0 to C // 2 only, [..., C // 2 + 1, D]; for a transform along the latents
            alone. The other rows follow from these (`restore_rows`).
        real_at: the result of `self_conjugate`; None to compute it.
    """
    if real_at is None:
        real_at = self_conjugate(latents.shape[-2], latents.shape[-1], axes, latents.device)
    z = torch.fft.rfft(latents, dim=-2) if half else fourier(latents, axes)
    return z.real, z.imag.masked_fill(real_at[: z.shape[-2]], 0)


def fourier(x: Tensor, axes: tuple[int, ...], *, inverse: bool = False) -> Tensor:
    """Return the transform of x along `axes`, complex; an empty x too, which MKL would refuse."""
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
        is_real = frequency == -frequency % len(frequency)
        marks &= is_real[:, None] if axis == -2 else is_real
    return marks


# Up to this many tokens, a product with a matrix of cosines is faster on a CPU than the FFT, which
# first copies the tokens of each feature side by side, and computes the sines too.
DENSE = 256


def _cosines(tokens: Tensor) -> Tensor:
    """Return cos(2 π k n / N) for k = 0 ... N // 2 and n = 0 ... N - 1, [N // 2 + 1, N]."""
    count = tokens.shape[-2]
    n = torch.arange(count)
    # The angle is reduced to one period in integers, so that it loses no digits.
    period = (n.double() * (2 * math.pi / count)).cos().to(tokens.dtype)
    return period[n[: count // 2 + 1, None] * n % count]


def compute_real_spectrum(
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
            return restore_rows(real, None, count)[0], None
        counts = torch.full((real.shape[-2],), 2, dtype=real.dtype, device=real.device)
        counts[:1].fill_(1)
        if count % 2 == 0:
            counts[-1:].fill_(1)
        return real, counts
    return fourier(tokens, axes).real, None


def restore_rows(real: Tensor, imaginary: Tensor | None, rows: int) -> tuple[Tensor, Tensor | None]:
    """Return all `rows` rows of a spectrum from its first rows // 2 + 1: Re is even, Im odd."""
    mirrored = rows - real.shape[-2]
    if not mirrored:
        return real, imaginary
    real = torch.cat([real, real[..., 1 : mirrored + 1, :].flip(-2)], dim=-2)
    if imaginary is not None:
        mirror = imaginary[..., 1 : mirrored + 1, :].flip(-2)
        imaginary = torch.cat([imaginary, -mirror], dim=-2)
    return real, imaginary


def column_scale(
    real: Tensor, imaginary: Tensor | None, axes: tuple[int, ...], rows: int
) -> Tensor:
    """Return √n / ‖z‖, the factor on a spectrum z if its latents are divided by their norm.

    Args:
        real, imaginary: Re z and Im z, [..., C, D]; None for an Im z of zero.
        axes: of the transform and the norm; n is the product of their lengths.
        rows: C of the full spectrum, of which `real` may hold the first rows // 2 + 1.

    Returns:
        A tensor of the shape of `real`, but 1 along `axes`.
    """
    square = real.square()
    if imaginary is not None:
        square = torch.addcmul(square, imaginary, imaginary)
    total = square.sum(axes, keepdim=True)
    if square.shape[-2] < rows:  # every row stands for two, except the self-conjugate ones
        once = square[..., :1, :] if rows % 2 else square[..., :1, :] + square[..., -1:, :]
        total = 2 * total - once
    n = 1
    for axis in axes:
        n *= rows if axis == -2 else real.shape[-1]
    # The sum is at least the smallest normal number: the gradient of its rsqrt is finite.
    return (total / n).clamp_min(torch.finfo(total.dtype).tiny).rsqrt()


def normalise_columns(
    real: Tensor,
    imaginary: Tensor | None,
    axes: tuple[int, ...],
    rows: int | None = None,
    scaled: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return √n Z / ‖Z‖; the arguments are those of `lego_pass`."""
    scale = column_scale(real, imaginary, axes, rows or real.shape[-2])
    if scaled is not None:
        scale = torch.where(scaled[:, None, None], scale, 1)
    return real * scale, None if imaginary is None else imaginary * scale
