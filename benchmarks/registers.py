"""Compile every Triton kernel, as its launcher launches it, for GPUs that need not be there.

    python benchmarks/registers.py [--out benchmarks/results/registers.json]

The launchers run on the CPU with tensors of the sizes below, but what they would launch is only
recorded, with the dtypes, strides and divisibilities that Triton specialises on, and then compiled
ahead of time: registers, shared memory, spills, asynchronous copies, matrix instructions. Rows of
the table are told apart by kernel and specialisation; a name that many sizes share is the first's.
"""

import argparse
import ast
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

import torch

os.environ.pop("TRITON_INTERPRET", None)  # before triton: interpreted functions do not compile

import triton
from motet.kernels import (
    absorbed_attention_triton,
    context_kv_triton,
    harmonic_merge_triton,
    latent_attention_triton,
    lego_pass_triton,
    slerp_triton,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import JITFunction
from triton.runtime.jit import create_function_from_signature

# Shared memory that one program may have, in bytes.
CHIPS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
RESULT = Path(__file__).parent / "results" / "registers.json"
_MATRIX = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA)\b")
_BITS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Launch:
    """One specialisation of a kernel: what Triton compiles."""

    name: str
    chip: int
    function: JITFunction
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def source(self) -> tuple[ASTSource, dict[str, Any]]:
        backend = make_backend(GPUTarget("cuda", self.chip, 32))
        binder = create_function_from_signature(
            self.function.signature, self.function.params, backend
        )
        bound, specialization, options = binder(*self.arguments, **self.options)
        packed = self.function._pack_args(backend, options, bound, specialization, options)
        parsed, signature, constants, attributes = packed
        return ASTSource(self.function, signature, constants, attributes), parsed.__dict__

    def key(self) -> str:
        """What the machine code depends on, in few letters."""
        source, options = self.source()
        shape = [options[k] for k in ("num_warps", "num_stages")]
        parts = (source.signature, sorted(source.constants.items()), sorted(source.attrs), shape)
        return hashlib.sha256(f"{self.function.__name__} {parts}".encode()).hexdigest()[:12]

    def multiplies(self) -> bool:
        """Whether matrix units and asynchronous copies are to be expected."""
        return not self.function.__name__.startswith(
            ("_combine", "_merge", "_products", "_softmax")
        )


@dataclass(frozen=True)
class Compiled:
    """What came out."""

    name: str
    kernel: str
    chip: int
    key: str
    warps: int
    stages: int
    multiplies: bool
    registers: int
    spill_stores: int
    shared_bytes: int
    async_copies: int
    matrix_instructions: int


def launches(chip: int, cells: dict[str, Callable[[], object]] | None = None) -> list[Launch]:
    """Return what the launchers would launch for `cells`, by default for every shipped size."""
    recorded: dict[str, Launch] = {}
    for name, run in (SHIPPED if cells is None else cells).items():
        own: list[Launch] = []

        def record(self, *args, grid, warmup, name=name, own=own, **kwargs):
            names = [p.name for p in self.params]
            given = dict(zip(names, args, strict=False)) | kwargs
            options = {k: v for k, v in given.items() if k not in names}
            own.append(Launch(name, chip, self, tuple(given[k] for k in names), options))

        with (
            mock.patch.object(JITFunction, "run", record),
            mock.patch.object(context_kv_triton, "capability", return_value=chip),
            mock.patch.object(latent_attention_triton, "capability", return_value=chip),
        ):
            run()
        for launch in own:
            recorded.setdefault(launch.key(), launch)
    return list(recorded.values())


