"""What `make gpu-check` says of whole models: errors at full length, bits, graphs of a step."""

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import motet
import torch
from motet import _error_floors
from motet.cli import measure
from motet.fusion.patients import PatientBatch
from motet.kernels.plan import Strategy
from torch import Tensor

Check = Callable[[], tuple[float, float]]
"""Returns an error and what it may be."""

STRATEGIES: tuple[Strategy, ...] = ("cached", "absorbed")
RUNS = 50


def model_checks(device: str) -> Iterator[tuple[str, Check]]:
    """Yield what may run beside other checks; on a CPU with sizes that only show that it works."""
    for name in ("LegoBlock", "HEALNet", "LegoMerge", "LegoFuse stack", "LegoFuse weave"):
        yield f"{name} float64", partial(_model, name, device)
    gpu = device == "cuda"
    lengths, width, runs = ((2000,) * 8, 2048, RUNS) if gpu else ((20, 0, 31), 32, 3)
    for name, config in measure.CONFIGS.items() if gpu else [("blca", measure.CONFIGS["blca"])]:
        for strategy in STRATEGIES:
            for heads in (8, 1) if gpu else (8,):
                with_heads = config._replace(heads=heads)
                cell = measure.Cell(name, with_heads, lengths, step=True, width=width, dropout=0.1)
                title = f"{name} {strategy}, heads: {heads}, bf16, the same bits {runs} times"
                yield title, partial(_same_bits, cell, strategy, device, runs)
    yield f"LegoBlock, the same bits {runs} times", partial(_same_bits_lego, device, runs)
    if gpu:
        yield "HEALNet, a graph of the step", partial(step_graph, "HEALNet", device)
        yield "LegoBlock, a graph of the step", partial(step_graph, "LegoBlock", device)
        alone = partial(measure.in_child, 1, failed_capture)
        yield "a failed capture leaves nothing behind", alone


def full_length_checks(device: str) -> Iterator[tuple[str, Check]]:
    """Yield the checks that need the memory of a GPU for themselves."""
    gpu = device == "cuda"
    batches = {"8x15000": (15_000,) * 8, "1x60000": (60_000,)} if gpu else {"2x50": (50, 50)}
    for shape, lengths in batches.items():
        for name, config in measure.CONFIGS.items():
            cell = measure.Cell(name, config, lengths, step=True, width=2048 if gpu else 32)
            yield f"{name} {shape} bf16, the whole length", partial(_full_length, cell, device)


def _model(name: str, device: str) -> tuple[float, float]:
    """Compare a model on the device with itself on the CPU, logits and gradients."""
    sizes: dict[str, Any] = {"num_latents": 17, "latent_dim": 30}
    blocks = {
        "omic": motet.LegoBlock(motet.Tabular(40), motet.SNN(40), out_features=4, **sizes),
        "wsi": motet.LegoBlock(motet.Bag(32), motet.ABMIL(32), out_features=4, **sizes),
    }
    modalities = {"omic": motet.Tabular(40), "wsi": motet.Bag(32)}
    makers: dict[str, Callable[[], Any]] = {
        "LegoBlock": lambda: motet.LegoMerge({"wsi": blocks["wsi"]}),
        "HEALNet": lambda: motet.HEALNet(modalities, out_features=4, self_attention=1),
        "LegoMerge": lambda: motet.LegoMerge(blocks),
        "LegoFuse stack": lambda: motet.LegoFuse(blocks),
        "LegoFuse weave": lambda: motet.LegoFuse(blocks, mode="weave"),
    }
    model = makers[name]().double().eval()
    inputs = {"omic": torch.randn(5, 40).double(), "wsi": torch.randn(5, 70, 32).double()}
    if name == "LegoBlock":
        del inputs["omic"]
    mask = torch.rand(5, 70) < 0.5
    mask[2] = False

    def outcome(device: str) -> list[Tensor]:
        model.to(device).zero_grad()
        given = {name: x.to(device) for name, x in inputs.items()}
        logits = model(given, masks={"wsi": mask.to(device)})
        logits.square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return [x.detach().cpu().clone() for x in (logits, *gradients)]

    exact = outcome("cpu")
    return measure.relative_error(outcome(device), exact), _error_floors.MODEL["float64"]


def _same_bits(
    cell: measure.Cell, strategy: Strategy, device: str, runs: int
) -> tuple[float, float]:
    """Return in how many of the runs a training step's gradients differ from the first: in none."""
    work = measure.Workload(cell, "bf16", device)

    def step() -> list[Tensor]:
        torch.manual_seed(1)  # of the dropout
        return work.run(strategy)

    return _other_bits(step, runs), 0.0


