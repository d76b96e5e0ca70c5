"""Passes: an attention, then the update of the latents, of HEALNet and of LegoBlocks (MM-Lego).

`run_steps` does all between two attentions at once (`kernels.lego_pass`), and carries a LegoBlock's
spectrum without ever transforming back; `run_literally` does as the equations say, module by
module, and is what the former is tested against.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..kernels.backends import Backend
from ..kernels.lego_pass.operator import lego_pass
from ..kernels.lego_pass.spectrum import (
    AXES,
    compute_spectrum,
    fourier,
    restore_rows,
    self_conjugate,
)
from ..kernels.lego_pass.weights import QueryWeights, Update
from ..kernels.plan import Strategy
from .attention import Attention, Keys
from .layers import FeedForward, update

T = TypeVar("T")
Watch = Callable[[int, Tensor | None], None]
"""Is given the number of a pass, and the queries it asks with, if it asks."""


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
    def drops(self) -> bool:
        """Whether dropout is active."""
        return self.attention.active_dropout > 0 or self.feed_forward.active_dropout > 0


class Spectrum(NamedTuple):
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

    def forward(self, latents: Tensor, *, half: bool = False) -> Spectrum:
        """Return the spectrum of real latents, its first C // 2 + 1 rows if `half`."""
        if not self.axes:
            return Spectrum(latents, None)
        if latents.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"dtype: expected float32 or float64 for the transform of a LegoBlock, got "
                f"{latents.dtype}; for half precision use torch.autocast"
            )
        return Spectrum(
            *compute_spectrum(latents, self.axes, half=half, real_at=self.self_conjugate)
        )


class PassOptions(NamedTuple):
    """How passes are run; the results are the same but for rounding."""

    strategy: Strategy | None = None
    """Of attending to the context, see `kernels.plan`; "reference" for the literal loop."""
    backend: Backend = "auto"
    half: bool = False
    """Whether only the first C // 2 + 1 latents are computed, the others being their mirror image:
    after a transform along the latents Re Z is even, and updates treat equal latents alike, unless
    dropout is active. Nor are equal rows of a spectrum as context told apart then."""

    @property
    def head_backend(self) -> Backend:
        """Who computes the head: torch after the literal loop, which has second derivatives."""
        return "eager" if self.strategy == "reference" else self.backend


class Step(NamedTuple):
    """One pass: which weights, what they attend to, and what a LegoBlock's transform asks for."""

    attention: Attention
    feed_forward: FeedForward
    keys: Keys
    normalise: bool = False
    """Whether latents are divided by their norm before the transform."""
    drop_imaginary: bool = False
    """Whether Im Z is zero from the next pass on."""
    rows: Tensor | None = None
    """Bool [B], the rows that these two are for; None for all."""


def run_steps(
    start: Tensor,
    steps: Sequence[Step],
    transform: Transform | None,
    options: PassOptions,
    watch: Watch | None = None,
) -> Spectrum:
    """Run passes on real latents [B or 1, C, D]; return the last spectrum, all C rows of it.

    Between passes the inverse transform and the next transform cancel: that of `start` is the only
    one. Without a transform, the spectrum is the latents themselves.
    """
    if options.strategy == "reference":
        return run_literally(start, steps, transform, watch)
    axes, rows, spectrum = (), None, Spectrum(start, None)
    if transform is not None:
        axes, rows, spectrum = transform.axes, transform.rows, transform(start, half=options.half)
    # What passes have in common is made once.
    updates = _shared(steps, lambda s: (s.attention, s.feed_forward), _update_of)
    query_weights = _shared(steps, lambda s: (s.attention, s.keys.needs_queries), _query_weights_of)
    present = _shared(steps, lambda s: id(s.keys.context), lambda s: s.keys.context.nonempty)
    seeds = _seeds(steps, start)
    (real, imaginary), first = spectrum, steps[0]
    real, imaginary, queries = lego_pass(
        real, imaginary=imaginary, axes=axes if first.normalise else (), rows=rows,
        scaled=first.rows, query_weights=query_weights[0], backend=options.backend,
    )  # fmt: skip
    for index, step in enumerate(steps):
        if watch is not None:
            watch(index, queries)
        attended = step.keys.attend(step.attention, queries, seeds[2 * index])
        dropping = step.rows
        if step.drop_imaginary and imaginary is not None:
            imaginary = None if dropping is None else _without(imaginary, dropping)
        following = steps[index + 1] if index + 1 < len(steps) else None
        real, imaginary, queries = lego_pass(
            real,
            attended,
            updates[index],
            imaginary=imaginary,
            present=present[index],
            snn=step.feed_forward.snn,
            dropout_p=step.feed_forward.active_dropout,
            seed=seeds[2 * index + 1],
            axes=axes if following is not None and following.normalise else (),
            rows=rows,
            scaled=None if following is None else following.rows,
            query_weights=None if following is None else query_weights[index + 1],
            backend=options.backend,
        )
    spectrum = Spectrum(real, imaginary)
    return (
        Spectrum(*restore_rows(*spectrum, rows)) if options.half and rows is not None else spectrum
    )


