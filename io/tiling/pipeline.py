"""One worker of a tiling: it opens, decodes, encodes and commits slides, all at the same time.

Each slide passes four threads. The first opens the slide and finds its tissue, the second decodes
patches, the third (the caller's) encodes them, the fourth commits the slide. So up to four slides
are in work at once. The queues between the threads are short: memory does not grow with the cohort.

If a slide fails, its failure is written to the store and the next slide follows. An error that
every slide would have (a full disk, an encoder that raises) stops the worker.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from ..errors import SlideError
from ..slides.open_slide import open_slide
from ..slides.slide import Slide
from ..store.disk import FULL, clean
from ..store.failures import note_failure, note_name
from ..store.format import FLAGS
from ..store.leases import Lease, Leases
from ..store.pseudonyms import withhold_names
from ..store.read import FeatureStore
from ..store.source import Source, describe
from ..store.write import StoreWriter
from ..store.write_slide import SlideWriter
from .ahead import Ahead
from .events import Emit, hung_error, slide_event
from .find_patches import find_patches
from .grid import PatchGrid, Tiling, make_grid
from .patches import PatchBatch, probe_decoder, read_patches
from .resolution import find_resolution, recorded_mpp
from .slide_options import mask_file, must_be_redone, slide_options
from .watchdog import Watchdog

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..encoders.base import Encoder

BATCH_BYTES = 16 * 2**20
"""Most bytes of the pixels of a batch. A batch holds patches of one slide only: its content then
does not depend on the other slides, so the features are the same bytes in every run."""
FAILURES = (OSError, ValueError, RuntimeError, MemoryError)
"""Exceptions that a bad slide may cause: SlideError, and those that libraries raise instead."""
HUNG = 86
"""Exit code of a worker that ended itself, after it wrote down that a slide hangs."""


@dataclass(frozen=True)
class WorkerSettings:
    """The arguments of a worker. Plain values: they are sent to other processes as JSON."""

    out: str
    slides: list[tuple[str, str]]
    """Path and name of each slide."""
    tiling: dict[str, Any]
    encoder: str
    encoder_options: dict[str, Any] = field(default_factory=dict)
    slide_mpp: dict[str, float] | float | None = None
    list_mpp: dict[str, float] = field(default_factory=dict)
    """Name to micrometres per px, by lists of slides."""
    masks: str | None = None
    """Folder of the user's masks."""
    mask_of: dict[str, str] = field(default_factory=dict)
    """Name of the slide to the path of its mask in `masks`."""
    redo: bool = False
    """True to do the slides again that were made with other options."""
    reader: str = "auto"
    max_damaged: float = 0.5
    pseudonyms: dict[str, str] = field(default_factory=dict)
    """Name to pseudonym of each slide; empty if they have none."""
    fingerprint: str | None = None
    """Of the file of pseudonyms."""
    logs: str | None = None
    """Folder of what C libraries print; None for `logs` in the store."""
    decoders: int = 2
    batch: int = 64
    retry: dict[str, int] = field(default_factory=dict)
    """Name of the note to number of attempts, of what failed before this call; it is retried."""
    one_at_a_time: bool = False
    """True: open a slide only after the one before is committed, so that it is clear which slide
    crashed the process."""
    heartbeat_s: float = 30.0
    slide_timeout_s: float | None = 600.0
    """A slide without progress for this long counts as hung: its failure is written down and the
    process ends. None for a worker in the process of the caller, which must not end."""

    def source(self, path: str, name: str) -> Source:
        """Return a slide with the mpp of a list and its pseudonym, if it has them."""
        return Source(
            Path(path), name, mpp=self.list_mpp.get(name), pseudonym=self.pseudonyms.get(name)
        )


@dataclass(eq=False)
class SlideJob:
    """A slide in work, from its opening to its commit or failure."""

    source: Source
    lease: Lease
    slide: Slide
    grid: PatchGrid
    patches: NDArray[np.int64]
    """The n patches to embed, as indices of the grid."""
    rows: NDArray[np.int64]
    """Their rows [n] in the store, which also has rows for corrupt patches."""
    writer: SlideWriter
    replace: bool = False
    """True if the store holds the slide from another file, or with another specification."""
    seconds: dict[str, float] = field(default_factory=dict)
    decoder: str = "cpu"
    failed: bool = False
    finished: threading.Event = field(default_factory=threading.Event)


