"""The Triton kernels compiled ahead of time for GPUs that are not there.

In processes of their own: where kernels are interpreted, they do not compile.
"""

import json
import os
import subprocess
import sys

import pytest

from .conftest import ROOT

pytest.importorskip("triton")

SCRIPT = ROOT / "benchmarks" / "registers.py"
TABLE = ROOT / "benchmarks" / "results" / "registers.json"
# Half precision and tf32x3, dropout, counts, positional channels, the blocks that only Hopper gets.
SAMPLE = (
    "attention bf16 8x64 c64 dropout",
    "attention fp32 1x16 c25 dropout",
    "attention bf16 1x64 c17 counts",
    "context bf16 2048+5 to 1x224",
    "context fp32 1024 to 1x128",
    "pass bf16 64x64",
)


def run(*arguments, tmp_path):
    """Run Python with what the compiler caches in a folder of the test's own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def table():
    return json.loads(TABLE.read_text())


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
    """No spills, shared memory within the chip's, asynchronous copies and matrix units in use."""
    assert {row["kernel"] for row in table["rows"] if row["multiplies"]} == {
        "_asking_backward", "_attend", "_attend_backward", "_mean_weights", "_pass", "_pool",
        "_project", "_update_backward", "_weights",
    }  # fmt: skip
    limits = {80: 163, 90: 227, 100: 227}
    for row in table["rows"]:
        assert row["spill_stores"] == 0, row
        assert row["shared_bytes"] <= limits[row["chip"]] * 1024, row
        if row["multiplies"]:
            assert row["async_copies"] > 0, row
            assert row["matrix_instructions"] > 0, row


@pytest.mark.parametrize("name", SAMPLE)
def test_the_table_is_true(name, table, tmp_path):
    out = tmp_path / "registers.json"
    compiled = run(SCRIPT, "--only", name, "--out", str(out), tmp_path=tmp_path)
    assert not compiled.returncode, compiled.stderr
    fresh = json.loads(out.read_text())
    assert {row["chip"] for row in fresh["rows"]} == {80, 90, 100}
    if fresh["triton"] != table["triton"]:
        return  # no faults is what other versions have to show
    recorded = {(row["chip"], row["key"]): row for row in table["rows"]}
    for row in fresh["rows"]:
        known = recorded[row["chip"], row["key"]]
        assert row | {"name": known["name"]} == known


def test_the_gate_sees_a_fault(tmp_path):
    """Rows of an odd width are not aligned and have no asynchronous copies."""
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(SCRIPT.parent)!r})
        import registers
        launches = registers.launches(80, {{"odd": registers.context_kv("bf16", 37, 1, 32)}})
        launch = next(x for x in launches if x.function.__name__ == "_project")
        print(*registers.faults(registers.compiled(launch), launch))
        """
    told = run("-c", code, tmp_path=tmp_path)
    assert "_project for odd on sm_80: no asynchronous copies" in told.stdout, told.stderr
