"""The contenders of `make gpu`: HEALNet on slides, from the literal equation to one CUDA graph.

All contenders do the same work on the same bags. From one to the next a single thing changes, so
that the times show separately what half precision, the algebra, the kernels and the graph gain. A
training step is forward, backward and Adam for every contender. A contender that cannot run, or for
which no time is left, is listed with the reason. Errors are those of the complete batch, measured
without dropout.
"""

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarks.checks import captured
from motet.cli import bench, measure
from motet.kernels.backends import Backend
from motet.kernels.plan import Strategy
from torch import Tensor, nn

AS_RELEASED = {f"{name}, 1 head": c._replace(heads=1) for name, c in measure.CONFIGS.items()}
CONFIGS = {**measure.CONFIGS, **AS_RELEASED, "8x64": measure.Config(64, 128, 64, 2)}


class Contender(NamedTuple):
    """One way to compute a cell."""

    dtype: str
    strategy: Strategy | None = None
    backend: Backend = "auto"
    mode: str = "eager"
    """One of:

    * eager;
    * compiled: torch.compile;
    * graph: motet.StepGraphs or motet.CudaGraphs, called with the statistics of the tokens; they
      copy the batch to the memory that the graph reads;
    * static graph: the same work, captured with the batch already in that memory, so that nothing
      is copied;
    * published: the authors' code.
    """


USUAL = "planned bf16"
FIRST = {
    "reference bf16": Contender("bf16", "reference", "eager"),
    USUAL: Contender("bf16"),
    "planned bf16, graph": Contender("bf16", mode="graph"),
    "planned bf16, static graph": Contender("bf16", mode="static graph"),
    "published bf16": Contender("bf16", mode="published"),
}
"""Measured first, because they matter most: what a user gets, in eager mode and as a graph, and the
authors' code."""
LAST = {
    "cached bf16": Contender("bf16", "cached", "triton"),
    "absorbed bf16": Contender("bf16", "absorbed", "triton"),
    "folded bf16": Contender("bf16", "cached", "eager"),
    "reference fp32": Contender("fp32", "reference", "eager"),
    "cached fp32": Contender("fp32", "cached", "triton"),
    "published fp32": Contender("fp32", mode="published"),
    "reference bf16, compiled": Contender("bf16", "reference", "eager", "compiled"),
    "folded + SDPA bf16": Contender("bf16", "cached", "compile", "compiled"),
}
"""Measured after FIRST: the intermediate steps, and references."""


class GridSettings:
    """The device of a session and the limits on its time."""

    def __init__(
        self,
        device: str,
        *,
        rounds: int,
        seconds: float = 4.0,
        published: Path | None = None,
        compile_s: float = 0.0,
    ) -> None:
        self.device, self.rounds, self.published = device, rounds, published
        self.seconds = seconds
        """The most that timing one cell may take."""
        self.compile_s = compile_s
        """Seconds that are left for torch.compile."""


def named_cells(*, small: bool = False) -> list[measure.Cell]:
    """Return the cells of `make gpu`, the most important first."""
    if small:
        batches = ((20,) * 2, (1, 20, 9))
        configs = {name: measure.CONFIGS[name] for name in ("blca", "kirp")}
        return [
            *(_cell(name, c, b, s, width=32) for name, c in configs.items() for b in batches
              for s in (False, True)),
            _cell("blca", configs["blca"], batches[0], True, width=32, dropout=0.1),
        ]  # fmt: skip
    slides = (15_000,) * 8
    eight_heads = measure.CONFIGS.items()
    return [
        *(_cell(name, c, slides, s) for name, c in eight_heads for s in (False, True)),
        *(_cell(name, c, slides, True, dropout=0.1) for name, c in eight_heads),
        *(_cell(name, c, bench.RAGGED_GPU, s) for name, c in eight_heads for s in (True, False)),
        *(_cell(name, CONFIGS[name], (n,) * 8, True) for name in ("blca", "ucec")
          for n in (500, 2000, 8000, 60_000)),
        *(_cell(name, CONFIGS[name], (n,), True) for name in ("blca", "kirp")
          for n in (2000, 15_000, 60_000)),
        *(_cell(name, c, slides, True) for name, c in AS_RELEASED.items()),
        *(_cell("8x64", CONFIGS["8x64"], slides, s) for s in (False, True)),
    ]  # fmt: skip


def all_cells(*, small: bool = False) -> list[measure.Cell]:
    """Return all cells of `make gpu-full`."""
    if small:
        return named_cells(small=True)
    batches = [(n,) * b for b in (8, 1) for n in (500, 2000, 8000, 15_000, 60_000)]
    return [
        _cell(name, config, lengths, step, width=width, dropout=dropout)
        for width in (2048, 1024)
        for dropout in (0.0, 0.1)
        for lengths in (*batches, bench.RAGGED_GPU)
        for name, config in CONFIGS.items()
        for step in (True, False)
        if step or not dropout  # dropout acts in training alone
    ]


