"""The time of every kernel of a training step on a GPU: `make gpu-profile`.

Every kernel has its time and its launches per step. A kernel that reads the tokens, or a tensor
with as many rows, also has the least bytes and FLOP that its task needs, and its share of the
roofline. The roofline is the larger of bytes / bandwidth and FLOP / matrix rate, both measured in
the same run. The shares are compared with the demanded ones, and the times with those of another
Triton.
"""

import json
import re
from collections import Counter, defaultdict
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
"""The shares of the roofline are demanded of bags with at least so many tokens."""
SLOWER = 1.1
"""A kernel is reported if it takes this many times as long as with another Triton."""
# The kernels of each strategy whose share is demanded. "mm" is the longest matrix product of a
# library: the one for the gradient of the weights, once a step.
LAUNCHED = {
    "cached": ("project_kernel", "attend_kernel", "dq_kernel", "dkv_kernel", "mm"),
    "absorbed": ("project_kernel", "pool_kernel"),
}
_PRODUCT = re.compile("gemm|nvjet|cutlass|aten::mm")


class KernelWork(NamedTuple):
    """The least bytes and FLOP of a kernel, per launch."""

    bytes: float
    flop: float

    def seconds(self, roofline: measure.Roofline) -> float:
        """Return the least time."""
        return max(
            self.bytes / max(roofline.read, roofline.copy), self.flop / roofline.products["bf16"]
        )


