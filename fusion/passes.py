"""Passes of HEALNet and of LegoBlocks (MM-Lego): an attention, then the update of the latents.

`run_passes` is the fast form: one operator (`kernels.lego_pass`) does everything between two
attentions, and a LegoBlock's spectrum is never transformed back. `run_literally` is the reference:
it computes the equations module by module, and the fast form is tested against it.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
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
from ..kernels.lego_pass.weights import QueryWeights, UpdateWeights
from ..kernels.plan import Strategy
from .attention import Attention, Keys
from .context import ModalityInput
from .layers import FeedForward, update

T = TypeVar("T")
PassObserver = Callable[["Pass", Tensor | None], None]
"""Called before every attention with the pass and its queries (None if it needs no queries)."""


class LegoLayer(nn.Module):
    """The weights of one pass of a LegoBlock."""

    def __init__(self, attention: Attention, feed_forward: FeedForward) -> None:
        super().__init__()
        self.attention = attention
        self.feed_forward = feed_forward

    def forward(self, latents: Tensor, keys: Keys) -> Tensor:
        """Return the updated latents [B, C, D], residuals included."""
        return update(self.attention, self.feed_forward, latents, keys)

    @property
    def drops(self) -> bool:
        """Whether dropout is active."""
        return self.attention.active_dropout > 0 or self.feed_forward.active_dropout > 0


class Spectrum(NamedTuple):
    """Latents in the frequency domain; without a transform, the latents themselves."""

    real: Tensor
    """Re Z, [B, C, D]; or [1, C, D] while it is the same in all rows."""
    imaginary: Tensor | None
    """Im Z in the same shape; None if it is zero, and without a transform."""

    def to_complex(self) -> Tensor:
        """Return Z; without a transform, the real latents themselves."""
        return self.real if self.imaginary is None else torch.complex(self.real, self.imaginary)


class FourierTransform(nn.Module):
    """The Fourier transform of latents [B, C, D] along the axes of `fft`, see LegoBlock."""

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
    """How passes are computed, with results that differ by rounding only, and who watches them."""

    strategy: Strategy | None = None
    """Of the attention, see `kernels.plan`; "reference" for the literal loop."""
    backend: Backend = "auto"
    half: bool = False
    """Whether only the first C // 2 + 1 latents are computed. After a transform along the latents
    Re Z is even: row C - i equals row i. Updates give equal rows equal results, unless dropout is
    active, so the other rows are copies. If the context is a spectrum, its mirrored rows are equal
    too; each pair is then one token that counts twice (`Context.counts`)."""
    watch: PassObserver | None = None

    @property
    def head_backend(self) -> Backend:
        """The backend of the head: torch after the literal loop, which has second derivatives."""
        return "eager" if self.strategy == "reference" else self.backend


class Pass(NamedTuple):
    """One pass: its weights, its keys, and for a LegoBlock how the spectrum is treated."""

    attention: Attention
    feed_forward: FeedForward
    keys: Keys
    normalise: bool = False
    """Whether latents are divided by their norm before the transform of this pass."""
    drop_imaginary: bool = False
    """Whether Im Z is set to zero after this pass."""
    rows: Tensor | None = None
    """Bool [B]: the rows to which `normalise` and `drop_imaginary` apply; None for all rows."""


def run_passes(
    start: Tensor,
    passes: Sequence[Pass],
    transform: FourierTransform | None,
    options: PassOptions,
) -> Spectrum:
    """Run passes on real latents [B or 1, C, D]; return the last spectrum with all C latents.

    In the equations every pass transforms back, and the next one transforms again. The two cancel,
    so `start` is transformed once and the spectrum is carried from pass to pass. Without a
    transform, the spectrum is the latents themselves.

    A call of `lego_pass` between attentions i and i + 1 finishes pass i (output projection,
    residual, feed-forward) and begins pass i + 1 (division by the norm, queries). The first call
    only begins pass 0, the last one only finishes the last pass.
    """
    if options.strategy == "reference":
        return run_literally(start, passes, transform, options.watch)
    axes, rows, spectrum = (), None, Spectrum(start, None)
    if transform is not None:
        axes, rows, spectrum = transform.axes, transform.rows, transform(start, half=options.half)
    # Passes that share weights or a context share the objects made of them.
    updates = _make_shared(passes, lambda p: (p.attention, p.feed_forward), _make_update)
    query_weights = _make_shared(
        passes, lambda p: (p.attention, p.keys.needs_queries), _make_query_weights
    )
    present = _make_shared(passes, lambda p: id(p.keys.context), lambda p: p.keys.context.nonempty)
    seeds = _draw_seeds(passes, start)  # two per pass: attention, feed-forward
    (real, imaginary), first = spectrum, passes[0]
    real, imaginary, queries = lego_pass(
        real, imaginary=imaginary, axes=axes if first.normalise else (), rows=rows,
        scaled=first.rows, query_weights=query_weights[0], backend=options.backend,
    )  # fmt: skip
    for index, layer_pass in enumerate(passes):
        if options.watch is not None:
            options.watch(layer_pass, queries)
        attended = layer_pass.keys.attend(layer_pass.attention, queries, seeds[2 * index])
        if layer_pass.drop_imaginary and imaginary is not None:
            rows_to_drop = layer_pass.rows
            imaginary = None if rows_to_drop is None else _zero_rows(imaginary, rows_to_drop)
        next_pass = passes[index + 1] if index + 1 < len(passes) else None
        real, imaginary, queries = lego_pass(
            real,
            attended,
            updates[index],
            imaginary=imaginary,
            present=present[index],
            snn=layer_pass.feed_forward.snn,
            dropout_p=layer_pass.feed_forward.active_dropout,
            seed=seeds[2 * index + 1],
            axes=axes if next_pass is not None and next_pass.normalise else (),
            rows=rows,
            scaled=None if next_pass is None else next_pass.rows,
            query_weights=None if next_pass is None else query_weights[index + 1],
            backend=options.backend,
        )
    if options.half and rows is not None:
        real, imaginary = restore_rows(real, imaginary, rows)
    return Spectrum(real, imaginary)


def run_literally(
    start: Tensor,
    passes: Sequence[Pass],
    transform: FourierTransform | None,
    watch: PassObserver | None = None,
) -> Spectrum:
    """Run passes on real latents [B, C, D], equation by equation; arguments as of `run_passes`."""
    axes, latents = () if transform is None else transform.axes, start
    spectrum = Spectrum(latents, None)
    dropped = torch.zeros(len(start), dtype=torch.bool, device=start.device)
    for index, layer_pass in enumerate(passes):
        if transform is None or not axes:
            if watch is not None:
                watch(layer_pass, layer_pass.attention.compute_queries(latents))
            latents = update(
                layer_pass.attention, layer_pass.feed_forward, latents, layer_pass.keys
            )
            spectrum = Spectrum(latents, None)
            continue
        if index:
            latents = fourier(spectrum.to_complex(), axes, inverse=True)
        all_rows = torch.ones_like(dropped)
        rows = all_rows if layer_pass.rows is None else layer_pass.rows
        if layer_pass.normalise:
            norm = torch.linalg.vector_norm(latents, dim=axes, keepdim=True)
            shrunk = latents / norm.clamp_min(torch.finfo(norm.dtype).tiny)
            latents = torch.where(rows[:, None, None], shrunk, latents)
        z = fourier(latents, axes)
        # The spectrum of real latents is real at these places. Rounding noise there would decide
        # the phase of a merge, so it is set to exactly zero.
        imaginary = _zero_rows(z.imag.masked_fill(transform.self_conjugate, 0), dropped)
        if watch is not None:
            watch(layer_pass, layer_pass.attention.compute_queries(z.real))
        real = update(layer_pass.attention, layer_pass.feed_forward, z.real, layer_pass.keys)
        if layer_pass.drop_imaginary:
            dropped = dropped | rows
            imaginary = _zero_rows(imaginary, rows)
        spectrum = Spectrum(real, imaginary)
    return spectrum


def _make_shared(
    passes: Sequence[Pass], key: Callable[[Pass], Hashable], make: Callable[[Pass], T]
) -> list[T]:
    """Return `make(p)` for each pass p, called once for all passes with the same key."""
    by_key: dict[Hashable, T] = {}
    shared = []
    for layer_pass in passes:
        pass_key = key(layer_pass)
        if pass_key not in by_key:
            by_key[pass_key] = make(layer_pass)
        shared.append(by_key[pass_key])
    return shared


def _make_update(layer_pass: Pass) -> UpdateWeights:
    out, feed = layer_pass.attention.to_out, layer_pass.feed_forward
    return UpdateWeights(
        out.weight, out.bias, feed.norm.weight, feed.norm.bias,
        feed.up.weight, feed.up.bias, feed.down.weight, feed.down.bias,
    )  # fmt: skip


def _make_query_weights(layer_pass: Pass) -> QueryWeights | None:
    return layer_pass.attention.query_weights if layer_pass.keys.needs_queries else None


def _draw_seeds(passes: Sequence[Pass], like: Tensor) -> list[Tensor | None]:
    """Return two dropout seeds per pass (attention, feed-forward), drawn in one launch on a GPU.

    All None without dropout, and on a CPU, where the generator of torch draws the masks.
    """
    drops = any(s.attention.active_dropout or s.feed_forward.active_dropout for s in passes)
    if not (drops and like.is_cuda):
        return [None] * (2 * len(passes))
    # Triton compiles a kernel anew for pointers that are not multiples of 16 bytes. Hence two int64
    # per seed, of which the first is used.
    return list(torch.randint(2**62, (2 * len(passes), 2), device=like.device)[:, :1])


def _zero_rows(imaginary: Tensor, rows: Tensor) -> Tensor:
    """Return Im Z [B, C, D] with zeros in the rows where `rows` [B] is True."""
    return imaginary.masked_fill(rows[:, None, None], 0)


class AttentionRecorder:
    """Records the attention weights of a forward pass, as `PassOptions.watch`.

    Args:
        batches: the input of each modality.
        keys: those that a model made of `batches`.
    """

    def __init__(
        self, batches: Mapping[str, ModalityInput], keys: Mapping[str, Sequence[Keys]]
    ) -> None:
        self._batches = batches
        self._name_of = {id(of_pass.context): name for name in keys for of_pass in keys[name]}
        self.attention: dict[str, list[Tensor]] = {name: [] for name in keys}
        """Weights of each pass, by modality, in the layout of `HEALNetOutput.attention`."""

    def __call__(self, layer_pass: Pass, queries: Tensor | None) -> None:
        context = layer_pass.keys.context
        name = self._name_of.get(id(context))
        if name is None:  # self-attention
            return
        weights = layer_pass.keys.weights(layer_pass.attention, queries)
        self.attention[name].append(self._batches[name].restore_layout(weights, context))
