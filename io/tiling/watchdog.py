"""Notice that a worker makes no progress on its slides: a C library or an encoder hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..store.source import Source


class Watchdog:
    """Watch the slides that a worker has in work, and report one that hangs.

    A worker does its slides in the order in which it began them, in each of its threads. So if
    none of them makes progress, those before the slide that hangs are finished: the oldest one in
    work is the one that hangs.

    Time is counted in short waits of the watching thread, not by a clock: while the process is
    halted, no time passes.

    Args:
        timeout_s: seconds without progress after which a slide hangs; None watches nothing.
        report: called once, from the watching thread, with the slide that hangs.
    """

    def __init__(self, timeout_s: float | None, report: Callable[[Source], None]) -> None:
        self._timeout_s, self._report = timeout_s, report
        self._in_work: dict[str, Source] = {}
        self._idle_s = 0.0
        self._paused = 0
        self._closed = threading.Event()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the watching thread."""
        if self._timeout_s is not None:
            args = (self._timeout_s,)
            threading.Thread(target=self._watch, args=args, name="watchdog", daemon=True).start()

    def close(self) -> None:
        """End the watching thread."""
        self._closed.set()

    def begin(self, source: Source) -> None:
        """Note that a slide is in work."""
        with self._lock:
            self._in_work[source.key] = source
            self._idle_s = 0.0

    def progress(self) -> None:
        """Note progress on a slide."""
        self._idle_s = 0.0

    def finish(self, source: Source) -> None:
        """Note that a slide is done or has failed."""
        with self._lock:
            self._in_work.pop(source.key, None)
            self._idle_s = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count no time in the block: it waits for another process."""
        with self._lock:
            self._paused += 1
        try:
            yield
        finally:
            with self._lock:
                self._paused -= 1

    def _watch(self, timeout_s: float) -> None:
        step_s = min(1.0, timeout_s / 10)
        while not self._closed.wait(step_s):
            with self._lock:
                if self._in_work and not self._paused:
                    self._idle_s += step_s
                oldest = next(iter(self._in_work.values()), None)
            if oldest is not None and self._idle_s > timeout_s:
                self._report(oldest)
                return
