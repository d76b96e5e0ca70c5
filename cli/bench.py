"""`motet bench`: HEALNet on this machine, beside the literal equation and the machine's limits."""

import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO, cast

import torch

from ..kernels.plan import Strategy
from .measure import (
    CONFIGS,
    DTYPES,
    FLOOR,
    Cell,
    Roof,
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
    measure_roof,
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


def measure(cell: Cell, dtype: str, device: str, roof: Roof, *, quick: bool) -> dict[str, Any]:
    """Return a row of the table: errors, and where they are in bounds times and peak memory."""
    planned = cell.plan(dtype, device)
    own = cast(Strategy, planned.strategy)  # these cells have more than one token
    strategies: dict[str, Strategy] = {"motet": own, "reference": "reference"}
    row: dict[str, Any] = {"cell": cell.name, "dtype": dtype, "strategy": own}
    row["predicted_ms"] = 1e3 * planned.cost.seconds
    try:
        row["error"], row["allowed_error"] = _errors(cell, dtype, device, strategies)
        if not row["error"]["motet"] <= row["allowed_error"]:
            return row | {"failed": f"error {row['error']['motet']:.1e} is out of bounds"}
        times, row["peak_mib"] = _times_and_peaks(cell, dtype, device, strategies, quick=quick)
    except RuntimeError as error:  # no memory, above all
        return row | {"failed": " ".join(str(error).split())}
    row["ms"] = {name: timing._asdict() for name, timing in times.items()}
    row["ratio"] = times["reference"].median / times["motet"].median
    least = roof.seconds(cell, dtype, planned.cost.flop)
    return row | {"roof_share": 1e3 * least / times["motet"].median}


def _errors(
    cell: Cell, dtype: str, device: str, strategies: Mapping[str, Strategy]
) -> tuple[dict[str, float], float]:
    small = Workload(cell.shortened(2000 if device == "cuda" else 300), dtype, device)
    gold = small.gold()
    errors = {name: relative_error(small.run(s), gold) for name, s in strategies.items()}
    return errors, 2 * errors["reference"] + FLOOR[dtype]


def _times_and_peaks(
    cell: Cell, dtype: str, device: str, strategies: Mapping[str, Strategy], *, quick: bool
) -> tuple[dict[str, Timing], dict[str, float]]:
    work = Workload(cell, dtype, device)
    runs = {name: partial(work.run, strategy) for name, strategy in strategies.items()}
    times = in_turns(runs, device, rounds=3 if quick else 15)
    if device == "cuda":
        return times, {name: cuda_peak(run, work.tokens) for name, run in runs.items()}
    if sys.platform == "win32":  # which does not say
        return times, {}
    del work, runs
    threads = torch.get_num_threads()
    return times, {
        name: in_child(threads, _memory_of, cell, dtype, s) for name, s in strategies.items()
    }


def _memory_of(cell: Cell, dtype: str, strategy: Strategy) -> float:
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
    roof = measure_roof(chosen, quick=quick)
    print(f"{roof}\n{_EXPLAINED[chosen]}\n\n{_line(_TITLES)}", file=shown, flush=True)
    rows = []
    for cell in cells(chosen, quick=quick):
        for name in DTYPES if dtype is None else (dtype,):
            rows.append(measure(cell, name, chosen, roof, quick=quick))
            _show(rows[-1], shown)
    text = json.dumps({**facts, "quick": quick, "roof": roof._asdict(), "rows": rows}, indent=1)
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
        "ms: median (quartiles), in turns with the reference, the literal equation in torch; x: "
        "reference / ms.\nroof: share of what was measured above, for tokens read once (twice in a "
        f"step) and the strategy's FLOP.\nMiB: {memory}, data included.\nerror: norm of "
        "logits or gradients against float64, relative, on short bags; no time where it is too "
        "large."
    )
    for device, memory in (
        ("cpu", "peak resident memory of a fresh process, growth"),
        ("cuda", "peak of torch's allocations on the GPU"),
    )
}
_TITLES = (
    "cell", "dtype", "strategy", "ms", "reference ms", "x", "predicted ms", "roof", "MiB",
    "reference", "error", "reference",
)  # fmt: skip
_WIDTHS = (24, 5, 9, 24, 24, 6, 13, 6, 8, 9, 8, 9)


def _line(texts: Sequence[str]) -> str:
    padded = [
        f"{text:{width}}" if i < 5 else f"{text:>{width}}"
        for i, (text, width) in enumerate(zip(texts, _WIDTHS, strict=True))
    ]
    return " ".join(padded).rstrip()


def _show(row: Mapping[str, Any], file: TextIO) -> None:
    start = (row["cell"], row["dtype"], row["strategy"])
    if "failed" in row:
        print(f"{row['cell']:24} {row['dtype']:5} {row['strategy']:9} {row['failed']}", file=file)
        return
    both = ("motet", "reference")
    print(
        _line(
            (
                *start,
                *(str(Timing(**row["ms"][name])) for name in both),
                f"{row['ratio']:.2f}",
                f"{figures(row['predicted_ms'])}",
                f"{row['roof_share']:.0%}",
                *(f"{row['peak_mib'][name]:.0f}" if row["peak_mib"] else "-" for name in both),
                *(f"{row['error'][name]:.0e}" for name in both),
            )
        ),
        file=file,
        flush=True,
    )
