"""HEALNet: a shared latent array, updated layer after layer by attention to each modality."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self, cast

from torch import Tensor, nn

from .._checks import choice, integer, positive, rate
from ..kernels.backends import Backend
from ..kernels.plan import Strategy
from .attention import Attention, Keys, LatentKeys
from .attention_forms import prepare
from .context import Context, ModalityInput, read_all
from .layers import (
    FeedForward,
    Head,
    ShareWeights,
    initial_latents,
    layer_order,
)
from .modalities import (
    Modality,
    Positions,
    check_modalities,
    modality_from_config,
    modality_to_config,
)
from .passes import AttentionRecorder, Pass, PassOptions, run_passes


class HEALNetOutput(NamedTuple):
    """What HEALNet returns if latents or attention are requested."""

    logits: Tensor
    """[B, out_features]."""
    latents: Tensor | None
    """[B, C, D], the last latents; None if not requested."""
    attention: dict[str, list[Tensor]] | None
    """Attention weights [B, H, C, N] by modality and layer, zero at tokens that are not real.

    They are jagged [B, j, H, C] for a jagged input. Modalities without a tensor are left out. None
    if not requested.
    """


class FusionLayer(nn.Module):
    """The weights of one fusion layer."""

    def __init__(
        self,
        token_dims: Mapping[str, int],
        latent_dim: int,
        *,
        heads: int,
        self_heads: int,
        head_dim: int,
        self_head_dim: int,
        attn_dropout: float,
        ff_dropout: float,
        snn: bool,
        temperature: float,
        self_attention: int,
        one_feed_forward: bool,
    ) -> None:
        super().__init__()

        def feed_forward() -> FeedForward:
            return FeedForward(latent_dim, dropout=ff_dropout, snn=snn)

        self.attention = nn.ModuleDict(
            {
                name: Attention(
                    latent_dim,
                    dim,
                    heads=heads,
                    head_dim=head_dim,
                    dropout=attn_dropout,
                    temperature=temperature,
                )
                for name, dim in token_dims.items()
            }
        )
        shared = feed_forward() if one_feed_forward else None
        self.feed_forward = nn.ModuleDict({name: shared or feed_forward() for name in token_dims})
        self.self_attention = nn.ModuleList(
            Attention(
                latent_dim,
                None,
                heads=self_heads,
                head_dim=self_head_dim,
                dropout=attn_dropout,
                temperature=temperature,
            )
            for _ in range(self_attention)
        )
        self.self_feed_forward = nn.ModuleList(feed_forward() for _ in range(self_attention))

    def attention_to(self, name: str) -> Attention:
        return cast(Attention, self.attention[name])

    def make_pass(self, name: str, keys: Keys) -> Pass:
        """Return the pass that updates the latents from a modality."""
        return Pass(self.attention_to(name), cast(FeedForward, self.feed_forward[name]), keys)

    def make_self_attention_passes(self, latent_keys: LatentKeys) -> list[Pass]:
        """Return the passes of latent self-attention."""
        pairs = zip(self.self_attention, self.self_feed_forward, strict=True)
        return [
            Pass(cast(Attention, attend), cast(FeedForward, feed), latent_keys)
            for attend, feed in pairs
        ]


class HEALNet(nn.Module):
    r"""Fuse any number of modalities in one latent array S (HEALNet, Eq. 1-4, Algorithms 1 and 2).

    .. math::
        S_{l+1} = \psi(S_l, \, A_m(S_l, X_m)), \quad
        A_m(S, X) = \mathrm{softmax}\Big(\frac{Q_m(S) K_m(X)^\top}{\sqrt{E}}\Big) V_m(X)

    for each modality m in turn, in every layer; then a head on the mean latent. ψ adds the
    attention to S and passes the sum through a gated self-normalising feed-forward.

    A row misses a modality if its key is absent or None, if `present` is False for the row, or if
    its bag is empty; the three are the same. The update from that modality is then skipped for that
    row. Latent self-attention still runs. A row without any modality is predicted from S_0.

    Args:
        modalities: name to `Tabular`, `Bag` or `Grid`; updates follow the dict's order.
        out_features: width of the logits; None for a model without a head, which returns latents.
        depth: number of fusion layers L.
        num_latents: number of latents C.
        latent_dim: their width D.
        heads: heads per attention H.
        head_dim: width of each head E.
        attn_dropout: probability of dropping an attention weight in training.
        ff_dropout: probability of dropping a feed-forward output in training.
        share_weights: True, one set of weights for all layers (the paper); False, one per layer;
            "all-but-first", layer 1 has its own and the others share one set, in which all
            modalities share one feed-forward.
        self_attention: number of latent self-attention blocks after each modality.
        self_heads: heads of the self-attention; None means `heads`.
        self_head_dim: width of its heads; None means `head_dim`.
        snn: gate the feed-forward with SELU instead of GELU.
        temperature: divides the attention scores, on top of sqrt(E).
        latent_init: "uniform", U(0, 1) (the paper), or "normal", N(0, 1).
        num_freq_bands: Fourier bands per axis of the positions of grids and coordinates.
        max_freq: highest frequency of the positions.
        fourier_encode: encode the positions of `Grid` modalities.

    Raises:
        ValueError: an argument outside its range.
        TypeError: something that is not a modality.

    Note:
        `torch.compile(fullgraph=True)` needs dense inputs without masks. Ragged, masked and partly
        missing inputs have shapes that depend on data, which break its graph.

    Note:
        The authors' code divides the scores by a further temperature of 0.5, draws S_0 from N(0, 1)
        and does not share layer 1. `motet.from_upstream` sets all three.

    Example:
        >>> model = motet.HEALNet({"omic": motet.Tabular(20), "wsi": motet.Bag(32)}, out_features=4)
        >>> model({"omic": torch.randn(2, 20), "wsi": torch.randn(2, 50, 32)}).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        *,
        out_features: int | None,
        depth: int = 2,
        num_latents: int = 25,
        latent_dim: int = 119,
        heads: int = 8,
        head_dim: int = 16,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        share_weights: ShareWeights = True,
        self_attention: int = 0,
        self_heads: int | None = None,
        self_head_dim: int | None = None,
        snn: bool = True,
        temperature: float = 1.0,
        latent_init: Literal["uniform", "normal"] = "uniform",
        num_freq_bands: int = 2,
        max_freq: float = 10.0,
        fourier_encode: bool = True,
    ) -> None:
        super().__init__()
        check_modalities(modalities)
        heads, head_dim = integer("heads", heads), integer("head_dim", head_dim)
        choice("snn", snn, (True, False))
        self.modalities = dict(modalities)
        self.positions = Positions(num_freq_bands, max_freq, fourier_encode)
        self.config: dict[str, Any] = {
            "modalities": {name: modality_to_config(m) for name, m in modalities.items()},
            "out_features": None if out_features is None else integer("out_features", out_features),
            "depth": integer("depth", depth),
            "num_latents": integer("num_latents", num_latents),
            "latent_dim": integer("latent_dim", latent_dim),
            "heads": heads,
            "head_dim": head_dim,
            "attn_dropout": rate("attn_dropout", attn_dropout),
            "ff_dropout": rate("ff_dropout", ff_dropout),
            "share_weights": share_weights,
            "self_attention": integer("self_attention", self_attention, 0),
            "self_heads": heads if self_heads is None else integer("self_heads", self_heads),
            "self_head_dim": (
                head_dim if self_head_dim is None else integer("self_head_dim", self_head_dim)
            ),
            "snn": snn,
            "temperature": positive("temperature", temperature),
            "latent_init": latent_init,
            "num_freq_bands": self.positions.num_freq_bands,
            "max_freq": self.positions.max_freq,
            "fourier_encode": fourier_encode,
        }
        self._build(self.config)

    def _build(self, config: dict[str, Any]) -> None:
        """Draw the weights. Their order is fixed: in another order, a seed gives another model."""
        width, share_weights = config["latent_dim"], config["share_weights"]
        self.latents = initial_latents(config["num_latents"], width, config["latent_init"])
        self.order = layer_order(config["depth"], share_weights)
        token_dims = {name: m.token_dim(self.positions) for name, m in self.modalities.items()}
        self.layers = nn.ModuleList(
            FusionLayer(
                token_dims,
                width,
                heads=config["heads"],
                self_heads=config["self_heads"],
                head_dim=config["head_dim"],
                self_head_dim=config["self_head_dim"],
                attn_dropout=config["attn_dropout"],
                ff_dropout=config["ff_dropout"],
                snn=config["snn"],
                temperature=config["temperature"],
                self_attention=config["self_attention"],
                one_feed_forward=share_weights == "all-but-first" and i > 0,
            )
            for i in range(max(self.order) + 1)
        )
        out_features = config["out_features"]
        self.head = None if out_features is None else Head(width, out_features)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an untrained model from `model.config`."""
        modalities = {n: modality_from_config(m) for n, m in config["modalities"].items()}
        return cls(**{**config, "modalities": modalities})

    def forward(
        self,
        inputs: Any,
        *,
        masks: Any = None,
        present: Any = None,
        coords: Any = None,
        statistics: Any = None,
        return_latents: bool = False,
        return_attention: bool = False,
        strategy: Strategy | None = None,
        backend: Backend = "auto",
    ) -> Tensor | HEALNetOutput:
        """Predict logits.

        Args:
            inputs: modality name to tensor or None (shapes at `Tabular`, `Bag` and `Grid`), or a
                sequence in the order of the modalities. The caller's tensors are not changed.
            masks: name to bool mask, True for real tokens, [B, N] or in the shape of a grid; or a
                sequence. Without one, all tokens of a dense tensor are real.
            present: name to bool [B], False where the row misses the modality; or a sequence.
            coords: name to coordinates, for a `Bag` that has them; or a sequence.
            statistics: name to the result of `motet.token_statistics` on a `Bag`'s tensor, if it
                was computed before; or a sequence.
            return_latents: return the last latents too.
            return_attention: return the attention weights too, before dropout; without a
                gradient, unless `strategy="reference"`.
            strategy: "cached", "absorbed", or "reference" for the literal equation; None for the
                one that `motet.kernels.plan` chooses. The results differ by rounding only.
            backend: "auto", "triton", "compile" or "eager".

        Returns:
            Logits [B, out_features] (latents [B, C, D] for a model without a head); a
            `HEALNetOutput` if latents or attention are requested.

        Raises:
            ValueError: an unknown modality, no tensor at all, or shapes, dtypes or devices that do
                not fit the model.
            TypeError: something that is not a tensor.
        """
        batches = read_all(
            self.modalities, inputs,
            masks=masks, present=present, coords=coords, statistics=statistics, like=self.latents,
        )  # fmt: skip
        keys = self.prepare(batches, strategy=strategy, backend=backend)
        recorder = AttentionRecorder(batches, keys) if return_attention else None
        rows = next(iter(batches.values())).rows
        options = PassOptions(strategy, backend, watch=recorder)
        latents = self.fuse(rows, keys, options)
        logits = latents if self.head is None else self.head(latents, backend=options.head_backend)
        if not (return_latents or return_attention):
            return logits
        attention = None if recorder is None else recorder.attention
        return HEALNetOutput(logits, latents if return_latents else None, attention)

    def prepare(
        self,
        batches: Mapping[str, ModalityInput],
        *,
        strategy: Strategy | None = None,
        backend: Backend = "auto",
    ) -> dict[str, list[Keys]]:
        """Read every context once; return the keys of each set of weights, by modality."""
        return self.attend_to(self.make_contexts(batches), strategy=strategy, backend=backend)

    def make_contexts(self, batches: Mapping[str, ModalityInput]) -> dict[str, Context]:
        """Return the tokens of every modality; no weights are used."""
        return {
            name: batch.make_context(self.modalities[name], self.positions)
            for name, batch in batches.items()
        }

    def attend_to(
        self,
        contexts: Mapping[str, Context],
        *,
        strategy: Strategy | None = None,
        backend: Backend = "auto",
    ) -> dict[str, list[Keys]]:
        """Return the keys of each set of weights; `contexts` are those of `make_contexts`."""
        return {
            name: prepare(
                context,
                [cast(FusionLayer, layer).attention_to(name) for layer in self.layers],
                latents=len(self.latents),
                layers=[self.order.count(index) for index in range(len(self.layers))],
                strategy=strategy,
                backend=backend,
            )
            for name, context in contexts.items()
        }

    def fuse(
        self,
        rows: int,
        keys: Mapping[str, Sequence[Keys]],
        options: PassOptions | None = None,
    ) -> Tensor:
        """Update the latents of `rows` rows, layer after layer; return the last, [B, C, D].

        `keys` are those that `prepare` returned for the same `options`; None for the planned ones.
        """
        options = PassOptions() if options is None else options
        start, passes = self.latents[None], []
        latent_keys = LatentKeys(start, options.backend)
        for index in self.order:
            layer = cast(FusionLayer, self.layers[index])
            for name in self.modalities:
                # A modality that no row has gets no pass, but self-attention follows all the same.
                cross = [layer.make_pass(name, keys[name][index])] if name in keys else []
                to_latents = layer.make_self_attention_passes(latent_keys)
                passes += cross + to_latents
        if options.strategy == "reference":
            start = start.expand(rows, -1, -1)
        return run_passes(start, passes, None, options).real
