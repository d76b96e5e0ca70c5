"""LegoBlock, LegoMerge and LegoFuse: the forward pass and a training step, timed.

    make bench    the small sizes, by pytest-benchmark
    python benchmarks/bench_lego.py --published DIR [--rounds N] [--json FILE]
    python benchmarks/bench_lego.py --blocks 16

The second times the authors' code (see published.py) and ours in one run, in turns, with equal
parameters on the same 8 samples. Their block transforms its context again in every pass;
"theirs, context once" is their block with a single transform. Encoders do nothing here, so that
only the blocks are timed. The third gives the cost of a model of M blocks as a share of M times the
cost of one block.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import motet
import torch
from motet import _error_floors
from motet.cli import measure
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
SAMPLES, DEPTH = 8, 4
LATENTS = ((17, 126), (64, 64))
CONTEXTS = ((1, 2181), (100, 1024), (4000, 1024))


def pytest_generate_tests(metafunc) -> None:
    """Parametrise without importing pytest, which the authors' environment may lack."""
    from benchmarks.cells import lego_cells

    metafunc.parametrize("contender", ["motet", "reference"])
    metafunc.parametrize("cell", lego_cells("cpu", tokens=100), ids=lambda cell: cell.name)


def bench_lego(benchmark, cell: Any, contender: str) -> None:
    run = cell.contenders()[contender]
    benchmark.group = cell.name
    benchmark.extra_info["error"] = error = cell.error(lambda *_: run())
    assert error < _error_floors.DEEP_MODEL["float32"]
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


