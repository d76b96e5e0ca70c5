"""Leases: one owner at a time, dead owners replaced, on this machine and others."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from motet.io.store import leases as leases_module
from motet.io.store.leases import Leases

from .conftest import ROOT, SOAK


def foreign(folder: Path, key: str, heartbeat_s: float = 0.2, **changes: object) -> Path:
    """Write a lease of another machine."""
    owner = {
        "boot": "other", "heartbeat_s": heartbeat_s, "host": "elsewhere", "namespace": "pid:[1]",
        "pid": 1, "start": "1", "token": "0123456789abcdef", **changes,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    path = folder / key
    path.write_text(json.dumps(owner))
    return path


def test_one_owner(tmp_path: Path) -> None:
    leases, others = Leases(tmp_path / "leases"), Leases(tmp_path / "leases")
    lease = leases.take("a")
    assert lease is not None
    assert leases.take("a") is None
    assert others.take("a") is None
    with others.wait("b"):
        assert leases.take("b") is None
    assert leases.take("b") is not None
    lease.release()
    lease.release()
    again = others.take("a")
    assert again is not None
    lease.release()  # the lease now belongs to another owner
    assert leases.take("a") is None
    again.release()
    assert os.listdir(tmp_path / "leases") == ["b"]


def test_threads_take_one_each(tmp_path: Path) -> None:
    leases, got, before = Leases(tmp_path), [], {*threading.enumerate()}
    start = threading.Barrier(8)

    def take() -> None:
        start.wait()
        got.extend(lease for i in range(20) if (lease := leases.take(f"k{i}")))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(lease.key for lease in got) == sorted(f"k{i}" for i in range(20))
    assert [thread.name for thread in {*threading.enumerate()} - before] == ["leases"]
    for lease in got:
        lease.release()
    end = time.monotonic() + 20
    while {*threading.enumerate()} - before and time.monotonic() < end:
        time.sleep(0.001)
    assert {*threading.enumerate()} <= before
    assert leases.take("k1") is not None


def killed(folder: Path) -> None:
    """Let a process take the lease `a`, and kill the process."""
    code = (
        "import sys; from motet.io.store.leases import Leases; Leases(sys.argv[1]).take('a');"
        "print('taken', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"taken\n"
    assert Leases(folder).take("a") is None
    process.kill()
    while Path(f"/proc/{process.pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z":
        time.sleep(0.001)
    assert Leases(folder).take("a") is not None  # dead, though nobody has collected it
    process.wait()
    process.stdout.close()
    process.stdin.close()


def test_dead_on_this_machine(tmp_path: Path) -> None:
    killed(tmp_path)
    lease = Leases(tmp_path).take("a")
    assert lease is None
    # The number of a dead owner may be another process's by now.
    content = json.loads((tmp_path / "a").read_bytes())
    (tmp_path / "b").write_text(json.dumps(content | {"start": "1"}))
    assert Leases(tmp_path).take("b") is not None
    # In another container the number says nothing.
    (tmp_path / "c").write_text(json.dumps(content | {"start": "1", "namespace": "pid:[1]"}))
    assert Leases(tmp_path).take("c") is None


def test_the_thread_does_not_keep_a_process(tmp_path: Path) -> None:
    code = (
        "import sys; from motet.io.store.leases import Leases; Leases(sys.argv[1], 1000).take('a')"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, timeout=60)


@pytest.mark.parametrize("clock", [-(10**9), 0, 10**9])
def test_dead_elsewhere(tmp_path: Path, clock: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease is dead after two heartbeats without change, whatever the other machine's clock."""
    path, seconds = foreign(tmp_path, "a", heartbeat_s=10), 100.0
    monkeypatch.setattr(leases_module, "time", SimpleNamespace(monotonic=lambda: seconds))
    now = time.time() + clock
    os.utime(path, (now, now))
    leases = Leases(tmp_path)
    assert leases.take("a") is None
    seconds = 115.0
    os.utime(path, (now + 1, now + 1))  # the owner beats
    assert leases.take("a") is None
    seconds = 134.0
    assert leases.take("a") is None
    seconds = 135.0
    lease = leases.take("a")
    assert lease is not None
    assert Leases(tmp_path).take("a") is None
    lease.release()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": "../../x"}', "\0" * 99])
def test_leases_that_say_nothing(tmp_path: Path, text: str) -> None:
    """Leases that a power cut or an attacker left block for two heartbeats at most."""
    folder = tmp_path / "leases"
    foreign(folder, "a").write_text(text)
    foreign(folder, "b", token="/etc/passwd")
    leases = Leases(folder)
    assert leases.take("a") is None
    assert leases.take("b") is None
    leases._seen = {key: (content, since - 61) for key, (content, since) in leases._seen.items()}
    assert leases.take("a") is not None
    assert leases.take("b") is not None
    assert sorted(os.listdir(folder)) == ["a", "b"]


def test_what_a_killed_worker_began_is_removed(tmp_path: Path) -> None:
    """A worker that is killed while it creates a lease leaves its draft, which blocks no one."""
    code = (
        "import os, sys; from motet.io.store.leases import Leases; os.link = lambda *_: os._exit(9)"
    )
    code += "; Leases(sys.argv[1]).take('a')"
    assert subprocess.run([sys.executable, "-c", code, tmp_path]).returncode == 9
    (draft,) = tmp_path.iterdir()
    living = tmp_path / f".{'0' * 16}.new"
    other = foreign(tmp_path, f".{'1' * 16}.new")
    leases = Leases(tmp_path)
    with leases.wait("a"):
        living.write_bytes((tmp_path / "a").read_bytes())
        leases.clean()
        assert not draft.exists()
        assert sorted(os.listdir(tmp_path)) == [living.name, other.name, "a"]


def test_beats(tmp_path: Path) -> None:
    """A living owner keeps its lease; an owner whose lease was removed is told that it is lost."""
    leases, others = Leases(tmp_path, 0.05), Leases(tmp_path, 0.05)
    lease, lost = leases.take("a"), leases.take("b")
    assert lease is not None
    assert lost is not None
    (tmp_path / "b").unlink()
    end = time.monotonic() + 20
    while not lost.lost and time.monotonic() < end:
        time.sleep(0.01)
    assert lost.lost
    for _ in range(3):
        touched = (tmp_path / "a").stat().st_mtime_ns
        while (tmp_path / "a").stat().st_mtime_ns == touched and time.monotonic() < end:
            time.sleep(0.01)
    assert (tmp_path / "a").stat().st_mtime_ns != touched
    assert others.take("a") is None
    assert not lease.lost
    lease.release()
    # The thread ends with the last lease.
    while leases._thread is not None and time.monotonic() < end:
        time.sleep(0.01)
    assert leases._thread is None


@pytest.mark.slow
def test_stress(tmp_path: Path) -> None:
    """Eight processes take four keys and are killed at random: no key ever has two owners."""
    kills = 5000 if SOAK else 100
    script = ROOT / "python_tests" / "kill_leases.py"
    ran = subprocess.run(
        [sys.executable, script, tmp_path, str(kills)], capture_output=True, text=True,
        timeout=60 + kills,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == ""
