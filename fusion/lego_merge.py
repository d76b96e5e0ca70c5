"""LegoMerge: join trained LegoBlocks by merging their latents, without training (MM-Lego)."""

from collections.abc import Mapping, Sequence
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from .._checks import choice
from ..kernels import harmonic_merge
from ..kernels.checks import normalised_weights
from .attention import Keys
from .layers import Head
from .lego_block import LegoBlock
from .lego_heads import HeadMethod, merge_heads
from .lego_joined import JoinedBlocks
from .passes import PassOptions

Method = Literal["harmonic", "mean", "sum", "product", "upstream-harmonic"]


class LegoMerge(JoinedBlocks):
    r"""Join trained blocks with no training (MM-Lego, Eq. 4).

    .. math::
        \frac{1}{\sum_m w_m / |Z_m|} \exp\Big(i \sum_m w_m \arg Z_m\Big)

    over the last complex latents Z_m of the blocks whose modality a row has; their weights are
    renormalised to sum to 1. The head, merged of those of the same blocks with the same weights,
    computes logits from the real part. So a row is predicted as by a LegoMerge of the blocks whose
    modality it has; a row with one modality, as by that block. A row without any modality is
    predicted from the initial latents and the heads of all blocks. A `Head` that is given as `head`
    is that of all rows.

    Args:
        blocks: name to trained LegoBlock, one or more, copied.
        method: "harmonic" (the paper), "mean" (weighted), "sum", "product", or "upstream-harmonic"
            (two blocks; the authors' code).
        head: "slerp" (the paper), "linear", or "ot" (the rows of each further head are matched to
            those of the first by optimal transport, then averaged; needs POT); or a `Head`.
        weights: one positive number per block, a dict or in order, for harmonic and mean latents
            and for the head; None means equal.
        phase: how phases are averaged, "principal" or "circular"; see
            `motet.kernels.harmonic_merge`.

    Raises:
        ValueError: blocks that do not fit each other, or an argument outside its range.
        TypeError: something that is not a LegoBlock.

    Note:
        Merged heads of rows that miss modalities are computed from the blocks in every call. To
        train a merged model further, use LegoFuse, or give a `Head`.

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
        method: Method = "harmonic",
        head: HeadMethod | Head = "slerp",
        weights: Mapping[str, float] | Sequence[float] | None = None,
        phase: Literal["principal", "circular"] = "principal",
    ) -> None:
        choice("method", method, get_args(Method))
        choice("phase", phase, ("principal", "circular"))
        super().__init__(blocks, head, weights)
        if method == "upstream-harmonic" and len(self.blocks) != 2:
            raise ValueError(f"method: upstream-harmonic takes 2 blocks, got {len(self.blocks)}")
        self.method: Method = method
        self.phase: Literal["principal", "circular"] = phase
        self.config = self._make_config(
            head, method=method, weights=dict(self.weights), phase=phase
        )

    def fuse(self, rows: int, keys: Mapping[str, Sequence[Keys]], options: PassOptions) -> Tensor:
        blocks = self._blocks()
        latents = {
            name: blocks[name].encode(rows, block_keys, options).to_complex()
            for name, block_keys in keys.items()
        }
        if not rows or self.has_all(keys):
            return self._merge(list(latents), list(latents.values()))
        return self._merge_by_pattern(rows, latents, keys)

    def compute_logits(
        self, latents: Tensor, keys: Mapping[str, Sequence[Keys]], options: PassOptions
    ) -> Tensor:
        rows = len(latents)
        if not rows or self.has_all(keys):
            return super().compute_logits(latents, keys, options)
        parts = [
            (index, self._apply_head(self._merge_heads(names), latents[index], options))
            for names, index in self._find_patterns(rows, keys)
        ]
        return _gather_rows(rows, parts)

    def add(self, name: str, block: LegoBlock, *, weight: float | None = None) -> Self:
        """Return a model with one more modality, nothing retrained.

        The head is merged anew from the heads of all blocks.

        Args:
            name: the new modality.
            block: its trained block, copied.
            weight: its share in (0, 1); the others keep their ratios. None means 1 / (M + 1).

        Raises:
            ValueError: a name that the model already has, a block or weight that does not fit, or a
                model that was made with a `Head`, not with a way to merge heads.
        """
        if self.config["head"] == "given":
            raise ValueError("head: expected a merged head to add to, got a given one")
        weights = self._add_weight(name, weight)
        bigger = type(self)(
            self._add_block(name, block),
            method=self.method,
            head=self.config["head"],
            weights=weights,
            phase=self.phase,
        )
        return bigger.train(self.training)

    def has_all(self, keys: Mapping[str, Sequence[Keys]]) -> bool:
        """Return True if no row misses a modality; False if rows do, or if only values can tell."""
        complete = all(block_keys[0].context.nonempty is None for block_keys in keys.values())
        return complete and len(keys) == len(self.blocks)

    def _find_patterns(
        self, rows: int, keys: Mapping[str, Sequence[Keys]]
    ) -> list[tuple[list[str], Tensor]]:
        """Return each set of modalities that rows have (a pattern), and the indices of these rows.

        The weights and the number of tensors of a merge depend on the pattern. Rows of the same
        pattern are merged together, one call each: with M modalities at most 2^M calls, instead of
        one per row.
        """
        blocks = self._blocks()
        device = next(iter(blocks.values())).latents.device
        has = torch.zeros(rows, len(blocks), dtype=torch.bool, device=device)
        for i, name in enumerate(blocks):
            if name in keys:
                nonempty = keys[name][0].context.nonempty
                has[:, i] = True if nonempty is None else nonempty
        patterns, pattern_of_row = has.unique(dim=0, return_inverse=True)  # waits for the GPU
        return [
            (
                [name for name, is_present in zip(blocks, pattern, strict=True) if is_present],
                (pattern_of_row == i).nonzero().squeeze(1),
            )
            for i, pattern in enumerate(patterns.tolist())
        ]

    def _merge_by_pattern(
        self, rows: int, latents: dict[str, Tensor], keys: Mapping[str, Sequence[Keys]]
    ) -> Tensor:
        blocks = self._blocks()
        parts = []
        for names, index in self._find_patterns(rows, keys):
            values = [latents[name][index] for name in names]
            if not names:  # no modality at all: merge the initial latents of all blocks
                names = list(blocks)
                values = [blocks[name].untouched(len(index)).to_complex() for name in names]
            parts.append((index, self._merge(names, values)))
        return _gather_rows(rows, parts)

    def _merge_heads(self, names: Sequence[str]) -> Head | None:
        """Return the head of the rows that have the modalities `names`."""
        blocks = self._blocks()
        heads = [head for name in names if (head := blocks[name].head) is not None]
        if self.config["head"] == "given" or len(heads) in (0, len(blocks)):
            return self.head
        if len(heads) == 1:
            return heads[0]
        weights = normalised_weights([self.weights[name] for name in names], len(names))
        return merge_heads(heads, weights, self.config["head"])

    def _merge(self, names: list[str], latents: list[Tensor]) -> Tensor:
        if self.method in ("harmonic", "upstream-harmonic"):
            zero = torch.zeros_like
            latents = [z if z.is_complex() else torch.complex(z, zero(z)) for z in latents]
        if len(latents) == 1:
            return latents[0]
        weights = [self.weights[name] for name in names]
        match self.method:
            case "harmonic":
                return harmonic_merge(latents, weights, self.phase)
            case "mean":
                shares = normalised_weights(weights, len(latents))
                return torch.stack([w * z for w, z in zip(shares, latents, strict=True)]).sum(0)
            case "sum":
                return torch.stack(latents).sum(0)
            case "product":
                return torch.stack(latents).prod(0)
            case "upstream-harmonic":
                return _upstream_harmonic(latents[0], latents[1], weights[0])


def _gather_rows(rows: int, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return [B, ...]: the values of each part at its rows; the parts hold every row once."""
    # A single real block gives real latents, a harmonic merge complex ones: the result is complex
    # if any part is.
    dtype = parts[0][1].dtype
    for _, values in parts:
        dtype = torch.promote_types(dtype, values.dtype)
    out = parts[0][1].new_zeros(rows, *parts[0][1].shape[1:], dtype=dtype)
    for index, values in parts:
        out = out.index_copy(0, index, values.to(dtype))
    return out


def _upstream_harmonic(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Merge two latents as the authors' code does."""
    size_a, size_b = a.abs(), b.abs()
    size = 2 * alpha * (1 - alpha) * size_a * size_b / (alpha * size_b + (1 - alpha) * size_a)
    return torch.polar(size, (a.angle() + b.angle()) / 2)
