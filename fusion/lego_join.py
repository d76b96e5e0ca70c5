"""LegoMerge and LegoFuse: trained LegoBlocks joined without and with fine-tuning (MM-Lego)."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor, nn

from .._checks import choice, integer
from ..kernels import harmonic_merge, slerp
from ..kernels.backends import Backend
from ..kernels.checks import normalised_weights, same_kind
from ..kernels.plan import Strategy
from .attention import Keys
from .attention_forms import prepare
from .context import Batch, Context, read_all
from .layers import Head
from .lego_block import LegoBlock, LegoOutput
from .lego_passes import How, run_steps
from .modalities import Modality, check_names

Method = Literal["harmonic", "mean", "sum", "product", "upstream-harmonic"]
Mode = Literal["stack", "weave", "upstream-weave"]
HeadMethod = Literal["slerp", "linear", "ot"]


class _Joined(nn.Module):
    """Blocks by modality, copied so that nothing done here changes the originals."""

    def __init__(self, blocks: Mapping[str, LegoBlock], head: str | Head, weights: Any) -> None:
        super().__init__()
        if not isinstance(head, Head):
            choice("head", head, get_args(HeadMethod))
        first = _check_fit(blocks)
        self.weights = _positive_weights(weights, list(blocks))
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
        # A parameter of the authors' classes that their computation does not use; kept by
        # from_upstream so that to_upstream returns it.
        self.register_buffer("upstream_latents", None)
        self.config: dict[str, Any] = {}
        self.train(any(block.training for block in blocks.values()))

    @property
    def modalities(self) -> dict[str, Modality]:
        return {name: block.modality for name, block in self._blocks().items()}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], encoders: Mapping[str, nn.Module] | None = None
    ) -> Self:
        """Build an untrained model from `model.config`; copies are made of encoders passed in."""
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
        # A plain head of the right size: nothing is merged only to be overwritten.
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
        return_latents: bool = False,
        strategy: Strategy | None = None,
        backend: Backend = "auto",
    ) -> Tensor | LegoOutput:
        """Predict logits; arguments as in `HEALNet.forward`, the last two as in LegoBlock's.

        Returns:
            Logits [B, out_features] (real latents [B, C, D] without a head); a `LegoOutput` if
            latents were asked for.
        """
        like = next(iter(self._blocks().values())).latents
        batches = read_all(
            self.modalities, inputs, masks=masks, present=present, coords=coords, like=like
        )
        latents = self.join(batches, self.how(strategy, backend))
        # Contiguous, as a block alone has it: the head then rounds alike.
        real = latents.real.contiguous() if latents.is_complex() else latents
        logits = real if self.head is None else self.head(real)
        return LegoOutput(logits, latents) if return_latents else logits

    def how(self, strategy: Strategy | None = None, backend: Backend = "auto") -> How:
        """Return how the passes of all blocks are run; arguments as of `forward`."""
        hows = [block.how(strategy, backend) for block in self._blocks().values()]
        return How(strategy, backend, all(how.half for how in hows))

    def join(self, batches: Mapping[str, Batch], how: How) -> Tensor:
        """Return the joint latents [B, C, D] of the modalities that there are."""
        rows = next(iter(batches.values())).rows
        return self.fuse(rows, self.prepare(batches, how), how)

    def prepare(self, batches: Mapping[str, Batch], how: How) -> dict[str, list[Keys]]:
        """Encode and read every modality once; return what its block attends to."""
        blocks = self._blocks()
        return {name: blocks[name].prepare(batch, how) for name, batch in batches.items()}

    def fuse(self, rows: int, keys: Mapping[str, Sequence[Keys]], how: How) -> Tensor:
        """Return the joint latents [B, C, D] of B rows; `keys` are what `prepare` returned."""
        raise NotImplementedError

    def _config(self, head: str | Head, **fields: Any) -> dict[str, Any]:
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

    def _with_block(self, name: str, block: LegoBlock) -> dict[str, LegoBlock]:
        if name in self._blocks():
            raise ValueError(f"name: expected a new modality, got {name!r}, which the model has")
        blocks = {**self._blocks(), name: block}
        _check_fit(blocks)
        return blocks

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
        self.config = self._config(head, method=method, weights=dict(self.weights), phase=phase)

    def fuse(self, rows: int, keys: Mapping[str, Sequence[Keys]], how: How) -> Tensor:
        blocks = self._blocks()
        latents = {name: blocks[name].encode(rows, own, how).joined() for name, own in keys.items()}
        updated = {name: own[0].context.nonempty for name, own in keys.items()}
        if not rows or self.has_all(keys):
            return self._merge(list(latents), list(latents.values()))
        return self._merge_by_pattern(rows, latents, updated)

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
        bigger = type(self)(
            self._with_block(name, block),
            method=self.method,
            head=self.config["head"],
            weights=weights,
            phase=self.phase,
        )
        return bigger.train(self.training)

    def has_all(self, keys: Mapping[str, Sequence[Keys]]) -> bool:
        """Return whether it is known that no row misses a modality."""
        known = all(own[0].context.nonempty is None for own in keys.values())
        return known and len(keys) == len(self.blocks)

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
                parts = [blocks[name].untouched(len(chosen)).joined() for name in names]
            part = self._merge(names, parts)
            if merged is None:
                merged = part.new_zeros(rows, *part.shape[1:])
            merged = merged.to(torch.promote_types(merged.dtype, part.dtype))
            merged = merged.index_copy(0, chosen, part.to(merged.dtype))
        assert merged is not None
        return merged

    def _merge(self, names: list[str], latents: list[Tensor]) -> Tensor:
        if self.method in ("harmonic", "upstream-harmonic"):
            zero = torch.zeros_like
            latents = [z if z.is_complex() else torch.complex(z, zero(z)) for z in latents]
        if len(latents) == 1:
            return latents[0]
        weights = [self.weights[name] for name in names]
        if self.method == "sum":
            return torch.stack(latents).sum(0)
        if self.method == "product":
            return torch.stack(latents).prod(0)
        if self.method == "mean":
            shares = normalised_weights(weights, len(latents))
            return torch.stack([w * z for w, z in zip(shares, latents, strict=True)]).sum(0)
        if self.method == "harmonic":
            return harmonic_merge(latents, weights, self.phase)
        alpha = weights[0]
        a, b = (z.abs() for z in latents)
        size = 2 * alpha * (1 - alpha) * a * b / (alpha * b + (1 - alpha) * a)
        angle = (latents[0].angle() + latents[1].angle()) / 2
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
        self.config = self._config(head, mode=mode, weights=dict(self.weights), depth=depth)

    def join(self, batches: Mapping[str, Batch], how: How) -> Tensor:
        if self.mode == "upstream-weave":
            return self._upstream_weave(batches, how)
        return super().join(batches, how)

    def fuse(self, rows: int, keys: Mapping[str, Sequence[Keys]], how: How) -> Tensor:
        return (self._stack if self.mode == "stack" else self._weave)(rows, keys, how)

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
        blocks, weights = self._with_block(name, block), self._weights_with(name, weight)
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

    def _stack(self, rows: int, keys: Mapping[str, Sequence[Keys]], how: How) -> Tensor:
        blocks = self._blocks()
        latents: Tensor | None = None
        started: Tensor | None = None  # bool [B]; None for every row, once there are latents
        for name, own in keys.items():
            start = latents
            if latents is not None and started is not None:
                start = torch.where(started[:, None, None], latents, blocks[name].latents)
            real = blocks[name].encode(rows, own, how, start).real
            updated = own[0].context.nonempty
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

    def _weave(self, rows: int, keys: Mapping[str, Sequence[Keys]], how: How) -> Tensor:
        assert self.latents is not None
        blocks = {name: self._blocks()[name] for name in keys}
        passes = {
            name: [
                step._replace(rows=step.keys.context.nonempty) for step in block.steps(keys[name])
            ]
            for name, block in blocks.items()
        }
        steps = [
            own[index]
            for index in range(self.rounds)
            for own in passes.values()
            if index < len(own)
        ]
        transform = next(iter(blocks.values())).transform
        start = self.latents.expand(rows if how.strategy == "reference" else 1, -1, -1)
        return run_steps(start, steps, transform, how).real.expand(rows, -1, -1)

    def _upstream_weave(self, batches: Mapping[str, Batch], how: How) -> Tensor:
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
                    context, [layer.attention], latents=latents.shape[1], strategy=how.strategy,
                    backend=how.backend,
                )  # fmt: skip
                latents = layer(latents, keys)
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
    choice("method", method, get_args(HeadMethod))
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
        raise ImportError("head='ot' needs POT: pip install POT") from error
    a, b = (t.reshape(len(t), -1).double().cpu().numpy() for t in (target, other))
    mass = np.ones(len(a))
    moved = ot.emd(mass, mass, ot.dist(a, b, metric="euclidean")) @ b
    return torch.from_numpy(moved).to(target).reshape(target.shape)


def _check_fit(blocks: Any) -> LegoBlock:
    """Raise unless the blocks fit together; return the first."""
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


def _positive_weights(weights: Any, names: list[str]) -> dict[str, float]:
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
