"""LegoBlock and LegoMerge on the literal path: forward and a step, with their errors."""

import pytest

from .cells import Cell, lego_cells

CELLS = lego_cells("cpu", tokens=100)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def bench_lego(benchmark, cell: Cell) -> None:
    benchmark.extra_info["error"] = error = cell.error(cell.run)
    assert error < 1e-4
    benchmark.pedantic(cell.run, cell.arguments, rounds=5, warmup_rounds=1)
