"""The ladder of `make gpu`: HEALNet on slides, from the literal equation to the kernels.

Each rung does the same work on the same bags; the steps between them tell apart what half
precision, the algebra and the kernels give. What a rung cannot do, or what would take longer than
there is time for, is listed with its reason.
"""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import motet
import torch
from benchmarks.checks import captured
from motet.cli import bench, measure
from motet.fusion.patients import Batch, Ragged
from motet.kernels.backends import Backend
from motet.kernels.plan import Strategy
from torch import Tensor, nn

BASE = "reference fp32"
AS_RELEASED = {f"{name}, 1 head": c._replace(heads=1) for name, c in measure.CONFIGS.items()}
CONFIGS = {**measure.CONFIGS, **AS_RELEASED, "8x64": measure.Config(64, 128, 64, 2)}


class Rung(NamedTuple):
    """How a cell is computed."""

    dtype: str
    strategy: Strategy | None = None
    backend: Backend = "auto"
    how: str = "eager"
    """eager, compiled, motet's graph (StepGraphs or CudaGraphs), graph of everything, or published
    for the authors' code."""


RUNGS = {
    BASE: Rung("fp32", "reference", "eager"),
    "reference bf16": Rung("bf16", "reference", "eager"),
    "folded bf16": Rung("bf16", "cached", "eager"),
    "Triton fp32": Rung("fp32", "cached", "triton"),
    "Triton bf16": Rung("bf16", "cached", "triton"),
    "absorbed bf16": Rung("bf16", "absorbed", "triton"),
    "planned bf16": Rung("bf16"),
    "published fp32": Rung("fp32", how="published"),
    "published bf16": Rung("bf16", how="published"),
    "reference bf16, compiled": Rung("bf16", "reference", "eager", "compiled"),
    "folded + SDPA bf16": Rung("bf16", "cached", "compile", "compiled"),
    "planned bf16, motet's graph": Rung("bf16", how="motet's graph"),
    "planned bf16, all one graph": Rung("bf16", how="graph"),
}


class Settings:
    """What bounds a session on a device."""

    def __init__(
        self, device: str, *, rounds: int, published: Path | None = None, compile_s: float = 0.0
    ) -> None:
        self.device, self.rounds, self.published = device, rounds, published
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


def grid(*, small: bool = False) -> list[measure.Cell]:
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
    cell: measure.Cell, settings: Settings, roof: measure.Roof, *, launches: bool = False
) -> dict[str, Any]:
    """Return errors, times, peak memory, share of the roof and launches of every rung."""
    device = settings.device
    row: dict[str, Any] = {"cell": cell.name, "rungs": {}}
    small, full = (Works(c, device) for c in (cell.shortened(2000), cell))
    runs, fit = {}, {}
    literal: dict[str, float] = {}
    for name, rung in RUNGS.items():
        own: dict[str, Any] = {}
        row["rungs"][name] = own
        with _reason_into(own, rung):
            with _time_box(rung, settings):
                own["error"] = error = small.error(rung, settings)
                if rung.strategy == "reference" and rung.how == "eager":
                    literal[rung.dtype] = error
                own["allowed"] = 2 * literal[rung.dtype] + measure.FLOOR[rung.dtype]
                if not error <= own["allowed"]:
                    raise ArithmeticError(f"error {error:.1e} is out of bounds")
                runs[name] = full.runner(rung, settings)
                runs[name]()
            if device == "cuda" and "graph" not in rung.how:  # whose memory was taken beforehand
                own["peak_mib"] = measure.cuda_peak(runs[name], full.of(rung.dtype).tokens)
            if launches and device == "cuda":
                own["launches"] = launches_of(runs[name])
            fit[name] = runs[name]
    times = measure.in_turns(fit, device, rounds=settings.rounds, seconds=4.0) if fit else {}
    for name, timing in times.items():
        own, dtype = row["rungs"][name], RUNGS[name].dtype
        planned = cell.plan(dtype, device)
        own["ms"] = timing._asdict()
        own["roof_share"] = 1e3 * roof.seconds(cell, dtype, planned.cost.flop) / timing.median
        if BASE in times:
            own["ratio"] = times[BASE].median / timing.median
    planned = cell.plan("bf16", device)
    row |= {"strategy": planned.strategy, "predicted_ms": 1e3 * planned.cost.seconds}
    return row