def run_literally(
    start: Tensor, steps: Sequence[Step], transform: Transform | None, watch: Watch | None = None
) -> Spectrum:
    """Run passes on real latents [B, C, D] as the papers say; arguments as of run_steps."""
    axes, latents = () if transform is None else transform.axes, start
    spectrum = Spectrum(latents, None)
    dropped = torch.zeros(len(start), dtype=torch.bool, device=start.device)
    for index, step in enumerate(steps):
        if transform is None or not axes:
            if watch is not None:
                watch(index, step.attention.queries(latents))
            latents = update(step.attention, step.feed_forward, latents, step.keys)
            spectrum = Spectrum(latents, None)
            continue
        if index:
            latents = fourier(spectrum.joined(), axes, inverse=True)
        everyone = torch.ones_like(dropped)
        rows = everyone if step.rows is None else step.rows
        if step.normalise:
            norm = torch.linalg.vector_norm(latents, dim=axes, keepdim=True)
            shrunk = latents / norm.clamp_min(torch.finfo(norm.dtype).tiny)
            latents = torch.where(rows[:, None, None], shrunk, latents)
        z = fourier(latents, axes)
        # Exactly zero in theory; rounding noise would decide the phase of a merge.
        imaginary = _without(z.imag.masked_fill(transform.self_conjugate, 0), dropped)
        real = update(step.attention, step.feed_forward, z.real, step.keys)
        if step.drop_imaginary:
            dropped = dropped | rows
            imaginary = _without(imaginary, rows)
        spectrum = Spectrum(real, imaginary)
    return spectrum


def _shared(
    steps: Sequence[Step], key: Callable[[Step], Hashable], make: Callable[[Step], T]
) -> list[T]:
    """Return what `make` makes of each step, made once for all that have one key."""
    made: dict[Hashable, T] = {}
    found = []
    for step in steps:
        own = key(step)
        if own not in made:
            made[own] = make(step)
        found.append(made[own])
    return found


def _update_of(step: Step) -> Update:
    out, feed = step.attention.to_out, step.feed_forward
    return Update(
        out.weight, out.bias, feed.norm.weight, feed.norm.bias,
        feed.up.weight, feed.up.bias, feed.down.weight, feed.down.bias,
    )  # fmt: skip


def _query_weights_of(step: Step) -> QueryWeights | None:
    return step.attention.query_weights if step.keys.needs_queries else None


def _seeds(steps: Sequence[Step], like: Tensor) -> list[Tensor | None]:
    """Return the seeds of every pass's attention and feed-forward, drawn at once on a GPU.

    None where there is no dropout, and on a CPU, where torch's own generator draws the masks.
    """
    drops = any(s.attention.active_dropout or s.feed_forward.active_dropout for s in steps)
    if not (drops and like.is_cuda):
        return [None] * (2 * len(steps))
    # 16 bytes apart: Triton compiles kernels anew for tensors that begin at other multiples.
    return list(torch.randint(2**62, (2 * len(steps), 2), device=like.device)[:, :1])


def _without(imaginary: Tensor, rows: Tensor) -> Tensor:
    return imaginary.masked_fill(rows[:, None, None], 0)
