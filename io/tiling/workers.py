"""Run the workers of a tiling as child processes of this one, or as tasks on a Ray cluster.

A damaged or hostile file may crash or hang a C library. Then only the worker's process dies: the
parent writes the slide down as failed and starts another worker. Workers share only the cohort's
folder.

How the parent finds the slide that killed a worker (`_next_workers`): a worker has several slides
in work, and each of them may be the cause. The parent starts a worker for only these slides, which
opens one slide at a time. If it dies too, the one slide in work is the cause.

A worker watches its slides itself (watchdog.py): it writes down the one that hangs, and ends. The
parent kills a worker only if that is impossible, since even the watching thread does not run.
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
from ..store.disk import clean
from ..store.failures import note_failure, note_name
from ..store.leases import Leases
from .events import Emit, hung_error, slide_event
from .pipeline import HUNG, WorkerSettings, work

LOAD_S, GRACE_S = 600.0, 10.0
"""A worker that sends no event is killed: without a slide in work (it loads its encoder) after at
least LOAD_S seconds, otherwise GRACE_S seconds after it should have ended itself."""
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
"""Signals that a process causes itself. SIGKILL is not among them: it comes from outside, such as
from the kernel when memory runs out, so it does not prove that the slide is at fault."""
RESTARTS = 3
"""A worker may die this many times in a row, without finishing a slide in between, before its slide
counts as the cause of deaths by SIGKILL too."""
STOPS = (StoreError, ValueError, OSError, RuntimeError, MemoryError)
"""Errors that stop a worker, and then all workers: they are not the fault of one slide."""

EventQueue = queue.Queue[tuple["_Child", dict[str, Any] | None]]


def run_here(settings: WorkerSettings, workers: int, emit: Emit) -> None:
    """Run workers in child processes until every slide is done or failed.

    Args:
        settings: of the workers.
        workers: number of processes.
        emit: called with each event, from this thread.

    Raises:
        StoreError, ValueError, OSError: the error that stopped a worker.
        ChildProcessError: a worker died, though not because of a slide.
    """
    events: EventQueue = queue.Queue()
    children = [_Child(settings, (i, workers), events) for i in range(workers)]
    try:
        before = time.monotonic()
        while children:
            now = time.monotonic()
            for child in children:
                # At most a second: while this process was halted, events could not arrive.
                child.kill_if_stalled(min(1.0, now - before))
            before = now
            try:
                child, event = events.get(timeout=0.5)
            except queue.Empty:
                continue
            if event is None:
                children.remove(child)
                children += _next_workers(child, settings, events, emit)
            elif event["event"] == "error":
                raise _event_to_error(event)
            else:
                child.handle(event)
                emit(event)
    finally:
        for child in children:
            child.process.kill()
        for child in children:
            child.wait()
        if children:  # they were killed: remove what they had begun to write
            with suppress(OSError):  # the disk may be full, which is the error that is raised then
                folder = Path(settings.out)
                clean(folder, Leases(folder / "leases", heartbeat_s=settings.heartbeat_s))


def _error_to_event(error: BaseException) -> dict[str, Any]:
    kind = next(kind for kind in STOPS if isinstance(error, kind))
    arguments = error.args if isinstance(error, OSError) else (str(error),)
    if isinstance(error, OSError) and error.filename is not None:
        arguments = (*arguments[:2], str(error.filename))
    return {"event": "error", "type": kind.__name__, "arguments": arguments}


def _event_to_error(event: dict[str, Any]) -> Exception:
    """Return the error of an event; RuntimeError and MemoryError (of CUDA, say) as an OSError."""
    kind = next(kind for kind in STOPS if kind.__name__ == event["type"])
    if kind in (RuntimeError, MemoryError):
        return ChildProcessError(f"a worker stopped: {event['arguments'][0]}")
    return kind(*event["arguments"])


def _next_workers(
    child: _Child, settings: WorkerSettings, events: EventQueue, emit: Emit
) -> list[_Child]:
    """Start the worker that replaces one that has ended; return it in a list, or an empty list.

    There are six cases:

    * It ended normally and had all slides: every slide is done, no worker follows.
    * It ended normally and had only the suspects of an earlier death: a worker for all slides
      follows.
    * It ended itself because a slide hung, which it wrote down: a worker for all slides follows.
    * It died with one slide in work, by a crash, a hang, an error, or by more than RESTARTS deaths
      in a row: this slide is recorded as failed, and a worker for all slides follows.
    * It died with no slide in work: a worker for all slides follows. After more than RESTARTS such
      deaths in a row, raise ChildProcessError.
    * It died otherwise: a worker for the slides in work follows, which does one at a time.
    """
    code = child.wait()
    if code == 0 and not child.has_suspects_only:
        return []
    if code in (0, HUNG):
        return [_Child(settings, child.turn, events)]
    deaths = child.deaths + 1
    suspects = dict(child.slides_in_work)
    is_own_fault = child.hung or code > 0 or -code in CRASHES
    if len(suspects) == 1 and (is_own_fault or deaths > RESTARTS):
        (key,) = suspects
        _record_failure(child, settings, key, None if child.hung else _describe_death(code), emit)
        suspects, deaths = {}, 0
    if deaths > RESTARTS and not suspects:
        raise ChildProcessError(
            f"a worker {_describe_death(code)} {deaths} times in a row before it opened a slide; "
            "use fewer workers: each then has more memory"
        )
    if not suspects:
        return [_Child(settings, child.turn, events, deaths=deaths)]
    slides = [(path, name) for path, name in settings.slides if name in suspects.values()]
    suspects_only = replace(settings, slides=slides, one_at_a_time=True)
    return [_Child(suspects_only, child.turn, events, has_suspects_only=True, deaths=deaths)]


def _describe_death(code: int) -> str:
    if code < 0:
        return f"died of {signal.Signals(-code).name}"
    return f"ended with exit code {code} (see logs/worker-*.stderr)"


def _record_failure(
    child: _Child, settings: WorkerSettings, key: str, death: str | None, emit: Emit
) -> None:
    """Write a slide down as failed: the child that read it died (None: it hung)."""
    name, out = child.slides_in_work[key], Path(settings.out)
    path = next(path for path, other in settings.slides if other == name)
    source = settings.source(path, name)
    error = hung_error(source, settings.slide_timeout_s)
    if death is not None:
        error = SlideError(path, "unreadable", f"the process that read it {death}")
    lease = Leases(out / "leases", heartbeat_s=settings.heartbeat_s).take(key)
    if lease is None:  # another worker took over the dead one's lease and now does the slide
        return
    with lease:
        attempts = settings.retry.get(note_name(out, key, child.encoder), 0) + 1
        note_failure(out, child.encoder, source, error, attempts)
    emit({**slide_event("failed", source), "message": str(error)})


class _Child:
    """A worker in a child process, and its state by the events that it has sent.

    Args:
        settings: of the worker; its slides are all of them, or the suspects only.
        turn: (i, n) for the i-th of n workers.
        events: the queue for its events. An event of None says that the process has ended.
        has_suspects_only: True if the worker has only slides that may have killed another.
        deaths: number of deaths in a row of the workers before it in this turn.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        turn: tuple[int, int],
        events: EventQueue,
        *,
        has_suspects_only: bool = False,
        deaths: int = 0,
    ) -> None:
        self.turn, self.has_suspects_only, self.deaths = turn, has_suspects_only, deaths
        self.silent_s, self.hung = 0.0, False
        timeout_s = settings.slide_timeout_s or LOAD_S
        self.limits_s = max(timeout_s, LOAD_S), timeout_s + GRACE_S
        """Seconds of silence after which it is killed: without and with slides in work."""
        self.encoder = ""
        """Folder of its encoder; known before it opens a slide."""
        self.slides_in_work: dict[str, str] = {}
        """Key to name of the slides that it has started and not finished."""
        logs = Path(settings.logs or Path(settings.out, "logs"))
        logs.mkdir(parents=True, exist_ok=True)
        with open(logs / f"worker-{turn[0]}.stderr", "ab") as stderr:
            # C libraries print messages about damaged files; on the terminal they would break the
            # progress bar.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "motet.io.tiling.workers"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
                text=True, encoding="utf-8",
                # A Ctrl-C at the terminal then reaches only the parent, which ends the children.
                start_new_session=True,
                env={**os.environ, **_gpu_environment(turn[0])},
            )  # fmt: skip
        self.listener = threading.Thread(target=self._listen, args=(events,), daemon=True)
        self.listener.start()
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the process has died already; _listen will report it
            self.process.stdin.write(json.dumps([asdict(settings), turn]) + "\n")
            # Standard input stays open: when it ends, the child knows that the parent is gone.
            self.process.stdin.flush()

    def _listen(self, events: EventQueue) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            events.put((self, json.loads(line)))
        events.put((self, None))

    def handle(self, event: dict[str, Any]) -> None:
        """Update the state by an event of this worker."""
        self.silent_s = 0.0
        if event["event"] == "ready":
            self.encoder = event["encoder"]
        elif event["event"] == "start":
            self.slides_in_work[event["key"]] = event["name"]
        elif event["event"] in ("done", "failed"):
            self.slides_in_work.pop(event["key"], None)
            self.deaths = 0

    def wait(self) -> int:
        """Wait until the process, which has ended or was killed, is gone; return its exit code."""
        code = self.process.wait()
        self.listener.join()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        return code

    def kill_if_stalled(self, waited_s: float) -> None:
        """Kill the process if it has sent no event for too long, now `waited_s` seconds more."""
        self.silent_s += waited_s
        if self.silent_s > self.limits_s[bool(self.slides_in_work)]:
            self.hung = True
            self.process.kill()


