"""Find the damaged tiles of a TIFF from their bytes, without decoding them.

Decoders do not say: from a JPEG tile with a hole libjpeg makes some picture without an error, and
cuCIM returns the pixels of another tile where one cannot be decoded at all. What a scan can prove:

* the range of a tile lies within the file;
* JPEG and JPEG 2000 tiles begin and end with their markers, and say the size that the file says;
* what follows 0xFF in coded data is what a coder may write there, so that other bytes in place of
  a few hundred are found out;
* no run of zero bytes is longer than the coding can give: in JPEG 32, which is more than a block of
  coefficients that are all -1, or, where the Huffman tables were made for the image, what its
  blocks could take together; a JPEG 2000 tile has at most one zero byte per empty packet; LZW would
  code the third zero otherwise;
* uncompressed RGB tiles are not black throughout.

Deflate carries a checksum that its decoder verifies: nothing is to be scanned but the ranges.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK_BYTES = 8 << 20  # read at once
THREADS = 2  # that scan; more would hold more chunks than they gain
GAP_BYTES = 1 << 16  # read along, rather than in two
HOLE_BYTES = 32  # in JPEG and LZW; a multiple of 8 that is at least 24, see `_holes`

Bytes = NDArray[np.uint8]
Index = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Tiles:
    """Where a level's tiles (or strips) lie in the file, and what they are."""

    offsets: Index
    counts: Index
    coding: str  # "jpeg" | "jpeg2000" | "lzw" | "packbits" | "deflate" | "none"
    sizes: frozenset[tuple[int, int]]  # (width, height) that tiles may have, in px
    raw_bytes: int  # of a decoded tile
    samples: int
    tables: bytes = b""  # JPEGTables
    sparse: bool = True  # tiles of no bytes were never scanned, and are white; else they are lost


@dataclass(frozen=True)
class Header:
    """What stands before a tile's coded data."""

    bytes: bytes
    hole: int  # so many zero bytes in a row are damage; 0 where zeros prove nothing
    plain: bool  # one run of coded data follows, up to the end marker
    size: tuple[int, int]  # (width, height)


def find_damaged(file: int, tiles: Tiles) -> NDArray[np.bool_]:
    """Tell which tiles are damaged.

    Args:
        file: its descriptor; it is read with pread, so that threads may share it.
        tiles: where they lie.

    Returns:
        bool [n], True where a tile is damaged.
    """
    offsets, counts = tiles.offsets, tiles.counts
    size = os.fstat(file).st_size
    most = 4 * tiles.raw_bytes + (1 << 16)  # no coder makes more of a tile
    bad = (counts < 0) | (offsets < 0) | (counts > most) | (offsets > size - counts)
    bad |= (counts == 0) & (not tiles.sparse)
    if tiles.coding == "none":
        bad |= (counts > 0) & (counts < tiles.raw_bytes) & (len(tiles.sizes) == 1)
    there = np.flatnonzero(~bad & (counts > 0))
    # Writers may store equal tiles once. Ranges that overlap otherwise are nobody's tiles.
    starts, first, which = np.unique(offsets[there], return_index=True, return_inverse=True)
    ends = starts + counts[there][first]
    found = np.zeros(len(starts), bool)
    overlap = starts[1:] < np.maximum.accumulate(ends)[:-1]
    found[1:] |= overlap
    found[:-1] |= overlap
    alone = np.flatnonzero(~found)
    check = {"jpeg": _check_coded, "jpeg2000": _check_coded, "lzw": _check_coded,
             "packbits": _check_coded, "none": _check_black}.get(tiles.coding)  # fmt: skip
    if check:
        found[alone] = check(file, tiles, starts[alone], ends[alone])
    bad[there] |= found[which] | (counts[there] != (ends - starts)[which])
    return bad


