"""`motet bench`: HEALNet on this machine, beside the literal equation and the machine's limits."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from torch import Tensor

from ..kernels.plan import Strategy
from .measure import (
    CONFIGS,
    DTYPES,
    FLOOR,
    Cell,
    Roofline,
    Timing,
    Workload,
    about,
    check_folder,
    choose_device,
    cuda_peak,
    figures,
    growth,
    in_child,
    in_turns,
    measure_roofline,
    relative_error,
)  # fmt: skip


def cells(device: str, *, quick: bool = False) -> list[Cell]:
    """Return what `motet bench` measures, in pairs: logits, and a training step."""
    bags, patches, ragged = (8, 15_000, RAGGED) if device == "cuda" else (4, 4000, FEWER)
    width, names = 2048, list(CONFIGS)
    if quick:
        bags, patches, ragged, width, names = 2, 50, (1, 20, 60), 64, ["blca", "kirp"]
    batches = [(name, CONFIGS[name], (patches,) * bags) for name in names]
    batches.append(("blca", CONFIGS["blca"], ragged))
    return [
        Cell(f"{name} {shape_name(lengths)} {kind}", config, lengths, kind == "step", width)
        for name, config, lengths in batches
        for kind in ("forward", "step")
    ]


# Ragged batches, log-uniform, about as many patches in all as the batches of one length.
FEWER = (500, 1400, 3700, 10_400)
RAGGED = (500, 991, 1963, 3891, 7711, 15_281, 30_283, 60_000)


def shape_name(lengths: Sequence[int]) -> str:
    """Return 8x15000, or "8 ragged"."""
    bags = len(lengths)
    return f"{bags}x{lengths[0]}" if len(set(lengths)) == 1 else f"{bags} ragged"


def measure(
    cell: Cell, dtype: str, device: str, roofline: Roofline, *, quick: bool
) -> dict[str, Any]:
    """Return a row of the table: errors, and where they are in bounds times and peak memory."""
    gpu = device == "cuda"  # whose time is that of a graph, on tokens with known statistics
    planned = cell.plan(dtype, device, graph=gpu, statistics=gpu)
    own = cast(Strategy, planned.strategy)  # these cells have more than one token
    row: dict[str, Any] = {"cell": cell.name, "dtype": dtype, "strategy": own}
    row["predicted_ms"] = 1e3 * planned.seconds
    try:
        row["error"], row["allowed_error"] = _errors(cell, dtype, device)
        if not row["error"]["motet"] <= row["allowed_error"]:
            return row | {"failed": f"error {row['error']['motet']:.1e} is out of bounds"}
        times, row["peak_mib"] = _times_and_peaks(cell, dtype, device, quick=quick)
    except RuntimeError as error:  # no memory, above all
        return row | {"failed": " ".join(str(error).split())}
    row["ms"] = {name: timing._asdict() for name, timing in times.items()}
    row["ratio"] = times["reference"].median / times["motet"].median
    least = roofline.seconds(cell, dtype, planned.cost.flop)
    return row | {"roofline_share": 1e3 * least / times["motet"].median}


def _contenders(work: Workload) -> dict[str, Callable[[], Callable[[], list[Tensor]]]]:
    """Return what makes what is compared: on a GPU the graph of `motet train`, and eager mode."""
    made = {"motet": lambda: work.run, "reference": lambda: partial(work.run, "reference")}
    return (
        made if work.device != "cuda" else {**made, "motet": work.graphed, "eager": made["motet"]}
    )


def _errors(cell: Cell, dtype: str, device: str) -> tuple[dict[str, float], float]:
    """Return the errors, and what they may be; on a CPU, where float64 is slow, of short bags."""
    work = Workload(cell if device == "cuda" else cell.shortened(300), dtype, device)
    exact = work.exact()
    errors = {who: relative_error(make()(), exact) for who, make in _contenders(work).items()}
    return errors, 2 * errors["reference"] + FLOOR[dtype]


def _times_and_peaks(
    cell: Cell, dtype: str, device: str, *, quick: bool
) -> tuple[dict[str, Timing], dict[str, float]]:
    work, rounds = Workload(cell, dtype, device), 3 if quick else 15
    runs: dict[str, Callable[[], list[Tensor]]] = {}
    peaks: dict[str, float] = {}

    def begin(who: str, make: Callable[[], Callable[[], list[Tensor]]]) -> None:
        runs[who] = make()  # a graph takes its memory here
        runs[who]()

    for who, make in _contenders(work).items():
        if device == "cuda":
            peaks[who] = cuda_peak(partial(begin, who, make), work.tokens)
        else:
            begin(who, make)
    times = in_turns(runs, device, rounds=rounds)
    if device == "cuda":
        return times, peaks
    if sys.platform == "win32":  # which does not say
        return times, {}
    runs.clear()
    del work
    threads, strategies = torch.get_num_threads(), {"motet": None, "reference": "reference"}
    return times, {
        name: in_child(threads, _memory_of, cell, dtype, s) for name, s in strategies.items()
    }


def _memory_of(cell: Cell, dtype: str, strategy: Strategy | None) -> float:
    """Return the growth by a batch and a run on it, after a small one that loads the libraries."""
    Workload(cell.shortened(16), dtype, "cpu").run(strategy)
    return growth(lambda: Workload(cell, dtype, "cpu").run(strategy))


def main(
    *,
    device: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    quick: bool = False,
    json_to: str | None = None,
) -> int:
    """Measure and print; return 1 if something failed or was too wrong to be timed."""
    chosen = choose_device(device, threads)
    path = None if json_to in (None, "-") else Path(cast(str, json_to))
    check_folder("--json", path)
    shown = sys.stderr if json_to == "-" else sys.stdout
    facts = about(chosen)
    print(_header(facts), file=shown)
    roofline = measure_roofline(chosen, quick=quick)
    print(f"{roofline}\n{_EXPLAINED[chosen]}\n\n{_titles(chosen)}", file=shown, flush=True)
    rows = []
    for cell in cells(chosen, quick=quick):
        for name in DTYPES if dtype is None else (dtype,):
            rows.append(measure(cell, name, chosen, roofline, quick=quick))
            _show(rows[-1], chosen, shown)
    text = json.dumps(
        {**facts, "quick": quick, "roofline": roofline._asdict(), "rows": rows}, indent=1
    )
    if path is not None:
        path.write_text(text + "\n")
    elif json_to == "-":
        print(text)
    return 1 if any("failed" in row for row in rows) else 0


def _header(facts: Mapping[str, Any]) -> str:
    triton = f", triton {facts['triton']}" if "triton" in facts else ""
    return (
        f"motet bench: {facts['device']}, threads: {facts['threads']}; torch {facts['torch']}"
        f"{triton}; motet {facts['motet']}, revision {facts['revision']}; {facts['date']}"
    )


_EXPLAINED = {
    device: (
        "ms: median (quartiles), in turns with the reference, the literal equation in torch"
        f"{more}; x: reference / ms.\nroof: share of what was measured above, for tokens read "
        f"once (twice in a step) and the strategy's FLOP.\nMiB: {memory}, data included.\n"
        f"error: norm of logits or gradients against float64, relative{short}; no time where it is "
        "too large."
    )
    for device, memory, more, short in (
        ("cpu", "peak resident memory of a fresh process, growth", "", ", on short bags"),
        (
            "cuda",
            "peak of torch's allocations on the GPU",
            ", and with eager mode; ms is that of a CUDA graph, copy of the batch included",
            "",
        ),
    )
}


def _columns(device: str) -> dict[str, tuple[int, Callable[[Mapping[str, Any]], str]]]:
    """Return title to width and text of the columns."""

    def time_of(who: str) -> tuple[int, Callable[[Mapping[str, Any]], str]]:
        return 24, lambda row: str(Timing(**row["ms"][who]))

    def peak_of(who: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda row: f"{row['peak_mib'][who]:.0f}" if row["peak_mib"] else "-"

    return {
        "ms": time_of("motet"),
        **({"eager ms": time_of("eager")} if device == "cuda" else {}),
        "reference ms": time_of("reference"),
        "x": (6, lambda row: f"{row['ratio']:.2f}"),
        "predicted ms": (13, lambda row: figures(row["predicted_ms"])),
        "roofline": (8, lambda row: f"{row['roofline_share']:.0%}"),
        "MiB": (8, peak_of("motet")),
        "reference MiB": (13, peak_of("reference")),
        "error": (8, lambda row: f"{row['error']['motet']:.0e}"),
        "reference error": (15, lambda row: f"{row['error']['reference']:.0e}"),
    }


def _start(cell: str, dtype: str, strategy: str) -> str:
    return f"{cell:24} {dtype:5} {strategy:9}"


def _titles(device: str) -> str:
    padded = [
        f"{title:{width}}" if width == 24 else f"{title:>{width}}"
        for title, (width, _) in _columns(device).items()
    ]
    return " ".join([_start("cell", "dtype", "strategy"), *padded]).rstrip()


def _show(row: Mapping[str, Any], device: str, file: TextIO) -> None:
    start = _start(row["cell"], row["dtype"], row["strategy"])
    if "failed" in row:
        print(f"{start} {row['failed']}", file=file, flush=True)
        return
    texts = [(width, text(row)) for width, text in _columns(device).values()]
    padded = [f"{text:{width}}" if width == 24 else f"{text:>{width}}" for width, text in texts]
    print(" ".join([start, *padded]).rstrip(), file=file, flush=True)
