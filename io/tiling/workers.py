"""Where the workers of a tiling run: child processes of this one, or tasks on a Ray cluster.

When a hostile file crashes or hangs a C library, a worker in a process of its own takes with it no
more than the slide it was on: the parent writes that slide down as failed and starts another
worker. Workers share nothing but the cohort's folder.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..errors import SlideError, StoreError
from ..store.leases import Leases
from ..store.source import Source
from ..store.write import note_failure
from .pipeline import Emit, WorkerSettings, work

STALL_S = 600.0
"""After this long without a sign of life a worker is taken for hung."""
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
"""What a process dies of by its own doing; of SIGKILL, a slide is not to blame at once."""
RESTARTS = 3
"""Deaths of a worker in a row, no slide finished between them, that are put down to others."""
STOPS = (StoreError, ValueError, OSError, RuntimeError, MemoryError)
"""What stops a worker, and then all of them: not the fault of one slide."""

Events = queue.Queue[tuple["_Child", dict[str, Any] | None]]


def run_here(
    settings: WorkerSettings, workers: int, emit: Emit, *, stall_s: float = STALL_S
) -> None:
    """Run workers in child processes until every slide is done or failed.

    Args:
        settings: what to do.
        workers: how many processes.
        emit: is told of events, from this thread.
        stall_s: seconds without a sign of life after which a worker is taken for hung.

    Raises:
        StoreError, ValueError, OSError: what stopped a worker; ChildProcessError, it died.
    """
    events: Events = queue.Queue()
    children = [_Child(settings, (i, workers), events) for i in range(workers)]
    try:
        while children:
            for child in children:
                child.check(stall_s)
            try:
                child, event = events.get(timeout=min(1.0, stall_s))
            except queue.Empty:
                continue
            if event is None:
                children.remove(child)
                children += _after(child, settings, events, emit)
            elif event["event"] == "error":
                raise _unpacked(event)
            else:
                child.hear(event)
                emit(event)
    finally:
        for child in children:
            child.process.kill()
        for child in children:
            child.end()


def _packed(error: BaseException) -> dict[str, Any]:
    """Return an error as an event."""
    kind = next(kind for kind in STOPS if isinstance(error, kind))
    arguments = error.args if isinstance(error, OSError) else (str(error),)
    if isinstance(error, OSError) and error.filename is not None:
        arguments = (*arguments[:2], str(error.filename))
    return {"event": "error", "type": kind.__name__, "arguments": arguments}


def _unpacked(event: dict[str, Any]) -> Exception:
    """Return it again; RuntimeError and MemoryError, such as of CUDA, become an OSError."""
    kind = next(kind for kind in STOPS if kind.__name__ == event["type"])
    if kind in (RuntimeError, MemoryError):
        return ChildProcessError(f"a worker stopped: {event['arguments'][0]}")
    return kind(*event["arguments"])


def _after(child: _Child, settings: WorkerSettings, events: Events, emit: Emit) -> list[_Child]:
    """Say who follows a worker that ended; its slides one at a time, if it died of one of them.

    With one slide at a time, the next death tells which it was.
    """
    code = child.end()
    if code == 0 and not child.alone:
        return []
    if code == 0:
        return [_Child(settings, child.turn, events)]
    deaths = child.deaths + 1
    suspects = dict(child.under_way)
    by_itself = child.hung or code > 0 or -code in CRASHES
    if len(suspects) == 1 and (by_itself or deaths > RESTARTS):
        ((key, name),) = suspects.items()
        _blame(settings, key, name, "hung" if child.hung else _death(code), emit)
        suspects, deaths = {}, 0
    if deaths > RESTARTS and not suspects:
        raise ChildProcessError(
            f"a worker {_death(code)} {deaths} times in a row before it opened a slide; with fewer "
            "workers each has more memory"
        )
    if not suspects:
        return [_Child(settings, child.turn, events, deaths=deaths)]
    slides = [(path, name) for path, name in settings.slides if name in suspects.values()]
    alone = replace(settings, slides=slides, one_at_a_time=True)
    return [_Child(alone, child.turn, events, alone=True, deaths=deaths)]


def _death(code: int) -> str:
    if code < 0:
        return f"died of {signal.Signals(-code).name}"
    return f"ended with exit code {code} (see logs/worker-*.stderr)"


def _blame(settings: WorkerSettings, key: str, name: str, how: str, emit: Emit) -> None:
    path = next(path for path, known in settings.slides if known == name)
    error = SlideError(path, "unreadable", f"the process that read it {how}")
    lease = Leases(Path(settings.out) / "leases", heartbeat_s=settings.heartbeat_s).take(key)
    if lease is None:  # another took over the dead worker's already
        return
    with lease:
        attempts = settings.retry.get(key, 0) + 1
        note_failure(Path(settings.out), key, Source(Path(path), name), error, attempts)
    emit({"event": "failed", "key": key, "name": name, "message": str(error)})


class _Child:
    """A worker in a process of its own, and what was last heard of it."""

    def __init__(
        self,
        settings: WorkerSettings,
        turn: tuple[int, int],
        events: Events,
        *,
        alone: bool = False,
        deaths: int = 0,
    ) -> None:
        self.turn, self.alone, self.deaths = turn, alone, deaths
        self.heard, self.hung = time.monotonic(), False
        self.under_way: dict[str, str] = {}
        logs = Path(settings.out) / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        with open(logs / f"worker-{turn[0]}.stderr", "ab") as stderr:
            # What C libraries say of damaged files is kept there, and would break a progress bar.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "motet.io.tiling.workers"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
                text=True, encoding="utf-8",
                start_new_session=True,  # a Ctrl-C at the terminal is for the parent, who ends it
                env={**os.environ, **_own_gpu(turn[0])},
            )  # fmt: skip
        self.listener = threading.Thread(target=self._listen, args=(events,), daemon=True)
        self.listener.start()
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # died already, which _listen finds out
            self.process.stdin.write(json.dumps([asdict(settings), turn]) + "\n")
            self.process.stdin.flush()  # and left open: its end says that the parent is gone

    def _listen(self, events: Events) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            events.put((self, json.loads(line)))
        events.put((self, None))

    def hear(self, event: dict[str, Any]) -> None:
        self.heard = time.monotonic()
        if event["event"] == "start":
            self.under_way[event["key"]] = event["name"]
        elif event["event"] in ("done", "failed"):
            self.under_way.pop(event["key"], None)
            self.deaths = 0

    def end(self) -> int:
        """Wait for the process, which is dead or dying; return its exit code."""
        code = self.process.wait()
        self.listener.join()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        return code

    def check(self, stall_s: float) -> None:
        if time.monotonic() - self.heard > stall_s:
            self.hung = True
            self.process.kill()


def _own_gpu(worker: int) -> dict[str, str]:
    """Return the environment in which a worker sees one GPU, of several that are here."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    driver = Path("/proc/driver/nvidia/gpus")
    gpus = range(len(list(driver.iterdir()))) if driver.is_dir() else []
    names = [str(gpu) for gpu in gpus] if given is None else given.split(",")
    return {"CUDA_VISIBLE_DEVICES": names[worker % len(names)]} if len(names) > 1 else {}


