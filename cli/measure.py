"""Measure times, peak memory, errors against float64, and the limits of this machine.

For `motet bench` and for the scripts in benchmarks/.
"""

import copy
import importlib.util
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _error_floors
from ..fusion.context import jagged
from ..fusion.graphs import CudaGraphs, StepGraphs
from ..fusion.healnet import HEALNet
from ..fusion.modalities import Bag
from ..fusion.patients import PatientBatch, Ragged
from ..fusion.statistics import token_statistics
from ..kernels.backends import Backend
from ..kernels.chips import Chip
from ..kernels.plan import Plan, Strategy, plan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# An error (relative, of norms) may be twice that of the reference in the same dtype + this floor.
FLOOR = {name: _error_floors.MODEL[str(dtype).split(".")[1]] for name, dtype in DTYPES.items()}
MIB = 2**20


class Config(NamedTuple):
    """The sizes of HEALNet tuned for one cohort; 8 heads as in the paper, 1 as in the release."""

    latents: int
    latent_dim: int
    head_dim: int
    depth: int
    heads: int = 8


CONFIGS = {
    "blca": Config(25, 119, 16, 2),
    "brca": Config(17, 126, 63, 2),
    "kirp": Config(17, 62, 27, 5),
    "ucec": Config(16, 65, 103, 2),
}


class Cell(NamedTuple):
    """What is measured: HEALNet on a batch of slides, its logits or the gradients."""

    name: str
    config: Config
    lengths: tuple[int, ...]
    """Number of patches of each bag."""
    step: bool
    """False for the logits, True for the gradients of a training step."""
    width: int = 2048
    dropout: float = 0.0

    def shortened(self, tokens: int) -> "Cell":
        """Return the cell with shorter bags and without dropout, to compute its error."""
        return self._replace(lengths=tuple(min(n, tokens) for n in self.lengths), dropout=0.0)

    def plan(
        self,
        dtype: str,
        device: str | Chip,
        *,
        graph: bool = False,
        statistics: bool = False,
    ) -> Plan:
        """Return the plan of HEALNet for this batch; arguments as of `kernels.plan`."""
        return plan(
            sum(self.lengths),
            self.width,
            bags=len(self.lengths),
            latents=self.config.latents,
            heads=self.config.heads,
            head_dim=self.config.head_dim,
            layers=self.config.depth,
            dtype=DTYPES[dtype],
            device=device,
            training=self.step,
            dropout=self.dropout,
            statistics=statistics,
            graph=graph,
        )


class Workload:
    """The model and the batch of a cell; bf16 means autocast, on tokens in bfloat16."""

    def __init__(self, cell: Cell, dtype: str, device: str) -> None:
        torch.manual_seed(0)
        self.cell, self.dtype, self.device = cell, dtype, device
        config = cell.config
        self.model = HEALNet(
            {"wsi": Bag(cell.width)},
            out_features=4,
            depth=config.depth,
            num_latents=config.latents,
            latent_dim=config.latent_dim,
            heads=config.heads,
            head_dim=config.head_dim,
            attn_dropout=cell.dropout,
        ).to(device)
        self.offsets = torch.tensor([0, *cell.lengths], device=device).cumsum(0)
        shape = (sum(cell.lengths), cell.width)
        generator = torch.Generator(device).manual_seed(0)  # a failed CUDA graph may block torch's
        self.tokens = torch.randn(shape, generator=generator, dtype=DTYPES[dtype], device=device)

    def run(self, strategy: Strategy | None = None, backend: Backend = "auto") -> list[Tensor]:
        """Return the logits, or the gradients of all parameters."""
        return self.run_model(
            lambda x: self.model({"wsi": x}, strategy=strategy, backend=backend), self.model
        )

    def run_model(self, call: Callable[[Tensor], Any], model: torch.nn.Module) -> list[Tensor]:
        """Return the same for any model: `call` maps the bags to logits of `model`."""
        half = self.dtype != "fp32"
        with (
            torch.autocast(self.device, torch.bfloat16, enabled=half),
            torch.set_grad_enabled(self.cell.step),
        ):
            logits = call(self.bags(self.tokens))
        if not self.cell.step:
            return [logits]
        parameters = list(model.parameters())
        return list(torch.autograd.grad(squares(logits, {}), parameters))

    def graphed(self) -> Callable[[], list[Tensor]]:
        """Return a function that does the same as one CUDA graph, as `motet train` does on a GPU.

        Its time includes the copy of the batch into the static tensors; the statistics of the
        tokens are known. The second call with the same sizes captures the graph, so two calls are
        made here.

        Raises:
            RuntimeError: nothing was captured; eager mode would be measured instead.
        """
        inputs, options = (batch := batch_of(self.tokens, self.offsets)).arguments()
        autocast = None if self.dtype == "fp32" else torch.bfloat16
        parameters = list(self.model.parameters())
        half = autocast is not None
        if self.cell.step:
            graphs = steps = StepGraphs(self.model, squares, autocast=autocast)

            def run() -> list[Tensor]:
                steps(batch)
                return [p.grad for p in parameters if p.grad is not None]

        else:
            graphs = predict = CudaGraphs(self.model)

            def run() -> list[Tensor]:
                with torch.no_grad(), torch.autocast(self.device, torch.bfloat16, enabled=half):
                    return [predict(inputs, statistics=options["statistics"])]

        for _ in range(2):
            run()
        if refused := [row["why"] for row in graphs.report() if row["how"] == "eager"]:
            raise RuntimeError(f"no graph: {refused[0]}")
        return run

    def bags(self, tokens: Tensor) -> Tensor:
        """Return tokens [T, D] as [B, N, D], jagged if lengths differ."""
        lengths = self.cell.lengths
        if len(set(lengths)) == 1:
            return tokens.unflatten(0, (len(lengths), -1))
        return jagged(tokens, self.offsets)

    def exact(self) -> list[Tensor]:
        """Return the results of the literal equation in float64."""
        return self.widened().run("reference", "eager")

    def widened(self) -> "Workload":
        """Return the same workload in float64."""
        wide = copy.copy(self)
        wide.dtype, wide.tokens = "fp32", self.tokens.double()  # "fp32": no autocast
        wide.model = copy.deepcopy(self.model).double()
        return wide