def parse_jpeg(data: bytes, tiles: Tiles) -> Header | None:
    """Read the segments before a JPEG's coded data; None where a decoder would refuse them.

    Args:
        data: the tile from its first byte.
        tiles: its sizes and JPEGTables.
    """
    zeros: dict[int, tuple[int, int]] = {}
    scales: set[int] = set()
    if tiles.tables:
        _segments(tiles.tables, zeros, scales)
    found = _segments(data, zeros, scales)
    if found is None:
        return None
    end, frame, scan = found
    count = tiles.samples
    if len(frame) != 7 + 3 * count or len(scan) < 6 or len(scan) != 4 + 2 * scan[0]:
        return None
    size = int.from_bytes(frame[4:6], "big"), int.from_bytes(frame[2:4], "big")
    if frame[1] != 8 or size not in tiles.sizes or frame[6] != count:
        return None
    factors = [divmod(factor, 16) for factor in frame[8::3]]
    if not all(1 <= h <= 4 and 1 <= v <= 4 for h, v in factors) or not {*frame[9::3]} <= scales:
        return None
    plain = frame[0] != 0xC2 and scan[0] == count
    if not plain:
        return Header(data[:end], 0, False, size)
    tables = [divmod(pair, 16) for pair in scan[2:-3:2]]
    known = all(dc in zeros and 16 + ac in zeros for dc, ac in tables)
    if not known or scan[1:-3:2] != frame[7::3] or scan[-3:] != b"\0?\0":
        return None
    return Header(data[:end], _jpeg_hole(size, factors, tables, zeros), True, size)


