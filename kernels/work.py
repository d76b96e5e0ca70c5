"""What each way to attend multiplies and moves, from sizes alone; see docs/design/algebra.md."""

from dataclasses import dataclass
from typing import NamedTuple


class Sizes(NamedTuple):
    """One modality of a batch, and the layers that attend to it."""

    tokens: int
    width: int
    bags: int
    latents: int
    heads: int
    head_dim: int
    layers: int
    sets: int
    itemsize: int
    training: bool = False
    dropout: bool = False
    weights: bool = False
    tokens_need_grad: bool = False
    statistics: bool = False

    @property
    def rows(self) -> int:
        """H · C"""
        return self.heads * self.latents

    @property
    def inner(self) -> int:
        """H · E"""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Cost:
    """What a strategy is predicted to take."""

    flop: float
    """Of the products, without what blocks compute in vain."""
    bytes: float
    """Read from memory and written to it."""
    seconds: float
    """As operators start one after the other: eager mode."""
    graph_seconds: float
    """As one CUDA graph; on a CPU the same as `seconds`."""
    host_seconds: float
    """That Python needs to start the operators."""
    launches: int
    """Kernels that a GPU starts, or operators of a CPU."""


class Work(NamedTuple):
    """What a strategy does."""

    flop: float
    passes: float
    """How often the tokens are read, a normalised copy counted as a pass to write and one to read.
    """
    moved: float
    """Bytes of everything else."""
    scores: float
    """Scores through the softmax, forward or backward."""
    operators: float


def cached(s: Sizes) -> Work:
    """K and V of all layers by one product."""
    projection = 4.0 * s.tokens * s.width * s.inner * s.sets
    scores = float(s.tokens * s.rows * s.layers)
    attention = 4.0 * scores * s.head_dim
    kv = 2.0 * s.tokens * s.inner * s.itemsize
    flop, passes, moved = projection + attention, 1.0, kv * (s.sets + s.layers)
    if s.training:  # scores again, then four products; dK and dV of every layer are summed
        flop += projection * (2 if s.tokens_need_grad else 1) + 2.5 * attention
        passes, moved = 2.0, 2 * moved + kv * (2 * s.layers + s.sets)
    return _with_extras(Work(flop, passes, moved, scores, 8.0 * s.layers), s)


def absorbed(s: Sizes) -> Work:
    """The projections are taken into the queries."""
    products = 4.0 * s.tokens * s.width * s.rows * s.layers
    small = 4.0 * s.bags * s.rows * s.head_dim * s.width * s.layers  # into and out of the queries
    scores = float(s.tokens * s.rows * s.layers)
    # Queries and pooled tokens are as wide as tokens: short bags lose what long ones gain.
    wide = 6.0 * s.bags * s.rows * s.width * s.itemsize * s.layers
    flop, passes, moved = products + small, float(s.layers), 4.0 * scores + wide
    if s.training:
        flop += products * (2 if s.tokens_need_grad else 1) + 2 * small
        passes, moved = 2 * passes, 2 * moved + wide
    return _with_extras(Work(flop, passes, moved, scores, 8.0 * s.layers), s)


def literal(s: Sizes) -> Work:
    """Every layer on its own."""
    work = cached(s._replace(sets=s.layers, tokens_need_grad=True))
    passes = 8.5 * s.layers / 2 * (2 if s.training else 1)  # counted in the authors' code
    return work._replace(passes=passes)


def _with_extras(work: Work, s: Sizes) -> Work:
    scores = work.scores * (3 if s.training else 1) * (1.5 if s.dropout else 1)
    moved = work.moved
    if s.weights:
        scores, moved = scores + work.scores, moved + work.scores * s.itemsize
    operators = work.operators * (2.5 if s.training else 1)
    return work._replace(scores=scores, moved=moved, operators=operators)
