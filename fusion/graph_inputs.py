"""The inputs of a CUDA graph: static tensors, whose sizes many batches share.

A graph reads and writes fixed addresses and has fixed shapes. So each batch is copied into static
tensors, which keep their addresses, and sizes that differ from batch to batch are rounded up:
all bags are packed with offsets, equally long ones too, and the number of tokens T is rounded up to
a bucket. The offsets say where the last bag ends. The rows behind it are padding: they hold numbers
of earlier batches. These are finite, and every product that reads them multiplies them by zero, so
they change neither results nor gradients.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention import Keys
from .context import Context, ModalityInput, check_tensor, read_all
from .encoders import ABMIL, SNN
from .healnet import HEALNet
from .lego_block import LegoBlock
from .lego_fuse import LegoFuse
from .lego_merge import LegoMerge
from .modalities import Bag, Modality
from .patients import PatientBatch, Ragged

Model = HEALNet | LegoBlock | LegoMerge | LegoFuse
# Shapes and dtypes of static tensors by name.
StaticSizes = Mapping[Any, tuple[tuple[int, ...], torch.dtype]]
# The smallest distance between two buckets: kernels read 128 rows at a time, so that padding up to
# a multiple of 128 costs nothing.
MIN_BUCKET_STEP = 128


def bucket(tokens: int) -> int:
    """Return the bucket size for a number of tokens: at most 6.25 % (1 / 16) or 127 tokens more.

    Between 2^k and 2^(k+1) buckets lie 2^k / 16 apart, so that few graphs serve all sizes and none
    computes much for nothing.
    """
    if not tokens:
        return MIN_BUCKET_STEP
    step = max(MIN_BUCKET_STEP, 1 << max(tokens.bit_length() - 5, 0))
    return -(-tokens // step) * step


class GraphInput(NamedTuple):
    """What a graph reads of one modality."""

    kind: type[Context] | type[ModalityInput]
    """A Context; or a ModalityInput, if the encoder is part of the graph."""
    tensors: dict[str, Tensor]
    """By field: the tensors of this batch, in their true sizes."""
    shapes: dict[str, tuple[int, ...]]
    """By field: the shapes of the static tensors that these are copied into."""
    constants: dict[str, Any]
    """By field: the values that are not tensors."""

    @property
    def key(self) -> tuple[Any, ...]:
        """Batches share a graph if their keys are equal."""
        dtypes = tuple(tensor.dtype for tensor in self.tensors.values())
        return self.kind, tuple(self.shapes.items()), dtypes, tuple(self.constants.items())

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Context | ModalityInput:
        """Return the Context or the ModalityInput with these tensors in place of the batch's."""
        fields: dict[str, Any] = {**self.constants, **tensors}
        return self.kind(**fields)

    @classmethod
    def from_fields(
        cls, kind: type[Context] | type[ModalityInput], fields: Mapping[str, Any]
    ) -> "GraphInput":
        """Return a GraphInput whose static tensors have the shapes of the batch."""
        tensors = {name: x for name, x in fields.items() if isinstance(x, Tensor)}
        constants = {name: x for name, x in fields.items() if not isinstance(x, Tensor)}
        return cls(kind, tensors, {name: tuple(x.shape) for name, x in tensors.items()}, constants)

    @classmethod
    def from_context(cls, context: Context, *, pack: bool) -> "GraphInput":
        """Return a context with its tokens padded to a bucket.

        If `pack` is True, dense bags become packed ones, so that they share graphs with ragged
        batches. Tokens with shared positions stay dense: these are grids, which have one size.
        """
        fields, tokens = context._asdict(), context.tokens
        shared = context.positions is not None and context.positions.ndim < tokens.ndim
        if context.single:
            if pack and context.present is None:
                # A batch with the modality in every row then has the key of one in which rows miss
                # it, and both use one graph.
                fields["present"] = tokens.new_ones(len(tokens), dtype=torch.bool)
                if context.positions is not None:
                    fields["positions"] = context.positions.expand(len(tokens), 1, -1)
        elif context.offsets is None and pack and not shared:
            dense = {name: x for name, x in fields.items() if isinstance(x, Tensor)}
            fields |= {name: x.flatten(0, 1) for name, x in dense.items()}
            rows, count = tokens.shape[:2]
            fields["offsets"] = count * torch.arange(rows + 1, device=tokens.device)
        graph_input = cls.from_fields(Context, fields)
        if "offsets" in graph_input.tensors:
            padded = bucket(len(graph_input.tensors["tokens"]))
            for name in graph_input.tensors.keys() - {"offsets"}:
                graph_input.shapes[name] = (padded, *graph_input.shapes[name][1:])
        return graph_input


