"""Cells of both merges, LegoBlock and LegoMerge: inputs, the call to time, its result in float64.

HEALNet's cells are in motet.cli.measure. bench_*.py time the sizes that suit a CPU, gpu.py times
all of them on a GPU.
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
class TimedCell:
    """A call to time, `run(*arguments)`, its reference, and the exact result of both."""

    name: str
    run: Callable[..., Tensor]
    arguments: tuple[Tensor, ...]
    exact: Callable[[], Tensor]
    """Computes the result in float64."""
    reference: Callable[..., Tensor] | None = None
    """The literal computation, called with the same arguments."""

    def contenders(self) -> dict[str, Callable[[], Tensor]]:
        """Return the functions to time, by name."""
        contenders = {"motet": partial(self.run, *self.arguments)}
        if self.reference is not None:
            contenders["reference"] = partial(self.reference, *self.arguments)
        return contenders

    def error(self, run: Callable[..., Tensor]) -> float:
        """Return the largest error of `run` against float64, relative to the largest value."""
        with torch.no_grad():
            exact = self.exact()
            result = run(*self.arguments).to(exact.dtype)
            return ((result - exact).abs().max() / exact.abs().max()).item()


def merge_cells(device: str, size: int) -> list[TimedCell]:
    """Return cells that merge two latents, or two vectors, of `size` elements.

    The reference is the operator written in torch.
    """
    half = [0.5, 0.5]
    z = tuple(torch.randn(size, dtype=torch.complex64, device=device) for _ in range(2))
    v = tuple(torch.randn(size, device=device) for _ in range(2))
    return [
        TimedCell(
            f"harmonic_merge {size}",
            lambda *latents: motet.kernels.harmonic_merge(latents),
            z,
            lambda: harmonic_merge_reference([x.to(torch.complex128) for x in z], half),
            lambda *latents: harmonic_merge_reference(latents, half),
        ),
        TimedCell(
            f"slerp {size}",
            lambda *vectors: motet.kernels.slerp(vectors),
            v,
            lambda: slerp_reference([x.double() for x in v], half),
            lambda *vectors: slerp_reference(vectors, half),
        ),
    ]


def lego_cells(device: str, tokens: int, *, graphs: bool = False) -> list[TimedCell]:
    """Return cells of LegoBlock on 8 bags of 1024 features, and of LegoMerge on bags and omic rows.

    The reference is the literal loop over passes. With `graphs`, which needs a GPU, cells of
    LegoBlock as CUDA graphs are added.
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
            f"LegoMerge 8 x {tokens} forward", merged,
            lambda *x, **options: merged(x, **options), (omic, bags), step=False,
        ),
    ]  # fmt: skip
    if graphs:
        cells += _graph_cells(f"LegoBlock 8 x {tokens}", block, bags)
    return cells


def _graph_cells(name: str, block: motet.LegoBlock, bags: Tensor) -> list[TimedCell]:
    predict = motet.CudaGraphs(block)
    steps = motet.StepGraphs(block, lambda logits, _: logits.square().sum())

    def step(x: Tensor) -> Tensor:
        steps(PatientBatch({"x": x}, {}, {}, {}))
        return torch.cat([p.grad.flatten() for p in block.parameters() if p.grad is not None])

    def make_cell(kind: str, call: Callable[..., Tensor]) -> TimedCell:
        title = f"{name} {kind}, CUDA graph"
        return _lego(title, block, call, (bags,), step=kind == "step", reference=False)

    return [
        make_cell("forward", lambda x: predict([x])),
        # `block` computes the exact gradients; the graph replays them.
        replace(make_cell("step", block), run=step),
    ]


def _lego(
    name: str,
    model: torch.nn.Module,
    call: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    *,
    step: bool,
    reference: bool = True,
) -> TimedCell:
    """Return the cell of a model's logits, or of the gradients of all its parameters.

    `reference` says whether the literal loop is a contender too.
    """

    def result(call: Callable[..., Tensor], model: torch.nn.Module, *tensors: Tensor) -> Tensor:
        with torch.set_grad_enabled(step):
            logits = call(*tensors)
            if not step:
                return logits
            loss = logits.square().sum()
        # With a single token the attention weight is always 1: the weights of the queries have no
        # influence on the loss, and so no gradient.
        gradients = torch.autograd.grad(
            loss, list(model.parameters()), allow_unused=True, materialize_grads=True
        )
        return torch.cat([g.flatten() for g in gradients])

    def exact() -> Tensor:
        wide = copy.deepcopy(model).double()
        tensors = [x.double() for x in inputs]
        merges = isinstance(wide, motet.LegoMerge)
        return result(lambda *x: wide(x if merges else x[0]), wide, *tensors)

    literal = partial(result, partial(call, strategy="reference"), model) if reference else None
    return TimedCell(name, partial(result, call, model), inputs, exact, literal)
