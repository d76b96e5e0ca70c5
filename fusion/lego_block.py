"""LegoBlock: one modality, learned in the frequency domain (MM-Lego).

The loop of transform, update and inverse transform is carried as the spectrum alone (`run_steps`);
`strategy="reference"` computes it literally (`run_literally`).
"""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from .._checks import choice, integer, positive, rate
from ..kernels.backends import Backend
from ..kernels.checks import same_kind
from ..kernels.lego_pass.spectrum import AXES, compute_real_spectrum, normalise_columns
from ..kernels.plan import Strategy
from .attention import Attention, Keys
from .attention_forms import prepare
from .context import Context, ModalityInput, Names, check_tensor, offsets_of, read
from .encoder_config import encoder_from_config, encoder_to_config, probe_encoder
from .layers import FeedForward, Head, ShareWeights, initial_latents, layer_order
from .modalities import (
    Bag,
    Modality,
    Positions,
    check_modality,
    modality_from_config,
    modality_to_config,
)
from .passes import LegoLayer, PassOptions, Spectrum, Step, Transform, run_steps


class LegoOutput(NamedTuple):
    """What the Lego models return when latents are asked for."""

    logits: Tensor
    """[B, out_features]."""
    latents: Tensor
    """[B, C, D], in the frequency domain if the blocks have a transform. Complex for a LegoBlock
    and a LegoMerge with one, and for every harmonic merge; real otherwise."""


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
        self.modality, self.encoder = modality, encoder
        self.positions = Positions(num_freq_bands, max_freq, fourier_encode)
        self.config: dict[str, Any] = {
            "modality": modality_to_config(modality),
            "encoder": encoder_to_config(encoder),
            "out_features": None if out_features is None else integer("out_features", out_features),
            "num_latents": integer("num_latents", num_latents),
            "latent_dim": integer("latent_dim", latent_dim),
            "depth": integer("depth", depth),
            "heads": integer("heads", heads),
            "head_dim": integer("head_dim", head_dim),
            "attn_dropout": rate("attn_dropout", attn_dropout),
            "ff_dropout": rate("ff_dropout", ff_dropout),
            "share_weights": share_weights,
            "fft": fft,
            "context": context,
            "normalise": normalise,
            "track_imaginary": track_imaginary,
            "snn": snn,
            "temperature": positive("temperature", temperature),
            "latent_init": latent_init,
            "num_freq_bands": self.positions.num_freq_bands,
            "max_freq": self.positions.max_freq,
            "fourier_encode": fourier_encode,
        }
        _check_choices(self.config)
        self.token_dim, self.pads_bags = self._look_at_tokens(encoder_dim)
        self.config["encoder_dim"] = None if encoder is None else self.token_dim
        self._build(self.config)

    def _look_at_tokens(self, encoder_dim: int | None) -> tuple[int, bool]:
        """Return the width of the tokens to attend to, and whether the encoder pads bags."""
        if self.encoder is not None:
            return probe_encoder(self.encoder, self.modality, encoder_dim)
        if encoder_dim is not None:
            raise ValueError("encoder_dim: expected None without an encoder")
        return self.modality.token_dim(self.positions), False

    def _build(self, config: dict[str, Any]) -> None:
        """Draw the weights; in another order, a seed would give another model."""
        width = config["latent_dim"]
        self.fft = config["fft"]
        self.transform = Transform(self.fft, config["num_latents"], width)
        self.spectral_context = config["context"] == "spectrum"
        self.normalise: bool = config["normalise"]
        self.track_imaginary: bool = config["track_imaginary"]
        self.order = layer_order(config["depth"], config["share_weights"])
        self.latents = initial_latents(config["num_latents"], width, config["latent_init"])
        self.layers = nn.ModuleList(
            LegoLayer(
                Attention(
                    width,
                    self.token_dim,
                    heads=config["heads"],
                    head_dim=config["head_dim"],
                    dropout=config["attn_dropout"],
                    temperature=config["temperature"],
                ),
                FeedForward(width, dropout=config["ff_dropout"], snn=config["snn"]),
            )
            for _ in range(max(self.order) + 1)
        )
        out_features = config["out_features"]
        self.head = None if out_features is None else Head(width, out_features)

    @classmethod
    def from_config(cls, config: dict[str, Any], encoder: nn.Module | None = None) -> Self:
        """Build an untrained block from `block.config`; a copy is made of an encoder passed in."""
        modality = modality_from_config(config["modality"])
        encoder = encoder_from_config(config["encoder"], copy.deepcopy(encoder))
        return cls(**{**config, "modality": modality, "encoder": encoder})

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        present: Tensor | None = None,
        coords: Tensor | None = None,
        statistics: Tensor | None = None,
        latents: Tensor | None = None,
        return_latents: bool = False,
        strategy: Strategy | None = None,
        backend: Backend = "auto",
    ) -> Tensor | LegoOutput:
        """Predict logits from one modality.

        Args:
            x: the modality's tensor, shapes at `Tabular`, `Bag` and `Grid`. It is not changed.
            mask: bool, True for real tokens, [B, N] or in the shape of a grid.
            present: bool [B], False where the row misses the modality: its latents get no update.
            coords: coordinates, for a `Bag` that has them.
            statistics: what `motet.token_statistics` returns of a `Bag`'s tensor, where it is
                known. Not used where an encoder or a transform makes other tokens of these.
            latents: real [C, D] or [B, C, D] to start from instead of the block's own.
            return_latents: return the last latents too.
            strategy: how the context is attended to, instead of what `motet.kernels.plan` chooses:
                "cached", "absorbed", or "reference" for the literal loop, transforms included. The
                results are the same but for rounding.
            backend: who computes: "auto", "triton", "compile" or "eager".

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
            statistics=statistics,
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
        options = self.pass_options(strategy, backend)
        spectrum = self.encode(batch.rows, self.prepare(batch, options), options, latents)
        real = spectrum.real
        logits = real if self.head is None else self.head(real, backend=options.head_backend)
        return LegoOutput(logits, spectrum.joined()) if return_latents else logits

    def pass_options(
        self, strategy: Strategy | None = None, backend: Backend = "auto"
    ) -> PassOptions:
        """Return how the block's passes are run; arguments as of `forward`."""
        even = self.transform.axes == (-2,) and strategy != "reference"
        return PassOptions(strategy, backend, even and not any(layer.drops for layer in self.sets))

    def prepare(self, batch: ModalityInput, options: PassOptions) -> list[Keys]:
        """Encode a batch and read the context once; return what each set of weights attends to.

        An encoder with weights of its own for every pass makes that what each pass attends to.
        """
        if not self.encodes_every_pass:
            return self.attend_to(self.context(batch, options), options)
        attentions = [layer.attention for layer in self.sets]
        return [
            self._prepared(self._context(batch, index, options.half), [attentions[own]], options)[0]
            for index, own in enumerate(self.order)
        ]

    def context(self, batch: ModalityInput, options: PassOptions) -> Context:
        """Encode a batch; return what all passes attend to."""
        return self._context(batch, None, options.half)

    def attend_to(self, context: Context, options: PassOptions) -> list[Keys]:
        """Read what `context` returned once; return what each set of weights attends to."""
        attentions = [layer.attention for layer in self.sets]
        asked = [self.order.count(index) for index in range(len(attentions))]
        return self._prepared(context, attentions, options, asked)

    def _prepared(
        self,
        context: Context,
        attentions: Sequence[Attention],
        options: PassOptions,
        layers: Sequence[int] | None = None,
    ) -> list[Keys]:
        rows = self.transform.rows
        return prepare(
            context, attentions, latents=rows // 2 + 1 if options.half else rows, layers=layers,
            strategy=options.strategy, backend=options.backend,
        )  # fmt: skip

    def steps(self, keys: Sequence[Keys]) -> list[Step]:
        """Return the block's passes; `keys` are what `prepare` returned."""
        asked = range(len(self.order)) if self.encodes_every_pass else self.order
        return [
            Step(
                self.sets[own].attention,
                self.sets[own].feed_forward,
                keys[index],
                self.normalise,
                not self.track_imaginary,
            )
            for own, index in zip(self.order, asked, strict=True)
        ]

    def encode(
        self, rows: int, keys: Sequence[Keys], options: PassOptions, latents: Tensor | None = None
    ) -> Spectrum:
        """Run all passes; return the last spectrum, [B, C, D] each.

        Args:
            rows: B.
            keys: what `prepare` returned for `options`.
            options: see there.
            latents: real [C, D] or [B, C, D] to start from; None means the block's own.
        """
        *steps, last = self.steps(keys)
        steps.append(last._replace(drop_imaginary=False))  # the last pass returns what it found
        start = self.latents if latents is None else latents
        if options.strategy == "reference":
            start = start.expand(rows, -1, -1)
        elif start.ndim == 2:
            start = start[None]
        return self._spread(rows, run_steps(start, steps, self.transform, options))

    def untouched(self, rows: int) -> Spectrum:
        """Return the spectrum of rows without the modality, [rows, C, D] each: no update."""
        real, imaginary = self.transform(self.latents[None])
        if self.transform.axes and self.normalise:
            real, imaginary = normalise_columns(real, imaginary, self.transform.axes)
        if not self.track_imaginary and len(self.order) > 1:
            imaginary = None
        return self._spread(rows, Spectrum(real, imaginary))

    def _spread(self, rows: int, spectrum: Spectrum) -> Spectrum:
        """Return waves of `rows` rows, with an imaginary part if there is a transform."""
        real, imaginary = spectrum
        if self.transform.axes and imaginary is None:
            imaginary = torch.zeros_like(real)
        shape = (rows, -1, -1)
        return Spectrum(real.expand(shape), None if imaginary is None else imaginary.expand(shape))

    @property
    def encodes_every_pass(self) -> bool:
        return getattr(self.encoder, "per_layer", False)

    @property
    def sets(self) -> list[LegoLayer]:
        """The sets of weights, of which `order` says which pass uses which."""
        return [cast(LegoLayer, layer) for layer in self.layers]

    def _context(self, batch: ModalityInput, layer: int | None, half: bool) -> Context:
        """Return what a pass attends to; `layer` for an encoder with weights per pass."""
        if self.encoder is None:
            context = batch.context(self.modality, self.positions)
        else:
            context = self._encoded(batch, layer)
        axes = self.transform.axes
        if not (self.spectral_context and axes):
            return context
        if context.offsets is None:
            tokens, counts = compute_real_spectrum(context.joined(), axes, half=half)
            if counts is not None:
                counts = counts.expand(tokens.shape[:2])
            return Context(tokens, single=context.single, counts=counts, present=context.present)
        bags = [compute_real_spectrum(bag, axes, half=half) for bag in context.rows() if len(bag)]
        tokens = torch.cat([context.joined()[:0], *(bag for bag, _ in bags)])
        if not half:
            return Context(tokens, offsets=context.offsets)
        lengths = context.offsets.diff()
        counts = [own for _, own in bags if own is not None]
        return Context(
            tokens,
            offsets=offsets_of(torch.where(lengths > 0, lengths // 2 + 1, 0)),
            counts=torch.cat(counts) if counts else None,
        )

    def _encoded(self, batch: ModalityInput, layer: int | None) -> Context:
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
        if bool((lengths <= 1).all()):
            present = lengths > 0
            places = tokens.new_zeros(batch.rows, 1, tokens.shape[1])
            tokens = places.index_put((present,), tokens[:, None])
            return Context(tokens, single=True, present=present)
        return Context(tokens, offsets=offsets_of(lengths))

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


def _check_choices(config: Mapping[str, Any]) -> None:
    choice("fft", config["fft"], tuple(AXES))
    choice("context", config["context"], ("features", "spectrum"))
    for name in ("normalise", "track_imaginary", "snn"):
        choice(name, config[name], (True, False))