class IdentityEncoder(nn.Module):
    """An encoder that returns its input, which is tokens already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_features = width  # their block reads it from the encoder's last module

    def forward(self, x: Any) -> Tensor:
        return x[0] if isinstance(x, list) else x


def make_block(published: Any, latents: tuple[int, int], width: int, seed: int = 0) -> Any:
    """Return their LegoBlock, and the arguments of its constructor."""
    torch.manual_seed(seed)
    arguments = {"l_c": latents[0], "l_d": latents[1], "depth": DEPTH}
    block = published.LegoBlock(in_shape=(1, width), encoder=IdentityEncoder(width), **arguments)
    with torch.no_grad():  # their slerp of equal heads, such as untrained LayerNorms, is NaN
        for parameter in block.to_logits.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return block, arguments


def make_block_pair(published: Any, latents: tuple[int, int], width: int) -> dict[str, nn.Module]:
    """Return their LegoBlock and ours, with equal parameters."""
    theirs, arguments = make_block(published, latents, width)
    config = {"model": "LegoBlock", "in_shape": (1, width), **arguments}
    ours = motet.from_upstream(config, theirs.state_dict(), [IdentityEncoder(width)])
    return {"theirs": theirs.eval(), "ours": ours}


def make_joined_pair(
    published: Any, kind: str, latents: tuple[int, int], width: int
) -> dict[str, nn.Module]:
    """Return their LegoMerge or LegoFuse of two blocks and ours, with equal parameters."""
    name, method = kind.split()
    blocks = [make_block(published, latents, width, seed) for seed in range(2)]
    argument = "merge_method" if name == "LegoMerge" else "fuse_method"
    theirs = getattr(published, name)([block for block, _ in blocks], **{argument: method})
    config = {
        "model": name,
        "in_shapes": [(1, width)] * 2,
        "block": blocks[0][1],
        argument: method,
    }
    encoders = [IdentityEncoder(width), IdentityEncoder(width)]
    ours = motet.from_upstream(config, theirs.state_dict(), encoders)
    return {"theirs": theirs.eval(), "ours": ours}


def run(model: nn.Module, inputs: list[Tensor], *, step: bool) -> list[Tensor]:
    """Return the logits, or the gradients of all parameters."""
    single = type(model).__name__ == "LegoBlock"
    with torch.set_grad_enabled(step):
        logits = model(inputs[0] if single else list(inputs))
    if not step:
        return [logits]
    return list(
        torch.autograd.grad(
            logits.square().sum(), list(model.parameters()), allow_unused=True,
            materialize_grads=True,
        )
    )  # fmt: skip


@contextmanager
def transform_once(tokens: Tensor) -> Iterator[None]:
    """Patch torch.fft.fft: the transform of `tokens` is computed once and then reused."""
    plain, cache = torch.fft.fft, {}

    def fft(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if x is not tokens:
            return plain(x, *arguments, **options)
        if x not in cache:
            cache[x] = plain(x, *arguments, **options)
        return cache[x]

    with mock.patch("torch.fft.fft", fft):
        yield


def run_with_context_once(model: nn.Module, inputs: list[Tensor], *, step: bool) -> list[Tensor]:
    """Return what `run` returns; the context is transformed once per call."""
    with transform_once(inputs[0]):
        return run(model, inputs, step=step)


def errors_of(pair: dict[str, nn.Module], inputs: list[Tensor], *, step: bool) -> dict[str, float]:
    """Return the errors of both against float64, and the difference of their float64 logits.

    Raises:
        ValueError: the logits differ, or our error is more than twice theirs and the floor.
    """
    wide = {name: copy.deepcopy(model).double() for name, model in pair.items()}
    doubles = [x.double() for x in inputs]
    errors = {
        name: measure.relative_error(
            run(model, inputs, step=step), run(wide[name], doubles, step=step)
        )
        for name, model in pair.items()
    }
    theirs, ours = (run(model, doubles, step=False)[0] for model in wide.values())
    errors["difference"] = difference = measure.relative_error([ours], [theirs])
    # Where the imaginary part is zero in theory, the phase in their harmonic merge comes from
    # rounding errors (docs/how-to/authors-checkpoints.md). Then the two logits need not agree.
    noisy = isinstance(pair["ours"], motet.LegoMerge) and pair["ours"].method != "sum"
    allowed_difference = _error_floors.MODEL["float64"]
    if not (difference < allowed_difference or noisy):
        raise ValueError(
            f"float64 logits differ by {difference:.1e}, expected < {allowed_difference:.0e}"
        )
    allowed = 2 * errors["theirs"] + measure.FLOOR["fp32"]
    if not errors["ours"] <= allowed:
        raise ValueError(f"error {errors['ours']:.1e}, expected at most {allowed:.1e}")
    return errors


def compare(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row per model, context, and forward or step."""
    from benchmarks.published import published_lego

    published = published_lego(options.published)
    for latents in LATENTS:
        for tokens, width in CONTEXTS:
            if options.quick and tokens > 100:
                continue
            pair = make_block_pair(published, latents, width)
            yield from rows_of("LegoBlock", pair, latents, tokens, width, options)
        for kind in ("LegoMerge sum", "LegoMerge harmonic", "LegoFuse stack", "LegoFuse weave"):
            pair = make_joined_pair(published, kind, latents, CONTEXTS[0][1])
            yield from rows_of(kind, pair, latents, *CONTEXTS[0], options)


