"""The merge operators beside the same expression in torch, with their errors."""

import pytest

from .cells import Cell, merge_cells

CELLS = [cell for size in (8 * 17 * 126, 1 << 20) for cell in merge_cells("cpu", size)]


@pytest.mark.parametrize("who", ["motet", "torch"])
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def bench_merge(benchmark, cell: Cell, who: str) -> None:
    run = cell.run if who == "motet" else cell.rival
    assert run is not None
    benchmark.group = cell.name
    benchmark.extra_info["error"] = error = cell.error(run)
    assert error < 1e-5
    benchmark.pedantic(run, cell.arguments, rounds=5, warmup_rounds=1)
