"""`make gpu`: check and time everything on the GPU at hand, and write one JSON file.

Runs in the environment that is active, since GPU machines bring their own torch. Every model on the
device is compared with itself on the CPU in float64; where that fails, nothing is timed. Every time
has its error beside it, and what is too wrong has no time. Either makes the exit code 1.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TOLERANCE = 1e-3  # relative, float32, of a result or of all gradients


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON file")
    parser.add_argument("--device", default="cuda", help="cpu runs the same as a smoke test")
    parser.add_argument("--small", action="store_true", help="the smallest cells only")
    options = parser.parse_args()

    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("make gpu: torch finds no CUDA device here", file=sys.stderr)
        return 2
    print(json.dumps(about := _about(torch, options.device)), flush=True)
    checks = _checks(options.device)
    failed = [check["name"] for check in checks if not check["passed"]]
    cells = [] if failed else _times(options.device, options.small)
    failed += [cell["name"] for cell in cells if "median_ms" not in cell]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"gpu-{about['device'].replace(' ', '-')}-{about['revision'][:12]}.json"
    path.write_text(json.dumps({**about, "checks": checks, "cells": cells}, indent=1) + "\n")
    print(f"{len(failed)} failed {failed or ''}; written to {path}")
    return 1 if failed else 0


def _about(torch: Any, device: str) -> dict[str, Any]:
    def first_line(*command: str) -> str:
        try:
            run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
        return (run.stdout.splitlines() or ["unknown"])[0]

    from motet.kernels import native

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "revision": first_line("git", "rev-parse", "HEAD"),
        "native": native.status() or "built",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _checks(device: str) -> list[dict[str, Any]]:
    """Compare every model on the device with itself on the CPU, float64, gradients too."""
    import motet
    import torch

    torch.manual_seed(0)
    sizes = {"num_latents": 17, "latent_dim": 30}
    blocks = {
        "omic": motet.LegoBlock(motet.Tabular(40), motet.SNN(40), out_features=4, **sizes),
        "wsi": motet.LegoBlock(motet.Bag(32), motet.ABMIL(32), out_features=4, **sizes),
    }
    modalities = {"omic": motet.Tabular(40), "wsi": motet.Bag(32)}
    models = {
        "LegoBlock": motet.LegoMerge({"wsi": blocks["wsi"]}),
        "HEALNet": motet.HEALNet(modalities, out_features=4, self_attention=1),
        "LegoMerge": motet.LegoMerge(blocks),
        "LegoFuse stack": motet.LegoFuse(blocks),
        "LegoFuse weave": motet.LegoFuse(blocks, mode="weave"),
    }
    inputs = {"omic": torch.randn(5, 40), "wsi": torch.randn(5, 70, 32)}
    mask = torch.rand(5, 70) < 0.5
    mask[2] = False

    def outcome(model: torch.nn.Module, device: str) -> torch.Tensor:
        model = model.double().to(device).eval()
        model.zero_grad()
        given = {name: x.double().to(device) for name, x in inputs.items()}
        if not isinstance(model, motet.HEALNet):
            given = {name: x for name, x in given.items() if name in model.blocks}
        logits = model(given, masks={"wsi": mask.to(device)})
        logits.square().sum().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return torch.cat([logits.detach().flatten(), *gradients]).cpu()

    checks = []
    for name, model in models.items():
        expected = outcome(model, "cpu")
        error = ((outcome(model, device) - expected).abs().max() / expected.abs().max()).item()
        checks.append({"name": f"{name} float64", "error": error, "passed": error < 1e-9})
        print(f"{name:16} error {error:.1e}", flush=True)
    return checks


def _times(device: str, small: bool) -> list[dict[str, Any]]:
    import torch

    from benchmarks.cells import healnet_cells, lego_cells, merge_cells

    # Full float32 products, so that the error beside a time is that of the operator.
    torch.backends.cuda.matmul.allow_tf32 = False
    sizes = (1000,) if small else (8 * 17 * 126, 1 << 24)
    tokens = (20,) if small else (500, 4000, 15000)
    makers: list[Callable[[], list[Any]]] = [
        *(lambda n=n: merge_cells(device, n) for n in sizes),
        *(lambda n=n: healnet_cells(device, n) for n in tokens),
        *(lambda n=n: lego_cells(device, n) for n in tokens),
    ]
    rows = []
    for make in makers:
        for cell in make():
            contenders = {"motet": cell.run}
            # On a GPU the operators still run their torch form: nothing to compare with.
            if cell.rival is not None and device == "cpu":
                contenders["torch"] = cell.rival
            errors = {who: cell.error(run) for who, run in contenders.items()}
            row: dict[str, Any] = {"name": cell.name, "errors": errors}
            if errors["motet"] < TOLERANCE:  # no time beside a wrong result
                row |= _timed(contenders, cell.arguments, device)
            rows.append(row)
            times = row.get("median_ms", {"motet": float("nan")})
            shown = "  ".join(
                f"{who} {times.get(who, float('nan')):9.3f} ms (error {error:.1e})"
                for who, error in errors.items()
            )
            print(f"{cell.name:34} {shown}", flush=True)
    return rows


def _timed(
    contenders: dict[str, Callable[..., Any]], arguments: tuple[Any, ...], device: str
) -> dict[str, Any]:
    """Return medians and spreads of 20 runs, taken in turns and waited for, and peak memory."""
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    peaks, samples = {}, {who: [] for who in contenders}
    for who, run in contenders.items():
        for _ in range(3):
            run(*arguments)
        wait()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            run(*arguments)
            wait()
            peaks[who] = torch.cuda.max_memory_allocated() / 2**20
    for _ in range(20):
        for who, run in contenders.items():
            started = time.perf_counter()
            run(*arguments)
            wait()
            samples[who].append(1e3 * (time.perf_counter() - started))
    quartiles = {who: statistics.quantiles(times, n=4) for who, times in samples.items()}
    return {
        "median_ms": {who: middle for who, (_, middle, _) in quartiles.items()},
        "iqr_ms": {who: high - low for who, (low, _, high) in quartiles.items()},
        "peak_mib": peaks,
    }


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # for benchmarks.cells
    sys.exit(main())