def _gpu_environment(worker: int) -> dict[str, str]:
    """Return the environment variable with which a worker uses one of several GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    driver = Path("/proc/driver/nvidia/gpus")
    gpus = range(len(list(driver.iterdir()))) if driver.is_dir() else []
    names = [str(gpu) for gpu in gpus] if visible is None else visible.split(",")
    return {"CUDA_VISIBLE_DEVICES": names[worker % len(names)]} if len(names) > 1 else {}


def run_on_ray(settings: WorkerSettings, address: str, workers: int | None, emit: Emit) -> None:
    """Run workers as tasks on a Ray cluster until every slide is done or failed.

    If the process or machine of a task dies, Ray starts the task again. It does the slides that are
    not yet in the store.

    Args:
        settings: of the workers; paths must be valid on every machine of the cluster.
        address: address of the cluster; "auto" for the one that this machine belongs to, "local" to
            start one on this machine.
        workers: number of tasks; by default one per GPU of the cluster, without GPUs one per
            machine.
        emit: called with each event, from this thread.

    Raises:
        ValueError: Ray is not installed, or there is no such cluster.
        StoreError, OSError: the error that stopped a worker.
        ChildProcessError: a worker died too often.
    """
    try:
        import ray
        from ray.exceptions import RayError, RayTaskError
        from ray.util.queue import Empty, Queue
    except ImportError:
        raise ValueError("ray: not installed: pip install 'motet[ray]'") from None
    started_here = not ray.is_initialized()
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
        running = [task.remote(asdict(settings), (i, workers), events) for i in range(workers)]
        while running:
            done, running = ray.wait(running, timeout=0.2)
            with suppress(Empty):
                for event in events.get_nowait_batch(min(events.qsize(), 1000)):
                    emit(event)
            ray.get(done)
        with suppress(Empty):
            for event in events.get_nowait_batch(events.qsize()):
                emit(event)
    except RayTaskError as error:
        if isinstance(error.cause, STOPS):
            raise _event_to_error(_error_to_event(error.cause)) from None
        raise
    except RayError as error:
        raise ChildProcessError(f"ray: {str(error).strip().splitlines()[0]}") from None
    finally:
        if started_here:
            ray.shutdown()


def _task(settings: dict[str, Any], turn: tuple[int, int], events: Any) -> None:
    work(WorkerSettings(**settings), events.put, turn=turn)


def main() -> int:
    """Run as a child: read the settings from standard input, write events to standard output."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        # Standard output now goes to standard error: C libraries print there, which is no event.
        os.dup2(2, 1)
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
            emit(_error_to_event(error))
            return 1
    return 0


def _end_with_the_parent() -> None:
    """End this process once standard input ends, that is, once the parent has died."""
    sys.stdin.read()
    # Without cleaning up, which could hang: other workers see at once that the owner of the leases
    # is dead, and remove its files.
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