def compiled(launch: Launch) -> Compiled:
    """Compile one launch and read the machine code."""
    source, options = launch.source()
    target = GPUTarget("cuda", launch.chip, 32)
    kernel = triton.compile(source, target=target, options=options)
    sass = _cuobjdump("-sass", kernel.asm["cubin"])
    usage = _cuobjdump("-res-usage", kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    return Compiled(
        launch.name,
        launch.function.__name__,
        launch.chip,
        launch.key(),
        kernel.metadata.num_warps,
        kernel.metadata.num_stages,
        launch.multiplies(),
        max(int(n) for n in re.findall(r"REG:(\d+)", usage)),
        len(re.findall(r"\bSTL\b", sass)),
        kernel.metadata.shared,
        len(re.findall(r"cp\.async\.(?:c[ag]|bulk)", ptx)),
        len(_MATRIX.findall(sass)),
    )


_recorded: list[Launch] = []  # for the processes that main forks


def _compiled_number(index: int) -> Compiled:
    return compiled(_recorded[index])


def faults(result: Compiled, launch: Launch) -> list[str]:
    """Return what is wrong with a compiled kernel, in words."""
    wrong = []
    if result.spill_stores:
        wrong.append(f"{result.spill_stores} spill stores")
    if result.shared_bytes > CHIPS[result.chip]:
        wrong.append(f"{result.shared_bytes} bytes of shared memory > {CHIPS[result.chip]}")
    if launch.multiplies() and not result.async_copies:
        wrong.append("no asynchronous copies")
    if launch.multiplies() and not result.matrix_instructions:
        wrong.append("no matrix instructions")
    return [f"{result.kernel} for {result.name} on sm_{result.chip}: {text}" for text in wrong]


def _cuobjdump(flag: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def attention(
    dtype: str, heads: int, latents: int, width: int, *, dropout: float, ragged: bool,
    counted: bool = False,
) -> Callable[[], None]:  # fmt: skip
    """Return what calls every launcher of latent_attention_triton at one size."""

    def run() -> None:
        kernels = latent_attention_triton
        own = {"dtype": _BITS[dtype]}
        q = torch.empty(2, heads, latents, width, **own)
        if ragged:
            k, v = torch.empty(64, 2, heads, width, **own).unbind(1)
            dk, dv = torch.empty(64, 2, heads, width, **own).unbind(1)
            offsets = torch.tensor([0, 40, 64])
        else:
            packed = (torch.empty(2, 32, 2, heads, width, **own) for _ in range(2))
            (k, v), (dk, dv) = (x.permute(0, 2, 3, 1, 4).unbind(1) for x in packed)
            offsets = None
        counts = torch.empty(64 if ragged else (2, 32)) if counted else None
        shared = (q, k, v, offsets, counts)
        seed = torch.zeros(1, dtype=torch.int64)
        out, lse = kernels.attend(*shared, 0.25, dropout, seed)
        kernels.attend_backward(q, *shared, out, lse, 0.25, dropout, seed, dk, dv)
        for reduce in (None, "mean"):
            kernels.weights(q, k, offsets, lse, 0.25, reduce)

    return run


def context_kv(
    dtype: str, width: int, sets: int, outputs: int, *, channels: int = 0, grouped: bool = False,
    x_dtype: str | None = None,
) -> Callable[[], None]:  # fmt: skip
    """Return what calls every launcher of context_kv_triton at one size."""

    def run() -> None:
        own = {"dtype": _BITS[dtype]}
        x = torch.empty(256, width, dtype=_BITS[x_dtype or dtype])
        p = torch.empty(128, channels) if channels else None
        weight = torch.empty(sets, outputs, width + channels, **own)
        bias = torch.empty(sets, outputs, **own)
        offsets = torch.arange(sets + 1) if grouped else None
        mean, rstd = torch.empty(256), torch.empty(256)
        for statistics in ((None, None), (mean, rstd)):
            context_kv_triton.project(x, p, weight, bias, offsets, *statistics, 1e-5)
        a = torch.empty(256, outputs, **own) if grouped else torch.empty(sets, 256, outputs, **own)
        context_kv_triton.pool(a, x, p, mean, rstd, offsets)

    return run


def absorbed(
    dtype: str, rows: int, *, dropout: float, channels: int = 5, counted: bool = False
) -> Callable[[], None]:
    """Return what calls every launcher of absorbed_attention_triton at one size."""

    def run() -> None:
        kernels, own = absorbed_attention_triton, {"dtype": _BITS[dtype]}
        x, p, offsets = torch.empty(256, 2048, **own), torch.empty(128, channels), torch.arange(3)
        queries = torch.empty(2, rows, 2048 + channels, **own)
        seed = torch.zeros(1, dtype=torch.int64) if dropout else None
        counts = torch.empty(256) if counted else None
        found = kernels.attend(queries, x, p, offsets, counts, 1e-5, dropout, seed)
        pooled, mass, *rest = found
        delta = torch.empty(2, rows)
        kernels.attend_backward(
            pooled, mass, delta, queries, x, p, offsets, counts, *rest, 1e-5, dropout, seed
        )

    return run


def merge(count: int) -> Callable[[], None]:
    """Return what calls every launcher of both merge operators for `count` inputs."""

    def run() -> None:
        latents = [torch.empty(256, dtype=torch.complex64) for _ in range(count)]
        for phase in ("principal", "circular"):
            harmonic_merge_triton.merge(latents, [1 / count] * count, phase, latents[0])
        vectors = [torch.empty(256) for _ in range(count)]
        slerp_triton.products(vectors)
        slerp_triton.combine(vectors, torch.empty(count, dtype=torch.float64), vectors[0])

    return run


def lego_pass(
    dtype: str, latents: int, dim: int, axes: tuple[int, ...] = (-2, -1), *,
    rows: int | None = None, snn: bool = True,
) -> Callable[[], None]:  # fmt: skip
    """Return what calls every launcher of lego_pass_triton at one size, products in `dtype`."""

    def run() -> None:
        kernels, products, inner = lego_pass_triton, _BITS[dtype], 8 * 64
        real, imaginary, keep = (torch.empty(2, latents, dim) for _ in range(3))
        gathered = torch.empty(2, 8, latents, 64, dtype=products)
        shapes = [
            (dim, inner), (dim,), (dim,), (dim,), (8 * dim, dim), (8 * dim,), (dim, 4 * dim),
            (dim,), (dim,), (dim,), (inner, dim),
        ]  # fmt: skip
        present, scaled = torch.ones(2, 2, dtype=torch.bool).unbind()
        rest = [
            *map(torch.empty, shapes), present, keep, scaled, snn, axes, rows or latents, products
        ]  # fmt: skip
        x, y, queries, scale = kernels.forward(real, imaginary, gathered, *rest)
        kernels.backward(x, y, queries, x, y, scale, real, gathered, *rest)

    return run


def sources() -> dict[str, str]:
    """Return a digest of every file of kernels, for which comments and layout do not count."""
    digests = {}
    for module in (
        absorbed_attention_triton, context_kv_triton, harmonic_merge_triton,
        latent_attention_triton, lego_pass_triton, slerp_triton,
    ):  # fmt: skip
        path = Path(module.__file__)
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            first = body[0] if isinstance(body, list) and body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                first.value.value = ""  # a docstring
        digests[path.name] = hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]
    return digests


def _shipped() -> Iterator[tuple[str, Callable[[], object]]]:
    # (heads, latents, width): TCGA as released, as in the paper (8 heads) where the blocks differ,
    # and 8x64.
    sizes = [
        (1, 25, 16), (1, 17, 64), (1, 17, 32), (1, 16, 112), (8, 25, 128), (8, 16, 80),
        (8, 64, 64), (8, 256, 64),
    ]  # fmt: skip
    for heads, latents, width in sizes:
        for dtype in ("bf16", "fp32"):
            for dropout in (0.0, 0.1):
                name = f"attention {dtype} {heads}x{width} c{latents}"
                yield (
                    f"{name} dropout" if dropout else name,
                    attention(dtype, heads, latents, width, dropout=dropout, ragged=True),
                )
    yield "attention bf16 8x64 c64 dense", attention("bf16", 8, 64, 64, dropout=0, ragged=False)
    yield (
        "attention fp16 8x64 c64 dropout",
        attention("fp16", 8, 64, 64, dropout=0.1, ragged=True),
    )
    yield (
        "attention bf16 1x256 c64 dropout",
        attention("bf16", 1, 64, 256, dropout=0.1, ragged=True),
    )
    for heads, latents, width in ((1, 25, 16), (1, 17, 64), (8, 25, 128), (8, 64, 64)):
        for dtype in ("bf16", "fp32"):
            yield (
                f"attention {dtype} {heads}x{width} c{latents} counts",
                attention(dtype, heads, latents, width, dropout=0, ragged=True, counted=True),
            )
    for heads, latents in ((1, 17), (8, 64)):
        yield (
            f"attention bf16 {heads}x64 c{latents} dense counts",
            attention("bf16", heads, latents, 64, dropout=0, ragged=False, counted=True),
        )
    for dtype in ("bf16", "fp32"):
        for sets, outputs in ((1, 32), (1, 128), (1, 224), (5, 64), (1, 1024), (1, 1648)):
            yield (
                f"context {dtype} 2048+5 to {sets}x{outputs}",
                context_kv(dtype, 2048, sets, outputs, channels=5),
            )
        yield (f"context {dtype} 1024 to 1x128", context_kv(dtype, 1024, 1, 128))
        for outputs in (16, 32, 200):
            yield (
                f"context {dtype} 2048+5 to {outputs} grouped",
                context_kv(dtype, 2048, 2, outputs, channels=5, grouped=True),
            )
    yield ("context fp16 2048+5 to 1x128", context_kv("fp16", 2048, 1, 128, channels=5))
    yield (
        "context bf16 from fp32 2048+5 to 1x128",
        context_kv("bf16", 2048, 1, 128, channels=5, x_dtype="fp32"),
    )

    for rows in (17, 136, 200):
        for dropout in (0.0, 0.1):
            name = f"absorbed bf16 {rows} queries"
            yield f"{name} dropout" if dropout else name, absorbed("bf16", rows, dropout=dropout)
    yield "absorbed fp32 136 queries dropout", absorbed("fp32", 136, dropout=0.1)
    for dtype, rows in (("bf16", 17), ("bf16", 136), ("fp32", 136)):
        name = f"absorbed {dtype} {rows} queries counts"
        yield name, absorbed(dtype, rows, dropout=0, counted=True)

    for count in (2, 3, 8):
        yield f"merge of {count}", merge(count)

    for dtype in ("bf16", "fp32"):
        for latents, dim in ((17, 126), (25, 119), (64, 64), (256, 32)):
            yield f"pass {dtype} {latents}x{dim}", lego_pass(dtype, latents, dim)
            yield f"pass {dtype} {latents}x{dim} gelu", lego_pass(dtype, latents, dim, snn=False)
        for latents, dim, rows in ((9, 126, 17), (33, 64, 64)):
            yield (
                f"pass {dtype} {latents}x{dim} of {rows}",
                lego_pass(dtype, latents, dim, (-2,), rows=rows),
            )
        for dim, axes in ((64, ()), (126, (-1,)), (256, (-1,))):  # rows apart
            yield f"pass {dtype} rows of {dim}", lego_pass(dtype, 64, dim, axes)


SHIPPED = dict(_shipped())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="default: %(default)s")
    parser.add_argument("--only", help="the one size to compile, by its name in the table")
    parser.add_argument("--keys", action="store_true", help="say what would be compiled, as JSON")
    arguments = parser.parse_args()
    chosen = SHIPPED if arguments.only is None else {arguments.only: SHIPPED[arguments.only]}
    found = [launch for chip in CHIPS for launch in launches(chip, chosen)]
    if arguments.keys:
        keys = [f"{launch.chip} {launch.key()}" for launch in found]
        print(json.dumps({"sources": sources(), "keys": keys}))
        return
    columns = [field.name for field in fields(Compiled)]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    rows, wrong = [], []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        # Forked, so that processes share what was recorded; launches do not pickle.
        _recorded.extend(found)
        with multiprocessing.get_context("fork").Pool(arguments.jobs) as pool:
            for index, result in enumerate(pool.imap(_compiled_number, range(len(found)))):
                rows.append(asdict(result))
                wrong += faults(result, found[index])
                print(f"| {' | '.join(map(str, rows[-1].values()))} |", flush=True)
    arguments.out.parent.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = f'"triton": "{triton.__version__}", "sources": {json.dumps(sources())}'
    arguments.out.write_text(f'{{{head}, "rows": [\n{lines}\n]}}\n')
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
