"""The merge operators beside the same expression in torch, with their errors.

    python -m benchmarks.bench_merge [--published DIR] [--threads 1,2] [--json FILE]

prints a table: every size and number of inputs, beside the literal torch expression, beside the
authors' code for two inputs (DIR, a clone of konst-int-i/mm-lego; pip install einops), and beside
torch.add(a, b, out=out), whose bandwidth is the yardstick. All take turns in one process, a turn of
small tensors being many calls; ours writes to an `out` as torch.add does, and "fresh" is ours
without. Errors are against float64 on the first 2^20 elements.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from motet.cli import measure
from motet.cli.measure import Timing
from motet.kernels import harmonic_merge, slerp
from motet.kernels.harmonic_merge.reference import harmonic_merge_reference
from motet.kernels.slerp.reference import slerp_reference
from torch import Tensor

from .cells import Cell, merge_cells
from .published import published_lego

CELLS = [cell for size in (8 * 17 * 126, 1 << 20) for cell in merge_cells("cpu", size)]
SIZES = (8 * 17 * 126, 1 << 20, 1 << 24)
COUNTS = (2, 4, 8)

Merge = Callable[[Sequence[Tensor]], Tensor]


@pytest.mark.parametrize("who", ["motet", "torch"])
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def bench_merge(benchmark, cell: Cell, who: str) -> None:
    run = cell.run if who == "motet" else cell.rival
    assert run is not None
    benchmark.group = cell.name
    benchmark.extra_info["error"] = error = cell.error(run)
    assert error < measure.FLOOR["fp32"]
    benchmark.pedantic(run, cell.arguments, rounds=5, warmup_rounds=1)


def harmonic_expression(latents: Sequence[Tensor]) -> Tensor:
    """Eq. 4 in torch, as one would write it."""
    if len(latents) == 2:
        a, b = latents
        m, n = a.abs(), b.abs()
        return torch.polar(2 * m * n / (m + n), (a.angle() + b.angle()) / 2)
    reciprocal = sum(1 / z.abs() for z in latents)
    return torch.polar(len(latents) / reciprocal, sum(z.angle() for z in latents) / len(latents))


def slerp_expression(vectors: Sequence[Tensor]) -> Tensor:
    """The formula of section 3.3 in torch; the Karcher mean of more than two vectors."""
    if len(vectors) > 2:
        return slerp_reference(vectors)
    a, b = vectors
    angle = torch.acos(((a * b).sum() / (a.norm() * b.norm())).clamp(-1, 1))
    return torch.sin(angle / 2) / torch.sin(angle) * (a + b)


def published_merges(checkout: Path) -> dict[str, Merge]:
    """Return the authors' two merges at equal weights.

    Raises:
        ValueError: a folder that is no checkout of theirs, or no einops.
    """
    lego = published_lego(checkout)
    merge = lego.LegoMerge.__new__(lego.LegoMerge)
    torch.nn.Module.__init__(merge)
    merge.method, merge.alpha = "harmonic", 0.5

    def harmonic(latents: Sequence[Tensor]) -> Tensor:
        # Their forward, of blocks that return these latents.
        merge.layers = [lambda *_, z=z, **__: z for z in latents]
        return merge(list(latents), return_embeddings=True, complex=True)

    return {
        "harmonic_merge": harmonic,
        "slerp": lambda vectors: lego.PlugHeads._slerp(None, *vectors, 0.5),
    }


def rows(published: dict[str, Merge], threads: Sequence[int], seconds: float) -> Iterator[dict]:
    """Measure every cell of the table."""
    for own_threads in threads:
        for size in SIZES:
            for count in COUNTS:
                for operator, dtype in (("harmonic_merge", torch.complex64), ("slerp", None)):
                    inputs = [torch.randn(size, dtype=dtype) for _ in range(count)]
                    torch.set_num_threads(own_threads)
                    row = {"operator": operator, "size": size, "inputs": count}
                    yield (
                        row | {"threads": own_threads} | _row(operator, inputs, published, seconds)
                    )


def _row(
    operator: str, inputs: list[Tensor], published: dict[str, Merge], seconds: float
) -> dict[str, Any]:
    ours, expression, reference = {
        "harmonic_merge": (harmonic_merge, harmonic_expression, harmonic_merge_reference),
        "slerp": (slerp, slerp_expression, slerp_reference),
    }[operator]
    out = torch.empty_like(inputs[0])
    contenders: dict[str, Callable[[], Tensor]] = {
        "add": lambda: torch.add(*inputs[:2], out=out),
        "motet": lambda: ours(inputs, out=out),
        "fresh": lambda: ours(inputs),
        "torch": lambda: expression(inputs),
    }
    few = [x[: 1 << 20] for x in inputs]
    exact = reference([x.to(torch.complex128 if x.is_complex() else torch.float64) for x in few])
    errors = {"motet": _error(ours(few), exact), "torch": _error(expression(few), exact)}
    if operator in published and len(inputs) == 2:
        theirs = published[operator]
        contenders["published"] = lambda: theirs(inputs)
        # Their harmonic mean is half of Eq. 4 at equal weights; their slerp is for unit vectors.
        if operator == "harmonic_merge":
            errors["published"] = _error(2 * theirs(few), exact)
        else:
            units = [x.double() / x.double().norm() for x in few]
            errors["published"] = _error(theirs([u.float() for u in units]), reference(units))
    # A processor takes 0.1 ms to wake its widest registers, which only ours uses here.
    calls = max(1, (1 << 20) // inputs[0].numel())
    turns = {who: partial(_repeated, run, calls) for who, run in contenders.items()}
    times = {
        who: Timing(timing.median / calls, timing.low / calls, timing.high / calls, timing.rounds)
        for who, timing in measure.in_turns(turns, "cpu", rounds=25, seconds=seconds).items()
    }
    # What must pass through memory, of what torch.add reads and writes.
    sweeps = 1 if operator == "harmonic_merge" else 2
    moved = (sweeps * len(inputs) + 1) / 3
    return {
        "ms": {name: timing._asdict() for name, timing in times.items()},
        "ratio_torch": times["torch"].median / times["motet"].median,
        "bandwidth": moved * times["add"].median / times["motet"].median,
        "error": errors,
    }


def _repeated(run: Callable[[], Tensor], calls: int) -> None:
    for _ in range(calls):
        run()


def _error(own: Tensor, exact: Tensor) -> float:
    """Return the largest error: of an element for complex ones, of the largest for real ones."""
    error = (own.to(exact.dtype) - exact).abs()
    return (error / exact.abs() if exact.is_complex() else error / exact.abs().max()).max().item()


def _figure(figures: dict[str, float], who: str) -> str:
    return f"{figures[who]:.3g}" if who in figures else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--published", type=Path, help="a clone of konst-int-i/mm-lego")
    parser.add_argument("--threads", default="1,2", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=6.0, help="a cell: default %(default)s")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    published = {} if options.published is None else published_merges(options.published)
    heads = (
        "operator", "size", "inputs", "threads", "ms ours", "fresh", "torch", "published",
        "torch/ours", "published/ours", "of add's bandwidth", "error", "torch's", "published's",
    )  # fmt: skip
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    found = []
    with torch.no_grad():
        threads = [int(n) for n in options.threads.split(",")]
        for row in rows(published, threads, options.seconds):
            found.append(row)
            ms = {who: timing["median"] for who, timing in row["ms"].items()}
            ratio = ms.get("published", math.nan) / ms["motet"]
            cells = [
                *(row[name] for name in ("operator", "size", "inputs", "threads")),
                *(_figure(ms, who) for who in ("motet", "fresh", "torch", "published")),
                f"{row['ratio_torch']:.1f}", f"{ratio:.1f}", f"{row['bandwidth']:.2f}",
                *(_figure(row["error"], who) for who in ("motet", "torch", "published")),
            ]  # fmt: skip
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    if options.json is not None:
        lines = ",\n".join(json.dumps(row) for row in found)
        about = json.dumps(measure.about("cpu"))
        options.json.write_text(f'{{"about": {about}, "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
