"""The Triton kernels, compiled ahead of time for GPUs that this machine lacks.

Compilation runs in separate processes, since a process that interprets kernels cannot compile them.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock
from motet.kernels.chips import SHARED_BYTES

from .conftest import IN_CI, ROOT, SEED, SOAK, drawn

pytest.importorskip("triton")

SCRIPT = ROOT / "benchmarks" / "registers.py"
TABLE = ROOT / "benchmarks" / "results" / "registers.json"
# Half precision and tf32x3, dropout, counts, positional channels, blocks for Hopper alone.
SAMPLE = (
    "attention bf16 8x64 c64 dropout",
    "attention fp32 1x16 c25 dropout",
    "attention bf16 1x63 c17 counts",
    "context bf16 2048+5 to 1x224",
    "context fp32 1024 to 1x128",
    "pass bf16 64x64",
)
# The version that torch 2.11 for CUDA requires.
OLDEST = "3.6.0"


def run(*arguments, tmp_path, triton=None):
    """Run Python with the compiler's cache in a folder of the test.

    `triton` is a folder with another version of Triton than the environment's.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    if triton is not None:
        path = [str(triton), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def some(count):
    """Return the options by which registers.py takes so many launches; all in `make soak`."""
    return () if SOAK else ("--some", str(count), "--seed", str(SEED))


def oldest_triton():
    """Return a folder with the oldest Triton, installed once; skip without a network, not in CI."""
    folder = ROOT / ".cache" / f"triton-{OLDEST}"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as new:
                target = Path(new) / "triton"
                command = ["pip", "install", "--no-deps", "--target", target, f"triton=={OLDEST}"]
                done = subprocess.run(
                    [sys.executable, "-m", *command], capture_output=True, text=True, check=False
                )
                if done.returncode:
                    why = f"triton {OLDEST} cannot be installed: {done.stderr[-500:]}"
                    pytest.fail(why) if IN_CI else pytest.skip(why)
                target.rename(folder)
    return folder


@pytest.fixture(scope="module")
def table():
    return json.loads(TABLE.read_text())


@pytest.mark.slow
def test_the_table_lists_every_shipped_configuration(table, tmp_path):
    listed = run(SCRIPT, "--keys", tmp_path=tmp_path)
    assert not listed.returncode, listed.stderr
    shipped = json.loads(listed.stdout)
    assert len(shipped["keys"]) > 100
    recorded = [f"{row['chip']} {row['key']}" for row in table["rows"]]
    cure = "run python benchmarks/registers.py"
    assert sorted(recorded) == sorted(shipped["keys"]), cure
    assert table["sources"] == shipped["sources"], cure


def test_the_table_shows_no_faults(table):
    """Kernels do not spill, fit in shared memory, copy asynchronously and use matrix units."""
    multiply = {row["kernel"] for row in table["rows"] if row["multiplies"]}
    names = "query_backward attend dkv dq mean_weights pass pool project update_backward"
    names += " pool_tma project_tma"
    others = "gradients head_gradients to_heads to_tokens weights"
    assert multiply == {f"{name}_kernel" for name in f"{names} {others}".split()}
    for row in table["rows"]:
        if not row["name"].startswith("form"):  # forms are test sizes, which may spill
            assert row["spill_stores"] == 0, row
        assert row["shared_bytes"] <= SHARED_BYTES[row["chip"]], row
        assert row["races"] == 0, row
        if row["multiplies"]:
            assert row["async_copies"] > 0, row
            assert row["matrix_instructions"] > 0, row


@pytest.mark.slow
@pytest.mark.parametrize("name", drawn(SAMPLE, 1))
def test_the_table_is_true(name, table, tmp_path):
    out = tmp_path / "registers.json"
    compiled = run(SCRIPT, "--only", name, "--out", str(out), tmp_path=tmp_path)
    assert not compiled.returncode, compiled.stderr
    fresh = json.loads(out.read_text())
    assert {row["chip"] for row in fresh["rows"]} == {80, 90, 100}
    if fresh["triton"] != table["triton"]:
        return  # for other versions, no faults are enough
    recorded = {(row["chip"], row["key"]): row for row in table["rows"]}
    for row in fresh["rows"]:
        known = recorded[row["chip"], row["key"]]
        assert row | {"name": known["name"]} == known


@pytest.mark.slow
@pytest.mark.parametrize("version", ["newest", OLDEST])
def test_every_kernel_compiles_with_every_pointer_none_and_given(version, tmp_path):
    """Of the launches that show all of it, the drawn ones compile; all of them in `make soak`."""
    out = tmp_path / "registers.json"
    options = "--forms", "--chip", "90", *some(6)
    triton = None if version == "newest" else oldest_triton()
    listed = run(SCRIPT, *options, "--keys", tmp_path=tmp_path, triton=triton)
    assert not listed.returncode, listed.stderr
    forms = json.loads(listed.stdout)["forms"]
    both = {tuple(form[:2]) for form in forms if form[2] == "None"}
    assert both <= {tuple(form[:2]) for form in forms if form[2] == "given"}
    assert {("update_backward_kernel", "present_ptr"), ("attend_kernel", "seed_ptr")} <= both
    compiled = run(SCRIPT, *options, "--out", str(out), tmp_path=tmp_path, triton=triton)
    assert out.exists(), compiled.stderr  # the file is written after all have compiled
    fresh = json.loads(out.read_text())
    assert version in ("newest", fresh["triton"])
    keys = [f"{row['chip']} {row['key']}" for row in fresh["rows"]]
    assert sorted(keys) == sorted(json.loads(listed.stdout)["keys"])
    compiled, known = {row["kernel"] for row in fresh["rows"]}, {form[0] for form in forms}
    assert compiled == known if SOAK else compiled <= known
    assert compiled


@pytest.mark.slow
@pytest.mark.parametrize("version", ["newest", OLDEST])
def test_loops_on_hopper_neither_race_nor_take_detours(version, tmp_path):
    """In drawn launches (all in `make soak`) no copy goes where a product still reads.

    In both Tritons. Where the tensor memory accelerator copies, no tile passes through registers.
    """
    triton = None if version == "newest" else oldest_triton()
    process = run(SCRIPT, "--loops", "--chip", "90", *some(25), tmp_path=tmp_path, triton=triton)
    assert not process.returncode, process.stderr
    report = json.loads(process.stdout)
    assert version in ("newest", report["triton"])
    assert report["wgmma"] > (100 if SOAK else 0)
    assert not report["wrong"], "\n".join(report["wrong"])


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["project_tma_kernel", "pool_tma_kernel"])
def test_what_only_newer_chips_run_does_not_spill_in_the_oldest_triton(kernel, tmp_path):
    """The table has the newest Triton's spills; torch for GPUs comes with the oldest."""
    out = tmp_path / "registers.json"
    options = "--kernel", kernel, "--chip", "90", "100", "--out", str(out), *some(4)
    compiled = run(SCRIPT, *options, tmp_path=tmp_path, triton=oldest_triton())
    assert not compiled.returncode, compiled.stderr
    fresh = json.loads(out.read_text())
    assert fresh["triton"] == OLDEST
    assert len(fresh["rows"]) >= (10 if SOAK else 4)