class StaticTensors:
    """The tensors at fixed addresses that all graphs of a model read.

    One flat block of memory per name and dtype, as large as the largest size so far; the graph of a
    smaller size uses its beginning. If a block has to grow, it gets a new address, and all graphs
    that read the old one are worthless (`must_grow` says so before).

    Args:
        device: the device of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flat: dict[tuple[Any, ...], Tensor] = {}

    def must_grow(self, sizes: StaticSizes) -> bool:
        """Return whether an existing block is too small for one of these sizes."""
        blocks = ((self._flat.get((name, dtype)), shape) for name, (shape, dtype) in sizes.items())
        return any(flat is not None and len(flat) < math.prod(shape) for flat, shape in blocks)

    def reserve(self, sizes: StaticSizes) -> None:
        """Make every block large enough for these sizes; blocks that grow are allocated anew."""
        for name, (shape, dtype) in sizes.items():
            count, flat = math.prod(shape), self._flat.pop((name, dtype), None)
            if flat is None or len(flat) < count:
                del flat  # before the new block is allocated: it may be most of the memory
                # Padding that no batch has written yet must be finite, and counts must be positive,
                # since their logarithm is taken: hence ones, not zeros or empty memory.
                flat = torch.ones(count, dtype=dtype, device=self.device)
            self._flat[name, dtype] = flat

    def view(self, name: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the static tensor of that name in one of the reserved shapes."""
        return self._flat[name, dtype][: math.prod(shape)].view(shape)


def copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copy each source into the first rows of its target, in one launch per dtype."""
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        copied_to, copied_from = by_dtype.setdefault(target.dtype, ([], []))
        copied_to.append(target[: len(source)] if target.ndim else target)
        copied_from.append(source)
    for copied_to, copied_from in by_dtype.values():
        torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
            copied_to, copied_from
        )


def read_batches(model: Model, inputs: Any, options: Mapping[str, Any]) -> dict[str, ModalityInput]:
    """Check a model's inputs; for a LegoBlock, a dict or a sequence of its one modality "x"."""
    return read_all(_modalities(model), inputs, like=_like(model), **{"masks": None, **options})


def read_patients(model: Model, patients: PatientBatch) -> dict[str, ModalityInput]:
    """Check a batch of patients; a LegoBlock calls its one modality "x".

    Ragged bags are read without a NestedTensor: to make one takes longer than all the rest here.
    Bags with an entry in `present` take the longer way, through `read_batches`.
    """
    parts = [part.name for part in fields(patients) if part.name != "target"]
    if isinstance(model, LegoBlock):
        patients = replace(patients, **{n: _rename_to_x(getattr(patients, n)) for n in parts})
    modalities = _modalities(model)
    ragged = [
        n for n, x in patients.x.items() if isinstance(x, Ragged) and n not in patients.present
    ]
    others = {
        n: {name: value for name, value in getattr(patients, n).items() if name not in ragged}
        for n in parts
    }
    read = read_batches(model, *replace(patients, **others).arguments()) if others["x"] else {}
    for name in ragged:
        bags = {n: getattr(patients, n)[name] for n in parts if name in getattr(patients, n)}
        read[name] = _read_ragged(modalities.get(name), name, bags, _like(model))
    sizes = {name: batch.rows for name, batch in read.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"inputs: expected one batch size, got {sizes}")
    return {name: read[name] for name in modalities if name in read}