def kernel_works(cell: measure.Cell, strategy: Strategy) -> dict[str, KernelWork]:
    """Return the least work of the kernels of a step on tokens in half precision, by role.

    Rows of K and V are padded to a multiple of 16 numbers, as the kernels get them.
    """
    tokens, width, c = sum(cell.lengths), cell.width, cell.config
    inner = 2 * c.heads * (-(-c.head_dim // 16) * 16)  # columns of K and V
    queries = c.heads * c.latents
    columns = queries if strategy == "absorbed" else inner
    product = KernelWork(2.0 * tokens * (width + columns), 2.0 * tokens * width * columns)
    score_bytes, kv_bytes = 2.0 * tokens * queries, 2.0 * tokens * inner
    attention = 1.0 * tokens * inner * c.latents  # FLOP of one product with K or with V
    return {
        "row_statistics_kernel": KernelWork(2.0 * tokens * width, 0.0),
        "project_kernel": product,
        "pool_kernel": product,
        "attend_kernel": KernelWork(kv_bytes, 2 * attention),
        "dq_kernel": KernelWork(kv_bytes, 3 * attention),
        "dkv_kernel": KernelWork(2 * kv_bytes, 4 * attention * c.depth),
        "scale_gradient_kernel": KernelWork(2 * kv_bytes, 0.0),
        "softmax_statistics_kernel": KernelWork(score_bytes, 0.0),
        "softmax_weights_kernel": KernelWork(2 * score_bytes, 0.0),
        "softmax_gradient_kernel": KernelWork(3 * score_bytes, 0.0),
        "mm": product,
    }


def role_of(kernel: str) -> str:
    """Return the planner's name of a kernel: forms that read by TMA share the plain form's."""
    return kernel.replace("_tma_kernel", "_kernel")


def profiles(roofline: measure.Roofline, *, small: bool = False) -> Iterator[dict[str, Any]]:
    """Yield a row for every model and strategy, then one for matrix products with the tokens."""
    lengths, width = ((40,) * 2, 64) if small else ((15_000,) * 8, 2048)
    for name, config in measure.CONFIGS.items():
        cell = measure.Cell(name, config, lengths, step=True, width=width)
        for strategy in STRATEGIES:
            kernels = profile_step(cell, strategy, roofline)
            yield {"model": name, "strategy": strategy, "lengths": lengths, **kernels}
    yield {"products": dict(products(sum(lengths), width))}


def profile_step(
    cell: measure.Cell, strategy: Strategy, roofline: measure.Roofline
) -> dict[str, Any]:
    """Return the kernels of a training step in bf16, whose tokens' statistics are given."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    workload = measure.Workload(cell, "bf16", device)
    inputs, options = measure.batch_of(workload.tokens, workload.offsets).arguments()
    optimiser = torch.optim.Adam(workload.model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        optimiser.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            logits: Any = workload.model(
                inputs, statistics=options["statistics"], strategy=strategy
            )
        measure.squares(logits, {}).backward()
        optimiser.step()

    for _ in range(3):
        step()
    works, kernels = kernel_works(cell, strategy), kernels_of(step)
    longest_product = max((kernel for kernel in kernels if _PRODUCT.search(kernel["kernel"])),
                          key=lambda kernel: kernel["us"] / kernel["launches"],
                          default=None)  # fmt: skip
    for kernel in kernels:
        is_mm = kernel is longest_product and strategy == "cached"
        role = "mm" if is_mm else role_of(kernel["kernel"])
        if role in works and kernel["us"]:
            work, count = works[role], 1 if is_mm else kernel["launches"]
            kernel |= {"role": role, "bytes": work.bytes, "flop": work.flop}
            kernel["roofline_share"] = 1e6 * work.seconds(roofline) * count / kernel["us"]
    return {"gpu_us": sum(kernel["us"] for kernel in kernels), "kernels": kernels}


def too_slow(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a line for every kernel that reaches less of the roofline than demanded, on long bags.

    And for every demanded kernel that was not launched.
    """
    for row in rows:
        if "products" in row or min(row["lengths"]) < LONG:
            continue
        shares = {
            kernel["role"]: kernel["roofline_share"]
            for kernel in row["kernels"]
            if "role" in kernel
        }
        for role in LAUNCHED[row["strategy"]]:
            title = f"{row['model']} {row['strategy']}: {role}"
            if role not in shares:
                yield f"{title} was not launched"
            elif shares[role] < DEMANDED[role]:
                share, demanded = shares[role], DEMANDED[role]
                yield f"{title} reaches {share:.0%} of the roofline, not {demanded:.0%}"


def slower_than(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for every kernel that takes longer per launch than in an earlier report.

    Kernels that take less than a hundredth of the step are left out: their times vary as much.
    """

    def times(report: Mapping[str, Any]) -> dict[tuple[str, ...], float]:
        return {
            (row["model"], row["strategy"], kernel["kernel"]): kernel["us"] / kernel["launches"]
            for row in report["rows"]
            for kernel in row.get("kernels", ())
            if kernel["us"] >= 0.01 * row["gpu_us"]
        }

    earlier_times = times(before)
    for key, us in times(now).items():
        if us > SLOWER * earlier_times.get(key, us):
            model, strategy, kernel = key
            excess = us / earlier_times[key] - 1
            yield (
                f"{model} {strategy}: {kernel} takes {us:.1f} us, {excess:.0%} more than with "
                f"Triton {before['triton']}"
            )


def earlier(report: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """Return the newest profile of the same GPU with another Triton, or None."""
    reports = [json.loads(path.read_text()) for path in folder.glob("gpu-profile-*.json")]
    others = [
        other for other in reports
        if other["device"] == report["device"] and other["triton"] != report["triton"]
    ]  # fmt: skip
    return max(others, key=lambda other: other["date"], default=None)


def kernels_of(step: Callable[[], None]) -> list[dict[str, Any]]:
    """Return the kernels of a step: name, microseconds and launches, the longest first.

    Without a GPU, the operators of torch and motet.
    """
    gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(STEPS):
            step()
        if gpu:
            torch.cuda.synchronize()
    total_us: dict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    for event in profiler.events() or ():
        if gpu and event.device_type.name == "CUDA":
            name, us = _short_name(event.name), event.self_device_time_total
        elif not gpu and event.name.startswith(("aten::", "motet::")):
            name, us = event.name, event.self_cpu_time_total
        else:
            continue
        total_us[name] += us
        counts[name] += 1
    rows = [
        {"kernel": name, "us": us / STEPS, "launches": counts[name] / STEPS}
        for name, us in total_us.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])


def _short_name(name: str) -> str:
    """Return a kernel's name without its template's arguments."""
    return re.sub(r"[<(].*", "", name.removeprefix("void "))[:80]


def products(tokens: int, width: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the milliseconds of matrix products with the tokens, ours and the libraries'.

    By the number of columns, at widths where the planner changes from "absorbed" to "cached".
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
            runs["pool by grouped_mm"] = lambda g=grad, e=ends: _grouped_mm(g, x, e)
        times = measure.in_turns(runs, device, rounds=5, seconds=1.0)
        yield str(columns), {name: timing.median for name, timing in times.items()}


def _grouped_mm(grad: torch.Tensor, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.grouped_mm(grad.t(), x, offs=ends)


def lines(row: dict[str, Any]) -> Iterator[str]:
    """Yield a row as lines of text: the twelve longest kernels of a step."""
    if "products" in row:
        yield "\nmatrix products with the tokens, ms"
        for columns, times in row["products"].items():
            yield f"  {columns:>4} columns"
            yield from (f"    {name:20} {ms:9.3f}" for name, ms in times.items())
        return
    launches = sum(kernel["launches"] for kernel in row["kernels"])
    yield f"\n{row['model']} {row['strategy']}: {row['gpu_us']:.0f} us, {launches:.0f} launches"
    for kernel in row["kernels"][:12]:
        share = ""
        if "roofline_share" in kernel:
            share = f"{kernel['roofline_share']:6.0%} of the roofline"
        name = kernel["kernel"][:48]
        yield f"  {kernel['us']:9.1f} us {kernel['launches']:5.1f} x {name:48} {share}".rstrip()
