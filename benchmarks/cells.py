"""What is timed: named cells, each with its inputs, what runs, and its float64 gold.

For both merges and LegoBlock; HEALNet's cells are in motet.bench. bench_*.py time those that suit
a CPU; gpu.py times all of them on a GPU.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import motet
import torch
from motet.kernels.harmonic_merge import harmonic_merge_reference
from motet.kernels.slerp import slerp_reference
from torch import Tensor


@dataclass(frozen=True)
class Cell:
    """One thing to time: `run(*arguments)`, its rival, and what both should give."""

    name: str
    run: Callable[..., Tensor]
    arguments: tuple[Tensor, ...]
    gold: Callable[[], Tensor]
    rival: Callable[..., Tensor] | None = None

    def contenders(self) -> dict[str, Callable[[], Tensor]]:
        """Return what is timed."""
        found = {"motet": partial(self.run, *self.arguments)}
        if self.rival is not None:
            found["torch"] = partial(self.rival, *self.arguments)
        return found

    def error(self, run: Callable[..., Tensor]) -> float:
        """Return the largest error of `run` against the gold, relative to the largest value."""
        with torch.no_grad():
            gold = self.gold()
            own = run(*self.arguments).to(gold.dtype)
            return ((own - gold).abs().max() / gold.abs().max()).item()


def merge_cells(device: str, size: int) -> list[Cell]:
    """Two latents or vectors of `size` elements, against the operator written in torch."""
    half = [0.5, 0.5]
    z = tuple(torch.randn(size, dtype=torch.complex64, device=device) for _ in range(2))
    v = tuple(torch.randn(size, device=device) for _ in range(2))
    return [
        Cell(
            f"harmonic_merge {size}",
            lambda *latents: motet.kernels.harmonic_merge(latents),
            z,
            lambda: harmonic_merge_reference([x.to(torch.complex128) for x in z], half),
            lambda *latents: harmonic_merge_reference(latents, half),
        ),
        Cell(
            f"slerp {size}",
            lambda *vectors: motet.kernels.slerp(vectors),
            v,
            lambda: slerp_reference([x.double() for x in v], half),
            lambda *vectors: slerp_reference(vectors, half),
        ),
    ]


def lego_cells(device: str, tokens: int) -> list[Cell]:
    """LegoBlock and LegoMerge on 8 bags of 1024 features and an omic row."""
    torch.manual_seed(0)
    blocks = {
        "omic": motet.LegoBlock(motet.Tabular(2181), out_features=4, depth=4),
        "wsi": motet.LegoBlock(motet.Bag(1024), out_features=4, depth=4),
    }
    merged = motet.LegoMerge(blocks).to(device).eval()
    block = copy.deepcopy(blocks["wsi"]).to(device).eval()
    omic, bags = torch.randn(8, 2181, device=device), torch.randn(8, tokens, 1024, device=device)
    return [
        *_forward_and_step(f"LegoBlock 8 x {tokens}", block, bags),
        _forward(f"LegoMerge 8 x {tokens}", merged, omic, bags),
    ]


def _forward(name: str, model: torch.nn.Module, *inputs: Tensor) -> Cell:
    def run(*tensors: Tensor) -> Tensor:
        with torch.no_grad():
            return _call(model, tensors)

    def gold() -> Tensor:
        wide = copy.deepcopy(model).double()
        with torch.no_grad():
            return _call(wide, tuple(x.double() for x in inputs))

    return Cell(f"{name} forward", run, inputs, gold)


def _forward_and_step(name: str, model: torch.nn.Module, *inputs: Tensor) -> list[Cell]:
    """A step gives the gradients of all parameters, so its error is that of the gradients."""

    def gradients(model: torch.nn.Module, tensors: tuple[Tensor, ...]) -> Tensor:
        with torch.enable_grad():
            loss = _call(model, tensors).square().sum()
            parameters = [p for p in model.parameters() if p.requires_grad]
            # What asks a single token has no influence, and so no gradient.
            found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in found])

    def gold() -> Tensor:
        return gradients(copy.deepcopy(model).double(), tuple(x.double() for x in inputs))

    step = Cell(f"{name} step", lambda *tensors: gradients(model, tensors), inputs, gold)
    return [_forward(name, model, *inputs), step]


def _call(model: torch.nn.Module, tensors: tuple[Tensor, ...]) -> Tensor:
    return model(tensors[0]) if isinstance(model, motet.LegoBlock) else model(tensors)
