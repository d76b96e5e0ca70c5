"""Compile every Triton kernel, as its launcher launches it, for GPUs that this machine lacks.

    python benchmarks/registers.py [--out benchmarks/results/registers.json]

The launchers run on the CPU with tensors of the sizes in launches.py. Their launches are recorded
instead of run, with the dtypes, strides and divisibilities on which Triton specialises a kernel.
Then every specialisation is compiled ahead of time, and a row of the table says its registers,
shared memory, spills, asynchronous copies and matrix instructions. If several sizes lead to the
same specialisation, its row has the name of the first. To compile with another Triton than the
environment's, put it on PYTHONPATH.
"""

import argparse
import ast
import hashlib
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # before triton: interpreted functions do not compile

import motet.kernels
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource, make_backend
from triton.runtime import JITFunction
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

sys.path.append(str(Path(__file__).parent.parent))  # so that this script can import benchmarks

from benchmarks.launches import CELLS, LAUNCHERS
from benchmarks.loops import detours, races, uses_wgmma
from motet.kernels.chips import SHARED_BYTES

RESULT = Path(__file__).parent / "results" / "registers.json"
_MATRIX = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA)\b")


@dataclass(frozen=True)
class RecordedLaunch:
    """A launch that was recorded instead of run; its arguments decide what Triton compiles."""

    name: str
    chip: int
    function: JITFunction
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def source(self) -> tuple[ASTSource, dict[str, Any]]:
        """Return source and options as JITFunction.run would hand them to the compiler."""
        backend = make_backend(GPUTarget("cuda", self.chip, 32))
        binder = create_function_from_signature(
            self.function.signature, self.function.params, backend
        )
        bound, specialization, options = binder(*self.arguments, **self.options)
        packed = self.function._pack_args(backend, options, bound, specialization, options)
        parsed, signature, constants, attributes = packed
        return ASTSource(self.function, signature, constants, attributes), parsed.__dict__

    def key(self) -> str:
        """Return a short digest of everything that the machine code depends on."""
        source, options = self.source()
        shape = [options[k] for k in ("num_warps", "num_stages", "maxnreg") if options[k]]
        parts = (source.signature, sorted(source.constants.items()), sorted(source.attrs), shape)
        return hashlib.sha256(f"{self.function.__name__} {parts}".encode()).hexdigest()[:12]

    def multiplies(self) -> bool:
        """Return whether the kernel must use matrix instructions and asynchronous copies."""
        name = self.function.__name__
        arguments = dict(zip(self.function.arg_names, self.arguments, strict=True))
        if name == "query_backward_kernel" and arguments["dqueries_ptr"] is None:
            return False  # it computes the gradient of the normalisation alone
        if arguments.get("W", 0) % 8:  # rows of the heads' weights are not aligned to 16 bytes
            return False
        others = "centre combine fold head_backward head_kernel merge products row scale softmax"
        return not name.startswith(tuple(others.split()))


@dataclass(frozen=True)
class CompiledKernel:
    """The figures of a compiled kernel: a row of the table."""

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
    races: int


def record_launches(
    chip: int, cells: dict[str, Callable[[], object]] | None = None
) -> list[RecordedLaunch]:
    """Return a launch for every different specialisation in `cells`, by default in all cells."""
    recorded: dict[str, RecordedLaunch] = {}
    for name, run in (CELLS if cells is None else cells).items():
        launched: list[RecordedLaunch] = []

        def record(self, *args, grid, warmup, name=name, launched=launched, **kwargs):
            names = [p.name for p in self.params]
            arguments = dict(zip(names, args, strict=False)) | kwargs
            options = {k: v for k, v in arguments.items() if k not in names}
            values = tuple(arguments[k] for k in names)
            launched.append(RecordedLaunch(name, chip, self, values, options))

        with ExitStack() as patches:
            patches.enter_context(mock.patch.object(JITFunction, "run", record))
            for module in LAUNCHERS:
                for name, value in (("capability", chip), ("multiprocessors", 132)):
                    if hasattr(module, name):
                        patch = mock.patch.object(module, name, return_value=value)
                        patches.enter_context(patch)
            run()
        for launch in launched:
            recorded.setdefault(launch.key(), launch)
    return list(recorded.values())


