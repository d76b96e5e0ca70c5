"""Compile every Triton kernel, as its launcher launches it, for GPUs that need not be there.

    python benchmarks/registers.py [--out benchmarks/results/registers.json]

The launchers run on the CPU with tensors of the sizes in launches.py, but what they would launch is
only recorded, with the dtypes, strides and divisibilities that Triton specialises on, and then
compiled ahead of time: registers, shared memory, spills, asynchronous copies, matrix instructions.
Rows of the table are told apart by kernel and specialisation; a name that many sizes share is the
first's. Another Triton than the environment's is taken with PYTHONPATH.
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

sys.path.append(str(Path(__file__).parent.parent))  # where a script does not look

from benchmarks.launches import CELLS, LAUNCHERS
from benchmarks.loops import detours, races, uses_wgmma
from motet.kernels.chips import SHARED_BYTES

RESULT = Path(__file__).parent / "results" / "registers.json"
_MATRIX = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA)\b")


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
        shape = [options[k] for k in ("num_warps", "num_stages", "maxnreg") if options[k]]
        parts = (source.signature, sorted(source.constants.items()), sorted(source.attrs), shape)
        return hashlib.sha256(f"{self.function.__name__} {parts}".encode()).hexdigest()[:12]

    def multiplies(self) -> bool:
        """Whether matrix units and asynchronous copies are to be expected."""
        name = self.function.__name__
        given = dict(zip(self.function.arg_names, self.arguments, strict=True))
        if name == "query_backward_kernel" and given["dqueries_ptr"] is None:
            return False  # the normalisation alone
        if given.get("W", 0) % 8:  # heads' weights whose rows begin anywhere
            return False
        beside = "centre combine fold head_backward head_kernel merge products row scale softmax"
        return not name.startswith(tuple(beside.split()))


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
    races: int


def launches(chip: int, cells: dict[str, Callable[[], object]] | None = None) -> list[Launch]:
    """Return what the launchers would launch for `cells`, by default for all of them."""
    recorded: dict[str, Launch] = {}
    for name, run in (CELLS if cells is None else cells).items():
        own: list[Launch] = []

        def record(self, *args, grid, warmup, name=name, own=own, **kwargs):
            names = [p.name for p in self.params]
            given = dict(zip(names, args, strict=False)) | kwargs
            options = {k: v for k, v in given.items() if k not in names}
            own.append(Launch(name, chip, self, tuple(given[k] for k in names), options))

        with ExitStack() as patches:
            patches.enter_context(mock.patch.object(JITFunction, "run", record))
            for module in LAUNCHERS:
                for name, value in (("capability", chip), ("multiprocessors", 132)):
                    if hasattr(module, name):
                        patch = mock.patch.object(module, name, return_value=value)
                        patches.enter_context(patch)
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
        len(races(kernel.asm["ttgir"])),
    )


class _Stop(Exception):
    """What stops the compiler where it would make machine code."""


def ttgir(launch: Launch) -> str:
    """Compile one launch as far as the form in which copies and products are scheduled."""

    def stop(self, module, *_):
        raise _Stop(str(module))

    source, options = launch.source()
    target = GPUTarget("cuda", launch.chip, 32)
    with mock.patch.object(CUDABackend, "make_llir", stop):
        try:
            return triton.compile(source, target=target, options=options).asm["ttgir"]
        except _Stop as form:
            return form.args[0]


_recorded: list[Launch] = []  # for the processes that main forks


def _compiled_number(index: int) -> Compiled:
    return compiled(_recorded[index])


def _loops_of_number(index: int) -> tuple[bool, list[str]]:
    """Return whether a launch has asynchronous products, and what is wrong with its loops."""
    launch, form = _recorded[index], ttgir(_recorded[index])
    name = f"{launch.function.__name__} for {launch.name} on sm_{launch.chip}"
    wrong = races(form)
    if "_tma_" in launch.function.__name__:
        wrong += detours(form)
    return uses_wgmma(form), [f"{name}: {text}" for text in wrong]


def faults(result: Compiled, launch: Launch) -> list[str]:
    """Return what is wrong with a compiled kernel, in words."""
    wrong = []
    if result.spill_stores and not launch.name.startswith("form"):  # sizes that nobody runs
        wrong.append(f"{result.spill_stores} spill stores")
    if result.shared_bytes > SHARED_BYTES[result.chip]:
        wrong.append(f"{result.shared_bytes} bytes of shared memory > {SHARED_BYTES[result.chip]}")
    if launch.multiplies() and not result.async_copies:
        wrong.append("no asynchronous copies")
    if launch.multiplies() and not result.matrix_instructions:
        wrong.append("no matrix instructions")
    if result.races:
        wrong.append(f"{result.races} races")
    return [f"{result.kernel} for {result.name} on sm_{result.chip}: {text}" for text in wrong]


def _cuobjdump(flag: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def sources() -> dict[str, str]:
    """Return a digest of every file of kernels or launchers, but for comments and layout."""
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


def forms(launch: Launch) -> set[tuple[str, str, str]]:
    """Return kernel, parameter and "None" or "given", of every tensor, its descriptor, or None."""
    found = set()
    for name, value in zip(launch.function.arg_names, launch.arguments, strict=True):
        if value is None or isinstance(value, torch.Tensor | TensorDescriptor):
            kind = "None" if value is None else "given"
            found.add((launch.function.__name__, name, kind))
    return found


def fewest(found: list[Launch]) -> list[Launch]:
    """Return launches that show every kernel in every form that is among those found."""
    left, chosen = set().union(*map(forms, found)), []
    while left:
        best = max(found, key=lambda launch: len(forms(launch) & left))
        chosen.append(best)
        left -= forms(best)
    kernels = {launch.function.__name__ for launch in chosen}
    rest = {launch.function.__name__: launch for launch in reversed(found)}
    return chosen + [launch for name, launch in rest.items() if name not in kernels]


def _chosen(arguments: argparse.Namespace) -> list[Launch]:
    cells = CELLS if arguments.only is None else {arguments.only: CELLS[arguments.only]}
    if arguments.forms:
        # Small sizes, which are soon compiled; the merges have one size.
        cells = {name: run for name, run in CELLS.items() if name.startswith(("form", "merge"))}
        return [launch for chip in arguments.chip for launch in fewest(launches(chip, cells))]
    found = [launch for chip in arguments.chip for launch in launches(chip, cells)]
    if arguments.kernel is not None:
        own = [launch for launch in found if launch.function.__name__ == arguments.kernel]
        return [launch for launch in own if not launch.name.startswith("form")]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="default: %(default)s")
    parser.add_argument("--only", help="the one size to compile, by its name in the table")
    parser.add_argument("--forms", action="store_true", help="compile only so many launches that "
                        "every optional pointer of every kernel is None and is given")  # fmt: skip
    parser.add_argument("--kernel", help="the one kernel to compile, as far as sizes are run")
    parser.add_argument("--loops", action="store_true", help="say which launches for sm_90 refill "
                        "memory that a product still reads, or take detours, as JSON")  # fmt: skip
    parser.add_argument(
        "--chip", type=int, nargs="+", default=list(SHARED_BYTES), choices=list(SHARED_BYTES)
    )
    parser.add_argument("--keys", action="store_true", help="say what would be compiled, as JSON")
    arguments = parser.parse_args()
    found = _chosen(arguments)
    if arguments.keys:
        keys = [f"{launch.chip} {launch.key()}" for launch in found]
        seen = sorted(set().union(*map(forms, found)))
        print(json.dumps({"sources": sources(), "keys": keys, "forms": seen}))
        return
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        # Forked, so that processes share what was recorded; launches do not pickle.
        _recorded.extend(found)
        with multiprocessing.get_context("fork").Pool(arguments.jobs) as pool:
            if arguments.loops:
                products = [i for i, launch in enumerate(found) if launch.multiplies()]
                told = list(pool.imap(_loops_of_number, products))
                wrong = [text for _, own in told for text in own]
                wgmma = sum(uses for uses, _ in told)
                print(json.dumps({"triton": triton.__version__, "wgmma": wgmma, "wrong": wrong}))
                return
            wrong = _write_table(pool, found, arguments.out)
    if wrong:
        sys.exit("\n".join(wrong))


def _write_table(pool: Pool, found: list[Launch], out: Path) -> list[str]:
    """Compile the launches found, print and write a row for each, and return what is wrong."""
    columns = [field.name for field in fields(Compiled)]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    rows, wrong = [], []
    for index, result in enumerate(pool.imap(_compiled_number, range(len(found)))):
        rows.append(asdict(result))
        wrong += faults(result, found[index])
        print(f"| {' | '.join(map(str, rows[-1].values()))} |", flush=True)
    out.parent.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = f'"triton": "{triton.__version__}", "sources": {json.dumps(sources())}'
    out.write_text(f'{{{head}, "rows": [\n{lines}\n]}}\n')
    return wrong


if __name__ == "__main__":
    main()