def _cell(
    name: str, config: measure.Config, lengths: tuple[int, ...], step: bool, *,
    width: int = 2048, dropout: float = 0.0,
) -> measure.Cell:  # fmt: skip
    kind = "step" if step else "forward"
    suffix = f" x {width}" * (width != 2048) + f" dropout {dropout:g}" * (dropout > 0)
    title = f"{name} {bench.shape_name(lengths)}{suffix} {kind}"
    return measure.Cell(title, config, lengths, step, width, dropout)


def measure_cell(
    cell: measure.Cell,
    contenders: Mapping[str, Contender],
    settings: GridSettings,
    roofline: measure.Roofline,
    allowed: dict[str, float],
    *,
    launches: bool = False,
) -> dict[str, dict[str, Any]]:
    """Measure some contenders on one cell.

    A contender has times only if its error is within the allowed one.

    Args:
        cell: what the contenders compute.
        contenders: by name; they are timed in turns.
        settings: of the session.
        roofline: of the device.
        allowed: the largest allowed error by dtype. A missing entry is added: twice the error of
            the literal equation, and the floor.
        launches: True to count kernel launches, which takes one more run under the profiler.

    Returns:
        By contender: error, times, peak memory, share of the roofline and launches, or the reason
        why it has no times.
    """
    workloads = Workloads(cell, settings.device)
    rows: dict[str, dict[str, Any]] = {name: {} for name in contenders}
    correct: dict[str, Callable[[], object]] = {}
    for name, contender in contenders.items():
        row = rows[name]
        with _record_failure(row, contender), _limit_compile_time(contender, settings):
            tokens = workloads.workload(contender.dtype).tokens
            with _record_peak(row, tokens):
                row["error"] = error = workloads.error(contender, settings)
                if contender.dtype not in allowed:
                    literal = workloads.literal_error(contender.dtype)
                    allowed[contender.dtype] = 2 * literal + measure.FLOOR[contender.dtype]
                row["allowed"] = allowed[contender.dtype]
                if not error <= row["allowed"]:
                    raise ArithmeticError(f"error {error:.1e} is out of bounds")
            with _record_peak(row, tokens):  # of what is timed, in place of the error's peak
                run = workloads.timed(contender, settings)
                run()
            if launches and settings.device == "cuda":
                row["launches"] = count_launches(run)
            correct[name] = run
    workloads.drop_exact_results()
    times = measure.in_turns(
        correct, settings.device, rounds=settings.rounds, seconds=settings.seconds
    )
    # The FLOP of the strategy that a graph takes, for all contenders: one roofline per cell.
    flop = cell.plan("bf16", settings.device, graph=True).cost.flop
    for name, timing in times.items():
        row, dtype = rows[name], contenders[name].dtype
        row["ms"] = timing._asdict()
        row["roofline_share"] = 1e3 * roofline.seconds(cell, dtype, flop) / timing.median
        if USUAL in times:
            row["ratio"] = times[USUAL].median / timing.median
    return rows


def planned(cell: measure.Cell, device: str) -> dict[str, Any]:
    """Return the planner's predictions: in eager mode, and as a graph with token statistics."""
    eager = cell.plan("bf16", device)
    graph = cell.plan("bf16", device, graph=True, statistics=True)
    return {
        "strategy": eager.strategy, "predicted_ms": 1e3 * eager.seconds,
        "graph_strategy": graph.strategy, "predicted_graph_ms": 1e3 * graph.seconds,
    }  # fmt: skip


def check_device(contender: Contender, device: str) -> None:
    """Raise NotImplementedError if a contender cannot run on a device."""
    if device != "cuda" and (contender.backend == "triton" or "graph" in contender.mode):
        raise NotImplementedError("needs CUDA")