def compile_kernel(launch: RecordedLaunch) -> CompiledKernel:
    """Compile the kernel of a launch and read the figures from its machine code."""
    source, options = launch.source()
    target = GPUTarget("cuda", launch.chip, 32)
    kernel = triton.compile(source, target=target, options=options)
    sass = _cuobjdump("-sass", kernel.asm["cubin"])
    usage = _cuobjdump("-res-usage", kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    return CompiledKernel(
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
        len(races(kernel.asm["ttgir"])),
    )


class _StopCompiler(Exception):
    """Raised in place of the compiler's step after TTGIR, with the TTGIR as argument."""


def ttgir(launch: RecordedLaunch) -> str:
    """Compile to TTGIR, the form in which Triton schedules copies and products."""

    def stop(self, module, *_):
        raise _StopCompiler(str(module))

    source, options = launch.source()
    target = GPUTarget("cuda", launch.chip, 32)
    with mock.patch.object(CUDABackend, "make_llir", stop):
        try:
            return triton.compile(source, target=target, options=options).asm["ttgir"]
        except _StopCompiler as stopped:
            return stopped.args[0]


_recorded: list[RecordedLaunch] = []  # for the processes that main forks


def _compile_number(index: int) -> CompiledKernel:
    return compile_kernel(_recorded[index])


def _check_loops_of_number(index: int) -> tuple[bool, list[str]]:
    """Return whether a kernel has asynchronous products, and the faults of its loops."""
    launch, form = _recorded[index], ttgir(_recorded[index])
    name = f"{launch.function.__name__} for {launch.name} on sm_{launch.chip}"
    texts = races(form)
    if "_tma_" in launch.function.__name__:
        texts += detours(form)
    return uses_wgmma(form), [f"{name}: {text}" for text in texts]


def faults(result: CompiledKernel, launch: RecordedLaunch) -> list[str]:
    """Return the faults of a compiled kernel, one line each."""
    texts = []
    if result.spill_stores and not launch.name.startswith("form"):  # no model has the forms' sizes
        texts.append(f"{result.spill_stores} spill stores")
    if result.shared_bytes > SHARED_BYTES[result.chip]:
        texts.append(f"{result.shared_bytes} bytes of shared memory > {SHARED_BYTES[result.chip]}")
    if launch.multiplies() and not result.async_copies:
        texts.append("no asynchronous copies")
    if launch.multiplies() and not result.matrix_instructions:
        texts.append("no matrix instructions")
    if result.races:
        texts.append(f"{result.races} races")
    return [f"{result.kernel} for {result.name} on sm_{result.chip}: {text}" for text in texts]


def _cuobjdump(flag: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def sources() -> dict[str, str]:
    """Return a digest of the code of every file of kernels or launchers.

    Comments, docstrings and layout do not change it.
    """
    digests = {}
    folder = Path(motet.kernels.__file__).parent
    for path in sorted([*folder.rglob("*_kernels.py"), *folder.rglob("triton.py")]):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            first = body[0] if isinstance(body, list) and body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                first.value.value = ""  # a docstring
        digests[path.relative_to(folder).as_posix()] = hashlib.sha256(
            ast.dump(tree).encode()
        ).hexdigest()[:16]
    return digests


def forms(launch: RecordedLaunch) -> set[tuple[str, str, str]]:
    """Return the form of every pointer of a kernel.

    A form is the kernel's name, the parameter's, and "None", or "given" for a tensor or descriptor.
    """
    pointers = set()
    for name, value in zip(launch.function.arg_names, launch.arguments, strict=True):
        if value is None or isinstance(value, torch.Tensor | TensorDescriptor):
            form = "None" if value is None else "given"
            pointers.add((launch.function.__name__, name, form))
    return pointers


def fewest(launches: list[RecordedLaunch]) -> list[RecordedLaunch]:
    """Return few of `launches` that together have every kernel, and every form of its pointers."""
    missing, chosen = set().union(*map(forms, launches)), []
    while missing:
        best = max(launches, key=lambda launch: len(forms(launch) & missing))
        chosen.append(best)
        missing -= forms(best)
    kernels = {launch.function.__name__ for launch in chosen}
    first_of_kernel = {launch.function.__name__: launch for launch in reversed(launches)}
    return chosen + [launch for name, launch in first_of_kernel.items() if name not in kernels]


def _choose(options: argparse.Namespace) -> list[RecordedLaunch]:
    """Return what the options select."""
    cells = CELLS if options.only is None else {options.only: CELLS[options.only]}
    if options.forms:
        # The small sizes, which compile fast; the merges have one size.
        cells = {name: run for name, run in CELLS.items() if name.startswith(("form", "merge"))}
        return [launch for chip in options.chip for launch in fewest(record_launches(chip, cells))]
    launches = [launch for chip in options.chip for launch in record_launches(chip, cells)]
    if options.kernel is not None:
        launches = [launch for launch in launches if launch.function.__name__ == options.kernel]
        return [launch for launch in launches if not launch.name.startswith("form")]
    return launches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT, metavar="FILE",
                        help="the table to write (default: %(default)s)")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N",
                        help="processes (default: %(default)s)")  # fmt: skip
    parser.add_argument("--only", metavar="NAME", help="compile one size, named as in the table")
    parser.add_argument("--forms", action="store_true", help="compile few launches, in which every "
                        "optional pointer of every kernel is once None and once given")  # fmt: skip
    parser.add_argument("--kernel", metavar="NAME",
                        help="compile one kernel, at the sizes of the models")  # fmt: skip
    parser.add_argument("--loops", action="store_true", help="print as JSON which launches for "
                        "sm_90 overwrite memory that a product still reads, or have detours in "
                        "their loops (see benchmarks/loops.py)")  # fmt: skip
    parser.add_argument(
        "--chip", type=int, nargs="+", default=list(SHARED_BYTES), choices=list(SHARED_BYTES),
        help="compute capabilities, times 10 (default: all)",
    )  # fmt: skip
    parser.add_argument("--some", type=int, metavar="N",
                        help="take N of the launches, drawn by --seed")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--keys", action="store_true",
                        help="compile nothing; print as JSON what would be compiled")  # fmt: skip
    options = parser.parse_args()
    launches = _choose(options)
    all_forms = sorted(set().union(*map(forms, launches)))
    if options.loops:
        launches = [launch for launch in launches if launch.multiplies()]
    if options.some is not None and options.some < len(launches):
        launches = random.Random(options.seed).sample(launches, options.some)
    if options.keys:
        keys = [f"{launch.chip} {launch.key()}" for launch in launches]
        print(json.dumps({"sources": sources(), "keys": keys, "forms": all_forms}))
        return
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        # Forked processes share the recorded launches, which cannot be pickled.
        _recorded.extend(launches)
        with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
            if options.loops:
                results = list(pool.imap(_check_loops_of_number, range(len(launches))))
                wrong = [fault for _, loop_faults in results for fault in loop_faults]
                wgmma = sum(uses for uses, _ in results)
                print(json.dumps({"triton": triton.__version__, "wgmma": wgmma, "wrong": wrong}))
                return
            wrong = _write_table(pool, launches, options.out)
    if wrong:
        sys.exit("\n".join(wrong))


def _write_table(pool: Pool, launches: list[RecordedLaunch], out: Path) -> list[str]:
    """Compile `launches`, print and write a row for each, and return all faults."""
    columns = [field.name for field in fields(CompiledKernel)]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    rows, wrong = [], []
    for index, result in enumerate(pool.imap(_compile_number, range(len(launches)))):
        rows.append(asdict(result))
        wrong += faults(result, launches[index])
        print(f"| {' | '.join(map(str, rows[-1].values()))} |", flush=True)
    out.parent.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = f'"triton": "{triton.__version__}", "sources": {json.dumps(sources())}'
    out.write_text(f'{{{head}, "rows": [\n{lines}\n]}}\n')
    return wrong


if __name__ == "__main__":
    main()
