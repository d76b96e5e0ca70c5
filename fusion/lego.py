"""MM-Lego: LegoBlock learns a modality in the frequency domain, LegoMerge and LegoFuse join blocks.

LegoBlock computes the literal loop of the paper, transforms included: it is the yardstick for every
faster form.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Self, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..kernels import harmonic_merge, slerp
from .context import Batch, Context, offsets_of, read, read_all
from .encoders import ABMIL, SNN, BagSelfAttention, UpstreamEncoder
from .layers import (
    Attention,
    FeedForward,
    Head,
    ShareWeights,
    check_rates,
    initial_latents,
    layer_order,
    update,
)
from .modalities import (
    Bag,
    Modality,
    Positions,
    Tabular,
    check_names,
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
_ENCODERS: dict[str, type[nn.Module]] = {
    "SNN": SNN,
    "ABMIL": ABMIL,
    "BagSelfAttention": BagSelfAttention,
}


class LegoOutput(NamedTuple):
    """What the Lego models return when latents are asked for."""

    logits: Tensor
    """[B, out_features]."""
    latents: Tensor
    """[B, C, D], in the frequency domain: complex for LegoBlock and LegoMerge with a transform."""


class LegoLayer(nn.Module):
    """The weights of one pass of a LegoBlock."""

    def __init__(self, attention: Attention, feed_forward: FeedForward) -> None:
        super().__init__()
        self.attention = attention
        self.feed_forward = feed_forward

    def forward(self, latents: Tensor, context: Context) -> Tensor:
        return update(self.attention, self.feed_forward, latents, context)


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
            [I, ..., W] (tokens). A bag is given with its padding only if `forward` takes a `mask`
            (bool [I, N], True for real); otherwise every ragged or masked bag is encoded alone, so
            that padding cannot change a prediction. Missing items are never encoded.
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
        encoder_dim: width W of the encoder's output; None finds it by running the encoder once on
            zeros.

    Raises:
        ValueError: an argument outside its range, or an encoder whose width cannot be found.

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
        fft: str | None = "2d",
        context: str = "features",
        normalise: bool = False,
        track_imaginary: bool = True,
        snn: bool = True,
        temperature: float = 1.0,
        latent_init: str = "normal",
        num_freq_bands: int = 2,
        max_freq: float = 10.0,
        fourier_encode: bool = True,
        encoder_dim: int | None = None,
    ) -> None:
        super().__init__()
        if fft not in _FFT_AXES:
            raise ValueError(f"fft: expected '2d', 'latents', 'width' or None, got {fft!r}")
        if context not in ("features", "spectrum"):
            raise ValueError(f"context: expected 'features' or 'spectrum', got {context!r}")
        if isinstance(modality, Bag) and modality.coords and encoder is not None:
            raise ValueError("encoder: expected None for a Bag with coords, which the tokens carry")
        check_rates(attn_dropout=attn_dropout, ff_dropout=ff_dropout)
        self.modality, self.encoder = modality, encoder
        self.positions = Positions(num_freq_bands, max_freq, fourier_encode)
        if encoder is None:
            self.token_dim = modality.token_dim(self.positions)
        else:
            self.token_dim = encoder_dim or _output_width(encoder, modality)
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
            "num_freq_bands": num_freq_bands,
            "max_freq": max_freq,
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
            self.modality, x, name="x", mask=mask, present=present, coords=coords, like=self.latents
        )
        if latents is not None:
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
        return LegoOutput(logits, real if imaginary is None else torch.complex(real, imaginary))

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
        if self.normalise:
            norm = torch.linalg.vector_norm(latents, dim=self.axes, keepdim=True)
            latents = latents / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        spectrum = torch.fft.fftn(latents, dim=self.axes)
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
        return torch.fft.ifftn(spectrum, dim=self.axes)

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
            return Context(torch.fft.fftn(context.tokens, dim=self.axes).real)
        bags = [bag for bag in context.rows() if len(bag)]
        spectra = [torch.fft.fftn(bag, dim=self.axes).real for bag in bags]
        return Context(torch.cat([context.tokens[:0], *spectra]), context.offsets)

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
        return Context(tokens, offsets_of(lengths.reshape(batch.rows, -1).sum(1)))

    def _encoded_bags(self, bags: list[Tensor], run: Any) -> tuple[Tensor, Tensor]:
        """Encode bags [N_i, F]: return all tokens [T, W] and how many each bag has, int64 [I]."""
        assert self.encoder is not None
        full = [bag for bag in bags if len(bag)]
        encoded: list[Tensor] = []
        if full and "mask" in inspect.signature(self.encoder.forward).parameters:
            padded = nn.utils.rnn.pad_sequence(full, batch_first=True)
            sizes = torch.tensor([len(bag) for bag in full], device=padded.device)
            mask = torch.arange(padded.shape[1], device=padded.device) < sizes[:, None]
            tokens = self._tokens(run(padded, mask=mask), len(full))
            aligned = tokens.shape[1] == padded.shape[1]
            encoded = [t[m] if aligned else t for t, m in zip(tokens, mask, strict=True)]
        elif full:
            encoded = [self._tokens(run(bag[None]), 1)[0] for bag in full]
        counts = iter(map(len, encoded))
        lengths = [next(counts) if len(bag) else 0 for bag in bags]
        empty = self.latents.new_empty(0, self.token_dim)
        return torch.cat([empty, *encoded]), torch.tensor(lengths, device=empty.device)

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
        return encoded[:, None] if encoded.ndim == 2 else encoded.flatten(1, -2)


class _Joined(nn.Module):
    """Blocks by modality, copied so that nothing done here changes the originals."""

    def __init__(self, blocks: Mapping[str, LegoBlock], head: str | Head, weights: Any) -> None:
        super().__init__()
        if isinstance(blocks, LegoBlock) or not isinstance(blocks, Mapping) or not blocks:
            raise ValueError("blocks: expected a dict of modality name to LegoBlock, not empty")
        check_names(blocks)
        first_name, first = next(iter(blocks.items()))
        for name, block in blocks.items():
            if not isinstance(block, LegoBlock):
                raise TypeError(
                    f"blocks[{name!r}]: expected a LegoBlock, got {type(block).__name__}"
                )
            for field in ("num_latents", "latent_dim", "fft", "out_features"):
                if block.config[field] != first.config[field]:
                    raise ValueError(
                        f"blocks[{name!r}]: expected {field} {first.config[field]!r} as "
                        f"blocks[{first_name!r}], got {block.config[field]!r}"
                    )
        self.weights = _positive_weights(weights, list(blocks))
        self.blocks = nn.ModuleDict({name: copy.deepcopy(b) for name, b in blocks.items()})
        self.head: Head | None
        if isinstance(head, Head):
            self.head = copy.deepcopy(head)
        elif first.head is None:
            self.head = None
        else:
            heads = [b.head for b in blocks.values() if b.head is not None]
            self.head = merge_heads(heads, list(self.weights.values()), head)
        # A parameter of the authors' classes that their computation does not use; kept by
        # from_upstream so that to_upstream returns it.
        self.register_buffer("upstream_latents", None)

    @property
    def modalities(self) -> dict[str, Modality]:
        return {name: block.modality for name, block in self._blocks().items()}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], encoders: Mapping[str, nn.Module] | None = None
    ) -> Self:
        """Build an untrained model from `model.config`; copies are made of encoders passed in."""
        encoders = dict(encoders or {})
        unknown = [name for name in encoders if name not in config["blocks"]]
        if unknown:
            raise ValueError(f"encoders: unknown modality {unknown[0]!r}")
        blocks = {
            name: LegoBlock.from_config(block, encoders.get(name))
            for name, block in config["blocks"].items()
        }
        options = {key: value for key, value in config.items() if key != "blocks"}
        if options["head"] == "given":
            first = next(iter(blocks.values())).config
            options["head"] = Head(first["latent_dim"], first["out_features"])
        return cls(blocks, **options)

    def _config(self, head: str | Head, **fields: Any) -> dict[str, Any]:
        return {
            "blocks": {name: block.config for name, block in self._blocks().items()},
            "head": "given" if isinstance(head, Head) else head,
            **fields,
        }

    def _blocks(self) -> dict[str, LegoBlock]:
        return {name: block for name, block in self.blocks.items() if isinstance(block, LegoBlock)}

    def _read(self, inputs: Any, masks: Any, present: Any, coords: Any) -> dict[str, Batch]:
        like = next(iter(self._blocks().values())).latents
        return read_all(
            self.modalities, inputs, masks=masks, present=present, coords=coords, like=like
        )

    def _with_block(self, name: str, block: LegoBlock) -> dict[str, LegoBlock]:
        if name in self._blocks():
            raise ValueError(f"name: expected a new modality, got {name!r}, which the model has")
        return {**self._blocks(), name: block}

    def _weights_with(self, name: str, weight: float | None) -> dict[str, float]:
        count = len(self.weights)
        share = 1 / (count + 1) if weight is None else weight
        if not 0 < share < 1:
            raise ValueError(f"weight: expected a share in (0, 1), got {weight}")
        return {**{n: w * (1 - share) for n, w in self.weights.items()}, name: share}


class LegoMerge(_Joined):
    r"""Join trained blocks with no training (MM-Lego, Eq. 4).

    .. math::
        \frac{1}{\sum_m w_m / |Z_m|} \exp\Big(i \sum_m w_m \arg Z_m\Big)

    over the last complex latents Z_m of the blocks that a row has, weights renormalised over these;
    logits from the real part through the merged head. A row without any modality is predicted from
    the blocks' initial latents. One block alone gives what it gives unmerged.

    Args:
        blocks: name to trained LegoBlock, one or more, copied.
        method: "harmonic" (the paper), "mean" (weighted), "sum", "product", or "upstream-harmonic"
            (two blocks; the authors' code).
        head: "slerp" (the paper), "linear", "ot" (rows of each further head matched to the first
            by optimal transport, then averaged; needs POT); or a `Head` to use as it is.
        weights: one positive number per block, a dict or in order, for harmonic and mean latents
            and for the head; None means equal.
        phase: how phases are averaged, "principal" or "circular"; see
            `motet.kernels.harmonic_merge`.

    Raises:
        ValueError: blocks that do not fit each other, or an argument outside its range.
        TypeError: something that is not a LegoBlock.

    Note:
        "upstream-harmonic" with weights (α, 1-α) is 2 α (1-α) times the magnitude above, and the
        unweighted mean of the phases.

    Example:
        >>> blocks = {
        ...     "omic": motet.LegoBlock(motet.Tabular(20), motet.SNN(20), out_features=4),
        ...     "wsi": motet.LegoBlock(motet.Bag(32), motet.ABMIL(32), out_features=4),
        ... }
        >>> merged = motet.LegoMerge(blocks)
        >>> merged({"omic": torch.randn(2, 20), "wsi": None}).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        blocks: Mapping[str, LegoBlock],
        *,
        method: str = "harmonic",
        head: str | Head = "slerp",
        weights: Mapping[str, float] | Sequence[float] | None = None,
        phase: str = "principal",
    ) -> None:
        methods = ("harmonic", "mean", "sum", "product", "upstream-harmonic")
        if method not in methods:
            raise ValueError(f"method: expected one of {', '.join(methods)}, got {method!r}")
        if phase not in ("principal", "circular"):
            raise ValueError(f"phase: expected 'principal' or 'circular', got {phase!r}")
        super().__init__(blocks, head, weights)
        if method == "upstream-harmonic" and len(self.blocks) != 2:
            raise ValueError(f"method: upstream-harmonic takes 2 blocks, got {len(self.blocks)}")
        self.method, self.phase = method, phase
        self.config = self._config(head, method=method, weights=dict(self.weights), phase=phase)

    def forward(
        self,
        inputs: Any,
        *,
        masks: Any = None,
        present: Any = None,
        coords: Any = None,
        return_latents: bool = False,
    ) -> Tensor | LegoOutput:
        """Predict logits; arguments as in `HEALNet.forward`.

        Returns:
            Logits [B, out_features] (real latents [B, C, D] without a head); a `LegoOutput` if
            latents were asked for, complex unless the blocks have no transform.
        """
        batches = self._read(inputs, masks, present, coords)
        rows = next(iter(batches.values())).rows
        blocks = self._blocks()
        latents: dict[str, Tensor] = {}
        updated: dict[str, Tensor | None] = {}
        for name, batch in batches.items():
            real, imaginary, updated[name] = blocks[name].encode(batch)
            latents[name] = _joined_parts(real, imaginary)
        if len(latents) == len(blocks) and all(rows is None for rows in updated.values()):
            merged = self._merge(list(latents), list(latents.values()))
        else:
            merged = self._merge_by_pattern(rows, latents, updated)
        # Contiguous, as a block alone has it: the head then rounds alike.
        real = merged.real.contiguous() if merged.is_complex() else merged
        logits = real if self.head is None else self.head(real)
        return LegoOutput(logits, merged) if return_latents else logits

    def add(self, name: str, block: LegoBlock, *, weight: float | None = None) -> Self:
        """Return a model with one more modality, nothing retrained.

        The head is merged anew from the heads that the blocks came with.

        Args:
            name: the new modality.
            block: its trained block, copied.
            weight: its share in (0, 1), the others keeping their ratios; None means 1 / (M + 1).

        Raises:
            ValueError: a name that the model has, a block or weight that does not fit, or a model
                whose head was given rather than merged.
        """
        if self.config["head"] == "given":
            raise ValueError("head: expected a merged head to add to, got a given one")
        weights = self._weights_with(name, weight)
        return type(self)(
            self._with_block(name, block),
            method=self.method,
            head=self.config["head"],
            weights=weights,
            phase=self.phase,
        )

    def _merge_by_pattern(
        self, rows: int, latents: dict[str, Tensor], updated: dict[str, Tensor | None]
    ) -> Tensor:
        """Merge rows that have the same blocks together."""
        like = next(iter(latents.values()))
        blocks = self._blocks()
        has = torch.zeros(rows, len(blocks), dtype=torch.bool, device=like.device)
        for i, name in enumerate(blocks):
            if name in latents:
                own = updated[name]
                has[:, i] = True if own is None else own
        patterns, index = has.unique(dim=0, return_inverse=True)
        merged = None
        for i, pattern in enumerate(patterns.tolist()):
            chosen = (index == i).nonzero().squeeze(1)
            names = [name for name, there in zip(blocks, pattern, strict=True) if there]
            parts = [latents[name][chosen] for name in names]
            if not names:
                names = list(blocks)
                parts = [_joined_parts(*blocks[name].untouched(len(chosen))) for name in names]
            part = self._merge(names, parts)
            if merged is None:
                merged = part.new_zeros(rows, *part.shape[1:])
            merged = merged.to(torch.promote_types(merged.dtype, part.dtype))
            merged = merged.index_copy(0, chosen, part.to(merged.dtype))
        assert merged is not None
        return merged

    def _merge(self, names: list[str], latents: list[Tensor]) -> Tensor:
        if len(latents) == 1:
            return latents[0]
        weights = [self.weights[name] for name in names]
        if self.method == "sum":
            return torch.stack(latents).sum(0)
        if self.method == "product":
            return torch.stack(latents).prod(0)
        if self.method == "mean":
            total = sum(weights)
            return torch.stack([w / total * z for w, z in zip(weights, latents, strict=True)]).sum(
                0
            )
        spectra = [z if z.is_complex() else torch.complex(z, torch.zeros_like(z)) for z in latents]
        if self.method == "harmonic":
            return harmonic_merge(spectra, weights, self.phase)
        alpha = weights[0]
        a, b = (z.abs() for z in spectra)
        size = 2 * alpha * (1 - alpha) * a * b / (alpha * b + (1 - alpha) * a)
        angle = (spectra[0].angle() + spectra[1].angle()) / 2
        return torch.polar(size, angle)


