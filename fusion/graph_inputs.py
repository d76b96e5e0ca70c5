"""What a CUDA graph is given: tensors of sizes that many batches share, at addresses that stay.

Bags are packed with offsets, equal ones too, and their tokens rounded up to a bucket, so that
ragged batches share a graph. Behind the last bag are finite numbers of earlier batches, which
nothing reads but products whose other factor is zero there.
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
Sizes = Mapping[Any, tuple[tuple[int, ...], torch.dtype]]
# The fewest rows between two buckets: a kernel takes this many at a time anyway.
STEP = 128


def bucket(tokens: int) -> int:
    """Return `tokens` rounded up to sixteenths of a power of two: up to 6.25 %, or 127, more."""
    if not tokens:
        return STEP
    step = max(STEP, 1 << max(tokens.bit_length() - 5, 0))
    return -(-tokens // step) * step


class Given(NamedTuple):
    """What a graph is given of one modality."""

    kind: type[Context] | type[ModalityInput]
    """A Context; or a ModalityInput, where the encoder is in the graph too."""
    tensors: dict[str, Tensor]
    """By field, as they came."""
    shapes: dict[str, tuple[int, ...]]
    """By field, what the graph sees of them."""
    rest: dict[str, Any]
    """The fields that are no tensors."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What two batches have to agree in to share a graph."""
        dtypes = tuple(tensor.dtype for tensor in self.tensors.values())
        return self.kind, tuple(self.shapes.items()), dtypes, tuple(self.rest.items())

    def made_of(self, tensors: Mapping[str, Tensor]) -> Context | ModalityInput:
        """Return the Context or the ModalityInput with other tensors in it."""
        fields: dict[str, Any] = {**self.rest, **tensors}
        return self.kind(**fields)

    @classmethod
    def of_fields(
        cls, kind: type[Context] | type[ModalityInput], fields: Mapping[str, Any]
    ) -> "Given":
        """Return tensors in the sizes that they have."""
        tensors = {name: x for name, x in fields.items() if isinstance(x, Tensor)}
        rest = {name: x for name, x in fields.items() if not isinstance(x, Tensor)}
        return cls(kind, tensors, {name: tuple(x.shape) for name, x in tensors.items()}, rest)

    @classmethod
    def of_context(cls, context: Context, *, pack: bool) -> "Given":
        """Return a context; True for `pack` makes bags of one length ragged ones.

        Tokens that share their positions stay dense: a grid has one size.
        """
        fields, tokens = context._asdict(), context.tokens
        shared = context.positions is not None and context.positions.ndim < tokens.ndim
        if context.single:
            if pack and context.present is None:
                # So that a batch in which a row misses the modality is no other one.
                fields["present"] = tokens.new_ones(len(tokens), dtype=torch.bool)
        elif context.offsets is None and pack and not shared:
            dense = {name: x for name, x in fields.items() if isinstance(x, Tensor)}
            fields |= {name: x.flatten(0, 1) for name, x in dense.items()}
            rows, count = tokens.shape[:2]
            fields["offsets"] = count * torch.arange(rows + 1, device=tokens.device)
        given = cls.of_fields(Context, fields)
        if "offsets" in given.tensors:
            rows = bucket(len(given.tensors["tokens"]))
            for name in given.tensors.keys() - {"offsets"}:
                given.shapes[name] = (rows, *given.shapes[name][1:])
        return given


class Buffers:
    """Static tensors, each of the largest size that was asked for.

    Args:
        device: where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flat: dict[tuple[Any, ...], Tensor] = {}

    def moves(self, wanted: Sizes) -> bool:
        """Return whether a tensor that is there is too small for these shapes."""
        known = ((self._flat.get((name, dtype)), shape) for name, (shape, dtype) in wanted.items())
        return any(flat is not None and len(flat) < math.prod(shape) for flat, shape in known)

    def fit(self, wanted: Sizes) -> None:
        """Make room for tensors of these shapes and dtypes, in new places where they move."""
        for name, (shape, dtype) in wanted.items():
            size, known = math.prod(shape), self._flat.pop((name, dtype), None)
            if known is None or len(known) < size:
                del known  # first, since it may be most of the memory
                # Ones, so that what no batch has written yet is finite, and counts are positive.
                known = torch.ones(size, dtype=dtype, device=self.device)
            self._flat[name, dtype] = known

    def view(self, name: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the static tensor of that name."""
        return self._flat[name, dtype][: math.prod(shape)].view(shape)


def copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copy tensors into the first rows of others, in one launch per dtype."""
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        into, of = by_dtype.setdefault(target.dtype, ([], []))
        into.append(target[: len(source)] if target.ndim else target)
        of.append(source)
    for into, of in by_dtype.values():
        torch._foreach_copy_(into, of)  # pyright: ignore[reportPrivateImportUsage]


def read_batches(model: Model, inputs: Any, options: Mapping[str, Any]) -> dict[str, ModalityInput]:
    """Check a model's inputs; a LegoBlock takes a dict or a sequence too, of its one modality."""
    return read_all(_modalities(model), inputs, like=_like(model), **{"masks": None, **options})


