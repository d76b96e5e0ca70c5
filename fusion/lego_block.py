"""LegoBlock: one modality, learned in the frequency domain (MM-Lego).

It computes the literal loop of the paper, transforms included, and so is the yardstick for every
faster form.
"""

import copy
import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from ..kernels.checks import choice
from .attention import Attention, prepare
from .checks import integer, positive, rate, same_kind
from .context import Batch, Context, Names, check_tensor, offsets_of, read
from .encoders import ABMIL, SNN, BagSelfAttention, UpstreamEncoder
from .layers import (
    FeedForward,
    Head,
    ShareWeights,
    initial_latents,
    layer_order,
    update,
)
from .modalities import (
    Bag,
    Grid,
    Modality,
    Positions,
    Tabular,
    check_modality,
    modality_from_config,
    modality_to_config,
)

# The axes of latents [B, C, D] that each transform runs over; the same axes of a bag [B, N, D] for
# a spectrum as context.
_FFT_AXES: dict[str | None, tuple[int, ...]] = {
    "2d": (-2, -1),
    "latents": (-2,),
    "width": (-1,),
    None: (),
}
# Encoders that a file can name; others are passed to `load`.
_ENCODERS: dict[str, type[nn.Module]] = {
    "motet.SNN": SNN,
    "motet.ABMIL": ABMIL,
    "motet.BagSelfAttention": BagSelfAttention,
}


class LegoOutput(NamedTuple):
    """What the Lego models return when latents are asked for."""

    logits: Tensor
    """[B, out_features]."""
    latents: Tensor
    """[B, C, D], in the frequency domain if the blocks have a transform. Complex for a LegoBlock
    and a LegoMerge with one, and for every harmonic merge; real otherwise."""


class LegoLayer(nn.Module):
    """The weights of one pass of a LegoBlock."""

    def __init__(self, attention: Attention, feed_forward: FeedForward) -> None:
        super().__init__()
        self.attention = attention
        self.feed_forward = feed_forward

    def forward(self, latents: Tensor, context: Context) -> Tensor:
        (keys,) = prepare(context, [self.attention], latents=latents)
        return update(self.attention, self.feed_forward, latents, keys)


