"""HEALNet's forward pass and training step, timed with their errors.

    make bench    the small sizes, by pytest-benchmark
    python benchmarks/bench_healnet.py --published DIR [--rounds N] [--tokens N] [--json FILE]
    python benchmarks/bench_healnet.py --scaling --figure scaling.png

The second times a training step of the authors' code (see published.py) and of ours in one run, in
turns. Both get the same data, drawn anew for each round: an omic row of 2181 features and 4 bags of
patches, both with encoded positions. The third shows how time and memory of our step grow with the
size of a bag.
"""

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import motet
import torch
from motet import _error_floors
from motet.cli import measure
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
OMIC, PATCH = 2181, 2048
BAGS = 4
MAX_FREQ, TEMPERATURE = 2.0, 0.5
SIZES = (500, 2000, 8000, 15_000, 30_000, 60_000)
QUICK = [
    measure.Cell(f"{name} 4x500 {kind}", config, (500,) * 4, kind == "step", PATCH)
    for name, config in measure.CONFIGS.items()
    for kind in ("forward", "step")
]


def pytest_generate_tests(metafunc) -> None:
    """Parametrise without importing pytest, which the authors' environment may lack."""
    metafunc.parametrize("contender", ["motet", "reference"])
    metafunc.parametrize("cell", QUICK, ids=lambda cell: cell.name)


def bench_healnet(benchmark, cell: measure.Cell, contender: str) -> None:
    workload = measure.Workload(cell, "fp32", "cpu")
    strategy = None if contender == "motet" else "reference"
    benchmark.group = cell.name
    error = measure.relative_error(workload.run(strategy), workload.exact())
    benchmark.extra_info["error"] = error
    assert error < measure.FLOOR["fp32"]
    benchmark.pedantic(workload.run, (strategy,), rounds=5, warmup_rounds=1)


class Table(NamedTuple):
    """A table that compares both implementations on all configurations."""

    title: str
    shared: bool
    """Whether the layers share weights. In the authors' code the first layer never shares its
    weights, so the logits of the two can be compared only if no layer does."""
    heads: int


TABLES = (
    Table("weights shared, 8 heads", True, 8),
    Table("nothing shared, 8 heads", False, 8),
    Table("nothing shared, 1 head", False, 1),
)


def their_config(config: measure.Config, *, shared: bool) -> dict[str, Any]:
    """Return the arguments of the authors' constructor."""
    return {
        "n_modalities": 2,
        "channel_dims": [OMIC, PATCH],
        "num_spatial_axes": [1, 1],
        "out_dims": 4,
        "depth": config.depth,
        "num_freq_bands": 2,
        "max_freq": MAX_FREQ,
        "l_c": config.latents,
        "l_d": config.latent_dim,
        "x_heads": config.heads,
        "cross_dim_head": config.head_dim,
        "self_per_cross_attn": 0,
        "weight_tie_layers": shared,
    }


def models(checkout: Path, config: measure.Config, *, shared: bool) -> dict[str, nn.Module]:
    """Return the authors' model and ours, with equal weights unless layers share weights."""
    from benchmarks.published import published_healnet

    torch.manual_seed(0)
    arguments = their_config(config, shared=shared)
    theirs = published_healnet(checkout)(**arguments)
    if not shared:
        ours = motet.from_upstream({"model": "HealNet", **arguments}, theirs.state_dict())
        return {"theirs": theirs, "ours": ours}
    ours = motet.HEALNet(
        {"omic": motet.Grid(OMIC, axes=1), "wsi": motet.Grid(PATCH, axes=1)},
        out_features=4,
        depth=config.depth,
        num_latents=config.latents,
        latent_dim=config.latent_dim,
        heads=config.heads,
        head_dim=config.head_dim,
        temperature=TEMPERATURE,
        latent_init="normal",
        max_freq=MAX_FREQ,
    )
    return {"theirs": theirs, "ours": ours}


def logits_of(model: nn.Module, tensors: list[Tensor]) -> Tensor:
    from benchmarks.published import call

    return model(tensors) if isinstance(model, motet.HEALNet) else call(model, tensors)


def step(model: nn.Module, tensors: list[Tensor], *, half: bool = False) -> list[Tensor]:
    """Return the gradients of all parameters."""
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logits = logits_of(model, tensors)
    # allow_unused: with a single token the attention weight is always 1, so that the weights of the
    # queries have no gradient. Both models compute them all the same.
    return list(
        torch.autograd.grad(
            logits.square().sum(), list(model.parameters()), allow_unused=True,
            materialize_grads=True,
        )
    )  # fmt: skip


