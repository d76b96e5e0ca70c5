"""The predicted time of a pass on a GPU: its kernels' launches, and their times added up.

The launches are those of HEALNet with one modality: a forward pass, or a training step with its
loss and Adam. python_tests/test_launch_counts.py counts the launches of real passes, without a GPU,
and compares them with these. Times of a launch come from `Chip` (chips.py).
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from .chips import Chip
from .context_kv.blocks import padded_columns, pool_chunk
from .work import Cost, Sizes, absorbed, cached, literal


class Launch(NamedTuple):
    """Launches of one kernel; the numbers are those of one launch."""

    kernel: str
    times: int
    """How many launches."""
    bytes: float = 0.0
    flop: float = 0.0
    """As executed: with those of the padding of blocks."""
    scores: float = 0.0
    """Exponentials."""
    drawn: float = 0.0
    """Dropout decisions."""
    large: bool = False
    """Whether its time depends on the number of tokens; what follows the last such one is short."""

    def least(self, chip: Chip, dtype: torch.dtype) -> float:
        """Return the seconds of one launch at the roofline, the least that the chip allows."""
        return max(
            self.bytes / chip.bandwidth, self.flop / chip.matrix[dtype],
            self.scores / chip.exponentials,
        )  # fmt: skip

    def seconds(self, chip: Chip, dtype: torch.dtype) -> float:
        """Return the predicted seconds of one launch, in a CUDA graph or behind another launch."""
        fixed = chip.latencies.get(self.kernel, chip.launch_s)
        least = self.least(chip, dtype) / chip.share(self.kernel)
        return fixed + least + self.drawn / chip.random_numbers


class Times(NamedTuple):
    """Seconds of a pass."""

    eager: float
    graph: float
    host: float
    launches: int


def times_of(launches: Iterable[Launch], chip: Chip, dtype: torch.dtype) -> Times:
    """Return the time of launches in this order.

    In a graph their times add up. In eager mode Python starts the launches while the GPU runs
    earlier ones; when Python is done, the GPU still has the last large kernel to run. So the time
    is max(host, graph - last) + last.
    """
    graph, last, count = 0.0, 0.0, 0
    for each in launches:
        seconds = each.seconds(chip, dtype)
        graph += each.times * seconds
        count += each.times
        if each.large:
            last = seconds
    host = chip.host_s + chip.host_launch_s * count
    return Times(max(host, graph - last) + last, graph, host, count)


def gpu_costs(s: Sizes, chip: Chip, dtype: torch.dtype) -> dict[str, Cost]:
    """Return the cost of every strategy."""
    return {
        "cached": _cost(_cached(s, chip), cached(s).flop, chip, dtype),
        "absorbed": _cost(_absorbed(s, chip), absorbed(s).flop, chip, dtype),
        "reference": _cost(_literal(s), literal(s).flop, chip, dtype),
    }


def launches_of(strategy: str, s: Sizes, chip: Chip) -> list[Launch]:
    """Return the launches of the strategy "cached", "absorbed" or "reference"."""
    if strategy == "reference":
        return _literal(s)
    return _cached(s, chip) if strategy == "cached" else _absorbed(s, chip)


def single_cost(s: Sizes, chip: Chip, dtype: torch.dtype) -> Cost:
    """Return the cost of bags of at most one token: their values, and the kernels of latents."""
    flop = 2.0 * s.tokens * s.width * s.inner * s.sets * (2 if s.training else 1)
    moved = float(s.itemsize * (s.tokens + s.inner * s.sets) * s.width)
    launches = [*_latents(s), Launch("mm", 2 if s.training else 1, moved, flop, large=True)]
    return _cost(launches, flop, chip, dtype)


def _cost(launches: list[Launch], flop: float, chip: Chip, dtype: torch.dtype) -> Cost:
    times = times_of(launches, chip, dtype)
    moved = sum(each.times * each.bytes for each in launches)
    return Cost(flop, moved, times.eager, times.graph, times.host, times.launches)


def _latents(s: Sizes, sums: int = 0, joins: int = 0) -> list[Launch]:
    """Return the launches on latents and weights: between attentions, the head, and torch's own.

    Args:
        sums: additions of gradients for every layer whose weights another layer has too.
        joins: concatenations or stacks of tensors in a training step.
    """
    launches = [
        Launch("pass_kernel", s.layers + 1), Launch("fold_kernel", s.sets),
        Launch("head_kernel", 1),
        # torch concatenates weights and shifts, counts rows, and draws seeds of dropout.
        Launch("torch", 2 * s.sets + 2 + s.dropout),
    ]  # fmt: skip
    if s.training:
        launches += [
            Launch("gradients_kernel", s.layers + 1), Launch("update_backward_kernel", s.layers),
            Launch("query_backward_kernel", s.layers), Launch("fold_backward_kernel", s.sets),
            Launch("head_backward_kernel", 1),
            # The loss, its gradient, Adam, sums of gradients.
            Launch("torch", 8 + sums * (s.layers - s.sets) + joins),
        ]  # fmt: skip
    return launches


def _product(s: Sizes, outputs: int, rows: int, width: int, chip: Chip) -> float:
    """Return the FLOP of a product with the tokens whose programs have `rows` rows and `width`.

    At least those of one program on each multiprocessor: no product takes less time than one of its
    programs.
    """
    padded = padded_columns(outputs, chip.capability)
    program = 2.0 * rows * width * min(padded, 256)
    return max(2.0 * s.tokens * s.width * padded, chip.multiprocessors * program)


def _statistics(s: Sizes) -> list[Launch]:
    if s.statistics:
        return []
    return [Launch("row_statistics_kernel", 1, s.tokens * s.width * s.itemsize)]


def _blocks(latents: int) -> int:
    """Return how many latents of a head are computed, with the padding of blocks.

    A block is a power of 2 from 16 to 64; more latents take several blocks of 64.
    """
    return max(16, 1 << (latents - 1).bit_length()) if latents <= 64 else -(-latents // 64) * 64


def _cached(s: Sizes, chip: Chip) -> list[Launch]:
    """Return the launches with K and V of all layers by one product, and so their gradients."""
    x = float(s.tokens * s.width * s.itemsize)
    kv_width = 2 * s.heads * (-(-s.head_dim // 16) * 16)  # K and V, heads padded to 16 channels
    columns = kv_width * s.sets
    kv = float(s.tokens * kv_width * s.itemsize)
    rows = s.tokens * s.heads * _blocks(s.latents)
    score = 1.0 * rows * kv_width / s.heads  # FLOP of one product with K or V
    drawn = float(s.tokens * s.rows) if s.dropout else 0.0
    product = 2.0 * s.tokens * s.width
    several = s.sets > 1  # then torch stacks their weights and shifts
    launches = [
        *_latents(s, 2, several + (s.layers > s.sets)), *_statistics(s),
        Launch("torch", 2 * several), Launch("centre_weights_kernel", 1),
        Launch("project_kernel", 1, x + kv * s.sets,
               _product(s, columns, 128, s.width, chip), large=True),
        Launch("combine_attend_kernel", s.layers),
        Launch("attend_kernel", s.layers, kv, 2 * score, rows, drawn, True),
    ]  # fmt: skip
    if s.weights:
        written = float(s.tokens * s.rows * s.itemsize)
        launches.append(Launch("weights_kernel", s.layers, kv / 2 + written, score, rows))
    if s.training:
        shared_by = s.layers / s.sets  # layers that attend to the same K and V
        launches += [
            Launch("combine_dq_kernel", s.layers),
            Launch("dq_kernel", s.layers, kv, 3 * score, rows, drawn),
            Launch("dkv_kernel", s.sets, 2 * kv, 4 * score * shared_by, rows * shared_by,
                   drawn * shared_by),
            Launch("scale_gradient_kernel", 1, 2 * kv * s.sets), Launch("combine_pool_kernel", 1),
            Launch("mm", 1, x + kv * s.sets, product * columns, large=True),
        ]  # fmt: skip
        if s.tokens_need_grad:
            launches.append(Launch("mm", 1, 2 * x + kv * s.sets, product * columns, large=True))
    return launches


def _absorbed(s: Sizes, chip: Chip) -> list[Launch]:
    """Return the launches with absorbed queries, as wide as the tokens, in every layer."""
    passes = 2 * s.layers if s.training else s.layers
    x, scores = float(s.tokens * s.width * s.itemsize), float(s.tokens * s.rows * s.itemsize)
    scored = _product(s, s.rows, 128, s.width, chip)
    heads = 2.0 * s.bags * s.rows * s.head_dim * s.width  # FLOP of one product of the heads
    # Bytes of absorbed queries, or of pooled tokens, and of the heads' weights.
    wide = float(s.bags * s.rows * s.width * s.itemsize + s.inner * s.width * s.itemsize)
    chunk = pool_chunk(s.rows)
    partial = 4.0 * (s.tokens // chunk + s.bags) * s.rows * s.width
    pooled = _product(s, s.rows, min(chunk, -(-s.tokens // s.bags)), min(s.width, 256), chip)
    count, drawn = float(s.tokens * s.rows), float(s.tokens * s.rows) if s.dropout else 0.0
    launches = [
        *_latents(s, 4), *_statistics(s),
        Launch("to_tokens_kernel", passes, wide, heads),
        Launch("project_kernel", passes, x + scores, scored),
        Launch("softmax_statistics_kernel", s.layers, scores, 0.0, count),
        Launch("softmax_weights_kernel", s.layers, 2 * scores, 0.0, count, drawn),
        Launch("combine_pool_kernel", passes, partial),
        Launch("to_heads_kernel", passes, wide, heads),
        Launch("pool_kernel", passes, x + scores + partial, pooled, large=True),
    ]  # fmt: skip
    if s.weights:
        launches.append(Launch("torch", s.layers, 2 * scores))
    if s.training:
        launches += [
            Launch("softmax_gradient_kernel", s.layers, 3 * scores, 0.0, count, drawn),
            Launch("head_gradients_kernel", s.layers, 2 * wide, 2 * heads),
        ]  # fmt: skip
        if s.tokens_need_grad:
            launches.append(Launch("mm", 2 * s.layers, 2 * x + scores, scored, large=True))
    return launches


def _literal(s: Sizes) -> list[Launch]:
    """Return the launches of the equation in torch's operators, as in the authors' code."""
    x, kv = float(s.tokens * s.width), 2.0 * s.tokens * s.inner
    rows = s.tokens * s.rows
    product, score = 2.0 * s.tokens * s.width * 2 * s.inner, 2.0 * rows * s.head_dim
    step = 2 if s.training else 1
    launches = [
        # The tokens are normalised in float32, and cast.
        Launch("torch", s.sets * step, x * (2 * s.itemsize + 8)),
        Launch("mm", s.sets * (3 if s.training else 1), (x + kv) * s.itemsize, product),
        Launch("mm", 2 * s.layers * (3 if s.training else 1), (kv / 2 + rows) * s.itemsize, score),
        Launch("torch", s.layers * step, rows * (2 * s.itemsize + 8), 0.0, rows,
               float(rows) if s.dropout else 0.0, True),
    ]  # fmt: skip
    if s.weights:
        launches.append(Launch("torch", s.layers, rows * s.itemsize))
    # Counted on an H200 in models of 2 and 5 layers: a line through the two counts.
    total = 78 + 69 * s.layers if s.training else 31 + 23 * s.layers
    counted = sum(each.times for each in launches)
    return [*launches, Launch("torch", max(0, total - counted))]
