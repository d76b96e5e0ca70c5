"""Open and read mutated slides in this process, which must not crash or hang.

    python hostile_slides.py ORIGINALS SCRATCH FIRST LAST

takes the files of the folder ORIGINALS in turn, mutates copies by seeds FIRST to LAST - 1 and
prints the seed before a slide is used and the result after it. If the process crashes or hangs,
the last seed has no result.
"""

import faulthandler
import os
import resource
import sys
from pathlib import Path

import numpy as np

SECONDS = 20.0  # per file; the machine may be busy


def mutate(data: bytes, seed: int) -> bytes:
    """Damage a file in one of seven ways."""
    random = np.random.default_rng(seed)
    out = bytearray(data)
    size = len(out)

    def somewhere() -> int:
        """Return an offset: structure stands at the beginning and, in TIFF, often at the end."""
        return int(
            [random.integers(min(size, 1024)), size - 1 - random.integers(min(size, 8192)),
             random.integers(size)][random.choice(3, p=[0.5, 0.25, 0.25])]
        )  # fmt: skip

    way = seed % 7
    if way == 0:
        return bytes(out[: int(random.integers(size))])
    if way in (1, 2):
        for _ in range(int(random.choice([1, 4, 32]))):
            out[somewhere()] = int(random.integers(256))
    elif way in (3, 4):
        for _ in range(int(random.choice([1, 2, 6]))):
            at = somewhere() // 2 * 2
            value = random.choice([0, 1, 7, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1, size])
            width = int(random.choice([2, 4]))
            out[at : at + width] = (int(value) % 256**width).to_bytes(width, "little")
    elif way == 5:
        at, length = somewhere(), int(random.integers(1, max(2, size // 4)))
        out[at : at + length] = bytes(min(length, size - at))
    else:
        at, length = somewhere(), int(random.integers(1, 4096))
        out[at : at + length] = random.bytes(min(length, size - at))
    return bytes(out)


def use(path: Path) -> str:
    """Open a slide and read the parts that a tiling reads; return the reader or the reason."""
    from motet.io.errors import SlideError
    from motet.io.slides.open_slide import open_slide

    try:
        with open_slide(path) as slide:
            summary = slide.reader
            last = len(slide.levels) - 1
            for level in {0, last}:
                sides = slide.levels[level]
                slide.damaged(level)
                corners = np.array([[0, 0], [-9, -9], [sides.width // 2, sides.height // 2],
                                    [sides.width - 100, sides.height - 100]])  # fmt: skip
                for image in slide.read_many(level, corners, 256, 256, workers=2):
                    if isinstance(image, SlideError):
                        assert image.reason == "damaged", image
                        summary += " damaged"
                    else:
                        assert image.shape == (256, 256, 3)
                        assert image.dtype == np.uint8
            if max(slide.levels[last].width, slide.levels[last].height) < 4096:
                assert slide.thumbnail(300).shape[2] == 3
        return summary
    except SlideError as error:
        if error.reason not in ("unreadable", "unsupported", "too-large", "damaged"):
            raise
        return error.reason


def main() -> None:
    originals, scratch, first, last = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    files = sorted(path for path in originals.iterdir() if path.is_file())
    for seed in range(first, last):
        original = files[seed // 7 % len(files)]
        path = scratch / original.name
        path.write_bytes(mutate(original.read_bytes(), seed))
        print(seed, original.name, end=" ", flush=True)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        summary = use(path)
        faulthandler.cancel_dump_traceback_later()
        # VmHWM, because ru_maxrss starts at the peak of this process's parent.
        status = Path("/proc/self/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0]) >> 10
        assert peak < 1500, f"{peak} MiB"
        print(summary, flush=True)
        path.unlink()
    os._exit(0)  # run no exit handlers of C libraries that read mutated files


if __name__ == "__main__":
    main()
