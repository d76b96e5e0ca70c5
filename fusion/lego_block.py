"""LegoBlock: one modality, learned in the frequency domain (MM-Lego).

The equations transform, update and transform back in every pass. `run_passes` carries only the
spectrum from pass to pass; `strategy="reference"` computes the literal loop (`run_literally`).
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from .._checks import choice, integer, positive, rate
from ..kernels.backends import Backend
from ..kernels.lego_pass.spectrum import AXES, normalise_columns
from ..kernels.plan import Strategy
from .attention import Attention, Keys
from .attention_forms import prepare
from .context import ArgumentNames, Context, ModalityInput, check_tensor, read
from .encoder_config import encoder_from_config, encoder_to_config, probe_encoder
from .layers import FeedForward, Head, ShareWeights, initial_latents, layer_order
from .lego_encoding import ItemEncoder, transform_context
from .modalities import (
    Grid,
    Modality,
    Positions,
    check_modality,
    modality_from_config,
    modality_to_config,
)
from .passes import (
    AttentionRecorder,
    FourierTransform,
    LegoLayer,
    Pass,
    PassOptions,
    Spectrum,
    run_passes,
)


class LegoOutput(NamedTuple):
    """What the Lego models return if latents or attention are requested."""

    logits: Tensor
    """[B, out_features]."""
    latents: Tensor | None
    """[B, C, D], in the frequency domain if the blocks have a transform. Complex for a LegoBlock
    and a LegoMerge with one, and for every harmonic merge; real otherwise. None if not
    requested."""
    attention: dict[str, list[Tensor]] | None = None
    """Attention weights by modality ("x" for a LegoBlock) and pass, as of `HEALNetOutput`. None if
    not requested."""


class LegoBlock(nn.Module):
    r"""Wrap an encoder; learn its latent in the frequency domain (MM-Lego, Eq. 1-3).

    .. math::
        h = g(X), \quad Z = \mathcal F(L), \quad
        \mathrm{Re} Z \leftarrow \psi(\mathrm{Re} Z, \, h), \quad L \leftarrow \mathcal F^{-1}(Z)

    `depth` times, without the last inverse; then a head on the mean of Re Z. ψ is cross-attention
    followed by a gated feed-forward, as in HEALNet; Im Z is carried along. Blocks with the same
    `num_latents`, `latent_dim`, `fft` and `out_features` fit together in LegoMerge and LegoFuse,
    whatever their encoders are.

    Args:
        modality: `Tabular`, `Bag` or `Grid`.
        encoder: any module, or None. Its input is the caller's tensor as [I, ...], with every item
            of a patient (visit, slide) as a row; it returns [I, W] (one token) or [I, ..., W]
            (tokens). Ragged or masked bags are encoded one by one, so that padding cannot change a
            prediction. An encoder that returns one token per bag and whose `forward` takes a `mask`
            (bool [I, N], True for real) gets all bags at once instead, padded with zeros. Missing
            items are never encoded.
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
        track_imaginary: carry the imaginary part Im Z; if False, it is zero from the second pass
            on.
        snn: gate the feed-forward with SELU instead of GELU.
        temperature: divides the attention scores, on top of sqrt(head_dim).
        latent_init: "normal", N(0, 1), or "uniform", U(0, 1).
        num_freq_bands, max_freq, fourier_encode: positions of grids and coordinates, as in HEALNet;
            used without an encoder.
        encoder_dim: width W of the encoder's output. Needed only if it cannot be found by running
            the encoder on zeros, which the constructor does.

    Raises:
        ValueError: an argument outside its range, or an encoder whose width cannot be found.
        TypeError: something that is not a modality or not an encoder.

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
        if encoder is not None and not isinstance(modality, Grid):
            # The tokens are the encoder's, which gets what the caller passes, without constants.
            modality = replace(modality, keep_scale=False)
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
        self.token_dim, self.pads_bags = self._find_token_dim(encoder_dim)
        self.config["encoder_dim"] = None if encoder is None else self.token_dim
        self._build(self.config)

    def _find_token_dim(self, encoder_dim: int | None) -> tuple[int, bool]:
        """Return the width of the context's tokens, and whether the encoder takes padded bags."""
        if self.encoder is not None:
            return probe_encoder(self.encoder, self.modality, encoder_dim)
        if encoder_dim is not None:
            raise ValueError("encoder_dim: expected None without an encoder")
        return self.modality.token_dim(self.positions), False

    def _build(self, config: dict[str, Any]) -> None:
        """Draw the weights. Their order is fixed: in another order, a seed gives another model."""
        width = config["latent_dim"]
        self.fft = config["fft"]
        self.transform = FourierTransform(self.fft, config["num_latents"], width)
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
        """Build an untrained block from `block.config`, with a copy of `encoder`."""
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
        return_attention: bool = False,
        strategy: Strategy | None = None,
        backend: Backend = "auto",
    ) -> Tensor | LegoOutput:
        """Predict logits from one modality.

        Args:
            x: the modality's tensor, shapes at `Tabular`, `Bag` and `Grid`. It is not changed.
            mask: bool, True for real tokens, [B, N] or in the shape of a grid.
            present: bool [B], False where the row misses the modality: its latents get no update.
            coords: coordinates, for a `Bag` that has them.
            statistics: the result of `motet.token_statistics` on a `Bag`'s tensor, if it was
                computed before. Not used if an encoder or a transform changes the tokens.
            latents: real [C, D] or [B, C, D] to start from; None for the block's parameter.
            return_latents: return the last latents too.
            return_attention: return the attention weights too, before dropout; without a
                gradient, unless `strategy="reference"`. Not for an encoder or
                `context="spectrum"`, whose tokens are not those of the input.
            strategy: "cached", "absorbed", or "reference" for the literal loop; None for the one
                that `motet.kernels.plan` chooses. The results differ by rounding only.
            backend: "auto", "triton", "compile" or "eager".

        Returns:
            Logits [B, out_features] (real latents [B, C, D] for a block without a head); a
            `LegoOutput` if latents or attention are requested.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit; or attention that is not to the
                tokens of the input.
            TypeError: something that is not a tensor.
        """
        batch = read(
            self.modality, x, names=ArgumentNames(), mask=mask, present=present, coords=coords,
            statistics=statistics, like=self.latents,
        )  # fmt: skip
        if latents is not None:
            self._check_latents(latents, batch.rows)
        options = self.pass_options(strategy, backend, return_attention)
        keys = self.prepare(batch, options)
        recorder = AttentionRecorder({"x": batch}, {"x": keys}) if return_attention else None
        options = options._replace(watch=recorder)
        spectrum = self.encode(batch.rows, keys, options, latents)
        real = spectrum.real
        logits = real if self.head is None else self.head(real, backend=options.head_backend)
        if not (return_latents or return_attention):
            return logits
        attention = None if recorder is None else recorder.attention
        return LegoOutput(logits, spectrum.to_complex() if return_latents else None, attention)

    @property
    def attends_to_input(self) -> bool:
        """Whether the tokens that the block attends to are those of the input."""
        return self.encoder is None and not (self.spectral_context and self.transform.axes)

    def pass_options(
        self,
        strategy: Strategy | None = None,
        backend: Backend = "auto",
        return_attention: bool = False,
    ) -> PassOptions:
        """Return the options of the block's passes; arguments as of `forward`.

        Raises:
            ValueError: attention that is not to the tokens of the input.
        """
        if not return_attention:
            even = self.transform.axes == (-2,) and strategy != "reference"
            half = even and not any(layer.drops for layer in self.sets)
            return PassOptions(strategy, backend, half)
        if not self.attends_to_input:
            what = "an encoder" if self.encoder is not None else "context='spectrum'"
            raise ValueError(
                "return_attention: expected a block whose tokens are those of the input, got one "
                f"with {what}"
            )
        return PassOptions(strategy, backend)  # with the weights of all latents

    def prepare(self, batch: ModalityInput, options: PassOptions) -> list[Keys]:
        """Encode a batch and read the context once; return the keys of each set of weights.

        If the encoder has weights for every pass, return the keys of each pass instead.
        """
        if not self.encodes_every_pass:
            return self.attend_to(self.make_context(batch, options), options)
        attentions = [layer.attention for layer in self.sets]
        return [
            self._make_keys(
                self._make_context(batch, index, options.half), [attentions[weight_set]], options
            )[0]
            for index, weight_set in enumerate(self.order)
        ]

    def make_context(self, batch: ModalityInput, options: PassOptions) -> Context:
        """Encode a batch; return the context of all passes."""
        return self._make_context(batch, None, options.half)

    def attend_to(self, context: Context, options: PassOptions) -> list[Keys]:
        """Return the keys of each set of weights; `context` is that of `make_context`."""
        attentions = [layer.attention for layer in self.sets]
        uses = [self.order.count(index) for index in range(len(attentions))]
        return self._make_keys(context, attentions, options, uses)

    def _make_keys(
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

    def make_passes(self, keys: Sequence[Keys]) -> list[Pass]:
        """Return the block's passes; `keys` are those that `prepare` returned."""
        key_index = range(len(self.order)) if self.encodes_every_pass else self.order
        return [
            Pass(
                self.sets[weight_set].attention,
                self.sets[weight_set].feed_forward,
                keys[index],
                self.normalise,
                not self.track_imaginary,
            )
            for weight_set, index in zip(self.order, key_index, strict=True)
        ]

    def encode(
        self, rows: int, keys: Sequence[Keys], options: PassOptions, latents: Tensor | None = None
    ) -> Spectrum:
        """Run all passes; return the last spectrum, [B, C, D] each.

        Args:
            rows: B.
            keys: those that `prepare` returned for the same `options`.
            options: see `pass_options`.
            latents: real [C, D] or [B, C, D] to start from; None for the block's parameter.
        """
        *passes, last = self.make_passes(keys)
        passes.append(last._replace(drop_imaginary=False))  # it returns the Im Z that it received
        start = self.latents if latents is None else latents
        if options.strategy == "reference":
            start = start.expand(rows, -1, -1)
        elif start.ndim == 2:
            start = start[None]
        return self._expand_rows(rows, run_passes(start, passes, self.transform, options))

    def untouched(self, rows: int) -> Spectrum:
        """Return the spectrum of rows that miss the modality, [rows, C, D] each: no update."""
        real, imaginary = self.transform(self.latents[None])
        if self.transform.axes and self.normalise:
            real, imaginary = normalise_columns(real, imaginary, self.transform.axes)
        if not self.track_imaginary and len(self.order) > 1:
            imaginary = None
        return self._expand_rows(rows, Spectrum(real, imaginary))

    def _expand_rows(self, rows: int, spectrum: Spectrum) -> Spectrum:
        """Return a spectrum of `rows` rows; with a transform, Im Z is a tensor, not None."""
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
        """The sets of weights; pass i uses set `order[i]`."""
        return [cast(LegoLayer, layer) for layer in self.layers]

    def _check_latents(self, latents: Tensor, rows: int) -> None:
        """Raise unless a batch of `rows` rows can start from `latents`."""
        check_tensor(latents, "latents", self.latents)
        shape = tuple(self.latents.shape)
        if tuple(latents.shape) not in (shape, (rows, *shape)):
            raise ValueError(
                f"latents: expected {shape} or {(rows, *shape)}, got {tuple(latents.shape)}"
            )

    def _make_context(self, batch: ModalityInput, layer: int | None, half: bool) -> Context:
        """Return the context of a pass; `layer` is its index if the encoder has one per pass."""
        if self.encoder is None:
            context = batch.make_context(self.modality, self.positions)
        else:
            encoder = self.encoder if layer is None else partial(self.encoder, layer=layer)
            items = ItemEncoder(
                encoder, self.modality, self.positions, self.token_dim, self.pads_bags, self.latents
            )
            context = items.make_context(batch)
        if self.spectral_context and self.transform.axes:
            return transform_context(context, self.transform.axes, half=half)
        return context


def _check_choices(config: Mapping[str, Any]) -> None:
    choice("fft", config["fft"], tuple(AXES))
    choice("context", config["context"], ("features", "spectrum"))
    for name in ("normalise", "track_imaginary", "snn"):
        choice(name, config[name], (True, False))
