"""The launches of revision 7918d87, with whose kernels the first times on an H200 were measured.

For benchmarks/fit_planner.py alone. Delete it with gpu-cells-NVIDIA-H200-7918d87.json when the
kernels that kernels/gpu_cost.py lists have been measured.
"""

from typing import NamedTuple

from motet.cli.measure import Cell
from motet.kernels.chips import Chip
from motet.kernels.gpu_cost import Launch

REVISION = "7918d87"


class Profiled(NamedTuple):
    """A launch on 8 bags of 15,000 patches in bfloat16, and its time by a profiler."""

    launch: Launch
    seconds: float


_X, _T, _W = 2.0 * 120_000 * 2048, 120_000, 2048
PROFILE = (
    # BLCA with 256 columns of K and V; UCEC with 128 queries.
    Profiled(Launch("_project", 1, _X + 2 * _T * 256, 2.0 * _T * _W * 256), 290e-6),
    Profiled(Launch("_project", 1, _X + 2 * _T * 128, 2.0 * _T * _W * 128), 171e-6),
    Profiled(Launch("_pool", 1, 0.0, 2.0 * _T * _W * 256), 2358e-6),
    Profiled(Launch("_pool", 1, 0.0, 2.0 * _T * _W * 128), 1370e-6),
    Profiled(Launch("_attend", 1, 2.0 * _T * 256), 44e-6),
    Profiled(Launch("_attend_backward", 1, 4.0 * _T * 256), 88e-6),
    Profiled(Launch("_softmax", 1, 6.0 * _T * 128), 47e-6),
)
# In no profile: torch's operators on queries that are as wide as tokens.
FITTED = ("queries",)


def launches(cell: Cell, strategy: str, chip: Chip) -> list[Launch]:
    """Return the launches of a forward pass, or of a training step without Adam."""
    kernels = _cached(cell, chip) if strategy == "cached" else _absorbed(cell, chip)
    # All launches: a straight line through the profiler's counts at depths 2 and 5.
    depth, step = cell.config.depth, cell.step
    if strategy == "cached":
        started = 66 + 70 * depth if step else 27 + 22 * depth
    else:
        started = 53 + 131 * depth if step else 25 + 38 * depth
    return [*kernels, Launch("torch", started - sum(kernel.times for kernel in kernels))]


def _cached(cell: Cell, chip: Chip) -> list[Launch]:
    c, tokens = cell.config, sum(cell.lengths)
    columns = 2 * c.heads * (-(-c.head_dim // 16) * 16)
    kv = 2.0 * tokens * columns
    drawn = float(tokens * c.heads * c.latents) * (cell.step and cell.dropout > 0)
    kernels = [
        _project(cell, columns, 1, chip),
        Launch("_attend", c.depth, kv, drawn=drawn, large=True),
    ]
    if cell.step:
        kernels += [
            Launch("_attend_backward", c.depth, 2 * kv, drawn=drawn),
            # torch adds up dK and dV of the layers, at the share of the roofline of the kernels.
            Launch("_attend_backward", c.depth - 1, 3 * kv),
            _pool(cell, columns, (tokens,), 1, chip),
        ]
    return kernels


def _absorbed(cell: Cell, chip: Chip) -> list[Launch]:
    c, tokens = cell.config, sum(cell.lengths)
    passes = 2 * c.depth if cell.step else c.depth
    count = float(tokens * c.heads * c.latents)
    drawn = count * (cell.step and cell.dropout > 0)
    queries = 2.0 * len(cell.lengths) * c.heads * c.latents * cell.width
    kernels = [
        Launch("queries", c.depth * (3 if cell.step else 1), queries),
        _project(cell, c.heads * c.latents, passes, chip),
        Launch("_softmax", c.depth, 6 * count, drawn=drawn),
        _pool(cell, c.heads * c.latents, cell.lengths, passes, chip),
    ]
    if cell.step:
        kernels.append(Launch("_softmax", c.depth, 6 * count, drawn=drawn))
    return kernels


def _project(cell: Cell, columns: int, times: int, chip: Chip) -> Launch:
    tokens = sum(cell.lengths)
    block, blocks = _blocks(columns, 256)
    flop = 2.0 * cell.width * block * max(tokens * blocks, chip.multiprocessors * 128)
    return Launch("_project", times, 2.0 * tokens * (cell.width + columns), flop, large=True)


def _pool(cell: Cell, columns: int, bags: tuple[int, ...], times: int, chip: Chip) -> Launch:
    """Return the launch of the pooling kernel; its FLOP bound it at any width, not its bytes."""
    tokens = sum(cell.lengths)
    block, blocks = _blocks(columns, 128)
    chunk = max(512, min(16384, 1 << (16 * columns - 1).bit_length()))
    program = 2.0 * min(chunk, max(bags)) * block * 64
    flop = max(2.0 * tokens * cell.width * block * blocks, chip.multiprocessors * program)
    return Launch("_pool", times, 0.0, flop, large=True)


def _blocks(columns: int, widest: int) -> tuple[int, int]:
    """Return the columns of a block of outputs, and the number of blocks."""
    if columns <= 64:
        return max(16, 1 << (columns - 1).bit_length()), 1
    blocks = [block for block in (64, 128, 256) if block <= widest]
    block = min(blocks, key=lambda size: -(-columns // size) * (128 + size))
    return block, -(-columns // block)
