"""LegoFuse: trained LegoBlocks joined in one network, to be fine-tuned (MM-Lego)."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from .._checks import choice, integer
from .attention import Keys
from .attention_forms import prepare
from .context import Context, ModalityInput
from .layers import Head
from .lego_block import LegoBlock, LegoOutput
from .lego_heads import HeadMethod, merge_heads
from .lego_joined import JoinedBlocks
from .passes import PassOptions, run_passes

Mode = Literal["stack", "weave", "upstream-weave"]


class LegoFuse(JoinedBlocks):
    r"""Join trained blocks in one network, for a few epochs of fine-tuning (MM-Lego, section 3.4).

    "stack": the blocks run one after the other. The first block whose modality a row has starts
    from its latents; each further one starts from the real part of the block before it,
    L_{m+1} = Re Z_m.
    "weave": one latent array runs through the first layer of every block, then through the second
    layers, and so on; each pass is the transform, update and inverse transform of its block. The
    array starts from a parameter of the model, a copy of the first block's latents, and the head
    reads its transform.

    If a row misses a modality, its block is skipped for that row. A row without any modality is
    predicted from the first block's latents (stack) or from the model's (weave).

    Args:
        blocks: name to trained LegoBlock, one or more, copied.
        mode: "stack", "weave", or "upstream-weave" (the authors' code).
        head: how the heads are merged before fine-tuning, as in LegoMerge; or a `Head`.
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
        mode: Mode = "stack",
        head: HeadMethod | Head = "slerp",
        weights: Mapping[str, float] | Sequence[float] | None = None,
        depth: int | None = None,
    ) -> None:
        choice("mode", mode, get_args(Mode))
        super().__init__(blocks, head, weights)
        deepest = max(block.config["depth"] for block in blocks.values())
        rounds = deepest if depth is None else integer("depth", depth)
        if mode == "weave" and rounds > deepest:
            raise ValueError(f"depth: expected 1 to {deepest} rounds, got {depth}")
        if mode == "stack" and depth is not None:
            raise ValueError(f"depth: expected None for a stack, which has no rounds, got {depth}")
        self.mode: Mode = mode
        self.rounds = rounds
        self.latents: nn.Parameter | None = None
        if mode != "stack":
            first = next(iter(self._blocks().values()))
            self.latents = nn.Parameter(first.latents.detach().clone())
        self.config = self._make_config(head, mode=mode, weights=dict(self.weights), depth=depth)

    def join(
        self, batches: Mapping[str, ModalityInput], options: PassOptions, record: bool
    ) -> LegoOutput:
        if self.mode != "upstream-weave":
            return super().join(batches, options, record)
        if record:
            raise ValueError("return_attention: expected mode stack or weave, got upstream-weave")
        latents = self._upstream_weave(batches, options)
        return LegoOutput(self.compute_logits(latents, {}, options), latents)

    def fuse(self, rows: int, keys: Mapping[str, Sequence[Keys]], options: PassOptions) -> Tensor:
        return (self._stack if self.mode == "stack" else self._weave)(rows, keys, options)

    def add(self, name: str, block: LegoBlock, *, weight: float | None = None) -> Self:
        """Return a model with one more modality; all fine-tuned weights are kept.

        Args:
            name: the new modality, run last.
            block: its trained block, copied.
            weight: the new head is interpolated between the model's and the block's; the share of
                the block's head, in (0, 1). None means 1 / (M + 1).

        Raises:
            ValueError: a name that the model already has, or a block or weight that does not fit.
        """
        blocks, weights = self._add_block(name, block), self._add_weight(name, weight)
        head: HeadMethod | Head = self.config["head"]
        if self.head is not None and block.head is not None:
            method = "slerp" if head == "given" else str(head)
            share = weights[name]
            head = merge_heads([self.head, block.head], [1 - share, share], method)
        bigger = type(self)(
            blocks,
            mode=self.mode,
            head=head,
            weights=weights,
            depth=self.config["depth"],
        )
        if self.latents is not None and bigger.latents is not None:
            bigger.latents.data.copy_(self.latents)
        return bigger.train(self.training)

    def _stack(self, rows: int, keys: Mapping[str, Sequence[Keys]], options: PassOptions) -> Tensor:
        blocks = self._blocks()
        latents: Tensor | None = None
        # Bool [B]: the rows that a block has updated so far; None for all rows, once `latents` is
        # a tensor. The other rows still have to start from the latents of the next block.
        started: Tensor | None = None
        for name, block_keys in keys.items():
            start = latents
            if latents is not None and started is not None:
                start = torch.where(started[:, None, None], latents, blocks[name].latents)
            real = blocks[name].encode(rows, block_keys, options, start).real
            updated = block_keys[0].context.nonempty
            if updated is None:
                latents, started = real, None
                continue
            if latents is None:
                latents = next(iter(blocks.values())).untouched(rows).real
                started = torch.zeros_like(updated)
            latents = torch.where(updated[:, None, None], real, latents)
            started = None if started is None else started | updated
        assert latents is not None
        return latents

    def _weave(self, rows: int, keys: Mapping[str, Sequence[Keys]], options: PassOptions) -> Tensor:
        assert self.latents is not None
        blocks = {name: self._blocks()[name] for name in keys}
        # A row that misses the modality of a pass must not be divided by its norm there either.
        passes_of_block = [
            [p._replace(rows=p.keys.context.nonempty) for p in block.make_passes(keys[name])]
            for name, block in blocks.items()
        ]
        passes = [
            block_passes[index]
            for index in range(self.rounds)
            for block_passes in passes_of_block
            if index < len(block_passes)
        ]
        transform = next(iter(blocks.values())).transform
        start = self.latents.expand(rows if options.strategy == "reference" else 1, -1, -1)
        return run_passes(start, passes, transform, options).real.expand(rows, -1, -1)

    def _upstream_weave(self, batches: Mapping[str, ModalityInput], options: PassOptions) -> Tensor:
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
                layer = blocks[name].sets[0]
                context = Context(tokens[name], single=tokens[name].shape[1] == 1)
                (keys,) = prepare(
                    context, [layer.attention], latents=latents.shape[1], strategy=options.strategy,
                    backend=options.backend,
                )  # fmt: skip
                latents = layer(latents, keys)
        return latents
