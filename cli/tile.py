"""`motet tile`: its options, its progress bar, and the line at its end."""

import argparse
import csv
import json
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io.errors import counted
from .options import Commands, add_drop, add_json, add_out

if TYPE_CHECKING:
    from ..io.tiling.encode_patches import Encoded
    from ..io.tiling.tile_slides import Tiled


def add_tile(commands: Commands) -> None:
    """Add `motet tile`."""
    tile = commands.add_parser(
        "tile",
        help="cut slides into patches, encode them, and store the features",
        description="Cut slides into patches, encode those with tissue, and store the features "
        "(docs/how-to/slides.md). To continue after an interruption, give the same command again; "
        "several such commands at the same time share the work. Exit code 3: some slides failed "
        "(with --strict also: some paths were not taken).",
    )
    tile.add_argument(
        "slides", nargs="+", metavar="SLIDES",
        help="slide files, folders, or lists of paths (.txt; .csv with a column path, and mpp if "
        "it has one); FILE#2 is the second of several slides in a file",
    )  # fmt: skip
    add_out(tile, "folder of the store")
    tile.add_argument(
        "--encoder", required=True,
        help="stain-stats (built in), torchvision:resnet50, timm:NAME, hf:REPO or hf:FOLDER, "
        "export:FILE.pt2, or MODULE:CALLABLE (docs/how-to/encoders.md)",
    )  # fmt: skip
    _add_patches(tile)
    _add_work(tile)
    add_json(tile)
    tile.set_defaults(run=_tile, default_of=tile.get_default)


def _add_patches(tile: argparse.ArgumentParser) -> None:
    """Add the options that determine the patches."""
    resolution = tile.add_mutually_exclusive_group()
    resolution.add_argument("--mpp", type=float, metavar="UM", help="micrometres per patch pixel")
    resolution.add_argument(
        "--mag", type=float, metavar="X", help="magnification; the same as --mpp 10/X"
    )
    resolution.add_argument(
        "--downsample", type=float, metavar="F", help="level-0 pixels per patch pixel"
    )
    tile.add_argument(
        "--mpp-tolerance", type=float, default=0.02, metavar="SHARE",
        help="resolutions that differ by at most this share count as equal: pixels are then used "
        "as they are, and a slide may be coarser by that much (default: 0.02)",
    )  # fmt: skip
    tile.add_argument(
        "--bags", choices=("folder",),
        help="SLIDES are folders of patches that are images already; each folder is one bag",
    )  # fmt: skip
    tile.add_argument(
        "--tile-px", type=int, default=256, metavar="N", help="patch size in pixels (default: 256)"
    )
    tile.add_argument(
        "--border", default="drop", choices=("drop", "shift", "pad"),
        help="drop, shift or pad patches that cross the slide's right or lower border (default: "
        "drop)",
    )  # fmt: skip
    tile.add_argument(
        "--min-tissue", type=float, default=0.1, metavar="SHARE",
        help="keep patches with at least this share of tissue (default: 0.1)",
    )  # fmt: skip
    tile.add_argument(
        "--tissue-threshold", type=float, metavar="CONTRAST",
        help="least contrast of tissue to the glass, between 0 and 1: 0.02 for pale tissue, 0.1 "
        "to leave out dirt (default: chosen for each slide, 0.025 to 0.07)",
    )  # fmt: skip
    add_drop(tile, "leave out patches with these flags, do not embed them: pen, blur, or both")
    tile.add_argument(
        "--masks", type=Path, metavar="DIR",
        help="folder of tissue masks: a/b.geojson or a/b.png for the slide a/b.svs, or b.geojson "
        "or b.png if no other slide has this stem",
    )  # fmt: skip
    tile.add_argument(
        "--slide-mpp", metavar="UM|CSV",
        help="micrometres per level-0 pixel, used instead of what the files say: a number for all "
        "slides, or a CSV file with columns slide and mpp",
    )  # fmt: skip
    tile.add_argument(
        "--missing-mpp", default="fail", choices=("fail", "skip"),
        help="whether slides of unknown resolution fail or are skipped (default: fail)",
    )  # fmt: skip
    tile.add_argument(
        "--reader", default="auto",
        choices=("auto", "libjpeg", "cucim", "openslide", "tifffile", "pillow"),
        help="library that reads the slides (default: auto)",
    )  # fmt: skip
    tile.add_argument(
        "--max-damaged", type=float, default=0.5, metavar="SHARE",
        help="a slide fails if more than this share of its patches is damaged (default: 0.5)",
    )  # fmt: skip


