"""The base class of LegoMerge and LegoFuse: blocks by modality, and one head."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self, get_args

from torch import Tensor, nn

from .._checks import choice
from ..kernels.backends import Backend
from ..kernels.checks import normalised_weights, same_kind
from ..kernels.plan import Strategy
from .attention import Keys
from .context import ModalityInput, read_all
from .layers import Head
from .lego_block import LegoBlock, LegoOutput
from .lego_heads import HeadMethod, merge_heads
from .modalities import Modality, check_names
from .passes import AttentionRecorder, PassOptions


class JoinedBlocks(nn.Module):
    """Blocks by modality. They are copied, so the originals do not change."""

    def __init__(self, blocks: Mapping[str, LegoBlock], head: str | Head, weights: Any) -> None:
        super().__init__()
        if not isinstance(head, Head):
            choice("head", head, get_args(HeadMethod))
        first = _check_fit(blocks)
        self.weights = _check_weights(weights, list(blocks))
        self.blocks = nn.ModuleDict({name: copy.deepcopy(b) for name, b in blocks.items()})
        self.head: Head | None
        if isinstance(head, Head):
            same_kind("head", head.linear.weight, first.latents, "the blocks")
            if head.linear.in_features != first.config["latent_dim"]:
                raise ValueError(
                    f"head: expected a Head of width {first.config['latent_dim']}, the blocks' "
                    f"latent_dim, got {head.linear.in_features}"
                )
            self.head = copy.deepcopy(head)
        elif first.head is None:
            self.head = None
        else:
            heads = [b.head for b in blocks.values() if b.head is not None]
            self.head = merge_heads(heads, list(self.weights.values()), head)
        # The authors' classes have a parameter that their computation does not use. `from_upstream`
        # keeps it here, so that `to_upstream` can return it.
        self.register_buffer("upstream_latents", None)
        self.config: dict[str, Any] = {}
        self.train(any(block.training for block in blocks.values()))

    @property
    def modalities(self) -> dict[str, Modality]:
        return {name: block.modality for name, block in self._blocks().items()}

    @property
    def attends_to_input(self) -> bool:
        """Whether the tokens that all blocks attend to are those of the input."""
        return all(block.attends_to_input for block in self._blocks().values())

    @classmethod
    def from_config(
        cls, config: dict[str, Any], encoders: Mapping[str, nn.Module] | None = None
    ) -> Self:
        """Build an untrained model from `model.config`, with copies of `encoders`."""
        if encoders is not None and not isinstance(encoders, Mapping):
            raise TypeError(
                "encoders: expected a dict of modality name to module, got "
                f"{type(encoders).__name__}"
            )
        encoders = dict(encoders or {})
        unknown = [name for name in encoders if name not in config["blocks"]]
        if unknown:
            raise ValueError(f"encoders: unknown modality {unknown[0]!r}")
        blocks = {
            name: LegoBlock.from_config(block, encoders.get(name))
            for name, block in config["blocks"].items()
        }
        options = {key: value for key, value in config.items() if key not in ("blocks", "size")}
        # A new head of the right size: merging heads would be work for nothing, since the caller
        # overwrites all weights.
        head = options["head"] if config["size"] is None else Head(*config["size"])
        model = cls(blocks, **{**options, "head": head})
        model.config = config
        return model

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
    ) -> Tensor | LegoOutput:
        """Predict logits; arguments as of `HEALNet.forward`, the last four as of LegoBlock's.

        Returns:
            Logits [B, out_features] (real latents [B, C, D] without a head); a `LegoOutput` if
            latents or attention are requested.

        Raises:
            ValueError: as `HEALNet.forward` and `LegoBlock.forward`.
            TypeError: something that is not a tensor.
        """
        like = next(iter(self._blocks().values())).latents
        batches = read_all(
            self.modalities,
            inputs,
            masks=masks,
            present=present,
            coords=coords,
            statistics=statistics,
            like=like,
        )
        options = self.pass_options(strategy, backend, return_attention)
        output = self.join(batches, options, return_attention)
        if not (return_latents or return_attention):
            return output.logits
        return output if return_latents else output._replace(latents=None)

    def pass_options(
        self,
        strategy: Strategy | None = None,
        backend: Backend = "auto",
        return_attention: bool = False,
    ) -> PassOptions:
        """Return the options of the passes of all blocks; arguments as of `forward`."""
        options = [
            block.pass_options(strategy, backend, return_attention)
            for block in self._blocks().values()
        ]
        return PassOptions(strategy, backend, all(of_block.half for of_block in options))

    def join(
        self, batches: Mapping[str, ModalityInput], options: PassOptions, record: bool
    ) -> LegoOutput:
        """Return logits and joint latents [B, C, D] of `batches`; attention too, if `record`."""
        rows = next(iter(batches.values())).rows
        keys = self.prepare(batches, options)
        recorder = AttentionRecorder(batches, keys) if record else None
        options = options._replace(watch=recorder)
        latents = self.fuse(rows, keys, options)
        logits = self.compute_logits(latents, keys, options)
        return LegoOutput(logits, latents, None if recorder is None else recorder.attention)

    def prepare(
        self, batches: Mapping[str, ModalityInput], options: PassOptions
    ) -> dict[str, list[Keys]]:
        """Encode and read every modality once; return the keys of its block."""
        blocks = self._blocks()
        return {name: blocks[name].prepare(batch, options) for name, batch in batches.items()}

    def fuse(self, rows: int, keys: Mapping[str, Sequence[Keys]], options: PassOptions) -> Tensor:
        """Return the joint latents [B, C, D] of `rows` rows; `keys` are those of `prepare`."""
        raise NotImplementedError

    def compute_logits(
        self, latents: Tensor, keys: Mapping[str, Sequence[Keys]], options: PassOptions
    ) -> Tensor:
        """Return the logits of the latents that `fuse` made of `keys`."""
        return self._apply_head(self.head, latents, options)

    def _apply_head(self, head: Head | None, latents: Tensor, options: PassOptions) -> Tensor:
        # Contiguous, as in a single block: the head then gives the same bits.
        real = latents.real.contiguous() if latents.is_complex() else latents
        return real if head is None else head(real, backend=options.head_backend)

    def _make_config(self, head: str | Head, **fields: Any) -> dict[str, Any]:
        size = None
        if self.head is not None:
            size = [self.head.linear.in_features, self.head.linear.out_features]
        return {
            "blocks": {name: block.config for name, block in self._blocks().items()},
            "head": "given" if isinstance(head, Head) else head,
            "size": size,
            **fields,
        }

    def _blocks(self) -> dict[str, LegoBlock]:
        return {name: block for name, block in self.blocks.items() if isinstance(block, LegoBlock)}

    def _add_block(self, name: str, block: LegoBlock) -> dict[str, LegoBlock]:
        if name in self._blocks():
            raise ValueError(
                f"name: expected a new modality, got {name!r}, which the model already has"
            )
        blocks = {**self._blocks(), name: block}
        _check_fit(blocks)
        return blocks

    def _add_weight(self, name: str, weight: float | None) -> dict[str, float]:
        count = len(self.weights)
        share = 1 / (count + 1) if weight is None else weight
        if not 0 < share < 1:
            raise ValueError(f"weight: expected a share in (0, 1), got {weight}")
        return {**{n: w * (1 - share) for n, w in self.weights.items()}, name: share}


def _check_fit(blocks: Any) -> LegoBlock:
    """Raise unless the blocks fit together; return the first block."""
    if isinstance(blocks, LegoBlock) or not isinstance(blocks, Mapping) or not blocks:
        raise ValueError(
            f"blocks: expected a dict of modality name to LegoBlock, not empty, got {blocks!r}"
        )
    check_names("blocks", blocks)
    first_name, first = next(iter(blocks.items()))
    for name, block in blocks.items():
        if not isinstance(block, LegoBlock):
            raise TypeError(f"blocks[{name!r}]: expected a LegoBlock, got {type(block).__name__}")
        for field in ("num_latents", "latent_dim", "fft", "out_features"):
            if block.config[field] != first.config[field]:
                raise ValueError(
                    f"blocks[{name!r}]: expected {field} {first.config[field]!r} as "
                    f"blocks[{first_name!r}], got {block.config[field]!r}"
                )
        same_kind(f"blocks[{name!r}]", block.latents, first.latents, f"blocks[{first_name!r}]")
    return first


def _check_weights(weights: Any, names: list[str]) -> dict[str, float]:
    if weights is None:
        return dict.fromkeys(names, 1 / len(names))
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise ValueError(
                f"weights: expected one for each of {', '.join(names)}, got {', '.join(weights)}"
            )
        values = [float(weights[name]) for name in names]
    elif isinstance(weights, Sequence):
        values = [float(w) for w in weights]
    else:
        raise TypeError(
            f"weights: expected one number per block, a dict or in order, got {weights!r}"
        )
    if len(values) != len(names) or not all(0 < w < float("inf") for w in values):
        raise ValueError(f"weights: expected {len(names)} positive numbers, got {weights}")
    return dict(zip(names, normalised_weights(values, len(names)), strict=True))