def batch(bags: int, tokens: int) -> list[Tensor]:
    """Return an omic row and a bag of patches per patient."""
    return [torch.randn(bags, 1, OMIC), torch.randn(bags, tokens, PATCH)]


def redraw(data: list[Tensor]) -> None:
    for x in data:
        x.normal_()


def compare(checkout: Path, options: argparse.Namespace, table: Table) -> list[dict[str, Any]]:
    """Measure and print one table; return its rows."""
    rows = []
    print(f"\n{table.title}")
    for name, config in measure.CONFIGS.items():
        config = config._replace(heads=table.heads)
        row = {"config": name, **compare_one(checkout, options, config, table.shared)}
        rows.append(row)
        print(*lines(row), sep="\n", flush=True)
    ratios = [row["ratio"] for row in rows]
    memory = [row["memory_ratio"] for row in rows]
    print(
        f"ratio: geometric mean {statistics.geometric_mean(ratios):.2f}, least {min(ratios):.2f}; "
        f"memory: geometric mean {statistics.geometric_mean(memory):.2f}, least {min(memory):.2f}"
    )
    return rows


def compare_one(
    checkout: Path, options: argparse.Namespace, config: measure.Config, shared: bool
) -> dict[str, Any]:
    """Return errors, times and peak memory of both implementations.

    Raises:
        ValueError: the logits differ, or our error is more than twice theirs and the floor.
    """
    pair = models(checkout, config, shared=shared)
    row: dict[str, Any] = errors_of(pair, min(options.tokens, 300), equal=not shared)
    data = batch(BAGS, options.tokens)
    contenders: dict[str, Callable[[], object]] = {
        name: partial(step, model, data) for name, model in pair.items()
    }
    contenders["ours bf16"] = partial(step, pair["ours"], data, half=True)
    times = measure.in_turns(
        contenders, "cpu", rounds=options.rounds, seconds=options.seconds,
        before=partial(redraw, data),
    )  # fmt: skip
    row["ms"] = {name: timing._asdict() for name, timing in times.items()}
    row["ratio"] = times["theirs"].median / times["ours"].median
    row["ratio_bf16"] = times["theirs"].median / times["ours bf16"].median
    del data, contenders
    threads = torch.get_num_threads()
    row["peak_mib"] = {
        name: measure.in_child(
            threads, memory_of, checkout, config, shared, name, BAGS, options.tokens
        )
        for name in pair
    }
    # With few tokens a peak may be 0.
    theirs, ours = (max(peak, 1.0) for peak in row["peak_mib"].values())
    row["memory_ratio"] = theirs / ours
    return row


def errors_of(pair: dict[str, nn.Module], tokens: int, *, equal: bool) -> dict[str, Any]:
    """Return the errors of the gradients against float64, and the difference of the logits.

    The difference is None unless the models have `equal` weights.
    """
    data = batch(2, tokens)
    wide = [x.double() for x in data]
    errors = {}
    for name, model in pair.items():
        exact = step(copy.deepcopy(model).double(), wide)
        errors[name] = measure.relative_error(step(model, data), exact)
        errors[f"{name} bf16"] = measure.relative_error(step(model, data, half=True), exact)
    for suffix, floor in (("", measure.FLOOR["fp32"]), (" bf16", measure.FLOOR["bf16"])):
        error, allowed = errors[f"ours{suffix}"], 2 * errors[f"theirs{suffix}"] + floor
        if not error <= allowed:
            raise ValueError(f"error{suffix} {error:.1e}, expected at most {allowed:.1e}")
    difference = None
    if equal:
        with torch.no_grad():
            theirs, ours = (logits_of(model, data) for model in pair.values())
        difference = (theirs - ours).abs().max().item()
        if not difference < TOLERANCE:
            raise ValueError(f"logits differ by {difference:.1e}, expected < {TOLERANCE:.0e}")
    return {"error": errors, "difference": difference}


TOLERANCE = _error_floors.DEEP_MODEL["float32"]  # of logits


def memory_of(
    checkout: Path, config: measure.Config, shared: bool, name: str, bags: int, tokens: int
) -> float:
    """Return the MiB by which peak memory grows with the data and a training step.

    A step with short bags runs before: what it allocates once does not count.
    """
    model = models(checkout, config, shared=shared)[name]
    step(model, batch(bags, 16))
    return measure.growth(lambda: step(model, batch(bags, tokens)))


