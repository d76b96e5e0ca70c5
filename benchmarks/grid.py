"""The contenders of `make gpu`: HEALNet on slides, from the literal equation to one CUDA graph.

Each does the same work on the same bags; the steps between them tell apart what half precision,
the algebra, the kernels and the graph give. A training step is forward, backward and Adam, for all
alike. What a contender cannot do, or what would take longer than there is time for, is listed with
its reason. Errors are those of the whole batch, without dropout.
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
    """How a cell is computed."""

    dtype: str
    strategy: Strategy | None = None
    backend: Backend = "auto"
    how: str = "eager"
    """eager, compiled, graph (motet.StepGraphs or motet.CudaGraphs, which copy the batch to where
    the graph reads it, statistics of the tokens given), static graph (the same work captured with
    the batch in its place, nothing copied), or published for the authors' code."""


USUAL = "planned bf16"
FIRST = {
    "reference bf16": Contender("bf16", "reference", "eager"),
    USUAL: Contender("bf16"),
    "planned bf16, graph": Contender("bf16", how="graph"),
    "planned bf16, static graph": Contender("bf16", how="static graph"),
    "published bf16": Contender("bf16", how="published"),
}
"""What says most: what a user gets, in eager mode and as a graph, and the authors' code."""
LAST = {
    "cached bf16": Contender("bf16", "cached", "triton"),
    "absorbed bf16": Contender("bf16", "absorbed", "triton"),
    "folded bf16": Contender("bf16", "cached", "eager"),
    "reference fp32": Contender("fp32", "reference", "eager"),
    "cached fp32": Contender("fp32", "cached", "triton"),
    "published fp32": Contender("fp32", how="published"),
    "reference bf16, compiled": Contender("bf16", "reference", "eager", "compiled"),
    "folded + SDPA bf16": Contender("bf16", "cached", "compile", "compiled"),
}
"""The steps between, and what is only a reference."""


class GridSettings:
    """What bounds a session on a device."""

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
        """Of timing one cell, at most."""
        self.compile_s = compile_s
        """Seconds that are left for torch.compile."""


def named_cells(*, small: bool = False) -> list[measure.Cell]:
    """Return the cells of `make gpu`, those that matter most first."""
    if small:
        batches = ((20,) * 2, (1, 20, 9))
        own = {name: measure.CONFIGS[name] for name in ("blca", "kirp")}
        return [
            *(_cell(name, c, b, s, width=32) for name, c in own.items() for b in batches
              for s in (False, True)),
            _cell("blca", own["blca"], batches[0], True, width=32, dropout=0.1),
        ]  # fmt: skip
    slides = (15_000,) * 8
    eight = measure.CONFIGS.items()
    return [
        *(_cell(name, c, slides, s) for name, c in eight for s in (False, True)),
        *(_cell(name, c, slides, True, dropout=0.1) for name, c in eight),
        *(_cell(name, c, bench.RAGGED, s) for name, c in eight for s in (True, False)),
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
        for lengths in (*batches, bench.RAGGED)
        for name, config in CONFIGS.items()
        for step in (True, False)
        if step or not dropout  # dropout is for training
    ]


def _cell(
    name: str, config: measure.Config, lengths: tuple[int, ...], step: bool, *,
    width: int = 2048, dropout: float = 0.0,
) -> measure.Cell:  # fmt: skip
    kind = "step" if step else "forward"
    more = f" x {width}" * (width != 2048) + f" dropout {dropout:g}" * (dropout > 0)
    title = f"{name} {bench.shape_name(lengths)}{more} {kind}"
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
    """Return errors, times, peak memory, share of the roofline and launches of some contenders.

    Args:
        cell: what they compute.
        contenders: by name; timed in turns.
        settings: of the session.
        roofline: of the device.
        allowed: by dtype, the error that a contender may have; filled in where it is missing, from
            the literal equation's.
        launches: whether they are counted, which takes a run under the profiler.
    """
    works = Works(cell, settings.device)
    rows: dict[str, dict[str, Any]] = {name: {} for name in contenders}
    fit: dict[str, Callable[[], object]] = {}
    for name, contender in contenders.items():
        own = rows[name]
        with _reason_into(own, contender), _time_box(contender, settings):
            with _peak_into(own, works.of(contender.dtype).tokens):
                own["error"] = error = works.error(contender, settings)
                if contender.dtype not in allowed:
                    literal = works.literal_error(contender.dtype)
                    allowed[contender.dtype] = 2 * literal + measure.FLOOR[contender.dtype]
                own["allowed"] = allowed[contender.dtype]
                if not error <= own["allowed"]:
                    raise ArithmeticError(f"error {error:.1e} is out of bounds")
            with _peak_into(own, works.of(contender.dtype).tokens):
                run = works.timed(contender, settings)
                run()
            if launches and settings.device == "cuda":
                own["launches"] = launches_of(run)
            fit[name] = run
    works.drop_exact_results()
    times = measure.in_turns(fit, settings.device, rounds=settings.rounds, seconds=settings.seconds)
    flop = cell.plan("bf16", settings.device, graph=True).cost.flop  # the headline's
    for name, timing in times.items():
        own, dtype = rows[name], contenders[name].dtype
        own["ms"] = timing._asdict()
        own["roofline_share"] = 1e3 * roofline.seconds(cell, dtype, flop) / timing.median
        if USUAL in times:
            own["ratio"] = times[USUAL].median / timing.median
    return rows