def _add_work(tile: argparse.ArgumentParser) -> None:
    """Add the options that determine how the work is done."""
    tile.add_argument("--device", default="auto", help="device of the encoder (default: auto)")
    tile.add_argument(
        "--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"),
        help="precision of the encoder (default: auto)",
    )  # fmt: skip
    tile.add_argument("--weights", type=Path, metavar="FILE", help="weights of the encoder")
    tile.add_argument("--compile", action="store_true", help="compile the encoder")
    tile.add_argument(
        "--redo", action="store_true",
        help="do the slides again that were made with other --masks, --slide-mpp, --reader or "
        "--max-damaged",
    )  # fmt: skip
    tile.add_argument(
        "--batch", type=int, default=64, metavar="N", help="patches per batch (default: 64)"
    )
    tile.add_argument(
        "--workers", type=int, default=1, metavar="N",
        help="number of processes, each with a GPU if there are GPUs (default: 1)",
    )  # fmt: skip
    tile.add_argument(
        "--slide-timeout", type=float, default=600.0, metavar="S",
        help="a slide without progress for this many seconds counts as hung and fails (default: "
        "600)",
    )  # fmt: skip
    tile.add_argument(
        "--shard", metavar="I/N", help="divide the slides into N parts, tile part I (from 0)"
    )
    tile.add_argument(
        "--ray", metavar="ADDRESS", help="run on a Ray cluster: auto, local or its address"
    )
    tile.add_argument(
        "--strict", action="store_true",
        help="exit code 3 also if something in SLIDES is not taken: no slide by its extension, "
        "unreadable, a link to nothing or to a slide that is taken",
    )  # fmt: skip
    tile.add_argument(
        "--no-report", action="store_true", help="write no report (pictures and tables)"
    )
    tile.add_argument(
        "--show-labels", action="store_true",
        help="show label and macro images of the slides, which may name patients, in the report",
    )  # fmt: skip
    tile.add_argument(
        "--pseudonymise", type=Path, metavar="FILE",
        help="name slides by pseudonyms in the store and the report; FILE, outside of the store, "
        "maps them to the slides (docs/concepts/stores.md)",
    )  # fmt: skip


def _tile(options: argparse.Namespace) -> int:
    from ..io import tile_slides

    if options.show_labels and options.pseudonymise:
        raise ValueError("--show-labels: not with --pseudonymise: labels may name patients")
    if options.bags:
        return _encode_bags(options)
    started = time.perf_counter()
    passed = ("encoder", "mpp", "mag", "downsample", "mpp_tolerance", "tile_px", "border",
              "min_tissue", "tissue_threshold", "drop", "masks", "missing_mpp", "reader",
              "max_damaged", "device", "precision", "weights", "compile", "batch", "workers",
              "slide_timeout", "redo", "ray")  # fmt: skip
    progress = Progress()
    with closing(progress):
        tiled = tile_slides(
            options.slides,
            options.out,
            slide_mpp=read_slide_mpp(options.slide_mpp) if options.slide_mpp else None,
            shard=read_shard(options.shard) if options.shard else None,
            pseudonymise=options.pseudonymise,
            progress=progress,
            **{name: getattr(options, name) for name in passed},
        )
    return _finish(options, tiled, progress, time.perf_counter() - started)


NOT_OF_BAGS = (
    "mpp", "mag", "downsample", "mpp_tolerance", "tile_px", "border", "min_tissue",
    "tissue_threshold", "drop", "masks", "slide_mpp", "missing_mpp", "reader", "max_damaged",
    "redo", "workers", "slide_timeout", "shard", "ray", "pseudonymise", "show_labels",
)  # fmt: skip
"""The options that have no effect on bags."""


def _encode_bags(options: argparse.Namespace) -> int:
    """Encode the patches of `motet tile --bags folder`."""
    from ..io import encode_patches

    for name in NOT_OF_BAGS:
        if getattr(options, name) != options.default_of(name):
            raise ValueError(
                f"--{name.replace('_', '-')}: one process takes the patches of --bags as they are: "
                "leave it out"
            )
    started = time.perf_counter()
    progress = Progress()
    with closing(progress):
        encoded = encode_patches(
            options.slides, options.out, progress=progress,
            **{name: getattr(options, name)
               for name in ("encoder", "batch", "device", "precision", "weights", "compile")},
        )  # fmt: skip
    return _finish(options, encoded, progress, time.perf_counter() - started)


def _finish(
    options: argparse.Namespace, tiled: "Tiled | Encoded", progress: "Progress", seconds: float
) -> int:
    """Write the report, print the last line, and return the exit code."""
    if not options.no_report:
        from ..io.tiling.report.write_report import write_report

        write_report(options.out, labels=options.show_labels)
    if options.json:
        result = {**tiled._asdict(), "seconds": seconds, "encoder_waits": progress.encoder_waits}
        print(json.dumps({**result, "out": str(options.out)}))
    else:
        print(last_line(tiled, options.out, seconds, progress.encoder_waits))
    return 3 if tiled.failed or (options.strict and tiled.not_taken) else 0