class Decoded(NamedTuple):
    """An item from the decoding thread: patches of a slide, its end, or an error."""

    job: SlideJob
    result: PatchBatch | Literal["end"] | BaseException


def work(
    settings: WorkerSettings,
    emit: Emit,
    *,
    encoder: Encoder | None = None,
    turn: tuple[int, int] = (0, 1),
) -> None:
    """Tile and embed the slides, together with other workers; return when all slides are done.

    Args:
        settings: the slides, the store, the tiling and the encoder.
        emit: called with each event, from several threads: ready, known, start, warning,
            patches, waiting, done, failed.
        encoder: used instead of the one that the settings name.
        turn: (i, n) for the i-th of n workers, which begins with every n-th slide.

    Raises:
        StoreError: the folder holds a store of another specification.
        ValueError: the encoder does not exist, or returns features of another shape.
        OSError: the store cannot be written, for example because the disk is full.
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
            settings.out, self.tiling.to_json(), self.tiling.hash, self.encoder.spec(),
            settings.fingerprint,
        )  # fmt: skip
        self.leases = Leases(Path(settings.out) / "leases", heartbeat_s=settings.heartbeat_s)
        clean(self.store.path, self.leases)
        sources = [settings.source(path, name) for path, name in settings.slides]
        # First the worker's own share, then the rest: workers rarely meet at the same slide.
        first, workers = turn
        self.sources = sources[first::workers] + [
            source for i, source in enumerate(sources) if i % workers != first
        ]
        self.batch = max(1, min(settings.batch, BATCH_BYTES // (3 * self.tiling.tile_px**2)))
        self.stopped = threading.Event()
        self.jobs: set[SlideJob] = set()
        self.watchdog = Watchdog(settings.slide_timeout_s, self._end_hung)

    def run(self) -> None:
        self.send({"event": "ready", "encoder": self.store.slug})
        commits: list[Future[None]] = []
        self.watchdog.start()
        with closing(self.watchdog), ThreadPoolExecutor(1, "commit") as committer:
            try:
                with (
                    closing(Ahead(self._open_slides(), 1, "open")) as jobs,
                    closing(Ahead(self._upload(jobs), 2, "decode")) as decoded,
                ):
                    try:
                        self._encode(decoded, committer, commits)
                    finally:
                        # Set it before `closing` waits for the threads: the opening thread may be
                        # waiting for slides that other workers hold, and would not end.
                        self.stopped.set()
            finally:
                committer.shutdown()
                for job in list(self.jobs):  # not empty only if an error stopped the worker
                    self._release(job)
        for future in commits:
            future.result()  # raises the error of a commit

    def _encode(
        self,
        decoded: Ahead[Decoded],
        committer: ThreadPoolExecutor,
        commits: list[Future[None]],
    ) -> None:
        """Encode decoded patches; submit a slide to the committer when its last patch is done."""
        waited, wait_began = 0.0, time.perf_counter()
        for job, result in decoded:
            if self.stopped.is_set():
                return  # a commit raised an error, which `run` raises
            waited += time.perf_counter() - wait_began
            if isinstance(result, PatchBatch):
                self._encode_batch(job, result, waited)
                waited = 0.0
            elif result == "end" and not job.failed:
                commits.append(committer.submit(self._commit, job))
                commits[-1].add_done_callback(self._stop_after_an_error)
            elif isinstance(result, BaseException) and not job.failed:
                self._fail(job, result)
            while len(commits) > 1 or (commits and commits[0].done()):
                commits.pop(0).result()
            wait_began = time.perf_counter()

    def _stop_after_an_error(self, commit: Future[None]) -> None:
        """Stop if a commit raised an error; without this, only the next slide would show it."""
        if commit.exception() is not None:
            self.stopped.set()

    def _open_slides(self) -> Iterator[SlideJob]:
        """Open one slide after the other whose lease is free, until every slide is done."""
        todo = self.sources
        while todo and not self.stopped.is_set():
            leased_by_others = []
            for source in todo:
                if self.stopped.is_set():
                    return
                if not self._is_to_do(source):
                    self.send(slide_event("known", source))
                    continue
                lease = self.leases.take(source.key)
                if lease is None:
                    leased_by_others.append(source)
                elif not self._is_to_do(source):  # done just before this worker took the lease
                    lease.release()
                else:
                    job = self._open(source, lease)
                    if job is None:
                        continue
                    yield job
                    while self.settings.one_at_a_time and not self.stopped.is_set():
                        if job.finished.wait(0.1):
                            break
            todo = leased_by_others
            if todo:  # wait until they are done, or their workers die and the leases become free
                self.send({"event": "waiting", "slides": len(todo)})
                self.stopped.wait(min(1.0, self.settings.heartbeat_s))

    def _is_to_do(self, source: Source) -> bool:
        if self._work_left(source) in ("done", "empty"):
            return False
        attempts = self.store.attempts(source)
        # Retried once per call: after the retry of any worker, the number of attempts is larger
        # than it was when the call began.
        return attempts is None or attempts == self._attempts_before(source)

    def _work_left(self, source: Source) -> str:
        """Return what `StoreWriter.work_left` returns; "changed" if the options have changed."""
        left = self.store.work_left(source)
        if self.settings.redo and left in ("done", "empty", "features"):
            return "changed" if must_be_redone(self.store.path, self.settings, source) else left
        return left

    def _attempts_before(self, source: Source) -> int:
        """Return how many times a slide had failed when this call began."""
        name = note_name(self.store.path, source.key, self.store.slug)
        return self.settings.retry.get(name, 0)

    def _open(self, source: Source, lease: Lease) -> SlideJob | None:
        """Open a slide and choose its patches; None if it fails, which is written down."""
        self.watchdog.begin(source)
        self.send({"event": "start", "key": source.key, "name": source.name})
        started = time.perf_counter()
        slide = None
        try:
            slide = open_slide(source.path, reader=self.settings.reader, image=source.image)
            left = self._work_left(source)
            begin = self._begin_features if left == "features" else self._begin_slide
            job = begin(source, lease, slide)
            job.replace = left == "changed"
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
        self.jobs.add(job)
        return job

    def _begin_slide(self, source: Source, lease: Lease, slide: Slide) -> SlideJob:
        """Choose the patches of a slide that is not in the store, and begin to write it."""
        resolution = find_resolution(slide, source, self.settings.slide_mpp)
        if resolution.contradiction:
            message = f"{source.path}: {resolution.contradiction}"
            self.send({**slide_event("warning", source), "message": message})
        options = slide_options(self.settings, source)
        mask = mask_file(self.settings, source)
        patches = find_patches(slide, self.tiling, resolution.mpp, mask)
        grid, corrupt, n = patches.grid, patches.corrupt, len(patches.kept)
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
            "image": slide.image or None,
            **({"bounds": list(slide.bounds)} if slide.bounds else {}),
            "width": slide.levels[0].width,
            "height": slide.levels[0].height,
            **resolution.to_json(),
            "level": grid.level,
            "read_px": grid.read_px,
            "footprint_px": grid.footprint_px,
            "patch_mpp": grid.mpp,
            **({} if grid.aspect == 1 else {"footprint_y_px": grid.footprint[1]}),
            "counts": {
                "grid": len(grid.coords),
                "tissue": patches.with_tissue,
                **({"dropped": patches.dropped} if self.tiling.drop else {}),
            },
            "mask": self.settings.mask_of.get(source.name),
            "options": options,
            "reason": patches.why_empty,
        }
        if source.pseudonym is not None:
            described = {name: attrs[name] for name in ("name", "source")}
            attrs = withhold_names(attrs, source) | described
        writer = self.store.begin(
            source.key, attrs, grid.coords[patches.kept], patches.tissue, patches.flags,
            patches.thumb, patches.mask, self.encoder.width,
        )  # fmt: skip
        rows = np.flatnonzero(~corrupt)
        return SlideJob(source, lease, slide, grid, patches.kept[rows], rows, writer)

    def _begin_features(self, source: Source, lease: Lease, slide: Slide) -> SlideJob:
        """Begin the features of a further encoder, for the patches that the store has."""
        tiled = FeatureStore(self.store.path, self.store.slug)[source.key]
        grid = make_grid(slide, self.tiling, recorded_mpp(tiled.attrs))
        rows = np.flatnonzero(~tiled.flags & FLAGS.CORRUPT)
        patch_at = {tuple(corner): i for i, corner in enumerate(grid.coords.tolist())}
        patches = [patch_at.get(tuple(corner), -1) for corner in tiled.coords[rows].tolist()]
        if -1 in patches:
            raise SlideError(
                source.path, "unreadable", "its patches lie elsewhere than in the store"
            )
        writer = self.store.begin_features(source.key, self.encoder.width)
        indices = np.array(patches, np.int64)
        return SlideJob(source, lease, slide, grid, indices, rows, writer)

    def _decode(self, jobs: Ahead[SlideJob]) -> Generator[Decoded]:
        for job in jobs:
            started = time.perf_counter()
            try:
                patches: Any = read_patches(
                    job.slide, job.grid, job.patches, batch=self.batch,
                    workers=self.settings.decoders, device=self._decoder_of(job),
                    pinned=self._on_gpu,
                )  # fmt: skip
                with closing(patches):
                    for batch in patches:
                        job.seconds["decode"] = time.perf_counter() - started
                        if self.stopped.is_set():
                            return
                        if job.failed:
                            break
                        yield Decoded(job, batch)
                        # Leave out the time for which this thread waited in the yield.
                        started = time.perf_counter() - job.seconds["decode"]
            except FAILURES as error:
                yield Decoded(job, error)
            else:
                yield Decoded(job, "end")

    def _upload(self, jobs: Ahead[SlideJob]) -> Iterator[Decoded]:
        """Decode patches, and copy them to the GPU while the encoder works on those before.

        An error of a copy is the encoder's, not the slide's, and stops the worker.
        """
        with closing(self._decode(jobs)) as decoded:
            for job, result in decoded:
                if self._on_gpu and isinstance(result, PatchBatch) and len(result.rows):
                    result = replace(result, pixels=self.encoder.upload(result.pixels))
                yield Decoded(job, result)

    @property
    def _on_gpu(self) -> bool:
        device = getattr(self.encoder, "device", None)
        return device is not None and device.type == "cuda"

    def _decoder_of(self, job: SlideJob) -> str:
        """Return "cuda" if the encoder runs there and decodes this slide faster, else "cpu"."""
        if not self._on_gpu:
            return "cpu"
        job.decoder = probe_decoder(job.slide, job.grid)
        return job.decoder

    def _encode_batch(self, job: SlideJob, batch: PatchBatch, waited: float) -> None:
        if job.failed:
            return
        started = time.perf_counter()
        # Outside of the try: an error of the encoder is not the slide's and stops the worker.
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
        self.watchdog.progress()
        self.send({"event": "patches", **counts})

    def _commit(self, job: SlideJob) -> None:
        started = time.perf_counter()
        try:
            job.writer.commit(replace=job.replace)
        except FAILURES as error:
            self._fail(job, error)
            return
        job.seconds["commit"] = time.perf_counter() - started
        log = {"seconds": job.seconds, "decoder": job.decoder, "host": os.uname().nodename}
        self.store.log(job.source.key, log)
        self._release(job)
        self.watchdog.finish(job.source)
        self.send(slide_event("done", job.source))

    def _fail(self, job: SlideJob, error: BaseException) -> None:
        job.failed = True
        try:
            self._record(job.source, error)
        finally:
            self._release(job)

    def _release(self, job: SlideJob) -> None:
        """Close the slide, remove its files that are not committed, and release its lease.

        All of it is done even if a part raises: a lease that is kept would make others wait.
        """
        self.jobs.discard(job)
        with ExitStack() as last_first:
            last_first.callback(job.finished.set)
            last_first.callback(job.lease.release)
            last_first.callback(job.slide.close)
            last_first.callback(job.writer.abort)

    def _record(self, source: Source, error: BaseException) -> None:
        """Write the failure of a slide to the store; raise an error that all slides would have."""
        if isinstance(error, OSError) and error.errno in FULL:
            raise error
        attempts = self._attempts_before(source) + 1
        note_failure(self.store.path, self.store.slug, source, error, attempts)
        self.watchdog.finish(source)
        self.send({**slide_event("failed", source), "message": str(error)})

    def _end_hung(self, source: Source) -> None:
        """Write down that a slide hangs, and end the process: its threads cannot be stopped."""
        try:
            self._record(source, hung_error(source, self.settings.slide_timeout_s))
        finally:
            os._exit(HUNG)

    def send(self, event: dict[str, Any]) -> None:
        """Send an event. It may wait for the receiver, which is no fault of a slide."""
        with self.watchdog.paused():
            self.emit(event)