def scaling_of(tokens: int, rounds: int) -> dict[str, float]:
    """Return milliseconds and peak MiB of a training step with one bag, run in this process."""
    cell = measure.Cell(str(tokens), measure.CONFIGS["blca"], (tokens,), step=True)
    measure.Workload(cell.shortened(16), "fp32", "cpu").run()
    peak = measure.growth(lambda: measure.Workload(cell, "fp32", "cpu").run())
    work = measure.Workload(cell, "fp32", "cpu")
    timing = measure.in_turns({"ours": work.run}, "cpu", rounds=rounds)["ours"]
    return {"tokens": tokens, **timing._asdict(), "peak_mib": peak}


def scaling(options: argparse.Namespace) -> list[dict[str, float]]:
    """Measure each size in a process of its own; print a table and draw the figure."""
    rows = []
    print(f"{'patches':>8} {'ms':26} {'peak MiB':>9} {'data MiB':>9}")
    for tokens in (50, 4000) if options.quick else SIZES:
        row = measure.in_child(options.threads, scaling_of, tokens, options.rounds)
        rows.append(row)
        timing = measure.Timing(row["median"], row["low"], row["high"], row["rounds"])
        data = 4 * tokens * PATCH / measure.MIB
        print(f"{tokens:8} {timing!s:26} {row['peak_mib']:9.0f} {data:9.0f}", flush=True)
    if options.figure is not None:
        draw(rows, options.figure)
    return rows


def draw(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Draw time and memory against the size of a bag."""
    from matplotlib.figure import Figure

    tokens = [row["tokens"] for row in rows]
    data = [4 * n * PATCH / measure.MIB for n in tokens]
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(tokens, [row["median"] for row in rows], "o-", color="#2b6cb0")
    left.fill_between(
        tokens, [row["low"] for row in rows], [row["high"] for row in rows], color="#2b6cb0",
        alpha=0.2,
    )  # fmt: skip
    left.set(title="training step, median and quartiles", ylabel="ms")
    right.plot(tokens, [row["peak_mib"] for row in rows], "o-", color="#2b6cb0", label="peak")
    right.plot(tokens, data, "--", color="#a0aec0", label="the data's part")
    right.set(title="memory", ylabel="MiB")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel=f"patches in a bag, {PATCH} features each")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def lines(row: dict[str, Any]) -> Iterator[str]:
    """Yield a row as lines of text: one for each contender, then the ratios."""
    yield row["config"]
    for name, timing in row["ms"].items():
        peak = f", peak {row['peak_mib'][name]:.0f} MiB" if name in row["peak_mib"] else ""
        time = str(measure.Timing(**timing))
        yield f"  {name:12} {time:>26} ms, error {row['error'][name]:.0e}{peak}"
    yield (
        f"  theirs / ours: {row['ratio']:.2f}, in bf16 {row['ratio_bf16']:.2f}, memory "
        f"{row['memory_ratio']:.2f}; their error in bf16 {row['error']['theirs bf16']:.0e}"
    )
    if row["difference"] is not None:
        yield f"  logits differ by {row['difference']:.1e}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--published", type=Path, metavar="DIR", help="a clone of konst-int-i/healnet"
    )
    parser.add_argument(
        "--threads", type=int, default=2, metavar="N",
        help="threads of torch (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=int, default=15, metavar="N",
        help="times that each contender runs, at most (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=120.0, metavar="S",
        help="after three rounds, start none of a row after this time (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, default=4000, metavar="N",
        help="patches of a bag (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="sizes that only show that it works")
    parser.add_argument(
        "--scaling", action="store_true", help="measure our step with bags of growing size instead"
    )
    parser.add_argument("--figure", type=Path, metavar="PNG", help="the file that --scaling draws")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results to this file too"
    )
    options = parser.parse_args()
    if not options.scaling and options.published is None:
        parser.error("expected --published DIR or --scaling")
    if options.quick:
        options.tokens, options.rounds = 50, 3
    return options


def main() -> int:
    """Compare with the authors' code, or measure the growth; return the exit code."""
    options = _options()
    try:
        measure.choose_device("cpu", options.threads)
        measure.check_folder("--json", options.json)
        measure.check_folder("--figure", options.figure)
        facts = measure.about("cpu")
        print(json.dumps(facts))
        if options.scaling:
            results: dict[str, Any] = {"scaling": scaling(options)}
        else:
            rows = {table.title: compare(options.published, options, table) for table in TABLES}
            results = {"bags": BAGS, "tokens": options.tokens, "tables": rows}
    except ValueError as error:
        print(f"bench_healnet: {error}", file=sys.stderr)
        return 2
    if options.json is not None:
        options.json.write_text(json.dumps({**facts, **results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # so that this script can import benchmarks.published
    sys.exit(main())
