"""Where the time of a training step goes on a GPU: `make gpu-profile`.

For every kernel its time and launches per step, and for those that read the tokens, or what is as
long as the tokens, the bytes and FLOP that they need at least: with them the share of the roofline
(the larger of bytes over bandwidth and FLOP over matrix rate, both measured in the same run). The
shares are compared with those that are demanded, the times with those of another Triton.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import motet
import torch
from benchmarks.model_checks import STRATEGIES
from motet.cli import measure
from motet.kernels import context_kv
from motet.kernels.chips import DEMANDED
from motet.kernels.plan import Strategy
from torch.profiler import ProfilerActivity, profile

STEPS = 5
LONG = 8000
"""Tokens of a bag from which on shares of the roofline are demanded."""
SLOWER = 1.1
"""Times as long as with another Triton, from which on a kernel is named."""
# Of the demanded ones, what each strategy launches; "mm" is the longest product of a library, that
# of the gradient of the weights, once a step.
LAUNCHED = {
    "cached": ("project_kernel", "attend_kernel", "dq_kernel", "dkv_kernel", "mm"),
    "absorbed": ("project_kernel", "pool_kernel"),
}
_PRODUCT = re.compile("gemm|nvjet|cutlass|aten::mm")


class Work(NamedTuple):
    """What a kernel needs at least, per launch."""

    bytes: float
    flop: float

    def seconds(self, roofline: measure.Roofline) -> float:
        return max(
            self.bytes / max(roofline.read, roofline.copy), self.flop / roofline.products["bf16"]
        )


def works(cell: measure.Cell, strategy: Strategy) -> dict[str, Work]:
    """Return what the kernels of a step on tokens in half precision need, by role.

    K and V have rows of a multiple of 16 numbers, as they are given to the kernels.
    """
    tokens, width, c = sum(cell.lengths), cell.width, cell.config
    inner = 2 * c.heads * (-(-c.head_dim // 16) * 16)  # of K and V
    rows = c.heads * c.latents  # queries
    asked = rows if strategy == "absorbed" else inner
    product = Work(2.0 * tokens * (width + asked), 2.0 * tokens * width * asked)
    scores = Work(2.0 * tokens * rows, 0.0)
    kv, attention = 2.0 * tokens * inner, 1.0 * tokens * inner * c.latents  # of one product
    return {
        "row_statistics_kernel": Work(2.0 * tokens * width, 0.0),
        "project_kernel": product,
        "pool_kernel": product,
        "attend_kernel": Work(kv, 2 * attention),
        "dq_kernel": Work(kv, 3 * attention),
        "dkv_kernel": Work(2 * kv, 4 * attention * c.depth),
        "scale_gradient_kernel": Work(2 * kv, 0.0),
        "softmax_statistics_kernel": scores,
        "softmax_weights_kernel": Work(2 * scores.bytes, 0.0),
        "softmax_gradient_kernel": Work(3 * scores.bytes, 0.0),
        "mm": product,
    }


def role_of(kernel: str) -> str:
    """Return what the planner calls a kernel: the one that reads by TMA has a name of its own."""
    return kernel.replace("_tma_kernel", "_kernel")


def profiles(roofline: measure.Roofline, *, small: bool = False) -> Iterator[dict[str, Any]]:
    """Yield a row for every model and strategy, and for the products that decide between them."""
    lengths, width = ((40,) * 2, 64) if small else ((15_000,) * 8, 2048)
    for name, config in measure.CONFIGS.items():
        cell = measure.Cell(name, config, lengths, step=True, width=width)
        for strategy in STRATEGIES:
            found = profiled(cell, strategy, roofline)
            yield {"model": name, "strategy": strategy, "lengths": lengths, **found}
    yield {"products": dict(products(sum(lengths), width))}


def profiled(cell: measure.Cell, strategy: Strategy, roofline: measure.Roofline) -> dict[str, Any]:
    """Return the kernels of a training step in bf16 on tokens with known statistics."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    work = measure.Workload(cell, "bf16", device)
    inputs, options = measure.batch_of(work.tokens, work.offsets).arguments()
    optimiser = torch.optim.Adam(work.model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        optimiser.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            logits: Any = work.model(inputs, statistics=options["statistics"], strategy=strategy)
        measure.squares(logits, {}).backward()
        optimiser.step()

    for _ in range(3):
        step()
    needed, rows = works(cell, strategy), kernels_of(step)
    library = max((own for own in rows if _PRODUCT.search(own["kernel"])), default=None,
                  key=lambda own: own["us"] / own["launches"])  # fmt: skip
    for own in rows:
        role = "mm" if own is library and strategy == "cached" else role_of(own["kernel"])
        if role in needed and own["us"]:
            work, count = needed[role], 1 if role == "mm" else own["launches"]
            own |= {"role": role, "bytes": work.bytes, "flop": work.flop}
            own["roofline_share"] = 1e6 * work.seconds(roofline) * count / own["us"]
    return {"gpu_us": sum(own["us"] for own in rows), "kernels": rows}


def too_slow(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the kernels that reach less of the roofline than is demanded, on long bags."""
    for row in rows:
        if "products" in row or min(row["lengths"]) < LONG:
            continue
        shares = {own["role"]: own["roofline_share"] for own in row["kernels"] if "role" in own}
        for role in LAUNCHED[row["strategy"]]:
            where = f"{row['model']} {row['strategy']}: {role}"
            if role not in shares:
                yield f"{where} was not launched"
            elif shares[role] < DEMANDED[role]:
                share, demanded = shares[role], DEMANDED[role]
                yield f"{where} reaches {share:.0%} of the roofline, not {demanded:.0%}"


def slower_than(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield the kernels that take longer than in another report, per launch.

    Of those that are a hundredth of the step or more; shorter ones vary by as much.
    """

    def times(report: Mapping[str, Any]) -> dict[tuple[str, ...], float]:
        return {
            (row["model"], row["strategy"], own["kernel"]): own["us"] / own["launches"]
            for row in report["rows"]
            for own in row.get("kernels", ())
            if own["us"] >= 0.01 * row["gpu_us"]
        }

    known = times(before)
    for key, us in times(now).items():
        if us > SLOWER * known.get(key, us):
            model, strategy, kernel = key
            yield (
                f"{model} {strategy}: {kernel} takes {us:.1f} us, {us / known[key] - 1:.0%} more "
                f"than with Triton {before['triton']}"
            )


def earlier(report: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """Return the newest profile of the same GPU with another Triton, or None."""
    found = [json.loads(path.read_text()) for path in folder.glob("gpu-profile-*.json")]
    found = [
        own for own in found
        if own["device"] == report["device"] and own["triton"] != report["triton"]
    ]  # fmt: skip
    return max(found, key=lambda own: own["date"], default=None)


def kernels_of(step: Callable[[], None]) -> list[dict[str, Any]]:
    """Return what runs on the device in a step: name, microseconds and launches, longest first."""
    gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(STEPS):
            step()
        if gpu:
            torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in profiler.events() or ():
        if gpu and event.device_type.name == "CUDA":
            own = found[_short(event.name)]
            own[0] += event.self_device_time_total
            own[1] += 1
        elif not gpu and event.name.startswith(("aten::", "motet::")):
            own = found[event.name]
            own[0] += event.self_cpu_time_total
            own[1] += 1
    rows = [
        {"kernel": name, "us": us / STEPS, "launches": count / STEPS}
        for name, (us, count) in found.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])


def _short(name: str) -> str:
    """Return a kernel's name without its template's arguments."""
    return re.sub(r"[<(].*", "", name.removeprefix("void "))[:80]


def products(tokens: int, width: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the times of products with the tokens, ours and the libraries'.

    At the widths between which "cached" and "absorbed" are decided, in milliseconds.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = {"device": device, "dtype": torch.bfloat16}
    x = torch.randn(tokens, width, **half)
    statistics = motet.kernels.row_statistics(x)
    bags = 8 if tokens % 8 == 0 else 1
    for columns in (128, 136, 144, 192, 256, 512):
        weight = torch.randn(columns, width, **half)
        grad = torch.randn(tokens, columns, **half)
        runs: dict[str, Callable[[], Any]] = {
            "context_kv": lambda w=weight: context_kv(x, w, statistics=statistics),
            "mm": lambda w=weight: x @ w.t(),
            "dW by mm": lambda g=grad: g.t() @ x,
            "pool by bmm": lambda g=grad: (
                g.unflatten(0, (bags, -1)).mT @ x.unflatten(0, (bags, -1))
            ),
        }
        if device == "cuda":
            runs["dW by mm, fp32"] = lambda g=grad: torch.mm(g.t(), x, out_dtype=torch.float32)
            ends = torch.arange(1, bags + 1, device=device, dtype=torch.int32) * (tokens // bags)
            runs["pool by grouped_mm"] = lambda g=grad, e=ends: _grouped(g, x, e)
        times = measure.in_turns(runs, device, rounds=5, seconds=1.0)
        yield str(columns), {name: timing.median for name, timing in times.items()}


def _grouped(grad: torch.Tensor, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.grouped_mm(grad.t(), x, offs=ends)


def lines(row: dict[str, Any]) -> Iterator[str]:
    """Yield a row as text."""
    if "products" in row:
        yield "\nproducts with the tokens, ms"
        for columns, times in row["products"].items():
            said = ", ".join(f"{name} {ms:.3f}" for name, ms in times.items())
            yield f"  {columns:>4} columns: {said}"
        return
    launches = sum(own["launches"] for own in row["kernels"])
    yield f"\n{row['model']} {row['strategy']}: {row['gpu_us']:.0f} us, {launches:.0f} launches"
    for own in row["kernels"][:12]:
        share = f"{own['roofline_share']:6.0%} of the roofline" if "roofline_share" in own else ""
        line = f"  {own['us']:9.1f} us {own['launches']:5.1f} x {own['kernel']:50} {share}"
        yield line.rstrip()