class Progress:
    """A progress bar on a terminal; in a pipe, only a line for each slide that failed.

    Progress is measured in bytes of slides: the largest slides come first.
    """

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.patches = self.slides = self.failed = 0
        self.finished: set[str] = set()
        self.decode_s = self.encode_s = 0.0
        self.bar: Any = None

    def __call__(self, event: dict[str, Any]) -> None:
        """Handle an event of `tile_slides`."""
        from tqdm import tqdm

        kind = event["event"]
        if kind == "begin":
            self.slides = event["slides"]
            self.bar = tqdm(
                total=event["bytes"], unit="B", unit_scale=True, disable=None, file=sys.stderr,
                bar_format="{percentage:3.0f}% |{bar}| {desc}, {elapsed} so far, {remaining} left",
            )  # fmt: skip
            for line in notes(event["not_taken"], event["without_mask"]):
                self.bar.write(line, file=sys.stderr)
        elif kind == "patches":
            self.patches += event["patches"]
            self.decode_s += event["decode_s"]
            self.encode_s += event["encode_s"]
        elif kind in ("known", "done", "failed") and event["key"] not in self.finished:
            self.finished.add(event["key"])  # several workers may report a slide
            self.bar.update(event["bytes"])
        if kind == "failed":
            self.failed += 1
        if kind in ("failed", "warning"):
            self.bar.write(f"{kind}: {event['message']}", file=sys.stderr)
        self.bar.set_description_str(self.describe(), refresh=False)
        self.bar.update(0)

    def describe(self) -> str:
        """Return the text of the bar: slides, patches per second, and how long encoders wait."""
        text = f"{len(self.finished)}/{self.slides} slides"
        if self.failed:
            text += f" ({self.failed} failed)"
        if self.patches:
            rate = self.patches / (time.perf_counter() - self.started)
            text += f", {rate:,.0f} patches/s"
        if self.encoder_waits is not None:
            text += f", encoder waits {self.encoder_waits:.0%} of the time"
        return text

    @property
    def encoder_waits(self) -> float | None:
        """Return the share of the time that encoders waited for pixels; None without patches."""
        total = self.decode_s + self.encode_s
        return self.decode_s / total if total else None

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def notes(not_taken: dict[str, str], without_mask: list[str]) -> list[str]:
    """Return the lines that are printed first: what is not taken, by reason, and missing masks."""
    paths_of: dict[str, list[str]] = {}
    for path, reason in not_taken.items():
        paths_of.setdefault(reason, []).append(" ".join(path.split()))
    lines = [f"not taken: {counted(paths, 'path')}: {why}" for why, paths in paths_of.items()]
    if len(lines) > 10:
        lines[9:] = [f"not taken: {len(lines) - 9} more reasons, in not_taken.json of the store"]
    if without_mask:
        lines.append(f"no mask: {counted(without_mask, 'slide')}; tissue is searched on them")
    return lines


def last_line(
    tiled: "Tiled | Encoded", out: Path, seconds: float, encoder_waits: float | None
) -> str:
    """Return the line that is printed at the end."""
    text = f"{tiled}; {tiled.patches:,} patches embedded in {seconds:.1f} s"
    if tiled.patches:
        text += f" ({tiled.patches / seconds:,.0f}/s)"
    if encoder_waits is not None:
        text += f", the encoder waited {encoder_waits:.0%} of the time"
    if tiled.not_taken:
        text += f"; {len(tiled.not_taken)} not taken"
    return f"{text}: {out}"


def read_slide_mpp(text: str) -> dict[str, float] | float:
    """Read --slide-mpp: a number, or a CSV file with the columns slide and mpp.

    Raises:
        ValueError: neither.
    """
    try:
        return float(text)
    except ValueError:
        pass
    mpp_of_slide: dict[str, float] = {}
    with open(text, newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        if not {"slide", "mpp"} <= set(table.fieldnames or ()):
            raise ValueError(f"--slide-mpp: {text}: expected the columns slide and mpp, got "
                             f"{', '.join(table.fieldnames or ()) or 'none'}")  # fmt: skip
        for number, row in enumerate(table, 2):
            try:
                mpp_of_slide[row["slide"]] = float(row["mpp"])
            except (TypeError, ValueError):
                raise ValueError(
                    f"--slide-mpp: {text}, line {number}: mpp: expected a number, "
                    f"got {row['mpp']!r}"
                ) from None
    return mpp_of_slide


def read_shard(text: str) -> tuple[int, int]:
    """Read --shard: i/n.

    Raises:
        ValueError: another form, or i not below n.
    """
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise ValueError(f"--shard: expected i/n with i from 0 to n - 1, got {text!r}")
    return int(i), int(n)