class LegoBlock(nn.Module):
    r"""Wrap an encoder; learn its latent in the frequency domain (MM-Lego, Eq. 1-3).

    .. math::
        h = g(X), \quad Z = \mathcal F(L), \quad
        \mathrm{Re} Z \leftarrow \psi(\mathrm{Re} Z, \, h), \quad L \leftarrow \mathcal F^{-1}(Z)

    `depth` times, the last inverse left out; a head on the mean of Re Z. ψ is cross-attention
    followed by a gated feed-forward, as in HEALNet; Im Z is carried along. Blocks of one
    `num_latents`, `latent_dim`, `fft` and `out_features` fit together in LegoMerge and LegoFuse,
    whatever their encoders.

    Args:
        modality: `Tabular`, `Bag` or `Grid`.
        encoder: any module, or None for none. It is given what the caller passes, [I, ...], items
            of one patient (visits, slides) as rows of their own, and returns [I, W] (one token) or
            [I, ..., W] (tokens). Ragged or masked bags are each encoded alone, so that padding
            cannot change a prediction; but an encoder that returns one token per bag and whose
            `forward` takes a `mask` (bool [I, N], True for real) is given them padded with zeros,
            together. Missing items are never encoded.
        out_features: width of the logits; None for a block without a head.
        num_latents: number of latents C.
        latent_dim: their width D.
        depth: number of passes.
        heads: attention heads.
        head_dim: width of each head.
        attn_dropout: probability of dropping an attention weight in training.
        ff_dropout: probability of dropping a feed-forward output in training.
        share_weights: False, weights per pass; True, one set; or "all-but-first".
        fft: "2d" (the paper, Eq. 2), "latents" (along the latent axis), "width" (along the other),
            or None for no transform.
        context: "features", h itself (the paper, Eq. 3); or "spectrum", the real part of its
            transform along the same axes, taken over each bag's own length.
        normalise: divide the latents by their norm along the transformed axes before each
            transform.
        track_imaginary: carry the imaginary part; if False, it is zero from the second pass on.
        snn: gate the feed-forward with SELU instead of GELU.
        temperature: divides the attention scores, on top of sqrt(head_dim).
        latent_init: "normal", N(0, 1), or "uniform", U(0, 1).
        num_freq_bands, max_freq, fourier_encode: positions of grids and coordinates, as in HEALNet;
            used without an encoder.
        encoder_dim: width W of the encoder's output; needed only where running the encoder on zeros
            at construction cannot tell it.

    Raises:
        ValueError: an argument outside its range, or an encoder whose width cannot be found.
        TypeError: a modality or an encoder that is none.

    Note:
        The residuals and the feed-forward in ψ are those of the authors' code. Their code also
        transforms along one axis, normalises, attends to the spectrum and uses a temperature of
        0.5: `motet.from_upstream` sets all four.

    Example:
        >>> block = motet.LegoBlock(motet.Bag(32), encoder=motet.ABMIL(32), out_features=4)
        >>> block(torch.randn(2, 50, 32)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        modality: Modality,
        encoder: nn.Module | None = None,
        *,
        out_features: int | None,
        num_latents: int = 64,
        latent_dim: int = 64,
        depth: int = 2,
        heads: int = 8,
        head_dim: int = 64,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        share_weights: ShareWeights = False,
        fft: Literal["2d", "latents", "width"] | None = "2d",
        context: Literal["features", "spectrum"] = "features",
        normalise: bool = False,
        track_imaginary: bool = True,
        snn: bool = True,
        temperature: float = 1.0,
        latent_init: Literal["uniform", "normal"] = "normal",
        num_freq_bands: int = 2,
        max_freq: float = 10.0,
        fourier_encode: bool = True,
        encoder_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_modality("modality", modality)
        choice("fft", fft, tuple(_FFT_AXES))
        choice("context", context, ("features", "spectrum"))
        for name, flag in (("normalise", normalise), ("track_imaginary", track_imaginary)):
            choice(name, flag, (True, False))
        choice("snn", snn, (True, False))
        num_latents = integer("num_latents", num_latents)
        latent_dim, depth = integer("latent_dim", latent_dim), integer("depth", depth)
        heads, head_dim = integer("heads", heads), integer("head_dim", head_dim)
        out_features = None if out_features is None else integer("out_features", out_features)
        attn_dropout = rate("attn_dropout", attn_dropout)
        ff_dropout = rate("ff_dropout", ff_dropout)
        temperature = positive("temperature", temperature)
        self.modality, self.encoder = modality, encoder
        self.positions = Positions(num_freq_bands, max_freq, fourier_encode)
        self.pads_bags = False
        if encoder is None:
            if encoder_dim is not None:
                raise ValueError("encoder_dim: expected None without an encoder")
            self.token_dim = modality.token_dim(self.positions)
        else:
            self.token_dim, self.pads_bags = _probed(encoder, modality, encoder_dim)
        self.config: dict[str, Any] = {
            "modality": modality_to_config(modality),
            "encoder": _encoder_config(encoder),
            "out_features": out_features,
            "num_latents": num_latents,
            "latent_dim": latent_dim,
            "depth": depth,
            "heads": heads,
            "head_dim": head_dim,
            "attn_dropout": attn_dropout,
            "ff_dropout": ff_dropout,
            "share_weights": share_weights,
            "fft": fft,
            "context": context,
            "normalise": normalise,
            "track_imaginary": track_imaginary,
            "snn": snn,
            "temperature": temperature,
            "latent_init": latent_init,
            "num_freq_bands": self.positions.num_freq_bands,
            "max_freq": self.positions.max_freq,
            "fourier_encode": fourier_encode,
            "encoder_dim": None if encoder is None else self.token_dim,
        }
        self.fft, self.axes = fft, _FFT_AXES[fft]
        self.spectral_context = context == "spectrum"
        self.normalise, self.track_imaginary = normalise, track_imaginary
        self.order = layer_order(depth, share_weights)
        self.latents = initial_latents(num_latents, latent_dim, latent_init)
        self.self_conjugate: Tensor
        self.register_buffer(
            "self_conjugate", _self_conjugate(num_latents, latent_dim, self.axes), persistent=False
        )
        self.layers = nn.ModuleList(
            LegoLayer(
                Attention(
                    latent_dim,
                    self.token_dim,
                    heads=heads,
                    head_dim=head_dim,
                    dropout=attn_dropout,
                    temperature=temperature,
                ),
                FeedForward(latent_dim, dropout=ff_dropout, snn=snn),
            )
            for _ in range(max(self.order) + 1)
        )
        self.head = None if out_features is None else Head(latent_dim, out_features)

    @classmethod
    def from_config(cls, config: dict[str, Any], encoder: nn.Module | None = None) -> Self:
        """Build an untrained block from `block.config`; a copy is made of an encoder passed in."""
        modality = modality_from_config(config["modality"])
        encoder = _encoder_from_config(config["encoder"], copy.deepcopy(encoder))
        return cls(**{**config, "modality": modality, "encoder": encoder})

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        present: Tensor | None = None,
        coords: Tensor | None = None,
        latents: Tensor | None = None,
        return_latents: bool = False,
    ) -> Tensor | LegoOutput:
        """Predict logits from one modality.

        Args:
            x: the modality's tensor, shapes at `Tabular`, `Bag` and `Grid`. It is not changed.
            mask: bool, True for real tokens, [B, N] or in the shape of a grid.
            present: bool [B], False where the row misses the modality: its latents get no update.
            coords: coordinates, for a `Bag` that has them.
            latents: real [C, D] or [B, C, D] to start from instead of the block's own.
            return_latents: return the last latents too.

        Returns:
            Logits [B, out_features] (real latents [B, C, D] for a block without a head); a
            `LegoOutput` if latents were asked for.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit.
            TypeError: something that is not a tensor.
        """
        batch = read(
            self.modality,
            x,
            names=Names(),
            mask=mask,
            present=present,
            coords=coords,
            like=self.latents,
        )
        if latents is not None:
            check_tensor(latents, "latents", self.latents)
            shape = tuple(self.latents.shape)
            if tuple(latents.shape) not in (shape, (batch.rows, *shape)):
                raise ValueError(
                    f"latents: expected {shape} or {(batch.rows, *shape)}, got "
                    f"{tuple(latents.shape)}"
                )
        real, imaginary, _ = self.encode(batch, latents)
        logits = real if self.head is None else self.head(real)
        if not return_latents:
            return logits
        return LegoOutput(logits, joined_parts(real, imaginary))

    def encode(
        self, batch: Batch, latents: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Run all passes.

        Args:
            batch: the block's modality of a batch.
            latents: real [C, D] or [B, C, D] to start from; None means the block's own.

        Returns:
            Re Z and Im Z (None without a transform), [B, C, D] each, after the last update; and
            which rows were updated, bool [B], None for all.
        """
        contexts = self.contexts(batch)
        start = self.latents if latents is None else latents
        real, imaginary = self.passes(start.expand(batch.rows, -1, -1), contexts)
        return real, imaginary, contexts[0].nonempty

    def untouched(self, rows: int) -> tuple[Tensor, Tensor | None]:
        """Return Re Z and Im Z, [rows, C, D] each, of rows without the modality: no update."""
        return self.passes(self.latents.expand(rows, -1, -1), [None] * len(self.order))

    def passes(
        self, latents: Tensor, contexts: Sequence[Context | None]
    ) -> tuple[Tensor, Tensor | None]:
        """Run the literal loop on latents [B, C, D], a context per pass; None skips the update."""
        real, imaginary = latents, None
        for index, context in enumerate(contexts):
            real, imaginary = self.transform(latents)
            if imaginary is not None and index > 0 and not self.track_imaginary:
                # Exactly zero in theory; its rounding noise would decide the phase of the merge.
                imaginary = torch.zeros_like(imaginary)
            real = self.update(index, real, context)
            if index < len(contexts) - 1:
                latents = self.inverse(real, imaginary)
        return real, imaginary

    def transform(self, latents: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the real and the imaginary part of F(latents), normalised first if asked for."""
        if not self.axes:
            return latents, None
        if latents.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"dtype: expected float32 or float64 for the transform of a LegoBlock, got "
                f"{latents.dtype}; for half precision use torch.autocast"
            )
        if self.normalise:
            norm = torch.linalg.vector_norm(latents, dim=self.axes, keepdim=True)
            latents = latents / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        spectrum = fourier(latents, self.axes)
        return spectrum.real, spectrum.imag.masked_fill(self.self_conjugate, 0)

    def layer(self, index: int) -> LegoLayer:
        """Return one set of weights."""
        return cast(LegoLayer, self.layers[index])

    def update(self, index: int, real: Tensor, context: Context | None) -> Tensor:
        """Update the real part with the weights of one pass."""
        if context is None:
            return real
        return self.layer(self.order[index])(real, context)

    def inverse(self, real: Tensor, imaginary: Tensor | None) -> Tensor:
        """Return F^-1 of the spectrum, complex; without a transform, the real part itself."""
        if imaginary is None:
            return real
        spectrum = torch.complex(real, imaginary) if self.track_imaginary else real
        return fourier(spectrum, self.axes, inverse=True)

    def contexts(self, batch: Batch) -> list[Context]:
        """Return what each pass attends to; one context for all, unless the encoder has layers."""
        if getattr(self.encoder, "per_layer", False):
            return [self._context(batch, index) for index in range(len(self.order))]
        return [self._context(batch, None)] * len(self.order)

    def _context(self, batch: Batch, layer: int | None) -> Context:
        if self.encoder is None:
            context = batch.context(self.modality, self.positions)
        else:
            context = self._encoded(batch, layer)
        if not (self.spectral_context and self.axes):
            return context
        if context.offsets is None:
            return Context(fourier(context.joined(), self.axes).real)
        bags = [bag for bag in context.rows() if len(bag)]
        spectra = [fourier(bag, self.axes).real for bag in bags]
        return Context(torch.cat([context.joined()[:0], *spectra]), offsets=context.offsets)

    def _encoded(self, batch: Batch, layer: int | None) -> Context:
        """Encode each real item of the batch."""
        assert self.encoder is not None
        run = self.encoder if layer is None else partial(self.encoder, layer=layer)
        if batch.offsets is None and batch.keep is None:
            return batch.pack(self._tokens(run(batch.x), len(batch.x)), None)

        if batch.offsets is not None or isinstance(self.modality, Bag):
            if batch.offsets is None:
                assert batch.keep is not None
                bags = [x[keep] for x, keep in zip(batch.x, batch.keep, strict=True)]
            else:
                bags = batch.context(self.modality, self.positions).rows()
            tokens, lengths = self._encoded_bags(bags, run)
        else:
            assert batch.keep is not None
            real = batch.keep.all(1)
            if not torch.equal(real, batch.keep.any(1)):
                raise ValueError(
                    "mask: expected whole items, since the encoder takes no part of one; got a "
                    "partial mask"
                )
            tokens = batch.x.new_empty(0, self.token_dim)
            lengths = real.long()
            if real.any():
                encoded = self._tokens(run(batch.x[real]), int(real.sum()))
                tokens, lengths = encoded.flatten(0, 1), lengths * encoded.shape[1]
        lengths = lengths.reshape(batch.rows, batch.items).sum(1)
        return Context(tokens, offsets=offsets_of(lengths), single=bool((lengths <= 1).all()))

    def _encoded_bags(self, bags: list[Tensor], run: Any) -> tuple[Tensor, Tensor]:
        """Encode bags [N_i, F]: return all tokens [T, W] and how many each bag has, int64 [I]."""
        assert self.encoder is not None
        full = [bag for bag in bags if len(bag)]
        encoded: list[Tensor] = []
        if full and self.pads_bags:
            padded = nn.utils.rnn.pad_sequence(full, batch_first=True)
            sizes = torch.tensor([len(bag) for bag in full], device=padded.device)
            mask = torch.arange(padded.shape[1], device=padded.device) < sizes[:, None]
            encoded = list(self._tokens(run(padded, mask=mask), len(full)))
        elif full:
            encoded = [self._tokens(run(bag[None]), 1)[0] for bag in full]
        counts = iter(map(len, encoded))
        lengths = [next(counts) if len(bag) else 0 for bag in bags]
        empty = self.latents.new_empty(0, self.token_dim)
        return torch.cat([empty, *encoded]), torch.tensor(
            lengths, dtype=torch.int64, device=empty.device
        )

    def _tokens(self, encoded: Any, items: int) -> Tensor:
        """Bring an encoder's output into the shape [items, N, W]."""
        if not isinstance(encoded, Tensor):
            raise TypeError(
                f"encoder: expected it to return a tensor, got {type(encoded).__name__}"
            )
        if encoded.ndim == 1 and items == 1:  # encoders that squeeze a batch of one
            encoded = encoded[None]
        if encoded.ndim < 2 or len(encoded) != items or encoded.shape[-1] != self.token_dim:
            raise ValueError(
                f"encoder: expected it to return [{items}, {self.token_dim}] or "
                f"[{items}, ..., {self.token_dim}], got {tuple(encoded.shape)}"
            )
        if not torch.is_autocast_enabled(encoded.device.type):
            same_kind("encoder's output", encoded, self.latents, "the block")
        return encoded[:, None] if encoded.ndim == 2 else encoded.flatten(1, -2)


def joined_parts(real: Tensor, imaginary: Tensor | None) -> Tensor:
    """Return real + i imaginary; without a transform, the real part itself."""
    return real if imaginary is None else torch.complex(real, imaginary)


def fourier(x: Tensor, axes: tuple[int, ...], *, inverse: bool = False) -> Tensor:
    """Return the transform of x along `axes`, complex; also of no rows, which MKL refuses."""
    if x.numel() == 0:
        return x if x.is_complex() else torch.complex(x, x)
    return torch.fft.ifftn(x, dim=axes) if inverse else torch.fft.fftn(x, dim=axes)


def _self_conjugate(rows: int, columns: int, axes: tuple[int, ...]) -> Tensor:
    """Mark the frequencies, [rows, columns], at which the spectrum of a real array is real.

    The transforms leave rounding noise in the imaginary part there, whose sign would decide the
    phase of a merge: a negative real number has phase π or -π.
    """
    marks = torch.ones(rows, columns, dtype=torch.bool)
    for axis in axes:
        frequency = torch.arange(marks.shape[axis])
        own = frequency == -frequency % len(frequency)
        marks &= own[:, None] if axis == -2 else own
    return marks


def _encoder_config(encoder: nn.Module | None) -> dict[str, Any] | None:
    if encoder is None:
        return None
    name = f"motet.{type(encoder).__name__}"
    if _ENCODERS.get(name) is type(encoder):
        config: Any = encoder.config
        return {"type": name, **config}
    return {"type": type(encoder).__name__}


def _encoder_from_config(
    config: dict[str, Any] | None, encoder: nn.Module | None
) -> nn.Module | None:
    """Return the encoder that was passed in, or else the papers' encoder that the config names."""
    if config is None:
        if encoder is not None:
            raise ValueError("encoders: expected none, since the block has none")
        return None
    if encoder is not None:
        upstream = config["type"] == UpstreamEncoder.__name__
        wrapped = isinstance(encoder, UpstreamEncoder)
        return UpstreamEncoder(encoder) if upstream and not wrapped else encoder
    arguments = {key: value for key, value in config.items() if key != "type"}
    if config["type"] not in _ENCODERS:
        raise ValueError(
            f"encoders: expected the block's own encoder, a {config['type']}, which a file does "
            "not hold; got none"
        )
    return _ENCODERS[config["type"]](**arguments)


def _probed(encoder: Any, modality: Modality, width: int | None) -> tuple[int, bool]:
    """Run an encoder once on zeros; return the width of its output, and whether it pads bags.

    A bag is padded for an encoder that takes a mask and returns one token per bag; of one that
    returns several it could not be told which of them stem from padding.
    """
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"encoder: expected a torch.nn.Module or None, got {encoder!r}")
    if isinstance(modality, Bag) and modality.coords:
        raise ValueError("encoder: expected None for a Bag with coords, which the tokens carry")
    sizes = {Tabular: (), Bag: (2,), Grid: (32,) * (modality.item_ndim - 1)}
    shape = sizes[type(modality)]
    like = next((p for p in encoder.parameters() if p.is_floating_point()), torch.empty(0))
    zeros = torch.zeros(1, *shape, modality.channels, dtype=like.dtype, device=like.device)
    modes = {module: module.training for module in encoder.modules()}
    try:
        with torch.no_grad():
            out = encoder.eval()(zeros)
        found, pools = int(out.shape[-1]), out.ndim <= 2
    except Exception as error:
        if width is None:
            raise ValueError(
                "encoder_dim: the width of the encoder's output could not be found by running it "
                f"on zeros {tuple(zeros.shape)} ({type(error).__name__}: {error}); pass encoder_dim"
            ) from error
        return integer("encoder_dim", width), False
    finally:
        for module, mode in modes.items():
            module.training = mode
    if width is not None and width != found:
        raise ValueError(f"encoder_dim: expected {found}, the encoder's output, got {width}")
    return found, pools and "mask" in inspect.signature(encoder.forward).parameters
