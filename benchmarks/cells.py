"""What is timed: named cells, each with its inputs, what runs, and its result in float64.

For both merges and LegoBlock; HEALNet's cells are in motet.cli.measure. bench_*.py time those that
suit a CPU; gpu.py times all of them on a GPU.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import motet
import torch
from motet.fusion.patients import PatientBatch
from motet.kernels.harmonic_merge.reference import harmonic_merge_reference
from motet.kernels.slerp.reference import slerp_reference
from torch import Tensor


@dataclass(frozen=True)
class Cell:
    """One thing to time: `run(*arguments)`, its rival, and what both should give."""

    name: str
    run: Callable[..., Tensor]
    arguments: tuple[Tensor, ...]
    exact: Callable[[], Tensor]
    rival: Callable[..., Tensor] | None = None

    def contenders(self) -> dict[str, Callable[[], Tensor]]:
        """Return what is timed."""
        found = {"motet": partial(self.run, *self.arguments)}
        if self.rival is not None:
            found["reference"] = partial(self.rival, *self.arguments)
        return found

    def error(self, run: Callable[..., Tensor]) -> float:
        """Return the largest error of `run` against float64, relative to the largest value."""
        with torch.no_grad():
            exact = self.exact()
            own = run(*self.arguments).to(exact.dtype)
            return ((own - exact).abs().max() / exact.abs().max()).item()


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


def lego_cells(device: str, tokens: int, *, graphs: bool = False) -> list[Cell]:
    """LegoBlock and LegoMerge on 8 bags of 1024 features and an omic row, against the literal loop.

    True for `graphs` adds LegoBlock as CUDA graphs, for which it takes a GPU.
    """
    torch.manual_seed(0)
    blocks = {
        "omic": motet.LegoBlock(motet.Tabular(2181), out_features=4, depth=4),
        "wsi": motet.LegoBlock(motet.Bag(1024), out_features=4, depth=4),
    }
    merged = motet.LegoMerge(blocks).to(device).eval()
    block = copy.deepcopy(blocks["wsi"]).to(device).eval()
    omic, bags = torch.randn(8, 2181, device=device), torch.randn(8, tokens, 1024, device=device)
    cells = [
        _lego(f"LegoBlock 8 x {tokens} forward", block, block, (bags,), step=False),
        _lego(f"LegoBlock 8 x {tokens} step", block, block, (bags,), step=True),
        _lego(
            f"LegoMerge 8 x {tokens} forward", merged, lambda *x, **how: merged(x, **how),
            (omic, bags), step=False,
        ),
    ]  # fmt: skip
    if graphs:
        cells += _graph_cells(f"LegoBlock 8 x {tokens}", block, bags)
    return cells


def _graph_cells(name: str, block: motet.LegoBlock, bags: Tensor) -> list[Cell]:
    predict = motet.CudaGraphs(block)
    steps = motet.StepGraphs(block, lambda logits, _: logits.square().sum())

    def step(x: Tensor) -> Tensor:
        steps(PatientBatch({"x": x}, {}, {}, {}))
        return torch.cat([p.grad.flatten() for p in block.parameters() if p.grad is not None])

    def of(what: str, call: Callable[..., Tensor]) -> Cell:
        named = f"{name} {what}, CUDA graph"
        return _lego(named, block, call, (bags,), step=what == "step", rival=False)

    return [of("forward", lambda x: predict([x])), replace(of("step", block), run=step)]


def _lego(
    name: str,
    model: torch.nn.Module,
    call: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    *,
    step: bool,
    rival: bool = True,
) -> Cell:
    """Return the cell of a model's logits, or of the gradients of all its parameters."""

    def result(call: Callable[..., Tensor], of: torch.nn.Module, *tensors: Tensor) -> Tensor:
        with torch.set_grad_enabled(step):
            logits = call(*tensors)
            if not step:
                return logits
            loss = logits.square().sum()
        # What asks a single token has no influence, and so no gradient.
        found = torch.autograd.grad(
            loss, list(of.parameters()), allow_unused=True, materialize_grads=True
        )
        return torch.cat([g.flatten() for g in found])

    def exact() -> Tensor:
        wide = copy.deepcopy(model).double()
        tensors = [x.double() for x in inputs]
        joined = isinstance(wide, motet.LegoMerge)
        return result(lambda *x: wide(x if joined else x[0]), wide, *tensors)

    literal = partial(result, partial(call, strategy="reference"), model) if rival else None
    return Cell(name, partial(result, call, model), inputs, exact, literal)