def rows_of(
    name: str,
    pair: dict[str, nn.Module],
    latents: tuple[int, int],
    tokens: int,
    width: int,
    options: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Yield the row of the forward pass and that of the step, with errors, times and ratios."""
    count = 1 if name == "LegoBlock" else 2
    short = [torch.randn(SAMPLES, min(tokens, 300), width) for _ in range(count)]
    inputs = [torch.randn(SAMPLES, tokens, width) for _ in range(count)]
    for step in (False, True):
        row: dict[str, Any] = {
            "model": name,
            "latents": latents,
            "context": (SAMPLES, tokens, width),
            "what": "step" if step else "forward",
            "error": errors_of(pair, short, step=step),
        }
        contenders: dict[str, Callable[[], object]] = {
            contender: partial(run, model, inputs, step=step) for contender, model in pair.items()
        }
        if name == "LegoBlock":
            contenders["theirs, context once"] = partial(
                run_with_context_once, pair["theirs"], inputs, step=step
            )
        times = measure.in_turns(contenders, "cpu", rounds=options.rounds, seconds=options.seconds)
        row["ms"] = {contender: timing._asdict() for contender, timing in times.items()}
        row["ratio"] = {
            contender: timing.median / times["ours"].median
            for contender, timing in times.items()
            if contender != "ours"
        }
        yield row


def scaling(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the cost of LegoMerge of M blocks as a share of M times the cost of one block."""
    torch.manual_seed(0)
    tokens, width = 100, 256
    block = motet.LegoBlock(motet.Bag(width), out_features=4, depth=DEPTH).eval()
    x = torch.randn(SAMPLES, tokens, width)
    count = 1
    while count <= options.blocks:
        merged = motet.LegoMerge({str(i): block for i in range(count)})
        inputs = [x.clone() for _ in range(count)]
        for step in (False, True):
            contenders = {
                "one": partial(run, block, [x], step=step),
                "merged": partial(run, merged, inputs, step=step),
            }
            times = measure.in_turns(
                contenders, "cpu", rounds=options.rounds, seconds=options.seconds
            )
            yield {
                "blocks": count,
                "what": "step" if step else "forward",
                "ms": {contender: timing._asdict() for contender, timing in times.items()},
                "over": times["merged"].median / (count * times["one"].median),
            }
        count *= 2


def lines(row: dict[str, Any]) -> Iterator[str]:
    """Yield a row as lines of text."""
    times = {contender: str(measure.Timing(**timing)) for contender, timing in row["ms"].items()}
    if "blocks" in row:
        yield (
            f"{row['blocks']:6} {row['what']:8} {times['one']:>26} {times['merged']:>26} "
            f"{row['over']:14.3f}"
        )
        return
    latents = "x".join(map(str, row["latents"]))
    context = "x".join(map(str, row["context"]))
    yield (
        f"\n{row['model']}, latents {latents}, context {context}, {row['what']} "
        f"(float64 logits differ by {row['error']['difference']:.0e})"
    )
    for contender, time in times.items():
        error = f", error {row['error'][contender]:.0e}" if contender in row["error"] else ""
        ratio = f", {row['ratio'][contender]:.2f} x ours" if contender in row["ratio"] else ""
        yield f"  {contender:20} {time:>26} ms{error}{ratio}"


_BLOCKS_TITLE = (
    f"{'blocks':>6} {'':8} {'one block, ms':>26} {'merged, ms':>26} {'over M x one':>14}"
)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--published", type=Path, metavar="DIR", help="a clone of konst-int-i/mm-lego"
    )
    parser.add_argument(
        "--blocks", type=int, default=0, metavar="M",
        help="measure our models of 1, 2, 4 ... M blocks instead",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=int, default=2, metavar="N",
        help="threads of torch (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=int, default=31, metavar="N",
        help="times that each contender runs, at most (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=20.0, metavar="S",
        help="after three rounds, start none of a row after this time (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="sizes that only show that it works")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results to this file too"
    )
    options = parser.parse_args()
    if not options.blocks and options.published is None:
        parser.error("expected --published DIR or --blocks M")
    if options.quick:
        options.rounds = 3
    return options


def main() -> int:
    """Compare with the authors' code, or measure models of many blocks; return the exit code."""
    options = _options()
    rows = []
    try:
        measure.choose_device("cpu", options.threads)
        measure.check_folder("--json", options.json)
        facts = measure.about("cpu")
        print(json.dumps(facts))
        if options.blocks:
            print(_BLOCKS_TITLE)
        for row in scaling(options) if options.blocks else compare(options):
            rows.append(row)
            print(*lines(row), sep="\n", flush=True)
    except ValueError as error:
        print(f"bench_lego: {error}", file=sys.stderr)
        return 2
    if options.json is not None:
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # so that this script can import benchmarks.published
    sys.exit(main())