def batch_of(values: Tensor, offsets: Tensor) -> PatientBatch:
    """Return bags as the batches of `motet train` on a GPU are, with statistics of the tokens."""
    statistics = Ragged(token_statistics(values), offsets)
    return PatientBatch({"wsi": Ragged(values, offsets)}, {}, {}, {}, {"wsi": statistics})


def squares(logits: Tensor, target: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of squares of the logits: a loss without targets."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).square().sum()


def relative_error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return ‖results - exact‖ / ‖exact‖ over all tensors together."""
    pairs = list(zip(results, exact, strict=True))
    difference = math.hypot(*[(a.to(b.dtype) - b).norm().item() for a, b in pairs])
    return difference / math.hypot(*[b.norm().item() for _, b in pairs])


class Timing(NamedTuple):
    """The times of one contender, in milliseconds."""

    median: float
    low: float
    """The first quartile."""
    high: float
    """The third quartile."""
    rounds: int

    def __str__(self) -> str:
        return f"{figures(self.median)} ({figures(self.low)} to {figures(self.high)})"


def in_turns(
    contenders: Mapping[str, Callable[[], object]],
    device: str,
    *,
    rounds: int = 15,
    seconds: float = 6.0,
    before: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time contenders in turns, round after round, so that changes of the machine affect all alike.

    Args:
        contenders: name to the function that is timed; each runs once before, untimed.
        device: "cpu" or "cuda". On CUDA, times come from events, and the cache is emptied before.
        rounds: largest number of rounds.
        seconds: after this time and at least three rounds, no further round begins.
        before: called before each round, untimed, for example to draw new data.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    time_ms = _make_cuda_timer() if device == "cuda" else _time_ms
    started = time.perf_counter()
    for count in range(rounds):
        if count >= 3 and time.perf_counter() - started > seconds:
            break
        if before is not None:
            before()
        for name, run in contenders.items():
            samples[name].append(time_ms(run))
    quartiles = {name: statistics.quantiles(times, n=4) for name, times in samples.items()}
    return {
        name: Timing(middle, low, high, len(samples[name]))
        for name, (low, middle, high) in quartiles.items()
    }


def _time_ms(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


def _make_cuda_timer() -> Callable[[Callable[[], object]], float]:
    cache = torch.empty(128 * MIB, dtype=torch.int8, device="cuda")  # larger than any L2 cache

    def time_ms(run: Callable[[], object]) -> float:
        cache.zero_()
        torch.cuda.synchronize()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    return time_ms


def cuda_peak(run: Callable[[], object], data: Tensor) -> float:
    """Return the peak memory of a run on the GPU in MiB, data included."""
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - allocated + data.nbytes) / MIB


def in_child(threads: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return function(*arguments), computed in a fresh process.

    Raises:
        BrokenProcessPool: the process was killed, for example for lack of memory.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["motet.cli.measure"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_with_threads, threads, function, arguments).result()


def _with_threads(threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(threads)
    return function(*arguments)


def growth(run: Callable[[], object]) -> float:
    """Return by how many MiB a run increases the peak resident memory of this process."""
    import resource

    unit = MIB if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes, or in KiB

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    started = peak()
    run()
    return (peak() - started) / unit


class Roofline(NamedTuple):
    """The highest rates of the device, measured."""

    read: float
    """Bytes/s of a sum."""
    copy: float
    """Bytes/s of a copy, read and written."""
    products: dict[str, float]
    """FLOP/s of a square product, by dtype."""

    def seconds(self, cell: Cell, dtype: str, flop: float) -> float:
        """Return the least time: to read the tokens (twice in a step), or to compute the FLOP.

        Other memory traffic is not counted: keys and values need not exist.
        """
        passes = 2 if cell.step else 1
        moved = passes * sum(cell.lengths) * cell.width * DTYPES[dtype].itemsize
        return max(moved / max(self.read, self.copy), flop / self.products[dtype])

    def __str__(self) -> str:
        products = ", ".join(
            f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in self.products.items()
        )
        return (
            f"measured: sum {self.read / 1e9:.3g} GB/s, copy {self.copy / 1e9:.3g} GB/s; "
            f"products {products}"
        )


def measure_roofline(device: str, *, quick: bool = False) -> Roofline:
    """Measure bandwidth and rates of matrix products, the best of several rounds each.

    On CUDA the float32 rate is that of float32 products or a third of the TF32 rate, whichever is
    higher: three TF32 products give one of the same precision.
    """
    gpu = device == "cuda"
    size = 2**22 if quick else 2**30 if gpu else 2**28  # bytes, beyond the caches unless quick
    side = 256 if quick else 8192 if gpu else 2048
    x = torch.ones(size // 4, device=device)
    summed = _best_time(x.sum, device)
    copied = _best_time(partial(torch.empty_like(x).copy_, x), device)
    del x
    products = {}
    for name, dtype in DTYPES.items():
        a = torch.randn(side, side, device=device, dtype=dtype)
        products[name] = 2 * side**3 / _best_time(partial(torch.mm, a, a), device)
    if gpu and not torch.backends.cuda.matmul.allow_tf32:
        a = torch.randn(side, side, device=device)
        torch.backends.cuda.matmul.allow_tf32 = True
        third = 2 * side**3 / _best_time(partial(torch.mm, a, a), device) / 3
        torch.backends.cuda.matmul.allow_tf32 = False
        products["fp32"] = max(products["fp32"], third)
    return Roofline(size / summed, 2 * size / copied, products)


def _best_time(run: Callable[[], object], device: str) -> float:
    time_ms = _make_cuda_timer() if device == "cuda" else _time_ms
    run()
    return min(time_ms(run) for _ in range(7)) / 1e3


def about(device: str) -> dict[str, Any]:
    """Return the conditions of a measurement: hardware, versions, revision, date."""
    facts = {
        "device": torch.cuda.get_device_name() if device == "cuda" else _find_processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "motet": _version("motet"),
        "revision": _find_revision(),
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if importlib.util.find_spec("triton") is not None:
        facts["triton"] = _version("triton")
    if device == "cuda":
        facts["cuda"] = torch.version.cuda
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["driver"] = _first_line(query)
    return facts


def _find_processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _find_revision() -> str:
    """Return the git revision, with "-dirty" if files differ; "unknown" without a checkout."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():  # git would describe a repository around it
        return "unknown"
    command = ("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12")
    return _first_line((*command, "--exclude=*"))


def _first_line(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0]


def choose_device(name: str | None, threads: int | None) -> str:
    """Return the device to measure, and set the number of threads.

    Raises:
        ValueError: "cuda" without a CUDA device, or less than one thread.
    """
    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads: expected at least 1, got {threads}")
        torch.set_num_threads(threads)
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ValueError("--device: torch finds no CUDA device here")
    return name or ("cuda" if has_cuda else "cpu")


def check_folder(option: str, path: Path | None) -> None:
    """Raise a ValueError unless the file can be written; called before hours of measuring."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ValueError(f"{option}: expected a file in a folder that exists, got {str(path)!r}")


def figures(value: float) -> str:
    """Return a number with three significant figures, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"
