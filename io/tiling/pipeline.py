"""One worker of a tiling: open, decode, encode and commit overlap, across slides.

Each slide passes four threads: one opens the next slide and finds its tissue, one decodes, the
caller's encodes, one commits. The queues between them are short, so that memory does not grow with
the cohort. A slide that fails is recorded and the next one goes on; what fails all of them (a full
disk, an encoder that raises) stops the worker.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from ..errors import SlideError
from ..slides.open_slide import open_slide
from ..slides.slide import Slide
from ..store.disk import FULL
from ..store.format import FLAGS
from ..store.leases import Lease, Leases
from ..store.read import FeatureStore
from ..store.source import Source, describe
from ..store.write import StoreWriter, note_failure
from ..store.write_slide import SlideWriter
from .ahead import Ahead
from .find_patches import find_patches
from .grid import Grid, Tiling, make_grid
from .patches import PatchBatch, probe_decoder, read_patches

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..encoders.base import Encoder

Emit = Callable[[dict[str, Any]], None]

BATCH_BYTES = 16 * 2**20
"""Of the pixels of a batch, at most. No batch holds two slides, so that each is the same always."""
MASKS = (".geojson", ".png")
"""Endings of the user's own masks, in the order in which they are looked for."""
FAILURES = (OSError, ValueError, RuntimeError, MemoryError)
"""What a bad slide may raise: SlideError, and what libraries raise in its place."""


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker must know. Plain values, since it may be in another process or machine."""

    out: str
    slides: list[tuple[str, str]]
    """Path and name of each."""
    tiling: dict[str, Any]
    encoder: str
    encoder_options: dict[str, Any] = field(default_factory=dict)
    slide_mpp: dict[str, float] | float | None = None
    masks: str | None = None
    reader: str = "auto"
    max_damaged: float = 0.5
    decoders: int = 2
    batch: int = 64
    retry: dict[str, int] = field(default_factory=dict)
    """Attempts so far of the slides that failed before this call, which are tried again."""
    one_at_a_time: bool = False
    """No slide is opened before the last is committed, so that a crash tells whose it was."""
    heartbeat_s: float = 30.0


@dataclass(eq=False)
class Job:
    """A slide under way."""

    source: Source
    lease: Lease
    slide: Slide
    grid: Grid
    wanted: NDArray[np.int64]
    """Patches of the grid to embed."""
    rows: NDArray[np.int64]
    """Their rows in the store, which also holds those of corrupt patches."""
    writer: SlideWriter
    replace: bool
    """Whether the slide was tiled before, from another file or by another specification."""
    seconds: dict[str, float]
    decoder: str = "cpu"
    failed: bool = False
    over: threading.Event = field(default_factory=threading.Event)


class Step(NamedTuple):
    """What the decoding thread hands on: patches of a slide, its end, or its failure."""

    job: Job
    what: PatchBatch | Literal["end"] | BaseException


def work(
    settings: WorkerSettings,
    emit: Emit,
    *,
    encoder: Encoder | None = None,
    turn: tuple[int, int] = (0, 1),
) -> None:
    """Tile and embed every slide that no one else has done or works on; return when all are done.

    Args:
        settings: what to do.
        emit: is told of events, from several threads: start, patches, done, failed.
        encoder: instead of the one that the settings name.
        turn: (i, n), the i-th of n workers, who starts with every n-th slide.

    Raises:
        StoreError: the folder holds a store of another specification.
        ValueError: no such encoder, or one that does not do what it says.
        OSError: the store cannot be written, such as on a full disk.
    """
    _Worker(settings, emit, encoder, turn).run()


class _Worker:
    def __init__(
        self, settings: WorkerSettings, emit: Emit, encoder: Encoder | None, turn: tuple[int, int]
    ) -> None:
        from ..encoders.load_encoder import load_encoder

        self.settings, self.emit = settings, emit
        self.encoder = encoder or load_encoder(settings.encoder, **settings.encoder_options)
        self.tiling = Tiling(**settings.tiling)
        self.store = StoreWriter.open(
            settings.out, self.tiling.to_json(), self.tiling.hash, self.encoder.spec()
        )
        self.leases = Leases(Path(settings.out) / "leases", heartbeat_s=settings.heartbeat_s)
        self.store.clean(self.leases)
        sources = [Source(Path(path), name) for path, name in settings.slides]
        first, workers = turn
        self.sources = sources[first::workers] + [
            source for i, source in enumerate(sources) if i % workers != first
        ]
        self.batch = max(1, min(settings.batch, BATCH_BYTES // (3 * self.tiling.tile_px**2)))
        self.stopped = threading.Event()
        self.under_way: set[Job] = set()

    def run(self) -> None:
        finished: list[Future[None]] = []
        with ThreadPoolExecutor(1, "commit") as committer:
            try:
                with (
                    closing(Ahead(self._prepared(), 1, "open")) as prepared,
                    closing(Ahead(self._decoded(prepared), 2, "decode")) as decoded,
                ):
                    try:
                        self._consume(decoded, committer, finished)
                    finally:
                        # Before any thread is waited for: one may wait for what others work on.
                        self.stopped.set()
            finally:
                committer.shutdown()
                for job in list(self.under_way):  # something stopped all of them
                    self._leave(job)
        for future in finished:
            future.result()

    def _consume(
        self,
        decoded: Ahead[Step],
        committer: ThreadPoolExecutor,
        finished: list[Future[None]],
    ) -> None:
        """Embed what is decoded, and hand what is whole to the committer."""
        waiting = time.perf_counter()
        for job, what in decoded:
            waited = time.perf_counter() - waiting
            if isinstance(what, PatchBatch):
                self._embed(job, what, waited)
            elif what == "end" and not job.failed:
                finished.append(committer.submit(self._commit, job))
            elif isinstance(what, BaseException) and not job.failed:
                self._fail(job, what)
            while len(finished) > 1 or (finished and finished[0].done()):
                finished.pop(0).result()
            waiting = time.perf_counter()

    def _prepared(self) -> Iterator[Job]:
        """Open one after the other the slides that are to be done, as their leases are had."""
        todo = self.sources
        while todo and not self.stopped.is_set():
            left = []
            for source in todo:
                if self.stopped.is_set():
                    return
                if not self._is_to_do(source):
                    self.emit(_over("known", source))
                    continue
                lease = self.leases.take(source.key)
                if lease is None:
                    left.append(source)
                elif not self._is_to_do(source):  # done between the look and the lease
                    lease.release()
                else:
                    job = self._prepare(source, lease)
                    if job is None:
                        continue
                    yield job
                    while self.settings.one_at_a_time and not self.stopped.is_set():
                        if job.over.wait(0.1):
                            break
            todo = left
            if todo:  # others work on them, and may die
                self.emit({"event": "waiting", "slides": len(todo)})
                self.stopped.wait(min(1.0, self.settings.heartbeat_s))

    def _is_to_do(self, source: Source) -> bool:
        state = self.store.state(source)
        if state == "failed":
            # Tried again once per call, whoever of its workers comes first.
            return self.store.attempts(source.key) == self.settings.retry.get(source.key)
        return state not in ("done", "empty")

    def _prepare(self, source: Source, lease: Lease) -> Job | None:
        self.emit({"event": "start", "key": source.key, "name": source.name})
        started = time.perf_counter()
        slide = None
        try:
            slide = open_slide(source.path, reader=self.settings.reader)
            tiled = self.store.state(source) == "features"
            job = (self._begin_again if tiled else self._begin)(source, lease, slide)
        except FAILURES as error:
            if slide is not None:
                slide.close()
            try:
                self._record(source, error)
            finally:
                lease.release()
            return None
        except BaseException:
            lease.release()
            raise
        job.seconds["open"] = time.perf_counter() - started
        self.under_way.add(job)
        return job

    def _begin(self, source: Source, lease: Lease, slide: Slide) -> Job:
        mpp, mpp_source = self._mpp_of(slide, source)
        found = find_patches(slide, self.tiling, mpp, self._mask_of(source))
        grid, corrupt, n = found.grid, found.corrupt, len(found.kept)
        if n and corrupt.mean() > self.settings.max_damaged:
            raise SlideError(
                source.path,
                "damaged",
                f"{int(corrupt.sum())} of {n} patches lie on damaged tiles, more than "
                f"max_damaged={self.settings.max_damaged:g} of them",
            )
        attrs = {
            **describe(source),
            "vendor": slide.vendor,
            "reader": slide.reader,
            "width": slide.levels[0].width,
            "height": slide.levels[0].height,
            "mpp": mpp,
            "mpp_source": mpp_source,
            "level": grid.level,
            "read_px": grid.read_px,
            "footprint_px": grid.footprint_px,
            "patch_mpp": grid.mpp,
            "counts": {"grid": len(grid.coords), "tissue": found.touched},
            "reason": found.why_empty,
        }
        writer = self.store.begin(
            source.key, attrs, grid.coords[found.kept], found.tissue, found.flags, found.thumb,
            found.mask, self.encoder.width,
        )  # fmt: skip
        rows = np.flatnonzero(~corrupt)
        replace = self.store.state(source) == "changed"
        return Job(source, lease, slide, grid, found.kept[rows], rows, writer, replace, {})

    def _begin_again(self, source: Source, lease: Lease, slide: Slide) -> Job:
        """Begin the features of a further encoder, of the patches that were tiled."""
        tiled = FeatureStore(self.store.path, self.store.slug)[source.key]
        grid = make_grid(slide, self.tiling, tiled.attrs["mpp"])
        rows = np.flatnonzero(~tiled.flags & FLAGS.CORRUPT)
        patches = {tuple(corner): i for i, corner in enumerate(grid.coords.tolist())}
        wanted = [patches.get(tuple(corner), -1) for corner in tiled.coords[rows].tolist()]
        if -1 in wanted:
            raise SlideError(source.path, "unreadable", "its patches lie elsewhere than they did")
        writer = self.store.begin_features(source.key, self.encoder.width)
        return Job(source, lease, slide, grid, np.array(wanted, np.int64), rows, writer, False, {})

    def _mpp_of(self, slide: Slide, source: Source) -> tuple[float | None, str | None]:
        known = self.settings.slide_mpp
        if slide.mpp is not None:
            return slide.mpp, "file"
        if isinstance(known, dict):
            for name in (source.key, source.name, source.path.name, source.path.stem):
                if name in known:
                    return known[name], "table"
            return None, None
        return known, "user" if known is not None else None

    def _mask_of(self, source: Source) -> Path | None:
        """Return the user's own mask of a slide, if there is one."""
        if self.settings.masks is None:
            return None
        files = [Path(self.settings.masks) / (source.path.stem + ending) for ending in MASKS]
        return next((file for file in files if file.exists()), None)

    def _decoded(self, prepared: Ahead[Job]) -> Iterator[Step]:
        for job in prepared:
            started = time.perf_counter()
            try:
                patches: Any = read_patches(
                    job.slide, job.grid, job.wanted, batch=self.batch,
                    workers=self.settings.decoders, device=self._decoder(job),
                )  # fmt: skip
                with closing(patches):
                    for batch in patches:
                        job.seconds["decode"] = time.perf_counter() - started
                        if job.failed or self.stopped.is_set():
                            break
                        yield Step(job, batch)
                        started = time.perf_counter() - job.seconds["decode"]
            except FAILURES as error:
                yield Step(job, error)
            else:
                yield Step(job, "end")

    def _decoder(self, job: Job) -> str:
        """Return "cuda" if the encoder is there, and decoding is quicker there for this slide."""
        device = getattr(self.encoder, "device", None)
        if device is None or device.type != "cuda":
            return "cpu"
        job.decoder = probe_decoder(job.slide, job.grid)
        return job.decoder

    def _embed(self, job: Job, batch: PatchBatch, waited: float) -> None:
        if job.failed:
            return
        started = time.perf_counter()
        # What the encoder raises is no slide's fault, and stops the worker.
        features = self.encoder.encode(batch.pixels) if len(batch.rows) else None
        try:
            job.writer.corrupt(job.rows[batch.lost])
            if features is not None:
                job.writer.write(job.rows[batch.rows], features)
        except FAILURES as error:
            self._fail(job, error)
            return
        took = time.perf_counter() - started
        job.seconds["encode"] = job.seconds.get("encode", 0.0) + took
        counts = {"patches": len(batch.rows), "decode_s": waited, "encode_s": took}
        self.emit({"event": "patches", **counts})

    def _commit(self, job: Job) -> None:
        started = time.perf_counter()
        try:
            job.writer.commit(replace=job.replace)
        except FAILURES as error:
            self._fail(job, error)
            return
        job.seconds["commit"] = time.perf_counter() - started
        log = {"seconds": job.seconds, "decoder": job.decoder, "host": os.uname().nodename}
        self.store.log(job.source.key, log)
        self._leave(job)
        self.emit(_over("done", job.source))

    def _fail(self, job: Job, error: BaseException) -> None:
        job.failed = True
        try:
            self._record(job.source, error)
        finally:
            self._leave(job)

    def _leave(self, job: Job) -> None:
        """Close what a slide holds, and remove what is not committed."""
        job.writer.abort()
        job.slide.close()
        job.lease.release()
        job.over.set()
        self.under_way.discard(job)

    def _record(self, source: Source, error: BaseException) -> None:
        """Write down why a slide failed; raise what would fail the others too."""
        if isinstance(error, OSError) and error.errno in FULL:
            raise error
        attempts = self.settings.retry.get(source.key, 0) + 1
        note_failure(self.store.path, source.key, source, error, attempts)
        self.emit({**_over("failed", source), "message": str(error)})


def _over(event: str, source: Source) -> dict[str, Any]:
    return {"event": event, "key": source.key, "name": source.name, "bytes": source.bytes}
