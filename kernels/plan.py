"""The planner: it chooses the strategy of latent-query cross-attention, from sizes alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from .._checks import choice
from .backends import Backend, check_backend
from .chips import CHIPS, Chip
from .dtypes import DTYPES
from .gpu_cost import gpu_costs, single_cost
from .work import Cost, Sizes, Work, absorbed, cached, literal

Strategy = Literal["cached", "absorbed", "reference"]


@dataclass(frozen=True)
class Machine:
    """What a CPU can do: rates that real products and copies reach."""

    name: str
    flops: dict[torch.dtype, float]
    """FLOP/s of matrix products, by the dtype of the operands."""
    bandwidth: float
    """Bytes/s of main memory, as read by the kernels."""
    rows: float
    """Float32 numbers/s that are normalised on their way into a product."""
    scores: float
    """Attention scores/s through the softmax, forward."""
    launch: float
    """Seconds to start one operator."""


def cpu_machine(threads: int, amx: bool) -> Machine:
    """Return a server CPU: rates measured on one Sapphire Rapids core, times the threads.

    They are round numbers, measured when the planner was written. Without AMX, bfloat16 is no
    faster than float32, and float16 ten times slower.
    """
    single = 1.3e11
    half = 7e11 if amx else 1e11
    flops = {
        torch.float32: single,
        torch.float64: single / 2,
        torch.bfloat16: half,
        torch.float16: half if amx else single / 10,
    }
    return Machine(
        f"CPU, {threads} thread{'s' * (threads > 1)}{', AMX' * amx}",
        {dtype: threads * rate for dtype, rate in flops.items()},
        threads * 8e9,
        threads * 1.2e9,
        threads * 2e8,
        1e-5,
    )


_AMX = torch.cpu._is_amx_tile_supported()


@dataclass(frozen=True)
class Plan:
    """The chosen strategy, with its predicted cost and those of the other strategies.

    Args:
        strategy: "nothing": no bag has a token. "one token": no bag has a second one; the weight of
            a single token is 1, so only V is computed. "cached": K and V of all layers by one
            product. "absorbed": the projections are multiplied into the queries, and K and V are
            not computed. "reference": the equation as it stands, layer after layer, for tests.
        backend: the argument of `plan`.
        machine: the name of the CPU or GPU that the predictions are for.
        costs: predicted `Cost` by strategy, the chosen one's among them: flop, bytes, seconds,
            graph_seconds, host_seconds, launches.
        reason: why this strategy, in a few words.
        graph: whether the time of a CUDA graph decided, not that of eager mode.
        one_product: whether K and V of all bags come from one product, not from one per bag: for
            short bags. A bag's last bits then depend on the other bags of its batch. For
            "cached" and "nothing"; the other strategies have no such product.
        by_torch: whether torch's own operators carry the strategy out, for short bags on a CPU;
            if it is "absorbed", for bags of one length only, which `plan` does not know.

    Example:
        >>> chosen = motet.kernels.plan(300, 64, bags=4, latents=5, heads=2, head_dim=8, layers=2,
        ...                             longest=1, device="A100")
        >>> chosen.strategy, chosen.reason
        ('one token', 'no bag has a second token')
        >>> chosen.cost.flop
        614400.0
    """

    strategy: Literal["nothing", "one token", "cached", "absorbed", "reference"]
    backend: Backend
    machine: str
    costs: dict[str, Cost]
    reason: str
    graph: bool = False
    one_product: bool = False
    by_torch: bool = False

    @property
    def cost(self) -> Cost:
        """The predicted cost of the chosen strategy."""
        return self.costs[self.strategy]

    @property
    def seconds(self) -> float:
        """The predicted time that decided: as a graph if `graph`, else in eager mode."""
        return self.cost.graph_seconds if self.graph else self.cost.seconds

    def __str__(self) -> str:
        lines = [f"{self.strategy} on {self.machine}, backend {self.backend}: {self.reason}"]
        for name, cost in self.costs.items():
            mark = "*" if name == self.strategy else " "
            line = (
                f"{mark} {name:9} {cost.flop / 1e9:10.2f} GFLOP {cost.bytes / 1e9:8.3f} GB "
                f"{1e3 * cost.seconds:9.3f} ms predicted"
            )
            if self.machine in CHIPS:
                line += f"; graph {1e3 * cost.graph_seconds:.3f}, {cost.launches} launches"
            lines.append(line)
        return "\n".join(lines)


# Bags of fewer tokens on average are short. With one product per bag, bags of 50 patches take twice
# the time of one product for all, most of it to read the weights again. On a CPU such products are
# so small that a call of motet's operators takes longer than the product (measured on two cores).
SHORT_BAG = 256

_for_graphs = False


@contextmanager
def for_graphs() -> Iterator[None]:
    """Make `plan` choose for a CUDA graph: during a capture, and the warm-up runs before it."""
    global _for_graphs
    former, _for_graphs = _for_graphs, True
    try:
        yield
    finally:
        _for_graphs = former


def plan(
    tokens: int,
    width: int,
    *,
    bags: int,
    latents: int,
    heads: int,
    head_dim: int,
    layers: int,
    weight_sets: int = 1,
    longest: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | Machine | Chip = "cpu",
    training: bool = False,
    dropout: float = 0.0,
    weights: bool = False,
    tokens_need_grad: bool = False,
    statistics: bool = False,
    graph: bool | None = None,
    strategy: Strategy | None = None,
    backend: Backend = "auto",
) -> Plan:
    """Choose how all layers of a forward pass attend to one modality of a batch.

    A pure function: the same sizes give the same plan. If no bag has a token, or none a second one,
    there is nothing to choose. Otherwise it is the strategy with the least predicted time. On a GPU
    that is the time of all kernels of a pass, with those between the attentions, and for a training
    step with the loss and Adam: in eager mode, where Python starts one kernel after the other, or
    as a CUDA graph if `graph`. docs/design/algebra.md describes the strategies and the prediction.

    Args:
        tokens: T, of all bags together.
        width: D + P, of a token with its position.
        bags: B.
        latents: C.
        heads: H.
        head_dim: E.
        layers: L, the layers that attend to the modality.
        weight_sets: how many of these layers have weights of their own; 1 if all share them.
        longest: tokens of the longest bag; None if not known.
        dtype: of the products.
        device: "cpu", "cuda" (the current GPU), "A100", "H100", "H200", "B200", a `Machine` or a
            `Chip`.
        training: count the backward pass too.
        dropout: probability of dropping an attention weight.
        weights: whether the attention weights are returned as well.
        tokens_need_grad: whether the tokens need a gradient, as those of a trained encoder do.
        statistics: whether the means and 1 / SDs of the tokens are known; else a GPU reads the
            tokens once more for them.
        graph: whether to choose for a CUDA graph, not for eager mode; None: during a capture only.
        strategy: "cached", "absorbed" or "reference": takes this one instead of the fastest, if
            some bag has a second token; None for the fastest.
        backend: "auto", "triton", "compile" or "eager".

    Returns:
        The plan; print it to see why.

    Raises:
        ValueError: an unknown strategy, backend or device.

    Example:
        >>> print(motet.kernels.plan(120_000, 2048, bags=8, latents=25, heads=8, head_dim=16,
        ...                          layers=2, dtype=torch.bfloat16, device="H200"))
        cached on H200, backend auto: least predicted time
        * cached        128.90 GFLOP    1.167 GB     2.072 ms predicted; graph 0.515, 16 launches
          absorbed      393.64 GFLOP    3.208 GB     2.701 ms predicted; graph 1.461, 24 launches
          reference     254.73 GFLOP    4.393 GB     5.177 ms predicted; graph 2.326, 77 launches
    """
    choice("strategy", strategy, (None, *get_args(Strategy)))
    check_backend(backend)
    machine = _machine(device)
    _check_sizes(
        tokens=tokens, width=width, bags=bags, latents=latents, heads=heads, head_dim=head_dim,
        layers=layers, weight_sets=weight_sets,
    )  # fmt: skip
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected {' or '.join(map(str, DTYPES))}, got {dtype}")
    graph = _for_graphs if graph is None else graph
    sizes = Sizes(
        tokens, width, bags, latents, heads, head_dim, layers, weight_sets, dtype.itemsize,
        training, bool(training and dropout), weights, tokens_need_grad, statistics,
    )  # fmt: skip
    if tokens == 0 or (longest is not None and longest <= 1):
        return _degenerate(sizes, machine, dtype, backend, graph)
    on_gpu = isinstance(machine, Chip)
    costs = gpu_costs(sizes, machine, dtype) if on_gpu else _cpu_costs(sizes, machine, dtype)
    short = tokens < SHORT_BAG * bags
    if strategy is not None:
        reason = "set by strategy="
        return Plan(strategy, backend, machine.name, costs, reason, graph, one_product=short)
    faster = _time(costs["absorbed"], graph) < _time(costs["cached"], graph)
    best = "absorbed" if faster else "cached"
    # K and V by torch normalise all tokens for each set of weights; ours fold the LayerNorm into
    # the 2·H·E rows of its weights: torch's way pays while the tokens are fewer than these rows.
    pays = best == "absorbed" or tokens <= 2 * heads * head_dim
    by_torch = short and pays and not on_gpu and backend != "triton"
    reason = "least predicted time"
    return Plan(best, backend, machine.name, costs, reason, graph, short, by_torch)


def _time(cost: Cost, graph: bool) -> float:
    """Return the predicted time that decides."""
    return cost.graph_seconds if graph else cost.seconds


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        lowest = 0 if name in ("tokens", "bags") else 1
        if value < lowest:
            raise ValueError(f"{name}: expected at least {lowest}, got {value}")


def _degenerate(
    s: Sizes, machine: Machine | Chip, dtype: torch.dtype, backend: Backend, graph: bool
) -> Plan:
    """Return the plan for bags of at most one token."""
    if isinstance(machine, Chip):
        cost = single_cost(s, machine, dtype)
    else:
        flop = 2.0 * s.tokens * s.width * s.inner * s.sets * (2 if s.training else 1)
        moved = float(s.itemsize * (s.tokens + s.inner * s.sets) * s.width)
        seconds = flop / machine.flops[dtype] + moved / machine.bandwidth
        cost = Cost(flop, moved, seconds, seconds, machine.launch, 1)
    if s.tokens == 0:
        reason = "no bag has a token"
        costs = {"nothing": cost}
        return Plan("nothing", backend, machine.name, costs, reason, graph, one_product=True)
    reason = "no bag has a second token"
    return Plan("one token", backend, machine.name, {"one token": cost}, reason, graph)


def _machine(device: str | torch.device | Machine | Chip) -> Machine | Chip:
    if isinstance(device, Machine | Chip):
        return device
    device = str(device)
    if device in CHIPS:
        return CHIPS[device]
    if device not in ("cpu", "cuda"):
        names = ", ".join(map(repr, ("cpu", "cuda", *CHIPS)))
        raise ValueError(f"device: expected one of {names}, a Machine or a Chip, got {device!r}")
    return _current(device)


def _current(device: str) -> Machine | Chip:
    """Return this machine's CPU or GPU; an A100 for a GPU that chips.py does not list."""
    if device == "cpu":
        # torch.compile cannot trace get_num_threads; no choice depends on it.
        return cpu_machine(1 if torch.compiler.is_compiling() else torch.get_num_threads(), _AMX)
    if not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA device at hand, or a name such as 'H200'")
    name = torch.cuda.get_device_properties().name
    return next((chip for key, chip in CHIPS.items() if key in name), CHIPS["A100"])


def _cpu_costs(s: Sizes, machine: Machine, dtype: torch.dtype) -> dict[str, Cost]:
    works = {"cached": cached(s), "absorbed": absorbed(s), "reference": literal(s)}
    return {name: _cpu_cost(work, s, machine, dtype) for name, work in works.items()}


def _cpu_cost(work: Work, s: Sizes, machine: Machine, dtype: torch.dtype) -> Cost:
    """Return the cost of work on a CPU, which does one thing at a time: the times add up."""
    elements = work.passes * s.tokens * s.width
    busy = work.flop / machine.flops[dtype] + elements / machine.rows
    busy += work.moved / machine.bandwidth + work.scores / machine.scores
    started = machine.launch * work.operators
    moved = work.moved + elements * s.itemsize
    return Cost(work.flop, moved, busy + started, busy + started, started, int(work.operators))