class Works:
    """A cell in both dtypes, made when first needed."""

    def __init__(self, cell: measure.Cell, device: str) -> None:
        self.cell, self.device = cell, device
        self._works: dict[str, measure.Workload] = {}
        self._golds: dict[str, list[Tensor]] = {}

    def of(self, dtype: str) -> measure.Workload:
        if dtype not in self._works:
            self._works[dtype] = measure.Workload(self.cell, dtype, self.device)
        return self._works[dtype]

    def error(self, rung: Rung, settings: Settings) -> float:
        """Return a rung's error, without dropout."""
        if rung.how == "published":
            return self._published_error(rung, settings)
        if rung.dtype not in self._golds:
            self._golds[rung.dtype] = self.of(rung.dtype).gold()
        return measure.relative_error(self.runner(rung, settings)(), self._golds[rung.dtype])

    def runner(self, rung: Rung, settings: Settings) -> Callable[[], list[Tensor]]:
        """Return what runs a rung."""
        if self.device != "cuda" and (rung.backend == "triton" or "graph" in rung.how):
            raise NotImplementedError("needs CUDA")
        work, backend = self.of(rung.dtype), rung.backend
        if rung.how == "published":
            return self._published(work, settings)

        def call(x: Tensor) -> Any:
            return work.model({"wsi": x}, strategy=rung.strategy, backend=backend)

        if rung.how == "motet's graph":
            return _graphed(work)
        if rung.how == "graph":
            if len(set(self.cell.lengths)) > 1:
                raise NotImplementedError("left out: a graph of everything is of one set of sizes")
            return captured(lambda: work.of(call, work.model))
        if rung.how == "compiled" and backend == "eager":
            call = torch.compile(call)
        return lambda: work.of(call, work.model)

    def _published(
        self, work: measure.Workload, settings: Settings, *, wide: bool = False
    ) -> Callable[[], list[Tensor]]:
        """Return what runs the authors' code; without positions, as bags have none."""
        from benchmarks.published import call

        model = self._their_model(settings).to(self.device)
        model = model.double() if wide else model
        lengths = torch.tensor(self.cell.lengths, device=self.device)
        mask = torch.arange(int(lengths.max()), device=self.device) < lengths[:, None]
        dense = bool(mask.all())

        def of_bags(x: Tensor) -> Tensor:
            if dense:
                return call(model, [x])
            bags = x.values().split(self.cell.lengths)
            return call(model, [torch.nn.utils.rnn.pad_sequence(list(bags), True)], mask)

        return lambda: work.of(of_bags, model)

    def _published_error(self, rung: Rung, settings: Settings) -> float:
        """Compare their code with itself in float64, since its weights are its own."""
        work = self.of(rung.dtype)
        gold = self._published(work.widened(), settings, wide=True)()
        return measure.relative_error(self._published(work, settings)(), gold)

    def _their_model(self, settings: Settings) -> nn.Module:
        from benchmarks.published import published_healnet

        if settings.published is None:
            raise NotImplementedError("no --published DIR")
        torch.manual_seed(0)
        config = self.cell.config
        return published_healnet(settings.published)(
            n_modalities=1, channel_dims=[self.cell.width], num_spatial_axes=[1], out_dims=4,
            depth=config.depth, l_c=config.latents, l_d=config.latent_dim, x_heads=config.heads,
            cross_dim_head=config.head_dim, attn_dropout=self.cell.dropout,
            weight_tie_layers=True, fourier_encode_data=False, self_per_cross_attn=0,
        )  # fmt: skip


def _graphed(work: measure.Workload) -> Callable[[], list[Tensor]]:
    """Return what runs a workload as motet's own graphs, the copy of its tokens included."""
    autocast = torch.bfloat16 if work.dtype != "fp32" else None
    if work.cell.step:
        steps = motet.StepGraphs(
            work.model, lambda logits, _: logits.square().sum(), autocast=autocast
        )

        def step() -> list[Tensor]:
            steps(Batch({"wsi": Ragged(work.tokens, work.offsets)}, {}, {}, {}))
            return [p.grad for p in work.model.parameters() if p.grad is not None]

        return step
    graphs = motet.CudaGraphs(work.model)
    return lambda: work.of(lambda x: graphs({"wsi": x}), work.model)


@contextmanager
def _reason_into(own: dict[str, Any], rung: Rung) -> Iterator[None]:
    """Write down why a rung has no time, and whether that is a fault; go on with the next.

    A wrong result always is, a break where it is motet's: not if the literal equation or the
    authors' code runs out of memory, nor if torch cannot compile or capture.
    """
    try:
        yield
    except NotImplementedError as error:
        own |= {"failed": str(error), "fault": False}
    except Exception as error:  # compilers raise anything
        ours = rung.how in ("eager", "motet's graph") and rung.strategy != "reference"
        own["failed"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        own["fault"] = ours or isinstance(error, ArithmeticError)


@contextmanager
def _time_box(rung: Rung, settings: Settings) -> Iterator[None]:
    """Stop what is compiled by torch when the time for that is spent."""
    if rung.how != "compiled":
        yield
        return
    if settings.compile_s < 1:
        raise NotImplementedError("left out: no time left for torch.compile")

    def stop(*_: object) -> None:
        raise NotImplementedError("left out: torch.compile took too long")

    started, former = time.perf_counter(), signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, settings.compile_s / 2)  # the other rung wants some too
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
    yield f"\n{row['cell']}: {row['strategy']}, predicted {row['predicted_ms']:.3f} ms"
    for name, own in row["rungs"].items():
        if "failed" in own:
            yield f"  {name:26} {own['failed'][:120]}"
            continue
        peak = f"{own['peak_mib']:8.0f} MiB" if "peak_mib" in own else ""
        count = f"{own['launches']:5} launches" if own.get("launches") else ""
        timing, ratio = measure.Timing(**own["ms"]), own.get("ratio", float("nan"))
        yield (
            f"  {name:26} {timing!s:28} x {ratio:6.2f}"
            f" {own['roof_share']:5.0%} of the roof, error {own['error']:.0e} {peak} {count}"
        ).rstrip()
