"""Kill workers of the commit protocol at random moments: run by test_commit.py.

A script, because a worker is a fork of this process: with few modules and one thread, hundreds of
kills take seconds. Prints the errors it finds, and nothing if none.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
from motet.io import FeatureStore
from motet.io.store.disk import clean
from motet.io.store.leases import Leases
from motet.io.store.source import Source, describe
from motet.io.store.write import StoreWriter

SPECS = [
    {"id": name, "width": width, "weights": "0", "transform": "0", "precision": "fp32"}
    for name, width in (("first", 16), ("second", 5))
]


def sources(folder: Path) -> list[Source]:
    return [Source(path, path.name) for path in sorted(folder.iterdir())]


def work(out: Path, inputs: Path) -> None:
    """Process all slides for all encoders, as a worker of a pipeline does."""
    for spec in SPECS:
        writer = StoreWriter.open(out, {"mpp": 1.0}, "0" * 16, spec)
        leases = Leases(out / "leases")
        clean(out, leases)
        waiting = sources(inputs)
        while waiting:
            waiting = [one for one in waiting if not done(writer, leases, one, spec["width"])]
            time.sleep(0.001 * bool(waiting))
        clean(out, leases)


def done(writer: StoreWriter, leases: Leases, source: Source, width: int) -> bool:
    if writer.state(source) in ("done", "empty"):
        return True
    lease = leases.take(source.key)
    if lease is None:
        return False
    with lease:
        state = writer.state(source)
        if state in ("done", "empty"):
            return True
        draw = np.random.default_rng(source.path.stat().st_size)
        n = int(draw.integers(60)) * (source.name != "0.svs")
        flags = (draw.random(n) < 0.2).astype(np.uint8) * 8
        features = draw.normal(size=(n, 16))[:, :width]
        if state == "features":
            slide = writer.begin_features(source.key, width)
        else:
            slide = writer.begin(
                source.key, describe(source), draw.integers(9999, size=(n, 2)), draw.random(n),
                flags, np.full((4, 4, 3), n, np.uint8), np.ones((4, 4), bool), width,
            )  # fmt: skip
        with slide:
            rows = np.flatnonzero(flags == 0)
            for part in np.array_split(np.random.permutation(rows), 4):
                slide.write(part, features[part])
            slide.commit(replace=state == "changed")
    return True


def tree(folder: Path) -> dict[str, bytes]:
    """Return the files, by name, whose bytes must be equal in two runs."""
    parts = [folder / "run.json", *(folder / "slides").rglob("*")]
    return {str(one.relative_to(folder)): one.read_bytes() for one in parts if one.is_file()}


def forked(out: Path, inputs: Path) -> int:
    worker = os.fork()
    if worker == 0:
        code = 1
        try:
            work(out, inputs)
            code = 0
        finally:
            os._exit(code)
    return worker


def main(folder: Path, seeds: int) -> None:
    inputs, before, undisturbed = (folder / name for name in ("in", "before", "undisturbed"))
    inputs.mkdir()
    for i in range(5):
        (inputs / f"{i}.svs").write_bytes(bytes(100 + i))
    # The store already holds one slide, whose source has changed since.
    changed = inputs / "4.svs"
    others = {path: path.read_bytes() for path in inputs.iterdir() if path != changed}
    for path in others:
        path.unlink()
    changed.write_bytes(b"old")
    work(before, inputs)
    old = tree(before)
    changed.write_bytes(bytes(104))
    for path, content in others.items():
        path.write_bytes(content)
    quickest_s = float("inf")
    for _ in range(3):  # take the quickest: kills timed by a slow run would come too late
        shutil.rmtree(undisturbed, ignore_errors=True)
        shutil.copytree(before, undisturbed)
        start = time.perf_counter()
        work(undisturbed, inputs)
        quickest_s = min(quickest_s, time.perf_counter() - start)
    expected = tree(undisturbed)
    kills = 0
    for seed in range(seeds):
        draw, out = random.Random(seed), folder / f"run-{seed}"
        shutil.copytree(before, out)
        ended, longest_s = False, 0.8 * quickest_s
        while not ended:
            workers = [forked(out, inputs) for _ in range(draw.choice((1, 2)))]
            time.sleep(draw.uniform(0, longest_s))
            longest_s *= 1.1  # on a machine that has become busy, it would never end
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
            codes = [os.waitpid(worker, 0)[1] for worker in workers]
            kills += sum(code == signal.SIGKILL for code in codes)
            ended = 0 in codes
            if any(code not in (0, signal.SIGKILL) for code in codes):
                print(f"seed {seed}: a worker ended with {codes}")
            now = tree(out)
            for name, content in now.items():
                if content not in (expected.get(name), old.get(name)):
                    print(f"seed {seed}: {name} is neither the old nor the new")
            for problem in FeatureStore(out).verify():
                if problem.key:
                    print(f"seed {seed}: {problem}")
        work(out, inputs)  # clear what the killed worker left when the other ended
        if tree(out) != expected:
            print(f"seed {seed}: another result than without kills")
        for problem in FeatureStore(out).verify():
            print(f"seed {seed}: in the end: {problem}")
        shutil.rmtree(out)
    if kills < seeds:
        print(f"only {kills} workers were killed")
    print(f"{seeds} runs, {kills} kills, {quickest_s:.3f} s undisturbed", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