def _read_ragged(
    modality: Any, name: str, parts: Mapping[str, Ragged], like: Tensor
) -> ModalityInput:
    """Check ragged bags, and the coordinates and statistics of their tokens."""
    x, argument = parts["x"], f"inputs[{name!r}]"
    if not isinstance(modality, Bag):
        raise ValueError(f"{argument}: expected a tensor for {modality}, got ragged bags")
    check_tensor(x.values, argument, like)
    widths = {"x": modality.features, "coords": modality.coords}
    widths["statistics"] = 2 if "statistics" in parts else 0
    for part, width in widths.items():
        shape = tuple(parts[part].values.shape) if part in parts else (len(x.values), 0)
        if shape != (len(x.values), width):
            argument = argument if part == "x" else f"{part}[{name!r}]"
            raise ValueError(f"{argument}: expected ({len(x.values)}, {width}), got {shape}")
    values: dict[str, Any] = {part: bags.values for part, bags in parts.items()}
    constants = {"keep": None, "coords": None, "rows": len(x.offsets) - 1, "items": 1}
    return ModalityInput(**{**constants, "offsets": x.offsets.long(), **values})


def _rename_to_x(values: Mapping[str, Any]) -> dict[str, Any]:
    return dict.fromkeys("x", *values.values()) if values else {}


def _modalities(model: Model) -> Mapping[str, Modality]:
    return {"x": model.modality} if isinstance(model, LegoBlock) else model.modalities


def _like(model: Model) -> Tensor:
    return model.latents if isinstance(model, LegoBlock) else next(model.parameters())


def make_graph_inputs(
    model: Model, batches: Mapping[str, ModalityInput]
) -> dict[str, GraphInput] | str:
    """Return the inputs of a graph by modality; or, as a str, why this batch cannot have a graph.

    What depends on the lengths of bags happens here, outside the graph: masked tokens are cut out
    and bags are packed.
    """
    if isinstance(model, HEALNet):
        contexts = model.make_contexts(batches)
        return {n: GraphInput.from_context(context, pack=True) for n, context in contexts.items()}
    options, inputs = model.pass_options(), {}
    merges = isinstance(model, LegoMerge)
    for name, batch in batches.items():
        block = _block(model, name)
        if block.encoder is None:
            inputs[name] = GraphInput.from_context(
                block.make_context(batch, options), pack=not merges
            )
        elif batch.keep is None and batch.offsets is None:
            inputs[name] = GraphInput.from_fields(ModalityInput, batch._asdict())
        else:
            return "an encoder takes ragged or missing bags one by one"
    if merges:
        missing = any({"offsets", "present"} & x.tensors.keys() for x in inputs.values())
        if missing or len(inputs) < len(model.blocks):
            return "a LegoMerge has to read which rows miss a modality"
    return inputs


def compute_latents(model: Model, rows: int, read: Mapping[str, Context | ModalityInput]) -> Tensor:
    """Return the last latents of `rows` rows; `read` is what a graph reads of each modality."""
    if isinstance(model, HEALNet):
        contexts = {n: context for n, context in read.items() if isinstance(context, Context)}
        return model.fuse(rows, model.attend_to(contexts))
    options = model.pass_options()
    keys: dict[str, list[Keys]] = {}
    for name, value in read.items():
        block = _block(model, name)
        context = block.make_context(value, options) if isinstance(value, ModalityInput) else value
        keys[name] = block.attend_to(context, options)
    if isinstance(model, LegoBlock):
        return model.encode(rows, keys["x"], options).real
    return model.fuse(rows, keys, options)


def find_obstacle(model: Model) -> str:
    """Return why no call of this model can be captured; empty if nothing is known to forbid it."""
    if type(model) not in (HEALNet, LegoBlock, LegoMerge, LegoFuse):
        return f"the subclass {type(model).__name__} may compute something else"
    if isinstance(model, LegoFuse) and model.mode == "upstream-weave":
        return "upstream-weave runs the authors' loop"
    for module in model.modules():
        encoder = module.encoder if isinstance(module, LegoBlock) else None
        if encoder is not None and type(encoder) not in (SNN, ABMIL):
            return f"the encoder {type(encoder).__name__} may not fit into a graph"
    return ""


def _block(model: LegoBlock | LegoMerge | LegoFuse, name: str) -> LegoBlock:
    if isinstance(model, LegoBlock):
        return model
    block = model.blocks[name]
    assert isinstance(block, LegoBlock)
    return block