class LegoFuse(_Joined):
    r"""Join trained blocks in one network, for a few epochs of fine-tuning (MM-Lego, section 3.4).

    "stack": the blocks run one after the other; the first that a row has starts from its own
    latents, each further one from the real part of the latents before it, L_{m+1} = Re Z_m.
    "weave": one latent array passes the first layer of every block, then the second, and so on,
    each pass the transform, update and inverse of that block; it starts from a parameter of the
    model, a copy of the first block's latents, and the head sees its transform.

    A block whose modality a row misses is skipped for that row. A row without any modality is
    predicted from S_0, the first block's latents (stack) or the model's (weave).

    Args:
        blocks: name to trained LegoBlock, one or more, copied.
        mode: "stack", "weave", or "upstream-weave" (the authors' code).
        head: how the heads are merged to begin with, as in LegoMerge; or a `Head`.
        weights: one positive number per block for the head; None means equal.
        depth: rounds of a weave; None means the depth of the deepest block.

    Raises:
        ValueError: blocks that do not fit each other, or an argument outside its range.
        TypeError: something that is not a LegoBlock.

    Note:
        "upstream-weave" never transforms; each round runs x = encoder(x) + x and the first layer of
        every block. It needs dense inputs and encoders that keep the shape.

    Example:
        >>> blocks = {
        ...     "omic": motet.LegoBlock(motet.Tabular(20), motet.SNN(20), out_features=4),
        ...     "wsi": motet.LegoBlock(motet.Bag(32), motet.ABMIL(32), out_features=4),
        ... }
        >>> fused = motet.LegoFuse(blocks, mode="weave")
        >>> fused({"omic": torch.randn(2, 20), "wsi": torch.randn(2, 50, 32)}).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        blocks: Mapping[str, LegoBlock],
        *,
        mode: str = "stack",
        head: str | Head = "slerp",
        weights: Mapping[str, float] | Sequence[float] | None = None,
        depth: int | None = None,
    ) -> None:
        if mode not in ("stack", "weave", "upstream-weave"):
            raise ValueError(f"mode: expected 'stack', 'weave' or 'upstream-weave', got {mode!r}")
        super().__init__(blocks, head, weights)
        deepest = max(block.config["depth"] for block in blocks.values())
        rounds = deepest if depth is None else depth
        if rounds < 1 or (mode == "weave" and rounds > deepest):
            raise ValueError(f"depth: expected 1 to {deepest} rounds, got {depth}")
        self.mode, self.rounds = mode, rounds
        self.latents: nn.Parameter | None = None
        if mode != "stack":
            first = next(iter(self._blocks().values()))
            self.latents = nn.Parameter(first.latents.detach().clone())
        self.config = self._config(head, mode=mode, weights=dict(self.weights), depth=depth)

    def forward(
        self,
        inputs: Any,
        *,
        masks: Any = None,
        present: Any = None,
        coords: Any = None,
        return_latents: bool = False,
    ) -> Tensor | LegoOutput:
        """Predict logits; arguments as in `HEALNet.forward`.

        Returns:
            Logits [B, out_features] (latents [B, C, D] without a head); a `LegoOutput` if latents
            were asked for, real.
        """
        batches = self._read(inputs, masks, present, coords)
        run = {"stack": self._stack, "weave": self._weave, "upstream-weave": self._upstream_weave}
        latents = run[self.mode](batches)
        logits = latents if self.head is None else self.head(latents)
        return LegoOutput(logits, latents) if return_latents else logits

    def add(self, name: str, block: LegoBlock, *, weight: float | None = None) -> Self:
        """Return a model with one more modality; what was fine-tuned is kept, the head too.

        Args:
            name: the new modality, run last.
            block: its trained block, copied.
            weight: the share in (0, 1) of the block's head in the new head, which is interpolated
                between the model's and the block's; None means 1 / (M + 1).

        Raises:
            ValueError: a name that the model has, or a block or weight that does not fit.
        """
        weights = self._weights_with(name, weight)
        head: str | Head = self.config["head"]
        if self.head is not None and block.head is not None:
            method = "slerp" if head == "given" else str(head)
            share = weights[name]
            head = merge_heads([self.head, block.head], [1 - share, share], method)
        bigger = type(self)(
            self._with_block(name, block),
            mode=self.mode,
            head=head,
            weights=weights,
            depth=self.config["depth"],
        )
        if self.latents is not None and bigger.latents is not None:
            bigger.latents.data.copy_(self.latents)
        return bigger

    def _stack(self, batches: dict[str, Batch]) -> Tensor:
        blocks = self._blocks()
        rows = next(iter(batches.values())).rows
        first = next(iter(blocks.values()))
        latents = first.untouched(rows)[0]
        started = torch.zeros(rows, dtype=torch.bool, device=latents.device)
        for name, batch in batches.items():
            block = blocks[name]
            start = torch.where(started[:, None, None], latents, block.latents)
            real, _, updated = block.encode(batch, start)
            if updated is None:
                latents, started = real, torch.ones_like(started)
            else:
                latents = torch.where(updated[:, None, None], real, latents)
                started = started | updated
        return latents

    def _weave(self, batches: dict[str, Batch]) -> Tensor:
        assert self.latents is not None
        blocks = self._blocks()
        rows = next(iter(batches.values())).rows
        contexts = {name: blocks[name].contexts(batch) for name, batch in batches.items()}
        latents = self.latents.expand(rows, -1, -1)
        first = next(iter(blocks.values()))
        for index in range(self.rounds):
            for name, passes in contexts.items():
                if index >= len(passes):
                    continue
                real, imaginary = blocks[name].transform(latents)
                real = blocks[name].update(index, real, passes[index])
                woven = blocks[name].inverse(real, imaginary)
                nonempty = passes[index].nonempty
                if nonempty is not None:
                    woven = torch.where(nonempty[:, None, None], woven, latents)
                latents = woven
        return torch.fft.fftn(latents, dim=first.axes).real if first.axes else latents

    def _upstream_weave(self, batches: dict[str, Batch]) -> Tensor:
        assert self.latents is not None
        blocks = self._blocks()
        rows = next(iter(batches.values())).rows
        latents = self.latents.expand(rows, -1, -1)
        for name, batch in batches.items():
            if batch.keep is not None or batch.offsets is not None:
                raise ValueError(f"inputs[{name!r}]: upstream-weave takes dense tensors only")
            if not hasattr(blocks[name].encoder, "weave"):
                raise ValueError("mode: upstream-weave is for models made by motet.from_upstream")
        tokens = {name: batch.x for name, batch in batches.items()}
        for _ in range(self.rounds):
            for name in batches:
                encoder: Any = blocks[name].encoder
                tokens[name] = encoder.weave(tokens[name])
                latents = blocks[name].layer(0)(latents, Context(tokens[name]))
        return latents


def merge_heads(heads: Sequence[Head], weights: Sequence[float], method: str = "slerp") -> Head:
    """Merge heads parameter by parameter.

    Args:
        heads: one or more of the same shape.
        weights: one per head, summing to 1.
        method: "slerp", "linear" or "ot", see LegoMerge.

    Returns:
        A new Head.

    Raises:
        ValueError: an unknown method.
    """
    if method not in ("slerp", "linear", "ot"):
        raise ValueError(f"head: expected 'slerp', 'linear', 'ot' or a Head, got {method!r}")
    merged = copy.deepcopy(heads[0])
    if len(heads) == 1:
        return merged
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            values = [head.get_parameter(name).detach() for head in heads]
            if method == "slerp":
                value = slerp(values, weights)
            else:
                if method == "ot":
                    values = [values[0], *(_matched_rows(values[0], v) for v in values[1:])]
                value = torch.stack([w * v for w, v in zip(weights, values, strict=True)]).sum(0)
            parameter.copy_(value)
    return merged


def _matched_rows(target: Tensor, other: Tensor) -> Tensor:
    """Transport the rows of `other` optimally to those of `target`, all of equal mass."""
    try:
        import ot
    except ImportError as error:
        raise ImportError("head='ot' needs POT: pip install 'motet[ot]'") from error
    a, b = (t.reshape(len(t), -1).double().cpu().numpy() for t in (target, other))
    mass = np.ones(len(a))
    moved = ot.emd(mass, mass, ot.dist(a, b, metric="euclidean")) @ b
    return torch.from_numpy(moved).to(target).reshape(target.shape)


def _joined_parts(real: Tensor, imaginary: Tensor | None) -> Tensor:
    return real if imaginary is None else torch.complex(real, imaginary)


def _positive_weights(weights: Any, names: list[str]) -> dict[str, float]:
    if weights is None:
        return dict.fromkeys(names, 1 / len(names))
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise ValueError(f"weights: expected one for each of {', '.join(names)}")
        values = [float(weights[name]) for name in names]
    else:
        values = [float(w) for w in weights]
    if len(values) != len(names) or not all(0 < w < float("inf") for w in values):
        raise ValueError(f"weights: expected {len(names)} positive numbers, got {weights}")
    return {name: w / sum(values) for name, w in zip(names, values, strict=True)}


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
    name = type(encoder).__name__
    if _ENCODERS.get(name) is type(encoder):
        config: Any = encoder.config
        return {"type": name, **config}
    return {"type": name}


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
        return UpstreamEncoder(encoder) if upstream else encoder
    arguments = {key: value for key, value in config.items() if key != "type"}
    if config["type"] not in _ENCODERS:
        raise ValueError(
            f"encoders: expected the block's own encoder, a {config['type']}, which a file does "
            "not hold; got none"
        )
    return _ENCODERS[config["type"]](**arguments)


def _output_width(encoder: nn.Module, modality: Modality) -> int:
    """Find the width of an encoder's output by running it once on zeros."""
    sizes = {Tabular: (), Bag: (2,)}
    shape = sizes[type(modality)] if type(modality) in sizes else (32,) * (modality.item_ndim - 1)
    like = next(encoder.parameters(), torch.empty(0))
    zeros = torch.zeros(1, *shape, modality.channels, dtype=like.dtype, device=like.device)
    modes = {module: module.training for module in encoder.modules()}
    try:
        with torch.no_grad():
            out = encoder.eval()(zeros)
        return out.shape[-1]
    except Exception as error:
        raise ValueError(
            f"encoder_dim: the width of the encoder's output could not be found by running it on "
            f"zeros {tuple(zeros.shape)} ({type(error).__name__}: {error}); pass encoder_dim"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
