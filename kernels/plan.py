"""Which way to compute latent-query cross-attention, decided from sizes alone."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch

from .._checks import choice
from .backends import Backend, check_backend
from .dtypes import DTYPES

Strategy = Literal["cached", "absorbed", "reference"]


@dataclass(frozen=True)
class Machine:
    """What a processor can do; the figures are rates that real products and copies reach."""

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
    overlaps: bool
    """True if products and traffic happen at the same time, as in a kernel on a GPU."""


def _gpu(name: str, half: float, single: float, bandwidth: float) -> Machine:
    """A GPU: 70 % of the matrix rate of its data sheet, 90 % of its bandwidth."""
    flops = {
        torch.bfloat16: 0.7 * half,
        torch.float16: 0.7 * half,
        torch.float32: 0.7 * single,
        torch.float64: 2e13,
    }
    return Machine(name, flops, 0.9 * bandwidth, 0.9 * bandwidth / 2, 2e12, 5e-6, True)


# Data sheets: dense bfloat16 FLOP/s, dense TF32 over the three products of one float32, bytes/s.
MACHINES = {
    "A100": _gpu("A100", 312e12, 156e12 / 3, 2.0e12),
    "H100": _gpu("H100", 989e12, 494e12 / 3, 3.35e12),
    "H200": _gpu("H200", 989e12, 494e12 / 3, 4.8e12),
    "B200": _gpu("B200", 2250e12, 1100e12 / 3, 8.0e12),
}


def cpu_machine(threads: int, amx: bool) -> Machine:
    """A server CPU, by what one Sapphire Rapids core reaches here, times the threads."""
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
        False,
    )


_AMX = torch.cpu._is_amx_tile_supported()


@dataclass(frozen=True)
class Cost:
    """What a strategy is predicted to take."""

    flop: float
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """A strategy, with its predicted cost and that of what it was chosen over.

    Args:
        strategy: "nothing", no bag has a token; "one token", its weight is 1, so V alone is
            computed; "cached", K and V of all layers by one product; "absorbed", the projections
            are taken into the queries, K and V never exist; "reference", every layer on its own,
            literally, for tests.
        backend: as asked for.
        machine: what the predictions are for.
        costs: predicted `Cost` (flop, bytes, seconds) by strategy, the chosen one's among them.
        reason: why, in a few words.

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

    @property
    def cost(self) -> Cost:
        return self.costs[self.strategy]

    def __str__(self) -> str:
        lines = [f"{self.strategy} on {self.machine}, backend {self.backend}: {self.reason}"]
        for name, cost in self.costs.items():
            mark = "*" if name == self.strategy else " "
            lines.append(
                f"{mark} {name:9} {cost.flop / 1e9:10.2f} GFLOP {cost.bytes / 1e9:8.3f} GB "
                f"{1e3 * cost.seconds:9.3f} ms predicted"
            )
        return "\n".join(lines)


class _Sizes(NamedTuple):
    tokens: int
    width: int
    bags: int
    rows: int
    """H · C"""
    inner: int
    """H · E"""
    head_dim: int
    layers: int
    sets: int
    itemsize: int


