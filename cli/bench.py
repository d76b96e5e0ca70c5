"""`motet bench`: time HEALNet, next to the literal equation and the limits of the machine."""

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
    """Return the cells of `motet bench`, in pairs: the logits, and a training step."""
    bags, patches, ragged = (8, 15_000, RAGGED_GPU) if device == "cuda" else (4, 4000, RAGGED_CPU)
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


# Lengths of ragged batches: evenly spaced on a log scale, with about as many patches in all as the
# batches of equal bags.
RAGGED_CPU = (500, 1400, 3700, 10_400)
RAGGED_GPU = (500, 991, 1963, 3891, 7711, 15_281, 30_283, 60_000)


def shape_name(lengths: Sequence[int]) -> str:
    """Return "8x15000" for equal bags, "8 ragged" for others."""
    bags = len(lengths)
    return f"{bags}x{lengths[0]}" if len(set(lengths)) == 1 else f"{bags} ragged"


def measure(
    cell: Cell, dtype: str, device: str, roofline: Roofline, *, quick: bool
) -> dict[str, Any]:
    """Return a row of the table: errors and, if they are within bounds, times and peak memory."""
    gpu = device == "cuda"  # a GPU runs graphs, on tokens with known statistics
    planned = cell.plan(dtype, device, graph=gpu, statistics=gpu)
    strategy = cast(Strategy, planned.strategy)  # these cells have more than one token
    row: dict[str, Any] = {"cell": cell.name, "dtype": dtype, "strategy": strategy}
    row["predicted_ms"] = 1e3 * planned.seconds
    try:
        row["error"], row["allowed_error"] = _measure_errors(cell, dtype, device)
        if not row["error"]["motet"] <= row["allowed_error"]:
            return row | {"failed": f"error {row['error']['motet']:.1e} is out of bounds"}
        times, row["peak_mib"] = _measure_times_and_peaks(cell, dtype, device, quick=quick)
    except RuntimeError as error:  # most often: out of memory
        return row | {"failed": " ".join(str(error).split())}
    row["ms"] = {name: timing._asdict() for name, timing in times.items()}
    row["ratio"] = times["reference"].median / times["motet"].median
    least = roofline.seconds(cell, dtype, planned.cost.flop)
    return row | {"roofline_share": 1e3 * least / times["motet"].median}


def _make_contenders(work: Workload) -> dict[str, Callable[[], Callable[[], list[Tensor]]]]:
    """Return functions that make the functions to compare.

    On a GPU "motet" is the CUDA graph of `motet train`, and "eager" the same without a graph.
    """
    makers = {"motet": lambda: work.run, "reference": lambda: partial(work.run, "reference")}
    return (
        makers
        if work.device != "cuda"
        else {**makers, "motet": work.graphed, "eager": makers["motet"]}
    )


def _measure_errors(cell: Cell, dtype: str, device: str) -> tuple[dict[str, float], float]:
    """Return the errors and the largest allowed error; on a CPU of short bags: float64 is slow."""
    work = Workload(cell if device == "cuda" else cell.shortened(300), dtype, device)
    exact = work.exact()
    errors = {
        contender: relative_error(make()(), exact)
        for contender, make in _make_contenders(work).items()
    }
    return errors, 2 * errors["reference"] + FLOOR[dtype]


def _measure_times_and_peaks(
    cell: Cell, dtype: str, device: str, *, quick: bool
) -> tuple[dict[str, Timing], dict[str, float]]:
    work, rounds = Workload(cell, dtype, device), 3 if quick else 15
    runs: dict[str, Callable[[], list[Tensor]]] = {}
    peaks: dict[str, float] = {}

    def begin(contender: str, make: Callable[[], Callable[[], list[Tensor]]]) -> None:
        runs[contender] = make()  # a graph allocates its memory here
        runs[contender]()

    for contender, make in _make_contenders(work).items():
        if device == "cuda":
            peaks[contender] = cuda_peak(partial(begin, contender, make), work.tokens)
        else:
            begin(contender, make)
    times = in_turns(runs, device, rounds=rounds)
    if device == "cuda":
        return times, peaks
    if sys.platform == "win32":  # which does not report peak memory
        return times, {}
    runs.clear()
    del work
    threads, strategies = torch.get_num_threads(), {"motet": None, "reference": "reference"}
    return times, {
        name: in_child(threads, _measure_memory, cell, dtype, s) for name, s in strategies.items()
    }