class Workloads:
    """The workloads of a cell, one per dtype, each made when it is first needed."""

    def __init__(self, cell: measure.Cell, device: str) -> None:
        self.cell, self.device = cell, device
        self._workloads: dict[str, measure.Workload] = {}
        self._exact_results: dict[str, list[Tensor]] = {}
        self._graphs: dict[str, Callable[[], list[Tensor]]] = {}

    def workload(self, dtype: str) -> measure.Workload:
        """Return the workload in "fp32" or "bf16"."""
        if dtype not in self._workloads:
            self._workloads[dtype] = measure.Workload(self.cell, dtype, self.device)
        return self._workloads[dtype]

    def exact(self, dtype: str) -> list[Tensor]:
        """Return the results in float64, without dropout."""
        if dtype not in self._exact_results:
            workload = self.workload(dtype)
            with self._without_dropout(workload.model):
                self._exact_results[dtype] = workload.exact()
        return self._exact_results[dtype]

    def drop_exact_results(self) -> None:
        """Free the memory of the float64 results."""
        self._exact_results.clear()

    def literal_error(self, dtype: str) -> float:
        """Return the error of the literal equation."""
        workload = self.workload(dtype)
        with self._without_dropout(workload.model):
            return measure.relative_error(workload.run("reference", "eager"), self.exact(dtype))

    def error(self, contender: Contender, settings: GridSettings) -> float:
        """Return a contender's error, without dropout."""
        if contender.mode == "published":
            return self._published_error(contender, settings)
        with self._without_dropout(self.workload(contender.dtype).model):
            run = self.computation(contender, settings)
            return measure.relative_error(run(), self.exact(contender.dtype))

    def computation(
        self, contender: Contender, settings: GridSettings
    ) -> Callable[[], list[Tensor]]:
        """Return a function that computes the logits, or the gradients of a step."""
        check_device(contender, self.device)
        workload = self.workload(contender.dtype)
        if contender.mode == "graph":
            if contender.dtype not in self._graphs:
                self._graphs[contender.dtype] = workload.graphed()
            return self._graphs[contender.dtype]
        model, call = self._model_and_call(contender, settings)
        if contender.mode == "static graph":
            return captured(lambda: workload.run_model(call, model))
        return lambda: workload.run_model(call, model)

    def timed(self, contender: Contender, settings: GridSettings) -> Callable[[], object]:
        """Return the function to time: a step includes Adam.

        Adam's rate is zero, so that every round starts from the same weights.
        """
        compute = self.computation(contender, settings)
        if not self.cell.step:
            return compute
        model = self.workload(contender.dtype).model
        if contender.mode == "published":
            model, _ = self._model_and_call(contender, settings)
        parameters = [p for p in model.parameters() if p.requires_grad]
        adam = torch.optim.Adam(parameters, lr=0.0, fused=True)

        def step() -> None:
            for parameter, gradient in zip(parameters, compute(), strict=True):
                parameter.grad = gradient
            adam.step()

        return step

    def _model_and_call(
        self, contender: Contender, settings: GridSettings
    ) -> tuple[nn.Module, Callable[[Tensor], Any]]:
        """Return a model, and a function from the bags to its logits."""
        workload = self.workload(contender.dtype)
        if contender.mode == "published":
            model = self._their_model(settings)
            return model, self._their_call(model)

        def call(x: Tensor) -> Any:
            return workload.model(
                {"wsi": x}, strategy=contender.strategy, backend=contender.backend
            )

        if contender.mode == "compiled" and contender.backend == "eager":
            return workload.model, torch.compile(call)
        return workload.model, call

    def _their_call(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return a function that runs the authors' code, without positions, as bags have none."""
        from benchmarks.published import call

        lengths = torch.tensor(self.cell.lengths, device=self.device)
        mask = torch.arange(int(lengths.max()), device=self.device) < lengths[:, None]
        dense = bool(mask.all())

        def call_on_bags(x: Tensor) -> Tensor:
            if dense:
                return call(model, [x])
            bags = x.values().split(self.cell.lengths)
            return call(model, [torch.nn.utils.rnn.pad_sequence(list(bags), True)], mask)

        return call_on_bags

    def _published_error(self, contender: Contender, settings: GridSettings) -> float:
        """Compare the authors' code with itself in float64: its weights differ from ours."""
        workload, model = self.workload(contender.dtype), self._their_model(settings)
        with self._without_dropout(model):
            result = workload.run_model(self._their_call(model), model)
            wide = model.double()
            exact = workload.widened().run_model(self._their_call(wide), wide)
            return measure.relative_error(result, exact)

    @contextmanager
    def _without_dropout(self, model: nn.Module) -> Iterator[None]:
        """Take a model out of training if it has dropout; nothing else depends on the mode."""
        model.train(not self.cell.dropout)
        yield
        model.train()

    def _their_model(self, settings: GridSettings) -> nn.Module:
        from benchmarks.published import published_healnet

        if settings.published is None:
            raise NotImplementedError("no --published DIR")
        torch.manual_seed(0)
        config = self.cell.config
        model = published_healnet(settings.published)(
            n_modalities=1, channel_dims=[self.cell.width], num_spatial_axes=[1], out_dims=4,
            depth=config.depth, l_c=config.latents, l_d=config.latent_dim, x_heads=config.heads,
            cross_dim_head=config.head_dim, attn_dropout=self.cell.dropout,
            weight_tie_layers=True, fourier_encode_data=False, self_per_cross_attn=0,
        )  # fmt: skip
        return model.to(self.device)


@contextmanager
def _record_peak(row: dict[str, Any], data: Tensor) -> Iterator[None]:
    """Record the peak GPU memory of what runs inside, in MiB, with `data` and pools of graphs."""
    if not data.is_cuda:
        yield
        return
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.synchronize()
    row["peak_mib"] = (torch.cuda.max_memory_allocated() - held + data.nbytes) / measure.MIB


@contextmanager
def _record_failure(row: dict[str, Any], contender: Contender) -> Iterator[None]:
    """Record why a contender has no time and whether that is a fault, and suppress the error.

    A wrong result is always a fault. An exception is a fault only if motet caused it: it is none if
    the literal equation or the authors' code runs out of memory, or if torch cannot compile or
    capture.
    """
    try:
        yield
    except NotImplementedError as error:
        row |= {"failed": str(error), "fault": False}
    except Exception as error:  # compilers raise exceptions of every type
        ours = contender.mode in ("eager", "graph") and contender.strategy != "reference"
        row["failed"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        row["fault"] = ours or isinstance(error, ArithmeticError)


@contextmanager
def _limit_compile_time(contender: Contender, settings: GridSettings) -> Iterator[None]:
    """Interrupt a compiled contender when half of the time left for torch.compile is spent.

    Half, because two contenders of a cell are compiled.
    """
    if contender.mode != "compiled":
        yield
        return
    if settings.compile_s < 1:
        raise NotImplementedError("skipped: no time left for torch.compile")

    def stop(*_: object) -> None:
        raise NotImplementedError("skipped: torch.compile took too long")

    started, former = time.perf_counter(), signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, settings.compile_s / 2)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
        settings.compile_s -= time.perf_counter() - started


def count_launches(run: Callable[[], object]) -> int | None:
    """Return how many kernels, copies and fills a run starts on the GPU; None if not known."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
    except RuntimeError:  # the profiler may not read the GPU's counters
        return None
    return sum(event.device_type.name == "CUDA" for event in profiler.events() or ()) or None


def lines(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a cell's table: predictions, then one line per contender.

    "ratio" is the time of "planned bf16" over the contender's.
    """
    yield (
        f"\n{row['cell']}: predicted {row['strategy']} {row['predicted_ms']:.3f} ms, as a graph "
        f"{row['graph_strategy']} {row['predicted_graph_ms']:.3f} ms"
    )
    for name, result in row["contenders"].items():
        if "failed" in result:
            yield f"  {name:26} {result['failed'][:120]}"
            continue
        timing, ratio = measure.Timing(**result["ms"]), result.get("ratio", float("nan"))
        yield (
            f"  {name:26} {timing!s:26} ms, ratio {ratio:.2f}, "
            f"{1 / result['roofline_share']:.1f} x roofline"
        )
        details = [f"error {result['error']:.0e}"]
        if "peak_mib" in result:
            details.append(f"peak {result['peak_mib']:.0f} MiB")
        if result.get("launches"):
            details.append(f"{result['launches']} launches")
        yield f"  {'':26} {', '.join(details)}"


ROOFLINES_ALLOWED = {"step": 2.7, "cached": 2.0, "absorbed": 2.6}
"""The longest allowed time of 8 bags of 15,000 patches in a graph with the batch in its place, as a
multiple of the roofline: of a training step, and of a forward pass by strategy."""
TIMES_PUBLISHED = {"equal": 9.0, "ragged": 25.0}
"""The demanded speed of a training step, as a multiple of the authors' code under bf16 autocast: on
8 bags of 15,000 patches, and on ragged bags."""


def demands(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield demanded and measured figures of every cell to which a demand applies.

    These are the cells of 8 bags of 15,000 patches, and the training steps on ragged bags.
    """
    for row in rows:
        _, batch, kind = row["cell"].split(maxsplit=2)
        static, copied, published = (
            row["contenders"].get(name, {})
            for name in ("planned bf16, static graph", "planned bf16, graph", "published bf16")
        )
        ours = static if static.get("ms") else copied
        ragged = (batch, kind) == ("8", "ragged step")
        if not ours.get("ms") or not (
            (batch == "8x15000" and kind in ("step", "forward")) or ragged
        ):
            continue
        demand: dict[str, Any] = {"cell": row["cell"], "ms": ours["ms"]["median"]}
        if not ragged:
            allowed = ROOFLINES_ALLOWED["step" if kind == "step" else row["graph_strategy"]]
            demand |= {"rooflines": 1 / ours["roofline_share"], "rooflines_allowed": allowed}
        if published.get("ms") and kind != "forward":
            demand["times_published"] = published["ms"]["median"] / demand["ms"]
            demand["times_demanded"] = TIMES_PUBLISHED["ragged" if ragged else "equal"]
            demand["peak_share"] = ours["peak_mib"] / published["peak_mib"]
        yield demand