def run_on_ray(settings: WorkerSettings, address: str, workers: int | None, emit: Emit) -> None:
    """Run workers as tasks on a Ray cluster until every slide is done or failed.

    A task whose process or machine dies is started again by Ray; it finds what the others left.

    Args:
        settings: what to do, with paths that every machine of the cluster knows.
        address: of the cluster, "auto" for the one that this machine is part of, "local" to start
            one here.
        workers: tasks; by default one per GPU of the cluster, or else one per machine.
        emit: is told of events, from this thread.

    Raises:
        ValueError: Ray is not installed, or there is no such cluster.
        StoreError, OSError: what stopped a worker; ChildProcessError, it died.
    """
    try:
        import ray
        from ray.exceptions import RayError, RayTaskError
        from ray.util.queue import Empty, Queue
    except ImportError:
        raise ValueError("ray: not installed: pip install 'motet[ray]'") from None
    ours = not ray.is_initialized()
    try:
        ray.init(
            address=None if address == "local" else address,
            num_cpus=(workers or 2) if address == "local" else None,
            ignore_reinit_error=True, log_to_driver=False, include_dashboard=False,
        )  # fmt: skip
    except (ConnectionError, RayError, ValueError) as error:
        raise ValueError(f"ray={address!r}: no such cluster: {error}") from None
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        workers = workers or gpus or len(ray.nodes())
        events: Any = Queue(actor_options={"num_cpus": 0})
        task = ray.remote(max_retries=RESTARTS, num_cpus=1, num_gpus=1 if gpus else 0)(_task)
        left = [task.remote(asdict(settings), (i, workers), events) for i in range(workers)]
        while left:
            done, left = ray.wait(left, timeout=0.2)
            with suppress(Empty):
                for event in events.get_nowait_batch(min(events.qsize(), 1000)):
                    emit(event)
            ray.get(done)
        with suppress(Empty):
            for event in events.get_nowait_batch(events.qsize()):
                emit(event)
    except RayTaskError as error:
        if isinstance(error.cause, STOPS):
            raise _unpacked(_packed(error.cause)) from None
        raise
    except RayError as error:
        raise ChildProcessError(f"ray: {str(error).strip().splitlines()[0]}") from None
    finally:
        if ours:
            ray.shutdown()


def _task(settings: dict[str, Any], turn: tuple[int, int], events: Any) -> None:
    work(WorkerSettings(**settings), events.put, turn=turn)


def main() -> int:
    """Be a child: read the settings from standard input, write events to standard output."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)  # what C libraries print is no event
        settings, turn = json.loads(sys.stdin.readline())
        threading.Thread(target=_end_with_the_parent, daemon=True).start()
        lock = threading.Lock()

        def emit(event: dict[str, Any]) -> None:
            with lock:
                out.write(json.dumps(event) + "\n")
                out.flush()

        try:
            work(WorkerSettings(**settings), emit, turn=tuple(turn))
        except STOPS as error:
            emit(_packed(error))
            return 1
    return 0


def _end_with_the_parent() -> None:
    sys.stdin.read()
    os._exit(1)  # the lease of a dead process is free at once, and what was begun is swept


if __name__ == "__main__":
    sys.exit(main())