def _measure_memory(cell: Cell, dtype: str, strategy: Strategy | None) -> float:
    """Return the growth of memory by a batch and a run on it; a small run loads libraries first."""
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
    """Measure and print; return 1 if something failed or had an error out of bounds."""
    device_name = choose_device(device, threads)
    path = None if json_to in (None, "-") else Path(cast(str, json_to))
    check_folder("--json", path)
    table_file = sys.stderr if json_to == "-" else sys.stdout
    facts = about(device_name)
    print(_format_header(facts), file=table_file)
    roofline = measure_roofline(device_name, quick=quick)
    print(
        f"{roofline}\n{_EXPLAINED[device_name]}\n\n{_titles(device_name)}",
        file=table_file,
        flush=True,
    )
    rows = []
    for cell in cells(device_name, quick=quick):
        for name in DTYPES if dtype is None else (dtype,):
            rows.append(measure(cell, name, device_name, roofline, quick=quick))
            _show(rows[-1], device_name, table_file)
    text = json.dumps(
        {**facts, "quick": quick, "roofline": roofline._asdict(), "rows": rows}, indent=1
    )
    if path is not None:
        path.write_text(text + "\n")
    elif json_to == "-":
        print(text)
    return 1 if any("failed" in row for row in rows) else 0


def _format_header(facts: Mapping[str, Any]) -> str:
    triton = f", triton {facts['triton']}" if "triton" in facts else ""
    return (
        f"motet bench: {facts['device']}, threads: {facts['threads']}; torch {facts['torch']}"
        f"{triton}; motet {facts['motet']}, revision {facts['revision']}; {facts['date']}"
    )


_EXPLAINED = {
    device: (
        f"ms: median (quartiles), measured in turns with the reference, which is the\nliteral "
        f"equation in torch{note}.\nx: reference ms / ms.\nroofline: least possible time / ms, by "
        "the rates above, if tokens are read once\n(twice in a step) and the strategy's FLOP are "
        f"computed.\nMiB: {memory}, data included.\nerror: relative error of logits or "
        f"gradients (norms) against float64{short}.\nIf it is too large, nothing is timed."
    )
    for device, memory, note, short in (
        ("cpu", "growth of the peak resident memory of a fresh process", "", "\n(of short bags)"),
        (
            "cuda",
            "peak of torch's allocations on the GPU",
            ", and with eager mode.\nms is the time of a CUDA graph, with the copy of the batch",
            "",
        ),
    )
}


def _columns(device: str) -> dict[str, tuple[int, Callable[[Mapping[str, Any]], str]]]:
    """Return the columns of the table: title to width and function that makes the text."""

    def make_time_column(contender: str) -> tuple[int, Callable[[Mapping[str, Any]], str]]:
        return 24, lambda row: str(Timing(**row["ms"][contender]))

    def make_peak_text(contender: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda row: f"{row['peak_mib'][contender]:.0f}" if row["peak_mib"] else "-"

    return {
        "ms": make_time_column("motet"),
        **({"eager ms": make_time_column("eager")} if device == "cuda" else {}),
        "reference ms": make_time_column("reference"),
        "x": (6, lambda row: f"{row['ratio']:.2f}"),
        "predicted ms": (13, lambda row: figures(row["predicted_ms"])),
        "roofline": (8, lambda row: f"{row['roofline_share']:.0%}"),
        "MiB": (8, make_peak_text("motet")),
        "reference MiB": (13, make_peak_text("reference")),
        "error": (8, lambda row: f"{row['error']['motet']:.0e}"),
        "reference error": (15, lambda row: f"{row['error']['reference']:.0e}"),
    }


def _format_start(cell: str, dtype: str, strategy: str) -> str:
    return f"{cell:24} {dtype:5} {strategy:9}"


def _titles(device: str) -> str:
    padded = [
        f"{title:{width}}" if width == 24 else f"{title:>{width}}"
        for title, (width, _) in _columns(device).items()
    ]
    return " ".join([_format_start("cell", "dtype", "strategy"), *padded]).rstrip()


def _show(row: Mapping[str, Any], device: str, file: TextIO) -> None:
    start = _format_start(row["cell"], row["dtype"], row["strategy"])
    if "failed" in row:
        print(f"{start} {row['failed']}", file=file, flush=True)
        return
    texts = [(width, text(row)) for width, text in _columns(device).values()]
    padded = [f"{text:{width}}" if width == 24 else f"{text:>{width}}" for width, text in texts]
    print(" ".join([start, *padded]).rstrip(), file=file, flush=True)
