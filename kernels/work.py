"""What each strategy multiplies and moves, from sizes alone; docs/design/algebra.md derives it."""

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
    """Layers that have weights of their own; 1 if all share them."""
    itemsize: int
    """Bytes of a number."""
    training: bool = False
    dropout: bool = False
    weights: bool = False
    """Whether the attention weights are returned too."""
    tokens_need_grad: bool = False
    statistics: bool = False
    """Whether the means and 1 / SDs of the tokens are known."""

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
    """The predicted cost of a strategy."""

    flop: float
    """Of the products, without the padding of blocks."""
    bytes: float
    """Read from memory and written to it."""
    seconds: float
    """In eager mode, where Python starts one operator after the other."""
    graph_seconds: float
    """As one CUDA graph; on a CPU the same as `seconds`."""
    host_seconds: float
    """Seconds that Python takes to start the operators."""
    launches: int
    """Kernels that a GPU runs, or operators of a CPU."""


class Work(NamedTuple):
    """What a strategy multiplies, reads and writes in a pass; the time on a CPU follows from it."""

    flop: float
    passes: float
    """How often the tokens are read. A normalised copy counts twice: it is written and read."""
    moved: float
    """Bytes of everything else."""
    scores: float
    """Scores that go through a softmax, forward or backward."""
    operators: float
    """Operators of torch that are started."""


# Operators of torch that a layer starts in a forward pass: an estimate.
_OPERATORS = 8.0


def cached(s: Sizes) -> Work:
    """Return the work with K and V of all layers by one product."""
    projection = 4.0 * s.tokens * s.width * s.inner * s.sets
    scores = float(s.tokens * s.rows * s.layers)
    attention = 4.0 * scores * s.head_dim
    kv = 2.0 * s.tokens * s.inner * s.itemsize
    flop, passes, moved = projection + attention, 1.0, kv * (s.sets + s.layers)
    # Backward, the attention computes the scores again and four products: 2.5 times the two
    # products of the forward pass. dK and dV of all layers are added up.
    if s.training:
        flop += projection * (2 if s.tokens_need_grad else 1) + 2.5 * attention
        passes, moved = 2.0, 2 * moved + kv * (2 * s.layers + s.sets)
    return _with_extras(Work(flop, passes, moved, scores, _OPERATORS * s.layers), s)


def absorbed(s: Sizes) -> Work:
    """Return the work with the projections multiplied into the queries."""
    products = 4.0 * s.tokens * s.width * s.rows * s.layers
    small = 4.0 * s.bags * s.rows * s.head_dim * s.width * s.layers  # into and out of the queries
    scores = float(s.tokens * s.rows * s.layers)
    # Absorbed queries and pooled tokens are as wide as the tokens: for a short bag they are more
    # numbers than its tokens. A layer writes or reads some six tensors of this size: an estimate.
    wide = 6.0 * s.bags * s.rows * s.width * s.itemsize * s.layers
    flop, passes, moved = products + small, float(s.layers), 4.0 * scores + wide
    if s.training:
        flop += products * (2 if s.tokens_need_grad else 1) + 2 * small
        passes, moved = 2 * passes, 2 * moved + wide
    return _with_extras(Work(flop, passes, moved, scores, _OPERATORS * s.layers), s)


def literal(s: Sizes) -> Work:
    """Return the work of the equation as the authors' code computes it, layer after layer."""
    work = cached(s._replace(sets=s.layers, tokens_need_grad=True))
    # Counted in the authors' code, with two layers: a forward pass reads or writes the tokens 8.5
    # times, a training step 17.3 times.
    passes = 8.5 * s.layers / 2 * (2 if s.training else 1)
    return work._replace(passes=passes)


def _with_extras(work: Work, s: Sizes) -> Work:
    """Return the work with training, dropout and returned weights added.

    The factors are estimates: a score costs twice as much backward as forward, a dropout decision
    half a score, and a backward pass starts one and a half times the operators of a forward pass.
    """
    scores = work.scores * (3 if s.training else 1) * (1.5 if s.dropout else 1)
    moved = work.moved
    if s.weights:
        scores, moved = scores + work.scores, moved + work.scores * s.itemsize
    operators = work.operators * (2.5 if s.training else 1)
    return work._replace(scores=scores, moved=moved, operators=operators)
