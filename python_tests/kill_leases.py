"""Have eight processes take leases and kill them at random moments: run by test_leases.py.

A script for the same reason as kill_store.py. Prints the errors it finds, and nothing if none.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from motet.io.store.leases import Leases

KEYS = 4


def alive(worker: str) -> bool:
    try:
        state = Path(f"/proc/{worker}/stat").read_bytes()
    except OSError:
        return False
    return state.rpartition(b")")[2].split()[0] != b"Z"


def labour(folder: Path, seed: int) -> None:
    """Take leases of random keys; report a key that another live worker holds at the same time."""
    draw, leases, me = random.Random(seed), Leases(folder / "leases"), str(os.getpid())
    while True:
        key = f"k{draw.randrange(KEYS)}"
        lease = leases.take(key)
        if lease is None:
            continue
        note = folder / key
        before = note.read_text() if note.exists() else ""
        if before and before != me and alive(before):
            (folder / f"clash-{key}-{before}-{me}").touch()
        note.write_text(me)
        time.sleep(draw.uniform(0, 0.002))
        if note.read_text() != me:
            (folder / f"clash-{key}-{me}").touch()
        note.write_text("")
        with (folder / f"count-{me}").open("a") as file:
            file.write("x")
        lease.release()


def start(folder: Path, seed: int) -> int:
    worker = os.fork()
    if worker == 0:
        try:
            labour(folder, seed)
        finally:
            (folder / f"clash-ended-{os.getpid()}").touch()
            os._exit(1)
    return worker


def taken(folder: Path) -> int:
    """Return the number of leases that were taken and released."""
    return sum(path.stat().st_size for path in folder.glob("count-*"))


def main(folder: Path, minimum: int) -> None:
    """Kill workers until `minimum` have been killed and `minimum` leases taken."""
    draw, kills = random.Random(0), 0
    workers = [start(folder, seed) for seed in range(8)]
    while kills < minimum or taken(folder) < minimum:
        time.sleep(draw.uniform(0, 0.02))
        index = draw.randrange(8)
        os.kill(workers[index], signal.SIGKILL)
        os.waitpid(workers[index], 0)
        kills += 1
        workers[index] = start(folder, 100 + kills)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
    for clash in folder.glob("clash-*"):
        print(clash.name)
    leases = Leases(folder / "leases")
    for i in range(KEYS):
        if leases.take(f"k{i}") is None:
            print(f"k{i} is blocked by the dead")
    print(f"{taken(folder)} leases taken, {kills} kills", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
