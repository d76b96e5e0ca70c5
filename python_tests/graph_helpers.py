"""Models, ragged batches and a loss, for tests of graphs of steps."""

from collections.abc import Callable
from typing import Any

import motet
import torch
from motet.fusion.graphs import logits_of
from motet.fusion.patients import PatientBatch, Ragged
from torch import Tensor, nn

from .conftest import randomised

Target = dict[str, Tensor]
SIZES = {"num_latents": 6, "latent_dim": 5, "heads": 2, "head_dim": 4}


def loss_of(logits: Tensor, target: Target) -> Tensor:
    return (logits - target["wanted"][:, None]).square().mean()


def healnet(**options: Any) -> nn.Module:
    shapes = {"omic": motet.Tabular(7), "wsi": motet.Bag(6, coords=2)}
    sizes = {"self_attention": 1, **SIZES, **options}
    return randomised(motet.HEALNet(shapes, out_features=3, **sizes).double())


def lego(kind: str, encoder: bool = False, **options: Any) -> nn.Module:
    wide = {"out_features": 3, "fft": "latents", "context": "spectrum", **SIZES, **options}
    snn = motet.SNN(7, hidden=(8,)) if encoder else None
    blocks = {
        "omic": motet.LegoBlock(motet.Tabular(7), snn, depth=3, **wide),
        "wsi": motet.LegoBlock(motet.Bag(6), depth=2, **wide),
    }
    if kind in blocks:
        return randomised(blocks[kind].double())
    joined = {"merge": motet.LegoMerge, "stack": motet.LegoFuse, "weave": motet.LegoFuse}[kind]
    mode = {} if kind == "merge" else {"mode": kind}
    return randomised(joined(blocks, **mode).double())


def batch_of(
    *lengths: int, coords: bool = True, missing: bool = True, seed: int = 0
) -> PatientBatch:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    offsets, rows = torch.tensor([0, *lengths]).cumsum(0), len(lengths)
    present = torch.arange(rows) % 3 > 0
    omic = draw(rows, 7)
    if missing:
        omic[~present] = torch.nan
    return PatientBatch(
        {"omic": omic, "wsi": Ragged(draw(sum(lengths), 6), offsets)},
        {"wsi": Ragged(draw(sum(lengths), 2), offsets)} if coords else {},
        {"omic": present} if missing else {},
        {"wanted": draw(rows)},
    )


def only(batch: PatientBatch, name: str) -> PatientBatch:
    return PatientBatch({name: batch.x[name]}, {}, {}, batch.target)


def gradients_of(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def eager(model: nn.Module, batch: PatientBatch) -> tuple[Tensor, list[Tensor | None]]:
    model.zero_grad()
    loss = loss_of(logits_of(model, batch), batch.target)
    loss.backward()
    return loss.detach(), gradients_of(model)


def graphed(graphs: Any, batch: PatientBatch, **options: Any) -> tuple[Tensor, list[Tensor | None]]:
    loss = graphs(batch, **options)
    return loss, gradients_of(graphs.model)


def rename(model: nn.Module, values: dict[str, Any], deep: bool = False) -> dict[str, Any]:
    """Return the values with the only modality of a LegoBlock renamed to "x"."""
    if not isinstance(model, motet.LegoBlock):
        return values
    if deep:
        return {key: rename(model, options) for key, options in values.items()}
    return dict.fromkeys("x", *values.values()) if values else {}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[PatientBatch], PatientBatch]]] = {
    "shared weights": (healnet, lambda batch: batch),
    "own weights": (lambda: healnet(share_weights=False, depth=3), lambda batch: batch),
    "a table alone": (lambda: lego("omic", fft="2d"), lambda batch: only(batch, "omic")),
    "an encoder": (lambda: lego("omic", True), lambda batch: only(batch, "omic")),
    **{
        f"a block, {fft}, {context}": (
            lambda fft=fft, context=context: lego("wsi", fft=fft, context=context, normalise=True),
            lambda batch: only(batch, "wsi"),
        )
        for fft in ("2d", "latents", "width", None)
        for context in ("features", "spectrum")
    },
    "stack": (lambda: lego("stack"), lambda batch: batch),
    "weave": (lambda: lego("weave", normalise=True), lambda batch: batch),
}