def _jpeg_hole(
    size: tuple[int, int],
    factors: list[tuple[int, int]],
    tables: list[tuple[int, int]],
    zeros: dict[int, tuple[int, int]],
) -> int:
    """Say how many zero bytes in a row are more than a JPEG can hold.

    By the tables of the standard zeros are coefficients of -1, 191 bits per block. Tables made for
    one image may have zeros for "no change" and "end of block", 2 bits or a few per block: then a
    run may be as long as all blocks of the tile together.
    """
    across, down = max(h for h, _ in factors), max(v for _, v in factors)
    units = -(-size[0] // (8 * across)) * -(-size[1] // (8 * down))
    bits = 0
    for (h, v), (dc, ac) in zip(factors, tables, strict=True):
        (dc_length, category), (ac_length, symbol) = zeros[dc], zeros[16 + ac]
        if symbol != 0:
            return HOLE_BYTES
        bits += units * h * v * (dc_length + category + ac_length)
    return max(HOLE_BYTES, bits // 8 + 2)


def _segments(
    data: bytes, zeros: dict[int, tuple[int, int]], scales: set[int]
) -> tuple[int, bytes, bytes] | None:
    """Walk from the first marker to the coded data.

    Args:
        data: of a tile, or JPEGTables.
        zeros: gets per Huffman table (AC: 16 more) what zero bits are: (length, symbol).
        scales: gets the numbers of the quantisation tables.

    Returns:
        Where coded data begins, the frame header after its marker's code, and the scan header; None
        without them.
    """
    at, frame = 2, b""
    while data[:2] == b"\xff\xd8" and at + 4 <= len(data):
        marker = data[at + 1]
        if data[at] != 0xFF:
            return None
        if marker == 0xFF:  # fill
            at += 1
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + length]
        if length < 2 or len(body) < length - 2:
            return None
        if marker == 0xC4:
            if not _huffman(body, zeros):
                return None
        elif marker == 0xDB:
            while body:
                entry = 1 + 64 * (1 + (body[0] >> 4))
                if body[0] >> 4 > 1 or body[0] & 15 > 3 or len(body) < entry:
                    return None
                scales.add(body[0] & 15)
                body = body[entry:]
        elif marker in (0xC0, 0xC1, 0xC2) and not frame:
            frame = bytes([marker]) + body
        elif marker == 0xDA:
            return (at + 2 + length, frame, body) if frame else None
        elif not (0xE0 <= marker <= 0xEF or marker == 0xFE or (marker == 0xDD and length == 4)):
            return None
        at += 2 + length
    return None


def _huffman(body: bytes, zeros: dict[int, tuple[int, int]]) -> bool:
    """Read the tables of a DHT segment; False where they are none."""
    while body:
        lengths, symbols = body[1:17], body[17 : 17 + sum(body[1:17])]
        if body[0] & 0xEF > 3 or len(symbols) != sum(lengths) or not symbols:
            return False
        if body[0] < 4 and max(symbols) > 15:
            return False
        code = 0
        for bits, codes in enumerate(lengths, 1):
            code = 2 * code + codes
            if codes and code >= 1 << bits:  # the code of ones alone is nobody's
                return False
        first = next(bits for bits, codes in enumerate(lengths, 1) if codes)
        zeros[body[0]] = first, symbols[0]
        body = body[17 + len(symbols) :]
    return True


def parse_jpeg2000(data: bytes, tiles: Tiles) -> Header | None:
    """Read the main and the first tile-part header of a codestream; None where they are not right.

    Args:
        data: the tile from its first byte.
        tiles: its sizes.
    """
    at, packets, plain, size = 2 if data[:2] == b"\xff\x4f" else len(data), 0, False, (0, 0)
    while at + 4 <= len(data):
        marker, length = data[at : at + 2], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == b"\xff\x93":  # SOD
            hole = packets + HOLE_BYTES if packets else 0
            return Header(data[: at + 2], hole, plain, size) if size in tiles.sizes else None
        body = data[at + 4 : at + 2 + length]
        if marker[0] != 0xFF or length < 2 or len(body) < length - 2:
            return None
        if marker == b"\xff\x51" and len(body) >= 37:  # SIZ
            edges = [int.from_bytes(body[i : i + 4], "big") for i in range(2, 18, 4)]
            size = edges[0] - edges[2], edges[1] - edges[3]
            samples = int.from_bytes(body[34:36], "big")
            if samples != tiles.samples or body[36] != 7:
                return None
        elif marker == b"\xff\x52" and len(body) >= 10 + (body[0] & 1) * (body[5] + 1):  # COD
            layers = int.from_bytes(body[2:4], "big")
            packets = layers * tiles.samples * _precincts(size, body)
        elif marker == b"\xff\x90" and len(body) >= 8:  # SOT
            part = int.from_bytes(body[2:6], "big")
            plain = part == 0 or at + part >= len(data) - 2
        at += 2 + length
    return None


def _precincts(size: tuple[int, int], cod: bytes) -> int:
    """Count the precincts of one component, over all its resolutions."""
    count, last = 0, min(cod[5], 32)
    for resolution in range(last + 1):
        sides = [ceil(side / 2 ** (last - resolution)) for side in size]
        shift = cod[10 + resolution] if cod[0] & 1 else 0xFF
        count += ceil(sides[0] / 2 ** (shift & 15)) * ceil(sides[1] / 2 ** (shift >> 4))
    return count


def _runs(starts: Index, ends: Index) -> Iterator[slice]:
    """Part sorted ranges into such as are read at once."""
    begin = 0
    while begin < len(starts):
        stop = int(np.searchsorted(starts, starts[begin] + CHUNK_BYTES))
        apart = starts[begin + 1 : stop] - ends[begin : stop - 1] > GAP_BYTES
        stop = begin + 1 + int(apart.argmax()) if apart.any() else stop
        yield slice(begin, stop)
        begin = stop


# What may follow 0xFF within coded data: a stuffed zero or a restart; in JPEG 2000 bit stuffing
# keeps it below 0x90, but for the markers of packets.
_FOLLOWS = {"jpeg": [0, *range(0xD0, 0xD8)], "jpeg2000": [*range(0x90), 0x91, 0x92]}
_PARSE: dict[str, Callable[[bytes, Tiles], Header | None]] = {
    "jpeg": parse_jpeg, "jpeg2000": parse_jpeg2000,
}  # fmt: skip


def _check_coded(file: int, tiles: Tiles, starts: Index, ends: Index) -> NDArray[np.bool_]:
    bad = np.zeros(len(starts), bool)
    common: Header | None = None  # most tiles of a file have the same

    def check(part: slice) -> None:
        nonlocal common
        base = int(starts[part.start])
        content = os.pread(file, int(ends[part].max()) - base, base)
        data = np.frombuffer(content, np.uint8)
        begin, end = starts[part] - base, ends[part] - base
        wrong = end > len(data)  # the file has been cut since
        begin, end = np.minimum(begin, len(data)), np.minimum(end, len(data))
        hole = np.full(len(begin), HOLE_BYTES)
        if tiles.coding in _PARSE:
            common = common or _first_header(content, begin, end, tiles)
            begin, end, hole, plain, lost = _bodies(content, data, begin, end, tiles, common)
            wrong |= lost
            wrong |= _follows_wrongly(data, begin, end, _FOLLOWS[tiles.coding]) & plain
        wrong |= _holes(data, begin, end, hole)
        bad[part] = wrong

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(check, _runs(starts, ends)))  # raises what a part raised
    return bad


def _first_header(content: bytes, begin: Index, end: Index, tiles: Tiles) -> Header | None:
    for a, b in zip(begin[:8], end[:8], strict=True):
        if found := _PARSE[tiles.coding](content[a:b], tiles):
            return found
    return None