def _same_bits_lego(device: str, runs: int) -> tuple[float, float]:
    """Return the same of a block in the frequency domain."""
    block = motet.LegoBlock(motet.Bag(64), out_features=4, normalise=True).to(device)
    bags, parameters = torch.randn(8, 500, 64, device=device), list(block.parameters())

    def step() -> list[Tensor]:
        with torch.autocast(device, torch.bfloat16):
            logits: Any = block(bags)
        return list(torch.autograd.grad(logits.float().square().sum(), parameters))

    return _other_bits(step, runs), 0.0


def _other_bits(step: Callable[[], list[Tensor]], runs: int) -> float:
    first = step()
    differs = (
        any(not torch.equal(result, other) for result, other in zip(step(), first, strict=True))
        for _ in range(runs - 1)
    )
    return float(sum(differs))


def _full_length(cell: measure.Cell, device: str) -> tuple[float, float]:
    """Compare both strategies with float64, and allow twice what the literal equation errs."""
    work = measure.Workload(cell, "bf16", device)
    exact = work.exact()
    literal = measure.relative_error(work.run("reference", "eager"), exact)
    errors = [measure.relative_error(work.run(strategy), exact) for strategy in STRATEGIES]
    return max(errors), 2 * literal + measure.FLOOR["bf16"]


def drawn(*lengths: int, width: int, device: str) -> PatientBatch:
    """Return a batch of random bags of these lengths."""
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    return measure.batch_of(torch.randn(sum(lengths), width, device=device), offsets)


def _small(name: str, device: str) -> Any:
    if name == "LegoBlock":
        return motet.LegoBlock(motet.Bag(64), out_features=4, normalise=True).to(device)
    return motet.HEALNet({"wsi": motet.Bag(64)}, out_features=4).to(device)


def step_graph(name: str, device: str) -> tuple[float, float]:
    """Replay the graph of a step on ragged batches of one bucket; compare with steps as usual."""
    model = _small(name, device)
    eager, graphs = copy.deepcopy(model), motet.StepGraphs(model, measure.squares)
    errors = [
        _difference(graphs, eager, drawn(*lengths, width=64, device=device))
        for lengths in ((250, 250), (300, 199), (1, 499), (400, 0, 77))
    ]
    if sum(row["replays"] for row in graphs.report()) < 2:
        raise ArithmeticError(f"expected two replays of one graph, got {graphs.report()}")
    return max(errors), _error_floors.MODEL["float32"]


def _difference(graphs: motet.StepGraphs, eager: Any, batch: PatientBatch) -> float:
    """Return by how much loss and gradients differ from those of the same model in eager mode."""
    expected, loss = _eager_step(eager, batch), graphs(batch)
    gradients = [p.grad for p in graphs.model.parameters() if p.grad is not None]
    return measure.relative_error([loss, *gradients], expected)


def _eager_step(model: Any, batch: PatientBatch) -> list[Tensor]:
    model.zero_grad()
    inputs, options = batch.arguments()
    if isinstance(model, motet.LegoBlock):
        logits = model(inputs["wsi"], statistics=options["statistics"]["wsi"])
    else:
        logits = model(inputs, statistics=options["statistics"])
    loss = measure.squares(logits, {})
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def failed_capture() -> tuple[float, float]:
    """Break captures in two ways; then draw numbers, and go on without a graph.

    A graph that is destroyed while another is captured, as Python's garbage collector does it; and
    a loss that waits for the device. In a process of its own, where nothing is captured afterwards.
    """
    model = _small("HEALNet", "cuda")
    eager = copy.deepcopy(model)
    old = [_some_graph()]

    def destroys(logits: Tensor, target: dict[str, Tensor]) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            old.clear()
        return measure.squares(logits, target)

    def waits(logits: Tensor, target: dict[str, Tensor]) -> Tensor:
        loss = measure.squares(logits, target)
        return loss * (1 if loss.item() >= 0 else -1)

    errors = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # which says that a capture failed
        for loss in (destroys, waits, measure.squares):
            graphs = motet.StepGraphs(model, loss)
            for _ in range(4):
                batch = drawn(50, 40, width=64, device="cuda")
                errors.append(_difference(graphs, eager, batch))
                torch.randn(3, device="cuda")
            if loss is waits and not graphs.fell_back:
                raise ArithmeticError(f"expected a capture that failed, got {graphs.report()}")
    if torch.cuda.current_stream() != torch.cuda.default_stream():
        raise ArithmeticError("expected the default stream, got the one of the capture")
    return max(errors), _error_floors.MODEL["float32"]


def _some_graph() -> torch.cuda.CUDAGraph:
    graph, x = torch.cuda.CUDAGraph(), torch.ones(8, device="cuda")
    with torch.cuda.graph(graph):
        x.add_(1)
    return graph