RACE = """
import sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
sys.path.insert(0, {root!r})
from benchmarks.loops import detours, races, uses_wgmma


@triton.jit
def kernel(x_ptr, w_ptr, y_ptr, sums_ptr, D, SUMS: tl.constexpr):
    t, o, d = tl.arange(0, 128), tl.arange(0, 256), tl.arange(0, 64)
    acc, sums = tl.zeros([128, 256], tl.float32), tl.zeros([128], tl.float32)
    for d0 in range(0, D, 64):
        x = tl.load(x_ptr + t[:, None] * 2048 + d0 + d[None, :])
        w = tl.load(w_ptr + o[:, None] * 2048 + d0 + d[None, :])
        if SUMS:
            sums += tl.sum(x.to(tl.float32), 1)
        acc = tl.dot(x, tl.trans(w), acc)
    tl.store(y_ptr + t[:, None] * 256 + o[None, :], acc)
    tl.store(sums_ptr + t, sums)


half, full = "*bf16", "*fp32"
types = dict(x_ptr=half, w_ptr=half, y_ptr=full, sums_ptr=full, D="i32", SUMS="constexpr")
aligned = {{(i,): [["tt.divisibility", 16]] for i in range(5)}}
for sums in (True, False):
    source = ASTSource(kernel, types, {{(5,): sums}}, aligned)
    options = dict(num_warps=8, num_stages=3)
    form = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ttgir"]
    assert uses_wgmma(form)
    print(races(form), detours(form))
"""


@pytest.mark.parametrize("version", ["newest", pytest.param(OLDEST, marks=pytest.mark.slow)])
def test_the_gate_sees_a_race(version, tmp_path):
    """A tile that is both multiplied and summed is a race, as in an old LayerNorm kernel."""
    file = tmp_path / "race.py"
    file.write_text(RACE.format(root=str(ROOT)))
    triton = None if version == "newest" else oldest_triton()
    done = run(file, tmp_path=tmp_path, triton=triton)
    assert not done.returncode, done.stderr
    racing, clean = done.stdout.splitlines()
    assert "2 buffers, 2 copies ahead, 1 products pending" in racing
    assert "local_load in every step" in racing
    assert clean.startswith("[] ")
    assert "not copied by the tensor memory accelerator" in clean
    assert "local_load" not in clean


@pytest.mark.slow
def test_the_gate_sees_a_fault(tmp_path):
    """Rows of an odd width are not aligned and have no asynchronous copies."""
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(SCRIPT.parent)!r})
        import registers
        from benchmarks.launches import context_kv
        launches = registers.record_launches(80, {{"odd": context_kv("bf16", 37, 1, 32)}})
        launch = next(x for x in launches if x.function.__name__ == "project_kernel")
        print(*registers.faults(registers.compile_kernel(launch), launch))
        """
    done = run("-c", code, tmp_path=tmp_path)
    assert "project_kernel for odd on sm_80: no asynchronous copies" in done.stdout, done.stderr