def _bodies(
    content: bytes, data: Bytes, begin: Index, end: Index, tiles: Tiles, common: Header | None
) -> tuple[Index, Index, Index, NDArray[np.bool_], NDArray[np.bool_]]:
    """Find where coded data begins and ends, what its header says, and where markers lack."""
    n = len(begin)
    body, stop = begin.copy(), end - 2
    hole, plain, lost = np.zeros(n, np.int64), np.zeros(n, bool), end - begin < 4
    known = np.zeros(n, bool)
    if common:
        head = np.frombuffer(common.bytes, np.uint8)
        long = np.flatnonzero(end - begin >= len(head) + 2)
        if len(long):
            windows = np.lib.stride_tricks.sliding_window_view(data, len(head))
            known[long] = (windows[begin[long]] == head).all(1)
        body[known], hole[known], plain[known] = begin[known] + len(head), common.hole, common.plain
    for i in np.flatnonzero(~known & ~lost):
        a, b = int(begin[i]), int(end[i])
        header = _PARSE[tiles.coding](content[a:b], tiles)
        if header is None:
            lost[i] = True
        else:
            body[i], hole[i], plain[i] = a + len(header.bytes), header.hole, header.plain
    right = np.zeros(n, bool)
    whole = np.flatnonzero(~lost)
    right[whole] = (data[stop[whole]] == 0xFF) & (data[stop[whole] + 1] == 0xD9)
    for i in np.flatnonzero(~right & ~lost):  # bytes may follow the end marker, to fill up
        at = content.rfind(b"\xff\xd9", max(int(body[i]), int(end[i]) - 64), int(end[i]))
        if at < 0 or content[at + 2 : end[i]].strip(b"\0\xff"):
            lost[i] = True
        else:
            stop[i] = at
    return body, np.maximum(body, stop), hole, plain, lost


def _follows_wrongly(
    data: Bytes, begin: Index, end: Index, follows: list[int]
) -> NDArray[np.bool_]:
    """Tell in which ranges 0xFF is followed by what no coder writes there."""
    allowed = np.zeros(256, bool)
    allowed[follows] = True
    at = np.flatnonzero(data[:-1] == 0xFF)
    at = at[~allowed[data[at + 1]]]
    tile = np.searchsorted(begin, at, "right") - 1
    inside = (tile >= 0) & (at < end[tile])
    wrong = np.zeros(len(begin), bool)
    tile, first = np.unique(tile[inside], return_index=True)
    for i, position in zip(tile, at[inside][first], strict=True):
        rest = data[position : end[i]]
        filled = len(rest) < 16 and bool((rest == 0xFF).all())  # before the end marker
        wrong[i] = not filled
    return wrong


def _holes(data: Bytes, begin: Index, end: Index, hole: Index) -> NDArray[np.bool_]:
    """Tell which ranges hold a run of at least `hole` zero bytes, 0 for any."""
    wrong = np.zeros(len(begin), bool)
    # A run of 32 zero bytes holds three whole words of 8 or more: look at words first.
    words = data[: len(data) // 8 * 8].view(np.uint64)
    at = np.flatnonzero(words == 0)
    if not len(at):
        return wrong
    cuts = np.flatnonzero(np.diff(at) > 1)
    low = 8 * at[np.concatenate([[0], cuts + 1])]
    high = 8 * at[np.concatenate([cuts, [len(at) - 1]])] + 8
    low, high = low[high - low >= 24], high[high - low >= 24]
    for _ in range(7):
        low = low - ((low > 0) & (data[np.maximum(low - 1, 0)] == 0))
        high = high + ((high < len(data)) & (data[np.minimum(high, len(data) - 1)] == 0))
    since, until = np.searchsorted(high, begin, "right"), np.searchsorted(low, end, "left")
    for i in np.flatnonzero((until > since) & (hole > 0)):
        lows, highs = low[since[i] : until[i]], high[since[i] : until[i]]
        longest = (np.minimum(highs, end[i]) - np.maximum(lows, begin[i])).max()
        wrong[i] = longest >= hole[i]
    return wrong


def _check_black(file: int, tiles: Tiles, starts: Index, ends: Index) -> NDArray[np.bool_]:
    """Tell which uncompressed tiles are black throughout; with alpha or one channel all may be."""
    bad = np.zeros(len(starts), bool)
    if tiles.samples != 3:
        return bad
    for i, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        if not any(os.pread(file, min(64, end - start), (start + end) // 2)):
            bad[i] = not any(os.pread(file, end - start, start))
    return bad


def empty_tiles(offsets: Any, counts: Any) -> bool:
    """Tell whether some tile has no bytes at all."""
    return not (np.asarray(offsets).all() and np.asarray(counts).all())
