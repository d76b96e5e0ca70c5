"""What measures this machine: contenders in turns, peak memory, errors against float64, its limits.

For `motet bench`, and for the scripts in benchmarks/.
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
# An error may be twice that of the reference in the same dtype, and this: of a norm, relative.
FLOOR = {name: _error_floors.MODEL[str(dtype).split(".")[1]] for name, dtype in DTYPES.items()}
MIB = 2**20


class Config(NamedTuple):
    """HEALNet as tuned for one cohort; 8 heads as in the paper, 1 as released."""

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
    """HEALNet on a batch of slides: the logits, or the gradients of all parameters."""

    name: str
    config: Config
    lengths: tuple[int, ...]
    """Patches of each bag."""
    step: bool
    """False for the logits, True for the gradients of a training step."""
    width: int = 2048
    dropout: float = 0.0

    def shortened(self, tokens: int) -> "Cell":
        """Return the cell with short bags and without dropout, whose error can be taken."""
        return self._replace(lengths=tuple(min(n, tokens) for n in self.lengths), dropout=0.0)

    def plan(
        self,
        dtype: str,
        device: str | Chip,
        *,
        graph: bool = False,
        statistics: bool = False,
    ) -> Plan:
        """Return what HEALNet plans for this batch, on tokens of known statistics or others."""
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
    """A cell's model and batch; half precision as autocast does it, on tokens that are half too."""

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
        own = torch.Generator(device).manual_seed(0)  # torch's may be held by a failed CUDA graph
        self.tokens = torch.randn(shape, generator=own, dtype=DTYPES[dtype], device=device)

    def run(self, strategy: Strategy | None = None, backend: Backend = "auto") -> list[Tensor]:
        """Return the logits, or the gradients of all parameters."""
        return self.of(
            lambda x: self.model({"wsi": x}, strategy=strategy, backend=backend), self.model
        )

    def of(self, call: Callable[[Tensor], Any], model: torch.nn.Module) -> list[Tensor]:
        """Return the same of any model that takes the bags."""
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
        """Return what does the same as one CUDA graph, as `motet train` does on a GPU.

        The batch is copied to where the graph reads it; the statistics of its tokens are known.
        Sizes are captured when they come a second time, which is here.

        Raises:
            RuntimeError: there is no graph, so that eager mode would be measured in its name.
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
        """Return tokens [T, D] as [B, N, D], jagged where lengths differ."""
        lengths = self.cell.lengths
        if len(set(lengths)) == 1:
            return tokens.unflatten(0, (len(lengths), -1))
        return jagged(tokens, self.offsets)

    def exact(self) -> list[Tensor]:
        """Return the literal equation's results in float64."""
        return self.widened().run("reference", "eager")

    def widened(self) -> "Workload":
        """Return the same in float64."""
        wide = copy.copy(self)
        wide.dtype, wide.tokens = "fp32", self.tokens.double()  # "fp32": no autocast
        wide.model = copy.deepcopy(self.model).double()
        return wide


def batch_of(values: Tensor, offsets: Tensor) -> PatientBatch:
    """Return bags as the loader of `motet train` hands them out on a GPU, with statistics."""
    statistics = Ragged(token_statistics(values), offsets)
    return PatientBatch({"wsi": Ragged(values, offsets)}, {}, {}, {}, {"wsi": statistics})


def squares(logits: Tensor, target: Mapping[str, Tensor]) -> Tensor:
    """A loss that needs no target."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).square().sum()


def relative_error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return ‖results - exact‖ / ‖exact‖ over all tensors together."""
    pairs = list(zip(results, exact, strict=True))
    missed = math.hypot(*[(a.to(b.dtype) - b).norm().item() for a, b in pairs])
    return missed / math.hypot(*[b.norm().item() for _, b in pairs])


