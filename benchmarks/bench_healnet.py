"""HEALNet on the reference path: forward and a training step, with their errors."""

import pytest

from .cells import Cell, healnet_cells

CELLS = healnet_cells("cpu", tokens=500)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def bench_healnet(benchmark, cell: Cell) -> None:
    benchmark.extra_info["error"] = error = cell.error(cell.run)
    assert error < 1e-4
    benchmark.pedantic(cell.run, cell.arguments, rounds=5, warmup_rounds=1)
