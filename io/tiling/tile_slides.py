"""Whole-slide images to a feature store: `tile_slides`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..errors import listed

if TYPE_CHECKING:
    from ..encoders.base import Encoder
    from ..store.read import FeatureStore
    from ..store.source import Source
    from .events import Emit
    from .pipeline import WorkerSettings


class Tiled(NamedTuple):
    """The result of `tile_slides`: numbers of slides."""

    slides: int
    """All slides of the call."""
    done: int
    """Slides that are stored with their features."""
    empty: int
    """Slides that are stored without a patch."""
    skipped: int
    """Slides of unknown resolution, with missing_mpp="skip"."""
    failed: dict[str, str]
    """Key to message, of the slides that failed."""
    patches: int
    """Patches embedded in this call."""
    without_mask: list[str]
    """Names of the slides for which `masks` has no mask: their tissue is searched."""
    not_taken: dict[str, str]
    """Path to reason, of what `slides` names or holds and is no slide."""

    def __str__(self) -> str:
        parts = [f"{self.slides} slide{'s'[: self.slides != 1]}: {self.done} done"]
        for count, state in ((self.empty, "empty"), (self.skipped, "skipped")):
            if count:
                parts.append(f"{count} {state}")
        if self.failed:
            parts.append(f"{len(self.failed)} failed")
        return ", ".join(parts)


def tile_slides(
    slides: str | PathLike[str] | Iterable[str | PathLike[str]],
    out: str | PathLike[str],
    *,
    encoder: str | Encoder,
    mpp: float | None = None,
    mag: float | None = None,
    downsample: float | None = None,
    mpp_tolerance: float = 0.02,
    tile_px: int = 256,
    border: Literal["drop", "shift", "pad"] = "drop",
    min_tissue: float = 0.1,
    tissue_threshold: float | None = None,
    drop: Sequence[str] = (),
    masks: str | PathLike[str] | None = None,
    slide_mpp: Mapping[str, float] | float | None = None,
    missing_mpp: Literal["fail", "skip"] = "fail",
    pseudonymise: str | PathLike[str] | None = None,
    reader: str = "auto",
    max_damaged: float = 0.5,
    device: str = "auto",
    precision: str = "auto",
    weights: str | PathLike[str] | None = None,
    compile: bool = False,
    redo: bool = False,
    batch: int = 64,
    workers: int = 1,
    slide_timeout: float = 600.0,
    shard: tuple[int, int] | None = None,
    ray: str | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> Tiled:
    """Cut slides into patches, embed those with tissue, and store the features, slide by slide.

    A call continues where an earlier one stopped, on any machine that sees the folder. Several
    calls at the same time share the work. If a slide fails, the reason is stored and the other
    slides go on; the next call tries it again. A slide without a patch is stored as empty.

    Args:
        slides: files, folders (searched with their subfolders), or lists of slides (.txt, or .csv
            with a column `path`, and the micrometres per level-0 pixel in a column `mpp` if it has
            one). "slide.tif#2" is the second of several slides in a file.
        out: folder of the store; its format is described in docs/reference/store-format.md.
        encoder: name as `load_encoder` takes it, or an Encoder, which needs `workers=0`.
        mpp: micrometres per pixel of a patch. Exactly one of mpp, mag and downsample is needed.
        mag: magnification; the same as mpp=10/mag.
        downsample: level-0 pixels per pixel of a patch, whatever the slide's resolution.
        mpp_tolerance: resolutions that differ by at most this share, 0 to 0.5, count as equal: the
            pixels of such a level are used as they are, and a slide may be coarser by that much.
        tile_px: width and height of a patch, pixels.
        border: patches that reach beyond the right or lower edge of the slide: "drop" leaves them
            out, "shift" moves them inwards, "pad" fills them with white.
        min_tissue: least share of a patch that must be tissue, 0 to 1.
        tissue_threshold: least contrast between tissue and glass, between 0 and 1, for slides on
            which Otsu's threshold misses pale tissue (lower it, to 0.02) or takes dirt for tissue
            (raise it, to 0.1); see `tissue_mask`.
        drop: flags of patches that are neither embedded nor stored: "pen", "blur" or both. Their
            number is in the attribute `counts` of the slide.
        masks: folder with the user's own masks of tissue; used instead of the tissue search. That
            of the slide "a/b.svs" is a/b.geojson or a/b.png, or b.geojson or b.png if no other
            slide has this stem. The tissue of slides without a mask is searched.
        slide_mpp: micrometres per level-0 pixel, used instead of what the files say: one value for
            all slides, or a dict from slide (key, name, file name or its stem) to value. A value of
            the dict wins over the list's column `mpp`, and that over one value for all.
        missing_mpp: a slide of unknown resolution is a failure ("fail") or left out ("skip").
        pseudonymise: a file outside of the store. The store, its report and exports then hold
            pseudonyms in place of names and paths; this file, which only you can read, maps them to
            the slides. It is created if it does not exist. Pass it again to continue.
        reader: "auto", or "libjpeg", "cucim", "openslide", "tifffile", "pillow" for all slides.
        max_damaged: a slide fails if more than this share of its patches, 0 to 1, lies on damaged
            tiles of the file; otherwise these patches are flagged and not embedded.
        device: device of the encoder: "auto", "cpu", "cuda" or "cuda:1".
        precision: "auto" (bf16 on CUDA, else fp32), "fp32", "bf16" or "fp16".
        weights: a file of weights for the encoder.
        compile: True compiles the encoder.
        redo: True does the slides of the store again that were made with other `masks`,
            `slide_mpp`, `reader` or `max_damaged`; features of other encoders are then removed from
            these slides. By default such a call is refused.
        batch: most patches per call of the encoder.
        workers: number of processes on this machine; GPUs are assigned to them in turn. 0 works
            inside this process, which then ends if a file crashes a C library. With ray: number of
            tasks, by default one per GPU.
        slide_timeout: a slide on which no progress is made for this many seconds counts as hung and
            fails. Without effect with workers=0: a process cannot end its threads.
        shard: (i, n), to do only the i-th of n parts, i from 0.
        ray: address of a Ray cluster; "auto" for that of this machine, "local" to start one. Paths
            must be valid on all machines of the cluster.
        progress: called with each event, a dict whose `event` is: begin, ready (encoder loaded),
            known (done before), start, warning (the file's mpp differs from the user's by more than
            2 %), patches, waiting, done, failed.

    Returns:
        The numbers of slides that are done, empty, skipped and failed.

    Raises:
        ValueError: an argument is wrong; there is no slide; two slides have the same key.
        StoreError: the folder holds a store of another specification, or of other pseudonyms.
        OSError: the store cannot be written, for example because the disk is full.

    Example:
        >>> import numpy as np, skimage.data
        >>> from PIL import Image
        >>> Image.fromarray(skimage.data.immunohistochemistry()).save("tissue.png")
        >>> options = {"encoder": "stain-stats", "downsample": 1, "tile_px": 128, "workers": 0}
        >>> print(motet.io.tile_slides("tissue.png", "tiled", **options))
        1 slide: 1 done
        >>> motet.io.FeatureStore("tiled")["tissue"].features.shape[0] > 5
        True
    """
    from ..store.failures import read_attempts, write_not_taken
    from ..store.read import FeatureStore
    from .grid import Tiling
    from .mask_files import find_masks
    from .pipeline import WorkerSettings
    from .slide_options import check_options

    tiling = _tiling_fields(
        mpp, mag, downsample, mpp_tolerance, tile_px, border, min_tissue, tissue_threshold, drop
    )
    _check(encoder, masks, missing_mpp, reader, max_damaged, batch, workers, on_ray=bool(ray))
    not_taken: dict[str, str] = {}
    all_sources = _find_sources(slides, not_taken)
    mask_of = {} if masks is None else find_masks(Path(masks), all_sources)
    sources = _shard(all_sources, shard)
    fingerprint, logs = None, None
    if pseudonymise is not None:
        sources, fingerprint, logs = _pseudonymise(sources, Path(pseudonymise), Path(out))
    settings = WorkerSettings(
        out=str(Path(out).absolute()),
        slides=[(str(source.path.absolute()), source.name) for source in sources],
        pseudonyms={source.name: source.pseudonym for source in sources if source.pseudonym},
        fingerprint=fingerprint,
        logs=logs,
        tiling=tiling,
        encoder=encoder if isinstance(encoder, str) else encoder.id,
        encoder_options={
            "device": device, "precision": precision, "compile": compile,
            "weights": None if weights is None else str(weights),
        },
        slide_mpp=_check_slide_mpp(slide_mpp),
        list_mpp={source.name: source.mpp for source in sources if source.mpp is not None},
        masks=None if masks is None else str(Path(masks).absolute()),
        mask_of=mask_of,
        redo=redo,
        reader=reader,
        max_damaged=max_damaged,
        decoders=max(1, len(os.sched_getaffinity(0)) // max(1, workers)),
        batch=batch,
        slide_timeout_s=_positive(slide_timeout, "slide_timeout") if workers or ray else None,
        retry=read_attempts(Path(out)),
    )  # fmt: skip
    if not redo:
        check_options(Path(out), Tiling(**tiling).hash, settings, sources)
    patches, slug = 0, ""

    def emit(event: dict[str, Any]) -> None:
        nonlocal patches, slug
        patches += event.get("patches", 0) if event["event"] == "patches" else 0
        slug = event["encoder"] if event["event"] == "ready" else slug
        if progress is not None:
            progress(event)

    total = sum(source.bytes for source in sources)
    without_mask = [
        source.name for source in sources if masks is not None and source.name not in mask_of
    ]
    emit({
        "event": "begin", "slides": len(sources), "bytes": total, "without_mask": without_mask,
        "not_taken": not_taken,
    })  # fmt: skip
    _run_workers(settings, encoder, workers, ray, emit)
    # Names of files stay out of a store with pseudonyms.
    write_not_taken(Path(out), {} if pseudonymise else not_taken)
    counts = _count_results(sources, FeatureStore(out, slug), missing_mpp)
    return Tiled(
        len(sources), **counts, patches=patches, without_mask=without_mask, not_taken=not_taken
    )


def _pseudonymise(sources: list[Source], file: Path, out: Path) -> tuple[list[Source], str, str]:
    """Return the slides with their pseudonyms, the fingerprint of these, and the folder of logs.

    Messages of C libraries name files, so they go beside the file of pseudonyms.
    """
    from ..store.pseudonyms import pseudonymise

    sources, fingerprint = pseudonymise(sources, file, out)
    logs = file.with_name(f"{file.name}.logs")
    logs.mkdir(mode=0o700, exist_ok=True)
    return sources, fingerprint, str(logs.absolute())


def _tiling_fields(
    mpp: float | None,
    mag: float | None,
    downsample: float | None,
    mpp_tolerance: float,
    tile_px: int,
    border: str,
    min_tissue: float,
    tissue_threshold: float | None,
    drop: Sequence[str],
) -> dict[str, Any]:
    """Return the fields of a `Tiling`, checked."""
    from .grid import Tiling

    tiling = {
        "mpp": 10 / _positive(mag, "mag") if mag is not None and mpp is None else mpp,
        "downsample": downsample, "tile_px": tile_px, "border": border, "min_tissue": min_tissue,
        "mpp_tolerance": mpp_tolerance, "tissue_threshold": tissue_threshold, "drop": drop,
    }  # fmt: skip
    if sum(value is not None for value in (mpp, mag, downsample)) != 1:
        raise ValueError("expected one of mpp, mag and downsample, got "
                         f"mpp={mpp}, mag={mag}, downsample={downsample}")  # fmt: skip
    return Tiling(**tiling).to_json()  # raises ValueError if a field is wrong


def _check(
    encoder: str | Encoder,
    masks: str | PathLike[str] | None,
    missing_mpp: str,
    reader: str,
    max_damaged: float,
    batch: int,
    workers: int,
    *,
    on_ray: bool,
) -> None:
    """Check the arguments that no other function checks; `on_ray` is True for a run on Ray."""
    from ..slides.open_slide import READERS

    _check_choice("missing_mpp", missing_mpp, ("fail", "skip"))
    _check_choice("reader", reader, ("auto", *READERS))
    if not 0 <= max_damaged <= 1:
        raise ValueError(f"max_damaged: expected 0 to 1, got {max_damaged}")
    for name, count, least in (("batch", batch, 1), ("workers", workers, 0)):
        if not isinstance(count, int) or count < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {count!r}")
    if not isinstance(encoder, str) and (workers or on_ray):
        raise ValueError("encoder: an object cannot be sent to other processes: set workers=0, or "
                         "pass a name, such as 'my.module:encode'")  # fmt: skip
    if masks is not None and not Path(masks).is_dir():
        raise ValueError(f"masks: expected a folder, got {str(masks)!r}")


def _find_sources(
    slides: str | PathLike[str] | Iterable[str | PathLike[str]], not_taken: dict[str, str]
) -> list[Source]:
    from .find_slides import find_slides

    paths = [slides] if isinstance(slides, str | PathLike) else slides
    sources = find_slides(paths, not_taken=not_taken)
    if not sources:
        reasons = "; not taken: " + listed(f"{path}: {why}" for path, why in not_taken.items())
        raise ValueError(f"slides: no slide in {slides}{reasons if not_taken else ''}")
    return sources


def _run_workers(
    settings: WorkerSettings, encoder: str | Encoder, workers: int, ray: str | None, emit: Emit
) -> None:
    """Run the workers on a Ray cluster, in child processes, or one worker in this process."""
    if ray is not None:
        from .workers import run_on_ray

        run_on_ray(settings, ray, workers if workers > 1 else None, emit)
    elif workers:
        from .workers import run_here

        run_here(settings, workers, emit)
    else:
        from .pipeline import work

        work(settings, emit, encoder=None if isinstance(encoder, str) else encoder)


def _count_results(sources: list[Source], store: FeatureStore, missing_mpp: str) -> dict[str, Any]:
    """Return `done`, `empty`, `skipped` and `failed` of Tiled, for the encoder of the store."""
    store.write_manifest()
    failures, states = store.failed, store.manifest().set_index("key")["status"]
    failed: dict[str, str] = {}
    counts = {"ok": 0, "empty": 0, "skipped": 0}
    for source in sources:
        failure = failures.get(source.key)
        if failure is None:
            counts[str(states[source.key])] += 1
        elif failure.get("reason") == "no-mpp" and missing_mpp == "skip":
            counts["skipped"] += 1
        else:
            failed[source.key] = str(failure.get("message"))
    return {
        "done": counts["ok"], "empty": counts["empty"], "skipped": counts["skipped"],
        "failed": failed,
    }  # fmt: skip


def _shard(sources: list[Source], shard: tuple[int, int] | None) -> list[Source]:
    """Return the slides of one part, the largest file first.

    The size of a compressed file is a good estimate of its tissue, hence of the work. Slides are
    assigned to the parts in turn, so the parts are of about the same size, and the slides that are
    done last are small ones, so workers end at about the same time.
    """
    sources = sorted(sources, key=lambda source: (-source.bytes, source.name))
    if shard is None:
        return sources
    i, n = shard
    if not 0 <= i < n:
        raise ValueError(f"shard: expected (i, n) with 0 <= i < n, got ({i}, {n})")
    return sources[i::n]


def _check_slide_mpp(
    slide_mpp: Mapping[str, float] | float | None,
) -> dict[str, float] | float | None:
    if slide_mpp is None:
        return None
    if isinstance(slide_mpp, Mapping):
        return {
            str(name): _positive(mpp, f"slide_mpp of {name}") for name, mpp in slide_mpp.items()
        }
    return _positive(slide_mpp, "slide_mpp")


def _positive(value: float, name: str) -> float:
    if not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a number above 0, got {value!r}")
    return float(value)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected {listed(choices)}, got {value!r}")
