"""The passes of LegoBlocks: transform, update of the real part, inverse transform (MM-Lego).

`run_steps` carries the spectrum and never transforms back; `run_literally` does all of it, and is
what the former is tested against.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.backends import Backend
from ..kernels.lego_pass.cpu import ask
from ..kernels.lego_pass.operator import lego_pass
from ..kernels.lego_pass.spectrum import AXES, fourier, normalised, self_conjugate, spectrum, whole
from ..kernels.lego_pass.weights import Asking, Update
from ..kernels.plan import Strategy
from .attention import Attention, Keys
from .layers import FeedForward, update


class LegoLayer(nn.Module):
    """The weights of one pass of a LegoBlock."""

    def __init__(self, attention: Attention, feed_forward: FeedForward) -> None:
        super().__init__()
        self.attention = attention
        self.feed_forward = feed_forward

    def forward(self, latents: Tensor, keys: Keys) -> Tensor:
        """Update latents [B, C, D], as the equation says."""
        return update(self.attention, self.feed_forward, latents, keys)

    @property
    def weights(self) -> Update:
        """What `lego_pass` takes."""
        out, feed = self.attention.to_out, self.feed_forward
        return Update(
            out.weight, out.bias, feed.norm.weight, feed.norm.bias,
            feed.up.weight, feed.up.bias, feed.down.weight, feed.down.bias,
        )  # fmt: skip

    @property
    def drops(self) -> bool:
        """Whether dropout is active."""
        return self.attention.active_dropout > 0 or self.feed_forward.active_dropout > 0


class Waves(NamedTuple):
    """Latents in the frequency domain; without a transform, the latents themselves."""

    real: Tensor
    """Re Z, [B, C, D], or [1, C, D] for all rows."""
    imaginary: Tensor | None
    """Im Z alike; None for zero, and without a transform."""

    def joined(self) -> Tensor:
        """Return Z; without a transform, the latents themselves."""
        return self.real if self.imaginary is None else torch.complex(self.real, self.imaginary)


class Transform(nn.Module):
    """F of latents [B, C, D] along the axes of `fft`, see LegoBlock."""

    def __init__(self, fft: str | None, rows: int, columns: int) -> None:
        super().__init__()
        self.axes = AXES[fft]
        self.rows = rows
        self.self_conjugate: Tensor
        self.register_buffer(
            "self_conjugate", self_conjugate(rows, columns, self.axes), persistent=False
        )

    def forward(self, latents: Tensor, *, half: bool = False) -> Waves:
        """Return the spectrum of real latents, its first C // 2 + 1 rows if `half`."""
        if not self.axes:
            return Waves(latents, None)
        if latents.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"dtype: expected float32 or float64 for the transform of a LegoBlock, got "
                f"{latents.dtype}; for half precision use torch.autocast"
            )
        return Waves(*spectrum(latents, self.axes, half=half, own=self.self_conjugate))


class How(NamedTuple):
    """How passes are run; the results are the same but for rounding."""

    strategy: Strategy | None = None
    """Of attending to the context, see `kernels.plan`; "reference" for the literal loop."""
    backend: Backend = "auto"
    half: bool = False
    """Whether only the first C // 2 + 1 latents are computed, the others being their mirror image:
    after a transform along the latents Re Z is even, and updates treat equal latents alike, unless
    dropout is active. Nor are equal rows of a spectrum as context told apart then."""


class Step(NamedTuple):
    """One pass of one block."""

    layer: LegoLayer
    keys: Keys
    normalise: bool
    """Whether latents are divided by their norm before the transform."""
    forget: bool
    """Whether Im Z is zero from the next pass on."""
    rows: Tensor | None = None
    """Bool [B], the rows that these two are for; None for all."""


def run_steps(start: Tensor, steps: Sequence[Step], transform: Transform, how: How) -> Waves:
    """Run passes on real latents [B or 1, C, D]; return the last spectrum, all C rows of it.

    Between passes the inverse transform and the next transform cancel: that of `start` is the only
    one.
    """
    if how.strategy == "reference":
        return run_literally(start, steps, transform)
    axes, rows = transform.axes, transform.rows
    real, imaginary = transform(start, half=how.half)
    first = steps[0]
    if axes and first.normalise:
        real, imaginary = normalised(real, imaginary, axes, rows, first.rows)
    asking = _asking(first)
    queries = None if asking is None else ask(real, asking)
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        feed_forward = step.layer.feed_forward
        gathered = step.keys.attend(step.layer.attention, queries)
        if step.forget and imaginary is not None:
            imaginary = None if step.rows is None else _without(imaginary, step.rows)
        keep = None
        if feed_forward.active_dropout:
            ones = real.new_ones(len(gathered), *real.shape[1:])
            keep = F.dropout(ones, feed_forward.active_dropout)
        scales = following is not None and following.normalise
        real, imaginary, queries = lego_pass(
            real,
            gathered,
            step.layer.weights,
            imaginary=imaginary,
            present=step.keys.context.nonempty,
            snn=feed_forward.snn,
            keep=keep,
            axes=axes if scales else (),
            rows=rows,
            scaled=None if following is None else following.rows,
            asking=None if following is None else _asking(following),
            backend=how.backend,
        )
    return Waves(*whole(real, imaginary, rows)) if how.half else Waves(real, imaginary)


def run_literally(start: Tensor, steps: Sequence[Step], transform: Transform) -> Waves:
    """Run passes on real latents [B, C, D] as the papers say; arguments as of run_steps."""
    axes, latents = transform.axes, start
    waves = Waves(latents, None)
    forgotten = torch.zeros(len(start), dtype=torch.bool, device=start.device)
    for index, step in enumerate(steps):
        if not axes:
            latents = step.layer(latents, step.keys)
            waves = Waves(latents, None)
            continue
        if index:
            latents = fourier(waves.joined(), axes, inverse=True)
        everyone = torch.ones_like(forgotten)
        rows = everyone if step.rows is None else step.rows
        if step.normalise:
            norm = torch.linalg.vector_norm(latents, dim=axes, keepdim=True)
            shrunk = latents / norm.clamp_min(torch.finfo(norm.dtype).tiny)
            latents = torch.where(rows[:, None, None], shrunk, latents)
        z = fourier(latents, axes)
        # Exactly zero in theory; rounding noise would decide the phase of a merge.
        imaginary = _without(z.imag.masked_fill(transform.self_conjugate, 0), forgotten)
        real = step.layer(z.real, step.keys)
        if step.forget:
            forgotten = forgotten | rows
            imaginary = _without(imaginary, rows)
        waves = Waves(real, imaginary)
    return waves


def _asking(step: Step) -> Asking | None:
    return step.layer.attention.asking if step.keys.asks else None


def _without(imaginary: Tensor, rows: Tensor) -> Tensor:
    return imaginary.masked_fill(rows[:, None, None], 0)
