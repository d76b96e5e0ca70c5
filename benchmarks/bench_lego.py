"""LegoBlock, LegoMerge and LegoFuse, forward and a step: pytest-benchmark, or a script.

    python benchmarks/bench_lego.py --published DIR [--rounds N] [--json FILE]
    python benchmarks/bench_lego.py --blocks 16

The first times the authors' code (see published.py) and ours in one run, in turns, with the same
parameters on the same 8 samples. Their block runs its encoder and transforms its context in every
pass; a second table does both once in theirs too. Encoders cost nothing here, so that what is
timed are the blocks. The second shows what M blocks cost over M times one block.
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
    """Parametrise without importing pytest, which the authors' environment need not have."""
    from benchmarks.cells import lego_cells

    metafunc.parametrize("who", ["motet", "reference"])
    metafunc.parametrize("cell", lego_cells("cpu", tokens=100), ids=lambda cell: cell.name)


def bench_lego(benchmark, cell: Any, who: str) -> None:
    run = cell.contenders()[who]
    benchmark.group = cell.name
    benchmark.extra_info["error"] = error = cell.error(lambda *_: run())
    assert error < _error_floors.DEEP_MODEL["float32"]
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


class Given(nn.Module):
    """An encoder whose work is done: it returns the tokens that it is given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_features = width  # which their block asks its last module for

    def forward(self, x: Any) -> Tensor:
        return x[0] if isinstance(x, list) else x


def blocks(published: Any, latents: tuple[int, int], width: int, seed: int = 0) -> Any:
    """Return their LegoBlock and our constructor arguments for it."""
    torch.manual_seed(seed)
    own = {"l_c": latents[0], "l_d": latents[1], "depth": DEPTH}
    block = published.LegoBlock(in_shape=(1, width), encoder=Given(width), **own)
    with torch.no_grad():  # equal heads, such as untrained LayerNorms, are NaN to their slerp
        for parameter in block.to_logits.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return block, own


def pair(published: Any, latents: tuple[int, int], width: int) -> dict[str, nn.Module]:
    """Return their LegoBlock and ours, with equal parameters."""
    theirs, own = blocks(published, latents, width)
    config = {"model": "LegoBlock", "in_shape": (1, width), **own}
    ours = motet.from_upstream(config, theirs.state_dict(), [Given(width)])
    return {"theirs": theirs.eval(), "ours": ours}


def joined(published: Any, kind: str, latents: tuple[int, int], width: int) -> dict[str, nn.Module]:
    """Return their LegoMerge or LegoFuse of two blocks and ours, with equal parameters."""
    name, method = kind.split()
    parts = [blocks(published, latents, width, seed) for seed in range(2)]
    argument = "merge_method" if name == "LegoMerge" else "fuse_method"
    theirs = getattr(published, name)([block for block, _ in parts], **{argument: method})
    config = {
        "model": name,
        "in_shapes": [(1, width)] * 2,
        "block": parts[0][1],
        argument: method,
    }
    ours = motet.from_upstream(config, theirs.state_dict(), [Given(width), Given(width)])
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
def context_once(tokens: Tensor) -> Iterator[None]:
    """Answer transforms of the context from the first one's result."""
    plain, known = torch.fft.fft, {}

    def fft(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if x is not tokens:
            return plain(x, *arguments, **options)
        if x not in known:
            known[x] = plain(x, *arguments, **options)
        return known[x]

    with mock.patch("torch.fft.fft", fft):
        yield


def hoisted(model: nn.Module, inputs: list[Tensor], *, step: bool) -> list[Tensor]:
    """Return what `run` does; the context is transformed once per call."""
    with context_once(inputs[0]):
        return run(model, inputs, step=step)


def errors_of(both: dict[str, nn.Module], inputs: list[Tensor], *, step: bool) -> dict[str, float]:
    """Return the errors of both against float64, and how far their float64 logits lie apart.

    Raises:
        ValueError: logits that differ, or an error of more than twice theirs.
    """
    wide = {name: copy.deepcopy(model).double() for name, model in both.items()}
    doubles = [x.double() for x in inputs]
    errors = {
        name: measure.relative_error(
            run(model, inputs, step=step), run(wide[name], doubles, step=step)
        )
        for name, model in both.items()
    }
    theirs, ours = (run(model, doubles, step=False)[0] for model in wide.values())
    errors["difference"] = difference = measure.relative_error([ours], [theirs])
    # Where the imaginary part is zero in theory, the phase in their harmonic merge is that of
    # rounding noise: see docs/how-to/authors-checkpoints.md.
    noisy = isinstance(both["ours"], motet.LegoMerge) and both["ours"].method != "sum"
    most = _error_floors.MODEL["float64"]
    if not (difference < most or noisy):
        raise ValueError(f"float64 logits differ by {difference:.1e}, expected < {most:.0e}")
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
            yield from rows_of("LegoBlock", pair(published, latents, width), latents, tokens, width,
                               options)  # fmt: skip
        for kind in ("LegoMerge sum", "LegoMerge harmonic", "LegoFuse stack", "LegoFuse weave"):
            models = joined(published, kind, latents, CONTEXTS[0][1])
            yield from rows_of(kind, models, latents, *CONTEXTS[0], options)


def rows_of(
    name: str,
    both: dict[str, nn.Module],
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
            "error": errors_of(both, short, step=step),
        }
        contenders: dict[str, Callable[[], object]] = {
            who: partial(run, model, inputs, step=step) for who, model in both.items()
        }
        if name == "LegoBlock":
            contenders["theirs, context once"] = partial(hoisted, both["theirs"], inputs, step=step)
        times = measure.in_turns(contenders, "cpu", rounds=options.rounds, seconds=options.seconds)
        row["ms"] = {who: timing._asdict() for who, timing in times.items()}
        row["ratio"] = {
            who: timing.median / times["ours"].median
            for who, timing in times.items()
            if who != "ours"
        }
        yield row


def scaling(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what LegoMerge of M blocks costs over M times one block."""
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
                "ms": {who: timing._asdict() for who, timing in times.items()},
                "over": times["merged"].median / (count * times["one"].median),
            }
        count *= 2


def _line(row: dict[str, Any]) -> str:
    ms = {who: str(measure.Timing(**timing)) for who, timing in row["ms"].items()}
    if "blocks" in row:
        return (
            f"{row['blocks']:6} {row['what']:8} {ms['one']:>24} {ms['merged']:>26} "
            f"{row['over']:9.3f}"
        )
    latents = "x".join(map(str, row["latents"]))
    context = "x".join(map(str, row["context"]))
    once = "theirs, context once"
    return (
        f"{row['model']:18} {latents:7} {context:12} {row['what']:8} {ms['theirs']:>24} "
        f"{ms['ours']:>24} {row['ratio']['theirs']:6.2f} {ms.get(once, ''):>24} "
        f"{row['ratio'].get(once, float('nan')):6.2f} {row['error']['theirs']:7.0e} "
        f"{row['error']['ours']:7.0e} {row['error']['difference']:9.0e}"
    )


_TITLE = (
    f"{'':18} {'latents':7} {'context':12} {'':8} {'theirs ms':>24} {'ours ms':>24} {'ratio':>6} "
    f"{'theirs, context once, ms':>24} {'ratio':>6} {'error':>7} {'error':>7} {'logits':>9}\n"
    f"{'':18} {'':7} {'':12} {'':8} {'':>24} {'':>24} {'':>6} {'':>24} {'':>6} {'theirs':>7} "
    f"{'ours':>7} {'differ':>9}"
)
_BLOCKS_TITLE = f"{'blocks':>6} {'':8} {'one block ms':>24} {'merged ms':>26} {'of M times':>9}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--published", type=Path, metavar="DIR", help="the authors' checkout")
    parser.add_argument(
        "--blocks", type=int, default=0, metavar="M", help="cost of 1, 2, 4 ... M blocks instead"
    )
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=31, help="(default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=20.0,
        help="no further round of a row after so many, from the third on (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="sizes that only show that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures too")
    options = parser.parse_args()
    if not options.blocks and options.published is None:
        parser.error("expected --published DIR or --blocks M")
    if options.quick:
        options.rounds = 3
    return options


def main() -> int:
    """Compare, or count blocks."""
    options = _options()
    rows = []
    try:
        measure.choose_device("cpu", options.threads)
        measure.check_folder("--json", options.json)
        facts = measure.about("cpu")
        print(json.dumps(facts))
        print(_BLOCKS_TITLE if options.blocks else _TITLE)
        for row in scaling(options) if options.blocks else compare(options):
            rows.append(row)
            print(_line(row), flush=True)
    except ValueError as error:
        print(f"bench_lego: {error}", file=sys.stderr)
        return 2
    if options.json is not None:
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # for benchmarks.published
    sys.exit(main())