class Timing(NamedTuple):
    """Milliseconds of one contender."""

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
    """Time contenders one after the other, round after round, so that all see the same machine.

    Args:
        contenders: name to what is timed; each runs once untimed first.
        device: "cpu" or "cuda". On CUDA events are taken, with the cache emptied before each.
        rounds: at most so many.
        seconds: no further round after so many seconds and three rounds.
        before: runs before each round, untimed, such as to draw fresh data.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    watch = _cuda_watch() if device == "cuda" else _watch
    started = time.perf_counter()
    for count in range(rounds):
        if count >= 3 and time.perf_counter() - started > seconds:
            break
        if before is not None:
            before()
        for name, run in contenders.items():
            samples[name].append(watch(run))
    quartiles = {name: statistics.quantiles(times, n=4) for name, times in samples.items()}
    return {
        name: Timing(middle, low, high, len(samples[name]))
        for name, (low, middle, high) in quartiles.items()
    }


def _watch(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


def _cuda_watch() -> Callable[[Callable[[], object]], float]:
    cache = torch.empty(128 * MIB, dtype=torch.int8, device="cuda")  # more than any L2

    def watch(run: Callable[[], object]) -> float:
        cache.zero_()
        torch.cuda.synchronize()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    return watch


def cuda_peak(run: Callable[[], object], data: Tensor) -> float:
    """Return the MiB that a run needs at its peak on the GPU, its data included."""
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held + data.nbytes) / MIB


def in_child(threads: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return function(*arguments), computed in a process that has done nothing before.

    Raises:
        BrokenProcessPool: the process was killed, as it is where memory does not suffice.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["motet.cli.measure"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_with_threads, threads, function, arguments).result()


def _with_threads(threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(threads)
    return function(*arguments)


def growth(run: Callable[[], object]) -> float:
    """Return by how many MiB the peak of this process's resident memory grows by a run."""
    import resource

    unit = MIB if sys.platform == "darwin" else 2**10  # of ru_maxrss in a MiB

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    started = peak()
    run()
    return (peak() - started) / unit


class Roofline(NamedTuple):
    """What the device does at most, measured."""

    read: float
    """Bytes/s of a sum."""
    copy: float
    """Bytes/s of a copy, read and written."""
    products: dict[str, float]
    """FLOP/s of a square product, by dtype."""

    def seconds(self, cell: Cell, dtype: str, flop: float) -> float:
        """Return the least time: that of the tokens, read once and again in a step, or the FLOP's.

        Other traffic is left out: keys and values need not exist.
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
    """Measure bandwidth and matrix rates, the best of some rounds each.

    On CUDA float32 is the better of full products and a third of the TF32 rate, since three TF32
    products make one that is as good.
    """
    gpu = device == "cuda"
    size = 2**22 if quick else 2**30 if gpu else 2**28  # bytes, beyond the caches unless quick
    side = 256 if quick else 8192 if gpu else 2048
    x = torch.ones(size // 4, device=device)
    summed = _best(x.sum, device)
    copied = _best(partial(torch.empty_like(x).copy_, x), device)
    del x
    products = {}
    for name, dtype in DTYPES.items():
        a = torch.randn(side, side, device=device, dtype=dtype)
        products[name] = 2 * side**3 / _best(partial(torch.mm, a, a), device)
    if gpu and not torch.backends.cuda.matmul.allow_tf32:
        a = torch.randn(side, side, device=device)
        torch.backends.cuda.matmul.allow_tf32 = True
        third = 2 * side**3 / _best(partial(torch.mm, a, a), device) / 3
        torch.backends.cuda.matmul.allow_tf32 = False
        products["fp32"] = max(products["fp32"], third)
    return Roofline(size / summed, 2 * size / copied, products)


def _best(run: Callable[[], object], device: str) -> float:
    watch = _cuda_watch() if device == "cuda" else _watch
    run()
    return min(watch(run) for _ in range(7)) / 1e3


def about(device: str) -> dict[str, Any]:
    """Return what a figure depends on: hardware, versions, revision, date."""
    facts = {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "motet": _version("motet"),
        "revision": _revision(),
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


def _processor() -> str:
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


def _revision() -> str:
    """Return the git revision, "-dirty" if files differ; "unknown" for an installed package."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():  # else git would name the repository around it
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
        ValueError: no CUDA device where one is asked for, or less than one thread.
    """
    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads: expected at least 1, got {threads}")
        torch.set_num_threads(threads)
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ValueError("--device: torch finds no CUDA device here")
    return name or ("cuda" if there else "cpu")


def check_folder(option: str, path: Path | None) -> None:
    """Raise a ValueError unless the file can be written, before anything is measured for it."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ValueError(f"{option}: expected a file in a folder that is there, got {str(path)!r}")


def figures(value: float) -> str:
    """Return three significant figures, never in powers of ten."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"