def read_patients(model: Model, patients: PatientBatch) -> dict[str, ModalityInput]:
    """Check a batch of patients; a LegoBlock calls its one modality "x".

    Ragged bags are taken as they are: to make a NestedTensor takes longer than all else here.
    """
    parts = [part.name for part in fields(patients) if part.name != "target"]
    if isinstance(model, LegoBlock):
        patients = replace(patients, **{n: _as_x(getattr(patients, n)) for n in parts})
    modalities = _modalities(model)
    absent = patients.present  # what says so of bags takes the longer way
    ragged = [n for n, x in patients.x.items() if isinstance(x, Ragged) and n not in absent]
    rest = {
        n: {name: own for name, own in getattr(patients, n).items() if name not in ragged}
        for n in parts
    }
    read = read_batches(model, *replace(patients, **rest).arguments()) if rest["x"] else {}
    for name in ragged:
        own = {n: getattr(patients, n)[name] for n in parts if name in getattr(patients, n)}
        read[name] = _bags(modalities.get(name), name, own, _like(model))
    sizes = {name: batch.rows for name, batch in read.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"inputs: expected one batch size, got {sizes}")
    return {name: read[name] for name in modalities if name in read}


def _bags(modality: Any, name: str, parts: Mapping[str, Ragged], like: Tensor) -> ModalityInput:
    """Return ragged bags with what describes their tokens; for anything else raise."""
    x, what = parts["x"], f"inputs[{name!r}]"
    if not isinstance(modality, Bag):
        raise ValueError(f"{what}: expected a tensor for {modality}, got ragged bags")
    check_tensor(x.values, what, like)
    shapes = {"x": modality.features, "coords": modality.coords}
    shapes["statistics"] = 2 if "statistics" in parts else 0
    for part, width in shapes.items():
        shape = tuple(parts[part].values.shape) if part in parts else (len(x.values), 0)
        if shape != (len(x.values), width):
            said = what if part == "x" else f"{part}[{name!r}]"
            raise ValueError(f"{said}: expected ({len(x.values)}, {width}), got {shape}")
    given: dict[str, Any] = {part: own.values for part, own in parts.items()}
    rest = {"keep": None, "coords": None, "rows": len(x.offsets) - 1, "items": 1}
    return ModalityInput(**{**rest, "offsets": x.offsets.long(), **given})


def _as_x(values: Mapping[str, Any]) -> dict[str, Any]:
    return dict.fromkeys("x", *values.values()) if values else {}


def _modalities(model: Model) -> Mapping[str, Modality]:
    return {"x": model.modality} if isinstance(model, LegoBlock) else model.modalities


def _like(model: Model) -> Tensor:
    return model.latents if isinstance(model, LegoBlock) else next(model.parameters())


def given_of(model: Model, batches: Mapping[str, ModalityInput]) -> dict[str, Given] | str:
    """Return what a graph of the model is given of a batch, or why there can be none."""
    if isinstance(model, HEALNet):
        contexts = model.contexts(batches)
        return {name: Given.of_context(own, pack=True) for name, own in contexts.items()}
    options, given = model.pass_options(), {}
    merges = isinstance(model, LegoMerge)
    for name, batch in batches.items():
        block = _block(model, name)
        if block.encoder is None:
            given[name] = Given.of_context(block.context(batch, options), pack=not merges)
        elif batch.keep is None and batch.offsets is None:
            given[name] = Given.of_fields(ModalityInput, batch._asdict())
        else:
            return "an encoder takes ragged or missing bags one by one"
    if merges:
        missing = any({"offsets", "present"} & own.tensors.keys() for own in given.values())
        if missing or len(given) < len(model.blocks):
            return "a LegoMerge looks at which rows miss a modality"
    return given


def latents_from(model: Model, rows: int, read: Mapping[str, Context | ModalityInput]) -> Tensor:
    """Return the last latents of `rows` rows from what a graph is given."""
    if isinstance(model, HEALNet):
        contexts = {name: own for name, own in read.items() if isinstance(own, Context)}
        return model.fuse(rows, model.attend_to(contexts))
    options = model.pass_options()
    keys: dict[str, list[Keys]] = {}
    for name, own in read.items():
        block = _block(model, name)
        context = block.context(own, options) if isinstance(own, ModalityInput) else own
        keys[name] = block.attend_to(context, options)
    if isinstance(model, LegoBlock):
        return model.encode(rows, keys["x"], options).real
    return model.fuse(rows, keys, options)


def why_never(model: Model) -> str:
    """Return why no call of a model can be captured, from its kind and its encoders."""
    if type(model) not in (HEALNet, LegoBlock, LegoMerge, LegoFuse):
        return f"a {type(model).__name__} may compute something else"
    if isinstance(model, LegoFuse) and model.mode == "upstream-weave":
        return "an upstream-weave is the authors' code"
    for module in model.modules():
        encoder = module.encoder if isinstance(module, LegoBlock) else None
        if encoder is not None and type(encoder) not in (SNN, ABMIL):
            return f"the encoder {type(encoder).__name__} may do what a graph cannot"
    return ""


def _block(model: LegoBlock | LegoMerge | LegoFuse, name: str) -> LegoBlock:
    if isinstance(model, LegoBlock):
        return model
    block = model.blocks[name]
    assert isinstance(block, LegoBlock)
    return block