def planned(cell: measure.Cell, device: str) -> dict[str, Any]:
    """Return what the planner says of a cell: eagerly, and as a graph on known statistics."""
    chosen = cell.plan("bf16", device)
    graph = cell.plan("bf16", device, graph=True, statistics=True)
    return {
        "strategy": chosen.strategy, "predicted_ms": 1e3 * chosen.seconds,
        "graph_strategy": graph.strategy, "predicted_graph_ms": 1e3 * graph.seconds,
    }  # fmt: skip


def check_device(contender: Contender, device: str) -> None:
    """Raise unless a contender can run on a device."""
    if device != "cuda" and (contender.backend == "triton" or "graph" in contender.how):
        raise NotImplementedError("needs CUDA")


class Works:
    """A cell in both dtypes, made when first needed."""

    def __init__(self, cell: measure.Cell, device: str) -> None:
        self.cell, self.device = cell, device
        self._works: dict[str, measure.Workload] = {}
        self._exact_results: dict[str, list[Tensor]] = {}
        self._graphs: dict[str, Callable[[], list[Tensor]]] = {}

    def of(self, dtype: str) -> measure.Workload:
        if dtype not in self._works:
            self._works[dtype] = measure.Workload(self.cell, dtype, self.device)
        return self._works[dtype]

    def exact(self, dtype: str) -> list[Tensor]:
        """Return the results in float64, without dropout."""
        if dtype not in self._exact_results:
            with self._without_dropout(self.of(dtype).model):
                self._exact_results[dtype] = self.of(dtype).exact()
        return self._exact_results[dtype]

    def drop_exact_results(self) -> None:
        """Free their memory."""
        self._exact_results.clear()

    def literal_error(self, dtype: str) -> float:
        """Return the error of the literal equation."""
        work = self.of(dtype)
        with self._without_dropout(work.model):
            return measure.relative_error(work.run("reference", "eager"), self.exact(dtype))

    def error(self, contender: Contender, settings: GridSettings) -> float:
        """Return a contender's error, without dropout."""
        work = self.of(contender.dtype)
        if contender.how == "published":
            return self._published_error(contender, settings)
        with self._without_dropout(work.model):
            run = self.results(contender, settings)
            return measure.relative_error(run(), self.exact(contender.dtype))

    def results(self, contender: Contender, settings: GridSettings) -> Callable[[], list[Tensor]]:
        """Return what computes the logits, or the gradients of a step."""
        check_device(contender, self.device)
        work = self.of(contender.dtype)
        if contender.how == "graph":
            if contender.dtype not in self._graphs:
                self._graphs[contender.dtype] = work.graphed()
            return self._graphs[contender.dtype]
        model, call = self._model_and_call(contender, settings)
        if contender.how == "static graph":
            return captured(lambda: work.of(call, model))
        return lambda: work.of(call, model)

    def timed(self, contender: Contender, settings: GridSettings) -> Callable[[], object]:
        """Return what is timed: for a step with Adam, which leaves the weights as they are."""
        results = self.results(contender, settings)
        if not self.cell.step:
            return results
        work = self.of(contender.dtype)
        model = work.model
        if contender.how == "published":
            model, _ = self._model_and_call(contender, settings)
        parameters = [p for p in model.parameters() if p.requires_grad]
        adam = torch.optim.Adam(parameters, lr=0.0, fused=True)

        def step() -> None:
            for parameter, gradient in zip(parameters, results(), strict=True):
                parameter.grad = gradient
            adam.step()

        return step

    def _model_and_call(
        self, contender: Contender, settings: GridSettings
    ) -> tuple[nn.Module, Callable[[Tensor], Any]]:
        """Return a model, and what takes the bags to its logits."""
        work = self.of(contender.dtype)
        if contender.how == "published":
            model = self._their_model(settings)
            return model, self._their_call(model)

        def call(x: Tensor) -> Any:
            return work.model({"wsi": x}, strategy=contender.strategy, backend=contender.backend)

        if contender.how == "compiled" and contender.backend == "eager":
            return work.model, torch.compile(call)
        return work.model, call

    def _their_call(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return what runs the authors' code; without positions, as bags have none."""
        from benchmarks.published import call

        lengths = torch.tensor(self.cell.lengths, device=self.device)
        mask = torch.arange(int(lengths.max()), device=self.device) < lengths[:, None]
        dense = bool(mask.all())

        def of_bags(x: Tensor) -> Tensor:
            if dense:
                return call(model, [x])
            bags = x.values().split(self.cell.lengths)
            return call(model, [torch.nn.utils.rnn.pad_sequence(list(bags), True)], mask)

        return of_bags

    def _published_error(self, contender: Contender, settings: GridSettings) -> float:
        """Compare their code with itself in float64, since its weights are its own."""
        work, model = self.of(contender.dtype), self._their_model(settings)
        with self._without_dropout(model):
            own = work.of(self._their_call(model), model)
            wide = model.double()
            return measure.relative_error(own, work.widened().of(self._their_call(wide), wide))

    @contextmanager
    def _without_dropout(self, model: nn.Module) -> Iterator[None]:
        """Take a model out of training where it drops anything; nothing else depends on that."""
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
def _peak_into(own: dict[str, Any], data: Tensor) -> Iterator[None]:
    """Write down the MiB at the peak of what is run, graphs' pools and the data included."""
    if not data.is_cuda:
        yield
        return
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.synchronize()
    own["peak_mib"] = (torch.cuda.max_memory_allocated() - held + data.nbytes) / measure.MIB


@contextmanager
def _reason_into(own: dict[str, Any], contender: Contender) -> Iterator[None]:
    """Write down why a contender has no time, and whether that is a fault; go on with the next.

    A wrong result always is, a break where it is motet's: not if the literal equation or the
    authors' code runs out of memory, nor if torch cannot compile or capture.
    """
    try:
        yield
    except NotImplementedError as error:
        own |= {"failed": str(error), "fault": False}
    except Exception as error:  # compilers raise anything
        ours = contender.how in ("eager", "graph") and contender.strategy != "reference"
        own["failed"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        own["fault"] = ours or isinstance(error, ArithmeticError)


@contextmanager
def _time_box(contender: Contender, settings: GridSettings) -> Iterator[None]:
    """Stop what is compiled by torch when the time for that is spent."""
    if contender.how != "compiled":
        yield
        return
    if settings.compile_s < 1:
        raise NotImplementedError("left out: no time left for torch.compile")

    def stop(*_: object) -> None:
        raise NotImplementedError("left out: torch.compile took too long")

    started, former = time.perf_counter(), signal.signal(signal.SIGALRM, stop)
    signal.setitimer(
        signal.ITIMER_REAL, settings.compile_s / 2
    )  # the other contender wants some too
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
        settings.compile_s -= time.perf_counter() - started


def launches_of(run: Callable[[], object]) -> int | None:
    """Return how many kernels, copies and fills a run starts on the GPU; None if nobody says."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
    except RuntimeError:  # no access to the GPU's counters
        return None
    return sum(event.device_type.name == "CUDA" for event in profiler.events() or ()) or None


def lines(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield a cell as text."""
    yield (
        f"\n{row['cell']}: predicted {row['strategy']} {row['predicted_ms']:.3f} ms, as a graph "
        f"{row['graph_strategy']} {row['predicted_graph_ms']:.3f} ms"
    )
    for name, own in row["contenders"].items():
        if "failed" in own:
            yield f"  {name:26} {own['failed'][:120]}"
            continue
        peak = f"{own['peak_mib']:8.0f} MiB" if "peak_mib" in own else ""
        count = f"{own['launches']:5} launches" if own.get("launches") else ""
        timing, ratio = measure.Timing(**own["ms"]), own.get("ratio", float("nan"))
        yield (
            f"  {name:26} {timing!s:28} x {ratio:6.2f}"
            f" {1 / own['roofline_share']:6.1f} rooflines, error {own['error']:.0e} {peak} {count}"
        ).rstrip()


# For training steps on 8 bags of 15,000 patches: the time at most, as a multiple of the roofline's,
# and the speed at least, as a multiple of the authors' code under autocast.
ROOFLINES_ALLOWED = {"step": 2.7, "cached": 2.0, "absorbed": 2.6}
"""Time at most, in multiples of the roofline's, in a graph with the batch in its place: of a
training step, and of a forward pass by strategy."""
TIMES_PUBLISHED = {"equal": 9.0, "ragged": 25.0}
"""At least so many times the authors' training step in bf16, on bags of one length or ragged."""


def demands(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield what is demanded of 8 bags of 15,000 patches in one graph, and what was measured."""
    for row in rows:
        _, batch, kind = row["cell"].split(maxsplit=2)
        static, copied, other = (
            row["contenders"].get(who, {})
            for who in ("planned bf16, static graph", "planned bf16, graph", "published bf16")
        )
        own = static if static.get("ms") else copied
        ragged = (batch, kind) == ("8", "ragged step")
        if not own.get("ms") or not (
            (batch == "8x15000" and kind in ("step", "forward")) or ragged
        ):
            continue
        found: dict[str, Any] = {"cell": row["cell"], "ms": own["ms"]["median"]}
        if not ragged:
            allowed = ROOFLINES_ALLOWED["step" if kind == "step" else row["graph_strategy"]]
            found |= {"rooflines": 1 / own["roofline_share"], "rooflines_allowed": allowed}
        if other.get("ms") and kind != "forward":
            found["times_published"] = other["ms"]["median"] / found["ms"]
            found["times_demanded"] = TIMES_PUBLISHED["ragged" if ragged else "equal"]
            found["peak_share"] = own["peak_mib"] / other["peak_mib"]
        yield found