class _Extras(NamedTuple):
    training: bool
    dropout: bool
    weights: bool
    tokens_need_grad: bool


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
    device: str | torch.device | Machine = "cpu",
    training: bool = False,
    dropout: float = 0.0,
    weights: bool = False,
    tokens_need_grad: bool = False,
    strategy: Strategy | None = None,
    backend: Backend = "auto",
) -> Plan:
    """Choose how one modality of a batch is attended to in all layers of a forward pass.

    A pure function: the same sizes give the same plan. Degenerate cases come first (no token, one
    token per bag); then the strategy with the least predicted time. LayerNorm's gain and shift are
    always taken into the weights; its mean is subtracted from the tokens before a product, not
    after it, so that rows with a mean far above their standard deviation lose no digits. (It is
    taken out afterwards for bfloat16 tokens on a GPU, whose own rounding is larger than that.)

    Args:
        tokens: T, of all bags together.
        width: D + P, of a token with its position.
        bags: B.
        latents: C.
        heads: H.
        head_dim: E.
        layers: L, in which the modality is attended to.
        weight_sets: how many of these layers have weights of their own.
        longest: tokens of the longest bag, where it is known.
        dtype: of the products.
        device: "cpu", "cuda" (the GPU at hand), "A100", "H100", "H200", "B200", or a `Machine`.
        training: count the backward pass too.
        dropout: probability of dropping an attention weight.
        weights: whether the attention weights are wanted as well.
        tokens_need_grad: whether the tokens come from something that is trained.
        strategy: "cached", "absorbed" or "reference" instead of the cheapest, where there is a
            choice: degenerate cases come first.
        backend: "auto", "triton", "compile" or "eager".

    Returns:
        The plan; print it to see why.

    Raises:
        ValueError: an unknown strategy, backend or device.

    Example:
        >>> print(motet.kernels.plan(120_000, 2048, bags=8, latents=25, heads=8, head_dim=16,
        ...                          layers=2, dtype=torch.bfloat16, device="H200"))
        cached on H200, backend auto: least predicted time
        * cached        128.90 GFLOP    0.676 GB     0.230 ms predicted
          absorbed      393.64 GFLOP    2.237 GB     0.613 ms predicted
          reference     254.73 GFLOP    4.424 GB     1.068 ms predicted
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
    sizes = _Sizes(
        tokens, width, bags, heads * latents, heads * head_dim, head_dim, layers, weight_sets,
        dtype.itemsize,
    )  # fmt: skip
    if tokens == 0 or (longest is not None and longest <= 1):
        return _degenerate(sizes, machine, dtype, backend, training)
    extras = _Extras(training, bool(training and dropout), weights, tokens_need_grad)
    costs = {
        name: _seconds(work(sizes, extras), sizes, machine, dtype)
        for name, work in (("cached", _cached), ("absorbed", _absorbed), ("reference", _literal))
    }
    if strategy is not None:
        return Plan(strategy, backend, machine.name, costs, "asked for")
    faster = costs["absorbed"].seconds < costs["cached"].seconds
    best = "absorbed" if faster else "cached"
    return Plan(best, backend, machine.name, costs, "least predicted time")


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        lowest = 0 if name in ("tokens", "bags") else 1
        if value < lowest:
            raise ValueError(f"{name}: expected at least {lowest}, got {value}")


def _degenerate(
    s: _Sizes, machine: Machine, dtype: torch.dtype, backend: Backend, training: bool
) -> Plan:
    """Plan for bags of no token, or of one."""
    flop = 2.0 * s.tokens * s.width * s.inner * s.sets * (2 if training else 1)
    moved = float(s.itemsize * (s.tokens + s.inner * s.sets) * s.width)
    cost = Cost(flop, moved, flop / machine.flops[dtype] + moved / machine.bandwidth)
    if s.tokens == 0:
        return Plan("nothing", backend, machine.name, {"nothing": cost}, "no bag has a token")
    reason = "no bag has a second token"
    return Plan("one token", backend, machine.name, {"one token": cost}, reason)


def _machine(device: str | torch.device | Machine) -> Machine:
    if isinstance(device, Machine):
        return device
    device = str(device)
    if device in MACHINES:
        return MACHINES[device]
    if device not in ("cpu", "cuda"):
        known = ", ".join(map(repr, ("cpu", "cuda", *MACHINES)))
        raise ValueError(f"device: expected one of {known}, or a Machine, got {device!r}")
    return _at_hand(device)


def _at_hand(device: str) -> Machine:
    if device == "cpu":
        # torch.compile cannot ask for the threads; no choice depends on them.
        return cpu_machine(1 if torch.compiler.is_compiling() else torch.get_num_threads(), _AMX)
    if not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA device at hand, or a name such as 'H200'")
    name = torch.cuda.get_device_properties().name
    return next((machine for key, machine in MACHINES.items() if key in name), MACHINES["A100"])


class _Work(NamedTuple):
    """What a strategy does; see docs/design/algebra.md, section 1."""

    flop: float
    passes: float
    """How often the tokens are read, a normalised copy counted as a pass to write and one to read.
    """
    passes_on_gpu: float
    """The same where a chunk of tokens does not stay in a cache between two products."""
    moved: float
    """Bytes of everything else."""
    scores: float
    """Scores through the softmax, forward or backward."""
    operators: float


def _cached(s: _Sizes, e: _Extras) -> _Work:
    projection = 4.0 * s.tokens * s.width * s.inner * s.sets
    scores = float(s.tokens * s.rows * s.layers)
    attention = 4.0 * scores * s.head_dim
    kv = 2.0 * s.tokens * s.inner * s.itemsize
    flop, passes, moved = projection + attention, 1.0, kv * (s.sets + s.layers)
    if e.training:  # scores again, then four products; dK and dV of every layer are summed
        flop += projection * (2 if e.tokens_need_grad else 1) + 2.5 * attention
        passes, moved = 2.0, 2 * moved + kv * (2 * s.layers + s.sets)
    return _with_extras(_Work(flop, passes, passes, moved, scores, 8.0 * s.layers), s, e)


def _absorbed(s: _Sizes, e: _Extras) -> _Work:
    products = 4.0 * s.tokens * s.width * s.rows * s.layers
    small = 4.0 * s.bags * s.rows * s.head_dim * s.width * s.layers  # into and out of the queries
    scores = float(s.tokens * s.rows * s.layers)
    # Queries and pooled tokens are as wide as tokens: short bags lose what long ones gain.
    wide = 6.0 * s.bags * s.rows * s.width * s.itemsize * s.layers
    flop, passes, moved = products + small, float(s.layers), 4.0 * scores + wide
    if e.training:
        flop += products * (2 if e.tokens_need_grad else 1) + 2 * small
        passes, moved = 2 * passes, 2 * moved + wide
    return _with_extras(_Work(flop, passes, 2 * passes, moved, scores, 8.0 * s.layers), s, e)


def _literal(s: _Sizes, e: _Extras) -> _Work:
    work = _cached(s._replace(sets=s.layers), e._replace(tokens_need_grad=True))
    passes = 8.5 * s.layers / 2 * (2 if e.training else 1)  # counted in the authors' code
    return work._replace(passes=passes, passes_on_gpu=passes)


def _with_extras(work: _Work, s: _Sizes, e: _Extras) -> _Work:
    scores = work.scores * (3 if e.training else 1) * (1.5 if e.dropout else 1)
    moved = work.moved
    if e.weights:
        scores, moved = scores + work.scores, moved + work.scores * s.itemsize
    operators = work.operators * (2.5 if e.training else 1)
    return work._replace(scores=scores, moved=moved, operators=operators)


def _seconds(work: _Work, s: _Sizes, machine: Machine, dtype: torch.dtype) -> Cost:
    products = work.flop / machine.flops[dtype]
    if machine.overlaps:
        read = work.passes_on_gpu * s.tokens * s.width * s.itemsize
        moved = work.moved + read
        busy = max(products, moved / machine.bandwidth) + work.scores / machine.scores
        return Cost(work.flop, moved, busy + machine.launch * work.operators / 4)
    elements = work.passes * s.tokens * s.width
    busy = products + elements / machine.rows + work.moved / machine.bandwidth
    busy += work.scores / machine.scores + machine.launch * work.operators
    return Cost(work.flop, work.moved + elements * s.itemsize, busy)
