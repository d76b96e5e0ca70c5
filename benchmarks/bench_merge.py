"""The merge operators, timed beside the same expression in torch, with their errors.

    python -m benchmarks.bench_merge [--published DIR] [--threads 1,2] [--json FILE]

prints a table of all sizes and numbers of inputs. Our operator is compared with the expression in
torch, with the authors' code for two inputs (DIR, a clone of konst-int-i/mm-lego; pip install
einops), and with torch.add(a, b, out=out), whose bandwidth is that of the memory. All contenders
take turns in one process; a turn with small tensors is many calls. "ms ours" writes to a given
`out`, as torch.add does; "fresh" allocates its result. Errors are against float64 on the first 2^20
elements.
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

from .cells import TimedCell, merge_cells
from .published import published_lego

CELLS = [cell for size in (8 * 17 * 126, 1 << 20) for cell in merge_cells("cpu", size)]
SIZES = (8 * 17 * 126, 1 << 20, 1 << 24)
COUNTS = (2, 4, 8)

Merge = Callable[[Sequence[Tensor]], Tensor]


@pytest.mark.parametrize("contender", ["motet", "torch"])
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def bench_merge(benchmark, cell: TimedCell, contender: str) -> None:
    run = cell.run if contender == "motet" else cell.reference
    assert run is not None
    benchmark.group = cell.name
    benchmark.extra_info["error"] = error = cell.error(run)
    assert error < measure.FLOOR["fp32"]
    benchmark.pedantic(run, cell.arguments, rounds=5, warmup_rounds=1)


def harmonic_expression(latents: Sequence[Tensor]) -> Tensor:
    """Eq. 4 in torch, without optimisation."""
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
        ValueError: `checkout` is not a clone of their repository, or einops is not installed.
    """
    lego = published_lego(checkout)
    merge = lego.LegoMerge.__new__(lego.LegoMerge)
    torch.nn.Module.__init__(merge)
    merge.method, merge.alpha = "harmonic", 0.5

    def harmonic(latents: Sequence[Tensor]) -> Tensor:
        # Their forward pass merges what the blocks return: these blocks return the latents.
        merge.layers = [lambda *_, z=z, **__: z for z in latents]
        return merge(list(latents), return_embeddings=True, complex=True)

    return {
        "harmonic_merge": harmonic,
        "slerp": lambda vectors: lego.PlugHeads._slerp(None, *vectors, 0.5),
    }


def rows(
    published: dict[str, Merge], thread_counts: Sequence[int], seconds: float
) -> Iterator[dict]:
    """Measure every row of the table."""
    for threads in thread_counts:
        for size in SIZES:
            for count in COUNTS:
                for operator, dtype in (("harmonic_merge", torch.complex64), ("slerp", None)):
                    inputs = [torch.randn(size, dtype=dtype) for _ in range(count)]
                    torch.set_num_threads(threads)
                    row = {"operator": operator, "size": size, "inputs": count, "threads": threads}
                    yield row | _measure(operator, inputs, published, seconds)


def _measure(
    operator: str, inputs: list[Tensor], published: dict[str, Merge], seconds: float
) -> dict[str, Any]:
    """Return times, ratios and errors of one operator on these inputs."""
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
    # Many calls per turn: a processor takes 0.1 ms to power up its widest registers, which only our
    # operators use here.
    calls = max(1, (1 << 20) // inputs[0].numel())
    turns = {name: partial(_repeat, run, calls) for name, run in contenders.items()}
    times = {
        name: Timing(timing.median / calls, timing.low / calls, timing.high / calls, timing.rounds)
        for name, timing in measure.in_turns(turns, "cpu", rounds=25, seconds=seconds).items()
    }
    # The least memory traffic of the operator over that of torch.add, which moves three tensors.
    # slerp reads its inputs twice: for the scalar products, and for the sum.
    sweeps = 1 if operator == "harmonic_merge" else 2
    moved = (sweeps * len(inputs) + 1) / 3
    return {
        "ms": {name: timing._asdict() for name, timing in times.items()},
        "ratio_torch": times["torch"].median / times["motet"].median,
        "bandwidth": moved * times["add"].median / times["motet"].median,
        "error": errors,
    }


def _repeat(run: Callable[[], Tensor], calls: int) -> None:
    for _ in range(calls):
        run()


def _error(result: Tensor, exact: Tensor) -> float:
    """Return the largest error.

    Relative to each element for complex results, to the largest element for real ones.
    """
    error = (result.to(exact.dtype) - exact).abs()
    return (error / exact.abs() if exact.is_complex() else error / exact.abs().max()).max().item()


def _figure(figures: dict[str, float], contender: str) -> str:
    return f"{figures[contender]:.3g}" if contender in figures else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--published", type=Path, help="a clone of konst-int-i/mm-lego")
    parser.add_argument(
        "--threads", default="1,2", metavar="N,N", help="numbers of threads (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=6.0,
        help="start no round of a row after this time (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file too")
    options = parser.parse_args()
    published = {} if options.published is None else published_merges(options.published)
    titles = (
        "operator", "size", "inputs", "threads", "ms ours", "fresh", "torch", "published",
        "torch/ours", "published/ours", "of add's bandwidth", "error", "torch's", "published's",
    )  # fmt: skip
    print(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
    measured = []
    with torch.no_grad():
        thread_counts = [int(n) for n in options.threads.split(",")]
        for row in rows(published, thread_counts, options.seconds):
            measured.append(row)
            ms = {name: timing["median"] for name, timing in row["ms"].items()}
            ratio = ms.get("published", math.nan) / ms["motet"]
            cells = [
                *(row[name] for name in ("operator", "size", "inputs", "threads")),
                *(_figure(ms, name) for name in ("motet", "fresh", "torch", "published")),
                f"{row['ratio_torch']:.1f}", f"{ratio:.1f}", f"{row['bandwidth']:.2f}",
                *(_figure(row["error"], name) for name in ("motet", "torch", "published")),
            ]  # fmt: skip
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    if options.json is not None:
        lines = ",\n".join(json.dumps(row) for row in measured)
        about = json.dumps(measure.about("cpu"))
        options.json.write_text(f'{{"about": {about}, "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
